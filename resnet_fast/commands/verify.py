"""``resnet-fast verify``: the fused numbers beside torch's own, layer by layer, against float64."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.guards import any_size

from . import CommandError, adversarial, arguments, curves, equality, machine, plots, tables, units
from .judging import Check, name_of
from .progress import Progress, bar

__all__ = ["DESCRIPTION", "EXAMPLES", "SECTIONS", "add_arguments", "run"]

DESCRIPTION = """\
Is the fused network right? Ours and torch's error against float64: the whole network, every block and every layer
alone (forward, backward, running statistics, eval mode), inputs that break kernels, two runs bit by bit, and the
losses of a few training steps. Ours passes where its error is at most twice torch's own in the same dtype, and a few
roundings. Networks by name get random weights, with batch norms calibrated on the photographs; nothing is
downloaded."""

EXAMPLES = """\
examples:
  resnet-fast verify
  resnet-fast verify --model timm:resnet34 --dtype float32 --only layers,blocks
  resnet-fast verify --device cuda --json verify.json --plot verify.png

networks:  as for resnet-fast bench
exit:      0 equal; 1 not equal; 2 wrong usage; 130 interrupted"""

SECTIONS = ("network", "blocks", "layers", "adversarial", "determinism", "losses")

_IMAGES = 2  # in the network's own checks: float64 is slow
_SMALL = 64  # side of the images whose losses are followed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``verify``."""
    add = parser.add_argument
    add("--model", default="resnet50", help="which network, as for bench (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s, a GPU where there is one)")
    add("--dtype", help="float32, bfloat16, float16, a comma list (default: float32, and bfloat16 where it is native)")
    add("--only", default=",".join(SECTIONS), help=f"a comma list of {', '.join(SECTIONS)} (default: all)")
    add("--steps", type=int, default=6, help="training steps of the loss curves (default: %(default)s)")
    add("--images", metavar="DIR", help="a folder of jpg and png files (default: scikit-learn's photographs)")
    add("--size", type=int, help="height and width of the images (default: 96; 32 for cifar networks)")
    add("--threads", type=int, help="torch's CPU threads (default: left as they are)")
    add("--seed", type=int, default=0, help="of weights and crops (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything, with its provenance, to FILE")
    add("--plot", metavar="FILE", help="draw errors and loss curves into FILE (png, svg, pdf); needs matplotlib")
    add("--verbose", action="store_true", help="a row for every layer and block")


class Section(NamedTuple):
    """A part of the report: its checks, and what could not be checked, in words."""

    name: str
    checks: list[Check]
    notes: list[str]


# ---- the sections


def _place(done: int, of: int, section: str, name: str) -> str:
    return f"{bar(done, of)} {section}: {name}"


def _check_units(section: str, model: nn.Module, x: Tensor, options: _Options, progress: Progress) -> Section:
    kinds = ("layer", "stem")
    chosen = [(u, n) for u, n in units.units(model) if (u.kind in kinds) == (section == "layers")]
    inputs = units.inputs(model, {n for _, n in chosen}, x[:_IMAGES].to(options.device))
    checks: list[Check] = []
    notes = []
    for i, (unit, name) in enumerate(chosen):
        if name not in inputs:
            notes.append(f"{unit.name}: not called, or not with a picture")
            continue
        progress.tick(functools.partial(_place, i, len(chosen), section, unit.name))
        given = units.apart(inputs[name]) if unit.kind == "stem" else inputs[name]
        for dtype in options.dtypes:
            checks += units.unit_checks(unit, given, dtype)
    progress.clear()
    if not chosen:
        notes.append("nothing in this network is fused")
    return Section(section, checks, notes)


def _adversarial(options: _Options, progress: Progress) -> Section:
    checks: list[Check] = []
    inputs = list(adversarial.every())
    for i, hard in enumerate(inputs):
        progress.tick(functools.partial(_place, i, len(inputs), "adversarial", hard.name))
        checks += adversarial.hard_checks(hard, options.device, options.dtypes)
    progress.clear()
    return Section("adversarial", checks, [])


# ---- the command


