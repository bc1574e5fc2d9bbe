"""make bench-check, benchmarks/compare.py: what is measured again, and beside what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare


def _bench(**changes: Any) -> dict[str, Any]:
    contenders = [{"name": n, "images_per_second": s} for n, s in (("channels_last", 10.0), ("resnet_fast", 20.0))]
    speed = [{"mode": "inference", "dtype": "float32", "batch": 4, "device": "cpu", "contenders": contenders}]
    return {
        "file": "r.json", "model": {"name": "resnet50"}, "cpu": "A", "cores": 2, "threads": 2, "isa": "avx2",
        "gpus": [],
        "commit": "abc", "date": "2026-01-02T03", "versions": {"torch": "2.13"}, "speed": speed, **changes,
    }  # fmt: skip


def test_compare() -> None:
    new = _bench()
    new["speed"] = [{**new["speed"][0], "contenders": [{"name": "resnet_fast", "images_per_second": 30.0}]}]
    assert compare.rows(_bench(), new) == [("resnet50 inference float32 batch 4 resnet_fast", 20.0, 30.0, 1.5)]
    text = compare.text(_bench(), new)
    assert "1.50" in text and "ANOTHER MACHINE" not in text
    assert "ours beside plain torch" not in text  # nothing plain was measured again
    half = [{"name": "channels_last", "images_per_second": 5.0}, {"name": "resnet_fast", "images_per_second": 15.0}]
    slow = {**_bench(), "speed": [{**_bench()["speed"][0], "contenders": half}]}
    assert "in the same run: 2.00x then, 3.00x now, 1.50 of it" in compare.text(_bench(), slow)
    op = {"op": "conv_stats", "variant": "plain", "case": "a", "dtype": "float32", "batch": 4}
    network = {"network": "r", "mode": "m", "dtype": "d", "batch": 1, "group": "plain"}
    records = [{**op, "contender": "native", "ms_p50": 2.0}, {**op, "contender": "eager", "ms_p50": 3.0}]
    records += [{**network, "contender": n, "images_per_second": s} for n, s in (("eager", 1), ("resnet_fast", 4))]
    assert list(compare.gains({"records": records}).values()) == [1.5, 4.0]
    other = compare.text(_bench(), {**new, "cpu": "B", "threads": 8})
    assert "ANOTHER MACHINE TYPE" in other and "A then, B now" in other and "threads: 2 then, 8 now" in other


def _old(**changes: Any) -> dict[str, Any]:
    old = _bench(**changes)
    old["speed"][0].update(size=224, baseline="channels_last")
    return old


def test_what_is_measured_again(tmp_path: Path) -> None:
    """Of each kind of file a command that its own parser takes."""
    old = _old()
    old["speed"].append({**old["speed"][0], "dtype": "bfloat16", "batch": 9})
    words = compare.commands(old, tmp_path / "x.json", 10)
    assert words[words.index("--batch") + 1] == "4" and words[words.index("--dtype") + 1] == "float32"
    train = _old(train=["--data", "digits"], model={"name": "cifar_resnet20, resnet-fast train"})
    words = compare.commands(train, tmp_path / "x.json", 10)
    assert words[:3] == ["-m", "benchmarks.train_command", "cifar_resnet20"]
    words = compare.commands({**_old(), "suite": 1, "command": "--device cpu"}, tmp_path / "x.json", 10)
    assert words[1] == "benchmarks.suite" and words[words.index("--part") + 1] == "ops"


def test_a_file_that_cannot_be_measured_again_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**_old(), "passed": True}))

    def fresh(old: dict[str, Any], seconds: float, folder: Path) -> dict[str, Any]:
        if old["file"] == "a.json":
            raise compare.CommandError("a.json: the fresh run ended with 1 and without a result")
        return _bench()

    monkeypatch.setattr(compare, "fresh", fresh)
    assert compare.main(["--results", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "b.json, commit abc" in out and "fresh / committed" in out and "a.json: the fresh run ended" in err
    assert compare.main(["--results", str(tmp_path), "a.json"]) == 2


def test_compare_with_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--results", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err
