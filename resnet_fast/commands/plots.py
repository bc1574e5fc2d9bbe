"""Pictures: bars of images per second for ``bench``, errors and loss curves for ``verify``, and their parts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CommandError
from .curves import Curves
from .engines import TITLES
from .judging import Check

__all__ = ["bars", "errors", "losses", "require", "save", "stamp"]

#: Colour-blind safe (Okabe and Ito); ours stands out, the others are quiet.
_COLOURS = {
    "eager": "#bbbbbb", "channels_last": "#888888", "compile": "#56b4e9",
    "openvino": "#009e73", "onnxruntime": "#cc79a7", "resnet_fast": "#d55e00",
}  # fmt: skip
_LABELS = {"eager": "eager, NCHW", "channels_last": "eager, channels_last", "compile": "torch.compile", **TITLES}


def require() -> Any:
    """matplotlib.pyplot on its file-only backend, or a CommandError that names the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError(f"a plot needs matplotlib ({error}). Remedy: pip install -e .[bench]") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def bars(title: str, settings: Sequence[dict[str, Any]], file: str | Path, line: str) -> None:
    """Draw the "speed" entries of a bench JSON: a panel each, as scales differ; img/s and ratio on the bars.

    ``line``: where the numbers come from (``stamp``).
    """
    plt = require()
    columns = min(4, len(settings))
    lines = -(-len(settings) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(max(4.6, 3.1 * columns), 3.3 * lines + 0.9), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for panel in panels[len(settings) :]:
        panel.set_axis_off()
    for panel, setting in zip(panels, settings, strict=False):
        entries = [c for c in setting["contenders"] if c["failed"] is None]
        speeds = [c["images_per_second"] for c in entries]
        drawn = panel.bar(range(len(entries)), speeds, color=[_COLOURS.get(c["name"], "#009e73") for c in entries])
        texts = [f"{_speed(c['images_per_second'])}\n{c['ratio']:.2f}x" for c in entries]
        panel.bar_label(drawn, texts, fontsize=9, padding=2)
        panel.set_ylim(0, max(speeds) * 1.25)
        panel.set_xticks([])
        panel.set_title(f"{setting['dtype']}, batch {setting['batch']}", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("images per second")
    names = list(dict.fromkeys(c["name"] for s in settings for c in s["contenders"]))
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS.get(name, "#009e73")) for name in names]
    figure.legend(
        handles, [_LABELS.get(n, n) for n in names], loc="outside lower center", ncols=max(2, columns), frameon=False
    )
    width = figure.get_figwidth()
    base = settings[0]["baseline"]
    ratio = f"x: ratio to {_LABELS.get(base, base)}, median over rounds"
    figure.suptitle(textwrap.fill(title, int(10 * width)), fontsize=12)
    save(figure, file, f"{ratio}\n{textwrap.fill(line, int(15 * width))}")


def _speed(value: float) -> str:
    """Images per second as on a bar: 2,438 or 27.5."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def stamp(record: dict[str, Any]) -> str:
    """Where a picture's numbers come from, in a line: machine, versions, commit, date (of ``machine.provenance``)."""
    gpu = f"{record['gpus'][0]['name']}, " if record["gpus"] else ""
    threads = f"{record['cpu']}, {record['threads']} threads"
    versions = f"torch {record['versions']['torch']}, resnet_fast {record['versions']['resnet_fast']}"
    return f"{gpu}{threads}; {versions}, commit {record['commit']}, {record['date'][:10]}"


def save(figure: Any, file: str | Path, line: str) -> None:
    """Write the picture, with ``line`` below it: where its numbers come from."""
    if figure.legends:  # also below: one layout for both
        figure.legends[0].set_title(line, prop={"size": 7.5})
    else:
        figure.supxlabel(line, fontsize=7.5, color="#555555")
    figure.savefig(file, dpi=130)
    require().close(figure)


_CURVES = {
    "float64": ("#000000", "-"),
    "torch": ("#56b4e9", "-"),
    "torch_nchw": ("#009e73", "--"),
    "ours": ("#d55e00", ":"),
}
_CURVE_NAMES = {"torch": "torch, channels_last", "torch_nchw": "torch, NCHW", "ours": "resnet_fast"}


