"""What nothing can be generated with: prompts, masks and settings, refused before the model runs."""

import torch
from torch import Tensor

from ..gpt2 import GPT2
from ..runtime import CourseError


class GenerateError(CourseError):
    """A prompt or a setting that nothing can be generated with."""


class GenerateWarning(UserWarning):
    """The model does not see the whole prompt."""


def _whole(least: int, most: int | None = None) -> tuple:
    def allows(x):
        return isinstance(x, int) and not isinstance(x, bool) and least <= x and (most is None or x <= most)

    return allows, f"a whole number from {least} {'on' if most is None else f'to {most}'}"


def _number(least: int | float, most: int | float) -> tuple:
    def allows(x):
        return isinstance(x, int | float) and not isinstance(x, bool) and least <= x <= most

    return allows, f"a number from {least:g} to {most:g}"


def _or(value: object, rule: tuple) -> tuple:
    return (lambda x: x == value or rule[0](x)), f"{value!r} or {rule[1]}"


SETTINGS = {
    "max_new_tokens": _whole(1),
    "temperature": _or(0, _number(1e-6, 1e6)),
    "top_k": _or(None, _whole(1)),
    "top_p": _or(None, _number(1e-6, 1)),
    "min_p": _or(None, _number(0, 1)),
    "repetition_penalty": _number(1e-6, 1e6),
    "no_repeat_ngram_size": _whole(0),
    "num_beams": _whole(1, 1000),  # memory grows with them
    "length_penalty": _number(-10, 10),
    "early_stopping": _or("never", (lambda x: isinstance(x, bool), "True or False")),
}


SEARCH = {"num_beams", "length_penalty", "early_stopping"}


def check(**settings: object) -> None:
    for name, value in settings.items():
        if name not in SETTINGS:
            raise GenerateError(f"there is no setting {name!r}: choose from {', '.join(SETTINGS)}")
        allows, expected = SETTINGS[name]
        if not allows(value):
            raise GenerateError(f"{name} is {value!r}: it must be {expected}")


def check_choice(**choice: object) -> None:
    """Check the settings of one step, those of ``next_token``."""
    if search := SEARCH & choice.keys():
        raise GenerateError(
            f"{min(search)} is a setting of beam_search, which draws nothing: call that, or leave it out"
        )
    check(**choice)


def check_rng(rng: object) -> None:
    if not isinstance(rng, torch.Generator):
        remedy = "pass one, such as aigc_course.runtime.rng_for(0, 'text'), or temperature=0, which draws nothing"
        raise GenerateError(f"rng is {rng!r}, and tokens are drawn with a torch.Generator: {remedy}")


def check_prompt(model: GPT2, ids: object, mask: object) -> Tensor:
    """Which tokens are real, (b, t), as booleans."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
        found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise GenerateError(f"ids are {found}, expected int64 of shape (b, t): torch.tensor([tokenizer.encode(text)])")
    if ids.numel() == 0:
        raise GenerateError(f"the prompt is empty, of shape {tuple(ids.shape)}: start with the tokenizer's end token")
    device, last = model.wte.weight.device, model.config.vocab_size - 1
    if ids.device != device:
        raise GenerateError(f"ids are on {ids.device}, the model on {device}: give ids.to({str(device)!r})")
    if ids.min() < 0 or ids.max() > last:
        found = f"{ids.min().item()} to {ids.max().item()}"
        raise GenerateError(f"ids go from {found}, the vocabulary from 0 to {last}: encode with the model's tokenizer")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise GenerateError(f"attention_mask must be as ids, of shape {tuple(ids.shape)}: 1 for a token, 0 for padding")
    real = mask.to(device) == 1
    if not real.any(1).all():
        raise GenerateError(
            f"row {int(real.any(1).int().argmin())} is all padding: start with the tokenizer's end token"
        )
    right = (real[:, :-1] & ~real[:, 1:]).any(1)
    if right.any():
        raise GenerateError(f"row {int(right.int().argmax())} has padding after a token: it belongs on the left")
    return real
