"""benchmarks/fusions.py: one kind of fusion after the other, what each step leaves out, and their measurement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import resnet_fast
from benchmarks import fusions, networks, parts
from benchmarks.items import Settings
from resnet_fast import buffers, models, switches
from resnet_fast.backends import library, winograd
from resnet_fast.dispatch import reasons
from resnet_fast.folding import FoldCache
from resnet_fast.fuse import blocks

CPU = torch.device("cpu")
TINY = Settings(CPU, tiny=True)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_of_fusion(device: str, mode: str) -> None:
    """From nothing to everything: on a CPU ever less is switched off, on a GPU ever more goes to other backends."""
    steps = fusions.steps(device, mode)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) >= 5
    fused = [sum(row.status == "fused" for row in _explained(step)) for step in steps]
    assert fused[0] == 0 and fused[1] == 16 and set(fused[2:]) == {17}
    if device == "cpu":
        assert all(set(b.off) < set(a.off) for a, b in itertools.pairwise(steps[2:]))
        assert steps[1].off == steps[2].off and steps[-1].off == ()
    else:
        backends = [set(_pinned(step).values()) for step in steps[2:]]
        assert backends[0] == {None} and backends[1] == {None, "triton"}
        assert backends[-1] == ({None, "triton"} if mode == "training" else {None, "triton", "native"})
        whole = {name for name, backend in _pinned(steps[-1]).items() if backend == "native"}
        able = {f"layer1.{i}" for i in range(3)} | {f"layer2.{i}" for i in range(1, 4)}
        assert whole == (set() if mode == "training" else able)
        assert [step.graph for step in steps] == [False] * (len(steps) - 1) + [True]


def _network_of(step: fusions.Step) -> torch.nn.Module:
    with torch.device("meta"):  # nothing is computed
        return step.fuse(models.resnet50())


def _explained(step: fusions.Step) -> list[Any]:
    rows = resnet_fast.explain(_network_of(step))
    return [row for row in rows if row.block] if rows.swapped else []


def _pinned(step: fusions.Step) -> dict[str, str | None]:
    """The backend of each block, by its name."""
    return {name: backend for name, _, _, backend in blocks(_network_of(step))}


def test_switches() -> None:
    """Each leaves out what its name says, and nothing is left out by itself."""
    conv = (CPU, [64, 64, 3, 3], [1, 64, 8, 8], [1, 1], [1, 1], [1, 1], 1, torch.float32)
    layer = resnet_fast.functional.ConvBn(
        torch.randn(8, 8, 1, 1), torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8), batch_stats=False
    )

    def used() -> dict[str, bool]:
        return {
            "winograd": winograd.why_not(*conv) is None,
            "products": library._is_pointwise([8, 8, 1, 1], [0, 0], 1),
            "memory": buffers.empty((1, 8, 1024, 1024), torch.float32) is not None,
            "folding": FoldCache().get(CPU, torch.float32, [layer]) is not None,
        }

    if reasons("bn_stats", CPU, torch.float32)["native"] is not None:
        pytest.skip("needs resnet_fast._C")
    assert all(used().values())
    for name in ("winograd", "products", "memory", "folding"):
        with switches.without(name):
            assert used() == {n: n != name for n in used()}
    assert all(used().values()) and all(switches.on(name) for name in switches.NAMES)
    with pytest.raises(ValueError, match="names: found wino; supported are folding"), switches.without("wino"):
        pass
    with switches.without("programs"), switches.without("memory"):
        assert not switches.on("programs") and not switches.on("memory") and switches.on("folding")


def test_wrong_numbers_are_no_step() -> None:
    good = torch.randn(4, 10)
    networks._compare(good * 1.01, good, 0.03)
    for bad in (good * 1.1, good * float("nan")):
        with pytest.raises(ValueError, match="its numbers are"):
            networks._compare(bad, good, 0.03)


def test_steps_that_take_too_long_to_prepare_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_PREPARED", -1.0)
    first, *rest = sorted(parts.items("fusions", TINY)[0].measure(), key=lambda r: r["failed"] is not None)
    assert first["ratio"] == 1 and first["contender"] == fusions.steps("cpu", "inference")[0].name
    assert len(rest) == len(fusions.steps("cpu", "inference")) - 1
    assert all("took all the time" in r["failed"] for r in rest)


@pytest.mark.slow
def test_fusions_are_measured() -> None:
    for item, mode in zip(parts.items("fusions", TINY), ("inference", "training"), strict=True):
        records = item.measure()
        assert [r["contender"] for r in records] == [step.name for step in fusions.steps("cpu", mode)]
        assert all(r["failed"] is None and r["ratio"] > 0 and r["ms_p50"] > 0 for r in records)
