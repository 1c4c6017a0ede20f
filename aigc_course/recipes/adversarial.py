"""The recipes ``gan`` and ``dcgan``: adversarial networks of digits, with dense and with convolutional layers."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checkpoints, ranks
from ..datasets import load_mnist
from ..gan import DCGANConfig, Discriminator, GANConfig, Generator, gan_step, recalibrate, sample
from ..runtime import CourseError, pick_device, pick_profile, rng_for
from ..state import TrainConfig, TrainState
from ..training import fit
from .judge import digit_figures, mnist_features
from .recipe import Recipe, card, check_profile


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a GAN is trained.

    ``lr`` is the generator's learning rate, and ``lr_ratio`` times that the discriminator's; both are constant for the
    share ``flat`` of the steps, then fall linearly to 0. ``beta1`` is Adam's. ``r1`` weighs the R1 penalty, paid every
    8 steps. ``ema`` is the decay of the generator's average, which is what the recipe gives.
    """

    config: GANConfig | DCGANConfig
    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    lr_ratio: float = 1.0
    beta1: float = 0.5
    flat: float = 0.5
    r1: float = 0.0
    ema: float = 0.99
    precision: str = "auto"


GANS = {
    ("gan", "quick"): Settings(config=GANConfig(hidden=(128, 256)), steps=3000, lr=2e-3, r1=0.3),
    ("gan", "full"): Settings(config=GANConfig(hidden=(128, 256)), steps=30_000, lr=2e-3, r1=0.3, ema=0.999),
    ("dcgan", "quick"): Settings(config=DCGANConfig(width=32, z_dim=64), steps=1300, batch_size=32, flat=0.3, r1=1.0),
    ("dcgan", "full"): Settings(
        config=DCGANConfig(width=48, z_dim=64), steps=14_000, lr=6e-4, flat=0.3, r1=1.0, ema=0.999, precision="bf16"
    ),
}
R1_EVERY = 8


@dataclass(frozen=True)
class Plan:
    """A run decided but not begun: ``fit(plan.step, plan.state, plan.images, plan.config)`` is the whole training."""

    step: Callable[[TrainState, Tensor, torch.Generator], dict[str, Tensor]]
    state: TrainState
    images: Tensor
    config: TrainConfig

    def generator(self) -> Generator:
        """The average of the generator's weights over the steps so far, with BatchNorm's statistics of its own."""
        average = copy.deepcopy(self.state.ema["generator"].module)
        recalibrate(average, rng_for(self.config.seed, "recalibrate", device=self.state.device))
        return average.eval()


def gan_plan(
    name: str,
    profile: str | None = None,
    *,
    images: Float[Tensor, "n c h w"] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    update: Callable[..., dict[str, Tensor]] = gan_step,
    **changes,
) -> Plan:
    """The networks, the step, the images and the settings of the recipe ``name``, "gan" or "dcgan".

    ``images`` in [-1, 1] (``None``: MNIST) replace the digits, and set the size and channels of a "dcgan"; ``update``
    replaces ``gan_step``, and ``changes`` fields of the recipe's ``Settings``, such as ``steps``.
    """
    if name not in ("gan", "dcgan"):
        raise CourseError(f"there is no GAN recipe {name!r}: choose 'gan' or 'dcgan'")
    settings = replace(GANS[name, pick_profile(profile)], **changes)
    config, steps = settings.config, settings.steps
    if images is None:
        images = load_mnist(size=config.shape[-1]).images
    elif isinstance(config, DCGANConfig):
        config = replace(config, channels=images.shape[1], size=images.shape[-1])
    nets = {
        "generator": Generator(config, rng_for(seed, name, "generator")),
        "discriminator": Discriminator(config, rng_for(seed, name, "discriminator")),
    }
    for net in nets.values():
        net.to(memory_format=torch.channels_last)  # the order of memory in which convolutions run faster
    rates = {"generator": settings.lr, "discriminator": settings.lr * settings.lr_ratio}
    adams = {
        k: torch.optim.Adam(nets[k].parameters(), lr=lr, betas=(settings.beta1, 0.999), fused=True)
        for k, lr in rates.items()
    }

    def step(state: TrainState, real: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        left = min(1.0, (1 - state.step_count / steps) / max(1 - settings.flat, 1e-9))
        for name, adam in state.optimizers.items():
            adam.param_groups[0]["lr"] = rates[name] * left
        return update(state, real, rng, r1=settings.r1, r1_every=R1_EVERY)

    train_config = TrainConfig(
        steps=steps,
        batch_size=settings.batch_size,
        seed=seed,
        device=str(pick_device(device)),
        precision=settings.precision,
        ema={"generator": settings.ema},
    )
    return Plan(step, TrainState(nets, adams), images, train_config)


def gan_recipe(name: str, profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> Generator:
        if out is not None:
            check_profile(out, profile)
        plan = gan_plan(name, profile, seed=seed, device=device)
        fit(plan.step, plan.state, plan.images, plan.config, out=out, on_log=on_log)
        model = plan.generator()

        def keep() -> None:
            facts = card(name, profile, seed, device, held_out(model, seed))
            facts["config"] = asdict(model.config)
            checkpoints.save(Path(out) / "model", model.state_dict(), card=facts)

        if out is not None:
            ranks.on_first(keep)
        return model

    def restore(folder: Path) -> Generator:
        checkpoint = checkpoints.load(folder, device=device)
        kind = GANConfig if name == "gan" else DCGANConfig
        model = Generator(kind(**checkpoint.card["config"]), rng_for(0))
        model.load_state_dict(checkpoint.weights)
        return model.to(device, memory_format=torch.channels_last).eval()

    return Recipe(name=name, profile=profile, train=train, restore=restore, sample=sample, device=device)


def held_out(model: Generator, seed: int) -> dict[str, float]:
    """The figures of 10,000 samples against the 10,000 test digits."""
    device = next(model.parameters()).device
    figures = digit_figures(mnist_features(sample(model, 10_000, rng_for(seed, "judge", device=device))))
    return {
        "Frechet distance to the test digits, on the course's features": figures.frechet,
        "precision": figures.precision,
        "recall": figures.recall,
        "share that the classifier is over 0.9 sure of": figures.sure,
        "smallest share of a class": figures.classes.min().item(),
        "largest share of a class": figures.classes.max().item(),
    }
