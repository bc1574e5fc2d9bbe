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
from typing import Any

import pytest
import torch
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution and its norm. ``groups`` divides both widths."""

    c: int
    k: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    bias: bool
    affine: bool
    tracked: bool
    eps: float
    momentum: float | None
    relu: bool = True

    def modules(self, distance: float) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """``distance``: how far from 0 the norm's outputs are kept, where it has an affine."""
        conv = nn.Conv2d(
            self.c, self.k, self.kernel, self.stride, self.padding, self.dilation, self.groups, bias=self.bias
        )
        bn = nn.BatchNorm2d(self.k, self.eps, self.momentum, self.affine, self.tracked)
        with torch.no_grad():
            fan_in = conv.weight[0].numel()
            conv.weight.copy_(torch.randn(conv.weight.shape) / (3 * fan_in**0.5))
            if self.affine:
                bn.weight.copy_(0.1 + 0.1 * torch.rand(self.k))
                bn.bias.copy_(distance * torch.randn(self.k).sign())
            if self.tracked:
                bn.running_mean.copy_(0.1 * torch.randn(self.k))
                bn.running_var.copy_(0.5 + torch.rand(self.k))
        return conv, bn


@dataclasses.dataclass(frozen=True)
class Block:
    """``kind``: "chain", "basic" or "bottleneck"; ``shortcut`` of the latter two: a layer, "identity" or "opaque"."""

    kind: str
    layers: tuple[Layer, ...]
    shortcut: Layer | str | None

    def module(self) -> nn.Module:
        if self.kind == "chain":
            parts: list[nn.Module] = []
            for layer in self.layers:
                parts += [*layer.modules(1.0), *([nn.ReLU(inplace=layer.bias)] if layer.relu else [])]
            return nn.Sequential(*parts)
        down: nn.Module | None = None
        if isinstance(self.shortcut, Layer):
            down = nn.Sequential(*self.shortcut.modules(4.0))
        elif self.shortcut == "opaque":
            last = self.layers[-1]
            norm = nn.BatchNorm2d(last.k)
            with torch.no_grad():
                norm.weight.fill_(0.1)
                norm.bias.copy_(4.0 * torch.randn(last.k).sign())
            stride = [i for layer in self.layers if (i := layer.stride) > 1]
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride else nn.Identity()
            down = nn.Sequential(pool, nn.Conv2d(self.layers[0].c, last.k, 1, bias=False), norm)
        if self.kind == "basic":
            block: Any = models.BasicBlock(8, 8, 1, down)
        else:
            block = models.Bottleneck(8, 2, 1, down)
        for i, layer in enumerate(self.layers, 1):
            conv, bn = layer.modules(1.0)
            setattr(block, f"conv{i}", conv)
            setattr(block, f"bn{i}", bn)
        return block


@dataclasses.dataclass(frozen=True)
class Example:
    """A network of one or two blocks, and how it is used."""

    blocks: tuple[Block, ...]
    n: int
    h: int
    w: int
    dtype: torch.dtype
    wide_norms: bool
    layout: str
    train: bool
    learns: tuple[bool, ...]
    x_learns: bool
    seed: int

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        network = nn.Sequential(*(block.module() for block in self.blocks))
        for p, learns in zip(network.parameters(), itertools.cycle(self.learns)):
            p.requires_grad_(learns)
        return network.train(self.train)

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
        t = torch.randn(self.n, self.blocks[0].layers[0].c, self.h, self.w)
        return (t.sign() * (3 + 0.2 * torch.rand_like(t))).to(self.dtype)


WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from((1, 3, 4, 7, 8, 16, 17, 31, 32, 33, 63, 64, 65)))


