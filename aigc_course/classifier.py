"""The small classifier of digits behind the image metrics; not the Inception network of published FIDs."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear
from .runtime import CourseError
from .state import TrainState

SIZE = 32  # images are (n, 1, 32, 32)


class ClassifierError(CourseError):
    """Images that the classifier cannot take."""


# ---- network ----


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """``width`` channels in the first of three stages, and ``features`` numbers before the last layer."""

    width: int = 16
    features: int = 64
    n_classes: int = 10
    dropout: float = 0.3


class Classifier(nn.Module):
    """Three stages of two convolutions with BatchNorm and ReLU, then the features, then one logit per class."""

    def __init__(self, config: ClassifierConfig, rng: torch.Generator):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch.nn's own weights, replaced below, are drawn globally
            stages, channels = [], 1
            for width in (config.width, 2 * config.width, 4 * config.width):
                stages += [*_conv(channels, width), *_conv(width, width), nn.MaxPool2d(2)]
                channels = width
            self.trunk = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(config.dropout))
            self.hidden = Linear(channels * (SIZE // 8) ** 2, config.features)
            self.head = Linear(config.features, config.n_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def features(self, x: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n d"]:
        """What the last layer sees of each image, in [-1, 1]."""
        if tuple(x.shape[1:]) != (1, SIZE, SIZE):
            raise ClassifierError(
                f"x has shape {tuple(x.shape)}, expected (n, 1, {SIZE}, {SIZE}): recipes.mnist_features pads 28 to 32"
            )
        return F.relu(self.hidden(self.trunk(x))).float()

    def forward(self, x: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n k"]:
        """The logits of the classes."""
        return self.head(self.features(x)).float()


def _conv(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


# ---- objective, step ----


@runtime_checkable
class Labelled(Protocol):
    """Images with a class each, such as ``datasets.Images``."""

    images: Float[Tensor, "n 1 32 32"]
    labels: Int[Tensor, "n"]


def classifier_step(state: TrainState, batch: Labelled, rng: torch.Generator) -> dict[str, Tensor]:
    """One update of "classifier" on the cross-entropy, in nats, of images shifted by up to two pixels."""
    shift = torch.randint(-2, 3, (2,), generator=rng, device=rng.device).tolist()  # the margin of 2 is black
    logits = state.nets["classifier"](batch.images.roll(shift, dims=(2, 3)))
    loss = F.cross_entropy(logits, batch.labels)
    state.minimize("classifier", loss)
    return {"loss": loss, "accuracy": (logits.argmax(1) == batch.labels).float().mean()}
