"""warmup(): measure once which backend and configuration runs each convolution of a model fastest, and keep it.

Of a model in eval mode it measures how each block runs fastest in inference (inference_tuning.py). In training mode
every distinct (op, shape, dtype) of the model's blocks is measured alone on random tensors, in every way that can run
it, in turns; then each distinct block, forward and backward, against its unfused form. What is fastest goes into the
table of the device, which dispatch.py looks into. Training never measures anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch, inference_tuning, tables
from . import functional as f
from .dispatch import OPS, PARTS, Choice
from .fuse import blocks, undisturbed
from .inference import Request
from .plan import Opaque
from .schedule import Call, Part, apart, describe, inputs, parts
from .tables import Candidate, Row, Signature

__all__ = ["Report", "TuningWarning", "warmup"]

#: Seconds of one call of a function whose work is on a device.
Timer = Callable[[Callable[[], object], torch.device], float]

_ROUNDS = 3
#: A way that takes this many times the best one's time in the first round is not measured again.
_HOPELESS = 1.5
#: Those that take up to so many times the best one's time meet in a last race.
_CLOSE = 1.1
#: Seconds after which what was measured is written down, should the process die.
_SAVE_EVERY = 30.0


class TuningWarning(UserWarning):
    """A way to run an op failed, or gave other numbers than the definition; it was left out."""


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What :func:`warmup` did; prints as a few lines."""

    device: str
    measured: tuple[Row, ...]
    known: int  # rows that were there already
    path: Path | None  # the table's file; None where it could not be written, or nothing was measured
    left_out: tuple[str, ...]  # what failed, and how
    note: str = ""  # why there was nothing to measure

    def __str__(self) -> str:
        wins: dict[str, int] = {}
        for row in self.measured:
            wins[row.candidates[0].backend] = wins.get(row.candidates[0].backend, 0) + 1
        won = ", ".join(f"{name} {n}" for name, n in sorted(wins.items(), key=lambda item: -item[1]))
        rivals = sorted({c.backend for row in self.measured for c in row.candidates})
        if self.note:
            return f"{self.device}: {self.note}"
        lines = [f"{self.device}: {len(self.measured)} measured, {self.known} known before"]
        if self.measured:
            lines.append(f"compared {', '.join(rivals)}; fastest: {won}")
            lines.append(f"written to {self.path}" if self.path else "not written: it holds for this process")
        return "\n".join([*lines, *(f"left out: {text}" for text in self.left_out)])

    def __repr__(self) -> str:
        return str(self)


# ---- time


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """The :data:`Timer`: the mean of so many calls that they last some milliseconds."""
    if device.type != "cuda":
        calls, start = 0, time.perf_counter()
        while calls == 0 or (time.perf_counter() - start < 0.02 and calls < 100):
            function()
            calls += 1
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls = 1
        while True:
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            milliseconds = begin.elapsed_time(end)
            if milliseconds >= 5.0 or calls >= 1000:
                return milliseconds / 1e3 / calls
            calls = min(1000, max(calls + 1, math.ceil(calls * 6.0 / max(milliseconds, 0.01))))


