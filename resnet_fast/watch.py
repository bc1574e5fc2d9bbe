"""Noticing, in a few microseconds, that nothing about a block's submodules has changed since they were last looked at.

The guards of ``plan`` read every attribute that matters, at every forward. In inference most of that is spent on
finding everything as it was: a :class:`Watch` compares by identity all that the guards could have read.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import nn

__all__ = ["Watch"]


class Watch:
    """The submodules at ``paths`` of ``module``, with the containers on the way, as they are now."""

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        seen: dict[int, nn.Module] = {}
        self._contents: list[dict[str, Any]] = []
        self._hooks: list[dict[Any, Any]] = []
        containers: dict[int, nn.Module] = {id(module): module}
        for path in paths:
            found: Any = module
            for name in path.split("."):
                containers[id(found)] = found
                found = found._modules.get(name)
                if not isinstance(found, nn.Module):
                    break
                seen[id(found)] = found
        self._keep(module.__dict__)
        for m in containers.values():
            self._keep(m._modules)
        for m in seen.values():
            # All attributes: numbers, flags, a replaced forward, and the dictionaries of what follows.
            for contents in (m.__dict__, m._parameters, m._buffers):
                self._keep(contents)
            if isinstance(m, nn.Sequential) and not m._modules:
                self._contents.append(m._modules)  # so long as it is empty it hands on what it gets
            self._hooks += [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
        self._modules = list(seen.values())
        self._kinds = [type(m) for m in self._modules]
        self._lengths = [len(contents) for contents in self._contents]
        self._values = list(chain.from_iterable(contents.values() for contents in self._contents))

    def _keep(self, contents: dict[str, Any]) -> None:
        if contents:
            self._contents.append(contents)

    def unchanged(self) -> bool:
        """Every attribute, parameter, buffer and submodule is still the same object, and there are no hooks."""
        # No loop of Python's own: this runs at every forward of every block.
        return (
            list(map(len, self._contents)) == self._lengths
            and not any(self._hooks)
            and all(map(is_, map(type, self._modules), self._kinds))
            and all(map(is_, chain.from_iterable(map(dict.values, self._contents)), self._values))
        )