@st.composite
def layers(
    draw: Any, c: int, k: int, kernel: int | None = None, stride: int | None = None, same: bool = False
) -> Layer:
    """``same``: H and W change by the stride alone."""
    kernel = draw(st.sampled_from((1, 3, 3, 5, 2))) if kernel is None else kernel
    stride = draw(st.sampled_from((1, 1, 2, 3))) if stride is None else stride
    dilation = draw(st.sampled_from((1, 1, 2)))
    fits = [g for g in range(1, min(c, k) + 1) if c % g == 0 and k % g == 0]
    return Layer(
        c,
        k,
        kernel,
        stride,
        dilation * (kernel // 2) if same else draw(st.integers(dilation * (kernel // 2), dilation * (kernel // 2) + 1)),
        dilation,
        draw(st.sampled_from((1, 1, *fits))),
        bias=draw(st.sampled_from((False, False, True))),
        affine=draw(st.sampled_from((True, True, True, False))),
        tracked=draw(st.sampled_from((True, True, True, False))),
        eps=draw(st.sampled_from((1e-5, 1e-3, 0.1))),
        momentum=draw(st.sampled_from((0.1, 0.1, None, 0.0, 1.0, 0.37))),
    )


@st.composite
def blocks(draw: Any, c: int | None = None) -> Block:
    c = draw(WIDTHS) if c is None else c
    kind = draw(st.sampled_from(("chain", "basic", "bottleneck")))
    if kind == "chain":
        found = []
        for _ in range(draw(st.integers(1, 3))):
            layer = draw(layers(c, draw(WIDTHS)))
            found.append(dataclasses.replace(layer, relu=draw(st.sampled_from((True, True, False)))))
            c = layer.k
        return Block(kind, tuple(found), None)
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


@st.composite
def examples(draw: Any) -> Example:
    first = draw(blocks())
    found = [first]
    if draw(st.booleans()):
        found.append(draw(blocks(first.layers[-1].k)))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    return Example(
        tuple(found),
        n=draw(st.integers(1, 3)),
        h=draw(st.integers(1, 11)),
        w=draw(st.integers(1, 11)),
        dtype=dtype,
        wide_norms=dtype != torch.float32 and draw(st.booleans()),
        layout=draw(st.sampled_from(("nchw", "channels_last", "sliced"))),
        train=draw(st.booleans()),
        learns=draw(st.sampled_from(LEARNS)),
        x_learns=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


# ---- how it is judged -------------------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "sliced":
        big = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2], 2 * x.shape[3], dtype=x.dtype)
        view = big[:, 1:-1, :, ::2]
        return view.copy_(x)
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=kind)


def measure(network: nn.Module, image: Tensor, example: Example) -> dict[str, Tensor | None]:
    """Inference, a step with gradients, inference again: outputs, gradients, buffers."""
    found: dict[str, Tensor | None] = {}
    x = image.detach()
    with torch.no_grad():
        found["first"] = network.eval()(x).clone()
        found["second"] = network(x).clone()
    if example.train:  # statistics alone, as update_bn takes them: neither folded nor recorded
        network.train()
        with torch.no_grad():
            found["third"], found["fourth"] = network(x).clone(), network(x).clone()
    network.train(example.train)
    leaf = x.detach().requires_grad_(example.x_learns)
    z = network(leaf)
    found["z"] = z.detach()
    if z.requires_grad:
        torch.manual_seed(example.seed + 2)
        z.backward(torch.randn(z.shape).to(example.dtype).to(z.dtype))
    found["dx"] = leaf.grad
    found |= {f"d{n}": p.grad for n, p in network.named_parameters()}
    with torch.no_grad():
        found["after"] = network.eval()(x).clone()
    return found | {n: b.clone() for n, b in network.named_buffers()}


