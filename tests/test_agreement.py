"""Whole networks in inference: as near to float64 as torch is, and the same top-1 class, of photographs and of noise.

Random networks have no opinion, so theirs is made: residual branches are as small as training leaves them, batch norms
fit their input, and the head knows one class for each of a few images, so that the classes of these images, changed a
little, are far apart. Whether an opinion is clear is judged by float64's margin and torch's own error, never by ours.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.models import MODELS
from tests.libraries import require
from tests.tolerance import name_of

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = DTYPES[1:]
_PHOTOGRAPHS, _NOISE = 8, 4


class Judged(NamedTuple):
    """A network in float64, images, their prototypes' numbers, and what it says of them."""

    model: nn.Module
    x: Tensor
    labels: Tensor
    logits: Tensor


def photographs(n: int, h: int, w: int) -> Tensor:
    """Crops of scikit-learn's sample images, normalised."""
    pytest.importorskip("sklearn")
    from resnet_fast.commands import images

    return images.crops(images.load(None, print), n, max(h, w), 0)[:, :, :h, :w]


def network(name: str, x: Tensor) -> nn.Module:
    """Weights drawn, norms as after training: different, fit for ``x``, the last of a block's with a small gamma."""
    torch.manual_seed(0)
    make = MODELS.get(name) or functools.partial(getattr(require("torchvision").models, name), weights=None)
    model: nn.Module = make()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    lasts = {n.rpartition(".")[0]: n for n in norms if n.rpartition(".")[2].startswith("bn")}
    for n, norm in norms.items():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
        if n.rpartition(".")[0] and lasts.get(n.rpartition(".")[0]) == n:
            norm.weight.data.mul_(0.2)
        norm.momentum = None  # a cumulative average
    with torch.no_grad():
        model.train()(x)
    return model.eval()


@torch.no_grad()
def judged(name: str, h: int, w: int, batch: int, device: str = "cpu") -> Judged:
    """``batch`` images: the prototypes in turns, each with noise of its own."""
    prototypes = torch.cat((photographs(_PHOTOGRAPHS, h, w), torch.randn(_NOISE, 3, h, w))).to(device)
    model = network(name, prototypes.cpu()).to(device).double()
    model.fc = nn.Identity()
    features = model(prototypes.double())
    centre = features.mean(0)
    model.fc = head = nn.Linear(features.shape[1], len(features), dtype=torch.float64, device=device)
    head.weight.copy_(F.normalize(features - centre, dim=1))
    head.bias.copy_(-(head.weight @ centre))
    labels = torch.arange(batch, device=device) % len(prototypes)
    x = prototypes[labels] + 0.02 * torch.randn(batch, 3, h, w, device=device)
    return Judged(model, x, labels, model(x.double()))


def assert_same_opinion(found: Judged, z: Tensor, torchs: Tensor) -> None:
    """Top-1 is float64's, and torch's, where float64's lead is beyond twice the error allowed: of nearly all images."""
    ref64, dtype = found.logits, z.dtype
    assert z.shape == torchs.shape == ref64.shape and torchs.dtype == dtype and z.isfinite().all()
    bound = 2 * (torchs.double() - ref64).abs().max() + 4 * torch.finfo(dtype).eps * ref64.abs().max()
    assert (ref64.argmax(1) == found.labels).double().mean() >= 0.9, "the network has no opinion"
    first, second = ref64.topk(2, dim=1).values.unbind(1)
    clear = first - second > 2 * bound
    enough = 0.4 if dtype == torch.bfloat16 else 0.9  # crops of one photograph resemble each other
    assert clear.double().mean() >= enough, f"margins {(first - second).min():.3g} for errors of {bound:.3g}"
    top = z.argmax(1)
    assert torch.equal(top[clear], ref64.argmax(1)[clear]) and torch.equal(top[clear], torchs.argmax(1)[clear])
    # Of a whole network one element's error is a single draw (see fusing.py): the norm is judged.
    ours, theirs = ((t.double() - ref64).norm() / ref64.norm() for t in (z, torchs))
    assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps, f"{ours:.3g} of the norm, torch {theirs:.3g}"


@functools.lru_cache(maxsize=1)
def small(name: str) -> Judged:
    return judged(name, 49, 57, _PHOTOGRAPHS + _NOISE)


def compare(found: Judged, dtype: torch.dtype, batches: tuple[int, ...], asked: str | None = None) -> None:
    """Fused against eager, channels-last, in batches of so many, each as torch has it for all."""
    model = copy.deepcopy(found.model).to(dtype=dtype, memory_format=torch.channels_last)
    ours = resnet_fast.fuse(copy.deepcopy(model), backend=asked)
    x = found.x.to(dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torchs = torch.cat([model(part) for part in x.split(max(batches))])
        for batch in batches:
            assert_same_opinion(found, torch.cat([ours(part) for part in x.split(batch)]), torchs)
    rows = [row for row in resnet_fast.explain(ours) if row.block]
    assert rows and {row.status for row in rows} == {"fused"}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "name", [n if n in ("resnet18", "resnet50") else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_top1_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    """All at once, and some one by one, at an odd size."""
    found = small(name)
    compare(found, dtype, (len(found.x),))
    few = Judged(found.model, found.x[::5], found.labels[::5], found.logits[::5])
    compare(few, dtype, (1,))


@pytest.mark.slow
@pytest.mark.parametrize("h, w", [(224, 224), (225, 199)])
def test_top1_at_full_size(h: int, w: int) -> None:
    found = judged("resnet18", h, w, _PHOTOGRAPHS + _NOISE)
    for dtype in DTYPES:
        compare(found, dtype, (len(found.x),))


def test_a_wrong_network_has_another_opinion() -> None:
    """Of one batch norm that is twice as large, of one weight that is stale, of NaN: the check can fail."""
    found = small("resnet18")
    with torch.no_grad():
        exact = copy.deepcopy(found.model).float()
        torchs = exact(found.x)
        for change in (
            lambda m: m.layer3[0].bn2.running_var.mul_(0.02),
            lambda m: m.layer2[1].conv1.weight.copy_(m.layer2[1].conv2.weight),
            lambda m: m.layer4[0].bn1.bias.fill_(math.nan),
        ):
            wrong = copy.deepcopy(exact)
            change(wrong)
            with pytest.raises(AssertionError):
                assert_same_opinion(found, wrong(found.x), torchs)
        assert_same_opinion(found, torchs.clone(), torchs)
        blind = Judged(found.model, found.x, found.labels, found.logits * 0 + torch.arange(12) * 1e-9)
        with pytest.raises(AssertionError, match="no opinion"):
            assert_same_opinion(blind, torchs, torchs)


# ---- on a GPU


@functools.lru_cache(maxsize=1)
def large(name: str, h: int, w: int, batch: int) -> Judged:
    return judged(name, h, w, batch, "cuda")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "native", "triton"])
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("h, w", [(224, 224), (225, 199)])
@pytest.mark.parametrize("name", NETWORKS)
def test_top1_on_a_gpu(name: str, h: int, w: int, dtype: torch.dtype, asked: str | None) -> None:
    """As near to float64 as torch is, and of the same opinion, in batches of 1, 7 and 24."""
    found = large(name, h, w, 24)
    compare(found, dtype, (24,), asked)
    few = Judged(found.model, *(t[:8] for t in found[1:]))
    compare(few, dtype, (1, 7), asked)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "native", "triton"])
@pytest.mark.parametrize("batch", [32, 128, 256])
def test_large_batches_on_a_gpu(batch: int, asked: str | None) -> None:
    compare(large("resnet50", 224, 224, batch), torch.bfloat16, (batch,), asked)
