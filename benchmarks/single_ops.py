"""The two ceilings, a copy and a matrix product, and single ops over the table of cases, on every backend."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.items import Item, Record, Settings, times
from benchmarks.rounds import Timer
from resnet_fast.commands.judging import name_of
from resnet_fast.dispatch import BACKENDS, OPS, reasons, use_backend
from tests.cases import TINY, Case, inputs, resnet50

# ---- the two ceilings


def copy(settings: Settings) -> list[Record]:
    nbytes = 4 << 20 if settings.tiny else 256 << 20 if settings.device.type == "cpu" else 2 << 30
    source = torch.rand(nbytes // 4, device=settings.device)
    target = torch.empty_like(source)
    rounds = Timer(settings.device)([lambda: target.copy_(source)], 0.5)
    return [{"ceiling": "copy", "bytes": 2 * nbytes, "rate": 2 * nbytes / rounds.p20, **times(rounds)}]


def product(settings: Settings) -> list[Record]:
    cuda = settings.device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (256 if settings.tiny else 1024, torch.float32)
    a, b = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    rounds = Timer(settings.device)([lambda: torch.mm(a, b, out=out)], 1.0)
    rate = 2 * n**3 / rounds.p20
    return [{"ceiling": "product", "size": n, "dtype": name_of(dtype), "rate": rate, **times(rounds)}]


# ---- single ops


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
def prepared(op: str, variant: str, case: Case, dtype: torch.dtype, device: str) -> tuple[list[Record], Tensor]:
    """Two sets of inputs, and the definition's first output of the first one."""
    sets = [inputs(op, case, dtype, device, seed, variant=variant) for seed in (0, 1)]
    reference = _first(OPS[op].definition(**sets[0])).clone()
    return sets, reference


def _op(settings: Settings, op: str, variant: str, direction: str, case: Case, dtype: torch.dtype, name: str) -> Any:
    device = settings.device
    sets, reference = prepared(op, variant, case, dtype, device.type)
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
    return [{**record, **times(rounds), "bytes": cost.bytes, "flops": cost.flops}]


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
            "batch": case.N, "dtype": name_of(dtype), "contender": "cudnn-frontend", **times(rounds),
            "bytes": cost.bytes, "flops": cost.flops,
        }
    ]  # fmt: skip


def items(settings: Settings) -> Iterator[Item]:
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
