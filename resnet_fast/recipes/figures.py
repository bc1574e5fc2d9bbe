"""The figures: a run's curves, and the analyses in the manner of the paper's figures 4, 6 and 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_fast.commands import CommandError, plots

__all__ = ["curves", "degradation", "gradients", "losses", "require", "responses"]

#: Okabe and Ito's colours, by depth.
_COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#0072b2")


def require() -> Any:
    """matplotlib.pyplot, or a CommandError that names the extra."""
    try:
        return plots.require()
    except CommandError as error:
        raise CommandError(str(error).replace("[bench]", "[recipes]")) from error


def _figure(columns: int, rows: int = 1, height: float = 4.0) -> tuple[Any, Any, list[Any]]:
    plt = require()
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.8 * columns, height * rows), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return plt, figure, panels


def _save(plt: Any, figure: Any, title: str, file: Path) -> None:
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def curves(title: str, rows: Sequence[Mapping[str, float]], file: Path) -> None:
    """Loss and top-1 error by epoch, of training (thin) and of the test or validation (bold)."""
    plt, figure, (left, right) = _figure(2)
    epochs = [row["epoch"] for row in rows]
    for name, label, style in (
        ("train", "training", {"lw": 1, "color": "#888888"}),
        ("validation", "validation", {"lw": 2, "color": "#56b4e9"}),
        ("test", "test", {"lw": 2, "color": "#d55e00"}),
    ):
        if f"{name}_loss" not in rows[0]:
            continue
        marker = "o" if len(rows) == 1 else None
        left.plot(epochs, [row[f"{name}_loss"] for row in rows], label=label, marker=marker, **style)
        right.plot(epochs, [100 - row[f"{name}_top1"] for row in rows], label=label, marker=marker, **style)
    for panel, what in ((left, "loss"), (right, "top-1 error, %")):
        panel.set_xlabel("epoch")
        panel.set_ylabel(what)
        panel.set_ylim(bottom=0)
    left.legend(frameon=False)
    _save(plt, figure, title, file)


def degradation(title: str, runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Like figures 4 and 6: training error (thin) and test error (bold) by iteration, plain nets left of residual ones.

    ``runs``: "kind" ("plain" or "residual"), "depth", "shortcut" and "rows". A third panel has options A, B and C.
    """
    depths = sorted({r["depth"] for r in runs})
    options = [r for r in runs if r["kind"] == "residual" and r["shortcut"] != "A"]
    plt, figure, panels = _figure(3 if options else 2)
    colour = dict(zip(depths, _COLOURS * 2, strict=False))
    for run in runs:
        if run["shortcut"] in ("B", "C"):
            continue
        panel = panels[0] if run["kind"] == "plain" else panels[1]
        _errors(panel, run, f"{run['kind']}-{run['depth']}", colour[run["depth"]])
    panels[0].set_title("plain", fontsize=10)
    panels[1].set_title("residual", fontsize=10)
    if options:
        depth = options[0]["depth"]
        same = [r for r in runs if r["kind"] == "residual" and r["depth"] == depth]
        for run, c in zip(same, _COLOURS[1:], strict=False):
            _errors(panels[2], run, f"option {run['shortcut']}", c)
        panels[2].set_title(f"residual-{depth}, shortcut options", fontsize=10)
    for panel in panels:
        panel.set_xlabel("iteration")
        panel.set_ylabel("error, %   (thin: training, bold: test)")
        panel.set_ylim(0, 100)
        panel.legend(frameon=False, fontsize=8)
    _save(plt, figure, title, file)


def _errors(panel: Any, run: Mapping[str, Any], label: str, colour: str) -> None:
    rows = run["rows"]
    x = [row["iteration"] for row in rows]
    panel.plot(x, [100 - row["train_top1"] for row in rows], color=colour, lw=0.9, alpha=0.8)
    panel.plot(x, [100 - row["test_top1"] for row in rows], color=colour, lw=2, label=label)


