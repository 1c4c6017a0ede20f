"""Answers to the exercises of lesson 01: a second right one each, and what people write who make a known mistake."""

import math

import torch
from answers import Answers
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from aigc_course import gmm
from aigc_course.datasets import toy_mixture

# ---- 1.1 ----


def logit_by_evaluation(weight, first, second, covariance):
    """The function is linear: its value at zero, and its change along each axis."""
    one, two = MultivariateNormal(first, covariance), MultivariateNormal(second, covariance)
    d = len(first)
    at = torch.cat([torch.zeros(1, d), torch.eye(d)]).to(first)
    ratio = math.log(weight / (1 - weight)) + one.log_prob(at) - two.log_prob(at)
    return ratio[1:] - ratio[0], ratio[0].item()


def squares(mean, precision):
    return sum(mean[i] * precision[i, j] * mean[j] for i in range(len(mean)) for j in range(len(mean)))


def logit_uninverted(weight, first, second, covariance):
    offset = math.log(weight / (1 - weight)) - (squares(first, covariance) - squares(second, covariance)) / 2
    return covariance @ (first - second), offset


def logit_of_second(weight, first, second, covariance):
    p = covariance.inverse()
    return p @ second - p @ first, math.log((1 - weight) / weight) + (squares(first, p) - squares(second, p)) / 2


def logit_without_weights(weight, first, second, covariance):
    p = covariance.inverse()
    return p @ first - p @ second, 0.5 * squares(second, p) - 0.5 * squares(first, p)


def logit_with_one_weight(weight, first, second, covariance):
    p = covariance.inverse()
    return p @ first - p @ second, math.log(weight) + 0.5 * squares(second, p) - 0.5 * squares(first, p)


def logit_without_means(weight, first, second, covariance):
    return torch.cholesky_solve((first - second)[:, None], torch.linalg.cholesky(covariance))[:, 0], -math.log(
        1 / weight - 1
    )


def logit_without_half(weight, first, second, covariance):
    p = covariance.inverse()
    return p @ first - p @ second, math.log(weight / (1 - weight)) + squares(second, p) - squares(first, p)


def logit_with_distance(weight, first, second, covariance):
    p = covariance.inverse()
    return p @ first - p @ second, math.log(weight / (1 - weight)) - 0.5 * squares(first - second, p)


# ---- 1.2 ----


def log_joint_of(x, weights, means, variances):
    """log p(z, x), component by component."""
    columns = []
    for k in range(len(weights)):
        columns.append(weights[k].log() + Normal(means[k], variances[k].sqrt()).log_prob(x).sum(1))
    return torch.stack(columns, dim=1)


def e_step_multiplied_out(x, weights, means, variances):
    """Squares multiplied out, which rounds most of all right answers."""
    precisions = 1 / variances
    squares = x**2 @ precisions.T - 2 * x @ (means * precisions).T + (means**2 * precisions).sum(1)
    joint = torch.log(weights) - squares / 2 - variances.log().sum(1) / 2 - x.shape[1] / 2 * math.log(2 * math.pi)
    return joint.softmax(1), joint.logsumexp(1)


def e_step_naive(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances).exp()
    return joint / joint.sum(1, keepdim=True), joint.sum(1).log()


def e_step_with_epsilon(size):
    def e_step(x, weights, means, variances):
        joint = log_joint_of(x, weights, means, variances).exp()
        density = joint.sum(1) + size
        return joint / density[:, None], density.log()

    return e_step


def e_step_clamped(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances).exp().clamp(min=1e-37)
    return joint / joint.sum(1, keepdim=True), joint.sum(1).log()


def e_step_without_nan(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances).exp()
    density = joint.sum(1)
    return torch.nan_to_num(joint / density[:, None]), torch.nan_to_num(density.log())


def e_step_in_doubles(x, weights, means, variances):
    return e_step_naive(x.double(), weights.double(), means.double(), variances.double())


def e_step_with_one_maximum(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances)
    scaled = (joint - joint.max()).exp()
    return scaled / scaled.sum(1, keepdim=True), scaled.sum(1).log() + joint.max()


def e_step_over_samples(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances)
    return joint.softmax(dim=0), joint.logsumexp(1)


def e_step_over_samples_by_hand(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances)
    return (joint - joint.logsumexp(0)).exp(), joint.logsumexp(1)


def e_step_without_maximum(x, weights, means, variances):
    joint = log_joint_of(x, weights, means, variances)
    scaled = (joint - joint.amax(1, keepdim=True)).exp()
    return scaled / scaled.sum(1, keepdim=True), scaled.sum(1).log()


def e_step_without_weights(x, weights, means, variances):
    joint = log_joint_of(x, torch.ones_like(weights), means, variances)
    return joint.softmax(1), joint.logsumexp(1)


def e_step_with_equal_weights(x, weights, means, variances):
    joint = log_joint_of(x, torch.full_like(weights, 1 / len(weights)), means, variances)
    return joint.softmax(1), joint.logsumexp(1)


