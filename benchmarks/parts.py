"""What ``python -m benchmarks.suite`` measures: the items of each part, and how one item is measured on a device.

An item is measured alone and returns records, each a flat dict that goes into JSON and CSV as it is. The same code runs
on a CPU, where events are a clock and CUDA graphs do not exist. Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import fusions, roofline
from benchmarks.rounds import Rounds, Timer
from resnet_fast.commands import equality, sources, timing
from resnet_fast.commands.progress import Progress
from resnet_fast.commands.steps import tensors
from resnet_fast.dispatch import BACKENDS, OPS, forget, reasons, use_backend
from resnet_fast.guards import any_size
from tests.cases import TINY, Case, inputs, resnet50

Record = dict[str, Any]

PARTS = ("ceilings", "ops", "training", "inference", "fusions", "memory")
#: Share of the whole time that each part may take; what one leaves, the next has.
SHARES = {"ceilings": 0.05, "ops": 0.22, "training": 0.28, "inference": 0.24, "fusions": 0.11, "memory": 0.1}


class Item(NamedTuple):
    """One thing to measure. ``key`` names it for good; items of one ``kind`` take about as long as each other."""

    key: str
    kind: str
    measure: Callable[[], list[Record]]


class Settings(NamedTuple):
    """What a run measures: on which device, and whether only so much that a test can wait for it."""

    device: torch.device
    tiny: bool = False
    every: int = 1  # of the layers of single ops, every so many-th

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype that matters first."""
        return (torch.float32,) if self.device.type == "cpu" else (torch.bfloat16, torch.float16)

    @property
    def batch(self) -> int:
        """Of single ops."""
        return 2 if self.tiny else 4 if self.device.type == "cpu" else 128

    @property
    def seconds(self) -> float:
        """Of rounds for one contender of one op."""
        return 0.005 if self.tiny else 0.1 if self.device.type == "cpu" else 0.05


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def sync(device: torch.device) -> None:
    """Wait for the device, and let an error of it come up here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what the item before has left."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the two ceilings


def _copy(settings: Settings) -> list[Record]:
    nbytes = 4 << 20 if settings.tiny else 256 << 20 if settings.device.type == "cpu" else 2 << 30
    source = torch.rand(nbytes // 4, device=settings.device)
    target = torch.empty_like(source)
    rounds = Timer(settings.device)([lambda: target.copy_(source)], 0.5)
    return [{"ceiling": "copy", "bytes": 2 * nbytes, "rate": 2 * nbytes / rounds.p20, **_times(rounds)}]


def _product(settings: Settings) -> list[Record]:
    cuda = settings.device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (256 if settings.tiny else 1024, torch.float32)
    a, b = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    rounds = Timer(settings.device)([lambda: torch.mm(a, b, out=out)], 1.0)
    rate = 2 * n**3 / rounds.p20
    return [{"ceiling": "product", "size": n, "dtype": name_of(dtype), "rate": rate, **_times(rounds)}]


def _times(rounds: Rounds) -> Record:
    return {
        "ms_p20": rounds.p20 * 1e3,
        "ms_p50": rounds.p50 * 1e3,
        "ms_p80": rounds.p80 * 1e3,
        "rounds": rounds.rounds,
    }


# ---- single ops over the table


#: op, variant, direction: what a training step and inference are made of. Each is timed on every backend that has it.
OPS_MEASURED = (
    ("conv_stats", "lazy", "forward"),
    ("affine_act_mask", "residual", "forward"),
    ("conv_backward_sums", "lazy", "backward"),
    ("affine_act_backward", "mask", "backward"),
    ("conv_dgrad", "lazy", "backward"),
    ("conv_wgrad", "lazy", "backward"),
    ("conv_affine_act", "residual", "inference"),
    ("bn_stats", "plain", "forward"),
    ("bn_backward_sums", "masked", "backward"),
    ("bn_backward_apply", "masked", "backward"),
    ("affine_act_maxpool", "plain", "forward"),
    ("maxpool_backward_sums", "plain", "backward"),
    ("maxpool_backward_apply", "plain", "backward"),
)
#: On a CPU nothing takes a lazy operand: the ops that take none, in their order of interest.
OPS_ON_CPU = ("conv_stats", "affine_act_mask", "affine_act_backward", "conv_backward", "conv_affine_act")


def _cases(op: str, settings: Settings) -> list[Case]:
    """The table's; of a memory-bound op each size of y once; of the stem's ops the stem alone. Or some of them."""
    return _all_cases(op, settings)[:: settings.every]


def _all_cases(op: str, settings: Settings) -> list[Case]:
    table = TINY[:4] if settings.tiny else resnet50(settings.batch)
    stems = [case for case in table if case.name.startswith("stem")]
    if "maxpool" in op:
        return stems
    if op == "conv_backward_sums":  # a lazy input has channels that a kernel has made
        return [case for case in table if case not in stems]
    if op.startswith("conv"):
        return list(table)
    return list({(case.K, case.P, case.Q): case for case in reversed(table)}.values())[::-1]


def contenders(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str | None]]:
    """Backends with the op, and why they cannot run it here (None: they can); "eager" is plain torch."""
    answers = reasons(op, device, dtype)
    for name in BACKENDS:
        reason = answers[name]
        if reason is None or not reason.startswith("has no"):
            yield name, reason
    yield "eager", None


def _run_op(name: str, op: str, kwargs: Record) -> Any:
    if name == "eager":
        from tests.eager import eager

        if op == "affine_act_mask":  # plain torch keeps z, and packs no bits
            op = "affine_act"
        return eager(op, kwargs)
    with use_backend(name):
        return OPS[op](**kwargs)


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@functools.lru_cache(maxsize=1)
def _prepared(op: str, variant: str, case: Case, dtype: torch.dtype, device: str) -> tuple[list[Record], Tensor]:
    """Two sets of inputs, and the definition's first output of the first one."""
    sets = [inputs(op, case, dtype, device, seed, variant=variant) for seed in (0, 1)]
    reference = _first(OPS[op].definition(**sets[0])).clone()
    return sets, reference


