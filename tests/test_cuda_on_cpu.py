"""The machine that runs CUDA's kernels on a CPU: each of its checks fires, and what is right comes out right."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.dispatch import OPS
from tests import cuda_on_cpu
from tests.able import needs_machine
from tests.cases import TINY, VARIANTS, WHOLE_BLOCKS, WHOLE_STEM, inputs
from tests.tolerance import backends

pytestmark = needs_machine


def launch(
    name: str, x: Tensor | None = None, y: Tensor | None = None, size: Sequence[int] = (), w: Tensor | None = None
) -> None:
    """One kernel of probes.cu."""
    tensors = {key: t for key, t in (("x", x), ("w", w), ("y", y)) if t is not None}
    with cuda_on_cpu.operands(**tensors):
        cuda_on_cpu.machine().probe(name=name, size=list(size), **{key: t.data_ptr() for key, t in tensors.items()})


def probe(name: str, x: Tensor | None, outputs: int, size: Sequence[int] = ()) -> Tensor:
    """The int32 outputs of a kernel, by the rules for ops: twice, the inputs for reading alone."""

    def once() -> Tensor:
        y = torch.empty(outputs, dtype=torch.int32)
        launch(name, x, y, size)
        return y

    return cuda_on_cpu.twice(once, [] if x is None else [x])


def ints(count: int) -> Tensor:
    return torch.randint(0, 1000, (count,), dtype=torch.int32)


# ---- what must not pass

#: Kernel, values of x, of y, and its sizes; then what the fault says, and a thread that it names.
BROKEN: dict[str, tuple[str, int, int, list[int], str, str]] = {
    "read_behind": ("copy", 100, 100, [100, 1], r"reads 4 bytes at offset 400 of x \(400 bytes\)", "(35, 0, 0)"),
    "read_before": ("copy", 100, 100, [100, -1], r"reads 4 bytes that begin 4 before x \(400 bytes\)", "(0, 0, 0)"),
    "write_behind": ("copy_shifted", 9, 9, [9, 1], r"writes 4 bytes at offset 36 of y \(36 bytes\)", "(8, 0, 0)"),
    "write_before": ("copy_shifted", 9, 9, [9, -1], r"writes 4 bytes that begin 4 before y", "(0, 0, 0)"),
    "far": ("read_nothing", 0, 1, [], "reads 4 bytes at 0, far from every operand", "(0, 0, 0)"),
    "straddling": ("copy_wide", 6, 8, [8, 0], r"at offset (16|24) of x \(24 bytes\)", "(1, 0, 0)"),
    "misaligned": ("copy_wide", 64, 64, [60, 1], "address that is 4 bytes off its alignment, 16", "(0, 0, 0)"),
    "output_barrier_before_read": ("swap_through_output", 0, 128, [1, 1], "y that thread .* has .*no barrier", ""),
    "output_barrier_after_read": ("swap_through_output", 0, 128, [2, 1], "y that thread .* has .*no barrier", ""),
    "block_reads_another": ("swap_through_output", 0, 128, [3, 1], "y where another block of this launch", ""),
    "block_writes_anothers": ("swap_through_output", 0, 128, [4, 1], "writes y where another block of this launch", ""),
    "all_blocks_write": ("last_block_wins", 0, 1, [], "writes y where another block of this launch writes it", ""),
    "input": ("write_input", 32, 1, [32], "writes the input x", "(0, 0, 0)"),
    "barrier": ("divergent_barrier", 0, 64, [], r"divergent barrier: thread \(0, 0, 0\) waits in", "(40, 0, 0)"),
    "deadlock": ("shuffle_against_barrier", 0, 64, [], "waits for ever in a shuffle, while thread", "(0, 0, 0)"),
    "mask": ("shuffle_outside_of_mask", 0, 32, [], "a shuffle in whose mask it is not", "(16, 0, 0)"),
    "missing_lane": ("shuffle_from_outside", 0, 32, [], "lane 0 reads lane 20, which takes no part", ""),
    "shared_row": ("shared_index", 0, 8, [4], r"takes element 4 of a 'int \[4\]'", "(0, 0, 0)"),
    "shared_behind": ("dynamic_shared_index", 0, 1, [4, 16], "at offset 16 of the dynamic shared memory", "(0, 0, 0)"),
    "shared_before": ("dynamic_shared_index", 0, 1, [-1, 16], "begin 4 before the dynamic shared", "(0, 0, 0)"),
    "shared_unwritten": ("shared_unwritten", 0, 32, [], "no thread of this block has written", "(31, 0, 0)"),
    "read_too_early": ("swap_neighbours", 64, 64, [1], "no thread of this block has written", "(0, 0, 0)"),
    "write_too_early": ("swap_neighbours", 64, 64, [2], "written, with no barrier in between", "(1, 0, 0)"),
    "async_not_waited": ("copy_async", 256, 256, [1], "before its cp.async was waited for", "(0, 0, 0)"),
    "async_in_flight": ("copy_async", 256, 256, [2], "before its cp.async was waited for", "(0, 0, 0)"),
    "async_of_another": ("copy_async", 256, 256, [3], "no thread of this block has written", "(0, 0, 0)"),
    "mma": ("mma_in_half_a_warp", 0, 32, [], "waits for ever in mma", "(0, 0, 0)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fault(name: str) -> None:
    kernel, x, y, size, message, thread = BROKEN[name]
    with pytest.raises(cuda_on_cpu.machine().Fault, match=message) as fault:
        probe(kernel, ints(x) if x else None, y, size)
    assert str(fault.value).startswith(f"{kernel}: block (")
    assert thread in str(fault.value) and re.search(r"\n  at .*probes\.cu:\d+", str(fault.value))


def test_fault_names_the_block_and_the_line() -> None:
    with pytest.raises(cuda_on_cpu.machine().Fault) as fault:
        probe("copy", ints(100), 100, [100, 1])
    found = re.fullmatch(
        r"copy: block \(1, 0, 0\), thread \(35, 0, 0\) reads .*\n  at copy\(.*\) at probes\.cu:(\d+)", str(fault.value)
    )
    assert found
    source = (cuda_on_cpu.HERE / "probes.cu").read_text().splitlines()
    assert "y[i] = x[i + shift]" in source[int(found[1]) - 1]


def test_output_that_was_not_written() -> None:
    with pytest.raises(cuda_on_cpu.machine().Fault, match=r"output 0.*: 1 elements, the first of them number 99, were"):
        probe("copy", ints(100), 100, [99, 0])


def test_output_that_depends_on_the_order_of_blocks() -> None:
    with pytest.raises(cuda_on_cpu.machine().Fault, match="or on the order of threads"):
        probe("last_atomic_wins", None, 1)


def test_a_fault_leaves_the_machine_as_it_was() -> None:
    x = ints(100)
    with pytest.raises(cuda_on_cpu.machine().Fault):
        probe("copy", x, 100, [100, 1])
    assert torch.equal(probe("copy", x, 100, [100, 0]), x)


def test_nothing_but_operands() -> None:
    """Memory that is the process's own, but no operand of this launch."""
    x, y = ints(64), torch.empty(64, dtype=torch.int32)
    with cuda_on_cpu.operands(y=y), pytest.raises(cuda_on_cpu.machine().Fault, match=r"copy: .* reads 4 bytes"):
        cuda_on_cpu.machine().probe(name="copy", x=x.data_ptr(), y=y.data_ptr(), size=[64, 0])


