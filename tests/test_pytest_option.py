"""The root conftest: which items `pytest` and `pytest --benchmark` run, and what happens to marked ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "tests/test_some.py": """
        import pytest

        def test_plain(): pass

        @pytest.mark.gpu
        def test_on_gpu(): assert __import__("torch").cuda.is_available()
        """,
    "benchmarks/bench_some.py": """
        def bench_short(benchmark): benchmark.pedantic(int, rounds=2)

        def test_long(benchmark): benchmark.pedantic(int, rounds=2)
        """,
}
needs_pytest_benchmark = pytest.mark.skipif(not find_spec("pytest_benchmark"), reason="needs pytest-benchmark")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small repository with our conftest.py and pyproject.toml, one test file and one benchmark file."""
    for name in ("conftest.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(line[8:] for line in text.splitlines()))
    return tmp_path


def run_pytest(project: Path, *args: str, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-v", *args]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def outcomes(output: str) -> dict[str, str]:
    return dict(re.findall(r"::(\w+) (PASSED|SKIPPED|FAILED|ERROR)", output))


@pytest.mark.parametrize("paths", [[], ["."]], ids=" ".join)
def test_plain_pytest_leaves_out_benchmarks(project: Path, paths: list[str]) -> None:
    assert set(outcomes(run_pytest(project, *paths))) == {"test_plain", "test_on_gpu"}


def test_gpu_marker(project: Path) -> None:
    import torch

    output = run_pytest(project)
    if torch.cuda.is_available():
        assert outcomes(output)["test_on_gpu"] == "PASSED"
    else:
        assert outcomes(output)["test_on_gpu"] == "SKIPPED"
        assert "needs a CUDA device" in output


@needs_pytest_benchmark
@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], {"bench_short", "test_long"}),
        (["benchmarks/bench_some.py"], {"bench_short", "test_long"}),
        (["-k", "short"], {"bench_short"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_benchmark_runs_benchmarks_alone(project: Path, args: list[str], names: set[str]) -> None:
    output = run_pytest(project, "--benchmark", *args)
    assert outcomes(output) == dict.fromkeys(names, "PASSED")
    assert "Name (time in" in output  # the table
    (saved,) = project.glob(".benchmarks/*/*.json")
    assert {entry["name"] for entry in json.loads(saved.read_text())["benchmarks"]} == names


@needs_pytest_benchmark
def test_benchmark_json_goes_where_it_is_told(project: Path) -> None:
    run_pytest(project, "--benchmark", "--benchmark-json=out/new/result.json")
    machine = json.loads((project / "out/new/result.json").read_text())["machine_info"]
    assert {"torch", "threads"} <= machine.keys()
    assert "node" not in machine
    assert not list(project.glob(".benchmarks/*/*.json"))


@pytest.mark.slow
@needs_pytest_benchmark
def test_benchmark_compares_across_commits(project: Path) -> None:
    """A run, a commit, and a run beside it: one table, in which the older run is the baseline."""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *words], cwd=project, check=True, capture_output=True)

    git("init", "-q")
    for message in ("one", "two"):
        (project / "message.txt").write_text(message)
        git("add", ".")
        git("commit", "-qm", message)
        options = ["--benchmark-compare"] if message == "two" else []
        output = run_pytest(project, "--benchmark", *options)
    saved = [json.loads(file.read_text()) for file in sorted(project.glob(".benchmarks/*/*.json"))]
    assert len({result["commit_info"]["id"] for result in saved}) == 2
    assert "Comparing against benchmarks from" in output
    rows = re.findall(r"^bench_short \((\w+)\)", output, re.MULTILINE)
    assert len(rows) == 2 and "NOW" in rows and any(row.startswith("0001") for row in rows)


def test_benchmark_without_the_plugin(project: Path) -> None:
    without = ["-p", "no:benchmark"]
    output = run_pytest(project, "--benchmark", *without, code=pytest.ExitCode.USAGE_ERROR)
    assert "--benchmark needs pytest-benchmark" in output
    assert set(outcomes(run_pytest(project, *without))) == {"test_plain", "test_on_gpu"}


@needs_pytest_benchmark
@pytest.mark.skipif(not find_spec("xdist"), reason="needs pytest-xdist")
def test_benchmark_refuses_to_share_the_machine(project: Path) -> None:
    output = run_pytest(project, "--benchmark", "-n2", code=pytest.ExitCode.USAGE_ERROR)
    assert "leave out -n" in output
