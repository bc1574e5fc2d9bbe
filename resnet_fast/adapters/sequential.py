"""Any module that runs as nn.Sequential does: its runs of convolution, batch norm and, if there is one, ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..plan import Refusal
from .common import BlockPlan, ConvBnPath, HostPlan, Part

_NORMS = ("BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d")


def adapt(module: Any) -> HostPlan | None:
    """Plan every run; None where there is none."""
    children = list(module._modules.items())
    parts: list[BlockPlan] = []
    steps: list[int | str] = []  # a part's number, or the name of a child that is called as it is
    i = 0
    while i < len(children):
        name, child = children[i]
        norm = children[i + 1][1] if i + 1 < len(children) else None
        if type(child) is not nn.Conv2d or type(norm).__name__ not in _NORMS:
            steps.append(name)
            i += 1
            continue
        act = children[i + 2] if i + 2 < len(children) and type(children[i + 2][1]) is nn.ReLU else None
        parts.append(BlockPlan("sequence", (ConvBnPath(name, children[i + 1][0], act[0] if act else False),)))
        steps.append(len(parts) - 1)
        i += 3 if act else 2
    if not parts:
        return None
    names = tuple(name for name, _ in children)

    def forward(module: Any, x: Tensor, part: Part) -> Tensor:
        if tuple(module._modules) != names:
            raise Refusal("children were added or removed since fuse(); remedy: unfuse(model), then fuse(model)")
        for step in steps:
            x = part(step, x) if isinstance(step, int) else module._modules[step](x)
        return x

    return HostPlan("sequence", tuple(parts), "forward", forward)
