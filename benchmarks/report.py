"""README's speed table and its plot, from what ``resnet-fast bench --json benchmarks/results/NAME.json`` wrote.

``python -m benchmarks.report`` rewrites README.md between ``<!-- speed:begin -->`` and ``<!-- speed:end -->`` and draws
``benchmarks/results/NAME.png`` (with ``--check`` it changes nothing, and fails if README.md is not up to date).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_fast.commands import CommandError, plots

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
_COLUMNS = {"eager": "eager NCHW", "channels_last": "eager channels_last", "compile": "torch.compile"}
_COLUMNS["resnet_fast"] = "resnet_fast"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every result in ``folder`` whose equality test passed, by file name. Raises CommandError where there is none."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise CommandError(f"{file.name}: no JSON: {error}") from error
        if not isinstance(result, dict) or "speed" not in result:
            raise CommandError(f"{file.name}: not written by `resnet-fast bench --json`")
        if not result["passed"]:
            raise CommandError(f"{file.name}: its equality test failed; speed of wrong numbers is not reported")
        found.append({**result, "file": file.name})
    if not found:
        raise CommandError(
            f"no results in {folder.name}/. Remedy: resnet-fast bench --json benchmarks/results/NAME.json"
        )
    return found


def machine(result: dict[str, Any]) -> str:
    """The device that was measured, in words."""
    if any(s["device"] == "cuda" for s in result["speed"]) and result["gpus"]:
        return str(result["gpus"][0]["name"])
    return f"{result['cpu']}, {result['threads']} threads, {result['isa'] or 'no kernels'}"


def _cell(contender: dict[str, Any] | None) -> str:
    if contender is None:
        return ""
    if contender["failed"] is not None:
        return "does not run"
    speed = contender["images_per_second"]
    return f"{speed:,.0f} ({contender['ratio']:.2f})" if speed >= 100 else f"{speed:.1f} ({contender['ratio']:.2f})"


def table(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown between the markers."""
    lines = []
    for result in results:
        versions = result["versions"]
        names = [n for n in _COLUMNS if any(c["name"] == n for s in result["speed"] for c in s["contenders"])]
        base = result["speed"][0]["baseline"]
        lines += [
            f"**{result['model']['name']}**, images per second (ratio to {_COLUMNS[base]}), {machine(result)}:",
            "",
            "| mode | dtype | batch | " + " | ".join(_COLUMNS[n] for n in names) + " |",
            "| --- | --- | ---: |" + " ---: |" * len(names),
        ]
        for s in result["speed"]:
            by_name = {c["name"]: c for c in s["contenders"]}
            cells = " | ".join(_cell(by_name.get(n)) for n in names)
            lines.append(f"| {s['mode']} | {s['dtype']} | {s['batch']} | {cells} |")
        triton = f", triton {versions['triton']}" if machine(result) in [g["name"] for g in result["gpus"]] else ""
        lines += [
            "",
            f"torch {versions['torch']}{triton}, resnet_fast {versions['resnet_fast']}, commit {result['commit']}, "
            f"{result['date'][:10]}; `{result['command']}`; benchmarks/results/{result['file']}",
            "",
        ]
    return "\n".join(lines).rstrip()


def insert(text: str, body: str) -> str:
    """``text`` with ``body`` between the markers. Raises CommandError where they are missing or in disorder."""
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise CommandError(f"README.md: found {text.count(marker)} of the line {marker}, expected 1")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise CommandError(f"README.md: {END} stands before {BEGIN}")
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 with --check if README.md is out of date; 2 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--no-plot", action="store_true", help="leave the plots as they are")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is out of date")
    args = parser.parse_args(argv)
    try:
        results = load(args.results)
        if not args.readme.is_file():
            raise CommandError(f"{args.readme.name}: no such file; it needs the lines {BEGIN} and {END}")
        old = args.readme.read_text()
        new = insert(old, table(results))
        if args.check:
            if new != old:
                print("README.md is out of date: python -m benchmarks.report", file=sys.stderr)
            return int(new != old)
        args.readme.write_text(new)
        if not args.no_plot:
            for result in results:
                if result["speed"]:
                    title = f"{result['model']['name']}, {result['speed'][0]['mode']}, {machine(result)}"
                    plots.bars(title, result["speed"], args.results / f"{Path(result['file']).stem}.png")
    except CommandError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
