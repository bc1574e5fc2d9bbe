"""Batch norm and ReLU in one pass where no convolution stands before them: DenseNet's layers, pre-activation blocks.

With a convolution before it a batch norm is a part of that layer (functional.py). Here x is normalised as it comes:
scale and shift are made of the batch's or the running statistics, and one pass applies them with the ReLU.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import functional as f
from . import ops
from .autograd import each_gradient
from .dispatch import forced_backend, use_backend
from .guards import DTYPES, Work, check_context, faster_unfused, relu_of
from .layers import layer_tensors, scale_shift, update_running
from .plan import NormAct, Refusal, check_idle, check_plain, find, norm_of

__all__ = ["refusal", "run", "run_unfused"]

#: Multiply-adds of a convolution that a value stands for, where guards asks whether fusing pays in training on a CPU:
#: it does from 385 thousand values a thread (docs/bn_act.md, entry 35).
_MACS = 130


class _Static(NamedTuple):
    """What the Function must know besides its tensors."""

    eps: float
    batch_stats: bool
    relu: bool
    layer: f.ConvBn


def _affine(static: _Static, x: Tensor, *vectors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, rstd, scale, shift, all (C,); the running statistics are updated where they are not what is used."""
    gamma, beta, mean, var = vectors
    if static.batch_stats:
        mean, var, rstd, scale, shift = ops.bn_stats(x, gamma, beta, static.eps)
        update_running([static.layer], (mean, var), empty=False)
        return mean, rstd, scale, shift
    assert mean is not None and var is not None
    # A copy: backward is of these statistics, whatever has become of the running ones by then.
    return mean.clone(), *scale_shift(mean, var, gamma, beta, static.eps)


