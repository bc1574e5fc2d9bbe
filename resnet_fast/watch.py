"""Noticing, in a few microseconds, that nothing about a block's submodules has changed since they were last looked at.

The guards of ``plan`` read every attribute that matters, at every forward. Most of that is spent on finding everything
as it was: a :class:`Watch` compares by identity all that the guards could have read.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import nn

from .dispatch import backend

__all__ = ["Watch", "unchanged_in_python"]


class Watch:
    """The submodules at ``paths`` of ``module``, with the containers on the way, as they are now.

    Without ``attributes`` and hooks, which do not decide how fast a block runs, only whether it may run fused.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str], attributes: bool = True) -> None:
        seen: dict[int, nn.Module] = {}
        contents: list[dict[str, Any]] = []
        hooks: list[dict[Any, Any]] = []
        containers: dict[int, nn.Module] = {id(module): module}
        for path in paths:
            found: Any = module
            for name in path.split("."):
                containers[id(found)] = found
                found = found._modules.get(name)
                if not isinstance(found, nn.Module):
                    break
                seen[id(found)] = found
        contents += [*([module.__dict__] if attributes else []), *(m._modules for m in containers.values())]
        for m in seen.values():
            if not attributes:
                contents.append(m._parameters)
                continue
            # All attributes: numbers, flags, a replaced forward, and the dictionaries of what follows.
            contents += [m.__dict__, m._parameters, m._buffers]
            if isinstance(m, nn.Sequential) and not m._modules:
                hooks.append(m._modules)  # so long as it is empty it hands on what it gets
            hooks += [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
        self._hooks = tuple(hooks)
        self._contents = tuple(filter(None, contents))  # no plan names what an empty one may come to hold
        self._sizes = array("q", map(len, self._contents)).tobytes()
        self._values = tuple(chain.from_iterable(map(dict.values, self._contents)))
        self._modules = tuple(seen.values())
        self._kinds = tuple(map(type, self._modules))
        self._unchanged = _comparison()

    def unchanged(self) -> bool:
        """Every attribute, parameter, buffer and submodule is still the same object, and there are no hooks."""
        return self._unchanged(self._contents, self._sizes, self._values, self._hooks, self._modules, self._kinds)


def unchanged_in_python(
    contents: tuple[dict[Any, Any], ...],
    sizes: bytes,
    values: tuple[Any, ...],
    empty: tuple[dict[Any, Any], ...],
    objects: tuple[Any, ...],
    kinds: tuple[type, ...],
) -> bool:
    """What the native kernels' ``unchanged`` is without them: dictionaries hold the very ``values``, of which each has
    as many as ``sizes`` (int64) says, others are ``empty``, ``objects`` are of their ``kinds``.
    """
    # No loop of Python's own: this runs at every forward of every block.
    return (
        array("q", map(len, contents)).tobytes() == sizes
        and not any(empty)
        and all(map(is_, map(type, objects), kinds))
        and all(map(is_, chain.from_iterable(map(dict.values, contents)), values))
    )


@functools.cache
def _comparison() -> Callable[..., bool]:
    try:
        return backend("native").unchanged
    except ImportError:
        return unchanged_in_python
