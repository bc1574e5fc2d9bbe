"""The support table, resnet_fast/adapters/support.json: every example of it is what it says, and README.md says so too.

``resnet-fast models`` prints the same data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast.__main__ import main
from resnet_fast.commands import models
from tests.fusing import compare, norms
from tests.libraries import build

ROWS = models.load()
EXAMPLES = [
    pytest.param(row, example, id=f"{row['library'].partition(' ')[0]}: {example['name']}")
    for row in ROWS
    for example in row["examples"]
]
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(("row", "example"), EXAMPLES)
def test_example(row: dict[str, Any], example: dict[str, Any]) -> None:
    def make() -> torch.nn.Module:
        model = build(example["make"], example["arguments"], example.get("attribute", ""))
        return model.requires_grad_(True) if example.get("unfreeze") else model

    size = example.get("size", 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model, rows = compare(make, x, generic=row.get("generic", False))
    assert list(norms(model)) == example["norms"], f"\n{rows}"
    for reason in example.get("reasons", []):
        assert any(reason in r.reason for r in rows if r.status != "fused"), f"{reason!r} is not in\n{rows}"
    fell_back = [r for r in rows if "last call ran the original" in r.reason]
    assert not fell_back, f"\n{rows}"
    left = [r for r in rows if r.status != "fused"]
    assert row["left"] or not [r for r in left if r.status == "not"], f"\n{rows}"


def test_names_are_unique() -> None:
    ids = [p.id for p in EXAMPLES if "generic" not in p.values[0]]
    assert len(ids) == len(set(ids))


def test_readme_has_the_table() -> None:
    text = README.read_text()
    assert models.insert(text, models.markdown()) == text, "remedy: python -m resnet_fast models --write README.md"


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for row in ROWS:
        assert row["library"].split()[0] in printed
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ROWS
    file = tmp_path / "page.md"
    assert main(["models", "--write", str(file)]) == 2
    assert "found no file" in capsys.readouterr().err
    file.write_text(f"a\n{models.END}{models.BEGIN}\n")
    assert main(["models", "--write", str(file)]) == 2
    assert models.BEGIN in capsys.readouterr().err
    file.write_text(f"a\n{models.BEGIN}\na stale line\n{models.END}\nb\n")
    assert main(["models", "--write", str(file)]) == 0
    assert "a stale line" not in file.read_text() and "| torchvision |" in file.read_text()
