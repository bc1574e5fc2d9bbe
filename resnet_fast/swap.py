"""Swapping a module's forward: the generated subclass, what a fused module carries, and stages.

A block is swapped by assigning ``block.__class__`` a generated subclass of its own class. Keys, Parameter identity,
hooks on the block, ``isinstance``, train/eval and ``.to()`` are untouched, for the object is the same; pickles and
deepcopies name the original class. The generated forward asks the plan's guards at every call and runs the original
forward where one fails.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import copyreg
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import norm_act
from .folding import FoldCache, Program
from .guards import Decision, decide
from .plan import BlockPlan, HostPlan, Join, Misfit, NormAct, Refusal, Slower
from .running import Handed, narrow, program, run, run_join, run_program, run_unfused, stage_situation
from .watch import Watch

__all__ = [
    "KEY",
    "STAGE",
    "FuseError",
    "State",
    "attach",
    "attach_stages",
    "detach",
    "original_class",
    "parts",
    "state_of",
]

#: Where a fused module keeps what is ours, in its ``__dict__``. Never in a pickle.
KEY = "_resnet_fast"


class FuseError(RuntimeError):
    """fuse(strict=True) met a block that it cannot fuse whole; the message names each one and why."""


class State:
    """What a fused module carries: its plan, its backend, and the folded weights of each part."""

    def __init__(self, plan: BlockPlan | HostPlan, backend: str | None) -> None:
        self.plan, self.backend, self.method = plan, backend, _method(plan)
        self.caches = [FoldCache() for _ in parts(plan)]
        self.refusal: str | None = None  # why the last call ran the original forward, for explain()
        self.program: Program | None = None  # of a stage
        self.rest: Rest | None = None  # of a host or stage


def parts(plan: BlockPlan | HostPlan) -> tuple[BlockPlan | Join | NormAct, ...]:
    """What of a module is fused, one by one."""
    return plan.parts if isinstance(plan, HostPlan) else (plan,)


class Rest(NamedTuple):
    """That every block of a host or stage trains faster as it was, on inputs like one: none of them is asked then.

    ``refusals``: of the modules inside that are fused, and of the host, as explain() wants to know of them.
    """

    decision: Decision
    states: frozenset[State]
    refusals: list[tuple[State, str | None]]

    def run(self, forward: Callable[..., Any], host: nn.Module, x: Tensor) -> Any:
        """The original ``forward`` of ``host``, and of all that is at rest inside."""
        for state, refusal in self.refusals:
            state.refusal = refusal
        token = _resting.set(self.states)
        try:
            return forward(host, x)
        finally:
            _resting.reset(token)


#: Modules whose original forwards run with no more ado: what is inside of a host that is at rest.
_resting: contextvars.ContextVar[frozenset[State]] = contextvars.ContextVar("resnet_fast_resting", default=frozenset())


class _Busy:
    """Counts what ran fused, or may do so the next time, in any thread."""

    calls = 0


def _rest(host: nn.Module, x: Any, busy: int) -> Rest | None:
    """What is to be known of ``host``, which has just been called with ``x``. ``busy``: the count before."""
    if _Busy.calls != busy or type(x) is not Tensor:
        return None
    refusals, paths, weights = [], [], []
    for name, module in host.named_modules():
        state = state_of(module)
        if state is None:
            continue
        decided = [(c.decision, p) for c, p in zip(state.caches, parts(state.plan), strict=True) if c.decision]
        if decided or state.plan is STAGE:
            refusals.append((state, state.refusal))
        for decision, part in decided:
            paths += [f"{name}.{path}" if name else path for path in part.paths]
            weights += decision.weights
    if not weights:
        return None
    decision = decide(x, Watch(host, paths, attributes=False), weights, "")
    return Rest(decision, frozenset(state for state, _ in refusals), refusals)


def _forward(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The replaced method of every fused module: the plan's forward, or the original's where a guard fails."""
    if torch.compiler.is_compiling():  # the compiler fuses in its own way, and wants the original to read
        return getattr(type(self)._resnet_fast_original, self.__dict__[KEY].method)(self, *args, **kwargs)
    state: State = self.__dict__[KEY]
    plan = state.plan
    if state in _resting.get():
        return getattr(type(self)._resnet_fast_original, state.method)(self, *args, **kwargs)
    refusal, misfit = None, None
    x: Any = args[0] if args else None
    handed = _taken(x)
    rest = state.rest
    if rest is not None and len(args) == 1 and not kwargs and handed.dtype is None and rest.decision.holds(x):
        return rest.run(getattr(type(self)._resnet_fast_original, state.method), self, x)
    busy = _Busy.calls
    try:
        if not args:
            raise Refusal("called with keywords alone; remedy: give x by position")
        if (len(args) > 1 or kwargs) and not (isinstance(plan, HostPlan) and plan.further):
            raise Refusal("called with further arguments")
        if isinstance(plan, BlockPlan):
            z, on = run(self, plan, x, state.caches[0], state.backend, handed)
            _Busy.calls += 1
            return _handing(z, on, handed.inside)
        part = _Parts(self, state, handed)
        try:
            z = plan.forward(self, x, part, *args[1:], **kwargs)
        finally:
            refusal = state.refusal = part.refusal
        if len(args) == 1 and not kwargs:
            state.rest = _rest(self, x, busy) or state.rest
        return z
    except Refusal as error:
        refusal = str(error)
        misfit = error if isinstance(error, Misfit) else None
        _Busy.calls += type(error) is not Slower
    finally:
        if state.refusal != refusal:
            state.refusal = refusal
    if misfit is not None and isinstance(plan, BlockPlan):  # parts of a host see to theirs
        return run_unfused(self, plan, narrow(x, handed), misfit.summand)
    original = type(self)._resnet_fast_original
    return getattr(original, state.method)(self, *(narrow(x, handed), *args[1:])[: len(args)], **kwargs)


