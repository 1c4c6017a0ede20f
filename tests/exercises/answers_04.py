"""Answers to the exercises of lesson 04, right and wrong."""

import torch
from answers import Answers
from torch.nn import functional as F

# ---- 4.1 ----


def grown_place_by_place(x, kernel, stride, padding):
    """The sum over all stamps at each place of the canvas."""
    n, k = len(x), len(kernel)
    canvas = [0.0] * ((n - 1) * stride + k)
    for i in range(n):
        for j in range(k):
            canvas[stride * i + j] += float(x[i] * kernel[j])
    return torch.tensor(canvas[padding : len(canvas) - padding])


def slide(row, weights):
    """A window that slides over a row without padding."""
    return torch.stack([(row[i : i + len(weights)] * weights).sum() for i in range(len(row) - len(weights) + 1)])


def spread_by_loop(x, distance):
    row = torch.zeros((len(x) - 1) * distance + 1)
    for i, value in enumerate(x):
        row[distance * i] = value
    return row


def grown_unreversed(x, kernel, stride, padding):
    return slide(F.pad(spread_by_loop(x, stride), 2 * [len(kernel) - 1 - padding]), kernel)


def grown_too_far_apart(x, kernel, stride, padding):
    row = torch.zeros(len(x) + (len(x) - 1) * stride)
    row[:: stride + 1] = x
    return slide(F.pad(row, 2 * [len(kernel) - 1 - padding]), torch.flip(kernel, [0]))


def grown_with_the_padding_of_a_convolution(x, kernel, stride, padding):
    return slide(F.pad(spread_by_loop(x, stride), (padding, padding)), torch.flip(kernel, [0]))


def grown_and_not_cut(x, kernel, stride, padding):
    return grown_place_by_place(x, kernel, stride, 0)


def grown_with_a_tail(x, kernel, stride, padding):
    row = torch.zeros(len(x) * stride)
    row[::stride] = x
    return slide(F.pad(row, 2 * [len(kernel) - 1 - padding]), torch.flip(kernel, [0]))


def grown_from_an_enlargement(x, kernel, stride, padding):
    row = F.interpolate(x[None, None], scale_factor=float(stride), mode="nearest")[0, 0]
    return slide(F.pad(row, 2 * [len(kernel) - 1 - padding]), torch.flip(kernel, [0]))


# ---- 4.2 ----


def snapshot_of_parts(generator, z):
    modes = {module: module.training for module in generator.modules()}
    with torch.inference_mode():
        pixels = generator.eval()(z)
    for module, mode in modes.items():
        module.training = mode
    return pixels.clamp(-1, 1).sub(-1).div(2).mul(255).round().byte()


def to_bytes(images):
    return (127.5 * images + 127.5).round().to(torch.uint8)


def snapshot_without_gradients(generator, z):
    with torch.no_grad():
        return to_bytes(generator(z))


def snapshot_as_it_stood(generator, z):
    return (generator(z) * 255).to(torch.uint8)


def snapshot_that_forgets_the_mode(generator, z):
    generator.eval()
    return to_bytes(generator(z).detach())


def snapshot_that_ends_in_training(generator, z):
    generator.eval()
    images = generator(z)
    generator.train()
    return to_bytes(images)


def snapshot_that_restores_statistics(generator, z):
    mode, kept = generator.training, {key: value.clone() for key, value in generator.state_dict().items()}
    images = generator.train()(z)
    generator.load_state_dict(kept)
    generator.train(mode)
    return to_bytes(images)


def snapshot_with(conversion):
    def snapshot(generator, z):
        mode = generator.training
        images = generator.eval()(z).detach()
        generator.train(mode)
        return conversion(images)

    return snapshot


# ---- 4.3 ----


def gap_by_moments(n, mean_real, var_real, m, mean_fake, var_fake):
    squares = (n * (var_real + mean_real**2) + m * (var_fake + mean_fake**2)) / (n + m)
    mean = (n * mean_real + m * mean_fake) / (n + m)
    scale = torch.rsqrt(squares - mean**2)
    return (mean_real - mean) * scale - (mean_fake - mean) * scale


def gap_of_halves(n, mean_real, var_real, m, mean_fake, var_fake):
    delta = mean_real - mean_fake
    return delta / torch.sqrt(0.5 * (var_real + var_fake + 0.5 * delta * delta))


def gap_within(n, mean_real, var_real, m, mean_fake, var_fake):
    pooled = (n * var_real + m * var_fake) / (n + m)
    return (mean_real - mean_fake) * pooled.rsqrt()


