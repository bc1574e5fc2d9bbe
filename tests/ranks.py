"""Two processes that meet by gloo on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo, which tests on the CPU need"
)


def two_ranks(worker: str, case: str, folder: Path, timeout: float = 120) -> list[Any]:
    """What both ranks of ``python -m tests.<worker> RANK 2 FILE CASE`` leave in FILE.RANK."""
    folder.mkdir(exist_ok=True)
    file = folder / "meeting"
    command = [sys.executable, "-W", "ignore", "-m", f"tests.{worker}"]
    ranks = [
        subprocess.Popen([*command, str(r), "2", str(file), case], cwd=ROOT, stderr=subprocess.PIPE) for r in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=timeout)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return [torch.load(f"{file}.{r}") for r in (0, 1)]
