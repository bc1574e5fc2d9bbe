"""Triton's kernels compiled for GPUs that are not here: nothing spills, all fits, what is aligned is moved wide.

bfloat16, which Triton's interpreter cannot run, is covered here and on a GPU. tests/compile_triton.py compiles, in one
process per architecture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
#: Bytes of shared memory that one program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
BN_ACT = (
    "bn_stats",
    "bn_finalize",
    "affine_act",
    "affine_act_mask",
    "affine_act_backward",
    "bn_backward_sums",
    "bn_backward_finalize",
    "bn_backward_apply",
)
STEM = ("affine_act_maxpool", "maxpool_backward_sums", "maxpool_backward_apply")
#: Files of kernels that are compiled here, with their ops.
FILES = {("bn_act.py", "bn_act_backward.py", "bn_stats.py", "reduce.py"): BN_ACT, ("stem.py",): STEM}
OPS = tuple(op for ops in FILES.values() for op in ops)
#: Kernels that see nothing but per-channel vectors and partial sums.
SMALL = {"bn_finalize_kernel", "bn_backward_finalize_kernel", "finish_stats_kernel", "finish_sums_kernel"}

pytestmark = pytest.mark.slow
Record = dict[str, Any]


def start(arch: int, *ops: str, **env: str) -> subprocess.Popen[str]:
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **env}
    command = [sys.executable, "-m", "tests.compile_triton", "--arch", str(arch), *ops]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Every kernel in every configuration, for every architecture."""
    found: list[Record] = []
    for process in [start(arch, *OPS) for arch in SHARED]:
        out, errors = process.communicate(timeout=540)
        assert process.returncode == 0, errors[-2000:]
        found += map(json.loads, out.splitlines())
    return found


def name_of(record: Record) -> str:
    return f"{record['kernel']} {record['shape']} {record['dtype']} sm_{record['arch']} {record['constants']}"


def wide(records: list[Record]) -> Iterator[Record]:
    """Those that move activations with aligned rows."""
    return (r for r in records if r["shape"] == "wide" and r["kernel"] not in SMALL)


def test_every_kernel_is_compiled(records: list[Record]) -> None:
    folder = ROOT / "resnet_fast" / "backends" / "triton"
    sources = [(folder / file).read_text() for files in FILES for file in files]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    assert kernels == {r["kernel"] for r in records} and len(kernels) >= 11
    for kernel in kernels - SMALL:
        found = {(r["arch"], r["shape"], r["dtype"]) for r in records if r["kernel"] == kernel}
        dtypes = ("float32", "bfloat16", "float16")
        assert found >= {(a, s, d) for a in SHARED for s in ("wide", "masked") for d in dtypes}, kernel


def test_nothing_spills_and_everything_fits(records: list[Record]) -> None:
    for r in records:
        assert r["stack"] == 0 and r["local"] == 0, f"{name_of(r)}: {r['stack']} bytes of stack, {r['local']} local"
        assert r["shared"] <= SHARED[r["arch"]], f"{name_of(r)}: {r['shared']} bytes of shared memory"
        # Registers are given out in eights; bandwidth needs several programs on a multiprocessor.
        registers = 32 * r["options"]["num_warps"] * 8 * -(-r["registers"] // 8)
        assert r["kernel"] in SMALL or 65536 // registers >= 3, f"{name_of(r)}: {r['registers']} registers"


def test_what_is_aligned_is_moved_in_16_bytes(records: list[Record]) -> None:
    """Beside masks (single bytes of 8 channels), indices (bytes, as many as values) and partial sums (fp32)."""
    for r in wide(records):
        loads, stores = {int(k) for k in r["loads"]}, {int(k) for k in r["stores"]}
        index = 32 if r["dtype"] == "float32" else 64
        assert 128 in loads and loads <= {128, 8 if r["constants"].get("PACKED") else 128, index}, name_of(r)
        if r["kernel"] not in ("maxpool_backward_sums_kernel", "maxpool_backward_apply_kernel"):
            assert index not in loads, name_of(r)
        if "sums" in r["kernel"] or "stats" in r["kernel"]:
            assert stores == {32}, name_of(r)
        else:
            assert 128 in stores, name_of(r)
            masks = {8} if r["kernel"] == "affine_act_kernel" and "mask" not in r["absent"] else set()
            partial = {32} if r["kernel"] == "affine_act_backward_kernel" else set()
            indices = {index} if r["kernel"] == "affine_act_maxpool_kernel" else set()
            assert stores == {128} | masks | partial | indices, name_of(r)


def test_arithmetic_is_rounded_as_it_should_be(records: list[Record]) -> None:
    """To nearest even at the store, fused multiply-adds, and a maximum that keeps NaN."""
    for r in wide(records):
        ptx = " ".join(r["ptx"])
        assert "fma.rn.f32" in ptx, name_of(r)
        if "sums" in r["kernel"] or "stats" in r["kernel"] or r["kernel"] == "affine_act_backward_kernel":
            continue  # they store fp32, or dz as it came
        short = {"float32": "", "bfloat16": "bf16", "float16": "f16"}[r["dtype"]]
        assert not short or re.search(rf"cvt\.rn\.(relu\.)?{short}(x2)?\.f32", ptx), f"{name_of(r)}: {ptx}"
        if r["constants"].get("RELU") or "maxpool_kernel" in r["kernel"]:
            assert "max.NaN.f32" in ptx, name_of(r)


def test_elementwise_kernels_need_no_shared_memory(records: list[Record]) -> None:
    """A thread loads its own per-channel values: none waits for another."""
    for r in wide(records):
        if r["kernel"] in ("affine_act_kernel", "bn_backward_apply_kernel", "maxpool_backward_apply_kernel"):
            packs_halves = r["dtype"] == "float32" and "mask" not in r["absent"] and r["kernel"] == "affine_act_kernel"
            assert r["barriers"] == 0 or packs_halves, f"{name_of(r)}: {r['barriers']} barriers"


def test_an_interpreted_process_compiles_nothing() -> None:
    process = start(90, "bn_stats", TRITON_INTERPRET="1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "TRITON_INTERPRET is set" in errors
