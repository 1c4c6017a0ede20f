"""What the rows of images and mixtures time is the same mathematics on both sides, from the same data."""

import math

import pytest
import torch

from aigc_course.datasets import binarize, load_mnist
from aigc_course.runtime import rng_for
from aigc_course.vae import VAE, VAEConfig
from benchmarks import images, mixtures
from benchmarks.peers import dcgan, digits, gan, vae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mnist():
    return load_mnist(), digits.mnist(images.unpacked())


@pytest.fixture(autouse=True)
def rng_kept():
    """The peers draw from the global generator, as scripts do."""
    with torch.random.fork_rng(devices=[]):
        yield


def vae_nets():
    net, peer = VAE(VAEConfig(z_dim=20, hidden=(400,)), rng=rng_for(1, "vae")), vae.VAE()
    for bias in (net.encoder[0].bias, net.decoder[0].bias):
        torch.nn.init.normal_(bias.data, 0.0, 0.1)  # all zero at the start: a bias left behind would not show
    images.copy_vae(net, peer)
    return net, peer


def test_the_vaes_have_the_same_loss(mnist):
    x = binarize(mnist[0].images[:128])
    images.agree(images.vae_gaps(*vae_nets(), x), 1e-5)


@pytest.mark.parametrize("layer", ["to_mu", "to_logvar", "from_z", "to_pixels"])
def test_a_vae_with_another_layer_is_refused(mnist, layer):
    net, peer = vae_nets()
    getattr(peer, layer).weight.data.mul_(1.01)
    with pytest.raises(AssertionError, match="loss"):
        images.agree(images.vae_gaps(net, peer, binarize(mnist[0].images[:128])), 1e-5)


@pytest.mark.parametrize(
    ("dense", "script", "share", "layout"),
    [
        (True, gan, 0.5, torch.contiguous_format),
        (False, dcgan, 1.0, torch.contiguous_format),
        (False, dcgan, 1.0, torch.channels_last),
    ],
)
def test_a_step_of_the_gans_has_the_same_losses_and_gradients(mnist, dense, script, share, layout):
    nets, peers = images.gan_nets(dense)
    for net in nets.values():
        net.to(memory_format=layout)
    pad = (0,) * 4 if dense else (2,) * 4
    real = torch.nn.functional.pad(mnist[0].images[:8], pad, value=-1.0)
    images.agree(images.gan_gaps(nets, peers, script.train_step, real, share), 1e-5)
    peers["generator"].state_dict(keep_vars=True).popitem()[1].data.add_(0.01)
    with pytest.raises(AssertionError):
        images.agree(images.gan_gaps(nets, peers, script.train_step, real, share), 1e-5)


def test_the_digits_are_the_same(mnist):
    ours, theirs = mnist
    images.agree(images.image_gaps(ours, theirs, range(0, 60_000, 300)), 1e-6)
    with pytest.raises(AssertionError, match="pixels"):
        images.agree(images.image_gaps(ours, digits.mnist(images.unpacked(), normalize=False), range(9)), 1e-6)


def test_padded_and_binary_digits_are_the_same(mnist):
    root, rows = images.unpacked(), range(0, 60_000, 1000)
    images.agree(images.image_gaps(load_mnist(size=32), digits.mnist(root, pad=2), rows), 1e-6)
    dataset = digits.binary_mnist(root)
    binary = torch.stack([dataset[i][0] for i in rows])
    assert torch.equal(binary, binarize(mnist[0].images[torch.tensor(rows)]))


def test_an_epoch_of_ours_and_of_theirs_sees_every_digit_once(mnist):
    ours, theirs = mnist[0][:1000], torch.utils.data.Subset(mnist[1], range(1000))
    seen = [images.our_epoch(ours, 0), digits.read_epoch(digits.batches(theirs, 64))]
    assert [count for count, *_ in seen] == [1000, 1000]
    assert seen[0][1].shape == seen[1][1].shape == (1000 % 64, 1, 28, 28)
    assert seen[0][2].shape == seen[1][2].shape == (1000 % 64,)


def test_the_multiplications_of_a_layer_are_counted():
    x = torch.zeros(5, 3, 8, 8)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 4, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(4, 2, 2, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 10),
    )
    with torch.no_grad():
        assert images.products(layers, x) == [5 * 4 * 16 * 3 * 16, 5 * 4 * 16 * 2 * 4, 5 * 128 * 10]


