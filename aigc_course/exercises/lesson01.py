"""The exercises of lesson 01, Gaussian mixtures."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import gmm
from ..datasets import toy_2d, toy_mixture
from .exercise import Function, Goal, Mistake, Number, Wrong

# ---- 1.1 the responsibility of one of two bells ----


def _logit(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.linalg.inv(covariance)
    middle = (first + second) / 2
    slope = precision @ (first - second)
    return slope, weight.log() - (1 - weight).log() - middle @ slope


def _logit_cases(rng: torch.Generator) -> list[tuple]:
    cases = []
    for d in (3, 1, 2):
        root = torch.randn(d, d, generator=rng, dtype=torch.float64)
        first, second = 2 * torch.randn(2, d, generator=rng, dtype=torch.float64)
        weight = 0.05 + 0.3 * torch.rand((), generator=rng, dtype=torch.float64)
        cases.append((weight, first, second + 1, root @ root.T + torch.eye(d, dtype=torch.float64)))
    return cases


def _logit_uninverted(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    return _logit(weight, first, second, torch.linalg.inv(covariance))


def _logit_mirrored(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    return _logit(1 - weight, second, first, covariance)


def _logit_unweighted(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    return _logit(torch.full_like(weight, 0.5), first, second, covariance)


def _logit_of_one(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    slope, offset = _logit(weight, first, second, covariance)
    return slope, offset + (1 - weight).log()


def _logit_at_zero(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    return _logit(weight, first, second, covariance)[0], torch.logit(weight)


def _logit_unhalved(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    slope, offset = _logit(weight, first, second, covariance)
    return slope, 2 * offset - torch.logit(weight)


def _logit_of_difference(weight: Tensor, first: Tensor, second: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    slope, _ = _logit(weight, first, second, covariance)
    return slope, torch.logit(weight) - (first - second) @ slope / 2


check_logit = Function(
    number="1.1",
    title="A responsibility is a sigmoid",
    kind="derivation",
    reference=_logit,
    cases=_logit_cases,
    praise="The quadratic terms cancel because the covariance is shared; with two covariances they would stay.",
    mistakes=[
        Mistake(
            "covariance-not-inverted",
            "You multiply by the covariance where its inverse belongs. Check with one dimension: the wider the bells, "
            "the gentler the passage from one to the other must be.",
            _logit_uninverted,
        ),
        Mistake(
            "other-component",
            "Slope and offset both have the opposite sign: this is the responsibility of the second component. Follow "
            "the slope from the second mean to the first; along this way the first component must gain.",
            _logit_mirrored,
        ),
        Mistake(
            "weights-forgotten",
            "The slope is right, but the mixing weights have dropped out of the offset, as if both were one half. "
            "Halfway between the means the responsibility must be the weight itself.",
            _logit_unweighted,
        ),
        Mistake(
            "weight-without-odds",
            "The first weight enters, the second does not. The denominator holds both components, so what remains "
            "after the division is the ratio of the two weights.",
            _logit_of_one,
        ),
        Mistake(
            "position-lost",
            "The offset contains the weights alone. The terms that are quadratic in the means do not depend on x, but "
            "they do not cancel either: without them, moving the data and both means together would change the "
            "responsibilities.",
            _logit_at_zero,
        ),
        Mistake(
            "half-missing",
            "The part of the offset that comes from the means is twice too large. Where does the factor in front of "
            "the squared distance in the exponent go?",
            _logit_unhalved,
        ),
        Mistake(
            "square-of-difference",
            "The offset has the squared distance between the two means. What stands there is the difference of two "
            "squares, one for each mean, and that is not the square of the difference.",
            _logit_of_difference,
        ),
    ],
)

# ---- 1.2 an E step that underflows ----


def _draw_mixture(d: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and variances of three components in float32."""
    weights = torch.tensor([0.6, 0.3, 0.1])[torch.randperm(3, generator=rng)]
    means = (1.5 if d < 10 else 0.3) * torch.randn(3, d, generator=rng)
    return weights, means, 0.8 + 0.45 * torch.rand(3, d, generator=rng)


