"""The real libraries that tests compare with: import them, or say why that is impossible.

    torchvision = require("torchvision")

skips the test where torchvision cannot be imported, and fails it under RESNET_FAST_REQUIRE_LIBRARIES=1.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

_fragments: list[torch.library.Library] = []  # a Library's definitions live as long as the object


def _import(name: str) -> Any:
    """Import a module; whatever goes wrong becomes an ImportError with the reason."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        del sys.modules[name]


def _define_nms() -> None:
    """Define the two operators that torchvision's Python code expects of its compiled library.

    torchvision's wheel is a CUDA build. Beside a CPU torch its library does not load, and the import stops at
    "operator torchvision::nms does not exist". Calling either operator still raises NotImplementedError.
    """
    if _fragments:
        return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragments.append(fragment)


def import_torchvision() -> Any:
    """Import torchvision, also its CUDA build beside a CPU torch. Raises ImportError with the reason."""
    try:
        return _import("torchvision")
    except ImportError as error:
        if "torchvision::" not in str(error):
            raise
    _forget("torchvision")
    _define_nms()
    return _import("torchvision")


def import_timm() -> Any:
    """Import timm, which imports torchvision. Raises ImportError with the reason."""
    import_torchvision()
    return _import("timm")


def import_transformers() -> Any:
    """Import transformers with its ResNet. Raises ImportError with the reason.

    transformers imports its parts, and an installed torchvision, on first use: both happen here.
    """
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    transformers = _import("transformers")
    _import("transformers.models.resnet.modeling_resnet")
    return transformers


def import_smp() -> Any:
    """Import segmentation_models_pytorch, which imports timm. Raises ImportError with the reason."""
    import_timm()
    return _import("segmentation_models_pytorch")


_IMPORTERS: dict[str, Callable[[], Any]] = {
    "torchvision": import_torchvision,
    "timm": import_timm,
    "transformers": import_transformers,
    "smp": import_smp,
}


def build(make: str, arguments: dict[str, Any], attribute: str = "") -> torch.nn.Module:
    """The model that ``make`` ("timm.create_model") gives with ``arguments``; ``attribute``: a part of it.

    In arguments "@timm.layers.BlurPool2d" stands for that object, {"make": ..., "arguments": ...} for what it makes.
    """
    library = make.partition(".")[0]
    if library not in ("tests", "resnet_fast"):
        require({"segmentation_models_pytorch": "smp"}.get(library, library))

    def value(v: Any) -> Any:
        if isinstance(v, dict) and "make" in v:
            return _found(v["make"])(**{k: value(a) for k, a in v["arguments"].items()})
        if isinstance(v, dict):
            return {k: value(a) for k, a in v.items()}
        return _found(v[1:]) if isinstance(v, str) and v.startswith("@") else v

    model = _found(make)(**{k: value(v) for k, v in arguments.items()})
    return model.get_submodule(attribute)


def _found(path: str) -> Any:
    """The object with this dotted path, its modules imported on the way."""
    names = path.split(".")
    thing = importlib.import_module(names[0])
    for i, name in enumerate(names[1:], 2):
        if not hasattr(thing, name):
            importlib.import_module(".".join(names[:i]))
        thing = getattr(thing, name)
    return thing


def require(name: str) -> Any:
    """Return the library ("torchvision", "timm", "transformers" or "smp"), or skip the test with the reason.

    Under RESNET_FAST_REQUIRE_LIBRARIES=1 the test fails instead. Callable at module level as well.
    """
    if name not in _IMPORTERS:
        raise ValueError(f"name={name!r} is not supported; use one of {', '.join(_IMPORTERS)}")
    try:
        return _IMPORTERS[name]()
    except ImportError as error:
        if os.environ.get("RESNET_FAST_REQUIRE_LIBRARIES") == "1":
            pytest.fail(f"RESNET_FAST_REQUIRE_LIBRARIES=1, but {error}", pytrace=False)
        pytest.skip(str(error), allow_module_level=True)
