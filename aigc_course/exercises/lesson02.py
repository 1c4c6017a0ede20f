"""The exercises of lesson 02, the variational autoencoder."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checkpoints
from ..datasets import binarize, load_mnist
from ..runtime import course_dir
from ..state import TrainState
from ..vae import VAE, VAEConfig, kl_to_standard_normal, reparameterize
from .exercise import Exercise, Function, Goal, Mistake, Number, Untried, Wrong

# ---- 2.1 the number of draws ----

ONE, DIMENSIONS, RELATIVE_ERROR = 300, 10, 0.1


def draws_needed() -> float:
    """The first term of (2.3) is a product of equal factors; the factor follows from what one dimension needs."""
    second_moment = 1 + ONE * RELATIVE_ERROR**2
    return (second_moment**DIMENSIONS - 1) / RELATIVE_ERROR**2


check_draws = Number(
    number="2.1",
    title="How many draws?",
    kind="prediction",
    truth=draws_needed,
    praise="Each dimension multiplies the second moment by four. Now run the next cell and read its line at ten.",
    mistakes=[
        Mistake(
            "linear",
            "This is ten times the draws of one dimension. But a draw has to explain x in all ten coordinates at once, "
            "and the density of x given z is a product over them: what one coordinate does is multiplied, not added.",
            ONE * DIMENSIONS,
        ),
        Mistake(
            "counts-multiplied",
            "You multiplied the numbers of draws themselves. What is a product over the coordinates is the second "
            "moment of one draw, the first term of (2.3); find out first how large it is where 300 draws suffice.",
            lambda: float(ONE) ** DIMENSIONS,
        ),
        Mistake(
            "variances-multiplied",
            "You raised the relative variance of one dimension to the tenth power. In (2.3) one is subtracted at the "
            "end: the second moments multiply, and a variance is a second moment less one.",
            lambda: (ONE * RELATIVE_ERROR**2) ** DIMENSIONS / RELATIVE_ERROR**2,
        ),
        Mistake(
            "error-not-squared",
            "The growth with the dimension is right, but an average over K draws has 1/K of the variance, and the "
            "standard error is its root: ten per cent has to be squared before you divide by it.",
            lambda: draws_needed() * RELATIVE_ERROR,
        ),
        Mistake(
            "one-draw",
            "This is the relative variance of a single draw in ten dimensions. An average of that many draws would "
            "have a relative error of 100 %, and 10 % is asked for.",
            lambda: draws_needed() * RELATIVE_ERROR**2,
        ),
    ],
)


# ---- 2.2 the divergence between two Gaussians ----


def kl_between(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(N(mu_q, diag(exp(logvar_q))) || N(mu_p, diag(exp(logvar_p)))) of each row, in nats."""
    scaled = (logvar_q.exp() + (mu_q - mu_p).square()) / logvar_p.exp()
    return 0.5 * (scaled - 1 - logvar_q + logvar_p).sum(-1)


def _two_gaussians(rng: torch.Generator) -> list[tuple[Tensor, ...]]:
    return [
        tuple(scale * torch.randn(n, d, generator=rng, dtype=torch.float64) for scale in (1.0, 0.7, 1.0, 0.7))
        for n, d in ((5, 3), (1, 4), (4, 2))
    ]


