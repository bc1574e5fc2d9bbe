"""resnet-fast evaluate: views, ensembles, published weights, the worst classes, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fast import models
from resnet_fast.__main__ import main
from resnet_fast.commands import CommandError
from resnet_fast.recipes import data, evaluation, networks, transforms
from tests.libraries import require
from tests.test_recipes_data import folder_of_images

CPU = torch.device("cpu")


class Colours(nn.Module):
    """Class scores are the mean red, green and blue of an image of any size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def pictures(count: int = 6, size: int = 12) -> data.Images:
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return data.Images(images, torch.arange(count) % 3)


@pytest.fixture
def pre() -> transforms.Preprocess:
    return transforms.Preprocess(8, 9, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7]))


def test_ten_crops_are_four_corners_the_centre_and_their_mirrors(pre: transforms.Preprocess) -> None:
    require("torchvision")
    image = torch.arange(3 * 9 * 9, dtype=torch.uint8).view(3, 9, 9)
    crops = transforms.ten_crops(image, pre)
    corners = [image[:, :8, :8], image[:, :8, 1:], image[:, 1:, :8], image[:, 1:, 1:]]
    assert len(crops) == 10 and all(torch.equal(a, b) for a, b in zip(crops, corners, strict=False))
    assert torch.equal(crops[5], image.flip(2)[:, :8, :8])


@pytest.mark.parametrize("views", [evaluation.Views(), evaluation.Views("10"), evaluation.Views(scales=(8, 10, 16))])
def test_scores_are_averaged_over_views(views: evaluation.Views, pre: transforms.Preprocess) -> None:
    require("torchvision")
    source = pictures()
    found = evaluation.answers(Colours(), source, pre, views, device=CPU, batch=7)
    for i in range(len(source)):
        seen = [Colours()(pre.normalise(view[None])).softmax(1)[0] for view in views.of(source[i][0], pre)]
        assert len(seen) == {"center": 1, "10": 10}[views.crops] * (len(views.scales) or 1)
        torch.testing.assert_close(found.scores[i], torch.stack(seen).mean(0))
    assert torch.equal(found.labels, source.labels) and found.kept.tolist() == list(range(6))


