"""Mixtures of Gaussians: the mathematics of EM, agreement with independent implementations, and every refusal."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as ScikitMixture
from torch import distributions as D
from torch.nn import functional as F

from aigc_course.datasets import toy_2d
from aigc_course.gmm import GaussianMixture, MixtureError, e_step, gaussian_log_prob, m_step
from aigc_course.runtime import CourseError, rng_for

COVARIANCES = ("full", "diag")
both = pytest.mark.parametrize("covariance", COVARIANCES)


pytestmark = pytest.mark.usefixtures("one_thread")


def random_parameters(k, d, covariance, rng, *, spread=2.0):
    weights = torch.rand(k, generator=rng, dtype=torch.float64) + 0.2
    means = spread * torch.randn(k, d, generator=rng, dtype=torch.float64)
    factors = torch.randn(k, d, d, generator=rng, dtype=torch.float64)
    covariances = factors @ factors.mT / d + 0.5 * torch.eye(d, dtype=torch.float64)
    if covariance == "diag":
        covariances = covariances.diagonal(dim1=1, dim2=2).clone()
    return weights / weights.sum(), means, covariances


def random_data(n, d, rng, *, blobs=3):
    """Blobs of unequal scale with a common correlation: far from singular."""
    centres = 3 * torch.randn(blobs, d, generator=rng, dtype=torch.float64)
    mixing = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=rng, dtype=torch.float64) / d**0.5
    noise = torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing
    return centres[torch.randint(blobs, (n,), generator=rng)] + noise


def as_matrices(covariances):
    return covariances if covariances.ndim == 3 else torch.diag_embed(covariances)


def reference_mixture(weights, means, covariances):
    components = D.MultivariateNormal(means, covariance_matrix=as_matrices(covariances))
    return D.MixtureSameFamily(D.Categorical(weights), components)


def expected_complete(x, responsibilities, weights, means, covariances):
    """PRML eq. 9.40 by the road of torch.distributions."""
    log_normal = D.MultivariateNormal(means, covariance_matrix=as_matrices(covariances)).log_prob(x[:, None])
    return (responsibilities * (weights.log() + log_normal)).sum()


# ---- densities and the E step ----


@both
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (7, 3, 2), (700, 20, 40)])
def test_densities_agree_with_torch_distributions(n, d, k, covariance):
    rng = rng_for("densities", n, d, k)
    parameters = weights, means, covariances = random_parameters(k, d, covariance, rng)
    x = 3 * torch.randn(n, d, generator=rng, dtype=torch.float64)
    factors = torch.linalg.cholesky(covariances) if covariance == "full" else covariances.sqrt()
    reference = reference_mixture(*parameters)
    torch.testing.assert_close(
        gaussian_log_prob(x, means, factors), reference.component_distribution.log_prob(x[:, None]), rtol=1e-11, atol=0
    )
    responsibilities, log_prob = e_step(x, *parameters)
    torch.testing.assert_close(log_prob, reference.log_prob(x), rtol=1e-11, atol=0.0)
    bayes = weights * reference.component_distribution.log_prob(x[:, None]).exp()
    torch.testing.assert_close(responsibilities, bayes / bayes.sum(1, keepdim=True), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(responsibilities.sum(1), torch.ones(n, dtype=torch.float64), rtol=1e-14, atol=0.0)


@both
def test_components_may_be_renumbered(covariance):
    rng = rng_for("permutation")
    parameters = random_parameters(4, 3, covariance, rng)
    x, order = torch.randn(50, 3, generator=rng, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    responsibilities, log_prob = e_step(x, *parameters)
    permuted, same = e_step(x, *(parameter[order] for parameter in parameters))
    torch.testing.assert_close(permuted, responsibilities[:, order])
    torch.testing.assert_close(same, log_prob)
    for new, old in zip(
        m_step(x, permuted, covariance=covariance),
        m_step(x, responsibilities, covariance=covariance),
        strict=True,
    ):
        torch.testing.assert_close(new, old[order])


@both
def test_far_points_stay_finite_in_float32(covariance):
    parameters = [p.float() for p in random_parameters(3, 2, covariance, rng_for("far"))]
    x = torch.tensor([[1e3, -1e3], [1e6, 1e6], [-1e9, 3e8], [0.0, 0.0]])
    responsibilities, log_prob = e_step(x, *parameters)
    assert log_prob.isfinite().all()
    torch.testing.assert_close(responsibilities.sum(1), torch.ones(4))


def test_a_weight_of_zero_is_legal():
    weights, means, covariances = random_parameters(3, 2, "full", rng_for("zero"))
    x = torch.randn(30, 2, generator=rng_for("zero x"), dtype=torch.float64)
    some = torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64)
    responsibilities, log_prob = e_step(x, some, means, covariances)
    without, same = e_step(x, some[[0, 2]], means[[0, 2]], covariances[[0, 2]])
    assert (responsibilities[:, 1] == 0).all()
    torch.testing.assert_close(responsibilities[:, [0, 2]], without)
    torch.testing.assert_close(log_prob, same)


# ---- the theory of EM ----


@both
def test_the_bound_and_the_gap_add_up(covariance):
    """log p(x) = F(q) + KL(q || posterior) for any q (PRML eq. 9.70), and F is nowhere above log p."""
    rng = rng_for("bound")
    parameters = weights, means, covariances = random_parameters(4, 3, covariance, rng)
    x = 2 * torch.randn(40, 3, generator=rng, dtype=torch.float64)
    posterior, log_prob = e_step(x, *parameters)
    log_joint = weights.log() + D.MultivariateNormal(means, as_matrices(covariances)).log_prob(x[:, None])
    for _ in range(5):
        q = torch.randn(40, 4, generator=rng, dtype=torch.float64).softmax(1)
        free_energy = (q * (log_joint - q.log())).sum(1)
        kl = (q * (q.log() - posterior.log())).sum(1)
        torch.testing.assert_close(free_energy + kl, log_prob, rtol=0.0, atol=1e-10)
        assert (free_energy < log_prob).all()


@both
def test_the_m_step_is_the_maximum(covariance):
    """At the M step's parameters the expected complete log-likelihood has no slope, and all around it is lower."""
    rng = rng_for("maximum")
    x = random_data(200, 3, rng)
    responsibilities = torch.randn(200, 3, generator=rng, dtype=torch.float64).softmax(1)
    weights, means, covariances = m_step(x, responsibilities, covariance=covariance)
    best = expected_complete(x, responsibilities, weights, means, covariances)

    logits = weights.log().requires_grad_()
    leaves = (logits, means.clone().requires_grad_(), covariances.clone().requires_grad_())
    value = expected_complete(x, responsibilities, logits.softmax(0), *leaves[1:])
    for gradient in torch.autograd.grad(value, leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-8)

    for size, _ in itertools.product((0.01, 0.1), range(10)):
        noise = [size * torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in (weights, means, covariances)]
        tilt = (1 + noise[2]).abs() if covariance == "diag" else torch.eye(3) + noise[2]
        moved = covariances * tilt if covariance == "diag" else tilt @ covariances @ tilt.mT
        for other in (
            ((logits.detach() + noise[0]).softmax(0), means, covariances),
            (weights, means + noise[1], covariances),
            (weights, means, moved),
        ):
            assert expected_complete(x, responsibilities, *other) < best


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(30, 200),
    d=st.integers(1, 5),
    k=st.integers(1, 4),
    blobs=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_em_never_lowers_the_likelihood(covariance, n, d, k, blobs, seed):
    x = random_data(n, d, rng_for("monotone", seed), blobs=blobs)
    mixture = GaussianMixture(k, covariance=covariance, reg_covar=0.0, tol=0.0, max_iter=15, seed=seed)
    try:
        trace = np.array(mixture.fit(x).log_likelihoods_)
    except MixtureError:
        event("collapsed")
        assume(False)
    event("ran")
    assert len(trace) == 16
    assert (np.diff(trace) >= -1e-10 * np.abs(trace[1:])).all()


