"""What fuse() knows of other people's classes: one small file per model family.

An adapter is called with a block and returns a plan, a string (why this one cannot be fused), or None (nothing to say
of it). It is looked up by the exact class, named by module and qualified name, so that no library is imported here:
a subclass may have another forward, and a class of the same name elsewhere is another class.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..plan import BlockPlan, HostPlan
from . import ours, segmentation_models_pytorch, sequential, timm, torchvision, transformers
from .common import Adapter

__all__ = ["Adapter", "Unfit", "look", "register"]

#: Qualified class name -> adapter.
_LIBRARIES: dict[str, Adapter] = {
    **ours.ADAPTERS,
    **torchvision.ADAPTERS,
    **timm.ADAPTERS,
    **transformers.ADAPTERS,
    **segmentation_models_pytorch.ADAPTERS,
}

#: What register_block() added; asked first.
_REGISTERED: dict[type[nn.Module], Adapter] = {}


class Unfit(NamedTuple):
    """A block that an adapter knows and cannot fuse."""

    kind: str
    reason: str


def register(cls: type[nn.Module], adapter: Adapter) -> None:
    """Use ``adapter`` for instances of exactly ``cls``."""
    _REGISTERED[cls] = adapter


def look(module: nn.Module, cls: type[nn.Module]) -> BlockPlan | HostPlan | Unfit | None:
    """The plan for ``module``, of original class ``cls``; why there is none; or None where no adapter knows it."""
    adapter = _REGISTERED.get(cls) or _LIBRARIES.get(f"{cls.__module__}.{cls.__qualname__}")
    if adapter is None and cls.forward is nn.Sequential.forward:
        adapter = sequential.adapt
    if adapter is None:
        return None
    verdict = adapter(module)
    if isinstance(verdict, str):
        return Unfit(cls.__name__, verdict)
    if verdict is not None and not isinstance(verdict, (BlockPlan, HostPlan)):
        raise TypeError(
            f"the adapter of {cls.__qualname__} returned {type(verdict).__name__}, "
            "supported are BlockPlan, HostPlan, str (the reason why not) and None"
        )
    return verdict
