"""residual_block, conv_bn_act and folded_block against the same block in plain torch: outputs, gradients, buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resnet_fast import functional as f
from resnet_fast.dispatch import reasons
from resnet_fast.functional import ConvBn, FoldCache, LayoutWarning, conv_bn_act, folded_block, residual_block
from tests.tolerance import DTYPES, assert_close, name_of, to_float64

TENSORS = ("weight", "gamma", "beta", "running_mean", "running_var", "num_batches_tracked", "bias")
DIFFERENTIABLE = ("weight", "gamma", "beta", "bias")
needs_folding = pytest.mark.skipif(
    reasons("bn_stats", torch.device("cpu"), torch.float32)["native"] is not None,
    reason="FoldCache needs the native kernels, to see writes that bump no counter",
)


# ---- blocks, and the same in plain torch


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


KINDS = ("chain1", "chain3", "basic", "identity", "projection", "residual")


# ---- against torch


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_torch(kind: str, dtype: torch.dtype, train: bool, relu: bool) -> None:
    block = Block(kind, dtype, train=train)
    block.layers[-1] = block.layers[-1]._replace(relu=relu)
    check(block)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"bias": True, "gamma": None, "beta": None},
        {"gamma": None, "beta": None},
        {"momentum": None},
        {"momentum": 1.0},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None, "bias": True},
        {"num_batches_tracked": None, "momentum": None},
        {"eps": 0.1},
        {"relu": False},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["chain1", "projection", "identity"])
def test_options(kind: str, train: bool, options: dict[str, Any]) -> None:
    if not train and "running_mean" in options:
        pytest.skip("without running statistics nn.BatchNorm2d takes the batch's in eval, too: the same as in train")
    check(Block(kind, train=train, **options))


SUBSETS: dict[str, Callable[[str], bool]] = {
    "none": lambda name: False,
    "x": lambda name: name == "x",
    "weights": lambda name: name.endswith("weight"),
    "gammas": lambda name: name.endswith("gamma"),
    "betas": lambda name: name.endswith("beta"),
    "first_layer": lambda name: name.startswith("0."),
    "middle_weight": lambda name: name == "1.weight",
    "last_layer": lambda name: name.startswith("2."),
    "projection": lambda name: name.startswith("3."),
    "residual": lambda name: name == "residual",
    "all_but_x": lambda name: name != "x",
    "all_but_norms": lambda name: name.endswith("weight") or name == "x",
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanted", SUBSETS.values(), ids=SUBSETS.keys())
@pytest.mark.parametrize("kind", ["chain3", "identity", "projection", "residual"])
def test_subsets_of_gradients(kind: str, wanted: Callable[[str], bool], train: bool) -> None:
    """Who needs no gradient gets None, as in torch; the others' do not change."""
    block = Block(kind, train=train)
    ours = check(block, wanted)
    everything = check(block)
    gradients = {name for name in ours if name.startswith("d") and ours[name] is not None}
    for name in gradients:
        assert torch.equal(ours[name], everything[name]), name
    assert bool(gradients) == any(wanted(name) for name in block.named())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (3,), (2, 3)], ids=str)
