"""The VAE: every estimator against a model with exact answers, and what it leaves alone, learns and refuses."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D
from torch import nn

from aigc_course import vae
from aigc_course.datasets import binarize, load_mnist
from aigc_course.runtime import CourseError, rng_for
from aigc_course.state import TrainState
from aigc_course.vae import (
    VAE,
    VAEConfig,
    VAEError,
    active_units,
    bernoulli_log_prob,
    check_binary,
    elbo,
    importance_weighted_bound,
    iwae_step,
    kl_to_standard_normal,
    log_likelihood,
    log_weight,
    reparameterize,
    sample,
    vae_step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, key, dtype=torch.float64):
    return torch.randn(*shape, generator=rng_for("test_vae", key), dtype=dtype)


def assert_mean(draws, expected, *, errors=4.0):
    """The mean of independent ``draws`` (m, …) is ``expected``, within so many standard errors."""
    standard_error = draws.std(0) / len(draws) ** 0.5
    off = (draws.mean(0) - expected).abs() / standard_error
    assert (off <= errors).all(), f"{off.max():.1f} standard errors off"


class LinearGaussian(nn.Module):
    """z ~ N(0, I) and x = W z + b + s noise, with an encoder that is linear and wrong: all is known in closed form.

    The columns of W are orthogonal, so the exact posterior has a diagonal covariance: ``exact_encoder`` puts it in.
    """

    def __init__(self, pixels=5, z_dim=3):
        super().__init__()
        w = torch.linalg.qr(normal(pixels, z_dim, key="w")).Q * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        self.w, self.b = nn.Parameter(w), nn.Parameter(normal(pixels, key="b"))
        self.log_s = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))
        self.exact_encoder()
        with torch.no_grad():
            self.mean.weight.mul_(0.7)
            self.mean.bias.add_(0.2)
            self.logvar.weight.add_(0.1 * normal(z_dim, pixels, key="logvar"))
            self.logvar.bias.add_(torch.tensor([0.8, 0.4, -0.2]))  # wider, wider, narrower than the posterior

    @torch.no_grad()
    def exact_encoder(self):
        variance, (pixels, z_dim) = self.posterior_precision().diagonal().reciprocal(), self.w.shape
        self.mean, self.logvar = (nn.Linear(pixels, z_dim, dtype=torch.float64) for _ in range(2))
        self.mean.weight.copy_(variance[:, None] * self.w.T / self.log_s.exp() ** 2)
        self.mean.bias.copy_(-self.mean.weight @ self.b)
        self.logvar.weight.zero_()
        self.logvar.bias.copy_(variance.log())
        return self

    def encode(self, x):
        return self.mean(x), self.logvar(x)

    def log_prob(self, x, z):
        return D.Normal(z @ self.w.T + self.b, self.log_s.exp(), validate_args=False).log_prob(x).sum(-1)

    def posterior_precision(self):
        return torch.eye(self.w.shape[1], dtype=torch.float64) + self.w.T @ self.w / self.log_s.exp() ** 2

    def marginal(self):
        noise = self.log_s.exp() ** 2 * torch.eye(len(self.b), dtype=torch.float64)
        return D.MultivariateNormal(self.b, self.w @ self.w.T + noise)

    def exact_log_prob(self, x):
        return self.marginal().log_prob(x)

    def exact_elbo(self, x):
        """log p(x) - KL(q(z|x) || p(z|x))."""
        mu, logvar = self.encode(x)
        precision = self.posterior_precision()
        mean = torch.linalg.solve(precision, ((x - self.b) @ self.w / self.log_s.exp() ** 2).T).T
        posterior = D.MultivariateNormal(mean, precision_matrix=precision)
        gap = D.kl_divergence(D.MultivariateNormal(mu, torch.diag_embed(logvar.exp())), posterior)
        return self.exact_log_prob(x) - gap


@pytest.fixture
def model():
    return LinearGaussian()


@pytest.fixture
def x(model):
    """Eight observations, not all likely."""
    return model.b.detach() + 1.5 * normal(8, 5, key="x")


def repeated(function, x, times):
    """What ``function`` gives for each of ``x`` (n, …), in so many independent draws: (times, n)."""
    return function(x.repeat(times, *[1] * (x.ndim - 1))).detach().unflatten(0, (times, len(x)))


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def tiny_vae(z_dim=4, hidden=(16,), key="tiny", **options):
    return VAE(VAEConfig(z_dim=z_dim, hidden=hidden), rng=rng_for(key), **options)


def random_pixels(*shape, key="pixels", dtype=torch.float32):
    return (normal(*shape, 1, 28, 28, key=key) > 0).to(dtype)


@pytest.fixture(scope="module")
def digits():
    return binarize(load_mnist(train=False)[:300].images, rng_for("digits"))


# ---- densities ----


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 10)), min_size=1, max_size=12), st.integers(1, 3))
def test_kl_agrees_with_torch_distributions(pairs, n):
    mu, logvar = torch.tensor(pairs * n, dtype=torch.float64).view(n, len(pairs), 2).unbind(-1)
    ours = kl_to_standard_normal(mu, logvar)
    theirs = D.kl_divergence(D.Normal(mu, (logvar / 2).exp()), D.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert (ours >= -1e-14).all()


def test_kl_is_zero_at_the_prior_alone_and_its_gradient_is_right():
    zero = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(kl_to_standard_normal(zero, zero), zero[:, 0])
    for away in (0.1, -0.1):
        assert (kl_to_standard_normal(zero + away, zero) > 0.01).all()
        assert (kl_to_standard_normal(zero, zero + away) > 0.005).all()
    mu, logvar = (normal(4, 3, key=key).requires_grad_() for key in ("mu", "logvar"))
    assert torch.autograd.gradcheck(kl_to_standard_normal, (mu, logvar))
    for gradient in torch.autograd.grad(kl_to_standard_normal(zero.requires_grad_(), zero).sum(), zero):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 80.0, 800.0])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_pixels_have_the_log_prob_of_torch_distributions(dtype, scale, leading):
    x = random_pixels(6, dtype=dtype)
    logits = scale * (2 * torch.rand(*leading, 6, 1, 28, 28, generator=rng_for("logits"), dtype=dtype) - 1)
    logits.flatten()[:2] = scale * torch.tensor([1.0, -1.0])
    logits.requires_grad_()
    ours = bernoulli_log_prob(x, logits)
    assert ours.shape == (*leading, 6) and ours.dtype == dtype and ours.isfinite().all()
    twin = D.Bernoulli(logits=logits.double()).log_prob(x.double()).sum((-3, -2, -1))
    rtol = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(ours.double(), twin, rtol=rtol, atol=1000 * torch.finfo(dtype).eps)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(gradient, x - logits.sigmoid(), rtol=4 * rtol, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_a_logit_of_zero_the_gradient_is_one_half_exactly(dtype):
    """There max(l, 0) and |l| have a corner, but log p(x) has none."""
    x, logits = random_pixels(2, dtype=dtype), torch.zeros(2, 1, 28, 28, dtype=dtype, requires_grad=True)
    log_prob = bernoulli_log_prob(x, logits)
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, -784 * math.log(2)))
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert torch.equal(gradient, x - 0.5)


def test_samples_have_the_mean_and_the_variance_of_the_encoder():
    mu = torch.tensor([[0.0, -3.0, 7.0], [1.0, 0.5, -2.0]], dtype=torch.float64)
    logvar = torch.tensor([[0.0, 2.0, -4.0], [1.0, -1.0, 3.0]], dtype=torch.float64)
    z = reparameterize(mu, logvar, normal(100_000, 2, 3, key="noise"))
    assert_mean(z, mu)
    assert_mean((z - mu).square(), logvar.exp())
    torch.testing.assert_close(reparameterize(mu, logvar, torch.zeros_like(mu)), mu, rtol=0, atol=0)
    torch.testing.assert_close(z[7], reparameterize(mu, logvar, normal(100_000, 2, 3, key="noise")[7]))


# ---- the bound ----


def test_the_elbo_is_log_prob_less_the_distance_to_the_posterior(model, x):
    draws = repeated(lambda x: elbo(model, x, rng_for("elbo")).value, x, 10_000)
    assert_mean(draws, model.exact_elbo(x))
    assert (model.exact_elbo(x) < model.exact_log_prob(x) - 0.1).all()  # this encoder leaves a gap to find
    # The draws are independent, over images and over calls.
    noise = draws - draws.mean(0)
    correlation = noise.T.corrcoef() - torch.eye(8)
    assert correlation.abs().max() < 0.05
    assert not torch.equal(elbo(model, x, rng_for("another")).value, draws[0])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_beta_weighs_the_kl(model, x, beta):
    bound = elbo(model, x, rng_for("beta"), beta=beta)
    mu, logvar = model.encode(x)
    kl = D.kl_divergence(D.Normal(mu, (logvar / 2).exp()), D.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(bound.kl, kl)
    torch.testing.assert_close(bound.value, bound.reconstruction - beta * kl)
    plain = elbo(model, x, rng_for("beta"))
    torch.testing.assert_close(bound.reconstruction, plain.reconstruction)
    torch.testing.assert_close(plain.value, plain.reconstruction - plain.kl)


ESTIMATORS = {
    "elbo": (elbo, 1.0),
    "beta": (partial(elbo, beta=3.0), 3.0),
    "one sample": (lambda model, x, rng: (importance_weighted_bound(model, x, 1, rng),), 1.0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_the_elbo_is_that_of_its_mean(model, x, name):
    """Reparameterised, for the decoder and the encoder alike; beta weighs the gradient of the KL."""
    estimator, beta = ESTIMATORS[name]
    kl = kl_to_standard_normal(*model.encode(x))
    exact = flat_gradient((model.exact_elbo(x) - (beta - 1) * kl).mean(), model)
    rng, batch = rng_for("gradient", name), x.repeat(100, 1)
    draws = [flat_gradient(estimator(model, batch, rng)[0].mean(), model) for _ in range(150)]
    assert_mean(torch.stack(draws), exact)


def test_with_the_exact_posterior_every_weight_is_log_prob(model, x):
    """w = p(x, z) / p(z|x) = p(x), whatever z is drawn; so every bound of it is log p(x) too."""
    model.exact_encoder()
    exact = model.exact_log_prob(x)
    noise = 3 * normal(6, 8, 3, key="any")
    weights = log_weight(model, x, *model.encode(x), noise)
    assert weights.shape == (6, 8)
    torch.testing.assert_close(weights, exact.expand(6, 8), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_weight(model, x, *model.encode(x), noise[2]), exact, rtol=0, atol=1e-10)
    for seed, k in enumerate((1, 2, 7, 100)):
        bound = importance_weighted_bound(model, x, k, rng_for("bound", seed))
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-10)
        for rows in (1, 3, 10, 1000):
            estimate = log_likelihood(model, x, k, rng_for("estimate", seed), rows=rows)
            torch.testing.assert_close(estimate, exact.detach(), rtol=0, atol=1e-10)


def test_log_weight_agrees_with_torch_distributions(digits):
    model, x = tiny_vae(), digits[:7]
    mu, logvar = model.encode(x)
    noise = normal(5, 7, 4, key="twin", dtype=torch.float32)
    z = mu + (logvar / 2).exp() * noise
    log_prior, log_q = D.Normal(0.0, 1.0).log_prob(z).sum(-1), D.Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)
    log_pixels = D.Bernoulli(logits=model.decode(z)).log_prob(x).sum((-3, -2, -1))
    twin = log_pixels + log_prior - log_q
    torch.testing.assert_close(model.log_prob(x, z), log_pixels)
    torch.testing.assert_close(log_weight(model, x, mu, logvar, noise), twin)
    torch.testing.assert_close(log_weight(model, x, mu, logvar, noise[0]), twin[0])


def test_the_bound_rises_with_k_from_the_elbo_to_log_prob(model, x):
    bounds = {
        k: repeated(lambda x, k=k: importance_weighted_bound(model, x, k, rng_for("k", k)), x, 3000)
        for k in (1, 2, 5, 20, 60)
    }
    exact = model.exact_log_prob(x).detach()
    assert_mean(bounds[1], model.exact_elbo(x))
    for fewer, more in zip((1, 2, 5, 20), (2, 5, 20, 60), strict=True):
        rise = (bounds[more] - bounds[fewer]).mean(1)
        assert rise.mean() > 4 * rise.std() / 3000**0.5
    for draws in bounds.values():
        assert (draws.mean(0) < exact + 4 * draws.std(0) / 3000**0.5).all()
        assert_mean((draws - exact).exp(), 1.0)  # the mean of the weights has the mean p(x), for every k
    assert (exact - bounds[60].mean(0)).max() < 0.1 < (exact - bounds[1].mean(0)).min()


# ---- log-likelihood ----


def test_log_likelihood_is_the_bound_where_one_piece_holds_all(model, x):
    bound = importance_weighted_bound(model, x, 9, rng_for("same"))
    estimate = log_likelihood(model, x, 9, rng_for("same"), rows=72)
    torch.testing.assert_close(estimate, bound.detach())
    assert bound.requires_grad and not estimate.requires_grad


@pytest.mark.parametrize(("rows", "times"), [(1, 10), (7, 50), (30, 100), (50, 200), (1000, 500)])
def test_log_likelihood_does_not_depend_on_the_size_of_the_pieces(model, x, rows, times):
    """Twenty samples for each of eight images, with one image in several pieces, or several images in one."""
    exact = model.exact_log_prob(x).detach()
    draws = repeated(lambda x: log_likelihood(model, x, 20, rng_for("rows", rows), rows=rows), x, times)
    assert_mean((draws - exact).exp().flatten(), 1.0)
    bound = repeated(lambda x: importance_weighted_bound(model, x, 20, rng_for("whole", rows)), x, times)
    assert_mean((draws - bound).flatten(), 0.0)


def test_log_likelihood_converges(model, x):
    exact = model.exact_log_prob(x).detach()
    error = [(log_likelihood(model, x, k, rng_for("converges")) - exact).abs().mean() for k in (10, 1000, 100_000)]
    assert error[2] < error[1] / 3 < error[0] / 9
    assert error[2] < 0.01


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 30), k=st.integers(1, 60), rows=st.integers(1, 80))
def test_no_more_than_rows_pairs_are_decoded_at_once(n, k, rows):
    class Recorder(LinearGaussian):
        def log_prob(self, x, z):
            calls.append(z.shape[:-1].numel())
            return super().log_prob(x, z)

    calls = []
    estimate = log_likelihood(Recorder(), normal(n, 5, key="memory"), k, rng_for(0), rows=rows)
    assert estimate.shape == (n,)
    assert max(calls) <= rows and sum(calls) == n * k
    assert len(calls) <= 4 * math.ceil(n * k / rows)  # nor needlessly few


def test_log_likelihood_is_the_integral_over_the_latent(digits):
    """With one latent unit the integral of p(x|z) N(z; 0, 1) is a sum over a fine grid."""
    model, x = tiny_vae(z_dim=1, key="integral"), digits[:5]
    with torch.no_grad():
        model.decoder[-1].weight.mul_(2.0)
        z = torch.linspace(-8, 8, 4001)[:, None, None].expand(-1, 5, 1)
        log_joint = model.log_prob(x, z).double() + D.Normal(0.0, 1.0).log_prob(z[..., 0].double())
        exact = log_joint.logsumexp(0) + math.log(16 / 4000)
    estimate = log_likelihood(model, x, 4000, rng_for("integral"))
    torch.testing.assert_close(estimate.double(), exact, rtol=0, atol=0.1)
    mean = elbo(model, x.repeat(200, 1, 1, 1, 1).flatten(0, 1), rng_for("below")).value.view(200, 5).mean(0)
    assert (mean < exact - 0.5).all()


# ---- steps ----


class Probe(TrainState):
    """A state that keeps the gradient of the loss instead of moving the network."""

    def __init__(self, model):
        super().__init__({"vae": model}, {})

    def minimize(self, name, loss):
        assert name == "vae" and loss.numel() == 1
        self.loss, self.gradient = loss.detach(), flat_gradient(loss, self.nets[name])


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_the_vae_step_descends_the_mean_of_the_negative_bound(model, x, beta):
    probe = Probe(model)
    figures = vae_step(probe, x, rng_for("step"), beta=beta)
    bound = elbo(model, x, rng_for("step"), beta=beta)
    torch.testing.assert_close(probe.loss, -bound.value.mean().detach())
    torch.testing.assert_close(probe.gradient, -flat_gradient(bound.value.mean(), model))
    assert list(figures) == ["elbo", "reconstruction", "kl"]
    torch.testing.assert_close(figures["elbo"], figures["reconstruction"] - beta * figures["kl"])
    for figure, expected in zip(figures.values(), bound, strict=True):
        torch.testing.assert_close(figure, expected.mean())


def test_the_weighted_gradients_of_the_weights_are_the_gradient_of_the_bound(model, x):
    """Burda et al., eq. 14: over all choices that the step may make, weighted by their probabilities."""
    noise = torch.randn(5, 8, 3, generator=rng_for("choices"), dtype=torch.float64)
    bound = importance_weighted_bound(model, x, 5, rng_for("choices"))
    probabilities = log_weight(model, x, *model.encode(x), noise).detach().softmax(0)
    total = 0
    for one, probability in zip(noise, probabilities, strict=True):
        total += flat_gradient((probability * log_weight(model, x, *model.encode(x), one)).mean(), model)
    torch.testing.assert_close(total, flat_gradient(bound.mean(), model))


@pytest.mark.parametrize(("k", "drawn", "n"), [(1, 1, 8), (6, 1, 160), (6, 8, 2), (2, 3, 160)])
def test_the_gradient_of_the_iwae_step_is_that_of_the_bound_on_average(model, x, k, drawn, n):
    probe, differences, figures = Probe(model), [], []
    x = x.repeat(20, 1)[:n]
    for seed in range(300):
        figure = iwae_step(probe, x, rng_for("iwae", seed), k=k, drawn=drawn)["bound"]
        bound = importance_weighted_bound(model, x, k, rng_for("iwae", seed)).mean()
        differences.append(-probe.gradient - flat_gradient(bound, model))
        figures.append((figure - bound).detach())
    differences = torch.stack(differences)
    assert_mean(differences + 1e-12 * normal(*differences.shape, key="k=1: no choice, no difference"), 0.0)
    torch.testing.assert_close(torch.stack(figures).mean(), torch.tensor(0.0), rtol=0, atol=0.01, check_dtype=False)


def test_the_iwae_step_does_not_depend_on_the_size_of_its_pieces(model, x, monkeypatch):
    results = []
    for rows in (1000, 20, 3):
        monkeypatch.setattr(vae, "ROWS", rows)
        probe = Probe(model)
        results.append((iwae_step(probe, x, rng_for("pieces"), k=7)["bound"], probe.gradient))
    for bound, gradient in results[1:]:
        torch.testing.assert_close(bound, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


@pytest.mark.parametrize(("step", "names"), [(vae_step, {"elbo", "reconstruction", "kl"}), (iwae_step, {"bound"})])
def test_steps_on_digits_raise_the_log_likelihood(digits, step, names):
    model = tiny_vae(z_dim=8, hidden=(64,), pixel_means=digits.mean(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bound, likelihood = elbo(model, digits, rng_for(1)).value.mean(), log_likelihood(model, digits, 20, rng_for(2))
    state = TrainState({"vae": model}, {"vae": torch.optim.Adam(model.parameters(), lr=5e-3)})
    for seed in range(40):
        figures = step(state, digits, rng_for("train", seed), **({"k": 5} if step is iwae_step else {}))
        assert set(figures) == names
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name
    assert elbo(model, digits, rng_for(1)).value.mean() > bound + 15
    assert log_likelihood(model, digits, 20, rng_for(2)).mean() > likelihood.mean() + 15


def test_active_units_are_those_whose_mean_varies():
    """The variance of the mean counts, and neither its size nor the variance around it."""

    class Encoder:
        def encode(self, x):
            mu = x[:, :1] * torch.tensor([0.011, 0.009, 0.0, 4.0]).sqrt() + torch.tensor([0.0, 5.0, -5.0, 0.0])
            return mu, torch.tensor([-9.0, 0.0, 3.0, -9.0]).expand_as(mu)

        def log_prob(self, x, z):
            raise AssertionError("not needed")

    x = torch.tensor([[1.0], [-1.0]]).repeat(500, 1)  # of variance 1
    assert active_units(Encoder(), x).tolist() == [True, False, False, True]
    assert active_units(Encoder(), x, threshold=0.005).tolist() == [True, True, False, True]
    assert active_units(Encoder(), x, threshold=1.0).tolist() == [False, False, False, True]
    assert active_units(tiny_vae(), random_pixels(9)).shape == (4,)


# ---- network ----


def test_the_network_starts_at_the_mean_image(digits):
    means = digits.mean(0)
    means[0, 0, :2] = torch.tensor([0.0, 1.0])  # pixels that never change keep a finite logit
    model, plain = (tiny_vae(hidden=(32, 16), pixel_means=m) for m in (means, None))
    logits = model.decode(torch.zeros(4))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.sigmoid(), means, rtol=0, atol=1.1e-3)
    torch.testing.assert_close(plain.decode(torch.zeros(4)).sigmoid(), torch.full((1, 28, 28), 0.5))
    average = model.decode(normal(2000, 4, key="start", dtype=torch.float32)).sigmoid().mean(0)
    assert (average - means).abs().max() < 0.1
    bounds = [elbo(m, digits, rng_for("start")).value.mean() for m in (model, plain)]
    assert bounds[0] > bounds[1] + 200


def test_shapes_and_types_of_the_network():
    model = VAE(VAEConfig(z_dim=3, hidden=(20, 10)))
    widths = [[m.out_features for m in part if isinstance(m, nn.Linear)] for part in (model.encoder, model.decoder)]
    assert widths == [[20, 10, 6], [10, 20, 784]]
    mu, logvar = model.encode(random_pixels(5))
    assert mu.shape == logvar.shape == (5, 3) and not torch.equal(mu, logvar)
    for leading in ((), (5,), (4, 5), (2, 4, 5)):
        assert model.decode(torch.zeros(*leading, 3)).shape == (*leading, 1, 28, 28)
    assert model.log_prob(random_pixels(5), torch.zeros(4, 5, 3)).shape == (4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = *model.encode(random_pixels(5)), model.decode(torch.zeros(5, 3))
    assert all(output.dtype == torch.float32 for output in outputs)
    x, double = random_pixels(5, dtype=torch.float64), model.double()
    assert elbo(double, x, rng_for("double")).value.dtype == torch.float64


def test_a_seed_fixes_everything_and_the_global_generator_is_left_alone(digits):
    def everything(seed):
        rng = rng_for("everything", seed)
        model = VAE(VAEConfig(z_dim=3, hidden=(8,)), rng=rng)
        state = TrainState({"vae": model}, {"vae": torch.optim.Adam(model.parameters())})
        x = digits[:4]
        results = [*elbo(model, x, rng), importance_weighted_bound(model, x, 3, rng), log_likelihood(model, x, 3, rng)]
        results += [*vae_step(state, x, rng).values(), *iwae_step(state, x, rng, k=3).values(), sample(model, 2, rng)]
        return torch.cat([result.detach().flatten() for result in results + list(model.parameters())])

    before = torch.get_rng_state()
    first, again, other = everything(0), everything(0), everything(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- samples ----


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_no_trace(training):
    model, modes = tiny_vae().train(training), []
    model.decoder.register_forward_hook(lambda module, args, output: modes.append(module.training))
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    images = sample(model, 6, rng_for("samples"))
    assert modes == [False] and model.training is training and model.decoder.training is training
    assert images.shape == (6, 1, 28, 28) and images.dtype == torch.float32 and not images.requires_grad
    check_binary(images)
    assert torch.equal(images, sample(model, 6, rng_for("samples")))
    assert not torch.equal(images, sample(model, 6, rng_for("others")))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_samples_have_the_distribution_of_the_model():
    """The mean of each pixel, and the variance of their sum: E[sum p (1 - p)] + Var[sum p], for z from the prior."""
    model, n = tiny_vae(z_dim=2, key="distribution"), 4000
    with torch.no_grad():
        model.decoder[-1].weight.add_(1.0)  # now all pixels brighten and darken together
        model.decoder[-1].bias.fill_(-1.0)
        p = model.decode(normal(n, 2, key="prior", dtype=torch.float32)).sigmoid().flatten(1)
    images = sample(model, n, rng_for("many")).flatten(1)
    assert_mean(images - p, 0.0, errors=4.5)  # 784 pixels
    within, between = (p * (1 - p)).sum(1).mean(), p.sum(1).var()
    assert between > within  # both terms can be seen
    assert images.sum(1).var() == pytest.approx((within + between).item(), rel=0.1)
    assert len(images.unique(dim=0)) == n


# ---- refusals ----


def grey(low, high):
    return torch.linspace(low, high, 3 * 784).view(3, 1, 28, 28)


def with_nan():
    x = random_pixels(3)
    x[1, 0, 2, 2] = math.nan
    return x


PIXELS = "pixels that are 0 or 1"
BAD_IMAGES = {
    "grey": (grey(0.0, 0.75), PIXELS, "from 0 to 0.75"),
    "in [-1, 1]": (2 * random_pixels(3) - 1, PIXELS, "from -1 to 1"),
    "8-bit": (255 * random_pixels(3), PIXELS, "from 0 to 255"),
    "nan": (with_nan(), PIXELS, "nan"),
    "flat": (torch.zeros(3, 784), "(n, 1, 28, 28)", "(3, 784)"),
    "no channel": (torch.zeros(3, 28, 28), "(n, 1, 28, 28)", "(3, 28, 28)"),
    "one image": (torch.zeros(1, 28, 28), "(n, 1, 28, 28)", "(1, 28, 28)"),
    "32 pixels": (torch.zeros(3, 1, 32, 32), "(n, 1, 28, 28)", "(3, 1, 32, 32)"),
    "bytes": (torch.zeros(3, 1, 28, 28, dtype=torch.uint8), "expected floats", "x is uint8"),
    "truths": (random_pixels(3).bool(), "expected floats", "x is bool"),
    "colour": (torch.zeros(3, 3, 28, 28), "(n, 1, 28, 28)", "(3, 3, 28, 28)"),
}


def assert_one_clear_line(message, *parts):
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_are_not_binary_are_refused(case):
    x, expected, found = BAD_IMAGES[case]
    with pytest.raises(VAEError) as caught:
        check_binary(x)
    assert isinstance(caught.value, CourseError)
    assert_one_clear_line(str(caught.value), expected, found, "datasets.binarize(images, rng)")


def test_binary_images_are_taken():
    for x in (random_pixels(3), torch.zeros(1, 1, 28, 28), torch.ones(2, 1, 28, 28), torch.zeros(0, 1, 28, 28)):
        check_binary(x)


USER = """
import json, torch
from aigc_course.state import TrainState
from aigc_course.vae import *
model, rng = VAE(VAEConfig(z_dim=4, hidden=(8,))), torch.Generator()
state = TrainState({"vae": model}, {})
good, small = torch.ones(3, 1, 28, 28), torch.ones(3, 28, 28)
grey, signed = 0.25 * good, -good
calls = {
    "encode": lambda: model.encode(grey),
    "encode's shape": lambda: model.encode(small),
    "log_prob": lambda: model.log_prob(signed, torch.zeros(3, 4)),
    "log_prob's shape": lambda: model.log_prob(small, torch.zeros(3, 4)),
    "elbo": lambda: elbo(model, grey, rng),
    "log_likelihood": lambda: log_likelihood(model, small, 5, rng),
    "vae_step": lambda: vae_step(state, signed, rng),
    "iwae_step": lambda: iwae_step(state, grey, rng),
    "decode": lambda: model.decode(torch.zeros(3, 5)),
    "log_prob's latent": lambda: model.log_prob(good, torch.zeros(2, 3, 7)),
    "fraction": lambda: VAEConfig(z_dim=2.5),
    "fractions": lambda: VAEConfig(hidden=(200, 1.5)),
}
messages = {}
for name, call in calls.items():
    try:
        call()
    except VAEError as error:
        messages[name] = str(error)
