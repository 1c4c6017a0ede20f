"""Mixtures of Gaussians fitted by expectation-maximisation (Bishop 2006, PRML, section 9.2).

The axes are n samples, d dimensions and k components; densities are in nats. Covariances are full, (k, d, d), or
diagonal, the variances alone, (k, d): the number of axes tells which.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .runtime import CourseError, rng_for


class MixtureError(CourseError):
    """A mixture that cannot be fitted or used as asked."""


# ---- density ----


def gaussian_log_prob(
    x: Float[Tensor, "n d"],
    means: Float[Tensor, "k d"],
    cholesky: Float[Tensor, "k d d"] | Float[Tensor, "k d"],
) -> Float[Tensor, "n k"]:
    """log N(x | mean, covariance) in nats, for each sample and each component (PRML eq. 2.43).

    ``cholesky`` holds the lower factors L of the covariances L Lᵀ, (k, d, d), or the standard deviations, (k, d).
    """
    log_det = _diagonals(cholesky).log().sum(-1)  # half the log-determinant of the covariance
    return -0.5 * (_squared_distances(x, means, cholesky) + x.shape[1] * math.log(2 * math.pi)) - log_det


def _squared_distances(x: Tensor, means: Tensor, cholesky: Tensor) -> Tensor:
    """(x - mean)ᵀ covariance⁻¹ (x - mean), which is |z|² for z = L⁻¹ (x - mean): (n, k), stored as (k, n)."""
    (k, d), centre = means.shape, means.mean(0)  # numbers about a common centre keep their digits in a product
    squares, means = x.new_empty(k, len(x)), means - centre
    if cholesky.ndim == 3:
        identity = torch.eye(d, dtype=x.dtype, device=x.device)
        inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False)
        offsets, flat = inverse @ means[:, :, None], inverse.reshape(k * d, d)
        far = _lossy(offsets.square().sum((1, 2)), x.dtype)
        for rows in _blocks(x, means):
            y = (x[rows] - centre).T
            z = flat @ y - offsets.view(k * d, 1)
            squares[:, rows] = z.view(k, d, -1).square().sum(1)
            for j in far:
                squares[j, rows] = (inverse[j] @ (y - means[j, :, None])).square().sum(0)
        return squares.T
    precise = _precise(x)
    means, precisions = means.to(precise), cholesky.to(precise).square().reciprocal()
    constants = (means.square() * precisions).sum(1, keepdim=True)
    far = _lossy(constants[:, 0], precise)
    for rows in _blocks(x, means[:1]):  # multiplied out, (x - mean)² / variance is a matter of two matrix products
        y = x[rows].to(precise) - centre
        squares[:, rows] = (precisions @ y.square().T - 2 * (means * precisions) @ y.T + constants).clamp_min(0).to(x)
        for j in far:
            squares[j, rows] = ((y - means[j]) / cholesky[j]).square().sum(1).to(x)
    return squares.T


def _blocks(x: Tensor, means: Tensor) -> list[slice]:
    # All differences x - mean together, (k, d, n), can fill the memory; those of a block of samples fit the cache.
    size = max(256, 2**18 // means.numel())
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.device.type != "mps" else x.dtype


def _lossy(ratios: Tensor, dtype: torch.dtype) -> list[int]:
    """Where a difference of terms so many times as large as itself has lost about half of its digits."""
    return (ratios > torch.finfo(dtype).eps ** -0.45).nonzero().flatten().tolist()


def _diagonals(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1) if matrices.ndim == 3 else matrices


def _cholesky(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors (standard deviations of diagonal covariances), and which components have a sound one."""
    if covariances.ndim == 3:
        factors, info = torch.linalg.cholesky_ex(covariances)
    else:
        factors, info = covariances.sqrt(), torch.zeros_like(covariances[:, 0])
    # A squared pivot is the variance that the coordinates before leave to this one: none, if it is lost in rounding.
    rounding = 10 * torch.finfo(covariances.dtype).eps * _diagonals(covariances)
    return factors, (info == 0) & (_diagonals(factors).square() > rounding).all(-1)


# ---- E step ----


