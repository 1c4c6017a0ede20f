"""Right and wrong answers to the exercises of lesson 03, written as readers write them."""

import math

import numpy as np
import torch
from answers import Answers
from torch.nn import functional as F

# ---- 3.1 ----


def logit_from_odds(log_p, log_q, share, label):
    """-log of (1 - D) / D, which is (1 - label) / label + (1 - share) q / (share label p)."""
    soft = torch.full_like(log_p, math.log((1 - label) / label))
    return -torch.logaddexp(soft, math.log((1 - share) / (share * label)) + (log_q - log_p))


def hard_label(log_p, log_q, share, label):
    return (math.log(share) + log_p) - (math.log(1 - share) + log_q)


def label_times_ratio(log_p, log_q, share, label):
    return torch.stack(
        [math.log(share * label) + a - math.log(1 - share) - b for a, b in zip(log_p, log_q, strict=True)]
    )


def equal_shares(log_p, log_q, share, label):
    return math.log(label) + log_p - torch.logaddexp(math.log(1 - label) + log_p, log_q)


def share_of_fakes(log_p, log_q, share, label):
    both = torch.stack([math.log((1 - share) * (1 - label)) + log_p, math.log(share) + log_q])
    return math.log((1 - share) * label) + log_p - both.logsumexp(0)


def both_labels_soft(log_p, log_q, share, label):
    mass = torch.stack([log_p, log_q], dim=1) + torch.tensor([share, 1 - share]).log()
    labels = torch.tensor([label, 1 - label])
    return (mass + labels.log()).logsumexp(1) - (mass + (1 - labels).log()).logsumexp(1)


def probability_of_real(log_p, log_q, share, label):
    real, fake = log_p + math.log(share), log_q + math.log(1 - share)
    return label * torch.sigmoid(real - fake)


def fake_over_real(log_p, log_q, share, label):
    real, fake = log_p + math.log(share), log_q + math.log(1 - share)
    return torch.logaddexp(fake, real + math.log(1 - label)) - real - math.log(label)


def by_densities(log_p, log_q, share, label):
    p, q = torch.exp(log_p), torch.exp(log_q)
    return torch.log(share * label * p / (share * (1 - label) * p + (1 - share) * q))


# ---- 3.2 ----


def by_loops(weigh, *, mean=True, through_w=True, sign=-1.0):
    """A reader's answer with loops: ``weigh(D, kind)`` is what a fake counts."""

    def gradients(z, theta, s, w, b, kind):
        d_theta, d_s = torch.zeros_like(theta), torch.zeros_like(s)
        for latent in z:
            logit = sum(w[i] * (theta[i] + s[i] * latent[i]) for i in range(len(w))) + b
            felt = sign * weigh(1 / (1 + math.exp(-logit)), kind)
            for i in range(len(w)):
                slope = w[i] if through_w else 1.0
                d_theta[i] += felt * slope
                d_s[i] += felt * slope * latent[i]
        return (d_theta / len(z), d_s / len(z)) if mean else (d_theta, d_s)

    return gradients


def strength(d, kind):
    return {"minimax": d, "non_saturating": 1 - d}[kind]


def pulls_by_matrices(z, theta, s, w, b, kind):
    x = theta + z * s
    odds = torch.exp(-(x * w).sum(1) - b)
    felt = 1 / (1 + odds) if kind == "minimax" else odds / (1 + odds)
    return -w * (felt.sum() / len(z)), -w * (felt @ z) / len(z)


def no_latent_in_s(z, theta, s, w, b, kind):
    felt = strength(torch.sigmoid((theta + s * z) @ w + b), kind)
    both = -(felt[:, None] * w).mean(0)
    return both, both.clone()


def mean_times_mean(z, theta, s, w, b, kind):
    felt = strength(torch.sigmoid((theta + s * z) @ w + b), kind)
    return -felt.mean() * w, -felt.mean() * z.mean(0) * w


# ---- 3.3 ----


def transport_by_quantiles(x, y):
    """Each point of x stands for len(y) grains, each of y for len(x): then as many grains on both sides, in order."""
    grains_x = np.repeat(np.sort(x.numpy()), len(y))
    grains_y = np.repeat(np.sort(y.numpy()), len(x))
    return torch.tensor(np.abs(grains_x - grains_y).mean())


def sorted_and_zipped(x, y):
    pairs = list(zip(sorted(x.tolist()), sorted(y.tolist()), strict=False))
    return torch.tensor(sum(abs(a - b) for a, b in pairs) / len(pairs), dtype=torch.float64)


def zipped(x, y):
    ways = [abs(a - b) for a, b in zip(x, y, strict=False)]
    return sum(ways) / len(ways)


