"""What the adapters share: reading a shortcut, and knowing a method's text."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import Any

from torch import nn

from ..plan import BlockPlan, ConvBnPath, HostPlan, Opaque, Part

__all__ = ["BlockPlan", "ConvBnPath", "HostPlan", "Opaque", "Part", "shortcut", "text_of"]


def shortcut(block: Any, name: str) -> ConvBnPath | Opaque | str:
    """The shortcut in attribute ``name``: none or identity, Sequential(conv, norm), or anything else, called as it is."""
    m = getattr(block, name)
    if m is None or type(m) is nn.Identity or (type(m) is nn.Sequential and len(m) == 0):
        return "identity"
    if type(m) is nn.Sequential and len(m) == 2 and type(m[0]) is nn.Conv2d:
        first, second = m._modules
        return ConvBnPath(f"{name}.{first}", f"{name}.{second}")
    return Opaque(name)


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