class _NormAct(torch.autograd.Function):
    """z = relu(x * scale + shift). x and four vectors are kept; the ReLU's mask is formed again from them."""

    @staticmethod
    def forward(ctx: Any, static: _Static, x: Tensor, *vectors: Tensor | None) -> Tensor:
        affine = _affine(static, x, *vectors)
        ctx.static, ctx.backend = static, forced_backend()
        ctx.save_for_backward(x, *affine)
        return ops.affine_act(x, *affine[2:], relu=static.relu)

    @staticmethod
    @once_differentiable
    @each_gradient
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        static: _Static = ctx.static
        x, mean, rstd, scale, shift = ctx.saved_tensors
        _, needs_x, needs_gamma, needs_beta, *_ = ctx.needs_input_grad
        mask = (scale, shift) if static.relu else ()
        dz = f.to_channels_last(dz)
        dx = dgamma = sum_g = None
        # On a GPU this runs in autograd's own threads, which know nothing of the forward's use_backend.
        with use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
            b = c = torch.zeros_like(scale)
            if static.batch_stats or needs_gamma or needs_beta:
                sum_g, sum_gx = ops.bn_backward_sums(dz, x, mean, *mask)
                n = float(x.numel() // x.shape[1])
                b_batch, c_batch, dgamma = ops.bn_backward_finalize(sum_g, sum_gx, rstd, scale, n)
                b, c = (b_batch, c_batch) if static.batch_stats else (b, c)
            if needs_x:
                dx = ops.bn_backward_apply(dz, x, mean, scale, b, c, *mask)
        return None, dx, dgamma if needs_gamma else None, sum_g if needs_beta else None, None, None


def _look(module: nn.Module, plan: NormAct) -> tuple[Any, bool, bool]:
    """The norm, whether it takes the batch's statistics, and whether a ReLU follows. Raises Refusal."""
    bn = find(module, plan.bn, plain=True)
    norm = norm_of(type(bn))
    if norm is None:
        raise Refusal(f"{plan.bn} is {type(bn).__name__}, supported is torch.nn.BatchNorm2d")
    check_plain(plan.bn, bn)
    if norm.inner != plan.has_inner_act:
        raise Refusal(f"{plan.bn} is {type(bn).__name__}, another kind than at fuse()")
    if norm.inner:
        check_idle(f"{plan.bn}.drop", bn.drop)
    batch_stats = not norm.frozen and (bn.training or (bn.running_mean is None and bn.running_var is None))
    if batch_stats and type(bn) is nn.SyncBatchNorm and dist.is_available() and dist.is_initialized():
        raise Refusal(f"{plan.bn} takes statistics over ranks without a convolution before it")
    return bn, batch_stats, relu_of(module, plan.act)


def refusal(module: nn.Module, plan: NormAct) -> str | None:
    """Why it would not run fused if it were called now, or None. What depends on the input is not known here."""
    try:
        _look(module, plan)
    except Refusal as reason:
        return str(reason)
    return None


def run(module: nn.Module, plan: NormAct, x: Any, backend: str | None = None) -> Tensor:
    """relu(norm(x)) in one pass. Raises Refusal, before anything was changed, where torch's own must run."""
    check_context()
    bn, batch_stats, relu = _look(module, plan)
    norm = norm_of(type(bn))
    assert norm is not None
    mean, var, gamma, beta = bn.running_mean, bn.running_var, bn.weight, bn.bias
    vectors = [v for v in (mean, var, gamma, beta) if v is not None]
    if type(x) is not Tensor or x.dim() != 4 or x.numel() == 0 or x.device.type not in ("cpu", "cuda"):
        raise Refusal("x is no tensor (N, C, H, W) on cpu or cuda, or is empty")
    if x.layout is not torch.strided:
        raise Refusal(f"x is {x.layout}, supported is torch.strided")
    kinds = (x.dtype,) if norm.frozen else (x.dtype, torch.float32)
    if x.dtype not in DTYPES or any(v.device != x.device or v.dtype not in kinds for v in vectors):
        raise Refusal(f"x is {x.dtype} on {x.device}, which {plan.bn} or our kernels do not take")
    if any(type(v) not in (Tensor, nn.Parameter) or v.shape != x.shape[1:2] for v in vectors):
        raise Refusal(f"{plan.bn} has other vectors than plain ones of {x.shape[1]} values")
    if batch_stats and x.numel() == x.shape[1]:
        raise Refusal("there is one value per channel")
    keeps = batch_stats and bn.training and bn.track_running_stats
    layer = f.ConvBn(
        x,  # in a weight's place: its dtype is all that is read
        gamma,
        beta,
        mean if keeps or not batch_stats else None,
        var if keeps or not batch_stats else None,
        bn.num_batches_tracked if keeps else None,
        eps=norm.eps or bn.eps,
        momentum=bn.momentum if keeps else None,
        batch_stats=batch_stats,
    )
    if not batch_stats and x.device.type == "cpu" and not torch.is_grad_enabled() and forced_backend() is None:
        return _as_torch(x, layer, relu)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gamma, beta))
    if needs_grad and faster_unfused(x, None, Work(_MACS * x.shape[1])):
        raise Refusal(f"{tuple(x.shape)} is too small to gain in training on this CPU")
    x = f.to_channels_last(x)
    _, *tensors = layer_tensors(layer)
    static = _Static(layer.eps, batch_stats, relu, layer)
    with use_backend(backend) if backend else contextlib.nullcontext():
        if needs_grad:
            return f.one_channel(_NormAct.apply(static, x, *tensors))
        return f.one_channel(ops.affine_act(x, *_affine(static, x, *tensors)[2:], relu=relu))


def _as_torch(x: Tensor, layer: f.ConvBn, relu: bool) -> Tensor:
    """With statistics that are given, on a CPU: a batch norm and a ReLU in place are as fast as one pass of ours."""
    z = F.batch_norm(x, layer.running_mean, layer.running_var, layer.gamma, layer.beta, eps=layer.eps)
    return z.relu_() if relu else z


def run_unfused(module: nn.Module, plan: NormAct, x: Tensor) -> Tensor:
    """The same, as its own modules run it."""
    x = find(module, plan.bn)(x)
    if plan.has_inner_act or plan.act is False:
        return x
    act = None if plan.act is True else find(module, str(plan.act))
    return torch.relu(x) if plan.act is True else x if act is None else act(x)
