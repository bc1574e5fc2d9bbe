"""Random blocks: fused and original agree in outputs, gradients and buffers, or raise the same error; nothing leaks.

150 examples, always the same ones; RESNET_FAST_FUZZ=nightly draws 2,000 new ones, and prints how to repeat a failure.

The rule is the house's (tolerance.py), with torch's own error the largest of several runs: NCHW and channels-last, with
oneDNN and without, and with weights whose last bit is rounded elsewhere. Inputs and batch norms are drawn so that
rounding decides no ReLU; where it does all the same (a batch norm without affine), gradients may jump by a finite
amount, in torch as in ours, and are compared by norm.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models
from tests.tools import small

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=150, derandomize=True, database=None, **COMMON)
settings.register_profile("nightly", max_examples=2000, print_blob=True, **COMMON)
PROFILE = settings.get_profile(os.environ.get("RESNET_FAST_FUZZ", "ci"))


# ---- what is drawn ----------------------------------------------------------------------------------------------

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
    shortcut = draw(st.sampled_from(("identity", "identity", "projection", "opaque")))
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


# ---- how it is judged -------------------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "sliced":
        big = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2], 2 * x.shape[3], dtype=x.dtype)
        view = big[:, 1:-1, :, ::2]
        return view.copy_(x)
    if layout == "expanded":
        return x
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=kind)


def measure(network: nn.Module, image: Tensor, example: Example) -> dict[str, Tensor | None]:
    """Inference, a step with gradients, inference again: outputs, gradients, buffers."""
    found: dict[str, Tensor | None] = {}
    x = image.detach()
    low = example.autocast if x.dtype == torch.float32 else None
    autocast = torch.autocast("cpu", low, enabled=low is not None)
    without_gradients = torch.inference_mode if example.inference_mode else torch.no_grad
    network.eval()
    with without_gradients(), autocast:
        found["first"] = network(x).clone()
        found["second"] = network(x).clone()
    if example.train:  # statistics alone, as update_bn takes them: neither folded nor recorded
        example.set_train(network)
        with without_gradients(), autocast:
            found["third"], found["fourth"] = network(x).clone(), network(x).clone()
    leaf = x.detach().requires_grad_(example.x_learns)
    with autocast:
        outputs = [network(leaf if i == 0 else leaf.flip(0, 3)) for i in range(example.passes)]
    torch.manual_seed(example.seed + 2)
    for i, z in enumerate(outputs):
        found[f"z{i}"] = z.detach()
        dz = torch.randn(z.shape).to(example.autocast or example.dtype).to(z.dtype)
        for again in range(1 + example.retain if z.requires_grad else 0):
            z.backward(dz, retain_graph=again < example.retain)
    found["dx"] = leaf.grad
    found |= {f"d{n}": p.grad for n, p in network.named_parameters()}
    network.eval()
    with without_gradients(), autocast:
        found["after"] = network(x).clone()
    return found | {n: b.clone() for n, b in network.named_buffers()}


class Margins(NamedTuple):
    """Of everything inside, what its inputs hold at least, and their largest magnitude.

    ``decisions``: by how much every ReLU and max-pool decides. ``spreads``: standard deviations that a batch norm
    divides by.
    """

    decisions: list[tuple[float, float]]
    spreads: list[tuple[float, float]]
    idle: list[bool]  # of every convolution: whether it has taps that meet the padding alone


@contextmanager
def margins() -> Iterator[Margins]:
    """What was met inside."""
    found = Margins([], [], [])

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            if name in ("relu", "relu_", "max_pool2d") and args[0].numel():
                x = args[0].detach()
                low = lead(x) if name == "max_pool2d" else x.abs().min()
                found.decisions.append((low.item(), x.abs().max().item()))
            if name == "conv2d":
                found.idle.append(has_idle_taps(*args[:2], *map(both, args[3:6])))
            if name == "batch_norm" and (kwargs or {}).get("training") and args[0].numel():
                x = args[0].detach()
                spread = x.std((0, 2, 3), correction=0).min().item()
                # Two values become 1 and -1 whatever they are: all gradients before are what rounding left, too.
                found.spreads.append((0.0 if x.numel() <= 2 * x.shape[1] else spread, x.abs().max().item()))
            return function(*args, **(kwargs or {}))

    with Watch():
        yield found


def has_idle_taps(x: Tensor, w: Tensor, *geometry: tuple[int, int]) -> bool:
    """``geometry``: stride, padding, dilation."""
    for size, taps, step, pad, spread in zip(x.shape[-2:], w.shape[-2:], *geometry, strict=True):
        last = (size + 2 * pad - spread * (taps - 1) - 1) // step
        met = [{tap * spread - pad + step * o for o in range(last + 1)} & set(range(size)) for tap in range(taps)]
        if not all(met):
            return True
    return False


def lead(x: Tensor) -> Tensor:
    """The least by which a maximum that is not 0 is ahead, in the windows of a 3x3/2 max-pool."""
    windows = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
    first, second = windows.topk(2).values.unbind(-1)
    return torch.where(first > 0, first - second, torch.inf).min()


def error(ours: Tensor, ref: Tensor) -> float:
    finite = ref.isfinite() & ours.isfinite()
    return (ours.double() - ref)[finite].abs().max().item() if finite.any() else 0.0


def judge(
    name: str, ours: Tensor | None, theirs: list[Any], ref: Any, eps: float, decided: bool, exact: bool, largest: float
) -> None:
    """``decided``: rounding decides no ReLU and no maximum. ``exact``: no batch norm divides by what rounding left.

    ``largest``: of all gradients. Beside it one that cancels (below a batch norm of two values, say) is rounding.
    """
    if ours is None or ref is None:
        assert ours is None and ref is None and all(t is None for t in theirs), f"{name}: some are None"
        return
    first = theirs[0]
    assert ours.shape == first.shape and ours.dtype == first.dtype, f"{name}: {ours.dtype}, torch's {first.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, first), name
        return
    if ours.numel() == 0:
        return
    assert torch.equal(ours.isnan(), first.isnan()), f"{name}: NaN in other places"
    if not exact and name.startswith("d"):
        return  # sums of large terms that cancel, each of which is rounded: in torch as in ours
    own = max(error(t, ref) for t in theirs)
    scale = ref[ref.isfinite()].abs().amax().item() if ref.isfinite().any() else 0.0
    found, allowed = error(ours, ref), 2 * own + 4 * eps * scale
    if name.startswith("d"):
        allowed += 4 * eps * largest if scale < eps**0.25 * largest else 0.0
    elif scale < eps**0.5:
        # All cancels, as where a batch norm without affine gets one value: float32's rounding of y * rstd is left.
        allowed += 4 * torch.finfo(torch.float32).eps * 1e-5**-0.5
    if not exact or (not decided and name.startswith("d")):
        distance = lambda t: (t.double() - ref)[t.isfinite() & ref.isfinite()].norm().item()  # noqa: E731
        loose = 3 * max(map(distance, theirs)) + 30 * eps * ref[ref.isfinite()].norm().item() + 1e-30
        found, allowed = distance(ours), max(allowed, loose)
    assert found <= allowed, (
        f"{name}: error {found:.3g}, torch's own {own:.3g}, allowed {allowed:.3g}, max|ref| {scale:.3g}"
    )


@torch.no_grad()
def nudged(network: nn.Module, eps: float) -> nn.Module:
    """Convolutions' weights off by up to eps / 2: what another order of additions might give."""
    for m in network.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.copy_(m.weight.double() * (1 + (torch.rand(m.weight.shape) - 0.5) * eps))
    return network


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as raised:
        return raised


