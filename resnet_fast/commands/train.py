"""``resnet-fast train``: the paper's networks and recipes on digits, CIFAR-10, image folders or synthetic images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resnet_fast
from resnet_fast.recipes import checkpoint, data, definitions, figures, networks, records, training, transforms
from resnet_fast.recipes.ranks import Ranks

from . import CommandError, did_you_mean, machine, tables
from .progress import Progress

__all__ = [
    "DESCRIPTION",
    "EXAMPLES",
    "add_arguments",
    "choice",
    "device_for",
    "output_file",
    "positive",
    "run",
    "without_folders",
]

DESCRIPTION = """\
Train a network of "Deep Residual Learning for Image Recognition" with its blocks fused. Without any option: ResNet-20
on scikit-learn's handwritten digits, in seconds. The folder of --output gets last.pt and best.pt, metrics.json and
metrics.csv, curves.png, and TensorBoard's events where that is installed."""

EXAMPLES = """\
examples:
  resnet-fast train --output runs/digits
  resnet-fast train --data cifar10:DIR --model cifar_resnet56 --recipe paper-cifar --output runs/r56
  resnet-fast train --data imagefolder:DIR --model resnet50 --recipe paper-imagenet --amp bf16 --output runs/r50
  torchrun --nproc-per-node 2 -m resnet_fast train --sync-bn --output runs/two   one process for each GPU, or on a CPU
  resnet-fast train --resume --output runs/r56 ...                      the same command again: goes on exactly
  resnet-fast train --weights resnet50-0676ba61.pth --freeze backbone --output runs/transfer

exit:      0 done; 1 the loss is not finite; 2 wrong usage, data or disk; 130 interrupted, and saved"""

