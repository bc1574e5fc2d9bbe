"""warmup(), the tables that it writes, and what dispatch and explain() make of them. The clock is a fake one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fast
from resnet_fast import dispatch, ops, schedule, tuning, use_backend
from resnet_fast.dispatch import SIGNATURES
from resnet_fast.fuse import blocks
from resnet_fast.models import resnet50
from resnet_fast.tables import Candidate, Row, Signature, TableWarning
from resnet_fast.tuning import TuningWarning, warmup
from tests.able import needs_native
from tests.cases import TINY, inputs
from tests.tolerance import assert_same_bits
from tests.tuning import CPU, SHAPE, clock, image, step, tiny

ROOT = Path(__file__).parents[1]
CASE = next(case for case in TINY if case.name == "3x3")
pytestmark = pytest.mark.usefixtures("empty_cache")

needs_triton = pytest.mark.skipif(
    dispatch.reasons("conv_stats", CPU, torch.float32)["triton"] is not None, reason="needs Triton's interpreter"
)


@pytest.fixture
def interpreter() -> None:
    """Asked for by tests that run Triton's kernels; the others do without, for its interpreter takes its time."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = dispatch._why_not

    def why_not(name: str, *args: Any) -> str | None:
        return "left out of this test" if name == "triton" else original(name, *args)

    if "interpreter" not in request.fixturenames:
        monkeypatch.setattr(dispatch, "_why_not", why_not)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(op, backend) of every convolution that tables decided on."""
    seen: list[tuple[str, str]] = []
    original = dispatch.tuned

    def tuned(op: str, *args: Any, **kwargs: Any) -> Any:
        choice = original(op, *args, **kwargs)
        if choice is not None:
            seen.append((op, choice.backend))
        return choice

    for module in (dispatch, sys.modules["resnet_fast.autograd"]):
        monkeypatch.setattr(module, "tuned", tuned)
    return seen


# ---- what is known beforehand is what happens


def calls(model: nn.Module) -> set[Signature]:
    """What the schedule says that a training step calls."""
    seen = schedule.inputs(model, SHAPE)
    parts = [part for _, module, plan, _ in blocks(model) for part in schedule.parts(module, plan, seen)]
    return {call.signature for part in parts for call in part.calls}


def observed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> set[Signature]:
    """What a training step asks the tables for; there is a row, if of something else, so that it asks."""
    if not dispatch.table(CPU).choices:
        other = SIGNATURES["conv_stats"](**inputs("conv_stats", CASE))
        dispatch.add_rows(CPU, [Row(other, (Candidate("torch", None, 1.0),), "test")])
    asked: set[Signature] = set()
    for name, make in SIGNATURES.items():

        def noted(*args: Any, make: Any = make, **kwargs: Any) -> Signature:
            asked.add(make(*args, **kwargs))
            return make(*args, **kwargs)

        monkeypatch.setitem(SIGNATURES, name, noted)
    step(model)
    return asked


@pytest.mark.parametrize("frozen", ["nothing", "first convolution", "batch norm"])
def test_the_schedule_is_what_training_runs(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same ops, shapes and operands, frozen parameters and statistics included."""
    model = tiny()
    if frozen == "first convolution":
        model[0].conv1.weight.requires_grad_(False)
    if frozen == "batch norm":
        model[1].bn1.eval()
    expected, found = calls(model), observed(model, monkeypatch)
    assert len(expected) > 8 and {s.op for s in found} == set(SIGNATURES)
    assert {s for s in found if s.op != "conv_backward_sums"} == expected


def test_autocast_is_scheduled_in_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert {s.dtype for s in calls(tiny())} == {torch.bfloat16}


def test_without_rows_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a signature was made")

    for name in SIGNATURES:
        monkeypatch.setitem(SIGNATURES, name, fail)
    step(tiny())


# ---- warmup


