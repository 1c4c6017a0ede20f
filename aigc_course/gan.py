"""Generative adversarial networks (Goodfellow et al. 2014, arXiv:1406.2661), dense and convolutional (DCGAN).

A generator turns latents z ~ N(0, I) into examples, a discriminator gives each example a logit: the log-odds that it is
real, or, in a Wasserstein GAN, a critic's score. Images lie in [-1, 1].
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .linear import Linear
from .runtime import CourseError
from .state import TrainState

KINDS = ("non_saturating", "minimax", "wasserstein", "hinge")


class GANError(CourseError):
    """An image, a latent, a loss or a setting that cannot be used."""


# ---- network ----


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """Dense layers. ``shape`` is that of one example, such as (1, 28, 28) or (2,); the discriminator has the
    generator's ``hidden`` layers in reverse order. ``bounded`` ends the generator in tanh, as images ask for."""

    shape: Sequence[int] = (1, 28, 28)
    z_dim: int = 64
    hidden: Sequence[int] = (256, 512)
    bounded: bool = True
    spectral_norm: bool = False

    def __post_init__(self):
        for name in ("shape", "hidden"):
            object.__setattr__(self, name, _whole_numbers(f"GANConfig.{name}", getattr(self, name)))
        _whole_number("GANConfig.z_dim", self.z_dim)


