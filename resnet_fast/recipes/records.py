"""What a training run leaves in its folder: metrics.json, metrics.csv, curves.png, TensorBoard's events."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_fast.commands import CommandError

from . import checkpoint, figures
from .libraries import tensorboard

__all__ = ["Folder", "Row"]

#: One epoch: numbers by name. Losses are means, ``*_top1`` and ``*_top5`` percent of right answers.
Row = dict[str, float]


class Folder:
    """The output folder of a run; made where it is missing, refused where it holds another run.

    ``resume``: go on with the run in it, if there is one.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self.last, self.best = path / "last.pt", path / "best.pt"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--output {path}: {error.strerror}") from error
        if self.last.exists() and not (resume or overwrite):
            raise CommandError(
                f"--output {path.name}: holds a run. Remedy: --resume goes on with it, --overwrite drops it"
            )
        self.resuming = resume and self.last.exists()
        if overwrite and not resume:
            for file in (self.last, self.best):
                file.unlink(missing_ok=True)
        writer = tensorboard()
        self._events = writer(str(path / "events")) if writer else None

    def epoch(self, rows: Sequence[Row], record: dict[str, Any]) -> None:
        """After an epoch, whose row is the last one: everything again, each file replaced as a whole."""
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        checkpoint.write(self.path / "metrics.csv", text.getvalue().encode())
        checkpoint.write(self.path / "metrics.json", (json.dumps(record, indent=1) + "\n").encode())
        if self._events is not None:
            for name, value in rows[-1].items():
                self._events.add_scalar(name.replace("_", "/", 1), value, int(rows[-1]["iteration"]))

    def curves(self, title: str, rows: Sequence[Row]) -> None:
        """Draw curves.png."""
        if rows:
            figures.curves(title, rows, self.path / "curves.png")

    def close(self) -> None:
        """Write out TensorBoard's events."""
        if self._events is not None:
            self._events.close()