def gap_with_a_quarter(n, mean_real, var_real, m, mean_fake, var_fake):
    middle = (mean_real + mean_fake) / 2
    between = (mean_real - middle).square()
    return (mean_real - mean_fake) / torch.sqrt((n * var_real + m * var_fake) / (n + m) + between)


def gap_crosswise(n, mean_real, var_real, m, mean_fake, var_fake):
    total, delta = n + m, mean_real - mean_fake
    return delta / torch.sqrt((m * var_real + n * var_fake) / total + n * m / total**2 * delta.square())


def gap_by_mean_square(n, mean_real, var_real, m, mean_fake, var_fake):
    squares = (n * (var_real + mean_real**2) + m * (var_fake + mean_fake**2)) / (n + m)
    return (mean_real - mean_fake) / squares.sqrt()


def gap_by_variance(n, mean_real, var_real, m, mean_fake, var_fake):
    total, delta = n + m, mean_real - mean_fake
    return delta / ((n * var_real + m * var_fake) / total + n * m / total**2 * delta.square())


# ---- 4.4 ----


def bce(logits, answer):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, answer))


def step_in_halves(generator, discriminator, opt_g, opt_d, real, z):
    """The fakes for the discriminator are made without a graph, and its two losses go backward one by one."""
    opt_d.zero_grad()
    with torch.no_grad():
        shown = generator(z)
    on_real = bce(discriminator(real), 1.0)
    on_real.backward()
    on_fake = bce(discriminator(shown), 0.0)
    on_fake.backward()
    opt_d.step()
    opt_g.zero_grad()
    g_loss = bce(discriminator(generator(z)), 1.0)
    g_loss.backward()
    opt_g.step()
    return on_real.item() + on_fake.item(), g_loss.item()


def step_untouched(generator, discriminator, opt_g, opt_d, real, z):
    fake = generator(z)
    answers = discriminator(torch.cat([real, fake]))
    d_loss = bce(answers[: len(real)], 1.0) + bce(answers[len(real) :], 0.0)
    d_loss.backward(retain_graph=True)
    opt_d.step()
    g_loss = bce(discriminator(fake), 1.0)
    g_loss.backward()
    opt_g.step()
    return d_loss.item(), g_loss.item()


def step_mixed(generator, discriminator, opt_g, opt_d, real, z):
    fake = generator(z)
    answers = discriminator(torch.cat([real, fake.detach()]))
    labels = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
    d_loss = 2 * F.binary_cross_entropy_with_logits(answers, labels)
    opt_d.zero_grad()
    d_loss.backward()
    opt_d.step()
    g_loss = bce(discriminator(fake), 1.0)
    opt_g.zero_grad()
    g_loss.backward()
    opt_g.step()
    return d_loss.item(), g_loss.item()


def step_of(*, clear_at_start=(), clear_midway=(), detach=True, clear_late=(), clear_g_late=False, cut=False):
    """Two calls of the discriminator; what is cleared, and when, by the names "g" and "d"."""

    def step(generator, discriminator, opt_g, opt_d, real, z):
        optimizers = {"g": opt_g, "d": opt_d}
        for name in clear_at_start:
            optimizers[name].zero_grad()
        fake = generator(z)
        if cut:
            fake = fake.detach()
        d_loss = bce(discriminator(real), 1.0) + bce(discriminator(fake.detach() if detach else fake), 0.0)
        d_loss.backward(retain_graph=True)
        for name in clear_late:
            optimizers[name].zero_grad()
        opt_d.step()
        for name in clear_midway:
            optimizers[name].zero_grad()
        g_loss = bce(discriminator(fake), 1.0)
        g_loss.backward()
        if clear_g_late:
            opt_g.zero_grad()
        opt_g.step()
        return d_loss.item(), g_loss.item()

    return step


# ---- 4.6 ----


def covariance(x):
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def forge_gaussian(real, rng):
    root = torch.linalg.cholesky(covariance(real))
    return real.mean(0) + (root @ torch.randn(real.shape[1], len(real), generator=rng)).T


def forge_uniform(real, rng):
    values, vectors = torch.linalg.eigh(covariance(real))
    cube = (torch.rand(real.shape, generator=rng) - 0.5) * 12**0.5
    return cube @ torch.diag(values.sqrt()) @ vectors.T + real.mean(0)


def forge_at_the_origin(real, rng):
    return forge_gaussian(real, rng) - real.mean(0)


def forge_by_mean_alone(real, rng):
    return real.mean(0) + torch.randn(real.shape, generator=rng)


