"""The only place where a family meets its data: ``build(name, profile)`` is what ``aigc train`` and the lessons run."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import checkpoints
from .datasets import FileCheck, binarize, load_mnist
from .gmm import GaussianMixture
from .runtime import CourseError, course_dir, pick_device, pick_profile, rng_for
from .state import TrainConfig, TrainState
from .training import fit
from .vae import VAE, VAEConfig, active_units, elbo, iwae_step, vae_step


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named model with everything decided: how it is trained on its data, loaded again, and sampled.

    ``train(out=None, on_log=None)`` returns the model, and keeps it in the folder ``out`` if there is one;
    ``load(out)`` reads it back; ``restore(checkpoint)`` makes the model of what ``checkpoints.load`` read;
    ``sample(model, n, rng)`` gives images (n, 1, height, width) in [-1, 1].
    """

    name: str
    profile: str
    train: Callable[..., Any]
    restore: Callable[[checkpoints.Checkpoint], Any]
    sample: Callable[[Any, int, torch.Generator], Tensor]
    device: torch.device

    def load(self, out: Path) -> Any:
        """The model that ``train(out)`` kept; raises ``CourseError`` if another profile left it there."""
        check_profile(out, self.profile)
        return self.restore(checkpoints.load(Path(out) / "model", device=self.device))


def check_profile(out: Path, profile: str) -> None:
    """Raise ``CourseError`` if the folder ``out`` holds a model of another profile."""
    folder = Path(out) / "model"
    found = checkpoints.load(folder).card.get("profile") if (folder / checkpoints.MANIFEST).exists() else profile
    if found != profile:
        raise CourseError(
            f"{out} holds a model of the profile {found}, not {profile}: add --profile {found}, or name another folder"
        )