def responses(title: str, nets: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Like figure 7: standard deviation of each layer's response, in order of the layers and of magnitude.

    ``nets``: "kind", "depth" and "std" (a list).
    """
    plt, figure, panels = _figure(1, 2, 3.0)
    figure.set_size_inches(8, 6.5)
    depths = sorted({net["depth"] for net in nets})
    colour = dict(zip(depths, _COLOURS, strict=False))
    for net in nets:
        style = {"color": colour[net["depth"]], "ls": "--" if net["kind"] == "plain" else "-", "lw": 1.5}
        name = f"{net['kind']}-{net['depth']}"
        panels[0].plot(range(1, len(net["std"]) + 1), net["std"], label=name, **style)
        panels[1].plot(range(1, len(net["std"]) + 1), sorted(net["std"], reverse=True), label=name, **style)
    panels[0].set_xlabel("layer, in order")
    panels[1].set_xlabel("layer, sorted by magnitude")
    values = [v for net in nets for v in net["std"]]
    for panel in panels:
        panel.set_ylabel("std of response")
        if max(values) > 8 * min(values):
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    _save(plt, figure, title, file)


def gradients(title: str, nets: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Gradient norm of each convolution's weight, by layer: with and without shortcuts, and by shortcut option.

    ``nets``: "kind", "depth", "shortcut" and "norm" (a list).
    """
    main = [n for n in nets if n["shortcut"] in ("A", None)]
    options = [n for n in nets if n["shortcut"] in ("A", "B", "C") and n["depth"] == nets[-1]["depth"]]
    compared = any(n["shortcut"] != "A" for n in options)
    plt, figure, panels = _figure(2 if compared else 1)
    depths = sorted({net["depth"] for net in main})
    colour = dict(zip(depths, _COLOURS * 2, strict=False))
    for net in main:
        style = "--" if net["kind"] == "plain" else "-"
        layers = range(1, len(net["norm"]) + 1)
        panels[0].plot(layers, net["norm"], style, color=colour[net["depth"]], label=f"{net['kind']}-{net['depth']}")
    if compared:
        for net, c in zip(options, _COLOURS[1:], strict=False):
            panels[1].plot(range(1, len(net["norm"]) + 1), net["norm"], color=c, label=f"option {net['shortcut']}")
        panels[1].set_title(f"residual-{options[0]['depth']}, shortcut options", fontsize=10)
    for panel in panels:
        panel.set_yscale("log")
        panel.set_xlabel("convolution, from the input")
        panel.set_ylabel("norm of the weight's gradient")
        panel.legend(frameon=False, fontsize=8)
    _save(plt, figure, title, file)


def losses(title: str, sets: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Loss by iteration, fused over plain, a panel for each of ``sets``; below, the relative difference to plain.

    Each has "name", "plain", "fused" and "layout" (lists; the last is plain in the other memory layout), and "others":
    further plain runs, of other seeds.
    """
    columns = 3
    rows = -(-len(sets) // columns)
    plt, figure, panels = _figure(columns, 2 * rows, 2.8)
    for i, s in enumerate(sets):
        top = panels[2 * columns * (i // columns) + i % columns]
        bottom = panels[2 * columns * (i // columns) + columns + i % columns]
        steps = range(1, len(s["plain"]) + 1)
        for j, other in enumerate(s["others"]):
            top.plot(steps, other, color="#cccccc", lw=1, label="plain, other seeds" if j == 0 else None)
        top.plot(steps, s["plain"], color="#56b4e9", lw=3, label="plain")
        top.plot(steps, s["fused"], color="#d55e00", lw=1.2, label="fused")
        top.set_title(s["name"], fontsize=10)
        top.set_ylabel("loss")
        top.legend(frameon=False, fontsize=8)
        for key, colour, label in (("layout", "#999999", "plain in NCHW"), ("fused", "#d55e00", "fused")):
            difference = [max(abs(f - p) / p, 1e-9) for f, p in zip(s[key], s["plain"], strict=True)]
            bottom.semilogy(steps, difference, color=colour, lw=1.2, label=label)
        bottom.axhline(1e-3, color="#888888", lw=1, ls=":")
        bottom.set_ylabel("difference / plain loss")
        bottom.set_xlabel("iteration")
        bottom.legend(frameon=False, fontsize=8, loc="lower right")
    for unused in range(len(sets), rows * columns):
        for row in (2 * (unused // columns), 2 * (unused // columns) + 1):
            panels[columns * row + unused % columns].set_axis_off()
    _save(plt, figure, title, file)