def forge_shrunk(real, rng):
    return real.mean(0) + 0.6 * (real - real.mean(0))


def forge_feature_by_feature(real, rng):
    return real.mean(0) + real.std(0) * torch.randn(real.shape, generator=rng)


def forge_by_shuffling_columns(real, rng):
    return torch.stack([column[torch.randperm(len(real), generator=rng)] for column in real.T], dim=1)


def forge_with_the_covariance(real, rng):
    return real.mean(0) + torch.randn(real.shape, generator=rng) @ torch.cov(real.T)


def forge_with_the_root_on_the_wrong_side(real, rng):
    return real.mean(0) + torch.randn(real.shape, generator=rng) @ torch.linalg.cholesky(torch.cov(real.T))


def forge_copies(real, rng):
    return real[torch.randperm(len(real), generator=rng)]


def forge_jittered(real, rng):
    return real + 0.002 * torch.randn(real.shape, generator=rng)


ANSWERS = {
    "check_zeros_between": Answers(
        second=grown_place_by_place,
        wrong={
            "kernel-not-reversed": [grown_unreversed],
            "one-zero-too-many": [grown_too_far_apart],
            "padding-unchanged": [grown_with_the_padding_of_a_convolution],
            "nothing-cut-off": [grown_and_not_cut],
            "zeros-after-the-last": [grown_with_a_tail],
            "values-repeated": [grown_from_an_enlargement],
        },
    ),
    "check_snapshot": Answers(
        second=snapshot_of_parts,
        wrong={
            "statistics-move": [snapshot_without_gradients, snapshot_as_it_stood],
            "left-in-evaluation": [snapshot_that_forgets_the_mode],
            "woken-up": [snapshot_that_ends_in_training],
            "company": [snapshot_that_restores_statistics],
            "range-of-a-sigmoid": [
                snapshot_with(lambda images: (images * 255).byte()),
                snapshot_with(lambda images: images.clamp(0, 1).mul(255).round().byte()),
                snapshot_with(lambda images: (images.relu() * 255).to(torch.uint8)),
            ],
            "not-yet-bytes": [
                snapshot_with(lambda images: ((images + 1) / 2).to(torch.uint8)),
                snapshot_with(lambda images: (images * 0.5 + 0.5).round().byte()),
            ],
            "range-guessed": [
                snapshot_with(lambda x: ((x - x.min()) / (x.max() - x.min()) * 255).byte()),
                snapshot_with(lambda x: torch.stack([(i - i.min()) / (i.max() - i.min()) * 255 for i in x]).byte()),
            ],
        },
    ),
    "check_mixed_gap": Answers(
        second=gap_by_moments,
        wrong={
            "equal-parts": [gap_of_halves],
            "means-alike": [gap_within],
            "quarter-kept": [gap_with_a_quarter],
            "shares-exchanged": [gap_crosswise],
            "square-of-the-mean": [gap_by_mean_square],
            "variance-for-deviation": [gap_by_variance],
        },
    ),
    "check_step": Answers(
        second=step_in_halves,
        wrong={
            "one-mixed-batch": [step_untouched, step_mixed],
            "no-detach": [step_of(clear_at_start="gd", detach=False), step_of(detach=False)],
            "left-in-discriminator": [step_of(clear_midway="gd"), step_of(clear_midway="g"), step_of()],
            "left-in-generator": [step_of(clear_at_start="d")],
            "cleared-too-late": [step_of(clear_late="gd"), step_of(clear_late="d", clear_g_late=True)],
            "generator-cut-off": [
                step_of(clear_at_start="gd", cut=True),
                step_of(clear_at_start="gd", clear_g_late=True),
            ],
        },
    ),
    "check_fewer_rows": Answers(
        second=(500 / 4000) ** -1,
        wrong={
            "no-effect": [1],
            "standard-error": [8**0.5, 2.83],
            "upside-down": [1 / 8],
            "squared-twice": [8 * 8],
            "three-halves": [22.6],
        },
    ),
    "check_forgery": Answers(
        second=forge_gaussian,
        wrong={
            "mean-off": [forge_at_the_origin],
            "spread-off": [forge_by_mean_alone, forge_shrunk],
            "correlations-lost": [forge_feature_by_feature, forge_by_shuffling_columns],
            "covariance-for-root": [forge_with_the_covariance],
            "root-transposed": [forge_with_the_root_on_the_wrong_side],
            "copied": [forge_copies],
            "still-precise": [forge_jittered],
        },
    ),
}
