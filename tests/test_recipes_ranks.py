"""resnet-fast train under torchrun: two gloo processes on the CPU, with joined batch statistics and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fast.recipes import checkpoint

from .test_recipes_training import ROOT, assert_same, command, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]


RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

#: The command, and the threads that are left behind it
THREADS = """
import os, sys
from resnet_fast.__main__ import main

status = main(sys.argv[1:])
names = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
print(f"rank {os.environ['RANK']}: {status}, gloo's threads: {[n for n in names if 'gloo' in n]}", flush=True)
"""


def torchrun(output: Path, *options: str, until: str | None = None) -> str:
    """What the command prints, run by two processes; killed at a line that begins with ``until``."""
    pytest.importorskip("matplotlib")
    said: list[str] = []
    with subprocess.Popen(
        [*RANKS, *command(output, *options)[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if until is not None and line.startswith(until):
                workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (process.pid, *map(int, workers)):  # torchrun gives each worker a session of its own
                    os.kill(pid, signal.SIGKILL)
                break
    assert process.returncode == (0 if until is None else -signal.SIGKILL), "".join(said)[-3000:]
    assert any("2 processes" in line for line in said)
    return "".join(said)


def test_two_processes_with_synchronised_batch_norm_are_one(tmp_path: Path) -> None:
    """The same batches, augmentation and statistics as in one process."""
    options = ["--iterations", "4", "--sync-bn", "--lr", "0.001"]
    assert torchrun(tmp_path / "two", *options).count("\nepoch 1 ") == 1
    assert train(tmp_path / "one", *options) == 0
    two, one = (checkpoint.load(tmp_path / run / "last.pt") for run in ("two", "one"))
    assert len(two["rng"]) == 2 and two["rows"][0]["train_loss"] == pytest.approx(
        one["rows"][0]["train_loss"], rel=1e-4
    )
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_fused_as_they_do_unfused(tmp_path: Path) -> None:
    """DistributedDataParallel alone: each process has its own batch statistics; and going on is exact there too."""
    options = ["--epochs", "2", "--lr", "0.001"]
    torchrun(tmp_path / "fused", *options)
    torchrun(tmp_path / "plain", *options, "--no-fuse")
    fused, plain = (checkpoint.load(tmp_path / run / "last.pt") for run in ("fused", "plain"))
    assert [row["epoch"] for row in fused["rows"]] == [1, 2]
    for a, b in zip(fused["rows"], plain["rows"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    assert fused["model"].keys() == plain["model"].keys()
    for name, value in plain["model"].items():
        torch.testing.assert_close(fused["model"][name], value, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")

    # Killed after its first epoch: both processes go on from one checkpoint, and end where the straight run did.
    torchrun(tmp_path / "killed", *options, "--save-every", "2", until="epoch 1")
    assert 2 <= checkpoint.load(tmp_path / "killed" / "last.pt")["iteration"] < 8
    torchrun(tmp_path / "killed", *options, "--save-every", "2", "--resume")
    assert_same(checkpoint.load(tmp_path / "killed" / "last.pt"), fused)


@pytest.mark.parametrize("option", ["--fuse", "--no-fuse", "--sync-bn"])
def test_no_thread_of_the_group_is_left(tmp_path: Path, option: str) -> None:
    """One that lets a tensor go while the interpreter ends aborts the process: seen behind a run that had ended well.

    And a refusal that the first rank alone can know of reaches all of them, as a line instead of a trace.
    """
    pytest.importorskip("matplotlib")
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    words = [*RANKS, str(script), *command(tmp_path / "run", "--iterations", "2", option)[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first, again = (
        subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=environment)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank}: 0, gloo's threads: []" in first.stdout
    for rank in range(2):
        assert f"rank {rank}: 2, gloo's threads: []" in again.stdout
    assert "holds a run. Remedy: --resume" in again.stderr and "Traceback" not in again.stderr
