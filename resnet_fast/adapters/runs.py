"""Finding in a torch.fx graph what can be fused: runs, chains of them, and the sums that join two branches.

A run is a convolution, its batch norm and, if there is one, the ReLU behind it, each the only user of the one before. A
batch norm behind anything else makes a pair with its ReLU. A part takes the place of its last node: nothing between its
nodes may write over what it reads.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..plan import find, is_idle, norm_of
from .common import ConvBnPath

__all__ = ["Found", "common", "find_parts"]

_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)


class Found(NamedTuple):
    """A chain, a join or a pair in a graph. ``layers`` is empty for the latter two.

    ``norm``: the path of a pair's norm; ``residual``: the node of a "given" shortcut; ``promotes`` as in a plan.
    """

    layers: tuple[ConvBnPath, ...]
    shortcut: ConvBnPath | str | None
    input: fx.Node
    residual: fx.Node | None
    nodes: tuple[fx.Node, ...]
    idle: tuple[str, ...]
    act: str | bool = False
    norm: str = ""
    promotes: bool = False

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def owners(self) -> set[str]:
        return {node.meta["owner"] for node in self.nodes}


def common(owners: set[str]) -> str:
    """The innermost module around all of ``owners``."""
    split = [owner.split(".") if owner else [] for owner in owners]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def find_parts(module: nn.Module, graph: fx.Graph) -> list[Found]:
    """Everything in ``graph`` that can be fused, in order, no node in two of them."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    chains = _chains(module, graph)
    ends = {chain.end: chain for chain in chains}
    parts: list[Found] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        joined = _joined(module, node, ends, order)
        if joined is not None:
            parts.append(joined)
            taken.update(joined.nodes)
    for chain in chains:
        if not taken & set(chain.nodes) and _undisturbed(module, chain, order):
            parts.append(chain)
            taken.update(chain.nodes)
    for node in graph.nodes:
        pair = _pair(module, node) if node not in taken else None
        if pair is not None and _undisturbed(module, pair, order):
            parts.append(pair)
    return sorted(parts, key=lambda p: order[p.end])


