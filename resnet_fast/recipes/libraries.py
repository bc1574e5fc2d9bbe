"""The libraries of the ``recipes`` extra, imported on first use; a missing one is an error that names the extra."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from resnet_fast.commands import CommandError, sources

__all__ = ["require", "tensorboard", "transforms", "vision"]

_REMEDY = "Remedy: pip install -e .[recipes]"


def require(module: str, what: str) -> Any:
    """Import ``module``, which ``what`` needs. Raises CommandError with the extra's name where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandError(f"{what} needs {module.partition('.')[0]} ({error}). {_REMEDY}") from error


def vision(what: str) -> Any:
    """torchvision, also its CUDA build beside a CPU torch. Raises CommandError with the extra's name."""
    try:
        return sources.torchvision()
    except CommandError as error:
        reason = str(error).removeprefix("--model: ").partition(" Remedy: ")[0]
        raise CommandError(f"{what} needs torchvision: {reason} {_REMEDY}") from error


def transforms(what: str) -> Any:
    """torchvision.transforms.v2. Raises CommandError with the extra's name."""
    vision(what)
    return importlib.import_module("torchvision.transforms.v2")


def tensorboard() -> Any:
    """TensorBoard's SummaryWriter, or None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return None
