"""The fused forward of a block or a part of one, the stage as a program, and a part unfused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as f
from . import switches
from .dispatch import forced_backend, measured_blocks, use_backend
from .folding import FoldCache, Folded, Program, arithmetic, cast, folded_block
from .guards import (
    DTYPES,
    POOL,
    block_signature,
    check_context,
    check_input,
    check_values,
    decide,
    faster_unfused,
    global_hook,
    is_usual,
    look,
    needs_grad,
    pool_of,
    pools,
    relu_of,
    transformed,
)
from .inference import fused_block
from .plan import SUBSAMPLES, BlockPlan, ConvBnPath, Join, Misfit, Opaque, Refusal, Slower, find, qualified
from .sums import check_given, check_summand, misfit
from .watch import Watch

__all__ = [
    "Handed",
    "narrow",
    "program",
    "run",
    "run_join",
    "run_program",
    "run_unfused",
    "stage_situation",
]


class Handed(NamedTuple):
    """What goes along with a tensor from block to block inside a stage, and from stage to stage inside a host's text.

    Nobody else can hold it there, so nobody can have written to it, counted or not.

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
    decision = cache.decision
    if decision is not None and backend is None and decision.holds(x):
        raise Slower(decision.reason)
    check_context()
    if backend is None:
        z, on = _run(module, plan, x, cache, handed, residual)
    else:
        with use_backend(backend):
            z, on = _run(module, plan, x, cache, handed, residual)
    return f.one_channel(z), on


def run_join(module: nn.Module, plan: Join, x: Any, residual: Any, backend: str | None = None) -> Tensor:
    """relu(x + residual) in one pass. Raises Refusal, before anything was changed, where torch's own must run."""
    check_context()
    if not relu_of(module, plan.act):
        raise Refusal(f"{plan.act} is no ReLU")
    if type(x) is not Tensor or x.dim() != 4 or x.dtype not in DTYPES or x.device.type not in ("cpu", "cuda"):
        raise Refusal("a sum is not of tensors (N, C, H, W) in float32, bfloat16, float16 on cpu and cuda")
    check_summand(x, x.dtype, x.device)
    check_summand(residual, x.dtype, x.device)
    if x.shape != residual.shape:
        raise Refusal(f"a summand is {tuple(residual.shape)}, the other one {tuple(x.shape)}")
    if backend is None:
        return f.one_channel(f.add_relu(x, residual))
    with use_backend(backend):
        return f.one_channel(f.add_relu(x, residual))


def _run(
    module: nn.Module, plan: BlockPlan, x: Tensor, cache: FoldCache, handed: Handed, residual: Tensor | None
) -> tuple[Tensor, Handed]:
    situation, folded = None, None
    if type(x) is Tensor and x.layout is torch.strided and x.device.type == "cpu" and not torch.is_grad_enabled():
        situation = _situation(module, x, handed)
        folded = cache.recall(situation)
    if folded is None:
        if plan.promotes and plan.shortcut == "identity":
            _check_promotion(x, handed)
        seen = look(module, plan, cache)
        layers, projection = seen.found
        every = [*layers, projection] if projection else layers
        usual = seen.prepared is not None and handed.dtype is None and is_usual(x, seen.prepared)
        if not usual:
            check_input(x, every, handed.dtype)
        if not seen.fits and (reason := misfit(plan, x, *seen.found)):
            raise Refusal(reason)
        if needs_grad(x, None, every):
            signature = None
            if measured_blocks(x.device):
                signature = block_signature(x, layers, projection, plan, pools(module, plan, layers))
            reason = faster_unfused(x, signature, seen.work)
            if reason is not None:
                cache.decision = decide(x, seen.watch, [la.weight for la in every], reason)
                raise Slower(reason)
            if usual:
                z = f.run_prepared(x, seen.prepared)  # type: ignore[arg-type]
                if z is not None:
                    return z, _OUTSIDE
    if isinstance(plan.shortcut, Opaque):
        if folded is None:
            check_values(x, layers)
        x, handed = narrow(x, handed), handed._replace(dtype=None)
        residual = find(module, plan.shortcut.path)(x)
    dtype = handed.dtype or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elsewhere = plan.shortcut == "given" or isinstance(plan.shortcut, Opaque)
    if elsewhere:
        _check_residual(plan, residual, x, dtype, layers if folded is None else None)
    given = folded is not None or not (any(la.batch_stats for la in every) or needs_grad(x, residual, every))
    if folded is None and given:
        wide = arithmetic(x.device, dtype, every, projection is not None)
        folded = cache.get(x.device, wide, every, situation, Watch(module, plan.paths + plan.idle))
    if folded is not None:
        answer = _run_folded(plan, x, folded, residual, handed)
        if answer is not None:
            z, bound = answer
            pool, known = pool_of(module, plan)
            if pool is not None:
                z = pool(z)
            if handed.inside:
                keeps = pool is None or known  # a maximum is no larger than what it is of
                return z, Handed(dtype=None if z.dtype == dtype else dtype, bound=bound if keeps else None)
            return cast(z, dtype), _OUTSIDE
        seen = look(module, plan, cache)
        layers, projection = seen.found
        if not seen.fits and (reason := misfit(plan, x, layers, projection)):
            raise Refusal(reason)
        if elsewhere:
            _check_residual(plan, residual, x, dtype, layers)
    x = narrow(x, handed)
    identity = plan.shortcut == "identity"
    pool, known = pool_of(module, plan)
    known = known and layers[-1].relu
    options: dict[str, Any] = {"projection": projection, "residual": residual, "identity": identity, "pool": known}
    fused = fused_block(x, layers, **options) if given and x.device.type == "cuda" else None
    z = f.residual_block(x, layers, **options) if fused is None else fused
    return z if pool is None or known else pool(z), _OUTSIDE


