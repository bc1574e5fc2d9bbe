"""The guards of a block, at every forward: whether its plan holds now, and for this input; else a Refusal says why.

What is read here is all that torch's own forward would have read: modules, attributes, hooks, the input, the context.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import functional as f
from .dispatch import forced_backend, measured_blocks
from .folding import FoldCache
from .plan import BlockPlan, ConvBnPath, Join, Opaque, Refusal, check_idle, check_plain, find, norm_of, qualified
from .sums import always_fits, sizes
from .tables import Signature
from .watch import Watch

__all__ = [
    "DTYPES",
    "POOL",
    "Decision",
    "Seen",
    "Work",
    "any_size",
    "block_signature",
    "check_context",
    "check_input",
    "check_values",
    "collect",
    "decide",
    "faster_unfused",
    "global_hook",
    "is_usual",
    "look",
    "needs_grad",
    "pool_of",
    "pools",
    "relu_of",
    "transformed",
    "why_not_now",
    "work_of",
]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Convolutions whose forward is nn.Conv2d's, followed by a ``norm`` and an ``activation`` that may be None.
_CONVS_WITH_NORM = ("detectron2.layers.wrappers.Conv2d",)


def _tensor(module: nn.Module, name: str) -> Any:
    """``module.name`` for a parameter or buffer, past nn.Module.__getattr__: this runs hundreds of times a forward."""
    for home in (module._parameters, module._buffers):
        if name in home:
            return home[name]
    return getattr(module, name, None)


def _conv(module: nn.Module, path: str) -> nn.Conv2d:
    conv = find(module, path, plain=True)
    if type(conv) is not nn.Conv2d:
        kind: Any = type(conv)
        if qualified(kind) not in _CONVS_WITH_NORM:
            raise Refusal(f"{path} is {type(conv).__name__}, supported is torch.nn.Conv2d")
        if conv.activation is not None:
            raise Refusal(f"{path} has an activation of its own")
    if conv.padding_mode != "zeros":
        raise Refusal(f"{path} has padding_mode={conv.padding_mode!r}, supported is 'zeros'")
    if isinstance(conv.padding, str):
        raise Refusal(f"{path} has padding={conv.padding!r}, supported are numbers")
    check_plain(path, conv)
    return conv


def relu_of(module: nn.Module, act: str | bool) -> bool:
    """Whether ``act``, as in :class:`ConvBnPath`, is a ReLU at this moment."""
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
    relu = relu_of(module, paths.act)
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
    stride, padding, dilation = (_pair(v) for v in (conv.stride, conv.padding, conv.dilation))
    # On one channel oneDNN takes a column of outputs for a row and forgets W's stride, in the layout that is ours.
    if weight.dim() == 4 and weight.shape[1] == conv.groups == 1 and stride[0] == 1 < stride[1]:
        raise Refusal(
            f"{paths.conv} reads one channel with stride {stride}, which oneDNN computes wrongly channels-last"
        )
    mean, var = _tensor(bn, "running_mean"), _tensor(bn, "running_var")
    return f.ConvBn(
        weight,
        _tensor(bn, "weight"),
        _tensor(bn, "bias"),
        mean if keeps else None,
        var if keeps else None,
        counter if keeps else None,
        bias,
        stride,
        padding,
        dilation,
        conv.groups,
        norm.eps or bn.eps,
        momentum,
        training or (mean is None and var is None),
        relu,
        group,
    )


def _pair(value: Any) -> tuple[int, int]:
    """A stride, padding or dilation as torch's convolution understands it: one number stands for both."""
    if type(value) is tuple:
        return value
    return (value, value) if isinstance(value, int) else tuple(value) * (3 - len(value))


def _group(bn: Any) -> Any:
    """The ranks over which an nn.SyncBatchNorm takes its statistics; None where it is alone, as in its own forward."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


#: F.max_pool2d(x, 3, 2, 1), where a block calls it as a function.
POOL = nn.MaxPool2d(3, 2, padding=1)


def pool_of(module: nn.Module, plan: BlockPlan) -> tuple[nn.Module | None, bool]:
    """The pooling behind a chain, if there is any, and whether it is the one that the ops know."""
    if plan.pool is None:
        return None, False
    m = POOL if plan.pool is True else find(module, str(plan.pool), plain=True)
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
    every = [*layers, *([projection] if projection else [])]
    moved = [id(la.running_mean) for la in every if la.batch_stats and la.running_mean is not None]
    if len(set(moved)) < len(moved):
        raise Refusal("one batch norm stands in two places, and its statistics move from one to the other")
    first, last = layers[0].weight, layers[-1].weight
    side = projection.weight.shape[0] if projection else first.shape[1] * layers[0].groups
    if (projection or plan.shortcut == "identity") and side != last.shape[0]:
        raise Refusal(f"a summand has {side} channels, the other one {last.shape[0]}")
    return layers, projection


def pools(module: nn.Module, plan: BlockPlan, layers: list[f.ConvBn]) -> bool:
    """Whether the pooling behind a chain runs in one pass with it."""
    return pool_of(module, plan)[1] and layers[-1].relu


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
#: How many times as many it takes where no layer has 32 output channels, and no convolution of ours gains on the
#: library's; in a block where none has more than 64; where the shortcut runs as it is (docs/conv.md, entries 43, 46).
_NARROW, _MEDIUM, _OPAQUE = 6.0, 2.0, 5.0


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Inside, blocks train fused on a CPU however small they are: for those who ask whether fusing is right."""
    global _worth
    before, _worth = _worth, 0.0
    try:
        yield
    finally:
        _worth = before