def e_step(
    x: Float[Tensor, "n d"],
    weights: Float[Tensor, "k"],
    means: Float[Tensor, "k d"],
    covariances: Float[Tensor, "k d d"] | Float[Tensor, "k d"],
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n"]]:
    """The responsibilities p(component | x), and log p(x) in nats under the mixture.

    A component of weight 0 is legal and takes no responsibility. Raises ``MixtureError`` if a covariance is not
    positive definite.
    """
    cholesky, sound = _cholesky(covariances)
    _refuse(~sound, "has a covariance that is not positive definite: give one that is")
    log_joint = weights.log() + gaussian_log_prob(x, means, cholesky)
    responsibilities, log_prob = _softmax_and_logsumexp(log_joint)  # (9.23), and (9.28) sample by sample
    return responsibilities, log_prob


def _softmax_and_logsumexp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both over the columns, from the same exponentials; along the rows of memory, as ``_squared_distances`` stores."""
    # The largest exponential is 1: none overflows, and not all vanish, unless all are exp(-inf).
    top = x.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    terms = F.threshold((x - top).exp(), torch.finfo(x.dtype).tiny, 0.0)  # numbers below it would slow all products
    total = terms.sum(1, keepdim=True)
    return terms / total, (top + total.log())[:, 0]


# ---- M step ----


def m_step(
    x: Float[Tensor, "n d"],
    responsibilities: Float[Tensor, "n k"],
    *,
    covariance: str = "full",
    reg_covar: float = 0.0,
) -> tuple[Float[Tensor, "k"], Float[Tensor, "k d"], Float[Tensor, "k d d"] | Float[Tensor, "k d"]]:
    """The weights, means and covariances that maximise the expected complete log-likelihood (PRML eq. 9.40).

    ``covariance`` is ``"full"`` or ``"diag"``. ``reg_covar`` is added to every variance, in squared units of x; above
    0 the result is no longer that maximum. Raises ``MixtureError`` if a component is empty, or has collapsed onto so
    few distinct samples that its covariance is singular.
    """
    _check_covariance(covariance)
    counts = responsibilities.sum(0)  # N_k (9.27)
    # Less than the rounding error of one sample is nobody: the mean would be a quotient of noise.
    _refuse(counts < torch.finfo(x.dtype).eps, "is empty, it has no samples: use fewer components or another start")
    weights = counts / len(x)  # (9.26)
    means = responsibilities.T @ x / counts[:, None]  # (9.24)

    full = covariance == "full"
    scatter = _scatter(x, responsibilities, means, full, reg_covar)
    covariances = scatter / (counts[:, None, None] if full else counts[:, None])  # (9.25)
    _diagonals(covariances).add_(reg_covar)

    # Copies of one point show a spread too, by rounding: a few eps of where they lie.
    spread = _diagonals(covariances).sqrt() > 10 * torch.finfo(x.dtype).eps * means.abs()
    sound = _cholesky(covariances)[1] & spread.all(-1)
    remedy = f"raise reg_covar (now {reg_covar:g}) or use fewer components"
    _refuse(~sound, f"has collapsed, its covariance is singular: {remedy}")
    return weights, means, covariances


def _scatter(x: Tensor, responsibilities: Tensor, means: Tensor, full: bool, floor: float) -> Tensor:
    """The sum of responsibility (x - mean) (x - mean)ᵀ over the samples, (k, d, d), or its diagonal, (k, d)."""
    scatter = 0.0
    if full:
        for rows in _blocks(x, means):
            y = responsibilities[rows].T.sqrt()[:, None] * (x[rows].T.contiguous() - means[:, :, None])
            scatter = scatter + y @ y.mT  # which has no negative eigenvalue
        return scatter
    # Multiplied out, as the squared distances are; the sums are taken anew, for the means are rounded to x's type.
    centre, precise, sums = means.mean(0), _precise(x), 0.0
    for rows in _blocks(x, means[:1]):
        weights, y = responsibilities[rows].T.to(precise), x[rows].to(precise) - centre
        sums, scatter = sums + weights @ y, scatter + weights @ y.square()
    counts = responsibilities.sum(0, dtype=precise)[:, None]
    shift = sums.square() / counts
    scatter = scatter - shift
    left = (scatter + counts * floor).clamp_min(torch.finfo(precise).tiny)
    for j in _lossy((shift / left).amax(1), precise):
        scatter[j] = responsibilities[:, j].to(precise) @ (x - means[j]).to(precise).square()
    return scatter.to(x.dtype)


# ---- the estimator ----


class GaussianMixture:
    """A mixture of ``n_components`` Gaussians, fitted by EM. Names and meanings follow scikit-learn's class.

    ``covariance`` is ``"full"`` or ``"diag"``. Without ``init``, a triple (weights, means, covariances), EM starts from
    k-means++ centres (Arthur and Vassilvitskii 2007), drawn from ``seed``; of ``n_init`` such starts the best final
    log-likelihood wins, and one that collapses is passed over unless all do. A start takes at most ``max_iter`` M
    steps, and stops once the mean log-likelihood changes by less than ``tol`` nats per sample. ``reg_covar``, in
    squared units of x, is added to every variance. With this floor the M step no longer maximises, and EM is no longer
    exactly monotone: the log-likelihood can fall.

    ``fit`` learns ``weights_`` (k,), ``means_`` (k, d), ``covariances_`` (k, d, d) or (k, d), ``converged_`` and
    ``log_likelihoods_``: floats, the mean log-likelihood per sample in nats before each M step, and last that of the
    final parameters, so the last equals ``log_prob(x).mean()``.

    Samples are tensors (n, d) of float32 or float64 on any device. The learned tensors are of the same kind, and later
    samples must be too. A bad argument, a component left empty and a collapsed one raise ``MixtureError``.
    """

    def __init__(
        self,
        n_components: int,
        *,
        covariance: str = "full",
        n_init: int = 1,
        init: tuple[Tensor, Tensor, Tensor] | None = None,
        max_iter: int = 200,
        tol: float = 1e-4,
        reg_covar: float = 1e-6,
        seed: int = 0,
    ) -> None:
        _check_covariance(covariance)
        self.n_components, self.covariance = n_components, covariance
        self.n_init, self.init, self.seed = n_init, init, seed
        self.max_iter, self.tol, self.reg_covar = max_iter, tol, reg_covar
        for name, least in {"n_components": 1, "n_init": 1, "max_iter": 0, "tol": 0, "reg_covar": 0}.items():
            if not getattr(self, name) >= least:
                raise MixtureError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    @torch.no_grad()
    def fit(self, x: Tensor) -> "GaussianMixture":
        """Fit the mixture to samples (n, d), n at least ``n_components`` and 2; returns itself."""
        _check_samples(x, at_least=max(2, self.n_components))
        runs, collapse = [], None
        for i in range(self.n_init if self.init is None else 1):
            try:
                start = (
                    self._drawn_start(x, rng_for(self.seed, "gmm", i)) if self.init is None else self._given_start(x)
                )
                runs.append(self._em(x, *start))
            except MixtureError as error:  # of several starts one may collapse; the others go on
                collapse = error
        if not runs:
            raise collapse
        best = max(runs, key=lambda run: run[1][-1])
        (self.weights_, self.means_, self.covariances_), self.log_likelihoods_, self.converged_ = best
        return self

    def _em(self, x: Tensor, *parameters: Tensor) -> tuple[tuple[Tensor, ...], list[float], bool]:
        log_likelihoods: list[float] = []
        while True:
            responsibilities, log_prob = e_step(x, *parameters)
            log_likelihoods.append(log_prob.mean().item())
            converged = len(log_likelihoods) > 1 and abs(log_likelihoods[-1] - log_likelihoods[-2]) < self.tol
            if converged or len(log_likelihoods) > self.max_iter:
                return parameters, log_likelihoods, converged
            parameters = m_step(x, responsibilities, covariance=self.covariance, reg_covar=self.reg_covar)

    def _drawn_start(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """k-means++: each next centre is a sample, drawn in proportion to its squared distance to the nearest."""
        chosen = torch.randint(len(x), (), generator=rng)
        distances = [(x - x[chosen]).square().sum(1)]
        while len(distances) < self.n_components:
            # Drawn on the CPU, so that every device starts from the same centres.
            cumulative = torch.stack(distances).amin(0).cpu().double().cumsum(0)
            draw = cumulative[-1] * torch.rand((), generator=rng, dtype=torch.float64)
            chosen = torch.searchsorted(cumulative, draw, right=True).clamp(max=len(x) - 1)
            distances.append((x - x[chosen]).square().sum(1))
        nearest = torch.stack(distances).argmin(0)
        hard = F.one_hot(nearest, self.n_components).to(x.dtype)
        return m_step(x, hard, covariance=self.covariance, reg_covar=self.reg_covar)

    def _given_start(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, d = self.n_components, x.shape[1]
        shapes = {"weights": (k,), "means": (k, d), "covariances": (k, d, d) if self.covariance == "full" else (k, d)}
        start = weights, _, covariances = tuple(torch.as_tensor(parameter).to(x) for parameter in self.init)
        for (name, shape), parameter in zip(shapes.items(), start, strict=True):
            if parameter.shape != shape or not parameter.isfinite().all():
                found = f"shape {tuple(parameter.shape)}" if parameter.shape != shape else "NaN or infinity"
                raise MixtureError(f"the {name} of init have {found}: give finite numbers of shape {shape}")
        if weights.min() < 0 or abs(weights.sum().item() - 1) > 1e-5:
            raise MixtureError(f"the weights of init are {weights.tolist()}: give numbers >= 0 that sum to 1")
        if self.covariance == "full" and (covariances - covariances.mT).abs().max() > 1e-5 * covariances.abs().max():
            raise MixtureError("the covariances of init are not symmetric: give symmetric matrices")
        return start  # the first E step refuses a covariance that is not positive definite

    def log_prob(self, x: Tensor) -> Float[Tensor, "n"]:
        """log p(x) in nats, for samples (n, d)."""
        return self._e_step(x)[1]

    def responsibilities(self, x: Tensor) -> Float[Tensor, "n k"]:
        """p(component | x), for samples (n, d)."""
        return self._e_step(x)[0]

    def _e_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = self._fitted().means_
        _check_samples(x, at_least=1)
        if x.shape[1] != means.shape[1]:
            raise MixtureError(f"x has {x.shape[1]} dimensions: the mixture was fitted to {means.shape[1]}")
        if (x.dtype, x.device) != (means.dtype, means.device):
            expected = f"the mixture was fitted to {means.dtype} on {means.device}, so pass x.to(mixture.means_)"
            raise MixtureError(f"x is {x.dtype} on {x.device}: {expected}")
        return e_step(x, self.weights_, means, self.covariances_)

    def _fitted(self) -> "GaussianMixture":
        if not hasattr(self, "means_"):
            raise MixtureError("the mixture is not fitted yet: call fit(x) first")
        return self

    def sample(self, n: int, rng: torch.Generator) -> Float[Tensor, "n d"]:
        """``n`` samples. ``rng`` may live on another device than the mixture, and decides the samples alone."""
        self._fitted()
        if n < 1:
            raise MixtureError(f"n is {n}: ask for at least 1 sample")
        components = torch.multinomial(self.weights_.to(rng.device), n, replacement=True, generator=rng)
        noise = torch.randn(n, self.means_.shape[1], generator=rng, device=rng.device, dtype=self.means_.dtype)
        components, x = components.to(self.means_.device), noise.to(self.means_.device)
        cholesky, _ = _cholesky(self.covariances_)
        for j, (mean, factor) in enumerate(zip(self.means_, cholesky, strict=True)):
            mine = components == j
            x[mine] = mean + (x[mine] @ factor.mT if factor.ndim == 2 else x[mine] * factor)
        return x

    @property
    def n_parameters(self) -> int:
        """How many numbers are free: weights (they sum to one), means and covariances (they are symmetric)."""
        k, d = self._fitted().means_.shape
        return (k - 1) + k * d + k * (d * (d + 1) // 2 if self.covariance == "full" else d)

    def bic(self, x: Tensor) -> float:
        """Bayesian information criterion of samples (n, d): -2 log p(x) + p log n; lower is better (Schwarz 1978)."""
        return -2 * self.log_prob(x).cpu().double().sum().item() + self.n_parameters * math.log(len(x))


def _refuse(bad: Tensor, what: str) -> None:
    if bad.any():
        raise MixtureError(f"component {bad.nonzero()[0].item()} {what}")


def _check_covariance(name: str) -> None:
    if name not in ("full", "diag"):
        raise MixtureError(f"there is no covariance {name!r}: choose 'full' or 'diag'")


def _check_samples(x: Tensor, *, at_least: int) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise MixtureError(f"x is {found}: expected a tensor of float32 or float64")
    if x.ndim != 2 or x.shape[1] < 1:
        raise MixtureError(f"x has shape {tuple(x.shape)}: expected (n, d), one sample a row")
    if len(x) < at_least:
        raise MixtureError(f"x has {len(x)} rows: at least {at_least} are needed")
    if not x.sum().isfinite() and not x.isfinite().all():  # the sum is quick, but may overflow
        raise MixtureError("x holds NaN or infinity: remove or replace those rows")