@dataclass(frozen=True, kw_only=True)
class DCGANConfig:
    """Convolutions after Radford et al. (2016, arXiv:1511.06434) for ``channels`` x ``size`` x ``size`` images.

    ``width`` is the number of channels next to the image; it doubles wherever the resolution halves, down to 4 x 4.
    ``batch_norm`` and ``spectral_norm`` are the discriminator's, ``generator_batch_norm`` the generator's; ``leak`` is
    the slope of LeakyReLU below zero, ``init_std`` the standard deviation of the weights at the start.
    """

    size: int = 32
    channels: int = 1
    z_dim: int = 100
    width: int = 64
    batch_norm: bool = True
    generator_batch_norm: bool = True
    spectral_norm: bool = False
    leak: float = 0.2
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("channels", "z_dim", "width"):
            _whole_number(f"DCGANConfig.{name}", getattr(self, name))
        if type(self.size) is not int or self.size not in (8, 16, 32, 64, 128, 256):
            raise GANError(f"DCGANConfig.size is {self.size!r}: choose 8, 16, 32, 64, 128 or 256, which halve to 4")
        for name, least in {"init_std": "above 0", "leak": "from 0 on"}.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or value < 0 or (name == "init_std" and value == 0):
                raise GANError(f"DCGANConfig.{name} is {value!r}: it must be a number {least}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image."""
        return self.channels, self.size, self.size


class Generator(nn.Module):
    """From latents (n, z_dim) to examples (n, *config.shape). ``rng`` draws the weights."""

    def __init__(self, config: GANConfig | DCGANConfig, rng: torch.Generator):
        super().__init__()
        self.config = config
        with _drawing_from(rng):
            self.layers = dense_generator(config) if isinstance(config, GANConfig) else conv_generator(config)

    def forward(self, z: Float[Tensor, "n z"]) -> Float[Tensor, "n *shape"]:
        if z.ndim != 2 or z.shape[1] != self.config.z_dim:
            raise GANError(f"z has shape {tuple(z.shape)}, expected (n, {self.config.z_dim}): z_dim of the config")
        _check_batch_norm(self, len(z))
        return self.layers(z)


class Discriminator(nn.Module):
    """From examples (n, *config.shape) to one logit each. ``rng`` draws the weights."""

    def __init__(self, config: GANConfig | DCGANConfig, rng: torch.Generator):
        super().__init__()
        self.config = config
        with _drawing_from(rng):
            self.layers = dense_discriminator(config) if isinstance(config, GANConfig) else conv_discriminator(config)
            if config.spectral_norm:  # Miyato et al. 2018, arXiv:1802.05957: every layer's largest gain becomes 1
                for layer in self.layers:
                    if isinstance(layer, nn.Linear | nn.Conv2d):
                        spectral_norm(layer)

    def forward(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n"]:
        if tuple(x.shape[1:]) != tuple(self.config.shape):
            found, expected = tuple(x.shape), ", ".join(map(str, ("n", *self.config.shape)))
            remedy = "load images of this size and these channels, or set the config's to theirs"
            raise GANError(f"x has shape {found}, expected ({expected}): {remedy}")
        _check_batch_norm(self, len(x))
        return self.layers(x).flatten().float()


def dense_generator(config: GANConfig) -> nn.Sequential:
    """Linear layers with ReLU between them, as wide as ``config.hidden``, then the shape of an example."""
    layers: list[nn.Module] = []
    for width, following in zip((config.z_dim, *config.hidden), config.hidden, strict=False):
        layers += [Linear(width, following), nn.ReLU()]
    layers += [Linear(config.hidden[-1], math.prod(config.shape))]
    return nn.Sequential(*layers, *([nn.Tanh()] if config.bounded else []), nn.Unflatten(1, config.shape))


def dense_discriminator(config: GANConfig) -> nn.Sequential:
    """The generator's hidden layers in reverse order, with LeakyReLU, down to one logit."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (math.prod(config.shape), *reversed(config.hidden))
    for width, following in zip(widths, widths[1:], strict=False):
        layers += [Linear(width, following), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, Linear(widths[-1], 1))


def conv_generator(config: DCGANConfig) -> nn.Sequential:
    """Transposed convolutions from 1 x 1 to 4 x 4, then doubling: BatchNorm and ReLU between them, tanh at the end."""
    norm = config.generator_batch_norm
    width = config.width * config.size // 8
    layers = [nn.Unflatten(1, (config.z_dim, 1, 1)), nn.ConvTranspose2d(config.z_dim, width, 4, bias=not norm)]
    while width > config.width:  # 4 x 4, 8 x 8, … up to half the size
        layers += [
            *_norm_relu(width, norm),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=not norm),
        ]
        width //= 2
    layers += [*_norm_relu(width, norm), nn.ConvTranspose2d(width, config.channels, 4, stride=2, padding=1)]
    return _initialised(nn.Sequential(*layers, nn.Tanh()), config.init_std)


def _norm_relu(width: int, norm: bool) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]


def conv_discriminator(config: DCGANConfig) -> nn.Sequential:
    """Convolutions that halve the image to 4 x 4, then one to a logit; no BatchNorm at the image, none at the logit."""
    width, norm = config.width, config.batch_norm
    layers: list[nn.Module] = [nn.Conv2d(config.channels, width, 4, stride=2, padding=1), nn.LeakyReLU(config.leak)]
    while width < config.width * config.size // 8:
        layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=not norm)]
        layers += [*([nn.BatchNorm2d(2 * width)] if norm else []), nn.LeakyReLU(config.leak)]
        width *= 2
    return _initialised(nn.Sequential(*layers, nn.Conv2d(width, 1, 4)), config.init_std)  # 4 x 4 down to 1 x 1


def _initialised(layers: nn.Sequential, std: float) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, std)
    return layers


@contextmanager
def _drawing_from(rng: torch.Generator) -> Iterator[None]:
    """Let ``torch.nn``, which knows only the global generator, draw from ``rng``; the global one is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng.get_state())
        yield
        rng.set_state(torch.get_rng_state())


def _check_batch_norm(net: nn.Module, n: int) -> None:
    if n < 2 and net.training and any(isinstance(layer, nn.BatchNorm2d) for layer in net.layers):
        raise GANError(f"a batch of {n} has no variance to normalise by: give BatchNorm two examples, or call .eval()")


def _whole_numbers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    found = tuple(values) if isinstance(values, Sequence) else ()
    if not found or not all(type(value) is int and value > 0 for value in found):
        raise GANError(f"{name} is {values!r}: it takes whole numbers of at least 1")
    return found


def _whole_number(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise GANError(f"{name} is {value!r}: it takes a whole number of at least 1")


# ---- objective ----


def discriminator_loss(
    real_logits: Float[Tensor, "n"], fake_logits: Float[Tensor, "m"], *, kind: str = "non_saturating"
) -> Float[Tensor, ""]:
    """What the discriminator minimises, in nats for the first two kinds, from logits l.

    ``"non_saturating"`` and ``"minimax"``: -log D(x) - log(1 - D(G(z))) with D = sigmoid(l), by softplus
    (arXiv:1406.2661, eq. 1); ``"wasserstein"``: the difference of the mean scores (Arjovsky et al. 2017,
    arXiv:1701.07875, eq. 3); ``"hinge"``: scores pushed beyond +1 and -1 (arXiv:1802.05957, eq. 16).
    """
    if _kind(kind) == "wasserstein":
        return fake_logits.mean() - real_logits.mean()
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Float[Tensor, "n"], *, kind: str = "non_saturating") -> Float[Tensor, ""]:
    """What the generator minimises: log(1 - D) for ``"minimax"``, -log D for ``"non_saturating"``, else -score."""
    if _kind(kind) == "minimax":
        return -F.softplus(fake_logits).mean()
    if kind == "non_saturating":  # log(1 - D) has no slope while D is sure of itself (arXiv:1406.2661, section 3)
        return F.softplus(-fake_logits).mean()
    return -fake_logits.mean()


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise GANError(f"there is no loss kind {kind!r}: choose from {', '.join(KINDS)}")
    return kind


def gradient_norms(discriminator: nn.Module, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n"]:
    """The Euclidean norm of the gradient of the sum of all logits with respect to each example; differentiable itself.

    It is that of the example's own logit, unless BatchNorm in training mode ties the examples of a batch together.
    """
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        x = x.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def gradient_penalty(
    discriminator: nn.Module, real: Float[Tensor, "n *shape"], fake: Float[Tensor, "n *shape"], rng: torch.Generator
) -> Float[Tensor, ""]:
    """The mean of (norm of the gradient - 1)² at random points between real and fake examples
    (Gulrajani et al. 2017, arXiv:1704.00028, eq. 3)."""
    share = torch.rand(len(real), *[1] * (real.ndim - 1), generator=rng, device=real.device)
    between = share * real + (1 - share) * fake.detach()
    return (gradient_norms(discriminator, between) - 1).square().mean()


def r1_penalty(discriminator: nn.Module, real: Float[Tensor, "n *shape"]) -> Float[Tensor, ""]:
    """Half the mean squared norm of the gradient at real examples (Mescheder et al. 2018, arXiv:1801.04406, eq. 9)."""
    return 0.5 * gradient_norms(discriminator, real).square().mean()


# ---- step ----


def gan_step(
    state: TrainState,
    real: Float[Tensor, "n *shape"],
    rng: torch.Generator,
    *,
    kind: str = "non_saturating",
    gp: float = 0.0,
    r1: float = 0.0,
    r1_every: int = 1,
    critic_steps: int = 1,
) -> dict[str, Tensor]:
    """One update of "discriminator" and, every ``critic_steps`` steps, one of "generator".

    ``gp`` and ``r1`` weigh the penalties; with ``r1_every`` R1 is paid, that many times over, only every so many steps.
    """
    if r1_every < 1 or critic_steps < 1:
        raise GANError(f"r1_every is {r1_every} and critic_steps is {critic_steps}: both count steps, from 1 on")
    generator, discriminator = state.nets["generator"], state.nets["discriminator"]
    fake = generator(latents(generator, len(real), rng))
    # Two calls: BatchNorm sees a batch of real examples, then one of fakes, never a mixture.
    real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
    loss = discriminator_loss(real_logits, fake_logits, kind=kind)
    figures = {"d_loss": loss, "d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean()}
    if gp:
        loss = loss + gp * gradient_penalty(discriminator, real, fake, rng)
    if r1 and state.step_count % r1_every == 0:
        loss = loss + r1 * r1_every * r1_penalty(discriminator, real)
    state.minimize("discriminator", loss)
    if (state.step_count + 1) % critic_steps == 0:
        figures["g_loss"] = generator_loss(discriminator(fake), kind=kind)
        state.minimize("generator", figures["g_loss"])  # reaches through the discriminator, and leaves nothing in it
    return figures


def latents(generator: nn.Module, n: int, rng: torch.Generator) -> Float[Tensor, "n z"]:
    """``n`` latents z ~ N(0, I) for ``generator``, on the device of ``rng``."""
    return torch.randn(n, generator.config.z_dim, generator=rng, device=rng.device)


# ---- sample ----


@torch.no_grad()
def sample(generator: Generator, n: int, rng: torch.Generator) -> Float[Tensor, "n *shape"]:
    """``n`` examples in evaluation mode: BatchNorm's statistics, and the mode, stay as they were."""
    return generate(generator, latents(generator, n, rng))


@torch.no_grad()
def generate(generator: Generator, z: Float[Tensor, "n z"]) -> Float[Tensor, "n *shape"]:
    """The examples of given latents, in float32; leaves no trace, as ``sample``."""
    mode = generator.training
    generator.eval()
    try:
        return torch.cat([generator(part) for part in z.split(250)]).float()
    finally:
        generator.train(mode)


@torch.no_grad()
def recalibrate(generator: Generator, rng: torch.Generator, *, batches: int = 20, size: int = 250) -> None:
    """Set BatchNorm's running statistics to the means over ``batches`` of ``size`` fresh latents.

    An average of weights needs this: the statistics that it finds are those of other weights (Izmailov et al. 2018,
    arXiv:1803.05407, section 3.2).
    """
    layers = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not layers:
        return
    mode, momenta = generator.training, [layer.momentum for layer in layers]
    generator.train()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # every batch counts alike
        for _ in range(batches):
            generator(latents(generator, size, rng))
    finally:
        generator.train(mode)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
