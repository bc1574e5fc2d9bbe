"""The paper's networks in plain PyTorch: what ``resnet_fast.fuse()`` swaps and is tested against.

"The paper" is He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385 (2015).
Attribute names and state_dict keys are torchvision's, so its weights load with ``strict=True``. Nothing here
needs the rest of the package.

Initialisation. Convolutions are normal with std = sqrt(2 / fan_out): He et al., "Delving Deep into
Rectifiers", arXiv 1502.01852, which derives fan_in and fan_out and finds either sufficient. The residual
paper does not say which it took; fan_out is torchvision's choice, so the same seed gives the same weights
here and there. BatchNorm starts at gamma = 1, beta = 0 and the classifier at nn.Linear's default, as in
torchvision.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from resnet_fast.models.blocks import BasicBlock, Bottleneck, PlainBasicBlock, SubsamplePad
from resnet_fast.models.macs import macs
from resnet_fast.models.networks import (
    CifarResNet,
    ResNet,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    cifar_plain110,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)

MODELS: dict[str, Callable[..., nn.Module]] = {
    constructor.__name__: constructor
    for constructor in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        plain18,
        plain34,
        cifar_resnet20,
        cifar_resnet32,
        cifar_resnet44,
        cifar_resnet56,
        cifar_resnet110,
        cifar_resnet1202,
        cifar_plain20,
        cifar_plain32,
        cifar_plain44,
        cifar_plain56,
        cifar_plain110,
    )
}
"""Name -> constructor of every network here."""

__all__ = [
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "PlainBasicBlock",
    "ResNet",
    "SubsamplePad",
    "cifar_plain20",
    "cifar_plain32",
    "cifar_plain44",
    "cifar_plain56",
    "cifar_plain110",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
    "create",
    "macs",
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]


def create(name: str, **kwargs: Any) -> nn.Module:
    """Build ``MODELS[name]`` with its keyword arguments, e.g. ``create("resnet50", num_classes=10)``.

    Raises:
        ValueError: no network of that name; the message suggests the nearest and lists all.
        TypeError: a keyword argument that the network does not take.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"name={name!r} is not a model; {hint}supported: {', '.join(MODELS)}")
    return MODELS[name](**kwargs)