class _Bar:
    """Progress on stderr: one line that is written over on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._done, self._shown = total, 0, shown
        self._tty = shown and sys.stderr.isatty()
        self._begin = self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        """``text`` is what comes now."""
        now = time.monotonic()
        if self._shown and (self._tty or self._done == 0 or now - self._last >= 10):
            self._last = now
            filled = 24 * self._done // max(self._total, 1)
            left = (now - self._begin) / self._done * (self._total - self._done) if self._done else None
            about = "" if left is None else f", about {left:.0f} s left"
            line = f"warmup [{'#' * filled}{'.' * (24 - filled)}] {self._done}/{self._total}{about}: {text}"
            sys.stderr.write(f"\r\x1b[K{line[:150]}" if self._tty else f"{line}\n")
            sys.stderr.flush()
        self._done += 1

    def close(self) -> None:
        if self._tty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


# ---- one op


def _real(value: Any, device: torch.device) -> Any:
    """Random numbers in the place of a fake tensor: images about 0, vectors about 1."""
    if not isinstance(value, Tensor):
        return value
    t = torch.randn(value.shape, dtype=torch.float32, device=device)
    t = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else 1 + 0.1 * t
    return t.to(value.dtype)


def _arguments(call: Call, device: torch.device) -> dict[str, Any]:
    found = {name: _real(value, device) for name, value in call.arguments.items()}
    w = found["w"]
    found["w"] = w / max(1.0, (w.shape[1] * w.shape[2] * w.shape[3]) ** 0.5)  # y about as large as x
    return found


def _differs(ours: Any, theirs: Any, dtype: torch.dtype) -> str | None:
    """Where a way's results are not the definition's: a wrong kernel, not another rounding."""
    limit = 16 * max(torch.finfo(dtype).eps, 2.0**-10)  # float32 may be TF32
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            return f"output {i} is {tuple(a.shape)} and not {tuple(b.shape)}"
        if a.numel() == 0:
            continue
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        if not error.item() <= limit:
            return f"output {i} is off by {error.item():.2g} of its norm (allowed: {limit:.2g})"
    return None


class _Tuner:
    """What the measurements of one device share."""

    def __init__(self, device: torch.device, timer: Timer, bar: _Bar) -> None:
        self.device, self.timer, self.bar = device, timer, bar
        self.left_out: list[str] = []

    def leave_out(self, what: str, reason: object) -> None:
        text = f"{what}: {str(reason).strip().partition(chr(10))[0]}"
        if text not in self.left_out:
            self.left_out.append(text)
            warnings.warn(f"warmup leaves out {text}", TuningWarning, stacklevel=4)

    def race(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of each, in turns: the median of rounds, of one round for what is far behind."""
        times = {i: [self.timer(function, self.device)] for i, function in functions.items()}
        best = min((t[0] for t in times.values()), default=0.0)
        running = [i for i, t in times.items() if t[0] <= _HOPELESS * best]
        for _ in range(_ROUNDS - 1):
            for i in running:
                times[i].append(self.timer(functions[i], self.device))
        return {i: median(t) for i, t in times.items()}

    def right(
        self, functions: Mapping[str, Callable[[], Tensor]], expected: Tensor, what: str
    ) -> dict[str, Callable[[], Tensor]]:
        """Those that run and give ``expected``; the others are left out of ``what``, and it is said."""
        found = {}
        for name, function in functions.items():
            try:
                wrong = _differs([function()], [expected], expected.dtype)
            except Exception as error:  # as in op()
                wrong = f"{type(error).__name__}: {error}"
            if wrong is None:
                found[name] = function
            else:
                self.leave_out(f"{name} for {what}", wrong)
        return found

    def op(self, call: Call) -> Row | None:
        """Everything measured for one call; None where nothing could run it but the order of backends."""
        arguments = _arguments(call, self.device)
        op, dtype = call.op, call.signature.dtype
        with torch.no_grad():
            expected = None
            with contextlib.suppress(torch.OutOfMemoryError):  # then the others are believed
                expected = OPS[op].definition(**arguments)
            found: dict[str, Candidate] = {}
            functions: dict[str, Callable[[], object]] = {}

            def measure(candidates: Sequence[tuple[str, Mapping[str, Any] | None]]) -> None:
                """Adds those that run and are right."""
                new: dict[str, Callable[[], object]] = {}
                for name, config in candidates:
                    candidate = Candidate(name, config, math.inf)
                    text = describe(candidate)
                    choice = dispatch.resolve(call.signature, candidate, self.device)
                    if text in found or not isinstance(choice, Choice):
                        continue
                    found[text] = candidate  # asked once, whatever comes of it
                    function = functools.partial(choice.function, **arguments)
                    try:
                        wrong = None if expected is None else _differs(function(), expected, dtype)
                    except Exception as error:  # out of memory, shared memory or registers: each is another type
                        wrong = f"{type(error).__name__}: {error}"
                    if wrong is None:
                        new[text] = functions[text] = function
                    else:
                        self.leave_out(f"{text} for {op} {_shape(call.signature)}", wrong)
                race(new)

            def race(contenders: Mapping[str, Callable[[], object]]) -> None:
                for text, took in self.race(contenders).items():
                    found[text] = found[text]._replace(seconds=took)

            reasons = dispatch.reasons(op, self.device, dtype)
            # The definition of conv_backward_sums is its parts in plain torch: below they run on their backends.
            able = [n for n, why in reasons.items() if why is None and not (n == "torch" and op.endswith("_sums"))]
            for name in able:
                starts, axes = _configurations(name, op, arguments)
                measure([(name, config) for config in starts or [None]])
                for axis, options in axes.items():
                    # One axis after the other, the others at their best so far: a sum of measurements, no product.
                    mine = [c for c in found.values() if c.backend == name and c.config and axis in c.config]
                    if mine:
                        best = min(mine, key=lambda c: c.seconds).config or {}
                        measure([(name, {**best, axis: option}) for option in options])
            close = {text for text, c in found.items() if c.seconds <= _CLOSE * min(c.seconds for c in found.values())}
            if len(close) > 1:  # they were not all measured in one race
                race({text: functions[text] for text in close if text in functions})
            found = {text: c for text, c in found.items() if c.seconds < math.inf}
            if op == "conv_backward_sums":
                found[PARTS] = Candidate(PARTS, None, self._apart(call, arguments))
        if not found:
            return None
        return Row(call.signature, tuple(sorted(found.values(), key=lambda c: c.seconds)), "warmup")

    def _apart(self, call: Call, arguments: dict[str, Any]) -> float:
        """Seconds of ``conv_backward``, each way at its best, and of ``bn_backward_sums`` behind it."""
        plain = apart(call._replace(arguments=arguments)).arguments
        x = arguments["x"]
        sums = {"dz": x, "y": x, "mean": arguments["xmean"], **{n: arguments[n] for n in ("scale", "shift")}}

        def in_parts() -> None:
            OPS["conv_backward"](**plain)
            OPS["bn_backward_sums"](**sums)

        return self.race({PARTS: in_parts})[PARTS]

    def block(self, part: Part) -> Row | None:
        """A training step of a block, fused by what the table now says, against the same in plain torch."""
        assert part.signature is not None
        dtype, device = part.signature.dtype, self.device

        def leaf(t: Any, wanted: bool) -> Any:
            return _real(t, device).to(dtype).requires_grad_(wanted)

        def layer(la: f.ConvBn) -> f.ConvBn:
            twin = la._replace(**{name: _real(t, device) for name, t in la._asdict().items() if isinstance(t, Tensor)})
            counter = None if la.num_batches_tracked is None else torch.zeros_like(la.num_batches_tracked)
            twin = twin._replace(weight=leaf(la.weight, True), num_batches_tracked=counter, group=None)
            for t in (twin.gamma, twin.beta):
                if t is not None:
                    t.requires_grad_(True)
            return twin

        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            x = leaf(part.x, part.x.requires_grad)
            layers = [layer(la) for la in part.layers]
            projection = layer(part.projection) if part.projection else None
            identity, residual = part.plan.shortcut == "identity", None
            if isinstance(part.plan.shortcut, Opaque):
                with torch.no_grad():
                    residual = torch.randn_like(_eager(x, layers, None, None, False, False))
                residual.requires_grad_(x.requires_grad)
            every = [*layers, *([projection] if projection else [])]
            wanted = [t for t in (x, residual, *(t for la in every for t in la[:3])) if t is not None]
            wanted = [t for t in wanted if t.requires_grad]

            def fused() -> None:
                shortcut = {"projection": projection, "residual": residual, "identity": identity}
                step(f.residual_block(x, layers, **shortcut, pool=part.pool))  # type: ignore[arg-type]

            def original() -> None:
                step(_eager(x, layers, projection, residual, identity, part.pool))

            def step(z: Tensor) -> None:
                torch.autograd.grad(z, wanted, torch.ones_like(z), allow_unused=True)

            try:
                fused()
                original()
                times = self.race({"fused": fused, "original": original})
            except Exception as error:
                self.leave_out(f"the block {_shape(part.signature)}", f"{type(error).__name__}: {error}")
                return None
        both = [Candidate(name, None, took) for name, took in times.items()]
        return Row(part.signature, tuple(sorted(both, key=lambda c: c.seconds)), "warmup")


