"""The exercises of lesson 03: the best discriminator, the pull on a generator, transport on a line, a ring, an orbit, a
step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets import toy_mixture
from ..gan import Discriminator, GANConfig, Generator
from ..metrics import mode_coverage
from .exercise import Function, Goal, Mistake, Number, Wrong

# ---- 3.1 the best discriminator, with unequal shares and a soft label ----


def best_logit(log_p: Tensor, log_q: Tensor, share: float, label: float, *, fake_label: float = 0.0) -> Tensor:
    """Where share p (label / D - (1 - label) / (1 - D)) = (1 - share) q / (1 - D), and so for softened fakes."""
    real, fake = log_p + math.log(share), log_q + math.log1p(-share)
    up, down = real + math.log(label), torch.logaddexp(real + math.log1p(-label), fake)
    if fake_label:
        up = torch.logaddexp(up, fake + math.log(fake_label))
        down = torch.logaddexp(real + math.log1p(-label), fake + math.log1p(-fake_label))
    return up - down


def _logit_through_exp(log_p: Tensor, log_q: Tensor, share: float, label: float) -> Tensor:
    p, q = share * log_p.exp(), (1 - share) * log_q.exp()
    return (label * p).log() - ((1 - label) * p + q).log()


def _log_densities(rng: torch.Generator) -> list[tuple]:
    """Shares far from one half, labels below one; some places lie so far out that float32 has no densities there."""
    far = torch.tensor([[-300.0, -304.0], [-310.0, -300.0], [-250.0, -3.0]])
    cases = []
    for n, least in ((7, 0.1), (1, 0.6), (12, 0.6)):
        near = -40 * torch.rand(n, 2, generator=rng)
        near[0] = -3 * torch.rand(2, generator=rng)  # here both densities count
        log_p, log_q = (near if n == 1 else torch.cat([near, far])).T
        share, label = (lowest + 0.3 * torch.rand((), generator=rng).item() for lowest in (least, 0.65))
        cases.append((log_p, log_q, share, label))
    return cases


check_best_logit = Function(
    number="3.1",
    title="The best discriminator of softened labels",
    kind="derivation",
    praise="With equal shares and a label of 1 it is the lesson's logarithm of a ratio; a label below 1 bounds it.",
    reference=best_logit,
    cases=_log_densities,
    atol=1e-3,
    mistakes=[
        Mistake(
            "the-old-game",
            "This is the best logit of the lesson's own game, with equal shares and labels of 1 and 0. Here neither "
            "holds: start from the loss in the task, and derive it anew.",
            lambda log_p, log_q, share, label: log_p - log_q,
        ),
        Mistake(
            "label-ignored",
            "This is the answer for reals that are labelled 1. The loss that the task states also charges the "
            "discriminator for being too sure of a real example: write down that term of the derivative as well.",
            lambda log_p, log_q, share, label: log_p - log_q + math.log(share / (1 - share)),
        ),
        Mistake(
            "label-on-one-side-only",
            "The label multiplies the density of the reals on the side of D, but the rest of each real example, one "
            "minus the label, is missing on the other side: there it stands beside the fakes.",
            lambda log_p, log_q, share, label: log_p - log_q + math.log(share * label / (1 - share)),
        ),
        Mistake(
            "share-ignored",
            "This is right for equal numbers of reals and fakes. Each expectation has a weight in the loss, and at "
            "each place x the weight multiplies the density.",
            lambda log_p, log_q, share, label: best_logit(log_p, log_q, 0.5, label),
        ),
        Mistake(
            "share-of-the-wrong-side",
            "The share multiplies the fakes in your answer, and one minus the share the reals: look again at whose "
            "share it is. The more reals there are, the higher the logit should be.",
            lambda log_p, log_q, share, label: best_logit(log_p, log_q, 1 - share, label),
        ),
        Mistake(
            "fakes-softened-too",
            "You softened both labels. In the task a fake keeps the label 0; with a softened one the discriminator "
            "would call a place with only fakes partly real, and the generator could rest there.",
            lambda log_p, log_q, share, label: best_logit(log_p, log_q, share, label, fake_label=1 - label),
        ),
        Mistake(
            "a-probability",
            "These numbers all lie between 0 and 1: it is D, the probability, that you return. The letter for the "
            "logit is l; the task asks for the log-odds of D.",
            lambda *case: best_logit(*case).sigmoid(),
        ),
        Mistake(
            "odds-upside-down",
            "The sign is turned round: a place with many reals and few fakes must get a high logit, not a low one. "
            "Which of the two probabilities did you put on top?",
            lambda *case: -best_logit(*case),
        ),
        Mistake(
            "through-the-densities",
            "The formula is right, but it leaves the logarithms: far from the data, exp(log_p) is 0 in float32, and "
            "the quotient of two zeros is not a number. Keep to sums of logarithms, and add densities by logaddexp.",
            _logit_through_exp,
        ),
    ],
)

# ---- 3.2 the pull on the generator, by hand ----


def pulls(
    z: Tensor, theta: Tensor, s: Tensor, w: Tensor, b: float, kind: str, strength: Callable | None = None
) -> tuple:
    """The means over the batch of -strength w and of -strength w z; the strength is D, or 1 - D."""
    d = ((theta + s * z) @ w + b).sigmoid()
    felt = strength(d, kind) if strength else (d if kind == "minimax" else 1 - d)
    return -felt.mean() * w, -(felt[:, None] * z).mean(0) * w


def _pull_cases(rng: torch.Generator) -> list[tuple]:
    draw = partial(torch.randn, generator=rng, dtype=torch.float64)
    sizes = ((5, 3, "minimax"), (6, 2, "non_saturating"), (1, 2, "minimax"), (9, 1, "non_saturating"))
    return [
        (
            draw(n, d),
            draw(d),
            1 + draw(d).abs(),
            draw(d).sign() * (0.5 + draw(d).abs()),
            0.5 + draw(()).abs().item(),
            kind,
        )
        for n, d, kind in sizes
    ]


def _times_batch(z: Tensor, *rest) -> tuple:
    return tuple(len(z) * part for part in pulls(z, *rest))


def _same_for_both(*case) -> tuple:
    return (pulls(*case)[0],) * 2


def _not_beyond_the_logit(z, theta, s, w, b, kind) -> tuple:
    return tuple(part / w for part in pulls(z, theta, s, w, b, kind))


def _product_of_means(z, theta, s, w, b, kind) -> tuple:
    by_theta = pulls(z, theta, s, w, b, kind)[0]
    return by_theta, by_theta * z.mean(0)


check_pulls = Function(
    number="3.2",
    title="Two pulls without autograd",
    kind="by hand",
    praise="Every fake pulls along w; the loss decides only how loudly each of them speaks.",
    reference=pulls,
    cases=_pull_cases,
    mistakes=[
        Mistake(
            "chain-rule-half-done",
            "You have the derivative with respect to the probability D. On its way back the gradient also passes the "
            "sigmoid, whose slope is missing here; without it, no loss would ever saturate.",
            lambda *case: pulls(*case, lambda d, kind: 1 / (1 - d) if kind == "minimax" else 1 / d),
        ),
        Mistake(
            "strengths-exchanged",
            "The two losses have each other's strength. Test it on a fake that D sees through, D near 0: which of the "
            "two losses should hardly be heard?",
            lambda *case: pulls(*case, lambda d, kind: 1 - d if kind == "minimax" else d),
        ),
        Mistake(
            "kind-ignored",
            "The answers for the minimax loss are right, and those for the non-saturating loss are the same formula: "
            "the argument kind must change something.",
            lambda *case: pulls(*case, lambda d, kind: d),
        ),
        Mistake(
            "a-sum-over-the-batch",
            "Each is too large by the number of fakes: the losses are averages over the batch, not sums, so that the "
            "step does not grow with the batch.",
            _times_batch,
        ),
        Mistake(
            "the-same-for-both-parameters",
            "The gradient for theta is right, and that for s is the same. A sample moves by dx = ds z when s changes: "
            "each latent has a say in it.",
            _same_for_both,
        ),
        Mistake(
            "stopped-at-the-logit",
            "You stopped at the logit. From there to the sample there is one more factor, the slope of the logit in "
            "x: without it no parameter knows in which direction the discriminator rises.",
            _not_beyond_the_logit,
        ),
        Mistake(
            "product-of-means",
            "The gradient for theta is right. For s, the mean of a product was replaced by the product of the means: "
            "the latents of the fakes that are heard most must count most.",
            _product_of_means,
        ),
        Mistake(
            "uphill",
            "All signs are turned round. The gradient of a loss that the generator minimises points to where the loss "
            "grows, and both of these losses fall when the logit rises.",
            lambda *case: tuple(-part for part in pulls(*case)),
        ),
    ],
)

# ---- 3.3 the Wasserstein distance of two samples on a line ----


def transport(x: Tensor, y: Tensor, cost: Callable = torch.abs, *, shares: bool = True) -> Tensor:
    """The integral of ``cost`` of the difference of the distribution functions of two samples."""
    points = torch.cat([x, y]).sort().values
    below = [(sample[:, None] <= points[:-1]).sum(0) / (len(sample) if shares else 1) for sample in (x, y)]
    return (cost(below[0] - below[1]) * points.diff()).sum()


def _heights_only(x: Tensor, y: Tensor) -> Tensor:
    points = torch.cat([x, y])
    return sum(((x <= point).double().mean() - (y <= point).double().mean()).abs() for point in points)


def _two_samples(rng: torch.Generator) -> list[tuple]:
    """The first sample reaches beyond the second on both sides, so that their distribution functions cross."""
    cases = []
    for n, m in ((3, 5), (6, 6), (7, 1)):
        wide = torch.cat([2 * torch.randn(n - 2, generator=rng, dtype=torch.float64), torch.tensor([-4.0, 5.0])])
        narrow = 4 * torch.rand(m, generator=rng, dtype=torch.float64) - 2
        cases.append((wide[torch.randperm(n, generator=rng)], narrow))
    return [*cases, cases[0][::-1]]


check_transport = Function(
    number="3.3",
    title="The earth mover on a line",
    kind="derivation",
    praise="No density, no network and no plan: on a line, sorting is all that the earth mover needs.",
    reference=transport,
    cases=_two_samples,
    mistakes=[
        Mistake(
            "cut-to-the-shorter",
            "You paired the sorted points and dropped those of the longer sample that were left over. Their earth "
            "must be moved too: the points of the two samples do not weigh the same.",
            lambda x, y: (x.sort().values[: len(y)] - y.sort().values[: len(x)]).abs().mean(),
        ),
        Mistake(
            "paired-as-they-come",
            "You paired the points in the order in which they were drawn, which is one transport plan among many, and "
            "not the cheapest. The distance must not change when a sample is shuffled.",
            lambda x, y: (x[: len(y)] - y[: len(x)]).abs().mean(),
        ),
        Mistake(
            "only-the-means",
            "This is the distance of the two means. It is what one fixed f, a straight line, gains; a better f "
            "changes its direction wherever the two distribution functions cross.",
            lambda x, y: (x.mean() - y.mean()).abs(),
        ),
        Mistake(
            "without-the-absolute-value",
            "Here earth that is moved to the right cancels earth that is moved to the left, so the result may even be "
            "negative. Work is paid in either direction.",
            partial(transport, cost=lambda gap: gap),
        ),
        Mistake(
            "counts-for-shares",
            "You compare numbers of points where shares are due: each distribution function must rise to 1, whatever "
            "the size of its sample.",
            partial(transport, shares=False),
        ),
        Mistake(
            "heights-without-widths",
            "You added the differences of the distribution functions, but an integral has widths too: each difference "
            "holds from one point to the next, and that is the way the earth goes.",
            _heights_only,
        ),
        Mistake(
            "squared",
            "You squared the difference of the distribution functions. That is a distance too (Cramér's), but its "
            "slope in a shift is not the constant one: what is at most 1 was made smaller.",
            partial(transport, cost=torch.square),
        ),
        Mistake(
            "every-pair",
            "You averaged over all pairs: a plan that spreads each grain over all places. It is not the cheapest one, "
            "and it costs something even if the two samples are the same.",
            lambda x, y: (x[:, None] - y).abs().mean(),
        ),
    ],
)

# ---- 3.4 a generator for the ring, made by hand ----

STEEPEST, QUALITY, SHARE = 300.0, 0.95, 0.16


def _stretch(generator: Callable, rng: torch.Generator) -> float:
    """The largest quotient of ways, of samples and of latents, between neighbours on twelve chords of a circle in the
    plane of latents, four of which pass its centre."""
    angles = 2 * math.pi * torch.rand(12, 2, generator=rng)
    angles[:, 1] = angles[:, 0] + math.pi / 3 + angles[:, 1] * 2 / 3  # no short chords, on which rounding would count
    angles[:4, 1] = angles[:4, 0] + math.pi
    ends = 3 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    z = torch.lerp(ends[:, :1], ends[:, 1:], torch.linspace(0, 1, 5001)[:, None])
    ways = _samples(generator, z.flatten(0, 1)).unflatten(0, z.shape[:2]).diff(dim=1).norm(dim=-1)
    return (ways / z.diff(dim=1).norm(dim=-1).clamp(min=1e-6)).max().item()


@torch.no_grad()
def _samples(generator: Callable, z: Tensor) -> Tensor:
    x = generator(z.clone())
    if not isinstance(x, Tensor) or x.shape != z.shape:
        found = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"what is of the type {type(x).__name__}"
        raise Wrong(
            f"for latents of shape {tuple(z.shape)}, samples of the same shape are asked for; yours are {found}."
        )
    if not x.isfinite().all():
        raise Wrong(f"{(~x.isfinite()).any(1).sum().item()} of {len(x)} samples are infinite or not a number.")
    return x.float()


def measure_ring(exercise: Goal, generator: Any) -> None:
    """Places first, then shares, then continuity, on 8,000 fresh latents."""
    if not callable(generator):
        raise Wrong("a function, or a network, from latents to samples is asked for: hand it over without calling it.")
    rng = torch.Generator()
    rng.seed()
    centres = toy_mixture("ring")[1]
    x = _samples(generator, torch.randn(8000, 2, generator=rng)).double()
    distance, nearest = torch.cdist(x, centres).min(1)
    radius, commonest = x.norm(dim=1).median().item(), nearest.bincount(minlength=8).max().item() / len(x)
    coverage = mode_coverage(x, centres, 0.02)
    if abs(radius - 2) > 0.3:
        raise exercise.wrong("not-on-the-ring", f"(The median of the distances to the origin is {radius:.3g}.)")
    if commonest > 0.4:
        raise exercise.wrong("collapsed", f"(The commonest centre has {commonest:.0%} of the samples.)")
    if coverage.high_quality < QUALITY:
        between = (distance > 0.4).double().sum().item() / (distance > 0.06).sum().item()
        found = f"(High quality: {coverage.high_quality:.1%}.)"
        if between < 0.05:
            raise exercise.wrong("noise-too-wide", found)
        raise exercise.wrong("no-stops" if coverage.high_quality < 0.3 else "bridges-too-long", found)
    if coverage.modes < 8:
        raise exercise.wrong("modes-left-out", f"(Modes covered: {coverage.modes}.)")
    if commonest > SHARE:
        raise exercise.wrong("unfair-shares", f"(The commonest centre has {commonest:.1%}, a fair share is 12.5%.)")
    if (stretch := _stretch(generator, rng)) > STEEPEST:
        raise exercise.wrong("torn", f"(Neighbours come to lie {stretch:,.0f} times as far apart as they were.)")


check_ring = Goal(
    number="3.4",
    title="A ring made by hand",
    kind="open",
    praise="So the generator that the lesson trains could exist; what it has to learn is where to be steep.",
    measure=measure_ring,
    mistakes=[
        Mistake(
            "not-on-the-ring",
            "The samples do not lie on the ring at all: all eight centres are at a distance of 2 from the origin.",
        ),
        Mistake(
            "collapsed",
            "Nearly all samples go to one or two centres: this is the mode collapse of section 6, made by hand. Let a "
            "part of the latents, an eighth, belong to each centre.",
        ),
        Mistake(
            "no-stops",
            "The samples go round the ring almost evenly, and hardly ever rest at a centre. Let the position on the "
            "ring stay the same for most latents and change in a hurry in between.",
        ),
        Mistake(
            "bridges-too-long",
            "Most samples are at a centre, but too many are on the way from one to the next. The way itself cannot be "
            "avoided; make the set of latents that are on it less probable.",
        ),
        Mistake(
            "noise-too-wide",
            "Hardly any samples are on the way between centres; those that miss lie around a centre, but outside "
            "three standard deviations of 0.02. It is the spread within each mode that is too large.",
        ),
        Mistake(
            "modes-left-out",
            "What you draw is of high quality, but some centres get next to nothing: quality is precision, and the "
            "modes covered are recall. Does your position ever reach all eight?",
        ),
        Mistake(
            "unfair-shares",
            "All eight centres are reached, but not equally often. Latents near 0 are more probable than those far "
            "out, so equal intervals of z are not equal shares.",
        ),
        Mistake(
            "torn",
            "The samples are good, but the map is torn, or nearly so: neighbouring latents land at different centres, "
            "which no network with finite weights can do. Walk from one centre to the next instead of jumping.",
        ),
    ],
)

# ---- 3.5 two players who circle: how far do they get? ----

STEP, ROUNDS = 0.1, 200


def distance_after(h: float, rounds: int) -> float:
    """Simultaneous steps in the Wasserstein game of the Dirac-GAN, from a distance of 1."""
    theta, psi = 1.0, 0.0
    for _ in range(rounds):
        theta, psi = theta + h * psi, psi - h * theta
    return math.hypot(theta, psi)


check_distance = Number(
    number="3.5",
    title="How far do they get?",
    kind="prediction",
    praise="A smaller step leads away more slowly, but it leads away all the same.",
    truth=lambda: distance_after(STEP, ROUNDS),
    rtol=0.01,
    mistakes=[
        Mistake(
            "they-keep-their-distance",
            "That is true of alternating steps, up to the shape of the ellipse, and of players in continuous time. "
            "Here both answer the same old position: what is the size of the eigenvalues then?",
            1.0,
        ),
        Mistake(
            "square-root-forgotten",
            "You raised 1 + h² to the power of the rounds. That is what happens to the square of the distance.",
            lambda: distance_after(STEP, ROUNDS) ** 2,
        ),
        Mistake(
            "inwards",
            "The size of the change is right, its direction is not: the eigenvalues lie outside the unit circle, not "
            "inside, so the players do not come to rest.",
            lambda: 1 / distance_after(STEP, ROUNDS),
        ),
        Mistake(
            "as-if-real",
            "You took 1 + h for the size of the eigenvalue 1 + ih. The two parts are at right angles in the complex "
            "plane, so they do not simply add; 1 + h belongs to the game in which both players maximise.",
            lambda: (1 + STEP) ** ROUNDS,
        ),
        Mistake(
            "growth-added",
            "You added the growth of the rounds up. Each round multiplies the distance that the round before has left.",
            lambda: 1 + ROUNDS * (math.hypot(1, STEP) - 1),
        ),
        Mistake(
            "half-of-the-rounds",
            "You seem to have taken the square root twice, or half of the rounds. All of them are simultaneous, and "
            "each multiplies the distance by the size of the eigenvalue.",
            lambda: distance_after(STEP, ROUNDS // 2),
        ),
    ],
)

# ---- 3.6 a step in which the two players' gradients are tangled ----


def mended_step(generator, discriminator, g_optimizer, d_optimizer, real: Tensor, z: Tensor) -> tuple[float, float]:
    return _step(generator, discriminator, g_optimizer, d_optimizer, real, z)


def _step(
    generator, discriminator, g_optimizer, d_optimizer, real, z, *, detach="d", clears=("d", "g"), order="dg"
) -> tuple[float, float]:
    """``detach`` names who gets a detached fake, ``clears`` whose gradients are cleared before their turn."""
    fake, loss = generator(z), {}
    for player in order:
        seen = fake.detach() if player in detach else fake
        optimizer = g_optimizer if player == "g" else d_optimizer
        loss[player] = F.softplus((1 if player == "d" else -1) * discriminator(seen)).mean()
        if player == "d":
            loss["d"] = loss["d"] + F.softplus(-discriminator(real)).mean()
        if player in clears:
            optimizer.zero_grad()
        loss[player].backward(retain_graph=True)
        optimizer.step()
    return loss["d"].item(), loss["g"].item()


def _after_three_steps(step: Callable, seed: int, real: Tensor, z: Tensor) -> tuple | None:
    """The losses, the weights of both networks, and how many backward passes went through the generator."""
    rng = torch.Generator().manual_seed(seed)
    config = GANConfig(shape=(2,), z_dim=3, hidden=(5,), bounded=False)
    nets = Generator(config, rng), Discriminator(config, rng)
    sgd = [torch.optim.SGD(net.parameters(), lr=0.3) for net in nets]
    passes = []
    nets[0].layers[0].bias.register_hook(lambda gradient: passes.append(1))
    losses = []
    for part_real, part_z in zip(real, z, strict=True):
        result = step(*nets, *sgd, part_real, part_z)
        if result is None:
            return None
        d_loss, g_loss = result
        losses += [float(d_loss), float(g_loss)]
    weights = torch.cat([parameter.detach().flatten() for net in nets for parameter in net.parameters()])
    return torch.tensor(losses), weights, len(passes)


def _step_cases(rng: torch.Generator) -> list[tuple]:
    cases = []
    for n_real, n_fake in ((6, 4), (1, 1)):
        seed = int(torch.randint(10**6, (), generator=rng))
        real, z = torch.randn(3, n_real, 2, generator=rng), torch.randn(3, n_fake, 3, generator=rng)
        cases.append((seed, real + 1, z))
    return cases


check_mended_step = Function(
    number="3.6",
    title="Two tangled players",
    kind="repair",
    praise="Each player now moves by its own loss, and each step forgets the one before.",
    reference=mended_step,
    cases=_step_cases,
    outcome=_after_three_steps,
    mistakes=[
        Mistake(
            "still-tangled",
            "The step still moves both players as the one in the task does: by the time the generator moves, its "
            "gradients also hold those of the discriminator's loss, and of all the steps before. Two lines need care.",
            partial(_step, detach="", clears="d"),
        ),
        Mistake(
            "gradients-of-earlier-steps",
            "The discriminator's loss no longer reaches the generator. But the generator's gradients are never "
            "cleared: from the second step on, it also moves by those of the steps before.",
            partial(_step, clears="d"),
        ),
        Mistake(
            "pays-for-the-generator",
            "All weights move rightly, but the discriminator's backward pass still runs through the whole generator, "
            "only for its result to be thrown away: in a large GAN that is a good part of the time. Cut the graph.",
            partial(_step, detach=""),
        ),
        Mistake(
            "generator-stands-still",
            "The generator does not move at all: it is cut off from its own loss too. The fakes must be detached in "
            "only one of the two losses; PyTorch does not complain, because the discriminator's weights still need "
            "gradients.",
            partial(_step, detach="dg"),
        ),
        Mistake(
            "leftovers-in-the-discriminator",
            "The generator is mended, but now the discriminator's gradients are not cleared before its turn: they "
            "hold what the generator's backward pass left in it, a pull to take fakes for real.",
            partial(_step, clears="g"),
        ),
        Mistake(
            "generator-goes-first",
            "Each loss moves only its own player, but in another order than in the task: there the generator answers "
            "the discriminator that has just learnt, here the one of the step before.",
            partial(_step, order="gd"),
        ),
    ],
)