def _e_step_truth(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    return gmm.e_step(x.double(), weights.double(), means.double(), variances.double())


def _two_tensors(answer: Callable, case: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What the answer returns for a case, in double precision, if its form is right."""
    found = answer(*(part.clone() for part in case))
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise Wrong("two tensors are asked for: the responsibilities and the log-densities of the samples.")
    n, k = len(case[0]), len(case[1])
    shapes = tuple(tuple(part.shape) for part in found)
    if shapes != ((n, k), (n,)):
        raise Wrong(
            f"for {n} samples and {k} components your shapes are {shapes[0]} and {shapes[1]}: "
            f"expected {(n, k)} and {(n,)}."
        )
    return found[0].detach().double(), found[1].detach().double()


def _near(a: Tensor, b: Tensor, atol: float = 1e-4) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=atol)


def _measure_e_step(exercise: Goal, answer: Callable) -> None:
    if not callable(answer):
        raise Wrong("hand over the mended function itself, without calling it.")
    rng = torch.Generator()
    rng.seed()
    for n in (7, 1):
        _judge_mild(exercise, answer, rng, n)
    _judge_far(exercise, answer, rng)


def _far_case(farthest: float, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two near samples, a far one and a farther one, in standard deviations; all densities are zero in float32."""
    weights, means, variances = _draw_mixture(130, rng)
    directions = torch.nn.functional.normalize(torch.randn(4, 130, generator=rng), dim=1)
    x = means[0] + torch.tensor([[0.5], [0.5], [30.0], [farthest]]) * directions
    return x, weights, means, variances


def _judge_mild(exercise: Goal, answer: Callable, rng: torch.Generator, n: int) -> None:
    """In two dimensions, where no density vanishes."""
    weights, means, variances = _draw_mixture(2, rng)
    x = 1.5 * torch.randn(n, 2, generator=rng)
    found, log_found = _two_tensors(answer, (x, weights, means, variances))
    right, log_right = _e_step_truth(x, weights, means, variances)
    if _near(found, right) and _near(log_found, log_right):
        return
    if n > 1 and _near(found.sum(0), torch.ones(3).double()) and not _near(found.sum(1), torch.ones(n).double()):
        raise exercise.wrong("wrong-axis", f"(One sample's responsibilities sum to {found[0].sum():.3g}, not to 1.)")
    if _near(log_found, log_right):
        detail = f"(A responsibility is {found[0, 0]:.4g} where {right[0, 0]:.4g} is right.)"
    else:
        detail = f"(A log-density is {log_found[0]:.4g} where {log_right[0]:.4g} is right.)"
    ones = torch.ones(3)
    for factor in (1, 1 / 3):
        equal, log_equal = _e_step_truth(x, factor * ones, means, variances)
        if _near(found, equal) and (_near(log_found, log_equal) or _near(log_found, log_right)):
            raise exercise.wrong("weights-forgotten", detail)
    squared, log_squared = _e_step_truth(x, weights, means, variances.square())
    if _near(found, squared) and _near(log_found, log_squared):
        raise exercise.wrong("variance-as-deviation", detail)
    log_joint = weights.double().log() + gmm.gaussian_log_prob(x.double(), means.double(), variances.double().sqrt())
    if _near(found, right) and _near(log_found, log_right - log_joint.amax(1)):
        raise exercise.wrong("maximum-lost", detail)
    floor = _two_tensors(answer, _far_case(33.0, rng))[1]  # is a constant all that is left where the density vanishes?
    if floor.isfinite().all() and floor.max() - floor.min() < 1:
        raise exercise.wrong("patched", f"(In 130 dimensions every log-density is about {floor[0]:.4g}.)")
    which = "log-densities" if _near(found, right) else "responsibilities"
    gap = (log_found - log_right if _near(found, right) else found - right).abs().max()
    raise Wrong(f"already in two dimensions the {which} are not the right ones, by up to {gap:.3g}.")


def _judge_far(exercise: Goal, answer: Callable, rng: torch.Generator) -> None:
    """In 130 dimensions: first densities that double precision can still hold, then smaller ones."""
    for farthest in (33.0, 80.0):
        case = _far_case(farthest, rng)
        found, log_found = _two_tensors(answer, case)
        right, log_right = _e_step_truth(*case)
        lost = ~(found.isfinite().all(1) & log_found.isfinite())
        sums = found.sum(1)
        if lost.any():
            detail = f"({int(lost.sum())} of 4 samples in 130 dimensions get an infinity or no number.)"
            if farthest > 50:
                raise exercise.wrong("more-digits", detail)
            raise exercise.wrong("underflow" if lost.all() else "one-maximum-for-all", detail)
        if (log_found > log_right + 5).any() or (sums < 0.9).any():
            at = int((log_found - log_right).abs().argmax())
            detail = f"(A log-density is {log_found[at]:.4g} where {log_right[at]:.4g} is right"
            raise exercise.wrong("patched", f"{detail}; the responsibilities there sum to {sums[at]:.3g}.)")
        if not (_near(found, right, 5e-3) and _near(log_found, log_right, 1e-2)):
            gap = max((found - right).abs().max().item(), (log_found - log_right).abs().max().item())
            raise Wrong(f"right in two dimensions, but in 130 dimensions off by up to {gap:.3g}.")


check_e_step = Goal(
    number="1.2",
    title="An E step that dies in many dimensions",
    kind="repair",
    measure=_measure_e_step,
    praise="Each sample now has a largest exponential of 1, in however many dimensions.",
    mistakes=[
        Mistake(
            "underflow",
            "In 130 dimensions every density still becomes exactly zero, and then zero is divided by zero. Look for "
            "the place where the function leaves the logarithms: it does so too early.",
        ),
        Mistake(
            "patched",
            "A small constant, a clamp or a replaced NaN hides the zero, but does not bring back what was lost: far "
            "samples now all get the same invented density, and responsibilities that mean nothing. Lose nothing to "
            "begin with.",
        ),
        Mistake(
            "more-digits",
            "Double precision only moves the cliff, from about e to the minus 103 to about e to the minus 745; a "
            "sample somewhat farther away falls over it all the same. The cure does not depend on the number of "
            "digits.",
        ),
        Mistake(
            "one-maximum-for-all",
            "The nearest samples are saved, the farther ones still vanish. Which of the sums has to keep a term of "
            "size 1, one over the whole batch or one for each sample? What you subtract must match.",
        ),
        Mistake(
            "wrong-axis",
            "Your responsibilities sum to one over the samples. They answer the question which component made this "
            "sample, so it is over the components, for each sample, that they must sum to one.",
        ),
        Mistake(
            "maximum-lost",
            "The responsibilities are right, but every log-density lacks the number that was pulled out of its sum. "
            "In the responsibilities it cancels, in the log-density it does not: see both sides of (1.7).",
        ),
        Mistake(
            "weights-forgotten",
            "The numbers are those of a mixture whose components all count alike. The mixing weights were in the "
            "broken version and have been lost on the way; in logarithms a factor becomes a term.",
        ),
        Mistake(
            "variance-as-deviation",
            "The bells have the wrong width: the variance was handed over where a standard deviation is expected (or "
            "it was squared once more).",
        ),
    ],
)

# ---- 1.3 the gap under an idle q ----


def _gap() -> float:
    """By running it: two equal components of unequal weight, and q that does not care."""
    x = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    weights, q = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    means, variances = torch.ones(2, 1, dtype=torch.float64), torch.full((2, 1), 4.0, dtype=torch.float64)
    log_joint = weights.log() + gmm.gaussian_log_prob(x, means, variances.sqrt())
    bound = (q * (log_joint - q.log())).sum(1)
    return (gmm.e_step(x, weights, means, variances)[1] - bound).mean().item()


check_gap = Number(
    number="1.3",
    title="The gap, by hand",
    kind="by hand",
    truth=_gap,
    atol=0.005,
    praise="The data do not matter here: where the components coincide, the posterior is the prior.",
    mistakes=[
        Mistake(
            "divergence-reversed",
            "This is the divergence from the posterior to q. In (1.10) the average is taken over the other one of the "
            "two: see which distribution stands first, and is also the one to average over.",
            lambda: 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
        ),
        Mistake(
            "entropy-dropped",
            "The entropy of q is missing. The bound (1.9) divides by q inside the logarithm; without that the bound "
            "lies lower than it should, and the gap looks too large.",
            lambda: -(math.log(0.9) + math.log(0.1)) / 2,
        ),
        Mistake(
            "bits",
            "The size is right in bits. Nats are asked for: take natural logarithms.",
            lambda: _gap() / math.log(2),
        ),
        Mistake(
            "no-gap",
            "The gap is zero only if q is the posterior. The components have the same shape, but not the same weight: "
            "what does Bayes' rule (1.6) give here?",
            0.0,
        ),
        Mistake(
            "sign",
            "A divergence is never negative. You took the log-likelihood from the bound, but the bound is lower.",
            lambda: -_gap(),
        ),
        Mistake(
            "entropy-alone",
            "This is the entropy of q alone. The gap compares q with the posterior: the weights must enter.",
            math.log(2),
        ),
    ],
)

# ---- 1.4 one round of EM for round bells ----

Round = tuple[Tensor, Tensor, Tensor]


def _round_parts(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Responsibilities, N_k, new means, and the weighted sums of squared distances to them."""
    gamma = gmm.e_step(x, weights, means, variances[:, None].expand_as(means))[0]
    counts = gamma.sum(0)
    centres = gamma.T @ x / counts[:, None]
    return gamma, counts, centres, (gamma * torch.cdist(x, centres).square()).sum(0)


def _round(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    _, counts, centres, squares = _round_parts(x, weights, means, variances)
    return counts / len(x), centres, squares / (counts * x.shape[1])


def _round_dimension(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    _, counts, centres, squares = _round_parts(x, weights, means, variances)
    return counts / len(x), centres, squares / counts


def _round_over_n(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    _, counts, centres, squares = _round_parts(x, weights, means, variances)
    return counts / len(x), centres, squares / x.numel()


def _round_deviation(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    *rest, spread = _round(x, weights, means, variances)
    return *rest, spread.sqrt()


def _round_old_means(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    gamma, counts, centres, _ = _round_parts(x, weights, means, variances)
    return counts / len(x), centres, (gamma * torch.cdist(x, means).square()).sum(0) / (counts * x.shape[1])


def _round_old_weights(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    return weights, *_round(x, weights, means, variances)[1:]


def _round_determinant(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Round:
    share, centres, full = gmm.m_step(x, _round_parts(x, weights, means, variances)[0])
    return share, centres, torch.linalg.det(full) ** (1 / x.shape[1])


def _round_cases(rng: torch.Generator) -> list[tuple]:
    cases = []
    for n, d, k in ((40, 3, 4), (60, 2, 3), (90, 5, 2)):
        x = torch.randn(n, d, generator=rng, dtype=torch.float64) * (1 + 2 * torch.arange(d)) + 3
        weights = torch.rand(k, generator=rng, dtype=torch.float64) + 0.2
        means = 3 + 2 * torch.randn(k, d, generator=rng, dtype=torch.float64)
        variances = 20 + 20 * torch.rand(k, generator=rng, dtype=torch.float64)
        cases.append((x, weights / weights.sum(), means, variances))
    return cases


check_round = Function(
    number="1.4",
    title="One round of EM for round bells",
    kind="derivation",
    reference=_round,
    cases=_round_cases,
    praise="This is the mean of the diagonal of (1.14), which is its trace divided by d.",
    mistakes=[
        Mistake(
            "dimension-forgotten",
            "Your variances are too large, and the more so the more dimensions there are. Each sample brings d "
            "squared deviations, and the logarithm of the normalising factor has d in it: follow it through the "
            "derivative.",
            _round_dimension,
        ),
        Mistake(
            "over-n",
            "Your variances are too small: they are divided by the number of all samples. A component of small weight "
            "has few samples of its own; how many, in effect?",
            _round_over_n,
        ),
        Mistake(
            "standard-deviation",
            "Weights and means are right; in the third place stand standard deviations, but variances were asked for, "
            "as they come in.",
            _round_deviation,
        ),
        Mistake(
            "old-means",
            "Weights and means are right, the variances are measured around the old means. The M step maximises over "
            "means and variances together; around any other point than the new mean the sum of squares is larger.",
            _round_old_means,
        ),
        Mistake(
            "old-weights",
            "Means and variances are right, but the weights are those that came in. They are parameters too: maximise "
            "over them with a Lagrange multiplier, as for (1.12).",
            _round_old_weights,
        ),
        Mistake(
            "determinant",
            "The variance has the volume of the full covariance's ellipsoid. Volume is not what the weighted log- "
            "likelihood asks for; set its derivative in the variance to zero, and a sum of squares appears instead.",
            _round_determinant,
        ),
    ],
)

# ---- 1.5 what a collapse gains ----

SPIKE_SAMPLES, SPIKE_DIMENSIONS, SPIKE_WEIGHT = 40, 3, 0.1


def _collapse_gain() -> float:
    """By running it: the total log-likelihood at a standard deviation of 1e-6, less that at 1e-4."""
    rng = torch.Generator()
    rng.seed()
    x = torch.randn(SPIKE_SAMPLES, SPIKE_DIMENSIONS, generator=rng, dtype=torch.float64)
    weights = torch.tensor([SPIKE_WEIGHT, 1 - SPIKE_WEIGHT], dtype=torch.float64)
    means, totals = torch.stack([x[0], torch.zeros_like(x[0])]), []
    for deviation in (1e-4, 1e-6):
        spread = torch.tensor([[deviation], [1.0]], dtype=torch.float64).expand(2, SPIKE_DIMENSIONS)
        log_joint = weights.log() + gmm.gaussian_log_prob(x, means, spread)
        totals.append(log_joint.logsumexp(1).sum().item())
    return totals[1] - totals[0]


check_collapse = Number(
    number="1.5",
    title="What a collapse gains",
    kind="prediction",
    truth=_collapse_gain,
    atol=0.02,
    praise="One sample, in three dimensions, pays for all of it, and the next factor of 100 would pay as much again.",
    mistakes=[
        Mistake(
            "one-dimension",
            "This is the gain in one dimension, as in (1.16). Here the component is round in three: by how much does "
            "the height of its peak grow?",
            math.log(100),
        ),
        Mistake(
            "all-samples",
            "You let all forty samples gain. Only the sample at the centre of the shrinking component does; the "
            "others lie so many of its standard deviations away that the broad component alone keeps them alive.",
            SPIKE_SAMPLES * SPIKE_DIMENSIONS * math.log(100),
        ),
        Mistake(
            "decades",
            "You counted decades. The log-likelihood is in nats, and a factor of ten is worth about 2.3 of them.",
            SPIKE_DIMENSIONS * 2.0,
        ),
        Mistake(
            "variance-unhalved",
            "Twice too much. It is the standard deviation that is divided by 100 in each direction; if you think in "
            "variances, mind the exponent of the variance in the density.",
            SPIKE_DIMENSIONS * math.log(1e4),
        ),
        Mistake(
            "deviation-halved",
            "Half of it is missing. The exponent one half belongs to the variance, but 100 is the factor of the "
            "standard deviation.",
            SPIKE_DIMENSIONS * math.log(100) / 2,
        ),
        Mistake(
            "bounded",
            "You expect no change, as if the likelihood had reached a ceiling. A density, unlike a probability, may "
            "exceed 1 by any factor: look at its height at the centre of the component.",
            0.0,
        ),
        Mistake(
            "falls",
            "You expect the log-likelihood to fall. If it did, EM would never fall into this hole. Which sample is "
            "looked at with a sharper peak, and do the others lose anything that they still had?",
            -SPIKE_DIMENSIONS * math.log(100),
        ),
        Mistake(
            "weighted",
            "You multiplied the gain by the weight of the component. The weight is a factor inside the logarithm, "
            "before and after: it cancels from the difference.",
            SPIKE_WEIGHT * SPIKE_DIMENSIONS * math.log(100),
        ),
        Mistake(
            "per-sample",
            "This is the gain per sample, a mean over all forty. The total is asked for.",
            SPIKE_DIMENSIONS * math.log(100) / SPIKE_SAMPLES,
        ),
    ],
)

# ---- 1.6 a start for EM ----

RINGS, WANTED, SLACK = 10, 9, 0.1


def _moved_ring(rng: torch.Generator) -> tuple[Tensor, float]:
    """The ring of the lesson, turned, enlarged and moved; and its true mean log-density in nats."""
    angle, size, away = torch.rand(3, generator=rng, dtype=torch.float64).tolist()
    angle, size = 2 * math.pi * angle, 0.5 + 2.5 * size
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    centre = (30 + 30 * away) * turn[:, 0]
    x = toy_2d("ring", 400, rng, dtype=torch.float64)
    truth = gmm.e_step(x, *toy_mixture("ring"))[1].mean().item() - 2 * math.log(size)
    return size * x @ turn.T + centre, truth


def _start_of(exercise: Goal, answer: Callable, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    start = answer(x.clone(), 8, rng)
    if not isinstance(start, tuple | list) or len(start) != 3 or not all(isinstance(part, Tensor) for part in start):
        raise Wrong("three tensors are asked for: weights, means and covariances.")
    weights, means, covariances = start = tuple(part.detach().to(x) for part in start)
    for name, part, shape in zip(("weights", "means", "covariances"), start, ((8,), (8, 2), (8, 2, 2)), strict=True):
        if part.shape != shape:
            raise exercise.wrong("illegal-start", f"(The {name} have shape {tuple(part.shape)}, expected {shape}.)")
        if not part.isfinite().all():
            raise exercise.wrong(
                "illegal-start", f"(The {name} have {int((~part.isfinite()).sum())} infinities or NaN.)"
            )
    if weights.min() < 0 or abs(weights.sum().item() - 1) > 1e-5:
        raise exercise.wrong("illegal-start", f"(The weights sum to {weights.sum():.4g}.)")
    if not torch.allclose(covariances, covariances.mT) or torch.linalg.eigvalsh(covariances).min() <= 0:
        lowest = torch.linalg.eigvalsh(covariances).min()
        raise exercise.wrong("illegal-start", f"(The smallest eigenvalue of a covariance is {lowest:.3g}.)")
    away, across = torch.cdist(means, x).amin(1).max(), torch.pdist(x).max()
    if away > across:
        raise exercise.wrong(
            "ignores-data", f"(A mean lies {away:.3g} from the nearest sample; the ring is {across:.3g} wide.)"
        )
    same = (torch.cdist(means, means) < 1e-9 * across) & (
        torch.cdist(covariances.flatten(1), covariances.flatten(1)) == 0
    )
    if same.sum() > 8:
        raise exercise.wrong("twins", f"({int((same.sum(1) > 1).sum())} of 8 components have a twin.)")
    return start


def _measure_start(exercise: Goal, answer: Callable) -> list[float]:
    if not callable(answer):
        raise Wrong("hand over the function itself, without calling it.")
    rng = torch.Generator()
    rng.seed()
    short, errors = [], []
    for _ in range(RINGS):
        x, truth = _moved_ring(rng)
        start = _start_of(exercise, answer, x, rng)
        try:
            short.append(truth - gmm.GaussianMixture(8, init=start, max_iter=100).fit(x).log_likelihoods_[-1])
        except gmm.MixtureError as error:
            errors.append(str(error).split(":")[0])
    good = sum(gap <= SLACK for gap in short)
    if good >= WANTED:
        return short
    if len(errors) > RINGS - WANTED:
        raise exercise.wrong("empty-component", f"(On {len(errors)} of {RINGS} rings, for example: {errors[0]}.)")
    worst = f"the worst fit is {max(short):.2f} nats per sample short"
    raise exercise.wrong("lower-hill", f"({good} of {RINGS} rings reached, {WANTED} are wanted; {worst}.)")


check_start = Goal(
    number="1.6",
    title="A start that finds all eight groups",
    kind="open",
    measure=_measure_start,
    praise="One run of EM from your start reaches the top on at least nine fresh rings in ten.",
    mistakes=[
        Mistake(
            "lower-hill",
            "EM ends on a lower hill too often: on these rings two components share a group while another has to "
            "cover two. Chance alone hardly ever puts one mean into each group; let each choice know of those made "
            "before.",
        ),
        Mistake(
            "twins",
            "Some of your components are identical. They take equal responsibility for every sample, so each M step "
            "gives them equal parameters again, for ever.",
        ),
        Mistake(
            "ignores-data",
            "Your means lie where no data are. Each ring that is tried has been turned, enlarged and moved, so places "
            "that are known beforehand do not help: take them from the samples that come in.",
        ),
        Mistake(
            "empty-component",
            "A component lost all its samples. It began between the groups or was so narrow that another one was "
            "nearer to every sample; begin where samples are, and as wide as a group or wider.",
        ),
        Mistake(
            "illegal-start",
            "This is no mixture yet. Eight weights that are not negative and sum to one, eight means, and for each a "
            "covariance, a symmetric 2 by 2 matrix with positive eigenvalues, are needed.",
        ),
    ],
)
