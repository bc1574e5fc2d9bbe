"""Which backend runs an op: torch.library registration, the order of backends, and the reasons for every choice.

Each op of :mod:`resnet_fast.ops` becomes ``torch.ops.resnet_fast.<name>``: a schema read off its definition, one
implementation that picks a backend, and a fake (the definition on fake tensors) for torch.compile and torch.export.

A backend is a module with functions named like ops and one predicate ``why_not(op, device, dtype)``: None, or the
reason why it cannot run this op there. The first backend of ``BACKENDS`` that can, runs; the definition ("torch") is
last. ``with use_backend("native"):`` allows that one alone and raises with every reason where it cannot.

Where the op, at this shape, was measured (:mod:`resnet_fast.tables`, filled by ``resnet_fast.warmup``), the fastest way
comes before that order. Nothing is measured here: a look at a dictionary, and none where there are no rows.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tables
from .tables import Candidate, Row, Signature

__all__ = [
    "BACKENDS",
    "OPS",
    "PARTS",
    "SIGNATURES",
    "BackendError",
    "Choice",
    "Op",
    "Table",
    "add_rows",
    "assume",
    "choose",
    "direct",
    "forced_backend",
    "forget",
    "fused_sums",
    "hook",
    "measured_blocks",
    "measured_inference",
    "op",
    "prepare",
    "reasons",
    "resolve",
    "table",
    "tuned",
    "use_backend",
]

#: In the order in which they are asked. "torch", the definitions, is implied at the end. "cudnn" comes where no other
#: can: its ReLU drops NaN, and nothing says beforehand that there is none.
BACKENDS: tuple[str, ...] = ("onednn", "native", "triton", "cudnn")

#: Every op by name, in the order of definition.
OPS: dict[str, Op] = {}

_LIBRARY = torch.library.Library("resnet_fast", "DEF")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("resnet_fast_backend", default=None)


class BackendError(RuntimeError):
    """The backend asked for cannot run an op; the message holds every reason."""


class Choice(NamedTuple):
    """What ``choose`` picked: the backend's name and its function."""

    backend: str
    function: Callable[..., Any]


