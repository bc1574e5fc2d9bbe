"""``resnet-fast analyze``: the paper's analyses, each a table, JSON and PNG, in minutes on data that are at hand."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

import resnet_fast
from resnet_fast.recipes import analyses, checkpoint, data, definitions, figures, networks

from . import CommandError, machine, tables
from .progress import Progress
from .train import choice, device_for, positive, without_folders

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "run"]

DESCRIPTION = """\
What the paper measures of its networks:
  degradation   error of plain and of residual networks as depth grows, and of the shortcut options (figures 4, 6)
  responses     standard deviation of each layer's response in trained networks (figure 7)
  gradients     norm of the gradient of each layer's weight at the start, with and without shortcuts
and of this project:
  fusion        loss by iteration of fused and of plain training, from the same seed
Trained networks are kept in --output and not trained again: an interrupted analysis goes on where it was."""

EXAMPLES = """\
examples:
  resnet-fast analyze degradation
  resnet-fast analyze degradation --full --data cifar10:DIR --output runs/figure6
  resnet-fast analyze gradients --depths 20,56,110"""

_ITERATIONS = 500
_DEPTHS = {"degradation": "20,32,44,56", "responses": "20,56,110", "gradients": "20,32,44,56"}
_KNOWN = {"plain": (20, 32, 44, 56, 110), "residual": (20, 32, 44, 56, 110, 1202)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``analyze``."""
    add = parser.add_argument
    add("what", choices=("degradation", "responses", "gradients", "fusion"), help="see above")
    add("--data", default="digits", help="digits, cifar10:DIR or synthetic (default: %(default)s)")
    add("--depths", help="comma list of 20, 32, 44, 56, 110 (default: 20,32,44,56; responses: 20,56,110)")
    add("--shortcuts", default="A,B,C", help="options compared at the smallest depth (default: %(default)s)")
    add("--iterations", type=int, help=f"length of each training (default: {_ITERATIONS}; fusion: 50)")
    add("--full", action="store_true", help="the paper's schedule: 64000 iterations of 128 images")
    add("--lr", type=float, help="learning rate (default: the paper's; fusion: see docs/recipes.md)")
    add("--batch", type=int, help="images a step (default: 64; 128 with --full)")
    add("--size", type=int, help="height and width (default: digits 8, others 32)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    add("--fuse", action=argparse.BooleanOptionalAction, default=True, help="train fused, or not (default: fused)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s, a GPU where there is one)")
    add("--threads", type=int, help="torch's CPU threads (default: left as they are)")
    add("--output", metavar="DIR", default="runs/analyses", help="folder of results (default: %(default)s)")


def _depths(args: argparse.Namespace, kind: str) -> list[int]:
    text = args.depths or _DEPTHS[args.what]
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    known = sorted({d for depths in _KNOWN.values() for d in depths})
    if not found or not set(found) <= set(known):
        raise CommandError(f"--depths {text}: supported are {', '.join(map(str, known))}, separated by commas")
    return sorted(d for d in set(found) if d in _KNOWN[kind])


def _shortcuts(args: argparse.Namespace) -> list[str]:
    found = [word.strip().upper() for word in args.shortcuts.split(",") if word.strip()]
    for word in found:
        choice("shortcuts", word, ("A", "B", "C"))
    return [s for s in found if s != "A"]


def _study(args: argparse.Namespace, folder: Path) -> analyses.Study:
    recipe = analyses.default_recipe(args.data, args.full)
    for name in ("lr", "batch"):
        if getattr(args, name) is not None:
            recipe = dataclasses.replace(recipe, **{name: getattr(args, name)})
    size = args.size or (32 if args.data == "synthetic" else None)
    found = data.open_data(args.data, size=size, holdout=recipe.holdout, seed=0)
    analyses.small(found)
    iterations = args.iterations or (recipe.iterations if args.full else _ITERATIONS)
    return analyses.Study(
        found,
        recipe,
        folder / "networks",
        seed=args.seed,
        fuse=args.fuse,
        iterations=iterations or _ITERATIONS,
        device=device_for(args.device),
    )


def _nets(args: argparse.Namespace) -> list[tuple[str, int, str | None]]:
    """(kind, depth, shortcut) in the order of the table."""
    plain: list[tuple[str, int, str | None]] = [("plain", d, None) for d in _depths(args, "plain")]
    residual: list[tuple[str, int, str | None]] = [("residual", d, "A") for d in _depths(args, "residual")]
    return plain + residual


def _degradation(args: argparse.Namespace, study: analyses.Study, progress: Progress) -> tuple[dict[str, Any], str]:
    nets = _nets(args)
    least = min(depth for _, depth, _ in nets)
    nets += [("residual", least, option) for option in _shortcuts(args)]
    runs = []
    for kind, depth, shortcut in nets:
        found = study.run(kind, depth, shortcut, progress)
        runs.append({k: v for k, v in found.items() if k != "model"})
        last = found["rows"][-1]
        print(f"{kind}-{depth} {shortcut or ''}: training error {100 - last['train_top1']:.2f} %", flush=True)
    lines = [["network", "shortcut", "parameters", "training error %", "test error %", "training loss"]]
    for r in runs:
        last = r["rows"][-1]
        errors = f"{100 - last['train_top1']:.2f}", f"{100 - last['test_top1']:.2f}", f"{last['train_loss']:.4f}"
        lines.append([f"{r['kind']}-{r['depth']}", r["shortcut"] or "none", f"{r['parameters']:,}", *errors])
    return {"runs": runs}, tables.table(lines, right=range(2, 6))


