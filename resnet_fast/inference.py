"""Inference on unfolded weights, for GPUs: batch norm, residual and ReLU in the epilogue of their convolution.

Scale and shift come straight from the batch norms at every call, in float32 and with four launches a block: nothing is
cached, so nothing can be stale, and a CUDA graph sees in-place changes of the weights. A block runs in one of ``WAYS``:
the one asked for by ``use_backend``; else the fastest by the device's table, which ``warmup`` of a model in eval mode
writes; else, unmeasured, as in training with given statistics (``functional.residual_block``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, ops, tables
from . import functional as f
from .dispatch import choose, forced_backend, hook, use_backend
from .layers import ConvBn, layer_tensors, scale_shift
from .tables import Candidate, Row, Signature

__all__ = [
    "WAYS",
    "Like",
    "Request",
    "Way",
    "affines",
    "choose_way",
    "explain_way",
    "fused_block",
    "run_way",
    "unable",
    "whole_block_why_not",
    "whole_stem_why_not",
]

#: The ways to run a block, by the names that tables have for them.
WAYS: dict[str, str] = {
    "bottleneck": "the whole block in one kernel",
    "stem": "the whole stem, its max-pool too, in one kernel",
    "triton": "each convolution with its batch norm in one Triton kernel",
    "cudnn": "each convolution with its batch norm in one of cuDNN's",
    "mixed": "each convolution in the way that is fastest for it",
    "library": "the library's convolutions, and one pass behind each",
    "unfused": "convolution, batch norm, ReLU and sum as torch runs them",
}
#: Backends whose ``conv_affine_act`` is one kernel. The others' is a convolution and a pass behind it, which
#: ``residual_block`` does with one pass less where there is a projection.
_FUSING = ("triton", "cudnn")


class Like(NamedTuple):
    """What is known of an input before there is one."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


class Request(NamedTuple):
    """A block and what comes into it: all that the way to run it depends on. Fields as in ``residual_block``."""

    x: Tensor | Like
    layers: Sequence[ConvBn]
    projection: ConvBn | None = None
    residual: bool = False
    identity: bool = False
    pool: bool = False

    @property
    def every(self) -> list[ConvBn]:
        """The layers, the projection last."""
        return [*self.layers, *([] if self.projection is None else [self.projection])]

    @property
    def signature(self) -> Signature:
        """What its row in a table is found by."""
        shapes = tuple(
            (tuple(la.weight.shape), tuple(la.stride), tuple(la.padding), tuple(la.dilation), la.groups)
            for la in self.every
        )
        flags = (self.identity, self.residual, self.projection is not None, self.pool)
        return Signature("inference", self.x.dtype, tuple(self.x.shape), shapes, flags)


class Way(NamedTuple):
    """One of ``WAYS``; ``convolutions``, where it is "mixed": "triton" or "library" for each layer, as in ``every``."""

    name: str
    convolutions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.convolutions)})" if self.convolutions else self.name


_BLOCK, _STEM, _LIBRARY, _UNFUSED = Way("bottleneck"), Way("stem"), Way("library"), Way("unfused")


def affines(layers: Sequence[ConvBn]) -> list[tuple[Tensor, Tensor]]:
    """(scale, shift) of every layer by its running statistics, (K,) each; a convolution's bias is in shift."""
    tensors = [layer_tensors(layer) for layer in layers]
    _, gammas, betas, means, variances = zip(*tensors, strict=True)
    if any(t is None for vectors in (gammas, betas) for t in vectors):
        return [
            scale_shift(mean, var, gamma, beta, layer.eps)[1:]
            for layer, gamma, beta, mean, var in zip(layers, gammas, betas, means, variances, strict=True)
        ]
    scales = torch._foreach_add(list(variances), [layer.eps for layer in layers])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, list(gammas))
    shifts = torch._foreach_addcmul(list(betas), list(means), scales, value=-1)
    return list(zip(scales, shifts, strict=True))


def whole_block_why_not(
    x: Tensor | Like, layers: Sequence[ConvBn], projection: ConvBn | None = None, identity: bool = False
) -> str | None:
    """None where one kernel can run the whole block on ``x``, else the reason."""
    every = [*layers, projection] if projection is not None else list(layers)
    if len(layers) != 3 or not (identity or projection is not None):
        shortcut = "a" if identity or projection else "no"
        return f"{len(layers)} layers and {shortcut} shortcut (supported: a bottleneck)"
    for layer, padding in zip(every, ((0, 0), (1, 1), (0, 0), (0, 0)), strict=False):
        found = (layer.stride, layer.padding, layer.dilation, layer.groups)
        if tuple(map(tuple, found[:3])) != ((1, 1), padding, (1, 1)) or layer.groups != 1:
            stride, pad, dilation, groups = found
            return (
                f"stride {stride}, padding {pad}, dilation {dilation}, groups {groups} (supported: 1, {padding}, 1, 1)"
            )
    if not all(layer.relu for layer in layers):
        return "a layer without its ReLU"
    ask = hook("bottleneck", "why_not", x.device, x.dtype)
    if ask is None:
        return f"no backend for {x.device} has it"
    sizes = [list(layer.weight.shape) for layer in every] + [None] * (4 - len(every))
    return ask(x.device, x.dtype, list(x.shape), sizes)


