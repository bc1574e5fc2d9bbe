"""Compiles Triton kernels for GPUs that are not here, and says what became of them; test_triton_compile.py judges it.

    python -m tests.compile_triton --arch 90 bn_stats affine_act ...

runs those ops on CPU tensors of a few shapes with every launch noted down instead of made, compiles each distinct
launch for that architecture and prints one JSON object a line. It must be a process of its own, without
TRITON_INTERPRET: with it, kernels are Python. An op is covered as soon as its backend function launches through
``common.launch``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.cases import VARIANTS, Case, inputs
from tests.tolerance import DTYPES, name_of

#: Channels that ResNets have (a multiple of 16: "wide"), and that allow no wide access. Kernels do not depend on the
#: rest of the shape. Of one channel, which is a constant to Triton, one dtype will do.
SHAPES = {
    "wide": (Case("wide", 1, 64, 28, 28, 256, 1, 1, 0), DTYPES),
    "masked": (Case("masked", 1, 64, 14, 14, 70, 1, 1, 0), DTYPES),
    "single": (Case("single", 1, 64, 14, 14, 1, 1, 1, 0), (torch.float16,)),
}
#: Convolutions: one shape for every row of their tables of tiles and every kind of layer in ResNets, which differ in
#: filter, stride, and whether channels fit into a narrow tile (64); and one with channels off every block.
CONV_SHAPES = {
    "1x1": (Case("1x1", 1, 256, 14, 14, 64, 1, 1, 0), DTYPES),
    "1x1_expand": (Case("1x1_expand", 1, 64, 14, 14, 256, 1, 1, 0), (torch.bfloat16,)),
    "1x1_first": (Case("1x1_first", 1, 64, 14, 14, 64, 1, 1, 0), (torch.bfloat16,)),
    "1x1_2": (Case("1x1_2", 1, 256, 14, 14, 512, 1, 2, 0), (torch.bfloat16,)),
    "3x3": (Case("3x3", 1, 64, 14, 14, 64, 3, 1, 1), (torch.bfloat16,)),
    "3x3_2": (Case("3x3_2", 1, 128, 14, 14, 128, 3, 2, 1), DTYPES),
    "3x3_wide": (Case("3x3_wide", 1, 256, 14, 14, 256, 3, 1, 1), (torch.bfloat16,)),
    "odd": (Case("odd", 1, 36, 13, 13, 70, 3, 1, 1), (torch.float16,)),
}
#: Triton's names of storage types.
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


class Instance:
    """One way to compile a kernel: what Triton's just-in-time compiler derives from the arguments of a launch."""

    def __init__(self, op: str, shape: str, dtype: torch.dtype, launch: Any) -> None:
        self.op, self.shape, self.dtype, self.kernel = op, shape, name_of(dtype), launch.kernel
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.attributes: dict[tuple[int, ...], list[Any]] = {}
        self.options = {k: v for k, v in launch.arguments.items() if k not in self.kernel.arg_names}
        for i, parameter in enumerate(self.kernel.params):
            self._add(i, parameter, launch.arguments[parameter.name])

    def _add(self, i: int, parameter: Any, value: Any) -> None:
        aligned = False
        if parameter.is_constexpr or value is None or (_is_one(value) and _specialised(parameter)):
            self.constants[parameter.name] = value
            kind = "constexpr"
        elif isinstance(value, torch.Tensor):
            kind = f"*{NAMES[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif type(value).__name__ == "TensorDescriptor":
            kind = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and _specialised(parameter)
        self.signature[parameter.name] = kind
        if aligned:
            self.attributes[(i,)] = [["tt.divisibility", 16]]

    @property
    def key(self) -> str:
        parts = (self.kernel.fn.__name__, self.signature, self.constants, self.attributes, self.options)
        return repr(parts)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def _specialised(parameter: Any) -> bool:
    return not parameter.do_not_specialize


def shapes_of(op: str) -> dict[str, tuple[Case, tuple[torch.dtype, ...]]]:
    return CONV_SHAPES if op.startswith("conv_") else SHAPES


def instances(ops: Iterable[str], only: Iterable[str] = (), ieee: bool = False) -> Iterator[Instance]:
    """Every distinct launch of ``ops``: all variants on all shapes, or on those named; ``ieee``: in float32 alone."""
    from resnet_fast.backends import triton as backend
    from resnet_fast.backends.triton.common import recorded

    seen: set[str] = set()
    for op in ops:
        for variant in VARIANTS[op]:
            for shape, (case, dtypes) in shapes_of(op).items():
                if only and shape not in only:
                    continue
                for dtype in (d for d in dtypes if d == torch.float32 or not ieee):
                    with recorded() as launches:
                        getattr(backend, op)(**inputs(op, case, dtype, variant=variant))
                    assert launches, f"{op} launches nothing through common.launch"
                    for launch in launches:
                        instance = Instance(op, shape, dtype, launch)
                        if instance.key not in seen:
                            seen.add(instance.key)
                            yield instance


