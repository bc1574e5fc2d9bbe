"""Networks from names and files: the paper's, with published or own weights, as they are or for other classes."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import models
from resnet_fast.commands import CommandError, did_you_mean

from . import checkpoint
from .libraries import vision
from .transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess

__all__ = ["Network", "Weights", "build", "freeze", "read", "with_head"]


class Network(NamedTuple):
    """Everything needed to build a network again: what a checkpoint says of its own.

    ``head``: "own" (the last layer has ``num_classes`` outputs) or "append" (a linear layer from ``body_classes`` to
    ``num_classes`` stands behind it). ``options``: keyword arguments of the constructor.
    """

    name: str
    num_classes: int
    in_channels: int = 3
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    head: str = "own"
    body_classes: int = 0


class Weights(NamedTuple):
    """What a weights file holds. ``preprocess`` and ``classes``: None where the file and its name do not tell."""

    file: str
    network: Network
    state: dict[str, Tensor]
    preprocess: Preprocess | None
    classes: tuple[str, ...] | None
    origin: str


def build(network: Network, norm_layer: Any = None) -> nn.Module:
    """The network with weights drawn from torch's generator (He initialisation). Raises CommandError."""
    if network.name not in models.MODELS:
        known = ", ".join(models.MODELS)
        raise CommandError(
            f"--model {network.name}: no such network.{did_you_mean(network.name, models.MODELS)} Known: {known}"
        )
    options = dict(network.options)
    if norm_layer is not None:
        options["norm_layer"] = norm_layer
    classes = network.body_classes if network.head == "append" else network.num_classes
    try:
        body = models.create(network.name, num_classes=classes, in_channels=network.in_channels, **options)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--model {network.name}: {error}") from error
    return _appended(body, classes, network.num_classes) if network.head == "append" else body


def _appended(body: nn.Module, classes: int, num_classes: int) -> nn.Module:
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(classes, num_classes)))


def _published(file: Path, state: dict[str, Tensor], model: str | None) -> tuple[str | None, Any]:
    """(name of torchvision's network, its weights entry) by the digest in the file's name or of its bytes."""
    named = re.fullmatch(r"(\w+?)-([0-9a-f]{8})\.pth", file.name)
    candidates = [named[1]] if named else [model] if model else list(models.MODELS)
    published = [n for n in candidates if n is not None and re.fullmatch(r"resnet(18|34|50|101|152)", n)]
    if not published or state.get("fc.weight", torch.empty(0)).shape[:1] != (1000,):
        return None, None
    digest = named[2] if named else hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    for name in published:
        for entry in vision("reading published weights").models.get_model_weights(name):
            if entry.url.endswith(f"-{digest}.pth"):
                return name, entry
    return (named[1] if named else None), None


def _of_entry(entry: Any) -> Preprocess:
    """torchvision's own description of the preprocessing that an entry's weights were trained with."""
    t = entry.transforms()
    return Preprocess(t.crop_size[0], t.resize_size[0], torch.tensor(t.mean), torch.tensor(t.std))


def read(file: str, model: str | None = None) -> Weights:
    """A checkpoint of ``resnet-fast train``, torchvision's published weights or any state_dict in their layout.

    ``model``: the network's name, where the file does not say. Raises CommandError.
    """
    path = Path(file)
    content = checkpoint.load(path)
    if "format" in content:
        network = Network(**content["network"])
        if model is not None and model != network.name:
            raise CommandError(f"{path.name}: is a checkpoint of {network.name}, and --model says {model}")
        return Weights(
            path.name,
            network,
            content["model"],
            Preprocess(**content["preprocess"]),
            tuple(content["classes"]),
            f"resnet-fast train, {content['data']}, epoch {content['epoch']}",
        )
    nested = content.get("state_dict", content.get("model", content))
    state = {str(k).removeprefix("module."): v for k, v in nested.items() if isinstance(v, Tensor)}
    if "fc.weight" not in state or "conv1.weight" not in state:
        raise CommandError(f"{path.name}: not in torchvision's ResNet layout: it has no conv1.weight or no fc.weight")
    name, entry = _published(path, state, model)
    if model is not None and name is not None and entry is not None and model != name:
        raise CommandError(f"{path.name}: are torchvision's weights of {name}, and --model says {model}")
    name = model or name
    if name is None:
        raise CommandError(f"{path.name}: a bare state_dict does not say of which network. Remedy: --model NAME")
    network = Network(name, len(state["fc.weight"]), state["conv1.weight"].shape[1])
    if entry is not None:
        return Weights(path.name, network, state, _of_entry(entry), tuple(entry.meta["categories"]), str(entry))
    return Weights(path.name, network, state, None, None, "a state_dict, of which nothing more is known")


def usual(network: Network) -> Preprocess:
    """ImageNet's usual preprocessing, for weights of which nothing is known."""
    size, resize = (32, 32) if network.name.startswith("cifar") else (224, 256)
    if network.in_channels != 3:
        return Preprocess(size, resize, torch.full((network.in_channels,), 0.5), torch.ones(network.in_channels))
    return Preprocess(size, resize, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))


def load_into(model: nn.Module, weights: Weights) -> None:
    """Load every weight. Raises CommandError that says what does not fit."""
    own, theirs = model.state_dict(), weights.state
    # Files from before torch counted batches lack this one entry, which torch fills in.
    missing = [k for k in own if k not in theirs and not k.endswith("num_batches_tracked")]
    extra = [k for k in theirs if k not in own]
    shapes = [k for k in own if k in theirs and own[k].shape != theirs[k].shape]
    if missing or extra or shapes:
        said = []
        if missing:
            said.append(f"it lacks {len(missing)} entries ({missing[0]}, ...)")
        if extra:
            said.append(f"it has {len(extra)} that the network has not ({extra[0]}, ...)")
        if shapes:
            k = shapes[0]
            said.append(f"{k} is {tuple(theirs[k].shape)} and should be {tuple(own[k].shape)}")
        raise CommandError(f"{weights.file}: not of a {weights.network.name}: {'; '.join(said)}")
    model.load_state_dict({k: theirs.get(k, own[k]) for k in own}, strict=True)


def with_head(weights: Weights, num_classes: int, head: str, norm_layer: Any = None) -> tuple[nn.Module, Network]:
    """The network with ``weights``, for ``num_classes``: the last layer "replace"d, or one "append"ed behind it."""
    if weights.network.head != "own":
        raise CommandError(f"{weights.file}: has an appended head already; transfer from the network before that one")
    model = build(weights.network, norm_layer)
    load_into(model, weights)
    if head == "append":
        body = weights.network.num_classes
        return _appended(model, body, num_classes), weights.network._replace(
            num_classes=num_classes, head="append", body_classes=body
        )
    last: Any = model.fc
    model.fc = nn.Linear(last.in_features, num_classes)
    return model, weights.network._replace(num_classes=num_classes)


def head_of(model: nn.Module, network: Network) -> nn.Module:
    """The layer that is new in a transfer."""
    found: Any = model.head if network.head == "append" else model.fc
    return found


def freeze(model: nn.Module, network: Network, what: str) -> list[nn.Module]:
    """Freeze "backbone" (all but the head), "bn" (every batch norm) or "none", in place.

    Returns the modules that must stay in eval mode in training, so that running statistics are frozen as well.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if what == "none":
        return []
    if what == "backbone":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in head_of(model, network).parameters():
            parameter.requires_grad_(True)
    else:
        for norm in norms:
            for parameter in norm.parameters():
                parameter.requires_grad_(False)
    return list(norms)
