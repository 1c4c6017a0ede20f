"""Answers to the exercises of lesson 02: a second right one each, and what plausible readers would write instead."""

import math

import torch
from answers import Answers
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from aigc_course import vae

# ---- 2.1 ----

FACTOR = 1 + 300 / 100  # the second moment of one draw in one dimension

draws = Answers(
    second=sum(300 * FACTOR**j for j in range(10)),  # the geometric series
    wrong={
        "linear": [sum([300] * 10)],
        "counts-multiplied": [math.prod([300] * 10), 5.9e24],
        "variances-multiplied": [math.exp(10 * math.log(3)) * 100],
        "error-not-squared": [FACTOR**10 / 0.1],
        "one-draw": [FACTOR**10, 2**20 - 1],
    },
)

# ---- 2.2 ----


def kl_by_torch(mu_q, logvar_q, mu_p, logvar_p):
    q, p = (Independent(Normal(m, (v / 2).exp()), 1) for m, v in ((mu_q, logvar_q), (mu_p, logvar_p)))
    return kl_divergence(q, p)


def kl_in_parts(mu_q, logvar_q, mu_p, logvar_p, *, half=0.5, logs=1.0, one=1.0):
    """Unit by unit, in a loop."""
    total = torch.zeros(len(mu_q), dtype=mu_q.dtype)
    for j in range(mu_q.shape[1]):
        ratio = torch.exp(logvar_q[:, j] - logvar_p[:, j])
        distance = (mu_q[:, j] - mu_p[:, j]) ** 2 * torch.exp(-logvar_p[:, j])
        total = total + half * (ratio + distance - one + logs * (logvar_p[:, j] - logvar_q[:, j]))
    return total


def kl_from_p_to_q(mu_q, logvar_q, mu_p, logvar_p):
    return 0.5 * (logvar_q - logvar_p + (logvar_p.exp() + (mu_p - mu_q) ** 2) / logvar_q.exp() - 1).sum(1)


def kl_with_exp_as_sigma(mu_q, logvar_q, mu_p, logvar_p):
    sigma_q, sigma_p = logvar_q.exp(), logvar_p.exp()
    return (torch.log(sigma_p / sigma_q) + (sigma_q**2 + (mu_q - mu_p) ** 2) / (2 * sigma_p**2) - 0.5).sum(1)


def kl_by_torch_with_exp_as_sigma(mu_q, logvar_q, mu_p, logvar_p):
    return kl_divergence(Normal(mu_q, logvar_q.exp()), Normal(mu_p, logvar_p.exp())).sum(1)


def kl_mean(mu_q, logvar_q, mu_p, logvar_p):
    var_q, var_p = logvar_q.exp(), logvar_p.exp()
    return (0.5 * (var_q / var_p + (mu_q - mu_p) ** 2 / var_p - 1 + torch.log(var_p / var_q))).mean(dim=-1)


def kl_distance_not_scaled(mu_q, logvar_q, mu_p, logvar_p):
    ratio = logvar_q - logvar_p
    return 0.5 * (ratio.exp() + (mu_p - mu_q) ** 2 - 1 - ratio).sum(1)


kl = Answers(
    second=kl_by_torch,
    wrong={
        "half-missing": [lambda *a: kl_in_parts(*a, half=1.0)],
        "exchanged": [kl_from_p_to_q, lambda a, b, c, d: kl_by_torch(c, d, a, b)],
        "exp-as-sigma": [kl_with_exp_as_sigma, kl_by_torch_with_exp_as_sigma],
        "mean-over-units": [kl_mean],
        "distance-not-scaled": [kl_distance_not_scaled],
        "prior-ignored": [lambda mu, logvar, *rest: -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)],
        "one-not-subtracted": [lambda *a: kl_in_parts(*a, one=0.0)],
        "logarithms-flipped": [lambda *a: kl_in_parts(*a, logs=-1.0)],
        "summed-over-batch": [lambda *a: kl_in_parts(*a).sum(0)],
    },
)

# ---- 2.3 ----