def instances_of_ways(ops: Iterable[str], only: Iterable[str], arch: int) -> Iterator[Instance]:
    """Every distinct launch of convolutions in bfloat16 as a table may choose it on sm_``arch``."""
    from resnet_fast.backends.triton import conv_common, conv_descriptor, conv_pointwise

    for module in (conv_common, conv_descriptor, conv_pointwise):
        module.hopper = lambda device: arch >= 90  # type: ignore[attr-defined]
    seen: set[str] = set()
    for op in ops:
        for variant in VARIANTS[op]:
            for shape, (case, _) in CONV_SHAPES.items():
                if shape not in (only or CONV_SHAPES) or shape == "odd":
                    continue
                kwargs = inputs(op, case, torch.bfloat16, variant=variant)
                calls = [kwargs]
                if "residual" in kwargs:  # as the first block's first convolution: a kernel of both gradients by itself
                    calls.append({name: value for name, value in kwargs.items() if name != "residual"})
                for launch in (launch for call in calls for launch in launches_of_ways(op, call)):
                    instance = Instance(op, shape, torch.bfloat16, launch)
                    kind = launch.kernel.fn.__name__
                    if kind.startswith("conv_") and "finish" not in kind and instance.key not in seen:
                        seen.add(instance.key)
                        yield instance


def launches_of_ways(op: str, kwargs: dict[str, Any]) -> Iterator[Any]:
    """What is launched by every way to begin with, and by every option of every direction beside the usual ones.

    And beside written ones: a gradient that is written for one direction is so for the other.
    """
    from resnet_fast.backends.triton import conv, conv_ways
    from resnet_fast.backends.triton.common import recorded

    starts, axes = conv_ways.configurations(op, **kwargs)
    beside = [{**base, axis: option} for base in starts[:2] for axis, options in axes.items() for option in options]
    for way in [*starts, *beside]:
        with recorded() as launches:
            conv.configured(op, way)(**kwargs)
        yield from launches


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory (what is spilled), by the cuobjdump that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def compiled(instance: Instance, arch: int) -> dict[str, Any]:
    """Compile for sm_``arch`` and look at the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    source = ASTSource(instance.kernel, instance.signature, instance.constants, instance.attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=instance.options)
    ptx = kernel.asm["ptx"]
    # (bits of one access) -> how many: "ld.global.L1::evict_last.v4.b32" moves 4 * 32.
    widths: dict[str, dict[int, int]] = {"ld": {}, "st": {}}
    for access, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx):
        width = int(vector or 1) * int(bits)
        widths[access][width] = widths[access].get(width, 0) + 1
    return {
        "op": instance.op,
        "kernel": instance.kernel.fn.__name__,
        "shape": instance.shape,
        "dtype": instance.dtype,
        "arch": arch,
        "constants": {k: v for k, v in instance.constants.items() if v is not None},
        "absent": [k for k, v in instance.constants.items() if v is None],
        "options": instance.options,
        "shared": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
        "loads": widths["ld"],
        "stores": widths["st"],
        "barriers": len(re.findall(r"\bbar\.sync\b|\bbarrier\.sync\b", ptx)),
        "ptx": re.findall(r"\b(?:cvt\.rn\.\S+|wgmma\S+|mma\.sync\S+|cp\.async\S+|max\.NaN\S+|fma\.rn\S+|div\S+)", ptx),
        "seconds": round(time.perf_counter() - start, 3),
    }


def main() -> None:
    """One JSON object a line, on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, required=True, help="80 or 90, for instance")
    parser.add_argument("--shape", action="append", default=[], help="of SHAPES or CONV_SHAPES; all, if not given")
    parser.add_argument("--ways", action="store_true", help="of convolutions, everything that a table may choose")
    parser.add_argument("--ieee", action="store_true", help="float32 convolutions without TF32, and nothing else")
    parser.add_argument("ops", nargs="+")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: kernels are Python, and there is nothing to compile")
    torch.set_num_threads(1)
    if args.ieee:
        torch.backends.cudnn.allow_tf32 = False
    for instance in (
        instances_of_ways(args.ops, args.shape, args.arch) if args.ways else instances(args.ops, args.shape, args.ieee)
    ):
        record = compiled(instance, args.arch)
        record["ptx"] = sorted(set(record["ptx"]))
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
