"""``make test-gpu``: every test that needs a GPU, then compute-sanitizer over a reduced table, within a time.

``python -m benchmarks.check_gpu --output DIR`` writes DIR/test-gpu.xml (JUnit), DIR/test-gpu.log and, at the end, a
summary. The tests run in several processes on the one GPU where pytest-xdist is there: they are small, and what they
wait for is the CPU, which compiles Triton's kernels and computes references. Nothing is timed in them. As a pytest
plugin this module ends a process whose GPU context is lost, so that a new one runs the remaining tests: one stray
access would else fail every test behind it. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_PROCESSES = 8  # on one GPU; each holds a context of about half a gigabyte
_SANITIZER_SHARE = 0.3  # of the time
_GRACE = 20.0  # s to end after an interrupt
#: In this order. initcheck looks at our kernels alone: libraries read padding that nobody wrote.
_TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": (),
    "racecheck": (),
    "initcheck": ("--kernel-regex", "kns=resnet_fast"),
}
_FOUND = 86  # exit status of compute-sanitizer where it found something


# ---- the plugin


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """After a failure, see whether the GPU still answers; if not, end this process (xdist starts another)."""
    yield
    if call.excinfo is None or not torch.cuda.is_initialized() or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(
            f"\n{item.nodeid}: the GPU's context is lost: {error}\n{call.excinfo.value}",
            file=sys.__stderr__,
            flush=True,
        )
        os._exit(70)


# ---- the command


class Outcome(NamedTuple):
    """One step: its name, whether it passed (None: it did not run), in words, and how long it took (s)."""

    name: str
    passed: bool | None
    words: str
    seconds: float


def _run(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Exit status; None where the time ran out (after SIGINT: pytest writes its report). Output: ``log``."""
    print(f"==> {' '.join(command)}", flush=True)
    with log.open("a") as f:
        f.write(f"\n$ {' '.join(command)}\n")
        f.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=_GRACE)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            try:  # whatever it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def junit(file: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the names of what failed."""
    counts: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "failed": []}
    if not file.is_file():
        return counts
    for suite in ElementTree.parse(file).getroot().iter("testsuite"):
        for key in ("tests", "failures", "errors", "skipped"):
            counts[key] += int(suite.get(key, 0))
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(f"{case.get('classname', '')}::{case.get('name', '')}")
    return counts


def tests(args: argparse.Namespace, log: Path, seconds: float) -> Outcome:
    """Every test marked gpu (or ``--mark``)."""
    file = args.output / "test-gpu.xml"
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        args.mark,
        "-q",
        f"--junitxml={file}",
        "-p",
        "benchmarks.check_gpu",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(_PROCESSES, os.cpu_count() or 1)), "--max-worker-restart=50"]
    begin = time.time()
    # OMP_NUM_THREADS: the processes share the cores.
    status = _run([*command, *args.pytest], log, seconds, {"OMP_NUM_THREADS": "1"})
    counts = junit(file)
    bad = counts["failures"] + counts["errors"]
    words = f"{counts['tests'] - bad - counts['skipped']} passed, {bad} failed, {counts['skipped']} skipped"
    if status is None:
        words += f"; cut off after {seconds:.0f} s"
    elif status == 5:
        words += "; no test was found"
    words += "".join(f"\n    {name}" for name in counts["failed"][:15])
    return Outcome("tests", status == 0, words, time.time() - begin)


def sanitize(tool: str, options: Sequence[str], args: argparse.Namespace, log: Path, seconds: float) -> Outcome:
    """One tool of compute-sanitizer over ``benchmarks.reduced``."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        return Outcome(tool, None, "compute-sanitizer is not there", 0.0)
    if seconds < 15:
        return Outcome(tool, None, "no time was left", 0.0)
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "20", *options,
        sys.executable, "-m", "benchmarks.reduced", "--seconds", str(int(seconds * 0.8)),
    ]  # fmt: skip
    begin = time.time()
    # Without torch's caching allocator every tensor has bounds of its own.
    status = _run(command, log, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"})
    words = {0: "nothing found", _FOUND: "errors found: see test-gpu.log", None: "cut off at the end of its time"}
    return Outcome(
        tool, None if status is None else status == 0, words.get(status, f"ended with {status}"), time.time() - begin
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a test failed or the sanitizer found something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_gpu", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of test-gpu.xml and test-gpu.log")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything (default: %(default)g)")
    parser.add_argument("--mark", default="gpu", help="pytest's -m (default: %(default)s)")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, behind --")
    args = parser.parse_args(argv)
    args.output = args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "test-gpu.log"
    log.write_text("")
    end = time.time() + args.seconds
    share = 0.0 if args.no_sanitizer else _SANITIZER_SHARE
    outcomes = [tests(args, log, args.seconds * (1 - share))]
    if not args.no_sanitizer:
        for i, (tool, options) in enumerate(_TOOLS.items()):
            outcomes.append(sanitize(tool, options, args, log, (end - time.time()) / (len(_TOOLS) - i)))
    lines = ["test-gpu:"]
    for o in outcomes:
        verdict = "-" if o.passed is None else "ok" if o.passed else "FAILED"
        lines.append(f"  {o.name:10} {verdict:7} {o.seconds:5.0f} s  {o.words}")
    text = "\n".join(lines)
    with log.open("a") as f:
        f.write(f"\n{text}\n")
    print(text)
    return int(any(o.passed is False for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
