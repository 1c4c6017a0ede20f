"""How far generated examples are from real ones: numbers from feature tensors.

The axes are n (or m) examples, one a row, and d features. Features come from a network that the caller chooses, so
figures compare only if the features, and for the Fréchet distance the numbers of rows, are the same. All is computed
in float64 on the CPU, wherever the features lie; a bad argument raises ``MetricError``.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from ..runtime import CourseError

BLOCK = 2**20  # numbers of a matrix held at once, 8 MB: the pairs of 10,000 with 10,000 rows would take 800 MB
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MetricError(CourseError):
    """Features that cannot be compared, or a setting out of range."""


# ---- distances between two distributions ----


def frechet_distance_gaussians(
    mean_a: Float[Tensor, "d"], cov_a: Float[Tensor, "d d"], mean_b: Float[Tensor, "d"], cov_b: Float[Tensor, "d d"]
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, in squared units of the features.

    |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½), after Dowson and Landau (1982, Journal of Multivariate
    Analysis 12, 450-455). Covariances may be singular.
    """
    mean_a, cov_a, mean_b, cov_b = _moments(mean_a=mean_a, cov_a=cov_a, mean_b=mean_b, cov_b=cov_b)
    # (cov_a cov_b)^½ is not symmetric, but its trace is the sum of the singular values of cov_a^½ cov_b^½.
    root_trace = torch.linalg.matrix_norm(_root("cov_a", cov_a) @ _root("cov_b", cov_b), "nuc")
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # below 0 by rounding alone