class _Parts:
    """One call of a module with a :class:`HostPlan`: what its text calls in place of its parts."""

    __slots__ = ("_module", "_state", "handed", "refusal")

    def __init__(self, module: nn.Module, state: State, handed: Handed) -> None:
        self._module, self._state, self.handed = module, state, handed
        self.refusal: str | None = None  # the last part's

    def __call__(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._run(i, x, residual, _NOTHING)[0]

    def _run(self, i: int, x: Tensor, residual: Tensor | None, handed: Handed) -> tuple[Tensor, Handed]:
        what, state = parts(self._state.plan)[i], self._state
        try:
            if isinstance(what, NormAct):
                answer = norm_act.run(self._module, what, x, state.backend), _NOTHING
            elif isinstance(what, Join):
                answer = run_join(self._module, what, x, residual, state.backend), _NOTHING
            else:
                answer = run(self._module, what, x, state.caches[i], state.backend, handed, residual)
            _Busy.calls += 1
            return answer
        except Refusal as error:
            self.refusal = str(error)
            residual = error.summand if isinstance(error, Misfit) else residual
            _Busy.calls += type(error) is not Slower
        if isinstance(what, NormAct):
            return norm_act.run_unfused(self._module, what, x), _NOTHING
        return run_unfused(self._module, what, x, residual), _NOTHING

    def chain(self, i: int, x: Tensor, *modules: Any) -> Any:
        """Part ``i`` of x, then ``modules``, one after the other: what is known of a tensor goes along with it."""
        z, handed = self._run(i, x, None, Handed(inside=_hands_on(modules[0])))
        return _in_turn(modules, z, handed, False)[0]


def _method(plan: BlockPlan | HostPlan) -> str:
    return plan.method if isinstance(plan, HostPlan) else "forward"


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle as the original: its class, and its state without ours."""
    with _as_original(self):
        value = self.__reduce_ex__(protocol)
    # __reduce_ex__ hands out self.__dict__ itself, into which ours has returned by now.
    if len(value) > 2 and isinstance(value[2], dict):
        state = {k: v for k, v in value[2].items() if k != KEY}
        value = (*value[:2], state, *value[3:])
    if value[0] is copyreg.__newobj__ and len(value[1]) == 1:  # type: ignore[attr-defined]
        # The pickler insists that __newobj__ makes an instance of the object's own class; protocol 0's maker does not.
        value = (copyreg._reconstructor, (value[1][0], object, None), *value[2:])  # type: ignore[attr-defined]
    return value


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """A copy of a fused module is fused: the original's copy, attached to the same plan."""
    with _as_original(self):
        twin = copy.deepcopy(self, memo)
    state: State = self.__dict__[KEY]
    attach(twin, state.plan, state.backend)
    return twin


def _no_scripting(self: Any) -> Any:
    """torch.jit.script asks here what to compile; it would read the text of ``_forward``."""
    raise FuseError(
        "torch.jit.script: found a fused model, supported is its original. Remedy: resnet_fast.unfuse(model), script "
        "it, then resnet_fast.fuse(model) again"
    )


@contextlib.contextmanager
def _as_original(module: Any) -> Iterator[None]:
    """``module`` as its original class, for a moment: calls in other threads run the original forward meanwhile."""
    state, kind = module.__dict__.pop(KEY), type(module)
    module.__class__ = kind._resnet_fast_original
    try:
        yield
    finally:
        module.__class__ = kind
        module.__dict__[KEY] = state


def _replaced(method: Callable[..., Any]) -> Callable[..., Any]:
    """``_forward`` under the name and signature of ``method``: trainers and tracers look at what a model takes."""
    return functools.wraps(method)(types.FunctionType(_forward.__code__, _forward.__globals__))


@functools.cache
def _fused_class(original: type[nn.Module], method: str) -> type[nn.Module]:
    """The generated subclass, one per class: every block of a kind stays of one type."""
    body = {
        "__module__": original.__module__,
        "__qualname__": f"Fused{original.__qualname__}",
        "__doc__": f"{original.__name__}, with its {method} fused by resnet_fast.",
        "__reduce_ex__": _reduce_ex,
        "__deepcopy__": _deepcopy,
        "__prepare_scriptable__": _no_scripting,
        "_resnet_fast_original": original,
        method: _replaced(getattr(original, method)),
    }
    return type(f"Fused{original.__name__}", (original,), body)


def attach(module: Any, plan: BlockPlan | HostPlan, backend: str | None) -> None:
    """Swap the forward of ``module``, or the method that the plan replaces."""
    module.__dict__[KEY] = State(plan, backend)
    module.__class__ = _fused_class(type(module), _method(plan))  # type: ignore[arg-type]


def detach(module: Any) -> None:
    """Undo ``attach``."""
    kind: Any = type(module)
    module.__class__ = _without(kind)
    del module.__dict__[KEY]


@functools.cache
def _without(kind: Any) -> Any:
    """``kind`` without our class: what it was made of, or, where fully_shard came after fuse(), that one's over it."""
    if "_resnet_fast_original" in vars(kind):
        return kind._resnet_fast_original
    bases = tuple(_without(base) if hasattr(base, "_resnet_fast_original") else base for base in kind.__bases__)
    body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__.replace("Fused", "", 1), bases, body)


