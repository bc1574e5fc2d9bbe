"""The measurements on one machine, in parts, within a time: ``python -m benchmarks.suite --output DIR``.

Each part (ceilings, ops, training, inference, fusions, memory; ``benchmarks.parts``) runs in a process of its own,
which is ended at its deadline and started again, without the item that it was at, where it dies. Every item is written
to DIR/bench.jsonl when it is measured; after every part, and after an interruption, DIR/bench.json and DIR/bench.csv
hold what there is, with machine, versions, commit, clocks and date, and what failed or was left out. Parts of earlier
runs in the same folder are kept. ``python -m benchmarks.report`` draws bench.json once it lies in benchmarks/results/.
On a CPU it needs half an hour: ``--device cpu --seconds 1800``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import parts, roofline
from benchmarks.items import Settings
from resnet_fast.commands import machine

ROOT = Path(__file__).resolve().parents[1]
LINES, RESULT, TABLE = "bench.jsonl", "bench.json", "bench.csv"
_GRACE = 10.0  # s after its deadline that a part's process has to end by itself
_RESTARTS = 5  # of a part whose process dies

Record = dict[str, Any]


# ---- the file of lines


def append(file: Path, line: Record) -> None:
    """Write one line, whole, now: what is written stays, whatever happens next."""
    with file.open("a") as f:
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read(file: Path) -> list[Record]:
    """Every whole line; the last one may have been cut off."""
    lines = []
    for text in file.read_text().splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def of_run(lines: Iterable[Record], run: str, part: str) -> dict[str, Record]:
    """The last state of each item of a part in one run."""
    return {
        line["item"]: line for line in lines if (line.get("run"), line.get("part")) == (run, part) and "item" in line
    }


# ---- the machine


def clocks() -> Record | None:
    """What nvidia-smi says of clocks (MHz), temperature (C) and power (W) now; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (v.strip() for v in done.stdout.strip().split(",")), strict=False))


def provenance(argv: Sequence[str], commit: str | None) -> Record:
    """``machine.provenance`` of this command. ``commit``: of a tree that is no checkout."""
    record = machine.provenance(argv)
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return {
        **record,
        "command": shlex.join(["python", "-m", "benchmarks.suite", *words]),
        "commit": record["commit"] or commit,
    }


# ---- parts, each in a process


def _child(args: argparse.Namespace) -> int:
    """Measure one part; called in a process of its own."""
    file = args.output / LINES
    settings = Settings(torch.device(args.device), args.tiny, args.every)
    if args.threads:
        torch.set_num_threads(args.threads)

    def tell(line: Record) -> None:
        append(file, {"run": args.run, "part": args.child, **line})

    skip = [key for key, line in of_run(read(file), args.run, args.child).items() if line["state"] != "left out"]
    try:
        parts.run(args.child, settings, args.deadline, skip, tell)
    except KeyboardInterrupt:  # the parent has it, too, and says so
        return 130
    return 0


