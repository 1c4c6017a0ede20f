"""Toy densities in the plane, to sample and to measure."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .files import DataError

TOY_NAMES = ("mixture", "moons", "ring", "grid")
MOONS_STD = 0.1


def toy_mixture(name: str) -> tuple[Float64[Tensor, "k"], Float64[Tensor, "k 2"], Float64[Tensor, "k 2 2"]]:
    """Weights, means and covariances of a toy density that is a mixture of Gaussians.

    ``"mixture"``: three slanted Gaussians of unequal weight. ``"ring"``: eight on a circle of radius 2, standard
    deviation 0.02 (Metz et al. 2017, arXiv 1611.02163; Gulrajani et al. 2017, arXiv 1704.00028). ``"grid"``: 25 at the
    integer points from (-2, -2) to (2, 2), standard deviation 0.05 (as Gulrajani et al., whose centres lie 2 apart).
    Raises ``DataError`` for ``"moons"``, which is no such mixture, and for an unknown name.
    """
    if name not in TOY_NAMES:
        raise DataError(f"there is no toy density {name!r}: choose one of {', '.join(map(repr, TOY_NAMES))}")
    if name == "moons":
        raise DataError(
            "'moons' has no density in closed form: choose 'mixture', 'ring' or 'grid', or sample with toy_2d"
        )
    if name == "mixture":
        means = [[-2.0, 0.0], [2.0, 1.0], [0.5, -2.0]]
        covs = [[[0.6, 0.5], [0.5, 0.7]], [[0.3, -0.2], [-0.2, 0.5]], [[1.0, 0.1], [0.1, 0.1]]]
        return (
            torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
            torch.tensor(means, dtype=torch.float64),
            torch.tensor(covs, dtype=torch.float64),
        )
    if name == "ring":
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        means, std = 2 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.02
    else:
        ticks = torch.arange(-2, 3, dtype=torch.float64)
        means, std = torch.cartesian_prod(ticks, ticks), 0.05
    k = len(means)
    covs = (std**2 * torch.eye(2, dtype=torch.float64)).repeat(k, 1, 1)
    return torch.full((k,), 1 / k, dtype=torch.float64), means, covs


def toy_2d(name: str, n: int, rng: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n 2"]:
    """``n`` independent points from a toy density, on the generator's device.

    ``"mixture"``, ``"ring"`` and ``"grid"`` are the mixtures of ``toy_mixture``. ``"moons"`` is two half circles of
    radius 1, the upper around (0, 0) and the lower around (1, 0.5) as in scikit-learn's ``make_moons``: the moon and
    the angle are drawn uniformly, and Gaussian noise of standard deviation 0.1 is added. Raises ``DataError`` for any
    other name.
    """
    if n < 1:
        raise DataError(f"n: expected at least one point, found {n}")
    noise = torch.randn(n, 2, generator=rng, device=rng.device, dtype=dtype)
    if name == "moons":
        angle = math.pi * torch.rand(n, generator=rng, device=rng.device, dtype=dtype)
        lower = torch.rand(n, generator=rng, device=rng.device) < 0.5
        upper_moon = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower_moon = upper_moon.new_tensor([1.0, 0.5]) - upper_moon
        return torch.where(lower[:, None], lower_moon, upper_moon) + MOONS_STD * noise
    weights, means, covs = toy_mixture(name)
    component = torch.multinomial(weights.float().to(rng.device), n, replacement=True, generator=rng)
    factors = torch.linalg.cholesky(covs).to(dtype).to(rng.device)
    return means.to(dtype).to(rng.device)[component] + (factors[component] * noise[:, None]).sum(dim=2)


def toy_log_density(name: str, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
    """The exact log-density, in nats, of a mixture of ``toy_mixture`` at each of ``n`` points.

    log p(x) = logsumexp_k [log w_k - log(2 pi) - log|L_k| - |L_k^-1 (x - m_k)|^2 / 2], where L_k is the Cholesky factor
    of the covariance. Raises ``DataError`` for ``"moons"``, which has none in closed form, and for an unknown name.
    """
    weights, means, covs = toy_mixture(name)
    factors = torch.linalg.cholesky(covs)
    log_scale = weights.log() - math.log(2 * math.pi) - factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    # The cast comes before the move: Apple's MPS has no float64.
    means, factors, log_scale = (t.to(x.dtype).to(x.device) for t in (means, factors, log_scale))
    centred = x - means[:, None]
    white = torch.linalg.solve_triangular(factors, centred.mT, upper=False)
    return torch.logsumexp(log_scale[:, None] - white.square().sum(dim=1) / 2, dim=0)
