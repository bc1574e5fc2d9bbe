"""The fused operations over ResNet-50's layer shapes: ours, eager (NCHW), channels_last, torch.compile.

``pytest --benchmark benchmarks/bench_ops.py``. Groups are one step on one shape; ``extra_info`` holds, for the
memory-bound rows, GB/s of the minimal traffic and the share of what a copy of as many bytes reached in the same run,
and for convolutions GFLOP/s. ``bench_kernel`` times each memory-bound op alone: with outputs in fresh memory, as an op
returns them; in the same memory again, which leaves the kernel without the allocator's page faults, and small tensors
in a cache; and in turn on many operands of which no cache holds one until its turn comes again, as in a network, which
is the share of memory's bandwidth. The copy beside it finds its operands as the op does. On a GPU a round is N launches
between two CUDA events, 1 ms or more (not yet run on a GPU).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rounds import Rounds, run_rounds
from resnet_fast import functional, ops
from resnet_fast.commands.judging import name_of
from resnet_fast.dispatch import OPS, backend, prepare, reasons, use_backend
from tests.cases import Case, inputs, resnet50

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONTENDERS = ("ours", "eager", "channels_last", "compile")
BATCH = {"cpu": 4, "cuda": 128}
#: Of the kernels alone: activations that no cache holds.
KERNEL_BATCH = {"cpu": 16, "cuda": 128}
#: Bytes of operands taken in turn, of which a cache keeps none: several times a GPU's L2 or a CPU's last level.
COLD = 1 << 30
#: Large and small activations; few channels and many. Compiling each takes seconds on a CPU: there are no more.
LAYERS = {"bn_act": ("s1_expand_1x1", "s4_expand_1x1"), "conv": ("s2_expand_1x1", "s4_3x3")}
KERNEL_LAYERS = ("stem_7x7_2", "s1_expand_1x1", "s2_3x3", "s3_expand_1x1", "s4_expand_1x1")
#: Op and variant of the memory-bound rows.
KERNELS = (
    ("bn_stats", "plain"),
    ("affine_act", "plain"),
    ("affine_act", "residual"),
    ("affine_act_mask", "residual"),
    ("affine_act_backward", "plain"),
    ("affine_act_backward", "mask"),
    ("affine_act_backward", "mask_projection"),
    ("bn_backward_sums", "masked"),
    ("bn_backward_apply", "masked"),
    ("bn_backward_apply", "linear"),
)
STEM_KERNELS = ("affine_act_maxpool", "maxpool_backward_sums", "maxpool_backward_apply")
DTYPES = (torch.float32, torch.bfloat16)


class Step(NamedTuple):
    """``call`` once is one step; ``traffic`` its minimal bytes; ``flops`` its arithmetic, where that is the limit."""

    call: Callable[[], Any]
    traffic: int
    flops: int = 0


def _case(name: str, batch: int) -> Case:
    return next(case for case in resnet50(batch) if case.name == name)


def _layout(contender: str, *tensors: Tensor) -> list[Tensor]:
    """Eager gets NCHW, all others channels-last."""
    layout = torch.contiguous_format if contender == "eager" else torch.channels_last
    return [t.contiguous(memory_format=layout) for t in tensors]


def _compiled(contender: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if contender == "compile" else function


# ---- row bn_act: (NPQ, K) read and written, bandwidth is the limit


def _forward(contender: str, case: Case, dtype: torch.dtype, device: str) -> Step:
    """Training's block end: statistics of y, then z = relu(bn(y) + residual). Reads y twice, residual; writes z."""
    args = inputs("affine_act", case, dtype, device)
    y, residual = _layout(contender, args["y"], args["residual"])
    gamma, beta = args["scale"], args["shift"]
    traffic = 4 * y.numel() * y.element_size()
    if contender == "ours":

        def ours() -> Any:
            _, _, _, scale, shift = ops.bn_stats(y, gamma, beta)
            return ops.affine_act_mask(y, scale, shift, residual)

        return Step(ours, traffic)
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)

    def plain(y: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(F.batch_norm(y, mean, var, gamma, beta, training=True) + residual)

    run = _compiled(contender, plain)
    return Step(lambda: run(y, residual), traffic)


def _backward(contender: str, case: Case, dtype: torch.dtype, device: str) -> Step:
    """Its backward: dz, mask, y -> dy, dgamma, dbeta and the residual's gradient. Reads dz, y, g, y; writes g, dy."""
    args = inputs("affine_act_backward", case, dtype, device)
    dz, z, y = _layout(contender, args["dz"], args["z"], args["y"])
    mean, gamma = args["mean"], torch.ones_like(args["mean"])
    rstd = torch.ones_like(mean)
    traffic = 6 * y.numel() * y.element_size()
    if contender == "ours":
        mask = inputs("affine_act_backward", case, dtype, device, variant="mask")["z"]

        def ours() -> Any:
            g, sum_g, sum_gy, _ = ops.affine_act_backward(dz, mask, y, mean)
            b, c, dgamma = ops.bn_backward_finalize(sum_g, sum_gy, rstd, gamma, float(case.NPQ))
            return g, ops.bn_backward_apply(g, y, mean, gamma, b, c), dgamma, sum_g

        return Step(ours, traffic)

    def plain(dz: Tensor, z: Tensor, y: Tensor) -> Any:
        g = torch.ops.aten.threshold_backward(dz, z, 0)
        return g, torch.ops.aten.native_batch_norm_backward(
            g, y, gamma, None, None, mean, rstd, True, 1e-5, [True, True, True]
        )

    run = _compiled(contender, plain)
    return Step(lambda: run(dz, z, y), traffic)


# ---- row conv: arithmetic is the limit


def _layer(case: Case, dtype: torch.dtype, device: str) -> nn.Sequential:
    conv = nn.Conv2d(case.C, case.K, case.R, case.stride, case.padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(case.K)).to(device=device, dtype=dtype)


def _inference(contender: str, case: Case, dtype: torch.dtype, device: str) -> Step:
    """z = relu(bn(conv(x))) by running statistics; ours packed beforehand, compile with freezing on a CPU."""
    (x,) = _layout(contender, inputs("conv_stats", case, dtype, device)["x"])
    layer = _layer(case, dtype, device).eval().requires_grad_(False)
    flops = 2 * case.NPQ * case.K * case.C * case.R**2
    traffic = (x.numel() + case.NPQ * case.K) * x.element_size()
    if contender == "ours":
        geometry = ([case.stride] * 2, [case.padding] * 2, [1, 1], 1)
        packed = prepare("conv_affine_act", layer[0].weight, x, *geometry)
        shift = torch.zeros(case.K, device=device)
        return Step(lambda: ops.conv_affine_act(x, packed, shift, *geometry), traffic, flops)
    _lay_out(contender, layer)
    run = _compiled(contender, nn.Sequential(layer, nn.ReLU()))
    return Step(lambda: run(x), traffic, flops)


def _training(contender: str, case: Case, dtype: torch.dtype, device: str) -> Step:
    """relu(bn(conv(x))) by the batch's statistics, and the gradients of x, w, gamma, beta."""
    args = inputs("conv_stats", case, dtype, device)
    (x,) = _layout(contender, args["x"])
    x.requires_grad_()
    layer = _layer(case, dtype, device)
    _lay_out(contender, layer)
    flops = 3 * 2 * case.NPQ * case.K * case.C * case.R**2
    traffic = 3 * (x.numel() + case.NPQ * case.K) * x.element_size()
    (dz,) = _layout(contender, inputs("affine_act_backward", case, dtype, device)["dz"])
    leaves = [x, *layer.parameters()]
    if contender == "ours":
        conv, bn = layer
        packed = functional.ConvBn(
            conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked,
            stride=(case.stride,) * 2, padding=(case.padding,) * 2,
        )  # fmt: skip
        return Step(lambda: torch.autograd.grad(functional.conv_bn_act(x, packed), leaves, dz), traffic, flops)
    run = _compiled(contender, nn.Sequential(layer, nn.ReLU()))
    return Step(lambda: torch.autograd.grad(run(x), leaves, dz), traffic, flops)


def _lay_out(contender: str, layer: nn.Module) -> None:
    for p in layer.parameters():
        if p.dim() == 4:
            (p.data,) = _layout(contender, p.data)


STEPS: dict[str, Callable[[str, Case, torch.dtype, str], Step]] = {
    "bn_act_forward": _forward,
    "bn_act_backward": _backward,
    "conv_inference": _inference,
    "conv_training": _training,
}


def _copies(traffic: int, device: str, sets: int = 1) -> Callable[[], Any]:
    """A copy that reads and writes ``traffic`` bytes in all, of ``sets`` in turn."""
    source = torch.zeros(sets, traffic // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copies = itertools.cycle([functools.partial(t.copy_, s) for t, s in zip(target, source, strict=True)])
    return lambda: next(copies)()


def _add(info: dict[str, Any], rounds: Rounds, traffic: int) -> None:
    """What was measured; and GB/s of ``traffic``, where a copy of as many bytes ran beside it."""
    info.update(p20=rounds.p20, p50=rounds.p50, p80=rounds.p80, launches=rounds.launches)
    if rounds.beside is not None:
        info["GB/s"] = traffic / rounds.p50 / 1e9
        info["copy GB/s"] = traffic / rounds.beside / 1e9
        info["share of copy"] = rounds.beside / rounds.p50


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("step", "layer"), [(step, layer) for step in STEPS for layer in LAYERS[step.rpartition("_")[0]]]
)
@pytest.mark.parametrize("device", DEVICES)
def bench_op(benchmark: Any, device: str, step: str, layer: str, dtype: torch.dtype, contender: str) -> None:
    torch._dynamo.reset()
    case = _case(layer, BATCH[device])
    made = STEPS[step](contender, case, dtype, device)
    dtype_name = name_of(dtype)
    benchmark.group = f"{step} {dtype_name} {device} {layer}: N={case.N} K={case.K} P={case.P}"
    frozen = step == "conv_inference"
    copies = None if made.flops else _copies(made.traffic, device)
    rounds = run_rounds(made.call, device, seconds=0.3, benchmark=benchmark, inference=frozen, beside=copies)
    _add(benchmark.extra_info, rounds, made.traffic)
    if made.flops:
        benchmark.extra_info["GFLOP/s"] = made.flops / rounds.p50 / 1e9


# ---- each memory-bound op alone


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in values if isinstance(t, Tensor)]


