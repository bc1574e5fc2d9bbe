"""The paper's analyses on small data: degradation, layer responses, gradients; and that fused training is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.commands import CommandError
from resnet_fast.commands.progress import Progress
from resnet_fast.guards import any_size

from . import checkpoint, definitions, networks, training
from .data import Data, Images
from .definitions import Recipe
from .loading import Batches
from .ranks import Ranks

__all__ = ["Study", "gradients", "network", "responses", "same_training"]


def network(kind: str, depth: int, shortcut: str | None, data: Data) -> networks.Network:
    """The CIFAR network of that depth: "plain" or "residual", the latter with ``shortcut`` "A", "B" or "C"."""
    options = {"shortcut": shortcut} if kind == "residual" else {}
    name = f"cifar_{'resnet' if kind == 'residual' else 'plain'}{depth}"
    return networks.Network(name, len(data.classes), data.channels, options)


class Study:
    """Networks trained alike, each once: kept in ``folder``, where the next analysis, or the same again, finds it."""

    def __init__(
        self, data: Data, recipe: Recipe, folder: Path, *, seed: int, fuse: bool, iterations: int, device: str
    ) -> None:
        self.data, self.recipe, self.folder, self.seed, self.fuse = data, recipe, folder, seed, fuse
        self.iterations, self.device = iterations, device
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, net: networks.Network) -> Path:
        """Named by all that decides the result."""
        said = [net._asdict(), dataclasses.asdict(self.recipe), self.iterations, self.seed, self.fuse, self.data.name]
        said += [self.data.size, len(self.data.train)]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{net.name}-{net.options.get('shortcut', 'none')}-{digest}.pt"

    def run(self, kind: str, depth: int, shortcut: str | None, progress: Progress) -> dict[str, Any]:
        """The curve of one network ("rows") and its weights ("model"), trained now or before."""
        net = network(kind, depth, shortcut, self.data)
        file = self._file(net)
        if file.exists():
            return checkpoint.load(file)
        torch.manual_seed(self.seed)
        model = networks.build(net)
        if self.fuse:
            resnet_fast.fuse(model)
        preprocess = training.preprocess_for(self.data, self.recipe, self.seed)
        trainer = training.Trainer(
            self.data,
            model,
            net,
            self.recipe,
            preprocess,
            Ranks(self.device),
            training.Settings(seed=self.seed, channels_last=self.fuse, save_every=100),
            iterations=self.iterations,
            easy_start=self.recipe.name == "paper-cifar" and depth == 110,
            progress=progress,
        )
        partial = file.with_suffix(".part")
        if partial.exists():
            trainer.restore(checkpoint.load(partial))
        trainer.run(save=lambda: checkpoint.save(partial, trainer.state()))
        progress.clear()
        result = {
            "kind": kind,
            "depth": depth,
            "shortcut": shortcut,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": trainer.seconds,
            "rows": trainer.rows,
            "model": model.state_dict(),
        }
        checkpoint.save(file, result)
        partial.unlink(missing_ok=True)
        return result

    def trained(self, kind: str, depth: int, shortcut: str | None, progress: Progress) -> nn.Module:
        """The network itself."""
        model = networks.build(network(kind, depth, shortcut, self.data))
        model.load_state_dict(self.run(kind, depth, shortcut, progress)["model"])
        return model

    def batch(self, count: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """``count`` training images, preprocessed, without augmentation; labels."""
        preprocess = training.preprocess_for(self.data, self.recipe, self.seed)
        batches = Batches(self.data.train, preprocess, None, batch=min(count, len(self.data.train)), seed=self.seed)
        found = next(iter(batches.epoch(epoch)))
        return preprocess.normalise(found.images), found.labels


def _convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d, str]]:
    """The 3x3 convolutions from the input on, without projections: (name, module, name of the batch norm behind it)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            stem, _, last = name.rpartition(".")
            norm = last.replace("conv", "bn")
            found.append((name, module, f"{stem}.{norm}" if stem else norm))
    return found


@torch.no_grad()
def responses(model: nn.Module, x: Tensor) -> list[float]:
    """Standard deviation of the response of each 3x3 layer: after batch norm, before ReLU and addition (figure 7).

    In eval mode, as the trained network is used. ``x`` (N, C, H, W). The network must not be fused: hooks look inside.
    """
    model.eval()
    modules = dict(model.named_modules())
    found: list[float] = []
    hooks = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(float(output.std()))

    for *_, norm in _convolutions(model):
        hooks.append(modules[norm].register_forward_hook(keep))
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def gradients(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Norm of the gradient of each 3x3 convolution's weight, in training mode, root mean square over the batches."""
    model.train()
    layers = _convolutions(model)
    squares = [0.0] * len(layers)
    for x, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        for i, (_, conv, _) in enumerate(layers):
            if conv.weight.grad is None:
                raise RuntimeError("a convolution has no gradient")
            squares[i] += float(conv.weight.grad.double().square().sum())
    return [(s / len(batches)) ** 0.5 for s in squares]


def same_training(
    data: Data,
    name: str,
    recipe: Recipe,
    *,
    steps: int,
    seeds: Sequence[int],
    amp: str,
    device: str,
    progress: Callable[[str], Any],
) -> dict[str, Any]:
    """The loss of each of ``steps`` iterations: plain and fused from the first seed, plain from the others.

    "layout" is plain training again in the other memory layout: what rounding alone does to torch's own curve.
    """

    def losses(seed: int, fuse: bool, channels_last: bool = True) -> list[float]:
        torch.manual_seed(seed)
        net = networks.Network(name, len(data.classes), data.channels)
        model = networks.build(net)
        if fuse:
            resnet_fast.fuse(model)
        trainer = training.Trainer(
            data,
            model,
            net,
            recipe,
            training.preprocess_for(data, recipe, seed),
            Ranks(device),
            training.Settings(seed=seed, amp=amp, channels_last=channels_last),
            iterations=steps,
        )
        found: list[float] = []
        with progress(f"{name} on {data.name}, {amp}, seed {seed}, {'fused' if fuse else 'plain'}"):
            trainer.run(on_step=lambda loss: found.append(float(loss)))
        return found

    plain = losses(seeds[0], False)
    with any_size():
        fused = losses(seeds[0], True)
    return {
        "name": f"{name} on {data.name}, {amp}, lr {recipe.lr:g}",
        "plain": plain,
        "fused": fused,
        "layout": losses(seeds[0], False, channels_last=False),
        "others": [losses(seed, False) for seed in seeds[1:]],
    }


def small(data: Data) -> Images:
    """The training images, which an analysis needs in memory. Raises CommandError for a folder."""
    if not isinstance(data.train, Images):
        raise CommandError("analyze: supported are digits, cifar10:DIR and synthetic")
    return data.train


def default_recipe(data: str, full: bool) -> Recipe:
    """The paper's recipe for CIFAR; shortened, and with small batches, unless ``full``."""
    recipe = definitions.find("paper-cifar")
    return recipe if full or data.startswith("cifar10") else dataclasses.replace(recipe, batch=64, holdout=0.0)
