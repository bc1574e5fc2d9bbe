"""Blocks as residual_block takes them, the same in plain torch, and the rule of tolerance for both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.functional import ConvBn, residual_block
from tests.tolerance import assert_close, to_float64

KINDS = ("chain1", "chain3", "basic", "identity", "projection", "residual")
TENSORS = ("weight", "gamma", "beta", "running_mean", "running_var", "num_batches_tracked", "bias")
DIFFERENTIABLE = ("weight", "gamma", "beta", "bias")


class Block:
    """Inputs of residual_block: x, layers, and a shortcut."""

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float32,
        *,
        train: bool = True,
        size: int = 6,
        batch: int = 3,
        decided: bool | None = None,
        **options: Any,
    ) -> None:
        """``options`` are fields of every layer: None for an absent tensor, ``bias=True`` for a bias.

        ``decided`` (the default in low precision): every ReLU's input keeps a distance from 0. Where rounding decides
        on which side a value lies, gradients jump by a finite amount, in torch as in ours: no error can be compared.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.decided = dtype in (torch.bfloat16, torch.float16) if decided is None else decided
        c, k = (8, 6) if kind != "chain1" else (8, 10)
        shapes = {
            "chain1": [(k, c, 3)],
            "chain3": [(k, c, 1), (k, k, 3), (10, k, 1)],
            "basic": [(c, c, 3), (c, c, 3)],
            "identity": [(k, c, 1), (k, k, 3), (c, k, 1)],
            "projection": [(k, c, 1), (k, k, 3), (10, k, 1)],
            "residual": [(k, c, 1), (k, k, 3), (10, k, 1)],
        }[kind]
        strides = [1, 2, 1] if kind in ("projection", "residual") else [1] * 3
        self.layers = [
            self.layer(*shape, stride, dtype, wide, train, options, 1.0)
            for shape, stride in zip(shapes, strides, strict=False)
        ]
        self.projection = self.layer(10, c, 1, 2, dtype, wide, train, options, 4.0) if kind == "projection" else None
        self.x = self.image(batch, c, size).to(dtype).contiguous(memory_format=torch.channels_last)
        self.residual = self.image(batch, 10, (size + 1) // 2).to(dtype) if kind == "residual" else None
        self.identity = kind in ("identity", "basic")

    def image(self, n: int, c: int, size: int) -> Tensor:
        t = torch.randn(n, c, size, size)
        return t.sign() * (3 + 0.2 * torch.rand_like(t)) if self.decided else t

    def layer(
        self,
        k: int,
        c: int,
        r: int,
        stride: int,
        dtype: torch.dtype,
        wide: torch.dtype,
        train: bool,
        options: dict[str, Any],
        distance: float,
    ) -> ConvBn:
        options = dict(options)
        if options.pop("bias", None):
            options["bias"] = torch.randn(k).to(dtype)
        values = {
            "weight": (torch.randn(k, c, r, r) / (c * r * r) ** 0.5).to(dtype),
            "gamma": ((0.1 + 0.1 * torch.rand(k)) if self.decided else 1 + 0.3 * torch.randn(k)).to(wide),
            "beta": (distance * torch.randn(k).sign() if self.decided else 0.5 * torch.randn(k)).to(wide),
            "running_mean": (0.1 * torch.randn(k)).to(wide),
            "running_var": (1 + 0.2 * torch.rand(k)).to(wide),
            "num_batches_tracked": torch.tensor(3),
            "stride": (stride, stride),
            "padding": (r // 2, r // 2),
            "batch_stats": train,
            "relu": True,
        }
        return ConvBn(**{**values, **options})

    @property
    def every(self) -> list[ConvBn]:
        return [*self.layers, *([self.projection] if self.projection else [])]

    def map(self, convert: Callable[[str, Tensor], Tensor]) -> Block:
        """A copy with every tensor converted; ``convert`` also gets its name ("x", "0.weight", ...)."""
        new = copy.copy(self)

        def layer(i: int, old: ConvBn) -> ConvBn:
            tensors = {n: getattr(old, n) for n in TENSORS}
            return old._replace(**{n: None if t is None else convert(f"{i}.{n}", t) for n, t in tensors.items()})

        new.layers = [layer(i, la) for i, la in enumerate(self.layers)]
        new.projection = None if self.projection is None else layer(len(self.layers), self.projection)
        new.x = convert("x", self.x)
        new.residual = None if self.residual is None else convert("residual", self.residual)
        return new

    def leaves(self, wanted: Callable[[str], bool] = lambda name: True) -> Block:
        """A copy, fresh leaves; those that ``wanted`` names require a gradient."""

        def leaf(name: str, t: Tensor) -> Tensor:
            kind = name.rpartition(".")[2]
            differentiable = kind in (*DIFFERENTIABLE, "x", "residual")
            return t.detach().clone().requires_grad_(differentiable and wanted(name))

        return self.map(leaf)

    def named(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        self.map(lambda name, t: found.setdefault(name, t))
        return found

    def ours(self) -> Tensor:
        return residual_block(
            self.x, self.layers, projection=self.projection, residual=self.residual, identity=self.identity
        )

    def torchs(self) -> Tensor:
        """The same by F.conv2d, F.batch_norm and relu."""
        z = self.x
        for i, layer in enumerate(self.layers):
            z = plain(layer, z)
            if i < len(self.layers) - 1 and layer.relu:
                z = torch.relu(z)
        if self.projection is not None:
            z = z + plain(self.projection, self.x)
        elif self.identity or self.residual is not None:
            side = self.x if self.identity else self.residual
            z = z + side.to(z.dtype)  # as z += side does
        return torch.relu(z) if self.layers[-1].relu else z


def plain(layer: ConvBn, x: Tensor) -> Tensor:
    """One layer as nn.Conv2d and nn.BatchNorm2d do it."""
    y = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    factor = layer.momentum
    if layer.batch_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        factor = 1 / layer.num_batches_tracked.item() if factor is None else factor
    factor = 0.0 if factor is None else factor
    buffers = (layer.running_mean, layer.running_var)
    return F.batch_norm(y, *buffers, layer.gamma, layer.beta, layer.batch_stats, factor, layer.eps)


def backward(block: Block, forward: Callable[[Block], Tensor], dz: Tensor) -> dict[str, Tensor | None]:
    """z, every gradient and every buffer after one forward and backward."""
    z = forward(block)
    if z.requires_grad:
        z.backward(dz.to(z.dtype))
    buffers = {n: t for n, t in block.named().items() if "running" in n or "tracked" in n}
    return {"z": z.detach(), **{f"d{n}": t.grad for n, t in block.named().items() if n not in buffers}, **buffers}


def check(block: Block, wanted: Callable[[str], bool] = lambda name: True, context: Any = None) -> dict[str, Any]:
    """The rule of tolerance for z, every gradient and every buffer. Returns ours."""

    def run(forward: Callable[[Block], Tensor], b: Block) -> Tensor:
        if context is None:
            return forward(b)
        with context:
            return forward(b)

    torch.manual_seed(1)
    wide = block.map(lambda name, t: to_float64(t)).leaves(wanted)
    z64 = wide.torchs()
    dz = torch.randn_like(z64).to(block.x.dtype if context is None else torch.bfloat16).to(torch.float64)
    ref64 = backward(block.map(lambda name, t: to_float64(t)).leaves(wanted), Block.torchs, dz)
    torchs = backward(block.leaves(wanted), lambda b: run(Block.torchs, b), dz)
    nchw = block.map(lambda name, t: t.contiguous())
    again = backward(nchw.leaves(wanted), lambda b: run(Block.torchs, b), dz)
    ours = backward(block.leaves(wanted), lambda b: run(Block.ours, b), dz)
    assert ours["z"].dtype == torchs["z"].dtype
    for name in ref64:
        a, b, c = ours[name], ref64[name], torchs[name]
        if name.endswith("tracked"):
            assert torch.equal(a, c), name
        else:
            assert (None if a is None else a.dtype) == (None if c is None else c.dtype), name
            assert_close(a, b, c, name, again[name], None if context is None else torch.bfloat16)
    return ours
