"""What the commands' options mean: words checked with a suggestion, devices, dtypes, files, and the network to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import CommandError, did_you_mean, images, plots, sources
from .progress import Progress

__all__ = ["DTYPES", "batches", "choice", "default_dtypes", "device", "file", "network", "plot_file", "words"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CALIBRATION = (4, 8)  # batches, images a batch


def choice(option: str, value: str, known: Any) -> str:
    """``value``, one of ``known``; else CommandError with a suggestion."""
    if value not in known:
        raise CommandError(f"{option} {value}: supported are {', '.join(known)}.{did_you_mean(value, known)}")
    return value


def words(option: str, text: str, known: Any) -> list[str]:
    """The words of a comma list, each one of ``known``."""
    found = list(dict.fromkeys(w.strip() for w in text.split(",") if w.strip()))
    if not found:
        raise CommandError(f"{option}: empty, supported are {', '.join(known)}")
    return [choice(option, w, known) for w in found]


def batches(text: str) -> list[int]:
    """The numbers of a comma list."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise CommandError(f"--batch {text}: supported are positive numbers, separated by commas")
    return list(dict.fromkeys(found))


def device(name: str) -> torch.device:
    """auto, cpu or cuda; CommandError where there is no such device."""
    choice("--device", name, ("auto", "cpu", "cuda"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise CommandError(f"--device cuda: {built}. Remedy: --device cpu, or see `resnet-fast info`")
    return torch.device(name)


def default_dtypes(device: torch.device) -> str:
    """float32, and bfloat16 where the device has it."""
    if device.type == "cpu":
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "float32,bfloat16" if native else "float32"


def file(option: str, name: str | None) -> Path | None:
    """Where to write: its folder must be there before the work starts."""
    if name is None:
        return None
    path = Path(name)
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{option} {name}: no such folder {path.parent}")
    if path.is_dir():
        raise CommandError(f"{option} {name}: is a folder")
    return path


def plot_file(option: str, name: str | None) -> Path | None:
    """As ``file``, for a picture: matplotlib is there and knows the ending."""
    path = file(option, name)
    if path is not None:
        known = plots.require().Figure().canvas.get_supported_filetypes()
        if path.suffix.removeprefix(".").lower() not in known:
            raise CommandError(f"{option} {name}: its ending must be one of {', '.join(sorted(known))}")
    return path


def network(
    name: str, folder: str | None, count: int, size: int, device: torch.device, seed: int, progress: Progress
) -> tuple[sources.Source, Tensor, images.Pictures]:
    """The network, calibrated if its weights are random; photographs (count, 3, size, size); and their source."""
    with progress("reading photographs"):
        pictures = images.load(folder, progress.warn)
        x = images.crops(pictures, count, size, seed)
    with progress(f"building {name}"):
        source = sources.build(name, seed)
    if not source.own_weights:
        batches, each = _CALIBRATION
        with progress(f"calibrating batch norms on {batches * each} crops"):
            many = images.crops(pictures, batches * each, size, seed + 1)
            try:
                sources.calibrate(source.model.to(device), list(many.to(device).split(each)), seed)
            except (RuntimeError, ValueError) as error:
                line = str(error).splitlines()[0]
                raise CommandError(f"{name} does not run at --size {size}: {line}") from error
    return source, x, pictures