def integrate(height):
    """The integral, interval by interval, of a function of the two distribution functions."""

    def work(x, y):
        places = sorted(x.tolist() + y.tolist())
        total = torch.zeros((), dtype=torch.float64)
        for left, right in zip(places, places[1:], strict=False):
            total += (right - left) * height((x <= left).sum().item(), (y <= left).sum().item(), len(x), len(y))
        return total

    return work


def heights_without_widths(x, y):
    places = torch.cat([x, y]).sort().values
    f_x = torch.searchsorted(x.sort().values, places, right=True) / len(x)
    f_y = torch.searchsorted(y.sort().values, places, right=True) / len(y)
    return (f_x - f_y).abs().double().sum()


# ---- 3.4 ----


def on_the_ring(turn, radius=2.0):
    """The point after ``turn`` eighths of the way round."""
    return radius * torch.stack([torch.cos(turn * math.pi / 4), torch.sin(turn * math.pi / 4)], dim=1)


def eighths(z):
    """The first latent as a uniform number from 0 to 8."""
    return 4 * (1 + torch.erf(z[:, 0] / math.sqrt(2)))


def walk(u, share):
    """Rest at each whole number; the last ``share`` of each unit is the way to the next."""
    return u.floor() + ((u - u.floor() - 1 + share) / share).clamp(min=0)


def stairs(z):
    return on_the_ring(walk(eighths(z), 0.03)) + 0.01 * z[:, 1:]


def round_the_circle(z):
    return on_the_ring(8 * torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi))


# ---- 3.5 ----


def power_of_matrix(h, rounds):
    """How far the matrix of a round takes (1, 0)."""
    return np.linalg.norm(np.linalg.matrix_power(np.array([[1.0, h], [-h, 1.0]]), rounds) @ [1.0, 0.0])


def of_taking_turns(h, rounds):
    """The constant of the ellipse on which players who take turns stay."""
    theta, psi = 1.0, 0.0
    for _ in range(rounds):
        psi -= h * theta
        theta += h * psi
    return math.sqrt(theta**2 + psi**2 - h * theta * psi)


# ---- 3.6 ----


def step_with_frozen_players(generator, discriminator, g_optimizer, d_optimizer, real, z):
    """Right: the fakes of D's turn are drawn without a graph, and D is frozen in G's turn."""
    with torch.no_grad():
        shown = generator(z)
    logits = torch.cat([discriminator(real), discriminator(shown)])
    labels = torch.cat([torch.ones(len(real)), torch.zeros(len(z))])
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    d_loss = losses[: len(real)].mean() + losses[len(real) :].mean()
    discriminator.zero_grad()
    d_loss.backward()
    d_optimizer.step()
    discriminator.requires_grad_(False)
    g_loss = -F.logsigmoid(discriminator(generator(z))).mean()
    generator.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    discriminator.requires_grad_(True)
    return d_loss.item(), g_loss.item()


def d_loss_of(discriminator, real, fake):
    return -F.logsigmoid(discriminator(real)).mean() - F.logsigmoid(-discriminator(fake)).mean()


def g_loss_of(discriminator, fake):
    return -F.logsigmoid(discriminator(fake)).mean()


def as_it_was(generator, discriminator, g_optimizer, d_optimizer, real, z):
    fake = generator(z)
    d_loss = d_loss_of(discriminator, real, fake)
    d_optimizer.zero_grad()
    d_loss.backward(retain_graph=True)
    d_optimizer.step()
    g_loss = g_loss_of(discriminator, fake)
    g_loss.backward()
    g_optimizer.step()
    return d_loss.item(), g_loss.item()


def only_detached(generator, discriminator, g_optimizer, d_optimizer, real, z):
    fake = generator(z)
    d_loss = d_loss_of(discriminator, real, fake.detach())
    discriminator.zero_grad()
    d_loss.backward()
    d_optimizer.step()
    g_loss = g_loss_of(discriminator, fake)
    g_loss.backward()
    g_optimizer.step()
    return d_loss.item(), g_loss.item()


def only_cleared(generator, discriminator, g_optimizer, d_optimizer, real, z):
    fake = generator(z)
    d_loss = d_loss_of(discriminator, real, fake)
    d_optimizer.zero_grad()
    d_loss.backward(retain_graph=True)
    d_optimizer.step()
    g_optimizer.zero_grad()
    g_loss = g_loss_of(discriminator, fake)
    g_loss.backward()
    g_optimizer.step()
    return d_loss.item(), g_loss.item()


def detached_once_for_all(generator, discriminator, g_optimizer, d_optimizer, real, z):
    fake = generator(z).detach()
    d_loss = d_loss_of(discriminator, real, fake)
    d_optimizer.zero_grad()
    d_loss.backward()
    d_optimizer.step()
    g_loss = g_loss_of(discriminator, fake)
    g_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    return d_loss.item(), g_loss.item()