print(json.dumps(messages))
"""


def test_a_user_reads_one_clear_line():
    """In a process of its own, without the checks of shapes that the tests switch on."""
    done = subprocess.run([sys.executable, "-c", USER], capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert len(messages) == 12
    for name, found in {
        "encode": "from 0.25 to 0.25",
        "encode's shape": "(3, 28, 28)",
        "log_prob": "from -1 to -1",
        "log_prob's shape": "(3, 28, 28)",
        "elbo": "from 0.25 to 0.25",
        "log_likelihood": "(3, 28, 28)",
        "vae_step": "from -1 to -1",
        "iwae_step": "from 0.25 to 0.25",
    }.items():
        assert_one_clear_line(messages[name], found, "expected" if "(" in found else PIXELS, "binarize")
    assert_one_clear_line(messages["decode"], "5 wide", "z_dim=4")
    assert_one_clear_line(messages["log_prob's latent"], "7 wide", "z_dim=4")
    assert_one_clear_line(messages["fraction"], "VAEConfig.z_dim is 2.5", "whole numbers")
    assert_one_clear_line(messages["fractions"], "VAEConfig.hidden is (200, 1.5)", "whole numbers")


@pytest.mark.parametrize("k", [0, -3])
def test_a_bound_takes_a_sample(model, x, k):
    for call in (
        lambda: importance_weighted_bound(model, x, k, rng_for(0)),
        lambda: log_likelihood(model, x, k, rng_for(0)),
        lambda: iwae_step(Probe(model), x, rng_for(0), k=k),
    ):
        with pytest.raises(VAEError, match=f"k is {k}: .* at least one"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_dim": 0}, "VAEConfig.z_dim is 0: .* at least 1"),
        ({"z_dim": -2}, "VAEConfig.z_dim is -2"),
        ({"z_dim": True}, "VAEConfig.z_dim is True"),
        ({"hidden": ()}, r"VAEConfig.hidden is \(\)"),
        ({"hidden": (200, 0)}, r"VAEConfig.hidden is \(200, 0\): .* at least 1"),
    ],
)
def test_a_network_without_width_is_refused(options, message):
    with pytest.raises(VAEError, match=message) as caught:
        VAEConfig(**options)
    assert "\n" not in str(caught.value)


def test_a_configuration_may_come_from_json():
    assert VAEConfig(**json.loads('{"z_dim": 2, "hidden": [400, 200]}')) == VAEConfig(z_dim=2, hidden=(400, 200))