def _op(settings: Settings, op: str, variant: str, direction: str, case: Case, dtype: torch.dtype, name: str) -> Any:
    device = settings.device
    sets, reference = _prepared(op, variant, case, dtype, device.type)
    record: Record = {
        "op": op, "variant": variant, "direction": direction, "case": case.name, "count": case.count,
        "batch": case.N, "dtype": name_of(dtype), "contender": name,
    }  # fmt: skip
    apart = (_first(_run_op(name, op, sets[0])).float() - reference.float()).square().mean().sqrt()
    size = float(reference.float().square().mean().sqrt())
    if not float(apart) <= 0.03 * size:
        raise ValueError(f"{op} on {name}: its numbers are {float(apart) / size:.1%} off the definition's")
    rounds = Timer(device)([functools.partial(_run_op, name, op, kwargs) for kwargs in sets], settings.seconds)
    cost = roofline.op_cost(op, case, reference.element_size(), variant)
    return [{**record, **_times(rounds), "bytes": cost.bytes, "flops": cost.flops}]


def _genstats(settings: Settings, case: Case, dtype: torch.dtype) -> list[Record]:
    """cuDNN's graph of a convolution with the sums of its output in the epilogue (nvidia-cudnn-frontend)."""
    cudnn = importlib.import_module("cudnn")
    kwargs = inputs("conv_stats", case, dtype, "cuda", variant="bare")
    x, w = kwargs["x"], kwargs["w"]
    y = torch.empty(case.y_size, dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)
    total, square = (torch.empty(1, case.K, 1, 1, device="cuda") for _ in range(2))
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kind = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[dtype]
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )  # fmt: skip
    image, weight = (
        graph.tensor(name=n, dim=list(t.shape), stride=list(t.stride()), data_type=kind)
        for n, t in (("x", x), ("w", w))
    )
    geometry = {"padding": [case.padding] * 2, "stride": [case.stride] * 2, "dilation": [1, 1]}
    product = graph.conv_fprop(image=image, weight=weight, **geometry)
    product.set_output(True).set_data_type(kind)
    sums = graph.genstats(name="genstats", input=product)
    for output in sums:
        output.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")
    pack = {image: x, weight: w, product: y, sums[0]: total, sums[1]: square}
    rounds = Timer(settings.device)([lambda: graph.execute(pack, workspace, handle=handle)], settings.seconds)
    cost = roofline.op_cost("conv_stats", case, x.element_size(), "bare")
    return [
        {
            "op": "conv_stats", "variant": "bare", "direction": "forward", "case": case.name, "count": case.count,
            "batch": case.N, "dtype": name_of(dtype), "contender": "cudnn-frontend", **_times(rounds),
            "bytes": cost.bytes, "flops": cost.flops,
        }
    ]  # fmt: skip