def test_some_norms_frozen(frozen: tuple[int, ...]) -> None:
    block = Block("projection")
    for i in frozen:
        if i == 3:
            block.projection = block.projection._replace(batch_stats=False)
        else:
            block.layers[i] = block.layers[i]._replace(batch_stats=False)
    check(block)
    check(block, lambda name: name.rpartition(".")[2] in ("weight", "x"))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, train: bool) -> None:
    """In float64, through the definitions; numerically, and so independent of our formulas and of torch's."""
    block = Block(kind, torch.float64, train=train, size=3, batch=2, bias=True).leaves()
    if train:  # the buffers' updates would make the function depend on how often it was called
        block = block.map(lambda name, t: t)
        strip = {"running_mean": None, "running_var": None, "num_batches_tracked": None}
        block.layers = [la._replace(**strip) for la in block.layers]
        block.projection = block.projection and block.projection._replace(**strip)
    names = [n for n, t in block.named().items() if t.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        return block.map(lambda name, t: given.get(name, t)).ours()

    leaves = tuple(block.named()[n] for n in names)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    torch.testing.assert_close(block.ours(), block.torchs(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, train: bool) -> None:
    """float32 parameters and x: bfloat16 z, float32 gradients, as torch's own autocast gives."""
    block = Block(kind, train=train, decided=True)
    ours = check(block, context=torch.autocast("cpu", torch.bfloat16))
    assert ours["z"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in ours.items() if name.startswith("d") and t is not None)


def test_mean_of_a_thousand_deviations() -> None:
    """A bias-like offset in x: conv outputs whose mean dwarfs their deviation, forward and backward."""
    block = Block("chain1", relu=False, size=12)
    block.x = block.x + 1000
    check(block)


@pytest.mark.parametrize("kind", KINDS)
def test_nchw_input(kind: str) -> None:
    block = Block(kind)
    dz = torch.randn_like(block.torchs())
    expected = backward(block.leaves(), Block.ours, dz)
    block.x = block.x.contiguous()
    if block.residual is not None:
        block.residual = block.residual.contiguous()
    f._layout_said = False
    with pytest.warns(LayoutWarning, match=r"x \(3, 8, 6, 6\) is not channels_last .* Remedy: model.to"):
        ours = backward(block.leaves(), Block.ours, dz)
    assert ours["z"].is_contiguous(memory_format=torch.channels_last)
    for name, t in expected.items():
        assert t is None or torch.equal(ours[name], t), name


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, train: bool) -> None:
    """Zero gradients, and running statistics that a batch of nothing does not change."""
    ours = check(Block(kind, train=train, batch=0))
    assert all(not t.any() for name, t in ours.items() if name.startswith("d") and t is not None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e18])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["chain1", "identity", "projection"])
def test_nan_and_infinity(kind: str, train: bool, value: float) -> None:
    """In x, then in the first weight: what torch makes of it, forward."""
    for where in ("x", "0.weight"):
        block = Block(kind, train=train).map(lambda name, t: t.clone())
        block.named()[where][0, 0, 0, 0] = value
        with torch.no_grad():
            torchs = block.leaves(SUBSETS["none"]).torchs()
            ours = block.ours()
        for test in (torch.isnan, torch.isposinf):
            assert torch.equal(test(ours), test(torchs)), where