def _responses(args: argparse.Namespace, study: analyses.Study, progress: Progress) -> tuple[dict[str, Any], str]:
    x, _ = study.batch(256)
    nets: list[dict[str, Any]] = []
    for kind, depth, shortcut in _nets(args):
        if kind == "plain" and depth > 56:  # the paper's figure has none: it does not train
            continue
        model = study.trained(kind, depth, shortcut, progress)
        nets.append({"kind": kind, "depth": depth, "shortcut": shortcut, "std": analyses.responses(model, x)})
    lines = [["network", "layers", "mean std", "median", "largest"]]
    for net in nets:
        std = sorted(net["std"])
        numbers = sum(std) / len(std), std[len(std) // 2], std[-1]
        lines.append([f"{net['kind']}-{net['depth']}", str(len(std)), *(f"{v:.3f}" for v in numbers)])
    return {"networks": nets}, tables.table(lines, right=range(1, 5))


def _gradients(args: argparse.Namespace, study: analyses.Study, progress: Progress) -> tuple[dict[str, Any], str]:
    batches = [study.batch(study.recipe.batch, epoch) for epoch in range(4)]
    nets = _nets(args)
    greatest = max(depth for _, depth, _ in nets)
    nets += [("residual", greatest, option) for option in _shortcuts(args)]
    found: list[dict[str, Any]] = []
    for kind, depth, shortcut in nets:
        with progress(f"{kind}-{depth}"):
            torch.manual_seed(study.seed)
            model = networks.build(analyses.network(kind, depth, shortcut, study.data))
            if study.fuse:
                resnet_fast.fuse(model)
            norm = analyses.gradients(model, batches)
        found.append({"kind": kind, "depth": depth, "shortcut": shortcut, "norm": norm})
    lines = [["network", "shortcut", "first layer", "median", "last layer", "first / last"]]
    for net in found:
        n = net["norm"]
        numbers = [f"{v:.3g}" for v in (n[0], sorted(n)[len(n) // 2], n[-1], n[0] / n[-1])]
        lines.append([f"{net['kind']}-{net['depth']}", net["shortcut"] or "none", *numbers])
    return {"networks": found}, tables.table(lines, right=range(2, 6))


def _fusion(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    steps = args.iterations or 50
    fast = definitions.find("fast")
    digits = data.open_data("digits")
    photographs = data.open_data("synthetic", size=args.size or 64, samples=256)
    sets = []
    for found, name, batch, calm in ((digits, "cifar_resnet20", 128, 3e-4), (photographs, "resnet18", 16, 1e-5)):
        for amp, lr, seeds in (("off", args.lr or calm, 1), ("off", fast.lr, 2), ("bf16", fast.lr, 3)):
            recipe = dataclasses.replace(fast, lr=lr, batch=args.batch or batch)
            sets.append(
                {
                    "amp": amp,
                    **analyses.same_training(
                        found,
                        name,
                        recipe,
                        steps=steps,
                        seeds=range(args.seed, args.seed + seeds),
                        amp=amp,
                        device=device_for(args.device),
                        progress=progress,
                    ),
                }
            )
    lines = [["training", "largest |fused - plain| / plain", "torch's two layouts", "torch's other seeds"]]
    for s in sets:
        others = f"{max(largest(o, s['plain']) for o in s['others']):.1e}" if s["others"] else ""
        both = [f"{largest(s[k], s['plain']):.1e}" for k in ("fused", "layout")]
        lines.append([s["name"], *both, others])
    return {"sets": sets}, tables.table(lines, right=range(1, 4))


def largest(losses: list[float], plain: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - p) / p for a, p in zip(losses, plain, strict=True))


def run(args: argparse.Namespace) -> int:
    """Exit status 0."""
    positive(args, "iterations", "lr", "batch", "size", "threads")
    figures.require()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {folder}: {error.strerror}") from error
    progress, began = Progress(), time.monotonic()
    record = machine.provenance(without_folders(args.argv))
    settings: dict[str, Any] = {}
    if args.what == "fusion":
        found, text = _fusion(args, progress)
    else:
        study = _study(args, folder)
        settings = {
            "data": study.data.name,
            "iterations": study.iterations,
            "recipe": dataclasses.asdict(study.recipe),
            "seed": study.seed,
            "fused": study.fuse,
        }
        analysis = {"degradation": _degradation, "responses": _responses, "gradients": _gradients}[args.what]
        found, text = analysis(args, study, progress)
    progress.clear()
    result = {"schema": 1, **record, **settings, "analysis": args.what, **found}
    checkpoint.write(folder / f"{args.what}.json", (json.dumps(result, indent=1) + "\n").encode())
    picture = folder / f"{args.what}.png"
    draw: Any = {"fusion": figures.losses}.get(args.what) or getattr(figures, args.what)
    draw(_title(args, settings, record), next(iter(found.values())), picture)
    print(f"{_title(args, settings, record)}\n{text}")
    print(f"{time.monotonic() - began:.0f} s; {args.what}.json and {picture.name} in {folder}/")
    return 0


def _title(args: argparse.Namespace, settings: dict[str, Any], record: dict[str, Any]) -> str:
    if args.what == "fusion":
        return f"fused and plain training, same seed (commit {record['commit']})"
    what = {
        "degradation": "error by iteration",
        "responses": "standard deviation of layer responses",
        "gradients": "gradient norm at initialisation",
    }[args.what]
    length = "" if args.what == "gradients" else f", {settings['iterations']} iterations"
    return f"{what}: {settings['data']}{length}, batch {settings['recipe']['batch']} (commit {record['commit']})"
