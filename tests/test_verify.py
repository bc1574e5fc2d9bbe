"""resnet-fast verify: it passes where the numbers are right, and says which are wrong where a kernel is broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import adapters, dispatch
from resnet_fast.__main__ import main
from resnet_fast.commands import adversarial, curves, units, verify
from resnet_fast.models.blocks import BasicBlock, Bottleneck
from resnet_fast.plan import BlockPlan

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NET = ["--model", "tests.test_verify:make_net", "--size", "16", "--device", "cpu", "--steps", "2"]
needs_photographs = pytest.mark.skipif(
    not (find_spec("sklearn") and find_spec("PIL")), reason="needs scikit-learn and Pillow"
)


def make_net() -> nn.Module:
    """What --model tests.test_verify:make_net builds: a stem, an identity, a projection."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        BasicBlock(16, 16),
        Bottleneck(16, 8, stride=2, downsample=nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(32, 5),
    )
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    return net


def make_other() -> nn.Module:
    """A network in which nothing is fused."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.LazyLinear(5))


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@needs_photographs
def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "v.json", tmp_path / "v.png"
    arguments = ["verify", *NET, "--dtype", "float32,bfloat16", "--json", str(file), "--plot", str(picture)]
    assert main(arguments) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "WRONG" not in out and "checks passed" in out
    rows = [line.strip() for line in out.splitlines()]
    for hard in adversarial.every():  # each input by its name, whatever was nearest to its bound
        assert any(row.startswith(f"{hard.name}  ") for row in rows), hard.name
    assert "differ in some bit" in out
    result = json.loads(file.read_text())
    assert result["passed"] and [s["section"] for s in result["verify"]] == list(verify.SECTIONS)
    checks = {s["section"]: s["checks"] for s in result["verify"]}
    for dtype in ("float32", "bfloat16"):
        names = {c["tensor"].partition(":")[0] for c in checks["layers"] if c["dtype"] == dtype}
        assert names == {"0.0", "1.conv1", "1.conv2", "2.conv1", "2.conv2", "2.conv3", "2.downsample.0"}
        assert {c["tensor"].partition(":")[0] for c in checks["blocks"] if c["dtype"] == dtype} >= {"1", "2"}
        hard = {c["tensor"].partition(":")[0] for c in checks["adversarial"] if c["dtype"] == dtype}
        assert hard >= {
            "mean / std = 1000",
            "constant channels",
            "gamma = 0",
            "beta = 100 before padding",
            "inf",
            "NaN",
        }
        assert hard >= {"subnormals", "one image", "H * W = 1", "one image of H * W = 1"}
    kinds = {(c["mode"], c["what"]) for c in checks["blocks"]}
    assert kinds >= {("eval", "outputs"), ("train", "outputs"), ("train", "gradients"), ("train", "running statistics")}
    assert [len(c["ours"]) for c in result["curves"]] == [2, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")


def _scaled(answer: Any, factor: float) -> Any:
    return answer * factor if isinstance(answer, Tensor) else tuple(t * factor for t in answer)


_noise = torch.Generator().manual_seed(0)


def _restless(answer: Any) -> Any:
    y, *rest = answer
    return (y * (1 + 1e-7 * torch.rand(y.shape, generator=_noise)), *rest)


def _after(wrong: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A wrapper of a backend's function that changes what it returns."""
    return lambda function: lambda *args, **kwargs: wrong(function(*args, **kwargs))


def _heavier(function: Any) -> Any:
    """A wrapper of what lays out weights: they are 1% off."""
    return lambda w, *args: function(w * 1.01, *args)


