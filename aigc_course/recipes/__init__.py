"""The only place where a family meets its data: ``build(name, profile)`` is what ``aigc train`` and the lessons run."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints
from ..datasets import FileCheck
from ..runtime import CourseError, course_dir, pick_device, pick_profile
from .adversarial import GANS, Plan, gan_plan, gan_recipe
from .judge import CLASSIFIERS, DigitFigures, classifier, digit_figures, mnist_features
from .mixture import GMM, PCA, DigitMixture, gmm
from .recipe import Recipe, check_profile, machine, shipped
from .variational import BATCH_SIZE, FLAT, LEARNING_RATE, VAES, WIDE, held_out_figures, learning_rate, vae

__all__ = [
    "BATCH_SIZE",
    "CLASSIFIERS",
    "FLAT",
    "GANS",
    "GMM",
    "LEARNING_RATE",
    "NAMES",
    "PCA",
    "Plan",
    "RECIPES",
    "VAES",
    "WIDE",
    "DigitFigures",
    "DigitMixture",
    "Recipe",
    "build",
    "card_of",
    "check_pretrained",
    "check_profile",
    "digit_figures",
    "gan_plan",
    "held_out_figures",
    "learning_rate",
    "load_pretrained",
    "machine",
    "mnist_features",
    "pretrained",
    "ship",
]

RECIPES = {
    "gmm": gmm,
    **{name: partial(vae, name) for name in ("vae", "vae2d", "iwae")},
    **{name: partial(gan_recipe, name) for name in ("gan", "dcgan")},
    "classifier": classifier,
}
NAMES = tuple(RECIPES)


def build(name: str, profile: str | None = None, *, seed: int = 0, device: str = "auto") -> Recipe:
    """The recipe called ``name`` at ``profile``, "quick" or "full". Raises ``CourseError`` for a name that is none."""
    if name not in RECIPES:
        raise CourseError(f"there is no recipe {name!r}: choose from {', '.join(NAMES)}")
    return RECIPES[name](pick_profile(profile), seed, pick_device(device))


def load_pretrained(name: str, *, device: str = "auto") -> Any:
    """The trained model ``name`` that comes with the course, from ``data/checkpoints``, where its card lies too.

    Raises ``CourseError`` for a name that is none, ``CheckpointError`` if its files are damaged.
    """
    if name not in pretrained():
        raise CourseError(f"no trained model {name!r} comes with the course: choose from {', '.join(pretrained())}")
    checkpoint = shipped(name, pick_device(device))
    return build(name, checkpoint.card["profile"], device=device).restore(checkpoint)


def card_of(name: str) -> dict[str, Any]:
    """What the trained model ``name`` says of itself: its command, machine, seed, settings and figures."""
    return shipped(name, torch.device("cpu")).card


def pretrained() -> list[str]:
    """The names of the trained models that come with the course."""
    return sorted(
        path.parent.name for path in (course_dir() / "data" / "checkpoints").glob(f"*/{checkpoints.MANIFEST}")
    )


def ship(name: str, run: Path) -> Path:
    """Put the model that ``train(run)`` kept among those that come with the course; returns its folder there."""
    checkpoint = checkpoints.load(Path(run) / "model")
    if (found := checkpoint.card.get("recipe")) != name:
        raise CourseError(f"{run} holds a model of the recipe {found}, not {name}: name another run")
    return checkpoints.save(course_dir() / "data" / "checkpoints" / name, checkpoint.weights, card=checkpoint.card)


def check_pretrained() -> list[FileCheck]:
    """Read every trained model that comes with the course; damage is told, not raised."""
    rows = []
    for name in pretrained():
        folder = course_dir() / "data" / "checkpoints" / name
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            checkpoints.load(folder)
            rows.append(FileCheck(f"checkpoints/{name}", size, True, "as its manifest says"))
        except checkpoints.CheckpointError as error:
            rows.append(FileCheck(f"checkpoints/{name}", size, False, str(error)))
    return rows
