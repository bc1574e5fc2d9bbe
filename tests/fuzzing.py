"""What test_fuzz.py draws: networks of one or two blocks of any kind, their inputs, and how they are run."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import models

pytest.importorskip("hypothesis")
from hypothesis import strategies as st

#: One number for both sides, or one for each.
Pair = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A batch norm of ``c`` channels, and the ReLU behind it: None, or whether it works in place."""

    c: int
    affine: bool
    tracked: bool
    eps: float
    momentum: float | None
    inplace: bool | None = False

    def module(self, distance: float) -> nn.BatchNorm2d:
        """``distance``: how far from 0 the norm's outputs are kept, where it has an affine."""
        bn = nn.BatchNorm2d(self.c, self.eps, self.momentum, self.affine, self.tracked)
        with torch.no_grad():
            if self.affine:
                bn.weight.copy_(0.1 + 0.1 * torch.rand(self.c))
                bn.bias.copy_(distance * torch.randn(self.c).sign())
            if self.tracked:
                bn.running_mean.copy_(0.1 * torch.randn(self.c))
                bn.running_var.copy_(0.5 + torch.rand(self.c))
        return bn

    @property
    def relu(self) -> list[nn.Module]:
        """The ReLU behind it, if there is one."""
        return [] if self.inplace is None else [nn.ReLU(inplace=self.inplace)]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution and, if there is one, its norm. ``groups`` divides both widths."""

    c: int
    k: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    bias: bool
    norm: Norm | None

    def conv(self) -> nn.Conv2d:
        conv = nn.Conv2d(
            self.c, self.k, self.kernel, self.stride, self.padding, self.dilation, self.groups, bias=self.bias
        )
        with torch.no_grad():
            fan_in = conv.weight[0].numel()
            conv.weight.copy_(torch.randn(conv.weight.shape) / (3 * fan_in**0.5))
        return conv

    def modules(self, distance: float) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """``distance`` as for :class:`Norm`."""
        assert self.norm is not None
        return self.conv(), self.norm.module(distance)


class Dense(nn.Module):
    """DenseNet's layer: [x, conv2(relu(norm2(conv1(relu(norm1(x))))))] side by side."""

    def __init__(self, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm1, conv1, norm2, conv2

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat((x, self.conv2(torch.relu(self.norm2(new)))), 1)


class PreActivation(Dense):
    """A pre-activation block: x + conv2(relu(norm2(conv1(relu(norm1(x))))))."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(new)))


class Joined(nn.Module):
    """A basic block in a text that no adapter knows: relu(x + norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, conv1: nn.Module, norm1: nn.Module, conv2: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv1, norm1, conv2, norm2

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(out)))