def trains_with(fastest: str, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """After a warmup in which ``fastest`` wins, training runs it, and meets nothing that was not measured.

    Returns warmup's report, and explain()'s table.
    """
    model = tiny()
    expected = step(copy.deepcopy(model))
    report = warmup(model, SHAPE, timer=clock(**{fastest: 0.5, "parts": 0.75}), progress=False)
    assert {row.candidates[0].backend for row in report.measured if row.signature.op == "conv_stats"} == {fastest}
    ran.clear()
    found = step(model)
    assert {backend for op, backend in ran if op in ("conv_stats", "conv_backward")} == {fastest}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    # Sums in one are no choice where no backend has them.
    met = {s for s in observed(model, monkeypatch) if fastest == "triton" or s.op != "conv_backward_sums"}
    assert met <= set(dispatch.table(CPU).rows)
    text = str(resnet_fast.explain(model, SHAPE))
    assert "not measured" not in text
    assert "not measured: order of backends" in str(resnet_fast.explain(model, (3, *SHAPE[1:])))
    return report, text


@needs_native
@pytest.mark.parametrize("fastest", ["native", "torch"])
def test_the_fastest_runs(
    fastest: str, ran: list[tuple[str, str]], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And explain() says by how much."""
    report, text = trains_with(fastest, ran, monkeypatch)
    assert report.path is not None and report.path.parent == empty_cache and report.path.exists()
    assert f"fastest: {fastest} " in str(report) and "compared fused, native, original, torch" in str(report)
    slower = {"native": "torch", "torch": "native"}[fastest]
    assert text.count(f"{fastest}  measured: 2.00x {slower} on ") == 12


@needs_native
@needs_triton
@pytest.mark.slow
def test_triton_runs_where_it_is_fastest(
    ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, interpreter: None
) -> None:
    """Statistics, dgrad with sums and wgrad fused, by the ways that the table names."""
    module = dispatch.backend("triton")
    original = module.configurations
    monkeypatch.setattr(module, "configurations", lambda op, **kwargs: (original(op, **kwargs)[0], {}))
    _, text = trains_with("triton", ran, monkeypatch)
    assert ("conv_backward_sums", "triton") in ran
    assert text.count("measured: 2.00x native on ") == 9 and text.count("measured: 1.50x parts on ") == 3
    assert "triton (fprop 256x128x16x4x1x1)" in text and "triton (dgrad 256x128x128x4x1x1, wgrad " in text


@needs_triton
def test_ways_are_mixed_by_direction(interpreter: None) -> None:
    """The fastest way of each direction is found one after the other, and no configuration is measured twice."""
    tried: list[str] = []

    def timer(function: Any, device: torch.device) -> float:
        config = getattr(function.func, "__wrapped__", None) and function.func.__closure__
        ways = next((c.cell_contents for c in config or () if isinstance(c.cell_contents, dict)), None)
        if ways is None:
            return 9.0
        tried.append(repr(ways))
        cost = {"fprop": 1.0, "dgrad": 1.0, "wgrad": 1.0}
        for direction, way in ways.items():
            cost[direction] = {("dgrad", True): 0.5, ("wgrad", True): 2.0}.get((direction, way.library), 1.0)
        return sum(cost.values())

    model = tiny()
    seen = schedule.inputs(model, SHAPE)
    part = next(part for _, m, plan, _ in blocks(model) for part in schedule.parts(m, plan, seen))
    call = next(call for call in part.calls if call.op == "conv_backward" and call.signature.layers[0][0][2] == 3)
    row = tuning._Tuner(CPU, timer, tuning._Bar(1, False)).op(call)
    assert row is not None
    best = row.candidates[0]
    assert best.backend == "triton" and best.config is not None
    assert best.config["dgrad"] == "library" and best.config["wgrad"] != "library"
    texts = [schedule.describe(c) for c in row.candidates]
    assert len(set(texts)) == len(texts) >= 5


def test_the_model_is_not_changed() -> None:
    model = tiny()
    model[1].eval()
    model[0].register_buffer("seen", torch.zeros(1))
    before = copy.deepcopy(model.state_dict())
    modes, refusals = [m.training for m in model.modules()], str(resnet_fast.explain(model))
    random = torch.get_rng_state()
    warmup(model, SHAPE, timer=clock(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    assert str(resnet_fast.explain(model)) == refusals and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("faster", ["fused", "original"])
def test_a_block_that_loses_runs_as_it_was(faster: str) -> None:
    """To the bit, forward and backward; in explain() with its number."""
    plain, model = tiny(fused=False), tiny()
    warmup(model, SHAPE, timer=clock(**{faster: 0.5}), progress=False)
    found, expected = step(model), step(plain)
    rows = [row for row in resnet_fast.explain(model, SHAPE) if row.block]
    reason = next(step.reason for row in rows for step in row.steps if step.direction == "block")
    assert reason.startswith("measured: 2.00x ")
    title = str(resnet_fast.explain(model, SHAPE)).partition("\n")[0]
    assert ("in training at this size 2 run as they were, which is faster" in title) == (faster == "original")
    if faster == "fused":
        assert {row.status for row in rows} == {"fused"}
        return
    assert_same_bits(found[1], expected[1])
    assert all("the original forward: measured: 2.00x" in row.reason for row in rows)
    with torch.no_grad():  # what was measured is a training step
        model(image())
    assert {row.status for row in resnet_fast.explain(model) if row.block} == {"fused"}
    with use_backend("torch"):
        step(model)
    assert {row.status for row in resnet_fast.explain(model) if row.block} == {"fused"}


@needs_native
@pytest.mark.slow
def test_a_whole_resnet50() -> None:
    """explain() has every convolution of it, forward and backward, with a reason; warmup measures each kind once."""
    model, size = resnet_fast.fuse(resnet50().train().to(memory_format=torch.channels_last)), (2, 3, 40, 40)
    before = resnet_fast.explain(model, size)
    report = warmup(model, size, timer=clock(native=0.5, fused=0.5), progress=False)
    after = resnet_fast.explain(model, size)
    convolutions = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for explanation, reason in ((before, "not measured: order of backends"), (after, "measured: 2.00x torch on ")):
        steps = [(f"{row.name}.{s.layer}".strip("."), s) for row in explanation for s in row.steps]
        for direction in ("forward", "backward"):
            assert {name for name, s in steps if s.direction == direction} == convolutions
        assert all(s.reason.startswith(reason) for _, s in steps if s.direction != "block")
    assert len(convolutions) == 53 and len(report.measured) < 60 and report.left_out == ()


def test_warmup_goes_on_where_it_was() -> None:
    """Interrupted, what was measured is kept; a later process measures the rest alone, and then nothing."""
    count = 0

    def interrupted(function: Any, device: torch.device) -> float:
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        warmup(tiny(), SHAPE, timer=interrupted, progress=False)
    dispatch.forget()
    kept = len(dispatch.table(CPU).rows)
    assert kept > 0
    report = warmup(tiny(), SHAPE, timer=clock(), progress=False)
    assert report.known == kept and len(report.measured) > 0

    def never(function: Any, device: torch.device) -> float:
        raise AssertionError("measured again")

    dispatch.forget()
    report = warmup(tiny(), SHAPE, timer=never, progress=False)
    assert report.measured == () and report.known == len(dispatch.table(CPU).rows)
    assert "0 measured" in repr(report)
    assert len(warmup(tiny(), SHAPE, timer=clock(), progress=False, again=True).measured) == report.known


@needs_native
@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_what_fails_is_left_out(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with other numbers than the definition's, or without room on this device, is no candidate."""
    module = dispatch.backend("native")
    right = module.conv_stats

    def conv_stats(*args: Any, **kwargs: Any) -> Any:
        if failure == "raises":
            raise RuntimeError("out of shared memory\nand more")
        y, *rest = right(*args, **kwargs)
        return y * 1.1, *rest

    monkeypatch.setattr(module, "conv_stats", conv_stats)
    expected = "out of shared memory" if failure == "raises" else "output 0 is off by 0.1"
    with pytest.warns(TuningWarning, match=f"leaves out native for conv_stats .*{expected}"):
        report = warmup(tiny(), SHAPE, timer=clock(native=0.1), progress=False)
    rows = [row for row in report.measured if row.signature.op == "conv_stats"]
    assert rows and all("native" not in {c.backend for c in row.candidates} for row in rows)
    assert "left out: native for conv_stats" in str(report) and "and more" not in str(report)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    warmup(tiny(), SHAPE, timer=clock())
    assert "warmup [........................] 0/" in capsys.readouterr().err
    warmup(tiny(), SHAPE, timer=clock())
    assert capsys.readouterr().err == ""


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="model: found no block that is fused"):
        warmup(nn.Conv2d(8, 8, 3), SHAPE)
    with pytest.raises(ValueError, match="model: found no block that is fused, or would be, and is free"):
        warmup(resnet_fast.fuse(tiny(), backend="torch"), SHAPE)
    with pytest.raises(ValueError, match=r"input_shape: found \(8, 6, 6\)"):
        warmup(tiny(), SHAPE[1:])
    with pytest.raises(RuntimeError, match=r"model: its forward failed on a fake image of .*Remedy"):
        warmup(tiny(), (2, 9, 6, 6))
    with pytest.raises(TypeError, match="model: found str"):
        warmup("resnet50", SHAPE)  # type: ignore[arg-type]
    with use_backend("torch"), pytest.raises(ValueError, match="inside use_backend"):
        warmup(tiny(), SHAPE)


def test_explain_of_what_is_pinned_or_not_fused() -> None:
    rows = resnet_fast.explain(resnet_fast.fuse(tiny(), backend="torch"), SHAPE)
    assert {(s.runs, s.reason) for row in rows for s in row.steps} == {("torch", "asked for")}
    plain = resnet_fast.explain(tiny(fused=False), SHAPE)
    assert [(s.layer, s.direction) for s in plain[1].steps] == [
        ("conv1", "forward"),
        ("conv2", "forward"),
        ("conv2", "backward"),
        ("conv1", "backward"),
    ]
    assert all(row.steps == () for row in resnet_fast.explain(tiny()))


@needs_triton
def test_explain_names_what_a_backend_has_no_kernel_for(interpreter: None) -> None:
    model = resnet_fast.fuse(nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).train())
    reasons = {step.reason for row in resnet_fast.explain(model, (2, 3, 16, 16)) for step in row.steps}
    assert len(reasons) == 1
    assert "not measured: order of backends; unsupported by triton: a 7 x 7 filter" in reasons.pop()


