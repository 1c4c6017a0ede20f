"""What a recipe is, and the card of the model that it makes."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoints
from ..runtime import CourseError, course_dir


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named model with everything decided: how it is trained on its data, loaded again, and sampled.

    ``train(out=None, on_log=None)`` returns the model, and keeps it in the folder ``out`` if there is one;
    ``load(out)`` reads it back; ``restore(folder)`` reads a folder such as ``out/model``;
    ``sample(model, n, rng)`` gives images (n, 1, height, width) in [-1, 1], or a list of n texts.
    """

    name: str
    profile: str
    train: Callable[..., Any]
    restore: Callable[[Path], Any]
    sample: Callable[[Any, int, torch.Generator], Tensor | list[str]]
    device: torch.device

    def load(self, out: Path) -> Any:
        """The model that ``train(out)`` kept; raises ``CourseError`` if another profile left it there."""
        check_profile(out, self.profile)
        return self.restore(Path(out) / "model")


def check_profile(out: Path, profile: str) -> None:
    """Raise ``CourseError`` if the folder ``out`` holds a model of another profile."""
    folder = Path(out) / "model"
    found = checkpoints.read_card(folder).get("profile") if (folder / checkpoints.MANIFEST).exists() else profile
    if found != profile:
        raise CourseError(
            f"{out} holds a model of the profile {found}, not {profile}: add --profile {found}, or name another folder"
        )


def machine(device: torch.device) -> str:
    """The kind of machine, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"


def card(name: str, profile: str, seed: int, device: torch.device, figures: Mapping[str, float]) -> dict[str, Any]:
    """What a saved model says of itself."""
    return {
        "recipe": name,
        "profile": profile,
        "seed": seed,
        "command": f"aigc train {name} --profile {profile} --seed {seed}",
        "machine": machine(device),
        "figures": dict(figures),
    }


def shipped(name: str) -> Path:
    """The folder of the trained model ``name`` that comes with the course."""
    return (
        course_dir() / "data" / "checkpoints" / {"tang": "gpt2-tang", "shakespeare": "gpt2-shakespeare"}.get(name, name)
    )