@contextmanager
def relu_inputs() -> Iterator[list[tuple[float, float]]]:
    """(smallest, largest) magnitude of what every ReLU inside gets."""
    found: list[tuple[float, float]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in ("relu", "relu_") and args[0].numel():
                magnitude = args[0].detach().abs()
                found.append((magnitude.min().item(), magnitude.max().item()))
            return function(*args, **(kwargs or {}))

    with Watch():
        yield found


def error(ours: Tensor, ref: Tensor) -> float:
    finite = ref.isfinite() & ours.isfinite()
    return (ours.double() - ref)[finite].abs().max().item() if finite.any() else 0.0


def judge(
    name: str, ours: Tensor | None, theirs: list[Any], ref: Any, eps: float, decided: bool, largest: float
) -> None:
    """``largest``: of all gradients. Beside it one that cancels (below a batch norm of two values, say) is rounding."""
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
    own = max(error(t, ref) for t in theirs)
    scale = ref[ref.isfinite()].abs().amax().item() if ref.isfinite().any() else 0.0
    found, allowed = error(ours, ref), 2 * own + 4 * eps * scale
    if name.startswith("d") and scale < eps**0.5 * largest:
        allowed += 4 * eps * largest
    if not decided and (name.startswith("d")):
        norm = lambda t: (t.double() - ref).norm().item()  # noqa: E731
        found, allowed = norm(ours), 3 * max(norm(t) for t in theirs) + 30 * eps * ref.norm().item() + 1e-30
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
    ours = resnet_fast.fuse(copy.deepcopy(plain))
    wide = copy.deepcopy(plain).double()
    mine = outcome(lambda: measure(ours, image, example))
    with relu_inputs() as margins:
        ref: Any = outcome(lambda: measure(wide, image.double(), example))
    eps = torch.finfo(example.dtype).eps

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
    decided = all(low > 16 * eps * high for low, high in margins)
    try:
        judge_all(mine, theirs, ref, eps, decided)
    except AssertionError:
        # Torch may have been lucky eight times, where sums cancel: what is wrong, is wrong beside 24 more draws too. A
        # ReLU that gets nearly 0 lets its gradient pass or not, by the roundings of all that came before.
        nudge = 1 if decided else 8
        theirs += [draw(*flags, nudge) for flags in itertools.product((False, True), repeat=2) for _ in range(6)]
        judge_all(mine, theirs, ref, eps, decided)


def judge_all(mine: dict[str, Any], theirs: list[Any], ref: dict[str, Any], eps: float, decided: bool) -> None:
    gradients = [t.abs().max().item() for n, t in ref.items() if n.startswith("d") and t is not None and t.numel()]
    for name in ref:
        judge(name, mine[name], [t[name] for t in theirs], ref[name], eps, decided, max(gradients, default=0.0))


@pytest.mark.slow
@settings(PROFILE)
@given(examples())
def test_random_blocks(example: Example) -> None:
    compare(example)


#: What random examples have found, and was put right.
FOUND = {
    # oneDNN crashed on a grouped 1x1 convolution with a dilation.
    "dilated 1x1": Block("chain", (Layer(32, 32, 1, 2, 1, 2, 16, False, True, True, 0.1, None, False),), None),
    # The statistics of an example in training were those of folded weights: no batch was counted.
    "training without gradients": Block(
        "basic", (Layer(8, 8, 3, 1, 1, 1, 1, False, True, True, 1e-5, 0.1),) * 2, "identity"
    ),
}


@pytest.mark.parametrize("block", FOUND.values(), ids=FOUND.keys())
def test_found(block: Block) -> None:
    compare(Example((block, block), 2, 8, 5, torch.float32, False, "channels_last", True, (True,), True, 0))


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
    infer(resnet_fast.fuse(model), x, i)
    copy.deepcopy(model)


def with_mistakes(model: nn.Module, x: Tensor, i: int) -> None:
    """Errors, and graphs that nobody runs backward."""
    model.train()
    model(x)
    with pytest.raises(RuntimeError):
        model(x[:, :2])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(
    "step", [train_step, infer, by_turns, fused_and_unfused, with_mistakes], ids=lambda s: s.__name__
)
def test_memory_is_flat_over_200_steps(step: Callable[[nn.Module, Tensor, int], None]) -> None:
    """No tensor more than after the first fifty; and less growth than if a step kept one input, or one activation."""
    model = resnet_fast.fuse(small())
    x = torch.randn(8, 3, 32, 32)
    for i in range(50):
        step(model, x, i)
    tensors, memory = live_tensors(), resident()
    for i in range(50, 250):
        step(model, x, i)
    assert live_tensors() <= tensors
    assert resident() - memory < 200 * x.nbytes
