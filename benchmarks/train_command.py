"""The whole ``resnet-fast train`` command, fused against not, in turns: what README's table has of it.

``python -m benchmarks.train_command resnet50`` runs the command of that name (see ``RUNS``) in processes of their own
and writes benchmarks/results/train-NAME.json, which ``python -m benchmarks.report`` reads. Images per second are those
of metrics.json: data, augmentation, forward, backward and optimizer of all iterations, the first ones included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from resnet_fast.commands import machine

ROOT = Path(__file__).resolve().parents[1]

#: By name: options of ``resnet-fast train``, batch, height and width.
RUNS: dict[str, tuple[list[str], int, int]] = {
    "resnet50": (["--data", "synthetic", "--model", "resnet50", "--samples", "64", "--iterations", "4"], 16, 224),
    "cifar_resnet20": (["--data", "digits", "--model", "cifar_resnet20", "--iterations", "240"], 32, 8),
    "cifar_resnet56": (["--data", "synthetic", "--model", "cifar_resnet56", "--iterations", "6"], 128, 32),
}
WAYS = {"eager": ["--no-fuse"], "channels_last": ["--no-fuse", "--channels-last"], "resnet_fast": ["--fuse"]}
#: The mean loss of the few iterations, fused against not: more than rounding would show.
_ALIKE = 0.02


def once(options: list[str], batch: int, way: str) -> dict[str, Any]:
    """metrics.json of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "resnet_fast", "train", *options, "--batch", str(batch), "--lr", "0.001"]
        ran = subprocess.run(
            [*command, *WAYS[way], "--output", folder], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise SystemExit(ran.stderr)
        return dict(json.loads((Path(folder) / "metrics.json").read_text()))


def main() -> int:
    """Exit status 0; 1 where fused and plain training differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_command", description=__doc__)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", default="off", choices=("off", "bf16"))
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/train-NAME.json)")
    args = parser.parse_args()
    options, batch, size = RUNS[args.name]
    options = [*options, "--amp", args.amp]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, runs in found.items():
            runs.append(once(options, batch, way))
    plain, ours = (found[way][0]["epochs"][0]["train_loss"] for way in ("channels_last", "resnet_fast"))
    contenders = []
    for way, runs in found.items():
        speeds = [run["images_per_second"] for run in runs]
        ratios = [s / b["images_per_second"] for s, b in zip(speeds, found["channels_last"], strict=True)]
        ratio, speed = statistics.median(ratios), statistics.median(speeds)
        contenders.append({"name": way, "images_per_second": speed, "ratio": ratio, "ratios": ratios, "failed": None})
        print(f"{args.name} {args.amp} {way}: {speed:.1f} img/s, {ratio:.2f} x, rounds {[round(r, 2) for r in ratios]}")
    passed = abs(ours - plain) <= _ALIKE * plain
    dtype = "float32" if args.amp == "off" else "bfloat16"
    setting = {"mode": "train command", "dtype": dtype, "batch": batch, "size": size, "device": "cpu"}
    record = machine.provenance([])
    record["command"] = f"python -m benchmarks.train_command {args.name}" + (
        " --amp bf16" if args.amp == "bf16" else ""
    )
    result = {
        "schema": 1,
        **record,
        "train": options,
        "model": {"name": f"{args.name}, resnet-fast train"},
        "losses": {"plain": plain, "fused": ours},
        "passed": passed,
        "speed": [{**setting, "baseline": "channels_last", "contenders": contenders}],
    }
    suffix = "" if args.amp == "off" else f"-{args.amp}"
    file = args.output or ROOT / "benchmarks" / "results" / f"train-{args.name}{suffix}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
