"""The only place where a family meets its data: ``build(name, profile)`` is what ``aigc train`` and the lessons run."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import checkpoints, ranks
from ..datasets import FileCheck
from ..runtime import CourseError, only_process, pick_device, pick_profile
from .adversarial import GANS, Plan, gan_plan, gan_recipe
from .judge import CLASSIFIERS, DigitFigures, classifier, digit_figures, mnist_features
from .language import (
    LANGUAGE,
    LANGUAGE_NAMES,
    LanguageModel,
    LanguagePlan,
    LanguageSettings,
    held_out_bits,
    language_plan,
    language_recipe,
    sample_texts,
    token_rows,
)
from .mixture import GMM, PCA, DigitMixture, gmm
from .recipe import Recipe, check_profile, machine, shipped
from .shipping import ship_language
from .variational import BATCH_SIZE, FLAT, LEARNING_RATE, VAES, WIDE, held_out_figures, learning_rate, vae

__all__ = [
    "BATCH_SIZE",
    "CLASSIFIERS",
    "FLAT",
    "GANS",
    "GMM",
    "LANGUAGE",
    "LANGUAGE_NAMES",
    "LEARNING_RATE",
    "NAMES",
    "PCA",
    "Plan",
    "RECIPES",
    "VAES",
    "WIDE",
    "DigitFigures",
    "DigitMixture",
    "LanguageModel",
    "LanguagePlan",
    "LanguageSettings",
    "Recipe",
    "build",
    "card_of",
    "check_pretrained",
    "check_profile",
    "digit_figures",
    "gan_plan",
    "held_out_bits",
    "held_out_figures",
    "language_plan",
    "learning_rate",
    "load_pretrained",
    "machine",
    "mnist_features",
    "pretrained",
    "sample_texts",
    "ship",
    "token_rows",
]

RECIPES = {
    "gmm": gmm,
    **{name: partial(vae, name) for name in ("vae", "vae2d", "iwae")},
    **{name: partial(gan_recipe, name) for name in ("gan", "dcgan")},
    "classifier": classifier,
    **{name: partial(language_recipe, name) for name in LANGUAGE_NAMES},
}
NAMES = tuple(RECIPES)


def build(name: str, profile: str | None = None, *, seed: int = 0, device: str = "auto") -> Recipe:
    """The recipe called ``name`` at ``profile``, "quick" or "full". Raises ``CourseError`` for a name that is none."""
    if name not in RECIPES:
        raise CourseError(f"there is no recipe {name!r}: choose from {', '.join(NAMES)}")
    recipe = RECIPES[name](pick_profile(profile), seed, pick_device(device))

    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> Any:
        with ExitStack() as held:
            if out is not None:  # until the model is saved, too
                folder = Path(out).expanduser().absolute()
                ranks.on_first(lambda: held.enter_context(only_process(folder)))
            return recipe.train(out, on_log)

    return replace(recipe, train=train)


def load_pretrained(name: str, *, device: str = "auto") -> Any:
    """The trained model ``name`` that comes with the course, from ``data/checkpoints``, where its card lies too.

    Raises ``CourseError`` for a name that is none, ``CheckpointError`` if its files are damaged.
    """
    if name not in pretrained():
        raise CourseError(f"no trained model {name!r} comes with the course: choose from {', '.join(pretrained())}")
    return build(name, card_of(name)["profile"], device=device).restore(shipped(name))


def card_of(name: str) -> dict[str, Any]:
    """What the trained model ``name`` says of itself: its command, machine, seed, settings and figures."""
    return checkpoints.read_card(shipped(name))


def pretrained() -> list[str]:
    """The names of the trained models that come with the course."""
    return sorted(name for name in NAMES if (shipped(name) / checkpoints.MANIFEST).exists())


def ship(name: str, run: Path) -> Path:
    """Put the model that ``train(run)`` kept among those that come with the course; returns its folder there."""
    if name not in NAMES:
        raise CourseError(f"there is no recipe {name!r}: choose from {', '.join(NAMES)}")
    model, folder = Path(run) / "model", shipped(name)
    if (found := checkpoints.read_card(model).get("recipe")) != name:
        raise CourseError(f"{run} holds a model of the recipe {found}, not {name}: name another run")
    if name in LANGUAGE_NAMES:
        return ship_language(name, model, folder)
    checkpoint = checkpoints.load(model)
    return checkpoints.save(folder, checkpoint.weights, card=checkpoint.card)


def check_pretrained() -> list[FileCheck]:
    """Read every trained model that comes with the course; damage is told, not raised."""
    rows = []
    for name in pretrained():
        folder = shipped(name)
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            checkpoints.read_card(folder)
            rows.append(FileCheck(f"checkpoints/{folder.name}", size, True, "as its manifest says"))
        except checkpoints.CheckpointError as error:
            rows.append(FileCheck(f"checkpoints/{folder.name}", size, False, str(error)))
    return rows
