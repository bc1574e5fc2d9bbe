"""Row bottleneck: the op and its kernel against float64, at every tail; and inference on a GPU that is made of it."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fast
from resnet_fast import adapters, dispatch, guards, inference, ops
from resnet_fast.dispatch import backend, use_backend
from resnet_fast.functional import ConvBn
from resnet_fast.models import Bottleneck
from tests import cuda_on_cpu
from tests.able import needs_machine
from tests.blocks import KINDS, Block
from tests.cases import LAYOUTS, NASTY, TINY, WHOLE_BLOCKS, Case, inputs
from tests.eager import eager
from tests.fusing import calibrated
from tests.libraries import require
from tests.tolerance import (
    DTYPES,
    assert_close,
    assert_same_bits,
    backends,
    check,
    name_of,
    run,
    to_float64,
    variants,
)

OP = "bottleneck"
BY_NAME = {case.name: case for case in TINY + NASTY}
LOW = (torch.bfloat16, torch.float16)
#: Shared memory of a block, by architecture: weights of width 64 stay in that of sm_90.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}
CPU = torch.device("cpu")


#: (variant, case) of the geometries that have a kernel.
WHOLE = [
    pytest.param(variant, case, id=f"{variant}-{case.name}")
    for variant, cases in WHOLE_BLOCKS.items()
    for case in cases
]
#: Backends that have the kernel: here by emulation, and on a GPU.
KERNELS = [p for p in backends(OP, LOW) if p.values[:2] in (("cuda_on_cpu", "cpu"), ("native", "cuda"))]


def sizes_of(kwargs: dict[str, Any]) -> list[list[int] | None]:
    return [list(kwargs[name].shape) if name in kwargs else None for name in ("w1", "w2", "w3", "rw")]


def why_not(name: str, kwargs: dict[str, Any]) -> str | None:
    """Of the kernel for whole blocks."""
    module = cuda_on_cpu.native() if name == "cuda_on_cpu" else backend("native")
    x = kwargs["x"]
    return module.bottleneck_why_not(x.device, x.dtype, list(x.shape), sizes_of(kwargs))


def check_kernel(kwargs: dict[str, Any], name: str, arch: str = "sm_80") -> None:
    """The rule of tolerance, for the kernel and not for what stands in for it."""
    with cuda_on_cpu.shared_memory(SHARED[arch]) if name == "cuda_on_cpu" else contextlib.nullcontext():
        assert why_not(name, kwargs) is None
        check(OP, kwargs, name)


# ---- the op


@pytest.mark.parametrize("case", ["1x1", "threads", "K9", "N1", "image_1x1", "empty"])
@pytest.mark.parametrize("op, variant, name, device, dtype", variants("bottleneck"))
def test_matches_float64(op: str, variant: str, name: str, device: str, dtype: torch.dtype, case: str) -> None:
    """Of geometries without a kernel, too: there it is made of convolutions."""
    check(op, inputs(op, BY_NAME[case], dtype, device, variant=variant), name)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("variant, case", WHOLE)
@pytest.mark.parametrize("name, device, dtype", KERNELS)
def test_kernel(name: str, device: str, dtype: torch.dtype, variant: str, case: Case, arch: str) -> None:
    """Four tiles, one of them whole and three at the image's edge; weights streamed, and resident where they fit."""
    if arch == "sm_90" and (case.K == 128 or name != "cuda_on_cpu"):
        pytest.skip("one variant: streamed at width 128, and by the GPU's own size")
    check_kernel(inputs(OP, case, dtype, device, variant=variant), name, arch)


#: Every number of rows in a tile, columns around its halves, more CTAs than tiles and fewer.
SIZES = [(n, h, w) for h in range(1, 9) for n, w in ((1 + h % 3, (1, 7, 8, 9, 15, 16, 2, 18)[h - 1]),)]
SIZES += [(1, 1, 16), (2, 1, 33), (1, 8, 1), (3, 17, 9), (1, 10, 50), (5, 2, 2)]


@pytest.mark.parametrize("n, h, w", SIZES, ids=lambda v: str(v))
@pytest.mark.parametrize("name, device, dtype", KERNELS)
def test_every_tail(name: str, device: str, dtype: torch.dtype, n: int, h: int, w: int) -> None:
    narrow = Case("narrow", n, 64, h, w, 64, 1, 1, 0)
    check_kernel(inputs(OP, narrow, dtype, device, variant="projection"), name, "sm_90")
    if dtype == torch.float16:
        check_kernel(inputs(OP, narrow, dtype, device, variant="identity"), name)