def _configurations(
    backend: str, op: str, arguments: dict[str, Any]
) -> tuple[Sequence[Mapping[str, Any] | None], Mapping[str, Sequence[Any]]]:
    """What of ``backend`` can be configured for this call: whole configurations to begin with, and options by axis."""
    ask = None if backend == "torch" else getattr(dispatch.backend(backend), "configurations", None)
    return ([], {}) if ask is None else ask(op, **arguments)


def _eager(
    x: Tensor,
    layers: Sequence[f.ConvBn],
    projection: f.ConvBn | None,
    residual: Tensor | None,
    identity: bool,
    pool: bool,
) -> Tensor:
    """``residual_block`` as the original modules run it."""

    def conv_bn(x: Tensor, la: f.ConvBn) -> Tensor:
        y = F.conv2d(x, la.weight, la.bias, *la.geometry)
        return F.batch_norm(y, la.running_mean, la.running_var, la.gamma, la.beta, True, la.momentum or 0.1, la.eps)

    z = x
    for la in layers[:-1]:
        z = conv_bn(z, la)
        z = F.relu(z, inplace=True) if la.relu else z
    z = conv_bn(z, layers[-1])
    shortcut = conv_bn(x, projection) if projection else x if identity else residual
    z = z if shortcut is None else z + shortcut
    z = F.relu(z, inplace=True) if layers[-1].relu else z
    return F.max_pool2d(z, 3, 2, 1) if pool else z