class Work(NamedTuple):
    """Multiply-adds of a block's forward, for each pixel of its input. ``least``: how many times as many it takes."""

    macs: float
    least: float = 1.0


def _too_small(x: Tensor, work: Work | None) -> str | None:
    """Why the block trains unfused on the CPU, if it does. ``work``: see ``work_of``."""
    if work is None or x.device.type != "cpu" or forced_backend() is not None:
        return None
    macs, worth = work.macs * x.shape[0] * x.shape[2] * x.shape[3], work.least * _worth * torch.get_num_threads()
    if macs >= worth:
        return None
    return (
        f"{macs / 1e6:.3g} million multiply-adds for {tuple(x.shape)}: fusing pays in training from {worth / 1e6:.0f} "
        "on this CPU; remedy where it pays earlier: resnet_fast.warmup, or RESNET_FAST_MIN_MACS=0 in the environment"
    )


def work_of(module: nn.Module, plan: BlockPlan, layers: list[f.ConvBn], projection: f.ConvBn | None) -> Work | None:
    """What a forward takes; None where the original cannot train on a CPU (SyncBatchNorm)."""
    paths = [*plan.layers, *([plan.shortcut] if isinstance(plan.shortcut, ConvBnPath) else [])]
    if any(isinstance(find(module, path.bn), nn.SyncBatchNorm) for path in paths):
        return None
    macs, outputs = 0.0, 1.0
    for layer in layers:
        outputs /= layer.stride[0] * layer.stride[1]
        macs += layer.weight.numel() * outputs
    if projection is not None:
        macs += projection.weight.numel() / (projection.stride[0] * projection.stride[1])
    widest = max(layer.weight.shape[0] for layer in layers)
    least = _NARROW if widest < 32 else _MEDIUM if widest <= 64 and len(layers) > 1 else 1.0
    return Work(macs, max(least, _OPAQUE) if isinstance(plan.shortcut, Opaque) else least)


class Seen(NamedTuple):
    """What ``collect`` found, and how to know that it would find the same again."""

    watch: Watch
    key: tuple[Any, ...]
    found: tuple[list[f.ConvBn], f.ConvBn | None]
    work: Work | None
    prepared: f.Prepared | None  # for training; None where every call must look for itself
    fits: bool  # see sums.always_fits


def look(module: nn.Module, plan: BlockPlan, cache: FoldCache) -> Seen:
    """What ``collect`` finds; what it found the last time, where nothing has changed since."""
    # Which ranks there are decides what a SyncBatchNorm does. The id is safe: see _situation.
    key = id(module.__dict__), plan, dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    seen: Seen | None = cache.seen
    if seen is not None and seen.key == key and seen.watch.unchanged():
        return seen
    cache.seen = None
    watch = Watch(module, plan.paths + plan.idle)  # first: what changes meanwhile is seen the next time
    found = collect(module, plan)
    pool, known = pool_of(module, plan)
    alone = plan.shortcut in (None, "identity") or isinstance(plan.shortcut, ConvBnPath)
    prepared = None
    if alone and (pool is None or (known and found[0][-1].relu)):
        prepared = f.prepare(*found, identity=plan.shortcut == "identity", pool=pool is not None)
    fits = always_fits(plan, *found)
    seen = cache.seen = Seen(watch, key, found, work_of(module, plan, *found), prepared, fits)
    return seen


def faster_unfused(x: Tensor, signature: Signature | None, work: Work | None) -> str | None:
    """Why a block trains faster as it was: measured, or on a CPU too small. ``work``: see ``work_of``."""
    known = measured_blocks(x.device)
    if signature is not None and signature in known:
        return known[signature]
    return _too_small(x, work)


class Decision(NamedTuple):
    """That blocks train faster as they were on inputs like one, and how to know that it would be found again.

    Of their original path, which is always right, nothing else need be known.
    """

    watch: Watch
    weights: list[Tensor]
    trained: list[bool]
    situation: tuple[Any, ...]
    reason: str

    def holds(self, x: Any) -> bool:
        """Whether ``x`` is such an input and the blocks are as they were."""
        return (
            type(x) is Tensor
            and self.situation == _size_situation(x)
            and self.trained == [w.requires_grad for w in self.weights]
            and self.watch.unchanged()
        )


