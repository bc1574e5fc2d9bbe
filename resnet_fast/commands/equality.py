"""Does the fused model equal torch's? The project's one rule of tolerance, on a whole network.

max|ours - ref64| <= 2 max|torch_same_dtype - ref64| + 4 eps(dtype) max|ref64|, where ref64 is the same network, weights
and photographs in float64, and torch_same_dtype is torch's eager channels_last network in the dtype that is timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast

__all__ = [
    "LOSS_SCALE",
    "Check",
    "Curves",
    "Unit",
    "autocast",
    "curve_check",
    "determinism_checks",
    "eval_checks",
    "in_layout",
    "loss",
    "loss_curves",
    "tensors",
    "train_checks",
    "unit_checks",
]

#: What the loss is multiplied by in training, so that float16's small gradients do not vanish.
LOSS_SCALE = {torch.float16: 1024.0}


class Check(NamedTuple):
    """One kind of number compared, of all its tensors the one nearest to its bound (or farthest beyond it).

    ``ours`` and ``torch``: max|difference to ref64|; ``bound``: what ours may be at most; ``largest``: max|ref64|.
    """

    mode: str
    dtype: str
    what: str
    tensor: str
    tensors: int
    ours: float
    torch: float
    bound: float
    largest: float
    ok: bool


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a network's output, whatever holds them, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in tensors(item)]
    return []


def loss(output: Any) -> Tensor:
    """A scalar: cross-entropy of logits (N, classes) against made-up labels; of other outputs, the mean square."""
    total: Tensor | None = None
    for t in tensors(output):
        if t.dim() == 2 and t.shape[1] > 1:
            labels = (torch.arange(t.shape[0], device=t.device) * 7 + 1) % t.shape[1]
            part = F.cross_entropy(t if t.dtype == torch.float64 else t.float(), labels)
        else:
            part = (t if t.dtype == torch.float64 else t.float()).square().mean()
        total = part if total is None else total + part
    if total is None:
        raise TypeError("the network's output holds no floating-point tensor")
    return total


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Training in a low dtype is autocast over float32 parameters; in float32 and float64 it is nothing."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype) if low else contextlib.nullcontext()


def _error(a: Tensor, reference: Tensor) -> float:
    """max|a - reference|; infinite where one has a NaN or an infinity that the other does not have there."""
    if a.shape != reference.shape:
        return float("inf")
    a, reference = a.detach().double(), reference.detach().double()
    same = (a == reference) | (a.isnan() & reference.isnan())
    difference = (a - reference).abs().masked_fill(same, 0.0)
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if difference.numel() else 0.0


def _judge(
    mode: str,
    dtype: torch.dtype,
    what: str,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> Check:
    """Judge every tensor by the rule, and report the one nearest to its bound. ``same``: torch's ways."""
    found: list[tuple[float, Check]] = []
    for name in reference if all(t.keys() == reference.keys() for t in (ours, *same)) else ():
        largest = _largest(reference[name])
        mine = _error(ours[name], reference[name])
        theirs = max(_error(t[name], reference[name]) for t in same)
        bound = 2 * theirs + 4 * torch.finfo(dtype).eps * largest
        ok = mine <= bound and mine < float("inf")
        rank = mine / bound if bound else float(mine > 0)
        check = Check(mode, _name(dtype), what, name, len(reference), mine, theirs, bound, largest, ok)
        found.append((rank, check))
    if not found:
        nan = float("nan")
        return Check(mode, _name(dtype), what, "not the same tensors", 0, nan, nan, nan, nan, False)
    return max(found, key=lambda pair: (not pair[1].ok, pair[0]))[1]


