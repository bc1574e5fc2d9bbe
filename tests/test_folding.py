"""Inference on folded layers: against the same block in plain torch; never stale; NaN as torch has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.dispatch import backend, choose, use_backend
from resnet_fast.folding import FoldCache, Folded, arithmetic, cast, folded_block, magnitude
from tests.able import needs_native
from tests.blocks import KINDS, Block
from tests.tolerance import DTYPES, assert_close, assert_same_bits, name_of, to_float64

needs_folding = needs_native  # to see writes that bump no counter


def fold(cache: FoldCache, block: Block) -> tuple[list[Folded], Folded | None]:
    """The block's layers and its projection, folded for the dtype in which they are computed."""
    every = [*block.layers, *([block.projection._replace(relu=False)] if block.projection else [])]
    wide = arithmetic(block.x.device, block.x.dtype, every, block.projection is not None)
    folded = cache.get(block.x.device, wide, every)
    assert folded is not None
    n = len(block.layers)
    return folded[:n], folded[n] if block.projection else None


def run(block: Block, layers: list[Folded], projection: Folded | None, **options: Any) -> Tensor | None:
    """folded_block as plans call it: in the dtype of arithmetic, and back."""
    wide = layers[0].dtype
    residual = None if block.residual is None else cast(block.residual, wide)
    answer = folded_block(
        cast(block.x, wide), layers, projection=projection, residual=residual, identity=block.identity, **options
    )
    return None if answer is None else cast(answer[0], block.x.dtype)


def fold_and_run(cache: FoldCache, block: Block) -> Tensor:
    """folded_block, which must not decline; no gradients."""
    with torch.no_grad():
        z = run(block, *fold(cache, block))
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
            z = run(block, *fold(FoldCache(), block))
            torchs = block.torchs()
        if z is not None:
            assert torch.equal(z.isnan(), torchs.isnan())


@needs_folding
def test_bounds_are_bounds() -> None:
    block = Block("projection", train=False)
    with torch.no_grad():
        layers, side = fold(FoldCache(), block)
        z, bound = folded_block(block.x, layers, projection=side)
        assert z.abs().max() <= bound
        again, same = folded_block(block.x, layers, projection=side, known=magnitude(block.x))
        assert torch.equal(z, again) and same == bound
        # A bound that has grown too large is measured again; the answer is the same.
        assert folded_block(block.x, layers, projection=side, known=1e40)[1] == bound


@needs_folding
def test_a_residual_of_another_shape_is_torchs_to_judge() -> None:
    block = Block("basic", train=False)
    with torch.no_grad():
        layers, _ = fold(FoldCache(), block)
        assert folded_block(block.x, layers, residual=block.x[:, :, :1, :1].contiguous()) is None


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
    assert fold(cache, block)[0][0] is fold(cache, block)[0][0]  # it is a cache
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
    for b in (low, block, low):
        assert torch.equal(fold_and_run(cache, b), fold_and_run(FoldCache(), b))
        assert fold_and_run(cache, b).dtype == b.x.dtype


@needs_folding
def test_fold_cache_serves_many_shapes() -> None:
    """More than it keeps layouts for, and the first one again."""
    block, cache = Block("chain3", train=False), FoldCache()
    for size in (6, 5, 4, 9, 3, 7, 6):
        block.x = torch.randn(2, 8, size, size).contiguous(memory_format=torch.channels_last)
        assert torch.equal(fold_and_run(cache, block), fold_and_run(FoldCache(), block))


@needs_folding
@pytest.mark.parametrize(
    "order", [("native", None, "native"), (None, "native", None)], ids=["native first", "native second"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_forced_backend_leaves_no_trace(order: tuple[str | None, ...], dtype: torch.dtype) -> None:
    """What one choice of backend prepared is not used under another."""
    block, cache = Block("chain3", dtype, train=False), FoldCache()
    for forced in order:
        with use_backend(forced), torch.no_grad():
            layers, _ = fold(cache, block)
            run(block, layers, None)
            chosen = choose("conv_affine_act", block.x.device, layers[0].dtype)
        has_fast_path = hasattr(backend(chosen.backend), "conv_affine_act_plain")
        assert all((layer._plain is not None) == has_fast_path for layer in layers)
        assert all(layer._function is chosen.function for layer in layers)


@needs_folding
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 5, 3, 7), (2, 64, 40, 40)], ids=str)
def test_magnitude(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """max|x| wherever it stands, of either sign, in every layout; huge for NaN and infinity."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(size, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    for x in (dense, dense.contiguous(), dense[:, 1:]):
        assert magnitude(x) == x.abs().amax().item()
    for place in (0, -1):
        for value in (-7.5, 7.5, torch.nan, -torch.nan, torch.inf, -torch.inf):
            x = dense.clone(memory_format=torch.channels_last)
            x.permute(0, 2, 3, 1).reshape(-1)[place] = value
            assert magnitude(x) == (7.5 if abs(value) == 7.5 else 1e300)


@pytest.mark.parametrize("opaque", [False, True], ids=["strided", "onednn"])
def test_huge_pages_change_no_value(opaque: bool) -> None:
    from resnet_fast.backends import library

    w = torch.randn(512, 2048, 1, 1)
    t = w.clone()
    if opaque:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this torch has no oneDNN")
        t = torch.ops.mkldnn._reorder_convolution_weight(w, [0, 0], [1, 1], [1, 1], 1, [1, 2048, 7, 7])
    done = library.huge_pages(t)
    assert 0 <= done <= w.nbytes and done % 2**21 == 0
    assert_same_bits(t.to_dense().view_as(w) if opaque else t, w)
    assert library.huge_pages(torch.randn(1000)) == 0
