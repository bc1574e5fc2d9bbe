"""The training loop: steps, epochs, evaluation in between, and everything that must be kept to go on exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fast.commands import CommandError
from resnet_fast.commands.progress import Progress
from resnet_fast.commands.steps import in_layout

from . import checkpoint
from .data import Data, Folder, Images
from .definitions import Recipe
from .loading import Batches, draws, test_batches
from .networks import Network
from .ranks import Ranks
from .records import Row
from .schedule import Schedule
from .transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess, center, flip, lighting, mixup, shift, spatial

__all__ = ["AMP", "DivergedError", "InterruptedTraining", "Scores", "Settings", "Trainer", "measure", "preprocess_for"]

#: What --amp names; None: float32 throughout.
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_MEAN_IMAGES = 2048  # of a folder, whose mean image is estimated
_LOOK = 50  # iterations between looks at the loss on a GPU, each of which waits for it
_AGREE = 10  # iterations between questions among ranks whether to stop


class DivergedError(Exception):
    """The loss or a weight is no longer finite; the message says when, and what is kept."""


class InterruptedTraining(Exception):
    """Training was asked to stop, and has been saved."""


class Settings(NamedTuple):
    """Seed, arithmetic, layout, and how images are read and work is saved. ``on_corrupt``: "skip" or "error"."""

    seed: int = 0
    amp: str = "off"
    channels_last: bool = True
    workers: int = 0
    on_corrupt: str = "skip"
    save_every: int = 500


class Scores(NamedTuple):
    """Mean loss, top-1 and top-5 in percent, over ``images``."""

    loss: float
    top1: float
    top5: float
    images: int


def preprocess_for(data: Data, recipe: Recipe, seed: int) -> Preprocess:
    """Mean and deviation of the training images as ``recipe.normalise`` says.

    "channel": ImageNet's usual numbers for a folder. "pixel": the mean image, of a folder estimated from the central
    views of 2048 images.
    """
    size = data.size
    resize = round(size * 256 / 224) if isinstance(data.train, Folder) else size
    plain = Preprocess(size, resize, torch.zeros(data.channels), torch.ones(data.channels))
    if isinstance(data.train, Images):
        images = data.train.images.float() / 255
    elif recipe.normalise == "channel":
        return Preprocess(size, resize, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))
    else:
        return Preprocess(size, resize, _mean_image(data.train, plain, seed), torch.ones(data.channels))
    if recipe.normalise == "channel":
        mean = images.mean((0, 2, 3))
        std = (images - mean.view(-1, 1, 1)).square().mean((0, 2, 3)).sqrt().clamp_min(1e-3)
        return Preprocess(size, resize, mean, std)
    return Preprocess(size, resize, images.mean(0), torch.ones(data.channels))


def _mean_image(source: Folder, plain: Preprocess, seed: int) -> Tensor:
    from .data import CorruptImageError

    total, count = torch.zeros(plain.channels, plain.size, plain.size, dtype=torch.float64), 0
    for index in torch.randperm(len(source), generator=draws(seed))[:_MEAN_IMAGES].tolist():
        try:
            total += center(source[index][0], plain)
        except CorruptImageError:
            continue  # counted when training meets it
        count += 1
    if not count:
        raise CommandError("none of the training images can be read")
    return (total / count / 255).float()


class Trainer:
    """A network in training. ``model`` is fused, or not, already; this object moves, wraps and trains it."""

    def __init__(
        self,
        data: Data,
        model: nn.Module,
        network: Network,
        recipe: Recipe,
        preprocess: Preprocess,
        ranks: Ranks,
        settings: Settings = Settings(),  # noqa: B008  (immutable)
        *,
        epochs: int | None = None,
        iterations: int | None = None,
        frozen: Sequence[nn.Module] = (),
        easy_start: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.data, self.network, self.recipe, self.preprocess = data, network, recipe, preprocess
        self.ranks, self.settings, self.frozen, self.progress = ranks, settings, list(frozen), progress
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = in_layout(model.to(ranks.device), self._layout)
        self.batches = Batches(
            data.train,
            preprocess,
            spatial(recipe.augment, preprocess),
            batch=recipe.batch,
            seed=settings.seed,
            rank=ranks.rank,
            world=ranks.world,
            workers=settings.workers,
            on_corrupt="error" if settings.on_corrupt == "error" else "replace",
        )
        if not len(self.batches):
            raise CommandError(f"--batch {recipe.batch}: too large or too small for {len(data.train)} training images")
        if epochs is None and iterations is None:
            epochs, iterations = recipe.epochs, recipe.iterations
        self.total = iterations if iterations is not None else (epochs or 0) * len(self.batches)
        self.schedule = Schedule(recipe, self.total, len(self.batches), easy_start)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.amp == "fp16")
        self._wrapped: nn.Module = self.model
        on_cpu = ranks.device.type == "cpu"
        self._average = ranks.world > 1 and on_cpu and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        if ranks.world > 1 and not self._average:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(self.model, device_ids=ids)
        self.epoch = self.position = self.iteration = 0
        self.rows: list[Row] = []
        self.best: dict[str, float] = {"epoch": -1, "top1": -1.0}
        self.corrupt: set[str] = set()
        self.seconds = 0.0  # spent in training steps
        self.images = 0  # trained on in that time
        self._clear()

    def _clear(self) -> None:
        """Sums over this epoch of loss * n, right answers and n, on the device: reading them makes the host wait."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)

    def _optimizer(self) -> torch.optim.SGD:
        r = self.recipe
        learned = [p for p in self.model.parameters() if p.requires_grad]
        if not learned:
            raise CommandError("--freeze: leaves nothing to learn")
        groups: list[dict[str, Any]] = [{"params": learned}]
        if not r.decay_all:
            groups = [
                {"params": [p for p in learned if p.dim() > 1]},
                {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
            ]
        return torch.optim.SGD(groups, r.lr, r.momentum, weight_decay=r.weight_decay, nesterov=r.nesterov)

    # ---- one step

    def _input(self, images: Tensor, step: int) -> tuple[Tensor, Tensor | None, float]:
        """Augmented and normalised; the order that mixup mixed with (or None), and the weight of the first."""
        r, s = self.recipe, self.settings
        random, share = draws(s.seed, self.epoch, step), (self.ranks.rank, self.ranks.world)
        x = images.to(self.ranks.device, non_blocking=True)
        if r.flip and self.data.flips and r.augment != "none":
            x = flip(x, random, share)
        x = self.preprocess.normalise(x)
        if r.lighting and x.shape[1] == 3:
            x = lighting(x, self.preprocess.std, random, share)
        if r.augment == "crop":
            x = shift(x, max(1, round(r.pad * self.preprocess.size / 32)), random, share)
        order, weight = None, 1.0
        if r.mixup:
            x, order, weight = mixup(x, r.mixup, random)
        return x.contiguous(memory_format=self._layout), order, weight

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One iteration on uint8 images (N, C, H, W); returns the loss, on the device."""
        device, dtype = self.ranks.device, AMP[self.settings.amp]
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.iteration)
        x, order, weight = self._input(images, self.position)
        labels = labels.to(device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = self._wrapped(x)
        logits = logits.float()
        smoothing = self.recipe.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if order is not None:
            other = F.cross_entropy(logits, labels[order], label_smoothing=smoothing)
            loss = weight * loss + (1 - weight) * other
        self.scaler.scale(loss).backward()
        if self._average:
            self.ranks.average_gradients(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss, n = loss.detach(), len(labels)
        right = (logits.detach().argmax(1) == labels).sum()
        self._sums += torch.stack((loss.double() * n, right.double(), torch.tensor(float(n), device=device).double()))
        if self.schedule.wants_error:
            total = self.ranks.sum(torch.stack((right.double(), torch.tensor(float(n), device=device).double())))
            self.schedule.trained(100.0 - 100.0 * float(total[0] / total[1]))
        self.iteration += 1
        self.position += 1
        return loss

    # ---- a run

    def run(
        self,
        *,
        on_step: Callable[[Tensor], None] | None = None,
        on_epoch: Callable[[Row, bool], None] | None = None,
        save: Callable[[], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train to the end.

        ``on_step(loss)`` after every iteration; ``on_epoch(row, best)`` after every epoch's evaluation; ``save()``
        every ``save_every`` iterations, after every epoch and when ``stop()`` answers yes. Raises DivergedError,
        InterruptedTraining and what ``save`` raises.
        """
        while self.iteration < self.total:
            began = time.perf_counter()
            self.model.train()
            for module in self.frozen:
                module.eval()
            for batch in self.batches.epoch(self.epoch, self.position):
                self._count(batch.corrupt)
                loss = self.step(batch.images, batch.labels)
                self.images += len(batch.labels) * self.ranks.world
                if on_step is not None:
                    on_step(loss)
                if self.ranks.device.type == "cpu" or self.iteration % _LOOK == 0:
                    self._check(loss, "the loss")
                now = time.perf_counter()
                self.seconds, began = self.seconds + now - began, now
                self._show()
                if self.iteration >= self.total:
                    break
                if self._stopping(stop):
                    if save is not None:
                        self._check_weights()
                        save()
                    raise InterruptedTraining
                if save is not None and self.iteration % self.settings.save_every == 0:
                    self._check_weights()
                    save()
                began = time.perf_counter()
            self._end_epoch(on_epoch, save)
            if self.iteration < self.total and self._stopping(stop, now=True):
                raise InterruptedTraining

    def _count(self, corrupt: list[str]) -> None:
        for name in corrupt:
            if name not in self.corrupt and self.progress is not None:
                self.progress.warn(f"skipped {name}")
            self.corrupt.add(name)

    def _stopping(self, stop: Callable[[], bool] | None, now: bool = False) -> bool:
        """Ranks must agree, or one would wait for the others for ever: they ask each other now and then."""
        if stop is None or (self.ranks.world > 1 and not now and self.iteration % _AGREE):
            return False
        return self.ranks.any(stop())

    def _check(self, value: Tensor, what: str) -> None:
        if not math.isfinite(float(value)):
            raise DivergedError(
                f"{what} is {float(value)} at iteration {self.iteration} (epoch {self.epoch + 1}, learning rate "
                f"{self.schedule.lr(self.iteration - 1):.3g}{', --amp fp16' if self.settings.amp == 'fp16' else ''})"
            )

    def _check_weights(self) -> None:
        """Before a checkpoint is replaced: a good one must not be lost to one that is not."""
        self._check(self._sums[0], "the loss")
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.detach().isfinite().all()):
                self._check(torch.tensor(math.nan), f"a weight of {name}")

    def _show(self) -> None:
        if self.progress is None or not self.ranks.first:
            return

        def line() -> str:
            speed = self.images / self.seconds if self.seconds else 0.0
            left = (self.total - self.iteration) * self.seconds * self.recipe.batch / max(self.images, 1)
            done = self.position / len(self.batches)
            bar = "#" * round(20 * done) + "-" * (20 - round(20 * done))
            loss = float(self._sums[0] / self._sums[2])
            return (
                f"epoch {self.epoch + 1} [{bar}] {self.iteration}/{self.total}  loss {loss:.4f}  "
                f"lr {self.optimizer.param_groups[0]['lr']:.3g}  {speed:.0f} img/s  ETA {_clock(left)}"
            )

        self.progress.tick(line)

    def _end_epoch(self, on_epoch: Callable[[Row, bool], None] | None, save: Callable[[], None] | None) -> None:
        self._check_weights()
        loss, right, count = self.ranks.sum(self._sums).tolist()
        row: Row = {
            "epoch": self.epoch + 1,
            "iteration": self.iteration,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / count,
            "train_top1": 100 * right / count,
        }
        judge = "test"
        for name, source in (("validation", self.data.validation), ("test", self.data.test)):
            if source is not None:
                scores = self.evaluate(source)
                row |= {f"{name}_{k}": v for k, v in scores._asdict().items() if k != "images"}
                judge = "validation" if name == "validation" else judge
        if not math.isfinite(row["test_loss"]):
            self._check(torch.tensor(row["test_loss"]), "the test's loss")
        self.schedule.validated(100 - row[f"{judge}_top1"])
        self.corrupt = set().union(*self.ranks.gather(sorted(self.corrupt)))
        row["images_per_second"] = self.images / self.seconds if self.seconds else 0.0
        row["seconds"] = self.seconds
        better = row[f"{judge}_top1"] > self.best["top1"]
        if better:
            self.best = {"epoch": self.epoch + 1, "top1": row[f"{judge}_top1"]}
        self.rows.append(row)
        self.epoch, self.position = self.epoch + 1, 0
        self._clear()
        # The best network first: killed in between, the epoch is done again, and ends the same.
        if on_epoch is not None:
            on_epoch(row, better)
        if save is not None:
            save()

    def evaluate(self, source: Images | Folder) -> Scores:
        """The central view of every image, all ranks together."""
        self.ranks.buffers(self.model)
        scores, corrupt = measure(
            self.model,
            source,
            self.preprocess,
            self.ranks,
            batch=min(self.recipe.batch, 256),
            amp=self.settings.amp,
            layout=self._layout,
            workers=self.settings.workers,
            on_corrupt=self.settings.on_corrupt,
        )
        self._count(corrupt)
        return scores

    # ---- what must be kept

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on; on the first rank (the others answer, too)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": dict(self.schedule.state),
            "scaler": self.scaler.state_dict(),
            "rng": self.ranks.gather(checkpoint.rng_state()),
            "sums": [s.cpu() for s in self.ranks.gather(self._sums.cpu())],
            "epoch": self.epoch,
            "position": self.position,
            "iteration": self.iteration,
            "total": self.total,
            "rows": self.rows,
            "best": self.best,
            "corrupt": sorted(self.corrupt),
            "seconds": self.seconds,
            "images": self.images,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`'s answer. Raises CommandError where it is of a run of another length or world."""
        for what, found, own in (
            ("--epochs or --iterations", state["total"], self.total),
            ("the number of processes", len(state["rng"]), self.ranks.world),
        ):
            if found != own:
                raise CommandError(f"--resume: {what} was {found} iterations or ranks in this run and is {own} now")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.state = dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.position, self.iteration = state["epoch"], state["position"], state["iteration"]
        self.rows, self.best, self.corrupt = list(state["rows"]), dict(state["best"]), set(state["corrupt"])
        self.seconds, self.images = state["seconds"], state["images"]
        self._sums = state["sums"][self.ranks.rank].to(self.ranks.device)
        checkpoint.set_rng_state(state["rng"][self.ranks.rank])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@torch.no_grad()
def measure(
    model: nn.Module,
    source: Images | Folder,
    preprocess: Preprocess,
    ranks: Ranks,
    *,
    batch: int = 128,
    amp: str = "off",
    layout: torch.memory_format = torch.channels_last,
    workers: int = 0,
    on_corrupt: str = "skip",
) -> tuple[Scores, list[str]]:
    """Scores of ``model`` in eval mode on central views, and the files left out. Leaves the model in eval mode."""
    model.eval()
    dtype = AMP[amp]
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    corrupt: list[str] = []
    mode = "error" if on_corrupt == "error" else "leave out"
    parts = test_batches(
        source, preprocess, batch=batch, rank=ranks.rank, world=ranks.world, workers=workers, on_corrupt=mode
    )
    for part in parts:
        corrupt += part.corrupt
        if not len(part.labels):
            continue
        labels = part.labels.to(ranks.device)
        x = preprocess.normalise(part.images.to(ranks.device)).contiguous(memory_format=layout)
        with torch.autocast(ranks.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(x)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        n = torch.tensor(float(len(labels)), device=ranks.device).double()
        sums += torch.stack((loss, best[:, 0].sum().double(), best.any(1).sum().double(), n))
    loss_sum, top1, top5, count = ranks.sum(sums).tolist()
    if not count:
        raise CommandError("the test has no image that can be read")
    return Scores(loss_sum / count, 100 * top1 / count, 100 * top5 / count, int(count)), corrupt


def checkpoint_content(trainer: Trainer, options: dict[str, Any], data: str) -> dict[str, Any]:
    """What is saved: the trainer's state and what is needed to use the network without this run."""
    network = trainer.network._asdict()
    return {
        "format": checkpoint.FORMAT,
        "network": {**network, "options": dict(network["options"])},
        "preprocess": trainer.preprocess.state(),
        "classes": list(trainer.data.classes),
        "data": data,
        "options": options,
        **trainer.state(),
    }


def save_best(file: Path, content: dict[str, Any]) -> None:
    """The same without what only training needs."""
    left_out = ("optimizer", "rng", "scaler", "schedule", "sums")
    checkpoint.save(file, {k: v for k, v in content.items() if k not in left_out})