def test_training_takes_as_many_steps_each_time(mnist):
    net, _ = vae_nets()
    state = images.TrainState({"vae": net}, {"vae": torch.optim.Adam(net.parameters())})
    sample = images.training(images.vae_step, state, binarize(mnist[0].images[:200]), 3, 64)
    first, second = sample(), sample()
    assert len(first["elbo"]) == len(second["elbo"]) == 3
    assert second["elbo"] != first["elbo"]


@pytest.mark.parametrize("row", images.PLAIN, ids=lambda row: row.key)
def test_the_two_sides_of_a_row_run_and_agree(row, mnist, monkeypatch):
    """On 256 digits and a few steps; each pair checks its own networks first."""
    few = digits.mnist(images.unpacked())
    monkeypatch.setattr(images, "load_mnist", lambda **options: load_mnist(**options)[:256])
    monkeypatch.setattr(images, "GAN_STEPS", 3)
    monkeypatch.setattr(images, "DCGAN_STEPS", 2)

    def mnist_of(root, normalize=True, pad=0, real=digits.mnist):
        dataset = real(root, normalize, pad)
        dataset.data, dataset.targets = few.data[:256].clone(), few.targets[:256]
        return dataset

    monkeypatch.setattr(digits, "mnist", mnist_of)
    pair = row.pair()
    for _ in range(2):
        pair.check(pair.ours(), pair.theirs())
    assert pair.flops is None or pair.flops > 1e8


@pytest.mark.parametrize("row", mixtures.ROWS, ids=lambda row: row.key)
def test_the_two_sides_of_a_mixture_run_and_agree(row):
    x = row.pair.args[0]()[:500]
    pair = mixtures.em_pair(lambda: x, **row.pair.keywords)
    pair.check(pair.ours(), pair.theirs())


@pytest.mark.parametrize(("covariance", "d", "reg_covar"), [("full", 2, 1e-6), ("full", 10, 1e-6), ("diag", 784, 1e-3)])
def test_the_mixtures_reach_the_same_likelihood(mnist, covariance, d, reg_covar):
    x = mnist[0].images[:2000].flatten(1).double().add(1).div(2)
    if d < 784:
        x = mixtures.PCA.fit(x, d).encode(x)
    options = {"covariance": covariance, "reg_covar": reg_covar}
    initial = mixtures.start(x, 5, **options)
    ours, theirs = mixtures.fit_ours(x, initial, 4, **options), mixtures.fit_theirs(x, initial, 4, **options)
    mixtures.same_likelihood(ours, theirs, x, 4)
    with pytest.raises(AssertionError, match="M steps"):
        mixtures.same_likelihood(mixtures.fit_ours(x, initial, 5, **options), theirs, x, 4)
    ours.log_likelihoods_[-1] *= 1 + 1e-9
    with pytest.raises(AssertionError, match="log-likelihood"):
        mixtures.same_likelihood(ours, theirs, x, 4)


def test_scikit_learn_takes_as_many_steps_as_ours(monkeypatch):
    """N M steps and N + 1 E steps, and no start of its own: as many as the course's class promises."""
    taken, model = [], mixtures.mixture.GaussianMixture
    for name in ("_e_step", "_m_step", "_estimate_log_prob"):
        real = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, name=name, real=real, **o: taken.append(name) or real(*a, **o))
    x = torch.randn(300, 2, generator=rng_for(3), dtype=torch.float64)
    options = {"covariance": "full", "reg_covar": 1e-6}
    initial = mixtures.start(x, 3, **options)
    mixtures.fit_theirs(x, initial, 4, **options)
    assert taken.count("_m_step") == 4
    assert taken.count("_e_step") == taken.count("_estimate_log_prob") == 5
    assert len(mixtures.fit_ours(x, initial, 4, **options).log_likelihoods_) == 5


def test_the_rows_are_those_of_the_table():
    rows = {row.key: row for row in [*images.ROWS, *mixtures.ROWS] if not row.helper}
    required = {
        "vae": 2.0,
        "gan": 1.6,
        "dcgan": 1.7,
        "dcgan-bf16": 3.3,
        "gmm-2": 4.0,
        "gmm-50": 1.8,
        "gmm-784": 1.0,
        "mnist": 40.0,
        "mnist-first": 1.0,
    }
    assert {key: row.required for key, row in rows.items()} == required
    assert all(row.aim >= row.required and math.isfinite(row.aim) for row in rows.values())
