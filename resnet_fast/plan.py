"""Which submodules make up a block, the guards that are checked at every forward, and the fused forward itself.

A plan names submodules by their paths and never holds them: what is replaced inside a block (SyncBatchNorm, frozen
batch norm, DataParallel's replicas) is seen at the next forward. Where a guard fails, the block's own forward runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import functional as f
from .dispatch import forced_backend, measured_blocks, use_backend
from .folding import FoldCache, Folded, Program, arithmetic, cast, folded_block
from .inference import fused_block
from .tables import Signature
from .watch import Watch

__all__ = [
    "NORMS",
    "BlockPlan",
    "Check",
    "ConvBnPath",
    "HostPlan",
    "Join",
    "Norm",
    "Opaque",
    "Refusal",
    "any_size",
    "block_signature",
    "check_idle",
    "check_plain",
    "collect",
    "faster_unfused",
    "find",
    "is_idle",
    "norm_of",
    "pools",
    "program",
    "run",
    "run_join",
    "run_unfused",
    "stage_situation",
    "why_not_now",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Refusal(Exception):
    """Why a block cannot run fused, now or ever; the message is what explain() shows."""


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

#: Convolutions whose forward is nn.Conv2d's, followed by a ``norm`` and an ``activation`` that may be None.
_CONVS_WITH_NORM = ("detectron2.layers.wrappers.Conv2d",)


@functools.cache
def _qualified(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def norm_of(cls: type) -> Norm | None:
    """What is known of a norm's class: exactly this class, for a subclass may have another forward."""
    key: Any = cls
    return _norm_of(key)