def test_whole_images_are_fully_convolutional() -> None:
    """The last layer at every place, averaged, is what the network says of a larger image."""
    torch.manual_seed(0)
    model = models.create("cifar_resnet20").eval()
    x = torch.randn(1, 3, 40, 56)
    features: list[torch.Tensor] = []
    model.layer3.register_forward_hook(lambda m, i, o: features.append(o))  # type: ignore[union-attr]
    with torch.no_grad():
        said = model(x)
        dense = torch.einsum("nchw,kc->nkhw", features[0], model.fc.weight) + model.fc.bias.view(-1, 1, 1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(dense.mean((2, 3)), said, rtol=1e-4, atol=1e-5)


def test_ensembles_and_the_worst_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = torch.eye(4)[[0, 0, 1, 2, 3, 3]]
    found = evaluation.Answers(scores, labels, torch.arange(6), [])
    assert evaluation.top(found, 1) == pytest.approx(50) and evaluation.top(found, 4) == 100
    worst = evaluation.worst_classes(found, ["a", "b", "c", "d"], 4)
    assert [(w.name, w.images, w.right, w.taken_for) for w in worst] == [
        ("c", 2, 0.0, [("d", 2)]),
        ("b", 2, 50.0, [("c", 1)]),
        ("a", 2, 100.0, []),
    ]
    right = found._replace(scores=torch.eye(4)[labels] * 3)
    assert evaluation.top(evaluation.ensemble([found, right]), 1) == 100
    with pytest.raises(ValueError, match="different images"):
        evaluation.ensemble([found, found._replace(kept=torch.arange(1, 7))])


@pytest.mark.parametrize(
    ("file", "name", "resize"),
    [("resnet18-f37072fd.pth", "IMAGENET1K_V1", 256), ("resnet50-11ad3fa6.pth", "IMAGENET1K_V2", 232)],
)
def test_published_weights_bring_their_preprocessing(file: str, name: str, resize: int, tmp_path: Path) -> None:
    library = require("torchvision").models
    torch.manual_seed(0)
    theirs = library.get_model(file.partition("-")[0], weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / file)
    weights = networks.read(str(tmp_path / file))
    assert weights.origin.endswith(name) and weights.classes is not None and weights.classes[0] == "tench"
    assert weights.preprocess is not None and (weights.preprocess.size, weights.preprocess.resize) == (224, resize)
    ours = networks.build(weights.network).eval()
    networks.load_into(ours, weights)
    # The whole way from an image, as torchvision goes it.
    image = torch.randint(256, (3, 300, 260), dtype=torch.uint8)
    entry = library.get_weight(f"ResNet{weights.network.name[6:]}_Weights.{name}")
    expected = entry.transforms()(image)[None]
    seen = weights.preprocess.normalise(transforms.center(image, weights.preprocess)[None])
    # uint8 is resized in fixed point, which now and then ends one level beside what torchvision's older code rounds to.
    assert (seen - expected).abs().max() <= 1.01 / 255 / 0.224
    assert (seen - expected).abs().mean() <= 0.5 / 255 / 0.224
    with torch.no_grad():
        torch.testing.assert_close(ours(seen), theirs(seen))
    with pytest.raises(CommandError, match="are torchvision's weights of"):
        networks.read(str(tmp_path / file), "resnet34")


def test_renamed_published_weights_are_known_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("torchvision")
    file = tmp_path / "mine.pth"
    torch.save(models.create("resnet18").state_dict(), file)
    plain = networks.read(str(file), "resnet18")
    assert plain.preprocess is None and "nothing more is known" in plain.origin
    assert networks.usual(plain.network).resize == 256

    class Digest:
        def hexdigest(self) -> str:
            return "f37072fd" + 56 * "0"

    monkeypatch.setattr(networks.hashlib, "sha256", lambda content: Digest())
    assert networks.read(str(file)).network.name == "resnet18"


def saved(tmp_path: Path, name: str = "a.pt", classes: int = 10, seed: int = 0) -> str:
    """A state_dict of cifar_resnet20."""
    torch.manual_seed(seed)
    torch.save(models.create("cifar_resnet20", num_classes=classes).state_dict(), tmp_path / name)
    return str(tmp_path / name)


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [saved(tmp_path, f"{i}.pt", seed=i) for i in range(2)]
    out = tmp_path / "result.json"
    options = ["--model", "cifar_resnet20", "--data", "synthetic", "--samples", "32", "--json", str(out)]
    assert main(["evaluate", "--weights", files[0], "--ensemble", files[1], *options]) == 0
    said = capsys.readouterr().out
    assert "ensemble of 2" in said and "the worst classes" in said and "ImageNet's usual one taken" in said
    result: dict[str, Any] = json.loads(out.read_text())
    assert [r["name"] for r in result["results"]] == ["0.pt", "1.pt", "ensemble of 2"]
    assert result["top1"] == result["results"][-1]["top1"] and result["images"] == 8
    assert str(tmp_path) not in out.read_text()
    plain = tmp_path / "plain.json"
    options[-1] = str(plain)
    assert main(["evaluate", "--weights", files[0], "--ensemble", files[1], *options, "--no-fuse"]) == 0
    assert json.loads(plain.read_text())["results"] == result["results"]


def test_evaluate_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("torchvision")
    root = folder_of_images(tmp_path / "images")
    (root / "val" / "class1" / "2.png").write_bytes(b"no image")
    weights = ["--weights", saved(tmp_path, classes=2), "--model", "cifar_resnet20", "--data", f"imagefolder:{root}"]
    for views in ([], ["--crops", "10"], ["--scales", "32,40"]):
        assert main(["evaluate", *weights, *views]) == 0
        assert "1 unreadable images left out: class1/2.png" in capsys.readouterr().out
    assert main(["evaluate", *weights, "--on-corrupt", "error"]) == 2
    assert "unreadable image class1/2.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--crops", "9"], "--crops 9: supported are center, 10"),
        (["--crops", "10", "--scales", "32"], "choose one"),
        (["--scales", "32,x"], "--scales 32,x"),
        (["--data", "digits"], "a.pt: has 7 classes, digits has 10"),
        (["--split", "validation"], "synthetic has none"),
        (["--json", "nowhere/x.json"], "no such folder"),
        (["--model", "cifar_resnet32"], "not of a cifar_resnet32"),
        (["--weights", "nowhere.pt"], "no such file"),
    ],
)
def test_bad_input(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "digits" in options:
        pytest.importorskip("sklearn")
    usual = ["--weights", saved(tmp_path, classes=7), "--model", "cifar_resnet20", "--data", "synthetic"]
    assert main(["evaluate", *usual, "--samples", "8", *options]) == 2
    assert said in capsys.readouterr().err
