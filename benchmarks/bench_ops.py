"""The fused operations over ResNet-50's layer shapes: ours, eager (NCHW), channels_last, torch.compile.

``pytest --benchmark benchmarks/bench_ops.py``. Groups are one step on one shape; ``extra_info`` holds, for the
memory-bound row, GB/s of the minimal traffic and the share of what a copy of as many bytes reached in the same run, and
for convolutions GFLOP/s. On a GPU a round is N launches between two CUDA events, 1 ms or more (not yet run on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rounds import run_rounds
from resnet_fast import functional, ops
from resnet_fast.dispatch import prepare
from tests.cases import Case, inputs, resnet50

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONTENDERS = ("ours", "eager", "channels_last", "compile")
BATCH = {"cpu": 4, "cuda": 128}
#: Large and small activations; few channels and many. Compiling each takes seconds on a CPU: there are no more.
LAYERS = {"bn_act": ("s1_expand_1x1", "s4_expand_1x1"), "conv": ("s2_expand_1x1", "s4_3x3")}
DTYPES = (torch.float32, torch.bfloat16)


class Step(NamedTuple):
    """``call`` once is one step; ``traffic`` its minimal bytes; ``flops`` its arithmetic, where that is the limit."""

    call: Callable[[], Any]
    traffic: int
    flops: int = 0


def _case(name: str, device: str) -> Case:
    return next(case for case in resnet50(BATCH[device]) if case.name == name)


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

        def ours() -> Tensor:
            mean, var = ops.bn_stats(y)
            scale = gamma * torch.rsqrt(var + 1e-5)
            return ops.affine_act(y, scale, beta - mean * scale, residual)

        return Step(ours, traffic)
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)

    def plain(y: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(F.batch_norm(y, mean, var, gamma, beta, training=True) + residual)

    run = _compiled(contender, plain)
    return Step(lambda: run(y, residual), traffic)


def _backward(contender: str, case: Case, dtype: torch.dtype, device: str) -> Step:
    """Its backward: dz, z, y -> dy, dgamma, dbeta and the residual's gradient. Reads dz, z, y, g, y; writes g, dy."""
    args = inputs("affine_act_backward", case, dtype, device)
    dz, z, y = _layout(contender, args["dz"], args["z"], args["y"])
    mean, gamma = args["mean"], torch.ones_like(args["mean"])
    rstd = torch.ones_like(mean)
    traffic = 7 * y.numel() * y.element_size()
    m = case.NPQ
    if contender == "ours":

        def ours() -> Any:
            g, sum_g, sum_gy, _ = ops.affine_act_backward(dz, z, y, mean)
            a = gamma * rstd
            dy = ops.bn_backward_apply(g, y, mean, a, -a * rstd.square() * sum_gy / m, -a * sum_g / m)
            return g, dy, sum_gy * rstd, sum_g

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


def _copy_bandwidth(traffic: int, device: str) -> float:
    """GB/s of a copy that reads and writes ``traffic`` bytes in all: the best of several, in this very run."""
    source = torch.zeros(traffic // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return traffic / 1e9 / run_rounds(lambda: target.copy_(source), device, seconds=0.1).p20


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("step", "layer"), [(step, layer) for step in STEPS for layer in LAYERS[step.rpartition("_")[0]]]
)
@pytest.mark.parametrize("device", DEVICES)
def bench_op(benchmark: Any, device: str, step: str, layer: str, dtype: torch.dtype, contender: str) -> None:
    torch._dynamo.reset()
    case = _case(layer, device)
    made = STEPS[step](contender, case, dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    benchmark.group = f"{step} {dtype_name} {device} {layer}: N={case.N} K={case.K} P={case.P}"
    frozen = step == "conv_inference"
    rounds = run_rounds(made.call, device, seconds=0.3, benchmark=benchmark, inference=frozen)
    info = benchmark.extra_info
    info.update(p20=rounds.p20, p50=rounds.p50, p80=rounds.p80, launches=rounds.launches)
    if made.flops:
        info["GFLOP/s"] = made.flops / rounds.p50 / 1e9
    else:
        info["GB/s"] = made.traffic / rounds.p50 / 1e9
        info["copy GB/s"] = _copy_bandwidth(made.traffic, device)
        info["share of copy"] = info["GB/s"] / info["copy GB/s"]