def _kl_of_exp_as_sigma(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    scaled = ((2 * logvar_q).exp() + (mu_q - mu_p).square()) / (2 * logvar_p).exp()
    return (0.5 * (scaled - 1) - logvar_q + logvar_p).sum(-1)


check_kl = Function(
    number="2.2",
    title="The divergence between any two Gaussians",
    kind="derivation",
    reference=kl_between,
    cases=_two_gaussians,
    praise="With a mean of zero and a log-variance of zero for p it becomes (2.9).",
    mistakes=[
        Mistake(
            "half-missing",
            "Everything is twice as large as it should be: where has the one half gone that stands in the exponent of "
            "a Gaussian, and before the logarithm of its variance? Trained with, this would be a β of 2.",
            lambda *a: 2 * kl_between(*a),
        ),
        Mistake(
            "exchanged",
            "This is the divergence from p to q. It is asked for from q to p: the expectation is taken under q, so "
            "that the variance in the denominator is the one of p.",
            lambda mu_q, logvar_q, mu_p, logvar_p: kl_between(mu_p, logvar_p, mu_q, logvar_q),
        ),
        Mistake(
            "exp-as-sigma",
            "The exponential of a log-variance is taken for a standard deviation, and squared once more. It is the "
            "variance itself; the standard deviation is its root.",
            _kl_of_exp_as_sigma,
        ),
        Mistake(
            "mean-over-units",
            "This is a mean over the units of a code. The coordinates are independent, so their divergences add; a "
            "mean makes each nat cheaper by the number of units, which is a silent β.",
            lambda *a: kl_between(*a) / a[0].shape[-1],
        ),
        Mistake(
            "distance-not-scaled",
            "The squared distance of the means is not divided by the variance of p. A prior of another width than one "
            "measures distances in its own standard deviations.",
            lambda mu_q, logvar_q, mu_p, logvar_p: (
                kl_between(mu_q, logvar_q, mu_q, logvar_p) + 0.5 * (mu_q - mu_p).square().sum(-1)
            ),
        ),
        Mistake(
            "prior-ignored",
            "This is (2.9): p is taken for the standard normal, whatever mean and variance were handed over. Go back "
            "to the logarithm of q(z)/p(z), and keep both of p's parameters in it.",
            lambda mu_q, logvar_q, mu_p, logvar_p: kl_to_standard_normal(mu_q, logvar_q),
        ),
        Mistake(
            "one-not-subtracted",
            "Your result is too large by one half for each unit. Two equal Gaussians must come out at zero: which "
            "expectation, under q, of q's own exponent has been left out?",
            lambda *a: kl_between(*a) + 0.5 * a[0].shape[-1],
        ),
        Mistake(
            "logarithms-flipped",
            "The logarithms of the two variances have each other's sign. A q that is narrower than p claims to know "
            "more than p, and that must cost something.",
            lambda mu_q, logvar_q, mu_p, logvar_p: (
                kl_between(mu_q, logvar_q, mu_p, logvar_p) + (logvar_q - logvar_p).sum(-1)
            ),
        ),
        Mistake(
            "summed-over-batch",
            "You return one number for the whole batch. One divergence is asked for from each row: sum over the last "
            "axis only.",
            lambda *a: kl_between(*a).sum(),
        ),
    ],
)


# ---- 2.3 a silent beta ----

BATCH, CHANNELS, SIDE, UNITS = 64, 3, 32, 100


def script_loss(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The loss of the script in the exercise: a mean over everything, beside a sum over everything without a half."""
    return F.binary_cross_entropy_with_logits(logits, x) + (mu**2 + logvar.exp() - 1 - logvar).sum()


@functools.cache
def hidden_beta() -> float:
    """The β of ``script_loss``, measured: how its gradients compare with those of the ELBO's two parts."""
    rng = torch.Generator().manual_seed(0)
    shape = (BATCH, CHANNELS, SIDE, SIDE)
    x = torch.bernoulli(torch.full(shape, 0.3, dtype=torch.float64), generator=rng)
    logits = torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
    mu, logvar = (torch.randn(BATCH, UNITS, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.enable_grad():
        cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1).mean()
        rate = kl_to_standard_normal(mu, logvar).mean()
        theirs = torch.autograd.grad(script_loss(logits, x, mu, logvar), [logits, mu])
        ours = torch.autograd.grad(cross_entropy, [logits]) + torch.autograd.grad(rate, [mu])
    weights = [float((a * b).sum() / (b * b).sum()) for a, b in zip(theirs, ours, strict=True)]
    return weights[1] / weights[0]


check_silent_beta = Number(
    number="2.3",
    title="Which β is it?",
    kind="by hand",
    truth=hidden_beta,
    praise="A nat of code must save that many nats of reconstruction. And with another batch size it is another β.",
    mistakes=[
        Mistake(
            "as-in-the-lesson",
            "That is the number of values in an image, as in (2.16). But there the rate has its one half and is a mean "
            "over images; look again at both in this script.",
            CHANNELS * SIDE * SIDE,
        ),
        Mistake(
            "batch-forgotten",
            "You have found the mean over the values of an image and the missing one half. Over what else does the "
            "cross-entropy take a mean, and the rate a sum?",
            2 * CHANNELS * SIDE * SIDE,
        ),
        Mistake(
            "half-overlooked",
            "The mean over pixels and images against the sum is accounted for. Now compare the bracket of the rate "
            "with (2.9), factor by factor.",
            BATCH * CHANNELS * SIDE * SIDE,
        ),
        Mistake(
            "channels-forgotten",
            "You counted places where you should count values: the mean of a colour image is taken over its three "
            "channels, too.",
            2 * BATCH * SIDE * SIDE,
        ),
        Mistake(
            "inverted",
            "This is the weight of the reconstruction where the rate has the weight 1. β is the price of the rate "
            "where the reconstruction, in nats per image, counts once.",
            lambda: 1 / hidden_beta(),
        ),
        Mistake(
            "units-divided",
            "You divided by the number of latent units. That would be right for a rate that is a mean over units; here "
            "it is a sum over them, as in (2.9).",
            lambda: hidden_beta() / UNITS,
        ),
        Mistake(
            "units-multiplied",
            "You counted the latent units as well. But the rate of an image is a sum over its units by (2.9), so that "
            "this sum is no deviation from the ELBO.",
            lambda: hidden_beta() * UNITS,
        ),
    ],
)


# ---- 2.4 a step to repair ----


def step(
    state: TrainState,
    x: Tensor,
    noise: Tensor,
    *,
    sigma: Callable[[Tensor], Tensor] = lambda logvar: (0.5 * logvar).exp(),
    cross_entropy: Callable[[Tensor], Tensor] = lambda terms: terms.flatten(1).sum(1).mean(),
    variance: Callable[[Tensor], Tensor] = torch.exp,
    rate: Callable[[Tensor], Tensor] = lambda terms: terms.sum(1).mean(),
    update: bool = True,
) -> dict[str, Tensor]:
    """One update that raises the ELBO; the options are the places at which the mistakes differ."""
    net = state.nets["vae"]
    mu, logvar = net.encode(x)
    logits = net.decode(mu + sigma(logvar) * noise)
    loss = cross_entropy(F.binary_cross_entropy_with_logits(logits, x, reduction="none"))
    kl = rate(0.5 * (mu**2 + variance(logvar) - 1 - logvar))
    if update:
        state.minimize("vae", loss + kl)
    return {"elbo": -(loss + kl), "reconstruction": -loss, "kl": kl}


def _after_one_step(function: Callable, seed: int, x: Tensor, noise: Tensor) -> Any:
    """The figures of a step on a small network, and how far each weight has moved for a learning rate of one."""
    config = VAEConfig(z_dim=noise.shape[1], hidden=(6,))
    net = VAE(config, rng=torch.Generator().manual_seed(seed)).double()
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    state = TrainState({"vae": net}, {"vae": torch.optim.SGD(net.parameters(), lr=0.01)})
    figures = function(state, x, noise)
    if not isinstance(figures, Mapping):
        return figures
    after = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return {**figures, "weights": (after - before) / 0.01}


def _batches(rng: torch.Generator) -> list[tuple[int, Tensor, Tensor]]:
    cases = []
    for n, z_dim in ((5, 3), (1, 4), (3, 2)):
        seed = int(torch.randint(2**31, (), generator=rng))
        x = torch.bernoulli(torch.full((n, 1, 28, 28), 0.3, dtype=torch.float64), generator=rng)
        cases.append((seed, x, torch.randn(n, z_dim, generator=rng, dtype=torch.float64)))
    return cases


check_step = Function(
    number="2.4",
    title="Two mistakes in one step",
    kind="repair",
    reference=step,
    outcome=_after_one_step,
    cases=_batches,
    praise="Neither mistake raised an error, and with both the printed loss would have fallen.",
    mistakes=[
        Mistake(
            "nothing-mended",
            "This is still the step as it was handed out. Two lines of it contradict the lesson: ask of every number "
            "which units it has, and of every name whether it holds what it says.",
            functools.partial(step, sigma=torch.exp, cross_entropy=torch.mean),
        ),
        Mistake(
            "sigma-left",
            "The losses are in nats per image now. The other mistake stands where the code is drawn: compare what "
            "multiplies the noise with (2.11), and with what the encoder returns.",
            functools.partial(step, sigma=torch.exp),
        ),
        Mistake(
            "mean-left",
            "The code is drawn rightly now. But the two terms of the loss are not in the same units: one is in nats "
            "per image, the other in nats per pixel, and by (2.16) that is a β of 784.",
            functools.partial(step, cross_entropy=torch.mean),
        ),
        Mistake(
            "sum-over-batch",
            "Your cross-entropy is a sum over the images as well, while the rate is a mean over them. That makes β one "
            "divided by the batch size, and the last, smaller batch of an epoch has another one.",
            functools.partial(step, cross_entropy=torch.sum),
        ),
        Mistake(
            "all-summed",
            "Both terms are sums over the whole batch. Their ratio is right, but the figures are no longer nats per "
            "image, and a batch of twice the size takes a step of twice the length.",
            functools.partial(step, cross_entropy=torch.sum, rate=torch.sum),
        ),
        Mistake(
            "both-means",
            "You made the rate a mean over the units as well, to match. Two means do not cancel: with 784 pixels and d "
            "units β is 784/d. Both terms have to be sums within an image.",
            functools.partial(step, cross_entropy=torch.mean, rate=torch.mean),
        ),
        Mistake(
            "rate-a-mean",
            "The reconstruction is mended, but in your version the rate has become a mean over the latent units, where "
            "(2.9) has a sum: each nat of code costs only a fraction of a nat.",
            functools.partial(step, rate=torch.mean),
        ),
        Mistake(
            "rate-touched",
            "You replaced the exponential in the rate by a standard deviation, too. There the formula (2.9) has the "
            "variance, and it was right as it stood.",
            functools.partial(step, variance=lambda logvar: (0.5 * logvar).exp()),
        ),
        Mistake(
            "no-update",
            "The figures are right, but no weight has moved: the step must still hand its loss to the optimizer.",
            functools.partial(step, update=False),
        ),
    ],
)


# ---- 2.5 better codes for single images ----

DIGITS, DRAWS, WITHIN, MOST = 16, 200, 0.5, 3.0


@functools.cache
def _flat() -> VAE:
    """The model with two latent units that comes with the course."""
    checkpoint = checkpoints.load(course_dir() / "data" / "checkpoints" / "vae2d")
    model = VAE(VAEConfig(**checkpoint.card["config"]), rng=torch.Generator())  # not from the global generator
    model.load_state_dict(checkpoint.weights)
    return model.eval()


@functools.cache
def _digits() -> Tensor:
    return load_mnist(train=False).images


@torch.no_grad()
def _bound(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of the ELBO of each image, reconstruction and rate."""
    reconstruction = torch.stack([model.log_prob(x, reparameterize(mu, logvar, part)).mean(0) for part in noise])
    return reconstruction.mean(0), kl_to_standard_normal(mu, logvar)


def measure_gain(exercise: Exercise, refine: Any) -> None:
    """Judge ``refine(model, x, mu, logvar, rng)`` by the ELBO of fresh test digits, beside that of ``ascend``.

    How much there is to gain depends on the digits, a few of which the encoder takes for another one; which ascent
    finds the way out is a matter of luck. So no digit counts for more than ``MOST`` nats.
    """
    if not callable(refine):
        raise Wrong("hand over the function itself, without calling it.")
    rng = torch.Generator()
    rng.seed()
    model, images = copy.deepcopy(_flat()), _digits()
    x = binarize(images[torch.randperm(len(images), generator=rng)[:DIGITS]], rng)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        noise = torch.randn(DRAWS // 2, DIGITS, 2, generator=rng)
    with torch.enable_grad():
        result = refine(model, x.clone(), mu.clone(), logvar.clone(), rng)
    if result is None or result is ...:
        raise Untried
    new_mu, new_logvar = _codes(result, mu)
    if any(not torch.equal(a, b) for a, b in zip(model.parameters(), _flat().parameters(), strict=True)):
        raise exercise.wrong("model-changed")
    noise = torch.cat([noise, -noise])  # in pairs: half of the error of the measurement cancels
    codes = (mu, logvar), (new_mu, new_logvar), ascend(model, x, mu, logvar, rng)
    before, after, best = (_bound(_flat(), x, *code, noise.unflatten(0, (-1, 50))) for code in codes)
    reconstruction, rate = ((a - b).mean().item() for a, b in zip(after, before, strict=True))
    gain = reconstruction - rate
    behind = ((best[0] - best[1]) - (after[0] - after[1])).clamp(-MOST, MOST).mean().item()
    narrow = (new_logvar - codes[2][1]).mean() < -1.5  # no luck with the means makes up for such variances
    forgotten = narrow and reconstruction > -20  # downhill, where variances shrink as well, it falls by hundreds
    unchanged = torch.equal(new_mu, mu) and torch.equal(new_logvar, logvar)
    if behind <= WITHIN and not forgotten and not unchanged:
        return
    detail = (
        f"(The bound moved by {gain:+.3g} nats per digit: reconstruction {reconstruction:+.3g}, rate {rate:+.3g}. "
        f"You are {behind:.3g} behind the plain ascent.)"
    )
    if unchanged:
        raise exercise.wrong("unchanged", detail)
    if forgotten:
        raise exercise.wrong("rate-forgotten", detail)
    if gain >= 0:
        raise exercise.wrong("not-enough", detail)
    if new_logvar.mean() - logvar.mean() > 1 and rate < 0:
        raise exercise.wrong("no-noise", detail)
    if reconstruction < 0 and rate >= 0:
        raise exercise.wrong("downhill", detail)
    raise exercise.wrong("worse", detail)


def ascend(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Forty steps of Adam up the ELBO of each image, from the encoder's code, with eight draws for each step."""
    code = torch.stack([mu, logvar]).requires_grad_()
    adam = torch.optim.Adam([code], lr=0.1)
    for _ in range(40):
        z = reparameterize(*code, torch.randn(8, *mu.shape, generator=rng))
        loss = (kl_to_standard_normal(*code) - model.log_prob(x, z).mean(0)).sum()
        adam.zero_grad()
        loss.backward(inputs=[code])
        adam.step()
    return code[0].detach(), code[1].detach()


def _codes(result: Any, mu: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors of an answer, or ``Wrong``."""
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(t, Tensor) for t in result):
        raise Wrong("two tensors are asked for, the new means and the new log-variances.")
    for name, part in zip(("mu", "logvar"), result, strict=True):
        if part.shape != mu.shape:
            raise Wrong(f"your {name} has the shape {tuple(part.shape)}: {tuple(mu.shape)} is asked for.")
        if not part.isfinite().all():
            raise Wrong(f"your {name} holds numbers that are infinite or none: was a step too long?")
    return tuple(part.detach().float() for part in result)


check_refine = Goal(
    number="2.5",
    title="Do better than the encoder",
    kind="open",
    measure=measure_gain,
    seconds=60.0,
    praise="What you gained was the encoder's share of the gap in (2.5), the price of amortised inference.",
    mistakes=[
        Mistake(
            "unchanged",
            "You return the encoder's own codes. Did the optimizer get copies of them, or is a step missing?",
        ),
        Mistake(
            "model-changed",
            "Your function has changed the weights of the model. log p(x) itself then moves, and the comparison says "
            "nothing about q; give the optimizer the two tensors of the code and nothing else.",
        ),
        Mistake(
            "rate-forgotten",
            "Your variances are far smaller than is worth their price: one that falls by a factor of e costs half a "
            "nat. Is the rate part of what you maximise? Without it, they shrink for as long as you let them.",
        ),
        Mistake(
            "no-noise",
            "Your variances have grown towards those of the prior, as if nothing but the rate spoke about them. They "
            "matter to the reconstruction only if z is drawn from q: log p(x|z) at the mean is not its expectation.",
        ),
        Mistake(
            "downhill",
            "Both parts of the bound are worse than before. An optimizer minimises: is the sign of the whole right?",
        ),
        Mistake(
            "worse",
            "The bound has fallen, in no manner known here. Look at its value after every few steps: if it jumps "
            "about, the steps are too long or the draws too few.",
        ),
        Mistake(
            "not-enough",
            f"The direction is right, but the plain ascent is more than {WITHIN:g} nats per digit ahead of you. Take "
            "more steps, or longer ones, or more draws for each of them.",
        ),
    ],
)


# ---- 2.6 what beta does to a code ----


def best_code(x: Tensor, W: Tensor, s: float, beta: float) -> tuple[Tensor, Tensor]:
    """The means (n, d) and the variances (d,) of the diagonal Gaussian that is best for the objective with ``beta``."""
    precision = beta * torch.eye(W.shape[1], dtype=W.dtype) + W.T @ W / s**2
    return torch.linalg.solve(precision, W.T @ x.T / s**2).T, beta / precision.diagonal()


def _linear_models(rng: torch.Generator) -> list[tuple[Tensor, Tensor, float, float]]:
    cases = []
    for n, outputs, d in ((5, 4, 2), (1, 6, 3), (3, 3, 3)):
        x, W = (torch.randn(rows, outputs, generator=rng, dtype=torch.float64) for rows in (n, d))
        s, beta = (0.3 + torch.rand(2, generator=rng, dtype=torch.float64)).tolist()
        cases.append((x, W.T.contiguous(), s, 3 * beta + 0.5))
    return cases


def _mean_by_coordinate(x: Tensor, W: Tensor, s: float, beta: float) -> tuple[Tensor, Tensor]:
    _, variance = best_code(x, W, s, beta)
    return variance * (x @ W) / (beta * s**2), variance


check_best_code = Function(
    number="2.6",
    title="What β does to a code",
    kind="derivation",
    reference=best_code,
    cases=_linear_models,
    praise="It is the code of a decoder whose noise variance is β s²: a price on the rate acts like noise.",
    mistakes=[
        Mistake(
            "beta-forgotten",
            "This is the best q for β = 1, whatever β is handed over. Write down the objective with β before the rate, "
            "and differentiate that.",
            lambda x, W, s, beta: best_code(x, W, s, 1.0),
        ),
        Mistake(
            "beta-inverted",
            "Your β works the wrong way round: with a greater β the code follows x more closely, and its variance "
            "falls. The weight belongs to the rate, not to the reconstruction.",
            lambda x, W, s, beta: best_code(x, W, s, 1 / beta),
        ),
        Mistake(
            "marginal-variance",
            "The means are right. Your variances are the diagonal of an inverse, those of a q with correlations; the "
            "best diagonal q has the inverse of each diagonal entry, as before (2.8).",
            lambda x, W, s, beta: (
                best_code(x, W, s, beta)[0],
                torch.linalg.inv(torch.eye(W.shape[1], dtype=W.dtype) + W.T @ W / (beta * s**2)).diagonal(),
            ),
        ),
        Mistake(
            "mean-by-coordinate",
            "The variances are right. For the means you solved each coordinate as if the others were zero; where the "
            "columns of W are not orthogonal, the derivative by one mean contains the others.",
            _mean_by_coordinate,
        ),
        Mistake(
            "variance-without-beta",
            "The means are right, but β is missing from the variances. The rate contains the variance too, in two of "
            "its terms, and β multiplies both.",
            lambda x, W, s, beta: (best_code(x, W, s, beta)[0], best_code(x, W, s, 1.0)[1]),
        ),
        Mistake(
            "mean-without-beta",
            "The variances are right, but β is missing from the means. The rate pulls each mean to zero, and β says "
            "how strongly.",
            lambda x, W, s, beta: (best_code(x, W, s, 1.0)[0], best_code(x, W, s, beta)[1]),
        ),
        Mistake(
            "s-not-squared",
            "You divide by s where the Gaussian has its variance: s is the standard deviation of the decoder's noise.",
            lambda x, W, s, beta: best_code(x, W, math.sqrt(s), beta),
        ),
        Mistake(
            "numerator-lost",
            "The means are right. Your variances lack β in the numerator: where W is zero the data say nothing, and "
            "the best variance must be that of the prior, one, at any price.",
            lambda x, W, s, beta: (best_code(x, W, s, beta)[0], best_code(x, W, s, beta)[1] / beta),
        ),
    ],
)