def _of(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, on one input; None where it is something else."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    return find(module, str(node.target))


def _is_idle(module: nn.Module, node: fx.Node) -> bool:
    m = _of(module, node)
    return m is not None and is_idle(m)


def _next(module: nn.Module, node: fx.Node, passed: list[fx.Node]) -> fx.Node | None:
    """The only user of ``node``, past nn.Identity modules, which go into ``passed``; None where there are several."""
    while len(node.users) == 1:
        (node,) = node.users
        if not _is_idle(module, node):
            return node
        passed.append(node)
    return None


def _relu(module: nn.Module, node: fx.Node | None) -> str | bool:
    """The path of the ReLU that ``node`` calls; True where it is a function; False where there is none."""
    if node is None:
        return False
    if node.op == "call_module":
        return str(node.target) if type(_of(module, node)) is nn.ReLU else False
    if node.op == "call_function":
        return node.target in _RELUS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _paths(nodes: list[fx.Node]) -> tuple[str, ...]:
    return tuple(str(node.target) for node in nodes)


def _run(module: nn.Module, conv: fx.Node) -> Found | None:
    """Convolution, batch norm and, if there is one, ReLU, from ``conv`` on."""
    if type(_of(module, conv)) is not nn.Conv2d:
        return None
    passed: list[fx.Node] = []
    bn = _next(module, conv, passed)
    m = None if bn is None else _of(module, bn)
    norm = None if m is None else norm_of(type(m))
    if bn is None or norm is None:
        return None
    act, behind, idle = _act(module, bn, norm.inner)
    nodes, idle = [conv, *passed, bn, *behind], _paths(passed) + idle
    layer = ConvBnPath(str(conv.target), str(bn.target), act)
    assert isinstance(conv.args[0], fx.Node)
    return Found((layer,), None, conv.args[0], None, tuple(nodes), idle)


def _act(module: nn.Module, bn: fx.Node, inner: bool) -> tuple[str | bool, list[fx.Node], tuple[str, ...]]:
    """The ReLU behind ``bn``, its own or the next node: its path or whether it is there; the nodes; what is idle."""
    idle: tuple[str, ...] = ()
    if inner:
        idle = (f"{bn.target}.drop",)
        if type(find(module, f"{bn.target}.act")) is nn.ReLU:
            return f"{bn.target}.act", [], idle
        idle += (f"{bn.target}.act",)
    passed: list[fx.Node] = []
    behind = _next(module, bn, passed)
    act = _relu(module, behind)
    if act is False or behind is None:
        return False, [], idle
    return act, [*passed, behind], idle + _paths(passed)


def _pair(module: nn.Module, bn: fx.Node) -> Found | None:
    """The batch norm ``bn`` and its ReLU."""
    m = _of(module, bn)
    norm = None if m is None else norm_of(type(m))
    if norm is None:
        return None
    act, nodes, idle = _act(module, bn, norm.inner)
    inner_act = isinstance(act, str) and act.startswith(f"{bn.target}.")
    if act is False or norm.inner != inner_act:
        return None
    assert isinstance(bn.args[0], fx.Node)
    return Found((), None, bn.args[0], None, (bn, *nodes), idle, act, str(bn.target))


def _chains(module: nn.Module, graph: fx.Graph) -> list[Found]:
    """Runs, and those behind each other as one."""
    runs = {node: run for node in graph.nodes if (run := _run(module, node)) is not None}
    chains: list[Found] = []
    absorbed: set[fx.Node] = set()
    for conv, run in runs.items():
        if conv in absorbed:
            continue
        while True:
            passed: list[fx.Node] = []
            behind = _next(module, run.end, passed)
            more = None if behind is None else runs.get(behind)
            if behind is None or more is None:
                break
            absorbed.add(behind)
            nodes = (*run.nodes, *passed, *more.nodes)
            run = run._replace(layers=run.layers + more.layers, nodes=nodes, idle=run.idle + _paths(passed) + more.idle)
        chains.append(run)
    return chains


def _behind(module: nn.Module, node: Any, passed: list[fx.Node]) -> Any:
    """What ``node`` stands for, back past nn.Identity modules, which go into ``passed``."""
    while isinstance(node, fx.Node) and _is_idle(module, node) and len(node.users) == 1:
        passed.append(node)
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _joined(module: nn.Module, total: fx.Node, ends: dict[fx.Node, Found], order: dict[fx.Node, int]) -> Found | None:
    """The sum at ``total`` with the chain that ends in it, its shortcut and its ReLU, or the sum and the ReLU alone."""
    is_sum = total.op == "call_function" and total.target in _SUMS
    is_sum = is_sum or (total.op == "call_method" and total.target in ("add", "add_"))
    if not is_sum or len(total.args) != 2 or total.kwargs or total.args[0] is total.args[1]:
        return None
    promotes = total.target not in (operator.iadd, "add_")
    if not promotes and not _is_private(module, total.args[0]):
        return None
    passed: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    sides = [_behind(module, arg, steps) for arg, steps in zip(total.args, passed, strict=True)]
    sides = [side for side in sides if side is not None]
    if len(sides) < 2:
        return None
    acted: list[fx.Node] = []
    behind = _next(module, total, acted)
    act = _relu(module, behind)
    tail = [total, *acted, behind] if act is not False and behind is not None else [total]
    idle = _paths([*passed[0], *passed[1], *acted[: len(tail) - 1]])
    # A chain that ends without a ReLU and goes nowhere else; of two the longer one, the other is its shortcut.
    able = [
        (chain, i)
        for i, side in enumerate(sides)
        if (chain := ends.get(side)) is not None and chain.layers[-1].act is False and len(side.users) == 1
    ]
    for main, i in sorted(able, key=lambda pair: -len(pair[0].layers)):
        other, steps = sides[1 - i], [*passed[0], *passed[1]]
        layers = (*main.layers[:-1], ConvBnPath(main.layers[-1].conv, main.layers[-1].bn, act))
        side = next((chain for chain, j in able if j != i), None)
        shortcut: ConvBnPath | str = "given"
        extra: tuple[fx.Node, ...] = ()
        if other is main.input:
            shortcut = "identity"
        elif side is not None and len(side.layers) == 1 and side.input is main.input:
            shortcut, extra, idle = side.layers[0], side.nodes, idle + side.idle
        nodes = (*main.nodes, *extra, *steps, *tail)
        residual = other if shortcut == "given" else None
        found = Found(layers, shortcut, main.input, residual, nodes, main.idle + idle, promotes=promotes)
        if _undisturbed(module, found, order):
            return found
    if act is False:
        return None
    assert isinstance(total.args[0], fx.Node) and isinstance(total.args[1], fx.Node)
    left = _paths(acted[: len(tail) - 1])
    return Found((), "given", total.args[0], total.args[1], tuple(tail), left, act, promotes=promotes)


def _is_private(module: nn.Module, node: Any) -> bool:
    """Nobody else can see it if ``node``'s memory is written: it goes back, use by use, to a fresh convolution."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if type(_of(module, node)) is nn.Conv2d:
            return True
        if _of(module, node) is None:
            return False
        node = node.args[0]
    return False


def _undisturbed(module: nn.Module, part: Found, order: dict[fx.Node, int]) -> bool:
    """Whether nothing between the part's nodes can write over what it reads: it runs where its last node stood."""
    own, first, last = set(part.nodes), min(order[node] for node in part.nodes), order[part.end]
    return not any(
        first < place < last and node not in own and _may_write(module, node) for node, place in order.items()
    )


def _may_write(module: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` might change one of its inputs: a function in place, a module with other text than torch's."""
    if node.op == "call_module":
        m = find(module, str(node.target))
        harmless = (nn.Conv2d, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear)
        inside = [m, *m.modules()] if type(m).forward is nn.Sequential.forward else [m]
        kinds = {type(child) for child in inside if type(child).forward is not nn.Sequential.forward}
        return not all(kind in harmless or norm_of(kind) for kind in kinds)
    name = getattr(node.target, "__name__", str(node.target))
    in_place = name.endswith("_") or (name.startswith("i") and name[1:] in dir(operator)) or name in ("setitem",)
    return node.op in ("call_function", "call_method") and (
        in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs or True in node.args
    )