def _ops(settings: Settings) -> Iterator[Item]:
    device = settings.device
    measured = list(OPS_MEASURED)
    if device.type == "cpu":
        plain = {"conv_stats": "plain", "conv_backward": "plain"}
        known = {op: (variant, direction) for op, variant, direction in OPS_MEASURED}
        measured = [(op, *known.get(op, ("plain", "backward"))) for op in OPS_ON_CPU]
        measured = [(op, plain.get(op, variant), direction) for op, variant, direction in measured]
    for dtype in settings.dtypes:
        peers = device.type == "cuda" and importlib.util.find_spec("cudnn") is not None
        for op, variant, direction in measured:
            if dtype == torch.float16 and op != "conv_affine_act":  # beside bfloat16 only where cuDNN asks for it
                continue
            for case in _cases(op, settings):
                for name, reason in contenders(op, device, dtype):
                    key = f"ops/{op}/{variant}/{case.name}/{name_of(dtype)}/{name}"
                    measure = functools.partial(_op, settings, op, variant, direction, case, dtype, name)
                    yield Item(key, op, measure if reason is None else functools.partial(_cannot, reason))
                if peers and op == "conv_stats":
                    key = f"ops/conv_stats/bare/{case.name}/{name_of(dtype)}/cudnn-frontend"
                    yield Item(key, "cudnn-frontend", functools.partial(_genstats, settings, case, dtype))


def _cannot(reason: str) -> list[Record]:
    raise NotImplementedError(reason)


# ---- whole networks


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
        return [Network("resnet50", n, first, "plain") for n in ((1, 4) if mode == "training" else (1, 4, 16))]
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
    seconds = 0.2 if settings.tiny else 5.0 if settings.device.type == "cpu" else 2.0
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


def _run(settings: Settings, mode: str) -> Iterator[Item]:
    progress = Progress()
    yield Item(f"{mode}/equality", "equality", functools.partial(_equal, settings, mode))
    for n in _networks(settings, mode):
        key = f"{mode}/{n.source}/{n.batch}/{name_of(n.dtype)}/{n.group}"
        yield Item(key, f"{n.group}", functools.partial(_network, settings, mode, n, progress))


# ---- the kinds of fusion


def _fusions(settings: Settings) -> Iterator[Item]:
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
        seconds = 0.2 if settings.tiny else 40.0 if settings.device.type == "cpu" else 3.0
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


def _memory(settings: Settings) -> Iterator[Item]:
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


def items(part: str, settings: Settings) -> list[Item]:
    """The items of ``part``, in the order in which they are measured."""
    if part == "ceilings":
        made = (("copy", _copy), ("product", _product))
        return [Item(f"ceilings/{name}", name, functools.partial(f, settings)) for name, f in made]
    if part == "ops":
        return list(_ops(settings))
    if part == "memory":
        return list(_memory(settings))
    if part == "fusions":
        return list(_fusions(settings))
    return list(_run(settings, part))


def run(
    part: str,
    settings: Settings,
    deadline: float,
    skip: Sequence[str],
    tell: Callable[[Record], None],
) -> None:
    """Measure the items of ``part`` that are not in ``skip`` until ``deadline`` (time.time()).

    ``tell`` gets {"item", "state"}: "begin"; then "done" with "records" and "seconds", or "failed" with "reason"; or
    "left out", where its kind takes longer than there is time, or it cannot run here. An error that leaves the device
    unusable is told, and raised: a new process goes on.
    """
    took: dict[str, float] = {}
    for item in items(part, settings):
        if item.key in skip:
            continue
        left = deadline - time.time()
        if left < max(took.get(item.kind, 0.0), 0.05):
            tell({"item": item.key, "state": "left out", "reason": f"{max(left, 0):.0f} s were left"})
            continue
        tell({"item": item.key, "state": "begin"})
        begin = time.time()
        try:
            records = item.measure()
            sync(settings.device)
        except NotImplementedError as error:
            tell({"item": item.key, "state": "left out", "reason": str(error)[:300]})
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
            tell({"item": item.key, "state": "failed", "reason": reason})
            _prepared.cache_clear()
            sync(settings.device)  # raises where the device is lost
        else:
            tell({"item": item.key, "state": "done", "seconds": round(time.time() - begin, 3), "records": records})
        if part != "ops":
            free(settings.device)
        took[item.kind] = max(took.get(item.kind, 0.0), time.time() - begin)
