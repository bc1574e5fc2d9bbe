"""Multiply-adds of a network, counted on shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def macs(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> int:
    """Multiply-adds of the convolutions and linear layers of ``model`` for one input.

    A convolution costs H_out * W_out * C_in * C_out * k_h * k_w / groups, padding included (the "FLOPs" of
    arXiv 1512.03385, table 1). Biases, norms, activations, pools and adds cost zero.

    The model runs once in eval mode on the meta device, with meta stand-ins for its parameters and buffers.
    No data is read, computed or moved, whatever device the model is on, and its mode, buffers and hooks stay
    as they were (its own hooks do see the meta tensors). Calls of nn.Conv*d, nn.ConvTranspose*d and nn.Linear
    modules count, each call once; calls of torch.nn.functional do not.

    The networks of this package at (3, 224, 224), in 1e9, and the paper's table 1:

        ==============================  =====  =====  =====  =====  ======
        options                            18     34     50    101     152
        ==============================  =====  =====  =====  =====  ======
        version="v1", shortcut="A"      1.795  3.644  3.498  7.211  10.923
        version="v1", shortcut="B"      1.814  3.664  3.858  7.570  11.282
        version="v1.5", shortcut="B"    1.814  3.664  4.089  7.801  11.514
        the paper                         1.8    3.6    3.8    7.6    11.3
        ==============================  =====  =====  =====  =====  ======

    The paper's digits are A rounded for 18 and 34, and v1 B rounded for 101 and 152. No option rounds to its
    3.8 for 50: v1 B, which the paper used, is 3.858, cut and not rounded.

    Args:
        model: any module that takes one tensor.
        input_size: shape of the input without the batch dimension; default (3, 224, 224).

    Returns:
        The count, a whole number.

    Raises:
        ValueError: input_size is empty or has an entry that is not an integer of at least 1.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would compile for meta tensors
    shape = tuple(input_size)
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_size={input_size!r} is not supported; use (C, H, W), integers of at least 1")
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, CONVOLUTIONS):
            total += output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
        elif isinstance(module, TRANSPOSED):
            total += args[0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)

    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = (t.dtype for t in state.values() if t.is_floating_point())
    x = torch.empty((1, *shape), dtype=next(floating, torch.get_default_dtype()), device="meta")
    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        for module, _ in modes:
            module.training = False  # not .eval(), which a model may have overridden
            if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
                hooks.append(module.register_forward_hook(count))
        stand_ins = {name: torch.empty_like(t, device="meta") for name, t in state.items()}
        with torch.no_grad():
            torch.func.functional_call(model, stand_ins, (x,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return total
