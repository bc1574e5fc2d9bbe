"""Pictures of ``benchmarks.suite``'s results: speed by batch, each layer's share of its bound, memory, fusions.

Each function draws what a result holds of its kind into a file, with a line that says where the numbers come from, and
returns whether there was anything to draw.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from resnet_fast.commands import plots
from resnet_fast.commands.engines import TITLES
from resnet_fast.commands.timing import GRAPH

Record = dict[str, Any]

_COLOURS = {
    "openvino": "#009e73", "onnxruntime": "#cc79a7",
    "eager": "#bbbbbb", "channels_last": "#777777", "compile": "#56b4e9", "compile_max": "#0072b2",
    "compile_frozen": "#0072b2", "reduce_overhead": "#56b4e9", "max_autotune": "#0072b2", "captured": "#d55e00",
    "tuned": "#d55e00", "resnet_fast:native": "#d55e00", "resnet_fast:triton": "#e69f00",
    "resnet_fast": "#d55e00", "native": "#d55e00", "triton": "#e69f00", "onednn": "#cc79a7", "cudnn": "#009e73",
    "cudnn-frontend": "#0072b2",
}  # fmt: skip
_LABELS = {
    **TITLES,
    "eager": "eager, NCHW", "channels_last": "eager, channels_last", "compile": "torch.compile",
    "compile_max": "torch.compile, max-autotune", "compile_frozen": "torch.compile, max-autotune, freezing",
    "reduce_overhead": "torch.compile, reduce-overhead, CUDA graph",
    "max_autotune": "torch.compile, max-autotune, CUDA graph", "captured": "resnet_fast, capture()",
    "tuned": "resnet_fast, warmup()",
    "resnet_fast:triton": "resnet_fast, Triton alone", "resnet_fast:native": "resnet_fast, our C++ alone",
}  # fmt: skip
_OPS = {
    "conv_stats": "convolution + statistics", "conv_backward": "both gradients of a convolution",
    "conv_backward_sums": "both gradients of a convolution + the previous norm's sums",
    "conv_dgrad": "gradient of x", "conv_wgrad": "gradient of w",
    "conv_affine_act": "convolution + affine + add + ReLU",
    "affine_act_mask": "affine + add + ReLU + mask", "affine_act_backward": "its backward, with sums",
    "bn_stats": "statistics", "bn_backward_sums": "sums of the batch norm's backward",
    "bn_backward_apply": "the batch norm's backward", "affine_act_maxpool": "affine + ReLU + max-pool",
    "maxpool_backward_sums": "max-pool's backward, sums", "maxpool_backward_apply": "max-pool's backward",
}  # fmt: skip


def label(contender: str) -> str:
    """Its name in a legend."""
    kind = contender.removesuffix(GRAPH)
    return _LABELS.get(kind, kind) + (", CUDA graph" if contender.endswith(GRAPH) else "")


def _colour(contender: str) -> str:
    return _COLOURS.get(contender.removesuffix(GRAPH), "#000000")


def machine(result: Record) -> str:
    """The device that was measured."""
    return str(result["gpus"][0]["name"]) if on_gpu(result) else f"{result['cpu']}, {result['threads']} threads"


def on_gpu(result: Record) -> bool:
    """Whether a suite's result was measured on a GPU: it has one, and says so in its command."""
    return bool(result["gpus"]) and "--device cpu" not in result["command"]


def _grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        found.setdefault(tuple(r[k] for k in keys), []).append(r)
    return found


def _grid(plt: Any, panels: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(6.0, width * columns), height * rows + 1.3), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for axis in flat[panels:]:
        axis.set_axis_off()
    return figure, flat[:panels]


def _finish(figure: Any, title: str, handles: Sequence[Any], result: Record, parts: Sequence[str], file: Path) -> None:
    """Title, legend and where the numbers come from: the commit and the date of the first of ``parts`` there is."""
    run = next((result["runs"][part] for part in parts if part in result.get("runs", {})), {})
    width = int(figure.get_figwidth() * 10)
    figure.suptitle(textwrap.fill(title, width), fontsize=12)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    plots.save(figure, file, textwrap.fill(plots.stamp({**result, **run}), int(width * 1.5)))


