"""GANs: losses against their formulas, a step against one by hand, the guidelines of DCGAN, and what is left alone."""

import copy
import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_course.gan import (
    KINDS,
    DCGANConfig,
    Discriminator,
    GANConfig,
    GANError,
    Generator,
    discriminator_loss,
    gan_step,
    generate,
    generator_loss,
    gradient_norms,
    gradient_penalty,
    latents,
    r1_penalty,
    recalibrate,
    sample,
)
from aigc_course.runtime import CourseError, rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")

CONVS = nn.Conv2d | nn.ConvTranspose2d
BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def conv(**options):
    return DCGANConfig(**{"size": 16, "z_dim": 4, "width": 2, **options})


def dense(**options):
    return GANConfig(**{"shape": (1, 4, 4), "z_dim": 3, "hidden": (8,), **options})


CONFIGS = {
    "conv": conv(),
    "spectral": conv(spectral_norm=True, batch_norm=False),
    "dense": dense(),
    "dense spectral": dense(spectral_norm=True),
    "unbounded": dense(bounded=False),
}


def normal(*shape, key, dtype=torch.float32):
    return torch.randn(*shape, generator=rng_for("test_gan", key), dtype=dtype)


def pair(config, key="pair"):
    rng = rng_for("test_gan", key)
    return Generator(config, rng), Discriminator(config, rng)


def adam(net, lr=1e-3):
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999))


def state_of(generator, discriminator, kind=TrainState):
    optimizers = {"generator": adam(generator), "discriminator": adam(discriminator, 2e-3)}
    return kind({"generator": generator, "discriminator": discriminator}, optimizers)