def _run_part(part: str, args: argparse.Namespace, run: str, deadline: float) -> None:
    """Run a part until it is through or ``deadline`` (time.time()) has come."""
    file = args.output / LINES
    command = [
        sys.executable, "-m", "benchmarks.suite", "--child", part, "--run", run, "--deadline", str(deadline),
        "--output", str(args.output), "--device", args.device, "--threads", str(args.threads or 0),
    ]  # fmt: skip
    command += ["--every", str(args.every), *(["--tiny"] if args.tiny else [])]
    for _ in range(_RESTARTS):
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            status: int | None = process.wait(timeout=max(deadline - time.time(), 0) + _GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        except BaseException:  # Ctrl-C: the child has it too
            process.kill()
            process.wait()
            raise
        reason = "was cut off at the end of its part's time" if status is None else f"its process ended with {status}"
        for key, line in of_run(read(file), run, part).items():
            if line["state"] == "begin":
                append(file, {"run": run, "part": part, "item": key, "state": "failed", "reason": reason})
        if status == 0 or time.time() > deadline - 1:
            return


# ---- what comes of it


_COLUMNS = (
    "part", "ceiling", "network", "mode", "op", "variant", "direction", "case", "count", "batch", "size", "dtype",
    "group", "contender", "memory", "ms_p20", "ms_p50", "ms_p80", "rounds", "images_per_second", "ratio", "rate",
    "bytes_per_second", "flops_per_second", "share", "peak_bytes", "saved_bytes", "limit", "failed",
)  # fmt: skip


def collect(lines: Sequence[Record]) -> Record:
    """The result of the newest run of each part: {provenance, "records", "failed", "left_out", "passed"}.

    Ops get bytes and FLOP per second, and the share of the ceiling that bounds them, measured on the same machine.
    """
    heads = {line["run"]: line["head"] for line in lines if "head" in line}
    newest = {line["part"]: line["run"] for line in lines if "item" in line}
    records: list[Record] = []
    failed, left_out = [], []
    ceilings = _ceilings(lines)
    for part, run in newest.items():
        for key, line in of_run(lines, run, part).items():
            if line["state"] == "done":
                records += [_rates({"part": part, **r}, ceilings) for r in line["records"]]
            elif line["state"] == "left out":
                left_out.append({"item": key, "reason": line["reason"]})
            else:
                failed.append({"item": key, "reason": line.get("reason", "was cut off")})
    last = heads[newest["ceilings"]] if "ceilings" in newest else next(iter(heads.values()))
    checks = [r for r in records if "equality" in r]
    return {
        "schema": 1,
        "suite": 1,
        **last,
        "runs": {part: {k: heads[run].get(k) for k in ("command", "commit", "date")} for part, run in newest.items()},
        "ceilings": ceilings,
        "clocks": [line["clocks"] for line in lines if line.get("clocks")],
        "passed": all(c["ok"] for c in checks),
        "checked": sorted({c["equality"] for c in checks}),
        "records": records,
        "failed": failed,
        "left_out": left_out,
    }


def _ceilings(lines: Iterable[Record]) -> dict[str, float]:
    """The highest that any run in this folder reached: a ceiling measured while the machine was busy is none."""
    found: dict[str, float] = {}
    for line in lines:
        if line.get("part") == "ceilings" and line.get("state") == "done":
            for r in line["records"]:
                found[r["ceiling"]] = max(r["rate"], found.get(r["ceiling"], 0.0))
    return found


def _rates(record: Record, ceilings: dict[str, float]) -> Record:
    if "bytes" not in record or "ms_p50" not in record or "op" not in record:
        return record
    seconds = record["ms_p50"] / 1e3
    found = {**record, "bytes_per_second": record["bytes"] / seconds, "flops_per_second": record["flops"] / seconds}
    if len(ceilings) == 2:
        # Of the same run, but the product's dtype: float32 ops on a GPU may use other units than its bfloat16.
        bound = roofline.Cost(record["bytes"], record["flops"])
        least = bound.seconds(roofline.Ceilings(ceilings["copy"], ceilings["product"]))
        found["share"] = least / seconds
    return found


def write(folder: Path) -> Record:
    """bench.json and bench.csv of bench.jsonl."""
    result = collect(read(folder / LINES))
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    with (folder / TABLE).open("w", newline="") as f:
        f.write(f"# {stamp(result)}\n")
        writer = csv.DictWriter(f, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(r for r in result["records"] if "equality" not in r)
    return result


def stamp(result: Record) -> str:
    """Where the numbers come from, in a line."""
    gpu = f"{result['gpus'][0]['name']}, driver {result['versions']['driver']}; " if result["gpus"] else ""
    versions = result["versions"]
    return (
        f"{gpu}{result['cpu']}, {result['threads']} threads; torch {versions['torch']}, triton {versions['triton']}, "
        f"resnet_fast {versions['resnet_fast']}, commit {result['commit']}, {result['date'][:10]}; {result['command']}"
    )


def summary(result: Record) -> str:
    """A few lines for the end of a run: ceilings, ratios, what is missing."""
    lines = [stamp(result)]
    for name, rate in result["ceilings"].items():
        unit, scale = ("GB/s", 1e9) if name == "copy" else ("TFLOP/s", 1e12)
        lines.append(f"  {name:10} {rate / scale:10.2f} {unit}")
    for r in result["records"]:
        if r.get("images_per_second"):
            ratio = f"{r['ratio']:.2f}" if r["ratio"] else "-"
            lines.append(
                f"  {r['mode']:9} {r['network']:22} {r['dtype']:8} batch {r['batch']:<4} {r['contender']:20} "
                f"{r['images_per_second']:10.1f} img/s  x{ratio}"
            )
    shares: dict[tuple[str, str], list[float]] = {}
    for r in result["records"]:
        if r.get("share"):
            shares.setdefault((r["op"], r["contender"]), []).append(r["share"])
    for (op, contender), values in shares.items():
        middle = sorted(values)[len(values) // 2]
        lines.append(f"  {op:24} {contender:15} {len(values):3d} cases, median {middle:.0%} of its ceiling")
    lines.append(
        f"equality: {', '.join(result['checked']) or 'not checked'}: {'passed' if result['passed'] else 'NOT EQUAL'}"
    )
    lines += [f"  failed: {f['item']}: {f['reason']}" for f in result["failed"][:12]]
    lines.append(
        f"{len(result['records'])} records, {len(result['failed'])} failed, {len(result['left_out'])} left out"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 if the numbers are not equal or nothing was measured; 2 for a wrong command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--part", choices=parts.PARTS[1:], help="one part alone, after the ceilings (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything (default: %(default)g)")
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: left as they are)")
    parser.add_argument("--commit", help="of a tree that is no git checkout")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the ops' layers every Nth (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small shapes and short times: does it run at all?")
    for name, kind in (("--child", str), ("--run", str), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.every < 1:
        parser.error(f"--every {args.every}: supported are positive numbers")
    if args.child:
        return _child(args)

    args.output = args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / LINES
    head = provenance(arguments, args.commit)
    run = f"{head['date']}-{os.getpid()}"
    append(file, {"run": run, "head": head})
    chosen = [p for p in parts.PARTS if args.part in (None, p) or p == "ceilings"]
    whole = sum(parts.SHARES[p] for p in chosen)
    end, begin, until = time.time() + args.seconds, time.time(), 0.0
    try:
        for part in chosen:
            until += parts.SHARES[part] / whole
            deadline = min(begin + until * args.seconds, end)
            print(f"==> {part}, until {deadline - begin:.0f} s", flush=True)
            append(file, {"run": run, "part": part, "clocks": clocks()})
            _run_part(part, args, run, deadline)
            write(args.output)
    except KeyboardInterrupt:
        print(summary(write(args.output)))
        print(f"suite: interrupted; what was measured is kept in {args.output.name}", file=sys.stderr)
        return 130
    append(file, {"run": run, "part": "end", "clocks": clocks()})
    result = write(args.output)
    print(summary(result))
    return 0 if result["passed"] and result["records"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit from outside is as good as Ctrl-C
    sys.exit(main())
