"""Scores averaged over views of an image and over networks: 10-crop, fully convolutional multi-scale, ensembles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from resnet_fast.commands import CommandError

from .data import CorruptImageError, Folder, Images
from .training import AMP
from .transforms import Preprocess, center, short_side, ten_crops

__all__ = ["Answers", "Views", "Worst", "answers", "ensemble", "top", "worst_classes"]


class Views(NamedTuple):
    """``crops`` "center" or "10"; or, with ``scales``, whole images whose shorter side has each of these lengths."""

    crops: str = "center"
    scales: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.scales:
            return f"fully convolutional at {', '.join(map(str, self.scales))}"
        return "10 crops" if self.crops == "10" else "central crop"

    def of(self, image: Tensor, preprocess: Preprocess) -> list[Tensor]:
        """The views of one uint8 image (C, H, W)."""
        if self.scales:
            return [short_side(image, length) for length in self.scales]
        return ten_crops(image, preprocess) if self.crops == "10" else [center(image, preprocess)]


class Answers(NamedTuple):
    """``scores`` (N, classes): class probabilities, averaged over views; ``labels`` (N,); images in their order.

    ``kept`` (N,): their indices, for unreadable images are left out; ``corrupt``: which these are.
    """

    scores: Tensor
    labels: Tensor
    kept: Tensor
    corrupt: list[str]


class _ViewsOf(Dataset[Any]):
    def __init__(self, source: Images | Folder, preprocess: Preprocess, views: Views) -> None:
        self.source, self.preprocess, self.views = source, preprocess, views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, int, list[Tensor], str]:
        try:
            image, label = self.source[index]
        except CorruptImageError as error:
            return index, -1, [], str(error)
        return index, label, self.views.of(image, self.preprocess), ""


def _groups(items: list[tuple[int, int, list[Tensor], str]]) -> Iterator[tuple[list[int], Tensor]]:
    """Views of one shape together: (row of each view's image, (V, C, H, W))."""
    found: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    for row, (*_, views, _) in enumerate(items):
        for view in views:
            found[tuple(view.shape)].append((row, view))
    for pairs in found.values():
        yield [row for row, _ in pairs], torch.stack([view for _, view in pairs])


@torch.inference_mode()
def answers(
    model: nn.Module,
    source: Images | Folder,
    preprocess: Preprocess,
    views: Views,
    *,
    device: torch.device,
    batch: int = 64,
    amp: str = "off",
    layout: torch.memory_format = torch.channels_last,
    workers: int = 0,
    on_corrupt: str = "skip",
    tick: Callable[[int], None] | None = None,
) -> Answers:
    """What ``model``, in eval mode, makes of every image. ``batch`` is in views; ``tick`` gets the images done.

    The networks end in a global average: on a whole image of any size that is the fully convolutional network with its
    class scores averaged over all places, for the last layer is linear.
    """
    model.eval()
    dtype = AMP[amp]
    views_each = len(views.scales) or (10 if views.crops == "10" else 1)
    loader = DataLoader(
        _ViewsOf(source, preprocess, views),
        batch_size=max(1, batch // views_each),
        num_workers=workers,
        collate_fn=list,
    )
    scores: list[Tensor] = []
    labels, kept, corrupt, done = [], [], [], 0
    for items in loader:
        done += len(items)
        corrupt += [name for *_, name in items if name]
        if corrupt and on_corrupt == "error":
            raise CommandError(f"unreadable image {corrupt[0]}. Remedy: replace it, or --on-corrupt skip")
        items = [item for item in items if not item[3]]
        if not items:
            continue
        total: Tensor | None = None
        for rows, images in _groups(items):
            x = preprocess.normalise(images.to(device)).contiguous(memory_format=layout)
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                logits = model(x)
            probabilities = logits.float().softmax(1).cpu()
            if total is None:
                total = torch.zeros(len(items), probabilities.shape[1])
            total.index_add_(0, torch.tensor(rows), probabilities)
        assert total is not None  # every item has a view
        scores.append(total / views_each)
        labels += [label for _, label, *_ in items]
        kept += [index for index, *_ in items]
        if tick is not None:
            tick(done)
    if not scores:
        raise CommandError("none of the images can be read")
    return Answers(torch.cat(scores), torch.tensor(labels), torch.tensor(kept), corrupt)


def ensemble(members: Sequence[Answers]) -> Answers:
    """Class scores averaged over networks (the paper, section 4.1). All must have seen the same images."""
    first = members[0]
    if any(not torch.equal(m.kept, first.kept) for m in members):
        raise ValueError("members: found answers about different images; supported are answers about the same ones")
    return first._replace(scores=torch.stack([m.scores for m in members]).mean(0))


def top(found: Answers, k: int) -> float:
    """Percent of the images whose label is among the ``k`` highest scores."""
    best = found.scores.topk(min(k, found.scores.shape[1]), 1).indices
    return 100 * float((best == found.labels[:, None]).any(1).double().mean())


class Worst(NamedTuple):
    """One class: images, percent right, and what the others were taken for: (class, count), the most frequent first."""

    name: str
    images: int
    right: float
    taken_for: list[tuple[str, int]]


def worst_classes(found: Answers, classes: Sequence[str], count: int) -> list[Worst]:
    """The ``count`` classes with the lowest share of right answers."""
    n = len(classes)
    confusion = torch.bincount(found.labels * n + found.scores.argmax(1), minlength=n * n).view(n, n)
    images, right = confusion.sum(1), confusion.diagonal()
    share = torch.where(images > 0, right / images.clamp_min(1), 2.0)  # classes without an image come last
    answer = []
    for c in share.argsort(stable=True)[:count].tolist():
        if not int(images[c]):
            break
        others = confusion[c].clone()
        others[c] = 0
        order = others.argsort(descending=True, stable=True)[:3].tolist()
        taken = [(classes[o], int(others[o])) for o in order if int(others[o])]
        answer.append(Worst(classes[c], int(images[c]), 100 * float(share[c]), taken))
    return answer
