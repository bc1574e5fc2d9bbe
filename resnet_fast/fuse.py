"""fuse(), unfuse(), fused(), explain(), register_block(): which modules of a model are swapped, and why not others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from . import adapters, dispatch, norm_act, schedule
from .guards import why_not_now
from .modules import FusedModule
from .plan import BlockPlan, HostPlan, Join, NormAct, Opaque, find
from .swap import KEY, STAGE, FuseError, State, attach, attach_stages, detach, original_class, parts, state_of

__all__ = ["Explanation", "FuseError", "Row", "explain", "fuse", "fused", "register_block", "unfuse"]

M = TypeVar("M", bound=nn.Module)


class _Candidate(NamedTuple):
    name: str
    module: nn.Module
    plan: BlockPlan | HostPlan | None
    kind: str
    reason: str  # why not, where there is no plan


def _ids(module: nn.Module, plan: BlockPlan | Join | NormAct) -> Iterator[int]:
    """The submodules that a plan takes over, and the containers on the way to them."""
    for path in plan.paths:
        names = path.split(".")
        for end in range(1, len(names) + 1):
            yield id(find(module, ".".join(names[:end])))


def _candidates(model: nn.Module, generic: bool = False, why: bool = False) -> Iterator[_Candidate]:
    """Every module that an adapter knows, and every convolution or norm that none of them covers.

    ``generic``: what no adapter knows is traced. ``why``: say of the uncovered ones what a trace would make of them.
    """
    covered: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in covered:
            continue
        state = state_of(module)
        if isinstance(module, FusedModule):
            verdict: Any = module.plan
        else:
            verdict = state.plan if state else adapters.look(module, original_class(module))
        if generic and verdict is None and not isinstance(found := adapters.trace(module), str):
            verdict = found
        if verdict is None or verdict is STAGE:
            continue
        if isinstance(verdict, adapters.Unfit):
            covered.update(map(id, module.modules()) if verdict.alone else ())
            yield _Candidate(name, module, None, verdict.kind, verdict.reason)
            continue
        for plan in parts(verdict):
            covered.update(_ids(module, plan))
        yield _Candidate(name, module, verdict, verdict.kind, "")
    traced: dict[str, Any] = {}
    for name, module in model.named_modules():
        if id(module) not in covered and isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
            reason = _unknown(model, name, traced) if why else _UNKNOWN
            yield _Candidate(name, module, None, type(module).__name__, reason)


_UNKNOWN = "not part of a block or sequence that an adapter knows"


def _unknown(model: nn.Module, name: str, traced: dict[str, Any]) -> str:
    """Why the convolution or norm ``name`` is covered by nothing: what a trace makes of the module around it.

    ``traced``: what traces made of modules so far.
    """
    around = name.rpartition(".")[0]
    while around and isinstance(find(model, around), (nn.ModuleList, nn.ModuleDict)):
        around = around.rpartition(".")[0]
    module = find(model, around) if around else model
    if around not in traced:
        traced[around] = None if state_of(module) else adapters.trace(module)
    found = traced[around]
    if isinstance(found, str):
        return f"{_UNKNOWN}; {around or 'the model'} {found}"
    if found is not None and id(find(model, name)) in {i for part in parts(found) for i in _ids(module, part)}:
        return f"{_UNKNOWN}; fuse(model, generic=True) fuses it"
    return f"{_UNKNOWN}; no convolution and batch norm follow each other here"


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, supported is torch.nn.Module")


def fuse(
    model: M,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    backend: str | None = None,
    strict: bool = False,
    generic: bool = False,
) -> M:
    """Swap the blocks of ``model`` for fused ones, in place; returns the same model.

    Args:
        model: any module: a torchvision, timm, transformers or segmentation-models-pytorch network, our own, or one
            whose blocks were registered. What is not recognised stays as it is; :func:`explain` says why.
        filter_fn: called with (name, module) of each block; where it returns False the block is left alone.
        backend: run on this backend alone ("native", "onednn", "cudnn", "triton", "torch"); None chooses per op.
        strict: raise :class:`FuseError`, and leave the model as it was, if a block cannot be fused whole.
        generic: also look into modules that no adapter knows: their forwards are traced by torch.fx, and every run of
            convolution, batch norm and ReLU, with the sum behind it, is fused where it stands. What cannot be traced
            (branches on tensors, isinstance) stays as it is. Tracing replaces nn.Module.__call__ for
            a moment: no other thread should run a model meanwhile.

    Calling it again is harmless: what is fused stays fused, with the backend now given. state_dict keys, parameters,
    buffers and hooks are not touched, so optimizers and checkpoints go on as before. :func:`unfuse` undoes it.
    The fused model takes what it took; blocks run fused in float32, bfloat16 and float16, and as they were in float64.
    Raises ``TypeError`` for a ``model`` that is no nn.Module or a ``filter_fn`` that cannot be called, and
    ``ValueError`` for an unknown ``backend``: before anything is changed.
    """
    _check_model(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: found {type(filter_fn).__name__}, supported is a callable (name, module) -> bool")
    with dispatch.use_backend(backend):
        pass  # an unknown name raises here, before anything is swapped
    chosen = [c for c in _candidates(model, generic) if filter_fn is None or filter_fn(c.name, c.module)]
    if strict:
        bad = [row for row in map(_row, chosen) if row.status != "fused" and row.block]
        if bad:
            lines = "\n".join(f"  {row.name or '(root)'} ({row.kind}): {row.reason}" for row in bad)
            raise FuseError(f"strict=True, and {len(bad)} block(s) cannot be fused whole:\n{lines}")
    for candidate in chosen:
        if candidate.plan is None or isinstance(candidate.module, FusedModule):
            continue
        state = state_of(candidate.module)
        if state is None:
            attach(candidate.module, candidate.plan, backend)
        elif state.backend != backend:
            candidate.module.__dict__[KEY] = State(candidate.plan, backend)  # a new one: a stage's program sees it
    attach_stages(model)
    return model


def unfuse(model: M) -> M:
    """Undo :func:`fuse`, in place: every module has its original class and forward again. Returns the model.

    Raises ``TypeError`` for what is no nn.Module. A model that is not fused stays as it is.
    """
    _check_model(model)
    for module in model.modules():
        if state_of(module) is not None:
            detach(module)
    return model


@contextlib.contextmanager
def fused(model: M, **options: Any) -> Iterator[M]:
    """``with fused(model): ...``: fused inside, and afterwards just as it was before.

    Options and errors are those of :func:`fuse`.
    """
    _check_model(model)
    before = {id(m) for m in model.modules() if state_of(m) is not None}
    fuse(model, **options)
    try:
        yield model
    finally:
        for module in model.modules():
            if state_of(module) is not None and id(module) not in before:
                detach(module)


def register_block(cls: type[nn.Module], adapter: Callable[[Any], BlockPlan | str | None]) -> None:
    """Teach :func:`fuse` a block class of your own.

    ``adapter(block)`` gets an instance of exactly ``cls`` (subclasses may have another forward, and are not asked) and
    returns a :class:`~resnet_fast.plan.BlockPlan` that names the block's submodules in the order of its forward, or a
    string: the reason why this one cannot be fused, or None: it is none of its blocks. Registering again replaces the
    adapter. Raises ``TypeError`` for a ``cls`` that is no class of modules, or an ``adapter`` that cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: found {cls!r}, supported is a subclass of torch.nn.Module")
    if not callable(adapter):
        raise TypeError(f"adapter: found {type(adapter).__name__}, supported is a callable (block) -> BlockPlan or str")
    adapters.register(cls, adapter)


