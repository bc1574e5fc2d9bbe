"""THE TABLE: the shapes that tests and benchmarks run, and the one place that makes an op's inputs from a shape.

``inputs("conv_stats", RESNET50[0], torch.bfloat16)`` gives the keyword arguments of the op, in the op's own order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast import ops
from resnet_fast.dispatch import OPS


class Case(NamedTuple):
    """One convolution: x (N, C, H, W), w (K, C, R, R), square stride and padding; ``count`` times in its network."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    stride: int
    padding: int
    count: int = 1

    @property
    def P(self) -> int:
        """Height of y."""
        return (self.H + 2 * self.padding - self.R) // self.stride + 1

    @property
    def Q(self) -> int:
        """Width of y."""
        return (self.W + 2 * self.padding - self.R) // self.stride + 1

    @property
    def NPQ(self) -> int:
        """Values per channel of y."""
        return self.N * self.P * self.Q

    @property
    def x_size(self) -> list[int]:
        return [self.N, self.C, self.H, self.W]

    @property
    def w_size(self) -> list[int]:
        return [self.K, self.C, self.R, self.R]

    @property
    def y_size(self) -> list[int]:
        return [self.N, self.K, self.P, self.Q]


def resnet50(batch: int) -> tuple[Case, ...]:
    """ResNet-50 v1.5 at 224 x 224: its 53 convolutions, each distinct one with its multiplicity."""
    cases = [Case("stem_7x7_2", batch, 3, 224, 224, 64, 7, 2, 3, 1)]
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        size = 56 >> stage  # of z
        outer, inner = 4 * width, width
        name, rest = f"s{stage + 1}", blocks - 1
        before, wide = (64, size) if stage == 0 else (outer // 2, 2 * size)  # channels and size of the stage's x
        stride = wide // size
        cases += [
            Case(f"{name}_first_1x1", batch, before, wide, wide, inner, 1, 1, 0, 1),
            Case(f"{name}_reduce_1x1", batch, outer, size, size, inner, 1, 1, 0, rest),
            Case(f"{name}_3x3", batch, inner, size, size, inner, 3, 1, 1, blocks if stride == 1 else rest),
            Case(f"{name}_expand_1x1", batch, inner, size, size, outer, 1, 1, 0, blocks + (stride == 1)),
        ]
        if stride == 2:
            cases += [
                Case(f"{name}_3x3_2", batch, inner, wide, wide, inner, 3, 2, 1, 1),
                Case(f"{name}_shortcut_1x1_2", batch, before, wide, wide, outer, 1, 2, 0, 1),
            ]
    return tuple(cases)


RESNET50 = resnet50(1)

#: Small twins of every kind of layer above.
TINY = (
    Case("stem_7x7_2", 2, 3, 17, 17, 16, 7, 2, 3),
    Case("1x1", 2, 32, 8, 8, 16, 1, 1, 0),
    Case("expand_1x1", 2, 16, 8, 8, 64, 1, 1, 0),
    Case("3x3", 2, 16, 8, 8, 16, 3, 1, 1),
    Case("3x3_2", 2, 16, 8, 8, 16, 3, 2, 1),
    Case("shortcut_1x1_2", 2, 16, 8, 8, 32, 1, 2, 0),
    Case("threads", 2, 8, 20, 20, 72, 3, 1, 1),  # more than 32768 values, several row blocks: runs in parallel
)

#: Shapes that break kernels.
NASTY = (
    Case("C1_K1", 2, 1, 5, 5, 1, 3, 1, 1),
    Case("C3_K7", 2, 3, 9, 7, 7, 3, 1, 1),
    Case("K8", 2, 5, 6, 6, 8, 3, 1, 1),
    Case("K9", 2, 5, 6, 6, 9, 3, 1, 1),
    Case("K70", 2, 8, 5, 7, 70, 1, 1, 0),
    Case("K600", 2, 4, 3, 3, 600, 1, 1, 0),  # more channels than one tile holds
    Case("N1", 1, 8, 7, 7, 16, 3, 1, 1),
    Case("image_1x1", 4, 8, 1, 1, 16, 1, 1, 0),  # P = Q = 1
    Case("image_1x1_3x3", 4, 8, 1, 1, 16, 3, 1, 1),  # nothing but padding around it
    Case("odd_stride_2", 3, 6, 7, 5, 10, 3, 2, 1),
    Case("NPQ_off_every_block", 1, 4, 13, 29, 12, 3, 1, 1),
    Case("padding_2", 2, 4, 5, 6, 8, 3, 1, 2),  # wider than the filter needs
    Case("empty", 0, 8, 6, 6, 16, 3, 1, 1),
)

#: Bottlenecks that have a whole-block kernel: C channels, K the width (H, W as wanted). See VARIANTS["bottleneck"].
WHOLE_BLOCKS = {
    "identity": (Case("stage1", 1, 256, 9, 17, 64, 1, 1, 0), Case("stage2", 1, 512, 9, 17, 128, 1, 1, 0)),
    "projection": (Case("first", 1, 64, 9, 17, 64, 1, 1, 0), Case("first_wide", 1, 64, 9, 17, 128, 1, 1, 0)),
}

#: A stem that has a whole kernel: four tiles, one of them whole.
WHOLE_STEM = Case("stem", 1, 3, 35, 37, 64, 7, 2, 3)

LAYOUTS = ("channels_last", "nchw", "sliced", "unaligned")


def arrange(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` (N, C, H, W) laid out as ``layout`` says."""
    t = t.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        return t
    if layout == "nchw":
        return t.contiguous()
    n, c, h, w = t.shape
    fill = torch.nan if t.is_floating_point() else 255
    if layout == "sliced":  # a view with gaps in every dimension
        whole = t.new_full((2 * n, c + 3, h + 1, w + 2), fill)
        view = whole.contiguous(memory_format=torch.channels_last)[::2, 1 : c + 1, :h, 1 : w + 1]
    elif layout == "unaligned":  # channels-last and dense, one element off the allocation's start
        view = t.new_full((t.numel() + 1,), fill).as_strided(t.shape, t.stride(), 1)
    else:
        raise ValueError(f"layout: found {layout!r}, supported are {', '.join(LAYOUTS)}")
    return view.copy_(t)


#: Which optional arguments a variant of an op gets; "relu" among them means relu=True. The first is the usual one.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "bn_stats": {"plain": ("gamma", "beta", "eps"), "bare": ()},
    "bn_finalize": {"plain": ("gamma", "beta", "eps"), "bare": ()},
    "affine_act": {
        "residual": ("relu", "residual"),
        "plain": ("relu",),
        "projection": ("relu", "residual", "rscale", "rshift"),
        "linear": (),
        "linear_projection": ("residual", "rscale", "rshift"),
    },
    "affine_act_mask": {
        "residual": ("residual",),
        "plain": (),
        "projection": ("residual", "rscale", "rshift"),
    },
    "affine_act_backward": {
        "plain": (),
        "projection": ("residual", "rmean"),
        "mask": ("mask",),
        "mask_projection": ("mask", "residual", "rmean"),
    },
    "bn_backward_sums": {"masked": ("scale", "shift"), "linear": ()},
    "bn_backward_finalize": {"plain": ()},
    "bn_backward_apply": {"masked": ("scale", "shift"), "linear": ()},
    "affine_act_maxpool": {"plain": ()},
    "maxpool_backward_sums": {"plain": ()},
    "maxpool_backward_apply": {"plain": ()},
    "conv_stats": {
        "plain": ("gamma", "beta", "eps"),
        "lazy": ("scale", "shift", "gamma", "beta", "eps"),
        "bare": (),
    },
    "conv_dgrad": {"plain": (), "lazy": ("y", "mean", "a", "b", "c")},
    "conv_wgrad": {
        "plain": (),
        "lazy": ("scale", "shift", "y", "mean", "a", "b", "c"),
        "lazy_activation": ("scale", "shift"),
        "lazy_gradient": ("y", "mean", "a", "b", "c"),
    },
    "conv_backward": {
        "plain": (),
        "lazy": ("scale", "shift", "y", "mean", "a", "b", "c"),
        "masked": ("scale", "shift", "y", "mean", "a", "b", "c", "gscale", "gshift"),
        "residual": ("y", "mean", "a", "b", "c", "residual"),
        "masked_residual": ("y", "mean", "a", "b", "c", "gscale", "gshift", "residual"),
    },
    "conv_backward_sums": {"lazy": ("y", "mean", "a", "b", "c"), "plain": ()},
    "conv_affine_act": {
        "residual": ("relu", "residual"),
        "plain": ("relu",),
        "linear": (),
        "scaled": ("relu", "scale", "residual"),
    },
    # Of a case with C channels and K, the width: to 2 K with a projection.
    "bottleneck": {"identity": (), "projection": ("rw", "rscale", "rshift")},
    "whole_stem": {"plain": ()},
}


class _Maker:
    """Values by the name of the argument: the vocabulary's names mean the same in every op."""

    def __init__(self, op: str, case: Case, dtype: torch.dtype, device: str, seed: int, layout: str) -> None:
        self.op, self.case, self.dtype, self.device, self.seed, self.layout = op, case, dtype, device, seed, layout
        # In these two the lazy activation is x, elsewhere scale and shift belong to y.
        lazy_x = op in ("conv_stats", "conv_wgrad", "conv_backward", "conv_backward_sums")
        self.channels = case.C if lazy_x else case.K

    def randn(self, name: str, *size: int) -> Tensor:
        """Normal numbers that depend on the seed and the name alone."""
        generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
        return torch.randn(size, generator=generator, device=self.device)

    def vector(self, name: str, channels: int, centre: float, spread: float) -> Tensor:
        """(K,) in the dtype of statistics."""
        return (centre + spread * self.randn(name, channels)).to(ops.stats_dtype(self.dtype))

    def image(self, name: str, size: list[int], offset: Tensor | None = None) -> Tensor:
        """(N, C, H, W) in the layout asked for, with a mean of its own in every channel."""
        t = self.randn(name, *size)
        if offset is not None:
            t += offset.view(1, -1, 1, 1)
        return arrange(t.to(self.dtype), self.layout)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """z and index of ``affine_act_maxpool``: as the definition makes them of this case's y."""
        z, index = ops.affine_act_maxpool.definition(self.make("y"), self.make("scale"), self.make("shift"))
        return z, arrange(index, self.layout)

    def mask(self) -> Tensor:
        """The mask of z, as ``affine_act_mask`` packs it."""
        one = torch.ones(self.case.K, device=self.device)
        return ops.affine_act_mask.definition(self.make("z"), one, 0 * one)[1]

    def bottleneck(self, name: str, projection: bool) -> Any:
        """An argument of ``bottleneck``: x (N, C, H, W), K the width; to C channels, or by a projection to 4 K."""
        case = self.case
        c, width, k = case.C, case.K, 4 * case.K if projection else case.C
        sizes = {"w1": (width, c, 1), "w2": (width, width, 3), "w3": (k, width, 1), "rw": (k, c, 1)}
        if name in sizes:
            out, into, r = sizes[name]
            w = self.randn(name, out, into, r, r) / (into * r * r) ** 0.5
            return w.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if name == "x":
            return self.image("x", case.x_size)
        channels = width if name[-1] in "12" else k
        return self.vector(name, channels, *((1.0, 0.5) if "scale" in name else (0.0, 1.0)))

    def make(self, name: str) -> Any:
        """The argument called ``name``."""
        case, k = self.case, self.case.K
        if self.op == "bn_finalize" and name in ("mean", "var"):
            return torch.stack([self.vector(f"{name}{part}", k, 1.0, 0.1).abs() for part in range(3)])
        if self.op == "conv_backward" and name == "residual":
            return self.image("residual", case.x_size)
        if self.op.startswith("maxpool") and name in ("dz", "index"):
            z, index = self.pooled()
            return index if name == "index" else self.image("dz", list(z.shape))
        simple: dict[str, Callable[[], Any]] = {
            "x": lambda: self.image("x", case.x_size),
            "y": lambda: self.image("y", case.y_size, self.make("mean")),
            "residual": lambda: self.image("residual", case.y_size, self.make("rmean")),
            "dz": lambda: self.image("dz", case.y_size),
            "g": lambda: self.image("g", case.y_size),
            "z": lambda: arrange(torch.relu(self.image("z", case.y_size)), self.layout),
            "mean": lambda: self.vector("mean", k, 0.0, 1.0),
            "xmean": lambda: self.vector("xmean", case.C, 0.0, 1.0),
            "rmean": lambda: self.vector("rmean", k, 0.0, 1.0),
            "scale": lambda: self.vector("scale", self.channels, 1.0, 0.5),
            "shift": lambda: self.vector("shift", self.channels, 0.0, 1.0),
            "rscale": lambda: self.vector("rscale", k, 1.0, 0.5),
            "rshift": lambda: self.vector("rshift", k, 0.0, 1.0),
            "a": lambda: self.vector("a", k, 1.0, 0.5),
            "b": lambda: self.vector("b", k, 0.0, 0.1),
            "c": lambda: self.vector("c", k, 0.0, 0.1),
            "gscale": lambda: self.vector("gscale", k, 1.0, 0.5),
            "gshift": lambda: self.vector("gshift", k, 0.0, 1.0),
            "needs_x": lambda: True,
            "needs_w": lambda: True,
            "gamma": lambda: self.vector("gamma", k, 1.0, 0.5),
            "beta": lambda: self.vector("beta", k, 0.0, 1.0),
            "eps": lambda: 1e-3,
            "n": lambda: float(case.NPQ),
            "sum_g": lambda: self.vector("sum_g", k, 0.0, 10.0),
            "sum_gy": lambda: self.vector("sum_gy", k, 0.0, 10.0),
            "rstd": lambda: self.vector("rstd", k, 1.0, 0.1).abs(),
            "input_size": lambda: case.x_size,
            "weight_size": lambda: case.w_size,
            "stride": lambda: [case.stride] * 2,
            "padding": lambda: [case.padding] * 2,
            "dilation": lambda: [1, 1],
            "groups": lambda: 1,
        }
        if name == "w":
            w = self.randn("w", *case.w_size) / (case.C * case.R * case.R) ** 0.5
            return w.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return simple[name]()


def inputs(
    op: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    *,
    layout: str = "channels_last",
    variant: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of ``op`` for ``case``, in the order of its signature; optional ones as ``variant`` says."""
    variants = VARIANTS[op]
    kept = variants[next(iter(variants)) if variant is None else variant]
    maker = _Maker(op, case, dtype, device, seed, layout)
    arguments = {}
    for name, parameter in OPS[op].signature.parameters.items():
        if name == "relu":
            arguments[name] = "relu" in kept
        elif op == "bn_finalize" and name == "n":  # a part may be empty
            arguments[name] = torch.tensor([case.NPQ, 0, 3], dtype=ops.stats_dtype(dtype), device=device)
        elif name == "z" and "mask" in kept:
            arguments[name] = maker.mask()
        elif op == "bottleneck" and (parameter.default is parameter.empty or name in kept):
            arguments[name] = maker.bottleneck(name, "rw" in kept)
        elif parameter.default is parameter.empty or name in kept:
            arguments[name] = maker.make(name)
    return arguments