def test_the_floor_can_make_the_likelihood_fall():
    """From the maximum itself, a variance of 0.01, a floor of 0.1 leads down; from k-means++ starts, it happens too."""
    x = 0.1 * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    start = (torch.ones(1, dtype=torch.float64), x.mean(0, keepdim=True), torch.full((1, 1), 0.01, dtype=torch.float64))
    trace = GaussianMixture(1, covariance="diag", init=start, reg_covar=0.1, max_iter=1).fit(x).log_likelihoods_
    # The mean log-likelihood at variance v is -(log(2 pi v) + 0.01 / v) / 2: here v goes from 0.01 to 0.11.
    assert trace[1] - trace[0] == pytest.approx(-(math.log(11) + 1 / 11 - 1) / 2, rel=1e-12)

    rng = torch.Generator().manual_seed(1)
    wide, narrow = (torch.randn(20, 1, generator=rng, dtype=torch.float64) for _ in range(2))
    x = torch.cat([wide, 5 + 0.1 * narrow])
    falling = GaussianMixture(2, reg_covar=1.0, tol=0.0, max_iter=30).fit(x).log_likelihoods_
    rising = GaussianMixture(2, reg_covar=0.0, tol=0.0, max_iter=30).fit(x).log_likelihoods_
    assert np.diff(falling).min() == pytest.approx(-0.0201, abs=1e-4)
    assert np.diff(rising).min() > -1e-12