@functools.cache
def _norm_of(cls: Any) -> Norm | None:
    norm = NORMS.get(_qualified(cls))
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
    """

    kind: str
    layers: tuple[ConvBnPath, ...]
    shortcut: ConvBnPath | Opaque | str | None = None
    idle: tuple[str, ...] = ()
    pool: str | bool | None = None
    check: Check | None = None

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
class Opaque:
    """A shortcut that is called as it is; ``path`` of the submodule."""

    path: str


@dataclasses.dataclass(frozen=True)
class Join:
    """The end of a block by itself: relu(x + residual). ``act``: path of the ReLU; True where it is a function."""

    act: str | bool

    @property
    def paths(self) -> tuple[str, ...]:
        """The ReLU, where it is a module."""
        return (self.act,) if isinstance(self.act, str) else ()

    @property
    def what(self) -> str:
        """The join in a few words, for explain()."""
        return "sum + relu"


#: ``part(i, x)`` or, where the part's shortcut is "given" and for a :class:`Join`, ``part(i, x, residual)``.
Part = Callable[..., Tensor]
Check = Callable[[nn.Module], None]


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """A module that is not fused as one: its text goes on as it is, around the parts of it that are.

    A network's stem, an nn.Sequential, a block with other modules between its layers.

    Args:
        kind: the word for it in explain().
        parts: what is fused.
        method: the method of the module that is replaced.
        forward: ``forward(module, x, part)``: that method's text, with ``part(i, x)`` in place of ``parts[i]``. May
            raise Refusal before anything else, if the module is no longer what it was planned for.
        left: what of a block runs as it is, in words, for explain().
    """

    kind: str
    parts: tuple[BlockPlan | Join, ...]
    method: str
    forward: Callable[[Any, Tensor, Part], Any]
    left: str = ""


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


def _tensor(module: nn.Module, name: str) -> Any:
    """``module.name`` for a parameter or buffer, past nn.Module.__getattr__: this runs hundreds of times a forward."""
    for home in (module._parameters, module._buffers):
        if name in home:
            return home[name]
    return getattr(module, name, None)


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


def _conv(module: nn.Module, path: str) -> nn.Conv2d:
    conv = find(module, path, plain=True)
    if type(conv) is not nn.Conv2d:
        kind: Any = type(conv)
        if _qualified(kind) not in _CONVS_WITH_NORM:
            raise Refusal(f"{path} is {type(conv).__name__}, supported is torch.nn.Conv2d")
        if conv.activation is not None:
            raise Refusal(f"{path} has an activation of its own")
    if conv.padding_mode != "zeros":
        raise Refusal(f"{path} has padding_mode={conv.padding_mode!r}, supported is 'zeros'")
    if isinstance(conv.padding, str):
        raise Refusal(f"{path} has padding={conv.padding!r}, supported are numbers")
    check_plain(path, conv)
    return conv


def _relu(module: nn.Module, act: str | bool) -> bool:
    if isinstance(act, bool):
        return act
    m = find(module, act, plain=True)
    if m is None:
        return False
    if type(m) is not nn.ReLU and type(m) is not nn.Identity:
        raise Refusal(f"{act} is {type(m).__name__}, supported are torch.nn.ReLU and none")
    check_plain(act, m)
    return type(m) is nn.ReLU


def _conv_bn(module: nn.Module, paths: ConvBnPath) -> f.ConvBn:
    """The layer as tensors and numbers, as it stands at this moment."""
    conv = _conv(module, paths.conv)
    bn = find(module, paths.bn, plain=True)
    relu = _relu(module, paths.act)
    weight, bias = _tensor(conv, "weight"), _tensor(conv, "bias")
    norm = norm_of(type(bn))
    if norm is None:
        raise Refusal(f"{paths.bn} is {type(bn).__name__}, supported is torch.nn.BatchNorm2d")
    if norm.inner and (type(bn.drop) is not nn.Identity or not (paths.has_inner_act or type(bn.act) is nn.Identity)):
        raise Refusal(f"{paths.bn} ends in {type(bn.drop).__name__}, {type(bn.act).__name__} of its own")
    if paths.has_inner_act and not norm.inner:  # convert_sync_batchnorm keeps the submodule, and does not call it
        raise Refusal(f"{paths.bn} is {type(bn).__name__}, which has no activation of its own")
    # nn.BatchNorm2d.forward's rules: what it normalises by, and whether it updates its buffers.
    training, keeps, momentum, counter, group = False, True, None, None, None
    if not norm.frozen:
        training = bn.training
        if training:
            if type(bn) is nn.SyncBatchNorm:
                group = _group(bn)
            keeps, momentum, counter = bn.track_running_stats, bn.momentum, _tensor(bn, "num_batches_tracked")
    check_plain(paths.bn, bn)
    mean, var = _tensor(bn, "running_mean"), _tensor(bn, "running_var")
    return f.ConvBn(
        weight,
        _tensor(bn, "weight"),
        _tensor(bn, "bias"),
        mean if keeps else None,
        var if keeps else None,
        counter if keeps else None,
        bias,
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        norm.eps or bn.eps,
        momentum,
        training or (mean is None and var is None),
        relu,
        group,
    )


def _group(bn: Any) -> Any:
    """The ranks over which an nn.SyncBatchNorm takes its statistics; None where it is alone, as in its own forward."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


#: F.max_pool2d(x, 3, 2, 1), where a block calls it as a function.
_POOL = nn.MaxPool2d(3, 2, padding=1)


def _pool(module: nn.Module, plan: BlockPlan) -> tuple[nn.Module | None, bool]:
    """The pooling behind a chain, if there is any, and whether it is the one that the ops know."""
    if plan.pool is None:
        return None, False
    m = _POOL if plan.pool is True else find(module, str(plan.pool), plain=True)
    if type(m) is not nn.MaxPool2d or not plan.layers[-1].act:
        return m, False
    known = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
    same = all(getattr(m, name) in (number, (number, number)) for name, number in known.items())
    watched = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return m, same and not (m.return_indices or m.ceil_mode or watched or "forward" in m.__dict__)


def collect(module: nn.Module, plan: BlockPlan) -> tuple[list[f.ConvBn], f.ConvBn | None]:
    """The block's layers and its projection. Raises Refusal where the plan does not hold at this moment."""
    if plan.check is not None:
        plan.check(module)
    layers = [_conv_bn(module, paths) for paths in plan.layers]
    projection = None
    if isinstance(plan.shortcut, ConvBnPath):
        projection = _conv_bn(module, plan.shortcut)._replace(relu=False)
    if isinstance(plan.shortcut, Opaque):
        find(module, plan.shortcut.path, plain=True)
    for path in plan.idle:
        m = find(module, path, plain=True)
        if m is None:
            continue
        check_idle(path, m)
    return layers, projection