def _root(name: str, covariance: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    if eigenvalues[0] < -1e-5 * eigenvalues.abs().max():  # more than the rounding of a covariance found in float32
        raise MetricError(f"{name} has the eigenvalue {eigenvalues[0].item():g}: a covariance has none below 0")
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Squared Fréchet distance of the Gaussians fitted to the rows of ``a`` and ``b`` (arXiv:1706.08500, eq. 6).

    Heusel et al. (2017) take Inception features, and call it FID. Symmetric, at least 0, in squared units of the
    features. Biased: between samples of one distribution it is above 0, by less the more rows there are
    (arXiv:1801.01401, section 4), so compare figures of equal n and m only.
    """
    a, b = _features(a=a, b=b, least=2)
    # Covariances are unbiased; of a single feature, torch.cov returns a number.
    return frechet_distance_gaussians(a.mean(0), torch.atleast_2d(a.T.cov()), b.mean(0), torch.atleast_2d(b.T.cov()))


def polynomial_kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """(x·y / d + 1)³ of every row of ``x`` with every row of ``y`` (arXiv:1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of two distributions, with ``polynomial_kernel``.

    The estimator is eq. 3 of Gretton et al. (2012, JMLR 13); with Inception features Bińkowski et al. (2018,
    arXiv:1801.01401) call it KID. Its mean over samples does not depend on n and m; between samples of one
    distribution that mean is 0, so a single figure may be negative.
    """
    a, b = _features(a=a, b=b, least=2)
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - _kernel_trace(a)) / (n * (n - 1))  # no row is paired with itself
    within_b = (_kernel_sum(b, b) - _kernel_trace(b)) / (m * (m - 1))
    return (within_a + within_b - 2 * _kernel_sum(a, b) / (n * m)).item()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return sum(polynomial_kernel(x[rows], y).sum() for rows in _blocks(x, width=len(y)))


def _kernel_trace(x: Tensor) -> Tensor:
    return ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()


# ---- neighbours: fidelity, diversity, novelty ----


def nearest_neighbours(
    queries: Float[Tensor, "n d"], references: Float[Tensor, "m d"], k: int = 1
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Euclidean distances to the ``k`` nearest references of each query, nearest first, and their indices.

    Pictures count as rows of pixels: ``images.flatten(1)``. A copy is at distance 0 exactly. Both results are on the
    CPU.
    """
    queries, references = _features(queries=queries, references=references)
    _check_k(k, most=len(references), rows="references")
    return _nearest(queries, references, k)


def _nearest(queries: Tensor, references: Tensor, k: int) -> tuple[Tensor, Tensor]:
    squared_norms = references.norm(dim=1).square()
    distances, indices = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    for rows in _blocks(queries, width=max(len(references), k * references.shape[1])):
        x = queries[rows]
        # |x - y|² less |x|², which is the same for every reference y: a matrix product finds the nearest many times
        # faster than differences do, but what it leaves of a small distance is rounding error.
        nearest = torch.addmm(squared_norms, x, references.T, alpha=-2).topk(k, largest=False).indices
        distances[rows], order = _distances(x[:, None], references[nearest])[:, 0].sort()
        indices[rows] = nearest.gather(1, order)
    return distances, indices


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences: copies are at distance 0, and a pair has one distance whichever way and in whichever block.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class PrecisionRecall(NamedTuple):
    """``precision``: the share of fakes that look real. ``recall``: the share of reals that the fakes cover."""

    precision: float
    recall: float


def precision_recall(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1-2), both in [0, 1].

    Around each real row lies a ball that reaches to its ``k``-th nearest other real row; a fake within any of these
    balls is precise. Recall is the same with the roles exchanged. Both grow with ``k`` and depend on n and m.
    """
    real, fake = _features(real=real, fake=fake, least=2)
    for name, x in {"real": real, "fake": fake}.items():
        _check_k(k, most=len(x) - 1, rows=f"other rows in {name}")
    real_radii = _nearest(real, real, k + 1)[0][:, -1]  # the nearest is the row itself, at distance 0
    fake_radii = _nearest(fake, fake, k + 1)[0][:, -1]
    precise, recalled = (torch.zeros(len(x), dtype=torch.bool) for x in (fake, real))
    for rows in _blocks(fake, width=len(real)):
        distances = _distances(fake[rows], real)
        precise[rows] = (distances <= real_radii).any(1)
        recalled |= (distances <= fake_radii[rows, None]).any(0)
    return PrecisionRecall(precise.double().mean().item(), recalled.double().mean().item())


# ---- coverage of classes and modes ----


def class_coverage(labels: Integer[Tensor, "n"], n_classes: int = 10) -> Float[Tensor, "n_classes"]:
    """The share of each class 0 … n_classes - 1 among the labels, on the CPU; the shares sum to 1."""
    whole = isinstance(labels, Tensor) and labels.dtype in INTEGERS
    if not whole or labels.ndim != 1 or len(labels) < 1:
        raise MetricError(f"labels are {_found(labels)}: expected whole numbers of shape (n,), n at least 1")
    labels = labels.cpu().long()
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise MetricError(f"labels hold {outside[0].item()}: expected 0 to {n_classes - 1}, or set n_classes")
    return labels.bincount(minlength=n_classes) / len(labels)


class ModeCoverage(NamedTuple):
    """``modes``: how many are covered. ``high_quality``: the share of samples that lie near some mode."""

    modes: int
    high_quality: float


def mode_coverage(
    samples: Float[Tensor, "n 2"],
    means: Float[Tensor, "k 2"],
    std: float,
    *,
    radius: float = 3.0,
    share: float = 0.1,
) -> ModeCoverage:
    """How many components of a mixture of k equal round Gaussians in the plane the samples reach.

    A sample is of high quality if it lies within ``radius`` standard deviations ``std`` of the nearest mean. A mode is
    covered if at least max(1, ``share`` n / k) such samples belong to it: a tenth of what a faithful model would put
    there, because a lone stray is no coverage. For the ring and grid made popular by Metz et al. (2017,
    arXiv:1611.02163), Lin et al. (2018, PacGAN, arXiv:1712.04086) take radius 3 too, but count a mode from its first
    such sample on, which is ``share=0``: a figure that grows with n.
    """
    samples, means = _features(samples=samples, means=means)
    for name, setting in {"std": std, "radius": radius}.items():
        if not 0 < setting < float("inf"):
            raise MetricError(f"{name} is {setting}: it must be above 0 and finite")
    if not 0 <= share <= 1:
        raise MetricError(f"share is {share}: it must lie in [0, 1]")
    distances, nearest = _distances(samples, means).min(1)
    high_quality = distances <= radius * std
    counts = nearest[high_quality].bincount(minlength=len(means))
    covered = counts >= max(1, share * len(samples) / len(means))
    return ModeCoverage(covered.sum().item(), high_quality.double().mean().item())


# ---- checks and blocks ----


def _blocks(x: Tensor, *, width: int) -> list[slice]:
    """The rows of ``x``, so many at a time that a matrix with ``width`` numbers for each stays small."""
    size = max(1, BLOCK // width)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _features(*, least: int = 1, **features: Tensor) -> list[Tensor]:
    """The features in float64 on the CPU, once they are known to be sound."""
    for name, x in features.items():
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] < 1 or not x.is_floating_point():
            remedy = "pictures become rows by images.flatten(1), whole numbers floats by .float()"
            raise MetricError(f"{name} is {_found(x)}: expected a tensor of floats of shape (n, d); {remedy}")
        if len(x) < least:
            raise MetricError(f"{name} has {len(x)} rows: at least {least} are needed")
        _check_finite(name, x)
    if len({x.shape[1] for x in features.values()}) > 1:
        found = " and ".join(f"{name} has {x.shape[1]}" for name, x in features.items())
        raise MetricError(f"{found} numbers a row: they must agree, so take both from the same network")
    return [_exact(x) for x in features.values()]


def _moments(**moments: Tensor) -> list[Tensor]:
    d = len(moments["mean_a"]) if isinstance(moments["mean_a"], Tensor) and moments["mean_a"].ndim == 1 else "d"
    for name, x in moments.items():
        shape = (d,) if name.startswith("mean") else (d, d)
        if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
            raise MetricError(f"{name} is {_found(x)}: expected a tensor of floats of shape {shape}")
        _check_finite(name, x)
        if x.ndim == 2 and (x - x.T).abs().max() > 1e-5 * x.abs().max():
            raise MetricError(f"{name} is not symmetric, as a covariance is")
    return [_exact(x) for x in moments.values()]


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()  # in this order: Apple's MPS has no float64


def _found(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def _check_finite(name: str, x: Tensor) -> None:
    if bad := (~x.isfinite()).sum().item():
        raise MetricError(f"{name}: {bad} of {x.numel()} numbers are NaN or infinite: did the model diverge?")


def _check_k(k: int, *, most: int, rows: str) -> None:
    if type(k) is not int or not 1 <= k <= most:
        raise MetricError(f"k is {k!r}: expected a whole number from 1 to {most}, for there are {most} {rows}")
