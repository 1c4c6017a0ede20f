"""The recipe ``gmm``: a mixture of Gaussians over the principal components of digits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checkpoints, ranks
from ..datasets import load_mnist
from ..gmm import GaussianMixture
from ..runtime import CourseError
from .recipe import Recipe, card, check_profile


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


def gmm(profile: str, seed: int, device: torch.device) -> Recipe:
    def train(out: Path | None = None, on_log: Callable[[int, dict[str, float]], None] | None = None) -> DigitMixture:
        if ranks.join()[1] > 1:
            raise CourseError("gmm is fitted by EM, in one process: start it without torchrun")
        if out is not None:
            check_profile(out, profile)
            checkpoints.writable(Path(out), "AIGC_RUN_DIR or --out")  # before the work
        images = load_mnist(train=True, device=device).images.flatten(1)
        pca = PCA.fit(images, 50)
        mixture = GaussianMixture(**GMM[profile], tol=0.01, reg_covar=1e-3, seed=seed).fit(pca.encode(images))
        model = DigitMixture(pca, mixture)
        if on_log is not None:
            on_log(len(mixture.log_likelihoods_) - 1, {"log_likelihood": mixture.log_likelihoods_[-1]})
        if out is not None:
            figures = {"log-likelihood of the training scores, nats per image": mixture.log_likelihoods_[-1]}
            checkpoints.save(Path(out) / "model", model.weights(), card=card("gmm", profile, seed, device, figures))
        return model

    def restore(folder: Path) -> DigitMixture:
        checkpoint = checkpoints.load(folder, device=device)
        return DigitMixture.from_weights(checkpoint.weights)

    return Recipe(name="gmm", profile=profile, train=train, restore=restore, sample=DigitMixture.sample, device=device)