def pools(module: nn.Module, plan: BlockPlan, layers: list[f.ConvBn]) -> bool:
    """Whether the pooling behind a chain runs in one pass with it."""
    return _pool(module, plan)[1] and layers[-1].relu


def block_signature(
    x: Tensor, layers: list[f.ConvBn], projection: f.ConvBn | None, plan: BlockPlan, pool: bool
) -> Signature | None:
    """What a whole block's row in a table is found by; None for what is not measured as a whole: frozen weights or
    statistics, statistics over several ranks, and a summand from elsewhere.
    """
    every = [*layers, projection] if projection else layers
    if plan.shortcut == "given" or not all(
        la.batch_stats and la.group is None and la.weight.requires_grad for la in every
    ):
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    shapes = tuple((tuple(la.weight.shape), la.stride, la.padding, la.dilation, la.groups) for la in every)
    opaque = isinstance(plan.shortcut, Opaque)
    flags = (plan.shortcut == "identity", opaque, projection is not None, pool, x.requires_grad)
    return Signature("block", dtype, tuple(x.shape), shapes, flags)


#: Multiply-adds of a forward, for each thread, below which a block trains unfused on a CPU: there Python adds more than
#: fusing saves (docs/conv.md, entry 24). Blocks that were measured or are pinned to a backend do as they were told.
_worth = float(os.environ.get("RESNET_FAST_MIN_MACS", 50e6))


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Inside, blocks train fused on a CPU however small they are: for those who ask whether fusing is right."""
    global _worth
    before, _worth = _worth, 0.0
    try:
        yield
    finally:
        _worth = before


def _too_small(x: Tensor, macs: float | None) -> str | None:
    """Why the block trains unfused on the CPU, if it does. ``macs``: see ``multiply_adds``."""
    if macs is None or x.device.type != "cpu" or forced_backend() is not None:
        return None
    work, worth = macs * x.shape[0] * x.shape[2] * x.shape[3], _worth * torch.get_num_threads()
    if work >= worth:
        return None
    return (
        f"{work / 1e6:.3g} million multiply-adds for {tuple(x.shape)}: fusing pays in training from {worth / 1e6:.0f} "
        "on this CPU; remedy where it pays earlier: resnet_fast.warmup, or RESNET_FAST_MIN_MACS=0 in the environment"
    )


def multiply_adds(
    module: nn.Module, plan: BlockPlan, layers: list[f.ConvBn], projection: f.ConvBn | None
) -> float | None:
    """Of a forward, for each pixel of its input; None where the original cannot train on a CPU (SyncBatchNorm)."""
    paths = [*plan.layers, *([plan.shortcut] if isinstance(plan.shortcut, ConvBnPath) else [])]
    if any(isinstance(find(module, path.bn), nn.SyncBatchNorm) for path in paths):
        return None
    macs, outputs = 0.0, 1.0
    for layer in layers:
        outputs /= layer.stride[0] * layer.stride[1]
        macs += layer.weight.numel() * outputs
    if projection is not None:
        macs += projection.weight.numel() / (projection.stride[0] * projection.stride[1])
    return macs


class _Seen(NamedTuple):
    """What ``collect`` found, and how to know that it would find the same again."""

    watch: Watch
    key: tuple[Any, ...]
    found: tuple[list[f.ConvBn], f.ConvBn | None]
    macs: float | None


def _look(module: nn.Module, plan: BlockPlan, cache: FoldCache) -> _Seen:
    """What ``collect`` finds; what it found the last time, where nothing has changed since."""
    # Which ranks there are decides what a SyncBatchNorm does. The id is safe: see _situation.
    key = id(module.__dict__), plan, dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    seen: _Seen | None = cache.seen
    if seen is not None and seen.key == key and seen.watch.unchanged():
        return seen
    cache.seen = None
    watch = Watch(module, plan.paths + plan.idle)  # first: what changes meanwhile is seen the next time
    found = collect(module, plan)
    seen = cache.seen = _Seen(watch, key, found, multiply_adds(module, plan, *found))
    return seen


def faster_unfused(x: Tensor, signature: Signature | None, macs: float | None) -> str | None:
    """Why a block trains faster as it was: measured, or on a CPU too small. ``macs``: see ``multiply_adds``."""
    known = measured_blocks(x.device)
    if signature is not None and signature in known:
        return known[signature]
    return _too_small(x, macs)


def why_not_now(module: nn.Module, plan: BlockPlan | Join) -> str | None:
    """Why the block would not run fused if it were called now, or None. What depends on the input is not known here."""
    try:
        if isinstance(plan, Join):
            _relu(module, plan.act)
            return None
        layers, projection = collect(module, plan)
    except Refusal as refusal:
        return str(refusal)
    for layer in (*layers, *([projection] if projection else [])):
        if layer.weight.dtype not in _DTYPES:
            return f"weights are {layer.weight.dtype}, supported are float32, bfloat16, float16"
    return None


def _transformed() -> bool:
    """Inside torch.compile, torch.jit.trace, torch.func, forward-mode AD or a TorchDispatchMode (make_fx, selective
    checkpointing, FLOP counters), which must see torch's own ops.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def _check_input(x: Any, layers: list[f.ConvBn], dtype: torch.dtype | None) -> None:
    """Refuse what the original forward is to judge: its errors are torch's own. ``dtype``: what x stands for."""
    w = layers[0].weight
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise Refusal(f"x is {type(x).__name__}, supported is torch.Tensor")
    # A rank without a batch still has to meet the others where statistics are merged.
    empty = x.numel() == 0 and not any(la.group is not None for la in layers)
    if x.dim() != 4 or empty or x.shape[1] != w.shape[1] * layers[0].groups:
        raise Refusal(f"x is {tuple(x.shape)}, supported are non-empty (N, {w.shape[1] * layers[0].groups}, H, W)")
    if x.dtype not in _DTYPES or x.device.type not in ("cpu", "cuda"):
        raise Refusal(f"x is {x.dtype} on {x.device}, supported are float32, bfloat16, float16 on cpu and cuda")
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = dtype or x.dtype
    for layer in layers:
        if layer.weight.device != x.device:
            raise Refusal(f"x is on {x.device}, a weight on {layer.weight.device}")
        if type(layer.weight) is not nn.Parameter and type(layer.weight) is not Tensor:
            raise Refusal(f"a weight is {type(layer.weight).__name__}, supported are tensors and parameters")
        if layer.weight.dtype != dtype and not autocast:
            raise Refusal(f"x is {dtype}, a weight {layer.weight.dtype}, without autocast")
        if layer.weight.dtype not in _DTYPES:
            raise Refusal(f"a weight is {layer.weight.dtype}, supported are float32, bfloat16, float16")