silent_beta = Answers(
    second=64 * 3072 / 0.5,
    wrong={
        "as-in-the-lesson": [3072, 32 * 32 * 3],
        "batch-forgotten": [6144],
        "half-overlooked": [196_608, 64 * 3072],
        "channels-forgotten": [131_072],
        "inverted": [2.54e-6],
        "units-divided": [3932],
        "units-multiplied": [64 * 3072 * 2 * 100],
    },
)

# ---- 2.4 ----


def step_by_the_package(state, x, noise):
    net = state.nets["vae"]
    mu, logvar = net.encode(x)
    reconstruction = net.log_prob(x, vae.reparameterize(mu, logvar, noise))
    kl = vae.kl_to_standard_normal(mu, logvar)
    elbo = (reconstruction - kl).mean()
    state.minimize("vae", -elbo)
    return {"elbo": elbo, "reconstruction": reconstruction.mean(), "kl": kl.mean()}


def attempt(*, draw="sigma", pixels="sum", images="mean", rate="sum", touched=False, update=True):
    """A reader's step, from which of the two lines was mended and how."""

    def step(state, x, noise):
        net = state.nets["vae"]
        mu, logvar = net.encode(x)
        z = mu + noise * (logvar.exp().sqrt() if draw == "sigma" else logvar.exp())
        logits = net.decode(z)
        per_pixel = (F.softplus(logits) - x * logits).reshape(len(x), -1)
        per_image = per_pixel.sum(1) if pixels == "sum" else per_pixel.mean(1)
        variance = torch.sqrt(logvar.exp()) if touched else logvar.exp()
        per_unit = -(1 + logvar - mu.pow(2) - variance) / 2
        kl_per_image = per_unit.sum(1) if rate == "sum" else per_unit.mean(1)
        loss = per_image.mean() if images == "mean" else per_image.sum()
        kl = kl_per_image.sum() if images == "both" else kl_per_image.mean()
        if update:
            state.minimize("vae", loss + kl)
        return {"elbo": -loss - kl, "reconstruction": -loss, "kl": kl}

    return step


def summed_by_torch(state, x, noise):
    net = state.nets["vae"]
    mu, logvar = net.encode(x)
    z = mu + (logvar / 2).exp() * noise
    cross_entropy = F.binary_cross_entropy_with_logits(net.decode(z), x, reduction="sum")
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()
    state.minimize("vae", cross_entropy + kl)
    return {"elbo": -(cross_entropy + kl), "reconstruction": -cross_entropy, "kl": kl}


step = Answers(
    second=step_by_the_package,
    wrong={
        "nothing-mended": [attempt(draw="variance", pixels="mean")],
        "sigma-left": [attempt(draw="variance")],
        "mean-left": [attempt(pixels="mean")],
        "sum-over-batch": [attempt(images="sum"), summed_by_torch],
        "all-summed": [attempt(images="both")],
        "both-means": [attempt(pixels="mean", rate="mean")],
        "rate-a-mean": [attempt(rate="mean")],
        "rate-touched": [attempt(touched=True)],
        "no-update": [attempt(update=False)],
    },
)

# ---- 2.5 ----


def climb(*, steps=40, draws=4, lr=0.1, sign=1.0, rate=1.0, noise_weight=1.0):
    """A reader's ``refine``: gradient steps on the code of each image."""

    def refine(model, x, mu, logvar, rng):
        mu, logvar = (t.clone().requires_grad_() for t in (mu, logvar))
        optimizer = torch.optim.Adam([mu, logvar], lr=lr)
        for _ in range(steps):
            noise = noise_weight * torch.randn(draws, *mu.shape, generator=rng)
            reconstruction = model.log_prob(x, vae.reparameterize(mu, logvar, noise)).mean(0)
            objective = reconstruction - rate * vae.kl_to_standard_normal(mu, logvar)
            loss = -sign * objective.sum()
            mu.grad, logvar.grad = torch.autograd.grad(loss, [mu, logvar])
            optimizer.step()
        return mu.detach(), logvar.detach()

    return refine