# ---- fitting ----


@both
@pytest.mark.parametrize("seed", range(5))
def test_separated_components_are_recovered(covariance, seed):
    truth = weights, means, covariances = random_parameters(3, 2, covariance, rng_for("truth", seed), spread=1.0)
    means += 12 * torch.tensor([[0, 0], [1, 0], [0, 1]])
    torch_rng = rng_for("separated", seed)
    labels = torch.multinomial(weights, 6000, replacement=True, generator=torch_rng)
    noise = torch.randn(6000, 2, 1, generator=torch_rng, dtype=torch.float64)
    x = means[labels] + (torch.linalg.cholesky(as_matrices(covariances))[labels] @ noise).squeeze(2)
    mixture = GaussianMixture(3, covariance=covariance, n_init=3, seed=seed).fit(x)
    order = torch.cdist(means, mixture.means_).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert mixture.converged_
    learned = (mixture.weights_, mixture.means_, mixture.covariances_)
    # 3000 samples of a variance of about 1: standard errors near 0.03.
    for found, expected, atol in zip(learned, truth, (0.03, 0.15, 0.25), strict=True):
        torch.testing.assert_close(found[order], expected, rtol=0.0, atol=atol)


@both
@pytest.mark.parametrize("reg_covar", [0.0, 0.05])
def test_em_agrees_with_scikit_learn(covariance, reg_covar):
    rng = rng_for("scikit")
    x = random_data(400, 4, rng)
    start = weights, means, covariances = random_parameters(3, 4, covariance, rng)
    ours = GaussianMixture(3, covariance=covariance, init=start, max_iter=12, tol=0.0, reg_covar=reg_covar).fit(x)
    theirs = ScikitMixture(
        3,
        covariance_type=covariance,
        weights_init=weights.numpy(),
        means_init=means.numpy(),
        precisions_init=(torch.linalg.inv(covariances) if covariance == "full" else 1 / covariances).numpy(),
        max_iter=12,
        tol=0.0,
        reg_covar=reg_covar,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs.fit(x.numpy())
    assert len(ours.log_likelihoods_) == 13
    assert not ours.converged_
    assert ours.log_likelihoods_[-1] == pytest.approx(theirs.score(x.numpy()), rel=1e-8)
    np.testing.assert_allclose(ours.weights_, theirs.weights_, rtol=1e-6)
    np.testing.assert_allclose(ours.means_, theirs.means_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours.covariances_, theirs.covariances_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours.responsibilities(x), theirs.predict_proba(x.numpy()), atol=1e-7)
    assert ours.n_parameters == theirs._n_parameters()
    assert ours.bic(x) == pytest.approx(theirs.bic(x.numpy()), rel=1e-8)


@both
@pytest.mark.parametrize("change", ["shift", "scale", "rotation"])
def test_em_follows_a_change_of_coordinates(covariance, change):
    rng = rng_for("invariance")
    d, s = 3, 250.0
    x = random_data(300, d, rng)
    weights, means, covariances = random_parameters(3, d, covariance, rng)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64)).Q
    if change == "rotation" and covariance == "diag":
        pytest.skip("diagonal covariances do not rotate")
    moves, spreads, offset = {
        "shift": (lambda v: v + 1e4, lambda c: c, 0.0),
        "scale": (lambda v: s * v, lambda c: s**2 * c, -d * math.log(s)),
        "rotation": (lambda v: v @ rotation.T, lambda c: rotation @ c @ rotation.T, 0.0),
    }[change]
    options = {"covariance": covariance, "reg_covar": 0.0, "tol": 0.0, "max_iter": 10}
    here = GaussianMixture(3, init=(weights, means, covariances), **options).fit(x)
    there = GaussianMixture(3, init=(weights, moves(means), spreads(covariances)), **options).fit(moves(x))
    torch.testing.assert_close(there.log_prob(moves(x)), here.log_prob(x) + offset, rtol=0.0, atol=1e-7)
    torch.testing.assert_close(there.responsibilities(moves(x)), here.responsibilities(x), rtol=0.0, atol=1e-7)
    np.testing.assert_allclose(there.log_likelihoods_, np.array(here.log_likelihoods_) + offset, atol=1e-8)


