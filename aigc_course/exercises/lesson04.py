"""Lesson 04: transposed convolutions, BatchNorm, the step, and what the Fréchet distance sees."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import gan, metrics
from .exercise import Function, Goal, Mistake, Number, Untried, Wrong

# ---- 4.1: a transposed convolution by zeros ----


def _grown(row: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv_transpose1d(row[None, None], kernel[None, None], stride=stride, padding=padding)[0, 0]


def _by_zeros(
    row: Tensor,
    kernel: Tensor,
    stride: int,
    padding: int,
    *,
    extra: int = 0,
    tail: bool = False,
    repeat: bool = False,
    reverse: bool = True,
    pad: Callable[[int, int], int] = lambda k, p: k - 1 - p,
) -> Tensor:
    step = stride + extra
    spread = row.repeat_interleave(step) if repeat else torch.stack([row, *[0 * row] * (step - 1)], dim=1).flatten()
    spread = spread if tail or repeat else spread[: step * (len(row) - 1) + 1]
    kernel = kernel.flip(0) if reverse else kernel
    return F.conv1d(spread[None, None], kernel[None, None], padding=pad(len(kernel), padding))[0, 0]


check_zeros_between = Function(
    number="4.1",
    title="Zeros between",
    kind="derivation",
    praise="A transposed convolution is an ordinary one after all, on a stretched row and with a reversed kernel.",
    reference=_grown,
    # no k for which k - 1 - p would be p in all of them, and rows long enough for every wrong way to run
    cases=lambda rng: [
        (torch.randn(n, generator=rng), torch.randn(k, generator=rng), s, p)
        for n, k, s, p in ((5, 4, 2, 1), (4, 5, 3, 0), (7, 3, 1, 2), (6, 6, 2, 1))
    ],
    mistakes=[
        Mistake(
            "kernel-not-reversed",
            "The sizes are right and the zeros are in place, but the kernel lies the wrong way round: a stamp puts its "
            "first weight first, while a window that slides over the row multiplies its last weight with the latest "
            "value. Compare a row that is 1 at one place and 0 elsewhere.",
            partial(_by_zeros, reverse=False),
        ),
        Mistake(
            "one-zero-too-many",
            "Your values lie one place too far apart. The i-th stamp begins at place s·i, so neighbours are s places "
            "apart: count how many zeros fit between them, at s = 1 to begin with.",
            partial(_by_zeros, extra=1),
        ),
        Mistake(
            "padding-unchanged",
            "You pad the stretched row by p. But here p takes away: with p = 0 every stamp is kept whole, and for the "
            "outermost places the window has to overlap the row by a single value.",
            partial(_by_zeros, pad=lambda k, p: p),
        ),
        Mistake(
            "nothing-cut-off",
            "You keep the whole canvas: your result is right for p = 0, and too long by 2p otherwise. The p places at "
            "either end have to go.",
            partial(_by_zeros, pad=lambda k, p: k - 1),
        ),
        Mistake(
            "zeros-after-the-last",
            "Your row goes on after its last value: zeros belong between two values only, and behind the last one "
            "nothing follows. Your result is s - 1 places too long.",
            partial(_by_zeros, tail=True),
        ),
        Mistake(
            "values-repeated",
            "You have filled the gaps with copies of the values, which is an enlargement by nearest neighbours. Then "
            "every value stamps the kernel s times; it ought to stamp it once.",
            partial(_by_zeros, repeat=True),
        ),
    ],
)


# ---- 4.2: a picture that changes nothing ----


def _glance(exercise: Goal, snapshot: Callable) -> None:
    if not callable(snapshot):
        raise Wrong("hand over the function itself, without calling it")
    rng = torch.Generator()
    rng.seed()
    for n, training in ((6, True), (5, False)):
        z = torch.randn(n, 3, generator=rng)
        generator = _seasoned(z, rng).train(training)
        image = gan.generate(generator, z)
        with torch.no_grad():
            in_company = copy.deepcopy(generator).train()(z)
        before = _statistics(generator)
        found = snapshot(generator, z)
        if found is None:
            raise Untried
        moved = (_statistics(generator) != before).sum()
        if moved:
            raise exercise.wrong("statistics-move", f"({moved} of {len(before)} statistics were moved by one glance)")
        if training and not generator.training:
            raise exercise.wrong("left-in-evaluation", "(generator.training was 1 before, and is 0 now)")
        if generator.training and not training:
            raise exercise.wrong("woken-up", "(generator.training was 0 before, and is 1 now)")
        _judge_bytes(exercise, found, image, in_company)


def _judge_bytes(exercise: Goal, found: Tensor, image: Tensor, in_company: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != image.shape or found.dtype != torch.uint8:
        what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise Wrong(f"the result is {what}: torch.uint8 of shape {tuple(image.shape)} is asked for")
    found = found.double()

    def off(wanted: Tensor) -> float:
        return (found - wanted).abs().max().item()  # whoever cuts instead of rounding is off by less than 1

    wanted = (image + 1) * 127.5
    if off(wanted) < 1.01:
        return
    detail = f"(off by up to {off(wanted):.0f} of 255)"
    light = image > 0
    if off((in_company + 1) * 127.5) < 1.01:
        raise exercise.wrong("company", detail)
    if found.max() <= 1:
        raise exercise.wrong("not-yet-bytes", f"(your largest byte is {found.max():.0f})")
    if (found - 255 * image)[light].abs().max() < 1.01:  # what becomes of the dark ones is the machine's affair
        detail = f"({(~light).double().mean():.0%} of the pixels are below 0, and come out wrong)"
        raise exercise.wrong("range-of-a-sigmoid", detail)
    per_image = tuple(range(1, image.ndim))
    for low, high in ((image.min(), image.max()), (image.amin(per_image, True), image.amax(per_image, True))):
        if off(255 * (image - low) / (high - low)) < 1.01:
            raise exercise.wrong("range-guessed", f"{detail[:-1]}, since no pixel here is exactly -1 or 1)")
    raise Wrong(f"the bytes are not the right ones. {detail}")


@torch.no_grad()
def _seasoned(z: Tensor, rng: torch.Generator) -> gan.Generator:
    """A small generator with statistics as if it had been trained; its pixels for ``z`` go from -tanh 1 to tanh 1."""
    generator = gan.Generator(gan.DCGANConfig(size=8, width=16, z_dim=3, init_std=0.1), rng).eval()
    for layer in generator.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(generator=rng)
            layer.running_var.uniform_(0.5, 2.0, generator=rng)
    before_tanh, last = generator.layers[:-1](z), generator.layers[-2]
    low, high = before_tanh.min(), before_tanh.max()
    last.weight.mul_(2 / (high - low))
    last.bias.copy_(-(high + low) / (high - low))
    return generator


def _statistics(net: nn.Module) -> Tensor:
    return torch.cat([buffer.double().flatten() for buffer in net.buffers()])


check_snapshot = Goal(
    number="4.2",
    title="A glance without traces",
    kind="repair",
    praise="It may be called as often as one likes: the training will not know.",
    measure=_glance,
    mistakes=[
        Mistake(
            "statistics-move",
            "The picture leaves a trace: BatchNorm's running statistics have moved, so that looking more often gives "
            "another generator. It is the mode of the network that decides this; no_grad does not.",
        ),
        Mistake(
            "left-in-evaluation",
            "The statistics stay, but so does evaluation mode: a training that goes on after this glance would no "
            "longer normalise by its batches.",
        ),
        Mistake(
            "woken-up",
            "You end in training mode whatever came in. A generator that was handed over in evaluation mode has to be "
            "returned in evaluation mode: remember what you found.",
        ),
        Mistake(
            "company",
            "The statistics are as they were, but the pictures were normalised by their own batch: the same latent in "
            "other company gives another picture. Putting statistics back afterwards is not enough.",
        ),
        Mistake(
            "range-of-a-sigmoid",
            "You multiply by 255 as if pixels lay in [0, 1]. They leave a tanh: many of them are negative, and grey, "
            "which is 127 or 128 among the bytes, is 0 here.",
        ),
        Mistake(
            "not-yet-bytes",
            "The pixels have been brought into [0, 1], and then cast: of a number below 1 a byte keeps nothing. The "
            "scale is missing.",
        ),
        Mistake(
            "range-guessed",
            "You stretch what you find to 0 … 255. Then the same grey is another byte in every picture, depending on "
            "the darkest and the lightest pixel around it. The range is known: it is that of tanh.",
        ),
    ],
)


# ---- 4.3: a mixed batch of unequal parts ----


def _mixed_gap(n, mean_real, var_real, m, mean_fake, var_fake):
    share = n / (n + m)
    gap = mean_real - mean_fake
    return gap / (share * var_real + (1 - share) * var_fake + share * (1 - share) * gap**2).sqrt()


def _gap_over(variance: Callable) -> Callable:
    """What they get who have another ``variance`` of the mixture; it is given both shares."""

    def gap(n, mean_real, var_real, m, mean_fake, var_fake):
        p, q = n / (n + m), m / (n + m)
        return (mean_real - mean_fake) / variance(p, mean_real, var_real, q, mean_fake, var_fake).sqrt()

    return gap


def _parts(rng: torch.Generator, n: int, m: int, channels: int) -> tuple:
    means = 2 * torch.randn(2, channels, generator=rng)
    variances = 0.3 + 2 * torch.rand(2, channels, generator=rng)
    return n, means[0], variances[0], m, means[1], variances[1]


check_mixed_gap = Function(
    number="4.3",
    title="Few fakes in one batch",
    kind="derivation",
    praise="With m = n it is the second case of (4.6).",
    reference=_mixed_gap,
    cases=lambda rng: [_parts(rng, 12, 4, 5), _parts(rng, 3, 40, 2), _parts(rng, 90, 1, 3)],
    mistakes=[
        Mistake(
            "equal-parts",
            "This is (4.6) as it stands, which was derived for equally many of both. With other numbers the halves "
            "become shares.",
            _gap_over(lambda p, a, va, q, b, vb: (va + vb) / 2 + (a - b) ** 2 / 4),
        ),
        Mistake(
            "means-alike",
            "Your variance is the mean of the two variances only. The two groups also lie apart, and that adds to the "
            "variance of the mixture.",
            _gap_over(lambda p, a, va, q, b, vb: p * va + q * vb),
        ),
        Mistake(
            "quarter-kept",
            "The variances are weighted rightly, but the square of the gap still has its quarter. That was ½ times ½, "
            "the variance of a fair coin; yours is not fair.",
            _gap_over(lambda p, a, va, q, b, vb: p * va + q * vb + (a - b) ** 2 / 4),
        ),
        Mistake(
            "shares-exchanged",
            "The variance of the real examples is weighted with the share of the fakes, and the other way round: let "
            "m be very small, and look at which variance is left.",
            _gap_over(lambda p, a, va, q, b, vb: q * va + p * vb + p * q * (a - b) ** 2),
        ),
        Mistake(
            "square-of-the-mean",
            "What you divide by is the root of the mean square of the mixture, not of its variance: the square of the "
            "common mean has not been taken away. Add a constant to both means, and the result must not change.",
            _gap_over(lambda p, a, va, q, b, vb: p * (va + a**2) + q * (vb + b**2)),
        ),
        Mistake(
            "variance-for-deviation",
            "You divide by the variance of the mixture, but BatchNorm divides by its root. Multiply all values by ten "
            "(means by 10, variances by 100): the result ought to stay.",
            lambda *parts: _mixed_gap(*parts) ** 2 / (parts[1] - parts[4]),
        ),
    ],
)


# ---- 4.4: three faults in a step ----


def _any_step(generator, discriminator, opt_g, opt_d, real, z, *, apart=True, detach=True, clear_d=True, clear_g=True):
    """The step of the lesson with any of its faults. ``clear_g`` clears at the start, where it cannot hide that a
    ``detach`` is missing; ``clear_d`` may be "after", that is after D's own step, which is too early."""
    if clear_g:
        opt_g.zero_grad()
    fake = generator(z)
    shown = fake.detach() if detach else fake
    if apart:
        real_logits, fake_logits = discriminator(real), discriminator(shown)
    else:
        real_logits, fake_logits = discriminator(torch.cat([real, shown])).split([len(real), len(z)])
    d_loss = gan.discriminator_loss(real_logits, fake_logits)
    if clear_d is True:
        opt_d.zero_grad()
    d_loss.backward(retain_graph=True)
    opt_d.step()
    if clear_d == "after":
        opt_d.zero_grad()
    g_loss = gan.generator_loss(discriminator(fake))
    g_loss.backward()
    opt_g.step()
    return d_loss.item(), g_loss.item()


