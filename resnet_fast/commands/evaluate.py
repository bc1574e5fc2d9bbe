"""``resnet-fast evaluate``: weights on test images, with the paper's 10-crop, multi-scale testing and ensembles."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import resnet_fast
from resnet_fast.recipes import data, evaluation, networks, training, transforms

from . import CommandError, machine, tables
from .progress import Progress
from .steps import in_layout
from .train import choice, device_for, output_file, positive, without_folders

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "run"]

DESCRIPTION = """\
Top-1 and top-5 of a network: a checkpoint of `resnet-fast train`, or torchvision's published weights as they were
downloaded, with the preprocessing that they were trained with. Class probabilities are averaged over the views of an
image, and over the networks of an ensemble."""

EXAMPLES = """\
examples:
  resnet-fast evaluate --weights runs/digits-cifar_resnet20/best.pt
  resnet-fast evaluate --data imagefolder:DIR --weights resnet50-0676ba61.pth --crops 10
  resnet-fast evaluate --data imagefolder:DIR --weights resnet50-0676ba61.pth --scales 224,256,384,480,640
  resnet-fast evaluate --weights a/best.pt --ensemble b/best.pt c/best.pt --json result.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``evaluate``."""
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("--weights", required=True, metavar="FILE", help="a checkpoint, or torchvision's weights")
    add("--ensemble", nargs="+", default=[], metavar="FILE", help="more of them: class scores are averaged")
    add("--model", help="the network of a state_dict that does not say (a checkpoint and published weights do)")
    add("--data", default="digits", help="digits, cifar10:DIR, imagefolder:DIR or synthetic (default: %(default)s)")
    add("--split", default="test", help="test, validation or train (default: %(default)s)")
    add("--crops", help="center, or 10: four corners, the centre, and their mirror images (default: center)")
    add("--scales", help="comma list of lengths of the shorter side: whole images, fully convolutional")
    add("--worst", type=int, default=5, help="classes in the table of the worst (default: %(default)s)")
    add("--batch", type=int, default=64, help="views at a time (default: %(default)s)")
    add("--fuse", action=flag, default=True, help="fused blocks, or as torch runs them (default: fused)")
    add("--channels-last", action=flag, help="memory layout (default: channels-last where fused)")
    add("--amp", default="off", help=f"{', '.join(training.AMP)}: autocast (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s, a GPU where there is one)")
    add("--threads", type=int, help="torch's CPU threads (default: left as they are)")
    add("--workers", type=int, default=0, help="processes that read image files (default: %(default)s)")
    add("--on-corrupt", default="skip", help="skip: leave unreadable images out, counted; error (default: %(default)s)")
    add("--samples", type=int, default=512, help="synthetic training images (default: %(default)s)")
    add("--split-seed", type=int, default=0, help="as in train (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything, with its provenance, to FILE")


def _views(args: argparse.Namespace) -> evaluation.Views:
    if args.scales is None:
        choice("crops", args.crops or "center", ("center", "10"))
        return evaluation.Views(args.crops or "center")
    if args.crops == "10":
        raise CommandError("--crops 10 --scales: choose one; with --scales whole images are looked at, not crops")
    try:
        scales = tuple(int(word) for word in args.scales.split(","))
    except ValueError:
        scales = ()
    if not scales or min(scales) < 1:
        raise CommandError(f"--scales {args.scales}: supported are positive numbers, separated by commas")
    return evaluation.Views("center", scales)


def _images(
    args: argparse.Namespace, weights: networks.Weights, preprocess: transforms.Preprocess
) -> tuple[data.Data, data.Images | data.Folder]:
    """The data as this network takes them, and the split asked for."""
    holdout = 0.1 if args.split == "validation" else 0.0
    kind = args.data.partition(":")[0]
    found = data.open_data(
        args.data,
        size=None if kind == "cifar10" else preprocess.size,
        channels=weights.network.in_channels,
        classes=weights.network.num_classes,
        samples=args.samples,
        holdout=holdout,
        seed=args.split_seed,
    )
    count = len(found.classes)
    if count != weights.network.num_classes:
        raise CommandError(f"{weights.file}: has {weights.network.num_classes} classes, {found.name} has {count}")
    ours = weights.network.in_channels
    if found.channels != ours:
        raise CommandError(
            f"{weights.file}: takes {ours} channel{'s' if ours > 1 else ''}, {found.name} has {found.channels}"
        )
    trained = weights.origin.startswith("resnet-fast train")
    if trained and weights.classes is not None and weights.classes != found.classes and kind != "synthetic":
        raise CommandError(f"{weights.file}: was trained for other classes: {', '.join(weights.classes[:5])}, ...")
    source = {"test": found.test, "validation": found.validation, "train": found.train}[args.split]
    if source is None:
        raise CommandError(f"--split validation: {found.name} has none. Remedy: --split test")
    return found, source


def run(args: argparse.Namespace) -> int:
    """Exit status 0."""
    choice("amp", args.amp, training.AMP)
    choice("on-corrupt", args.on_corrupt, ("skip", "error"))
    choice("split", args.split, ("test", "validation", "train"))
    positive(args, "worst", "batch", "threads", "samples")
    views, device = _views(args), torch.device(device_for(args.device))
    file = output_file("--json", args.json)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    progress = Progress()
    members: list[evaluation.Answers] = []
    rows: list[dict[str, Any]] = []
    classes: tuple[str, ...] = ()
    for name in [args.weights, *args.ensemble]:
        weights = networks.read(name, args.model)
        preprocess = weights.preprocess or networks.usual(weights.network)
        found, source = _images(args, weights, preprocess)
        classes = weights.classes if weights.classes is not None and not classes else classes or found.classes
        model = networks.build(weights.network)
        networks.load_into(model, weights)
        if args.fuse:
            resnet_fast.fuse(model.eval())
        layout = torch.channels_last if (args.fuse if args.channels_last is None else args.channels_last) else None
        model = in_layout(model.to(device), layout or torch.contiguous_format)
        count, label = len(source), weights.file
        known = "" if weights.preprocess is not None else "; preprocessing not known, ImageNet's usual one taken"
        print(f"{label}: {weights.network.name}, {weights.origin}{known}", flush=True)
        answers = evaluation.answers(
            model,
            source,
            preprocess,
            views,
            device=device,
            batch=args.batch,
            amp=args.amp,
            layout=layout or torch.contiguous_format,
            workers=args.workers,
            on_corrupt=args.on_corrupt,
            tick=lambda done, label=label, count=count: progress.tick(lambda: f"{label}: {done}/{count} images"),  # type: ignore[misc]
        )
        progress.clear()
        members.append(answers)
        rows.append(_row(label, weights.network.name, answers))
    if len(members) > 1:
        rows.append(_row(f"ensemble of {len(members)}", "", evaluation.ensemble(members)))
    final = evaluation.ensemble(members)
    worst = evaluation.worst_classes(final, classes, args.worst)
    skipped = members[0].corrupt
    print(_text(rows, worst, views, args.split, skipped))
    if file is not None:
        result = {
            "schema": 1,
            **machine.provenance(without_folders(args.argv)),
            "views": str(views),
            "split": args.split,
            "images": len(final.labels),
            "skipped_images": len(skipped),
            "results": rows,
            "top1": rows[-1]["top1"],
            "top5": rows[-1]["top5"],
            "worst": [w._asdict() for w in worst],
        }
        file.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _row(name: str, network: str, answers: evaluation.Answers) -> dict[str, Any]:
    return {"name": name, "network": network, "top1": evaluation.top(answers, 1), "top5": evaluation.top(answers, 5)}


def _text(
    rows: list[dict[str, Any]],
    worst: list[evaluation.Worst],
    views: evaluation.Views,
    split: str,
    skipped: list[str],
) -> str:
    lines = [["", "network", "top-1 %", "top-5 %", "top-1 error %", "top-5 error %"]]
    for r in rows:
        numbers = [f"{v:.2f}" for v in (r["top1"], r["top5"], 100 - r["top1"], 100 - r["top5"])]
        lines.append([r["name"], r["network"], *numbers])
    parts = [f"{split} images, {views}", tables.table(lines, right=range(2, 6))]
    table = [["class", "images", "right %", "taken for"]]
    for w in worst:
        taken = ", ".join(f"{name} ({count})" for name, count in w.taken_for)
        table.append([w.name, str(w.images), f"{w.right:.2f}", taken])
    parts += ["the worst classes", tables.table(table, right=(1, 2))]
    if skipped:
        parts.append(f"{len(skipped)} unreadable images left out: {', '.join(skipped[:3])}")
    return "\n".join(parts)
