"""Which submodules make up a block, the guards that are checked at every forward, and the fused forward itself.

A plan names submodules by their paths and never holds them: what is replaced inside a block (SyncBatchNorm, frozen
batch norm, DataParallel's replicas) is seen at the next forward. Where a guard fails, the block's own forward runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import functional as f
from .dispatch import forced_backend, originals, use_backend
from .folding import FoldCache, Folded, Program, arithmetic, cast, folded_block
from .inference import fused_block
from .tables import Signature
from .watch import Watch

__all__ = [
    "BlockPlan",
    "ConvBnPath",
    "HostPlan",
    "Opaque",
    "Refusal",
    "block_signature",
    "collect",
    "find",
    "pools",
    "program",
    "run",
    "run_unfused",
    "stage_situation",
    "why_not_now",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Refusal(Exception):
    """Why a block cannot run fused, now or ever; the message is what explain() shows."""


@dataclasses.dataclass(frozen=True)
class ConvBnPath:
    """Paths of a convolution, its batch norm and the ReLU behind it, within a block ("layer.0.convolution").

    ``act`` is the path of the activation module; True where the block calls the ReLU as a function, False without one.
    """

    conv: str
    bn: str
    act: str | bool = False


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """What an adapter says of a block.

    Args:
        kind: the word for it in explain(): "bottleneck", "basic", "conv_bn_act", ...
        layers: the main path. The last one's ``act`` stands behind the sum.
        shortcut: None (a chain), "identity", a :class:`ConvBnPath` (a projection, without ``act``), or
            :class:`Opaque`: a submodule that is called as it is, and its output added.
        idle: paths of what must be absent, None or nn.Identity, because the plan leaves it out.
        pool: path of the pooling behind a chain. In training nn.MaxPool2d(3, 2, padding=1) runs in one pass with the
            batch norm and ReLU before it; another pooling, or none, is called as it is.
    """

    kind: str
    layers: tuple[ConvBnPath, ...]
    shortcut: ConvBnPath | Opaque | str | None = None
    idle: tuple[str, ...] = ()
    pool: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.shortcut, str) and self.shortcut != "identity":
            raise ValueError(
                f"shortcut: found {self.shortcut!r}, supported are None, 'identity', a ConvBnPath or an Opaque"
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
        if self.pool is not None:
            words.append(self.pool)
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A shortcut that is called as it is; ``path`` of the submodule."""

    path: str


