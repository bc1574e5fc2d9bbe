"""Networks by name: our own, a library's, or what a function of the user's returns. Nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import models

from . import CommandError, did_you_mean

__all__ = ["Source", "build", "calibrate", "torchvision"]


class Source(NamedTuple):
    """A network in eval mode, float32 on the CPU. ``own_weights``: trained or the user's, and not to be touched."""

    name: str
    model: nn.Module
    own_weights: bool


_fragments: list[torch.library.Library] = []  # definitions live as long as this object


def _import(name: str, wheels: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        what = "is not installed" if absent else f"cannot be imported: {type(error).__name__}: {error}"
        raise CommandError(f"--model: {name} {what}. Remedy: pip install {wheels}") from error


def torchvision() -> Any:
    """torchvision, also its CUDA build beside a CPU torch, whose compiled library cannot load.

    Its Python code needs no more than that two operators are defined; calling one still raises NotImplementedError.
    """
    wheels = "torchvision (timm and segmentation-models-pytorch need it, too)"
    try:
        return _import("torchvision", wheels)
    except CommandError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    if not _fragments:
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _fragments.append(fragment)
    return _import("torchvision", wheels)


def _own(name: str) -> nn.Module:
    if name not in models.MODELS:
        known = [*models.MODELS, *(f"{prefix}:{name.partition(':')[2]}" for prefix in _LIBRARIES)]
        raise CommandError(
            f"--model {name}: no such network.{did_you_mean(name, known)} Known: {', '.join(models.MODELS)}; "
            "torchvision:NAME, timm:NAME, transformers:NAME or a folder, smp:NAME[/ENCODER], module:callable"
        )
    return models.create(name)


def _of_torchvision(name: str) -> nn.Module:
    library = torchvision().models
    known = library.list_models(library)
    if name not in known:
        raise CommandError(f"--model torchvision:{name}: no such network.{did_you_mean(name, known)}")
    return library.get_model(name, weights=None)


def _of_timm(name: str) -> nn.Module:
    torchvision()
    timm = _import("timm", "timm")
    if not timm.is_model(name):
        raise CommandError(f"--model timm:{name}: no such network.{did_you_mean(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


#: depths, hidden sizes and layer type of the ResNets published with transformers.
_WIDE, _NARROW = [256, 512, 1024, 2048], [64, 128, 256, 512]
_TRANSFORMERS: dict[str, tuple[list[int], list[int], str]] = {
    "resnet-18": ([2, 2, 2, 2], _NARROW, "basic"),
    "resnet-26": ([2, 2, 2, 2], _WIDE, "bottleneck"),
    "resnet-34": ([3, 4, 6, 3], _NARROW, "basic"),
    "resnet-50": ([3, 4, 6, 3], _WIDE, "bottleneck"),
    "resnet-101": ([3, 4, 23, 3], _WIDE, "bottleneck"),
    "resnet-152": ([3, 8, 36, 3], _WIDE, "bottleneck"),
}


def _transformers() -> Any:
    if importlib.util.find_spec("torchvision") is not None:
        torchvision()  # transformers imports it if it is there, and would stumble over a CUDA build
    return _import("transformers", "transformers")


def _of_transformers(name: str) -> nn.Module:
    known = _TRANSFORMERS.get(name.removeprefix("microsoft/"))
    if known is None and not Path(name).is_dir():
        raise CommandError(
            f"--model transformers:{name}: neither a folder nor one of {', '.join(_TRANSFORMERS)}."
            f"{did_you_mean(name, _TRANSFORMERS)}"
        )
    library = _transformers()
    if known is None:
        try:
            return library.AutoModelForImageClassification.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CommandError(f"--model transformers:{name}: {str(error).splitlines()[0]}") from error
    depths, sizes, kind = known
    config = library.ResNetConfig(depths=depths, hidden_sizes=sizes, layer_type=kind, num_labels=1000)
    return library.ResNetForImageClassification(config)


def _of_smp(name: str) -> nn.Module:
    torchvision()
    smp = _import("segmentation_models_pytorch", "segmentation-models-pytorch")
    arch, _, encoder = name.partition("/")
    known = {n for n in dir(smp) if isinstance(getattr(smp, n), type) and issubclass(getattr(smp, n), nn.Module)}
    if arch not in known:
        raise CommandError(f"--model smp:{name}: no such network.{did_you_mean(arch, known)} Known: {sorted(known)}")
    try:
        return getattr(smp, arch)(encoder or "resnet50", encoder_weights=None)
    except KeyError as error:
        raise CommandError(f"--model smp:{name}: {error.args[0]}") from error


_LIBRARIES: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _of_torchvision,
    "timm": _of_timm,
    "transformers": _of_transformers,
    "smp": _of_smp,
}


def _told(error: Exception) -> str:
    """The error, and where in the user's own file it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _of_user(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise CommandError(f"--model {name}: supported is module:callable, e.g. mypkg.nets:make")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or module_name.split(".")[0] != error.name.split(".")[0]:
            raise CommandError(f"--model {name}: {module_name} needs {error.name}, which is not installed") from error
        hint = did_you_mean(module_name, _LIBRARIES)
        raise CommandError(f"--model {name}: no module {error.name!r} here or installed.{hint}") from error
    except Exception as error:
        raise CommandError(f"--model {name}: importing {module_name} raised {_told(error)}") from error
    make = getattr(module, attribute, None)
    if not callable(make):
        what = "has no" if make is None else "has no callable"
        raise CommandError(f"--model {name}: {module_name} {what} {attribute}.{did_you_mean(attribute, vars(module))}")
    try:
        model = make()
    except Exception as error:
        raise CommandError(f"--model {name}: {attribute}() raised {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name}: returned {type(model).__name__}, supported is torch.nn.Module")
    return model


def build(name: str, seed: int) -> Source:
    """The network of that name (``resnet-fast bench --help`` lists the forms), with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    prefix, colon, rest = name.partition(":")
    own_weights = False
    if not colon:
        model = _own(name)
    elif prefix in _LIBRARIES:
        model = _LIBRARIES[prefix](rest)
        own_weights = prefix == "transformers" and rest.removeprefix("microsoft/") not in _TRANSFORMERS
    else:
        model, own_weights = _of_user(name), True
    return Source(name, model.float().eval(), own_weights)


@torch.no_grad()
def calibrate(model: nn.Module, batches: list[Tensor], seed: int) -> None:
    """Make a network of random weights behave like a trained one: batch norms that differ, and statistics that fit.

    gamma is drawn from 0.5..1.5 and beta from -0.2..0.2 (where the norm has any); the running statistics become the
    average over forwards, in training mode, of ``batches`` (N, 3, H, W) each. Leaves the network in eval mode.
    """
    random = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        for parameter, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.2, 0.2)):
            if parameter is not None:
                drawn = torch.rand(parameter.shape, generator=random) * (high - low) + low
                parameter.copy_(drawn.to(parameter.device))
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    model.train()
    for batch in batches:
        model(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