@both
def test_the_trace_ends_at_the_final_parameters(covariance):
    x = random_data(300, 3, rng_for("trace"))
    for max_iter, converged in ((0, False), (3, False), (500, True)):
        mixture = GaussianMixture(2, covariance=covariance, max_iter=max_iter, tol=1e-4).fit(x)
        trace = mixture.log_likelihoods_
        assert all(type(value) is float for value in trace)
        assert trace[-1] == pytest.approx(mixture.log_prob(x).mean().item(), rel=1e-12)
        assert mixture.converged_ is converged
        assert len(trace) == max_iter + 1 or converged
    assert abs(trace[-1] - trace[-2]) < 1e-4 <= abs(trace[-2] - trace[-3])


def test_steps_by_hand_are_the_fit():
    x = random_data(200, 2, rng_for("by hand"))
    parameters = start = random_parameters(3, 2, "full", rng_for("start"))
    for _ in range(7):
        responsibilities, _ = e_step(x, *parameters)
        parameters = m_step(x, responsibilities, reg_covar=1e-3)
    mixture = GaussianMixture(3, init=start, max_iter=7, tol=0.0, reg_covar=1e-3).fit(x)
    for learned, expected in zip((mixture.weights_, mixture.means_, mixture.covariances_), parameters, strict=True):
        torch.testing.assert_close(learned, expected, rtol=0.0, atol=0.0)


def test_a_seed_fixes_the_fit_and_the_best_of_several_starts_wins():
    x, options = random_data(150, 2, rng_for("starts"), blobs=6), {"max_iter": 20, "seed": 3}
    fits = {n: GaussianMixture(5, n_init=n, **options).fit(x).log_likelihoods_ for n in (1, 2, 4, 8)}
    finals = [fit[-1] for fit in fits.values()]
    assert finals == sorted(finals)
    assert finals[-1] > finals[0]
    assert GaussianMixture(5, n_init=8, **options).fit(x).log_likelihoods_ == fits[8]
    starts = {GaussianMixture(5, seed=seed, max_iter=0).fit(x).log_likelihoods_[0] for seed in range(5)}
    assert len(starts) > 1