# ---- explain ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of :func:`explain`. ``status``: "fused", "partly" or "not"; before fuse() what it would be."""

    name: str
    kind: str
    status: str
    reason: str
    block: bool  # a block or sequence, not a lone convolution or norm
    steps: tuple[schedule.Step, ...] = ()  # of its convolutions in training, or of it in inference: with an input shape


def _aligned(cells: list[tuple[str, str, str, str]]) -> list[str]:
    """Lines of four columns, of which the last may be of any width."""
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in cells]


class Explanation(list[Row]):
    """The rows of :func:`explain`: a list, which prints as a table."""

    swapped: bool = False

    def __str__(self) -> str:
        counts = {s: sum(row.status == s for row in self) for s in ("fused", "partly", "not")}
        head = "fused" if self.swapped else "would be fused (call fuse(model))"
        title = f"{counts['fused']} {head}, {counts['partly']} partly, {counts['not']} not"
        lost = sum(any(s.direction == "block" and s.runs == "original" for s in row.steps) for row in self)
        if lost:  # in inference they run fused
            title += f"; in training at this size {lost} run as they were, which is faster"
        if not self:
            return "nothing to fuse: no convolution, batch norm or block that an adapter knows"
        head_line, *lines = _aligned(
            [("name", "kind", "status", "reason"), *((r.name or "(root)", r.kind, r.status, r.reason) for r in self)]
        )
        details = iter(_aligned([(s.layer, s.direction, s.runs, s.reason) for row in self for s in row.steps]))
        text = [title, head_line]
        for row, line in zip(self, lines, strict=True):
            text += [line, *("    " + next(details) for _ in row.steps)]
        return "\n".join(text)

    __repr__ = __str__


