"""Plans: which submodules make up a block, by their paths, and what an adapter may say of a class.

A plan names submodules by their paths and never holds them: what is replaced inside a block (SyncBatchNorm, frozen
batch norms, FSDP) is seen at the next forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = [
    "NORMS",
    "SUBSAMPLES",
    "BlockPlan",
    "Check",
    "ConvBnPath",
    "HostPlan",
    "Join",
    "Misfit",
    "Norm",
    "NormAct",
    "Opaque",
    "Part",
    "Refusal",
    "Slower",
    "check_idle",
    "check_plain",
    "find",
    "is_idle",
    "norm_of",
    "qualified",
]


class Refusal(Exception):
    """Why a block cannot run fused, now or ever; the message is what explain() shows."""


class Misfit(Refusal):
    """A shortcut has been called, once, and torch's own rules must add what came out, ``summand``."""

    def __init__(self, reason: str, summand: Any) -> None:
        super().__init__(reason)
        self.summand = summand


class Slower(Refusal):
    """The block could run fused, and its original is the faster on such an input: measured, or for its size."""


class Norm(NamedTuple):
    """What is known of a class of batch norm beside nn.BatchNorm2d.

    ``frozen``: it always normalises by its running statistics. ``inner``: ``drop`` and ``act`` of its own follow, as in
    timm's BatchNormAct2d. ``eps``: the number itself, where the class has no such attribute.
    """

    frozen: bool = False
    inner: bool = False
    eps: float | None = None


#: Every norm that can be fused, by qualified class name; adapters add those of their libraries.
NORMS: dict[str, Norm] = {
    "torch.nn.modules.batchnorm.BatchNorm2d": Norm(),
    "torch.nn.modules.batchnorm.SyncBatchNorm": Norm(),
}


#: Shortcuts of which enough is known to call them inside a stage's program, by qualified class name: new tensors, of
#: numbers of x and zeros, by x and attributes alone.
SUBSAMPLES = frozenset(("resnet_fast.models.blocks.SubsamplePad",))


@functools.cache
def qualified(cls: Any) -> str:
    """The name of a class with its module's."""
    return f"{cls.__module__}.{cls.__qualname__}"


def norm_of(cls: type) -> Norm | None:
    """What is known of a norm's class: exactly this class, for a subclass may have another forward."""
    key: Any = cls
    return _norm_of(key)


@functools.cache
def _norm_of(cls: Any) -> Norm | None:
    norm = NORMS.get(qualified(cls))
    # An eps that stands in the forward's text must still stand there.
    return None if norm and norm.eps is not None and norm.eps not in cls.forward.__code__.co_consts else norm


@dataclasses.dataclass(frozen=True)
class ConvBnPath:
    """Paths of a convolution, its batch norm and the ReLU behind it, within a block ("layer.0.convolution").

    ``act`` is the path of the activation module; True where the block calls the ReLU as a function, False without one.
    """

    conv: str
    bn: str
    act: str | bool = False

    @property
    def has_inner_act(self) -> bool:
        """The activation is the norm's own submodule, as in timm's BatchNormAct2d."""
        return isinstance(self.act, str) and self.act.startswith(f"{self.bn}.")


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A shortcut that is called as it is; ``path`` of the submodule."""

    path: str


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """What an adapter says of a block.

    Args:
        kind: the word for it in explain(): "bottleneck", "basic", "conv_bn_act", ...
        layers: the main path. The last one's ``act`` stands behind the sum.
        shortcut: None (a chain), "identity", a :class:`ConvBnPath` (a projection, without ``act``), or
            :class:`Opaque`: a submodule that is called as it is, and its output added. "given", in the parts of a
            :class:`HostPlan`: the tensor that ``part`` is called with.
        idle: paths of what must be absent, None, nn.Identity or an empty nn.Sequential: the plan leaves it out.
        pool: path of the pooling behind a chain. In training nn.MaxPool2d(3, 2, padding=1) runs in one pass with the
            batch norm and ReLU before it; another pooling, or none, is called as it is. True where the block calls
            F.max_pool2d(x, 3, 2, 1) as a function.
        check: raises Refusal where the module is no longer what the plan was made for, beyond what paths can tell.
        promotes: the sum is ``out + x``, a new tensor in the wider of two dtypes, as float32 is beside autocast's;
            False: ``out += x``, which stays in the dtype of ``out``, the main path.
    """

    kind: str
    layers: tuple[ConvBnPath, ...]
    shortcut: ConvBnPath | Opaque | str | None = None
    idle: tuple[str, ...] = ()
    pool: str | bool | None = None
    check: Check | None = None
    promotes: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.shortcut, str) and self.shortcut not in ("identity", "given"):
            raise ValueError(
                f"shortcut: found {self.shortcut!r}, supported are None, 'identity', 'given', a ConvBnPath or an Opaque"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every submodule that the fused forward takes over."""
        convs = (*self.layers, self.shortcut) if isinstance(self.shortcut, ConvBnPath) else self.layers
        paths = (*(p for c in convs for p in (c.conv, c.bn, c.act)), self.pool)
        return tuple(dict.fromkeys(p for p in paths if isinstance(p, str)))

    @property
    def what(self) -> str:
        """The block in a few words, for explain()."""
        words = [f"{c.conv} + {c.bn}{' + relu' if c.act is not False else ''}" for c in self.layers]
        if isinstance(self.shortcut, ConvBnPath):
            words.append(f"shortcut {self.shortcut.conv} + {self.shortcut.bn}")
        elif self.shortcut == "identity":
            words.append("identity")
        elif isinstance(self.shortcut, Opaque):
            words.append(f"the sum with {self.shortcut.path}, which runs as it is")
        elif self.shortcut == "given":
            words.append("the sum")
        if self.pool is not None:
            words.append("max-pool" if self.pool is True else str(self.pool))
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Join:
    """The end of a block by itself: relu(x + residual). ``act``: path of the ReLU; True where it is a function.

    ``promotes`` as for :class:`BlockPlan`.
    """

    act: str | bool
    promotes: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The ReLU, where it is a module."""
        return (self.act,) if isinstance(self.act, str) else ()

    @property
    def what(self) -> str:
        """The join in a few words, for explain()."""
        return "sum + relu"


@dataclasses.dataclass(frozen=True)
class NormAct:
    """A batch norm and its ReLU without a convolution before them; ``bn`` and ``act`` as in :class:`ConvBnPath`."""

    bn: str
    act: str | bool

    @property
    def has_inner_act(self) -> bool:
        """The activation is the norm's own submodule, as in timm's BatchNormAct2d."""
        return isinstance(self.act, str) and self.act.startswith(f"{self.bn}.")

    @property
    def paths(self) -> tuple[str, ...]:
        """Every submodule that the fused forward takes over."""
        return (self.bn, self.act) if isinstance(self.act, str) else (self.bn,)

    @property
    def what(self) -> str:
        """The pair in a few words, for explain()."""
        return f"{self.bn} + relu"


class Part(Protocol):
    """What the text of a :class:`HostPlan` calls."""

    def __call__(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Part ``i`` of ``x``; ``residual``: where its shortcut is "given", and for a :class:`Join`."""

    def chain(self, i: int, x: Tensor, *modules: Any) -> Any:
        """``modules[-1](... modules[0](part(i, x)))``, where the text does nothing else with what is in between."""


