"""benchmarks/report.py and figures.py on results of every kind: of a GPU (made up here), of the CPU, of verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, fusions, report, suite
from resnet_fast.commands.timing import GRAPH
from tests import cases

HEAD = {
    "schema": 1, "suite": 1, "command": "python -m benchmarks.suite --device cuda --output out",
    "date": "2026-01-02T03:04:05", "commit": "abc", "cpu": "A CPU", "cores": 16, "threads": 16, "isa": "avx512",
    "gpus": [{"name": "A GPU", "capability": "9.0", "multiprocessors": 132, "memory": 1 << 37}],
    "versions": {"torch": "2.11", "triton": "3.6", "resnet_fast": "0.1.0", "driver": "580", "cuda": "13.0"},
    "clocks": [], "ceilings": {"copy": 4.0e12, "product": 750e12},
    "passed": True, "checked": ["inference", "training"], "failed": [], "left_out": [],
}  # fmt: skip


def made_up() -> dict[str, Any]:
    """A suite's result as a GPU gives it; numbers that no GPU has given, for the shape of tables and pictures."""
    records: list[dict[str, Any]] = [
        {"part": "ceilings", "ceiling": "copy", "rate": 4.0e12},
        {"part": "ceilings", "ceiling": "product", "rate": 750e12},
    ]
    speeds = {"eager": 1.0, "channels_last": 1.6, "compile": 2.0, "compile_max": 2.2, "resnet_fast": 2.5}
    for mode in ("training", "inference"):
        for network, most in (("resnet50", 2500), ("resnet18", 6000)):
            for batch in (32, 128, 256):
                for name, times in speeds.items():
                    for end in ("", GRAPH):
                        speed = most * times * batch / (batch + 60) * (1.2 if end else 1.0)
                        records.append(
                            {
                                "part": mode, "network": network, "mode": mode, "dtype": "bfloat16", "batch": batch,
                                "group": "eager", "contender": name + end, "images_per_second": speed, "failed": None,
                                "ratio": times / 1.6, "ms_p50": batch / speed * 1e3,
                            }
                        )  # fmt: skip
        for i, step in enumerate(fusions.steps("cuda", mode)):
            records.append(
                {
                    "part": mode, "network": "resnet50", "mode": mode, "dtype": "bfloat16", "batch": 128,
                    "group": "fusions", "contender": step.name, "ratio": 1 + 0.1 * i, "ms_p20": 60 / (1 + 0.1 * i),
                }
            )  # fmt: skip
    records.append(
        {
            "part": "training", "network": "timm:resnet50", "mode": "training", "dtype": "bfloat16", "batch": 128,
            "group": "plain", "contender": "resnet_fast", "failed": "RuntimeError: no", "ratio": None,
        }
    )  # fmt: skip
    for op in ("conv_stats", "affine_act_mask", "conv_backward_sums"):
        for i, case in enumerate(cases.resnet50(128)):
            for j, name in enumerate(("native", "triton", "eager")):
                records.append(
                    {
                        "part": "ops", "op": op, "case": case.name, "dtype": "bfloat16", "batch": 128,
                        "contender": name, "share": 0.3 + 0.02 * i + 0.1 * j, "ms_p50": 1.0,
                    }
                )  # fmt: skip
    for batch in (32, 64, 128):
        for name, size in (("channels_last", 90), ("resnet_fast", 70)):
            records.append(
                {
                    "part": "memory", "memory": "training", "network": "resnet50", "dtype": "bfloat16", "batch": batch,
                    "contender": name, "peak_bytes": batch * size << 20, "saved_bytes": batch * (size - 20) << 20,
                }
            )  # fmt: skip
    for name, batch in (("channels_last", 176), ("resnet_fast", 224)):
        records.append(
            {
                "part": "memory", "memory": "largest batch", "network": "resnet50", "dtype": "bfloat16",
                "batch": batch, "contender": name, "limit": 16 << 30, "grain": 16,
            }
        )  # fmt: skip
    return {**HEAD, "records": records}


