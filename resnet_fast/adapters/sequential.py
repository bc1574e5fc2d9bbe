"""Modules that call their children in order: nn.Sequential, and what returns some outputs on the way.

Their runs of convolution, batch norm and, if there are, ReLU and the 3x3/2 max-pool; batch norm and ReLU by themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from ..plan import Refusal, norm_of
from .common import BlockPlan, ConvBnPath, HostPlan, NormAct, Part

_ACTIVATIONS = nn.ReLU.__module__


def adapt(module: Any) -> HostPlan | None:
    """An nn.Sequential: plan every run; None where there is none."""
    return children(module, "forward")


def children(
    module: Any,
    method: str,
    keep: Collection[str] | None = None,
    allowed: Callable[[Any], None] | None = None,
    returned: Callable[[Any, Any], Any] | None = None,
) -> HostPlan | None:
    """Plan every run among the children, which ``method`` calls in order; None where there is none.

    ``keep``: names in ``module.return_layers``, whose outputs are returned in an OrderedDict; None: the last output is
    returned. ``allowed(module)`` raises Refusal where the method does something else. ``returned(module, x)`` makes of
    a child's output what is returned of it.
    """
    items = [(name, child) for name, child in module._modules.items() if child is not None]
    parts: list[BlockPlan | NormAct] = []
    steps: list[tuple[int | str, str]] = []  # a part's number or a child's name, and the name of its last child
    left: list[str] = []
    kept = frozenset(keep or ())
    i = 0
    while i < len(items):
        run = _run(items[i:], kept)
        if run is None:
            steps.append((items[i][0], items[i][0]))
            i += 1
            continue
        plan, length = run
        steps.append((len(parts), items[i + length - 1][0]))
        parts.append(plan)
        i += length
        bare = isinstance(plan, BlockPlan) and plan.layers[0].act is False
        if bare and i < len(items) and type(items[i][1]).__module__ == _ACTIVATIONS:
            left.append(
                f"{items[i][0]} ({type(items[i][1]).__name__}; supported is ReLU; the convolution and its norm are one)"
            )
    if not parts:
        return None
    names = tuple(module._modules)

    def forward(module: Any, x: Tensor, part: Part) -> Any:
        if tuple(module._modules) != names:
            raise Refusal("children were added or removed since fuse(); remedy: unfuse(model), then fuse(model)")
        if allowed is not None:
            allowed(module)
        if keep is not None and frozenset(module.return_layers) != kept:
            raise Refusal("return_layers changed since fuse(); remedy: unfuse(model), then fuse(model)")
        out: OrderedDict[str, Any] = OrderedDict()
        for step, name in steps:
            x = part(step, x) if isinstance(step, int) else module._modules[step](x)
            if name in kept:
                out[module.return_layers[name]] = x if returned is None else returned(module, x)
        return x if keep is None else out

    return HostPlan("sequence", tuple(parts), method, forward, ", ".join(left))


def _run(items: list[tuple[str, Any]], kept: frozenset[str]) -> tuple[BlockPlan | NormAct, int] | None:
    """The run that begins with the first of ``items``, and its length; no output in ``kept`` stays inside."""
    first = norm_of(type(items[0][1]))
    if first is not None:
        bn = items[0][0]
        if first.inner:
            return (NormAct(bn, f"{bn}.act"), 1) if type(items[0][1].act) is nn.ReLU else None
        if bn in kept or len(items) < 2 or type(items[1][1]) is not nn.ReLU:
            return None
        return NormAct(bn, items[1][0]), 2
    if len(items) < 2 or type(items[0][1]) is not nn.Conv2d or items[0][0] in kept:
        return None
    norm = norm_of(type(items[1][1]))
    if norm is None:
        return None
    conv, bn = items[0][0], items[1][0]
    if norm.inner:
        layer, idle = ConvBnPath(conv, bn, f"{bn}.act"), (f"{bn}.drop",)
        pool = items[2][0] if bn not in kept and len(items) > 2 and _is_known_pool(items[2][1]) else None
        return BlockPlan("sequence", (layer,), idle=idle, pool=pool), 2 if pool is None else 3
    layer = ConvBnPath(conv, bn)
    if bn in kept or len(items) < 3 or type(items[2][1]) is not nn.ReLU:
        return BlockPlan("sequence", (layer,)), 2
    act = items[2][0]
    layer = ConvBnPath(conv, bn, act)
    if act in kept or len(items) < 4 or not _is_known_pool(items[3][1]):
        return BlockPlan("sequence", (layer,)), 3
    return BlockPlan("sequence", (layer,), pool=items[3][0]), 4


def _is_known_pool(m: Any) -> bool:
    return type(m) is nn.MaxPool2d and all(
        getattr(m, name) in (number, (number, number))
        for name, number in {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}.items()
    )