@both
def test_float32_agrees_with_float64(covariance):
    """Scales from 1e-2 to 1e2, as principal components have, and a mean far from 0."""
    rng = rng_for("float32")
    x = random_data(1000, 5, rng) * torch.logspace(2, -2, 5, dtype=torch.float64) + 10
    exact = GaussianMixture(3, covariance=covariance, max_iter=20, tol=0.0).fit(x)
    rough = GaussianMixture(3, covariance=covariance, max_iter=20, tol=0.0).fit(x.float())
    assert rough.means_.dtype == torch.float32
    assert rough.log_likelihoods_[-1] == pytest.approx(exact.log_likelihoods_[-1], abs=2e-3)
    torch.testing.assert_close(rough.means_.double(), exact.means_, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@both
def test_cuda_agrees_with_the_cpu(covariance):
    x = random_data(2000, 4, rng_for("cuda"))
    here = GaussianMixture(3, covariance=covariance, max_iter=10, tol=0.0).fit(x)
    there = GaussianMixture(3, covariance=covariance, max_iter=10, tol=0.0).fit(x.cuda())
    assert there.means_.is_cuda
    np.testing.assert_allclose(there.log_likelihoods_, here.log_likelihoods_, rtol=1e-9)
    torch.testing.assert_close(there.sample(50, rng_for(1)).cpu(), here.sample(50, rng_for(1)), rtol=1e-6, atol=1e-6)
    with pytest.raises(MixtureError, match="pass x.to"):
        there.log_prob(x)


# ---- samples ----


@both
def test_samples_have_the_moments_of_the_mixture(covariance):
    weights, means, covariances = start = random_parameters(3, 2, covariance, rng_for("moments"))
    mixture = GaussianMixture(3, covariance=covariance, init=start, max_iter=0).fit(means)
    n = 40_000
    x = mixture.sample(n, rng_for("draw"))
    mean = weights @ means
    second = torch.einsum("k,kij->ij", weights, as_matrices(covariances) + means[:, :, None] * means[:, None, :])
    products = x[:, :, None] * x[:, None, :]
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / n**0.5).all()
    assert ((products.mean(0) - second).abs() < 4 * products.std(0) / n**0.5).all()