def content(net):
    """Weights and buffers, copied."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def layers_of(net, kind):
    return [layer for layer in net.layers if isinstance(layer, kind)]


# ---- network ----


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_images_double_from_4_and_halve_back_to_4(size, channels):
    config = DCGANConfig(size=size, channels=channels, width=1 if size > 64 else 2, z_dim=5)
    sides, shape = [], (2, channels, size, size)
    generator, discriminator = pair(config)
    for net in (generator, discriminator):
        for layer in layers_of(net, CONVS):
            layer.register_forward_hook(lambda _, args, output: sides.append(output.shape[-1]))
    images = generator(normal(2, 5, key="z"))
    doubled = [4 * 2**i for i in range(int(math.log2(size // 4)) + 1)]
    assert images.shape == shape and config.shape == shape[1:] and sides == doubled
    sides.clear()
    logits = discriminator(images)
    assert logits.shape == (2,) and logits.dtype == torch.float32 and sides == [*reversed(doubled[:-1]), 1]


@pytest.mark.parametrize("hidden", [(8,), (8, 16), [4, 6, 8]])
@pytest.mark.parametrize("shape", [(2,), (1, 28, 28), [3, 4, 4]])
def test_dense_networks_are_as_wide_as_asked_and_mirror_each_other(shape, hidden):
    generator, discriminator = pair(GANConfig(shape=shape, z_dim=3, hidden=hidden))
    widths = [[layer.out_features for layer in layers_of(net, nn.Linear)] for net in (generator, discriminator)]
    assert widths == [[*hidden, math.prod(shape)], [*reversed(hidden), 1]]
    examples = generator(normal(5, 3, key="z"))
    assert examples.shape == (5, *shape) and discriminator(examples).shape == (5,)
    for net, between in ((generator, nn.ReLU), (discriminator, nn.LeakyReLU)):
        assert len(layers_of(net, between)) == len(hidden)


@pytest.mark.parametrize("name", ["conv", "dense", "unbounded"])
def test_images_lie_between_minus_1_and_1_unless_unbounded(name):
    config = CONFIGS[name]
    generator, _ = pair(config)
    with torch.no_grad():
        layers_of(generator, CONVS | nn.Linear)[-1].weight.mul_(1e5)
    examples = generator(normal(50, config.z_dim, key="z"))
    assert examples.min() < -0.99 and examples.max() > 0.99
    assert (examples.abs().max() <= 1) == (name != "unbounded")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_weights_come_from_the_generator_given_and_no_other(kind, name):
    config = CONFIGS[name]
    rng, before = rng_for("weights"), torch.get_rng_state()
    first, second = kind(config, rng), kind(config, rng)
    again, other = kind(config, rng_for("weights")), kind(config, rng_for("other"))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(content(first), content(again))
    weights = [layers_of(net, CONVS | nn.Linear) for net in (first, second, other)]
    for i, j in ((0, 1), (0, 2)):
        assert not any(torch.equal(a.weight, b.weight) for a, b in zip(weights[i], weights[j], strict=True))


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_weights_start_with_the_standard_deviation_asked_for(kind, std):
    net = kind(DCGANConfig(width=8, z_dim=20, init_std=std), rng_for("std"))

    def check(values, mean):
        n = values.numel()
        assert (values.mean() - mean).abs() < 4.5 * std / n**0.5
        assert (values.std() / std - 1).abs() < 4.5 / (2 * n) ** 0.5

    for layer in layers_of(net, CONVS):
        check(layer.weight.detach(), 0.0)
        assert layer.bias is None or (layer.bias == 0).all()
    norms = layers_of(net, nn.BatchNorm2d)
    check(torch.cat([layer.weight.detach() for layer in norms]), 1.0)
    assert all((layer.bias == 0).all() for layer in norms)


# ---- guidelines (Radford et al. 2016, section 3) ----


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("norm", [True, False])
def test_the_guidelines_of_dcgan(size, norm):
    """Strides in place of pooling, no hidden linear layer, BatchNorm but next to the image and the logit, ReLU in G and
    LeakyReLU in D, tanh at the end."""
    config = conv(size=size, batch_norm=norm, generator_batch_norm=norm, leak=0.3)
    generator, discriminator = pair(config)
    norms, n = [nn.BatchNorm2d] * norm, int(math.log2(size // 8))
    up = (1 + n) * [nn.ConvTranspose2d, *norms, nn.ReLU]
    assert [type(layer) for layer in generator.layers] == [nn.Unflatten, *up, nn.ConvTranspose2d, nn.Tanh]
    down = n * [nn.Conv2d, *norms, nn.LeakyReLU]
    assert [type(layer) for layer in discriminator.layers] == [nn.Conv2d, nn.LeakyReLU, *down, nn.Conv2d]
    assert all(layer.negative_slope == 0.3 for layer in layers_of(discriminator, nn.LeakyReLU))
    for net, whole in ((generator, 0), (discriminator, -1)):
        strides = [layer.stride for layer in layers_of(net, CONVS)]
        assert strides.pop(whole) == (1, 1) and set(strides) == {(2, 2)}
        # BatchNorm takes a bias before it away again, so there is none.
        followed = [isinstance(after, nn.BatchNorm2d) for after in [*net.layers, None][1:]]
        for layer, normed in zip(net.layers, followed, strict=True):
            assert not isinstance(layer, CONVS) or (layer.bias is None) == normed


@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("size", "width", "channels", "z_dim"), [(8, 3, 1, 5), (32, 2, 3, 7), (64, 1, 1, 4)])
def test_the_number_of_weights(size, width, channels, z_dim, norms):
    """With w at the image, W = w size / 8 at 4 x 4: widths double, so layers between hold 16 (2 w² + … + W²/2)
    = 32 (W² - w²) / 3 weights, and each of their channels two of BatchNorm or one bias."""
    options = {"batch_norm": norms[0], "generator_batch_norm": norms[1]}
    generator, discriminator = pair(conv(size=size, width=width, channels=channels, z_dim=z_dim, **options))
    most = width * size // 8
    between = 32 * (most**2 - width**2) // 3
    expected = 16 * channels * width + width + between + (2 if norms[0] else 1) * 2 * (most - width) + 16 * most + 1
    assert sum(p.numel() for p in discriminator.parameters()) == expected
    expected = 16 * z_dim * most + between + (2 if norms[1] else 1) * (2 * most - width) + 16 * width * channels
    assert sum(p.numel() for p in generator.parameters()) == expected + channels


@pytest.mark.parametrize("config", [conv(width=4), dense()], ids=["conv", "dense"])
def test_spectral_norm_makes_every_gain_1(config):
    config = replace(config, spectral_norm=True)
    generator, discriminator = pair(config)
    x = normal(4, *config.shape, key="x")
    for _ in range(40):
        discriminator(x)  # each pass in training mode is one more step of the power iteration
    for layer in layers_of(discriminator, CONVS | nn.Linear):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert not any("parametrizations" in name for name in generator.state_dict())


# ---- losses ----


def naive_discriminator(kind, real, fake):
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    return -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()


def naive_generator(kind, fake):
    if kind == "minimax":
        return (1 - fake.sigmoid()).log().mean()
    return -fake.sigmoid().log().mean() if kind == "non_saturating" else -fake.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_their_formulas(kind):
    real, fake = (3 * normal(n, key=key, dtype=torch.float64) for n, key in ((50, "real"), (70, "fake")))
    for ours, naive, logits in (
        (lambda r, f: discriminator_loss(r, f, kind=kind), lambda r, f: naive_discriminator(kind, r, f), (real, fake)),
        (lambda f: generator_loss(f, kind=kind), lambda f: naive_generator(kind, f), (fake,)),
    ):
        for logit in logits:
            logit.requires_grad_()
        torch.testing.assert_close(ours(*logits), naive(*logits), rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss(*logits), logits) for loss in (ours, naive)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    if kind == "non_saturating":
        assert torch.equal(discriminator_loss(real, fake), discriminator_loss(real, fake, kind=kind))
        assert torch.equal(generator_loss(fake), generator_loss(fake, kind=kind))


def test_losses_of_a_discriminator_that_is_sure_stay_finite():
    """At logits of ±1e4 in float32 the naive forms take log(0); ours have the value and the gradient of the limit."""
    sure = torch.tensor([1e4, -1e4])
    gradient_of = {"real": torch.tensor([0.0, -0.5]), "fake": torch.tensor([0.5, 0.0])}
    for side, gradient in gradient_of.items():
        logits = {"real": torch.zeros(1), "fake": torch.zeros(1), side: sure.clone().requires_grad_()}
        assert not naive_discriminator("minimax", *logits.values()).isfinite()
        loss = discriminator_loss(*logits.values())
        torch.testing.assert_close(loss, torch.tensor(1e4 / 2 + math.log(2)))
        assert torch.equal(torch.autograd.grad(loss, logits[side])[0], gradient)
    for kind, value, gradient in (("non_saturating", 5e3, [0.0, -0.5]), ("minimax", -5e3, [-0.5, 0.0])):
        fake = sure.clone().requires_grad_()
        assert not naive_generator(kind, fake).isfinite()
        loss = generator_loss(fake, kind=kind)
        assert loss.item() == value and torch.autograd.grad(loss, fake)[0].tolist() == gradient


def test_a_generator_that_loses_learns_from_the_non_saturating_loss_only():
    """By its logit, log(1 - D) has the slope -D and -log D the slope D - 1: where D is near 0, the first is flat."""
    fake = torch.linspace(-8, 8, 17, dtype=torch.float64, requires_grad=True)
    slopes = {k: 17 * torch.autograd.grad(generator_loss(fake, kind=k), fake)[0] for k in ("minimax", "non_saturating")}
    torch.testing.assert_close(slopes["minimax"], -fake.detach().sigmoid())
    torch.testing.assert_close(slopes["non_saturating"], fake.detach().sigmoid() - 1)


def test_the_best_discriminator_is_the_ratio_of_densities():
    """Goodfellow et al. 2014, section 4.1: logits log(p/q), and a loss of log 4 - 2 JSD(p, q)."""
    counts_p, counts_q = torch.tensor([5, 3, 1, 1]), torch.tensor([1, 2, 3, 4])  # of ten each
    p, q = counts_p.double() / 10, counts_q.double() / 10

    def loss_of(logits):
        return discriminator_loss(logits.repeat_interleave(counts_p), logits.repeat_interleave(counts_q))

    best = (p / q).log().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(best), best)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)
    middle = (p + q) / 2
    jsd = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    torch.testing.assert_close(loss_of(best), math.log(4) - 2 * jsd)
    for i in range(8):
        other = best.detach() + 0.3 * normal(4, key=i, dtype=torch.float64)
        assert loss_of(other) > loss_of(best) + 1e-4


# ---- penalties ----


class Linear(nn.Module):
    """Its gradient is w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return x.flatten(1) @ self.w + 3