def _run(folder: Path, *options: str, **results: dict[str, Any]) -> tuple[int, str]:
    readme = folder / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    status = report.main(["--results", str(folder), "--readme", str(readme), *options])
    return status, readme.read_text()


def test_tables_of_a_gpu(tmp_path: Path) -> None:
    status, text = _run(tmp_path, "--no-plot", h=made_up())
    assert status == 0 and "old" not in text and text.endswith("\nrest\n")
    assert "Measured on a GPU: training, inference, single layers, memory; on a CPU: nothing." in text
    assert "Images per second (ratio to eager channels_last, of the same rounds), A GPU:" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| resnet50 | training | bfloat16 | 128 |")]
    assert row.count("|") == 5 + 10 and "(1.00)" in row and "(1.56)" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| timm:resnet50 |")]
    assert "does not run" in row
    assert "driver 580" in text and "commit abc" in text and "benchmarks/results/h.json" in text
    assert "Pictures" not in text  # none lies there


def test_no_gpu_result_is_said_plainly(tmp_path: Path) -> None:
    cpu = {**made_up(), "gpus": [], "command": "python -m benchmarks.suite --device cpu"}
    _, text = _run(tmp_path, "--no-plot", c=cpu)
    assert "Measured on a GPU: nothing; on a CPU: training, inference, single layers, memory." in text
    assert "| resnet50 |" not in text  # `resnet-fast bench` has the CPU's table


def test_a_cpu_run_on_a_gpu_machine_is_no_gpu_result() -> None:
    assert figures.on_gpu(made_up())
    assert not figures.on_gpu({**made_up(), "command": "python -m benchmarks.suite --device cpu"})


def test_wrong_numbers_are_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = _run(tmp_path, "--no-plot", h={**made_up(), "passed": False})
    assert status == 2 and "equality test failed" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = {"dtype": "float32", "nearby": [[2.0, 1.5]]}
    curves = [{**curve, **{n: [2.0, 1.5 + i / 100] for i, n in enumerate(("ours", "torch", "torch_nchw", "float64"))}}]
    check = {
        "mode": "train", "dtype": "float32", "what": "outputs", "tensor": "a", "tensors": 1, "ours": 1e-6,
        "torch": 2e-6, "bound": 5e-6, "largest": 1.0, "ok": True,
    }  # fmt: skip
    verified = {
        **HEAD, "model": {"name": "resnet50"}, "passed": True, "curves": curves,
        "verify": [{"section": "blocks", "checks": [check], "notes": []}],
    }  # fmt: skip
    del verified["suite"]
    status, text = _run(tmp_path, h=made_up(), v=verified)
    assert status == 0
    drawn = {f.name for f in tmp_path.glob("*.png")}
    assert drawn == {*(f"h-{kind}.png" for kind in figures.FIGURES), "v.png"}
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"(benchmarks/results/{name})" in text
    # The same again, and nothing to do.
    assert report.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md"), "--check"]) == 0


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert figures.draw({**made_up(), "records": []}, tmp_path, "x") == [] and not list(tmp_path.iterdir())


def test_summary_of_a_run() -> None:
    text = suite.summary(made_up())
    assert "4000.00 GB/s" in text and "750.00 TFLOP/s" in text and "passed" in text
    assert "conv_stats" in text and "of its ceiling" in text


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    """README's text is that of the committed results, and report makes the same of them again."""
    (tmp_path / "results").mkdir()
    for file in (report.ROOT / "benchmarks" / "results").iterdir():
        shutil.copy(file, tmp_path / "results")
    readme = tmp_path / "README.md"
    shutil.copy(report.ROOT / "README.md", readme)
    before = readme.read_bytes()
    options = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert report.main([*options, "--check"]) == 0
    assert report.main([*options, "--no-plot"]) == 0 and readme.read_bytes() == before


@pytest.mark.slow
def test_the_same_pictures_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _run(tmp_path, h=made_up())
    files = sorted(tmp_path.glob("*.png"))
    first = [file.read_bytes() for file in files]
    _run(tmp_path, h=made_up())
    assert files and [file.read_bytes() for file in files] == first
