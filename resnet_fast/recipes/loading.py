"""Batches in an order that depends on the seed and the epoch alone: training can go on from any of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnet_fast.commands import CommandError

from .data import CorruptImageError, Folder, Images
from .transforms import Preprocess, Spatial, center

__all__ = ["Batch", "Batches", "draws", "test_batches"]


def draws(*key: int) -> torch.Generator:
    """A generator whose numbers depend on ``key`` (seed, epoch, step, ...) alone."""
    seed = 0
    for part in key:  # Knuth's multiplier, modulo 2^63
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


class Batch(NamedTuple):
    """``images`` (N, C, size, size) uint8, ``labels`` (N,) int64, and the files that could not be read."""

    images: Tensor
    labels: Tensor
    corrupt: list[str]


def _collate(items: list[Any]) -> Batch:
    good = [(image, label) for image, label, _ in items if image is not None]
    corrupt = [name for *_, names in items for name in names]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    return Batch(images, torch.tensor([label for _, label in good]), corrupt)


def _ready(source: Images | Folder, preprocess: Preprocess) -> TypeGuard[Images]:
    """In memory, and of the right size: batches are picked without looking at single images."""
    return isinstance(source, Images) and tuple(source.images.shape[-2:]) == (preprocess.size, preprocess.size)


class _Views(Dataset[Any]):
    """A view of each image, or None. In training ("replace") the next readable image stands in for a corrupt one."""

    def __init__(
        self, source: Images | Folder, preprocess: Preprocess, transform: Spatial | None, on_corrupt: str
    ) -> None:
        self.source, self.preprocess, self.transform, self.on_corrupt = source, preprocess, transform, on_corrupt

    def __len__(self) -> int:
        return len(self.source)

    def _view(self, image: Tensor, key: tuple[int, ...]) -> Tensor:
        if self.transform is None:
            return center(image, self.preprocess)
        # torchvision draws from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws(*key).initial_seed())
            return self.transform(image)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor | None, int, list[str]]:
        """``key``: seed, epoch, index of the image."""
        *draw, index = key
        corrupt: list[str] = []
        for offset in range(len(self.source)):
            try:
                image, label = self.source[(index + offset) % len(self.source)]
            except CorruptImageError as error:
                corrupt.append(str(error))
                if self.on_corrupt == "replace":
                    continue
                return None, -1, corrupt
            return self._view(image, (*draw, index)), label, corrupt
        return None, -1, corrupt


class Batches:
    """The training batches of one rank.

    Every epoch is a new order of the images, cut into global batches of ``batch``; rank r of ``world`` takes every
    world-th image from the r-th on. The last, incomplete batch is cut to a multiple of ``world``, and left out where it
    has less than two images for each rank.
    """

    def __init__(
        self,
        source: Images | Folder,
        preprocess: Preprocess,
        transform: Spatial | None,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        on_corrupt: str = "replace",
    ) -> None:
        self.source, self.preprocess, self.transform = source, preprocess, transform
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.workers, self.on_corrupt = workers, on_corrupt
        tail = len(source) % batch // world * world
        self._tail = tail if tail >= 2 * world else 0

    def __len__(self) -> int:
        return len(self.source) // self.batch + (self._tail > 0)

    def _indices(self, epoch: int) -> list[Tensor]:
        """This rank's share of every batch."""
        order = torch.randperm(len(self.source), generator=draws(self.seed, epoch))
        kept = len(self.source) // self.batch * self.batch + self._tail
        return [part[self.rank :: self.world] for part in order[:kept].split(self.batch)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from the ``start``-th on."""
        parts = self._indices(epoch)[start:]
        source = self.source
        if self.transform is None and _ready(source, self.preprocess):
            for part in parts:
                yield Batch(source.images[part], source.labels[part], [])
            return
        views = _Views(source, self.preprocess, self.transform, self.on_corrupt)
        keys = [[(self.seed, epoch, int(i)) for i in part] for part in parts]
        for batch in _load(views, keys, self.workers):
            if not len(batch.labels):
                raise CommandError("none of the training images can be read")
            yield batch


def _load(views: _Views, keys: list[list[tuple[int, int, int]]], workers: int) -> Iterator[Batch]:
    """The images of every list of keys. What a worker finds wrong is raised here, without the worker's traceback."""
    sampler: Any = keys  # any iterable of lists of keys will do
    loader: DataLoader[Any] = DataLoader(
        views, batch_sampler=sampler, num_workers=workers, collate_fn=_collate, pin_memory=torch.cuda.is_available()
    )
    for batch in loader:
        if batch.corrupt and views.on_corrupt == "error":
            raise CommandError(f"unreadable image {batch.corrupt[0]}. Remedy: replace it, or --on-corrupt skip")
        yield batch


def test_batches(
    source: Images | Folder,
    preprocess: Preprocess,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    on_corrupt: str = "leave out",
) -> Iterator[Batch]:
    """This rank's share of all images in their order, the central view of each; unreadable ones are left out."""
    views = _Views(source, preprocess, None, on_corrupt)
    indices = range(rank, len(source), world)
    keys = [[(0, 0, i) for i in indices[k : k + batch]] for k in range(0, len(indices), batch)]
    if _ready(source, preprocess):
        for part in keys:
            chosen = torch.tensor([i for *_, i in part])
            yield Batch(source.images[chosen], source.labels[chosen], [])
        return
    yield from _load(views, keys, workers)
