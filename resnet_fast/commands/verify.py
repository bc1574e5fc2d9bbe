"""``resnet-fast verify``: the fused numbers beside torch's own, layer by layer, against float64."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import resnet_fast
from resnet_fast import adapters, modules
from resnet_fast.guards import any_size
from resnet_fast.models.blocks import BasicBlock, Bottleneck
from resnet_fast.plan import BlockPlan, ConvBnPath, HostPlan, Opaque, find

from . import CommandError, arguments, equality, machine, plots, tables
from .equality import Check, Unit
from .progress import Progress, bar

__all__ = ["DESCRIPTION", "EXAMPLES", "SECTIONS", "add_arguments", "run", "units"]

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
_SIDE = 14  # of the crops of feature maps that layers and blocks get


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


# ---- layers and blocks of a network


def _gap(pre: Tensor, margin: float) -> Tensor:
    """Per channel of ``pre`` (N, K, P, Q) the smallest shift that leaves no value within ``margin`` of 0."""
    values = pre.detach().transpose(0, 1).flatten(1).sort(1).values  # (K, NPQ)
    low, high = values[:, :1] - 2 * margin, values[:, -1:] + 2 * margin
    middles = torch.cat([low, (values[:, 1:] + values[:, :-1]) / 2, high], 1)
    wide = torch.cat([low == low, values.diff(dim=1) > 2 * margin, high == high], 1)
    nearest = middles.abs().masked_fill(~wide, torch.inf).argmin(1, keepdim=True)
    clear = values.abs().amin(1) > margin
    return (-middles.gather(1, nearest).squeeze(1)).masked_fill(clear, 0.0)


#: A value this far from 0, in parts of the largest, keeps its sign under float32's rounding.
_MARGIN = 512 * torch.finfo(torch.float32).eps


def _decide(
    plan: BlockPlan, module: nn.Module, x: Tensor, forward: Callable[[nn.Module], Callable[[Tensor], Any]]
) -> None:
    """Move the betas of ``module`` (float64), one batch norm after the other, as ``equality.Unit`` says."""
    seen: dict[str, Tensor] = {}

    def see(name: str, *call: Any) -> None:
        seen[name] = call[-1].detach()

    side = plan.shortcut
    paths = {layer.bn for layer in plan.layers}
    if isinstance(side, (ConvBnPath, Opaque)):
        paths.add(side.bn if isinstance(side, ConvBnPath) else side.path)
    handles = [find(module, path).register_forward_hook(functools.partial(see, path)) for path in paths]
    module.train()
    try:
        for i, layer in enumerate(plan.layers):
            bn = find(module, layer.bn)
            if layer.act is False or bn.bias is None:
                continue
            with torch.no_grad():
                forward(module)(x)
                pre = seen[layer.bn]
                if i == len(plan.layers) - 1 and side is not None:
                    pre = pre + (
                        x if isinstance(side, str) else seen[side.bn if isinstance(side, ConvBnPath) else side.path]
                    )
                bn.bias += _gap(pre, _MARGIN * float(pre.abs().max()))
    finally:
        for handle in handles:
            handle.remove()


def _fold(plan: BlockPlan, module: nn.Module) -> None:
    """torch's own folding, in the dtype of ``module``; a batch norm becomes the identity."""
    sides = (plan.shortcut,) if isinstance(plan.shortcut, ConvBnPath) else ()
    for layer in (*plan.layers, *sides):
        fused = fuse_conv_bn_eval(find(module, layer.conv), find(module, layer.bn))
        for path, new in ((layer.conv, fused), (layer.bn, nn.Identity())):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, new)


def _itself(module: nn.Module) -> Callable[[Tensor], Any]:
    return module


def _unfused(module: Any) -> Callable[[Tensor], Any]:
    return module.unfused


def _fused(module: nn.Module) -> Callable[[Tensor], Any]:
    return resnet_fast.fuse(module)


def _layer(name: str, conv: nn.Conv2d, bn: nn.Module, relu: bool, pool: nn.Module | None = None) -> Unit:
    if pool is not None:  # windows tie, and which value wins is as undecided as a ReLU near 0
        stem = modules.Stem.from_modules(conv, bn, pool)
        return Unit(name, "stem", stem, _itself, _unfused, None, functools.partial(_fold, modules.Stem.plan))
    unit = modules.ConvBnAct2d.from_modules(conv, bn, relu)
    plan = BlockPlan("layer", (ConvBnPath("conv", "bn", relu),))
    decided = functools.partial(_decide, plan, forward=_unfused)
    return Unit(name, "layer", unit, _itself, _unfused, decided, functools.partial(_fold, plan))


