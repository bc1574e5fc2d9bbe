"""resnet-fast analyze: what is measured, that the effects show, and that finished networks are not trained again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import models
from resnet_fast.__main__ import main
from resnet_fast.recipes import analyses, data, networks

TINY = ["--data", "synthetic", "--size", "8", "--device", "cpu", "--threads", "1", "--batch", "32"]


@pytest.fixture(autouse=True)
def drawn() -> None:
    pytest.importorskip("matplotlib")


def test_responses_are_those_behind_batch_norm() -> None:
    torch.manual_seed(0)
    model = models.create("cifar_resnet20")
    x = torch.randn(8, 3, 8, 8)
    found = analyses.responses(model, x)
    assert len(found) == 19  # 3x3 layers, as in the paper's figure 7
    with torch.no_grad():
        first = model.bn1(model.conv1(x))  # type: ignore[operator]
    assert found[0] == pytest.approx(float(first.std()))
    assert not any(m._forward_hooks for m in model.modules())


def test_gradient_norms_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    fused, plain = (models.create("cifar_resnet20", shortcut="B") for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    found = analyses.gradients(resnet_fast.fuse(fused), [(x, labels)])
    nn.functional.cross_entropy(plain.train()(x), labels).backward()
    expected = [m.weight.grad.norm() for m in plain.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert found == pytest.approx([float(e) for e in expected], rel=1e-3)


def test_the_gradient_effect() -> None:
    """At the start, before 56 plain layers the gradient is far larger than behind them; shortcuts keep it level."""
    found = data.open_data("synthetic", size=8, samples=64)
    assert isinstance(found.train, data.Images)
    x, labels = found.train.images.float() / 128 - 1, found.train.labels
    ratio = {}
    for kind in ("plain", "residual"):
        torch.manual_seed(0)
        norm = analyses.gradients(networks.build(analyses.network(kind, 56, "A", found)), [(x, labels)])
        ratio[kind] = norm[0] / norm[-1]
    assert ratio["plain"] > 10 * ratio["residual"]


def test_degradation_keeps_what_it_has_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--depths", "20", "--shortcuts", "A,B", "--iterations", "3", "--output", str(tmp_path)]
    assert main(["analyze", "degradation", *options]) == 0
    out = capsys.readouterr().out
    assert "plain-20" in out and "residual-20" in out
    result = json.loads((tmp_path / "degradation.json").read_text())
    assert [(r["kind"], r["shortcut"]) for r in result["runs"]] == [
        ("plain", None),
        ("residual", "A"),
        ("residual", "B"),
    ]
    assert (tmp_path / "degradation.png").read_bytes().startswith(b"\x89PNG")
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "networks").iterdir()}
    assert len(times) == 3
    assert main(["analyze", "responses", *options]) == 0  # of the same networks
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "networks").iterdir()} == times
    nets = json.loads((tmp_path / "responses.json").read_text())["networks"]
    assert [len(net["std"]) for net in nets] == [19, 19]


def test_gradients_by_shortcut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "gradients", *TINY, "--depths", "20", "--output", str(tmp_path)]) == 0
    nets = json.loads((tmp_path / "gradients.json").read_text())["networks"]
    assert [n["shortcut"] for n in nets] == [None, "A", "B", "C"] and all(len(n["norm"]) == 19 for n in nets)
    assert "first / last" in capsys.readouterr().out and (tmp_path / "gradients.png").exists()


@pytest.mark.slow
def test_fusion(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    options = ["--iterations", "2", "--size", "32", "--batch", "8", "--device", "cpu", "--threads", "1"]
    assert main(["analyze", "fusion", *options, "--output", str(tmp_path)]) == 0
    sets = json.loads((tmp_path / "fusion.json").read_text())["sets"]
    assert len(sets) == 6 and all(len(s["fused"]) == len(s["plain"]) == len(s["layout"]) == 2 for s in sets)
    assert (tmp_path / "fusion.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--depths", "21"], "--depths 21: supported are 20, 32, 44, 56, 110, 1202"),
        (["--shortcuts", "D"], "--shortcuts D: supported are A, B, C"),
        (["--data", "imagefolder:x"], "no such folder"),
        (["--iterations", "-1"], "--iterations -1"),
    ],
)
def test_bad_input(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "degradation", *TINY, "--output", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err
