"""Our own Triton kernels: what serves a GPU for which ``resnet_fast._C`` has no code, and tests without any GPU.

Files are named by rows of ops (bn_act, stem, conv) and, where these grew, by direction; common.py and reduce.py have
what they share. Triton is imported with this package, so not before a backend is chosen for the first time. Not yet run
on a GPU.
"""

from __future__ import annotations

import torch

from .bn_act import affine_act, affine_act_mask
from .bn_act_backward import affine_act_backward, bn_backward_apply, bn_backward_finalize, bn_backward_sums
from .bn_stats import bn_finalize, bn_stats
from .common import unable
from .conv import configured, conv_affine_act, conv_backward, conv_backward_sums, conv_dgrad, conv_stats, conv_wgrad
from .conv_ways import configurations
from .conv_ways import why_unsupported as unsupported
from .stem import affine_act_maxpool, maxpool_backward_apply, maxpool_backward_sums

__all__ = [
    "affine_act",
    "affine_act_backward",
    "affine_act_mask",
    "affine_act_maxpool",
    "bn_backward_apply",
    "bn_backward_finalize",
    "bn_backward_sums",
    "bn_finalize",
    "bn_stats",
    "configurations",
    "configured",
    "conv_affine_act",
    "conv_backward",
    "conv_backward_sums",
    "conv_dgrad",
    "conv_stats",
    "conv_wgrad",
    "maxpool_backward_apply",
    "maxpool_backward_sums",
    "unsupported",
    "why_not",
]
_OPS = frozenset(__all__) - {"configurations", "configured", "unsupported", "why_not"}


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run ``op``, else the reason."""
    return unable(device, dtype) or (None if op in _OPS else f"has no {op}")
