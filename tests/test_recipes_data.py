"""Data of the recipes: what is read, how it is split and augmented, and what damaged or missing files say."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast.commands import CommandError
from resnet_fast.recipes import cifar, data, definitions, loading, training, transforms
from resnet_fast.recipes.definitions import RECIPES
from resnet_fast.recipes.schedule import Schedule
from tests.libraries import require

# ---- digits, synthetic


def test_digits_are_split_once_and_for_all() -> None:
    pytest.importorskip("sklearn")
    found, again, other = data.open_data("digits"), data.open_data("digits"), data.open_data("digits", seed=1)
    assert (len(found.train), len(found.test), found.channels, found.size) == (1437, 360, 1, 8)
    assert isinstance(found.train, data.Images) and isinstance(found.test, data.Images)
    assert isinstance(again.test, data.Images) and isinstance(other.test, data.Images)
    assert torch.equal(found.test.images, again.test.images) and not torch.equal(found.test.labels, other.test.labels)
    assert set(found.test.labels.bincount().tolist()) <= {35, 36, 37}  # in proportion to the classes
    wide = data.open_data("digits", size=32)
    assert isinstance(wide.train, data.Images) and wide.train.images.shape == (1437, 3, 32, 32)


def test_synthetic_images_can_be_told_apart() -> None:
    found = data.open_data("synthetic", size=16, samples=40, classes=4)
    assert isinstance(found.train, data.Images) and isinstance(found.test, data.Images)
    assert found.train.images.shape == (40, 3, 16, 16) and len(found.classes) == 4
    means = torch.stack([found.train.images[found.train.labels == c].float().mean(0) for c in range(4)])
    nearest = (found.test.images.float()[:, None] - means).square().sum((2, 3, 4)).argmin(1)
    assert torch.equal(nearest, found.test.labels)


@pytest.mark.parametrize("spec", ["digit", "cifar10", "digits:here", "imagefolder:"])
def test_unknown_data(spec: str) -> None:
    with pytest.raises(CommandError, match="--data "):
        data.open_data(spec)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(CommandError, match=r"needs sklearn.*pip install -e .\[recipes\]"):
        data.open_data("digits")


# ---- CIFAR-10


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images a file instead of 10000."""
    monkeypatch.setattr(cifar, "_IMAGES", 10)
    random = torch.Generator().manual_seed(0)
    for i, name in enumerate((*cifar._TRAIN, *cifar._TEST)):
        rows = torch.randint(256, (10, 3073), generator=random, dtype=torch.uint8)
        rows[:, 0] = torch.arange(10)
        rows[:, 1] = i
        (tmp_path / f"{name}.bin").write_bytes(bytes(rows.flatten().tolist()))
    return tmp_path


def test_cifar_binary(small_cifar: Path) -> None:
    found = data.open_data(f"cifar10:{small_cifar}", holdout=0.1)
    assert isinstance(found.train, data.Images) and isinstance(found.test, data.Images)
    assert found.validation is not None and (len(found.train), len(found.validation)) == (45, 5)  # 45k/5k of 50k
    assert found.test.labels.tolist() == list(range(10)) and int(found.test.images[0, 0, 0, 0]) == 5
    assert found.classes[3] == "cat" and found.flips