def compare(example: Example) -> None:
    plain = example.cast(example.network())
    image = laid_out(example.image(), example.layout)
    ours = resnet_fast.fuse(copy.deepcopy(plain), generic=example.generic)
    wide = copy.deepcopy(plain).double()
    mine = outcome(lambda: measure(ours, image, example))
    with margins() as met:
        ref: Any = outcome(lambda: measure(wide, image.double(), example))
    if torch.bfloat16 in (example.dtype, example.autocast) and any(met.idle):
        return  # of those torch's own gradients of the weights may be unwritten memory
    eps = example.eps

    def draw(channels_last: bool, onednn: bool, nudge: int) -> Any:
        """One draw of torch's own rounding errors."""
        twin = nudged(copy.deepcopy(plain), nudge * eps)
        kind = torch.channels_last if channels_last else torch.contiguous_format
        with torch.backends.mkldnn.flags(enabled=onednn):
            return outcome(lambda: measure(twin, image.contiguous(memory_format=kind), example))

    theirs = [draw(*flags) for flags in itertools.product((False, True), repeat=3)]
    if isinstance(theirs[0], Exception):
        assert type(mine) is type(theirs[0]) and str(mine) == str(theirs[0]), f"{mine!r}, torch's {theirs[0]!r}"
        return
    if isinstance(mine, Exception):
        raise mine
    decided = all(low > 16 * eps * high for low, high in met.decisions)
    exact = all(low > 4 * eps * high for low, high in met.spreads)
    try:
        judge_all(mine, theirs, ref, eps, decided, exact)
    except AssertionError:
        # Torch may have been lucky eight times, where sums cancel: what is wrong, is wrong beside 24 more draws too. A
        # ReLU that gets nearly 0 lets its gradient pass or not, by the roundings of all that came before.
        nudge = 1 if decided and exact else 8
        theirs += [draw(*flags, nudge) for flags in itertools.product((False, True), repeat=2) for _ in range(6)]
        judge_all(mine, theirs, ref, eps, decided, exact)