class PCA:
    """Principal component analysis: an orthonormal basis of the ``d`` directions in which rows vary most.

    ``encode`` gives the scores (n, d) of rows (n, D), ``decode`` the rows nearest to them that the basis can express
    (Bishop 2006, PRML, section 12.1). ``variances`` holds the variance along every direction, largest first.
    """

    def __init__(self, mean: Float[Tensor, "D"], basis: Float[Tensor, "D d"], variances: Float[Tensor, "D"]):
        self.mean, self.basis, self.variances = mean, basis, variances

    @classmethod
    def fit(cls, x: Float[Tensor, "n D"], d: int) -> "PCA":
        if not 1 <= d <= min(x.shape):
            raise CourseError(f"PCA of {x.shape[0]} rows of {x.shape[1]} numbers has no {d} directions: lower d")
        mean = x.mean(0)
        centred = x - mean
        covariance = (centred.T @ centred / len(x)).to("cpu", torch.float64)
        variances, directions = (t.flip(-1).to(x.device, x.dtype) for t in torch.linalg.eigh(covariance))
        return cls(mean, directions[:, :d].contiguous(), variances)

    def encode(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n d"]:
        return (x - self.mean) @ self.basis

    def decode(self, scores: Float[Tensor, "n d"]) -> Float[Tensor, "n D"]:
        return self.mean + scores @ self.basis.T


@dataclass(frozen=True)
class DigitMixture:
    """A mixture of Gaussians over the principal components of images, and the way back to images."""

    pca: PCA
    mixture: GaussianMixture

    def scores(self, images: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n d"]:
        return self.pca.encode(images.flatten(1))

    def images(self, scores: Float[Tensor, "n d"]) -> Float[Tensor, "n 1 h w"]:
        size = round(self.pca.mean.numel() ** 0.5)
        return self.pca.decode(scores).clamp(-1, 1).reshape(-1, 1, size, size)

    def sample(self, n: int, rng: torch.Generator) -> Float[Tensor, "n 1 h w"]:
        return self.images(self.mixture.sample(n, rng))

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the model, by name."""
        pca, mixture = self.pca, self.mixture
        return {
            "pca.mean": pca.mean,
            "pca.basis": pca.basis,
            "pca.variances": pca.variances,
            "mixture.weights": mixture.weights_,
            "mixture.means": mixture.means_,
            "mixture.covariances": mixture.covariances_,
        }

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "DigitMixture":
        """The inverse of ``weights``."""
        mixture = GaussianMixture(len(weights["mixture.weights"]))
        mixture.weights_, mixture.means_ = weights["mixture.weights"], weights["mixture.means"]
        mixture.covariances_ = weights["mixture.covariances"]
        return cls(PCA(weights["pca.mean"], weights["pca.basis"], weights["pca.variances"]), mixture)


# The floor, reg_covar=1e-3, keeps a component that has gathered a few like images from collapsing; the variances of the
# 50 scores over all digits lie between 0.7 and 20.
GMM = {"quick": {"n_components": 40, "max_iter": 20}, "full": {"n_components": 200, "max_iter": 60}}


def _gmm(profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> DigitMixture:
        if out is not None:
            check_profile(out, profile)
        images = load_mnist(train=True, device=device).images.flatten(1)
        pca = PCA.fit(images, 50)
        mixture = GaussianMixture(**GMM[profile], tol=0.01, reg_covar=1e-3, seed=seed).fit(pca.encode(images))
        model = DigitMixture(pca, mixture)
        if on_log is not None:
            on_log(len(mixture.log_likelihoods_) - 1, {"log_likelihood": mixture.log_likelihoods_[-1]})
        if out is not None:
            figures = {"log-likelihood of the training scores, nats per image": mixture.log_likelihoods_[-1]}
            checkpoints.save(Path(out) / "model", model.weights(), card=_card("gmm", profile, seed, device, figures))
        return model

    def restore(checkpoint: checkpoints.Checkpoint) -> DigitMixture:
        return DigitMixture.from_weights(checkpoint.weights)

    return Recipe(name="gmm", profile=profile, train=train, restore=restore, sample=DigitMixture.sample, device=device)


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


def _vae(name: str, profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> VAE:
        config, k, epochs = VAES[name, profile].values()
        if out is not None:
            check_profile(out, profile)
        images = load_mnist(train=True).images
        vae = VAE(config, pixel_means=(images.mean(0) + 1) / 2, rng=rng_for(seed, name, "weights"))
        adam = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, eps=1e-4)
        steps = epochs * (len(images) // BATCH_SIZE)

        def step(state: TrainState, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
            adam.param_groups[0]["lr"] = learning_rate(state.step_count, steps)
            x = binarize(images, rng)
            return vae_step(state, x, rng) if k == 1 else iwae_step(state, x, rng, k=k)

        train_config = TrainConfig(
            steps=steps, batch_size=BATCH_SIZE, seed=seed, device=str(device), precision="fp32", checkpoint_every=1200
        )
        fit(step, TrainState({"vae": vae}, {"vae": adam}), images, train_config, out=out, on_log=on_log)
        if out is not None:
            card = _card(name, profile, seed, device, held_out_figures(vae.eval(), seed))
            card["config"] = {"z_dim": config.z_dim, "hidden": config.hidden}
            checkpoints.save(Path(out) / "model", vae.state_dict(), card=card)
        return vae.eval()

    def restore(checkpoint: checkpoints.Checkpoint) -> VAE:
        vae = VAE(VAEConfig(**checkpoint.card["config"])).to(device)
        vae.load_state_dict(checkpoint.weights)
        return vae.eval()

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


def machine(device: torch.device) -> str:
    """The kind of machine, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"


def _card(name: str, profile: str, seed: int, device: torch.device, figures: Mapping[str, float]) -> dict[str, Any]:
    """What a saved model says of itself."""
    return {
        "recipe": name,
        "profile": profile,
        "seed": seed,
        "command": f"aigc train {name} --profile {profile} --seed {seed}",
        "machine": machine(device),
        "figures": dict(figures),
    }


RECIPES = {"gmm": _gmm, **{name: partial(_vae, name) for name in ("vae", "vae2d", "iwae")}}
NAMES = tuple(RECIPES)


def build(name: str, profile: str | None = None, *, seed: int = 0, device: str = "auto") -> Recipe:
    """The recipe called ``name`` at ``profile``, "quick" or "full". Raises ``CourseError`` for a name that is none."""
    if name not in RECIPES:
        raise CourseError(f"there is no recipe {name!r}: choose from {', '.join(NAMES)}")
    return RECIPES[name](pick_profile(profile), seed, pick_device(device))


def load_pretrained(name: str, *, device: str = "auto") -> Any:
    """The trained model ``name`` that comes with the course, from ``data/checkpoints``, where its card lies too.

    Raises ``CourseError`` for a name that is none, ``CheckpointError`` if its files are damaged.
    """
    if name not in pretrained():
        raise CourseError(f"no trained model {name!r} comes with the course: choose from {', '.join(pretrained())}")
    checkpoint = checkpoints.load(course_dir() / "data" / "checkpoints" / name, device=pick_device(device))
    return build(name, checkpoint.card["profile"], device=device).restore(checkpoint)


def pretrained() -> list[str]:
    """The names of the trained models that come with the course."""
    return sorted(
        path.parent.name for path in (course_dir() / "data" / "checkpoints").glob(f"*/{checkpoints.MANIFEST}")
    )


def ship(name: str, run: Path) -> Path:
    """Put the model that ``train(run)`` kept among those that come with the course; returns its folder there."""
    checkpoint = checkpoints.load(Path(run) / "model")
    if (found := checkpoint.card.get("recipe")) != name:
        raise CourseError(f"{run} holds a model of the recipe {found}, not {name}: name another run")
    return checkpoints.save(course_dir() / "data" / "checkpoints" / name, checkpoint.weights, card=checkpoint.card)


def check_pretrained() -> list[FileCheck]:
    """Read every trained model that comes with the course; damage is told, not raised."""
    rows = []
    for name in pretrained():
        folder = course_dir() / "data" / "checkpoints" / name
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            checkpoints.load(folder)
            rows.append(FileCheck(f"checkpoints/{name}", size, True, "as its manifest says"))
        except checkpoints.CheckpointError as error:
            rows.append(FileCheck(f"checkpoints/{name}", size, False, str(error)))
    return rows
