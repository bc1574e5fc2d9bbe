"""What fuse() knows of other people's classes: one small file per model family.

An adapter is called with a block and returns a plan, a string (why this one cannot be fused), or None (nothing to say
of it). It is looked up by the exact class, named by module and qualified name, so that no library is imported here:
a subclass may have another forward, and a class of the same name elsewhere is another class. Where no adapter knows a
class, ``trace`` reads its text: asked for by ``fuse(model, generic=True)``, and for blocks in the style of CIFAR
repositories, which everyone has a copy of.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..modules import FusedModule
from ..plan import NORMS, BlockPlan, HostPlan
from . import (
    cifar,
    densenet,
    detectron2,
    ours,
    segmentation_models_pytorch,
    sequential,
    timm,
    torchvision,
    tracing,
    transformers,
)
from .common import Adapter, Alone

__all__ = ["Adapter", "Unfit", "look", "register", "trace"]

_FAMILIES = (ours, torchvision, timm, transformers, segmentation_models_pytorch, detectron2, densenet)

#: Qualified class name -> adapter.
_LIBRARIES: dict[str, Adapter] = {name: adapter for family in _FAMILIES for name, adapter in family.ADAPTERS.items()}

for _family in (torchvision, timm, transformers, detectron2):
    NORMS.update(_family.NORMS)

#: What register_block() added; asked first.
_REGISTERED: dict[type[nn.Module], Adapter] = {}


class Unfit(NamedTuple):
    """A block that an adapter knows and cannot fuse. ``alone``: nor anything inside it."""

    kind: str
    reason: str
    alone: bool = False


def register(cls: type[nn.Module], adapter: Adapter) -> None:
    """Use ``adapter`` for instances of exactly ``cls``."""
    _REGISTERED[cls] = adapter


def look(module: nn.Module, cls: type[nn.Module]) -> BlockPlan | HostPlan | Unfit | None:
    """The plan for ``module``, of original class ``cls``; why there is none; or None where no adapter knows it."""
    adapter = _REGISTERED.get(cls) or _LIBRARIES.get(f"{cls.__module__}.{cls.__qualname__}")
    if adapter is None and cls.forward is nn.Sequential.forward:
        adapter = sequential.adapt
    if adapter is None and cls.__name__ in cifar.NAMES:
        adapter = cifar.block
    if adapter is None:
        return None
    verdict = adapter(module)
    if isinstance(verdict, str):
        return Unfit(cls.__name__, str(verdict), isinstance(verdict, Alone))
    if verdict is not None and not isinstance(verdict, (BlockPlan, HostPlan)):
        raise TypeError(
            f"the adapter of {cls.__qualname__} returned {type(verdict).__name__}, "
            "supported are BlockPlan, HostPlan, str (the reason why not) and None"
        )
    return verdict


def trace(module: nn.Module) -> BlockPlan | HostPlan | str | None:
    """The plan that the text of ``module`` gives; why it cannot be read; or None where there is nothing to fuse."""
    return tracing.plan(module, is_block=_is_block) if module._modules else None


def _is_block(module: nn.Module) -> bool:
    """Whether an adapter makes more of ``module`` than the runs that a trace would find in it."""
    if isinstance(module, FusedModule):
        return True
    verdict = look(module, type(module))
    if isinstance(verdict, BlockPlan):
        return verdict.shortcut is not None
    return isinstance(verdict, Unfit) or (isinstance(verdict, HostPlan) and verdict.kind != "sequence")