def e_step_weights_in_density_only(x, weights, means, variances):
    gaussians = log_joint_of(x, torch.ones_like(weights), means, variances)
    return gaussians.softmax(1), (gaussians + weights.log()).logsumexp(1)


def e_step_of_deviations(x, weights, means, variances):
    bells = Normal(means, variances).log_prob(x[:, None]).sum(2)
    joint = bells + weights.log()
    return joint.softmax(1), joint.logsumexp(1)


# ---- 1.4 ----


def responsibilities(x, weights, means, variances):
    bells = torch.stack([Normal(m, v.sqrt()).log_prob(x).sum(1) for m, v in zip(means, variances, strict=True)], 1)
    return (weights.log() + bells).softmax(1)


def round_by_diagonal(x, weights, means, variances):
    """The mean of the variances that the package finds along the axes."""
    shares, centres, diagonals = gmm.m_step(x, responsibilities(x, weights, means, variances), covariance="diag")
    return shares, centres, diagonals.mean(1)


def round_in_loops(x, weights, means, variances, around=None, divide=lambda count, n, d: count * d):
    gammas = responsibilities(x, weights, means, variances)
    n, d = x.shape
    shares, centres, spreads = [], [], []
    for k in range(len(weights)):
        count = sum(gammas[i, k] for i in range(n))
        centre = sum(gammas[i, k] * x[i] for i in range(n)) / count
        origin = centre if around is None else around[k]
        total = sum(gammas[i, k] * ((x[i] - origin) ** 2).sum() for i in range(n))
        shares.append(count / n)
        centres.append(centre)
        spreads.append(total / divide(count, n, d))
    return torch.stack(shares), torch.stack(centres), torch.stack(spreads)


def round_without_dimension(x, weights, means, variances):
    return round_in_loops(x, weights, means, variances, divide=lambda count, n, d: count)


def round_over_all(x, weights, means, variances):
    return round_in_loops(x, weights, means, variances, divide=lambda count, n, d: n * d)


def round_around_old_means(x, weights, means, variances):
    return round_in_loops(x, weights, means, variances, around=means)


def round_of_deviations(x, weights, means, variances):
    shares, centres, spreads = round_in_loops(x, weights, means, variances)
    return shares, centres, spreads**0.5


def round_with_old_weights(x, weights, means, variances):
    _, centres, spreads = round_in_loops(x, weights, means, variances)
    return weights, centres, spreads


def round_by_volume(x, weights, means, variances):
    gammas = responsibilities(x, weights, means, variances)
    shares, centres, _ = round_in_loops(x, weights, means, variances)
    volumes = []
    for gamma, centre in zip(gammas.T, centres, strict=True):
        full = torch.cov(x.T, aweights=gamma, correction=0)
        volumes.append((full.logdet() / len(centre)).exp())
    return shares, centres, torch.stack(volumes)


# ---- 1.6 ----


def start_by_drawing(x, k, rng):
    """k-means++ with five candidates for each choice; round covariances as wide as the nearest samples lie."""
    chosen = x[:1]
    while len(chosen) < k:
        squares = torch.cdist(x, chosen).amin(1).square()
        candidates = torch.multinomial(squares, 5, generator=rng)
        left = [torch.cdist(x, torch.cat([chosen, x[c : c + 1]])).amin(1).square().sum() for c in candidates]
        chosen = torch.cat([chosen, x[candidates[int(torch.stack(left).argmin())]][None]])
    variance = torch.cdist(x, chosen).amin(1).square().mean() / 2
    return torch.full((k,), 1 / k), chosen, variance * torch.eye(2).repeat(k, 1, 1)


def start_anywhere(x, k, rng):
    chosen = torch.randperm(len(x), generator=rng)[:k]
    return torch.full((k,), 1 / k), x[chosen], torch.cov(x.T).repeat(k, 1, 1)


def start_anywhere_narrow(x, k, rng):
    chosen = torch.randperm(len(x), generator=rng)[:k]
    return torch.full((k,), 1 / k), x[chosen], 0.01 * torch.cov(x.T).repeat(k, 1, 1)


def start_at_the_first(x, k, rng):
    return torch.ones(k) / k, x[:k], torch.eye(2).repeat(k, 1, 1)


def start_together(x, k, rng):
    return torch.ones(k) / k, x.mean(0).repeat(k, 1), torch.cov(x.T).repeat(k, 1, 1)