def units(model: nn.Module) -> Iterator[tuple[Unit, str]]:
    """Every layer and block that fuse() takes over, and the name of the module whose input is its input."""
    for row in resnet_fast.explain(model):
        if not row.block or row.status == "not":
            continue
        host = model.get_submodule(row.name)
        plan = adapters.look(host, type(host))
        prefix = f"{row.name}." if row.name else ""
        parts = plan.parts if isinstance(plan, HostPlan) else (plan,) if isinstance(plan, BlockPlan) else ()
        for part in parts:
            if not isinstance(part, BlockPlan):
                continue  # a sum and a ReLU, or a batch norm and one: no layer
            sides = (part.shortcut,) if isinstance(part.shortcut, ConvBnPath) else ()
            for i, layer in enumerate((*part.layers, *sides)):
                last = i == len(part.layers) - 1
                act = find(host, layer.act) if isinstance(layer.act, str) else layer.act
                relu = act is True or type(act) is nn.ReLU
                pool = find(host, part.pool) if last and isinstance(part.pool, str) else None
                pool = pool if relu and type(pool) is nn.MaxPool2d else None
                conv = find(host, layer.conv)
                yield _layer(prefix + layer.conv, conv, find(host, layer.bn), relu, pool), prefix + layer.conv
        if isinstance(plan, BlockPlan) and row.name:
            decided = functools.partial(_decide, plan, forward=_itself)
            fold = functools.partial(_fold, plan)
            yield Unit(row.name, plan.kind, host, _fused, _itself, decided, fold), row.name


@torch.no_grad()
def _inputs(model: nn.Module, names: set[str], x: Tensor) -> dict[str, Tensor]:
    """What the modules called ``names`` get, in training mode: a crop (2, C, up to 14, up to 14) of it."""
    model = copy.deepcopy(model).train()
    found: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        t = args[0]
        if name not in found and isinstance(t, Tensor) and t.dim() == 4:
            side = 4 * _SIDE if t.shape[1] <= 4 else _SIDE
            found[name] = t[:2, :, :side, :side].clone(memory_format=torch.channels_last)

    handles = [model.get_submodule(n).register_forward_pre_hook(functools.partial(see, n)) for n in names]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def _apart(x: Tensor) -> Tensor:
    """``x`` with a little noise: photographs have even areas, in which the values of a pooling window tie."""
    random = torch.Generator().manual_seed(0)
    return x + 0.05 * torch.randn(x.shape, generator=random).to(x.device)


def _check_units(section: str, model: nn.Module, x: Tensor, options: _Options, progress: Progress) -> Section:
    every = list(units(model))
    kinds = ("layer", "stem")
    chosen = [(u, n) for u, n in every if (u.kind in kinds) == (section == "layers")]
    inputs = _inputs(model, {n for _, n in chosen}, x[:_IMAGES].to(options.device))
    checks: list[Check] = []
    notes = []
    for i, (unit, name) in enumerate(chosen):
        if name not in inputs:
            notes.append(f"{unit.name}: not called, or not with a picture")
            continue
        with progress(f"{bar(i, len(chosen))} {section}: {unit.name}"):
            given = _apart(inputs[name]) if unit.kind == "stem" else inputs[name]
            for dtype in options.dtypes:
                checks += equality.unit_checks(unit, given, dtype)
    if not chosen:
        notes.append("nothing in this network is fused")
    return Section(section, checks, notes)


# ---- inputs that break kernels


class Hard(NamedTuple):
    """A block in a state, and an input, that break kernels; ``train``: also forward and backward in training."""

    name: str
    module: nn.Module
    x: Tensor
    train: bool = True
    special: bool = False  # infinities or NaN: they must stand where torch's stand


def _hard() -> Iterator[Hard]:
    """(8 or 4, 32, 6, 6) inputs of a bottleneck with an identity, and of a basic block, whose padding shows."""

    def bottleneck(**change: float) -> nn.Module:
        torch.manual_seed(0)
        return altered(Bottleneck(32, 8), change)

    def basic(**change: float) -> nn.Module:
        torch.manual_seed(0)
        return altered(BasicBlock(32, 32), change)

    def altered(block: nn.Module, change: dict[str, float]) -> nn.Module:
        for name, m in block.named_modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.5, 0.5)
                for what, value in change.items():
                    if what.startswith(name):
                        nn.init.constant_(getattr(m, what.removeprefix(f"{name}_")), value)
        return block

    random = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=random).contiguous(memory_format=torch.channels_last)

    def marked(value: float) -> Tensor:
        x = randn(4, 32, 6, 6)
        x[1, 3, 2, 2] = value
        return x

    yield Hard("mean / std = 1000", bottleneck(), 1000 + randn(8, 32, 6, 6))
    even, x = bottleneck(), randn(8, 32, 6, 6)
    x[:, 0] = 3.0
    with torch.no_grad():
        find(even, "conv1").weight[:4, 1:] = 0.0  # four channels of y that are constant, and not 0
    yield Hard("constant channels", even, x)
    yield Hard("gamma = 0", bottleneck(bn1_weight=0.0, bn3_weight=0.0), randn(8, 32, 6, 6))
    yield Hard("beta = 100 before padding", basic(bn1_bias=100.0), randn(4, 32, 6, 6))
    yield Hard("subnormals", bottleneck(), 1e-40 * randn(8, 32, 6, 6))
    yield Hard("one image", basic(), randn(1, 32, 6, 6))
    yield Hard("H * W = 1", basic(), randn(8, 32, 1, 1))
    yield Hard("one image of H * W = 1", basic(), randn(1, 32, 1, 1), train=False)
    yield Hard("inf", basic(), marked(torch.inf), special=True)
    yield Hard("-inf", bottleneck(), marked(-torch.inf), special=True)
    yield Hard("NaN", basic(), marked(torch.nan), special=True)


