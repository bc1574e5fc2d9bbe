"""From uint8 images to a network's input: preprocessing, views for the test, augmentation for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .libraries import transforms

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Preprocess",
    "center",
    "lighting",
    "mixup",
    "shift",
    "short_side",
    "spatial",
    "ten_crops",
]

#: Per channel, of values in 0..1; torchvision's weights were trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Principal components of ImageNet's colours (values in 0..1), R, G, B in rows: Krizhevsky et al., NIPS 2012, section
#: 4.1; the numbers are those of Facebook's fb.resnet.torch.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_LIGHTING = 0.1


@dataclass(frozen=True)
class Preprocess:
    """How images reach a network in the test, as the checkpoint keeps it.

    The shorter side becomes ``resize``, the central ``size`` x ``size`` is cropped, values in 0..1 lose ``mean`` and
    are divided by ``std``. ``mean`` is (C,), or (C, size, size): one for each pixel, as in the paper. ``std`` is (C,).
    """

    size: int
    resize: int
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32; a mean for each pixel is resized where H and W are not its own."""
        mean = self.mean.to(x.device)
        mean = mean.view(-1, 1, 1) if mean.dim() == 1 else mean
        if mean.shape[1:] != (1, 1) and mean.shape[1:] != x.shape[-2:]:
            mean = F.interpolate(mean[None], x.shape[-2:], mode="bilinear", align_corners=False)[0]
        return (x.float() / 255 - mean) / self.std.to(x.device).view(-1, 1, 1)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"size": self.size, "resize": self.resize, "mean": self.mean, "std": self.std}


def short_side(x: Tensor, length: int) -> Tensor:
    """(..., H, W) uint8 with the shorter side resized to ``length``."""
    if min(x.shape[-2:]) == length:
        return x
    return transforms("resizing").functional.resize(x, [length], antialias=True)


def center(x: Tensor, preprocess: Preprocess) -> Tensor:
    """The central view, (..., size, size). Images that have this size already are not resized."""
    if tuple(x.shape[-2:]) == (preprocess.size, preprocess.size):
        return x
    resized = short_side(x, preprocess.resize)
    return transforms("cropping").functional.center_crop(resized, [preprocess.size] * 2)


def ten_crops(x: Tensor, preprocess: Preprocess) -> list[Tensor]:
    """Four corners and the centre, and their mirror images (the paper, section 3.4).

    They are cut from an image whose shorter side is 8/7 of ``size`` (256 for 224), or ``resize`` if that is larger.
    """
    resized = short_side(x, max(preprocess.resize, round(preprocess.size * 8 / 7)))
    return list(transforms("cropping").functional.ten_crop(resized, [preprocess.size] * 2))


Spatial = Callable[[Tensor], Tensor]


def spatial(kind: str, preprocess: Preprocess) -> Spatial | None:
    """The part of an augmentation that sees one uint8 image of any size and draws from torch's global generator.

    "scale": the paper's for ImageNet, the shorter side of random length in [256, 480] (in proportion to a size of 224)
    and a random crop; "resized_crop": a crop of random area and aspect (Szegedy et al., arXiv 1409.4842), colours
    jittered; "crop" and "none": the central view, "crop" goes on in :func:`shift`. None: nothing to be done for
    images that have the right size.
    """
    size = preprocess.size
    if kind in ("crop", "none"):
        return None
    v2 = transforms("augmentation")
    if kind == "scale":
        low, high = round(size * 256 / 224), round(size * 480 / 224)
        return v2.Compose([v2.RandomShortestSize(list(range(low, high + 1)), antialias=True), v2.RandomCrop(size)])
    if kind == "resized_crop":
        steps = [v2.RandomResizedCrop(size, antialias=True)]
        if preprocess.channels == 3:
            steps.append(v2.ColorJitter(0.4, 0.4, 0.4))
        return v2.Compose(steps)
    raise ValueError(f"kind={kind!r} is not supported; use scale, resized_crop, crop or none")


#: Which images of the global batch are this rank's: the rank-th and every world-th after it. Draws are made for all of
#: them, so that any number of processes augments alike.
Share = tuple[int, int]


def flip(x: Tensor, random: torch.Generator, share: Share = (0, 1)) -> Tensor:
    """(N, C, H, W): each image mirrored with probability one half."""
    rank, world = share
    chosen = (torch.rand(len(x) * world, generator=random)[rank::world] < 0.5).to(x.device)
    return torch.where(chosen.view(-1, 1, 1, 1), x.flip(3), x)


def shift(x: Tensor, pad: int, random: torch.Generator, share: Share = (0, 1)) -> Tensor:
    """(N, C, H, W): each image moved by up to ``pad`` pixels, zeros moving in: pad and crop at random."""
    n, channels, height, width = x.shape
    rank, world = share
    drawn = torch.randint(2 * pad + 1, (2, n * world), generator=random)[:, rank::world]
    top, left = drawn.to(x.device)
    padded = F.pad(x, [pad] * 4)
    rows = top.view(n, 1, 1, 1) + torch.arange(height, device=x.device).view(1, 1, -1, 1)
    columns = left.view(n, 1, 1, 1) + torch.arange(width, device=x.device).view(1, 1, 1, -1)
    image = torch.arange(n, device=x.device).view(n, 1, 1, 1)
    return padded[image, torch.arange(channels, device=x.device).view(1, -1, 1, 1), rows, columns]


def lighting(x: Tensor, std: Tensor, random: torch.Generator, share: Share = (0, 1)) -> Tensor:
    """(N, 3, H, W), normalised: AlexNet's PCA colour augmentation, one draw for each image."""
    rank, world = share
    alpha = _LIGHTING * torch.randn(len(x) * world, 3, generator=random)[rank::world]
    colour = (alpha * torch.tensor(_EIGENVALUES)) @ torch.tensor(_EIGENVECTORS).T  # (N, 3), in values of 0..1
    return x + (colour / std).to(x.device).view(-1, 3, 1, 1)


def mixup(x: Tensor, alpha: float, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """x mixed with itself in another order: (mixed, that order, weight of the first). arXiv 1710.09412."""
    # Beta(alpha, alpha) from two gamma draws; torch's own sampler takes no generator, so it gets a seed from ours.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=random)))
        weight = float(torch.distributions.Beta(alpha, alpha).sample())
    weight = max(weight, 1 - weight)  # the first label stays the one to be right about
    order = torch.randperm(len(x), generator=random).to(x.device)
    return weight * x + (1 - weight) * x[order], order, weight
