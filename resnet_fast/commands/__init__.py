"""The sub-commands of ``resnet-fast``: one module each, with ``DESCRIPTION``, ``EXAMPLES``, ``add_arguments``, ``run``.

The other modules here are their parts: where models and photographs come from, equality, timing, tables, plots.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["COMMANDS", "CommandError", "did_you_mean"]

#: Name of the command, which is the name of its module, and the line that ``resnet-fast --help`` shows.
COMMANDS: dict[str, str] = {
    "analyze": "the ResNet paper's degradation, layer responses and gradients; fused against plain training",
    "bench": "check that a fused model equals torch's, then time it against eager and compiled torch",
    "evaluate": "top-1 and top-5 of trained or published weights: 10-crop, multi-scale, ensembles",
    "info": "versions, hardware, and which backend can run which operation here, or why not",
    "models": "which models of which library are fused, what of them is left, and why",
    "train": "train a network of the ResNet paper, fused, with the paper's recipes; transfer to other classes",
    "verify": "errors of the fused network, its blocks and layers beside torch's own, against float64",
}


class CommandError(Exception):
    """The user's mistake, or something that is missing: said in one line, exit status 2."""


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """A question that names the known word closest to ``typed``, or nothing where none is close."""
    close = difflib.get_close_matches(typed, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
