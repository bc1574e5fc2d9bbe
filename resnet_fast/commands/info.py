"""``resnet-fast info``: versions, hardware, the build, and which backend runs which operation here, or why not."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import torch

from resnet_fast import dispatch

from . import machine, tables

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "collect", "run"]

DESCRIPTION = """\
What is installed, on which hardware, how the kernels were built, and for each operation which backends can run it here;
for the others why not, and what to do about it. Works without compiled kernels and without triton."""

EXAMPLES = """\
examples:
  resnet-fast info
  resnet-fast info --json | python -m json.tool"""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

#: device -> op -> dtype -> backend -> None (able) or the reason.
Support = dict[str, dict[str, dict[str, dict[str, "str | None"]]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``info``."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _support() -> Support:
    """``dispatch.reasons`` for every operation, device and dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what would be warned of is what is printed
        return {
            device: {
                op: {name: dispatch.reasons(op, torch.device(device), dtype) for name, dtype in _DTYPES.items()}
                for op in dispatch.OPS
            }
            for device in ("cpu", "cuda")
        }


def collect(argv: list[str]) -> dict[str, Any]:
    """Everything that ``info --json`` prints."""
    return {
        "schema": 1,
        **machine.provenance(argv),
        "openmp_runtimes": machine.openmp_runtimes(),
        "support": _support(),
    }


def _cell(answers: dict[str, str | None], notes: dict[str, int]) -> str:
    """One op on one backend: "yes", the dtypes that it can, or "-"; and the numbers of the reasons."""
    able = [_SHORT[dtype] for dtype, reason in answers.items() if reason is None]
    told = [reason for reason in dict.fromkeys(answers.values()) if reason and not reason.startswith("has no ")]
    marks = "".join(f" [{notes.setdefault(reason, len(notes) + 1)}]" for reason in told)
    words = "yes" if len(able) == len(answers) else " ".join(able) or ("no" if told else "-")
    return words + marks


def _support_table(device: str, support: dict[str, dict[str, dict[str, str | None]]]) -> str:
    backends = [*dispatch.BACKENDS, "torch"]
    notes: dict[str, int] = {}
    rows = [["", *backends, "runs (fp32, bf16, fp16)"]]
    for op, by_dtype in support.items():
        cells = [_cell({d: by_dtype[d].get(b) for d in by_dtype}, notes) for b in backends]
        first = [next(b for b in backends if by_dtype[d].get(b) is None) for d in by_dtype]
        rows.append([op, *cells, ", ".join(dict.fromkeys(first))])
    here = "" if device == "cpu" or torch.cuda.is_available() else " (no GPU in this process)"
    reasons = "".join(f"\n  [{number}] {reason}" for reason, number in notes.items())
    title = f"operations on {device}{here}: which backends can; the first from the left runs"
    return f"{title}\n{tables.table(rows)}{reasons}"


def _text(found: dict[str, Any]) -> str:
    parts = [tables.header(found)]
    record = found["build"]
    if "missing" not in record:
        isas = ", ".join(record.get("isas", []))
        built = f"build    {record.get('built', '')}, {record.get('compiler', '')}; CPU kernels for {isas}; "
        openmp = "OpenMP" if record.get("openmp") else "no OpenMP: one thread"
        parts.append(f"{built}{openmp}; nvcc {record.get('nvcc') or 'none'}")
    runtimes = found["openmp_runtimes"]
    parts.append(f"openmp   {', '.join(runtimes) or 'not known'}; {found['threads']} threads")
    if len(runtimes) > 1:
        parts.append(
            f"warning: {len(runtimes)} OpenMP runtimes in one process fight over the processors, which costs "
            "most of the speed. Remedy: build with g++ and plain -fopenmp, and import torch first"
        )
    parts += [f"\n{_support_table(device, support)}" for device, support in found["support"].items()]
    return "\n".join(parts)


def run(args: argparse.Namespace) -> int:
    """Exit status 0."""
    found = collect(args.argv)
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0
