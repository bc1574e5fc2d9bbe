"""CIFAR-10 as it is published: the binary or the Python batches, read without running what a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fast.commands import CommandError

from .libraries import require

__all__ = ["CLASSES", "read"]

#: In the order of the labels.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = ("test_batch",)
_IMAGES = 10_000  # in each file
_PIXELS = 3 * 32 * 32
_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")

#: What the published pickles hold: dictionaries, lists, bytes and one uint8 array.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch holds")
        if module.startswith("numpy.core"):  # numpy 2 moved it
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def _binary(file: Path) -> tuple[Tensor, Tensor]:
    """Rows of one label byte and 3072 bytes: R, G, B planes of 32 x 32."""
    size, expected = file.stat().st_size, _IMAGES * (1 + _PIXELS)
    if size != expected:
        raise CommandError(
            f"{file.name} has {size} bytes, expected {expected}: half-downloaded or damaged. "
            "Remedy: download and unpack CIFAR-10 again"
        )
    rows = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).view(_IMAGES, 1 + _PIXELS)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def _python(file: Path) -> tuple[Tensor, Tensor]:
    require("numpy", "reading CIFAR-10's Python batches")
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream, encoding="bytes").load()
        images = torch.tensor(content[b"data"], dtype=torch.uint8)
        labels = torch.tensor(content[b"labels"], dtype=torch.long)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CommandError(
            f"{file.name} is no CIFAR-10 batch ({type(error).__name__}: {error}): half-downloaded or damaged. "
            "Remedy: download and unpack CIFAR-10 again"
        ) from error
    if images.shape != (_IMAGES, _PIXELS) or labels.shape != (_IMAGES,):
        raise CommandError(f"{file.name} holds images {tuple(images.shape)}, expected {(_IMAGES, _PIXELS)}")
    return images.view(-1, 3, 32, 32), labels


def _find(folder: Path) -> tuple[Path, str]:
    """Where the batches lie, and their ending: ".bin" or "" (Python)."""
    if not folder.is_dir():
        raise CommandError(f"--data cifar10:{folder}: no such folder")
    for name in _FOLDERS:
        for suffix in (".bin", ""):
            if any((folder / name / f"{stem}{suffix}").is_file() for stem in _TRAIN + _TEST):
                return folder / name, suffix
    packed = sorted(folder.glob("cifar-10*.tar.gz"))
    hint = f"; {packed[0].name} is still packed" if packed else ""
    raise CommandError(
        f"--data cifar10:{folder.name}: neither data_batch_1.bin nor data_batch_1 in it or in "
        f"{' or '.join(_FOLDERS[1:])}{hint}. Remedy: unpack the published archive (binary or Python version) there"
    )


def read(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (50000, 3, 32, 32) uint8, labels (50000,) int64) for training, and the same of 10000 for the test.

    Raises CommandError for a folder or file that is missing, too short or not what it should be.
    """
    where, suffix = _find(folder)
    missing = [f"{stem}{suffix}" for stem in _TRAIN + _TEST if not (where / f"{stem}{suffix}").is_file()]
    if missing:
        raise CommandError(f"--data cifar10:{folder.name}: half-downloaded, without {', '.join(missing)}")
    reader = _binary if suffix else _python
    parts = [reader(where / f"{stem}{suffix}") for stem in _TRAIN + _TEST]
    wrong = next((int(labels.max()) for _, labels in parts if int(labels.max()) >= len(CLASSES)), None)
    if wrong is not None:
        raise CommandError(f"--data cifar10:{folder.name}: a label of {wrong}, expected 0 to {len(CLASSES) - 1}")
    train = torch.cat([p[0] for p in parts[:-1]]), torch.cat([p[1] for p in parts[:-1]])
    return train, parts[-1]