class Added(Joined):
    """The same, written over norm2's output: under autocast the sum keeps its dtype."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return torch.relu(out)


#: Blocks whose texts are traced: they are fused with generic=True alone.
TRACED = {"dense": Dense, "pre-activation": PreActivation, "joined": Joined, "added": Added}


@dataclasses.dataclass(frozen=True)
class Block:
    """``kind``: "chain", "stem", "basic", "bottleneck" or one of TRACED.

    A chain is of layers and norms; "stem" is a layer and a max-pool. ``shortcut`` of "basic" and "bottleneck": a layer,
    "identity" or "opaque".
    """

    kind: str
    layers: tuple[Layer | Norm, ...]
    shortcut: Layer | str | None = None

    @property
    def c(self) -> int:
        """Channels of its input."""
        return self.layers[0].c

    @property
    def k(self) -> int:
        """Channels of its output."""
        last = self.layers[-1]
        k = last.c if isinstance(last, Norm) else last.k
        return self.c + k if self.kind == "dense" else k

    def module(self) -> nn.Module:
        parts: list[nn.Module] = []
        for layer in self.layers:
            if isinstance(layer, Norm):
                parts += [layer.module(1.0), *layer.relu]
            elif layer.norm is None:
                parts.append(layer.conv())
            else:
                parts += [*layer.modules(1.0), *layer.norm.relu]
        if self.kind == "chain":
            return nn.Sequential(*parts)
        if self.kind == "stem":
            return nn.Sequential(*parts, nn.MaxPool2d(3, 2, 1))
        if self.kind in TRACED:
            return TRACED[self.kind](*(m for m in parts if not isinstance(m, nn.ReLU)))
        layers = [layer for layer in self.layers if isinstance(layer, Layer)]
        down: nn.Module | None = None
        if isinstance(self.shortcut, Layer):
            down = nn.Sequential(*self.shortcut.modules(4.0))
        elif self.shortcut == "opaque":
            norm = nn.BatchNorm2d(self.k)
            with torch.no_grad():
                norm.weight.fill_(0.1)
                norm.bias.copy_(4.0 * torch.randn(self.k).sign())
            strided = any(layer.stride != 1 for layer in layers)
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if strided else nn.Identity()
            down = nn.Sequential(pool, nn.Conv2d(self.c, self.k, 1, bias=False), norm)
        if self.kind == "basic":
            block: Any = models.BasicBlock(8, 8, 1, down)
        else:
            block = models.Bottleneck(8, 2, 1, down)
        for i, layer in enumerate(layers, 1):
            conv, bn = layer.modules(1.0)
            setattr(block, f"conv{i}", conv)
            setattr(block, f"bn{i}", bn)
        return block


@dataclasses.dataclass(frozen=True)
class Example:
    """A network of one or two blocks, and how it is used.

    ``learns``, ``trains``: requires_grad of its parameters and train() of its batch norms, over and over. ``passes``:
    forwards before the first backward; ``retain``: each backward runs twice. ``autocast``: its dtype.
    """

    blocks: tuple[Block, ...]
    n: int = 2
    h: int = 8
    w: int = 5
    dtype: torch.dtype = torch.float32
    wide_norms: bool = False
    layout: str = "channels_last"
    train: bool = True
    learns: tuple[bool, ...] = (True,)
    x_learns: bool = True
    seed: int = 0
    trains: tuple[bool, ...] = (True,)
    passes: int = 1
    retain: bool = False
    autocast: torch.dtype | None = None
    inference_mode: bool = False

    @property
    def generic(self) -> bool:
        """Whether fuse() has to trace."""
        return any(block.kind in TRACED for block in self.blocks)

    @property
    def eps(self) -> float:
        """Of the arithmetic."""
        return torch.finfo(self.autocast or self.dtype).eps

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        network = nn.Sequential(*(block.module() for block in self.blocks))
        for p, learns in zip(network.parameters(), itertools.cycle(self.learns)):
            p.requires_grad_(learns)
        return network

    def set_train(self, network: nn.Module) -> None:
        """train(), with some batch norms frozen."""
        network.train()
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm, trains in zip(norms, itertools.cycle(self.trains)):
            norm.train(trains)

    def cast(self, network: nn.Module) -> nn.Module:
        """In the example's dtype; with ``wide_norms`` the batch norms stay in float32, as mixed precision has them."""
        network.to(self.dtype)
        if self.wide_norms:
            for m in network.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.float()
        return network

    def image(self) -> Tensor:
        torch.manual_seed(self.seed + 1)
        n, c = self.n, self.blocks[0].c
        t = torch.randn(1 if self.layout == "expanded" else n, c, self.h, self.w)
        return (t.sign() * (3 + 0.2 * torch.rand_like(t))).to(self.dtype).expand(n, -1, -1, -1)


WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from((1, 3, 4, 7, 8, 16, 17, 31, 32, 33, 63, 64, 65)))


@st.composite
def norms(draw: Any, c: int) -> Norm:
    return Norm(
        c,
        affine=draw(st.sampled_from((True, True, True, False))),
        tracked=draw(st.sampled_from((True, True, True, False))),
        eps=draw(st.sampled_from((1e-5, 1e-3, 0.1))),
        momentum=draw(st.sampled_from((0.1, 0.1, None, 0.0, 1.0, 0.37))),
        inplace=draw(st.booleans()),
    )


