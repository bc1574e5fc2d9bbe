"""What was measured: which backend, in which configuration, runs an op fastest, by device, op, shape and dtype.

A table is a JSON file for one device. ``resnet_fast.warmup`` writes one into the cache folder; those that are committed
lie beside this file, and there is none yet: no GPU has been measured. This module knows files and rows, and nothing of
what a backend's name or configuration means.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FLAGS",
    "SCHEMA",
    "Candidate",
    "Row",
    "Signature",
    "TableError",
    "TableWarning",
    "cache_file",
    "device_name",
    "load",
    "read",
    "save",
]

#: Of the file's format and of what its words mean: raised when a reader of the one before would be misled.
SCHEMA = 1
COMMITTED = Path(__file__).parent

#: What, besides shapes, an op's time depends on; "block" is a whole block, forward and backward;
#: "inference" its forward in eval mode, whose candidates are ways to run it (inference.WAYS) and not backends.
FLAGS: dict[str, tuple[str, ...]] = {
    "conv_stats": ("lazy_x",),
    "conv_backward": ("needs_x", "needs_w", "lazy_x", "lazy_g", "masked", "residual"),
    "conv_backward_sums": ("needs_w", "lazy_g"),
    "block": ("identity", "residual", "projection", "pool", "needs_x"),
    "inference": ("identity", "residual", "projection", "pool"),
}


class TableWarning(UserWarning):
    """A table was ignored, or could not be written; the message names the file, the reason and the remedy."""


class TableError(ValueError):
    """What a file holds is no table for this device and these versions."""


class Signature(NamedTuple):
    """What a row is for. Equal signatures run equally fast on one device."""

    op: str
    dtype: torch.dtype
    x: tuple[int, ...]  # (N, C, H, W)
    #: Of each convolution (one, unless the op is "block"): w (K, C // groups, R, S), stride, padding, dilation, groups.
    layers: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int], ...]
    flags: tuple[bool, ...]  # in the order of FLAGS[op]


class Candidate(NamedTuple):
    """One way to run it, and the seconds that one call took."""

    backend: str
    config: Mapping[str, Any] | None
    seconds: float


class Row(NamedTuple):
    """Everything measured for one signature, the fastest first; ``source`` says by whom, in a few words."""

    signature: Signature
    candidates: tuple[Candidate, ...]
    source: str


# ---- for which device and versions


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What measurements hold for: the GPU's name; for a CPU its name and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    return device.type


@functools.cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _made_for(device: torch.device) -> dict[str, str | None]:
    """What a cache file must agree with, besides the schema."""
    return {
        "device": device_name(device),
        "resnet_fast": _version("resnet_fast"),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _file(device: torch.device) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.json"


def cache_file(device: torch.device, folder: str | os.PathLike[str] | None = None) -> Path:
    """The file of ``device`` in ``folder``; else in $RESNET_FAST_CACHE, or $XDG_CACHE_HOME/resnet_fast."""
    if folder is None:
        folder = os.environ.get("RESNET_FAST_CACHE") or None
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "resnet_fast"
    return Path(os.path.expanduser(folder)) / _file(device)


# ---- a row as JSON


def _to_json(row: Row) -> dict[str, Any]:
    op, dtype, x, layers, flags = row.signature
    return {
        "op": op,
        "dtype": str(dtype).removeprefix("torch."),
        "x": x,
        "layers": layers,
        "flags": [name for name, flag in zip(FLAGS[op], flags, strict=True) if flag],
        "candidates": [
            {"backend": c.backend, "config": c.config, "us": round(c.seconds * 1e6, 3)} for c in row.candidates
        ],
    }


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _from_json(row: Any, source: str) -> Row:
    """Raises KeyError, TypeError, ValueError or AttributeError where it is no row."""
    op, flags = row["op"], row["flags"]
    if unknown := set(flags) - set(FLAGS[op]):
        raise ValueError(f"unknown flags {sorted(unknown)}")
    dtype = getattr(torch, row["dtype"])
    layers = _tuples(row["layers"])
    if not isinstance(dtype, torch.dtype) or len(row["x"]) != 4 or not layers or any(len(la) != 5 for la in layers):
        raise ValueError(f"dtype {row['dtype']}, x {row['x']}, layers {row['layers']}")
    signature = Signature(op, dtype, _tuples(row["x"]), layers, tuple(name in flags for name in FLAGS[op]))
    candidates = [Candidate(str(c["backend"]), c["config"], float(c["us"]) / 1e6) for c in row["candidates"]]
    if not candidates or any(c.config is not None and not isinstance(c.config, dict) for c in candidates):
        raise ValueError("no candidates, or one whose config is no object")
    hash(signature)
    return Row(signature, tuple(sorted(candidates, key=lambda c: c.seconds)), source)


# ---- files


def read(path: Path, made_for: Mapping[str, str | None], source: str) -> dict[Signature, Row]:
    """The rows of a file. Raises :class:`TableError` where it is damaged, or not ``made_for`` this; OSError."""
    try:
        content = json.loads(path.read_bytes())
        schema = content["schema"]
        found = {key: content[key] for key in made_for}
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"it is damaged ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise TableError(f"it has schema {schema!r}, this version reads {SCHEMA}")
    for key, value in made_for.items():
        if found[key] != value:
            raise TableError(f"it was made for {key} {found[key]!r}, here is {value!r}")
    try:
        rows = [_from_json(row, source) for row in content["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(f"a row of it is damaged ({type(error).__name__}: {error})") from error
    return {row.signature: row for row in rows}


def _ignored(path: Path, reason: object, remedy: str, stacklevel: int) -> None:
    warnings.warn(f"the table {path} is ignored: {reason}. Remedy: {remedy}", TableWarning, stacklevel=stacklevel)


def load(device: torch.device, folder: str | os.PathLike[str] | None = None) -> dict[Signature, Row]:
    """Every row for ``device``: those committed, and over them those of the cache.

    A file that is damaged, or made for something else, is ignored with a :class:`TableWarning`.
    """
    rows: dict[Signature, Row] = {}
    committed = COMMITTED / _file(device)
    if committed.exists():
        try:
            rows |= read(committed, {"device": device_name(device)}, f"table {committed.name}")
        except (TableError, OSError) as error:
            _ignored(committed, error, "reinstall resnet_fast", 3)
    cache = cache_file(device, folder)
    try:
        rows |= read(cache, _made_for(device), "warmup")
    except FileNotFoundError:
        pass
    except (TableError, OSError) as error:
        _ignored(cache, error, "call resnet_fast.warmup(model, input_shape) again, or delete the file", 3)
    return rows


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock is a file beside the table, for the table itself is replaced."""
    with open(path.with_suffix(".lock"), "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(device: torch.device, rows: Iterable[Row], folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Add ``rows`` to the cache file of ``device``; what other processes wrote stays. Returns its path.

    The file is replaced as a whole, so that a reader sees the old one or the new one. None, with a
    :class:`TableWarning`, where it cannot be written.
    """
    path = cache_file(device, folder)
    made_for = _made_for(device)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            kept: dict[Signature, Row] = {}
            with contextlib.suppress(TableError, FileNotFoundError):  # one that cannot be read is written anew
                kept = read(path, made_for, "warmup")
            kept |= {row.signature: row for row in rows}
            lines = ",\n".join(json.dumps(_to_json(row)) for row in kept.values())
            head = json.dumps({"schema": SCHEMA, **made_for})[:-1]
            descriptor, temporary = tempfile.mkstemp(".tmp", path.stem, path.parent)
            with os.fdopen(descriptor, "w") as file:
                file.write(f'{head}, "rows": [\n{lines}\n]}}\n')
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            temporary = None
    except OSError as error:
        warnings.warn(
            f"the table {path} could not be written: {error}. What was measured holds for this process. Remedy: "
            "cache=<a folder that can be written>, or RESNET_FAST_CACHE",
            TableWarning,
            stacklevel=3,
        )
        return None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return path