@pytest.mark.parametrize("name, device, dtype", KERNELS)
def test_large_beta_at_borders(name: str, device: str, dtype: torch.dtype) -> None:
    """Outside of the image a1 is 0, not relu(shift1): a filter of ones counts the pixels below it."""
    c, h, w = 64, 3, 4
    x = torch.zeros(1, c, h, w, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(c, device=device), torch.zeros(c, device=device)
    eye = torch.eye(c, dtype=dtype, device=device)[:, :, None, None]
    w2 = eye.expand(c, c, 3, 3).contiguous(memory_format=torch.channels_last)
    kwargs = {"x": x, "w1": eye, "scale1": one, "shift1": 100 * one, "w2": w2, "scale2": one, "shift2": zero}
    kwargs |= {"w3": eye, "scale3": one, "shift3": zero}
    assert why_not(name, kwargs) is None
    z = run(OP, kwargs, name)
    expected = F.conv2d(torch.full((1, 1, h, w), 100.0), torch.ones(1, 1, 3, 3), padding=1)
    assert expected[0, 0, 0, 0] == 400 and expected[0, 0, 1, 1] == 900
    assert_same_bits(z.cpu(), expected.expand(1, c, h, w).to(dtype))
    case = Case("border", 1, 64, 9, 10, 64, 1, 1, 0)
    for variant in WHOLE_BLOCKS:
        kwargs = inputs(OP, case, dtype, device, variant=variant)
        check_kernel({**kwargs, "shift1": kwargs["shift1"] + 50}, name)


@pytest.mark.parametrize("variant", WHOLE_BLOCKS)
@pytest.mark.parametrize("name, device, dtype", [p for p in KERNELS if p.values[2] == torch.float16])
def test_nan_goes_where_torchs_goes(name: str, device: str, dtype: torch.dtype, variant: str) -> None:
    """One NaN in each operand in turn, and infinities in x."""
    case = Case("nan", 2, 64, 9, 4, 64, 1, 1, 0)
    for key in inputs(OP, case, dtype, device, variant=variant):
        kwargs = inputs(OP, case, dtype, device, variant=variant)
        kwargs[key][(1,) * kwargs[key].dim() if key == "x" else (0,) * kwargs[key].dim()] = torch.nan
        ours, torchs = run(OP, kwargs, name), eager(OP, kwargs)
        assert torchs.isnan().any()
        if key == "w2":  # a matrix product multiplies the padding by it, too
            assert (ours.isnan() >= torchs.isnan()).all()
        else:
            assert torch.equal(ours.isnan(), torchs.isnan()), f"NaN in {key}"
    kwargs["x"][0, 3, 2, 1] = torch.inf
    assert torch.equal(run(OP, kwargs, name).isnan(), eager(OP, kwargs).isnan())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name, device, dtype", [p for p in KERNELS if p.values[2] == torch.bfloat16])
def test_layouts(name: str, device: str, dtype: torch.dtype, layout: str) -> None:
    """Of x and of the weights, which in an NCHW model are not as the kernel reads them; vectors off 16 bytes."""
    kwargs = inputs(OP, Case("layout", 1, 64, 5, 6, 64, 1, 1, 0), dtype, device, variant="projection", layout=layout)
    kwargs["w2"] = kwargs["w2"].contiguous()
    kwargs["shift1"] = torch.cat((kwargs["shift1"][:1], kwargs["shift1"]))[1:]
    check_kernel(kwargs, name)


@pytest.mark.parametrize("variant, case", WHOLE)
@pytest.mark.parametrize("name, device, dtype", [p for p in KERNELS if p.values[1] == "cuda"])
def test_same_bits_twice(name: str, device: str, dtype: torch.dtype, variant: str, case: Case) -> None:
    """More tiles than CTAs. (cuda_on_cpu runs everything twice, in opposite orders.)"""
    kwargs = inputs(OP, case._replace(N=16, H=56, W=57), dtype, device, variant=variant)
    assert_same_bits(run(OP, kwargs, name), run(OP, kwargs, name))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_int32() -> None:
    """x of more than 2^31 elements: its last image comes out as it does alone."""
    kwargs = inputs(OP, Case("large", 1, 256, 56, 56, 64, 1, 1, 0), torch.bfloat16, "cuda", variant="identity")
    one = kwargs["x"]
    n = 2**31 // one.numel() + 2
    if torch.cuda.mem_get_info()[0] < 3 * n * one.nbytes:
        pytest.skip("needs 14 GB of GPU memory")
    x = torch.zeros((n, *one.shape[1:]), dtype=one.dtype, device="cuda").to(memory_format=torch.channels_last)
    x[-1:] = one
    assert_same_bits(run(OP, {**kwargs, "x": x}, "native")[-1:], run(OP, kwargs, "native"))


# ---- which blocks have the kernel


@needs_machine
@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.float32}, r"dtype float32 \(supported: bfloat16, float16\)"),
        ({"x": [1, 128, 9, 9]}, "weights .* on 128 channels"),
        ({"w2": [64, 64, 1, 1]}, "weights"),
        ({"w2": [64, 32, 3, 3]}, "weights"),
        ({"w3": [512, 64, 1, 1]}, "an identity shortcut from 256 to 512 channels"),
        ({"w3": [512, 64, 1, 1], "rw": [512, 256, 1, 1]}, "a projection .* on 256 channels"),
        ({"w1": [96, 256, 1, 1], "w2": [96, 96, 3, 3], "w3": [256, 96, 1, 1]}, r"width 96 \(supported: 64, 128\)"),
        ({"w1": [128, 256, 1, 1], "w2": [128, 128, 3, 3], "w3": [256, 128, 1, 1]}, None),
        ({"x": [1, 96, 9, 9], "w1": [64, 96, 1, 1], "w3": [96, 64, 1, 1]}, "96 to 96 channels"),
        ({"x": [2**20, 256, 2048, 2048]}, "below 2.31 tiles"),
    ],
)
def test_whole_blocks_have_reasons(change: dict[str, Any], reason: str | None) -> None:
    usual = {"x": [1, 256, 9, 9], "w1": [64, 256, 1, 1], "w2": [64, 64, 3, 3], "w3": [256, 64, 1, 1], "rw": None}
    sizes = {**usual, **change}
    dtype = sizes.pop("dtype", torch.float16)
    x, *weights = sizes.values()
    found = cuda_on_cpu.native().bottleneck_why_not(CPU, dtype, x, weights)
    assert found is None if reason is None else re.search(reason, found or ""), found


@needs_machine
def test_shared_memory_decides() -> None:
    """Streamed weights fit an A100's 163 KB, and not an RTX 3090's 99."""
    native = cuda_on_cpu.native()
    sizes = [[64, 256, 1, 1], [64, 64, 3, 3], [256, 64, 1, 1], None]
    with cuda_on_cpu.shared_memory(99 << 10):
        found = native.bottleneck_why_not(CPU, torch.float16, [1, 256, 9, 9], sizes)
        assert found == "width 64 needs 165888 bytes of shared memory, cpu has 101376"
        kwargs = inputs(OP, Case("small", 1, 64, 2, 2, 64, 1, 1, 0), torch.float16, variant="projection")
        check(OP, kwargs, "cuda_on_cpu")


@needs_machine
def test_weights_of_stage_1_are_resident_on_sm_90() -> None:
    """Stage 1's blocks as in docs/bottleneck.md, and the others streamed."""
    shared = cuda_on_cpu.kernels().bottleneck_shared
    resident = [shared(c=c, width=64, k=256, projection=c == 64, resident=True) for c in (256, 64)]
    assert resident == [231424, 216576]
    assert all(SHARED["sm_80"] < size <= SHARED["sm_90"] for size in resident)
    for width, projection in ((64, False), (64, True), (128, False), (128, True)):
        c = 64 if projection else 4 * width
        assert shared(c=c, width=width, k=4 * width, projection=projection, resident=False) == 165888
    assert SHARED["sm_80"] >= 165888
    assert shared(c=512, width=128, k=512, projection=False, resident=True) == -1


def test_no_kernel_on_a_cpu() -> None:
    with use_backend("native"):
        reason = dispatch.hook(OP, "why_not", CPU, torch.float16)(CPU, torch.float16, [1, 64, 2, 2], [[], [], [], None])
    assert reason == "no whole-block kernel for cpu (supported: cuda)"


@needs_machine
def test_wrong_arguments_are_named() -> None:
    """What is read by address is refused before it is read."""
    native = cuda_on_cpu.native()
    case = Case("wrong", 1, 64, 2, 2, 64, 1, 1, 0)
    for key in ("w1", "w2", "w3", "rw", "scale1", "shift2", "shift3", "rscale"):
        kwargs = inputs(OP, case, torch.float16, variant="projection")
        wrong = kwargs[key].float() if key.startswith(("w", "rw")) else kwargs[key][:-1]
        with pytest.raises(ValueError, match=f"{key}: found "):
            native.bottleneck(**{**kwargs, key: wrong})


# ---- blocks of models


@contextlib.contextmanager
def machine_as_native() -> Iterator[None]:
    """The backend "native" is the CUDA kernels, on the CPU."""
    original = dispatch.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "backend", lambda name: cuda_on_cpu.native() if name == "native" else original(name))
        dispatch._choose.cache_clear()
        try:
            with use_backend("native"):
                yield
        finally:
            dispatch._choose.cache_clear()


def layers_of(block: nn.Module) -> tuple[list[ConvBn], dict[str, Any]]:
    """The block as fuse() sees it, and its shortcut."""
    found = adapters.look(block, type(block))
    assert isinstance(found, resnet_fast.BlockPlan)
    layers, projection = guards.collect(block, found)
    return layers, {"projection": projection, "identity": found.shortcut == "identity"}


def _bottleneck(module: Any, first: bool) -> nn.Module:
    side = None
    if first:
        side = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
    torch.manual_seed(0)
    return calibrated(module(64 if first else 256, 64, downsample=side)).eval()


