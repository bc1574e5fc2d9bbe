"""Fused convolution + batch norm + ReLU (+ residual) blocks for ResNets in PyTorch.

``resnet_fast.fuse(model)`` swaps the blocks of an existing model, ``unfuse`` gives the original back, ``explain`` says
what is fused and why the rest is not. See README.md.
"""

import torch  # noqa: F401  (before _C: one OpenMP runtime)

from . import functional, models, ops
from .capture import capture
from .dispatch import BackendError, use_backend
from .functional import LayoutWarning
from .fuse import FuseError, explain, fuse, fused, register_block, unfuse
from .modules import BasicBlock, Bottleneck, ConvBnAct2d, Stem
from .plan import BlockPlan, ConvBnPath, Opaque
from .tuning import warmup

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BasicBlock",
    "BlockPlan",
    "Bottleneck",
    "ConvBnAct2d",
    "ConvBnPath",
    "FuseError",
    "LayoutWarning",
    "Opaque",
    "Stem",
    "capture",
    "explain",
    "functional",
    "fuse",
    "fused",
    "models",
    "ops",
    "register_block",
    "unfuse",
    "use_backend",
    "warmup",
]
