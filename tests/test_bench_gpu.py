"""make bench-gpu, benchmarks/suite.py and parts.py, and their Timer: all that a GPU run does, on the CPU and small."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import networks, parts, single_ops, suite
from benchmarks.items import Item, Settings
from benchmarks.rounds import Timer
from resnet_fast.commands import timing
from resnet_fast.commands.progress import Progress
from tests import cases

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Settings(CPU, tiny=True)


# ---- Timer


def test_timer_takes_inputs_in_turn() -> None:
    order: list[int] = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    rounds = Timer(CPU, cache=1024)(calls, 0.0, fewest=7)
    assert rounds.rounds == 7 and 0 < rounds.p20 <= rounds.p50 <= rounds.p80
    assert order == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0]  # each once to warm up, two for an estimate, seven timed


def test_timer_measures_the_call_alone() -> None:
    rounds = Timer(CPU, cache=64 << 20)([lambda: time.sleep(0.002)], 0.0)
    assert rounds.p20 >= 0.002


# ---- what is planned for a GPU, without one


@pytest.mark.parametrize("part", parts.PARTS[1:])
def test_plan_for_a_gpu(part: str) -> None:
    """Keys are unique; the table is whole; planning itself touches no device."""
    found = parts.items(part, Settings(torch.device("cuda")))
    keys = [item.key for item in found]
    assert len(keys) == len(set(keys)) and all(key.startswith(f"{part}/") for key in keys)
    if part == "ops":
        assert {key.split("/")[3] for key in keys} == {case.name for case in cases.resnet50(1)}
        assert {key.split("/")[1] for key in keys} == {op for op, *_ in single_ops.OPS_MEASURED}
        assert {key.split("/")[5] for key in keys} >= {"native", "triton", "cudnn", "eager"}
    elif part == "fusions":
        assert keys == ["fusions/inference", "fusions/training"]
    elif part == "memory":
        assert {"memory/resnet50/largest/resnet_fast", "memory/resnet50/256/channels_last"} <= set(keys)
    else:
        assert keys[0] == f"{part}/equality"
        text = " ".join(keys)
        words = (
            "resnet18",
            "resnet50",
            "resnet101",
            "timm:",
            "torchvision:",
            "float16",
            "compile",
            "max-autotune",
        )
        assert all(word in text for word in words)
        if part == "inference":  # capture() at every batch of interest, with torch.compile's graphs beside it
            for batch in (1, 8, 32, 128, 256):
                assert {f"inference/resnet50/{batch}/bfloat16/{group}" for group in ("graphs", "tuned")} <= set(keys)
            assert {timing.CAPTURED, "reduce_overhead"} < set(networks.GROUPS["graphs"])


def test_shares_are_whole() -> None:
    assert set(parts.SHARES) == set(parts.PARTS) and sum(parts.SHARES.values()) == pytest.approx(1.0)


def test_groups_name_contenders() -> None:
    """Each can be made; graphs say that they need a GPU."""
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)
    setting = timing.Setting("inference", 2, 8, torch.float32, CPU)
    for name in {name for group in networks.GROUPS.values() for name in group}:
        made = timing.contender(name, model, x, setting)
        assert made.name == name
        if name.endswith(timing.GRAPH) and not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="needs a CUDA device"):
                made.call()
        if name == timing.CAPTURED:
            with pytest.raises(
                ValueError, match=r"found device cpu, supported is cuda.* Remedy: call the model itself"
            ):
                made.call()


def test_capture_is_a_contender_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference on a GPU, and refused where its numbers are other ones than the model's."""
    made: list[str] = []
    monkeypatch.setattr(timing, "contender", lambda name, *_: made.append(name))
    for mode, device in (("inference", "cuda"), ("training", "cuda"), ("inference", "cpu")):
        setting = timing.Setting(mode, 2, 8, torch.float32, torch.device(device))
        timing.contenders(torch.nn.Identity(), torch.zeros(1), setting, ["channels_last"])
    assert made == ["channels_last", "resnet_fast", "captured", *["channels_last", "resnet_fast"] * 2]
    x, replays = torch.ones(2, 3), []

    def capture(factor: float) -> Any:
        return lambda model, example: lambda x: replays.append(1) or factor * model(x)

    monkeypatch.setattr(timing.resnet_fast, "capture", capture(1.0))
    call = timing._Captured(torch.nn.Identity())
    assert torch.equal(call(x), x) and torch.equal(call(2 * x), 2 * x) and len(replays) == 3
    monkeypatch.setattr(timing.resnet_fast, "capture", capture(1.1))
    with pytest.raises(RuntimeError, match=r"captured: its numbers are 10\.0% off"):
        timing._Captured(torch.nn.Identity())(x)


