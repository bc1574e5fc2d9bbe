"""Runs csrc/cuda on a CPU: g++ compiles the same sources, and every thread of a block is a fiber.

``run(op, kwargs)`` is the op on the native backend's own Python, with the kernels executed here. A ``machine().Fault``
says what a GPU would not have forgiven, and in which thread and line. Every op runs twice, the second time with other
bytes in fresh memory and with threads, warps and blocks in the opposite order: its outputs must be equal in every bit.

Of CUDA C++ there is what include/ has: kernels are launched by cudaLaunchKernelEx, not by <<<>>>; dynamic shared memory
and instructions without a name come from csrc/cuda/ptx.cuh; new .cu files in csrc/cuda are found by themselves.

The build is g++'s, a CUDA toolkit is not needed: it happens at the first use and is kept in build/cuda_on_cpu.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import resnet_fast
from tests.twice import twice as run_twice

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_cpu"

COMMON = "-std=c++17 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -Wall"
#: Every load and store is announced (thread), and so are misaligned pointers and indices off an array. nvcc knows no
#: strict aliasing. At -O1 an access stays on the line and in the order of the source.
INSTRUMENTED = (
    "-O1 -fno-strict-aliasing -fno-threadsafe-statics -Wno-unknown-pragmas -Wno-sign-compare "
    "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 "
    "-fsanitize=alignment,bounds,integer-divide-by-zero -fno-sanitize-recover=alignment,bounds,integer-divide-by-zero "
    "-x c++ -include cuda_runtime.h"
)
BINDINGS = "-O0 -DRESNET_FAST_WITH_CUDA=1 -DRESNET_FAST_WITHOUT_CPU"


class BuildError(RuntimeError):
    """g++ refused; the message is its own."""


def why_not() -> str | None:
    """None where the machine can be built, else the reason. Builds nothing."""
    if platform.system() != "Linux":
        return f"runs on Linux, and this is {platform.system()}"
    if not shutil.which("g++"):
        return "needs g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs Python.h (Debian and Ubuntu: python3-dev)"
    return None


# ---- The build


def _pybind11() -> str:
    """pybind11's headers: those of the package, or the copy that torch brings along."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return str(pybind11.get_include())
    return str(Path(torch.__file__).parent / "include")


def _commands() -> Iterator[tuple[Path, list[str]]]:
    """Every source with the command that compiles it, but for its output."""
    include = ["-I", str(HERE / "include"), "-I", str(CSRC)]
    python = ["-isystem", _pybind11(), "-isystem", sysconfig.get_path("include")]
    # Where both hold a function of the standard library, the linker keeps the first: not the instrumented one.
    for flags, sources, includes in (
        ("-O2", [*CSRC.glob("cuda/*.cpp"), *set(HERE.glob("*.cpp")) - {HERE / "module.cpp"}], include),
        (BINDINGS, [CSRC / "bindings.cpp", HERE / "module.cpp"], include + python),
        (INSTRUMENTED, [*CSRC.glob("cuda/*.cu"), *HERE.glob("*.cu")], include),
    ):
        for source in sorted(sources):
            yield source, ["g++", *COMMON.split(), *flags.split(), *includes, "-c", str(source)]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def _make(target: Path, command: Sequence[str]) -> None:
    """Runs the command that writes ``target``, which appears only when it is whole."""
    temporary = target.with_suffix(".tmp")
    result = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
    temporary.rename(target)


