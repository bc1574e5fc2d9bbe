"""Contenders and how they are timed: in turns within one run, each a median over rounds.

The CUDA part (events around each turn, one synchronisation a turn) is not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import buffers

from .engines import ENGINES, Engine
from .judging import name_of
from .progress import Progress
from .steps import LOSS_SCALE, autocast, in_layout, loss, tensors

__all__ = [
    "AGAINST",
    "CAPTURED",
    "GRAPH",
    "GRAPHED",
    "TUNED",
    "Contender",
    "Result",
    "Setting",
    "attempt",
    "contender",
    "contenders",
    "empty_cache",
    "measure",
    "memory",
    "quantile",
    "saved",
]

#: What ours can be timed against, in the order of the table.
AGAINST = ("eager", "channels_last", "compile", "reduce_overhead", "max_autotune", *ENGINES)
#: Those of it that replay CUDA graphs of their own making.
GRAPHED = ("reduce_overhead", "max_autotune")
#: Ours by ``resnet_fast.capture``, the copy of the input into its buffer included.
CAPTURED = "captured"
#: Ours after ``resnet_fast.warmup`` of the same network and size.
TUNED = "tuned"
#: What follows a contender's name where its call is a CUDA graph.
GRAPH = "+graph"

#: A turn lasts at least this long (s): short calls are repeated, so that a clock's and a cold cache's part is small.
_TURN = 0.1
_FEWEST, _MOST = 5, 100  # rounds, where the time does not decide


class Setting(NamedTuple):
    """What is timed: ``mode`` "inference" or "training", batch of (3, size, size) images, dtype, device."""

    mode: str
    batch: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> str:
        return name_of(self.dtype)


class Contender(NamedTuple):
    """``call()`` runs one forward, or one training step without the optimizer's part (the same for all)."""

    name: str
    call: Callable[[], Any]


class Result(NamedTuple):
    """One contender in one setting.

    ``ms``: p20, p50, p80 of one call, over ``rounds`` turns of ``calls`` calls. ``ratio``: the median over rounds of
    the baseline's time by this one's in the same round. ``peak``: bytes (see :func:`memory`). ``saved``: bytes kept for
    the backward of a training step (see :func:`saved`). ``first``: seconds of the first call, compilation in it.
    ``failed``: why there are no numbers.
    """

    name: str
    ms: tuple[float, float, float] | None = None
    images_per_second: float | None = None
    ratio: float | None = None
    peak: int | None = None
    saved: int | None = None
    first: float | None = None
    rounds: int = 0
    calls: int = 0
    failed: str | None = None


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile, 0..1, interpolated linearly."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(model: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, setting: Setting) -> Callable[[], Any]:
    """Forward, loss, backward; gradients are dropped, as by ``optimizer.zero_grad()``."""
    parameters = list(model.parameters())
    scale = LOSS_SCALE.get(setting.dtype, 1.0)

    def call() -> Tensor:
        for p in parameters:
            p.grad = None
        with autocast(setting.device, setting.dtype):
            output = forward(x)
        value = loss(output) * scale
        value.backward()
        return value.detach()

    return call


def attempt(name: str, make: Callable[[], Contender]) -> Contender:
    """What ``make`` makes; where that raises, a contender of this name whose call raises it: reported as failed."""
    try:
        return make()
    except Exception as error:
        reason = error

        def call() -> None:
            raise reason

        return Contender(name, call)


def contenders(model: nn.Module, x: Tensor, setting: Setting, against: Sequence[str]) -> list[Contender]:
    """Ours and every name of ``against``, each on a copy of ``model``; ``x`` (batch, 3, size, size) float32.

    Ours also by ``capture``, in inference on a GPU. "eager" is torch in its default layout (NCHW), "channels_last"
    torch in that layout, "compile" torch.compile of the latter, with freezing in CPU inference. In inference weights
    and images are in the dtype; training in a low dtype is autocast over float32 parameters.
    """
    captured = (CAPTURED,) if setting.mode == "inference" and setting.device.type == "cuda" else ()
    return [contender(name, model, x, setting) for name in (*against, "resnet_fast", *captured)]