def _check_given(residual: Any, x: Tensor, layers: list[f.ConvBn]) -> None:
    """Refuse a residual from elsewhere that torch's rules of broadcasting would have to judge."""
    n, k = x.shape[0], layers[-1].weight.shape[0]
    size = list(x.shape[2:])
    for layer in layers:
        for i in (0, 1):
            span = layer.dilation[i] * (layer.weight.shape[2 + i] - 1)
            size[i] = (size[i] + 2 * layer.padding[i] - span - 1) // layer.stride[i] + 1
    if tuple(residual.shape) != (n, k, *size):
        raise Refusal(f"a summand is {tuple(residual.shape)}, the other one {(n, k, *size)}")


def _check_summand(t: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a residual from elsewhere that torch's rules of promotion would have to judge."""
    if type(t) is not Tensor and type(t) is not nn.Parameter:
        raise Refusal(f"a summand is {type(t).__name__}, supported is torch.Tensor")
    if t.dim() != 4 or t.dtype != dtype or t.device != device:
        raise Refusal(f"a summand is {tuple(t.shape)}, {t.dtype} on {t.device}, the other one {dtype} on {device}")


def _needs_grad(x: Tensor, residual: Tensor | None, layers: list[f.ConvBn]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (x, residual, *(t for la in layers for t in (la.weight, la.gamma, la.beta, la.bias)))
    return any(t is not None and t.requires_grad for t in tensors)


class Handed(NamedTuple):
    """What goes along with a tensor from block to block inside a stage, where nobody else can hold it.

    ``disposable``: the block may write over its input. ``inside``: the output, too, goes to a block of the stage alone,
    so it may stay in the dtype in which it was computed. ``dtype``: what the tensor stands for then. ``bound``: max|x|.
    """

    disposable: bool = False
    inside: bool = False
    dtype: torch.dtype | None = None
    bound: float | None = None


_OUTSIDE = Handed()


def narrow(x: Any, handed: Handed) -> Any:
    """``x`` in the dtype that it stands for."""
    return x if handed.dtype is None else x.to(handed.dtype)


def run(
    module: nn.Module,
    plan: BlockPlan,
    x: Tensor,
    cache: FoldCache,
    backend: str | None = None,
    handed: Handed = _OUTSIDE,
    residual: Tensor | None = None,
) -> tuple[Tensor, Handed]:
    """The fused forward of ``module``; and what to hand on with z, for a stage. ``residual``: a "given" shortcut.

    Raises Refusal, before anything was changed, where the original must run.
    """
    _check_context()
    if backend is None:
        return _run(module, plan, x, cache, handed, residual)
    with use_backend(backend):
        return _run(module, plan, x, cache, handed, residual)


def run_join(module: nn.Module, plan: Join, x: Any, residual: Any, backend: str | None = None) -> Tensor:
    """relu(x + residual) in one pass. Raises Refusal, before anything was changed, where torch's own must run."""
    _check_context()
    if not _relu(module, plan.act):
        raise Refusal(f"{plan.act} is no ReLU")
    if type(x) is not Tensor or x.dim() != 4 or x.dtype not in _DTYPES or x.device.type not in ("cpu", "cuda"):
        raise Refusal("a sum is not of tensors (N, C, H, W) in float32, bfloat16, float16 on cpu and cuda")
    _check_summand(residual, x.dtype, x.device)
    if x.shape != residual.shape:
        raise Refusal(f"a summand is {tuple(residual.shape)}, the other one {tuple(x.shape)}")
    if backend is None:
        return f.add_relu(x, residual)
    with use_backend(backend):
        return f.add_relu(x, residual)


def _check_context() -> None:
    """Refuse where torch's own ops, or every inner module's call, must be seen."""
    if _transformed():
        raise Refusal("inside a transform of torch")
    if (kind := _global_hook()) is not None:
        raise Refusal(f"a global {kind} hook is registered, which must see every inner module")


def _run(
    module: nn.Module, plan: BlockPlan, x: Tensor, cache: FoldCache, handed: Handed, residual: Tensor | None
) -> tuple[Tensor, Handed]:
    situation, folded = None, None
    is_plain = type(x) is Tensor and x.device.type == "cpu" and not torch.is_grad_enabled()
    if is_plain:
        situation = _situation(module, x, handed)
        folded = cache.recall(situation)
    if folded is None:
        seen = _look(module, plan, cache)
        layers, projection = seen.found
        every = [*layers, projection] if projection else layers
        _check_input(x, every, handed.dtype)
        if _needs_grad(x, None, every):
            pooled = pools(module, plan, layers)
            signature = block_signature(x, layers, projection, plan, pooled) if measured_blocks(x.device) else None
            reason = faster_unfused(x, signature, seen.macs)
            if reason is not None:
                raise Refusal(reason)
    if isinstance(plan.shortcut, Opaque):
        x, handed = narrow(x, handed), handed._replace(dtype=None)
        residual = find(module, plan.shortcut.path)(x)
    dtype = handed.dtype or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if plan.shortcut == "given":
        _check_summand(residual, dtype, x.device)
        if folded is None:
            _check_given(residual, x, layers)
    given = folded is not None or not (any(la.batch_stats for la in every) or _needs_grad(x, residual, every))
    if folded is None and given:
        wide = arithmetic(x.device, dtype, every, projection is not None)
        folded = cache.get(x.device, wide, every, situation, Watch(module, plan.paths + plan.idle))
    if folded is not None:
        answer = _run_folded(plan, x, folded, residual, handed)
        if answer is not None:
            z, bound = answer
            pool, _ = _pool(module, plan)
            if pool is not None:
                z = pool(z)
            if handed.inside:
                return z, Handed(dtype=None if z.dtype == dtype else dtype, bound=bound)
            return cast(z, dtype), _OUTSIDE
        layers, projection = _look(module, plan, cache).found
        if plan.shortcut == "given":
            _check_given(residual, x, layers)
    x = narrow(x, handed)
    identity = plan.shortcut == "identity"
    pool, known = _pool(module, plan)
    known = known and layers[-1].relu
    options: dict[str, Any] = {"projection": projection, "residual": residual, "identity": identity, "pool": known}
    fused = fused_block(x, layers, **options) if given and x.device.type == "cuda" else None
    z = f.residual_block(x, layers, **options) if fused is None else fused
    return z if pool is None or known else pool(z), _OUTSIDE


def program(stage: nn.Module, plans: list[BlockPlan], caches: list[FoldCache], x: Tensor) -> Program | None:
    """The blocks of ``stage``, which have just run on ``x`` with nothing known of it, as one program; None where one of
    them did not run folded, or must be called for its shortcut.
    """
    situation = stage_situation(stage, x)
    if situation is None or any(isinstance(plan.shortcut, Opaque) or plan.pool for plan in plans):
        return None
    if not all(cache.is_folded for cache in caches):
        return None
    paths = [
        f"{name}.{path}" for name, plan in zip(stage._modules, plans, strict=True) for path in plan.paths + plan.idle
    ]
    blocks = [
        (cache, isinstance(plan.shortcut, ConvBnPath), plan.shortcut == "identity")
        for cache, plan in zip(caches, plans, strict=True)
    ]
    return Program(blocks, situation, Watch(stage, paths))


def stage_situation(stage: nn.Module, x: Any) -> tuple[Any, ...] | None:
    """``_situation`` of a whole stage; None where it must not run as a program."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.is_grad_enabled() or _transformed() or _global_hook():
        return None
    return _situation(stage, x, _OUTSIDE)


def _global_hook() -> str | None:
    """Of which kind a hook on every module is registered, if one is."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "forward"
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        return "backward"
    return None


def _situation(module: nn.Module, x: Tensor, handed: Handed) -> tuple[Any, ...]:
    """What, besides the submodules, decides whether and how a block runs folded. The batch and the size do not."""
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    channels = x.shape[1] if x.dim() == 4 and x.numel() else 0
    # A watch of the module keeps its __dict__ alive, so that no other module's can come to have the same id.
    return id(module.__dict__), channels, handed.dtype or x.dtype, x.device, autocast, forced_backend()


def _run_folded(
    plan: BlockPlan, x: Tensor, folded: list[Folded], residual: Tensor | None, handed: Handed
) -> tuple[Tensor, float] | None:
    wide = folded[0].dtype
    operand = cast(x, wide)
    projection = isinstance(plan.shortcut, ConvBnPath)
    return folded_block(
        operand,
        folded[: len(plan.layers)],
        projection=folded[-1] if projection else None,
        residual=None if residual is None else cast(residual, wide),
        identity=plan.shortcut == "identity",
        disposable=handed.disposable or operand is not x,
        known=handed.bound,
    )


def run_unfused(module: nn.Module, plan: BlockPlan | Join, x: Tensor, residual: Any = None) -> Tensor:
    """A part as its own modules would run it, one after the other."""

    def act(path: str | bool, x: Tensor) -> Tensor:
        if isinstance(path, bool):
            return F.relu(x) if path else x
        return x if (m := find(module, path)) is None else m(x)

    def norm(layer: ConvBnPath, x: Tensor) -> Tensor:
        x = find(module, layer.conv)(x)
        return x if layer.bn.startswith(f"{layer.conv}.") else find(module, layer.bn)(x)

    if isinstance(plan, Join):
        return act(plan.act, x + residual)
    side = x
    for i, layer in enumerate(plan.layers):
        x = norm(layer, x)
        if i == len(plan.layers) - 1 and plan.shortcut is not None:
            if isinstance(plan.shortcut, ConvBnPath):
                residual = norm(plan.shortcut, side)
            elif plan.shortcut != "given":
                residual = side if plan.shortcut == "identity" else find(module, plan.shortcut.path)(side)  # type: ignore[union-attr]
            x = x + residual
        if not layer.has_inner_act:
            x = act(layer.act, x)
    pool = _POOL if plan.pool is True else None if plan.pool is None else find(module, str(plan.pool))
    return x if pool is None else pool(x)