def test_cifar_python_batches_are_the_same(small_cifar: Path, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    folder = tmp_path / "other" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*cifar._TRAIN, *cifar._TEST):
        rows = numpy.frombuffer((small_cifar / f"{name}.bin").read_bytes(), dtype=numpy.uint8).reshape(10, 3073)
        content = {b"data": rows[:, 1:].copy(), b"labels": rows[:, 0].tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    ours, theirs = cifar.read(folder.parent), cifar.read(small_cifar)
    for (images, labels), (same_images, same_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


class _Trap:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran code",)


def test_damaged_cifar(small_cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, third = small_cifar / "data_batch_1.bin", small_cifar / "data_batch_3.bin"
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    with pytest.raises(CommandError, match=r"data_batch_1\.bin has 30630 bytes, expected 30730: half-downloaded"):
        cifar.read(small_cifar)
    first.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(CommandError, match="a label of 255, expected 0 to 9"):
        cifar.read(small_cifar)
    third.unlink()
    with pytest.raises(CommandError, match=r"half-downloaded, without data_batch_3\.bin"):
        cifar.read(small_cifar)
    for file in small_cifar.glob("*.bin"):
        file.unlink()
    (small_cifar / "cifar-10-binary.tar.gz").touch()
    with pytest.raises(CommandError, match=r"cifar-10-binary\.tar\.gz is still packed"):
        cifar.read(small_cifar)
    with pytest.raises(CommandError, match="no such folder"):
        cifar.read(small_cifar / "nowhere")
    for name in (*cifar._TRAIN, *cifar._TEST):
        (small_cifar / name).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CommandError, match=r"it names builtins\.print"):
        cifar.read(small_cifar)
    assert "a pickle ran code" not in capsys.readouterr().out


# ---- folders of images


def folder_of_images(root: Path, *, classes: int = 2, each: int = 4, size: int = 40) -> Path:
    """root/{train,val}/<class>/<i>.png, each class of a colour of its own."""
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for c in range(classes):
            where = root / part / f"class{c}"
            where.mkdir(parents=True)
            for i in range(each):
                colour = (250 * c // classes, 20 * i, 90)
                image.new("RGB", (size + 3 * i, size), colour).save(where / f"{i}.png")
    return root


def test_imagefolder(tmp_path: Path) -> None:
    require("torchvision")
    found = data.open_data(f"imagefolder:{folder_of_images(tmp_path)}", size=32)
    assert (len(found.train), len(found.test), found.classes) == (8, 8, ("class0", "class1"))
    pre = training.preprocess_for(found, RECIPES["paper-imagenet"], 0)
    assert pre.mean.shape == (3, 32, 32) and pre.resize == 37
    batch = next(iter(loading.test_batches(found.test, pre, batch=8)))
    assert batch.images.shape == (8, 3, 32, 32) and batch.labels.tolist() == [0] * 4 + [1] * 4
    # Train-time views do not depend on how many processes read.
    views = transforms.spatial("scale", pre)
    one, two = (
        [b.images for b in loading.Batches(found.train, pre, views, batch=4, seed=0, workers=w).epoch(0)]
        for w in (0, 1)
    )
    assert all(map(torch.equal, one, two))


def test_incomplete_folders(tmp_path: Path) -> None:
    require("torchvision")
    with pytest.raises(CommandError, match="no such folder"):
        data.open_data(f"imagefolder:{tmp_path / 'nowhere'}")
    root = folder_of_images(tmp_path)
    (root / "val" / "class1").rename(root / "val" / "other")
    with pytest.raises(CommandError, match="in one of them alone: class1, other"):
        data.open_data(f"imagefolder:{root}")
    for file in (root / "val" / "other").iterdir():
        file.unlink()
    with pytest.raises(CommandError, match="other"):
        data.open_data(f"imagefolder:{root}")
    (root / "val").rename(root / "later")
    with pytest.raises(CommandError, match="half-downloaded, no folder 'val'"):
        data.open_data(f"imagefolder:{root}")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images(workers: int, tmp_path: Path) -> None:
    """In training the next one takes its place, in the test it is left out, and it is counted; or an error."""
    require("torchvision")
    root = folder_of_images(tmp_path)
    file = root / "train" / "class0" / "1.png"
    file.write_bytes(file.read_bytes()[:60])
    (root / "val" / "class1" / "0.png").write_bytes(b"no image")
    found = data.open_data(f"imagefolder:{root}", size=32)
    pre = training.preprocess_for(found, RECIPES["modern"], 0)
    batches = list(loading.Batches(found.train, pre, None, batch=4, seed=0, workers=workers).epoch(0))
    assert sum(len(b.labels) for b in batches) == 8
    corrupt = [name for b in batches for name in b.corrupt]
    assert len(corrupt) == 1 and corrupt[0].startswith("class0/1.png: ") and str(tmp_path) not in corrupt[0]
    tests = list(loading.test_batches(found.test, pre, batch=4, workers=workers))
    assert sum(len(b.labels) for b in tests) == 7 and sum(len(b.corrupt) for b in tests) == 1
    with pytest.raises(CommandError, match=r"class0/1\.png.*--on-corrupt skip"):
        list(loading.Batches(found.train, pre, None, batch=4, seed=0, workers=workers, on_corrupt="error").epoch(0))


# ---- order and augmentation


def test_every_image_once_an_epoch_whatever_the_start_and_the_ranks() -> None:
    images = data.Images(torch.arange(26, dtype=torch.uint8).view(26, 1, 1, 1), torch.arange(26))
    pre = transforms.Preprocess(1, 1, torch.zeros(1), torch.ones(1))

    def labels(epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> list[list[int]]:
        found = loading.Batches(images, pre, None, batch=8, seed=3, rank=rank, world=world)
        assert len(found) == 4
        return [b.labels.tolist() for b in found.epoch(epoch, start)]

    first = labels(0)
    assert sorted(label for part in first for label in part) == list(range(26)) and [len(b) for b in first] == [
        8,
        8,
        8,
        2,
    ]
    assert labels(0) == first and labels(0, 2) == first[2:] and labels(1) != first
    # Two ranks share each batch, but for the last, which has too few for both; and one image makes no batch.
    two = loading.Batches(images, pre, None, batch=8, seed=3, world=2)
    assert len(two) == 3
    halves = [
        [b.labels.tolist() for b in loading.Batches(images, pre, None, batch=8, seed=3, rank=r, world=2).epoch(0)]
        for r in (0, 1)
    ]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(b) for b in first[:3]]


def test_shift_pads_and_crops() -> None:
    x = torch.arange(1, 17.0).view(1, 1, 4, 4).expand(200, 2, 4, 4)
    moved = transforms.shift(x, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], [1] * 4)
    windows = [padded[0, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    seen = {next(k for k, w in enumerate(windows) if torch.equal(w, image)) for image in moved}
    assert seen == set(range(9))


def test_ranks_draw_what_one_process_draws() -> None:
    x = torch.rand(6, 3, 8, 8)
    for change in (transforms.flip, lambda x, g, s: transforms.shift(x, 2, g, s)):
        whole = change(x, torch.Generator().manual_seed(1), (0, 1))
        for rank in (0, 1):
            own = change(x[rank::2], torch.Generator().manual_seed(1), (rank, 2))
            assert torch.equal(own, whole[rank::2])


def test_colours_move_along_the_principal_components() -> None:
    x, std = torch.zeros(2000, 3, 1, 1), torch.tensor([0.5, 1.0, 2.0])
    moved = transforms.lighting(x, std, torch.Generator().manual_seed(0))[:, :, 0, 0] * std
    vectors = torch.tensor(transforms._EIGENVECTORS)
    deviations = (moved @ vectors).std(0)
    torch.testing.assert_close(deviations, 0.1 * torch.tensor(transforms._EIGENVALUES), rtol=0.1, atol=0)


def test_scale_augmentation_is_the_papers() -> None:
    require("torchvision")
    pre = transforms.Preprocess(224, 256, torch.zeros(3), torch.ones(3))
    view = transforms.spatial("scale", pre)
    assert view is not None and view(torch.zeros(3, 300, 500, dtype=torch.uint8)).shape == (3, 224, 224)
    assert {min(view.transforms[0].min_size), max(view.transforms[0].min_size)} == {256, 480}  # type: ignore[attr-defined]


def test_per_pixel_mean() -> None:
    found = data.open_data("synthetic", size=8, samples=30)
    assert isinstance(found.train, data.Images)
    pre = training.preprocess_for(found, RECIPES["paper-cifar"], 0)
    assert pre.mean.shape == (3, 8, 8)
    assert pre.normalise(found.train.images).mean(0).abs().max() < 1e-6
    assert pre.normalise(torch.zeros(1, 3, 12, 12, dtype=torch.uint8)).shape == (1, 3, 12, 12)
    channel = training.preprocess_for(found, RECIPES["fast"], 0).normalise(found.train.images)
    torch.testing.assert_close(channel.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=0)


# ---- recipes


def test_the_papers_recipes() -> None:
    cifar10, imagenet = RECIPES["paper-cifar"], RECIPES["paper-imagenet"]
    for recipe, batch, iterations in ((cifar10, 128, 64_000), (imagenet, 256, 600_000)):
        assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 1e-4)
        assert (recipe.batch, recipe.iterations, recipe.normalise) == (batch, iterations, "pixel")
    assert (cifar10.augment, cifar10.pad, cifar10.holdout) == ("crop", 4, 0.1)
    assert (imagenet.augment, imagenet.lighting, imagenet.schedule) == ("scale", True, "plateau")
    steps = Schedule(cifar10, 64_000, 352)
    found = {i: round(steps.lr(i), 6) for i in (0, 31_999, 32_000, 47_999, 48_000, 63_999)}
    assert list(found.values()) == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    with pytest.raises(CommandError, match="Did you mean 'paper-cifar'"):
        definitions.find("paper-cifa")


def test_110_layers_start_slowly() -> None:
    schedule = Schedule(RECIPES["paper-cifar"], 64_000, 352, easy_start=True)
    assert schedule.lr(0) == pytest.approx(0.01) and schedule.wants_error
    for _ in range(200):
        schedule.trained(85.0)
    assert schedule.lr(200) == pytest.approx(0.01)
    for _ in range(200):
        schedule.trained(70.0)
    assert schedule.lr(400) == pytest.approx(0.1) and not schedule.wants_error


def test_plateau_waits_before_dividing() -> None:
    schedule = Schedule(RECIPES["paper-imagenet"], 600_000, 5004)
    for error in (80, 60, 50, *[49.95] * 7):
        schedule.validated(error)
    assert schedule.lr(50_000) == pytest.approx(0.1)
    schedule.validated(49.95)
    assert schedule.lr(50_000) == pytest.approx(0.01)
    for _ in range(8):
        schedule.validated(49.95)
    assert schedule.lr(50_000) == pytest.approx(0.001)


def test_warm_up_and_cosine() -> None:
    schedule = Schedule(RECIPES["modern"], 200 * 100, 100)
    rates = [schedule.lr(i) for i in (0, 249, 499, 500, 10_250, 19_999)]
    assert rates == pytest.approx([0.1 / 500, 0.05, 0.1, 0.1, 0.05, 0.0], abs=1e-4)