def _same_memory(op: str, kwargs: dict[str, Any]) -> Callable[[], Any]:
    """The op's launches once more, into the outputs of the first time."""
    row: Any = inspect.getmodule(getattr(backend("native"), op))
    launch, launches = row.launch, []

    def record(*args: Any, **operands: Any) -> None:
        launches.append(functools.partial(launch, *args, **operands))
        launch(*args, **operands)

    with mock.patch.object(row, "launch", record), use_backend("native"):
        OPS[op](**kwargs)
    assert launches, f"{op}: nothing was launched"
    return lambda: [again() for again in launches]


def _rotating_memory(op: str, kwargs: dict[str, Any], sets: int) -> Callable[[], Any]:
    """The op's launches on ``sets`` operands and outputs in turn."""
    copies = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()} for _ in range(sets)]
    launches = itertools.cycle([_same_memory(op, copy) for copy in copies])
    return lambda: next(launches)()


@pytest.mark.parametrize("memory", ["same", "fresh", "rotating"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("op", "variant", "layer"),
    [(op, variant, layer) for layer in KERNEL_LAYERS for op, variant in KERNELS]
    + [(op, "plain", "stem_7x7_2") for op in STEM_KERNELS],
)
@pytest.mark.parametrize("device", DEVICES)
def bench_kernel(
    benchmark: Any, device: str, op: str, variant: str, layer: str, dtype: torch.dtype, memory: str
) -> None:
    """Minimal traffic: every activation, mask and index among the operands and outputs once."""
    if reason := reasons(op, torch.device(device), dtype)["native"]:
        pytest.skip(f"native: {reason}")
    case = _case(layer, KERNEL_BATCH[device])
    kwargs = inputs(op, case, dtype, device, variant=variant)
    with use_backend("native"):
        outputs = OPS[op](**kwargs)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    traffic = sum(t.nbytes for t in (*_tensors(kwargs.values()), *outputs) if t.dim() == 4)
    sets = max(2, COLD // traffic) if memory == "rotating" else 1
    if memory == "same":
        call = _same_memory(op, kwargs)
    elif memory == "rotating":
        call = _rotating_memory(op, kwargs, sets)
    else:

        def call() -> Any:
            with use_backend("native"):
                return OPS[op](**kwargs)

    del outputs
    dtype_name = name_of(dtype)
    benchmark.group = f"{op} {variant} {dtype_name} {device} {layer}: N={case.N} K={case.K} P={case.P}"
    copies = _copies(traffic, device, sets)
    _add(benchmark.extra_info, run_rounds(call, device, seconds=0.15, benchmark=benchmark, beside=copies), traffic)