def test_tuned_is_warmed_up_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, for its own network, size and dtype; the contenders of the next group have no table of it."""
    asked: list[Any] = []
    forgotten: list[int] = []
    monkeypatch.setattr(timing.resnet_fast, "warmup", lambda model, shape, **options: asked.append((*shape, options)))
    monkeypatch.setattr(networks, "forget", lambda: forgotten.append(1))
    monkeypatch.setitem(networks.GROUPS, "tuned", ("channels_last", timing.TUNED))
    network = networks.Network("cifar_resnet20", 2, torch.float32, "tuned")
    records = networks._network(TINY, "inference", network, Progress())
    assert {r["contender"] for r in records} == {"channels_last", "tuned"} and not any(r["failed"] for r in records)
    assert len(asked) == 1 and asked[0][:4] == (2, 3, 32, 32) and asked[0][4]["dtype"] == torch.float32
    assert forgotten == [1]
    networks._network(TINY, "inference", network._replace(group="plain"), Progress())
    assert forgotten == [1]


def test_freezing_is_on_while_it_compiles() -> None:
    """And off again for what runs afterwards."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    inductor = importlib.import_module("torch._inductor.config")
    seen: list[bool] = []
    call = timing._Frozen(lambda x: seen.append(inductor.freezing) or model(x))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(call(x), call(x)) and seen == [True, inductor.freezing]


def _raises(*_: Any) -> Any:
    raise RuntimeError("out of memory")


def test_a_contender_that_fails_costs_itself_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """When it is made, at its first call, or late, while all are timed in turns."""
    calls = iter(range(100))

    def late() -> None:
        if next(calls) > 6:
            raise RuntimeError("out of memory")

    setting = timing.Setting("inference", 2, 8, torch.float32, CPU)
    entries = [
        timing.attempt("unmade", _raises),
        timing.Contender("early", _raises),
        timing.Contender("late", late),
        timing.attempt("good", lambda: timing.Contender("good", lambda: time.sleep(0.001))),
    ]
    found = timing.measure(entries, setting, Progress(), rounds=5, seconds=1, baseline="late", needed=())
    by_name = {r.name: r for r in found}
    for name in ("unmade", "early", "late"):
        assert by_name[name].failed == "RuntimeError: out of memory" and by_name[name].ms is None
    good = by_name["good"]
    assert good.failed is None and good.rounds == 5 and good.ratio is None
    assert "late cannot run" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="out of memory"):
        timing.measure(entries[1:2], setting, Progress(), rounds=5, seconds=1, baseline="x", needed=("early",))


# ---- a part, item by item


def _told(items: list[Item], monkeypatch: pytest.MonkeyPatch, skip: tuple[str, ...] = (), seconds: float = 60.0) -> Any:
    monkeypatch.setattr(parts, "items", lambda part, settings: items)
    lines: list[dict[str, Any]] = []
    parts.run("training", TINY, time.time() + seconds, skip, lines.append)
    return [(line["item"], line["state"]) for line in lines], lines


def test_run_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[dict[str, Any]]:
        raise RuntimeError("a kernel failed\nat length")

    def absent() -> list[dict[str, Any]]:
        raise NotImplementedError("no such backend")

    items = [Item("a", "k", broken), Item("b", "k", absent), Item("c", "k", lambda: [{"x": 1}]), Item("d", "k", broken)]
    states, lines = _told(items, monkeypatch, skip=("d",))
    assert states == [("a", "begin"), ("a", "failed"), ("b", "begin"), ("b", "left out"), ("c", "begin"), ("c", "done")]
    assert lines[1]["reason"] == "RuntimeError: a kernel failed" and lines[-1]["records"] == [{"x": 1}]


def test_run_leaves_out_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0

    def lasts(seconds: float) -> list[dict[str, Any]]:
        nonlocal now
        now += seconds
        return []

    monkeypatch.setattr(parts, "time", type("Clock", (), {"time": staticmethod(lambda: now)}))
    monkeypatch.setattr(time, "time", lambda: now)
    items = [Item(key, kind, lambda: lasts(40)) for key, kind in (("a", "slow"), ("b", "slow"), ("c", "unknown"))]
    states, _ = _told([*items, Item("d", "slow", lambda: lasts(1))], monkeypatch, seconds=70)
    assert states == [
        ("a", "begin"),
        ("a", "done"),
        ("b", "left out"),
        ("c", "begin"),
        ("c", "done"),
        ("d", "left out"),
    ]


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.TINY[3]
    single_ops.prepared.cache_clear()
    (record,) = single_ops._op(TINY, "affine_act_mask", "residual", "forward", case, torch.float32, "eager")
    assert record["ms_p50"] > 0 and record["bytes"] > 0
    right = single_ops._run_op

    def wrong(*args: Any) -> Any:
        return right(*args)[0] * 1.1 if args[0] == "torch" else right(*args)

    monkeypatch.setattr(single_ops, "_run_op", wrong)
    with pytest.raises(ValueError, match="off the definition's"):
        single_ops._op(TINY, "affine_act_mask", "residual", "forward", case, torch.float32, "torch")
    single_ops.prepared.cache_clear()