def by_log_weights(model, x, mu, logvar, rng):
    """Up the mean of log p(x, z) - log q(z|x), with the noise in pairs and steps that become shorter."""
    code = torch.cat([mu, logvar], 1).requires_grad_()
    optimizer = torch.optim.Adam([code], lr=0.15, betas=(0.9, 0.99))
    for i in range(50):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - i / 60)
        noise = torch.randn(4, *mu.shape, generator=rng)
        loss = -vae.log_weight(model, x, *code.chunk(2, 1), torch.cat([noise, -noise])).mean(0).sum()
        (code.grad,) = torch.autograd.grad(loss, [code])
        optimizer.step()
    return tuple(code.detach().chunk(2, 1))


def moves_the_decoder(model, x, mu, logvar, rng):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (-vae.elbo(model, x, rng).value.mean()).backward()
        optimizer.step()
    return tuple(t.detach() for t in model.encode(x))


def forgets_to_copy_back(model, x, mu, logvar, rng):
    code = torch.cat([mu, logvar], 1).requires_grad_()
    optimizer = torch.optim.SGD([code], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        vae.kl_to_standard_normal(*code.chunk(2, 1)).sum().backward()
        optimizer.step()
    return mu, logvar


refine = Answers(
    second=by_log_weights,
    wrong={
        "unchanged": [lambda model, x, mu, logvar, rng: (mu, logvar), forgets_to_copy_back],
        "model-changed": [moves_the_decoder],
        "rate-forgotten": [climb(rate=0.0, steps=80, lr=0.2)],
        "no-noise": [climb(noise_weight=0.0, draws=1, steps=60)],
        "downhill": [climb(sign=-1.0)],
        "worse": [lambda model, x, mu, logvar, rng: (0 * mu, logvar)],
        "not-enough": [climb(steps=1, lr=0.002)],
    },
)

# ---- 2.6 ----


def code_by_bayes(x, W, s, beta):
    """The posterior of a decoder with the noise variance beta s², by adding one image and one unit at a time."""
    noise = beta * s**2
    S = torch.linalg.inv(torch.eye(W.shape[1], dtype=W.dtype) + W.mT @ W / noise)
    mu = torch.stack([S @ W.mT @ row / noise for row in x])
    return mu, torch.stack([1 / (1 + column @ column / noise) for column in W.mT])


def code(*, mean_beta=True, variance_beta=True, inverted=False, power=2, variance="diagonal", mean="joint"):
    """A reader's attempt, with what is easily got wrong as options."""

    def best_code(x, W, s, beta):
        weight = 1 / beta if inverted else beta
        for_mean, for_variance = (weight if mean_beta else 1.0), (weight if variance_beta else 1.0)
        gram = torch.einsum("od,oe->de", W, W) / s**power
        identity = torch.eye(len(gram), dtype=W.dtype)
        pulls = torch.einsum("no,od->nd", x, W) / s**power
        if mean == "joint":
            mu = pulls @ torch.linalg.inv(for_mean * identity + gram)
        else:
            mu = pulls / (for_mean + gram.diagonal())
        if variance == "diagonal":
            v = for_variance / (for_variance + gram.diagonal())
        elif variance == "inverse":
            v = for_variance * torch.linalg.inv(for_variance * identity + gram).diagonal()
        else:
            v = 1 / (for_variance + gram.diagonal())
        return mu, v

    return best_code


best_code = Answers(
    second=code_by_bayes,
    wrong={
        "beta-forgotten": [code(mean_beta=False, variance_beta=False)],
        "beta-inverted": [code(inverted=True)],
        "marginal-variance": [code(variance="inverse")],
        "mean-by-coordinate": [code(mean="alone")],
        "variance-without-beta": [code(variance_beta=False)],
        "mean-without-beta": [code(mean_beta=False)],
        "s-not-squared": [code(power=1)],
        "numerator-lost": [code(variance="no numerator")],
    },
)

ANSWERS = {
    "check_draws": draws,
    "check_kl": kl,
    "check_silent_beta": silent_beta,
    "check_step": step,
    "check_refine": refine,
    "check_best_code": best_code,
}