@st.composite
def layers(
    draw: Any, c: int, k: int, kernel: int | None = None, stride: int | None = None, same: bool = False
) -> Layer:
    """``same``: H and W change by the stride alone."""
    if same:
        assert kernel is not None and stride is not None
        taps: Pair = kernel
        steps: Pair = stride
        dilation: Pair = draw(st.sampled_from((1, 1, 2)))
        padding: Pair = dilation * (kernel // 2)
    else:
        taps = draw(st.sampled_from((1, 3, 3, 5, 2, (1, 3), (3, 2)))) if kernel is None else kernel
        steps = draw(st.sampled_from((1, 1, 2, 3, (1, 2)))) if stride is None else stride
        dilation = draw(st.sampled_from((1, 1, 2, (2, 1))))
        if both(taps)[1] < 3 and both(steps)[1] > 1:
            dilation = 1  # torch's own convolution crashes where such a filter, dilated, strides over an image one wide
        spread = draw(st.integers(0, 1))
        padding = tuple(d * (r // 2) + spread for d, r in zip(both(dilation), both(taps), strict=True))  # type: ignore[assignment]
    fits = [g for g in range(1, min(c, k) + 1) if c % g == 0 and k % g == 0]
    groups = draw(st.sampled_from((1, 1, *fits)))
    bias = draw(st.sampled_from((False, False, True)))
    return Layer(c, k, taps, steps, padding, dilation, groups, bias, draw(norms(k)))


def both(pair: Pair) -> tuple[int, int]:
    return (pair, pair) if isinstance(pair, int) else pair


@st.composite
def chains(draw: Any, c: int) -> Block:
    found: list[Layer | Norm] = []
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(("layer", "layer", "layer", "norm", "bare")))
        if what == "norm":
            found.append(draw(norms(c)))
            continue
        layer = draw(layers(c, draw(WIDTHS)))
        norm: Norm | None = layer.norm
        assert norm is not None
        if what == "bare":  # a convolution that no norm follows, unless one comes next
            norm = None
        elif draw(st.sampled_from((False, False, True))):
            norm = dataclasses.replace(norm, inplace=None)
        found.append(dataclasses.replace(layer, norm=norm))
        c = layer.k
    return Block("chain", tuple(found))


@st.composite
def traced(draw: Any, kind: str, c: int) -> Block:
    middle = draw(WIDTHS)
    k = draw(WIDTHS) if kind == "dense" else c
    first = draw(layers(c, middle, draw(st.sampled_from((1, 3))), 1, same=True))
    second = draw(layers(middle, k, 3, 1, same=True))
    if kind in ("joined", "added"):
        return Block(kind, (first, second))
    bare = dataclasses.replace(second, norm=None)
    return Block(kind, (draw(norms(c)), first, bare))


@st.composite
def blocks(draw: Any, c: int | None = None) -> Block:
    c = draw(WIDTHS) if c is None else c
    kind = draw(st.sampled_from(("chain", "chain", "stem", "basic", "bottleneck", *TRACED)))
    if kind == "chain":
        return draw(chains(c))
    if kind == "stem":
        return Block(kind, (draw(layers(c, draw(WIDTHS))),))
    if kind in TRACED:
        return draw(traced(kind, c))
    shortcut = draw(st.sampled_from((*("identity", "identity", "projection", "opaque") * 3, "misfit")))
    middle = draw(WIDTHS)
    k = c if shortcut == "identity" else draw(WIDTHS)
    stride = 1 if shortcut == "identity" else draw(st.sampled_from((1, 2)))
    kernels = (3, 3) if kind == "basic" else (1, 3, 1)
    strided = 0 if kind == "basic" else draw(st.sampled_from((0, 1)))
    widths = (c, *[middle] * (len(kernels) - 1), k)
    found = [
        draw(layers(widths[i], widths[i + 1], kernel, stride if i == strided else 1, same=True))
        for i, kernel in enumerate(kernels)
    ]
    side: Any = shortcut
    if shortcut == "projection":
        side = dataclasses.replace(draw(layers(c, k, 1, stride, same=True)), dilation=1)
    elif shortcut == "misfit":  # it broadcasts, or torch refuses the sum
        side = draw(st.sampled_from((draw(layers(c, draw(st.sampled_from((1, k))))), "identity")))
    return Block(kind, tuple(found), side)


#: requires_grad of the parameters, over and over.
LEARNS = ((True,), (True,), (False,), (True, False), (True, False, False), (False, True, True))
#: train() of the batch norms, over and over.
TRAINS = ((True,), (True,), (True,), (False,), (False, True), (True, False, False))


@st.composite
def examples(draw: Any) -> Example:
    first = draw(blocks())
    found = [first]
    if draw(st.booleans()):
        found.append(draw(blocks(first.k)))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    return Example(
        tuple(found),
        n=draw(st.integers(1, 3)),
        h=draw(st.integers(1, 11)),
        w=draw(st.integers(1, 11)),
        dtype=dtype,
        wide_norms=dtype != torch.float32 and draw(st.booleans()),
        layout=draw(st.sampled_from(("nchw", "channels_last", "sliced", "expanded"))),
        train=draw(st.booleans()),
        learns=draw(st.sampled_from(LEARNS)),
        x_learns=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        trains=draw(st.sampled_from(TRAINS)),
        passes=draw(st.sampled_from((1, 1, 2))),
        retain=draw(st.sampled_from((False, False, True))),
        autocast=draw(st.sampled_from((None, torch.bfloat16))) if dtype == torch.float32 else None,
        inference_mode=draw(st.booleans()),
    )


#: The plainest parts of a block: a norm with its ReLU, a convolution with both, and one alone.
RELU = Norm(8, True, True, 1e-5, 0.1)
PLAIN = Layer(8, 8, 3, 1, 1, 1, 1, False, RELU)
BARE = dataclasses.replace(PLAIN, norm=None)