Check = Callable[[nn.Module], None]


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """A module that is not fused as one: its text goes on as it is, around the parts of it that are.

    A network's stem, an nn.Sequential, a block with other modules between its layers.

    Args:
        kind: the word for it in explain().
        parts: what is fused.
        method: the method of the module that is replaced.
        forward: ``forward(module, x, part)``: that method's text, with ``part(i, x)`` in place of ``parts[i]``, or
            ``part.chain(i, x, ...)`` where other modules follow it at once. May raise Refusal before anything else, if
            the module is no longer what it was planned for.
        further: ``forward(module, x, part, ...)`` also takes what the method is called with behind x.
        left: what of a block runs as it is, in words, for explain().
    """

    kind: str
    parts: tuple[BlockPlan | Join | NormAct, ...]
    method: str
    forward: Callable[..., Any]
    left: str = ""
    further: bool = False


@functools.lru_cache(maxsize=4096)
def _steps(path: str) -> tuple[tuple[str, str], ...]:
    """The names in ``path``, each behind the path of the container that holds it: ("", "a"), ("a", "b"), ..."""
    names = path.split(".")
    return tuple((".".join(names[:i]), name) for i, name in enumerate(names))


def find(module: nn.Module, path: str, plain: bool = False) -> Any:
    """The submodule at ``path``; None if it is absent, or None itself.

    ``plain``: it is to be called past the containers on the way, so Refusal is raised where one of them has hooks.
    """
    found: Any = module
    for container, name in _steps(path):
        modules = getattr(found, "_modules", None)
        if modules is None:
            return None
        if plain and container:
            check_plain(container, found)
        found = modules[name] if name in modules else getattr(found, name, None)
    return found


def check_plain(path: str, m: nn.Module) -> None:
    """Refuse what a fused forward would pass over: hooks and replaced forwards of inner modules."""
    if m._forward_hooks or m._forward_pre_hooks:
        raise Refusal(f"{path} has a forward hook (or is pruned or weight-normalised), which must see its calls")
    if m._backward_hooks or m._backward_pre_hooks:
        raise Refusal(f"{path} has a backward hook, which must see its gradients")
    if "forward" in m.__dict__:
        raise Refusal(f"{path}.forward was replaced")


def is_idle(m: nn.Module) -> bool:
    """Whether ``m`` hands on what it gets: nn.Identity, or an nn.Sequential of nothing."""
    return type(m) is nn.Identity or (type(m) is nn.Sequential and not m._modules)


def check_idle(path: str, m: nn.Module) -> None:
    """Refuse what a plan has left out and now does something."""
    if not is_idle(m):
        raise Refusal(f"{path} is {type(m).__name__}, which stands between the fused layers")
    check_plain(path, m)