class Smooth(nn.Module):
    """a · tanh(W x) in float64, with its gradient in closed form."""

    def __init__(self, d=6, hidden=5):
        super().__init__()
        self.w = nn.Parameter(normal(hidden, d, key="w", dtype=torch.float64))
        self.a = nn.Parameter(2 * normal(hidden, key="a", dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return torch.tanh(x.double().flatten(1) @ self.w.T) @ self.a

    @torch.no_grad()
    def norms(self, x):
        slope = 1 - torch.tanh(x.double().flatten(1) @ self.w.T).square()
        return ((slope * self.a) @ self.w).norm(dim=1)


class Square(nn.Module):
    """|x|² / 2: its gradient is x."""

    def forward(self, x):
        return x.flatten(1).square().sum(1) / 2


def test_a_linear_discriminator_has_the_norm_of_its_weights_everywhere():
    d, norm = Linear(normal(12, key="w")), normal(12, key="w").norm()
    real, fake = normal(5, 3, 2, 2, key="real"), normal(5, 3, 2, 2, key="fake")
    torch.testing.assert_close(gradient_norms(d, real), norm.expand(5))
    torch.testing.assert_close(gradient_penalty(d, real, fake, rng_for(0)), (norm - 1).square())
    torch.testing.assert_close(r1_penalty(d, real), norm.square() / 2)
    for slope, cost in ((1.0, 0.0), (0.5, 0.25), (0.0, 1.0)):  # a flat one costs as well
        assert gradient_penalty(Linear(slope * torch.eye(12)[3]), real, fake, rng_for(0)).item() == pytest.approx(cost)


def test_gradient_norms_agree_with_finite_differences():
    d, x, step = Smooth(), normal(4, 6, key="x"), 1e-5
    with torch.no_grad():
        moves = step * torch.eye(6, dtype=torch.float64)
        columns = [(d(x.double() + move) - d(x.double() - move)) / (2 * step) for move in moves]
    expected = torch.stack(columns, 1).norm(dim=1)
    assert expected.max() > 1.5 * expected.min()
    torch.testing.assert_close(gradient_norms(d, x).double(), expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_ties_the_gradients_of_a_batch_together_in_training_mode_only():
    _, d = pair(conv(width=4))
    x = normal(5, *d.config.shape, key="x")

    def own():
        """The norm of the gradient of each logit by its own example."""
        x.requires_grad_()
        return torch.stack([torch.autograd.grad(d(x)[i], x)[0][i].norm() for i in range(5)])

    assert (gradient_norms(d, x) / own() - 1).abs().max() > 0.02
    d.eval()
    torch.testing.assert_close(gradient_norms(d, x), own())


PENALTIES = {
    "gp": (lambda d, real, fake: gradient_penalty(d, real, fake, rng_for("gp")), lambda n: (n - 1).square().mean()),
    "r1": (lambda d, real, fake: r1_penalty(d, real), lambda n: n.square().mean() / 2),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_has_the_right_gradient_for_the_discriminator_and_none_for_the_examples(name):
    """A second derivative, against differences of the closed form; the examples, and what made them, get nothing."""
    penalty_of, by_norms = PENALTIES[name]
    d, real = Smooth(), normal(4, 6, key="real").requires_grad_()
    source = normal(4, 6, key="fake").requires_grad_()
    penalty = penalty_of(d, real, torch.tanh(2 * source))
    penalty.backward()
    assert real.grad is None and source.grad is None
    (points,) = d.seen
    torch.testing.assert_close(penalty.double(), by_norms(d.norms(points)), rtol=1e-5, atol=1e-6)
    for parameter in d.parameters():
        flat, gradient, step = parameter.detach().view(-1), parameter.grad.view(-1), 1e-5
        for i in range(len(flat)):
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                ends.append(by_norms(d.norms(points)).item())
                flat[i] -= sign * step
            assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_computed_in_full_precision_and_also_without_gradients_around(name):
    penalty_of, _ = PENALTIES[name]
    _, d = pair(conv(width=4))
    real, fake = normal(4, *d.config.shape, key="real"), normal(4, *d.config.shape, key="fake")
    expected = penalty_of(copy.deepcopy(d), real, fake)
    with torch.autocast(**BF16):
        found = penalty_of(copy.deepcopy(d), real, fake)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(penalty_of(copy.deepcopy(d), real, fake), expected)
    half = penalty_of(copy.deepcopy(d), real.bfloat16(), fake.bfloat16())
    torch.testing.assert_close(half, expected, rtol=0.05, atol=1e-4)


def test_the_points_lie_between_each_real_example_and_its_fake():
    """One share per example, for all its pixels, uniform in [0, 1]."""
    d = Smooth(d=12)
    real, fake = normal(2000, 3, 2, 2, key="real"), normal(2000, 3, 2, 2, key="fake")
    gradient_penalty(d, real, fake, rng_for("between"))
    (points,) = d.seen
    share = (points - fake).flatten(1).double().norm(dim=1) / (real - fake).flatten(1).double().norm(dim=1)
    torch.testing.assert_close(points, fake + share.float()[:, None, None, None] * (real - fake), rtol=1e-3, atol=1e-4)
    assert share.min() < 0.01 and share.max() > 0.99 and len(share.unique()) > 1900
    assert share.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert share.var().item() == pytest.approx(1 / 12, rel=0.1)
    # The slope of |x|²/2 at a point between 3 and 1 is uniform between them, so (norm - 1)² has the mean 4/3.
    three, one = torch.full((50_000, 1), 3.0), torch.full((50_000, 1), 1.0)
    assert gradient_penalty(Square(), three, one, rng_for("square")).item() == pytest.approx(4 / 3, rel=0.02)
    assert r1_penalty(Square(), three).item() == pytest.approx(9 / 2)
    found = [gradient_penalty(Square(), three, one, rng_for(seed)).item() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


# ---- steps ----

OPTIONS = {
    **{kind: {"kind": kind} for kind in KINDS},
    "the default": {},
    "gradient penalty": {"kind": "wasserstein", "gp": 10.0, "critic_steps": 2},
    "R1": {"r1": 3.0},
    "R1 every other step": {"r1": 3.0, "r1_every": 2},
}


def step_by_hand(nets, optimizers, real, rng, number, *, kind="non_saturating", gp=0, r1=0, r1_every=1, critic_steps=1):
    """Algorithm 1 of Goodfellow et al. as tutorials write it: zero_grad, backward, step."""
    d_losses = {
        "non_saturating": lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(),
        "minimax": lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(),
        "wasserstein": lambda r, f: f.mean() - r.mean(),
        "hinge": lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
    }
    g_losses = {"non_saturating": lambda f: F.softplus(-f).mean(), "minimax": lambda f: -F.softplus(f).mean()}
    g, d = nets
    fake = g(torch.randn(len(real), g.config.z_dim, generator=rng))
    answers = [d(real), d(fake.detach())]
    loss = d_losses[kind](*answers)
    figures = {"d_loss": loss.item()} | {
        name: torch.sigmoid(logits).mean().item() for name, logits in zip(("d_real", "d_fake"), answers, strict=True)
    }
    if gp:
        loss = loss + gp * gradient_penalty(d, real, fake.detach(), rng)
    if r1 and number in range(0, 100, r1_every):
        loss = loss + (r1 * r1_every) * r1_penalty(d, real)
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
    if number in range(critic_steps - 1, 100, critic_steps):
        loss = g_losses.get(kind, lambda f: -f.mean())(d(fake))
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        figures["g_loss"] = loss.item()
    return figures


@pytest.mark.parametrize("config", [conv(), dense()], ids=["conv", "dense"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_the_step_by_hand_bit_for_bit(name, config):
    options = OPTIONS[name]
    ours, hand = pair(config), pair(config)
    state, optimizers = state_of(*ours), (adam(hand[0]), adam(hand[1], 2e-3))
    for number in range(4):
        real = normal(6, *config.shape, key=number).tanh()
        figures = gan_step(state, real, rng_for("step", number), **options)
        expected = step_by_hand(hand, optimizers, real, rng_for("step", number), number, **options)
        assert {k: v.item() for k, v in figures.items()} == expected
        assert ("g_loss" in figures) == ((number + 1) % options.get("critic_steps", 1) == 0)
        state.step_count += 1
        for a, b in zip(ours, hand, strict=True):
            assert same(content(a), content(b)), number
    assert not same(content(ours[0]), content(pair(config)[0]))


class Watched(TrainState):
    """Keeps the names of what each update moved, and of what holds a gradient afterwards."""

    moved, left = (), ()

    def minimize(self, name, loss):
        before = {key: content(net) for key, net in self.nets.items()}
        super().minimize(name, loss)
        self.moved += ((name, [key for key, net in self.nets.items() if not same(before[key], content(net))]),)
        self.left += tuple(p for net in self.nets.values() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{}, {"gp": 10.0, "r1": 1.0}], ids=["plain", "penalties"])
@pytest.mark.parametrize("config", [conv(), dense()], ids=["conv", "dense"])
def test_each_update_moves_its_own_network_and_leaves_no_gradient(config, options):
    state = state_of(*pair(config), kind=Watched)
    for number in range(2):
        figures = gan_step(state, normal(5, *config.shape, key="real"), rng_for(number), **options)
    assert state.moved == 2 * (("discriminator", ["discriminator"]), ("generator", ["generator"]))
    assert not state.left
    assert list(figures) == ["d_loss", "d_real", "d_fake", "g_loss"]
    assert all(figure.numel() == 1 and figure.isfinite() for figure in figures.values())


def test_the_discriminators_loss_does_not_reach_the_generator():
    """Even an optimizer that holds both networks moves one of them only: the fakes are detached."""
    config = dense()
    state = state_of(*pair(config), kind=Watched)
    both = [parameter for net in state.nets.values() for parameter in net.parameters()]
    state.optimizers["discriminator"] = torch.optim.Adam(both)
    gan_step(state, normal(5, *config.shape, key="real"), rng_for(0), gp=10.0, r1=1.0)
    assert state.moved == (("discriminator", ["discriminator"]), ("generator", ["generator"]))


class WeightGradients(TorchDispatchMode):
    """Counts the gradients of convolutions' weights as they are computed: those of (G, D)."""

    def __init__(self):
        super().__init__()
        self.counts = [0, 0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            transposed, wanted = args[7], args[10][1]
            self.counts[0 if transposed else 1] += wanted
        return function(*args, **(kwargs or {}))


class Counted(TrainState):
    found = ()

    def minimize(self, name, loss):
        with WeightGradients() as mode:
            super().minimize(name, loss)
        self.found += ((name, *mode.counts),)


def test_no_update_computes_weight_gradients_of_the_other_network():
    """The generator's reaches through the discriminator's activations; the discriminator's never reaches back."""
    config = conv()
    state = state_of(*pair(config), kind=Counted)
    gan_step(state, normal(5, *config.shape, key="real"), rng_for(0))
    assert state.found == (("discriminator", 0, 2 * 3), ("generator", 3, 0))  # D saw two batches; each has three layers


@pytest.mark.parametrize("kind", KINDS)
def test_steps_bring_samples_to_the_data(kind):
    config = GANConfig(shape=(2,), z_dim=2, hidden=(32,), bounded=False)
    data = torch.tensor([1.5, -1.0]) + 0.3 * normal(512, 2, key="data")
    nets = dict(zip(("generator", "discriminator"), pair(config, key="learns"), strict=True))
    rates = {"generator": 0.01, "discriminator": 0.02}
    adams = {k: torch.optim.Adam(nets[k].parameters(), lr=lr, betas=(0.0, 0.9)) for k, lr in rates.items()}
    state = TrainState(nets, adams)

    def distance():
        return (sample(nets["generator"], 500, rng_for("judge")).mean(0) - data.mean(0)).norm()

    before = distance()
    for number in range(80):
        gan_step(state, data[64 * (number % 8) :][:64], rng_for("learn", number), kind=kind, r1=1.0)
    assert distance() < before / 3


def test_figures_reach_the_history():
    config = dense()
    state = state_of(*pair(config))

    def step(state, real, rng):
        return gan_step(state, real, rng, critic_steps=2, r1=1.0, r1_every=2)

    fit(step, state, normal(20, *config.shape, key="data"), TrainConfig(steps=5, batch_size=5, device="cpu"))
    assert set(state.history) == {"d_loss", "d_real", "d_fake", "g_loss"} and state.step_count == 5
    assert [math.isnan(value) for value in state.history["g_loss"]] == [True, False, True, False, True]
    for name in ("d_real", "d_fake"):
        assert all(0 < value < 1 for value in state.history[name])


def test_a_step_under_autocast_has_float32_logits_and_finite_figures():
    config, logits = conv(width=4), []
    state = state_of(*pair(config))
    state.nets["discriminator"].register_forward_hook(lambda _, args, output: logits.append(output.dtype))
    with torch.autocast(**BF16):
        figures = gan_step(state, normal(6, *config.shape, key="real"), rng_for(0), gp=10.0, r1=1.0)
    assert logits == 5 * [torch.float32]
    assert all(figure.dtype == torch.float32 and figure.isfinite() for figure in figures.values())


# ---- samples ----


def used(config=None):
    """A generator whose running statistics are not those of the start."""
    generator, _ = pair(config or conv(), key="used")
    with torch.no_grad():
        for i in range(3):
            generator(normal(8, generator.config.z_dim, key=i))
    return generator


@pytest.mark.parametrize("config", [conv(), dense()], ids=["conv", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_no_trace(config, training):
    generator, modes = used(config).train(training), []
    generator.layers.register_forward_hook(lambda module, args, output: modes.append(module.training))
    before, kept = torch.get_rng_state(), content(generator)
    for draw in (lambda rng: sample(generator, 6, rng), lambda rng: generate(generator, latents(generator, 6, rng))):
        images = draw(rng_for("samples"))
        assert images.shape == (6, *config.shape) and images.dtype == torch.float32 and not images.requires_grad
        assert torch.equal(images, sample(generator, 6, rng_for("samples")))
        assert not torch.equal(images, draw(rng_for("others")))
    assert not any(modes) and all(module.training is training for module in generator.modules())
    assert torch.equal(torch.get_rng_state(), before) and same(content(generator), kept)
    with torch.autocast(**BF16):
        assert sample(generator, 6, rng_for("samples")).dtype == torch.float32


@pytest.mark.parametrize("config", [conv(), dense()], ids=["conv", "dense"])
def test_an_example_does_not_depend_on_its_company(config):
    generator, sizes = used(config), []
    generator.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    z = latents(generator, 1203, rng_for("many"))
    examples = generate(generator, z)
    assert len(examples) == sum(sizes) == 1203 and max(sizes) <= 500  # so memory stays bounded
    torch.testing.assert_close(torch.cat([generate(generator, part) for part in z.split(401)]), examples)
    torch.testing.assert_close(generate(generator, z[1202:]), examples[1202:])


def test_latents_are_standard_normal():
    z = latents(used(), 20_000, rng_for("latents"))
    assert z.shape == (20_000, 4)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), rtol=0, atol=0.04)


@pytest.mark.parametrize("training", [True, False])
def test_recalibrated_statistics_are_the_means_over_batches(training):
    generator, before = used().train(training), torch.get_rng_state()
    norms = layers_of(generator, nn.BatchNorm2d)
    for i, layer in enumerate(norms):
        layer.momentum = 0.1 + 0.2 * i
    twin, seen = copy.deepcopy(generator).train(), {}
    for i, layer in enumerate(layers_of(twin, nn.BatchNorm2d)):
        layer.register_forward_pre_hook(lambda _, args, i=i: seen.setdefault(i, []).append(args[0].detach()))
    rng = rng_for("recalibrate")
    for _ in range(5):
        twin(torch.randn(12, 4, generator=rng))
    weights = [parameter.detach().clone() for parameter in generator.parameters()]
    recalibrate(generator, rng_for("recalibrate"), batches=5, size=12)
    for i, layer in enumerate(norms):
        means = torch.stack([x.mean((0, 2, 3)) for x in seen[i]]).mean(0)
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen[i]]).mean(0)
        torch.testing.assert_close(layer.running_mean, means, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.running_var, variances, rtol=1e-4, atol=1e-9)
        assert layer.momentum == 0.1 + 0.2 * i
    assert all(module.training is training for module in generator.modules())
    assert all(torch.equal(a, b) for a, b in zip(weights, generator.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_goes_wrong_leaves_mode_and_momenta_as_they_were():
    generator = used()

    def fail(*_):
        raise RuntimeError("interrupted")

    generator.layers[-1].register_forward_hook(fail)
    for training, call in (
        (True, lambda: sample(generator, 3, rng_for(0))),
        (False, lambda: recalibrate(generator, rng_for(0))),
    ):
        generator.train(training)
        with pytest.raises(RuntimeError, match="interrupted"):
            call()
        assert generator.training is training
        assert {layer.momentum for layer in layers_of(generator, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("config", [conv(generator_batch_norm=False), dense()], ids=["conv", "dense"])
def test_without_batch_norm_there_is_nothing_to_recalibrate(config):
    generator, rng = used(config), rng_for(0)
    kept = content(generator)
    recalibrate(generator, rng)
    assert same(content(generator), kept) and torch.equal(rng.get_state(), rng_for(0).get_state())


# ---- refusals ----


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: without the checks of shapes that the tests switch on."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def assert_one_clear_line(error, *parts):
    message = str(error.value)
    assert isinstance(error.value, CourseError) and "\n" not in message
    for part in parts:
        assert part in message, message


IMAGES = {
    "28 pixels": ((4, 1, 28, 28), "(n, 1, 16, 16)"),
    "colour": ((4, 3, 16, 16), "(n, 1, 16, 16)"),
    "flat": ((4, 256), "(n, 1, 16, 16)"),
    "no channel": ((3, 16, 16), "(n, 1, 16, 16)"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_of_another_shape_are_refused(unchecked, case):
    shape, expected = IMAGES[case]
    state = state_of(*pair(conv()))
    for call in (
        lambda: state.nets["discriminator"](torch.zeros(shape)),
        lambda: gan_step(state, torch.zeros(shape), rng_for(0)),
        lambda: r1_penalty(state.nets["discriminator"], torch.zeros(shape)),
    ):
        with pytest.raises(GANError) as error:
            call()
        assert_one_clear_line(error, str(shape), expected, "set the config's to theirs")


@pytest.mark.parametrize("shape", [(4, 5), (4,), (4, 4, 1, 1)])
@pytest.mark.parametrize("config", [conv(), dense(z_dim=4)], ids=["conv", "dense"])
def test_latents_of_another_shape_are_refused(unchecked, config, shape):
    generator, _ = pair(config)
    for call in (lambda: generator(torch.zeros(shape)), lambda: generate(generator, torch.zeros(shape))):
        with pytest.raises(GANError) as error:
            call()
        assert_one_clear_line(error, str(shape), "(n, 4)", "z_dim")
    assert generator.training


@pytest.mark.parametrize("which", [0, 1])
def test_batch_norm_refuses_a_batch_of_one_in_training_mode_only(which):
    net, x = pair(conv())[which], (torch.zeros(1, 4), torch.zeros(1, 1, 16, 16))[which]
    with pytest.raises(GANError) as error:
        net(x)
    assert_one_clear_line(error, "a batch of 1", "two examples", ".eval()")
    assert net(torch.cat([x, x])).isfinite().all() and net.eval()(x).isfinite().all()
    for config in (conv(batch_norm=False, generator_batch_norm=False), dense()):
        without = pair(config)[which]
        assert without(torch.zeros(1, *((config.z_dim,), config.shape)[which])).isfinite().all()


def test_a_loss_that_is_none_is_refused():
    config, state = dense(), state_of(*pair(dense()))
    for call in (
        lambda: discriminator_loss(torch.zeros(2), torch.zeros(2), kind="wgan"),
        lambda: generator_loss(torch.zeros(2), kind="wgan"),
        lambda: gan_step(state, torch.zeros(4, *config.shape), rng_for(0), kind="wgan"),
    ):
        with pytest.raises(GANError) as error:
            call()
        assert_one_clear_line(error, "'wgan'", "non_saturating, minimax, wasserstein, hinge")


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        (DCGANConfig, {"size": 20}, ("size is 20", "8, 16, 32, 64, 128 or 256")),
        (DCGANConfig, {"size": 4}, ("size is 4", "8, 16")),
        (DCGANConfig, {"size": "32"}, ("size is '32'", "8, 16")),
        (DCGANConfig, {"size": 32.0}, ("size is 32.0", "8, 16")),
        (DCGANConfig, {"width": 0}, ("DCGANConfig.width is 0:", "at least 1")),
        (DCGANConfig, {"width": 1.5}, ("DCGANConfig.width is 1.5:", "whole number")),
        (DCGANConfig, {"z_dim": "64"}, ("DCGANConfig.z_dim is '64':", "whole number")),
        (DCGANConfig, {"z_dim": True}, ("DCGANConfig.z_dim is True:", "whole number")),
        (DCGANConfig, {"channels": -1}, ("DCGANConfig.channels is -1:", "at least 1")),
        (DCGANConfig, {"init_std": -0.02}, ("init_std is -0.02:", "a number above 0")),
        (DCGANConfig, {"init_std": 0.0}, ("init_std is 0.0:", "a number above 0")),
        (DCGANConfig, {"init_std": math.nan}, ("init_std is nan:", "a number above 0")),
        (DCGANConfig, {"init_std": math.inf}, ("init_std is inf:", "a number above 0")),
        (DCGANConfig, {"init_std": "0.02"}, ("init_std is '0.02':", "a number above 0")),
        (DCGANConfig, {"leak": -0.2}, ("leak is -0.2:", "a number from 0 on")),
        (DCGANConfig, {"leak": math.nan}, ("leak is nan:", "a number from 0 on")),
        (DCGANConfig, {"leak": "0.2"}, ("leak is '0.2':", "a number from 0 on")),
        (GANConfig, {"shape": ()}, ("GANConfig.shape is ()", "at least 1")),
        (GANConfig, {"shape": 784}, ("GANConfig.shape is 784", "whole numbers")),
        (GANConfig, {"shape": (1, 28.0, 28)}, ("GANConfig.shape is (1, 28.0, 28)", "whole numbers")),
        (GANConfig, {"hidden": "256"}, ("GANConfig.hidden is '256'", "whole numbers")),
        (GANConfig, {"hidden": (256, 0)}, ("GANConfig.hidden is (256, 0)", "at least 1")),
        (GANConfig, {"hidden": (256, True)}, ("GANConfig.hidden is (256, True)", "whole numbers")),
        (GANConfig, {"hidden": []}, ("GANConfig.hidden is []", "at least 1")),
        (GANConfig, {"z_dim": 0}, ("GANConfig.z_dim is 0:", "at least 1")),
    ],
)
def test_settings_that_make_no_network_are_refused(unchecked, kind, options, parts):
    with pytest.raises(GANError) as error:
        kind(**options)
    assert_one_clear_line(error, *parts)


@pytest.mark.parametrize("options", [{"r1_every": 0}, {"critic_steps": 0}, {"critic_steps": -2}])
def test_steps_are_counted_from_one_on(options):
    ((name, value),) = options.items()
    with pytest.raises(GANError) as error:
        gan_step(state_of(*pair(dense())), torch.zeros(4, 1, 4, 4), rng_for(0), **options)
    assert_one_clear_line(error, f"{name} is {value}", "from 1 on")


def test_a_configuration_may_come_from_json():
    assert GANConfig(shape=[1, 28, 28], hidden=[256, 512]) == GANConfig()
    assert hash(GANConfig(hidden=[4])) == hash(GANConfig(hidden=(4,)))
