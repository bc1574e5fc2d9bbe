"""A plan for any module: its own text, as torch.fx traces it, with what can be fused made parts of a HostPlan.

Looked for are runs of convolution, batch norm and ReLU, chains of them, and the sum that joins a shortcut. All else
stays as it stands in the text, in its order: attention, drop-path (whose random numbers stay the same), pooling. A
module whose whole text is one block becomes a BlockPlan. Children that hold runs themselves are traced through where a
part crosses their border, and are called as they are elsewhere.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..plan import Refusal, check_idle, check_plain, find, is_idle, norm_of
from .common import BlockPlan, Check, ConvBnPath, HostPlan, Join, Part
from .text import Unreadable, attributes

__all__ = ["holds_run", "plan"]

_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)


def plan(module: nn.Module, kind: str | None = None, is_block: Callable[[nn.Module], bool] | None = None) -> Any:
    """A BlockPlan or HostPlan for ``module``; a string, why it cannot be traced; None where there is nothing to fuse.

    ``kind``: the word for it in explain(). ``is_block(child)``: a child has a plan of its own, and is not looked into.
    """
    try:
        return _plan(module, kind, is_block or (lambda child: False))
    except Unreadable as reason:
        return f"cannot be traced: {reason}"


def holds_run(module: nn.Module) -> bool:
    """Whether a convolution and a norm that can be fused are direct children, or a Sequential's among them."""
    children = list(module.children())
    if any(type(c) is nn.Conv2d for c in children) and any(norm_of(type(c)) for c in children):
        return True
    return any(type(c).forward is nn.Sequential.forward and holds_run(c) for c in children)


def _plan(module: nn.Module, kind: str | None, is_block: Callable[[nn.Module], bool]) -> BlockPlan | HostPlan | None:
    fixed = {"": attributes(module)}
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind not in (parameters[0].POSITIONAL_OR_KEYWORD, 0):
        raise Unreadable("its forward does not take one input")
    inner = dict(_inner(module, "", is_block, fixed))
    holds = bool(inner)
    while True:
        graph = _trace(module, inner, fixed)
        parts = [p for p in _parts(module, graph) if _common(p.owners) == ""]
        if not any(p.layers for p in parts) and not (parts and holds):
            return None
        # What no part reaches into from outside is called as it is, and planned by itself.
        owners = {owner for p in parts for owner in p.owners}
        needed = {name: m for name, m in inner.items() if any(f"{o}.".startswith(f"{name}.") for o in owners)}
        if needed.keys() == inner.keys():
            break
        inner = needed
    idle = tuple(dict.fromkeys(path for p in parts for path in p.idle))
    check = _check(module, {"": fixed[""], **{name: fixed[name] for name in inner}})
    return _assemble(module, graph, parts, kind, idle, check)


# ---- tracing ----------------------------------------------------------------------------------------------------


def _inner(
    module: nn.Module, path: str, is_block: Callable[[nn.Module], bool], fixed: dict[str, Any]
) -> Iterator[tuple[str, nn.Module]]:
    """The children, at any depth, that may be traced through; their attributes go into ``fixed``."""
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _inner(child, at, is_block, fixed)
            continue
        if is_block(child) or hasattr(type(child), "_resnet_fast_original") or "forward" in child.__dict__:
            continue
        below = list(_inner(child, at, is_block, fixed))
        # A Sequential may end in the convolution whose norm stands outside of it.
        ends = type(child).forward is nn.Sequential.forward and any(type(c) is nn.Conv2d for c in child.children())
        if not below and not ends and not holds_run(child):
            continue
        try:
            fixed[at] = attributes(child)
        except Unreadable:
            continue
        yield at, child
        yield from below


def _in_place(operation: Callable[..., Any]) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


