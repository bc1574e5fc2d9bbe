"""``make bench-check``: a short run here beside what is committed in benchmarks/results/, as ratios.

``python -m benchmarks.compare`` times again, briefly, some of what the committed files hold for this kind of device: of
each file the first dtype, of single layers every fourth. It prints fresh speed / committed speed of all that both have,
and says where the machine is another one: then the ratios say nothing about the code. It judges nothing: exit status 0,
or 2 where there is nothing to compare with. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import figures, report, suite
from resnet_fast.commands import CommandError, machine, tables
from resnet_fast.dispatch import BACKENDS

ROOT = report.ROOT
Result = dict[str, Any]


def speeds(result: Result) -> dict[str, float]:
    """Every speed in a result, by what was measured: images per second of networks, calls per second of ops."""
    found: dict[str, float] = {}
    for s in result.get("speed", ()):
        for c in s["contenders"]:
            if c["images_per_second"]:
                key = f"{result['model']['name']} {s['mode']} {s['dtype']} batch {s['batch']} {c['name']}"
                found[key] = c["images_per_second"]
    for r in result.get("records", ()):
        if r.get("images_per_second"):
            key = f"{r['network']} {r['mode']} {r['dtype']} batch {r['batch']} {r['contender']} ({r['group']})"
            found[key] = r["images_per_second"]
        elif "op" in r and r.get("ms_p50"):
            found[f"{r['op']} {r['variant']} {r['case']} {r['dtype']} batch {r['batch']} {r['contender']}"] = (
                1e3 / r["ms_p50"]
            )
    return found


def kind(result: Result) -> str:
    """The device type that a result is of."""
    if "suite" in result:
        return "cuda" if figures.on_gpu(result) else "cpu"
    return str(result["speed"][0]["device"]) if result.get("speed") else "none"


def differences(old: Result, new: Result) -> list[str]:
    """In what the two machines differ, in words; what a speed depends on."""
    found = []
    for name in ("cpu", "cores", "threads", "isa"):
        if old[name] != new[name]:
            found.append(f"{name}: {old[name]} then, {new[name]} now")
    gpus = [[g["name"] for g in r["gpus"]] for r in (old, new)]
    if gpus[0] != gpus[1]:
        found.append(f"gpus: {', '.join(gpus[0]) or 'none'} then, {', '.join(gpus[1]) or 'none'} now")
    return found


def rows(old: Result, new: Result) -> list[tuple[str, float, float, float]]:
    """What was measured, committed and fresh speed, and fresh / committed."""
    before, now = speeds(old), speeds(new)
    return [(key, before[key], now[key], now[key] / before[key]) for key in before if key in now]


_PLAIN = ("channels_last", "eager")


def gains(result: Result) -> dict[str, float]:
    """Speed of each of our contenders by that of plain torch in the same run, by what was measured."""
    settings: dict[str, dict[str, float]] = {}
    for key, speed in speeds(result).items():
        setting, name, group = re.fullmatch(r"(.*) ([^\s(]\S*)( \(\S+\))?", key).groups(default="")  # type: ignore[union-attr]
        settings.setdefault(setting + group, {})[name] = speed
    found = {}
    for setting, by_name in settings.items():
        base = next((by_name[name] for name in _PLAIN if name in by_name), None)
        ours = [name for name in by_name if name in ("resnet_fast", *BACKENDS)]
        found.update({f"{setting} {name}": by_name[name] / base for name in ours if base})
    return found


def text(old: Result, new: Result) -> str:
    """The comparison as it is printed."""
    found = rows(old, new)
    lines = [f"{old['file']}, commit {old['commit']}, {old['date'][:10]}: {len(found)} numbers measured again"]
    apart = differences(old, new)
    if apart:
        lines.append("  ANOTHER MACHINE TYPE: the ratios say nothing about the code")
        lines += [f"    {line}" for line in apart]
    if old["versions"]["torch"] != new["versions"]["torch"]:
        lines.append(f"  torch {old['versions']['torch']} then, {new['versions']['torch']} now")
    cells = [["", "committed", "fresh", "fresh / committed"]]
    cells += [[key, f"{a:.4g}/s", f"{b:.4g}/s", f"{ratio:.2f}"] for key, a, b, ratio in found]
    if found:
        ratios = sorted(ratio for *_, ratio in found)
        lines.append(tables.table(cells, right=(1, 2, 3)))
        lines.append(f"  median {median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    before, now = gains(old), gains(new)
    both = [key for key in before if key in now]
    if both:  # the machine's own ups and downs cancel
        then, fresh, change = (
            median(values) for values in zip(*((before[k], now[k], now[k] / before[k]) for k in both), strict=True)
        )
        lines.append(
            f"  ours beside plain torch in the same run: {then:.2f}x then, {fresh:.2f}x now, {change:.2f} of it"
        )
    return "\n".join(lines)


#: Of a suite's ops every so many-th layer is timed, of ``resnet-fast bench`` the first dtype in so many rounds.
_EVERY, _ROUNDS = 4, 3


def commands(old: Result, file: Path, seconds: float) -> list[str]:
    """What measures again, briefly, what ``old`` holds, into ``file``; arguments of python."""
    if "suite" in old:
        return [
            "-m", "benchmarks.suite", "--device", kind(old), "--output", str(file.parent), "--seconds", str(seconds),
            "--part", "ops", "--every", str(_EVERY), "--threads", str(old["threads"]),
        ]  # fmt: skip
    if "train" in old:
        name = str(old["model"]["name"]).partition(",")[0]
        amp = ["--amp", "bf16"] if old["speed"][0]["dtype"] == "bfloat16" else []
        return ["-m", "benchmarks.train_command", name, *amp, "--rounds", "1", "--output", str(file)]
    first = old["speed"][0]
    ours = {c["name"] for c in first["contenders"]} & {"channels_last"}
    batches = dict.fromkeys(str(s["batch"]) for s in old["speed"] if s["dtype"] == first["dtype"])
    return [
        "-m", "resnet_fast", "bench", "--model", old["model"]["name"], "--mode", first["mode"],
        "--device", first["device"], "--size", str(first["size"]), "--against", ",".join(ours) or first["baseline"],
        "--batch", ",".join(batches), "--dtype", first["dtype"], "--threads", str(old["threads"]),
        "--rounds", str(_ROUNDS), "--json", str(file),
    ]  # fmt: skip


def fresh(old: Result, seconds: float, folder: Path) -> Result:
    """The same measurements, briefly. Raises CommandError where the run fails."""
    file = folder / (suite.RESULT if "suite" in old else old["file"])
    done = subprocess.run([sys.executable, *commands(old, file, seconds)], cwd=ROOT, stdout=subprocess.DEVNULL)
    if not file.is_file():
        raise CommandError(f"{old['file']}: the fresh run ended with {done.returncode} and without a result")
    return dict(json.loads(file.read_text()))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 where nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("files", nargs="*", help="names in benchmarks/results (default: all of this kind of device)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="for a suite; others time a few rounds (default: %(default)g)"
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        every = [r for r in report.load(args.results) if not args.files or r["file"] in args.files]
        chosen = [r for r in every if kind(r) == device]
        if not chosen:
            raise CommandError(f"benchmarks/results holds nothing measured on this kind of device ({device})")
        now = machine.provenance([])
        print(f"this machine: {figures.machine({**now, 'suite': 1})}", flush=True)
        compared = 0
        for old in chosen:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    print(f"\n{text(old, fresh(old, args.seconds, Path(folder)))}", flush=True)
                    compared += 1
                except CommandError as error:  # the other files are of use without it
                    print(f"bench-check: {error}", file=sys.stderr)
        if not compared:
            return 2
    except CommandError as error:
        print(f"bench-check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench-check: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
