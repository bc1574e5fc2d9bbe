"""What a fused block runs at one input size: every convolution, forward and backward, and what says which way.

Nothing is computed: the model, and then each block's own function, runs on fake tensors, which have sizes and no
values. So this cannot differ from what autograd.py does, and a model that is asked about stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch, inference, tables
from . import functional as f
from .dispatch import OPS, PARTS, SIGNATURES
from .guards import Work, block_signature, collect, faster_unfused, pools, work_of
from .plan import BlockPlan, ConvBnPath, Opaque, Refusal, find
from .sums import misfit
from .tables import Candidate, Row, Signature

__all__ = ["Call", "Part", "Step", "apart", "describe", "inputs", "parts", "requests", "steps"]

#: Sizes, dtype and gradient of what a convolution was given.
Inputs = Mapping[int, Sequence[Tensor]]
#: Of the arguments of ``conv_backward_sums``: whether it runs as one.
Fuses = Callable[..., bool]


class Call(NamedTuple):
    """One call of an op whose way is chosen by shape. ``arguments`` by name, tensors fake."""

    op: str
    layer: int  # of the block's layers, the projection last
    signature: Signature
    arguments: dict[str, Any]


class Part(NamedTuple):
    """A block or chain at one input size. ``signature`` is the whole block's, None where that is not measured."""

    plan: BlockPlan
    layers: list[f.ConvBn]
    projection: f.ConvBn | None
    x: Tensor  # fake
    pool: bool
    work: Work | None  # of a forward
    signature: Signature | None
    calls: list[Call]


class Step(NamedTuple):
    """One line of ``explain(model, input_shape)``: what runs, and why that."""

    layer: str
    direction: str  # "forward", "backward" or "block"; "inference", of a block in eval mode
    runs: str
    reason: str


# ---- which sizes come to which convolution


class _Seen(TorchFunctionMode):
    """Notes what every convolution is given, by the id of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and len(args) > 1:
            x, seen = args[0], self.inputs.setdefault(id(args[1]), [])
            if all((t.shape, t.dtype, t.requires_grad) != (x.shape, x.dtype, x.requires_grad) for t in seen):
                seen.append(x)
        return func(*args, **(kwargs or {}))


def inputs(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None) -> Inputs:
    """By the id of a weight, what its convolution is given when ``model`` sees an image of ``input_shape``.

    ``dtype``: of the image; None: that of the model's parameters. The model runs in eval mode, which gives the same
    sizes and moves no statistics, on fake tensors.
    """
    if len(input_shape) != 4 or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(f"input_shape: found {input_shape!r}, supported are four positive numbers (N, C, H, W)")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise ValueError("model: found one without parameters, supported is a model with convolutions")
    modes = [(m, m.training) for m in model.modules()]
    seen = _Seen()
    try:
        model.eval()
        with FakeTensorMode(allow_non_fake_inputs=True), seen, torch.enable_grad():
            x = torch.empty(tuple(input_shape), dtype=dtype or parameter.dtype, device=parameter.device)
            model(x.contiguous(memory_format=torch.channels_last))
    except Exception as error:
        raise RuntimeError(
            f"model: its forward failed on a fake image of {tuple(input_shape)} ({type(error).__name__}: {error}). "
            "Remedy: the input_shape that it is trained with. A model whose forward looks at values cannot be asked."
        ) from error
    finally:
        for m, training in modes:
            m.training = training
    return seen.inputs


# ---- which ops a block calls on them


class _Record(TorchDispatchMode):
    """Every op of the vocabulary that is called, with its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fast":
            op = OPS[func._schema.name.partition("::")[2]]
            bound = op.signature.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.calls.append((op.name, dict(bound.arguments)))
        return func(*args, **(kwargs or {}))