#: What is broken: the op, what is behind its name in the backend, how; the section that must see it, and its words.
BROKEN: dict[str, tuple[str, str, Callable[[Any], Any], str, str]] = {
    "folded weights that are 1% off": ("conv_affine_act", "_prepare", _heavier, "layers", "eval float32 outputs"),
    "gradients that are 1% off": (
        "conv_backward", "", _after(lambda a: _scaled(a, 1.01)), "layers", "train float32 gradients",
    ),
    "sums counted twice": (
        "affine_act_backward", "", _after(lambda a: (a[0], a[1] * 2, *a[2:])), "blocks", "train float32 gradients",
    ),
    "a variance that is 0.1% off": (
        "conv_stats", "", _after(lambda a: (*a[:2], a[2] * 0.999, *a[3:])), "blocks",
        "train float32 running statistics",
    ),
    "a mask without its last bit": (
        "affine_act_mask", "", _after(lambda a: (a[0], a[1] & 0x7F)), "blocks", "train float32 gradients",
    ),
    "NaN swallowed": ("affine_act", "", _after(lambda a: a.nan_to_num()), "adversarial", "eval float32 outputs"),
    "another order at every call": ("conv_stats", "", _after(_restless), "determinism", "two runs, tensors that"),
    "training that goes astray": ("conv_backward", "", _after(lambda a: _scaled(a, 3.0)), "losses", "loss curve"),
}  # fmt: skip


@needs_photographs
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_kernels_fail(broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    op, end, wrap, section, words = BROKEN[broken]
    name = dispatch.choose(op, CPU, torch.float32).backend
    if name == "torch" or not hasattr(dispatch.backend(name), op + end):
        pytest.skip(f"no backend has {op}{end} here")
    module = dispatch.backend(name)
    monkeypatch.setattr(module, op + end, wrap(getattr(module, op + end)))
    dispatch._choose.cache_clear()
    try:
        status = main(["verify", *NET, "--dtype", "float32", "--only", section])
    finally:
        dispatch._choose.cache_clear()
    captured = capsys.readouterr()
    assert status == 1, captured.out
    assert "NOT EQUAL" in captured.err and "WRONG" in captured.out
    assert words in captured.err, captured.err


@needs_photographs
def test_nothing_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", "tests.test_verify:make_other", *NET[2:], "--only", "blocks"]) == 0
    assert "nothing in this network is fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--only", "layer"], ["Did you mean 'layers'?"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--json", "no-such-folder/x.json"], ["no such folder"]),
        (["--plot", "x.doc"], ["its ending must be one of"]),
        (["--dtype", "float8"], ["--dtype float8"]),
    ],
)
def test_mistakes(args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cpu", *args]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_betas_are_decided() -> None:
    """No ReLU of a block sees a value near 0, and betas move no farther than to the nearest gap."""
    torch.manual_seed(0)
    pre = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    pre[0, 0, 0, 0] = 1e-9
    shift = units._gap(pre, 1e-3)
    assert (pre + shift.view(1, -1, 1, 1)).abs().min() > 1e-3
    assert shift[0] != 0 and shift.abs().max() < 0.2
    constant = torch.zeros(2, 1, 3, 3)
    assert (constant + units._gap(constant, 1e-3)).abs().min() > 1e-3


def test_curve_check() -> None:
    line = [2.0, 1.5, 1.2]
    near = [v + 1e-3 for v in line]
    good = curves.Curves("float32", near, near, line, line, [near])
    assert curves.curve_check(good).ok
    assert not curves.curve_check(good._replace(ours=[v + 1e-2 for v in line])).ok
    assert not curves.curve_check(good._replace(ours=[2.0, float("nan"), 1.2])).ok


@pytest.mark.slow
@needs_photographs
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c() -> None:
    """Amid the work: one line, no traceback, status 130."""
    command = [
        sys.executable,
        "-m",
        "resnet_fast",
        "verify",
        *NET,
        "--steps",
        "100000",
        "--dtype",
        "float32",
        "--only",
        "losses",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "loss of" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "resnet-fast: interrupted" and "Traceback" not in rest


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_torch_folded_as_torch_compile_runs_it() -> None:
    """One of torch's ways: the numbers of its folded module, but for the order of additions. Not where it has none."""
    torch.manual_seed(0)
    block, x = BasicBlock(32, 32).eval(), torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    plan = adapters.look(block, type(block))
    assert isinstance(plan, BlockPlan)
    expected = block(x)
    unit = units.block_unit("block", block, plan)
    unit.fold(block)
    packed = units._packed(block, x)
    assert packed is not None and sum(isinstance(m, units._Packed) for m in packed.modules()) == 2
    torch.testing.assert_close(packed(x), expected)
    assert units._packed(block, x.half()) is None
