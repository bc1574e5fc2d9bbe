"""What can be trained on: handwritten digits, CIFAR-10, folders of images, synthetic images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.commands import CommandError, did_you_mean

from . import cifar
from .libraries import require, transforms, vision

__all__ = ["CorruptImageError", "Data", "Folder", "Images", "open_data"]

_KINDS = ("digits", "cifar10:DIR", "imagefolder:DIR", "synthetic")
_DIGITS_TEST = 360  # of 1797 images


class CorruptImageError(Exception):
    """An image file that cannot be decoded; the message names it and the reason."""


class Images:
    """Images in memory: ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def split(self, count: int, generator: torch.Generator) -> tuple[Images, Images]:
        """All but ``count`` images, and these, drawn at random."""
        order = torch.randperm(len(self), generator=generator)
        kept, held = order[count:], order[:count]
        return Images(self.images[kept], self.labels[kept]), Images(self.images[held], self.labels[held])


class Folder:
    """torchvision's ImageFolder as (3, H, W) uint8 tensors of their own sizes. Raises CorruptImageError."""

    def __init__(self, root: Path) -> None:
        library = vision("--data imagefolder")
        try:
            self.files: Any = library.datasets.ImageFolder(str(root))
        except (FileNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0].replace(str(root), root.name)
            raise CommandError(f"--data imagefolder: {reason}") from error
        self._decode = transforms("--data imagefolder").functional.pil_to_tensor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files.samples[index]
        try:
            return self._decode(self.files.loader(path)), label
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            reason = str(error).replace(path, Path(path).name)
            raise CorruptImageError(f"{Path(path).parent.name}/{Path(path).name}: {reason}") from error
        except Exception as error:  # Pillow's DecompressionBombError derives from Exception alone
            if type(error).__name__ != "DecompressionBombError":
                raise
            raise CorruptImageError(f"{Path(path).parent.name}/{Path(path).name}: {error}") from error


class Data(NamedTuple):
    """``train``, ``validation`` (or None) and ``test``; ``size``: height and width that networks get by default.

    ``flips``: a mirrored image is still of its class.
    """

    name: str
    train: Images | Folder
    validation: Images | None
    test: Images | Folder
    classes: tuple[str, ...]
    channels: int
    size: int
    flips: bool


def _digits(size: int, seed: int) -> Data:
    """scikit-learn's 1797 digits, split in proportion to the classes: 1 channel at 8 px, else enlarged RGB."""
    datasets = require("sklearn.datasets", "--data digits")
    split = require("sklearn.model_selection", "--data digits").train_test_split
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), 0..1
    if size != 8:
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    pixels, labels = (images * 255).round().to(torch.uint8).contiguous(), torch.tensor(found.target).long()
    parts = split(range(len(labels)), test_size=_DIGITS_TEST, stratify=labels.tolist(), random_state=seed)
    train, test = (Images(pixels[part], labels[part]) for part in map(torch.tensor, parts))
    classes = tuple(str(name) for name in found.target_names)
    return Data("digits", train, None, test, classes, pixels.shape[1], size, flips=False)


def _cifar10(folder: str, holdout: float, seed: int) -> Data:
    train, test = (Images(*part) for part in cifar.read(Path(folder)))
    validation = None
    if holdout:  # the paper's 45k/5k
        train, validation = train.split(round(holdout * len(train)), torch.Generator().manual_seed(seed))
    return Data("cifar10", train, validation, test, cifar.CLASSES, 3, 32, flips=True)


def _imagefolder(folder: str, size: int) -> Data:
    root = Path(folder)
    if not root.is_dir():
        raise CommandError(f"--data imagefolder:{folder}: no such folder")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise CommandError(f"--data imagefolder:{root.name}: half-downloaded, no folder {part!r} in it")
    train, test = Folder(root / "train"), Folder(root / "val")
    ours, theirs = set(train.files.classes), set(test.files.classes)
    if ours != theirs:
        odd = sorted(ours ^ theirs)
        raise CommandError(
            f"--data imagefolder:{root.name}: train has {len(ours)} classes and val {len(theirs)}; "
            f"in one of them alone: {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}"
        )
    return Data("imagefolder", train, None, test, tuple(train.files.classes), 3, size, flips=True)


def _synthetic(size: int, channels: int, classes: int, samples: int, seed: int) -> Data:
    """A smooth pattern for each class, under noise: it can be learned, and costs what photographs of ``size`` cost."""
    random = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(torch.randn(classes, channels, 4, 4, generator=random), (size, size), mode="bilinear")
    parts = []
    for count in (samples, max(samples // 4, 2)):
        labels = torch.randint(classes, (count,), generator=random)
        images = torch.empty(count, channels, size, size, dtype=torch.uint8)
        for i, label in enumerate(labels.tolist()):
            noise = torch.randn(channels, size, size, generator=random)
            images[i] = (127.5 + 40 * patterns[label] + 30 * noise).clamp(0, 255).round().to(torch.uint8)
        parts.append(Images(images, labels))
    names = tuple(f"class {i}" for i in range(classes))
    return Data("synthetic", parts[0], None, parts[1], names, channels, size, flips=True)


def open_data(
    spec: str,
    *,
    size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    samples: int = 512,
    holdout: float = 0.0,
    seed: int = 0,
) -> Data:
    """The data that ``--data`` names: "digits", "cifar10:DIR", "imagefolder:DIR" or "synthetic".

    Args:
        size: height and width; default 8 for digits, 32 for CIFAR-10, 224 for the others.
        channels, classes, samples: of synthetic images; classes default to 10.
        holdout: share of CIFAR-10's training images that become the validation set.
        seed: of the split and of synthetic images.

    Raises:
        CommandError: no such kind; data that are missing, incomplete or damaged; a library that is missing.
    """
    kind, _, folder = spec.partition(":")
    if kind == "digits" and not folder:
        return _digits(size or 8, seed)
    if kind == "synthetic" and not folder:
        return _synthetic(size or 224, channels, classes or 10, samples, seed)
    if kind in ("cifar10", "imagefolder"):
        if not folder:
            raise CommandError(f"--data {spec}: say where, {kind}:DIR")
        return _cifar10(folder, holdout, seed) if kind == "cifar10" else _imagefolder(folder, size or 224)
    raise CommandError(
        f"--data {spec}: supported are {', '.join(_KINDS)}.{did_you_mean(kind, [k.partition(':')[0] for k in _KINDS])}"
    )
