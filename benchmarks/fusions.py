"""The kinds of fusion, switched on one after the other: what each adds to a network's speed.

``steps`` lists them from torch's own modules to all of ours; each keeps what the ones before it have. On a CPU
``resnet_fast.switches`` leaves out what comes later; on a GPU the blocks' backends decide (not yet run on a GPU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

import resnet_fast
from resnet_fast import switches
from resnet_fast.commands import timing


class Step(NamedTuple):
    """``fuse`` makes the network of a copy; ``off``: switches that are off; ``graph``: the call is a CUDA graph."""

    name: str
    fuse: Callable[[nn.Module], nn.Module]
    off: tuple[str, ...] = ()
    graph: bool = False


#: Backend, and whether it gets a block, by its name and module.
Part = tuple[str | None, Callable[[str, nn.Module], bool]]


def _fused(*parts: Part) -> Callable[[nn.Module], nn.Module]:
    """fuse() part by part; a block that two parts want is the later one's."""

    def fuse(model: nn.Module) -> nn.Module:
        for backend, wanted in parts:
            resnet_fast.fuse(model, backend=backend, filter_fn=wanted)
        return model

    return fuse


def _any(name: str, module: nn.Module) -> bool:
    return True


def _block(name: str, module: nn.Module) -> bool:
    """Not the stem, whose modules are the network's own."""
    return name != ""


def _whole(name: str, module: Any) -> bool:
    """A bottleneck that one kernel computes in inference (``native.bottleneck_why_not``)."""
    is_bottleneck = _block(name, module) and hasattr(module, "conv3")
    return is_bottleneck and module.conv2.stride == (1, 1) and module.conv1.out_channels in (64, 128)


_PASSES, _STEM = "+ batch norm, add, ReLU in one pass", "+ the stem's, with its max-pool"


def steps(device: str, mode: str) -> list[Step]:
    """On ``device`` "cpu" or "cuda", in ``mode`` "training" or "inference". The names are the bars'."""
    plain = Step("eager, channels_last", _fused())
    if device == "cpu":
        off = tuple(name for name in switches.NAMES if mode == "inference" or name not in ("folding", "programs"))
        found = [plain, Step(_PASSES, _fused((None, _block)), off)]
        every = _fused((None, _any))
        products, winograd = ("+ 1x1 as matrix products", ("products",)), ("+ 3x3 after Winograd", ("winograd",))
        kinds: list[tuple[str, tuple[str, ...]]] = [(_STEM, ()), products, winograd]
        if mode == "inference":  # there convolutions are ours only where they are folded
            few = ("+ few pixels as matrix products", ("products",))
            kinds[1:] = [("+ folded into the convolutions", ("folding",)), winograd, few]
        kinds.append(("+ memory kept" + (", stages as programs" if mode == "inference" else ""), off))
        for name, on in kinds:
            off = tuple(n for n in off if n not in on)
            found.append(Step(name, every, off))
        return found
    passes: Part = (None, _block)
    everything: Part = (None, _any)
    convolutions: Part = ("triton", _block)
    found = [plain, Step(_PASSES, _fused(passes)), Step(_STEM, _fused(everything))]
    if mode == "training":
        last = _fused(everything, convolutions)
        found.append(Step("+ statistics, sums, affines inside the convolutions", last))
    else:
        found.append(Step("+ all of it inside the convolutions", _fused(everything, convolutions)))
        last = _fused(everything, convolutions, ("native", _whole))
        found.append(Step("+ whole bottlenecks in one kernel", last))
    return [*found, Step("+ CUDA graph", last, graph=True)]


def contender(step: Step, model: nn.Module, x: Tensor, setting: timing.Setting) -> timing.Contender:
    """``step`` on a copy of ``model``, to be timed; arguments as for ``timing.contender``."""
    name = "resnet_fast" + (timing.GRAPH if step.graph else "")
    made = timing.contender(name, model, x, setting, step.fuse)
    return timing.Contender(step.name, functools.partial(_without, step.off, made.call))


def _without(off: tuple[str, ...], call: Callable[[], Any]) -> Any:
    with switches.without(*off):
        return call()
