"""Every script in examples/ runs, with few steps and small images, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import libraries

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
#: torchvision may need help to be imported beside a CPU torch: see libraries.py.
RUN = (
    "import runpy, sys; from tests import libraries; libraries.import_torchvision(); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
#: script -> the library it needs, its arguments, and what it must have said.
SCRIPTS = {
    "torchvision_training.py": ("torchvision", "--steps 2 --batch 4 --size 32", "the losses agree"),
    "timm_training.py": ("timm", "--steps 2 --batch 4 --size 32", "largest difference"),
    "transformers_training.py": ("transformers", "--steps 2 --batch 4 --size 32", "the losses agree"),
    "detection_training.py": ("torchvision", "--steps 2 --size 64", "the losses agree"),
}


def output(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script: str) -> None:
    library, arguments, said = SCRIPTS[script]
    libraries.require(library)
    printed = output(["-c", RUN, str(EXAMPLES / script), *arguments.split()])
    assert said in printed
    assert "fused, " in printed.splitlines()[0] and not printed.startswith("0 fused")


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
@pytest.mark.parametrize("options", ["", "--fsdp --sync-batchnorm"], ids=["ddp", "fsdp"])
def test_torchrun(options: str) -> None:
    script = str(EXAMPLES / "distributed_training.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = output([*launch, script, "--steps", "2", "--batch", "2", "--size", "32", *options.split()])
    assert "2 ranks on" in printed and "equal on all ranks: True" in printed


def test_every_example_is_run() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {*SCRIPTS, "distributed_training.py"}
