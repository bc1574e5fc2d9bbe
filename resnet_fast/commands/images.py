"""Photographs to run on: scikit-learn's two samples, or a folder's; cut into normalised crops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import CommandError

__all__ = ["Pictures", "crops", "load"]

_SUFFIXES = (".jpg", ".jpeg", ".png")
_MOST = 256  # pictures read of a folder
_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, per channel of values in 0..1
_STD = (0.229, 0.224, 0.225)


class Pictures(NamedTuple):
    """``images``: (3, H, W) uint8 tensors, H and W of their own; ``source`` in words; how many files were skipped."""

    images: list[Tensor]
    source: str
    skipped: int = 0


def _tensor(pixels: Any) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W)."""
    return torch.tensor(pixels, dtype=torch.uint8).permute(2, 0, 1)


def _samples() -> Pictures:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise CommandError(
            f"the photographs are scikit-learn's, and it cannot be imported ({error}). "
            "Remedy: pip install -e .[bench], or name a folder with --images"
        ) from error
    try:
        found = load_sample_images().images
    except ImportError as error:
        raise CommandError(f"reading photographs needs Pillow ({error}). Remedy: pip install -e .[bench]") from error
    return Pictures([_tensor(i) for i in found], f"{len(found)} photographs of scikit-learn")


def _folder(folder: Path, warn: Callable[[str], None]) -> Pictures:
    if not folder.is_dir():
        raise CommandError(f"--images {folder}: " + ("not a folder" if folder.exists() else "no such folder"))
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())[:_MOST]
    if not files:
        raise CommandError(f"--images {folder}: no jpg or png files in it")
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise CommandError(f"--images needs Pillow and numpy ({error}). Remedy: pip install -e .[bench]") from error
    images, skipped = [], 0
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(_tensor(np.array(image.convert("RGB"))))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped += 1
            reason = str(error).replace(str(file), file.name).replace(repr(str(file)), file.name)
            warn(f"skipped {file.name}: {reason}")
    if not images:
        raise CommandError(f"--images {folder}: none of its {len(files)} jpg and png files can be read")
    if skipped:
        warn(f"{skipped} of {len(files)} files were skipped")
    return Pictures(images, f"{len(images)} photographs of a folder", skipped)


def load(folder: str | None, warn: Callable[[str], None]) -> Pictures:
    """The jpg and png files under ``folder`` (warned of where unreadable), or scikit-learn's samples."""
    return _samples() if folder is None else _folder(Path(folder), warn)


def crops(pictures: Pictures, count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size) float32: squares of random place, side and flip, resized, normalised as for ImageNet.

    The same arguments give the same crops.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    out = torch.empty(count, 3, size, size)
    for i in range(count):
        image = pictures.images[i % len(pictures.images)]
        height, width = image.shape[1:]
        short = min(height, width)
        side = draw(min(size, short), short)
        top, left = draw(0, height - side), draw(0, width - side)
        square = image[None, :, top : top + side, left : left + side].float() / 255
        if draw(0, 1):
            square = square.flip(3)
        out[i] = F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return (out - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
