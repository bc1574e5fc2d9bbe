"""make test-gpu, benchmarks/check_gpu.py, and the table that the sanitizer runs, reduced.py; on the CPU and small."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import check_gpu, reduced
from resnet_fast import dispatch
from tests import cases

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


PASSING = "def test_good(): pass\n"
FAILING = "def test_bad(): assert False\n"


@pytest.mark.slow
def test_check_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_two.py").write_text(PASSING + FAILING)
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--mark",
        "not gpu",
        "--seconds",
        "90",
        "--",
        str(tmp_path),
        "-n",
        "0",
    ]
    assert check_gpu.main([*arguments, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]) == 1
    out = capsys.readouterr().out
    assert "1 passed, 1 failed" in out and "test_two::test_bad" in out
    if "compute-sanitizer is not there" in out:
        assert out.count("compute-sanitizer is not there") == 3
    assert (tmp_path / "out" / "test-gpu.xml").is_file()
    log = (tmp_path / "out" / "test-gpu.log").read_text()
    assert "test_good PASSED" in log and log.rstrip().endswith(out[out.index("test-gpu:") :].rstrip())
    assert "1 failed, 1 passed" in (tmp_path / "out" / "test-gpu.log").read_text()


def test_a_junit_file_in_words(tmp_path: Path) -> None:
    file = tmp_path / "x.xml"
    assert "no JUnit file" in check_gpu.counted(file)
    skips = "".join(f'<testcase name="s{i}"><skipped message="needs a CUDA device"/></testcase>' for i in range(2))
    fails = "".join(f'<testcase classname="t" name="f{i}"><failure/></testcase>' for i in range(20))
    file.write_text(
        f'<testsuites><testsuite tests="23" failures="20" errors="0" skipped="2"><testcase name="p"/>{skips}{fails}'
        "</testsuite></testsuites>"
    )
    words = check_gpu.counted(file)
    assert words.startswith("1 passed, 20 failed, 2 skipped\n    failed: t::f0\n")
    assert "and 5 more" in words and words.endswith("2 skipped: needs a CUDA device")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_tests_still_report(tmp_path: Path) -> None:
    """Ctrl-C, or the end of a time that others set: a JUnit file, a summary, status 130."""
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\ndef test_good(): pass\n"
        f"def test_slow(): pathlib.Path({str(tmp_path / 'began')!r}).touch(); time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "benchmarks.check_gpu", "--output", str(tmp_path / "out"), "--mark", "not gpu"]
    command += ["--", str(tmp_path), "-n", "0", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    end = time.time() + 120
    while time.time() < end and not (tmp_path / "began").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "test-gpu: interrupted" in out
    assert "1 passed" in out and (tmp_path / "out" / "test-gpu.xml").is_file()


def test_a_hanging_step_is_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log"
    begin = time.time()
    assert (
        check_gpu._run([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], log, 2, {})
        is None
    )
    assert time.time() - begin < 30 and "here" in log.read_text()
    assert check_gpu._run([sys.executable, "-c", "raise SystemExit(3)"], log, 30, {}) == 3


def test_the_reduced_table_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert reduced.main(["--device", "cpu", "--seconds", "1.5"]) == 0
    out = capsys.readouterr().out
    assert "native bn_stats plain" in out and ", 0 raised" in out


def test_the_reduced_table_begins_with_every_kernel_of_tritons() -> None:
    """Those too that nothing but a table of measurements would choose: a sanitizer sees all, however short its time."""
    pytest.importorskip("triton")
    from resnet_fast.backends.triton import common

    if reason := common.unable(torch.device("cpu"), torch.float32):
        pytest.skip(f"launches are recorded on CPU tensors: {reason}")
    sources = (ROOT / "resnet_fast" / "backends" / "triton").glob("*.py")
    kernels = {name for file in sources for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    by_name = {case.name: case for case in cases.TINY}
    soon = [
        row for row in reduced.table() if row[0] == reduced.CASES[0] and row[2] == next(iter(cases.VARIANTS[row[1]]))
    ]
    assert reduced.table()[: len(soon)] == soon
    with common.recorded() as launches, torch.no_grad():
        for case, op, variant, dtype, name in soon:
            if name == "triton" and dtype == torch.float32 and hasattr(dispatch.backend(name), op):
                for _, call in reduced.ways(name, op, cases.inputs(op, by_name[case], variant=variant)):
                    call()
    assert {launch.kernel.fn.__name__ for launch in launches} == kernels and len(kernels) > 15
