"""Tests once more, in a process whose kernels are those of another instruction set than this CPU's best."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def every_isa(test: Callable[[str], None]) -> Any:
    """Decorator: ``test(isa)`` for each that can be built; none in a process that ``run_again`` started."""
    test = pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])(test)
    reason = "this run is one of the instruction sets"
    return pytest.mark.skipif("RESNET_FAST_ISA" in os.environ, reason=reason)(test)


def run_again(isa: str, chosen: str, more_than: int, *files: str, options: tuple[str, ...] = ()) -> None:
    """The tests ``chosen`` (pytest's -k) of ``files`` pass on ``isa``: more than so many, and none is skipped.

    Skips where ``isa`` is not built, not what this CPU has, or what every test runs on anyway.
    """
    from resnet_fast import _C

    if isa not in _C.build_info()["isas"]:
        pytest.skip(f"not built: {isa}")
    if isa == _C.cpu.isa():
        pytest.skip(f"{isa} is what every test here runs on")
    env = {**os.environ, "RESNET_FAST_ISA": isa}
    probe = "import torch\nfrom resnet_fast import _C\nprint(_C.cpu.isa())"
    found = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, timeout=60)
    if "this CPU does not have it" in found.stderr:
        pytest.skip(f"this CPU does not have {isa}")
    assert found.stdout.strip() == isa, found.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *files]
    command += ["-k", chosen, *options]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-600:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > more_than and "skipped" not in result.stdout