@needs_machine
@pytest.mark.parametrize("first", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("library", ["ours", "torchvision"])
def test_block_of_a_model_in_one_kernel(library: str, first: bool) -> None:
    """A real Bottleneck, in eval and float16, with weights as an NCHW model keeps them."""
    module = Bottleneck if library == "ours" else require("torchvision").models.resnet.Bottleneck
    block = _bottleneck(module, first)
    x = torch.randn(2, 64 if first else 256, 6, 7).half()
    with torch.no_grad():
        ref64 = copy.deepcopy(block).double()(x.double())
        torchs = block.half()(x)
        layers, shortcut = layers_of(block)
        with machine_as_native():
            assert inference.whole_block_why_not(x, layers, **shortcut) is None
            z = inference.fused_block(x.to(memory_format=torch.channels_last), layers, **shortcut)
    assert z is not None and z.dtype == torch.float16
    assert_close(z, ref64, torchs)


@needs_machine
def test_blocks_without_the_kernel_say_why() -> None:
    make = Bottleneck
    down = nn.Sequential(nn.Conv2d(64, 256, 1, 2), nn.BatchNorm2d(256))
    for block, reason in ((make(64, 64, 2, down), "stride (2, 2)"), (make(64, 16), "width 16")):
        layers, shortcut = layers_of(block.eval())
        x = torch.randn(1, layers[0].weight.shape[1], 4, 4).half()
        with machine_as_native():
            found = inference.whole_block_why_not(x, layers, **shortcut)
            assert found and found.startswith(reason), found
            half = [la._replace(weight=la.weight.half()) for la in layers]
            side = shortcut["projection"]
            side = side and side._replace(weight=side.weight.half())
            assert inference.fused_block(x, half, projection=side, identity=shortcut["identity"]) is None
    layers, shortcut = layers_of(_bottleneck(make, False))
    x = torch.randn(1, 256, 4, 4).half()
    with machine_as_native():
        assert inference.whole_block_why_not(x, layers[:2], **shortcut).startswith("2 layers and a shortcut")
        assert inference.whole_block_why_not(x, layers).startswith("3 layers and no shortcut")
        linear = [layers[0]._replace(relu=False), *layers[1:]]
        assert inference.whole_block_why_not(x, linear, **shortcut) == "a layer without its ReLU"
    with use_backend("torch"):
        assert inference.whole_block_why_not(x, layers, **shortcut) == "no backend for cpu has it"


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gamma": None, "beta": None}], ids=["plain", "bias", "bare"])
@pytest.mark.parametrize("name, device, dtype", [p for p in backends("conv_affine_act") if p.values[0] == "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_block_by_fused_convolutions(
    kind: str, name: str, device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Each convolution with its batch norm, and the last one with the shortcut, in one Triton kernel."""
    if options and kind not in ("basic", "projection"):
        pytest.skip("covered by the other kinds")
    block = Block(kind, dtype, train=False, **options).map(lambda name, t: t.to(device))
    ref64 = block.map(lambda name, t: to_float64(t)).torchs()
    with use_backend(name), torch.no_grad():
        z = inference.fused_block(
            block.x, block.layers, projection=block.projection, residual=block.residual, identity=block.identity
        )
    assert z is not None
    assert_close(z, ref64, block.torchs())


@pytest.mark.parametrize("name, device, dtype", [p for p in backends("conv_affine_act") if p.values[0] == "triton"])
def test_stem_is_the_librarys_convolution_and_one_pass(name: str, device: str, dtype: torch.dtype) -> None:
    block = Block("chain1", dtype, train=False).map(lambda name, t: t.to(device))
    with use_backend(name), torch.no_grad():
        z = inference.fused_block(block.x, block.layers, pool=True)
    ref64 = F.max_pool2d(block.map(lambda name, t: to_float64(t)).torchs(), 3, 2, 1)
    assert z is not None
    assert_close(z, ref64, F.max_pool2d(block.torchs(), 3, 2, 1))


def test_today_is_kept_where_nothing_fuses() -> None:
    block = Block("identity", train=False)
    with torch.no_grad():
        assert inference.fused_block(block.x, block.layers, identity=True) is None
        with use_backend("native"):
            assert inference.fused_block(block.x, block.layers, identity=True) is None


def test_affines_are_the_batch_norms_own() -> None:
    for options in ({}, {"bias": True}, {"gamma": None}, {"beta": None}):
        block = Block("projection", torch.float32, train=False, **options)
        for layer, (scale, shift) in zip(block.every, inference.affines(block.every), strict=True):
            y = torch.randn(2, scale.numel(), 3, 3)
            bias = 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
            expected = F.batch_norm(
                y + bias, layer.running_mean, layer.running_var, layer.gamma, layer.beta, eps=layer.eps
            )
            torch.testing.assert_close(y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), expected, rtol=1e-5, atol=1e-5)
    stale = inference.affines(block.every)
    block.layers[0].running_var.mul_(2)
    assert not torch.equal(stale[0][0], inference.affines(block.every)[0][0])


# ---- inference as users call it


def _devices(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Any]:
    return [
        pytest.param(
            device, dtype, id=f"{device}-{name_of(dtype)}", marks=[pytest.mark.gpu] if device == "cuda" else []
        )
        for device in ("cpu", "cuda")
        for dtype in dtypes
    ]


def _stage(device: str, dtype: torch.dtype) -> nn.Module:
    """The first two blocks of ResNet-50, which on a GPU have the kernel."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
    stage = nn.Sequential(Bottleneck(64, 64, downsample=down), Bottleneck(256, 64))
    return calibrated(stage).eval().to(device, dtype)


@pytest.mark.parametrize("form", ["plain", "inference_mode", "nchw", "autocast"])
@pytest.mark.parametrize("asked", [None, "native"])
@pytest.mark.parametrize("device, dtype", _devices())
def test_forms_of_inference(device: str, dtype: torch.dtype, asked: str | None, form: str) -> None:
    """no_grad or inference_mode, channels-last or NCHW, by dtype or by autocast: the same numbers as torch's."""
    low = torch.bfloat16 if form == "autocast" else dtype
    if form == "autocast" and dtype != torch.float32:
        pytest.skip("autocast is for float32 models")
    stage = _stage(device, dtype)
    x = torch.randn(2, 64, 6, 7).to(device, dtype)
    x = x if form == "nchw" else x.to(memory_format=torch.channels_last)
    mode = torch.inference_mode if form == "inference_mode" else torch.no_grad
    with torch.no_grad():
        ref64 = copy.deepcopy(stage).double().cpu()(x.double().cpu())
    with mode(), torch.autocast(device, torch.bfloat16, enabled=form == "autocast"):
        torchs = stage(x)
        ours = resnet_fast.fuse(copy.deepcopy(stage), backend=asked)
        z = ours(x)
        again = ours(x)
    assert z.dtype == torchs.dtype == low and not z.requires_grad
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(z, again)
    assert_close(z, ref64, torchs, dtype=low)


def test_definition_needs_all_of_a_projection() -> None:
    kwargs = inputs(OP, BY_NAME["1x1"], variant="identity")
    rw = torch.randn(32, 32, 1, 1)
    assert_same_bits(ops.bottleneck.definition(**kwargs, rw=rw), ops.bottleneck.definition(**kwargs))
