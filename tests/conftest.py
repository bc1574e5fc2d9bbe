"""What all tests share: one thread, a seed, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: here, before any test file can import one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: A developer's own table (resnet_fast.warmup) is no part of the tests: there is none in this folder.
os.environ["RESNET_FAST_CACHE"] = os.path.join(tempfile.gettempdir(), "resnet_fast_tests_have_no_table")

#: Blocks of any size train fused in the tests; test_small.py has the rule.
os.environ["RESNET_FAST_MIN_MACS"] = "0"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --dist loadgroup one process compiles what the tests of a file share, not each of them."""
    if config.pluginmanager.has_plugin("xdist"):
        for item in items:
            if {"records", "cubin", "candidates"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and on a busy machine they wait for each other. Tests of threads ask."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def whole_float32() -> Iterator[None]:
    """On a GPU too: which of its layers cuDNN would run in TF32 is not known. Tests of TF32 ask for it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty RESNET_FAST_CACHE, and no table known before or after."""
    from resnet_fast import dispatch

    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()
