"""benchmarks/suite.py, parts.py, check_gpu.py, compare.py and Timer: all that a GPU run does, on the CPU and small."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fast
from benchmarks import check_gpu, compare, fusions, parts, reduced, suite
from benchmarks.parts import Item, Settings
from benchmarks.rounds import Timer
from resnet_fast import buffers, dispatch, models, switches
from resnet_fast.backends import library, winograd
from resnet_fast.commands import timing
from resnet_fast.commands.progress import Progress
from resnet_fast.dispatch import reasons
from resnet_fast.folding import FoldCache
from resnet_fast.fuse import blocks
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
        assert {key.split("/")[3] for key in keys} == {case.name for case in parts.resnet50(1)}
        assert {key.split("/")[1] for key in keys} == {op for op, *_ in parts.OPS_MEASURED}
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
            assert {timing.CAPTURED, "reduce_overhead"} < set(parts.GROUPS["graphs"])


def test_shares_are_whole() -> None:
    assert set(parts.SHARES) == set(parts.PARTS) and sum(parts.SHARES.values()) == pytest.approx(1.0)


def test_groups_name_contenders() -> None:
    """Each can be made; graphs say that they need a GPU."""
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)
    setting = timing.Setting("inference", 2, 8, torch.float32, CPU)
    for name in {name for group in parts.GROUPS.values() for name in group}:
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
    monkeypatch.setattr(parts, "forget", lambda: forgotten.append(1))
    monkeypatch.setitem(parts.GROUPS, "tuned", ("channels_last", timing.TUNED))
    records = parts._network(TINY, "inference", parts.Network("cifar_resnet20", 2, torch.float32, "tuned"), Progress())
    assert {r["contender"] for r in records} == {"channels_last", "tuned"} and not any(r["failed"] for r in records)
    assert len(asked) == 1 and asked[0][:4] == (2, 3, 32, 32) and asked[0][4]["dtype"] == torch.float32
    assert forgotten == [1]
    parts._network(TINY, "inference", parts.Network("cifar_resnet20", 2, torch.float32, "plain"), Progress())
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


# ---- one kind of fusion after the other


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
    parts._compare(good * 1.01, good, 0.03)
    for bad in (good * 1.1, good * float("nan")):
        with pytest.raises(ValueError, match="its numbers are"):
            parts._compare(bad, good, 0.03)


def test_steps_that_take_too_long_to_prepare_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PREPARED", -1.0)
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
    case = parts.TINY[3]
    parts._prepared.cache_clear()
    (record,) = parts._op(TINY, "affine_act_mask", "residual", "forward", case, torch.float32, "eager")
    assert record["ms_p50"] > 0 and record["bytes"] > 0
    right = parts._run_op
    monkeypatch.setattr(parts, "_run_op", lambda *args: right(*args)[0] * 1.1 if args[0] == "torch" else right(*args))
    with pytest.raises(ValueError, match="off the definition's"):
        parts._op(TINY, "affine_act_mask", "residual", "forward", case, torch.float32, "torch")
    parts._prepared.cache_clear()


def test_largest_batch() -> None:
    limit = 24 << 20
    (record,) = parts._largest(TINY, "cifar_resnet20", "channels_last", limit, 4)
    assert record["batch"] >= 4 and record["batch"] % 4 == 0
    (more,) = parts._peak(TINY, "cifar_resnet20", record["batch"] + 4, "channels_last")
    assert (
        more["peak_bytes"]
        > limit
        >= parts._peak(TINY, "cifar_resnet20", record["batch"], "channels_last")[0]["peak_bytes"]
    )


# ---- the whole, in processes


@pytest.mark.slow
def test_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ceilings and a part, and another part in the same process, into the same folder."""
    common = ["--device", "cpu", "--tiny", "--seconds", "90", "--threads", "1", "--output", str(tmp_path)]
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
    assert {r["contender"] for r in result["records"] if r.get("group") == "plain"} == set(parts.GROUPS["plain"])
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


# ---- make test-gpu


PASSING = "def test_good(): pass\n"
FAILING = "def test_bad(): assert False\n"


