"""Whole networks: their speed in turns with plain torch, one kind of fusion after the other, and their memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import fusions
from benchmarks.items import Item, Record, Settings, free
from resnet_fast.commands import equality, sources, timing
from resnet_fast.commands.engines import ENGINES
from resnet_fast.commands.judging import name_of
from resnet_fast.commands.progress import Progress
from resnet_fast.commands.steps import tensors
from resnet_fast.dispatch import forget
from resnet_fast.guards import any_size

# ---- speed


class Network(NamedTuple):
    """A network at a batch, and which contenders run: a group of ``GROUPS``."""

    source: str
    batch: int
    dtype: torch.dtype
    group: str


_PLAIN = ("eager", "channels_last", "resnet_fast")
_GRAPHS = tuple(f"{name}{timing.GRAPH}" for name in _PLAIN)
#: Contenders that are timed in turns with each other. channels_last is the baseline in each.
GROUPS = {
    "eager": (*_PLAIN, *_GRAPHS),
    "plain": _PLAIN,
    "cpu training": ("eager", "channels_last", "compile", "resnet_fast"),
    "cpu inference": ("eager", "channels_last", "compile", *ENGINES, "resnet_fast"),
    "compile": ("channels_last", "compile", f"compile{timing.GRAPH}", "resnet_fast"),
    "triton": ("channels_last", "resnet_fast", "resnet_fast:triton", f"resnet_fast:triton{timing.GRAPH}"),
    "max-autotune": ("channels_last", "compile_max", f"compile_max{timing.GRAPH}", "resnet_fast"),
    "captured": ("eager", "channels_last", "resnet_fast", timing.CAPTURED),
    "ways": ("channels_last", "resnet_fast", *(f"resnet_fast:{name}" for name in ("native", "triton"))),
    "tuned": ("channels_last", timing.TUNED, f"{timing.TUNED}{timing.GRAPH}"),
    "graphs": ("channels_last", "reduce_overhead", "resnet_fast", timing.CAPTURED),
    "all graphs": ("channels_last", "max_autotune", "compile_frozen", "resnet_fast", timing.CAPTURED),
}


def _networks(settings: Settings, mode: str) -> list[Network]:
    """What matters most first: the time may end at any of them."""
    first, *others = settings.dtypes
    if settings.tiny:
        return [Network("cifar_resnet20", 2, first, "plain")]
    if settings.device.type == "cpu":
        return [Network("resnet50", n, first, f"cpu {mode}") for n in (1, 16, 4)]
    half = 2 if mode == "training" else 1
    found = [Network("resnet50", 256 // half, first, group) for group in ("eager", "compile", "triton")]
    found += [Network("resnet50", batch // half, first, "eager") for batch in (64, 512, 16)]
    found += [Network("resnet18", 512 // half, first, "eager"), Network("resnet101", 256 // half, first, "eager")]
    found += [Network("resnet50", 256 // half, dtype, "eager") for dtype in others]
    found += [Network(name, 256 // half, first, "plain") for name in ("timm:resnet50", "torchvision:resnet50")]
    if mode == "inference":
        found += [Network("resnet50", 256, first, group) for group in ("ways", "tuned")]
        found += [Network("resnet50", 1, first, group) for group in ("eager", "graphs", "compile", "tuned")]
        found += [Network("resnet50", batch, first, "captured") for batch in (8, 32, 128)]
        found.append(Network("resnet50", 256, first, "graphs"))
    found += [Network("resnet18", 512 // half, first, "compile"), Network("resnet101", 256 // half, first, "compile")]
    found.append(Network("resnet50", 64 // half, first, "compile"))
    found.append(Network("resnet50", 256 // half, first, "max-autotune"))
    if mode == "inference":
        found += [Network("resnet50", batch, first, group) for batch in (128, 32, 8) for group in ("graphs", "tuned")]
        found += [Network("resnet50", batch, first, "all graphs") for batch in (256, 1)]
    return found


def _size(settings: Settings) -> int:
    return 32 if settings.tiny else 224


def _photographs(settings: Settings, batch: int) -> Tensor:
    """Normal numbers: what a network computes on does not change how fast it is, but for all zeros."""
    random = torch.Generator().manual_seed(0)
    size = _size(settings)
    few = torch.randn(min(batch, 16), 3, size, size, generator=random)
    return few.repeat(-(-batch // 16), 1, 1, 1)[:batch].to(settings.device)


@functools.lru_cache(maxsize=1)
def _model(source: str, seed: int = 0) -> torch.nn.Module:
    return sources.build(source, seed).model


def _equal(settings: Settings, mode: str) -> list[Record]:
    """The equality test of ``resnet-fast bench``, of the first network: no speed is reported without it."""
    first = _networks(settings, mode)[0]
    model = _model(first.source)
    x = _photographs(settings, 8)
    sources.calibrate(model.to(settings.device), [x], 0)
    found = []
    for dtype in settings.dtypes:
        checks = equality.eval_checks if mode == "inference" else equality.train_checks
        found += checks(model, x[:2], settings.device, dtype)
    _model.cache_clear()
    return [{"equality": mode, "network": first.source, **c._asdict()} for c in found]


def _network(settings: Settings, mode: str, network: Network, progress: Progress) -> list[Record]:
    model = _model(network.source)
    x = _photographs(settings, network.batch)
    setting = timing.Setting(mode, network.batch, _size(settings), network.dtype, settings.device)
    entries = [
        timing.attempt(name, functools.partial(timing.contender, name, model, x, setting))
        for name in GROUPS[network.group]
    ]
    seconds = 0.2 if settings.tiny else 15.0 if settings.device.type == "cpu" else 2.0
    try:
        results = timing.measure(
            entries, setting, progress, rounds=None, seconds=seconds, baseline="channels_last", needed=()
        )
    finally:
        if timing.TUNED in GROUPS[network.group]:
            forget()  # what was measured for these contenders is not for the next ones
    found = []
    for r in results:
        record: Record = {
            "network": network.source, "mode": mode, "batch": network.batch, "size": setting.size,
            "dtype": setting.dtype_name, "group": network.group, "contender": r.name, "failed": r.failed,
        }  # fmt: skip
        if r.ms is not None:
            p20, p50, p80 = r.ms
            record.update(ms_p20=p20, ms_p50=p50, ms_p80=p80, rounds=r.rounds, images_per_second=r.images_per_second)
            record.update(ratio=r.ratio, first_seconds=r.first)
            if not r.name.endswith(timing.GRAPH):  # a graph's memory is its own, taken at recording
                record.update(peak_bytes=r.peak, saved_bytes=r.saved)
        found.append(record)
    return found


def speed(settings: Settings, mode: str) -> Iterator[Item]:
    progress = Progress()
    yield Item(f"{mode}/equality", "equality", functools.partial(_equal, settings, mode))
    for n in _networks(settings, mode):
        key = f"{mode}/{n.source}/{n.batch}/{name_of(n.dtype)}/{n.group}"
        yield Item(key, f"{n.group}", functools.partial(_network, settings, mode, n, progress))


# ---- the kinds of fusion


def kinds(settings: Settings) -> Iterator[Item]:
    progress = Progress()
    for mode in ("inference", "training"):
        yield Item(f"fusions/{mode}", "fusions", functools.partial(_steps, settings, mode, progress))


#: Seconds in which the steps' kernels are compiled (Triton's, on a GPU); later steps are left out, not all of them.
_PREPARED = 30.0


def _steps(settings: Settings, mode: str, progress: Progress) -> list[Record]:
    """ResNet-50, or a small one, with one kind of fusion more at each step, all in turns."""
    source = "cifar_resnet20" if settings.tiny else "resnet50"
    if settings.tiny:
        batch = 2
    elif settings.device.type == "cpu":
        batch = 16 if mode == "inference" else 4
    else:
        batch = 256 if mode == "inference" else 128
    setting = timing.Setting(mode, batch, _size(settings), settings.dtypes[0], settings.device)
    model, x = _model(source), _photographs(settings, batch)
    with any_size() if settings.tiny else contextlib.nullcontext():
        steps = fusions.steps(settings.device.type, mode)
        plain = fusions.contender(steps[0], model, x, setting)
        entries, reasons = [plain], {}
        expected = _answer(plain, setting)
        begin = time.time()
        for step in steps[1:]:
            if time.time() - begin > _PREPARED:
                reasons[step.name] = "left out: preparing the steps before it took all the time"
                continue
            try:
                entry = fusions.contender(step, model, x, setting)
                if not step.graph:  # which runs what the step before it runs
                    _compare(_answer(entry, setting), expected, 0.03 if setting.dtype == torch.float32 else 0.15)
                entries.append(entry)
            except Exception as error:
                reasons[step.name] = f"{type(error).__name__}: {error}"[:300]
        seconds = 0.2 if settings.tiny else 80.0 if settings.device.type == "cpu" else 3.0
        results = timing.measure(
            entries, setting, progress, rounds=None, seconds=seconds, baseline=plain.name, needed=()
        )
    common = {
        "network": source, "mode": mode, "batch": batch, "size": setting.size, "dtype": setting.dtype_name,
        "group": "fusions",
    }  # fmt: skip
    found = [{**common, "contender": n, "failed": reason, "ratio": None} for n, reason in reasons.items()]
    for r in results:
        times = {} if r.ms is None else dict(zip(("ms_p20", "ms_p50", "ms_p80"), r.ms, strict=True))
        found.append({**common, "contender": r.name, "failed": r.failed, "ratio": r.ratio, **times, "rounds": r.rounds})
    return found


def _compare(found: Tensor, expected: Tensor, limit: float) -> None:
    """ValueError where the difference is beyond ``limit``, in root mean squares: a guard, the equality test is not."""
    apart, size = (float(t.double().square().mean().sqrt()) for t in (found.float() - expected.float(), expected))
    if not apart <= limit * size:
        raise ValueError(f"its numbers are {apart / size:.1%} off" if size else "its numbers are not 0")


def _answer(entry: timing.Contender, setting: timing.Setting) -> Tensor:
    """What one call computes: the logits, or in training the loss."""
    with torch.inference_mode(setting.mode == "inference"):
        return tensors(entry.call())[0].clone()


# ---- memory


#: The largest batch is looked for within this: what a small GPU has, and so that no search fills a large one.
LIMIT = 16 << 30
_TRAINED = ("channels_last", "resnet_fast")


def _step(settings: Settings, source: str, batch: int, name: str) -> timing.Contender:
    dtype = settings.dtypes[0]
    setting = timing.Setting("training", batch, _size(settings), dtype, settings.device)
    return timing.contender(name, _model(source), _photographs(settings, batch), setting)


def _peak(settings: Settings, source: str, batch: int, name: str) -> list[Record]:
    """Bytes of a training step at its peak above the weights, and bytes kept for the backward."""
    call = _step(settings, source, batch, name).call
    call()
    peak, saved = timing.memory(call, settings.device), timing.saved(call)
    dtype = name_of(settings.dtypes[0])
    return [
        {
            "network": source, "memory": "training", "batch": batch, "size": _size(settings), "dtype": dtype,
            "contender": name, "peak_bytes": peak, "saved_bytes": saved,
        }
    ]  # fmt: skip


def _largest(settings: Settings, source: str, name: str, limit: int, grain: int) -> list[Record]:
    """The largest batch, in multiples of ``grain``, whose training step stays within ``limit`` bytes."""

    def fits(batch: int) -> bool:
        free(settings.device)
        try:
            call = _step(settings, source, batch, name).call
            call()
            peak = timing.memory(call, settings.device)
        except torch.OutOfMemoryError:
            return False
        held = 0
        if settings.device.type == "cuda":
            held = torch.cuda.memory_allocated(settings.device)
        return peak is not None and peak + held <= limit

    if settings.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.25 * limit / torch.cuda.mem_get_info()[1]))
    try:
        low, high = 0, grain
        while high <= 4096 and fits(high):
            low, high = high, 2 * high
        while high - low > grain:
            middle = (low + high) // 2 // grain * grain
            low, high = (middle, high) if fits(middle) else (low, middle)
    finally:
        if settings.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    dtype = name_of(settings.dtypes[0])
    return [
        {
            "network": source, "memory": "largest batch", "limit": limit, "grain": grain, "batch": low,
            "size": _size(settings), "dtype": dtype, "contender": name,
        }
    ]  # fmt: skip


def memory(settings: Settings) -> Iterator[Item]:
    cpu = settings.device.type == "cpu"
    source = "cifar_resnet20" if settings.tiny else "resnet50"
    for batch in (2, 4) if settings.tiny else (4, 16) if cpu else (32, 64, 128, 256):
        for name in _TRAINED:
            yield Item(
                f"memory/{source}/{batch}/{name}", "peak", functools.partial(_peak, settings, source, batch, name)
            )
    limit, grain = (64 << 20, 4) if settings.tiny else (LIMIT, 16)
    if settings.tiny or not cpu:
        for name in _TRAINED:
            measure = functools.partial(_largest, settings, source, name, limit, grain)
            yield Item(f"memory/{source}/largest/{name}", "largest", measure)
    if not settings.tiny and not cpu:
        for other in ("resnet18", "resnet101"):
            for name in _TRAINED:
                measure = functools.partial(_peak, settings, other, 128, name)
                yield Item(f"memory/{other}/128/{name}", "peak", measure)
