"""The rows of images: the VAE, the two GANs, and MNIST itself, each beside the usual script."""

import atexit
import copy
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.datasets import MNIST

from aigc_course.datasets import MNIST_FILES, Images, binarize, load_mnist, verified_bytes
from aigc_course.gan import DCGANConfig, Discriminator, GANConfig, Generator, gan_step
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import epoch_order, fit
from aigc_course.vae import VAE, VAEConfig, elbo, vae_step

from .clock import Pair, Row, both
from .peers import dcgan, digits, gan, vae

SEED = 7
VAE_BATCH, BATCH = 128, 64
GAN_STEPS, DCGAN_STEPS = 150, 20  # of one sample
KINDS = {"generator": Generator, "discriminator": Discriminator}
Nets = dict[str, nn.Module]
Gaps = dict[str, tuple[Tensor | float, Tensor | float]]  # what each side computed, ours first


@cache
def unpacked() -> str:
    """A folder with MNIST as torchvision keeps it once downloaded, until this process ends."""
    root = tempfile.mkdtemp(prefix="benchmarks-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (name for names in MNIST_FILES.values() for name in names):
        (raw / Path(name).stem).write_bytes(verified_bytes(name))
    return root


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give ``theirs`` the weights of ``ours``: the same layers in the same order, under other names."""
    weights, places = list(ours.state_dict().values()), theirs.state_dict()
    theirs.load_state_dict(dict(zip(places, weights, strict=True)))


def copy_vae(ours: VAE, theirs: vae.VAE) -> None:
    """The same for the VAE, whose peer has the mean and the log-variance in two layers."""
    weights = ours.state_dict()
    halves = {key: weights.pop(f"encoder.2.{key}").chunk(2) for key in ("weight", "bias")}
    for i, name in enumerate(("to_mu", "to_logvar")):
        getattr(theirs, name).load_state_dict({key: halves[key][i] for key in halves})
    for number, name in {"encoder.0": "to_hidden", "decoder.0": "from_z", "decoder.2": "to_pixels"}.items():
        getattr(theirs, name).load_state_dict({key: weights[f"{number}.{key}"] for key in ("weight", "bias")})


def products(net: nn.Sequential, x: Tensor) -> list[int]:
    """The multiplications of each layer of ``net`` on the batch ``x``, biases and activations apart."""
    found: list[int] = []
    for layer in net:
        before, x = x, layer(x)
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            outer = before if isinstance(layer, nn.ConvTranspose2d) else x
            found.append(outer.numel() * layer.weight[0].numel())
    return found


# ---- the VAE ----


def vae_gaps(net: VAE, peer: vae.VAE, x: Tensor, seed: int = SEED) -> Gaps:
    """The loss summed over ``x``, and its gradient in the first layer, from equal noise: both draw it from ``seed``."""
    loss = -elbo(net, x, torch.Generator().manual_seed(seed)).value.sum()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reconstruction, mu, logvar = peer(x)
    their_loss = vae.loss_function(reconstruction, x, mu, logvar)
    (gradient,) = torch.autograd.grad(loss, net.encoder[0].weight)
    (their_gradient,) = torch.autograd.grad(their_loss, peer.to_hidden.weight)
    return {"loss": (loss.item(), their_loss.item()), "gradient": (gradient, their_gradient)}


def vae_pair() -> Pair:
    """An epoch of 468 batches; each sample goes on from where the one before it ended."""
    images = binarize(load_mnist().images)
    net, peer = VAE(VAEConfig(z_dim=20, hidden=(400,)), rng=rng_for(SEED, "vae")), vae.VAE()
    copy_vae(net, peer)
    agree(vae_gaps(net, peer, images[:VAE_BATCH]))
    steps = len(images) // VAE_BATCH
    state = TrainState({"vae": net}, {"vae": torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)})
    loader = digits.batches(digits.binary_mnist(unpacked()), VAE_BATCH, drop_last=True)
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-3)

    def check(history: dict[str, list[float]], their_loss: float) -> None:
        agree({"loss over the epoch": (-sum(history["elbo"]) / steps, their_loss)}, 0.1)

    with torch.no_grad():
        encoder = products(net.encoder, torch.zeros(VAE_BATCH, 784))
        decoder = products(net.decoder, torch.zeros(VAE_BATCH, 20))
    return Pair(
        ours=training(vae_step, state, images, steps, VAE_BATCH),
        theirs=lambda: vae.train_epoch(peer, optimizer, loader),
        check=check,
        flops=2.0 * steps * (3 * sum(encoder + decoder) - encoder[0]),  # forward, and two gradients but for the input's
    )


# ---- the GANs ----


def gan_gaps(nets: Nets, peers: Nets, step: Callable, real: Tensor, share: float = 1.0) -> Gaps:
    """Both losses and both gradients of one whole step from equal latents, taken on copies by plain gradient descent.

    ``share`` is the peer's discriminator loss as a share of ours. In float32 two orders of summing put a few of a
    million activations on different sides of LeakyReLU's kink, and the gradients 1e-3 apart; in float64 they do not.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        a = _one_step(nets, our_step, real.double(), 1.0)
        b = _one_step(peers, step, real.double(), share)
    finally:
        torch.set_default_dtype(usual)
    return {name: (a[name], b[name]) for name in a}


def _one_step(nets: Nets, step: Callable, real: Tensor, share: float) -> dict[str, Tensor | float]:
    nets = {k: copy.deepcopy(nets[k]).to(real.dtype) for k in KINDS}
    descents = {k: torch.optim.SGD(nets[k].parameters(), lr=1e-3) for k in KINDS}
    descents["discriminator"].param_groups[0]["lr"] /= share
    seen = {}
    for k, descent in descents.items():  # the gradients are gone after the step
        descent.register_step_pre_hook(lambda *_, k=k: seen.update({k: _gradient(nets[k])}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        d_loss, g_loss = step(*(nets[k] for k in KINDS), *(descents[k] for k in KINDS), real)
    gradients = {f"gradient of the {k}": seen[k] / (share if k == "discriminator" else 1) for k in KINDS}
    return {"d_loss": d_loss / share, "g_loss": g_loss, **gradients}


def our_step(generator, discriminator, optimizer_g, optimizer_d, real: Tensor) -> tuple[float, float]:
    """``gan_step`` with the peers' signature; its latents are those that they draw from the global generator."""
    nets = {"generator": generator, "discriminator": discriminator}
    state = TrainState(nets, {"generator": optimizer_g, "discriminator": optimizer_d})
    figures = gan_step(state, real, torch.Generator().manual_seed(torch.initial_seed()))
    return figures["d_loss"].item(), figures["g_loss"].item()


def gan_nets(dense: bool) -> tuple[Nets, Nets]:
    """Our networks and the peer's, with the same weights."""
    config, peer = (GANConfig(), gan) if dense else (DCGANConfig(size=32, width=64, z_dim=100), dcgan)
    nets = {k: kind(config, rng_for(SEED, "gan", k)) for k, kind in KINDS.items()}
    peers = {"generator": peer.Generator(), "discriminator": peer.Discriminator()}
    for k in nets:
        copy_weights(nets[k], peers[k])
    return nets, peers


def gan_pair(*, dense: bool, precision: str = "fp32") -> Pair:
    """``GAN_STEPS`` or ``DCGAN_STEPS`` steps on batches of 64; each sample goes on from the one before it."""
    nets, peers = gan_nets(dense)
    script, steps, share, size = (gan, GAN_STEPS, 0.5, 28) if dense else (dcgan, DCGAN_STEPS, 1.0, 32)
    if not dense:
        for net in nets.values():
            net.to(memory_format=torch.channels_last)
    images = load_mnist(size=size).images
    agree(gan_gaps(nets, peers, script.train_step, images[:16], share))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ours = _one_step(nets, our_step, images[:BATCH], 1.0)
    theirs = _one_step(peers, script.train_step, images[:BATCH], share)
    agree({name: (ours[name], theirs[name]) for name in ours}, 0.3 if precision == "bf16" else 0.02)

    def adams(of: Nets, **options) -> dict[str, torch.optim.Optimizer]:
        return {k: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), **options) for k, net in of.items()}

    state, optimizers = TrainState(nets, adams(nets, fused=True)), adams(peers)
    loader = digits.batches(digits.mnist(unpacked(), pad=(size - 28) // 2), BATCH, drop_last=True)

    def check(history: dict[str, list[float]], losses: list[tuple[float, float]]) -> None:
        if len(history["g_loss"]) != steps or len(losses) != steps:
            raise AssertionError(f"{len(history['g_loss'])} steps of ours and {len(losses)} of theirs, not {steps}")
        if not all(map(math.isfinite, (x for pair in losses for x in pair))):
            raise AssertionError("a loss of theirs is not finite")

    return Pair(
        ours=training(gan_step, state, images, steps, BATCH, precision),
        theirs=partial(gan.train, script.train_step, *peers.values(), *optimizers.values(), loader, steps),
        check=check,
        units=steps,
        unit="step",
        flops=steps * gan_flops(nets, size),
        format=precision,
    )


def gan_flops(nets: Nets, size: int) -> float:
    """Of one step of ours: neither the pixels' gradient of a discriminator's update nor its weights' in a generator's
    update is computed."""
    with torch.no_grad():
        g = products(copy.deepcopy(nets["generator"]).layers, torch.zeros(BATCH, nets["generator"].config.z_dim))
        d = products(copy.deepcopy(nets["discriminator"]).layers, torch.zeros(BATCH, 1, size, size))
    generator = 3 * sum(g) - g[0]  # forward, the weights' gradient, the inputs' gradient but for the latents'
    discriminator = 2 * (3 * sum(d) - d[0])  # on real and on generated images
    through = 2 * sum(d)  # once more, and back to the pixels
    return 2.0 * (generator + discriminator + through)


# ---- MNIST ----


def our_epoch(data: Images, epoch: int) -> tuple[int, Tensor, Tensor]:
    """Go through ``data`` once, in batches of 64; returns how many images there were, and the last batch."""
    n = 0
    for indices in epoch_order(SEED, epoch, len(data)).split(BATCH):
        batch = data[indices]
        n += len(batch)
    return n, batch.images, batch.labels


def mnist_pair(*, loading: bool) -> Pair:
    """Batches of normalised images and their labels, in memory at the start or, with ``loading``, on the disk."""
    root, epochs = unpacked(), count()
    ready = None if loading else (load_mnist(), digits.mnist(root))
    ours, theirs = ready or (load_mnist(), digits.mnist(root))
    agree(image_gaps(ours, theirs, range(0, len(ours), 100)))

    def check(a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]) -> None:
        if a[0] != b[0] or a[1].shape != b[1].shape or a[2].shape != b[2].shape:
            raise AssertionError(f"{a[0]} images of ours, {b[0]} of theirs; last batch {a[1].shape}, {b[1].shape}")

    times = 1 if loading else 10  # an epoch in memory is too short for the clock that watches other processes

    def our_side() -> tuple[int, Tensor, Tensor]:
        return [our_epoch(ready[0] if ready else load_mnist(), next(epochs)) for _ in range(times)][-1]

    def their_side() -> tuple[int, Tensor, Tensor]:
        return digits.read_epoch(digits.batches(ready[1] if ready else digits.mnist(root), BATCH))

    n_bytes = None if loading else ours.images.nbytes + ours.labels.nbytes
    return Pair(ours=our_side, theirs=their_side, check=check, times=times, bytes=n_bytes)


def image_gaps(ours: Images, theirs: MNIST, rows: Sequence[int]) -> Gaps:
    """The pixels and the labels of ``rows``."""
    images, labels = zip(*(theirs[i] for i in rows), strict=True)
    mine = ours[torch.tensor(rows)]
    return {"pixels": (mine.images, torch.stack(images)), "labels": (mine.labels, torch.tensor(labels))}


# ---- what they share ----


def training(step, state: TrainState, images: Tensor, steps: int, batch: int, precision="fp32") -> Callable[[], dict]:
    """A sample of ours: ``steps`` steps of ``fit``; returns the figures of each."""
    config = TrainConfig(steps=steps, batch_size=batch, seed=SEED, device="cpu", precision=precision)

    def sample() -> dict[str, list[float]]:
        state.step_count = 0
        state.history.clear()
        return dict(fit(step, state, images, config).history)

    return sample


def agree(gaps: Gaps, tolerance: float = 1e-5) -> None:
    """Raise ``AssertionError`` unless the two sides of every gap lie within ``tolerance`` of each other, relative to
    the norm of theirs."""
    for name, (ours, theirs) in gaps.items():
        a, b = (torch.as_tensor(side, dtype=torch.float64) for side in (ours, theirs))
        if a.shape != b.shape or not (a - b).norm() <= tolerance * b.norm():
            sizes = f"ours of norm {a.norm().item():.9g}, theirs {b.norm().item():.9g}"
            raise AssertionError(f"{name}: {sizes}, apart by more than {tolerance:g} of that")


def _gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


COMMON, READY = "the common script", "torchvision MNIST, ToTensor, DataLoader"
BF16 = partial(gan_pair, dense=False, precision="bf16")
PLAIN = [
    Row(key=key, workload=workload, peer=peer, written_here=peer != READY, pair=pair, required=low, aim=aim)
    for key, workload, peer, pair, low, aim in (
        ("vae", "VAE 784-400-20, batch 128, an epoch, fp32", "the usual example's loop", partial(vae_pair), 2.0, 4.0),
        ("gan", "MLP GAN (28x28, batch 64), a step, fp32", COMMON, partial(gan_pair, dense=True), 1.6, 3.0),
        ("dcgan", "DCGAN 32x32, batch 64, a step, fp32", COMMON, partial(gan_pair, dense=False), 1.7, 2.5),
        ("dcgan-bf16", "DCGAN 32x32, batch 64, a step, bf16", f"{COMMON}, fp32", BF16, 3.3, 4.5),
        ("mnist", "MNIST to normalised batches, an epoch", READY, partial(mnist_pair, loading=False), 40.0, 130.0),
        ("mnist-first", "MNIST from disk, the first epoch", READY, partial(mnist_pair, loading=True), 1.0, 1.0),
    )
]
ROWS = [*both(PLAIN[:2]), *PLAIN[2:]]  # the others have next to no linear layers
