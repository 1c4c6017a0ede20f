"""One tiny model for each kind of training step, to be killed, spoilt and taken up again."""

import torch

from aigc_course.classifier import Classifier, ClassifierConfig, classifier_step
from aigc_course.datasets import Images, binarize
from aigc_course.gan import DCGANConfig, Discriminator, GANConfig, Generator, gan_step
from aigc_course.gpt2 import GPT2, GPT2Config, lm_step
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.vae import VAE, VAEConfig, iwae_step, vae_step

KINDS = ("vae", "iwae", "gan", "dcgan", "classifier", "gpt2")


def build(kind: str, **changes):
    """The four arguments of ``fit`` for a tiny run of this kind of step: 30 steps, 5 to the epoch."""
    settings = {"steps": 30, "batch_size": 8, "device": "cpu", "checkpoint_every": 4, "log_every": 3, "seed": 1}
    rng = rng_for("tiny", kind)
    digits = torch.rand(40, 1, 28, 28, generator=rng) * 2 - 1
    if kind in ("vae", "iwae"):
        nets, data = {"vae": VAE(VAEConfig(z_dim=3, hidden=(16,)), rng=rng)}, digits

        def step(state, batch, rng):
            state.optimizers["vae"].param_groups[0]["lr"] = 1e-2 * (1 - state.step_count / 30)
            x = binarize(batch, rng)
            return vae_step(state, x, rng) if kind == "vae" else iwae_step(state, x, rng, k=6, drawn=2)

    elif kind in ("gan", "dcgan"):
        config = GANConfig(hidden=(16,), z_dim=4) if kind == "gan" else DCGANConfig(width=4, size=16, z_dim=4)
        nets, data = {"generator": Generator(config, rng), "discriminator": Discriminator(config, rng)}, digits
        settings["ema"] = {"generator": 0.9}
        if kind == "dcgan":
            data = torch.rand(40, 1, 16, 16, generator=rng) * 2 - 1
            for net in nets.values():
                net.to(memory_format=torch.channels_last)

        def step(state, batch, rng):
            return gan_step(state, batch, rng, r1=0.1, r1_every=3)

    elif kind == "classifier":
        nets = {"classifier": Classifier(ClassifierConfig(width=2, features=8), rng)}
        images = torch.rand(40, 1, 32, 32, generator=rng) * 2 - 1
        data, step = Images(images, torch.arange(40) % 10), classifier_step
    else:
        sizes = {"vocab_size": 20, "block_size": 10, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.2}
        nets = {"gpt2": GPT2(GPT2Config(**sizes), rng)}
        data, step = torch.randint(20, (40, 11), generator=rng), lm_step
        settings["clip_norm"] = 1.0
    adams = {name: torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.5, 0.99)) for name, net in nets.items()}
    return step, TrainState(nets, adams), data, TrainConfig(**{**settings, **changes})


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """All that a run leaves: weights, buffers, averages, the optimizers' state, the history."""
    moments = {
        f"{name}.{index}.{key}": value
        for name, optimizer in state.optimizers.items()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    history = {name: torch.tensor(values, dtype=torch.float64) for name, values in state.history.items()}
    settings = {"settings": torch.frombuffer(bytearray(repr(state.settings()).encode("utf-8")), dtype=torch.uint8)}
    return {**state.weights(), **moments, **history, **settings}


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names under which ``a`` and ``b`` differ in a bit; NaN, for a figure that a step left out, is itself."""
    same = {n for n in a.keys() & b.keys() if a[n].dtype == b[n].dtype and _bits(a[n]) == _bits(b[n])}
    return sorted((a.keys() | b.keys()) - same)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
