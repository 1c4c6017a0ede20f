"""The recipes ``tang`` and ``shakespeare``: GPT-2s with a tokenizer of their own, kept as Hugging Face folders."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoints, ranks
from ..datasets import TokenDataset, load_poems, load_shakespeare
from ..generate import generate
from ..gpt2 import GPT2, GPT2Config, lm_losses, lm_step
from ..metrics import bits_per_character
from ..runtime import CourseError, pick_device, pick_profile, rng_for
from ..state import TrainConfig, TrainState
from ..tokenizer import Tokenizer
from ..training import fit
from .recipe import Recipe, card, check_profile


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """How a language model is trained.

    The learning rate rises linearly to ``lr`` over ``warmup`` steps, then falls along a cosine to a tenth of it. The
    held-out texts are scored every ``evaluate_every`` steps, and the weights that scored best are kept.
    """

    vocab_size: int = 4096
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    steps: int
    batch_size: int
    lr: float
    warmup: int = 50
    weight_decay: float = 0.1
    evaluate_every: int = 250
    precision: str = "auto"


# A poem has at most 64 characters, and rare ones are two or three tokens.
TANG, SHAKESPEARE = {"block_size": 80}, {"block_size": 256}
QUICK = {"n_layer": 2, "n_head": 4, "n_embd": 96, "dropout": 0.0, "lr": 4e-3}
FULL = {"n_head": 6, "n_embd": 192, "precision": "bf16"}
LANGUAGE = {
    ("tang", "quick"): LanguageSettings(**TANG, **QUICK, vocab_size=6144, steps=700, batch_size=16),
    ("tang", "full"): LanguageSettings(
        **TANG, **FULL, n_layer=6, dropout=0.2, steps=5000, batch_size=64, lr=1.5e-3, evaluate_every=500
    ),
    ("shakespeare", "quick"): LanguageSettings(**SHAKESPEARE, **QUICK, steps=600, batch_size=4),
    ("shakespeare", "full"): LanguageSettings(
        **SHAKESPEARE, **FULL, n_layer=4, dropout=0.1, steps=1500, batch_size=16, lr=2e-3
    ),
}
LANGUAGE_NAMES = ("tang", "shakespeare")


class LanguageModel(NamedTuple):
    """A model and the tokenizer that it was trained with."""

    model: GPT2
    tokenizer: Tokenizer


def texts(name: str, part: str) -> list[str]:
    """What the recipe ``name`` learns ("train") or is scored on ("valid", "test"): poems, or works of Shakespeare."""
    if name == "tang":
        return [poem.text for poem in load_poems(part)]
    return [work.text for work in load_shakespeare(part)]


@lru_cache(maxsize=2)
def trained_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """Byte-pair encoding learnt from the training texts alone; no token of a poem spans two Chinese characters."""
    return Tokenizer.train(texts(name, "train"), vocab_size, isolate_han=name == "tang")


def token_rows(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text between two end tokens: the first stands for the beginning."""
    return [[tokenizer.end, *tokenizer.encode(text), tokenizer.end] for text in texts]


@torch.no_grad()
def held_out_bits(model: GPT2, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Bits per character of whole texts: what the model's probabilities of all tokens, the end too, cost together.

    A text longer than the context is read in windows that overlap by half, so that every token but the first few is
    predicted from at least half a context.
    """
    size, device, was_training = model.config.block_size, model.wte.weight.device, model.training
    model.eval()
    rows, skip = [], []
    for row in token_rows(tokenizer, texts):
        start = 0
        rows.append(row[: size + 1])
        skip.append(0)
        while start + size + 1 < len(row):
            start += size // 2
            rows.append(row[start : start + size + 1])
            skip.append(size - size // 2)  # these were predicted in the window before
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    data, nats = TokenDataset.rows([rows[i] for i in order], size), 0.0
    skips = torch.tensor([skip[i] for i in order])
    for part in torch.arange(len(rows)).split(64 if size <= 128 else 16):
        losses = lm_losses(model, data[part].to(device)).cpu()
        nats += losses[torch.arange(losses.shape[1]) >= skips[part, None]].double().sum().item()
    model.train(was_training)
    return bits_per_character(nats, sum(map(len, texts)))


@dataclass(frozen=True)
class LanguagePlan:
    """A run decided but not begun: ``fit(plan.step, plan.state, plan.data, plan.config)`` is the whole training."""

    step: Callable[[TrainState, Tensor, torch.Generator], dict[str, Tensor]]
    state: TrainState
    data: TokenDataset
    config: TrainConfig
    tokenizer: Tokenizer
    settings: LanguageSettings

    @property
    def model(self) -> GPT2:
        return self.state.nets["gpt2"]


def language_plan(
    name: str, profile: str | None = None, *, seed: int = 0, device: str | torch.device = "auto", **changes
) -> LanguagePlan:
    """The network, the step, the data and the settings of the recipe ``name``, "tang" or "shakespeare".

    ``changes`` replace fields of the recipe's ``LanguageSettings``, such as ``steps``.
    """
    if name not in LANGUAGE_NAMES:
        raise CourseError(f"there is no language model {name!r}: choose 'tang' or 'shakespeare'")
    s = replace(LANGUAGE[name, pick_profile(profile)], **changes)
    tokenizer = trained_tokenizer(name, s.vocab_size)
    rows = token_rows(tokenizer, texts(name, "train"))
    if name == "tang":
        data = TokenDataset.rows(rows, s.block_size)
    else:
        data = TokenDataset.stream(torch.tensor([token for row in rows for token in row[1:]]), s.block_size)
    sizes = {key: getattr(s, key) for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout")}
    model = GPT2(GPT2Config(**sizes), rng_for(seed, name, "weights"))
    # the norms' gains and all biases are not pulled to 0
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)

    def step(state: TrainState, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        for group in state.optimizers["gpt2"].param_groups:
            group["lr"] = s.lr * _schedule(state.step_count, s.warmup, s.steps)
        return lm_step(state, batch, rng)

    config = TrainConfig(
        steps=s.steps,
        batch_size=s.batch_size,
        seed=seed,
        device=str(pick_device(device)),
        precision=s.precision,
        clip_norm=1.0,
        checkpoint_every=s.evaluate_every,
        log_every=min(50, s.evaluate_every),
    )
    return LanguagePlan(step, TrainState({"gpt2": model}, {"gpt2": adam}), data, config, tokenizer, s)


def _schedule(step: int, warmup: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest: linear up, then a half cosine down to a tenth."""
    falling = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * falling))