def judge_all(
    mine: dict[str, Any], theirs: list[Any], ref: dict[str, Any], eps: float, decided: bool, exact: bool
) -> None:
    gradients = [t.abs().max().item() for n, t in ref.items() if n.startswith("d") and t is not None and t.numel()]
    for name in ref:
        judge(name, mine[name], [t[name] for t in theirs], ref[name], eps, decided, exact, max(gradients, default=0.0))


@pytest.mark.slow
@settings(PROFILE)
@given(examples())
def test_random_blocks(example: Example) -> None:
    compare(example)


RELU = Norm(8, True, True, 1e-5, 0.1)

PLAIN = Layer(8, 8, 3, 1, 1, 1, 1, False, RELU)
BARE = dataclasses.replace(PLAIN, norm=None)

#: What random examples have found, and was put right.
FOUND = {
    # oneDNN crashed on a grouped 1x1 convolution with a dilation.
    "dilated 1x1": Example(
        (Block("chain", (Layer(32, 32, 1, 2, 1, 2, 16, False, Norm(32, True, True, 0.1, None, inplace=None)),)),) * 2
    ),
    # The statistics of an example in training were those of folded weights: no batch was counted.
    "training without gradients": Example((Block("basic", (PLAIN, PLAIN), "identity"),) * 2),
    # oneDNN forgot the stride of W where it reads one channel, channels-last, and the output is one column wide.
    "one channel": Example(
        (
            Block(
                "chain",
                (
                    Layer(5, 1, 1, 1, 0, 1, 1, False, Norm(1, True, True, 1e-5, 0.1)),
                    Layer(1, 16, (1, 3), (1, 3), (0, 1), 1, 1, False, Norm(16, True, True, 1e-5, 0.1)),
                    Layer(16, 5, 1, 1, 0, 1, 1, False, Norm(5, True, True, 1e-5, 0.1)),
                ),
            ),
        )
        * 2
    ),
    # x is float32 under autocast: its sum with a bfloat16 output is float32, unless it is written over that.
    "a sum that promotes": Example((Block("joined", (PLAIN, PLAIN)),) * 2, autocast=torch.bfloat16),
    # The shortcut was called, and complained, before the batch norm that torch asks first.
    "one value": Example(
        (
            Block(
                "basic",
                (
                    dataclasses.replace(PLAIN, stride=2),
                    dataclasses.replace(PLAIN, k=4, norm=Norm(4, True, True, 1e-5, 0.1)),
                ),
                "opaque",
            ),
        ),
        n=1,
        h=1,
        w=1,
    ),
    "a sum in place": Example((Block("added", (PLAIN, PLAIN)),) * 2, autocast=torch.bfloat16),
}


@pytest.mark.parametrize("example", FOUND.values(), ids=FOUND.keys())
def test_found(example: Example) -> None:
    compare(example)