class Op:
    """One op: call it to run the best backend, or ``.definition`` for the plain torch text."""

    def __init__(self, definition: Callable[..., Any]) -> None:
        functools.update_wrapper(self, definition)
        self.name: str = definition.__name__
        self.definition = definition
        self.signature = inspect.signature(definition)
        self.lead = next(iter(self.signature.parameters))  # its device and dtype decide who runs the op
        self.schema: str = torch.library.infer_schema(definition, mutates_args=())
        _LIBRARY.define(self.name + self.schema)
        # CompositeExplicitAutograd: one implementation for every device. The device is looked at in choose().
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnet_fast::{self.name}", definition, lib=_LIBRARY)
        self._overload = getattr(torch.ops.resnet_fast, self.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _nobody_listens() and _PLAIN.issuperset(map(type, (*args, *kwargs.values()))):
            return self._run(*args, **kwargs)
        return self._overload(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        lead: Tensor = args[0] if args else kwargs[self.lead]
        choice = tuned(self.name, *args, **kwargs) if self.name in SIGNATURES else None
        function = (choice or choose(self.name, lead.device, lead.dtype)).function
        if torch.is_autocast_enabled(lead.device.type):
            # Casting was decided before the op was called: a library convolution inside must not cast again.
            with torch.autocast(lead.device.type, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op resnet_fast::{self.name}{self.schema}>"


#: What the arguments of an op are, where no subclass of Tensor wants to see it.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, list))


def _nobody_listens() -> bool:
    """Whether the dispatcher would do nothing but call ``_run``: no autograd, compiler, mode, transform or profiler.

    Then it can be left out, which saves 7 us a call.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


def direct(lead: Tensor, others: Iterable[Any] = ()) -> Any:
    """The functions that run ops for tensors like ``lead``, by their names: what calling the ops comes to, decided once
    for many of them. None where each must decide for itself.

    That is where somebody listens to the dispatcher, under autocast, under ``use_backend``, with a table of what was
    measured, and for subclasses of Tensor, among ``others`` too. Grad mode must be off.
    """
    device = lead.device
    if (
        _forced.get() is not None
        or _assumed.get() is not None
        or (_tables.get(device) or table(device)).choices
        or torch.is_autocast_enabled(device.type)
        or not _nobody_listens()
        or not _PLAIN.issuperset(map(type, (lead, *others)))
    ):
        return None
    return _Direct(device, lead.dtype)


class _Direct:
    """Each op's function on one device, for one dtype."""

    __slots__ = ("_device", "_dtype")

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _choose(name, self._device, self._dtype, None).function


def op(definition: Callable[..., Any]) -> Op:
    """Decorator: register a definition as an op of the vocabulary."""
    OPS[definition.__name__] = Op(definition)
    return OPS[definition.__name__]


@functools.cache
def backend(name: str) -> ModuleType:
    """The backend module ``name``, imported on first use."""
    return importlib.import_module(f"resnet_fast.backends.{name}")


def _check_backend_name(name: str) -> None:
    known = (*BACKENDS, "torch")
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"backend: found {name!r}; supported are {', '.join(map(repr, known))}.{hint}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside on backend ``name`` alone: one of ``BACKENDS``, or "torch", the definitions.

    Raises ``ValueError`` for an unknown name at once and :class:`BackendError`, with the reason, for an op which that
    backend cannot run. ``None`` restores the automatic choice. Holds for the current thread or task, and for the
    backward, wherever it runs, of the blocks whose forward ran inside.
    """
    if name is not None:
        _check_backend_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that ``use_backend`` asks for here, or None; None where torch.compile reads, which cannot ask."""
    return None if torch.compiler.is_compiling() else _forced.get()


def _why_not(name: str, op_name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        module = backend(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    if not hasattr(module, op_name):
        return f"has no {op_name}"
    return module.why_not(op_name, device, dtype)


def reasons(op_name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Per backend: None where it can run ``op_name`` there, else why not. In order; "torch" is always able."""
    answers = {name: _why_not(name, op_name, device, dtype) for name in BACKENDS}
    answers["torch"] = None
    return answers


def choose(op_name: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend that runs ``op_name`` for tensors of ``dtype`` on ``device``. Choices are cached."""
    return _choose(op_name, device, dtype, _forced.get())


@functools.lru_cache(maxsize=1024)
def _choose(op_name: str, device: torch.device, dtype: torch.dtype, forced: str | None) -> Choice:
    if forced == "torch":
        return Choice("torch", OPS[op_name].definition)
    if forced is not None:
        answers = reasons(op_name, device, dtype)
        if answers[forced] is None:
            return Choice(forced, getattr(backend(forced), op_name))
        able = [name for name, reason in answers.items() if reason is None]
        raise BackendError(
            f"backend {forced!r} cannot run {op_name} on {device} in {dtype}: {answers[forced]}. "
            f"Able here: {', '.join(able)}. Remedy: use_backend(None) for the automatic choice."
        )
    for name in BACKENDS:
        if _why_not(name, op_name, device, dtype) is None:
            return Choice(name, getattr(backend(name), op_name))
    return Choice("torch", OPS[op_name].definition)


def prepare(
    op_name: str, w: Tensor, x: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Weight ``w`` in the layout that the backend of ``op_name`` likes best for inputs like ``x``.

    A backend offers it as ``<op>_prepare(w, input_size, stride, padding, dilation, groups)``; elsewhere ``w`` is made
    channels-last.
    """
    lay_out = hook(op_name, "prepare", x.device, x.dtype)
    if lay_out is None:
        return w.contiguous(memory_format=torch.channels_last)
    return lay_out(w, list(x.shape), stride, padding, dilation, groups)


def hook(op_name: str, suffix: str, device: torch.device, dtype: torch.dtype, choice: Choice | None = None) -> Any:
    """``<op>_<suffix>`` of the backend that runs ``op_name`` there and now, or None where it offers no such thing.

    ``choice``: what ``tuned`` says of the call in question, which comes before the order of backends.
    """
    choice = choice or choose(op_name, device, dtype)
    return None if choice.backend == "torch" else getattr(backend(choice.backend), f"{op_name}_{suffix}", None)


# ---- what was measured ------------------------------------------------------------------------------------------

#: In place of a backend's name, for an op that does what others do one after the other: those others, each by its row.
PARTS = "parts"

Sizes = Iterable[int]


def _conv(x: Tensor, w: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> tuple[Any, Any]:
    return tuple(x.shape), ((tuple(w.shape), tuple(stride), tuple(padding), tuple(dilation), groups),)


def _conv_stats(
    x: Tensor,
    w: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    scale: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Signature:
    return Signature("conv_stats", x.dtype, *_conv(x, w, stride, padding, dilation, groups), (scale is not None,))


def _conv_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    needs_x: bool,
    needs_w: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Signature:
    flags = (needs_x, needs_w, scale is not None, y is not None, gscale is not None, residual is not None)
    return Signature("conv_backward", x.dtype, *_conv(x, w, stride, padding, dilation, groups), flags)


def _conv_backward_sums(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    needs_w: bool,
    xmean: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Signature:
    flags = (needs_w, y is not None)
    return Signature("conv_backward_sums", x.dtype, *_conv(x, w, stride, padding, dilation, groups), flags)


#: Ops whose choice depends on the shape: from an op's arguments, in its own order, what its rows are found by.
SIGNATURES: dict[str, Callable[..., Signature]] = {
    "conv_stats": _conv_stats,
    "conv_backward": _conv_backward,
    "conv_backward_sums": _conv_backward_sums,
}


class Table(NamedTuple):
    """What is known of one device. ``unable``: rows whose fastest candidate cannot run here and now, and why."""

    rows: dict[Signature, Row]
    choices: dict[Signature, Choice]
    blocks: dict[Signature, str | None]  # how it was found that one is faster as it was; None where it is not
    unable: dict[Signature, str]
    inference: dict[Signature, Row]  # whole blocks in inference: inference.py knows their ways


_tables: dict[torch.device, Table] = {}
_NO_ROWS: Mapping[Any, Any] = MappingProxyType({})


def resolve(signature: Signature, candidate: Candidate, device: torch.device) -> Choice | str:
    """What runs ``candidate``, or why it cannot run here."""
    name, config = candidate.backend, candidate.config
    if name == PARTS or name == "torch":
        return Choice(name, OPS[signature.op].definition)
    if name not in BACKENDS:
        return f"no backend of the name {name!r}"
    reason = _why_not(name, signature.op, device, signature.dtype)
    if reason is not None:
        return reason
    if config is None:
        return Choice(name, getattr(backend(name), signature.op))
    try:
        return Choice(name, backend(name).configured(signature.op, config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{name} has no configuration {config!r} ({error})"


def add_rows(device: torch.device, rows: Iterable[Row]) -> None:
    """From now on the fastest candidate of each row runs on ``device``."""
    known = _tables.get(device) or Table({}, {}, {}, {}, {})
    # Replaced as a whole, so that threads may go on reading.
    new = Table(dict(known.rows), dict(known.choices), dict(known.blocks), dict(known.unable), dict(known.inference))
    for row in rows:
        signature, best = row.signature, row.candidates[0]
        new.rows[signature] = row
        new.choices.pop(signature, None)
        new.blocks.pop(signature, None)
        new.unable.pop(signature, None)
        if signature.op == "inference":
            new.inference[signature] = row
            continue
        if signature.op == "block":
            new.blocks[signature] = None
            if best.backend == "original":
                other = next((c.seconds for c in row.candidates if c.backend != "original"), best.seconds)
                new.blocks[signature] = (
                    f"measured: {other / best.seconds:.2f}x as fast as it was, on {tables.device_name(device)}"
                )
            continue
        choice = resolve(signature, best, device)
        if isinstance(choice, Choice):
            new.choices[signature] = choice
        else:
            new.unable[signature] = choice
    _tables[device] = new


def table(device: torch.device) -> Table:
    """What is known of ``device``: read from its files at the first call."""
    known = _tables.get(device)
    if known is None:
        add_rows(device, tables.load(device).values())
        known = _tables[device]
    return known


def forget(device: torch.device | None = None) -> None:
    """Drop what is known, of one device or of all: the files are read again."""
    if device is None:
        _tables.clear()
    else:
        _tables.pop(device, None)


def tuned(op_name: str, *args: Any, **kwargs: Any) -> Choice | None:
    """The fastest way to run this call, if it was measured; never under ``use_backend``, which asks for another."""
    device = (args[0] if args else kwargs[OPS[op_name].lead]).device
    choices = (_tables.get(device) or table(device)).choices
    if not choices or _forced.get() is not None:
        return None
    return choices.get(SIGNATURES[op_name](*args, **kwargs))


_assumed: contextvars.ContextVar[Callable[..., bool] | None] = contextvars.ContextVar(
    "resnet_fast_assumed", default=None
)


@contextlib.contextmanager
def assume(decide: Callable[..., bool]) -> Iterator[None]:
    """Inside, ``decide(*args, **kwargs)`` says whether ``fused_sums`` fuses, and the op itself is what it returns."""
    token = _assumed.set(decide)
    try:
        yield
    finally:
        _assumed.reset(token)


def fused_sums(*args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """What runs ``conv_backward_sums`` of these arguments; None where ``conv_backward`` and the sums shall run apart.

    Without a row that follows from the backend that runs ``conv_backward``: where it offers both in one, it is asked.
    """
    decide = _assumed.get()
    if decide is not None:
        return OPS["conv_backward_sums"] if decide(*args, **kwargs) else None
    choice = tuned("conv_backward_sums", *args, **kwargs)
    if choice is not None:
        return None if choice.backend == PARTS else choice.function
    g: Tensor = args[0]
    return hook("conv_backward", "sums", g.device, g.dtype)


def measured_blocks(device: torch.device) -> Mapping[Signature, str | None]:
    """Blocks that were measured on ``device``: the reason to give where one is faster unfused, None where fused."""
    if _forced.get() is not None:
        return _NO_ROWS
    return (_tables.get(device) or table(device)).blocks


def measured_inference(device: torch.device) -> Mapping[Signature, Row]:
    """Blocks whose inference was measured on ``device``; none under ``use_backend``, which asks for one way."""
    if _forced.get() is not None:
        return _NO_ROWS
    return (_tables.get(device) or table(device)).inference