def _same(one: Any, other: Any) -> bool:
    """Whether two fake tensors are one memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _fake(t: Any, dtype: torch.dtype | None = None) -> Any:
    """A fake twin of a tensor, best called inside the mode; anything else as it is."""
    if not isinstance(t, Tensor):
        return t
    twin = torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)
    twin = twin.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else twin
    return twin.requires_grad_(t.requires_grad)


def _calls(
    layers: list[f.ConvBn], projection: f.ConvBn | None, plan: BlockPlan, x: Tensor, pool: bool, fuses: Fuses
) -> list[Call]:
    """One training step of the block on fakes; ``x`` is one."""
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    record = _Record()
    every = [*layers, projection] if projection else layers
    with (
        FakeTensorMode(),
        torch.autocast(x.device.type, enabled=False),
        torch.enable_grad(),
        dispatch.use_backend("torch"),  # nothing but ops: no backend's own functions, which would read memory
        dispatch.assume(fuses),
    ):
        image = _fake(x, dtype)
        fakes = [
            f.ConvBn(*(_fake(value, dtype if name == "weight" else None) for name, value in la._asdict().items()))
            for la in every
        ]
        fakes = [la._replace(group=None, momentum=0.1) for la in fakes]
        main, side = fakes[: len(layers)], fakes[-1] if projection else None
        identity = plan.shortcut == "identity"
        with record:
            residual = None
            if isinstance(plan.shortcut, Opaque) or plan.shortcut == "given":
                with torch.no_grad():
                    z = f.residual_block(image, main)
                record.calls.clear()
                residual = torch.empty_like(z).requires_grad_(image.requires_grad)
            z = f.residual_block(image, main, projection=side, residual=residual, identity=identity, pool=pool)
            if z.requires_grad:
                leaves = [image, residual, *(t for la in fakes for t in la if isinstance(t, Tensor))]
                wanted = [t for t in leaves if t is not None and t.requires_grad]
                torch.autograd.grad(z, wanted, torch.empty_like(z), allow_unused=True)
    weights = [la.weight for la in fakes]
    found = []
    for op, arguments in record.calls:
        if op in SIGNATURES:
            layer = next(i for i, w in enumerate(weights) if _same(w, arguments["w"]))
            found.append(Call(op, layer, SIGNATURES[op](**arguments), arguments))
    return found


def apart(call: Call) -> Call:
    """The ``conv_backward`` of a ``conv_backward_sums`` whose sums are taken apart from it."""
    names = OPS["conv_backward"].signature.parameters
    arguments = {name: p.default for name, p in names.items()} | {"needs_x": True}
    arguments |= {name: value for name, value in call.arguments.items() if name in names}
    if not arguments["needs_w"]:  # as autograd.py has it: then x is looked at for its size alone
        arguments |= {"scale": None, "shift": None}
    return Call("conv_backward", call.layer, SIGNATURES["conv_backward"](**arguments), arguments)


def fuses_here(*args: Any, **kwargs: Any) -> bool:
    """Whether ``conv_backward_sums`` of these arguments runs as one, as ``dispatch.fused_sums`` decides."""
    with dispatch.use_backend(None):
        choice = dispatch.tuned("conv_backward_sums", *args, **kwargs)
        if choice is not None:
            return choice.backend != PARTS
        return dispatch.hook("conv_backward", "sums", args[0].device, args[0].dtype) is not None


def parts(module: nn.Module, plan: BlockPlan, seen: Inputs, fuses: Fuses = fuses_here) -> Iterator[Part]:
    """The block at every input that ``seen`` has of it. Nothing where it would not run fused.

    ``fuses`` says where ``conv_backward_sums`` is one op: what comes to the layer before it depends on that.
    """
    try:
        layers, projection = collect(module, plan)
    except Refusal:
        return
    first = find(module, plan.layers[0].conv)
    for x in seen.get(id(first.weight), ()):
        if torch.float64 in (x.dtype, layers[0].weight.dtype) or misfit(plan, x, layers, projection):
            continue
        pool = pools(module, plan, layers)
        signature = block_signature(x, layers, projection, plan, pool)
        work = work_of(module, plan, layers, projection)
        yield Part(plan, layers, projection, x, pool, work, signature, _calls(layers, projection, plan, x, pool, fuses))


# ---- what runs, and why


def describe(candidate: Candidate) -> str:
    """A backend and its configuration in a few words."""
    if not candidate.config:
        return candidate.backend
    words = []
    for name, value in candidate.config.items():
        words.append(f"{name} {'x'.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return f"{candidate.backend} ({', '.join(words)})"


def _measured(row: Row, device: torch.device) -> str:
    """How the fastest candidate compares with the best of another backend."""
    best = row.candidates[0]
    other = next((c for c in row.candidates if c.backend != best.backend), None)
    where = tables.device_name(device)
    if other is None:
        return f"measured: {best.seconds * 1e6:.0f} us, no other backend can, on {where}"
    return f"measured: {other.seconds / best.seconds:.2f}x {describe(other)} on {where}"


def _unsupported(call: Call) -> str:
    """What backends that could run the op say of this shape."""
    g: Tensor = next(iter(call.arguments.values()))
    said = []
    for name, reason in dispatch.reasons(call.op, g.device, g.dtype).items():
        ask = None if reason is not None or name == "torch" else getattr(dispatch.backend(name), "unsupported", None)
        why = ask(call.op, **call.arguments) if ask is not None else None
        if why is not None:
            said.append(f"; unsupported by {name}: {why}")
    return "".join(said)


def _step(part: Part, call: Call, pinned: str | None) -> Step:
    paths = [*part.plan.layers, *([part.plan.shortcut] if isinstance(part.plan.shortcut, ConvBnPath) else [])]
    path, direction = paths[call.layer].conv, "forward" if call.op == "conv_stats" else "backward"
    device, dtype = call.arguments["x"].device, call.signature.dtype
    if pinned is not None:
        return Step(path, direction, pinned, "asked for")
    known = dispatch.table(device)
    row = known.rows.get(call.signature)
    if row is not None and call.signature in known.choices:
        return Step(path, direction, describe(row.candidates[0]), _measured(row, device))
    reason = "not measured: order of backends" + _unsupported(call)
    if row is not None:
        best = row.candidates[0]
        reason = f"order of backends: {describe(best)} was fastest and cannot run: {known.unable[call.signature]}"
    return Step(path, direction, dispatch.choose(call.op, device, dtype).backend, reason)


def _block_step(part: Part, device: torch.device) -> Step | None:
    """Whether the block runs fused at all, where that was measured or it is too small."""
    row = dispatch.table(device).rows.get(part.signature) if part.signature else None
    if row is None:
        reason = faster_unfused(part.x, None, part.work)
        return None if reason is None else Step("", "block", "original", reason)
    best, other = row.candidates[:2]
    reason = f"measured: {other.seconds / best.seconds:.2f}x {other.backend} on {tables.device_name(device)}"
    return Step("", "block", best.backend, reason)


def requests(
    module: nn.Module, plan: BlockPlan, seen: Inputs, device: torch.device | None = None
) -> Iterator[inference.Request]:
    """What inference of the block depends on, at every input that ``seen`` has of it, were it on ``device`` (None:
    where it is). Nothing where it would not run fused, or normalises by its batch.
    """
    try:
        layers, projection = collect(module, plan)
    except Refusal:
        return
    if any(la.batch_stats for la in (*layers, *([projection] if projection else []))):
        return
    residual = plan.shortcut == "given" or isinstance(plan.shortcut, Opaque)
    pool = pools(module, plan, layers)
    for x in seen.get(id(find(module, plan.layers[0].conv).weight), ()):
        if torch.float64 in (x.dtype, layers[0].weight.dtype) or misfit(plan, x, layers, projection):
            continue
        where = device or x.device
        dtype = torch.get_autocast_dtype(where.type) if torch.is_autocast_enabled(where.type) else x.dtype
        known = inference.Like(where, dtype, tuple(x.shape))
        yield inference.Request(known, layers, projection, residual, plan.shortcut == "identity", pool)


def _inference_step(request: inference.Request, pinned: str | None) -> Step:
    """How a block runs in eval mode without gradients."""
    if request.x.device.type == "cpu":
        return Step("", "inference", "folded weights", "on a CPU there is nothing to choose")
    try:
        with dispatch.use_backend(pinned):
            way, reason = inference.explain_way(request)
    except dispatch.BackendError as error:
        return Step("", "inference", f"{pinned} raises", str(error))
    return Step("", "inference", str(way), reason)


def steps(
    module: nn.Module, plan: BlockPlan, seen: Inputs, pinned: str | None, device: torch.device | None = None
) -> list[Step]:
    """What ``module`` runs at each of its inputs: in training, or in eval mode in inference (on ``device``: there).

    ``pinned``: the one backend that it was fused for.
    """
    found: list[Step] = []
    pinned = pinned or dispatch.forced_backend()
    if not module.training:
        return [_inference_step(request, pinned) for request in requests(module, plan, seen, device)]
    for part in parts(module, plan, seen):
        whole = None if pinned else _block_step(part, part.x.device)
        if whole is not None:
            found.append(whole)
            if whole.runs == "original":
                continue
        found += [_step(part, call, pinned) for call in part.calls]
    return found
