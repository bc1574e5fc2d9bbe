"""Folded weights follow every change, and a stage writes over nothing that anyone can hold."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import resnet_fast
from resnet_fast import models
from tests.fusing import X, calibrated, net, run

# ---- folded weights are never stale ---------------------------------------------------------------------------------


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer1[0].conv2.weight.mul_(1.5)


def through_data(model: nn.Module) -> None:
    model.layer1[0].conv2.weight.data.mul_(1.5)


def vector_through_data(model: nn.Module) -> None:
    model.layer1[0].bn1.bias.data[3] += 1


def statistics(model: nn.Module) -> None:
    model.layer3[1].bn2.running_var.mul_(2)


def load(model: nn.Module) -> None:
    model.load_state_dict(calibrated(models.cifar_resnet20(), seed=3).state_dict())


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    model(X).square().sum().backward()
    optimizer.step()


def replaced_parameter(model: nn.Module) -> None:
    model.layer1[0].conv1.weight = nn.Parameter(model.layer1[0].conv1.weight.detach() * 2)


def swapped_data(model: nn.Module) -> None:
    model.layer1[0].conv1.weight.data = model.layer1[0].conv1.weight.detach() * 2


def replaced_norm(model: nn.Module) -> None:
    model.layer1[0].bn1 = calibrated(nn.Sequential(nn.BatchNorm2d(16)), seed=9)[0].eval()


def eps(model: nn.Module) -> None:
    model.layer1[0].bn1.eps = 0.5


@pytest.mark.parametrize("inference_mode", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_data,
        vector_through_data,
        statistics,
        load,
        step,
        replaced_parameter,
        swapped_data,
        replaced_norm,
        eps,
    ],
    ids=lambda c: c.__name__,
)
def test_folded_weights_follow(change, inference_mode: bool) -> None:
    model = resnet_fast.fuse(net())
    with torch.inference_mode(inference_mode):
        before = run(model)
        assert torch.equal(run(model), before)
    change(model)
    with torch.inference_mode(inference_mode):
        after = run(model)
        expected = run(resnet_fast.unfuse(model))
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-3)


def test_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = resnet_fast.fuse(net())
        before = model(X)
        model.layer1[0].conv2.weight.mul_(1.5)
        after = model(X)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, resnet_fast.unfuse(model)(X), rtol=1e-4, atol=1e-3)


def test_threads_share_a_model() -> None:
    model = resnet_fast.fuse(net())
    expected = run(model)
    results: list[bool] = []

    def work() -> None:
        results.extend(torch.equal(run(model), expected) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * 20


# ---- stages: z is written over what nobody else can hold ------------------------------------------------------------


def test_a_stage_overwrites_nothing_that_is_held() -> None:
    model, plain = resnet_fast.fuse(models.resnet18(num_classes=10).eval()), models.resnet18(num_classes=10).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last)
    kept = x.clone()
    held, expected = [], []
    for found, m in ((held, model), (expected, plain)):
        m.layer1[0].register_forward_hook(lambda mod, args, out, found=found: found.append(out))
        m.layer2[1].register_forward_pre_hook(lambda mod, args, found=found: found.append(args[0]))
    with torch.no_grad():
        ours = model.layer2(model.layer1(x))
        theirs = plain.layer2(plain.layer1(x))
    assert torch.equal(x, kept)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(held, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_stage_reuses_memory() -> None:
    """Of three blocks behind each other, the last two write where the first one wrote."""
    stage = resnet_fast.fuse(nn.Sequential(*(models.BasicBlock(8, 8) for _ in range(3))).eval())
    x = torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        stage(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            stage(x)
    names = [event.name for event in profile.events()]
    assert names.count("mkldnn::_convolution_pointwise_") == 2
    assert torch.equal(stage[0](x[:1].clone()), stage[0](x[:1].clone()))