@pytest.mark.parametrize("layer", [0, 2])
def test_one_value_per_channel_is_refused_as_torch_does(layer: int) -> None:
    block = Block("chain3", batch=1, size=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as torchs:
        block.torchs()
    for i in range(layer):
        block.layers[i] = block.layers[i]._replace(batch_stats=False)
    block.layers[layer] = block.layers[layer]._replace(batch_stats=True)
    with pytest.raises(ValueError) as ours:
        block.ours()
    assert str(ours.value).partition("got")[0] == str(torchs.value).partition("got")[0]
    shape = [1, (6, 6, 10)[layer], 1, 1]
    assert str(ours.value).endswith(f"got input size torch.Size({shape})")
    block.layers = [la._replace(batch_stats=False) for la in block.layers]
    check(block)


# ---- autograd's corners


def test_double_backward_raises() -> None:
    block = Block("identity").leaves()
    (dx,) = torch.autograd.grad(block.ours().square().sum(), block.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind: str) -> None:
    """The same gradients to the bit."""
    torch.manual_seed(2)
    plain_run, other = Block(kind).leaves(), None
    other = plain_run.leaves()
    plain_run.ours().square().sum().backward()
    checkpoint(lambda x: other.ours(), other.x, use_reentrant=False).square().sum().backward()
    for name, t in plain_run.named().items():
        assert (t.grad is None) == (other.named()[name].grad is None)
        assert t.grad is None or torch.equal(t.grad, other.named()[name].grad), name
    # Recomputation may stop as soon as it has what was saved, and so before the buffers move once more.
    assert other.layers[0].num_batches_tracked in (4, 5) and plain_run.layers[0].num_batches_tracked == 4


def test_backward_twice_and_accumulation() -> None:
    block = Block("projection").leaves()
    z = block.ours()
    z.sum().backward(retain_graph=True)
    once = {n: t.grad.clone() for n, t in block.named().items() if t.grad is not None}
    z.sum().backward()
    for name, grad in once.items():
        assert torch.equal(block.named()[name].grad, 2 * grad), name


def test_what_backward_saved_may_not_be_changed() -> None:
    """z is kept where the mask is read off it: writing to it is an error, as behind torch's own ReLU."""
    block = Block("identity").leaves()
    z = block.ours()
    z.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inplace_after_a_chain_is_free() -> None:
    block, other = Block("chain1").leaves(), None
    other = block.leaves()
    block.ours().add_(1).square().sum().backward()
    (other.ours() + 1).square().sum().backward()
    assert torch.equal(block.x.grad, other.x.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_buffers_move_all_the_same(mode: Any) -> None:
    block, other = Block("projection").leaves(), None
    other = block.leaves()
    expected = other.ours()
    with mode():
        z = block.ours()
    assert not z.requires_grad and torch.equal(z, expected)
    for name, t in other.named().items():
        assert torch.equal(block.named()[name], t), name


def test_no_activation_is_kept() -> None:
    """Saved for backward: x, z, and per layer its weight, y and four vectors."""
    block, seen = Block("identity").leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        block.ours()
    images = sorted(tuple(t.shape) for t in seen if t.dim() == 4 and t.shape[0] == 3)
    assert images == sorted([(3, 8, 6, 6)] * 3 + [(3, 6, 6, 6)] * 2)  # x, z, y3; y1, y2


# ---- what is refused


def test_refusals() -> None:
    block = Block("chain1")
    x, layer = block.x, block.layers[0]
    with pytest.raises(RuntimeError, match=r"differ in dtype: found torch.bfloat16 and torch.float32.*Remedy: x.to"):
        conv_bn_act(x.bfloat16(), layer)
    with pytest.raises(RuntimeError, match=r"different devices: found meta and cpu.*Remedy: x.to\('cpu'\)"):
        conv_bn_act(x.to("meta"), layer)
    with pytest.raises(ValueError, match=r"x: found 3 dimensions, supported is a tensor \(N, C, H, W\)"):
        conv_bn_act(x[0], layer)
    with pytest.raises(ValueError, match="x: found list"):
        conv_bn_act([1.0], layer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x: found dtype torch.int64.*Remedy: x.float"):
        conv_bn_act(x.long(), layer)
    with pytest.raises(ValueError, match="running_mean, running_var: found None"):
        conv_bn_act(x, layer._replace(batch_stats=False, running_mean=None))
    with pytest.raises(ValueError, match="found more than one, supported is at most one"):
        residual_block(x, [layer], residual=x, identity=True)
    with pytest.raises((RuntimeError, ValueError), match="channels"):
        conv_bn_act(x[:, :5], layer)
    with pytest.raises((RuntimeError, ValueError)):
        residual_block(x, [layer], residual=x[:, :5])


# ---- inference on folded layers


def fold_and_run(cache: FoldCache, block: Block) -> Tensor:
    """folded_block, which must not decline; no gradients."""
    with torch.no_grad():
        folded = cache.get(block.x, block.every)
        assert folded is not None
        n = len(block.layers)
        side = folded[n] if block.projection else None
        z = folded_block(block.x, folded[:n], projection=side, residual=block.residual, identity=block.identity)
        assert z is not None
        return z


@needs_folding
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gamma": None, "beta": None}], ids=["plain", "bias", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_folded_matches_torch(kind: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    block = Block(kind, dtype, train=False, **options)
    ref64 = block.map(lambda name, t: to_float64(t)).torchs()
    assert_close(fold_and_run(FoldCache(), block), ref64, block.torchs())


@needs_folding
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation": (2, 2), "padding": (2, 2)}], ids=["groups", "dilation"]
)
def test_folded_geometries(dtype: torch.dtype, options: dict[str, Any]) -> None:
    block = Block("basic", dtype, train=False, **options)
    if "groups" in options:
        block = block.map(lambda name, t: t[:, :4].contiguous() if name.endswith("weight") else t)
    ref64 = block.map(lambda name, t: to_float64(t)).torchs()
    assert_close(fold_and_run(FoldCache(), block), ref64, block.torchs())


@needs_folding
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_folded_on_a_1x1_image(kind: str, dtype: torch.dtype) -> None:
    block = Block(kind, dtype, train=False, size=1)
    ref64 = block.map(lambda name, t: to_float64(t)).torchs()
    assert_close(fold_and_run(FoldCache(), block), ref64, block.torchs())


@needs_folding
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "0.weight", "2.weight", "1.running_mean", "1.beta", "2.gamma", "3.running_var"])
def test_folded_declines_or_gives_torchs_nan(where: str, value: float) -> None:
    """A library's ReLU turns NaN into 0: folded_block must decline, or give what torch gives."""
    block = Block("projection", train=False).map(lambda name, t: t.clone())
    for fill in (False, True):
        target = block.named()[where]
        target[(0,) * target.dim()] = value
        if fill:
            block.x.zero_()  # infinity times nothing is NaN, too
        with torch.no_grad():
            folded = FoldCache().get(block.x, block.every)
            z = folded_block(block.x, folded[:3], projection=folded[3])
            torchs = block.torchs()
        if z is not None:
            assert torch.equal(z.isnan(), torchs.isnan())