@pytest.mark.slow
def test_check_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_two.py").write_text(PASSING + FAILING)
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--mark",
        "not gpu",
        "--seconds",
        "90",
        "--",
        str(tmp_path),
        "-n",
        "0",
    ]
    assert check_gpu.main([*arguments, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]) == 1
    out = capsys.readouterr().out
    assert "1 passed, 1 failed" in out and "test_two::test_bad" in out
    if "compute-sanitizer is not there" in out:
        assert out.count("compute-sanitizer is not there") == 3
    assert (tmp_path / "out" / "test-gpu.xml").is_file()
    log = (tmp_path / "out" / "test-gpu.log").read_text()
    assert "test_good PASSED" in log and log.rstrip().endswith(out[out.index("test-gpu:") :].rstrip())
    assert "1 failed, 1 passed" in (tmp_path / "out" / "test-gpu.log").read_text()


def test_a_junit_file_in_words(tmp_path: Path) -> None:
    file = tmp_path / "x.xml"
    assert "no JUnit file" in check_gpu.counted(file)
    skips = "".join(f'<testcase name="s{i}"><skipped message="needs a CUDA device"/></testcase>' for i in range(2))
    fails = "".join(f'<testcase classname="t" name="f{i}"><failure/></testcase>' for i in range(20))
    file.write_text(
        f'<testsuites><testsuite tests="23" failures="20" errors="0" skipped="2"><testcase name="p"/>{skips}{fails}'
        "</testsuite></testsuites>"
    )
    words = check_gpu.counted(file)
    assert words.startswith("1 passed, 20 failed, 2 skipped\n    failed: t::f0\n")
    assert "and 5 more" in words and words.endswith("2 skipped: needs a CUDA device")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_tests_still_report(tmp_path: Path) -> None:
    """Ctrl-C, or the end of a time that others set: a JUnit file, a summary, status 130."""
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\ndef test_good(): pass\n"
        f"def test_slow(): pathlib.Path({str(tmp_path / 'began')!r}).touch(); time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "benchmarks.check_gpu", "--output", str(tmp_path / "out"), "--mark", "not gpu"]
    command += ["--", str(tmp_path), "-n", "0", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    end = time.time() + 120
    while time.time() < end and not (tmp_path / "began").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "test-gpu: interrupted" in out
    assert "1 passed" in out and (tmp_path / "out" / "test-gpu.xml").is_file()


def test_a_hanging_step_is_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log"
    begin = time.time()
    assert (
        check_gpu._run([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], log, 2, {})
        is None
    )
    assert time.time() - begin < 30 and "here" in log.read_text()
    assert check_gpu._run([sys.executable, "-c", "raise SystemExit(3)"], log, 30, {}) == 3


def test_the_reduced_table_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert reduced.main(["--device", "cpu", "--seconds", "1.5"]) == 0
    out = capsys.readouterr().out
    assert "native bn_stats plain" in out and ", 0 raised" in out


def test_the_reduced_table_begins_with_every_kernel_of_tritons() -> None:
    """Those too that nothing but a table of measurements would choose: a sanitizer sees all, however short its time."""
    pytest.importorskip("triton")
    from resnet_fast.backends.triton import common

    if not common.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1: launches are recorded on CPU tensors")
    sources = (ROOT / "resnet_fast" / "backends" / "triton").glob("*.py")
    kernels = {name for file in sources for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    by_name = {case.name: case for case in cases.TINY}
    soon = [
        row for row in reduced.table() if row[0] == reduced.CASES[0] and row[2] == next(iter(cases.VARIANTS[row[1]]))
    ]
    assert reduced.table()[: len(soon)] == soon
    with common.recorded() as launches, torch.no_grad():
        for case, op, variant, dtype, name in soon:
            if name == "triton" and dtype == torch.float32 and hasattr(dispatch.backend(name), op):
                for _, call in reduced.ways(name, op, cases.inputs(op, by_name[case], variant=variant)):
                    call()
    assert {launch.kernel.fn.__name__ for launch in launches} == kernels and len(kernels) > 15


# ---- make bench-check


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