def _size_situation(x: Tensor) -> tuple[Any, ...]:
    """What, besides a block, decides whether it is too small to train fused, or was measured to be."""
    device = x.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    threads, recorded = torch.get_num_threads(), torch.is_grad_enabled()
    known = measured_blocks(device)  # replaced as a whole where rows are added
    return x.shape, x.dtype, device, x.requires_grad, recorded, autocast, threads, _worth, forced_backend(), known


def decide(x: Tensor, watch: Watch, weights: list[Tensor], reason: str) -> Decision:
    """``reason`` of ``faster_unfused``, to be kept, of the blocks with these ``weights`` under ``watch``."""
    return Decision(watch, weights, [w.requires_grad for w in weights], _size_situation(x), reason)


def why_not_now(module: nn.Module, plan: BlockPlan | Join) -> str | None:
    """Why the block would not run fused if it were called now, or None. What depends on the input is not known here."""
    try:
        if isinstance(plan, Join):
            relu_of(module, plan.act)
            return None
        layers, projection = collect(module, plan)
    except Refusal as refusal:
        return str(refusal)
    for layer in (*layers, *([projection] if projection else [])):
        if layer.weight.dtype not in DTYPES:
            return f"weights are {layer.weight.dtype}, supported are float32, bfloat16, float16"
    return None


def transformed() -> bool:
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


def check_input(x: Any, layers: list[f.ConvBn], dtype: torch.dtype | None) -> None:
    """Refuse what the original forward is to judge: its errors are torch's own. ``dtype``: what x stands for."""
    w = layers[0].weight
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise Refusal(f"x is {type(x).__name__}, supported is torch.Tensor")
    # A rank without a batch still has to meet the others where statistics are merged.
    empty = x.numel() == 0 and not any(la.group is not None for la in layers)
    if x.dim() != 4 or empty or x.shape[1] != w.shape[1] * layers[0].groups:
        raise Refusal(f"x is {tuple(x.shape)}, supported are non-empty (N, {w.shape[1] * layers[0].groups}, H, W)")
    if x.dtype not in DTYPES or x.device.type not in ("cpu", "cuda") or x.layout is not torch.strided:
        found = f"{x.dtype}, {x.layout} on {x.device}"
        raise Refusal(f"x is {found}, supported are float32, bfloat16, float16, strided, on cpu and cuda")
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = dtype or x.dtype
    for layer in layers:
        if layer.weight.device != x.device:
            raise Refusal(f"x is on {x.device}, a weight on {layer.weight.device}")
        if type(layer.weight) is not nn.Parameter and type(layer.weight) is not Tensor:
            raise Refusal(f"a weight is {type(layer.weight).__name__}, supported are tensors and parameters")
        if layer.weight.dtype != dtype and not autocast:
            raise Refusal(f"x is {dtype}, a weight {layer.weight.dtype}, without autocast")
        if layer.weight.dtype not in DTYPES:
            raise Refusal(f"a weight is {layer.weight.dtype}, supported are float32, bfloat16, float16")


def is_usual(x: Any, prepared: f.Prepared) -> bool:
    """What ``check_input`` accepts without autocast, for the most frequent case and in a fraction of its time."""
    if type(x) is not Tensor or x.dim() != 4 or not (x.is_cpu or x.is_cuda) or x.dtype not in DTYPES:
        return False
    if x.layout is not torch.strided:
        return False
    device, dtype = x.get_device(), x.dtype
    for w in prepared.weights:
        if w.dtype is not dtype or w.get_device() != device or type(w) is not nn.Parameter:
            return False
    channels = prepared.weights[0].shape[1] * prepared.groups
    return x.shape[1] == channels and x.numel() > 0 and not torch.is_autocast_enabled("cpu" if device < 0 else "cuda")


def check_values(x: Tensor, layers: list[f.ConvBn]) -> None:
    """Refuse, before a shortcut is called, what a batch norm of the main path would: one value per channel."""
    if x.shape[0] == 1 and any(
        layer.batch_stats and layer.group is None and size == (1, 1)
        for layer, size in zip(layers, sizes(x, layers), strict=True)
    ):
        raise Refusal("there is one value per channel")


def needs_grad(x: Tensor, residual: Tensor | None, layers: list[f.ConvBn]) -> bool:
    """Whether autograd records the block."""
    if not torch.is_grad_enabled():
        return False
    for la in layers:  # the first one answers, as a rule
        if la.weight.requires_grad:
            return True
    tensors = (x, residual, *(t for la in layers for t in (la.gamma, la.beta, la.bias)))
    return any(t is not None and t.requires_grad for t in tensors)


def check_context() -> None:
    """Refuse where torch's own ops, or every inner module's call, must be seen."""
    if transformed():
        raise Refusal("inside a transform of torch")
    if (kind := global_hook()) is not None:
        raise Refusal(f"a global {kind} hook is registered, which must see every inner module")


def global_hook() -> str | None:
    """Of which kind a hook on every module is registered, if one is."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "forward"
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        return "backward"
    return None
