"""pytest --benchmark runs benchmarks/ alone; plain pytest runs the tests alone. Markers: gpu, slow."""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("resnet_fast").addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks in benchmarks/ instead of the tests, print their table and save JSON "
        "(under .benchmarks/, or where --benchmark-json says)",
    )


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("--benchmark measures one thing at a time: leave out -n and --dist")
    option = config.option
    if not (option.benchmark_json or option.benchmark_save or option.benchmark_autosave):
        option.benchmark_autosave = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
    if option.benchmark_json:  # else the directory is missed only after the last benchmark
        option.benchmark_json.parent.mkdir(parents=True, exist_ok=True)
    if option.benchmark_columns is None:
        option.benchmark_columns = ["min", "median", "iqr", "rounds", "iterations"]
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # no path on the command line
        config.args = [str(BENCHMARKS)]


def pytest_report_header(config: pytest.Config) -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch: not installed"
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch: {torch.__version__}, {torch.get_num_threads()} threads, {gpu}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--benchmark")
    rest = [item for item in items if _is_benchmark(item) is not wanted]
    if rest:
        items[:] = [item for item in items if _is_benchmark(item) is wanted]
        config.hook.pytest_deselected(items=rest)

    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _is_benchmark(item: pytest.Item) -> bool:
    return BENCHMARKS in item.path.parents or "benchmark" in getattr(item, "fixturenames", ())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What a number depends on goes into the JSON, and the machine's name does not."""
    import torch

    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    if importlib.util.find_spec("triton"):
        from importlib.metadata import version

        machine_info["triton"] = version("triton")
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda
