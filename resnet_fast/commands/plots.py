"""Bars of images per second, one group a setting: for ``bench --plot`` and for benchmarks/report.py."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CommandError

__all__ = ["bars", "require"]

#: Colour-blind safe (Okabe and Ito); ours stands out, the others are quiet.
_COLOURS = {"eager": "#bbbbbb", "channels_last": "#888888", "compile": "#56b4e9", "resnet_fast": "#d55e00"}
_LABELS = {"eager": "eager, NCHW", "channels_last": "eager, channels_last", "compile": "torch.compile"}


def require() -> Any:
    """matplotlib.pyplot on its file-only backend, or a CommandError that names the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError(f"a plot needs matplotlib ({error}). Remedy: pip install -e .[bench]") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def bars(title: str, settings: Sequence[dict[str, Any]], file: str | Path) -> None:
    """Draw the "speed" entries of a bench JSON: a panel each, as scales differ; img/s and ratio on the bars."""
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
        texts = [f"{c['images_per_second']:.3g}\n{c['ratio']:.2f}x" for c in entries]
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
    figure.suptitle(textwrap.fill(title, 36 * columns), fontsize=12)
    figure.savefig(file, dpi=130)
    plt.close(figure)
