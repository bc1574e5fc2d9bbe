"""``resnet-fast models``: which models of which library are fused, what is left and why: the tests' own data."""

from __future__ import annotations

import argparse
import json
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

from . import CommandError, tables

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "insert", "load", "markdown", "run"]

DESCRIPTION = """\
Which models of which library are fused, what of them is left as it is, and why. The table is made of the data that the
tests iterate over (resnet_fast/adapters/support.json): each example is built with random weights and compared with its
original, in eval and in training, and its counts of batch norms are checked. For your own model: explain(model)."""

EXAMPLES = """\
examples:
  resnet-fast models
  resnet-fast models --json | python -m json.tool
  resnet-fast models --write README.md              between its lines <!-- support:begin --> and <!-- support:end -->"""

BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``models``."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the data as JSON")
    how.add_argument("--write", metavar="FILE", type=Path, help="write the table as Markdown between FILE's markers")


def load() -> list[dict[str, Any]]:
    """The rows of the table: library, models, fused, left, generic, and the examples that were tested."""
    return json.loads(resources.files("resnet_fast.adapters").joinpath("support.json").read_text())


def _cells(row: dict[str, Any]) -> list[str]:
    tested = "; ".join(f"{e['name']} {e['norms'][0]}/{e['norms'][1]}" for e in row["examples"])
    return [row["library"], row["models"], row["fused"], row["left"] or "nothing", tested]


_HEAD = ["library", "models", "fused", "left as it is", "tested: batch norms fused / all"]


def markdown() -> str:
    """The table for README.md."""
    rows = [_HEAD, ["---"] * len(_HEAD), *map(_cells, load())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def insert(text: str, body: str) -> str:
    """``text`` with ``body`` between the markers. Raises CommandError where they are missing or in disorder."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CommandError(f"found no line {BEGIN} with a line {END} behind it; remedy: add both to the file")
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def _text() -> str:
    widths = (27, 26, 34, 34, 34)
    lines: list[list[str]] = [_HEAD]
    for row in load():
        columns = [
            textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(_cells(row), widths, strict=True)
        ]
        height = max(map(len, columns))
        lines += [[column[i] if i < len(column) else "" for column in columns] for i in range(height)]
        lines.append([""] * len(_HEAD))
    return tables.table(lines, indent="").rstrip()


def run(args: argparse.Namespace) -> int:
    """Exit status 0."""
    if args.write is not None:
        if not args.write.is_file():
            raise CommandError(f"--write: found no file {args.write}")
        args.write.write_text(insert(args.write.read_text(), markdown()))
    else:
        print(json.dumps(load(), indent=1) if args.json else _text())
    return 0
