"""The learning rate at every iteration, as a function of the recipe and of little that must be remembered."""

from __future__ import annotations

import math
from typing import Any

from .definitions import Recipe

__all__ = ["Schedule"]

#: The paper's "train a while after the error flattens": epochs without an improvement by _LEAST before lr / 10.
_PATIENCE = 8
_LEAST = 0.1  # percent of validation error
#: The 110-layer network's start (section 4.2): a tenth of lr until the training error is below this, in percent.
_EASY = 80.0
_SMOOTHING = 0.98  # of the training error that this looks at: about fifty iterations


class Schedule:
    """``lr(iteration)``; ``trained`` after every iteration and ``validated`` after every epoch tell it how it goes.

    ``easy_start``: begin with lr / 10 until the training error is below 80 % (the paper's 110-layer network).
    """

    def __init__(self, recipe: Recipe, total: int, per_epoch: int, easy_start: bool = False) -> None:
        self.recipe, self.total = recipe, total
        self.warmup = round(recipe.warmup * per_epoch)
        # In a run shorter than the recipe's, the rise is shorter too.
        self.warmup = min(self.warmup, total // 4)
        self.state: dict[str, Any] = {
            "easy": easy_start,
            "error": 100.0,
            "factor": 1.0,
            "best": math.inf,
            "epochs_since": 0,
        }

    def lr(self, iteration: int) -> float:
        """Of the step that follows ``iteration`` steps."""
        r, s = self.recipe, self.state
        if s["easy"]:
            return r.lr / 10
        if iteration < self.warmup:
            return r.lr * (iteration + 1) / self.warmup
        if r.schedule == "cosine":
            done = (iteration - self.warmup) / max(1, self.total - self.warmup)
            return r.lr / 2 * (1 + math.cos(math.pi * min(done, 1.0)))
        if r.schedule == "steps":
            return r.lr * 0.1 ** sum(iteration >= round(m * self.total) for m in r.milestones)
        return r.lr * float(s["factor"])

    def trained(self, error: float) -> None:
        """The training error of an iteration, in percent; looked at where ``wants_error``."""
        s = self.state
        s["error"] = _SMOOTHING * s["error"] + (1 - _SMOOTHING) * error
        if s["error"] < _EASY:
            s["easy"] = False

    @property
    def wants_error(self) -> bool:
        """Whether ``trained`` need be called: reading the error makes the host wait for the device."""
        return bool(self.state["easy"])

    def validated(self, error: float) -> None:
        """The validation error of an epoch, in percent."""
        s = self.state
        if self.recipe.schedule != "plateau":
            return
        if error < s["best"] - _LEAST:
            s["best"], s["epochs_since"] = error, 0
            return
        s["epochs_since"] += 1
        if s["epochs_since"] >= _PATIENCE:
            s["factor"], s["epochs_since"] = s["factor"] / 10, 0
