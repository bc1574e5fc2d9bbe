"""The files of measured rows: what is written, read, merged, refused, and by whom at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast import dispatch, tables
from resnet_fast.dispatch import PARTS
from resnet_fast.tables import Candidate, Row, Signature, TableError, TableWarning
from tests.tuning import CPU, step, tiny

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("empty_cache")


def row_of(batch: int) -> Row:
    layer = (16, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1
    signature = Signature("conv_stats", torch.bfloat16, (batch, 8, 6, 6), (layer,), (True,))
    candidates = Candidate("triton", {"fprop": ["written", 1, 2]}, 1e-6), Candidate("native", None, 2e-6)
    return Row(signature, candidates, "warmup")


def test_rows_survive_a_file(empty_cache: Path) -> None:
    path = tables.save(CPU, [row_of(1), row_of(2)])
    assert path is not None and path.parent == empty_cache
    assert tables.load(CPU) == {row_of(n).signature: row_of(n) for n in (1, 2)}
    tables.save(CPU, [row_of(3)])
    assert len(tables.load(CPU)) == 3
    assert [p.name for p in empty_cache.iterdir() if p.suffix == ".tmp"] == []


def change(**change: Any) -> Callable[[dict[str, Any]], str]:
    return lambda content: json.dumps({**content, **change})


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda content: "", "damaged"),
        (lambda content: json.dumps(content)[:-20], "damaged"),
        (lambda content: "[]", "damaged"),
        (lambda content: "\xff\x00", "damaged"),
        (change(schema=99), "schema 99"),
        (change(device="NVIDIA H100"), "made for device 'NVIDIA H100'"),
        (change(torch="2.0.0"), "made for torch '2.0.0'"),
        (change(triton="2.0.0"), "made for triton '2.0.0'"),
        (change(resnet_fast="9.9"), "made for resnet_fast '9.9'"),
        (change(rows=[{}]), "a row of it is damaged"),
        (change(rows=3), "a row of it is damaged"),
        (lambda content: json.dumps(content).replace("bfloat16", "relu"), "a row of it is damaged"),
        (lambda content: json.dumps(content).replace("lazy_x", "eager_x"), "a row of it is damaged"),
        (lambda content: json.dumps(content).replace('"us": 1.0', '"us": "fast"'), "a row of it is damaged"),
        (lambda content: json.dumps(content).replace("conv_stats", "conv_magic"), "a row of it is damaged"),
    ],
)
def test_a_file_from_elsewhere_is_ignored(damage: Callable[[dict[str, Any]], str], reason: str) -> None:
    """Training goes on by the order of backends; the warning names file, reason and remedy; warmup writes it anew."""
    path = tables.save(CPU, [row_of(1)])
    assert path is not None
    path.write_text(damage(json.loads(path.read_text())), encoding="latin-1")
    with pytest.warns(TableWarning) as found:
        step(tiny())
    message = str(found[0].message)
    assert (
        len(found) == 1 and str(path) in message and reason in message and "Remedy: call resnet_fast.warmup" in message
    )
    assert dispatch.table(CPU).rows == {}
    tables.save(CPU, [row_of(2)])
    assert list(tables.load(CPU)) == [row_of(2).signature]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tables.cache_file(CPU).parent == tmp_path / "cache"
    assert tables.cache_file(CPU, "~/x").parent == Path("~/x").expanduser()
    monkeypatch.delenv("RESNET_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.cache_file(CPU).parent == tmp_path / "resnet_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.cache_file(CPU).parent == Path("~/.cache/resnet_fast").expanduser()


def test_committed_tables_come_first_and_the_cache_over_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A committed table holds for its device in every version that reads its schema."""
    path = tables.save(CPU, [row_of(1), row_of(2)], tmp_path / "committed")
    assert path is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "2.11.0"}))
    monkeypatch.setattr(tables, "COMMITTED", path.parent)
    assert {row.source for row in tables.load(CPU).values()} == {f"table {path.name}"}
    tables.save(CPU, [row_of(2)._replace(candidates=row_of(2).candidates[1:])])
    found = tables.load(CPU)
    assert [len(row.candidates) for row in found.values()] == [2, 1]
    path.write_text("{}")
    with pytest.warns(TableWarning, match="Remedy: reinstall"):
        assert len(tables.load(CPU)) == 1


@pytest.mark.parametrize("path", sorted(tables.COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_committed_tables_are_sound(path: Path) -> None:
    """Every row can be read, and names ways that this version has."""
    for row in tables.read(path, {}, path.name).values():
        for candidate in row.candidates:
            assert candidate.backend in (*dispatch.BACKENDS, "torch", PARTS, "fused", "original")
            if candidate.config:
                dispatch.backend(candidate.backend).configured(row.signature.op, candidate.config)


def test_reading_needs_what_it_asks_for(tmp_path: Path) -> None:
    path = tables.save(CPU, [row_of(1)], tmp_path)
    assert path is not None
    with pytest.raises(TableError, match=r"it is damaged \(KeyError: 'colour'"):
        tables.read(path, {"colour": "blue"}, "")


@pytest.mark.slow
def test_threads_and_processes_write_at_once() -> None:
    """Nothing is lost, and every reader finds a whole file."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_tables import CPU, row_of, tables, torch
torch.set_num_threads({torch.get_num_threads()})  # which the file is named after
for n in range(100, 110):
    tables.save(CPU, [row_of(n)])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)

    def write(start: int) -> None:
        for n in range(start, start + 5):
            tables.save(CPU, [row_of(n)])

    threads = [threading.Thread(target=write, args=(start,)) for start in (1, 11, 21)]
    tables.save(CPU, [row_of(99)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or process.poll() is None:
            assert row_of(99).signature in tables.load(CPU)
    assert process.returncode == 0
    batches = {signature.x[0] for signature in tables.load(CPU)}
    assert batches == {99, *range(1, 6), *range(11, 16), *range(21, 26), *range(100, 110)}
