"""After and before fuse(): parametrizations, pruning, averaged models, and norms that are converted or frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import resnet_fast
from tests import libraries
from tests.tools import FUSED, assert_same_state, fused_rows, images, near, pair, small, steps

PARAMETRIZE = {
    "weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "spectral_norm": lambda conv: parametrizations.spectral_norm(conv),
    "orthogonal": lambda conv: parametrizations.orthogonal(conv),
    "old spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "old weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=0.4),
    "structured": lambda conv: prune.ln_structured(conv, "weight", amount=0.3, n=2, dim=0),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", PARAMETRIZE)
def test_parametrized_convolution(how: str, when: str) -> None:
    """Its block runs as the original, in training and in eval; the others stay fused."""
    plain = small()
    ours = copy.deepcopy(plain)
    if when == "after":
        resnet_fast.fuse(ours)
    for model in (plain, ours):
        torch.manual_seed(3)  # spectral_norm starts at random
        PARAMETRIZE[how](model.layer1[1].conv1)
    resnet_fast.fuse(ours)
    losses = [steps(model) for model in (plain, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert_same_state(ours, plain)
    near(ours.eval()(images()), plain.eval()(images()))
    rows = {r.name: r for r in resnet_fast.explain(ours)}
    assert rows["layer1.1"].status == "not" and "conv1" in rows["layer1.1"].reason
    assert rows["layer1.0"].status == "fused"


@pytest.mark.parametrize("remove", ["prune", "weight_norm"])
def test_removed_again(remove: str) -> None:
    """Made permanent, the block is fused again, with the weight as it is now."""
    plain, ours = pair(train=False)
    with torch.no_grad():
        ours(images())  # folds the old weight
    for model in (plain, ours):
        conv = model.layer1[0].conv2
        if remove == "prune":
            prune.l1_unstructured(conv, "weight", amount=0.5)
            prune.remove(conv, "weight")
        else:
            parametrizations.weight_norm(conv)
            nn.utils.parametrize.remove_parametrizations(conv, "weight")
            with torch.no_grad():
                conv.weight.mul_(2)
    with torch.no_grad():
        near(ours(images()), plain(images()))
    # After remove_parametrizations the convolution is of its own class again.
    assert fused_rows(ours) == FUSED


def test_pruned_gamma() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        prune.custom_from_mask(model.layer2[1].bn2, "weight", torch.tensor([1, 0, 0, 1]))
    assert steps(ours) == pytest.approx(steps(plain), rel=1e-3)
    assert_same_state(ours, plain)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaged_models(kind: str) -> None:
    """AveragedModel copies the fused model; its average, and update_bn, are those of the original."""
    results = []
    for model in pair():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7) if kind == "ema" else None)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        schedule = SWALR(optimizer, swa_lr=0.02)
        for i in range(3):
            steps(model, 1)
            average.update_parameters(model)
            schedule.step()
            with torch.no_grad():  # used between updates: folded weights must follow
                average.eval()(images(2) + i)
        update_bn([images(), images() + 1], average)
        average.eval()
        with torch.no_grad():
            results.append((average, average(images())))
    near(results[1][1], results[0][1])
    assert_same_state(results[1][0], results[0][0], grads=False)
    assert fused_rows(results[1][0]) == FUSED


@pytest.mark.parametrize("when", ["before", "after"])
def test_convert_sync_batchnorm(when: str) -> None:
    """One process: SyncBatchNorm is a batch norm like any other; test_sync.py has two."""
    plain, ours = small(), small()
    if when == "after":
        resnet_fast.fuse(ours)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    resnet_fast.fuse(ours)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in ours.modules()) == 12
    assert steps(ours) == pytest.approx(steps(plain), rel=1e-3)
    assert_same_state(ours, plain)
    assert fused_rows(ours) == FUSED


@pytest.mark.parametrize("when", ["before", "after"])
def test_timm_freezes_and_unfreezes(when: str) -> None:
    """freeze_batch_norm_2d replaces norms by FrozenBatchNormAct2d's kin: right numbers, and a reason or a fusion."""
    libraries.require("timm")
    from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    plain, ours = small(), small()
    if when == "after":
        resnet_fast.fuse(ours)
        with torch.no_grad():
            ours.eval()(images())
            ours.train()
    plain, ours = freeze_batch_norm_2d(plain), freeze_batch_norm_2d(ours)
    if when == "before":
        resnet_fast.fuse(ours)
    assert not any(type(m) is nn.BatchNorm2d for m in ours.modules())
    assert steps(ours) == pytest.approx(steps(plain), rel=1e-3)
    assert_same_state(ours, plain)
    assert all(row.status == "fused" or row.reason for row in resnet_fast.explain(ours))
    plain, ours = unfreeze_batch_norm_2d(plain), unfreeze_batch_norm_2d(ours)
    resnet_fast.fuse(ours)
    assert steps(ours) == pytest.approx(steps(plain), rel=1e-3)
    near(ours.eval()(images()), plain.eval()(images()))
    assert_same_state(ours, plain)
    assert fused_rows(ours) == FUSED


def test_frozen_by_eval_and_requires_grad() -> None:
    """The usual way to freeze: norms in eval, their parameters without gradients, convolutions learning."""
    plain, ours = pair()
    for model in (plain, ours):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval().requires_grad_(False)
    assert steps(ours) == pytest.approx(steps(plain), rel=1e-3)
    assert_same_state(ours, plain)
    assert fused_rows(ours) == FUSED


def test_fuse_conv_bn_eval_of_torch() -> None:
    """torch's own fusion of the fused model's modules, made for deployment."""
    plain, ours = pair(train=False)
    folded = nn.utils.fuse_conv_bn_eval(ours.stem[0], ours.stem[1])
    ours.stem[0], ours.stem[1] = folded, nn.Identity()
    with torch.no_grad():
        near(ours(images()), plain(images()))


def test_quantization_observers_are_hooks() -> None:
    """What watches inner modules by forward hooks sees each of them, in a fused model too."""
    _, ours = pair(train=False)
    seen: list[str] = []
    for name, m in ours.named_modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    with torch.no_grad():
        ours(images())
    assert sorted(seen) == sorted(n for n, m in ours.named_modules() if isinstance(m, nn.Conv2d))