def whole_stem_why_not(request: Request) -> str | None:
    """None where one kernel can run the whole stem, else the reason."""
    if not request.pool or len(request.layers) != 1:
        return "no convolution with the max-pool behind it (supported: a stem)"
    (layer,) = request.layers
    found = (tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation), layer.groups)
    if found != ((2, 2), (3, 3), (1, 1), 1):
        stride, pad, dilation, groups = found
        return f"stride {stride}, padding {pad}, dilation {dilation}, groups {groups} (supported: 2, 3, 1, 1)"
    x = request.x
    ask = hook("whole_stem", "why_not", x.device, x.dtype)
    if ask is None:
        return f"no backend for {x.device} has it"
    return ask(x.device, x.dtype, list(x.shape), list(layer.weight.shape))


# ---- which way, and why


def unable(name: str, request: Request, asked: bool = False) -> str | None:
    """Why the block cannot run in the way ``name`` here and now, or, unless ``asked``, must not; or None."""
    if name not in WAYS:
        return "this version has no such way"
    if name == "bottleneck":
        return whole_block_why_not(request.x, request.layers, request.projection, request.identity)
    if name == "stem":
        return whole_stem_why_not(request)
    if name in ("library", "unfused"):
        return None
    if request.pool and len(request.layers) == 1:
        return "a stem's convolution is the library's, and the rest one pass"
    backend = "triton" if name == "mixed" else name
    reason = dispatch.reasons("conv_affine_act", request.x.device, request.x.dtype)[backend]
    if reason is None and name == "cudnn" and not asked:
        return "its ReLU makes 0 of NaN; fuse(model, backend='cudnn') asks for it"
    return reason


def _way(candidate: Candidate, request: Request) -> Way | str:
    """The way that a row names, or why it cannot run."""
    reason = unable(candidate.backend, request)
    if reason is not None:
        return reason
    found = tuple((candidate.config or {}).get("convolutions", ()))
    if (candidate.backend == "mixed") != bool(found) or (
        found and (len(found) != len(request.every) or not {"triton", "library"}.issuperset(found))
    ):
        return f"this version has no such way: {candidate.config}"
    return Way(candidate.backend, found)


def _by_row(row: Row, request: Request) -> tuple[Way, float, list[str]]:
    """The fastest way of a row that can run, its seconds, and the faster ones that cannot, and why."""
    left_out: list[str] = []
    for candidate in row.candidates:
        way = _way(candidate, request)
        if isinstance(way, Way):
            return way, candidate.seconds, left_out
        left_out.append(f"{candidate.backend}, {candidate.seconds * 1e6:.0f} us: {way}")
    return _LIBRARY, float("nan"), left_out


def _whole(request: Request) -> Way:
    """One kernel for all of it."""
    return _STEM if request.pool else _BLOCK


def choose_way(request: Request) -> Way:
    """How the block runs: as asked for by ``use_backend``, as measured, or by the order of backends."""
    x = request.x
    forced = forced_backend()
    if forced == "native":
        whole = _whole(request)
        return _LIBRARY if unable(whole.name, request) is not None else whole
    if forced is None and x.device.type == "cuda" and (rows := dispatch.measured_inference(x.device)):
        row = rows.get(request.signature)
        if row is not None:
            return _by_row(row, request)[0]
    backend = choose("conv_affine_act", x.device, x.dtype).backend
    return Way(backend) if backend in _FUSING else _LIBRARY