def _after(step: Callable, seed: int, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of both networks after a few steps, and the losses."""
    config = gan.DCGANConfig(size=16, width=3, z_dim=3, init_std=0.2)  # the smallest with BatchNorm in D
    rng = torch.Generator().manual_seed(seed)
    nets = gan.Generator(config, rng), gan.Discriminator(config, rng)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    losses = []
    for real, z in batches:
        figures = step(*nets, *optimizers, real.clone(), z.clone())
        if not isinstance(figures, tuple | list) or len(figures) != 2:
            raise Wrong("the step ought to return two numbers: the discriminator's loss and the generator's")
        losses += [float(figure) for figure in figures]
    return *(nn.utils.parameters_to_vector(net.parameters()).detach() for net in nets), torch.tensor(losses)


def _alike(ours: tuple, theirs: tuple) -> bool:
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def _judge_step(exercise: Goal, step: Callable) -> None:
    if not callable(step):
        raise Wrong("hand over the function itself, without calling it")
    rng = torch.Generator()
    rng.seed()
    seed = int(torch.randint(2**31, (), generator=rng))
    batches = [(torch.rand(n, 1, 16, 16, generator=rng) * 2 - 1, torch.randn(n, 3, generator=rng)) for n in (6, 4)]
    found, start = _after(step, seed, batches), _after(lambda *_: (0, 0), seed, batches)
    right = _after(_any_step, seed, batches)
    if _alike(found, right):
        return
    off = [(a - b).abs().max().item() for a, b in zip(found, right, strict=True)]
    detail = f"(after two steps weights of G are off by up to {off[0]:.2g}, those of D by {off[1]:.2g})"
    still = [torch.equal(a, b) for a, b in zip(found[:2], start[:2], strict=True)]
    if still[1]:
        raise exercise.wrong("cleared-too-late", detail)
    if still[0]:
        raise exercise.wrong("generator-cut-off", detail)
    keys = "one-mixed-batch", "no-detach", "left-in-discriminator", "left-in-generator"
    for settings in itertools.product((True, False), (True, False), (True, "after", False), (True, False)):
        options = dict(zip(("apart", "detach", "clear_d", "clear_g"), settings, strict=True))
        if _alike(found, _after(partial(_any_step, **options), seed, batches)):
            first = next(key for key, setting in zip(keys, settings, strict=True) if setting is not True)
            raise exercise.wrong(first, detail)
    if _alike(found[:2], right[:2]):
        raise Wrong("the weights move as they should, but the losses that you return are others.")
    raise Wrong(f"the step does something else than the lesson's. {detail}")


check_step = Goal(
    number="4.4",
    title="Three faults in one step",
    kind="repair",
    praise="Each player moves by the gradient of its own loss, and by nothing else.",
    measure=_judge_step,
    mistakes=[
        Mistake(
            "one-mixed-batch",
            "The discriminator still gets real images and fakes in one batch. BatchNorm then normalises both by common "
            "statistics, which it will not have in the generator's update, where it sees fakes only.",
        ),
        Mistake(
            "no-detach",
            "The discriminator's loss reaches the generator's weights, and what it leaves there is added to the "
            "generator's own gradient: a push towards being recognised.",
        ),
        Mistake(
            "left-in-discriminator",
            "The generator's backward pass goes through the discriminator and leaves gradients in its weights. When "
            "the discriminator's next update begins they are still there, and are added to its own.",
        ),
        Mistake(
            "left-in-generator",
            "The generator's gradients are never cleared: each of its updates repeats all earlier ones, for backward "
            "adds to what it finds.",
        ),
        Mistake(
            "cleared-too-late",
            "The discriminator does not move at all. Is its step still called, and does the optimizer find gradients "
            "then? Those that are cleared between backward and step are gone.",
        ),
        Mistake(
            "generator-cut-off",
            "The generator does not move at all. In its own update the path from the loss to its weights has to stay "
            "whole, and what arrives there has to stay until its step; the cut belongs to the discriminator's update.",
        ),
    ],
)


# ---- 4.5: fewer rows ----

FEW, MANY = 500, 4000


@cache
def _times_larger(d: int = 16, pairs: int = 40) -> float:
    """The mean distance of two samples of ``FEW`` rows of one distribution over that of two of ``MANY``."""
    rng = torch.Generator().manual_seed(0)
    mean = {
        n: sum(metrics.frechet_distance(*torch.randn(2, n, d, generator=rng)) for _ in range(pairs)) / pairs
        for n in (FEW, MANY)
    }
    return mean[FEW] / mean[MANY]


check_fewer_rows = Number(
    number="4.5",
    title="An eighth of the rows",
    kind="prediction",
    praise="All that is left between two samples of one distribution is their variance, which falls as 1/n.",
    truth=_times_larger,
    rtol=0.15,
    mistakes=[
        Mistake(
            "no-effect",
            "That would be so if the figure were right on average. Errors of the estimated means enter by their "
            "squares, which cannot cancel: two samples of one distribution are never at distance 0.",
            1.0,
        ),
        Mistake(
            "standard-error",
            "Means and covariances do err by a share of 1/√n. But the figure of (4.7) is the square of a distance: "
            "look at how an error in the mean enters it.",
            math.sqrt(MANY / FEW),
        ),
        Mistake(
            "upside-down",
            "You have the right factor, the wrong way round: with fewer rows the estimates are worse, and what the "
            "figure adds up are their errors.",
            FEW / MANY,
        ),
        Mistake(
            "squared-twice",
            "That is one square too many. The squared error of a mean is already of the order 1/n, and not 1/n².",
            (MANY / FEW) ** 2,
        ),
        Mistake(
            "three-halves",
            "Eight to the power of three halves: you have multiplied a squared error, 1/n, by one more error, 1/√n. "
            "In (4.7) every error enters by its square and nothing else.",
            (MANY / FEW) ** 1.5,
        ),
    ],
)


# ---- 4.6: a forgery ----


def _clumps(d: int, size: int, rng: torch.Generator) -> Tensor:
    """``size`` rows in each of d + 1 narrow clumps at the corners of a simplex, sheared and moved off."""
    corners = torch.cat([torch.eye(d), torch.zeros(1, d)]).repeat_interleave(size, dim=0)
    rows = corners + 0.02 * torch.randn(corners.shape, generator=rng)
    shear = torch.eye(d) * (3 + torch.rand(d, generator=rng)) + 6 * torch.ones(d, d).tril(-1)
    rows = rows @ shear.T + 5 + torch.rand(d, generator=rng)
    return rows[torch.randperm(len(rows), generator=rng)]


def _judge_forgery(exercise: Goal, forge: Callable) -> None:
    if not callable(forge):
        raise Wrong("hand over the function itself, without calling it")
    rng = torch.Generator()
    rng.seed()
    for d, size in ((2, 250), (4, 120)):
        real = _clumps(d, size, rng)
        fake = forge(real.clone(), rng)
        if fake is None:
            raise Untried
        if not isinstance(fake, Tensor) or fake.shape != real.shape or not fake.is_floating_point():
            what = f"a tensor of shape {tuple(fake.shape)}" if isinstance(fake, Tensor) else type(fake).__name__
            raise Wrong(f"the forgery is {what}: floats of shape {tuple(real.shape)} are asked for")
        if not fake.isfinite().all():
            raise Wrong("some of your numbers are infinite or not a number.")
        real, fake = real.double(), fake.detach().double()
        share = metrics.frechet_distance(real, fake) / real.T.cov().trace().item()
        if share >= 0.05:  # Gaussian noise with the moments of the real rows stays below 0.02
            raise _moments_off(exercise, real, fake, f"(d = {d}: the distance is {share:.1%} of the total variance)")
        precision = metrics.precision_recall(real, fake).precision
        if precision >= 0.25:
            copied = (metrics.nearest_neighbours(fake, real)[0][:, 0] < 1e-6).double().mean()
            key = "copied" if copied > 0.5 else "still-precise"
            raise exercise.wrong(
                key, f"(d = {d}: distance {share:.2%} of the total variance, precision {precision:.2f})"
            )


def _moments_off(exercise: Goal, real: Tensor, fake: Tensor, detail: str) -> Wrong:
    wanted, found = real.T.cov(), fake.T.cov()
    factor = torch.linalg.cholesky(wanted)

    def off(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    if (fake.mean(0) - real.mean(0)).square().sum() > 0.04 * max(wanted.trace(), found.trace()):
        return exercise.wrong("mean-off", detail)
    if off(found, wanted @ wanted) < 0.3:
        return exercise.wrong("covariance-for-root", detail)
    if off(found, factor.T @ factor) < 0.3:
        return exercise.wrong("root-transposed", detail)
    if off(found.diagonal(), wanted.diagonal()) < 0.35:
        return exercise.wrong("correlations-lost", detail)
    return exercise.wrong("spread-off", detail)


check_forgery = Goal(
    number="4.6",
    title="A forgery that the Fréchet distance passes",
    kind="open",
    praise="The distance sees a mean and a covariance. Where the examples are, it does not see.",
    measure=_judge_forgery,
    mistakes=[
        Mistake(
            "mean-off",
            "The two means lie apart, and the first term of (4.7) sees it. Compare fake.mean(0) with real.mean(0).",
        ),
        Mistake(
            "spread-off",
            "The means agree, but the features do not vary as much as the real ones: compare the diagonals of the two "
            "covariances.",
        ),
        Mistake(
            "correlations-lost",
            "Mean and variance of each feature are right, but the features no longer vary together: (4.7) compares "
            "whole covariances, off the diagonal too.",
        ),
        Mistake(
            "covariance-for-root",
            "Your rows have the square of the covariance that they should have. What turns uncorrelated rows into "
            "rows with covariance C is a root of C, not C itself.",
        ),
        Mistake(
            "root-transposed",
            "Your root of the covariance stands on the wrong side: rows x of covariance I become, by x @ A, rows of "
            "covariance AᵀA, which is not A Aᵀ unless A is symmetric.",
        ),
        Mistake(
            "copied",
            "Mean and covariance agree, but these are the real rows. A forgery has to lie where no real row is, or "
            "precision will praise it with reason.",
        ),
        Mistake(
            "still-precise",
            "Mean and covariance agree, but most of your rows still lie within the clumps of real ones: moving "
            "each row a little is not enough. What else has the same two moments?",
        ),
    ],
)