@needs_folding
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_folded_sees_what_was_written_to_its_output(mode: Any) -> None:
    """The bound that travels along with z is worth nothing once z was written to."""
    block = Block("basic", train=False)
    with mode():
        folded = FoldCache().get(block.x, block.layers)
        z = folded_block(block.x, folded, identity=True)
        z.fill_(torch.nan)
        after = folded_block(z, folded, identity=True)
        assert after is None or after.isnan().all()


def _data(t: Tensor) -> None:
    t.data.mul_(2)


def _in_place(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(2)


CHANGES = {"in_place": _in_place, "data": _data}


@needs_folding
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("name", ["weight", "gamma", "beta", "running_mean", "running_var", "bias"])
@pytest.mark.parametrize("layer", [0, 3])
def test_fold_cache_sees_changes(layer: int, name: str, change: Callable[[Tensor], None]) -> None:
    block, cache = Block("projection", train=False, bias=True), FoldCache()
    before = fold_and_run(cache, block)
    assert cache.get(block.x, block.every) is cache.get(block.x, block.every)  # it is a cache
    change(getattr(block.every[layer], name))
    after = fold_and_run(cache, block)
    assert not torch.equal(before, after)
    assert torch.equal(after, fold_and_run(FoldCache(), block))


@needs_folding
@pytest.mark.parametrize("field", [{"eps": 0.5}, {"relu": False}], ids=["eps", "relu"])
def test_fold_cache_sees_other_numbers(field: dict[str, Any]) -> None:
    block, cache = Block("chain3", train=False), FoldCache()
    before = fold_and_run(cache, block)
    block.layers[1] = block.layers[1]._replace(**field)
    after = fold_and_run(cache, block)
    assert not torch.equal(before, after) and torch.equal(after, fold_and_run(FoldCache(), block))


@needs_folding
def test_fold_cache_sees_a_replaced_tensor() -> None:
    block, cache = Block("chain3", train=False), FoldCache()
    before = fold_and_run(cache, block)
    block.layers[1] = block.layers[1]._replace(weight=block.layers[1].weight * 2)
    assert not torch.equal(before, fold_and_run(cache, block))


@needs_folding
def test_fold_cache_sees_the_dtype_of_x() -> None:
    """Under autocast one block serves inputs of two dtypes: each by weights folded for it."""
    block, cache = Block("chain3", train=False), FoldCache()
    low = block.map(lambda name, t: t.bfloat16() if name == "x" else t)
    for b in (block, low, block):
        assert torch.equal(fold_and_run(cache, b), fold_and_run(FoldCache(), b))
        assert fold_and_run(cache, b).dtype == b.x.dtype
