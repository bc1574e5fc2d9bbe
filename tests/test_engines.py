"""Other inference engines as contenders of resnet-fast bench."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fast.__main__ import main
from resnet_fast.commands import engines, timing

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip


def needed(name: str) -> None:
    if os.environ.get("RESNET_FAST_REQUIRE_LIBRARIES") != "1":
        pytest.importorskip(name)


def setting(dtype: torch.dtype = torch.float32, mode: str = "inference") -> timing.Setting:
    return timing.Setting(mode, 2, 16, dtype, CPU)


@pytest.mark.parametrize("name", engines.ENGINES)
def test_numbers(name: str) -> None:
    needed(name)
    model, x = network(), torch.randn(2, 3, 16, 16)
    call = timing.contender(name, model, x, setting()).call
    torch.testing.assert_close(call(), model(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(call(), model(x), rtol=1e-3, atol=1e-4)
    assert model[0].weight.dtype == torch.float32  # it runs a copy


@pytest.mark.parametrize("name", engines.ENGINES)
def test_bfloat16_or_the_reason(name: str) -> None:
    needed(name)
    x = torch.randn(2, 3, 16, 16)
    call = timing.contender(name, network(), x, setting(torch.bfloat16)).call
    try:
        found = call()
    except RuntimeError as error:
        assert "bfloat16: " in str(error)
    else:
        torch.testing.assert_close(found, network()(x), rtol=0.1, atol=0.1)


def test_other_dtypes_are_refused() -> None:
    call = timing.contender("openvino", network().half(), torch.randn(2, 3, 16, 16), setting(torch.float16)).call
    with pytest.raises(RuntimeError, match="float16; supported are float32 and bfloat16"):
        call()


@pytest.mark.parametrize(("mode", "device"), [("training", "cpu"), ("inference", "cuda")])
def test_inference_on_a_cpu_alone(mode: str, device: str) -> None:
    wrong = timing.Setting(mode, 2, 16, torch.float32, torch.device(device))
    with pytest.raises(ValueError, match=f"openvino: {mode} on {device}; supported is inference on a CPU"):
        timing.contender("openvino", network(), torch.randn(2, 3, 16, 16), wrong)


def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, x: torch.Tensor, dtype: str) -> Any:
        return lambda: 1.01 * model(x).detach().numpy()

    monkeypatch.setitem(engines.ENGINES, "openvino", wrong)
    with pytest.raises(RuntimeError, match=r"its numbers are 1\.0% off"):
        timing.contender("openvino", network(), torch.randn(2, 3, 16, 16), setting()).call()


def make() -> nn.Module:
    return network()


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    for name in engines.ENGINES:
        needed(name)
    file = tmp_path / "result.json"
    command = ["bench", "--device", "cpu", "--model", "tests.test_engines:make", "--size", "16", "--batch", "2"]
    command += ["--dtype", "float32", "--rounds", "2", "--json", str(file)]
    assert main([*command, "--against", "channels_last,openvino,onnxruntime"]) == 0
    result = json.loads(file.read_text())
    assert all(result["versions"][name] for name in engines.ENGINES)
    by_name = {c["name"]: c for c in result["speed"][0]["contenders"]}
    assert all(by_name[name]["images_per_second"] > 0 and by_name[name]["peak"] is None for name in engines.ENGINES)


def test_an_engine_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "openvino", None)
    command = ["bench", "--device", "cpu", "--model", "tests.test_engines:make", "--size", "16", "--batch", "2"]
    assert main([*command, "--dtype", "float32", "--rounds", "2", "--against", "channels_last,openvino"]) == 0
    assert "openvino is not installed. Remedy: pip install -e .[engines]" in capsys.readouterr().out