def contender(
    name: str, model: nn.Module, x: Tensor, setting: Setting, fuse: Callable[[nn.Module], nn.Module] = resnet_fast.fuse
) -> Contender:
    """One of ``contenders`` by its name, on a copy of ``model``; "resnet_fast" is what ``fuse`` makes of it.

    torch.compile besides: "reduce_overhead" and "max_autotune", its modes of these names, which replay CUDA graphs;
    "compile_max", the latter without graphs, and "compile_frozen", that with inductor's freezing. "openvino" and
    "onnxruntime", in inference on a CPU, are these engines. "captured" is what
    ``resnet_fast.capture`` makes of ours, "tuned" is ours by a table that ``resnet_fast.warmup`` fills at the first
    call (``dispatch.forget()`` afterwards, or others use it too). Behind any name "+graph": the whole call replayed as
    a CUDA graph, recorded at the first call. Behind "resnet_fast:" may stand the one backend to fuse for.
    """
    kind = name.removesuffix(GRAPH)
    training = setting.mode == "training"
    held = torch.float32 if training else setting.dtype
    layout = torch.contiguous_format if kind == "eager" else torch.channels_last
    if kind in ENGINES and (training or setting.device.type != "cpu"):
        raise ValueError(f"{kind}: {setting.mode} on {setting.device.type}; supported is inference on a CPU")
    own = in_layout(copy.deepcopy(model).to(device=setting.device, dtype=held).train(training), layout)
    inputs = x.to(device=setting.device, dtype=held).contiguous(memory_format=layout)
    if kind in ENGINES:
        return Contender(name, Engine(kind, own, inputs))
    forward: Callable[[Tensor], Any] = own
    if kind in _COMPILE:
        forward = torch.compile(own, dynamic=False, **_COMPILE[kind])
        forward = _Frozen(forward) if kind == "compile_frozen" else forward
    elif kind.startswith("resnet_fast:"):
        forward = resnet_fast.fuse(own, backend=kind.partition(":")[2])
    elif kind in ("resnet_fast", CAPTURED, TUNED):
        forward = fuse(own)
        if kind != "resnet_fast":
            forward = _Captured(own) if kind == CAPTURED else _Tuned(own)
    call = _step(own, forward, inputs, setting) if training else _bind(forward, inputs)
    return Contender(name, _Graph(call) if name.endswith(GRAPH) else call)


#: Names of torch.compile's contenders, and its options.
_COMPILE: dict[str, dict[str, Any]] = {
    "compile": {},
    "compile_max": {"mode": "max-autotune-no-cudagraphs"},
    "compile_frozen": {"mode": "max-autotune-no-cudagraphs"},
    "reduce_overhead": {"mode": "reduce-overhead"},
    "max_autotune": {"mode": "max-autotune"},
}


class _Frozen:
    """A compiled model whose first call, which compiles, has inductor's freezing on."""

    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        self._forward, self._compiled = forward, False

    def __call__(self, x: Tensor) -> Any:
        if self._compiled:
            return self._forward(x)
        inductor = importlib.import_module("torch._inductor.config")
        with inductor.patch(freezing=True):
            output = self._forward(x)
        self._compiled = True
        return output


class _Captured:
    """A fused model by ``resnet_fast.capture``, at the first call, and not if a replay's numbers are other ones."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._graph: Callable[[Tensor], Any] | None = None

    def __call__(self, x: Tensor) -> Any:
        if self._graph is None:
            graph = resnet_fast.capture(self._model, x)
            found, expected = (tensors(forward(x))[0] for forward in (graph, self._model))
            apart = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
            if not apart <= 16 * torch.finfo(expected.dtype).eps:
                raise RuntimeError(f"captured: its numbers are {apart:.1%} off the model's")
            self._graph = graph
        return self._graph(x)


class _Graph:
    """``call`` as a CUDA graph, recorded at the first call (not yet run on a GPU)."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA graph needs a CUDA device")
        if self._graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is set up at a first call must not be recorded
                for _ in range(3):
                    self._call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # A capture that fails would leave the stream it ran on the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._call()
            self._graph = graph
        self._graph.replay()


