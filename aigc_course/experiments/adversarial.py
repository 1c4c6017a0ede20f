"""Side experiments with GANs: the scale of the Fréchet distance, the guidelines of DCGAN, three sick runs."""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .. import recipes
from ..datasets import load_mnist, toy_2d, toy_mixture
from ..gan import (
    Discriminator,
    GANConfig,
    Generator,
    discriminator_loss,
    gan_step,
    generate,
    generator_loss,
    latents,
    r1_penalty,
    sample,
)
from ..metrics import frechet_distance, kernel_distance, mode_coverage, precision_recall
from ..runtime import rng_for
from ..state import TrainConfig, TrainState
from ..training import fit
from .variational import Row


def pack_images(images: Float[Tensor, "n c h w"]) -> dict[str, Any]:
    """Images in [-1, 1] as something that a JSON file can hold, to 8 bits a pixel."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().contiguous()
    return {"shape": list(pixels.shape), "pixels": base64.b64encode(zlib.compress(pixels.numpy(), 9)).decode("ascii")}


def unpack_images(packed: dict[str, Any]) -> Float[Tensor, "n c h w"]:
    """The inverse of ``pack_images``, to 8 bits a pixel."""
    pixels = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed["pixels"]))), dtype=torch.uint8)
    return pixels.reshape(packed["shape"]).float() / 127.5 - 1


# ---- twenty-five modes ----


def gan_grid(
    device: torch.device, *, seeds: int = 3, steps: int = 10_000, moments: int = 10, rate: float = 4e-3
) -> Iterator[Row]:
    """The dense GAN of lesson 03 on the grid of 25 modes: modes covered and share of high-quality samples on the way,
    and 1,000 samples at the end."""
    centres = toy_mixture("grid")[1]
    config = GANConfig(shape=(2,), z_dim=2, hidden=(128, 128), bounded=False)
    for seed in range(seeds):
        nets = {
            "generator": Generator(config, rng_for(seed, "grid", "G")),
            "discriminator": Discriminator(config, rng_for(seed, "grid", "D")),
        }
        adams = {k: torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.9)) for k, net in nets.items()}

        def step(state: TrainState, real: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
            for adam in state.optimizers.values():
                adam.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - state.step_count / steps))
            return gan_step(state, real, rng, r1=0.1, r1_every=4)

        state, data = TrainState(nets, adams), toy_2d("grid", 50_000, rng_for(seed, "grid"))
        row: Row = {"seed": seed, "step": [], "modes": [], "high quality": []}
        for part in range(1, moments + 1):
            config_so_far = TrainConfig(
                steps=steps * part // moments, batch_size=256, seed=seed, device=str(device), precision="fp32"
            )
            fit(step, state, data, config_so_far)
            drawn = sample(nets["generator"], 5000, rng_for(seed, "grid", "judge", device=device)).cpu()
            covered = mode_coverage(drawn, centres, 0.05)
            figures = {"step": state.step_count, "modes": covered.modes, "high quality": covered.high_quality}
            for name, value in figures.items():
                row[name].append(value)
        yield {**row, "samples": [[round(v, 3) for v in point] for point in drawn[:1000].tolist()]}


# ---- the scale of the figures ----


def digit_scale(device: torch.device) -> Iterator[Row]:
    """What digits that nobody generated score against the test digits, and how it hangs on their number.

    Six slices of 10,000 training digits give the real-against-real level; noise and blurred digits are for comparison.
    """
    train = load_mnist(size=32, device=device).images
    real = recipes.mnist_features(load_mnist(train=False, size=32, device=device).images)
    features = recipes.mnist_features(train)

    def row(what: str, rows: Tensor, against: Tensor = real) -> Row:
        fidelity = precision_recall(against, rows)
        distances = {"frechet": frechet_distance(against, rows), "kernel": kernel_distance(against, rows)}
        return {"what": what, "n": len(rows), **distances, "precision": fidelity.precision, "recall": fidelity.recall}

    for part in features.split(10_000):
        yield row("training digits", part)
    rng = rng_for(0, "digit_scale", device=device)
    noise = 2 * torch.rand(10_000, 1, 32, 32, generator=rng, device=device) - 1
    yield row("noise", recipes.mnist_features(noise))
    blurred = F.avg_pool2d(F.pad(train[:10_000], (2, 2, 2, 2), value=-1.0), 5, stride=1)
    yield row("blurred digits", recipes.mnist_features(blurred))
    for n in (100, 200, 500, 1000, 2000, 5000, 10_000):
        for _ in range(5):
            chosen = torch.randperm(len(features), generator=rng, device=device)[:n]
            yield row("a sample of the training digits", features[chosen])


# ---- one training, watched ----


def dcgan_growth(device: torch.device, *, moments: int = 12, first: int = 10) -> Iterator[Row]:
    """The quick recipe ``dcgan``, stopped at moments from step ``first`` to the last, evenly spaced in the logarithm:
    its losses since the moment before, forty digits from fixed latents, and the figures of 10,000 samples."""
    plan = recipes.gan_plan("dcgan", "quick", device=device)
    fixed = latents(plan.state.nets["generator"], 40, rng_for(0, "dcgan_growth", device=device))
    growth = (plan.config.steps / first) ** (1 / (moments - 1))
    for moment in range(moments):
        before = plan.state.step_count
        until = round(first * growth**moment)
        fit(plan.step, plan.state, plan.images, replace(plan.config, steps=until))
        losses = {k: sum(v[before:]) / (until - before) for k, v in plan.state.history.items()}
        generator = plan.generator()
        figures = _figures(generator, plan.config.seed)
        yield {"step": until, **losses, **figures, "samples": pack_images(generate(generator, fixed))}


# ---- the guidelines of DCGAN, one by one ----


def mixed_step(
    state: TrainState, real: Tensor, rng: torch.Generator, *, r1: float = 0.0, r1_every: int = 1
) -> dict[str, Tensor]:
    """``gan_step``, but for one thing: the discriminator sees real and fake examples in one batch."""
    generator, discriminator = state.nets["generator"], state.nets["discriminator"]
    fake = generator(latents(generator, len(real), rng))
    logits = discriminator(torch.cat([real, fake.detach()]))
    real_logits, fake_logits = logits[: len(real)], logits[len(real) :]
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = r1 * r1_every * r1_penalty(discriminator, real) if r1 and state.step_count % r1_every == 0 else 0.0
    state.minimize("discriminator", d_loss + penalty)
    g_loss = generator_loss(discriminator(fake))
    state.minimize("generator", g_loss)
    answers = {"d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean()}
    return {"d_loss": d_loss, "g_loss": g_loss, **answers}


CONFIG = recipes.GANS["dcgan", "quick"].config
VARIANTS: dict[str, dict[str, Any]] = {  # what each of them changes in the quick recipe
    "the recipe": {},
    "learning rate 2e-4, as published": {"lr": 2e-4},
    "beta1 0.9, Adam's default": {"beta1": 0.9},
    "weights ten times larger": {"config": replace(CONFIG, init_std=0.2)},
    "no BatchNorm in G": {"config": replace(CONFIG, generator_batch_norm=False)},
    "no BatchNorm in D": {"config": replace(CONFIG, batch_norm=False)},
    "no BatchNorm": {"config": replace(CONFIG, batch_norm=False, generator_batch_norm=False)},
    "one mixed batch in D": {"update": mixed_step},
    "ReLU in D": {"config": replace(CONFIG, leak=0.0)},
    "no R1": {"r1": 0.0},
    "no average of weights": {"ema": 0.0},
}


def dcgan_ablations(device: torch.device, *, seeds: int = 3, steps: int = 700, **changes) -> Iterator[Row]:
    """The quick recipe ``dcgan``, cut to ``steps``, with one guideline at a time broken, ``seeds`` runs each."""
    for name, variant in VARIANTS.items():
        for seed in range(seeds):
            plan = recipes.gan_plan("dcgan", "quick", seed=seed, device=device, steps=steps, **(variant | changes))
            yield {"variant": name, "seed": seed, **_run(plan)}


# ---- three sick runs ----


def attached_step(
    state: TrainState, real: Tensor, rng: torch.Generator, *, r1: float = 0.0, r1_every: int = 1
) -> dict[str, Tensor]:
    """A GAN's step without ``detach``: an optimizer "discriminator" that holds both networks moves both."""
    generator, discriminator = state.nets["generator"], state.nets["discriminator"]
    real_logits = discriminator(real)
    fake_logits = discriminator(generator(latents(generator, len(real), rng)))
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = r1 * r1_every * r1_penalty(discriminator, real) if r1 and state.step_count % r1_every == 0 else 0.0
    state.minimize("discriminator", d_loss + penalty)
    g_loss = generator_loss(discriminator(generator(latents(generator, len(real), rng))))
    state.minimize("generator", g_loss)
    answers = {"d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean()}
    return {"d_loss": d_loss, "g_loss": g_loss, **answers}


def dcgan_sick(device: torch.device, *, steps: int = 700, **changes) -> Iterator[Row]:
    """The quick recipe ``dcgan``, cut to ``steps``: healthy, and broken in three ways. A: digits in [0, 1]; B: the
    discriminator's optimizer moves the generator too; C: a generator that learns much faster than its discriminator."""
    digits = load_mnist(size=32).images
    patients: dict[str, dict[str, Any]] = {
        "healthy": {},
        "A": {"images": (digits + 1) / 2},
        "B": {"update": attached_step},
        "C": {"lr": 4e-3, "lr_ratio": 1 / 40},
    }
    for name, patient in patients.items():
        plan = recipes.gan_plan("dcgan", "quick", device=device, steps=steps, **(patient | changes))
        if name == "B":
            both = [parameter for net in plan.state.nets.values() for parameter in net.parameters()]
            plan.state.optimizers["discriminator"] = torch.optim.Adam(both, lr=1e-3, betas=(0.5, 0.999))
        row = _run(plan)
        samples = sample(plan.generator(), 20, rng_for(0, "sick", device=device))
        yield {"patient": name, **row, "samples": pack_images(samples)}


def _run(plan: recipes.Plan) -> Row:
    """Train as planned; the curves, in means of 20 steps, and the figures of 10,000 samples."""
    fit(plan.step, plan.state, plan.images, plan.config)
    curves = {k: torch.tensor(v).unfold(0, 20, 20).mean(1).tolist() for k, v in plan.state.history.items()}
    return {**curves, **_figures(plan.generator(), plan.config.seed)}


def _figures(generator: Generator, seed: int) -> Row:
    device = next(generator.parameters()).device
    images = sample(generator, 10_000, rng_for(seed, "judge", device=device))
    figures = recipes.digit_figures(recipes.mnist_features(images))
    return {"frechet": figures.frechet, "sure": figures.sure, "precision": figures.precision,
            "recall": figures.recall, "classes": figures.classes.tolist()}  # fmt: skip
