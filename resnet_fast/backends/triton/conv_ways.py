"""The ways to run a convolution on this backend, as a table of measurements names them, and the one in force.

A configuration gives each direction ("fprop", "dgrad", "wgrad", and "shared", dgrad and wgrad in one) its way:
"library", the library's convolution between our kernels; or a tile, [rows, columns, depth, warps, stages, per_sm].
Before a tile may stand "written": lazy operands are written out first; and for fprop "descriptor": operands are loaded
through tensor descriptors. What a configuration does not name runs as by default.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import conv_descriptor, conv_dgrad, conv_fprop, conv_pointwise, conv_wgrad
from .conv_common import Config, Geometry, geometry_of, unsupported

__all__ = ["USUAL", "Way", "configurations", "parsed", "way", "why_unsupported", "within"]


class Way(NamedTuple):
    """How one direction runs; without a tile, by the usual one of its shape."""

    library: bool = False
    written: bool = False
    descriptor: bool = False
    tile: Config | None = None

    @property
    def apart(self) -> bool:
        """Lazy operands are written out first."""
        return self.library or self.written


USUAL = Way()
_in_force: contextvars.ContextVar[Mapping[str, Way]] = contextvars.ContextVar("resnet_fast_conv_ways")
#: Directions of the ops that can be configured.
_DIRECTIONS: dict[str, tuple[str, ...]] = {
    "conv_stats": ("fprop",),
    "conv_backward": ("dgrad", "wgrad", "shared"),
    "conv_backward_sums": ("dgrad", "wgrad", "shared"),
}
_TILES = {
    "fprop": conv_fprop.CONFIGS,
    "dgrad": conv_dgrad.CONFIGS,
    "wgrad": conv_wgrad.CONFIGS,
    "shared": conv_pointwise.CONFIGS,
    "descriptor": conv_descriptor.CONFIGS,
}
#: Words that may stand before a tile, in this order.
_WORDS: dict[str, tuple[str, ...]] = {"fprop": ("written", "descriptor"), "dgrad": ("written",), "wgrad": ("written",)}


def way(direction: str) -> Way:
    """How ``direction`` runs here and now."""
    return _in_force.get({}).get(direction, USUAL)


def _parsed(direction: str, value: Any) -> Way:
    """Raises ValueError for what no table of this version says: nothing unknown reaches a compiler."""
    if value == "library" and direction != "shared":
        return Way(library=True)
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    words = [numbers.pop(0) for word in _WORDS.get(direction, ()) if numbers[:1] == [word]]
    if len(numbers) == len(Config._fields) and all(isinstance(n, int) for n in numbers):
        tile = Config(*numbers)
        kind = tile._replace(columns=0, depth=0) if direction == "shared" else tile  # there they are the shape's
        if kind in _TILES["descriptor" if "descriptor" in words else direction].values():
            return Way(written="written" in words, descriptor="descriptor" in words, tile=tile)
    raise ValueError(f"{direction}: found {value!r}, supported are 'library' and the tiles of CONFIGS")


def parsed(op: str, config: Mapping[str, Any]) -> dict[str, Way]:
    """The ways of ``op`` that ``config`` names. Raises ``ValueError`` for one that is not known."""
    if op not in _DIRECTIONS or (unknown := set(config) - set(_DIRECTIONS[op])):
        raise ValueError(f"{op} has no directions {sorted(unknown) if op in _DIRECTIONS else sorted(config)}")
    return {direction: _parsed(direction, value) for direction, value in config.items()}


def within(ways: Mapping[str, Way], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``ways`` in force."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        token = _in_force.set(ways)
        try:
            return function(*args, **kwargs)
        finally:
            _in_force.reset(token)

    return run


def _geometry(arguments: Mapping[str, Any]) -> Geometry | None:
    x, w = arguments["x"], arguments["w"]
    conv = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    return geometry_of(list(x.shape), list(w.shape), *conv)


def why_unsupported(op: str, **arguments: Any) -> str | None:
    """Why our kernels do not run this call's convolution, so that the library's does; or None."""
    conv = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    return unsupported(list(arguments["x"].shape), list(arguments["w"].shape), *conv)


def configurations(op: str, **arguments: Any) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """What to measure for this call: whole configurations to begin with, the usual one first, and options by direction.

    Nothing to choose from where the geometry is the library's.
    """
    geometry = _geometry(arguments) if op in _DIRECTIONS else None
    if geometry is None:
        return [], {}
    dtype: torch.dtype = arguments["x"].dtype
    lazy_x = arguments.get("scale") is not None
    lazy_g = arguments.get("y") is not None
    needed: dict[str, bool] = {"fprop": lazy_x}
    if op != "conv_stats":
        needed = {}
        if arguments.get("needs_x", True):
            needed["dgrad"] = lazy_g
        if arguments["needs_w"]:
            needed["wgrad"] = lazy_g or lazy_x
    masked = arguments.get("gscale") is not None
    crowded = masked and arguments.get("residual") is not None
    options: dict[str, Callable[[bool], list[Config]]] = {
        "fprop": lambda lazy: conv_fprop.options(geometry, dtype, lazy),
        "dgrad": lambda lazy: conv_dgrad.options(geometry, dtype, lazy, crowded and lazy),
        "wgrad": lambda lazy: conv_wgrad.options(geometry, dtype, lazy),
    }
    axes: dict[str, list[Any]] = {}
    for direction, lazy in needed.items():
        axes[direction] = [list(tile) for tile in options[direction](lazy)]
        if lazy:
            axes[direction] += [["written", *tile] for tile in options[direction](False)]
        axes[direction].append("library")
    if op == "conv_stats":
        for tile in conv_descriptor.options(geometry, dtype, arguments["x"].device):
            axes["fprop"] += [["descriptor", *tile], *([["written", "descriptor", *tile]] if lazy_x else [])]
    # One direction alone gains little from an operand that is written out for it: both at once are a beginning.
    starts = [{d: found[0] for d, found in axes.items()}]
    if any(needed.values()):
        written = {d: next((o for o in found if o[0] == "written"), found[0]) for d, found in axes.items()}
        starts.append(written)
    starts.append(dict.fromkeys(axes, "library"))
    if "dgrad" in axes and "wgrad" in axes:
        # The other two go by it, so that its way is one by itself.
        tiles = conv_pointwise.options(geometry, dtype, arguments["x"].device, masked)
        starts += [{"shared": list(tile)} for tile in tiles]
    return starts, axes