def wrong_player_cleared(generator, discriminator, g_optimizer, d_optimizer, real, z):
    g_optimizer.zero_grad()
    fake = generator(z)
    d_loss = d_loss_of(discriminator, real, fake.detach())
    d_loss.backward()
    d_optimizer.step()
    g_loss = g_loss_of(discriminator, fake)
    g_loss.backward()
    g_optimizer.step()
    return d_loss.item(), g_loss.item()


def generator_first(generator, discriminator, g_optimizer, d_optimizer, real, z):
    fake = generator(z)
    g_loss = g_loss_of(discriminator, fake)
    g_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    d_loss = d_loss_of(discriminator, real, fake.detach())
    d_optimizer.zero_grad()
    d_loss.backward()
    d_optimizer.step()
    return d_loss.item(), g_loss.item()


ANSWERS = {
    "check_best_logit": Answers(
        second=logit_from_odds,
        wrong={
            "the-old-game": [lambda log_p, log_q, share, label: -torch.sub(log_q, log_p)],
            "label-ignored": [hard_label],
            "label-on-one-side-only": [label_times_ratio],
            "share-ignored": [equal_shares],
            "share-of-the-wrong-side": [share_of_fakes],
            "fakes-softened-too": [both_labels_soft],
            "a-probability": [probability_of_real],
            "odds-upside-down": [fake_over_real],
            "through-the-densities": [by_densities],
        },
    ),
    "check_pulls": Answers(
        second=pulls_by_matrices,
        wrong={
            "chain-rule-half-done": [by_loops(lambda d, kind: 1 / (1 - d) if kind == "minimax" else 1 / d)],
            "strengths-exchanged": [by_loops(lambda d, kind: 1 - strength(d, kind))],
            "kind-ignored": [by_loops(lambda d, kind: d)],
            "a-sum-over-the-batch": [by_loops(strength, mean=False)],
            "the-same-for-both-parameters": [no_latent_in_s],
            "stopped-at-the-logit": [by_loops(strength, through_w=False)],
            "product-of-means": [mean_times_mean],
            "uphill": [by_loops(strength, sign=1.0)],
        },
    ),
    "check_transport": Answers(
        second=transport_by_quantiles,
        wrong={
            "cut-to-the-shorter": [sorted_and_zipped],
            "paired-as-they-come": [zipped],
            "only-the-means": [lambda x, y: (x.sum() / len(x) - y.sum() / len(y)).norm()],
            "without-the-absolute-value": [
                integrate(lambda a, b, n, m: a / n - b / m),
                lambda x, y: y.mean() - x.mean(),
            ],
            "counts-for-shares": [integrate(lambda a, b, n, m: abs(a - b))],
            "heights-without-widths": [heights_without_widths],
            "squared": [integrate(lambda a, b, n, m: (a / n - b / m) ** 2)],
            "every-pair": [lambda x, y: sum(abs(a - b) for a in x for b in y) / (len(x) * len(y))],
        },
    ),
    "check_ring": Answers(
        second=stairs,
        wrong={
            "not-on-the-ring": [lambda z: z, lambda z: on_the_ring(walk(eighths(z), 0.03), radius=1.0)],
            "collapsed": [lambda z: on_the_ring(0 * z[:, 0]), lambda z: on_the_ring(4.0 * (z[:, 0] > 0))],
            "no-stops": [round_the_circle, lambda z: 2 * z / z.norm(dim=1, keepdim=True)],
            "bridges-too-long": [lambda z: on_the_ring(walk(eighths(z), 0.3))],
            "noise-too-wide": [lambda z: on_the_ring(eighths(z).floor()) + 0.05 * z.flip(1)],
            "modes-left-out": [lambda z: on_the_ring(walk(eighths(z) * 7 / 8, 0.02))],
            "unfair-shares": [lambda z: on_the_ring((2 * z[:, 0]).round().clamp(-4, 3))],
            "torn": [
                lambda z: on_the_ring(torch.atan2(z[:, 1], z[:, 0]).mul(4 / math.pi).round()),
                lambda z: on_the_ring(eighths(z).floor()),
            ],
        },
    ),
    "check_distance": Answers(
        second=power_of_matrix(0.1, 200),
        wrong={
            "they-keep-their-distance": [abs(np.exp(20j)), of_taking_turns(0.1, 200)],
            "square-root-forgotten": [1.01**200, (1 + 0.1**2) ** 200],
            "inwards": [1.01**-100],
            "as-if-real": [1.1**200],
            "growth-added": [1 + 200 * 0.1**2 / 2],
            "half-of-the-rounds": [1.01**50],
        },
    ),
    "check_mended_step": Answers(
        second=step_with_frozen_players,
        wrong={
            "still-tangled": [as_it_was],
            "gradients-of-earlier-steps": [only_detached],
            "pays-for-the-generator": [only_cleared],
            "generator-stands-still": [detached_once_for_all],
            "leftovers-in-the-discriminator": [wrong_player_cleared],
            "generator-goes-first": [generator_first],
        },
    ),
}
