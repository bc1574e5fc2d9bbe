"""Our own C++ and CUDA kernels (csrc/, built into ``resnet_fast._C``); one path for both.

Files are named by rows of ops (bn_act, stem, conv, bottleneck); common.py has what they share, and memory.py what
folded weights and watch.py ask of ``_C``, which is no op.
"""

from __future__ import annotations

import torch

from .bn_act import (
    affine_act,
    affine_act_backward,
    affine_act_mask,
    bn_backward_apply,
    bn_backward_finalize,
    bn_backward_sums,
    bn_finalize,
    bn_stats,
    bn_stats_update,
)
from .bottleneck import bottleneck, bottleneck_why_not
from .common import unable
from .conv import conv_affine_act, conv_backward, conv_backward_into, conv_dgrad, conv_stats, conv_wgrad
from .memory import Memory, fingerprint, unchanged
from .stem import (
    affine_act_maxpool,
    maxpool_backward_apply,
    maxpool_backward_sums,
    whole_stem,
    whole_stem_why_not,
)

__all__ = [
    "Memory",
    "affine_act",
    "affine_act_backward",
    "affine_act_mask",
    "affine_act_maxpool",
    "bn_backward_apply",
    "bn_backward_finalize",
    "bn_backward_sums",
    "bn_finalize",
    "bn_stats",
    "bn_stats_update",
    "bottleneck",
    "bottleneck_why_not",
    "conv_affine_act",
    "conv_backward",
    "conv_backward_into",
    "conv_dgrad",
    "conv_stats",
    "conv_wgrad",
    "fingerprint",
    "maxpool_backward_apply",
    "maxpool_backward_sums",
    "unchanged",
    "whole_stem",
    "whole_stem_why_not",
    "why_not",
]


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run ``op``, else the reason."""
    return unable(device, dtype)