class _Tuned:
    """A fused model by a table of its own, which is measured at the first call and written nowhere that lasts."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._warm = model, False

    def __call__(self, x: Tensor) -> Any:
        if not self._warm:
            with tempfile.TemporaryDirectory() as folder:
                resnet_fast.warmup(self._model, x.shape, dtype=x.dtype, cache=folder, progress=False)
            self._warm = True
        return self._model(x)


def _bind(forward: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: forward(x)


@contextlib.contextmanager
def empty_cache(compiling: bool) -> Iterator[None]:
    """An empty cache for inductor, for the run: else the compile time would depend on what ran before."""
    if not compiling:
        yield
        return
    utils = importlib.import_module("torch._inductor.utils")
    with getattr(utils, "fresh_cache", contextlib.nullcontext)():
        yield


@contextlib.contextmanager
def _running(setting: Setting, compiling: bool) -> Iterator[None]:
    """Inference mode, and inductor's freezing, which folds batch norm and packs weights, where they apply.

    Freezing goes through the global switch: ``torch.compile(options={"freezing": True})`` comes too late for dynamo,
    which must hand the parameters over as constants, and freezes nothing (torch 2.13).
    """
    with contextlib.ExitStack() as stack:
        if setting.mode == "inference":
            stack.enter_context(torch.inference_mode())
            if compiling and setting.device.type == "cpu":
                inductor = importlib.import_module("torch._inductor.config")
                stack.enter_context(inductor.patch(freezing=True))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that torch's profiler writes to the process's stderr."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call holds at its peak, above what was held before it: activations, not weights.

    On a GPU of the caching allocator's own count. On a CPU the highest running sum of the allocations and frees that
    torch's profiler records; a library's scratch memory, which does not come from torch's allocator, is not in it. What
    this package keeps from call to call is given back first, so that it counts.
    """
    buffers.release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        output = call()
    del output
    results = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        return None
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved(call: Callable[[], Any]) -> int:
    """Bytes that one call has autograd keep for its backward: every tensor once, parameters not."""
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not (t.is_leaf and t.requires_grad):
            storage = t.untyped_storage()  # held, lest its address be used again
            _, most = kept.get(storage.data_ptr(), (storage, 0))
            kept[storage.data_ptr()] = (storage, max(most, t.numel() * t.element_size()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(nbytes for _, nbytes in kept.values())


def _turn(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds per call of ``calls`` calls in a row."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def measure(
    entries: Sequence[Contender],
    setting: Setting,
    progress: Progress,
    *,
    rounds: int | None,
    seconds: float,
    baseline: str,
    needed: Sequence[str] | None = None,
) -> list[Result]:
    """Warm up, then time all contenders in turns: one turn each per round, the first one another every round.

    ``rounds`` None: as many as fit in ``seconds``, 5 to 100. A contender that cannot run (no compiler, say) is reported
    as failed; those ``needed`` (None: ours and the baseline) may not fail. Without the baseline there is no ratio.
    """
    needed = (baseline, "resnet_fast") if needed is None else needed
    words = f"{setting.mode} {setting.dtype_name} batch {setting.batch}"
    failed: dict[str, str] = {}
    first: dict[str, float] = {}
    calls: dict[str, int] = {}
    peak: dict[str, int | None] = {}
    kept: dict[str, int | None] = {}
    once: dict[str, float] = {}
    device = setting.device
    torch._dynamo.reset()
    with _running(setting, any(c.name.removesuffix(GRAPH) in _COMPILE for c in entries)):
        for c in entries:
            with progress(
                f"{words}: {'compiling' if c.name.removesuffix(GRAPH) in _COMPILE else 'warming up'} ({c.name})"
            ):
                try:
                    begin = time.perf_counter()
                    c.call()
                    _sync(device)
                    first[c.name] = time.perf_counter() - begin
                    begin = time.perf_counter()
                    peak[c.name] = None if c.name in ENGINES else memory(c.call, device)
                    once[c.name] = time.perf_counter() - begin
                    kept[c.name] = saved(c.call) if setting.mode == "training" else None
                    if once[c.name] < 1:  # else it is known well enough, and warm
                        once[c.name] = min(_turn(c.call, 1, device) for _ in range(2))
                    calls[c.name] = max(1, round(_TURN / max(once[c.name], 1e-6)))
                except Exception as error:
                    if c.name in needed:
                        raise
                    failed[c.name] = _why(error)
                    progress.warn(f"{c.name} cannot run: {failed[c.name]}")
        able = [c for c in entries if c.name not in failed]
        if rounds is None:
            whole = sum(once[c.name] * calls[c.name] for c in able)
            rounds = max(_FEWEST, min(_MOST, int(seconds / whole)))
        times: dict[str, list[float]] = {c.name: [] for c in able}
        gc.collect()
        with progress(f"{words}: timing {len(able)} contenders in turns, {rounds} rounds"):
            for i in range(rounds):
                for j in range(len(able)):
                    c = able[(i + j) % len(able)]
                    if c.name in failed:
                        continue
                    try:
                        times[c.name].append(_turn(c.call, calls[c.name], device))
                    except Exception as error:  # memory runs out late, say: the others go on
                        if c.name in needed:
                            raise
                        failed[c.name] = _why(error)
                        progress.warn(f"{c.name} cannot run: {failed[c.name]}")
    found = []
    for c in entries:
        if c.name in failed:
            found.append(Result(c.name, failed=failed[c.name]))
            continue
        mine = times[c.name]
        p20, p50, p80 = (quantile(mine, q) for q in (0.2, 0.5, 0.8))
        base = times.get(baseline) if baseline not in failed else None
        ratio = quantile([b / t for b, t in zip(base, mine, strict=True)], 0.5) if base else None
        found.append(
            Result(
                c.name,
                (p20 * 1e3, p50 * 1e3, p80 * 1e3),
                setting.batch / p50,
                ratio,
                peak[c.name],
                kept[c.name],
                first[c.name],
                rounds,
                calls[c.name],
            )
        )
    return found
