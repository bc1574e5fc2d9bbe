"""The command line: exit codes, messages, what `bench` finds and writes, `info`, and the report made of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resnet_fast
from benchmarks import report
from resnet_fast.__main__ import main
from resnet_fast.commands import images, machine, sources, steps, timing
from resnet_fast.commands.progress import Progress

ROOT = Path(__file__).parents[1]
needs_photographs = pytest.mark.skipif(
    not (find_spec("sklearn") and find_spec("PIL")), reason="needs scikit-learn and Pillow"
)
CPU = torch.device("cpu")
SMALL = ["--model", "cifar_resnet20", "--batch", "2", "--rounds", "2", "--against", "channels_last", "--device", "cpu"]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turns of one or two calls, and torch's threads as they were."""
    monkeypatch.setattr(timing, "_TURN", 1e-3)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_small() -> nn.Module:
    """What --model tests.test_commands:make_small builds: no batch norm has seen a batch."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(5))


def make_text() -> str:
    return "no module"


def make_trouble() -> nn.Module:
    raise KeyError("weights")


# ---- bench


@needs_photographs
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_bench(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    against = ["--against", "eager,channels_last", "--dtype", "float32,bfloat16"]
    assert main(["bench", *SMALL, *against, "--mode", mode, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    order = [out.index(word) for word in ("cpu  ", "fused: ", "equality: ", "speed: ")]
    assert order == sorted(order)

    result = json.loads(file.read_text())
    assert result["passed"] and all(check["ok"] for check in result["equality"])
    assert {(c["mode"], c["dtype"]) for c in result["equality"]} >= {("eval", "float32"), ("eval", "bfloat16")}
    if mode == "training":
        kinds = {c["what"] for c in result["equality"] if c["mode"] == "train"}
        assert kinds == {"outputs", "loss", "gradients, worst", "gradients, median", "running statistics"}
    statuses = {row["status"] for row in result["explain"]}
    assert statuses == {"fused", "partly"}  # the paper's CIFAR networks have opaque shortcuts
    assert [(s["dtype"], s["batch"], s["mode"]) for s in result["speed"]] == [
        ("float32", 2, mode),
        ("bfloat16", 2, mode),
    ]
    for setting in result["speed"]:
        assert [c["name"] for c in setting["contenders"]] == ["eager", "channels_last", "resnet_fast"]
        for c in setting["contenders"]:
            p20, p50, p80 = c["ms"]
            assert 0 < p20 <= p50 <= p80 and c["ratio"] > 0 and c["peak"] > 0 and c["rounds"] == 2
            assert c["images_per_second"] == pytest.approx(2 / p50 * 1e3)
    assert {"date", "commit", "cpu", "versions", "command", "build"} <= result.keys()
    assert str(tmp_path) not in file.read_text()  # no paths of this machine


@needs_photographs
def test_bench_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "speed.png"
    assert main(["bench", *SMALL, "--dtype", "float32", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@needs_photographs
def test_plot_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", *SMALL, "--plot", "speed.png"]) == 2
    captured = capsys.readouterr()
    assert "pip install -e .[bench]" in captured.err and not captured.out  # before the work starts


@needs_photographs
@pytest.mark.parametrize(
    ("backend", "op", "mode", "what"),
    [
        ("onednn", "conv_affine_act", "inference", "outputs"),
        ("native", "affine_act_backward", "training", "gradients, median"),
        ("native", "conv_backward", "training", "gradients, worst"),
        ("native", "bn_stats", "training", "running statistics"),
    ],
)
def test_wrong_kernels_are_found(
    backend: str, op: str, mode: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from resnet_fast import dispatch

    wrong_op = "conv_stats" if op == "bn_stats" else op
    if dispatch.reasons(wrong_op, CPU, torch.float32)[backend] is not None:
        pytest.skip(f"{backend} cannot run {op} here")
    right = getattr(dispatch.backend(backend), wrong_op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        answer = right(*args, **kwargs)
        if op == "bn_stats":
            return *answer[:2], answer[2] * 1.001, *answer[3:]
        if op == "affine_act_backward":
            return (answer[0], *(s * 2 for s in answer[1:]))
        if op == "conv_backward":
            return tuple(t * 1.05 for t in answer)
        return answer * 1.01

    monkeypatch.setattr(dispatch.backend(backend), wrong_op, wrong)
    dispatch._choose.cache_clear()
    file = tmp_path / "result.json"
    try:
        assert main(["bench", *SMALL, "--dtype", "float32", "--mode", mode, "--json", str(file)]) == 1
    finally:
        dispatch._choose.cache_clear()
    captured = capsys.readouterr()
    assert "NOT EQUAL" in captured.err and what in captured.err
    assert "speed:" not in captured.out
    result = json.loads(file.read_text())
    assert not result["passed"] and result["speed"] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "resnet5"], ["--model resnet5", "Did you mean 'resnet50'?"]),
        (["--model", "torchvison:resnet18"], ["torchvison", "Did you mean 'torchvision'?"]),
        (["--model", "transformers:resnet-51"], ["Did you mean 'resnet-50'?"]),
        (["--model", "tests.test_commands:make_smal"], ["Did you mean 'make_small'?"]),
        (["--model", "tests.test_commands:make_text"], ["returned str"]),
        (["--model", "tests.test_commands:make_trouble"], ["make_trouble() raised KeyError", "test_commands.py, line"]),
        (["--dtype", "bfloat"], ["--dtype bfloat", "Did you mean 'bfloat16'?"]),
        (["--batch", "0"], ["--batch 0", "positive"]),
        (["--batch", "two"], ["--batch two"]),
        (["--against", "compiled"], ["Did you mean 'compile'?"]),
        (["--against", "max_autotune"], ["supported is inference on a GPU", "Remedy: --against eager,channels_last"]),
        (
            ["--mode", "training", "--against", "openvino"],
            ["supported is inference on a CPU", "Remedy: --against eager"],
        ),
        (["--against", "openvin"], ["Did you mean 'openvino'?"]),
        (["--mode", "train"], ["Did you mean 'training'?"]),
        (["--images", "no-such-folder"], ["no such folder"]),
        (["--json", "no-such-folder/x.json"], ["--json", "no such folder"]),
        (["--size", "-1"], ["--size -1"]),
        (["--model", "resnet18", "--images", "."], ["no jpg or png"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
@needs_photographs
def test_mistakes(
    args: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--device", "cpu", *args]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "error:" in line]
    for word in words:
        assert word in line
    assert not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@needs_photographs
def test_images_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 50), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (60, 33), 128).save(tmp_path / "b.JPG", "JPEG")
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    warned: list[str] = []
    pictures = images.load(str(tmp_path), warned.append)
    assert len(pictures.images) == 2 and pictures.skipped == 1
    assert "c.jpg" in warned[0] and "1 of 3" in warned[1] and str(tmp_path) not in "".join(warned)
    x = images.crops(pictures, 5, 32, seed=3)
    assert x.shape == (5, 3, 32, 32) and torch.equal(x, images.crops(pictures, 5, 32, seed=3))
    assert x[0, 0].mean() == pytest.approx((1 - 0.485) / 0.229, abs=1e-4)  # red, as ImageNet normalises it

    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.JPG").write_bytes(b"")
    with pytest.raises(images.CommandError, match="none of its 3"):
        images.load(str(tmp_path), warned.append)


def test_own_weights_are_left_alone() -> None:
    source = sources.build("tests.test_commands:make_small", seed=0)
    assert source.own_weights
    torch.testing.assert_close(source.model[0].weight, make_small()[0].weight)


def test_calibration() -> None:
    source = sources.build("cifar_resnet20", seed=0)
    x = torch.randn(32, 3, 32, 32)
    sources.calibrate(source.model, [x], seed=0)
    assert not source.model.training
    seen: dict[str, torch.Tensor] = {}
    for name, m in source.model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.momentum == 0.1 and m.weight.min() >= 0.5 and m.weight.std() > 0.1
            m.register_forward_hook(
                lambda m, _, z, name=name: seen.update({name: (z - m.bias.view(1, -1, 1, 1)).var()})
            )
    with torch.no_grad():
        source.model(x)
    assert all(0.3 < float(v) < 3 for v in seen.values())


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "timm:resnet18", "transformers:resnet-18", "smp:Unet/resnet18"]
)
def test_libraries(name: str) -> None:
    try:
        source = sources.build(name, seed=0)
    except sources.CommandError as error:
        assert "pip install" in str(error)
        pytest.skip(str(error))
    assert any(row.status == "fused" for row in resnet_fast.explain(source.model))
    with torch.inference_mode():
        assert steps.tensors(source.model(torch.randn(1, 3, 64, 64)))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(sources.CommandError, match=r"timm.*pip install"):
        sources._import("timm", "timm")


# ---- timing


def test_turns_are_interleaved_and_paired() -> None:
    order: list[str] = []
    clock = {"slow": 0.004, "resnet_fast": 0.002}

    def contender(name: str) -> timing.Contender:
        def call() -> None:
            order.append(name)
            torch.empty(1000)
            begin = timing.time.perf_counter()
            while timing.time.perf_counter() - begin < clock[name]:
                pass

        return timing.Contender(name, call)

    setting = timing.Setting("inference", 8, 32, torch.float32, CPU)
    entries = [contender("slow"), contender("resnet_fast")]
    slow, ours = timing.measure(entries, setting, Progress(), rounds=4, seconds=1, baseline="slow")
    assert order[-8:] == ["slow", "resnet_fast", "resnet_fast", "slow"] * 2
    assert slow.ratio == 1 and ours.ratio is not None and ours.ratio > 1.2
    assert ours.peak is not None and ours.peak >= 4000


def test_a_contender_that_fails_is_reported() -> None:
    def fail() -> None:
        raise RuntimeError("no compiler\nand a long story")

    entries = [timing.Contender(n, lambda: torch.empty(9)) for n in ("channels_last", "resnet_fast")]
    entries.insert(1, timing.Contender("eager", fail))
    setting = timing.Setting("inference", 8, 32, torch.float32, CPU)
    results = timing.measure(entries, setting, Progress(), rounds=2, seconds=1, baseline="channels_last")
    assert results[1].failed == "RuntimeError: no compiler" and results[1].ms is None
    assert results[2].ms is not None


def test_quantile() -> None:
    assert [timing.quantile([3, 1, 2], q) for q in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]


# ---- info, and the command itself


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (*resnet_fast.dispatch.OPS, torch.__version__, "openmp", "operations on cuda"):
        assert word in out


def test_info_json() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "resnet_fast", "info", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["support"]) == {"cpu", "cuda"}
    for ops in found["support"].values():
        assert set(ops) == set(resnet_fast.dispatch.OPS)
        for by_dtype in ops.values():
            assert set(by_dtype) == {"float32", "bfloat16", "float16"}
            assert all(answers["torch"] is None for answers in by_dtype.values())
    assert "cuda" in found["build"] or "remedy" in found["build"]
    if sys.platform == "linux":
        assert len(found["openmp_runtimes"]) == 1


def test_info_without_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "resnet_fast._C", None)
    assert "remedy" in machine.build()
    assert machine.isa() is None
    assert main(["info"]) == 0
    assert "pip install -e ." in capsys.readouterr().out


def test_info_warns_of_two_openmp_runtimes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    assert main(["info"]) == 0
    assert "2 OpenMP runtimes" in capsys.readouterr().out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert resnet_fast.__version__ in capsys.readouterr().out
    for command in ("bench", "info", "models"):
        assert main([command, "--help"]) == 0
        assert "examples:" in capsys.readouterr().out


def test_mistyped_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bnch"]) == 2
    assert "Did you mean 'bench'?" in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "load", interrupted)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "resnet-fast: interrupted"


# ---- benchmarks/report.py


def _result(**changes: Any) -> dict[str, Any]:
    contender = {"failed": None, "ms": [1, 1, 1], "images_per_second": 20.0, "ratio": 1.0}
    ours = {**contender, "name": "resnet_fast", "images_per_second": 123.4, "ratio": 1.5}
    broken = {"name": "compile", "failed": "no compiler", "images_per_second": None, "ratio": None}
    speed = {
        "mode": "inference", "dtype": "float32", "batch": 4, "device": "cpu", "baseline": "channels_last",
        "contenders": [{**contender, "name": "channels_last"}, broken, ours],
    }  # fmt: skip
    return {
        "model": {"name": "resnet50"}, "cpu": "A CPU", "threads": 2, "isa": "avx2", "gpus": [], "passed": True,
        "versions": {"torch": "2.13", "triton": None, "resnet_fast": "0.1.0"}, "commit": "abc",
        "command": "resnet-fast", "date": "2026-01-02T03:04:05", "speed": [speed], **changes,
    }  # fmt: skip


def _report(tmp_path: Path, readme: str | None, *results: dict[str, Any], options: tuple[str, ...] = ()) -> int:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    for i, result in enumerate(results):
        (tmp_path / f"r{i}.json").write_text(json.dumps(result))
    return report.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md"), "--no-plot", *options])


def test_report(tmp_path: Path) -> None:
    readme = f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n"
    assert _report(tmp_path, readme, _result()) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\nrest\n") and "old" not in text
    assert "| inference | float32 | 4 | 20.0 (1.00) | does not run | 123 (1.50) |" in text
    assert "A CPU" in text and "commit abc" in text and "2026-01-02" in text
    assert _report(tmp_path, None, options=("--check",)) == 0
    assert _report(tmp_path, readme, options=("--check",)) == 1


@pytest.mark.parametrize(
    ("readme", "results", "words"),
    [
        ("no markers", [_result()], report.BEGIN),
        (f"{report.END}{report.BEGIN}", [_result()], "stands before"),
        (None, [_result()], "no such file"),
        ("", [], "no results"),
        ("", [_result(passed=False)], "equality test failed"),
        ("", [{"x": 1}], "not written by"),
    ],
    ids=["markers missing", "markers turned", "no README", "no results", "not equal", "other JSON"],
)
def test_report_mistakes(
    readme: str | None, results: list[dict[str, Any]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(tmp_path, readme, *results) == 2
    assert words in capsys.readouterr().err


def test_ctrl_c_in_a_process() -> None:
    """The real signal: one line, no traceback, status 130."""
    if os.name == "nt":
        pytest.skip("POSIX signals")
    code = (
        "import os, signal, sys; from resnet_fast.commands import info; from resnet_fast.__main__ import main\n"
        "info.collect = lambda argv: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.strip() == "resnet-fast: interrupted" and not done.stdout
