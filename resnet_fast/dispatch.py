"""Which backend runs an op: torch.library registration, the order of backends, and the reasons for every choice.

Each op of :mod:`resnet_fast.ops` becomes ``torch.ops.resnet_fast.<name>``: a schema read off its definition, one
implementation that picks a backend, and a fake (the definition on fake tensors) for torch.compile and torch.export.

A backend is a module with functions named like ops and one predicate ``why_not(op, device, dtype)``: None, or the
reason why it cannot run this op there. The first backend of ``BACKENDS`` that can, runs; the definition ("torch") is
last. ``with use_backend("native"):`` allows that one alone and raises with every reason where it cannot.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "Choice",
    "Op",
    "choose",
    "forced_backend",
    "hook",
    "op",
    "prepare",
    "reasons",
    "use_backend",
]

#: In the order in which they are asked. "torch", the definitions, is implied at the end.
BACKENDS: tuple[str, ...] = ("onednn", "cudnn", "native", "triton")

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
        lead: Tensor = args[0]
        function = choose(self.name, lead.device, lead.dtype).function
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


def hook(op_name: str, suffix: str, device: torch.device, dtype: torch.dtype) -> Any:
    """``<op>_<suffix>`` of the backend that runs ``op_name`` there and now, or None where it offers no such thing."""
    choice = choose(op_name, device, dtype)
    return None if choice.backend == "torch" else getattr(backend(choice.backend), f"{op_name}_{suffix}", None)