def losses(panel: Any, below: Any, curves: Curves) -> None:
    """The loss of each contender by step, and in ``below`` how far each is from float64's, on a log scale."""
    steps = range(1, len(curves.float64) + 1)
    for name, (colour, style) in _CURVES.items():
        values = getattr(curves, name)
        wide = 3 if name == "float64" else 2
        panel.plot(steps, values, style, color=colour, linewidth=wide, label=_CURVE_NAMES.get(name, name))
        if name != "float64":
            apart = [max(abs(a - b), 1e-17) for a, b in zip(values, curves.float64, strict=True)]
            below.plot(steps, apart, style, color=colour, linewidth=2)
    for i, values in enumerate(curves.nearby):
        apart = [max(abs(a - b), 1e-17) for a, b in zip(values, curves.float64, strict=True)]
        label = "float64, weights rounded otherwise" if i == 0 else None
        below.plot(steps, apart, "-", color="#bbbbbb", linewidth=1.5, label=label, zorder=0)
    panel.set_title(f"loss, {curves.dtype}", fontsize=11)
    panel.set_ylabel("loss")
    below.set_ylabel("|loss - float64's|")
    below.set_yscale("log")
    below.set_xlabel("step")
    panel.legend(fontsize=8, frameon=False)
    below.legend(fontsize=8, frameon=False)
    for axes in (panel, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)


def errors(
    title: str,
    sections: Sequence[tuple[str, Sequence[Check]]],
    curves: Sequence[Curves],
    line: str,
    file: str | Path,
) -> None:
    """Each check's error in parts of its bound (right of 1: wrong), a strip a kind of number; then the loss curves."""
    plt = require()
    strips: dict[str, list[Check]] = {}
    for name, checks in sections:
        for c in checks:
            if name not in ("determinism", "losses") and c.what != "error":
                strips.setdefault(f"{name}: {c.dtype} {c.mode}, {c.what}", []).append(c)
    height = max(3.2, 0.24 * len(strips) + 1.2)
    together = list(dict.fromkeys(name.partition(",")[0] for name in strips))  # a section's dtype and mode
    strips = dict(sorted(strips.items(), key=lambda item: together.index(item[0].partition(",")[0])))
    rows = [height, *([2.6, 2.0] if curves else [])]
    figure = plt.figure(figsize=(9.5, sum(rows) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(rows), max(len(curves), 1), height_ratios=rows)
    panel = figure.add_subplot(grid[0, :])
    for y, checks in enumerate(strips.values()):
        for who, colour, marker in (("torch", "#56b4e9", "|"), ("ours", "#d55e00", ".")):
            shares = [getattr(c, who) / c.bound if c.bound else float(getattr(c, who) > 0) for c in checks]
            panel.plot([min(max(s, 1e-3), 1e3) for s in shares], [y] * len(shares), marker, color=colour, alpha=0.6)
    panel.axvline(1, color="#000000", linewidth=1)
    panel.set_xscale("log")
    ticks = [t for t in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3) if t <= max(1.0, panel.get_xlim()[1])]
    panel.set_xticks(ticks, ["0 to 0.001", *(f"{t:g}" for t in ticks[1:])])
    panel.set_yticks(range(len(strips)), list(strips), fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(
        "max error against float64, in parts of the bound (2 x torch's own + 4 roundings); right of 1: wrong"
    )
    panel.grid(axis="x", alpha=0.25)
    handles = [
        plt.Line2D([], [], color="#d55e00", marker=".", linestyle="", label="resnet_fast"),
        plt.Line2D([], [], color="#56b4e9", marker="|", linestyle="", label="torch, same dtype"),
        plt.Line2D([], [], color="#000000", label="the bound"),
    ]
    panel.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)
    for i, curve in enumerate(curves):
        losses(figure.add_subplot(grid[1, i]), figure.add_subplot(grid[2, i]), curve)
    figure.suptitle(textwrap.fill(title, 90), fontsize=12)
    save(figure, file, line)
