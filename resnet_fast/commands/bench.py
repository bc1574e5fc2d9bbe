"""``resnet-fast bench``: is the fused network right, and how fast is it? In this order."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from typing import Any

import torch
from torch import Tensor

import resnet_fast
from resnet_fast.fuse import Explanation

from . import CommandError, arguments, equality, machine, plots, sources, tables, timing
from .engines import ENGINES
from .judging import Check, name_of
from .progress import Progress
from .steps import in_layout

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "run"]

DESCRIPTION = """\
Run a network on photographs, fused and as torch runs it: first what is fused, then whether the numbers are equal
(error against float64 beside torch's own), and only then speed and memory, all contenders in turns in one run.
Networks by name get random weights, with batch norms calibrated on the photographs; nothing is downloaded."""

EXAMPLES = """\
examples:
  resnet-fast bench
  resnet-fast bench --model torchvision:resnet18 --batch 1,8,32 --dtype float32 --against channels_last
  resnet-fast bench --model transformers:resnet-50 --mode training --batch 16
  resnet-fast bench --against channels_last,compile,openvino,onnxruntime
  resnet-fast bench --model mypkg.nets:make --images photos/ --json result.json --plot result.png

networks:  a name of resnet_fast.models; torchvision:NAME; timm:NAME; transformers:resnet-18 ... resnet-152, or
           transformers:FOLDER (a saved model); smp:NAME[/ENCODER]; module:callable, which returns a torch.nn.Module
exit:      0 equal; 1 not equal; 2 wrong usage; 130 interrupted"""

_CHECKED = 2  # images in the equality test: float64 is slow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    add = parser.add_argument
    add("--model", default="resnet50", help="which network, see below (default: %(default)s)")
    add("--mode", default="inference", help="inference or training: forward, loss, backward (default: %(default)s)")
    add("--batch", help="images a batch, a comma list (default: 1,16 on a CPU; 1,128 on a GPU; training: the larger)")
    add("--dtype", help="float32, bfloat16, float16, a comma list (default: float32, and bfloat16 where it is native)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s, a GPU where there is one)")
    add(
        "--against",
        help="comma list of eager (torch, NCHW), channels_last, compile, and in inference on a GPU reduce_overhead, "
        "max_autotune: torch.compile with CUDA graphs; in inference on a CPU openvino, onnxruntime (default: the first "
        "three, on a GPU reduce_overhead too; the baseline is channels_last)",
    )
    add("--images", metavar="DIR", help="a folder of jpg and png files (default: scikit-learn's photographs)")
    add("--size", type=int, help="height and width of the images (default: 224; 32 for cifar networks)")
    add("--threads", type=int, help="torch's CPU threads (default: left as they are)")
    add("--rounds", type=int, help="rounds of each setting (default: what fits in --seconds, 5 to 100)")
    add("--seconds", type=float, default=15.0, help="time for the rounds of each setting (default: %(default)g)")
    add("--seed", type=int, default=0, help="of weights, crops and labels (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything, with its provenance, to FILE")
    add("--plot", metavar="FILE", help="draw the speeds into FILE (png, svg, pdf); needs matplotlib")
    add("--verbose", action="store_true", help="every row of what is fused")


class _Options:
    """The command line, checked; raises CommandError."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.mode = arguments.choice("--mode", args.mode, ("inference", "training"))
        self.device = arguments.device(args.device)
        small, large = (1, 16) if self.device.type == "cpu" else (1, 128)
        default = f"{small},{large}" if self.mode == "inference" else str(large)
        self.batches = arguments.batches(args.batch if args.batch is not None else default)
        dtypes = args.dtype if args.dtype is not None else arguments.default_dtypes(self.device)
        self.dtypes = [arguments.DTYPES[word] for word in arguments.words("--dtype", dtypes, arguments.DTYPES)]
        graphs = self.device.type == "cuda" and self.mode == "inference"
        engines = self.device.type == "cpu" and self.mode == "inference"
        plain = [n for n in timing.AGAINST if n not in ENGINES]
        usual = [n for n in plain if n not in timing.GRAPHED or (graphs and n != "max_autotune")]
        named = arguments.words("--against", args.against or ",".join(usual), timing.AGAINST)
        if not graphs and (wrong := [name for name in named if name in timing.GRAPHED]):
            raise CommandError(
                f"--against {', '.join(wrong)}: supported is inference on a GPU, for these replay CUDA graphs. "
                f"Remedy: --against {','.join(usual)}"
            )
        if not engines and (wrong := [name for name in named if name in ENGINES]):
            raise CommandError(
                f"--against {', '.join(wrong)}: supported is inference on a CPU. Remedy: --against {','.join(usual)}"
            )
        self.against = [name for name in timing.AGAINST if name in named]
        self.compiles = any(name == "compile" or name in timing.GRAPHED for name in self.against)
        self.baseline = "channels_last" if "channels_last" in named else self.against[0]
        for option in ("size", "threads", "rounds", "seconds"):
            value = getattr(args, option)
            if value is not None and not value > 0:
                raise CommandError(f"--{option} {value}: supported are positive numbers")
        self.size = args.size or (32 if args.model.startswith("cifar") else 224)
        self.rounds, self.seconds, self.seed = args.rounds, args.seconds, args.seed
        self.json, self.plot = arguments.file("--json", args.json), arguments.plot_file("--plot", args.plot)


def _explain(source: sources.Source, x: Tensor, options: _Options) -> Explanation:
    """What is fused, asked after a forward: a block that fell back then says so."""
    copied = copy.deepcopy(source.model).to(options.device)
    model = resnet_fast.fuse(in_layout(copied, torch.channels_last))
    with torch.no_grad():
        x = x[:_CHECKED].to(options.device)
        try:
            model(x.contiguous(memory_format=torch.channels_last))
        except (RuntimeError, ValueError, TypeError) as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise CommandError(f"{source.name} does not run at --size {options.size}: {line}") from error
    return resnet_fast.explain(model)


def _checks(source: sources.Source, x: Tensor, options: _Options, progress: Progress) -> list[Check]:
    found: list[Check] = []
    x = x[:_CHECKED]
    for dtype in options.dtypes:
        name = name_of(dtype)
        with progress(f"checking equality in {name}, eval mode, against float64"):
            found += equality.eval_checks(source.model, x, options.device, dtype)
        if options.mode == "training":
            with progress(f"checking equality in {name}, train mode with gradients, against float64"):
                found += equality.train_checks(source.model, x, options.device, dtype)
    return found


def _speed(source: sources.Source, x: Tensor, options: _Options, progress: Progress) -> list[dict[str, Any]]:
    found = []
    for dtype in options.dtypes:
        for batch in options.batches:
            setting = timing.Setting(options.mode, batch, options.size, dtype, options.device)
            entries = timing.contenders(source.model, x[:batch], setting, options.against)
            results = timing.measure(
                entries,
                setting,
                progress,
                rounds=options.rounds,
                seconds=options.seconds,
                baseline=options.baseline,
            )
            title = f"speed: {options.mode}, {setting.dtype_name}, batch {batch}, {options.size} x {options.size}"
            print(f"\n{tables.speed(title, results, options.baseline)}", flush=True)
            found.append(
                {
                    "mode": options.mode,
                    "dtype": setting.dtype_name,
                    "batch": batch,
                    "size": options.size,
                    "device": options.device.type,
                    "baseline": options.baseline,
                    "contenders": [r._asdict() for r in results],
                }
            )
    return found


def _notes(options: _Options) -> str:
    step = "a call is a forward in inference mode"
    if options.mode == "training":
        step = "a call is forward, loss, backward, without an optimizer; low dtypes: autocast, float32 parameters"
    where = "the CUDA allocator's" if options.device.type == "cuda" else "torch's CPU allocations, by its profiler"
    freezing = ", freezing on" if options.mode == "inference" and options.device.type == "cpu" else ""
    compile_ = f"; compile: torch.compile{freezing}, channels_last; its first call compiles" if (
        options.compiles
    ) else ""  # fmt: skip
    if options.device.type == "cuda" and options.mode == "inference":
        compile_ += "; captured: resnet_fast.capture; reduce_overhead, max_autotune: modes of torch.compile with graphs"
    if any(name in ENGINES for name in options.against):
        compile_ += "; openvino, onnxruntime: in NCHW, their peaks are not known"
    saved = "; saved: kept for the backward, parameters not counted" if options.mode == "training" else ""
    ratio = "x: median over rounds of the ratio within a round"
    return f"{step}; {ratio}; peak: {where}, above the weights{saved}{compile_}"


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 where the fused network is not equal to torch's (then nothing is timed)."""
    options = _Options(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    progress = Progress()
    count = max(*options.batches, _CHECKED)
    source, x, pictures = arguments.network(
        args.model, args.images, count, options.size, options.device, options.seed, progress
    )
    record = machine.provenance(args.argv)
    record["versions"] |= {name: machine.version_of(name) for name in options.against if name in ENGINES}
    count = sum(p.numel() for p in source.model.parameters())
    weights = "its own weights" if source.own_weights else "random weights, calibrated"
    print(tables.header(record))
    print(f"model    {source.name}, {count / 1e6:.1f} M parameters, {weights}; {options.mode} on {options.device.type}")
    skipped = f" ({pictures.skipped} unreadable files skipped)" if pictures.skipped else ""
    print(f"images   {len(x)} crops of {options.size} x {options.size} from {pictures.source}{skipped}", flush=True)

    rows = _explain(source, x, options)
    print(f"\n{tables.explanation(rows, args.verbose)}", flush=True)
    checks = _checks(source, x, options, progress)
    passed = all(check.ok for check in checks)
    print(f"\n{tables.equality(checks)}", flush=True)
    result: dict[str, Any] = {
        "schema": 1,
        **record,
        "model": {"name": source.name, "parameters": count, "own_weights": source.own_weights, "seed": options.seed},
        "images": {"source": pictures.source, "crops": len(x), "size": options.size, "skipped": pictures.skipped},
        "explain": [row._asdict() for row in rows],
        "equality": [check._asdict() for check in checks],
        "passed": passed,
        "speed": [],
    }
    if passed:
        with timing.empty_cache(options.compiles):
            result["speed"] = _speed(source, x, options, progress)
        print(f"\n{_notes(options)}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not passed:
        wrong = "; ".join(f"{c.mode} {c.dtype} {c.what} ({c.tensor})" for c in checks if not c.ok)
        print(f"resnet-fast: NOT EQUAL to torch: {wrong}. Nothing was timed.", file=sys.stderr)
        return 1
    if options.plot is not None:
        where = record["gpus"][0]["name"] if options.device.type == "cuda" else record["cpu"]
        title = f"{source.name}, {options.mode}, {where}"
        plots.bars(title, result["speed"], options.plot, plots.stamp(record))
    return 0