# ---- beside the tools of training


def test_autocast_and_grad_scaler() -> None:
    """Rows of autocast's dtype are used, and a scaled loss falls as plain PyTorch's does."""
    for dtype in (torch.bfloat16, torch.float16):
        losses = []
        for model in (tiny(fused=False), tiny()):
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            losses.append([])
            with torch.autocast("cpu", dtype):
                if model is not None and len(losses) == 2:
                    report = warmup(model, SHAPE, timer=clock(fused=0.5), progress=False)
                    assert {row.signature.dtype for row in report.measured} == {dtype}
            for _ in range(6):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype):
                    loss = F.cross_entropy(model(image()).float(), torch.arange(2))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses[-1].append(loss.item())
        assert losses[1][-1] < losses[1][0] / 2
        torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.02)


def test_compiles_as_one_graph(ran: list[tuple[str, str]]) -> None:
    """The op is one node whatever the table says; its choice is looked up when the graph runs."""
    torch._dynamo.reset()
    kwargs = inputs("conv_stats", CASE)
    compiled = torch.compile(lambda kwargs: ops.conv_stats(**kwargs), fullgraph=True, backend="aot_eager")
    expected = compiled(kwargs)
    assert ran == []
    row = Row(SIGNATURES["conv_stats"](**kwargs), (Candidate("torch", None, 1.0),), "test")
    dispatch.add_rows(CPU, [row])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = compiled(kwargs)
    assert ran == [("conv_stats", "torch")]
    torch.testing.assert_close(found, expected)
    model = tiny()
    warmup(model, SHAPE, timer=clock(), progress=False)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image()), model(image()))


def test_backends_that_are_gone(ran: list[tuple[str, str]]) -> None:
    """A row whose fastest way cannot run here, or is unknown to this version, is passed over, and explain() says so."""
    model = tiny()
    signature = next(s for s in calls(model) if s.op == "conv_stats" and not s.flags[0])
    for candidate in (
        Candidate("cudnn", None, 1.0),
        Candidate("tpu", None, 1.0),
        Candidate("native", {"fprop": "fast"}, 1.0),
    ):
        dispatch.add_rows(CPU, [Row(signature, (candidate,), "test")])
        step(model)
        assert ran == [] and signature in dispatch.table(CPU).unable
        assert (
            f"{candidate.backend}"
            in str(resnet_fast.explain(model, SHAPE)).partition("was fastest and cannot run: ")[0]
        )


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.warns(TableWarning, match=r"is ignored: .*Not a directory"),
        pytest.warns(TableWarning, match=r"could not be written.*Remedy: cache="),
    ):
        report = warmup(tiny(), SHAPE, timer=clock(), progress=False, cache=tmp_path / "file")
    assert report.path is None and "holds for this process" in str(report)
    assert len(dispatch.table(CPU).rows) == len(report.measured) > 0