def state_of(module: nn.Module) -> State | None:
    """What a fused module carries; None where it is not fused."""
    return module.__dict__.get(KEY)


# ---- stages -----------------------------------------------------------------------------------------------------

#: The attribute of a tensor under which hosts, stages and blocks tell each other what they know of it.
_HANDED = "_resnet_fast_handed"
_NOTHING = Handed()


def _taken(x: Any) -> Handed:
    """What was handed on with ``x``. It is taken off: it holds for one call."""
    return vars(x).pop(_HANDED, _NOTHING) if type(x) is Tensor else _NOTHING  # at once: threads may share x


def _hands_on(module: Any) -> bool:
    """A fused block or stage that is called past hooks: nobody but the caller can hold what it gets and returns."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    state = state_of(module)
    return (
        state is not None
        and (isinstance(state.plan, BlockPlan) or state.plan is STAGE)
        and not hooks
        and "forward" not in module.__dict__
    )


def _in_turn(modules: Sequence[Any], x: Any, handed: Handed, inside: bool) -> tuple[Any, Handed]:
    """``modules`` one after the other, from an ``x`` of which ``handed`` is known; and what is known of the output.

    ``inside``: whoever reads the output takes that into account.

    A module's output, once the next one has it, is that one's to overwrite.
    """
    tight = [*map(_hands_on, modules), inside]
    for i, module in enumerate(modules):
        if not tight[i]:
            x = narrow(x, handed)
        elif type(x) is Tensor:
            disposable = tight[i - 1] if i else handed.disposable
            setattr(x, _HANDED, handed._replace(disposable=disposable, inside=tight[i + 1]))
        x = module(x)
        handed = _taken(x)
    return x, handed


def _forward_stage(stage: Any, x: Any, part: Any) -> Any:
    """nn.Sequential.forward; in inference on folded weights, from the second call on, the blocks run as one program."""
    state: State = stage.__dict__[KEY]
    handed: Handed = part.handed
    situation, ready = stage_situation(stage, x, handed), state.program  # threads may share the stage
    if ready is not None and situation is not None:
        if ready.holds(situation):
            answer = run_program(ready, x, handed)
            if answer is not None:
                _Busy.calls += 1
                return _handing(*answer, handed.inside)
        else:
            state.program = ready = None
    blocks = list(stage)
    x, on = _in_turn(blocks, x, handed, handed.inside)
    if ready is None and situation is not None and all(map(_hands_on, blocks)):
        states: list[State] = [block.__dict__[KEY] for block in blocks]
        if all(s.refusal is None and s.backend is None for s in states):
            plans: Any = [s.plan for s in states]
            state.program = program(stage, plans, [s.caches[0] for s in states], situation)
    return _handing(x, on, handed.inside)


def _handing(z: Any, on: Handed, inside: bool) -> Any:
    """``z`` with what is known of it, for a reader inside."""
    if inside and type(z) is Tensor:
        setattr(z, _HANDED, on)
    return z


#: A Sequential of fused blocks. In inference, where the shortcut is the identity, z is written over x: that saves
#: memory traffic and, for large outputs, the operating system's work of mapping new pages.
STAGE = HostPlan("stage", (), "forward", _forward_stage)


def attach_stages(model: nn.Module) -> None:
    """Swap the forward of every nn.Sequential in ``model`` that is nothing but fused blocks."""
    for module in model.modules():
        if type(module).forward is not nn.Sequential.forward or len(module._modules) < 2:
            continue
        states = [state_of(child) for child in module.children()]
        if all(state is not None and isinstance(state.plan, BlockPlan) for state in states):
            attach(module, STAGE, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that an adapter knows: without ours, and without the one that FSDP2's fully_shard puts before it."""
    kind: Any = getattr(type(module), "_resnet_fast_original", type(module))
    is_sharded = kind.__module__.startswith("torch.distributed.") and len(kind.__bases__) == 2
    return kind.__bases__[1] if is_sharded else kind
