"""What ``python -m benchmarks.suite`` measures: the items of each part, and how one item is measured on a device.

An item is measured alone and returns records, each a flat dict that goes into JSON and CSV as it is. The same code runs
on a CPU, where events are a clock and CUDA graphs do not exist. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

from benchmarks import networks, single_ops
from benchmarks.items import Item, Record, Settings, free, sync

PARTS = ("ceilings", "ops", "training", "inference", "fusions", "memory")
#: Share of the whole time that each part may take; what one leaves, the next has.
SHARES = {"ceilings": 0.05, "ops": 0.22, "training": 0.28, "inference": 0.24, "fusions": 0.11, "memory": 0.1}


def items(part: str, settings: Settings) -> list[Item]:
    """The items of ``part``, in the order in which they are measured."""
    if part == "ceilings":
        made = (("copy", single_ops.copy), ("product", single_ops.product))
        return [Item(f"ceilings/{name}", name, functools.partial(f, settings)) for name, f in made]
    if part == "ops":
        return list(single_ops.items(settings))
    if part == "memory":
        return list(networks.memory(settings))
    if part == "fusions":
        return list(networks.kinds(settings))
    return list(networks.speed(settings, part))


def run(
    part: str,
    settings: Settings,
    deadline: float,
    skip: Sequence[str],
    tell: Callable[[Record], None],
) -> None:
    """Measure the items of ``part`` that are not in ``skip`` until ``deadline`` (time.time()).

    ``tell`` gets {"item", "state"}: "begin"; then "done" with "records" and "seconds", or "failed" with "reason"; or
    "left out", where its kind takes longer than there is time, or it cannot run here. An error that leaves the device
    unusable is told, and raised: a new process goes on.
    """
    took: dict[str, float] = {}
    for item in items(part, settings):
        if item.key in skip:
            continue
        left = deadline - time.time()
        if left < max(took.get(item.kind, 0.0), 0.05):
            tell({"item": item.key, "state": "left out", "reason": f"{max(left, 0):.0f} s were left"})
            continue
        tell({"item": item.key, "state": "begin"})
        begin = time.time()
        try:
            records = item.measure()
            sync(settings.device)
        except NotImplementedError as error:
            tell({"item": item.key, "state": "left out", "reason": str(error)[:300]})
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
            tell({"item": item.key, "state": "failed", "reason": reason})
            single_ops.prepared.cache_clear()
            sync(settings.device)  # raises where the device is lost
        else:
            tell({"item": item.key, "state": "done", "seconds": round(time.time() - begin, 3), "records": records})
        if part != "ops":
            free(settings.device)
        took[item.kind] = max(took.get(item.kind, 0.0), time.time() - begin)
