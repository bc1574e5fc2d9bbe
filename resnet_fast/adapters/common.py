"""What the adapters share: reading a shortcut, and knowing a method's text."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from ..plan import BlockPlan, Check, ConvBnPath, HostPlan, Join, Norm, NormAct, Opaque, Part, Refusal, is_idle

__all__ = [
    "Adapter",
    "Alone",
    "BlockPlan",
    "Check",
    "ConvBnPath",
    "HostPlan",
    "Join",
    "Norm",
    "NormAct",
    "Opaque",
    "Part",
    "residual",
    "shortcut",
    "text_of",
]


class Alone(str):
    """A reason why a module cannot be fused that holds for everything inside it, too."""


#: An adapter: a block -> its plan, the reason why it cannot be fused, or None.
Adapter = Callable[[Any], "BlockPlan | HostPlan | str | None"]


def shortcut(block: Any, name: str) -> ConvBnPath | Opaque | str:
    """The shortcut in attribute ``name``: identity, Sequential(conv, norm), or anything else, called as it is."""
    m = getattr(block, name)
    if m is None or is_idle(m):
        return "identity"
    if type(m) is nn.Sequential:
        steps = [(key, type(child)) for key, child in m._modules.items() if type(child) is not nn.Identity]
        if not steps:
            return "identity"
        if len(steps) == 2 and steps[0][1] is nn.Conv2d:
            return ConvBnPath(f"{name}.{steps[0][0]}", f"{name}.{steps[1][0]}")
    return Opaque(name)


def residual(
    kind: str, layers: tuple[ConvBnPath, ...], block: Any, name: str = "downsample", idle: tuple[str, ...] = ()
) -> BlockPlan:
    """A block whose ``shortcut`` is in attribute ``name``; what has become of it is looked at in every forward."""
    side = shortcut(block, name)
    if side == "identity":
        return BlockPlan(kind, layers, side, (*idle, name))
    if isinstance(side, Opaque):
        return BlockPlan(kind, layers, side, idle)
    children = tuple(getattr(block, name)._modules)

    def check(block: Any) -> None:
        m = getattr(block, name)
        if type(m) is not nn.Sequential or tuple(m._modules) != children:
            raise Refusal(f"{name} is another one than at fuse(); remedy: unfuse(model), then fuse(model)")

    return BlockPlan(kind, layers, side, idle, check=check)


@functools.cache
def text_of(function: Any) -> str:
    """Digest of a function's text, without comments, annotations and docstring; "" where it has no source.

    A host's forward may be replaced only while the library's own is the text that it was written for.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:16]
