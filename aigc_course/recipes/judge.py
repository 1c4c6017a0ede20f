"""The recipe ``classifier``, its features, and the figures by which generated digits are judged with them."""

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .. import checkpoints, ranks
from ..classifier import Classifier, ClassifierConfig, classifier_step
from ..datasets import Images, load_mnist
from ..metrics import class_coverage, frechet_distance, precision_recall
from ..runtime import CourseError, rng_for
from ..state import TrainConfig, TrainState
from ..training import fit
from .recipe import Recipe, card, check_profile, shipped

# Batches of 128, Adam at 2e-3 for the first half of the steps, then falling linearly to 0.
CLASSIFIERS = {"quick": {"epochs": 1}, "full": {"epochs": 6}}
SURE = 0.9  # the probability from which the classifier counts as sure of a class


def classifier(profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> Classifier:
        if out is not None:
            check_profile(out, profile)
        digits = load_mnist(size=32)
        model = Classifier(ClassifierConfig(), rng_for(seed, "classifier", "weights"))
        model.to(memory_format=torch.channels_last)
        adam = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
        steps = CLASSIFIERS[profile]["epochs"] * (len(digits) // 128)

        def step(state: TrainState, batch: Images, rng: torch.Generator) -> dict[str, Tensor]:
            adam.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - state.step_count / steps))
            return classifier_step(state, batch, rng)

        config = TrainConfig(steps=steps, batch_size=128, seed=seed, device=str(device), precision="fp32")
        fit(step, TrainState({"classifier": model}, {"classifier": adam}), digits, config, out=out, on_log=on_log)
        model.eval()

        def keep() -> None:
            test = load_mnist(train=False, size=32, device=device)
            with torch.no_grad():
                named = torch.cat([model(part).argmax(1) for part in test.images.split(500)])
            figures = {"accuracy on the test digits": (named == test.labels).float().mean().item()}
            facts = {**card("classifier", profile, seed, device, figures), "config": asdict(model.config)}
            checkpoints.save(Path(out) / "model", model.state_dict(), card=facts)

        if out is not None:
            ranks.on_first(keep)
        return model

    def restore(folder: Path) -> Classifier:
        checkpoint = checkpoints.load(folder, device=device)
        model = Classifier(ClassifierConfig(**checkpoint.card["config"]), rng_for(0))
        model.load_state_dict(checkpoint.weights)
        return model.to(device, memory_format=torch.channels_last).eval()

    def sample(model: Classifier, n: int, rng: torch.Generator) -> Tensor:
        raise CourseError("the classifier tells digits apart, it draws none: sample another recipe, such as dcgan")

    return Recipe(name="classifier", profile=profile, train=train, restore=restore, sample=sample, device=device)


@lru_cache(maxsize=2)
def _judge(device: torch.device) -> Classifier:
    """The classifier that comes with the course; it is read once."""
    return classifier("full", 0, device).restore(shipped("classifier"))


@torch.no_grad()
def mnist_features(images: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n d"]:
    """The features of digits in [-1, 1] that the course's classifier computes before its last layer.

    Images of 28 pixels are padded with black to 32. These are not the features of published FIDs (Inception's): a
    distance between them compares digits with digits, within this course.
    """
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2:] not in ((28, 28), (32, 32)):
        raise CourseError(f"images have shape {tuple(images.shape)}, expected (n, 1, 28, 28) or (n, 1, 32, 32)")
    if images.shape[-1] == 28:
        images = F.pad(images, (2, 2, 2, 2), value=-1.0)
    judge = _judge(images.device)
    return torch.cat([judge.features(part) for part in images.float().split(250)])


class DigitFigures(NamedTuple):
    """Figures of generated digits: the Fréchet distance of their features to those of the real ones, precision and
    recall, the share that the classifier is over 0.9 sure of, and the share of each class."""

    frechet: float
    precision: float
    recall: float
    sure: float
    classes: Float[Tensor, "10"]


def digit_figures(features: Float[Tensor, "n d"], real: Float[Tensor, "m d"] | None = None) -> DigitFigures:
    """Judge digits by their ``mnist_features`` against those of ``real`` ones (``None``: all 10,000 test digits).

    Figures from different numbers of images may not be compared: fewer score a larger Fréchet distance.
    """
    if real is None:
        real = mnist_features(load_mnist(train=False, size=32, device=features.device).images)
    with torch.no_grad():
        most, label = _judge(features.device).head(features).softmax(1).max(1)
    fidelity = precision_recall(real, features)
    return DigitFigures(
        frechet=frechet_distance(real, features),
        precision=fidelity.precision,
        recall=fidelity.recall,
        sure=(most > SURE).float().mean().item(),
        classes=class_coverage(label, 10),
    )