def test_memset_is_checked() -> None:
    launch("memset", y=torch.empty(8, dtype=torch.int32), size=[32])
    with pytest.raises(cuda_on_cpu.machine().Fault, match="cudaMemsetAsync writes 33 bytes at offset 0 of y"):
        launch("memset", y=torch.empty(8, dtype=torch.int32), size=[33])


def test_launches_that_a_driver_refuses() -> None:
    """More shared memory than 48 KiB must be asked for, and there is an end to it."""
    with pytest.raises(RuntimeError, match="kernel launch: invalid argument"):
        probe("dynamic_shared_index", None, 1, [0, 100_000])
    launch("allow_shared", size=[100_000])
    assert probe("dynamic_shared_index", None, 1, [0, 100_000]).item() == 1
    launch("allow_shared", size=[48 << 10])
    with pytest.raises(RuntimeError, match="shared memory: invalid argument"):
        launch("allow_shared", size=[200_000])


# ---- what must be right


def test_output_as_memory_of_a_block() -> None:
    """Behind a barrier a block may read what its threads wrote; and a launch all that the one before it wrote."""
    assert torch.equal(probe("swap_through_output", None, 128, [0, 2]), torch.arange(128, dtype=torch.int32) ^ 1)


def test_barriers_do_not_wait_for_threads_that_returned() -> None:
    assert probe("barrier_after_return", None, 64).tolist() == [1] * 40 + [2] * 24


@pytest.mark.parametrize("mode", [0, 3], ids=["barrier", "syncwarp"])
def test_shared_memory(mode: int) -> None:
    x = ints(64)
    assert torch.equal(probe("swap_neighbours", x, 64, [mode]), x.view(32, 2).flip(1).flatten())