def _row(candidate: _Candidate) -> Row:
    name, module, plan, kind, reason = candidate
    if plan is None:
        return Row(name, kind, "not", reason, not isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)))
    for part in parts(plan):
        refusal = norm_act.refusal(module, part) if isinstance(part, NormAct) else why_not_now(module, part)
        if refusal is not None:
            return Row(name, kind, "not", refusal, True)
    state = state_of(module)
    if state is not None and state.refusal is not None:
        return Row(name, kind, "not", f"last call ran the original forward: {state.refusal}", True)
    if isinstance(module, FusedModule) and module.refusal is not None:
        return Row(name, kind, "not", f"last call ran its modules one by one: {module.refusal}", True)
    partly = any(isinstance(part, BlockPlan) and isinstance(part.shortcut, Opaque) for part in parts(plan))
    what = "; ".join(part.what for part in parts(plan))
    if isinstance(module, FusedModule):
        what = f"{what}; by itself: it is a resnet_fast.{type(module).__name__}"
    if isinstance(plan, HostPlan) and plan.left:
        partly, what = True, f"{what}; as it is: {plan.left}"
    return Row(name, kind, "partly" if partly else "fused", what, True)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A forward inside leaves no word of itself: what the last call did, for explain(), is what it was before."""
    of: list[State | FusedModule] = [state for m in model.modules() if (state := state_of(m)) is not None]
    of += [m for m in model.modules() if isinstance(m, FusedModule)]
    before = [what.refusal for what in of]
    try:
        yield
    finally:
        for what, refusal in zip(of, before, strict=True):
            what.refusal = refusal


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, BlockPlan, str | None]]:
    """Every block and chain that is fused, or would be: its name, module, plan, and the backend it is pinned to."""
    for name, module, plan, _, _ in _candidates(model):
        state = state_of(module)
        for part in parts(plan) if plan is not None else ():
            if isinstance(part, BlockPlan):
                yield name, module, part, state.backend if state else None


def _device_to_explain(model: nn.Module, device: torch.device | str | None) -> torch.device | None:
    """``device`` as torch knows it, with its number. Raises ``ValueError`` for one that cannot be asked."""
    if device is None:
        return None
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: found {found}, supported are cpu and cuda")
    if model.training:
        raise ValueError(
            f"device: found {found} for a model in training mode, supported is inference. Remedy: model.eval(), or "
            "explain it where it is"
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: found {found}, and torch sees no CUDA device here. Remedy: ask where there is one")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def explain(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """What of ``model`` is fused and why the rest is not; before fuse(): what would be.

    Args:
        model: any module; nothing in it is changed.
        input_shape: (N, C, H, W) of an image that the model trains on. Each row then has ``.steps``: what runs every
            convolution, forward and backward, and why: measured (see :func:`resnet_fast.warmup`), or the order of
            backends. Of blocks in eval mode it is how they run in inference. The model's forward runs once, on fake
            tensors. Under autocast it is asked for autocast's dtype.
        dtype: of that image; None: that of the model's parameters.
        device: "cuda", of a model in eval mode: were it there. None: where it is.

    Returns rows with ``.name``, ``.kind``, ``.status`` ("fused", "partly", "not") and ``.reason``; prints as a table.
    Every convolution and batch norm is accounted for: in a row of its own, or within its block's. Raises ``TypeError``
    for what is no nn.Module, ``ValueError`` for an ``input_shape`` that is not four positive numbers or a ``device``
    that cannot be asked about, ``RuntimeError`` where the forward fails on that shape.
    """
    _check_model(model)
    where = _device_to_explain(model, device)
    seen: schedule.Inputs = {}
    if input_shape is not None:
        with undisturbed(model):
            seen = schedule.inputs(model, input_shape, dtype)
    answer = Explanation()
    answer.swapped = any(state_of(m) is not None for m in model.modules())
    for candidate in _candidates(model, why=True):
        row = _row(candidate)
        own = isinstance(candidate.module, FusedModule)
        if answer.swapped and candidate.plan is not None and state_of(candidate.module) is None and not own:
            row = row._replace(status="not", reason="left alone by fuse() (filter_fn, or added later)")
        state = state_of(candidate.module)
        if seen and candidate.plan is not None and (own or state is not None or not answer.swapped):
            pinned = state.backend if state else None
            blocks_of = [part for part in parts(candidate.plan) if isinstance(part, BlockPlan)]
            found = [schedule.steps(candidate.module, part, seen, pinned, where) for part in blocks_of]
            row = row._replace(steps=tuple(step for steps in found for step in steps))
        answer.append(row)
    every = [m for m in model.modules() if isinstance(m, FusedModule)]
    answer.swapped |= bool(every) and len(every) == sum(row.block for row in answer)
    return answer