def _shape(signature: Signature) -> str:
    """A shape in a few words, for the bar and warnings."""
    size = "x".join(map(str, signature.x))
    w, stride, *_ = signature.layers[0]
    if signature.op in ("block", "inference"):
        return f"of {len(signature.layers)} layers at {size}"
    return f"{size} to {w[0]}, {w[2]}x{w[3]}" + (f"/{stride[0]}" if stride != (1, 1) else "")


# ---- a model


def _never(*_: Any, **__: Any) -> bool:
    return False


def _fusable(g: Tensor, *_: Any, **__: Any) -> bool:
    """Whether a backend has ``conv_backward_sums`` in one; its definition is its parts in plain torch."""
    reasons = dispatch.reasons("conv_backward_sums", g.device, g.dtype)
    return any(why is None for name, why in reasons.items() if name != "torch")


def _work(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None
) -> tuple[dict[Signature, Call], dict[Signature, Part], torch.device | None]:
    """Every distinct call and block of ``model``; and their device."""
    with undisturbed(model):
        seen = inputs(model, input_shape, dtype)
    calls: dict[Signature, Call] = {}
    whole: dict[Signature, Part] = {}
    device = None
    for _, module, plan, pinned in blocks(model):
        if pinned is not None:
            continue  # it runs on that backend, whatever is faster
        # With sums taken apart everywhere, and in one wherever a backend has that: every call that any choice leads to.
        for fuses in (_never, _fusable):
            for part in parts(module, plan, seen, fuses):
                device = part.x.device
                for call in part.calls:
                    calls.setdefault(call.signature, call)
                    if call.op == "conv_backward_sums":
                        calls.setdefault(apart(call).signature, apart(call))
                if part.signature is not None:
                    whole.setdefault(part.signature, part)
    # conv_backward_sums is measured against its parts at their best: they come first.
    return dict(sorted(calls.items(), key=lambda item: item[0].op == "conv_backward_sums")), whole, device


