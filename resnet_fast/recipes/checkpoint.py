"""Checkpoints that are never half-written, and that load without running what a pickle may hold."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import torch

from resnet_fast.commands import CommandError

__all__ = ["FORMAT", "load", "rng_state", "save", "seed", "set_rng_state", "write"]

#: Counted up when older ones can no longer be read.
FORMAT = 1


def write(file: Path, content: bytes) -> None:
    """Replace ``file`` as a whole: write beside it, fsync, rename, fsync the folder. Raises CommandError.

    Where that fails, a full disk for one, the old file is as it was and nothing is left behind.
    """
    beside = file.with_name(f".{file.name}.part")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kept = f"; the {file.name} of before is whole" if file.exists() else ""
        remedy = "free some space, then run again with --resume" if full else "check the folder --output names"
        raise CommandError(
            f"cannot write {file.name} ({len(content)} bytes): {error.strerror}{kept}. Remedy: {remedy}"
        ) from error


def save(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and lists and dictionaries of them) as :func:`write` does."""
    stream = io.BytesIO()
    torch.save(content, stream)
    write(file, stream.getvalue())


def load(file: str | Path) -> dict[str, Any]:
    """What is in a checkpoint or weights file, on the CPU, read with weights_only=True. Raises CommandError."""
    path = Path(file)
    if not path.is_file():
        raise CommandError(f"{file}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CommandError(
            f"{path.name}: holds more than tensors and plain values, or is damaged: {str(error).splitlines()[0]} "
            "Remedy: save model.state_dict(), not the model"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path.name}: damaged or half-downloaded: {line}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path.name}: holds {type(content).__name__}, expected a checkpoint or a state_dict")
    found = content.get("format")
    if found is not None and found != FORMAT:
        raise CommandError(f"{path.name}: has format {found}, this version of resnet_fast reads {FORMAT}")
    return content


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:  # then nothing draws from it
        return None
    return numpy


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    numpy = _numpy()
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = [
            str(kind),
            [int(k) for k in keys],
            *(float(r) if i == 2 else int(r) for i, r in enumerate(rest)),
        ]
    return state


def seed(number: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(number)
    torch.manual_seed(number)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(number % 2**32)


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to :func:`rng_state`'s answer."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy = _numpy()
    if numpy is not None and "numpy" in state:
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), position, has_gauss, cached))