def _by_speed(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Images per second by contender and batch: the best where a contender was timed in several groups."""
    found: dict[str, dict[int, float]] = {}
    for r in records:
        line = found.setdefault(r["contender"], {})
        line[r["batch"]] = max(r["images_per_second"], line.get(r["batch"], 0.0))
    return found


def speed(result: Record, file: Path) -> bool:
    """Images per second against the batch; a panel for each network, mode and dtype with more than one batch."""
    timed = [r for r in result["records"] if r.get("images_per_second")]
    panels = {
        key: _by_speed(group)
        for key, group in _grouped(timed, "network", "mode", "dtype").items()
        if len({r["batch"] for r in group}) > 1
    }
    if not panels:
        return False
    plt = plots.require()
    figure, axes = _grid(plt, len(panels), 2, 5.2, 3.6)
    seen: dict[str, Any] = {}
    for axis, ((network, mode, dtype), lines) in zip(axes, panels.items(), strict=True):
        batches = sorted({batch for line in lines.values() for batch in line})
        for name, line in lines.items():
            xs = sorted(line)
            style = "--" if name.endswith(GRAPH) else "-"
            (seen[name],) = axis.plot(
                xs, [line[x] for x in xs], style, marker="o", markersize=4, color=_colour(name), label=label(name)
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.minorticks_off()
        axis.set_ylim(0)
        axis.set_title(f"{network}, {mode}, {dtype}", fontsize=11)
        axis.set_xlabel("images a batch")
        axis.set_ylabel("images per second")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(
        figure, f"Images per second, {machine(result)}", list(seen.values()), result, ("training", "inference"), file
    )
    return True


def layers(result: Record, file: Path) -> bool:
    """Each layer's least time by its bound, in per cent of the time measured: bars by op, layer and backend."""
    timed = [r for r in result["records"] if r.get("share")]
    dtype = next((r["dtype"] for r in timed), None)
    panels = _grouped([r for r in timed if r["dtype"] == dtype], "op")
    if not panels:
        return False
    plt = plots.require()
    figure, axes = _grid(plt, len(panels), 1, 12.5, 2.5)
    seen: dict[str, Any] = {}
    for axis, ((op,), group) in zip(axes, panels.items(), strict=True):
        cases = list(dict.fromkeys(r["case"] for r in group))
        names = list(dict.fromkeys(r["contender"] for r in group))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            shares = {r["case"]: 100 * r["share"] for r in group if r["contender"] == name}
            at = [cases.index(c) + (i - (len(names) - 1) / 2) * width for c in shares]
            colour = "#777777" if name == "eager" else _colour(name)
            text = "plain torch" if name == "eager" else name
            seen[text] = axis.bar(at, list(shares.values()), width, color=colour, label=text)
        axis.axhline(100, color="#000000", linewidth=0.8)
        axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
        axis.set_xlim(-0.6, len(cases) - 0.4)
        axis.set_ylabel("% of the bound")
        axis.set_title(f"{op}: {_OPS.get(op, op)}", fontsize=10, loc="left")
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    batch = timed[0]["batch"]
    rates = result["ceilings"]
    bound = f"a copy of {rates['copy'] / 1e9:,.0f} GB/s and a product of {rates['product'] / 1e12:,.2f} TFLOP/s"
    title = f"ResNet-50's layers, batch {batch}, {dtype}, {machine(result)}: least time, by {bound}, in % of measured"
    title += "; beyond 100 %: data from a cache, or Winograd's fewer products"
    _finish(figure, title, list(seen.values()), result, ("ops",), file)
    return True


def memory(result: Record, file: Path) -> bool:
    """Peak memory of a training step and what of it is kept for the backward, by batch; the largest batch that fits."""
    found = [r for r in result["records"] if "memory" in r]
    peaks = _grouped([r for r in found if r["memory"] == "training" and r["peak_bytes"]], "network")
    largest = [r for r in found if r["memory"] == "largest batch"]
    if not peaks:
        return False
    plt = plots.require()
    figure, axes = _grid(plt, len(peaks) + bool(largest), 3, 4.2, 3.6)
    for axis, ((network,), group) in zip(axes, peaks.items(), strict=False):
        batches = sorted({r["batch"] for r in group})
        for i, name in enumerate(dict.fromkeys(r["contender"] for r in group)):
            mine = {r["batch"]: r for r in group if r["contender"] == name}
            at = [batches.index(b) + (i - 0.5) * 0.4 for b in mine]
            bars = axis.bar(at, [r["peak_bytes"] / 2**30 for r in mine.values()], 0.38, color=_colour(name))
            axis.bar_label(bars, fmt="%.2f", fontsize=8)
            kept = [r["saved_bytes"] / 2**30 for r in mine.values()]
            axis.bar(at, kept, 0.38, color="none", edgecolor="#000000", hatch="///", linewidth=0.6)
        axis.set_xticks(range(len(batches)), [str(b) for b in batches])
        axis.set_xlabel("images a batch")
        axis.set_ylabel("GiB above the weights")
        axis.margins(y=0.12)
        axis.set_title(f"{network}, training, {group[0]['dtype']}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if largest:
        axis = axes[-1]
        names = [f"{r['network']}\n{label(r['contender'])}" for r in largest]
        bars = axis.bar(
            range(len(names)), [r["batch"] for r in largest], 0.6, color=[_colour(r["contender"]) for r in largest]
        )
        axis.bar_label(bars, fontsize=9)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel("images a batch")
        limit = largest[0]["limit"]
        size = f"{limit / 2**30:g} GiB" if limit >= 2**30 else f"{limit / 2**20:g} MiB"
        axis.set_title(f"largest batch within {size}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=_colour(name), label=label(name))
        for name in dict.fromkeys(r["contender"] for r in found)
    ]
    handles.append(
        plt.Rectangle((0, 0), 1, 1, fill=False, hatch="///", linewidth=0.6, label="of it kept for the backward")
    )
    _finish(figure, f"Peak memory of a training step, {machine(result)}", handles, result, ("memory",), file)
    return True


def fusions(result: Record, file: Path) -> bool:
    """A waterfall: the time of a call (p20) as one kind of fusion after the other is switched on."""
    found = _grouped([r for r in result["records"] if r.get("group") == "fusions" and "ms_p20" in r], "mode")
    if not found:
        return False
    plt = plots.require()
    figure, axes = _grid(plt, len(found), 1, 9.5, 3.9)
    for axis, ((mode,), group) in zip(axes, found.items(), strict=True):
        times = [r["ms_p20"] for r in group]  # steps are small beside what a busy machine adds to a median
        axis.bar(0, times[0], 0.6, color="#777777")
        for i in range(1, len(times)):
            before, after = times[i - 1], times[i]
            colour = "#009e73" if after <= before else "#cc3311"
            axis.bar(i, abs(before - after), 0.6, bottom=min(before, after), color=colour)
            text = f"{after - before:+,.3g} ms\n{times[0] / after:.2f}x"
            axis.text(i, max(before, after), text, ha="center", va="bottom", fontsize=8)
            axis.plot([i - 1.3, i + 0.3], [before] * 2, color="#999999", linewidth=0.7)
        axis.plot([len(times) - 1.3, len(times) + 0.3], [times[-1]] * 2, color="#999999", linewidth=0.7)
        axis.bar(len(times), times[-1], 0.6, color="#d55e00")
        for at, value in ((0, times[0]), (len(times), times[-1])):
            text = f"{value:,.4g} ms\n{times[0] / value:.2f}x"
            axis.text(at, value, text, ha="center", va="bottom", fontsize=8)
        names = [textwrap.fill(r["contender"], 17) for r in group] + ["all of it"]
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(0, max(times) * 1.18)
        axis.set_ylabel("ms a call")
        first = group[0]
        axis.set_title(f"{first['network']}, {mode}, {first['dtype']}, batch {first['batch']}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    title = f"One kind of fusion after the other switched on, {machine(result)}: ms saved, and speed-up so far (p20)"
    _finish(figure, title, [], result, ("fusions",), file)
    return True


#: By the ending of the file's name.
FIGURES: dict[str, Callable[[Record, Path], bool]] = {
    "speed": speed,
    "layers": layers,
    "memory": memory,
    "fusions": fusions,
}


def draw(result: Record, folder: Path, stem: str) -> list[str]:
    """Every picture that ``result`` has numbers for, as folder/stem-KIND.png; returns the files' names."""
    return [f"{stem}-{kind}.png" for kind, figure in FIGURES.items() if figure(result, folder / f"{stem}-{kind}.png")]
