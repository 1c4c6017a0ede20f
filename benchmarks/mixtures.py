"""The rows of mixtures: EM in float64 beside scikit-learn's, from the same start, with as many E and M steps.

Both take N M steps and N + 1 E steps for ``max_iter=N`` and ``tol=0``: scikit-learn ends with an E step for the labels,
the course's class with one for the final log-likelihood. Given weights, means and precisions, scikit-learn 1.9 draws no
start of its own; an older one would, so ``init_params="random"`` chooses the cheapest.
"""

import functools
import warnings
from collections.abc import Callable

import sklearn
import torch
from sklearn import mixture
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from aigc_course.datasets import load_mnist, toy_2d
from aigc_course.gmm import GaussianMixture
from aigc_course.recipes import PCA
from aigc_course.runtime import rng_for

from .clock import Pair, Row

SEED = 7
N = 60_000
Start = tuple[Tensor, Tensor, Tensor]


def start(x: Tensor, k: int, covariance: str, reg_covar: float) -> Start:
    """Equal weights, ``k`` rows of ``x`` as means, and the variances of all of ``x`` for every component."""
    means = x[torch.randperm(len(x), generator=rng_for(SEED, "start"))[:k]]
    variances = (x.var(0) + reg_covar).expand(k, -1).contiguous()
    covariances = torch.diag_embed(variances) if covariance == "full" else variances
    return torch.full((k,), 1 / k, dtype=x.dtype), means, covariances


def fit_ours(x: Tensor, initial: Start, steps: int, covariance: str, reg_covar: float) -> GaussianMixture:
    """``steps`` M steps of the course's EM."""
    options = {"covariance": covariance, "init": initial, "max_iter": steps, "tol": 0.0, "reg_covar": reg_covar}
    return GaussianMixture(len(initial[0]), **options).fit(x)


def fit_theirs(x: Tensor, initial: Start, steps: int, covariance: str, reg_covar: float) -> mixture.GaussianMixture:
    """``steps`` M steps of scikit-learn's EM."""
    weights, means, covariances = initial
    precisions = torch.linalg.inv(covariances) if covariance == "full" else 1 / covariances
    model = mixture.GaussianMixture(
        len(weights),
        covariance_type=covariance,
        tol=0.0,
        reg_covar=reg_covar,
        max_iter=steps,
        init_params="random",
        weights_init=weights.numpy(),
        means_init=means.numpy(),
        precisions_init=precisions.numpy(),
        random_state=SEED,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as many steps as were asked for is what is wanted
        return model.fit(x.numpy())


def same_likelihood(ours: GaussianMixture, theirs: mixture.GaussianMixture, x: Tensor, steps: int) -> None:
    """Raise ``AssertionError`` unless both took ``steps`` M steps to the same mean log-likelihood, within 1e-10."""
    taken = len(ours.log_likelihoods_) - 1, theirs.n_iter_
    if taken != (steps, steps):
        raise AssertionError(f"{taken[0]} M steps of ours and {taken[1]} of theirs, not {steps}")
    a, b = ours.log_likelihoods_[-1], float(theirs.score(x.numpy()))
    if not abs(a - b) <= 1e-10 * abs(b):
        raise AssertionError(f"log-likelihood: ours {a!r}, theirs {b!r}, not within 1e-10")


def plane() -> Tensor:
    """60,000 points of a toy density in the plane."""
    return toy_2d("grid", N, rng_for(SEED, "plane"), dtype=torch.float64)


def components() -> Tensor:
    """The first 50 principal components of the training digits."""
    images = load_mnist().images.flatten(1)
    return PCA.fit(images, 50).encode(images).double()


def pixels() -> Tensor:
    """The training digits' grey values in [0, 1]."""
    return load_mnist().images.flatten(1).double().add_(1).div_(2)


def em_pair(data: Callable[[], Tensor], *, k: int, covariance: str, steps: int, reg_covar: float = 1e-6) -> Pair:
    """``steps`` iterations of EM from one start; scikit-learn's BLAS gets as many threads as torch has."""
    threadpool_limits(torch.get_num_threads(), user_api="blas")
    x = data()
    n, d = x.shape
    options = {"covariance": covariance, "reg_covar": reg_covar}
    some, few = x[:2000], start(x, k, **options)
    own = start(some, k, **options)
    same_likelihood(fit_ours(some, own, 2, **options), fit_theirs(some, own, 2, **options), some, 2)
    # Full: one product with a d x d matrix for each row and component, in either step. Diagonal: two with vectors.
    product = 2.0 * n * k * d * (d if covariance == "full" else 2)
    return Pair(
        ours=lambda: fit_ours(x, few, steps, **options),
        theirs=lambda: fit_theirs(x, few, steps, **options),
        check=lambda a, b: same_likelihood(a, b, x, steps),
        units=steps,
        unit="iteration",
        flops=product * (2 * steps + 1) if d > 2 else None,  # in the plane exp, log and memory are what it costs
        format="fp64",
    )


ROWS = [
    Row(
        key=f"gmm-{d}",
        workload=f"GMM EM, float64, 60,000 x {d}, K={k}, {covariance}" + (f", floor {reg_covar:g}" if d == 784 else ""),
        peer=f"scikit-learn {sklearn.__version__}",
        pair=functools.partial(em_pair, data, k=k, covariance=covariance, steps=steps, reg_covar=reg_covar),
        required=required,
        aim=aim,
    )
    for d, k, covariance, data, steps, reg_covar, required, aim in (
        (2, 10, "full", plane, 20, 1e-6, 4.0, 8.0),
        (50, 10, "full", components, 3, 1e-6, 1.8, 4.0),
        # Most pixels at the border never change: this floor is the variance that they are given.
        (784, 50, "diag", pixels, 2, 1e-3, 1.0, 1.8),
    )
]
