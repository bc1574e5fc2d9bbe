"""A plan for any module: its own text, as torch.fx traces it, with what can be fused made parts of a HostPlan.

Looked for are runs of convolution, batch norm and ReLU, chains of them, and the sum that joins a shortcut. All else
stays as it stands in the text, in its order: attention, drop-path (whose random numbers stay the same), pooling. A
module whose whole text is one block becomes a BlockPlan. Children that hold runs themselves are traced through where a
part crosses their border, and are called as they are elsewhere.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..plan import Refusal, check_idle, check_plain, find, is_idle, norm_of
from .common import BlockPlan, Check, HostPlan, Join, NormAct, Part
from .runs import Found, common, find_parts
from .text import Unreadable, attributes

__all__ = ["holds_run", "plan"]


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
    inputs = Inputs.of(type(module).forward)
    inner = dict(_inner(module, "", is_block, fixed))
    plans: list[BlockPlan | Join | NormAct] = []
    ways: dict[tuple[str, ...], _Way | str] = {}
    for given in inputs.ways():
        try:
            ways[given] = _way(module, inputs, given, inner, fixed, kind, plans)
        except Unreadable as reason:
            if not inputs.optional:
                raise
            ways[given] = f"cannot be traced with {', '.join(given)} alone: {reason}"
    traced = [way for way in ways.values() if isinstance(way, _Way)]
    if not traced:
        raise Unreadable(next(way for way in ways.values() if isinstance(way, str)))
    if not any(way.parts for way in traced):
        return None
    if inputs.is_one and isinstance(only := traced[0].whole, BlockPlan):
        return only

    def forward(module: Any, x: Any, part: Part, *further: Any, **named: Any) -> Any:
        given, values = inputs.bind(x, further, named)
        way = ways[given]
        if isinstance(way, str):
            raise Refusal(way)
        way.check(module)
        return way.text(module, part, *values)

    best = max(traced, key=lambda way: len(way.parts))
    return HostPlan(best.kind, tuple(plans), "forward", forward, best.left, further=True)


def _way(
    module: nn.Module,
    inputs: Inputs,
    given: tuple[str, ...],
    inner: dict[str, nn.Module],
    fixed: dict[str, Any],
    kind: str | None,
    plans: list[BlockPlan | Join | NormAct],
) -> _Way:
    """What the module does with the inputs ``given``; its parts join ``plans``."""
    holds = bool(inner)
    while True:
        graph = _trace(module, inputs, given, inner, fixed)
        parts = [p for p in find_parts(module, graph) if common(p.owners) == ""]
        if not any(p.layers or p.norm for p in parts) and not (parts and holds):
            parts = []
        # What no part reaches into from outside is called as it is, and planned by itself.
        owners = {owner for p in parts for owner in p.owners}
        needed = {name: m for name, m in inner.items() if any(f"{o}.".startswith(f"{name}.") for o in owners)}
        if needed.keys() == inner.keys():
            break
        inner = needed
    idle = tuple(dict.fromkeys(path for p in parts for path in p.idle))
    check = _check(module, {"": fixed[""], **{name: fixed[name] for name in inner}})
    return _assemble(module, graph, parts, kind, idle, check, plans)


# ---- inputs -----------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a forward takes: names in order, those that may be None, and those that must be as their default says.

    A trace is made for every choice of the optional ones: whether they are given is what ``if skip is not None`` asks.
    """

    names: tuple[str, ...]
    optional: tuple[str, ...]
    fixed: dict[str, Any]
    extra: bool  # there are *args or **kwargs, which must stay empty

    @classmethod
    def of(cls, function: Any) -> Inputs:
        """Raises Unreadable where there are too many choices, or defaults that are no constants."""
        names: list[str] = []
        optional: list[str] = []
        fixed: dict[str, Any] = {}
        extra = False
        for p in list(inspect.signature(function).parameters.values())[1:]:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                extra = True
                continue
            if p.kind is not p.POSITIONAL_OR_KEYWORD:
                raise Unreadable(f"its forward takes {p.name} by position or by keyword alone")
            names.append(p.name)
            if p.default is None:
                optional.append(p.name)
            elif isinstance(p.default, (bool, int, float, str)):
                fixed[p.name] = p.default
            elif p.default is not p.empty:
                raise Unreadable(f"its forward's {p.name} has a {type(p.default).__name__} as default")
        if not names or names[0] in optional or names[0] in fixed:
            raise Unreadable("its forward does not take an input first")
        if len(optional) > 2:
            raise Unreadable(f"its forward takes {len(optional)} inputs that may be None, supported are two")
        return cls(tuple(names), tuple(optional), fixed, extra)

    @property
    def is_one(self) -> bool:
        """Whether the forward takes x and nothing else."""
        return len(self.names) == 1 and not self.extra

    def ways(self) -> Iterator[tuple[str, ...]]:
        """The names that have a value, for every choice of the optional ones; everything first."""
        for count in range(len(self.optional), -1, -1):
            for chosen in itertools.combinations(self.optional, count):
                out = {*self.fixed, *self.optional} - {*chosen}
                yield tuple(name for name in self.names if name not in out)

    def bind(self, x: Any, further: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
        """The names that have a value in this call, and the values. Raises Refusal."""
        if self.is_one and not further and not named and x is not None:
            return self.names, [x]
        values = dict(zip(self.names, (x, *further), strict=False))
        if len(further) >= len(self.names) or values.keys() & named.keys() or named.keys() - {*self.names}:
            raise Refusal("called with further arguments")
        values |= named
        for name, default in self.fixed.items():
            now = values.pop(name, default)
            if type(now) is not type(default) or now != default:
                raise Refusal(f"called with {name}={now!r}; a trace stands for {name}={default!r} alone")
        given = tuple(name for name in self.names if values.get(name) is not None)
        if any(name not in given and name not in self.optional and name not in self.fixed for name in self.names):
            raise Refusal("called with fewer inputs than it takes, or with None")
        return given, [values[name] for name in given]


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

    def __init__(self, inner: dict[str, nn.Module], inputs: Inputs, given: tuple[str, ...]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self._inner, self._owners = inner, [""]
        self._inputs, self._given = inputs, given

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Stand-ins for what is given; for the rest the defaults, which are constants."""
        values = {name: self.create_proxy("placeholder", name, (), {}) for name in self._given}
        named = {name: values.get(name, self._inputs.fixed.get(name)) for name in self._inputs.names}

        def call(root: Any) -> Any:
            return root_fn(root, **named)

        return call, [self.root]

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


def _trace(
    module: nn.Module, inputs: Inputs, given: tuple[str, ...], inner: dict[str, nn.Module], fixed: dict[str, Any]
) -> fx.Graph:
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
                graphs.append(_Tracer(inner, inputs, given).trace(module))
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


def _kind(part: Found) -> str:
    if part.shortcut is None:
        return "conv_bn_act" if len(part.layers) == 1 else "chain"
    return {2: "basic", 3: "bottleneck"}.get(len(part.layers), "block")


def _is_worth_a_word(m: nn.Module) -> bool:
    """It runs as it is, and has no row of its own in explain()."""
    return not is_idle(m) and not holds_run(m)


def _call_part(part: Part, i: int, *args: Tensor) -> Tensor:
    return part(i, *args)


class _Way(NamedTuple):
    """A module's text for one choice of its inputs: ``text(module, part, *values)``."""

    text: Callable[..., Any]
    check: Check
    parts: tuple[BlockPlan | Join | NormAct, ...]
    kind: str
    left: str
    whole: BlockPlan | None  # where the text is nothing but one block of x


def _part_plan(kind: str, part: Found) -> BlockPlan | Join | NormAct:
    if part.norm:
        return NormAct(part.norm, part.act)
    if not part.layers:
        return Join(part.act, part.promotes)
    return BlockPlan(kind, part.layers, part.shortcut, promotes=part.promotes)


def _assemble(
    module: nn.Module,
    graph: fx.Graph,
    parts: list[Found],
    kind: str | None,
    idle: tuple[str, ...],
    check: Check,
    plans: list[BlockPlan | Join | NormAct],
) -> _Way:
    """The plans of ``parts``, and the text of what is left of ``graph`` around them, which calls them by number."""
    joined = any(part.shortcut is not None for part in parts)
    whole = kind or ("block" if joined else "traced")
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        argument = graph.placeholder("resnet_fast_part")
    numbers = []
    for part in parts:
        plan = _part_plan(whole, part)
        if plan not in plans:
            plans.append(plan)
        numbers.append(plans.index(plan))
    for i, part in enumerate(parts):
        inputs = (part.input,) if part.residual is None else (part.input, part.residual)
        with graph.inserting_before(part.end):
            call = graph.call_function(_call_part, (argument, numbers[i], *inputs))
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
    block = None
    is_block = len(parts) == 1 and parts[0].layers and parts[0].input is first and parts[0].shortcut != "given"
    if is_block and len(rest) == 1 and out.args[0] is rest[0]:
        block = BlockPlan(
            kind or _kind(parts[0]), parts[0].layers, parts[0].shortcut, idle, check=check, promotes=parts[0].promotes
        )
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)

    def holds(module: nn.Module) -> None:
        check(module)
        for path in idle:
            if (m := find(module, path, plain=True)) is not None:
                check_idle(path, m)

    left = ""
    if joined:
        called = [(str(n.target), find(module, str(n.target))) for n in rest if n.op == "call_module"]
        left = ", ".join(f"{path} ({type(m).__name__})" for path, m in called if _is_worth_a_word(m))
    return _Way(scope["forward"], holds, tuple(plans[n] for n in numbers), whole, left, block)