def _judge_gradients(
    dtype: torch.dtype,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> list[Check]:
    """All parameters together, by each one's error relative to its own max|ref64|: the worst and the median one.

    One by one they cannot be judged: rounding turns a few ReLUs over, in ours at other places than in torch's, and a
    gradient behind one jumps. Parameters whose gradient all but vanishes (a bias that batch norm cancels) weigh little.
    """
    if not all(t.keys() == reference.keys() for t in (ours, *same)):
        return [_judge("train", dtype, "gradients", ours, same, reference)]
    least = 1e-3 * max(_largest(t) for t in reference.values())
    sizes = {n: max(_largest(t), least) or 1.0 for n, t in reference.items()}

    def relative(gradients: Mapping[str, Tensor]) -> dict[str, float]:
        return {n: _error(gradients[n], t) / sizes[n] for n, t in reference.items()}

    mine, theirs = relative(ours), [relative(t) for t in same]
    found = []
    for what, position in (("gradients, worst", -1), ("gradients, median", len(mine) // 2)):
        name, error = sorted(mine.items(), key=lambda item: item[1])[position]
        own = max(sorted(t.values())[position] for t in theirs)
        bound = 2 * own + 4 * torch.finfo(dtype).eps
        ok = error <= bound and error < float("inf")
        found.append(Check("train", _name(dtype), what, name, len(mine), error, own, bound, 1.0, ok))
    return found


def _largest(t: Tensor) -> float:
    return float(torch.nan_to_num(t.detach().abs()).max()) if t.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(output: Any, suffix: str = "") -> dict[str, Tensor]:
    return {f"output {i}{suffix}": t for i, t in enumerate(tensors(output))}


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """``model.to(memory_format=layout)``, which torch's annotations do not know."""
    change: Any = model.to
    return change(memory_format=layout)


def _prepared(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in ``dtype`` on ``device``, channels-last."""
    return in_layout(copy.deepcopy(model).to(device=device, dtype=dtype), torch.channels_last)


Fuse = Callable[[nn.Module], nn.Module]


def eval_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """Outputs in eval mode, weights and images (N, 3, H, W) rounded to ``dtype`` first."""
    same = _prepared(model, device, dtype).eval()
    x = x.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        ours = fuse(copy.deepcopy(same))
        mine = _named(ours(x)) | _named(ours(x), _AGAIN)
        theirs = _named(same(x)) | _named(same(x), _AGAIN)
        once = copy.deepcopy(same).double()(x.double())
        reference = _named(once) | _named(once, _AGAIN)
    return [_judge("eval", dtype, "outputs", mine, [theirs], reference)]


class _Step(NamedTuple):
    """What one training step leaves: everything that an optimizer, or the next step, would see."""

    outputs: dict[str, Tensor]
    loss: dict[str, Tensor]
    gradients: dict[str, Tensor]
    running: dict[str, Tensor]


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, but without dropout: it draws other numbers in other dtypes."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()
    yield
    model.eval()


def _step(model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype) -> _Step:
    scale = LOSS_SCALE.get(dtype, 1.0)
    with _training(model):
        torch.manual_seed(0)
        with autocast(device, dtype):
            output = model(x)
        value = loss(output)
        (value * scale).backward()
    gradients = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    running = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return _Step(_named(output), {"loss": value.detach()}, gradients, running)


#: What is behind an output's name of the second call, which runs on folded weights that were kept.
_AGAIN = " again"
_TURNED = 3  # float64 runs on photographs that are a rounding's worth off


def _turned(wide: nn.Module, x: Tensor, device: torch.device, reference: _Step, bound: float) -> list[_Step]:
    """float64 steps on photographs changed so slightly that the outputs stay within ``bound``, their own tolerance.

    That is what rounding does to everything behind the outputs: above all it turns some ReLUs over.
    """
    steps: list[_Step] = []
    random = torch.Generator().manual_seed(0)
    factor = 1.0
    for _ in range(_TURNED + 1):
        noise = (2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1).to(device)
        changed = x.double() * (1 + factor * torch.finfo(torch.float32).eps * noise)
        steps.append(_step(copy.deepcopy(wide), changed, device, torch.float64))
        if len(steps) == 1:  # the first one only measures how far the outputs move
            moved = max(_error(steps[0].outputs[n], t) for n, t in reference.outputs.items())
            factor = min(max(bound / moved, 1.0), 1e3) if moved else 1.0
    return steps


def train_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """One forward and backward in training mode: outputs, loss, every parameter's gradient, every running statistic.

    ``x`` (N, 3, H, W) float32. A low ``dtype``: autocast over float32 parameters; ref64 has none. Dropout is off.
    Torch's own error in loss, gradients and statistics is, in float32, the largest of its own and of what changes of
    the photographs do in float64 that move the outputs within their tolerance: else one turned ReLU decides.
    """
    same = _prepared(model, device, torch.float32)
    wide = copy.deepcopy(same).double()
    ours = fuse(copy.deepcopy(same))
    x = x.to(device=device, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    mine, theirs = _step(ours, x, device, dtype), _step(same, x, device, dtype)
    reference = _step(copy.deepcopy(wide), x.double(), device, torch.float64)
    outputs = _judge("train", dtype, "outputs", mine.outputs, [theirs.outputs], reference.outputs)
    ways = [theirs]
    if dtype == torch.float32:
        ways += _turned(wide, x, device, reference, outputs.bound)
    found = [outputs, _judge("train", dtype, "loss", mine.loss, [w.loss for w in ways], reference.loss)]
    if reference.gradients:
        found += _judge_gradients(dtype, mine.gradients, [w.gradients for w in ways], reference.gradients)
    if reference.running:
        found.append(
            _judge("train", dtype, "running statistics", mine.running, [w.running for w in ways], reference.running)
        )
    return found


# ---- one layer, or one block, alone


class Unit(NamedTuple):
    """A layer or block to be checked alone. ``ours`` and ``plain`` make its forward of a copy of ``module``.

    ``decided(module, x)``, of float64, moves the betas of ``module`` so that no ReLU's input lies near 0: where
    rounding decides on which side a value lies, gradients jump by a finite amount, in torch as in ours, and no error
    of single values can be compared. None: its gradients are judged by their norm alone. ``fold(module)`` folds batch
    norm into convolutions as torch itself does for inference.
    """

    name: str
    kind: str
    module: nn.Module
    ours: Callable[[nn.Module], Callable[[Tensor], Any]]
    plain: Callable[[nn.Module], Callable[[Tensor], Any]]
    decided: Callable[[nn.Module, Tensor], None] | None
    fold: Callable[[nn.Module], None]


def _unit_step(
    make: Callable[[nn.Module], Callable[[Tensor], Any]],
    module: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
) -> _Step:
    """One forward and backward in training mode; the upstream gradient is the same numbers, rounded to ``dtype``."""
    module = in_layout(copy.deepcopy(module), layout).train()
    forward = make(module)
    x = x.detach().clone(memory_format=torch.preserve_format).contiguous(memory_format=layout).requires_grad_()
    with autocast(x.device, torch.float64 if x.dtype == torch.float64 else dtype):
        output = forward(x)
    total: Tensor | None = None
    for i, z in enumerate(tensors(output)):
        random = torch.Generator().manual_seed(i)
        dz = torch.randn(z.shape, generator=random, dtype=torch.float64).to(dtype).to(z.device, z.dtype)
        part = (z * dz).sum()
        total = part if total is None else total + part
    assert total is not None
    total.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if x.grad is not None:
        gradients["x"] = x.grad
    running = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    return _Step(_named(output), {}, gradients, running)


def _judge_norms(
    dtype: torch.dtype,
    what: str,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> Check:
    """The rule for root mean squares: rms(ours - ref64) / rms(ref64) <= 2 rms(torch - ref64) / rms(ref64) + 4 eps.

    A tensor that all but vanishes beside the others is measured by a thousandth of the largest.
    """

    def rms(t: Tensor) -> float:
        return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0

    if not all(t.keys() == reference.keys() for t in (ours, *same)):
        return _judge("train", dtype, what, ours, same, reference)
    least = 1e-3 * max(rms(t) for t in reference.values())
    found: list[tuple[float, Check]] = []
    for name, ref in reference.items():
        size = max(rms(ref), least) or 1.0
        mine, *theirs = (rms(t[name].double() - ref) / size for t in (ours, *same))
        bound = 2 * max(theirs) + 4 * torch.finfo(dtype).eps
        check = Check("train", _name(dtype), what, name, len(reference), mine, max(theirs), bound, 1.0, mine <= bound)
        found.append((mine / bound, check))
    return max(found, key=lambda pair: (not pair[1].ok, pair[0]))[1]


def unit_checks(unit: Unit, x: Tensor, dtype: torch.dtype, train: bool = True, each: bool | None = None) -> list[Check]:
    """Outputs in eval mode; then, with ``train``, outputs, gradients and running statistics of a forward and backward.

    ``x`` (N, C, H, W) float32 on the device of ``unit.module``, whose parameters are float32. ``each``: gradients are
    judged value by value; None: in float32, with betas decided.
    """
    last = torch.channels_last
    found = []
    low = x.to(dtype).contiguous(memory_format=last)
    with torch.inference_mode():
        module = copy.deepcopy(unit.module).to(dtype).eval()
        ours = unit.ours(in_layout(copy.deepcopy(module), last))
        mine = _named(ours(low)) | _named(ours(low), _AGAIN)
        theirs = _named(unit.plain(in_layout(copy.deepcopy(module), last))(low))
        nchw = _named(unit.plain(copy.deepcopy(module))(low.contiguous()))
        reference = _named(unit.plain(copy.deepcopy(module).double())(low.double()))
        folded = in_layout(copy.deepcopy(module), last)
        unit.fold(folded)
        ways = [theirs, nchw, _named(unit.plain(folded)(low))]
    twice = [{n + end: t for end in ("", _AGAIN) for n, t in one.items()} for one in (*ways, reference)]
    found.append(_judge("eval", dtype, "outputs", mine, twice[:-1], twice[-1]))
    if train:
        module = copy.deepcopy(unit.module)
        exact = each if each is not None else dtype == torch.float32 and unit.decided is not None
        if exact and unit.decided is not None:
            wide = copy.deepcopy(module).double()
            unit.decided(wide, x.double())
            module.load_state_dict(wide.state_dict())
        step = _unit_step(unit.ours, module, x, dtype)
        same = [_unit_step(unit.plain, module, x, dtype, layout) for layout in (last, torch.contiguous_format)]
        ref = _unit_step(unit.plain, copy.deepcopy(module).double(), x.double(), dtype)
        found.append(_judge("train", dtype, "outputs", step.outputs, [s.outputs for s in same], ref.outputs))
        gradients = step.gradients, [s.gradients for s in same], ref.gradients
        if ref.gradients and exact:
            found.append(_judge("train", dtype, "gradients", *gradients))
        elif ref.gradients:
            found.append(_judge_norms(dtype, "gradients, rms", *gradients))
        if ref.running:
            running = step.running, [s.running for s in same], ref.running
            found.append(_judge("train", dtype, "running statistics", *running))
    return [c._replace(tensor=f"{unit.name}: {c.tensor}") for c in found]


# ---- the same bits twice


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Of cuDNN only algorithms that add in a fixed order: what it is asked here is our order of additions."""
    kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept


def _different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in some bit, a NaN's place included."""
    return [
        n
        for n, t in one.items()
        if not (torch.equal(t.isnan(), other[n].isnan()) and torch.equal(t.nan_to_num(), other[n].nan_to_num()))
    ]


def determinism_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """Two forwards in eval mode and two training steps from the same state: how many tensors differ in some bit."""
    found = []
    with _deterministic():
        frozen = _prepared(model, device, dtype).eval()
        low = x.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            outputs = [_named(fuse(copy.deepcopy(frozen))(low)) for _ in range(2)]
        same = _prepared(model, device, torch.float32)
        x = x.to(device=device, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        steps = [_step(fuse(copy.deepcopy(same)), x, device, dtype) for _ in range(2)]
    every = [{f"{kind} {n}": t for kind, part in s._asdict().items() for n, t in part.items()} for s in steps]
    for mode, (one, other) in (("eval", outputs), ("train", every)):
        names = _different(one, other)
        what = "two runs, tensors that differ"
        first = names[0] if names else "none"
        found.append(
            Check(mode, _name(dtype), what, first, len(one), float(len(names)), 0.0, 0.0, float(len(one)), not names)
        )
    return found


# ---- a few steps of training


class Curves(NamedTuple):
    """Losses step by step; ``nearby``: float64 runs from weights a rounding's worth off."""

    dtype: str
    ours: list[float]
    torch: list[float]
    torch_nchw: list[float]
    float64: list[float]
    nearby: list[list[float]]


def _losses(
    model: nn.Module,
    batches: Sequence[Tensor],
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> list[float]:
    """SGD with momentum over ``batches`` in turn; the loss before each step."""
    scale = LOSS_SCALE.get(dtype, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    held = next(model.parameters()).dtype
    found = []
    with _training(model):
        for i in range(steps):
            x = batches[i % len(batches)].to(device=device, dtype=held).contiguous(memory_format=layout)
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, dtype):
                output = model(x)
            value = loss(output)
            (value * scale).backward()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= scale
            optimizer.step()
            found.append(float(value.detach()))
    return found


def loss_curves(
    model: nn.Module,
    x: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    tell: Callable[[str], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    fuse: Fuse = resnet_fast.fuse,
) -> Curves:
    """Ours, torch in two layouts, float64, and float64 from weights changed by one rounding; ``x`` (N, 3, H, W)."""
    last, first = torch.channels_last, torch.contiguous_format
    batches = list(x.chunk(2))
    base = _prepared(model, device, torch.float32)
    wide = copy.deepcopy(base).double()
    name = _name(dtype)

    def run(who: str, m: nn.Module, kind: torch.dtype, layout: torch.memory_format) -> list[float]:
        with tell(f"loss of {steps} steps in {name}: {who}"):
            return _losses(m, batches, steps, device, kind, layout)

    nearby = []
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        turned = copy.deepcopy(wide)
        with torch.no_grad():
            for p in turned.parameters():
                noise = 2 * torch.rand(p.shape, generator=random, dtype=torch.float64) - 1
                p.mul_(1 + torch.finfo(dtype).eps * noise.to(p.device))
        nearby.append(run("float64, weights rounded otherwise", turned, torch.float64, last))
    return Curves(
        name,
        run("ours", fuse(copy.deepcopy(base)), dtype, last),
        run("torch", copy.deepcopy(base), dtype, last),
        run("torch, NCHW", in_layout(copy.deepcopy(base), first), dtype, first),
        run("float64", copy.deepcopy(wide), torch.float64, last),
        nearby,
    )


def curve_check(curves: Curves) -> Check:
    """The rule over the whole curve: the farthest that each strays from float64's. NaN fails.

    Torch's own error is the largest of its two layouts' and of the float64 runs from nearby weights: training amplifies
    whatever a rounding changed first, and one run is a single draw of that.
    """

    def stray(losses: Sequence[float]) -> float:
        apart = [abs(a - b) for a, b in zip(losses, curves.float64, strict=True)]
        return float("inf") if any(a != a for a in apart) else max(apart)

    eps = torch.finfo(getattr(torch, curves.dtype)).eps
    mine = stray(curves.ours)
    own = max(stray(c) for c in (curves.torch, curves.torch_nchw, *curves.nearby))
    largest = max(abs(v) for v in curves.float64)
    bound = 2 * own + 4 * eps * largest
    ok = mine <= bound and mine < float("inf")
    steps = len(curves.ours)
    return Check("train", curves.dtype, "loss curve", f"{steps} steps", 1, mine, own, bound, largest, ok)
