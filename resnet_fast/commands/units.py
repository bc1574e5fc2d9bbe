"""Every layer and block of a network by itself: ours and torch's error against float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import resnet_fast
from resnet_fast import adapters, modules
from resnet_fast.plan import BlockPlan, ConvBnPath, HostPlan, Opaque, find

from .judging import Check, judge, judge_norms
from .steps import AGAIN, Step, autocast, in_layout, named, tensors

__all__ = ["Unit", "apart", "block_unit", "fused", "inputs", "itself", "unit_checks", "units"]


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
) -> Step:
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
    return Step(named(output), {}, gradients, running)


class _Packed(nn.Module):
    """``conv`` as torch.compile runs it in inference on a CPU: oneDNN's, on weights in a layout of oneDNN's own.

    It adds in another order than torch.conv2d, which takes oneDNN's plain layouts: over 1024 channels its errors are
    up to three times as large.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.geometry = [*map(list, (conv.padding, conv.stride, conv.dilation)), conv.groups]
        self.w, self.bias = conv.weight.detach(), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.mkldnn
        w = ops._reorder_convolution_weight(self.w.contiguous(), *self.geometry, list(x.shape))
        return ops._convolution_pointwise(x, w, self.bias, *self.geometry, "none", [], "")


def _packed(folded: nn.Module, x: Tensor) -> nn.Module | None:
    """A folded module whose convolutions are ``_Packed``; None where torch.compile would not do that, or cannot."""
    able = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    native = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if x.device.type != "cpu" or not (able and native) or any(getattr(m, "groups", 1) > 1 for m in folded.modules()):
        return None
    folded = copy.deepcopy(folded)
    for name, m in list(folded.named_modules()):
        if type(m) is nn.Conv2d:
            parent, _, last = name.rpartition(".")
            setattr(folded.get_submodule(parent), last, _Packed(m))
    return folded


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
        mine = named(ours(low)) | named(ours(low), AGAIN)
        theirs = named(unit.plain(in_layout(copy.deepcopy(module), last))(low))
        nchw = named(unit.plain(copy.deepcopy(module))(low.contiguous()))
        reference = named(unit.plain(copy.deepcopy(module).double())(low.double()))
        folded = in_layout(copy.deepcopy(module), last)
        unit.fold(folded)
        ways = [theirs, nchw, named(unit.plain(folded)(low))]
        if (packed := _packed(folded, low)) is not None:
            ways.append(named(unit.plain(packed)(low)))
    twice = [{n + end: t for end in ("", AGAIN) for n, t in one.items()} for one in (*ways, reference)]
    found.append(judge("eval", dtype, "outputs", mine, twice[:-1], twice[-1]))
    if train:
        module = copy.deepcopy(unit.module)
        exact = each if each is not None else dtype == torch.float32 and unit.decided is not None
        if exact and unit.decided is not None:
            wide = copy.deepcopy(module).double()
            unit.decided(wide, x.double())
            module.load_state_dict(wide.state_dict())
        one = _unit_step(unit.ours, module, x, dtype)
        same = [_unit_step(unit.plain, module, x, dtype, layout) for layout in (last, torch.contiguous_format)]
        ref = _unit_step(unit.plain, copy.deepcopy(module).double(), x.double(), dtype)
        found.append(judge("train", dtype, "outputs", one.outputs, [s.outputs for s in same], ref.outputs))
        gradients = one.gradients, [s.gradients for s in same], ref.gradients
        if ref.gradients and exact:
            found.append(judge("train", dtype, "gradients", *gradients))
        elif ref.gradients:
            found.append(judge_norms(dtype, "gradients, rms", *gradients))
        if ref.running:
            running = one.running, [s.running for s in same], ref.running
            found.append(judge("train", dtype, "running statistics", *running))
    return [c._replace(tensor=f"{unit.name}: {c.tensor}") for c in found]


def _gap(pre: Tensor, margin: float) -> Tensor:
    """Per channel of ``pre`` (N, K, P, Q) the smallest shift that leaves no value within ``margin`` of 0."""
    values = pre.detach().transpose(0, 1).flatten(1).sort(1).values  # (K, NPQ)
    low, high = values[:, :1] - 2 * margin, values[:, -1:] + 2 * margin
    middles = torch.cat([low, (values[:, 1:] + values[:, :-1]) / 2, high], 1)
    wide = torch.cat([low == low, values.diff(dim=1) > 2 * margin, high == high], 1)
    nearest = middles.abs().masked_fill(~wide, torch.inf).argmin(1, keepdim=True)
    clear = values.abs().amin(1) > margin
    return (-middles.gather(1, nearest).squeeze(1)).masked_fill(clear, 0.0)


#: A value this far from 0, in parts of the largest, keeps its sign under float32's rounding.
_MARGIN = 512 * torch.finfo(torch.float32).eps