def _objects() -> dict[Path, list[str]]:
    """The object files that the sources make as they are now, and the commands. A header is part of every object."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    headers = [p for folder in (CSRC, HERE) for p in sorted(folder.rglob("*")) if p.suffix in (".h", ".cuh")]
    common = _digest(version, *(p.read_bytes() for p in headers))
    objects = {}
    for source, command in _commands():
        key = _digest(common.encode(), source.read_bytes(), shlex.join(command).encode())
        objects[BUILD / f"{source.parent.name}_{source.stem}-{key}.o"] = command
    return objects


def build() -> Path:
    """The module, built from the sources as they are now."""
    if reason := why_not():
        raise BuildError(f"cuda_on_cpu {reason}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest -n wait for the first
        objects = _objects()
        linked = _digest(*(str(path).encode() for path in objects))
        module = BUILD / f"machine-{linked}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if module.exists():
            return module
        made = [path for path in objects if not path.exists()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_make, made, [objects[path] for path in made]))
        if objects != _objects():
            for path in made:
                path.unlink()
            raise BuildError("the sources changed while they were compiled: run again")
        _make(module, ["g++", "-shared", *map(str, objects)])
        for path in set(BUILD.iterdir()) - {*objects, module, BUILD / "lock"}:
            path.unlink()
    return module


# ---- The modules


def _load(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _shared_arrays(path: Path) -> Iterator[tuple[int, int, str]]:
    """Address, size and name of every function's static arrays: that is what ``__shared__`` makes."""
    lines = [
        subprocess.run(["nm", "-S", *flags, path], capture_output=True, text=True, check=True).stdout.splitlines()
        for flags in ([], ["-C"])
    ]
    for mangled, demangled in zip(*lines, strict=True):
        fields = mangled.split()
        if len(fields) == 4 and fields[2] in "bB" and fields[3].startswith("_ZZ"):
            yield int(fields[0], 16), int(fields[1], 16), demangled.split(maxsplit=3)[3]


@functools.cache
def _built() -> Path | BuildError:
    """One attempt for each process: a thousand tests need not hear g++ out again."""
    try:
        return build()
    except BuildError as error:
        return error


@functools.cache
def _modules() -> tuple[ModuleType, ModuleType]:
    """The machine (module.cpp), and the ops on it (csrc/bindings.cpp): one file holds both."""
    path = _built()
    if isinstance(path, BuildError):
        raise path
    machine, ops = _load(f"{__name__}.machine", path), _load(f"{__name__}._C", path)
    machine.set_shared_arrays(list(_shared_arrays(path)))
    return machine, ops


def machine() -> ModuleType:
    """The machine itself: its Fault, its settings, and the probes."""
    return _modules()[0]


@functools.cache
def kernels() -> Any:
    """``_C.cuda`` of :func:`native`."""
    return _Kernels(_modules()[1].cuda)


@functools.cache
def native() -> ModuleType:
    """A second copy of the native backend, to whose ``_C.cpu`` belong the CUDA kernels."""
    ours = _modules()[1]
    replacement = SimpleNamespace(DType=ours.DType, build_info=ours.build_info, cpu=kernels(), cuda=kernels())
    name = f"{__name__}.native"
    source = ROOT / "resnet_fast" / "backends" / "native" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(source.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with mock.patch.object(resnet_fast, "_C", replacement, create=True):
        spec.loader.exec_module(module)
    return module


# ---- Running


class _Kernels:
    """The functions of ``_C.cuda``, for which the tensors among their arguments are all there is to access."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def call(**arguments: Any) -> Any:
            with operands(**{k: v for k, v in arguments.items() if isinstance(v, Tensor)}):
                return function(**arguments)

        return call


_inputs: set[int] = set()  # the storages that a kernel may not write


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _nbytes(t: Tensor) -> int:
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


@contextmanager
def operands(**tensors: Tensor) -> Iterator[None]:
    """Kernels may access these tensors and no other memory; inputs of the op that runs, for reading alone."""
    machine().set_operands(
        [(name, t.data_ptr(), _nbytes(t), _storage(t) not in _inputs) for name, t in tensors.items()]
    )
    try:
        yield
    finally:
        machine().set_operands([])


@contextmanager
def shared_memory(nbytes: int) -> Iterator[None]:
    """A GPU on which a block may have so much of it; else it is an A100, of 163 KiB."""
    machine().set_shared_limit(nbytes)
    try:
        yield
    finally:
        machine().set_shared_limit(163 << 10)


def twice(function: Callable[[], Any], inputs: Sequence[Tensor] = ()) -> Any:
    """What ``function`` returns, if it does so whatever fresh memory holds and in whatever order threads run."""

    def once(backwards: bool) -> Any:
        machine().set_reversed(backwards)
        return function()

    _inputs.update(map(_storage, inputs))
    try:
        return run_twice(once, machine().Fault)
    finally:
        _inputs.clear()


def run(op: str, kwargs: dict[str, Any]) -> Any:
    """The op on CUDA's kernels."""
    function = getattr(native(), op)
    return twice(lambda: function(**kwargs), [v for v in kwargs.values() if isinstance(v, Tensor)])