def test_largest_batch() -> None:
    limit = 24 << 20
    (record,) = networks._largest(TINY, "cifar_resnet20", "channels_last", limit, 4)
    assert record["batch"] >= 4 and record["batch"] % 4 == 0
    (more,) = networks._peak(TINY, "cifar_resnet20", record["batch"] + 4, "channels_last")
    assert (
        more["peak_bytes"]
        > limit
        >= networks._peak(TINY, "cifar_resnet20", record["batch"], "channels_last")[0]["peak_bytes"]
    )


# ---- the whole, in processes


@pytest.mark.slow
def test_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ceilings and a part, and another part in the same process, into the same folder."""
    common = ["--device", "cpu", "--tiny", "--seconds", "400", "--threads", "1", "--output", str(tmp_path)]
    assert suite.main([*common, "--part", "ops", "--commit", "abc"]) == 0
    run = next(line["run"] for line in suite.read(tmp_path / suite.LINES))
    child = [*common, "--child", "inference", "--run", run, "--deadline", str(time.time() + 300)]
    assert suite.main(child) == 0
    print(suite.summary(suite.write(tmp_path)))
    out = capsys.readouterr().out
    assert "equality: inference: passed" in out
    result = json.loads((tmp_path / suite.RESULT).read_text())
    assert result["passed"] and result["checked"] == ["inference"]
    assert {r["part"] for r in result["records"]} == {"ceilings", "ops", "inference"}
    assert {r["ceiling"] for r in result["records"] if "ceiling" in r} == {"copy", "product"}
    for r in result["records"]:
        if "op" in r:
            assert 0 < r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"] and r["share"] > 0
            assert r["bytes_per_second"] == pytest.approx(r["bytes"] / r["ms_p50"] * 1e3)
    assert {r["contender"] for r in result["records"] if r.get("group") == "plain"} == set(networks.GROUPS["plain"])
    assert {"gpus", "cpu", "versions", "commit", "date", "command", "clocks"} <= result.keys()
    assert result["command"].startswith("python -m benchmarks.suite") and str(tmp_path) not in json.dumps(result)
    first, *rest = (tmp_path / suite.TABLE).read_text().splitlines()
    assert first.startswith("# ") and "torch" in first
    assert len(list(csv.DictReader(rest))) == len([r for r in result["records"] if "equality" not in r])


def test_a_dead_process_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The item that it died at is failed; the next process goes on behind it. A hanging one is cut off."""
    file = tmp_path / suite.LINES
    child = """
import json, os, sys, time
file, run = sys.argv[1], sys.argv[2]
seen = open(file).read() if os.path.exists(file) else ""
def tell(**line): open(file, "a").write(json.dumps({"run": run, "part": "ops", **line}) + "\\n")
for key in ("a", "dies", "b", "hangs"):
    if f'"{key}"' in seen: continue
    tell(item=key, state="begin")
    if key == "dies": os._exit(66)
    if key == "hangs": time.sleep(60)
    tell(item=key, state="done", records=[{"x": key}])
"""
    real = subprocess.Popen
    monkeypatch.setattr(suite, "_GRACE", 0.2)
    monkeypatch.setattr(
        suite.subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", child, str(file), "r"], **rest)
    )
    args = type("Args", (), {"output": tmp_path, "device": "cpu", "threads": 1, "tiny": True, "every": 1})()
    begin = time.time()
    suite._run_part("ops", args, "r", time.time() + 10)
    assert time.time() - begin < 40
    lines = [*suite.read(file), {"run": "r", "head": {"gpus": []}}]
    result = suite.collect(lines)
    assert [r["x"] for r in result["records"]] == ["a", "b"]
    reasons = {f["item"]: f["reason"] for f in result["failed"]}
    assert "ended with 66" in reasons["dies"] and "cut off" in reasons["hangs"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_suite_keeps_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "benchmarks.suite", "--device", "cpu", "--output", str(tmp_path), "--part", "ops"]
    process = subprocess.Popen(
        [*command, "--tiny", "--seconds", "600"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        if any(
            line.get("part") == "ops" and line.get("state") == "done" for line in suite.read(tmp_path / suite.LINES)
        ):
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert "GB/s" in out and " records, " in out
    result = json.loads((tmp_path / suite.RESULT).read_text())
    assert any("op" in r for r in result["records"]) and (tmp_path / suite.TABLE).is_file()


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    suite.append(file, {"run": "r", "part": "ops", "item": "a", "state": "done", "records": []})
    with file.open("a") as f:
        f.write('{"run": "r", "part": "ops", "it')
    assert len(suite.read(file)) == 1


def test_collect_takes_the_newest_run_of_each_part() -> None:
    def lines(run: str, part: str, value: int) -> list[dict[str, Any]]:
        head = {"run": run, "head": {"date": run, "gpus": []}}
        return [head, {"run": run, "part": part, "item": "i", "state": "done", "records": [{"v": value}]}]

    result = suite.collect([*lines("1", "ops", 1), *lines("2", "memory", 2), *lines("3", "ops", 3)])
    assert sorted(r["v"] for r in result["records"]) == [2, 3]


def test_suite_needs_a_gpu_for_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        suite.main(["--output", "x", "--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err
