"""The recipes ``vae``, ``vae2d`` and ``iwae``: variational autoencoders of binary digits."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoints, ranks
from ..datasets import binarize, load_mnist
from ..runtime import rng_for
from ..state import TrainConfig, TrainState
from ..training import fit
from ..vae import VAE, VAEConfig, active_units, elbo, iwae_step, vae_step
from .recipe import Recipe, card, check_profile

# "vae" and "iwae" have the network and, but for its length and batch size, the training of the table in Burda et al.
# (2016, arXiv:1509.00519, section 5): Adam with epsilon 1e-4, pixels binarised afresh each time. The learning rate is
# 3e-3 for the first half of the steps, then falls linearly to 0; "k" is the number of samples of the bound.
WIDE, FLAT = VAEConfig(z_dim=50, hidden=(200, 200)), VAEConfig(z_dim=2, hidden=(400, 200))
VAES = {
    ("vae", "quick"): {"config": WIDE, "k": 1, "epochs": 8},
    ("vae", "full"): {"config": WIDE, "k": 1, "epochs": 50},
    ("vae2d", "quick"): {"config": FLAT, "k": 1, "epochs": 8},
    ("vae2d", "full"): {"config": FLAT, "k": 1, "epochs": 100},
    ("iwae", "quick"): {"config": WIDE, "k": 50, "epochs": 2},
    ("iwae", "full"): {"config": WIDE, "k": 50, "epochs": 50},
}
BATCH_SIZE, LEARNING_RATE = 100, 3e-3


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of step number ``step`` of ``steps``: constant for the first half, then falling to 0."""
    return LEARNING_RATE * min(1.0, 2 * (1 - step / steps))


def vae(name: str, profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> VAE:
        config, k, epochs = VAES[name, profile].values()
        if out is not None:
            check_profile(out, profile)
        images = load_mnist(train=True).images
        model = VAE(config, pixel_means=(images.mean(0) + 1) / 2, rng=rng_for(seed, name, "weights"))
        adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=1e-4, fused=True)
        steps = epochs * (len(images) // BATCH_SIZE)

        def step(state: TrainState, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
            adam.param_groups[0]["lr"] = learning_rate(state.step_count, steps)
            x = binarize(images, rng)
            return vae_step(state, x, rng) if k == 1 else iwae_step(state, x, rng, k=k)

        train_config = TrainConfig(
            steps=steps, batch_size=BATCH_SIZE, seed=seed, device=str(device), precision="fp32", checkpoint_every=1200
        )
        fit(step, TrainState({"vae": model}, {"vae": adam}), images, train_config, out=out, on_log=on_log)
        model.eval()

        def keep() -> None:
            facts = card(name, profile, seed, device, held_out_figures(model, seed))
            facts["config"] = {"z_dim": config.z_dim, "hidden": config.hidden}
            checkpoints.save(Path(out) / "model", model.state_dict(), card=facts)

        if out is not None:
            ranks.on_first(keep)
        return model

    def restore(folder: Path) -> VAE:
        checkpoint = checkpoints.load(folder, device=device)
        model = VAE(VAEConfig(**checkpoint.card["config"])).to(device)
        model.load_state_dict(checkpoint.weights)
        return model.eval()

    def sample(model: VAE, n: int, rng: torch.Generator) -> Tensor:
        z = torch.randn(n, model.config.z_dim, generator=rng, device=rng.device)
        with torch.no_grad():
            return 2 * model.decode(z).sigmoid() - 1  # the mean of each pixel, as pictures of VAEs usually show it

    return Recipe(name=name, profile=profile, train=train, restore=restore, sample=sample, device=device)


@torch.no_grad()
def held_out_figures(vae: VAE, seed: int) -> dict[str, float]:
    """The bound and its parts on the 10,000 test digits, binarised by ``seed``, and the number of active units."""
    device = vae.decoder[-1].weight.device
    rng = rng_for(seed, "test figures", device=device)
    x = binarize(load_mnist(train=False, device=device).images, rng)
    bound = elbo(vae, x, rng)
    return {
        "ELBO, nats per image": bound.value.mean().item(),
        "reconstruction, nats per image": bound.reconstruction.mean().item(),
        "KL, nats per image": bound.kl.mean().item(),
        "active units": int(active_units(vae, x).sum()),
    }