def explain_way(request: Request) -> tuple[Way, str]:
    """``choose_way``, and the reason for explain()."""
    x = request.x
    way = choose_way(request)
    if forced_backend() not in (None, "native"):
        return way, "asked for"
    whole = unable(_whole(request).name, request)
    other = "" if way == _whole(request) else "; one kernel for all of it can run it, too"
    if whole is not None:
        other = f"; not in one kernel: {whole}"
    if forced_backend() is not None:
        return way, f"asked for{other}"
    row = dispatch.measured_inference(x.device).get(request.signature)
    if row is None:
        return way, f"not measured, and no GPU has run the other ways{other}; warmup(model.eval(), input_shape) decides"
    _, seconds, left_out = _by_row(row, request)
    rivals = [c for c in row.candidates if c.seconds >= seconds and c.backend != way.name]
    reason = f"measured: {seconds * 1e6:.0f} us"
    if rivals:
        reason = f"measured: {rivals[0].seconds / seconds:.2f}x {rivals[0].backend}"
    reason += f" on {tables.device_name(x.device)}"
    return way, "; left out: ".join([reason, *left_out]) + ("" if whole is None else other)


# ---- running it


def fused_block(
    x: Tensor,
    layers: Sequence[ConvBn],
    *,
    projection: ConvBn | None = None,
    residual: Tensor | None = None,
    identity: bool = False,
    pool: bool = False,
) -> Tensor | None:
    """``functional.residual_block`` of layers with given statistics, without gradients; None where that is the way.

    Arguments, result and errors are those of ``residual_block``. A stem's convolution (``pool``) is the library's, and
    all behind it one pass, unless all of it is one kernel.
    """
    every = [*layers, projection] if projection is not None else list(layers)
    if isinstance(x, Tensor) and x.dim() == 4:
        x, residual, every = f._autocast(x, residual, every)
    f._check(x, every)
    side = every[-1] if projection is not None else None
    request = Request(x, every[: len(layers)], side, residual is not None, identity, pool)
    way = choose_way(request)
    return None if way == _LIBRARY else run_way(way, request, residual)


def run_way(way: Way, request: Request, residual: Tensor | None = None) -> Tensor:
    """The block of ``request``, whose x is a tensor, in one of ``WAYS`` that can run it; operands are checked."""
    x, layers, side, _, identity, pool = request
    assert isinstance(x, Tensor)
    if way == _LIBRARY:
        return f.residual_block(x, layers, projection=side, residual=residual, identity=identity, pool=pool)
    x = f.to_channels_last(x)
    if way == _UNFUSED:
        return _unfused(x, layers, side, residual, identity, pool)
    vectors = affines(request.every)
    if way == _STEM:
        return ops.whole_stem(x, layers[0].weight, *vectors[0])
    if way == _BLOCK:
        operands = [t for layer, pair in zip(request.every, vectors, strict=True) for t in (layer.weight, *pair)]
        return ops.bottleneck(x, *operands)
    backends = way.convolutions or (way.name,) * len(request.every)
    if side is not None:
        residual = _convolution(backends[-1], x, side._replace(relu=False), vectors[-1], None)
    elif identity:
        residual = x
    for i, (layer, vector) in enumerate(zip(layers, vectors, strict=False)):
        last = i == len(layers) - 1
        if last and pool:
            y = F.conv2d(x, layer.weight, None, *layer.geometry).contiguous(memory_format=torch.channels_last)
            return ops.affine_act_maxpool(y, *vector)[0]
        x = _convolution(backends[i], x, layer, vector, residual if last else None)
    return x


def _convolution(
    backend: str, x: Tensor, layer: ConvBn, vectors: tuple[Tensor, Tensor], residual: Tensor | None
) -> Tensor:
    """act(bn(conv(x)) + residual) by ``conv_affine_act`` of ``backend``, or by the library's and a pass behind it."""
    scale, shift = vectors
    if backend == "library":
        y = F.conv2d(x, layer.weight, None, *layer.geometry).contiguous(memory_format=torch.channels_last)
        return ops.affine_act(y, scale, shift, residual, relu=layer.relu)
    with use_backend(backend):
        return ops.conv_affine_act(x, layer.weight, shift, *layer.geometry, scale, residual, layer.relu)


def _unfused(
    x: Tensor,
    layers: Sequence[ConvBn],
    projection: ConvBn | None,
    residual: Tensor | None,
    identity: bool,
    pool: bool,
) -> Tensor:
    """As the original modules run it in eval mode."""

    def conv_bn(x: Tensor, la: ConvBn) -> Tensor:
        y = F.conv2d(x, la.weight, la.bias, *la.geometry)
        return F.batch_norm(y, la.running_mean, la.running_var, la.gamma, la.beta, False, 0.0, la.eps)

    z = x
    for i, la in enumerate(layers):
        z = conv_bn(z, la)
        if i == len(layers) - 1:
            shortcut = conv_bn(x, projection) if projection is not None else x if identity else residual
            z = z if shortcut is None else z + shortcut
        z = F.relu(z, inplace=True) if la.relu else z
    z = F.max_pool2d(z, 3, 2, 1) if pool else z
    return z.contiguous(memory_format=torch.channels_last)
