"""Whether a module's forward does the same at every call, read off its bytecode: a torch.fx trace may stand for it.

A trace is one path through Python, taken with stand-ins for tensors. Branches on a tensor's values or shape stop it;
what does not stop it, and would be frozen into it, is looked for here: isinstance, the state of torch and of other
libraries, globals, closures. Attributes of the module may be read; their values are part of the answer.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import operator
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Unreadable", "attributes"]


class Unreadable(Exception):
    """Why a forward's text cannot be trusted to do the same at every call."""


_BUILTINS = frozenset(("range", "len", "zip", "enumerate", "list", "tuple", "reversed", "super", "sum", "getattr"))
_MODULES = (torch, F, nn, torch.jit, operator, math)
#: Questions about how the code runs, answered no wherever a fused forward runs.
_ANSWERED = frozenset(("is_scripting", "is_tracing", "is_exporting", "is_compiling"))
#: What torch's and Python's own objects offer; nothing there depends on a user's state but what ``_asks_state`` names.
_KNOWN = frozenset(
    name
    for thing in (Tensor, torch, F, nn, torch.jit, operator, math, list, tuple, dict, str, nn.ModuleList, nn.ModuleDict)
    for name in dir(thing)
)
#: nn.Module's own methods that a forward may call; the rest change the module.
_OF_MODULES = frozenset(("children", "named_children", "modules", "named_modules", "training", "_modules"))
_CHANGES = (frozenset(dir(nn.Module)) - frozenset(dir(Tensor)) - _OF_MODULES) | {
    *("no_grad", "enable_grad", "inference_mode", "autocast", "manual_seed", "seed", "compile", "load", "save"),
}
#: Steps of bytecode that stand for ``with`` and ``try``: what they do at the time of tracing is not in the trace.
_BLOCKS = ("WITH_EXCEPT_START", "PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH")
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.memory_format)


def _asks_state(name: str) -> bool:
    return name.startswith(("is_", "are_", "get_", "set_")) and name not in _ANSWERED and hasattr(torch, name)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.cache
def _reads(function: FunctionType) -> tuple[frozenset[str], frozenset[FunctionType]]:
    """The names that a function reads as attributes, and the functions that it finds among its globals."""
    if set(function.__code__.co_freevars) - {"__class__"}:
        raise Unreadable(f"{function.__qualname__} closes over variables")
    names: set[str] = set()
    functions: set[FunctionType] = set()
    for code in _codes(function.__code__):
        before = None
        for step in dis.get_instructions(code):
            if step.opname == "IS_OP" and not (before and before.opname == "LOAD_CONST" and before.argval is None):
                raise Unreadable(f"{function.__qualname__} asks whether two objects are one")
            before = step
            if step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"):
                raise Unreadable(f"{function.__qualname__} sets {step.argval}")
            if step.opname in ("IMPORT_NAME", "YIELD_VALUE"):
                raise Unreadable(f"{function.__qualname__} imports or yields")
            if step.opname in _BLOCKS:
                raise Unreadable(f"{function.__qualname__} has a with or a try")
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                names.add(step.argval)
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                functions |= _look_up(function, step.argval)
        if "getattr" in code.co_names:
            names.update(constant for constant in code.co_consts if isinstance(constant, str))
    return frozenset(names), frozenset(functions)


def _look_up(function: FunctionType, name: str) -> set[FunctionType]:
    """Functions to be read as well, for a global ``name`` of ``function``."""
    value = function.__globals__.get(name, getattr(builtins, name, None))
    home = str(getattr(value, "__module__", None)).partition(".")[0]
    if isinstance(value, ModuleType) and any(value is m for m in _MODULES):
        return set()
    if inspect.isclass(value) and (issubclass(value, BaseException) or home == "torch"):
        return set()
    if name in _BUILTINS and value is getattr(builtins, name):
        return set()
    if isinstance(value, FunctionType):
        return set() if home == "torch" and not _asks_state(name) else {value}
    if isinstance(value, BuiltinFunctionType) and value is getattr(torch, name, None) and not _asks_state(name):
        return set()
    raise Unreadable(f"{function.__qualname__} depends on {name}, which may change from call to call")


def attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The module's plain attributes that its forward reads, and their values now. Raises Unreadable.

    Submodules, parameters and buffers are not among them: a trace refers to them by name. "training" is, if it is read.
    """
    found: dict[str, Any] = {}
    seen: set[FunctionType] = set()
    todo: list[Any] = [type(module).forward]
    while todo:
        function = todo.pop()
        if not isinstance(function, FunctionType):
            raise Unreadable(f"{type(module).__qualname__}.forward is no plain function")
        if function in seen:
            continue
        seen.add(function)
        names, functions = _reads(function)
        todo += functions
        for name in names:
            todo += _attribute(module, name, found)
    return tuple(sorted(found.items()))


def _function(value: Any) -> FunctionType | None:
    """The function behind a method or property; None where it is something else."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def _attribute(module: nn.Module, name: str, found: dict[str, Any]) -> list[FunctionType]:
    """Enter ``module.name`` into ``found``, if it is one; returns the functions behind it, to be read as well."""
    if name == "forward":  # past __call__: a child's hooks and borders would not be seen
        raise Unreadable("it calls .forward")
    if _asks_state(name):
        raise Unreadable(f"it asks .{name}, whose answer may change")
    if name in module._modules or name in module._parameters or name in module._buffers:
        return []
    if name in module.__dict__:
        value = module.__dict__[name]
        is_tuple = type(value) is tuple and all(isinstance(v, _CONSTANTS) for v in value)
        if isinstance(value, _CONSTANTS) or is_tuple:
            found[name] = value
            return []
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            found[name] = value
            torchs = str(value.__module__).partition(".")[0] == "torch" or isinstance(value, BuiltinFunctionType)
            return [] if torchs else [value]  # type: ignore[list-item]
        raise Unreadable(f"it reads .{name}, a {type(value).__name__}, whose contents may change")
    # Every class's own, for super() may call each; torch's are known by name.
    ours = [cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins")]
    values = [vars(cls)[name] for cls in ours if name in vars(cls)]
    functions = [f for value in values for f in (_function(value),) if f is not None]
    if functions or any(isinstance(value, _CONSTANTS) for value in values):
        return functions
    if name in _CHANGES:
        raise Unreadable(f"it uses .{name}")
    if name not in _KNOWN:
        raise Unreadable(f"it reads .{name}, of which nothing is known")
    return []
