"""What a part of benchmarks.suite is made of: items, each measured alone, and the settings of a run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.rounds import Rounds

Record = dict[str, Any]


class Item(NamedTuple):
    """One thing to measure. ``key`` names it for good; items of one ``kind`` take about as long as each other."""

    key: str
    kind: str
    measure: Callable[[], list[Record]]


class Settings(NamedTuple):
    """What a run measures: on which device, and whether only so much that a test can wait for it."""

    device: torch.device
    tiny: bool = False
    every: int = 1  # of the layers of single ops, every so many-th

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype that matters first."""
        return (torch.float32,) if self.device.type == "cpu" else (torch.bfloat16, torch.float16)

    @property
    def batch(self) -> int:
        """Of single ops."""
        return 2 if self.tiny else 4 if self.device.type == "cpu" else 128

    @property
    def seconds(self) -> float:
        """Of rounds for one contender of one op."""
        return 0.005 if self.tiny else 0.1 if self.device.type == "cpu" else 0.05


def sync(device: torch.device) -> None:
    """Wait for the device, and let an error of it come up here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what the item before has left."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def times(rounds: Rounds) -> Record:
    """As a record has them, in ms."""
    return {
        "ms_p20": rounds.p20 * 1e3,
        "ms_p50": rounds.p50 * 1e3,
        "ms_p80": rounds.p80 * 1e3,
        "rounds": rounds.rounds,
    }
