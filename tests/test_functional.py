"""residual_block and conv_bn_act against the same block in plain torch: outputs, gradients, buffers, refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resnet_fast import dispatch, use_backend
from resnet_fast import functional as f
from resnet_fast.functional import ConvBn, LayoutWarning, conv_bn_act, residual_block
from tests.blocks import KINDS, Block, backward, check
from tests.tolerance import DTYPES, name_of

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


@pytest.mark.parametrize("backend", [None, "torch"], ids=["automatic", "torch"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"bias": True}], ids=["plain", "cumulative", "bias"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, train: bool, options: dict[str, Any], backend: str | None) -> None:
    """Zero gradients, and running statistics that a batch of nothing does not change."""
    with use_backend(backend):
        ours = check(Block(kind, train=train, batch=0, **options))
    assert all(not t.any() for name, t in ours.items() if name.startswith("d") and t is not None)


def test_empty_batch_moves_what_nn_batch_norm_moves() -> None:
    """The counter, and nothing else."""
    bn = torch.nn.BatchNorm2d(6)
    block = Block("chain1", batch=0)
    ours = block.layers[0]
    before = [t.clone() for t in (ours.running_mean, ours.running_var, ours.num_batches_tracked)]
    bn(torch.empty(0, 6, 4, 4))
    block.ours()
    assert torch.equal(ours.running_mean, before[0]) and torch.equal(bn.running_mean, torch.zeros(6))
    assert torch.equal(ours.running_var, before[1]) and torch.equal(bn.running_var, torch.ones(6))
    assert ours.num_batches_tracked == before[2] + 1 and bn.num_batches_tracked == 1


@pytest.mark.parametrize("kind", KINDS)
def test_meta(kind: str) -> None:
    """Meta tensors have no autocast to ask for, and go through the definitions."""
    block = Block(kind).map(lambda name, t: t.to("meta"))
    z = block.ours()
    assert z.device.type == "meta" and z.shape == block.torchs().shape


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
    """x is: writing to it is an error, as behind torch's own convolution. z is not: its mask is kept instead."""
    block = Block("identity").leaves()
    block.ours().sum().backward()
    expected, block.x.grad = block.x.grad, None
    z = block.ours()
    z.detach().add_(1)
    z.sum().backward()
    assert torch.equal(block.x.grad, expected)
    z = block.ours()
    block.x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the ops that ran, in order."""
    seen: list[str] = []

    def choose(*args: Any) -> dispatch.Choice:
        choice = original(*args)
        seen.append(choice.backend)
        return choice

    original = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", choose)
    return seen


def test_backward_runs_on_the_backend_of_its_forward(ran: list[str]) -> None:
    """Outside of ``with use_backend``, and in a thread that never saw it, as autograd's are for a GPU."""
    block = Block("projection").leaves()
    with use_backend("torch"):
        first, second = block.ours(), block.ours()
    ran.clear()
    first.sum().backward()
    thread = threading.Thread(target=second.sum().backward)
    thread.start()
    thread.join()
    assert len(ran) > 20 and set(ran) == {"torch"}
    assert dispatch.forced_backend() is None


def test_backward_of_an_automatic_forward_obeys_its_caller(ran: list[str]) -> None:
    z = Block("projection").leaves().ours()
    ran.clear()
    with use_backend("torch"):
        z.sum().backward()
    assert ran and set(ran) == {"torch"}


def test_compiles_as_one_graph() -> None:
    """Called by itself; a fused module's original forward is what the compiler reads."""
    block, other = Block("projection").leaves(), None
    other = block.leaves()
    torch._dynamo.reset()
    compiled = torch.compile(lambda b: b.ours(), fullgraph=True, backend="aot_eager")
    compiled(other).square().sum().backward()
    block.ours().square().sum().backward()
    for name, t in block.named().items():
        torch.testing.assert_close(other.named()[name], t, msg=name)
        assert t.grad is None or torch.equal(other.named()[name].grad, t.grad), name


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
    """Saved for backward: x, a bit per value of z, and per layer its weight, y and four vectors."""
    block, seen = Block("identity").leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        block.ours()
    images = sorted(tuple(t.shape) for t in seen if t.dim() == 4 and t.shape[0] == 3)
    assert images == sorted([(3, 8, 6, 6)] * 2 + [(3, 6, 6, 6)] * 2 + [(3, 6, 6, 1)])  # x, y3; y1, y2; mask


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


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shortcut", ["identity", "residual", "projection", "none"])
def test_the_gradient_that_comes_in_is_not_written_to(relu: bool, kernel: int, shortcut: str) -> None:
    """It may be another branch's, too, or the caller's: of a sum both summands get the same tensor."""
    torch.manual_seed(0)

    def layer(r: int, relu: bool) -> ConvBn:
        vectors = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
        w = torch.randn(64, 64, r, r).contiguous(memory_format=torch.channels_last).requires_grad_()
        return ConvBn(w, *vectors, padding=(r // 2, r // 2), batch_stats=True, relu=relu)

    x, residual = (torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()
    options: dict[str, Any] = {
        "identity": {"identity": True},
        "residual": {"residual": residual.requires_grad_()},
        "projection": {"projection": layer(1, False)},
        "none": {},
    }[shortcut]
    z = residual_block(x, [layer(kernel, True), layer(kernel, relu)], **options)
    dz = torch.randn_like(z)
    before = dz.clone()
    z.backward(dz)
    assert torch.equal(dz, before)