_MODEL = {"imagefolder": "resnet50"}  # by kind of data; else cifar_resnet20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10:DIR, imagefolder:DIR or synthetic (default: %(default)s)")
    add("--model", help="a network of resnet_fast.models (default: cifar_resnet20; resnet50 for an image folder)")
    add("--recipe", help=f"{', '.join(definitions.RECIPES)} (default: the paper's where the data are, else fast)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="length in epochs (default: the recipe's)")
    length.add_argument("--iterations", type=int, help="length in iterations")
    add("--batch", type=int, help="images a step, over all processes (default: the recipe's)")
    add("--lr", type=float, help="learning rate (default: the recipe's)")
    add("--output", metavar="DIR", help="folder of the run (default: runs/DATA-MODEL)")
    add("--resume", action="store_true", help="go on with the run in --output, exactly; or begin, if there is none")
    add("--overwrite", action="store_true", help="drop the run in --output")
    add(
        "--save-every", type=int, default=500, metavar="N", help="iterations between checkpoints (default: %(default)s)"
    )
    flag = argparse.BooleanOptionalAction
    add("--fuse", action=flag, default=True, help="train with fused blocks, or as torch runs them (default: fused)")
    add("--channels-last", action=flag, help="memory layout (default: channels-last where fused)")
    add("--amp", default="off", help=f"{', '.join(training.AMP)}: autocast (default: %(default)s)")
    add("--sync-bn", action="store_true", help="batch norm over all processes")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s, a GPU where there is one)")
    add("--threads", type=int, help="torch's CPU threads (default: left as they are)")
    add("--workers", type=int, help="processes that read image files (default: the cores, at most 8)")
    add("--on-corrupt", default="skip", help="skip: count unreadable images and go on; error (default: %(default)s)")
    add("--size", type=int, help="height and width (default: digits 8, CIFAR 32, others 224; 32 for cifar networks)")
    add("--samples", type=int, default=512, help="synthetic training images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--split-seed", type=int, default=0, help="of the split into training and test (default: %(default)s)")
    add("--shortcut", help="A, B or C (default: A for cifar networks, else B)")
    add("--version", dest="version_", metavar="V", help="v1 or v1.5: which convolution of a bottleneck strides")
    transfer = parser.add_argument_group("transfer")
    transfer.add_argument("--weights", metavar="FILE", help="begin with a checkpoint or published torchvision weights")
    transfer.add_argument("--num-classes", type=int, help="must be that of the data; of synthetic data (default: 10)")
    transfer.add_argument("--head", default="replace", help="replace or append the last layer (default: %(default)s)")
    transfer.add_argument("--freeze", default="none", help="backbone, bn or none (default: %(default)s)")


def device_for(name: str) -> str:
    """ "cpu" or "cuda". Raises CommandError."""
    if name not in ("auto", "cpu", "cuda"):
        raise CommandError(f"--device {name}: supported are auto, cpu, cuda")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no GPU. Remedy: --device cpu")
    return name


def choice(option: str, value: str, known: Any) -> None:
    """Raise a CommandError unless ``--option value`` is one of ``known``."""
    if value not in known:
        raise CommandError(f"--{option} {value}: supported are {', '.join(known)}.{did_you_mean(value, known)}")


def positive(args: argparse.Namespace, *options: str) -> None:
    """Raise a CommandError unless each of these options is unset or above zero."""
    for option in options:
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise CommandError(f"--{option.replace('_', '-')} {value}: supported are positive numbers")


def output_file(option: str, name: str | None) -> Path | None:
    """Where to write: its folder must be there before the work starts."""
    if name is None:
        return None
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CommandError(f"{option} {name}: {'is a folder' if path.is_dir() else f'no such folder {path.parent}'}")
    return path


def _check(args: argparse.Namespace) -> None:
    choice("amp", args.amp, training.AMP)
    choice("on-corrupt", args.on_corrupt, ("skip", "error"))
    choice("head", args.head, ("replace", "append"))
    choice("freeze", args.freeze, ("backbone", "bn", "none"))
    positive(args, "epochs", "iterations", "batch", "lr", "save_every", "threads", "size", "samples", "num_classes")
    if args.workers is not None and args.workers < 0:
        raise CommandError(f"--workers {args.workers}: supported are 0 and above")
    if args.weights is None and (args.freeze == "backbone" or args.head != "replace"):
        raise CommandError("--head append and --freeze backbone need --weights FILE")


def recipe_for(args: argparse.Namespace) -> definitions.Recipe:
    """The recipe named or the default one, with what the command line changes of it."""
    recipe = definitions.find(args.recipe or definitions.default_recipe(args.data))
    changes = {name: getattr(args, name) for name in ("batch", "lr") if getattr(args, name) is not None}
    return dataclasses.replace(recipe, **changes)


def _open(args: argparse.Namespace, weights: networks.Weights | None, model: str, holdout: float) -> data.Data:
    small = model.startswith("cifar")
    size, channels = args.size, 3
    if weights is not None:
        channels = weights.network.in_channels
    kind = args.data.partition(":")[0]
    if size is None and kind == "digits":
        size = 8 if (small and weights is None) or channels == 1 else 32
    elif size is None and kind in ("synthetic", "imagefolder"):
        size = 32 if small else weights.preprocess.size if weights is not None and weights.preprocess else 224
    found = data.open_data(
        args.data,
        size=size,
        channels=channels,
        classes=args.num_classes,
        samples=args.samples,
        holdout=holdout,
        seed=args.split_seed,
    )
    count = len(found.classes)
    if args.num_classes is not None and args.num_classes != count:
        raise CommandError(f"--num-classes {args.num_classes}: {found.name} has {count} classes. Remedy: leave it out")
    if weights is not None and found.channels != channels:
        raise CommandError(f"--weights {weights.file}: takes {channels} channels, the images have {found.channels}")
    return found


def _options(args: argparse.Namespace, model: str, recipe: definitions.Recipe) -> dict[str, Any]:
    """The network's constructor's keyword arguments."""
    options: dict[str, Any] = {}
    if args.shortcut is not None:
        options["shortcut"] = args.shortcut
    if args.version_ is not None:
        options["version"] = args.version_
    if recipe.zero_init_residual and "plain" not in model:
        options["zero_init_residual"] = True
    return options


def _network(
    args: argparse.Namespace,
    weights: networks.Weights | None,
    model: str,
    found: data.Data,
    recipe: definitions.Recipe,
) -> tuple[nn.Module, networks.Network]:
    classes = len(found.classes)
    if weights is not None:
        return networks.with_head(weights, classes, args.head)
    network = networks.Network(model, classes, found.channels, _options(args, model, recipe))
    return networks.build(network), network


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second SIGINT stops at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: nobody can send us a signal
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _said(args: argparse.Namespace, recipe: definitions.Recipe, network: networks.Network, channels_last: bool) -> Any:
    """What must be the same in a resumed run."""
    return {
        "--data": args.data.partition(":")[0],
        "--model": network.name,
        "--recipe": recipe.name,
        "--batch": recipe.batch,
        "--lr": recipe.lr,
        "--seed": args.seed,
        "--split-seed": args.split_seed,
        "--amp": args.amp,
        "--fuse": args.fuse,
        "--channels-last": channels_last,
        "--sync-bn": args.sync_bn,
        "--freeze": args.freeze,
        "--head": network.head,
        "--shortcut": args.shortcut,
        "--version": args.version_,
    }


def _resume(trainer: training.Trainer, folder: records.Folder, said: dict[str, Any], first: bool) -> None:
    content = checkpoint.load(folder.last)
    if "options" not in content or "optimizer" not in content:
        raise CommandError(f"{folder.last.name}: is no checkpoint of a training run")
    changed = [
        f"{k} was {content['options'].get(k)} and is {v}" for k, v in said.items() if content["options"].get(k) != v
    ]
    if changed:
        raise CommandError(f"--resume: this run is another one: {'; '.join(changed)}")
    trainer.restore(content)
    if first:
        print(f"resume   after epoch {trainer.epoch}, iteration {trainer.iteration} of {trainer.total}", flush=True)


def without_folders(argv: list[str]) -> list[str]:
    """Of paths behind a colon (cifar10:/data/cifar) the last part: results name no folders of a machine."""
    return [f"{w.partition(':')[0]}:{Path(w.partition(':')[2]).name}" if ":/" in w else w for w in argv]


def run(args: argparse.Namespace) -> int:
    """Exit status 0; 1 where the loss or a weight is not finite; 130 where it was interrupted."""
    _check(args)
    figures.require()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ranks = Ranks(device_for(args.device))
    try:
        return _train(args, ranks)
    finally:
        ranks.close()


def _prepare(
    args: argparse.Namespace, ranks: Ranks, progress: Progress
) -> tuple[training.Trainer, dict[str, Any], Any]:
    """The trainer; what a resumed run must have in common with it; what is fused (None: nothing)."""
    recipe = recipe_for(args)
    weights = networks.read(args.weights, args.model) if args.weights is not None else None
    if weights is not None and (args.shortcut is not None or args.version_ is not None):
        if weights.origin.startswith("resnet-fast train"):
            raise CommandError(f"--shortcut, --version: {weights.file} says itself what its network is")
        told = _options(args, weights.network.name, recipe)
        told.pop("zero_init_residual", None)  # weights are not drawn
        weights = weights._replace(network=weights.network._replace(options=told))
    model_name = args.model or (weights.network.name if weights else _MODEL.get(args.data.partition(":")[0]))
    model_name = model_name or "cifar_resnet20"
    found = _open(args, weights, model_name, recipe.holdout)
    normed = args.freeze == "none" and not (args.sync_bn and ranks.world > 1)
    if recipe.batch < (2 * ranks.world if normed else ranks.world):
        raise CommandError(
            f"--batch {recipe.batch} over {ranks.world} process{'es' if ranks.world > 1 else ''}: batch norm needs "
            "2 images in each. Remedy: --batch of at least 2 for each process, --sync-bn, or --freeze bn with --weights"
        )
    if recipe.batch % ranks.world:
        raise CommandError(f"--batch {recipe.batch}: must be a multiple of the {ranks.world} processes")
    checkpoint.seed(args.seed)
    model, network = _network(args, weights, model_name, found, recipe)
    preprocess = training.preprocess_for(found, recipe, args.seed) if weights is None else _preprocess(weights, found)
    frozen = networks.freeze(model, network, args.freeze)
    if args.sync_bn and ranks.world > 1:
        if ranks.device.type == "cpu" and not args.fuse:
            raise CommandError("--sync-bn --no-fuse: torch's own SyncBatchNorm needs GPUs. Remedy: --fuse")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        frozen = networks.freeze(model, network, args.freeze)
    rows = None
    if args.fuse:
        rows = resnet_fast.explain(resnet_fast.fuse(model))
    channels_last = args.fuse if args.channels_last is None else args.channels_last
    workers = args.workers if args.workers is not None else min(machine.cores(), 8)
    settings = training.Settings(
        seed=args.seed,
        amp=args.amp,
        channels_last=channels_last,
        workers=workers if isinstance(found.train, data.Folder) else 0,
        on_corrupt=args.on_corrupt,
        save_every=args.save_every,
    )
    trainer = training.Trainer(
        found,
        model,
        network,
        recipe,
        preprocess,
        ranks,
        settings,
        epochs=args.epochs,
        iterations=args.iterations,
        frozen=frozen,
        easy_start=recipe.name == "paper-cifar" and network.name.endswith("110"),
        progress=progress if ranks.first else None,
    )
    return trainer, _said(args, recipe, network, channels_last), rows


def _preprocess(weights: networks.Weights, found: data.Data) -> transforms.Preprocess:
    """That of the weights, at the size of the data."""
    known = weights.preprocess or networks.usual(weights.network)
    if known.size == found.size:
        return known
    resize = found.size if isinstance(found.train, data.Images) else round(found.size * known.resize / known.size)
    return dataclasses.replace(known, size=found.size, resize=resize)


def _head(trainer: training.Trainer, args: argparse.Namespace, record: dict[str, Any], rows: Any) -> str:
    found, recipe, network = trainer.data, trainer.recipe, trainer.network
    count = sum(p.numel() for p in trainer.model.parameters())
    learned = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    held = f", {len(found.validation)} for validation" if found.validation is not None else ""
    size = trainer.preprocess.size
    lines = [
        tables.header(record),
        f"data     {found.name}, {len(found.train)} images for training{held}, {len(found.test)} for the test; "
        f"{found.channels} x {size} x {size}, {len(found.classes)} classes",
        f"model    {network.name}, {count / 1e6:.2f} M parameters"
        + (f", {learned / 1e6:.2f} M of them learn; from {args.weights}" if args.weights else ""),
        f"recipe   {recipe.name} ({recipe.source}): {trainer.total} iterations of {recipe.batch} images, "
        f"lr {recipe.lr:g}, {recipe.schedule}; amp {args.amp}, {trainer.ranks.world} process"
        + ("es" if trainer.ranks.world > 1 else ""),
    ]
    lines.append(tables.explanation(rows, False) if rows is not None else "fused: nothing (--no-fuse)")
    return "\n".join(lines)


def _train(args: argparse.Namespace, ranks: Ranks) -> int:
    progress = Progress()
    trainer, said, rows = _prepare(args, ranks, progress)
    output = Path(args.output or f"runs/{trainer.data.name}-{trainer.network.name}")
    folder: records.Folder | None = None
    refusal = ""
    if ranks.first:
        try:
            folder = records.Folder(output, resume=args.resume, overwrite=args.overwrite)
        except CommandError as error:
            refusal = str(error)
    if refusal := ranks.gather(refusal)[0]:  # on every rank: the others would wait for the first, and end in a trace
        raise CommandError(refusal)
    resuming = ranks.any(folder is not None and folder.resuming)
    record = machine.provenance(without_folders(args.argv))
    if ranks.first:
        print(_head(trainer, args, record, rows), flush=True)
    if resuming:
        _resume(trainer, folder or records.Folder(output, resume=True, overwrite=False), said, ranks.first)
    elif args.resume and ranks.first:
        print("resume   nothing to go on with: begins", flush=True)

    summary = _Summary(trainer, args, record, rows)

    def save() -> None:
        content = training.checkpoint_content(trainer, said, trainer.data.name)
        if folder is not None:
            checkpoint.save(folder.last, content)

    def on_epoch(row: records.Row, better: bool) -> None:
        content = training.checkpoint_content(trainer, said, trainer.data.name) if better else None
        if folder is None:
            return
        if content is not None:
            training.save_best(folder.best, content)
        folder.epoch(trainer.rows, summary.record())
        progress.clear()
        print(_line(row, better), flush=True)

    status, end = 0, ""
    try:
        with _stopping() as stop:
            trainer.run(on_epoch=on_epoch, save=save, stop=stop)
    except training.InterruptedTraining:
        status, end = (
            130,
            f"interrupted at iteration {trainer.iteration}, and saved; the same command with --resume goes on",
        )
    except training.DivergedError as error:
        kept = (
            "last.pt, and best.pt, are of before" if (output / "last.pt").exists() else "no checkpoint was written yet"
        )
        status, end = 1, f"stopped: {error}. {kept}. Remedy: a lower --lr, or --amp off"
    if folder is None:
        return status
    progress.clear()
    if trainer.rows:
        folder.curves(f"{trainer.network.name} on {trainer.data.name}, {trainer.recipe.name}", trainer.rows)
    folder.close()
    if end:
        print(f"resnet-fast: {end}", file=sys.stderr, flush=True)
    else:
        print(summary.text(output))
    return status


def _line(row: records.Row, better: bool) -> str:
    parts = [f"epoch {row['epoch']:.0f}", f"lr {row['lr']:.3g}", f"loss {row['train_loss']:.4f}"]
    parts += [f"train {row['train_top1']:.2f} %"]
    parts += [f"{name} {row[f'{name}_top1']:.2f} %" for name in ("validation", "test") if f"{name}_top1" in row]
    parts += [f"{row['images_per_second']:.0f} img/s", *(["best"] if better else [])]
    return "  ".join(parts)


class _Summary:
    """metrics.json, and its few lines at the end."""

    def __init__(self, trainer: training.Trainer, args: argparse.Namespace, record: dict[str, Any], rows: Any) -> None:
        self.trainer, self.args, self.provenance, self.rows = trainer, args, record, rows

    def record(self) -> dict[str, Any]:
        """metrics.json."""
        t = self.trainer
        last = t.rows[-1]
        counts = {s: sum(row.status == s for row in self.rows or ()) for s in ("fused", "partly", "not")}
        return {
            "schema": 1,
            **self.provenance,
            "data": t.data.name,
            "model": t.network.name,
            "parameters": sum(p.numel() for p in t.model.parameters()),
            "recipe": dataclasses.asdict(t.recipe),
            "iterations": t.iteration,
            "planned_iterations": t.total,
            "amp": self.args.amp,
            "fuse": self.args.fuse,
            "blocks": counts,
            "processes": t.ranks.world,
            "test_top1": last["test_top1"],
            "test_top5": last["test_top5"],
            "test_loss": last["test_loss"],
            "best": {**t.best, "of": "test" if t.data.validation is None else "validation"},
            "images_per_second": last["images_per_second"],
            "seconds": last["seconds"],
            "skipped_images": len(t.corrupt),
            "epochs": t.rows,
        }

    def text(self, output: Path) -> str:
        """What is printed last."""
        t = self.trainer
        if not t.rows:
            return "nothing to do"
        last = t.rows[-1]
        skipped = f"; {len(t.corrupt)} unreadable images skipped" if t.corrupt else ""
        of = "test" if t.data.validation is None else "validation"
        return (
            f"test top-1 {last['test_top1']:.2f} %, top-5 {last['test_top5']:.2f} % "
            f"(best on {of}: {t.best['top1']:.2f} % "
            f"in epoch {t.best['epoch']:.0f}); {last['seconds']:.1f} s of training, "
            f"{last['images_per_second']:.0f} img/s{skipped}; in {output}/"
        )