def _refuses(forward: Callable[[Tensor], Any], x: Tensor) -> str:
    """The type of error that a call in training raises, or "none"."""
    try:
        forward(x)
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error).__name__
    return "none"


def _adversarial(options: _Options, progress: Progress) -> Section:
    checks: list[Check] = []
    every = list(_hard())
    for i, (name, module, x, train, special) in enumerate(every):
        module, x = module.to(options.device), x.to(options.device)
        plan = adapters.look(module, type(module))
        assert isinstance(plan, BlockPlan)
        decided = None if special else functools.partial(_decide, plan, forward=_itself)
        unit = Unit(name, plan.kind, module, _fused, _itself, decided, functools.partial(_fold, plan))
        with progress(f"{bar(i, len(every))} adversarial: {name}"):
            for dtype in options.dtypes:
                checks += equality.unit_checks(unit, x, dtype, train, True if special else None)
        if not train:
            mine, theirs = (_refuses(make(copy.deepcopy(module).train()), x) for make in (_fused, _itself))
            same, nan = mine == theirs, float("nan")
            what = f"{name}: raises {mine}, torch {theirs}"
            checks.append(Check("train", "float32", "error", what, 1, float(not same), 0.0, 0.0, nan, same))
    return Section("adversarial", checks, [])


def _calmed(model: nn.Module) -> nn.Module:
    """A copy whose blocks add a tenth of what they compute to their shortcut, as blocks start and trained ones end up.

    Random weights at full strength amplify a rounding by orders of magnitude a step, in torch as in ours, and curves
    would soon have nothing in common.
    """
    model = copy.deepcopy(model)
    for row in resnet_fast.explain(model):
        host = model.get_submodule(row.name)
        plan = adapters.look(host, type(host)) if row.block else None
        if isinstance(plan, BlockPlan) and plan.shortcut is not None:
            gamma = find(host, plan.layers[-1].bn).weight
            if gamma is not None:
                gamma.data *= 0.1
    return model


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
        name = str(dtype).removeprefix("torch.")
        with progress(f"{bar(i, len(options.dtypes))} network: {name}, eval and train mode against float64"):
            checks += equality.eval_checks(model, x[:_IMAGES], options.device, dtype)
            checks += equality.train_checks(model, x[:_IMAGES], options.device, dtype)
    return Section("network", checks, [])


def _determinism(model: nn.Module, x: Tensor, options: _Options, progress: Progress) -> Section:
    checks = []
    for i, dtype in enumerate(options.dtypes):
        with progress(f"{bar(i, len(options.dtypes))} determinism: two runs in {str(dtype).removeprefix('torch.')}"):
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
    curves: list[equality.Curves] = []
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
            calm = model if source.own_weights else _calmed(model)
            made = [
                equality.loss_curves(calm, small, options.device, dtype, options.steps, progress)
                for dtype in options.dtypes
            ]
            curves += made
            section = Section(name, [equality.curve_check(c) for c in made], [])
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
            "curves": [c._asdict() for c in curves],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot is not None:
        where = record["gpus"][0]["name"] if options.device.type == "cuda" else record["cpu"]
        title = f"{source.name} on {where}: errors against float64"
        plots.errors(title, [(s.name, s.checks) for s in sections], curves, plots.stamp(record), options.plot)
    if wrong:
        some = "; ".join(f"{s}: {c.mode} {c.dtype} {c.what} ({c.tensor})" for s, c in wrong[:3])
        print(f"resnet-fast: NOT EQUAL to torch in {len(wrong)} of {count} checks: {some}", file=sys.stderr)
        return 1
    print(f"\nequal: {count} checks passed")
    return 0