#: One of every kind of block, and the parts of it that fuse() swaps.
KINDS = {
    "chain": (
        Block("chain", (RELU, PLAIN, RELU, BARE, RELU)),
        ["0 + relu", "2 + 3 + relu", "5 + relu", "7 + 8 + relu"],
    ),
    "stem": (Block("stem", (PLAIN,)), ["0 + 1 + relu, 3"]),
    "basic": (Block("basic", (PLAIN, PLAIN), "identity"), ["identity"]),
    "bottleneck": (Block("bottleneck", (PLAIN,) * 3, PLAIN), ["shortcut"]),
    "dense": (Block("dense", (RELU, PLAIN, BARE)), ["norm1 + relu", "conv1 + norm2 + relu"]),
    "pre-activation": (Block("pre-activation", (RELU, PLAIN, BARE)), ["norm1 + relu", "conv1 + norm2 + relu"]),
    "joined": (Block("joined", (PLAIN, PLAIN)), ["identity"]),
    "added": (Block("added", (PLAIN, PLAIN)), ["identity"]),
}


@pytest.mark.parametrize(("block", "words"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_what_is_drawn_runs_fused(block: Block, words: list[str], train: bool) -> None:
    """Random examples say nothing of our kernels where blocks run as they were."""
    example = Example((block,), train=train)
    network = resnet_fast.fuse(example.network().train(train), generic=example.generic)
    x = laid_out(example.image(), example.layout)
    for needs_grad in (True, False):
        with torch.set_grad_enabled(needs_grad):
            network(x)
        rows = [r for r in resnet_fast.explain(network) if r.block]
        assert [r.status for r in rows] == ["fused"], f"{rows}"
        assert all(word in rows[0].reason for word in words), rows[0].reason


# ---- nothing leaks ----------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """Tensors that Python knows of."""
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


def train_step(model: nn.Module, x: Tensor, i: int) -> None:
    model.train()
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
            p.grad = None


def infer(model: nn.Module, x: Tensor, i: int) -> None:
    with torch.no_grad():
        model.eval()(x)


def by_turns(model: nn.Module, x: Tensor, i: int) -> None:
    """What changes is folded anew; sizes vary more than are remembered."""
    train_step(model, x, i)
    infer(model, x[: 1 + i % 7, :, : 16 + i % 11], i)


def fused_and_unfused(model: nn.Module, x: Tensor, i: int) -> None:
    resnet_fast.unfuse(model)
    infer(resnet_fast.fuse(model, generic=True), x, i)
    copy.deepcopy(model)


def with_mistakes(model: nn.Module, x: Tensor, i: int) -> None:
    """Errors, and graphs that nobody runs backward."""
    model.train()
    model(x)
    with pytest.raises(RuntimeError):
        model(x[:, :2])


def norms_first() -> nn.Module:
    """A stem, a dense layer, a pre-activation block and a transition: norms with no convolution before them."""
    kinds = [KINDS[kind][0] for kind in ("stem", "dense")]
    wide = dataclasses.replace(RELU, c=16), dataclasses.replace(PLAIN, c=16), dataclasses.replace(BARE, k=16)
    network = Example((*kinds, Block("pre-activation", wide), Block("chain", wide[:2]))).network()
    return nn.Sequential(nn.Conv2d(3, 8, 1), *network)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(
    ("make", "step"),
    [
        *((small, step) for step in (train_step, infer, by_turns, fused_and_unfused, with_mistakes)),
        *((norms_first, step) for step in (train_step, infer, by_turns)),
    ],
    ids=lambda f: f.__name__,
)
def test_memory_is_flat_over_200_steps(
    make: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor, int], None]
) -> None:
    """No tensor more than after the first ones; and less growth than if a step kept one input, or one activation."""
    model = resnet_fast.fuse(make(), generic=True)
    x = torch.randn(8, 3, 32, 32)
    first = 7 * 11  # of by_turns, every size once: libraries keep something of each, and we of the last ones
    for i in range(first):
        step(model, x, i)
    tensors, memory = live_tensors(), resident()
    for i in range(first, 4 * first):
        step(model, x, i)
    assert live_tensors() <= tensors
    assert resident() - memory < 200 * x.nbytes
