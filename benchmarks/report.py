"""README's speed tables and all pictures, from the files in benchmarks/results/.

``resnet-fast bench --json``, ``resnet-fast verify --json`` and ``benchmarks.suite`` (``make bench-gpu``) write them.
``python -m benchmarks.report`` rewrites README.md between ``<!-- speed:begin -->`` and ``<!-- speed:end -->`` and draws
``benchmarks/results/NAME.png`` or, of a suite, ``NAME-speed.png``, ``-layers``, ``-memory`` and ``-fusions`` (with
``--check`` it changes nothing, and fails if README.md is not up to date).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, suite
from resnet_fast.commands import CommandError, curves, judging, plots
from resnet_fast.commands.engines import TITLES
from resnet_fast.commands.timing import CAPTURED, GRAPH, GRAPHED, TUNED

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
_COLUMNS = {"eager": "eager NCHW", "channels_last": "eager channels_last", "compile": "torch.compile"} | TITLES
_COLUMNS["resnet_fast"] = "resnet_fast"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every result in ``folder`` whose equality test passed, by file name. Raises CommandError where there is none."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise CommandError(f"{file.name}: no JSON: {error}") from error
        if not isinstance(result, dict) or not result.keys() & {"speed", "suite", "verify"}:
            raise CommandError(f"{file.name}: not written by `resnet-fast bench --json`, verify or benchmarks.suite")
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
    if "suite" in result:
        return figures.machine(result)
    if any(s["device"] == "cuda" for s in result.get("speed", ())) and result["gpus"]:
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
    """The Markdown between the markers: which numbers exist, then a table for each result that has one."""
    lines = [_exists(results), ""]
    for result in results:
        if "speed" in result:
            lines += _bench_table(result)
        elif "suite" in result and figures.on_gpu(result):  # on a CPU `resnet-fast bench` has the networks
            lines += _suite_table(result)
    pictures = [name for result in results for name in result.get("pictures", ())]
    if pictures:
        lines += ["Pictures: " + ", ".join(f"[{Path(n).stem}](benchmarks/results/{n})" for n in pictures) + "."]
    return "\n".join(lines).rstrip()


def _exists(results: Sequence[dict[str, Any]]) -> str:
    """Plainly, what has been measured and what has not."""
    on_gpus = [r for r in results if "suite" in r and figures.on_gpu(r)]
    on_gpus += [r for r in results if any(s["device"] == "cuda" for s in r.get("speed", ()))]
    words = []
    for gpu in (True, False):
        kinds: dict[str, None] = {}
        for r in results:
            if "verify" in r or (r in on_gpus) is not gpu:
                continue
            kinds.update(dict.fromkeys(s["mode"] for s in r.get("speed", ())))
            parts = dict.fromkeys(x["part"] for x in r.get("records", ()) if x["part"] != "ceilings")
            kinds.update(dict.fromkeys("single layers" if part == "ops" else part for part in parts))
        where = "on a GPU" if gpu else "on a CPU"
        words.append(f"{where}: {', '.join(kinds) if kinds else 'nothing'}")
    return f"Measured {words[0]}; {words[1]}."


def _bench_table(result: dict[str, Any]) -> list[str]:
    versions = result["versions"]
    names = [n for n in _COLUMNS if any(c["name"] == n for s in result["speed"] for c in s["contenders"])]
    base = result["speed"][0]["baseline"]
    lines = [
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
    engines = "".join(f", {title} {versions[name]}" for name, title in TITLES.items() if versions.get(name))
    return [
        *lines,
        "",
        f"torch {versions['torch']}{triton}{engines}, resnet_fast {versions['resnet_fast']}, "
        f"commit {result['commit']}, {result['date'][:10]}; `{result['command']}`; benchmarks/results/{result['file']}",
        "",
    ]


def _suite_table(result: dict[str, Any]) -> list[str]:
    """Of whole networks; a contender's better number where it was timed with others twice."""
    settings: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in result["records"]:
        if "images_per_second" in r or (r.get("network") and r.get("failed")):
            row = settings.setdefault((r["network"], r["mode"], r["dtype"], r["batch"]), {})
            old = row.get(r["contender"])
            if old is None or r.get("images_per_second", 0.0) > old.get("images_per_second", 0.0):
                row[r["contender"]] = r
    if not settings:
        return []
    compiled = ("compile", "compile_max", "compile_frozen", *GRAPHED)
    ours = ("resnet_fast", "resnet_fast:native", "resnet_fast:triton", TUNED, CAPTURED)
    order = [n + end for n in ("eager", "channels_last", *compiled, *TITLES, *ours) for end in ("", GRAPH)]
    names = [n for n in order if any(n in row for row in settings.values())]
    lines = [
        f"Images per second (ratio to eager channels_last, of the same rounds), {machine(result)}:",
        "",
        "| network | mode | dtype | batch | " + " | ".join(figures.label(n) for n in names) + " |",
        "| --- | --- | --- | ---: |" + " ---: |" * len(names),
    ]
    for (network, mode, dtype, batch), row in settings.items():
        cells = []
        for n in names:
            r = row.get(n)
            ratio = None if r is None else r.get("ratio")
            cells.append(_cell(None if r is None else {**r, "ratio": float("nan") if ratio is None else ratio}))
        lines.append(f"| {network} | {mode} | {dtype} | {batch} | {' | '.join(cells)} |")
    return [*lines, "", f"{suite.stamp(result)}; benchmarks/results/{result['file']}", ""]


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


def _draw(result: dict[str, Any], folder: Path) -> list[str]:
    """Every picture of ``result``; returns the files' names."""
    stem = Path(result["file"]).stem
    if "suite" in result:
        return figures.draw(result, folder, stem)
    if "verify" in result:
        followed = [curves.Curves(**c) for c in result["curves"]]
        sections = [(s["section"], [judging.Check(**c) for c in s["checks"]]) for s in result["verify"]]
        where = machine(result)
        title = f"{result['model']['name']} on {where}: errors against float64"
        plots.errors(title, sections, followed, plots.stamp(result), folder / f"{stem}.png")
    elif result["speed"]:
        mode = result["speed"][0]["mode"]  # "train command" is in the model's name
        title = ", ".join([result["model"]["name"], *([mode] if "train" not in result else []), machine(result)])
        plots.bars(title, result["speed"], folder / f"{stem}.png", plots.stamp(result))
    else:
        return []
    return [f"{stem}.png"]


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
        for result in results:
            if "suite" in result:
                stem = Path(result["file"]).stem
                names = [f"{stem}-{kind}.png" for kind in figures.FIGURES]
            else:
                names = [f"{Path(result['file']).stem}.png"]
            if args.check or args.no_plot:  # those that lie there
                result["pictures"] = [n for n in names if (args.results / n).is_file()]
            else:
                result["pictures"] = _draw(result, args.results)
        if not args.readme.is_file():
            raise CommandError(f"{args.readme.name}: no such file; it needs the lines {BEGIN} and {END}")
        old = args.readme.read_text()
        new = insert(old, table(results))
        if args.check:
            if new != old:
                print("README.md is out of date: python -m benchmarks.report", file=sys.stderr)
            return int(new != old)
        args.readme.write_text(new)
    except CommandError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
