"""The recipes: how long, how fast, with which augmentation. Each says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from resnet_fast.commands import CommandError, did_you_mean

__all__ = ["RECIPES", "Recipe", "default_recipe", "find"]


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, and what else there is to choose.

    ``batch`` is over all processes. One of ``epochs`` and ``iterations`` is the length. ``schedule``: "plateau" (divide
    by 10 when the validation error stops falling), "steps" (divide by 10 at ``milestones``, shares of the length) or
    "cosine" (down to 0 over the length); each after ``warmup`` epochs of linear rise. ``augment``, see
    :func:`resnet_fast.recipes.transforms.spatial`; "crop" moves images by up to ``pad`` of 32 pixels. ``normalise``:
    subtract the mean of each "pixel", or mean and deviation of each "channel". ``holdout``: share of CIFAR-10's
    training images kept for validation. ``decay_all`` False: no weight decay for biases and batch norms.
    """

    name: str
    source: str
    batch: int
    lr: float
    schedule: str
    epochs: int | None = None
    iterations: int | None = None
    milestones: tuple[float, ...] = ()
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_all: bool = True
    warmup: float = 0.0
    augment: str = "crop"
    pad: int = 4
    flip: bool = True
    lighting: bool = False
    normalise: str = "pixel"
    holdout: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    zero_init_residual: bool = False


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="paper-imagenet",
            source="arXiv 1512.03385, section 3.4",
            batch=256,
            lr=0.1,
            schedule="plateau",
            iterations=600_000,
            augment="scale",
            lighting=True,
        ),
        Recipe(
            name="paper-cifar",
            source="arXiv 1512.03385, section 4.2",
            batch=128,
            lr=0.1,
            schedule="steps",
            iterations=64_000,
            milestones=(32 / 64, 48 / 64),
            holdout=0.1,
        ),
        Recipe(
            name="modern",
            source="He et al., Bag of Tricks for Image Classification, arXiv 1812.01187: linear warm-up, zero gamma, "
            "no bias decay, cosine decay, label smoothing, mixup, 200 epochs",
            batch=256,
            lr=0.1,
            schedule="cosine",
            epochs=200,
            nesterov=True,
            decay_all=False,
            warmup=5,
            augment="resized_crop",
            lighting=True,
            normalise="channel",
            label_smoothing=0.1,
            mixup=0.2,
            zero_init_residual=True,
        ),
        Recipe(
            name="fast",
            source="this project: the paper's SGD with one warm-up and one cosine, short enough for a CPU",
            batch=32,
            lr=0.05,
            schedule="cosine",
            epochs=15,
            nesterov=True,
            weight_decay=5e-4,
            warmup=1,
            normalise="channel",
        ),
    )
}
"""By name."""


def default_recipe(data: str) -> str:
    """The recipe for data of that ``--data``: the paper's where they are the paper's, else "fast"."""
    kind = data.partition(":")[0]
    return {"cifar10": "paper-cifar", "imagefolder": "paper-imagenet"}.get(kind, "fast")


def find(name: str) -> Recipe:
    """The recipe of that name. Raises CommandError with the nearest one."""
    if name not in RECIPES:
        raise CommandError(f"--recipe {name}: supported are {', '.join(RECIPES)}.{did_you_mean(name, RECIPES)}")
    return RECIPES[name]
