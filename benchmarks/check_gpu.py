"""``make test-gpu``: every test that needs a GPU, then compute-sanitizer over a reduced table, within a time.

``python -m benchmarks.check_gpu --output DIR`` writes DIR/test-gpu.xml (JUnit), DIR/test-gpu.log and, at the end, a
summary. The tests run in several processes on the one GPU where pytest-xdist is there: they are small, and what they
wait for is the CPU, which compiles Triton's kernels and computes references. Nothing is timed in them. As a pytest
plugin this module ends a process whose GPU context is lost, so that a new one runs the remaining tests: one stray
access would else fail every test behind it. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
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
_HANGS = 90  # s of one test, after which the log says where it is
_NAMED = 15  # failures named in the summary
_JUNIT, _LOG = "test-gpu.xml", "test-gpu.log"
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


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, and wait: pytest writes its report then."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE)


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
            _stop(process)
            return None
        except KeyboardInterrupt:  # the process is in a session of its own, and has not had it
            _stop(process)
            raise
        finally:
            try:  # whatever it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def junit(file: Path) -> dict[str, Any]:
    """Counts of a JUnit file, the names of what failed, and how often each reason to skip was given."""
    counts: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    counts.update(failed=[], reasons=Counter())
    for suite in ElementTree.parse(file).getroot().iter("testsuite"):
        for key in ("tests", "failures", "errors", "skipped"):
            counts[key] += int(suite.get(key, 0))
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(f"{case.get('classname', '')}::{case.get('name', '')}")
        skipped = case.find("skipped")
        if skipped is not None:
            counts["reasons"][skipped.get("message", "")[:100]] += 1
    return counts


def tests(args: argparse.Namespace, log: Path, seconds: float) -> Outcome:
    """Every test marked gpu (or ``--mark``). The log names each one as it ends, and where one hangs."""
    file = args.output / _JUNIT
    command = [
        sys.executable, "-m", "pytest", "-v", "-m", args.mark, f"--junitxml={file}", "-p", "benchmarks.check_gpu",
        "-o", f"faulthandler_timeout={_HANGS}",
    ]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(_PROCESSES, os.cpu_count() or 1)), "--max-worker-restart=50"]
    begin = time.time()
    # OMP_NUM_THREADS: the processes share the cores.
    status = _run([*command, *args.pytest], log, seconds, {"OMP_NUM_THREADS": "1"})
    words = counted(file)
    if status is None:
        words += f"\n    cut off after {seconds:.0f} s"
    elif status == 5:
        words += "\n    no test was found"
    return Outcome("tests", status == 0, words, time.time() - begin)


def counted(file: Path) -> str:
    """A JUnit file in words: how many passed, which failed, why others were skipped."""
    if not file.is_file():
        return "no JUnit file was written: see test-gpu.log"
    counts = junit(file)
    bad = counts["failures"] + counts["errors"]
    words = f"{counts['tests'] - bad - counts['skipped']} passed, {bad} failed, {counts['skipped']} skipped"
    words += "".join(f"\n    failed: {name}" for name in counts["failed"][:_NAMED])
    if len(counts["failed"]) > _NAMED:
        words += f"\n    and {len(counts['failed']) - _NAMED} more: see test-gpu.log"
    return words + "".join(f"\n    {n} skipped: {reason}" for reason, n in counts["reasons"].most_common(5))


def sanitize(tool: str, options: Sequence[str], log: Path, seconds: float) -> Outcome:
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
    """Exit status 0; 1 where a test failed or the sanitizer found something; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_gpu", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of test-gpu.xml and test-gpu.log")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything (default: %(default)g)")
    parser.add_argument("--mark", default="gpu", help="pytest's -m (default: %(default)s)")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, behind --")
    args = parser.parse_args(argv)
    args.output = args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / _LOG
    log.write_text("")
    (args.output / _JUNIT).unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    interrupted = False
    try:
        for outcome in _steps(args, log):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        interrupted = True
        if not outcomes:
            outcomes.append(Outcome("tests", False, counted(args.output / _JUNIT), 0.0))
    text = "\n".join(["test-gpu: interrupted" if interrupted else "test-gpu:", *map(_line, outcomes)])
    with log.open("a") as f:
        f.write(f"\n{text}\n")
    print(text)
    return 130 if interrupted else int(any(o.passed is False for o in outcomes))


def _steps(args: argparse.Namespace, log: Path) -> Iterator[Outcome]:
    """The tests, and each tool of compute-sanitizer, as they end."""
    end = time.time() + args.seconds
    yield tests(args, log, args.seconds * (1 - (0.0 if args.no_sanitizer else _SANITIZER_SHARE)))
    for i, (tool, options) in enumerate(() if args.no_sanitizer else _TOOLS.items()):
        yield sanitize(tool, options, log, (end - time.time()) / (len(_TOOLS) - i))


def _line(o: Outcome) -> str:
    verdict = "-" if o.passed is None else "ok" if o.passed else "FAILED"
    return f"  {o.name:10} {verdict:7} {o.seconds:5.0f} s  {o.words}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit from outside is as good as Ctrl-C
    sys.exit(main())
