"""After fuse(): mixed precision, layouts, seeds, optimizers, and other people's training loops."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from tests import libraries
from tests.tools import FUSED, Small, assert_same_state, fused_rows, images, loss_of, near, pair, steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_scaler(dtype: torch.dtype) -> None:
    """Scaled losses under autocast; a step with an infinite gradient is left out, by both models alike."""
    scales, models = [], pair()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        history = []
        for i in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, images() + 0.1 * i)
            scaler.scale(loss * (float("inf") if i == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            history.append(scaler.get_scale())
        scales.append(history)
    assert scales[0] == scales[1] and scales[0][1] < scales[0][0]
    plain, ours = models
    assert all(p.isfinite().all() for p in ours.parameters())
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02, msg=lambda m, name=name: f"{name}: {m}")
    assert fused_rows(ours) == FUSED


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler_on_cuda(dtype: torch.dtype) -> None:
    plain, ours = (m.cuda() for m in pair())
    for model in (plain, ours):
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler("cuda")
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype):
                loss = loss_of(model, images().cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_in_eval(dtype: torch.dtype) -> None:
    """By turns with float32, and nested off: each from weights folded for it."""
    plain, ours = pair(train=False)
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype):
                mine, theirs = ours(images()), plain(images())
                with torch.autocast("cpu", enabled=False):
                    near(ours(images()), plain(images()))
            assert mine.dtype == theirs.dtype == dtype
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)
            near(ours(images()), plain(images()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts(layout: torch.memory_format) -> None:
    """Model and images in either; parameters and gradients keep their strides."""
    plain, ours = (m.to(memory_format=layout) for m in pair())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", resnet_fast.LayoutWarning)
        for x in (images(), images().to(memory_format=torch.channels_last)):
            for model in (plain, ours):
                loss_of(model, x).backward()
    assert_same_state(ours, plain)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
        lambda p: torch.optim.LBFGS(p, 0.01, max_iter=2),
    ],
    ids=["sgd-foreach", "adamw-fused", "adam", "lbfgs"],
)
def test_optimizers(make: Any) -> None:
    """Made before fuse(): the parameters are the same objects."""
    losses = []
    for fused in (False, True):
        model = pair()[0]
        optimizer = make(model.parameters())
        if fused:
            resnet_fast.fuse(model)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, images())
            loss.backward()
            return loss

        losses.append([float(optimizer.step(closure)) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3, abs=1e-4)


def test_optimizer_in_backward() -> None:
    """A step per parameter, as soon as its gradient is there: within the backward of the block before."""
    models = pair()
    for model in models:
        for p in model.parameters():
            optimizer = torch.optim.SGD([p], 0.01)

            def step(q: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(step)
        for _ in range(2):
            loss_of(model, images()).backward()
    assert_same_state(models[1], models[0])


def test_seed_and_drop_path() -> None:
    """timm's stochastic depth: one seed, one result, and the same random numbers as unfused."""
    timm = libraries.require("timm")

    def run(fused: bool) -> list[float]:
        torch.manual_seed(0)
        model = timm.create_model("resnet18", drop_path_rate=0.5, drop_rate=0.3, num_classes=4)
        if fused:
            resnet_fast.fuse(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.001)
        torch.manual_seed(5)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, torch.randn(4, 3, 32, 32))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [*losses, torch.rand(()).item()]

    first, second, plain = run(True), run(True), run(False)
    assert first == second
    assert first[2] == plain[2], "the generator went another way"
    assert first[:2] == pytest.approx(plain[:2], rel=1e-3, abs=1e-4)


def test_deterministic_algorithms() -> None:
    """Twice the same bits, under use_deterministic_algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            _, model = pair()
            loss_of(model, images()).backward()
            runs.append([p.grad for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Eight images with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return images(8)[i], torch.tensor(i % 5)


@pytest.mark.slow
def test_lightning(tmp_path: Any) -> None:
    """A Trainer fits, validates, saves a checkpoint and loads it, with a fused network inside a LightningModule."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def step(self, batch: Any) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.step(batch)

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", self.step(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    results = []
    for fused in (False, True):
        lightning.seed_everything(0, verbose=False)
        module = Module()
        if fused:
            resnet_fast.fuse(module)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lightning's own advice
            loader = torch.utils.data.DataLoader(Data(), batch_size=4)
            trainer.fit(module, loader, loader)
            file = tmp_path / f"{fused}.ckpt"
            trainer.save_checkpoint(file)
            loaded = Module.load_from_checkpoint(file, weights_only=True)
        near(loaded.net.eval()(images()), module.net.eval()(images()))
        results.append((trainer.callback_metrics["loss"].item(), module.net))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    assert_same_state(results[1][1], results[0][1], grads=False)
    assert fused_rows(results[1][1]) == FUSED


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Any) -> None:
    """Accelerator.prepare, accumulate, clip, save_state and load_state around a fused model."""
    accelerate = pytest.importorskip("accelerate")
    results = []
    for fused in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.utils.set_seed(0)
        model = pair()[1 if fused else 0]
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        loader = torch.utils.data.DataLoader(Data(), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.save_state(tmp_path / str(fused))
        accelerator.load_state(tmp_path / str(fused))
        results.append((losses, accelerator.unwrap_model(model)))
    tolerance = 1e-3 if precision == "no" else 0.05
    assert results[1][0] == pytest.approx(results[0][0], rel=tolerance)
    assert type(results[1][1]) is Small
    assert fused_rows(results[1][1]) == FUSED
    if precision == "no":
        assert_same_state(results[1][1], results[0][1], grads=False)


def test_steps_equal() -> None:
    plain, ours = pair()
    assert steps(ours, 4) == pytest.approx(steps(plain, 4), rel=1e-3)