def start_in_pairs(x, k, rng):
    chosen = torch.randperm(len(x), generator=rng)[: k // 2].repeat(2)
    return torch.ones(k) / k, x[chosen], torch.cov(x.T).repeat(k, 1, 1)


def start_from_the_truth(x, k, rng):
    return toy_mixture("ring")


def start_from_noise(x, k, rng):
    return torch.ones(k) / k, torch.randn(k, 2, generator=rng), torch.eye(2).repeat(k, 1, 1)


def start_between(x, k, rng):
    """Seven places around the middle, too narrow to reach any group but through the eighth."""
    means = x.mean(0) + 0.05 * x.std(0) * torch.randn(k, 2, generator=rng)
    means[0] = x[0]
    return torch.ones(k) / k, means, 1e-4 * torch.eye(2).repeat(k, 1, 1)


def start_on_a_lattice(x, k, rng):
    low, high = x.amin(0), x.amax(0)
    steps = torch.cartesian_prod(torch.linspace(0.2, 0.8, 4), torch.linspace(0.3, 0.7, 2))
    return torch.ones(k) / k, low + (high - low) * steps, 1e-3 * torch.eye(2).repeat(k, 1, 1)


def start_without_sum(x, k, rng):
    return torch.ones(k), x[:k], torch.eye(2).repeat(k, 1, 1)


def start_with_variances(x, k, rng):
    return torch.ones(k) / k, x[:k], torch.ones(k, 2)


def start_flat(x, k, rng):
    return torch.ones(k) / k, x[:k], torch.zeros(k, 2, 2)


def spike(deviation, n=40, d=3, weight=0.1):
    """The total log-likelihood with a component on the first sample, by ``torch.distributions``."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = torch.tensor([deviation, 1.0], dtype=torch.float64)[:, None, None] * torch.eye(d, dtype=torch.float64)
    bells = MultivariateNormal(torch.stack([x[0], 0 * x[0]]), scale_tril=scales)
    return MixtureSameFamily(Categorical(torch.tensor([weight, 1 - weight]).double()), bells).log_prob(x).sum()


def kl(p, q):
    return torch.distributions.kl_divergence(Categorical(torch.tensor(p)), Categorical(torch.tensor(q))).item()


EVEN, SKEWED = [0.5, 0.5], [0.9, 0.1]

ANSWERS = {
    "check_logit": Answers(
        second=logit_by_evaluation,
        wrong={
            "covariance-not-inverted": [logit_uninverted],
            "other-component": [logit_of_second],
            "weights-forgotten": [logit_without_weights],
            "weight-without-odds": [logit_with_one_weight],
            "position-lost": [logit_without_means],
            "half-missing": [logit_without_half],
            "square-of-difference": [logit_with_distance],
        },
    ),
    "check_e_step": Answers(
        second=e_step_multiplied_out,
        wrong={
            "underflow": [e_step_naive],
            "patched": [
                *map(e_step_with_epsilon, (1e-6, 1e-12, 1e-30, 1e-45)),
                e_step_clamped,
                e_step_without_nan,
            ],
            "more-digits": [e_step_in_doubles],
            "one-maximum-for-all": [e_step_with_one_maximum],
            "wrong-axis": [e_step_over_samples, e_step_over_samples_by_hand],
            "maximum-lost": [e_step_without_maximum],
            "weights-forgotten": [e_step_without_weights, e_step_with_equal_weights, e_step_weights_in_density_only],
            "variance-as-deviation": [e_step_of_deviations],
        },
    ),
    "check_gap": Answers(
        second=kl(EVEN, SKEWED),
        wrong={
            "divergence-reversed": [kl(SKEWED, EVEN), 0.368],
            "entropy-dropped": [kl(EVEN, SKEWED) + Categorical(torch.tensor(EVEN)).entropy().item(), 1.2],
            "bits": [0.5 * math.log2(0.5 / 0.9) + 0.5 * math.log2(5), 0.737],
            "no-gap": [0, 0.0, torch.tensor(0.0)],
            "sign": [-kl(EVEN, SKEWED), -0.51],
            "entropy-alone": [Categorical(torch.tensor(EVEN)).entropy().item(), 0.693],
        },
    ),
    "check_round": Answers(
        second=round_by_diagonal,
        wrong={
            "dimension-forgotten": [round_without_dimension],
            "over-n": [round_over_all],
            "standard-deviation": [round_of_deviations],
            "old-means": [round_around_old_means],
            "old-weights": [round_with_old_weights],
            "determinant": [round_by_volume],
        },
    ),
    "check_collapse": Answers(
        second=spike(1e-6) - spike(1e-4),
        wrong={
            "one-dimension": [spike(1e-6, d=1) - spike(1e-4, d=1), 4.6],
            "all-samples": [40 * (spike(1e-6) - spike(1e-4)), 553],
            "decades": [3 * math.log10(1e-4 / 1e-6), 6],
            "variance-unhalved": [spike(1e-8) - spike(1e-4), 27.6],
            "deviation-halved": [spike(1e-5) - spike(1e-4), 6.9],
            "bounded": [0, 0.0],
            "falls": [spike(1e-4) - spike(1e-6), -13.8],
            "weighted": [0.1 * (spike(1e-6) - spike(1e-4)), 1.38],
            "per-sample": [(spike(1e-6) - spike(1e-4)) / 40, 0.345],
        },
    ),
    "check_start": Answers(
        second=start_by_drawing,
        wrong={
            "lower-hill": [start_anywhere, start_anywhere_narrow, start_at_the_first],
            "twins": [start_together, start_in_pairs],
            "ignores-data": [start_from_the_truth, start_from_noise],
            "empty-component": [start_between, start_on_a_lattice],
            "illegal-start": [start_without_sum, start_with_variances, start_flat],
        },
    ),
}