def _check_residual(
    plan: BlockPlan, residual: Any, x: Tensor, dtype: torch.dtype, layers: list[f.ConvBn] | None
) -> None:
    """Refuse a residual from elsewhere that torch's own rules must add to a ``dtype``; ``layers``: its shape, too."""
    try:
        check_summand(residual, dtype, x.device)
        if layers is not None:
            check_given(residual, x, layers)
    except Refusal as error:
        if isinstance(plan.shortcut, Opaque):
            raise Misfit(str(error), residual) from None
        raise


def _check_promotion(x: Any, handed: Handed) -> None:
    """Refuse a sum with ``x`` that torch makes in a wider dtype than autocast's."""
    if type(x) is not Tensor or not torch.is_autocast_enabled(x.device.type):
        return
    low, found = torch.get_autocast_dtype(x.device.type), handed.dtype or x.dtype
    if torch.promote_types(low, found) != low:
        raise Refusal(f"the sum of {low} and x, which is {found}, is in {torch.promote_types(low, found)}")


def program(
    stage: nn.Module, plans: list[BlockPlan], caches: list[FoldCache], situation: tuple[Any, ...]
) -> Program | None:
    """The blocks of ``stage``, which have just run in ``situation``, as one program; None where one of them did not run
    folded, or has a shortcut of which nothing is known.
    """
    if not switches.on("programs"):
        return None
    if any(plan.pool for plan in plans):
        return None
    if not all(cache.is_folded for cache in caches):
        return None
    paths = [
        f"{name}.{path}" for name, plan in zip(stage._modules, plans, strict=True) for path in plan.paths + plan.idle
    ]
    blocks = []
    for name, plan, cache in zip(stage._modules, plans, caches, strict=True):
        side = None
        if isinstance(plan.shortcut, Opaque):
            paths.append(f"{name}.{plan.shortcut.path}")
            side = find(stage, paths[-1])
            kind: Any = type(side)
            if side is None or qualified(kind) not in SUBSAMPLES or "forward" in vars(side):
                return None
        blocks.append((cache, isinstance(plan.shortcut, ConvBnPath), plan.shortcut == "identity", side))
    return Program(blocks, situation, Watch(stage, paths))


def stage_situation(stage: nn.Module, x: Any, handed: Handed) -> tuple[Any, ...] | None:
    """``_situation`` of a whole stage; None where it must not run as a program."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    if transformed() or global_hook():
        return None
    return _situation(stage, x, handed)


def run_program(program: Program, x: Tensor, handed: Handed) -> tuple[Tensor, Handed] | None:
    """A stage as a program that holds, and what to hand on with z; None where its blocks must run one by one."""
    answer = program(x, handed.bound)
    if answer is None:
        return None
    z, bound = f.one_channel(answer[0]), answer[1]
    kind, dtype = x.device.type, handed.dtype or x.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if handed.inside:
        return z, Handed(dtype=None if z.dtype == dtype else dtype, bound=bound)
    return cast(z, dtype), _OUTSIDE


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
    """A part as its own modules would run it, one after the other; a ``residual`` that there is is not made again."""

    def act(path: str | bool, x: Tensor) -> Tensor:
        if isinstance(path, bool):
            return F.relu(x) if path else x
        return x if (m := find(module, path)) is None else m(x)

    def norm(layer: ConvBnPath, x: Tensor) -> Tensor:
        x = find(module, layer.conv)(x)
        return x if layer.bn.startswith(f"{layer.conv}.") else find(module, layer.bn)(x)

    def total(x: Tensor, residual: Any) -> Tensor:
        z = x + residual
        if plan.promotes:
            return z
        return z.to(x.dtype) if z.shape == x.shape else x.add_(residual)  # which torch refuses

    if isinstance(plan, Join):
        return act(plan.act, total(x, residual))
    side = x
    for i, layer in enumerate(plan.layers):
        x = norm(layer, x)
        if i == len(plan.layers) - 1 and plan.shortcut is not None:
            if isinstance(plan.shortcut, ConvBnPath):
                residual = norm(plan.shortcut, side)
            elif plan.shortcut == "identity":
                residual = side
            elif isinstance(plan.shortcut, Opaque) and residual is None:
                residual = find(module, plan.shortcut.path)(side)
            x = total(x, residual)
        if not layer.has_inner_act:
            x = act(layer.act, x)
    pool = POOL if plan.pool is True else None if plan.pool is None else find(module, str(plan.pool))
    return x if pool is None else pool(x)