def test_sampling_is_a_function_of_its_generator():
    mixture = GaussianMixture(2).fit(random_data(100, 2, rng_for("rng")))
    before = torch.get_rng_state()
    first, same, other = (mixture.sample(20, rng_for("sample", i)) for i in (0, 0, 1))
    GaussianMixture(2, n_init=2).fit(first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# ---- refusals ----


@both
def test_a_collapse_is_named_and_a_floor_mends_it(covariance):
    copies = torch.tensor([[0.1, 0.3], [5.3, -5.7]], dtype=torch.float64).repeat(40, 1)
    with pytest.raises(MixtureError, match=r"component \d has collapsed.*raise reg_covar \(now 0\) or use fewer"):
        GaussianMixture(2, covariance=covariance, reg_covar=0.0).fit(copies)
    mixture = GaussianMixture(2, covariance=covariance, reg_covar=1e-3).fit(copies)
    torch.testing.assert_close(mixture.means_.sort(0).values, torch.tensor([[0.1, -5.7], [5.3, 0.3]]).double())
    assert math.isfinite(mixture.log_likelihoods_[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_on_a_line_are_a_collapse_whatever_rounding_leaves(dtype):
    for seed in range(20):
        rng = rng_for("line", seed)
        t, direction = (
            torch.randn(50, 1, generator=rng, dtype=dtype),
            torch.rand(1, 2, generator=rng, dtype=dtype) + 0.5,
        )
        with pytest.raises(MixtureError, match="component 0 has collapsed"):
            m_step(t * direction, torch.ones(50, 1, dtype=dtype))


def test_a_collapse_on_the_way_names_its_component():
    """Component 1 starts narrow at an outlier among others, and EM shrinks it onto that sample."""
    x = torch.cat([torch.randn(30, 1, generator=rng_for("outlier"), dtype=torch.float64), torch.tensor([[7.7]])])
    start = (torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [7.0]]), torch.tensor([[1.0], [0.5]]))
    with pytest.raises(MixtureError, match="component 1 has collapsed"):
        GaussianMixture(2, covariance="diag", init=start, reg_covar=0.0).fit(x)
    assert GaussianMixture(2, covariance="diag", init=start, reg_covar=1e-4).fit(x).converged_


def test_an_empty_component_is_named():
    x = torch.randn(10, 2, generator=rng_for("empty"))
    with pytest.raises(MixtureError, match="component 1 is empty"):
        m_step(x, torch.tensor([[1.0, 0.0]]).expand(10, 2))
    with pytest.raises(MixtureError, match="component 2 is empty"):
        GaussianMixture(3).fit(torch.tensor([[0.0], [1.0]]).repeat(9, 1))


def grid(n=12, d=2, **kind):
    return torch.randn(n, d, generator=rng_for("grid"), **kind)


def with_init(weights=(0.5, 0.5), means=((0.0, 0.0), (1.0, 1.0)), covariances=None, covariance="full"):
    if covariances is None:
        covariances = torch.eye(2).repeat(2, 1, 1)
    init = (torch.tensor(weights), torch.tensor(means), covariances)
    return lambda: GaussianMixture(2, init=init, covariance=covariance).fit(grid())


REFUSED = {
    "nan": (lambda: GaussianMixture(2).fit(grid() / torch.tensor([1.0, 0.0]) * 0), "NaN or infinity"),
    "infinity": (lambda: GaussianMixture(2).fit(grid() / 0), "NaN or infinity"),
    "integers": (lambda: GaussianMixture(2).fit(grid().long()), "torch.int64: expected a tensor of float32"),
    "half": (lambda: GaussianMixture(2).fit(grid().half()), "torch.float16"),
    "vector": (lambda: GaussianMixture(2).fit(grid()[0]), r"shape \(2,\): expected \(n, d\)"),
    "images": (lambda: GaussianMixture(2).fit(grid()[None]), r"shape \(1, 12, 2\)"),
    "no columns": (lambda: GaussianMixture(2).fit(torch.zeros(5, 0)), r"shape \(5, 0\)"),
    "few rows": (lambda: GaussianMixture(13).fit(grid()), "12 rows: at least 13"),
    "one row": (lambda: GaussianMixture(1).fit(grid(1)), "1 rows: at least 2"),
    "no components": (lambda: GaussianMixture(0), "n_components is 0: it must be at least 1"),
    "no starts": (lambda: GaussianMixture(1, n_init=0), "n_init is 0"),
    "tolerance": (lambda: GaussianMixture(1, tol=-1.0), "tol is -1.0"),
    "negative floor": (lambda: GaussianMixture(1, reg_covar=-1e-6), "reg_covar is -1e-06"),
    "covariance name": (lambda: GaussianMixture(2, covariance="tied"), "no covariance 'tied': choose 'full' or 'diag'"),
    "m_step's name": (lambda: m_step(grid(), torch.ones(12, 1), covariance="diagonal"), "no covariance 'diagonal'"),
    "log_prob first": (lambda: GaussianMixture(2).log_prob(grid()), "call fit"),
    "responsibilities first": (lambda: GaussianMixture(2).responsibilities(grid()), "call fit"),
    "sample first": (lambda: GaussianMixture(2).sample(3, rng_for(0)), "call fit"),
    "bic first": (lambda: GaussianMixture(2).bic(grid()), "call fit"),
    "n_parameters first": (lambda: GaussianMixture(2).n_parameters, "call fit"),
    "width": (lambda: GaussianMixture(1).fit(grid()).log_prob(grid(d=3)), "3 dimensions: .* fitted to 2"),
    "dtype": (lambda: GaussianMixture(1).fit(grid()).log_prob(grid().double()), "float64 on cpu.*x.to.mixture.means_"),
    "nan later": (lambda: GaussianMixture(1).fit(grid()).bic(grid() / 0), "NaN or infinity"),
    "no samples": (lambda: GaussianMixture(1).fit(grid()).sample(0, rng_for(0)), "n is 0"),
    "init weights": (with_init(weights=(0.5, 0.6)), "sum to 1"),
    "init negative": (with_init(weights=(1.5, -0.5)), "numbers >= 0"),
    "init weights' shape": (with_init(weights=(0.2, 0.3, 0.5)), r"weights of init have shape \(3,\)"),
    "init means' shape": (with_init(means=((0.0,), (1.0,))), r"means of init have shape \(2, 1\): .*\(2, 2\)"),
    "init means' nan": (with_init(means=((0.0, math.nan), (1.0, 1.0))), "means of init have NaN"),
    "init variances": (with_init(covariances=torch.ones(2, 2)), r"covariances of init have shape \(2, 2\)"),
    "init matrices": (with_init(covariance="diag"), r"covariances of init have shape \(2, 2, 2\)"),
    "init indefinite": (
        with_init(covariances=torch.stack([torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])])),
        "component 1 has a covariance that is not positive definite",
    ),
    "init singular": (with_init(covariances=torch.ones(2, 2, 2)), "component 0 has a covariance"),
    "init negative variance": (
        with_init(covariances=torch.tensor([[1.0, 1.0], [1.0, -1.0]]), covariance="diag"),
        "component 1 has a covariance",
    ),
    "init skewed": (with_init(covariances=torch.tensor([[1.0, 0.5], [0.0, 1.0]]).repeat(2, 1, 1)), "not symmetric"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_line(case):
    call, message = REFUSED[case]
    with pytest.raises(MixtureError, match=message) as caught:
        call()
    assert isinstance(caught.value, CourseError)
    assert "\n" not in str(caught.value)


def test_of_several_starts_a_collapsed_one_is_passed_over():
    x = toy_2d("mixture", 40, torch.Generator().manual_seed(0), dtype=torch.float64)
    collapsing = GaussianMixture(4, reg_covar=0.0)
    with pytest.raises(MixtureError, match="collapsed"):
        collapsing.fit(x)
    several = GaussianMixture(4, reg_covar=0.0, n_init=10).fit(x)
    assert several.log_likelihoods_[-1] == pytest.approx(several.log_prob(x).mean().item())


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_narrow_components_far_apart_keep_their_digits(covariance, offset):
    """Two clouds a thousand of their own widths apart, and the origin further still: products lose what differences do
    not, and float32 loses it first."""
    rng = rng_for("narrow", covariance)
    clouds = torch.tensor([[0.0, 0.0], [1000.0, -1000.0]], dtype=torch.float64).repeat_interleave(500, 0)
    x = (clouds + torch.randn(1000, 2, generator=rng, dtype=torch.float64) + offset).float()
    hard = F.one_hot(torch.arange(2).repeat_interleave(500), 2)
    exact = m_step(x.double(), hard.double(), covariance=covariance)
    rounded = m_step(x, hard.float(), covariance=covariance)
    torch.testing.assert_close(rounded[2].double(), exact[2], rtol=1e-3, atol=1e-2)
    far = e_step(x, *(parameter.float() for parameter in exact))[1]
    near = e_step(x.double(), *(parameter.float().double() for parameter in exact))[1]
    torch.testing.assert_close(far.double(), near, rtol=1e-3, atol=2e-2)
    clouds = [
        torch.distributions.MultivariateNormal(m, torch.diag(c) if c.ndim == 1 else c)
        for m, c in zip(*exact[1:], strict=True)
    ]
    by_torch = torch.stack([w.log() + c.log_prob(x.double()) for w, c in zip(exact[0], clouds, strict=True)]).logsumexp(
        0
    )
    torch.testing.assert_close(e_step(x.double(), *exact)[1], by_torch, rtol=1e-9, atol=1e-9)