class _Keeper:
    """Scores the model while it trains, and keeps the weights that scored best on the held-out texts."""

    def __init__(self, name: str, plan: LanguagePlan, folder: Path | None, facts: dict[str, Any]):
        self.plan, self.folder, self.facts = plan, folder, facts
        self.held_out = texts(name, "valid")
        self.seen = texts(name, "train")[:: 20 if name == "tang" else 40]  # as much text, to see what is memorised
        self.curve: list[dict[str, float]] = []
        self.weights: dict[str, Tensor] = {}

    def score(self, step: int) -> dict[str, float]:
        if not self.curve and self.folder is not None and (self.folder / checkpoints.MANIFEST).exists():
            self.curve = checkpoints.read_card(self.folder)["curve"]  # a run taken up again
        self.curve = [point for point in self.curve if point["step"] < step]
        bits = {
            part: held_out_bits(self.plan.model, self.plan.tokenizer, some)
            for part, some in (("train", self.seen), ("valid", self.held_out))
        }
        self.curve.append({"step": step, **bits})
        if bits["valid"] <= min(point["valid"] for point in self.curve):
            self.weights = {name: t.detach().clone() for name, t in self.plan.model.state_dict().items()}
        if self.folder is not None:
            self.save()
        return {f"{part} bits": value for part, value in bits.items()}

    def save(self) -> None:
        """The best model so far and the curve up to now, in place of what was there."""
        best = min(self.curve, key=lambda point: point["valid"])
        figures = {"held-out bits per character": best["valid"], "at step": best["step"]}
        with checkpoints.replaced(self.folder) as new:
            if self.weights:
                model = copy.deepcopy(self.plan.model)
                model.load_state_dict(self.weights)
                model.save_pretrained(new)
                self.plan.tokenizer.save(new)
            else:  # a run taken up again whose best model is the one that it had saved
                checkpoints.copy_files(self.folder, new)
            checkpoints.seal(new, {**self.facts, "figures": figures, "curve": self.curve})

    def best(self, device: torch.device) -> LanguageModel:
        model = copy.deepcopy(self.plan.model)
        if self.weights:
            model.load_state_dict(self.weights)
        return LanguageModel(model.to(device).eval(), self.plan.tokenizer)


def language_recipe(name: str, profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> LanguageModel:
        if out is not None:
            check_profile(out, profile)
        plan = language_plan(name, profile, seed=seed, device=device)
        folder = None if out is None else Path(out) / "model"
        facts = {**card(name, profile, seed, device, {}), "settings": asdict(plan.settings)}
        keeper = _Keeper(name, plan, folder, facts)

        def log(step: int, figures: dict[str, float]) -> None:
            if step % plan.settings.evaluate_every == 0 or step == plan.settings.steps:
                figures = {**figures, **keeper.score(step)}
            if on_log is not None:
                on_log(step, figures)

        fit(plan.step, plan.state, plan.data, plan.config, out=out, on_log=log)

        def kept() -> LanguageModel:
            return restore(folder) if folder is not None else keeper.best(device)

        if ranks.join()[1] == 1:
            return kept()
        plan.model.load_state_dict(
            ranks.on_first(lambda: {key: value.cpu() for key, value in kept().model.state_dict().items()})
        )
        return LanguageModel(plan.model.eval(), plan.tokenizer)

    restore = partial(restore_language, device=device)
    return Recipe(name=name, profile=profile, train=train, restore=restore, sample=sample_texts, device=device)


def restore_language(folder: Path, device: torch.device) -> LanguageModel:
    """The model and the tokenizer in a folder that was sealed, each file as it was saved, and made for one another."""
    checkpoints.read_card(folder)
    model, tokenizer = GPT2.from_pretrained(folder).to(device), Tokenizer.load(folder)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise CourseError(
            f"{folder}: the model knows {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: they "
            "do not belong together"
        )
    return LanguageModel(model, tokenizer)


def sample_texts(
    language: LanguageModel, n: int, rng: torch.Generator, *, max_new_tokens: int | None = None, **settings
) -> list[str]:
    """``n`` texts from their beginning to their end or to ``max_new_tokens``; ``settings`` are ``generate``'s."""
    model, tokenizer = language
    start = torch.full((n, 1), tokenizer.end, device=model.wte.weight.device)
    new = model.config.block_size - 1 if max_new_tokens is None else max_new_tokens
    ids = generate(model, start, max_new_tokens=new, stop=tokenizer.end, rng=rng, **settings)
    return [tokenizer.decode(token for token in row[1:] if token != tokenizer.end) for row in ids.tolist()]
