"""Random blocks: fused and original agree in outputs, gradients and buffers, or raise the same error.

150 examples, always the same ones; RESNET_FAST_FUZZ=nightly draws 2,000 new ones, and prints how to repeat a failure.

The rule is the house's (tolerance.py), with torch's own error the largest of several runs: NCHW and channels-last, with
oneDNN and without, and with weights whose last bit is rounded elsewhere. Inputs and batch norms are drawn so that
rounding decides no ReLU; where it does all the same (a batch norm without affine), gradients may jump by a finite
amount, in torch as in ours, and are compared by norm.
"""

from __future__ import annotations

import copy
import dataclasses
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
from tests.fuzzing import BARE, PLAIN, RELU, Block, Example, Layer, Norm, both, examples

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402

COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=150, derandomize=True, database=None, **COMMON)
settings.register_profile("nightly", max_examples=2000, print_blob=True, **COMMON)
PROFILE = settings.get_profile(os.environ.get("RESNET_FAST_FUZZ", "ci"))


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