_FOLDED = (
    "nothing to measure: a CPU's inference runs on folded weights, and knows no other way. Training is measured in "
    "training mode: warmup(model.train(), input_shape)"
)


def warmup(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    cache: str | os.PathLike[str] | None = None,
    again: bool = False,
    progress: bool = True,
    timer: Timer = seconds_of,
) -> Report:
    """Measure how each convolution of ``model`` trains fastest on its device, and use that from now on.

    Args:
        model: a model, fused or to be fused, on the device that it trains on. It is not changed: its forward runs once,
            on fake tensors, and what is measured are random tensors of the same sizes. In eval mode: for inference.
        input_shape: (N, C, H, W) of an image that it trains on, or infers. Rows hold for this batch and size alone.
        dtype: of that image; None: that of the parameters. Under autocast what autocast makes of it is measured.
        cache: folder of the table; None: $RESNET_FAST_CACHE, or $XDG_CACHE_HOME/resnet_fast, where later processes
            look for it by themselves.
        again: measure what is in the table already, too.
        progress: show a bar on stderr.
        timer: ``timer(function, device)`` gives the seconds of one call.

    Ways to run an op are the backends that can, and their configurations: ours fused, the library's convolution with
    our kernels around it, a mix of both by direction. One whose numbers are not those of the definition is left out
    with a :class:`TuningWarning`. On a CPU the ways are the CPU's. Interrupted by Ctrl-C, it keeps what was measured.
    For inference they are, of each block: one kernel for all of it, a fused kernel for each convolution, the library's
    convolutions with a pass behind each, plain torch; on a CPU, where weights are folded, there is nothing to measure.
    Raises ``TypeError`` for what is no nn.Module, ``ValueError`` where there is nothing to measure and for a shape that
    is not four positive numbers, ``RuntimeError`` where the forward fails on it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, supported is torch.nn.Module")
    calls, whole, requests = {}, {}, {}  # type: ignore[var-annotated]
    if model.training:
        calls, whole, device = _work(model, input_shape, dtype)
    else:
        requests, device = inference_tuning.work(model, input_shape, dtype)
    if device is None:
        raise ValueError(
            "model: found no block that is fused, or would be, and is free in its backend. "
            "Remedy: print(resnet_fast.explain(model)), and fuse(model) without backend="
        )
    if dispatch.forced_backend() is not None:
        raise ValueError("warmup inside use_backend(...) compares nothing. Remedy: call it outside")
    if requests and device.type == "cpu":
        return Report(tables.device_name(device), (), 0, None, (), _FOLDED)
    if cache is not None:
        dispatch.add_rows(device, tables.load(device, cache).values())
    rows = dispatch.table(device).rows
    known = 0 if again else sum(signature in rows for signature in (*calls, *whole, *requests))
    every: list[Call | Part | Request] = [*calls.values(), *whole.values(), *requests.values()]
    wanted = [work for work in every if again or work.signature not in rows]
    bar = _Bar(len(wanted), progress and bool(wanted))
    tuner = _Tuner(device, timer, bar)
    measured: list[Row] = []
    path, saved, last = None, 0, time.monotonic()
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        with random:
            for work in wanted:
                assert work.signature is not None
                bar(f"{work.signature.op} {_shape(work.signature)}")
                if isinstance(work, Request):
                    row = inference_tuning.measure(work, tuner, f"a block {_shape(work.signature)}")
                else:
                    row = tuner.op(work) if isinstance(work, Call) else tuner.block(work)
                if row is not None:
                    measured.append(row)
                    dispatch.add_rows(device, [row])
                if time.monotonic() - last > _SAVE_EVERY:
                    path, saved, last = tables.save(device, measured[saved:], cache), len(measured), time.monotonic()
    finally:
        bar.close()
        if saved < len(measured):
            path = tables.save(device, measured[saved:], cache)
    return Report(tables.device_name(device), tuple(measured), known, path, tuple(tuner.left_out))