Part = Callable[[int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """A module that is no block but holds sequences of convolution, norm and ReLU: a network's stem, an nn.Sequential.

    Args:
        kind: the word for it in explain().
        parts: the sequences, as chains (``shortcut=None``).
        method: the method of the module that is replaced.
        forward: ``forward(module, x, part)``: that method's text, with ``part(i, x)`` in place of ``parts[i]``. May
            raise Refusal before anything else, if the module is no longer what it was planned for.
    """

    kind: str
    parts: tuple[BlockPlan, ...]
    method: str
    forward: Callable[[Any, Tensor, Part], Any]


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
            _check_plain(container, found)
        found = modules[name] if name in modules else getattr(found, name, None)
    return found


def _tensor(module: nn.Module, name: str) -> Any:
    """``module.name`` for a parameter or buffer, past nn.Module.__getattr__: this runs hundreds of times a forward."""
    for home in (module._parameters, module._buffers):
        if name in home:
            return home[name]
    return getattr(module, name, None)


def _check_plain(path: str, m: nn.Module) -> None:
    """Refuse what a fused forward would pass over: hooks and replaced forwards of inner modules."""
    if m._forward_hooks or m._forward_pre_hooks:
        raise Refusal(f"{path} has a forward hook (or is pruned or weight-normalised), which must see its calls")
    if m._backward_hooks or m._backward_pre_hooks:
        raise Refusal(f"{path} has a backward hook, which must see its gradients")
    if "forward" in m.__dict__:
        raise Refusal(f"{path}.forward was replaced")


def _conv(module: nn.Module, path: str) -> nn.Conv2d:
    conv = find(module, path, plain=True)
    if type(conv) is not nn.Conv2d:
        raise Refusal(f"{path} is {type(conv).__name__}, supported is torch.nn.Conv2d")
    if conv.padding_mode != "zeros":
        raise Refusal(f"{path} has padding_mode={conv.padding_mode!r}, supported is 'zeros'")
    if isinstance(conv.padding, str):
        raise Refusal(f"{path} has padding={conv.padding!r}, supported are numbers")
    _check_plain(path, conv)
    return conv


def _relu(module: nn.Module, act: str | bool) -> bool:
    if isinstance(act, bool):
        return act
    m = find(module, act, plain=True)
    if m is None:
        return False
    if type(m) is not nn.ReLU and type(m) is not nn.Identity:
        raise Refusal(f"{act} is {type(m).__name__}, supported are torch.nn.ReLU and none")
    _check_plain(act, m)
    return type(m) is nn.ReLU


def _is_frozen(bn: Any) -> bool:
    """torchvision's FrozenBatchNorm2d: four buffers, always as in eval."""
    kind = type(bn)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


def _conv_bn(module: nn.Module, paths: ConvBnPath) -> f.ConvBn:
    """The layer as tensors and numbers, as it stands at this moment."""
    conv = _conv(module, paths.conv)
    bn = find(module, paths.bn, plain=True)
    relu = _relu(module, paths.act)
    weight, bias = _tensor(conv, "weight"), _tensor(conv, "bias")
    # nn.BatchNorm2d.forward's rules: what it normalises by, and whether it updates its buffers.
    kind, training, keeps, momentum, counter, group = type(bn), False, True, None, None, None
    if kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm:
        training = bn.training
        if training:
            if kind is nn.SyncBatchNorm:
                group = _group(bn)
            keeps, momentum, counter = bn.track_running_stats, bn.momentum, _tensor(bn, "num_batches_tracked")
    elif not _is_frozen(bn):
        raise Refusal(f"{paths.bn} is {kind.__name__}, supported is torch.nn.BatchNorm2d")
    _check_plain(paths.bn, bn)
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
        bn.eps,
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


def _pool(module: nn.Module, plan: BlockPlan) -> tuple[nn.Module | None, bool]:
    """The pooling behind a chain, if there is any, and whether it is the one that the ops know."""
    if plan.pool is None:
        return None, False
    m = find(module, plan.pool, plain=True)
    if type(m) is not nn.MaxPool2d or not plan.layers[-1].act:
        return m, False
    known = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
    same = all(getattr(m, name) in (number, (number, number)) for name, number in known.items())
    watched = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return m, same and not (m.return_indices or m.ceil_mode or watched or "forward" in m.__dict__)


def collect(module: nn.Module, plan: BlockPlan) -> tuple[list[f.ConvBn], f.ConvBn | None]:
    """The block's layers and its projection. Raises Refusal where the plan does not hold at this moment."""
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
        if type(m) is not nn.Identity:
            raise Refusal(f"{path} is {type(m).__name__}, which stands between the fused layers")
        _check_plain(path, m)
    return layers, projection


def pools(module: nn.Module, plan: BlockPlan, layers: list[f.ConvBn]) -> bool:
    """Whether the pooling behind a chain runs in one pass with it."""
    return _pool(module, plan)[1] and layers[-1].relu


def block_signature(
    x: Tensor, layers: list[f.ConvBn], projection: f.ConvBn | None, plan: BlockPlan, pool: bool
) -> Signature | None:
    """What a whole block's row in a table is found by; None for what is not measured as a whole: frozen weights or
    statistics, and statistics over several ranks.
    """
    every = [*layers, projection] if projection else layers
    if not all(la.batch_stats and la.group is None and la.weight.requires_grad for la in every):
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    shapes = tuple((tuple(la.weight.shape), la.stride, la.padding, la.dilation, la.groups) for la in every)
    opaque = isinstance(plan.shortcut, Opaque)
    flags = (plan.shortcut == "identity", opaque, projection is not None, pool, x.requires_grad)
    return Signature("block", dtype, tuple(x.shape), shapes, flags)


class _Seen(NamedTuple):
    """What ``collect`` found, and how to know that it would find the same again."""

    watch: Watch
    key: tuple[Any, ...]
    found: tuple[list[f.ConvBn], f.ConvBn | None]


def _look(module: nn.Module, plan: BlockPlan, cache: FoldCache) -> tuple[list[f.ConvBn], f.ConvBn | None]:
    """``collect``; what it found the last time, where nothing has changed since."""
    # Which ranks there are decides what a SyncBatchNorm does. The id is safe: see _situation.
    key = id(module.__dict__), plan, dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    seen: _Seen | None = cache.seen
    if seen is not None and seen.key == key and seen.watch.unchanged():
        return seen.found
    cache.seen = None
    watch = Watch(module, plan.paths + plan.idle)  # first: what changes meanwhile is seen the next time
    found = collect(module, plan)
    cache.seen = _Seen(watch, key, found)
    return found


def why_not_now(module: nn.Module, plan: BlockPlan) -> str | None:
    """Why the block would not run fused if it were called now, or None. What depends on the input is not known here."""
    try:
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
) -> tuple[Tensor, Handed]:
    """The fused forward of ``module``; and what to hand on with z, for a stage.

    Raises Refusal, before anything was changed, where the original must run.
    """
    if _transformed():
        raise Refusal("inside a transform of torch")
    if (kind := _global_hook()) is not None:
        raise Refusal(f"a global {kind} hook is registered, which must see every inner module")
    if backend is None:
        return _run(module, plan, x, cache, handed)
    with use_backend(backend):
        return _run(module, plan, x, cache, handed)


def _run(module: nn.Module, plan: BlockPlan, x: Tensor, cache: FoldCache, handed: Handed) -> tuple[Tensor, Handed]:
    situation, folded, residual = None, None, None
    is_plain = type(x) is Tensor and x.device.type == "cpu" and not torch.is_grad_enabled()
    if is_plain:
        situation = _situation(module, x, handed)
        folded = cache.recall(situation)
    if folded is None:
        layers, projection = _look(module, plan, cache)
        every = [*layers, projection] if projection else layers
        _check_input(x, every, handed.dtype)
        faster = originals(x.device)
        if faster and _needs_grad(x, None, every):
            signature = block_signature(x, layers, projection, plan, pools(module, plan, layers))
            if signature is not None and signature in faster:
                raise Refusal(faster[signature])
    if isinstance(plan.shortcut, Opaque):
        x, handed = narrow(x, handed), handed._replace(dtype=None)
        residual = find(module, plan.shortcut.path)(x)
    dtype = handed.dtype or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
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
        layers, projection = _look(module, plan, cache)
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


def run_unfused(module: nn.Module, plan: BlockPlan, x: Tensor) -> Tensor:
    """A chain as its own modules would run it, one after the other."""
    for layer in plan.layers:
        for path in (layer.conv, layer.bn, layer.act):
            if isinstance(path, str) and (m := find(module, path)) is not None:
                x = m(x)
    pool = None if plan.pool is None else find(module, plan.pool)
    return x if pool is None else pool(x)