class _Options:
    """The command line, checked; raises CommandError."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = arguments.device(args.device)
        dtypes = args.dtype if args.dtype is not None else arguments.default_dtypes(self.device)
        self.dtypes = [arguments.DTYPES[word] for word in arguments.words("--dtype", dtypes, arguments.DTYPES)]
        named = arguments.words("--only", args.only, SECTIONS)
        self.sections = [name for name in SECTIONS if name in named]
        for option in ("size", "threads", "steps"):
            value = getattr(args, option)
            if value is not None and not value > 0:
                raise CommandError(f"--{option} {value}: supported are positive numbers")
        self.size = args.size or (32 if args.model.startswith("cifar") else 96)
        self.steps, self.seed = args.steps, args.seed
        self.json, self.plot = arguments.file("--json", args.json), arguments.plot_file("--plot", args.plot)


def _network(model: nn.Module, x: Tensor, options: _Options, progress: Progress) -> Section:
    checks = []
    for i, dtype in enumerate(options.dtypes):
        name = name_of(dtype)
        with progress(f"{bar(i, len(options.dtypes))} network: {name}, eval and train mode against float64"):
            checks += equality.eval_checks(model, x[:_IMAGES], options.device, dtype)
            checks += equality.train_checks(model, x[:_IMAGES], options.device, dtype)
    return Section("network", checks, [])


def _determinism(model: nn.Module, x: Tensor, options: _Options, progress: Progress) -> Section:
    checks = []
    for i, dtype in enumerate(options.dtypes):
        with progress(f"{bar(i, len(options.dtypes))} determinism: two runs in {name_of(dtype)}"):
            checks += equality.determinism_checks(model, x[:_IMAGES], options.device, dtype)
    return Section("determinism", checks, [])


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 where a check failed."""
    with any_size():  # layers and blocks are checked on small crops
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    options = _Options(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    progress = Progress()
    images = 2 * _IMAGES
    source, x, pictures = arguments.network(
        args.model, args.images, images, options.size, options.device, options.seed, progress
    )
    record = machine.provenance(args.argv)
    print(tables.header(record))
    weights = "its own weights" if source.own_weights else "random weights, calibrated"
    print(
        f"model    {source.name}, {weights}, on {options.device.type}; "
        f"{options.size} x {options.size} crops of {pictures.source}"
    )
    model = source.model.to(options.device)
    print(f"\n{tables.explanation(resnet_fast.explain(model), False)}", flush=True)

    sections: list[Section] = []
    followed: list[curves.Curves] = []
    for name in options.sections:
        if name == "network":
            section = _network(model, x, options, progress)
        elif name in ("layers", "blocks"):
            section = _check_units(name, model, x, options, progress)
        elif name == "adversarial":
            section = _adversarial(options, progress)
        elif name == "determinism":
            section = _determinism(model, x, options, progress)
        else:
            small = F.interpolate(x, (min(options.size, _SMALL),) * 2, mode="area")
            calm = model if source.own_weights else curves.calmed(model)
            made = [
                curves.loss_curves(calm, small, options.device, dtype, options.steps, progress)
                for dtype in options.dtypes
            ]
            followed += made
            section = Section(name, [curves.curve_check(c) for c in made], [])
        sections.append(section)
        print(f"\n{tables.section(name, section.checks, section.notes, args.verbose)}", flush=True)

    wrong = [(s.name, c) for s in sections for c in s.checks if not c.ok]
    count = sum(len(s.checks) for s in sections)
    if options.json is not None:
        result = {
            "schema": 1,
            **record,
            "model": {"name": source.name, "own_weights": source.own_weights, "seed": options.seed},
            "images": {"source": pictures.source, "crops": images, "size": options.size},
            "passed": not wrong,
            "verify": [
                {"section": s.name, "checks": [c._asdict() for c in s.checks], "notes": s.notes} for s in sections
            ],
            "curves": [c._asdict() for c in followed],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot is not None:
        where = record["gpus"][0]["name"] if options.device.type == "cuda" else record["cpu"]
        title = f"{source.name} on {where}: errors against float64"
        plots.errors(title, [(s.name, s.checks) for s in sections], followed, plots.stamp(record), options.plot)
    if wrong:
        some = "; ".join(f"{s}: {c.mode} {c.dtype} {c.what} ({c.tensor})" for s, c in wrong[:3])
        print(f"resnet-fast: NOT EQUAL to torch in {len(wrong)} of {count} checks: {some}", file=sys.stderr)
        return 1
    print(f"\nequal: {count} checks passed")
    return 0