class _Value(fx.Proxy):
    """fx's stand-in for a tensor, but that ``x += y`` stays what it is: fx's own makes a sum of it, written nowhere."""


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(_Value, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.Tracer):
    """Traces through ``inner``; every node knows in whose text it stands."""

    def __init__(self, inner: dict[str, nn.Module]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self._inner, self._owners = inner, [""]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._inner

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if type(m) is nn.ReLU and m not in (self.submodule_paths or {}):  # made on the spot: nn.ReLU()(x)
            return F.relu(*args, **kwargs)
        name = self.path_of_module(m)
        if name not in self._inner:
            return super().call_module(m, forward, args, kwargs)
        self._owners.append(name)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._owners.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self._owners[-1]
        return node


class _NoTensors(TorchDispatchMode):
    """Refuses every operation on a real tensor: its result would be frozen into the trace."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Unreadable(f"it computes with tensors of its own ({func})")


def _trace(module: nn.Module, inner: dict[str, nn.Module], fixed: dict[str, Any]) -> fx.Graph:
    """The graph of ``module``, which must be the same in training and in eval."""
    everyone = {"": module, **inner}
    watched = [m for path, m in everyone.items() if "training" in dict(fixed[path])]
    before = [m.training for m in watched]
    graphs: list[fx.Graph] = []
    try:
        for mode in (True, False) if watched else (None,):
            for m in watched:
                m.training = mode  # type: ignore[assignment]
            with _NoTensors():
                graphs.append(_Tracer(inner).trace(module))
    except Unreadable:
        raise
    except Exception as error:  # whatever a stand-in for a tensor cannot do
        raise Unreadable(str(error).partition("\n")[0] or type(error).__name__) from error
    finally:
        for m, mode in zip(watched, before, strict=True):
            m.training = mode
    if len({str(graph) for graph in graphs}) > 1:
        raise Unreadable("its forward does something else in training")
    return graphs[0]


# ---- parts ------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A chain or a join in a graph. ``layers`` is empty for a join; ``residual``: the node of a "given" shortcut."""

    layers: tuple[ConvBnPath, ...]
    shortcut: ConvBnPath | str | None
    input: fx.Node
    residual: fx.Node | None
    nodes: tuple[fx.Node, ...]
    idle: tuple[str, ...]
    act: str | bool = False

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def owners(self) -> set[str]:
        return {node.meta["owner"] for node in self.nodes}


def _common(owners: set[str]) -> str:
    """The innermost module around all of ``owners``."""
    split = [owner.split(".") if owner else [] for owner in owners]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _parts(module: nn.Module, graph: fx.Graph) -> list[_Found]:
    """Everything in ``graph`` that can be fused, in order, no node in two of them."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    chains = _chains(module, graph)
    ends = {chain.end: chain for chain in chains}
    parts: list[_Found] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        joined = _joined(module, node, ends, order)
        if joined is not None:
            parts.append(joined)
            taken.update(joined.nodes)
    for chain in chains:
        if not taken & set(chain.nodes) and _undisturbed(module, chain, order):
            parts.append(chain)
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


def _run(module: nn.Module, conv: fx.Node) -> _Found | None:
    """Convolution, batch norm and, if there is one, ReLU, from ``conv`` on."""
    if type(_of(module, conv)) is not nn.Conv2d:
        return None
    passed: list[fx.Node] = []
    bn = _next(module, conv, passed)
    m = None if bn is None else _of(module, bn)
    norm = None if m is None else norm_of(type(m))
    if bn is None or norm is None:
        return None
    nodes, idle = [conv, *passed, bn], _paths(passed)
    act: str | bool = False
    if norm.inner:
        idle += (f"{bn.target}.drop",)
        if type(find(module, f"{bn.target}.act")) is nn.ReLU:
            act = f"{bn.target}.act"
        else:
            idle += (f"{bn.target}.act",)
    if act is False:
        passed = []
        behind = _next(module, bn, passed)
        act = _relu(module, behind)
        if act is not False and behind is not None:
            nodes, idle = [*nodes, *passed, behind], idle + _paths(passed)
    layer = ConvBnPath(str(conv.target), str(bn.target), act)
    assert isinstance(conv.args[0], fx.Node)
    return _Found((layer,), None, conv.args[0], None, tuple(nodes), idle)


def _chains(module: nn.Module, graph: fx.Graph) -> list[_Found]:
    """Runs, and those behind each other as one."""
    runs = {node: run for node in graph.nodes if (run := _run(module, node)) is not None}
    chains: list[_Found] = []
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


def _joined(module: nn.Module, total: fx.Node, ends: dict[fx.Node, _Found], order: dict[fx.Node, int]) -> _Found | None:
    """The sum at ``total`` with the chain that ends in it, its shortcut and its ReLU, or the sum and the ReLU alone."""
    is_sum = total.op == "call_function" and total.target in _SUMS
    is_sum = is_sum or (total.op == "call_method" and total.target in ("add", "add_"))
    if not is_sum or len(total.args) != 2 or total.kwargs or total.args[0] is total.args[1]:
        return None
    if total.target in (operator.iadd, "add_") and not _is_private(module, total.args[0]):
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
        found = _Found(layers, shortcut, main.input, residual, nodes, main.idle + idle)
        if _undisturbed(module, found, order):
            return found
    if act is False:
        return None
    assert isinstance(total.args[0], fx.Node) and isinstance(total.args[1], fx.Node)
    return _Found((), "given", total.args[0], total.args[1], tuple(tail), _paths(acted[: len(tail) - 1]), act)


def _is_private(module: nn.Module, node: Any) -> bool:
    """Nobody else can see it if ``node``'s memory is written: it goes back, use by use, to a fresh convolution."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if type(_of(module, node)) is nn.Conv2d:
            return True
        if _of(module, node) is None:
            return False
        node = node.args[0]
    return False


def _undisturbed(module: nn.Module, part: _Found, order: dict[fx.Node, int]) -> bool:
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


# ---- plans ------------------------------------------------------------------------------------------------------

_ABSENT = object()


def _check(module: nn.Module, fixed: dict[str, Any]) -> Check:
    """Raises Refusal where something that decided the trace has changed: attributes, children, a class."""
    entries = []
    for path, values in fixed.items():
        m = find(module, path) if path else module
        around = [(path, m)]
        around += [
            (f"{path}.{name}" if path else name, child)
            for name, child in m.named_children()
            if isinstance(child, (nn.ModuleList, nn.ModuleDict))
        ]
        kept = tuple((name, value) for name, value in values if name != "training")
        for at, container in around:
            children = tuple((name, child is None) for name, child in container._modules.items())
            entries.append((at, _original(container), kept if container is m else (), children))

    def check(module: nn.Module) -> None:
        for path, kind, values, children in entries:
            m = find(module, path, plain=True) if path else module
            at = path or "the module"
            if path:
                if _original(m) is not kind:
                    raise Refusal(f"{path} is {type(m).__name__}, was {kind.__name__} at fuse(); {_AGAIN}")
                check_plain(path, m)
            for name, value in values:
                now = m.__dict__.get(name, _ABSENT)
                if now is not value and (type(now) is not type(value) or now != value):
                    raise Refusal(f"{at} has another .{name} than at fuse(); {_AGAIN}")
            if tuple([(name, child is None) for name, child in m._modules.items()]) != children:
                raise Refusal(f"{at}: children were added or removed since fuse(); {_AGAIN}")

    return check


_AGAIN = "remedy: unfuse(model), then fuse(model)"


def _original(m: nn.Module) -> type[nn.Module]:
    return getattr(type(m), "_resnet_fast_original", type(m))


def _kind(part: _Found) -> str:
    if part.shortcut is None:
        return "conv_bn_act" if len(part.layers) == 1 else "chain"
    return {2: "basic", 3: "bottleneck"}.get(len(part.layers), "block")


def _is_worth_a_word(m: nn.Module) -> bool:
    """It runs as it is, and has no row of its own in explain()."""
    return not is_idle(m) and not holds_run(m)


def _call_part(part: Part, i: int, *args: Tensor) -> Tensor:
    return part(i, *args)


def _assemble(
    module: nn.Module, graph: fx.Graph, parts: list[_Found], kind: str | None, idle: tuple[str, ...], check: Check
) -> BlockPlan | HostPlan:
    """The plan of ``parts``, and of what is left of ``graph`` around them."""
    first = next(iter(graph.nodes))
    with graph.inserting_after(first):
        argument = graph.placeholder("resnet_fast_part")
    for i, part in enumerate(parts):
        inputs = (part.input,) if part.residual is None else (part.input, part.residual)
        with graph.inserting_before(part.end):
            call = graph.call_function(_call_part, (argument, i, *inputs))
        part.end.replace_all_uses_with(call)
        for j in range(i + 1, len(parts)):  # a later part may read what this one has replaced
            later = parts[j]
            x, residual = (call if node is part.end else node for node in (later.input, later.residual))
            assert x is not None
            parts[j] = later._replace(input=x, residual=residual)
        own = set(part.nodes)
        for node in reversed(list(graph.nodes)):
            if node in own:
                graph.erase_node(node)
    rest = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    out = next(node for node in graph.nodes if node.op == "output")
    if len(rest) == 1 and out.args[0] is rest[0] and parts[0].input is first and parts[0].shortcut != "given":
        return BlockPlan(kind or _kind(parts[0]), parts[0].layers, parts[0].shortcut, idle, check=check)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    text = scope["forward"]

    def forward(module: Any, x: Any, part: Part) -> Any:
        check(module)
        for path in idle:
            if (m := find(module, path, plain=True)) is not None:
                check_idle(path, m)
        return text(module, x, part)

    left, whole = "", kind or "traced"
    if any(part.shortcut is not None for part in parts):
        whole = kind or "block"
        called = [(str(n.target), find(module, str(n.target))) for n in rest if n.op == "call_module"]
        left = ", ".join(f"{path} ({type(m).__name__})" for path, m in called if _is_worth_a_word(m))
    plans = tuple(BlockPlan(whole, p.layers, p.shortcut) if p.layers else Join(p.act) for p in parts)
    return HostPlan(whole, plans, "forward", forward, left)
