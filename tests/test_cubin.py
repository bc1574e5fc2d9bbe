"""What nvcc makes of csrc/cuda for sm_80 and sm_90: no spills, no stack frames, 16-byte accesses where they are meant.

Compiled into build/cubin, once for each content of the sources. ``pytest tests/test_cubin.py -rP`` lists registers and
shared memory of every kernel.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "cubin"
ARCHS = ("sm_80", "sm_90")
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-cubin")
#: Bytes of a storage type, by the name that it has in a kernel's template arguments.
ITEMSIZE = {"float": 4, "__half": 2, "__nv_bfloat16": 2}


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or of the part of it that triton brings along."""
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)


needs_nvcc = pytest.mark.skipif(not tool("nvcc"), reason="no nvcc")
needs_cuobjdump = pytest.mark.skipif(not tool("cuobjdump"), reason="no cuobjdump, neither CUDA's nor triton's")


class Kernel(NamedTuple):
    """A kernel as ptxas reports it."""

    name: str  # demangled, without namespaces and parameters
    parameters: str
    symbol: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def wide(self) -> bool:
        """Whether it is the instance, for a storage type and a width, that moves 16 bytes at a time."""
        match = re.match(r"\w+<(\w+), (\d+)\b", self.name)
        return bool(match) and ITEMSIZE.get(match[1], 0) * int(match[2]) == 16


def compile_for(source: Path, arch: str) -> Path:
    """A cubin, beside which lies what ptxas said."""
    headers = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh"))
    nvcc = tool("nvcc")
    assert nvcc
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    parts = [version, arch.encode(), *(p.read_bytes() for p in (*headers, source))]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cubin = BUILD / f"{source.stem}.{arch}.{key}.cubin"
    if not cubin.exists():
        for old in BUILD.glob(f"{source.stem}.{arch}.*"):
            old.unlink()
        temporary = cubin.with_suffix(".tmp")
        command = [nvcc, *FLAGS, f"-arch={arch}", "-I", str(CSRC), str(source), "-o", str(temporary)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        cubin.with_suffix(".log").write_text(result.stdout + result.stderr)
        temporary.rename(cubin)
    return cubin


@functools.cache
def cubins(arch: str) -> tuple[Path, ...]:
    """Of all sources, and of the probes: they use every instruction of ptx.cuh."""
    sources = [*sorted(CSRC.glob("cuda/*.cu")), ROOT / "tests" / "cuda_on_cpu" / "probes.cu"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"lock.{arch}", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest -n wait for the first
        return tuple(pool.map(lambda source: compile_for(source, arch), sources))


def demangled(symbols: list[str]) -> list[str]:
    run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [re.sub(r"(^void )|resnet_fast::cuda::|\(anonymous namespace\)::", "", s) for s in run.stdout.splitlines()]


def kernels(log: str) -> Iterator[Kernel]:
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    assert len(entries) == log.count("Compiling entry function")
    for name, (symbol, stack, stores, loads, registers, rest) in zip(
        demangled([entry[0] for entry in entries]), entries, strict=True
    ):
        shared = re.search(r"(\d+) bytes smem", rest)
        short, _, parameters = name.partition("(")
        yield Kernel(
            short,
            parameters,
            symbol,
            int(registers),
            int(shared[1]) if shared else 0,
            int(stack),
            int(stores) + int(loads),
        )


def all_kernels(arch: str) -> list[Kernel]:
    return [kernel for cubin in cubins(arch) for kernel in kernels(cubin.with_suffix(".log").read_text())]


@functools.cache
def machine_code(cubin: Path) -> dict[str, str]:
    """SASS by the kernel's symbol."""
    program = tool("cuobjdump")
    assert program
    text = subprocess.run([program, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_no_stack(arch: str) -> None:
    found = all_kernels(arch)
    sources = "".join(p.read_text() for p in CSRC.glob("cuda/*.cu"))
    names = {kernel.name.partition("<")[0] for kernel in found}
    assert set(re.findall(r"\b(\w+_kernel)\([^;{]*\)\s*\{", sources)) <= names
    print(f"{arch}\nregisters  shared  kernel")
    for kernel in sorted(found):
        print(f"{kernel.registers:9}  {kernel.shared:6}  {kernel.name}")
    wrong = [k for k in found if k.stack or k.spilled]
    assert not wrong, [f"{k.name}: {k.stack} bytes of stack, {k.spilled} spilled" for k in wrong]


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_wide_kernels_move_16_bytes(arch: str) -> None:
    """Every <T, WIDE<T>> kernel loads, and stores T where it has a T*, 16 bytes at a time, and no T by itself."""
    code = {symbol: sass for cubin in cubins(arch) for symbol, sass in machine_code(cubin).items()}
    wide = [kernel for kernel in all_kernels(arch) if kernel.wide]
    assert len(wide) >= 3 * 5
    for kernel in wide:
        sass = code[kernel.symbol]
        type_name = re.findall(r"<(\w+)", kernel.name)[0]
        assert re.search(r"\bLDG\.E\.(\w+\.)*128\b", sass), f"{kernel.name}: no 16-byte load"
        if type_name == "float":  # a float* may be a workspace
            continue
        if re.search(rf"(^|, ){type_name}\*", kernel.parameters):
            assert re.search(r"\bSTG\.E\.(\w+\.)*128\b", sass), f"{kernel.name}: no 16-byte store"
        narrow = re.findall(r"\b(?:LDG|STG)\.E\.(?:\w+\.)*[US]16\b", sass)
        assert not narrow, f"{kernel.name}: {len(narrow)} accesses of 2 bytes"


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_of_ptx_cuh(arch: str) -> None:
    """What cuda_on_cpu emulates is one instruction each on a GPU."""
    code = machine_code(cubins(arch)[-1])
    matmuls = {name: sass for name, sass in code.items() if "matmul" in name}
    assert len(matmuls) == 4
    for name, sass in matmuls.items():
        for instruction in (r"LDGSTS\.E\.\S*128", r"LDGDEPBAR", r"LDSM\.16\.\S*4", r"HMMA\.16816\.F32"):
            assert re.search(instruction, sass), f"{name}: no {instruction}"
        assert bool(re.search(r"LDSM\.16\.MT88\.4", sass)) == ("Lb1" in name)
        assert ("HMMA.16816.F32.BF16" in sass) == ("bfloat16" in name)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_whole_blocks_use_the_tensor_cores(arch: str) -> None:
    """Every instance multiplies by mma.sync of its type, fed by ldmatrix and cp.async; z goes out in 16 bytes."""
    cubin = next(cubin for cubin in cubins(arch) if cubin.name.startswith("bottleneck."))
    found = {kernel.symbol: kernel for kernel in kernels(cubin.with_suffix(".log").read_text())}
    code = machine_code(cubin)
    assert len(found) == 2 * (4 + 2)  # widths 64 (resident or not) and 128, projection or not
    for symbol, kernel in found.items():
        sass = code[symbol]
        for instruction in (r"LDGSTS\.E\.\S*128", r"LDSM\.16\.\S*4", r"HMMA\.16816\.F32", r"STG\.E\.\S*128"):
            assert re.search(instruction, sass), f"{kernel.name}: no {instruction}"
        assert ("HMMA.16816.F32.BF16" in sass) == ("bfloat16" in kernel.name)
        assert not re.search(r"\bSTG\.E\.(?:\w+\.)*(?:[US]16|64)\b", sass), f"{kernel.name}: narrow stores"
        assert 256 * kernel.registers <= 65536