def _decide(
    plan: BlockPlan, module: nn.Module, x: Tensor, forward: Callable[[nn.Module], Callable[[Tensor], Any]]
) -> None:
    """Move the betas of ``module`` (float64), one batch norm after the other, as ``Unit`` says."""
    seen: dict[str, Tensor] = {}

    def see(name: str, *call: Any) -> None:
        seen[name] = call[-1].detach()

    side = plan.shortcut
    paths = {layer.bn for layer in plan.layers}
    if isinstance(side, (ConvBnPath, Opaque)):
        paths.add(side.bn if isinstance(side, ConvBnPath) else side.path)
    handles = [find(module, path).register_forward_hook(functools.partial(see, path)) for path in paths]
    module.train()
    try:
        for i, layer in enumerate(plan.layers):
            bn = find(module, layer.bn)
            if layer.act is False or bn.bias is None:
                continue
            with torch.no_grad():
                forward(module)(x)
                pre = seen[layer.bn]
                if i == len(plan.layers) - 1 and side is not None:
                    pre = pre + (
                        x if isinstance(side, str) else seen[side.bn if isinstance(side, ConvBnPath) else side.path]
                    )
                bn.bias += _gap(pre, _MARGIN * float(pre.abs().max()))
    finally:
        for handle in handles:
            handle.remove()


def _fold(plan: BlockPlan, module: nn.Module) -> None:
    """torch's own folding, in the dtype of ``module``; a batch norm becomes the identity."""
    sides = (plan.shortcut,) if isinstance(plan.shortcut, ConvBnPath) else ()
    for layer in (*plan.layers, *sides):
        folded = fuse_conv_bn_eval(find(module, layer.conv), find(module, layer.bn))
        for path, new in ((layer.conv, folded), (layer.bn, nn.Identity())):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, new)


def itself(module: nn.Module) -> Callable[[Tensor], Any]:
    """The forward of ``module`` as it is."""
    return module


def _unfused(module: Any) -> Callable[[Tensor], Any]:
    return module.unfused


def fused(module: nn.Module) -> Callable[[Tensor], Any]:
    """The forward of ``module`` once it is fused, in place."""
    return resnet_fast.fuse(module)


def _layer(name: str, conv: nn.Conv2d, bn: nn.Module, relu: bool, pool: nn.Module | None = None) -> Unit:
    if pool is not None:  # windows tie, and which value wins is as undecided as a ReLU near 0
        stem = modules.Stem.from_modules(conv, bn, pool)
        return Unit(name, "stem", stem, itself, _unfused, None, functools.partial(_fold, modules.Stem.plan))
    unit = modules.ConvBnAct2d.from_modules(conv, bn, relu)
    plan = BlockPlan("layer", (ConvBnPath("conv", "bn", relu),))
    decided = functools.partial(_decide, plan, forward=_unfused)
    return Unit(name, "layer", unit, itself, _unfused, decided, functools.partial(_fold, plan))


def block_unit(name: str, module: nn.Module, plan: BlockPlan, decidable: bool = True) -> Unit:
    """A whole block; not ``decidable``: it holds infinities or NaN, and its betas stay as they are."""
    decided = functools.partial(_decide, plan, forward=itself) if decidable else None
    return Unit(name, plan.kind, module, fused, itself, decided, functools.partial(_fold, plan))


def units(model: nn.Module) -> Iterator[tuple[Unit, str]]:
    """Every layer and block that fuse() takes over, and the name of the module whose input is its input."""
    for row in resnet_fast.explain(model):
        if not row.block or row.status == "not":
            continue
        host = model.get_submodule(row.name)
        plan = adapters.look(host, type(host))
        prefix = f"{row.name}." if row.name else ""
        parts = plan.parts if isinstance(plan, HostPlan) else (plan,) if isinstance(plan, BlockPlan) else ()
        for part in parts:
            if not isinstance(part, BlockPlan):
                continue  # a sum and a ReLU, or a batch norm and one: no layer
            sides = (part.shortcut,) if isinstance(part.shortcut, ConvBnPath) else ()
            for i, layer in enumerate((*part.layers, *sides)):
                last = i == len(part.layers) - 1
                act = find(host, layer.act) if isinstance(layer.act, str) else layer.act
                relu = act is True or type(act) is nn.ReLU
                pool = find(host, part.pool) if last and isinstance(part.pool, str) else None
                pool = pool if relu and type(pool) is nn.MaxPool2d else None
                conv = find(host, layer.conv)
                yield _layer(prefix + layer.conv, conv, find(host, layer.bn), relu, pool), prefix + layer.conv
        if isinstance(plan, BlockPlan) and row.name:
            yield block_unit(row.name, host, plan), row.name


_SIDE = 14  # of the crops of feature maps that layers and blocks get


@torch.no_grad()
def inputs(model: nn.Module, names: set[str], x: Tensor) -> dict[str, Tensor]:
    """What the modules called ``names`` get, in training mode: a crop (2, C, up to 14, up to 14) of it."""
    model = copy.deepcopy(model).train()
    found: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        t = args[0]
        if name not in found and isinstance(t, Tensor) and t.dim() == 4:
            side = 4 * _SIDE if t.shape[1] <= 4 else _SIDE
            found[name] = t[:2, :, :side, :side].clone(memory_format=torch.channels_last)

    handles = [model.get_submodule(n).register_forward_pre_hook(functools.partial(see, n)) for n in names]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def apart(x: Tensor) -> Tensor:
    """``x`` with a little noise: photographs have even areas, in which the values of a pooling window tie."""
    random = torch.Generator().manual_seed(0)
    return x + 0.05 * torch.randn(x.shape, generator=random).to(x.device)