def test_warp_collectives() -> None:
    x = ints(64)
    x[-1] = 1001  # in the second warp alone
    lane = torch.arange(32)
    expected = []
    for warp in x.view(2, 32):
        odd = sum(1 << i for i in range(32) if warp[i] & 1)
        even_halves = sum(1 << i for i in range(16, 32) if warp[i] & 2)
        columns = [
            warp[5].expand(32),
            warp[lane // 8 * 8 + (lane + 3) % 8],
            warp[torch.where(lane < 3, lane, lane - 3)],
            warp[torch.where(lane % 16 > 12, lane, lane + 3)],
            warp[lane ^ 7],
            torch.tensor(odd, dtype=torch.int64).expand(32),
            (warp == 1001).any().expand(32),
            torch.ones(32),
            warp[lane ^ 16] * 2 + 1,
            torch.where(lane < 16, odd & 0xFFFF, even_halves),
            (x & 1).sum().expand(32),
            torch.ones(32),
        ]
        expected.append(torch.stack([c.to(torch.int64) for c in columns], 1))
    found = probe("warp_collectives", x, 64 * 12).view(64, 12).to(torch.int64)
    found[:, [5, 9]] &= 0xFFFFFFFF
    assert torch.equal(found, torch.cat(expected))


def test_atomics() -> None:
    assert probe("atomics", None, 6).tolist() == [63, -63, 2**31 - 1, 64 % 10, 7, 11]


def test_atomics_across_blocks() -> None:
    """A histogram in shared memory, and the last block's own work by a ticket."""
    x = torch.randint(0, 10, (300,), dtype=torch.int32)
    assert probe("histogram", x, 12, [300]).tolist() == [*x.bincount(minlength=10).tolist(), 5, 300]


@pytest.mark.parametrize("zeros", [False, True], ids=["copied", "zero-filled"])
def test_cp_async(zeros: bool) -> None:
    x = ints(256)
    assert torch.equal(probe("copy_async", x, 256, [4 if zeros else 0]), torch.zeros_like(x) if zeros else x)


@pytest.mark.parametrize("trans", [False, True], ids=["ldmatrix", "ldmatrix_trans"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_product(dtype: torch.dtype, trans: bool) -> None:
    """cp.async, ldmatrix and mma.sync together are a matrix product, rounded as float32 rounds."""
    m, n, k = 48, 24, 80
    x, w = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    # cp.async of a tile stops at the 8th row or column of w: what it brings is all there is.
    stored = w if trans else w.t().contiguous()
    name = f"matmul_{'trans_' if trans else ''}{str(dtype).removeprefix('torch.')}"

    def once() -> Tensor:
        y = torch.empty(m, n)
        launch(name, x, y, [m, n, k], stored)
        return y

    y = cuda_on_cpu.twice(once, [x, stored])
    bound = k * torch.finfo(torch.float32).eps * (x.double().abs() @ w.double().abs())
    assert ((y.double() - x.double() @ w.double()).abs() <= bound).all()


# ---- the ops


def test_every_op_with_a_cuda_kernel_is_in_the_table() -> None:
    """Ops that the native backend has, by its source: it may be unbuilt here."""
    sources = (cuda_on_cpu.ROOT / "resnet_fast" / "backends" / "native").glob("*.py")
    trees = [ast.parse(source.read_text()) for source in sources]
    found_ops = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)} & set(OPS)
    assert len(found_ops) > 10
    for op in found_ops:
        found = [p for p in backends(op) if p.values[0] == "cuda_on_cpu"]
        assert [p.values[2] for p in found] == [torch.float32, torch.bfloat16, torch.float16]
        assert not any(mark.name == "skip" for p in found for mark in p.marks)


def test_every_cuda_kernel_is_reached_by_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of each op, in each of its variants, calls all that _C.cuda has."""
    called: set[str] = set()
    native = cuda_on_cpu.native()
    kernels = cuda_on_cpu.kernels()
    plain = type(kernels).__getattr__

    def spy(self: Any, name: str) -> Any:
        called.add(name)
        return plain(self, name)

    monkeypatch.setattr(type(kernels), "__getattr__", spy)
    for op in OPS:
        for variant in VARIANTS[op] if hasattr(native, op) else ():
            case, dtype = TINY[1], torch.float32
            if op == "bottleneck":
                case, dtype = WHOLE_BLOCKS[variant][0]._replace(H=1, W=1), torch.float16
            if op == "whole_stem":
                case, dtype = WHOLE_STEM._replace(H=1, W=1), torch.float16
            cuda_on_cpu.run(op, inputs(op, case, dtype, variant=variant))
    there = {name for name in dir(kernels._module) if not name.startswith("_")}
    assert there - called <= {"driver_ok"}


def test_collection_builds_nothing() -> None:
    code = "import tests.tolerance as t\nt.backends('affine_act')\nfrom tests import cuda_on_cpu as c\n"
    code += "print(c._modules.cache_info().currsize, c.native.cache_info().currsize)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cuda_on_cpu.ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["0", "0"]
