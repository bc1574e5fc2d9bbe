"""What a number depends on: processor, GPU, versions, build, commit. Nothing here names the machine or its user."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import resnet_fast

__all__ = ["build", "commit", "cpu", "gpus", "isa", "openmp_runtimes", "provenance", "version_of", "versions"]


def cpu() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, multiprocessors and memory (bytes) of every CUDA device."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "multiprocessors": p.multi_processor_count,
                "memory": p.total_memory,
            }
        )
    return found


def driver() -> str | None:
    """Version of the NVIDIA kernel driver, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "unknown"


def version_of(package: str) -> str | None:
    """Of an installed package; None: absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of Python, torch and what it brings, and this package; None: absent."""
    onednn = re.search(r"(?:MKL-DNN|oneDNN)\D*?v?(\d+(?:\.\d+)+)", torch.__config__.show())
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "resnet_fast": resnet_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "onednn": onednn.group(1) if onednn and torch.backends.mkldnn.is_available() else None,
        "driver": driver(),
    }


def build() -> dict[str, Any]:
    """The record of the compiled kernels: ``_C.build_info()``, or {"missing": why, "remedy": how}."""
    try:
        extension = importlib.import_module("resnet_fast._C")
    except ImportError as error:
        absent = importlib.util.find_spec("resnet_fast._C") is None
        return {
            "missing": "resnet_fast._C was not built" if absent else f"resnet_fast._C does not load: {error}",
            "remedy": "pip install -e . (needs a C++17 compiler), then look here again",
        }
    return dict(extension.build_info())


def isa() -> str | None:
    """The instruction set that our CPU kernels chose on this processor; None without them."""
    try:
        return str(importlib.import_module("resnet_fast._C").cpu.isa())
    except (ImportError, AttributeError):
        return None


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes in this process. More than one costs speed: their threads fight."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and len(line.split(maxsplit=5)) == 6}
    return sorted({Path(f).name for f in files if re.match(r"lib(g|i)?omp\d*[-.]", Path(f).name)})


def commit() -> str | None:
    """The commit of the checkout that this package was imported from, "-dirty" if it was changed; None elsewhere."""
    root = Path(resnet_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "resnet_fast", "csrc", "setup.py")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changed else head


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """All of the above, the date (UTC) and the command; of paths in the command, the last part alone."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    record = build()
    return {
        "command": shlex.join(["resnet-fast", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "versions": versions(),
        "isa": isa(),
        "build": record,
    }
