"""Recipes: what is trained can be kept, read back and sampled; PCA by the properties that define it."""

import importlib
import json
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import nn

from aigc_course import checkpoints, recipes
from aigc_course.checkpoints import CheckpointError
from aigc_course.classifier import ClassifierConfig
from aigc_course.datasets import binarize, load_mnist
from aigc_course.gan import DCGANConfig, GANConfig, gan_step, sample
from aigc_course.metrics import frechet_distance
from aigc_course.recipes import PCA, digit_figures, gan_plan, held_out_figures, mnist_features
from aigc_course.runtime import CourseError, course_dir, rng_for
from aigc_course.training import fit
from aigc_course.vae import VAE, VAEConfig, active_units, elbo

VAES = ("vae", "vae2d", "iwae")
TINY_GANS = {"gan": GANConfig(z_dim=4, hidden=(8,)), "dcgan": DCGANConfig(width=4, z_dim=4)}
ADVERSARIAL = importlib.import_module("aigc_course.recipes.adversarial")  # the package has a function of this name
FRECHET = "Frechet distance to the test digits, on the course's features"


@pytest.fixture(scope="module")
def rows():
    mixing = torch.randn(6, 6, generator=rng_for(0, "mixing"), dtype=torch.float64)
    return torch.randn(500, 6, generator=rng_for(0, "rows"), dtype=torch.float64) @ mixing + 3


def test_pca_finds_the_orthonormal_directions_of_most_variance(rows):
    pca = PCA.fit(rows, 2)
    scores = pca.encode(rows)
    assert torch.allclose(pca.basis.T @ pca.basis, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(scores.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(scores.T.cov(correction=0), torch.diag(pca.variances[:2]), atol=1e-10)
    assert torch.allclose(pca.variances.sum(), rows.var(0, correction=0).sum())
    # What is lost is the variance along the directions left out, and no random pair of directions loses less.
    lost = (pca.decode(scores) - rows).square().sum(1).mean()
    assert torch.allclose(lost, pca.variances[2:].sum())
    for i in range(20):
        other, _ = torch.linalg.qr(torch.randn(6, 2, generator=rng_for(i, "other"), dtype=torch.float64))
        centred = rows - rows.mean(0)
        assert (centred - centred @ other @ other.T).square().sum(1).mean() >= lost


def test_with_all_directions_nothing_is_lost(rows):
    pca = PCA.fit(rows, 6)
    assert torch.allclose(pca.decode(pca.encode(rows)), rows)
    with pytest.raises(CourseError, match="lower d"):
        PCA.fit(rows, 7)


@pytest.fixture
def few_images(monkeypatch):
    images = load_mnist(train=False)[:1500]
    for module in (recipes.mixture, recipes.variational):
        monkeypatch.setattr(module, "load_mnist", lambda **_: images)
    monkeypatch.setitem(recipes.GMM, "quick", {"n_components": 3, "max_iter": 3})
    for name in VAES:
        monkeypatch.setitem(recipes.VAES, (name, "quick"), recipes.VAES[name, "quick"] | {"epochs": 1})
    return images


def test_a_trained_mixture_is_kept_read_back_and_sampled(few_images, tmp_path):
    recipe = recipes.build("gmm", "quick", device="cpu")
    logged = []
    model = recipe.train(tmp_path, on_log=lambda step, figures: logged.append((step, figures)))
    again = recipe.load(tmp_path)
    samples, others = (recipe.sample(m, 9, rng_for(1, "samples")) for m in (model, again))
    assert torch.equal(samples, others)
    assert samples.shape == (9, 1, 28, 28) and samples.min() >= -1 and samples.max() <= 1
    assert logged[0][0] == 3 and logged[0][1]["log_likelihood"] == model.mixture.log_likelihoods_[-1]
    scores = model.scores(few_images.images)
    assert torch.equal(model.mixture.log_prob(scores), again.mixture.log_prob(scores))


@pytest.mark.parametrize("name", VAES)
def test_a_trained_vae_is_kept_read_back_and_sampled(few_images, tmp_path, capsys, name):
    recipe, logged = recipes.build(name, "quick", seed=3, device="cpu"), []
    model = recipe.train(tmp_path, on_log=lambda step, figures: logged.append((step, figures)))
    again = recipe.load(tmp_path)
    for name_of, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name_of], value), name_of
    assert again.config == model.config and again.config.z_dim == (2 if name == "vae2d" else 50)
    assert not model.training and not again.training
    samples, others = (recipe.sample(m, 9, rng_for(1, "samples")) for m in (model, again))
    assert torch.equal(samples, others) and not torch.equal(samples, recipe.sample(model, 9, rng_for(2, "samples")))
    assert samples.shape == (9, 1, 28, 28) and samples.min() >= -1 and samples.max() <= 1
    assert (samples.abs() < 0.99).any()  # the mean of each pixel, not a draw of it
    average = recipe.sample(model, 500, rng_for(3, "samples")).mean(0)
    assert (average - few_images.images.mean(0)).abs().mean() < 0.03
    assert [step for step, _ in logged] == [15]
    assert set(logged[0][1]) == ({"bound"} if name == "iwae" else {"elbo", "reconstruction", "kl"})
    assert torch.equal(recipe.train(tmp_path).state_dict()["decoder.0.weight"], model.decoder[0].weight)
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", VAES)
def test_the_card_of_a_vae_says_how_good_it_is(few_images, tmp_path, name):
    recipe = recipes.build(name, "quick", seed=3, device="cpu")
    model = recipe.train(tmp_path)
    card = checkpoints.load(tmp_path / "model").card
    assert card["recipe"] == name and card["profile"] == "quick" and card["seed"] == 3
    assert card["command"] == f"aigc train {name} --profile quick --seed 3"
    assert VAEConfig(z_dim=card["config"]["z_dim"], hidden=tuple(card["config"]["hidden"])) == model.config
    figures = card["figures"]
    assert figures == held_out_figures(model, 3)
    bound, reconstruction, kl = (figures[f"{part}, nats per image"] for part in ("ELBO", "reconstruction", "KL"))
    assert bound == pytest.approx(reconstruction - kl, abs=1e-3)
    # The same by another draw of the pixels and of the latents, and better than where the training started.
    x = binarize(few_images.images, rng_for(4))
    assert bound == pytest.approx(elbo(model, x, rng_for(5)).value.mean().item(), abs=1.5)
    start = VAE(model.config, pixel_means=x.mean(0), rng=rng_for(6))
    assert bound > elbo(start, x, rng_for(5)).value.mean() + 3
    assert figures["active units"] == active_units(model, x).sum()
    assert figures["ELBO, nats per image"] != held_out_figures(model, 4)["ELBO, nats per image"]


def test_the_figures_of_a_vae_that_ignores_its_latents(few_images):
    """Then the reconstruction is the log-probability under fixed pixels, and only the draw of x makes it vary."""
    grey = (few_images.images.mean(0) + 1) / 2
    vae = VAE(VAEConfig(z_dim=2, hidden=(4,)), pixel_means=grey, rng=rng_for(0))
    for layers in (vae.encoder, vae.decoder):
        torch.nn.init.zeros_(layers[-1].weight)
    p = grey.clamp(1e-3, 1 - 1e-3)
    expected = (grey * p.log() + (1 - grey) * (1 - p).log()).sum().item()
    first, second = (held_out_figures(vae, seed) for seed in (0, 1))
    assert first["ELBO, nats per image"] != second["ELBO, nats per image"]
    for figures in (first, second):
        assert figures["reconstruction, nats per image"] == pytest.approx(expected, abs=0.5)
        assert figures["KL, nats per image"] == figures["active units"] == 0


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_seed_fixes_a_vae(few_images, monkeypatch, epochs):
    monkeypatch.setitem(recipes.VAES, ("vae2d", "quick"), recipes.VAES["vae2d", "quick"] | {"epochs": epochs})
    weights = [recipes.build("vae2d", "quick", seed=s, device="cpu").train().decoder[0].weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", VAES)
def test_a_vae_sees_fresh_pixels_and_its_learning_rate_falls_to_zero(few_images, monkeypatch, name):
    batches, rates, options = [], [], []

    def record(state, x, rng, **given):
        batches.append(x)
        rates.append(state.optimizers["vae"].param_groups[0]["lr"])
        options.append(given)
        return {}

    monkeypatch.setattr(recipes.variational, "iwae_step" if name == "iwae" else "vae_step", record)
    monkeypatch.setitem(recipes.VAES, (name, "quick"), recipes.VAES[name, "quick"] | {"epochs": 2})
    recipes.build(name, "quick", device="cpu").train()
    assert options == 30 * [{"k": 50} if name == "iwae" else {}]
    assert rates == pytest.approx(15 * [3e-3] + [3e-3 * (15 - i) / 15 for i in range(15)])
    first, second = torch.cat(batches[:15]), torch.cat(batches[15:])
    assert first.shape == second.shape == few_images.images.shape
    assert ((first == 0) | (first == 1)).all()
    ones = (few_images.images + 1).sum() / 2
    assert first.sum() != second.sum()
    for epoch in (first, second):
        assert epoch.sum() == pytest.approx(ones.item(), rel=0.01)


@pytest.fixture(scope="module")
def digits():
    """Three hundred digits to learn from (True) and other ones (False), of either size."""
    everything = {size: load_mnist(train=False, size=size) for size in (28, 32)}
    return {(train, size): everything[size][300 - 300 * train :][:300] for train in (True, False) for size in (28, 32)}


@pytest.fixture
def few_digits(monkeypatch, digits):
    """Tiny networks that see few digits in three steps, judged by the first of their samples: a list of these."""
    judged = []

    def judge(images):
        judged.append(images)
        return mnist_features(images[:200])

    for module in (ADVERSARIAL, recipes.judge):
        monkeypatch.setattr(module, "load_mnist", lambda train=True, size=28, **_: digits[train, size])
    monkeypatch.setattr(ADVERSARIAL, "mnist_features", judge)
    for name, config in TINY_GANS.items():
        for profile in ("quick", "full"):
            tiny = replace(recipes.GANS[name, profile], config=config, steps=3, batch_size=8)
            monkeypatch.setitem(recipes.GANS, (name, profile), tiny)
    monkeypatch.setitem(recipes.CLASSIFIERS, "quick", {"epochs": 1})
    return judged


def assert_same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("name", TINY_GANS)
def test_a_trained_gan_is_kept_read_back_and_sampled(few_digits, tmp_path, capsys, name):
    recipe, logged = recipes.build(name, "quick", seed=3, device="cpu"), []
    model = recipe.train(tmp_path, on_log=lambda step, figures: logged.append((step, figures)))
    again = recipe.load(tmp_path)
    assert_same_weights(model, again)
    assert again.config == model.config == TINY_GANS[name] and not model.training and not again.training
    samples, others = (recipe.sample(m, 9, rng_for(1, "samples")) for m in (model, again))
    assert torch.equal(samples, others) and not torch.equal(samples, recipe.sample(model, 9, rng_for(2, "samples")))
    assert samples.shape == (9, *model.config.shape) and samples.min() >= -1 and samples.max() <= 1
    assert [(step, set(figures)) for step, figures in logged] == [(3, {"d_loss", "d_real", "d_fake", "g_loss"})]
    assert_same_weights(recipe.train(tmp_path), model)
    assert "finished" in capsys.readouterr().out
    assert_same_weights(recipe.train(), model)
    other = recipes.build(name, "quick", seed=4, device="cpu").train()
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


@pytest.mark.parametrize("name", TINY_GANS)
def test_the_card_of_a_gan_says_how_its_samples_are_judged(few_digits, digits, tmp_path, name):
    model = recipes.build(name, "quick", seed=3, device="cpu").train(tmp_path)
    card = checkpoints.load(tmp_path / "model").card
    assert card["recipe"] == name and card["profile"] == "quick" and card["seed"] == 3
    assert card["command"] == f"aigc train {name} --profile quick --seed 3"
    assert type(model.config)(**card["config"]) == model.config
    (images,) = few_digits
    assert torch.equal(images, sample(model, 10_000, rng_for(3, "judge")))
    found = digit_figures(mnist_features(images[:200]), mnist_features(digits[False, 32].images))
    assert card["figures"] == {
        FRECHET: pytest.approx(found.frechet),
        "precision": found.precision,
        "recall": found.recall,
        "share that the classifier is over 0.9 sure of": pytest.approx(found.sure),
        "smallest share of a class": pytest.approx(found.classes.min().item()),
        "largest share of a class": pytest.approx(found.classes.max().item()),
    }


def test_an_interrupted_gan_goes_on_and_ends_as_one_that_was_not(few_digits, tmp_path, monkeypatch, capsys):
    recipe = recipes.build("dcgan", "quick", device="cpu")

    def interrupted(step, state, data, config, **options):
        return fit(step, state, data, replace(config, steps=2), **options)

    with monkeypatch.context() as patch:
        patch.setattr(ADVERSARIAL, "fit", interrupted)
        half = recipe.train(tmp_path / "run")
    resumed = recipe.train(tmp_path / "run")
    assert "going on from step 2 of 3" in capsys.readouterr().out
    assert not torch.equal(next(half.parameters()), next(resumed.parameters()))
    assert_same_weights(resumed, recipe.train(tmp_path / "whole"))
    assert_same_weights(resumed, recipe.load(tmp_path / "run"))


def test_the_seed_of_a_plan_draws_the_weights_of_both_networks():
    images, config = torch.zeros(8, 4, 1, 1), GANConfig(shape=(4, 1, 1), z_dim=4, hidden=(4,))
    plans = [gan_plan("gan", "quick", images=images, config=config, device="cpu", seed=seed) for seed in (0, 0, 1)]
    first = {k: [plan.state.nets[k].layers for plan in plans] for k in ("generator", "discriminator")}
    for (a, b, c), place in ((first["generator"], 0), (first["discriminator"], 1)):
        assert torch.equal(a[place].weight, b[place].weight) and not torch.equal(a[place].weight, c[place].weight)
    assert not torch.equal(first["generator"][0][0].weight, first["discriminator"][0][1].weight)


@pytest.mark.parametrize("name", ["vae", "cdcgan"])
def test_a_plan_of_what_is_no_gan_is_refused(name):
    with pytest.raises(CourseError, match=f"no GAN recipe '{name}': choose 'gan' or 'dcgan'$"):
        gan_plan(name, "quick")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_gan_computes_in_the_precision_of_its_settings(few_digits, precision, dtype):
    plan, seen = gan_plan("dcgan", "quick", device="cpu", precision=precision, steps=1), []
    for net in plan.state.nets.values():
        net.layers[-2].register_forward_hook(lambda _, args, output: seen.append(args[0].dtype))
    assert plan.config.precision == precision
    fit(plan.step, plan.state, plan.images, plan.config)
    assert seen[0] == seen[1] == dtype
    assert {parameter.dtype for net in plan.state.nets.values() for parameter in net.parameters()} == {torch.float32}
    for name, profile in recipes.GANS:
        assert gan_plan(name, profile, device="cpu").config.precision == recipes.GANS[name, profile].precision


def test_a_dcgan_takes_size_and_channels_from_images_of_ones_own(few_digits):
    images = torch.randn(20, 3, 16, 16, generator=rng_for("colours")).tanh()
    plan = gan_plan("dcgan", "quick", images=images, seed=5, device="cpu", batch_size=4, steps=2)
    config = replace(TINY_GANS["dcgan"], channels=3, size=16)
    assert plan.images is images and (plan.config.seed, plan.config.steps, plan.config.batch_size) == (5, 2, 4)
    assert [net.config for net in plan.state.nets.values()] == [config, config]
    fit(plan.step, plan.state, plan.images, plan.config)
    assert sample(plan.generator(), 2, rng_for(0)).shape == (2, 3, 16, 16)
    points = torch.randn(20, 2, generator=rng_for("points"))
    flat = gan_plan("gan", "quick", images=points[:, :, None, None], device="cpu", config=GANConfig(shape=(2, 1, 1)))
    fit(flat.step, flat.state, flat.images, flat.config)
    assert sample(flat.generator(), 5, rng_for(0)).shape == (5, 2, 1, 1)
    for name, size in (("gan", 28), ("dcgan", 32)):
        assert gan_plan(name, "quick", device="cpu").images.shape == (300, 1, size, size)


@pytest.mark.parametrize(
    ("flat", "shares"),
    [
        (0.5, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (0.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (1.0, 10 * [1]),
    ],
)
def test_both_learning_rates_are_flat_then_fall_to_zero(few_digits, flat, shares):
    rates, batches, options = [], [], []

    def record(state, real, rng, **given):
        rates.append({name: adam.param_groups[0]["lr"] for name, adam in state.optimizers.items()})
        batches.append(real)
        options.append(given)
        return {}

    changes = {"lr": 1e-3, "lr_ratio": 3.0, "flat": flat, "beta1": 0.3, "r1": 2.5, "steps": 10}
    plan = gan_plan("dcgan", "quick", device="cpu", update=record, **changes)
    fit(plan.step, plan.state, plan.images, plan.config)
    for name, peak in (("generator", 1e-3), ("discriminator", 3e-3)):
        assert [rate[name] for rate in rates] == pytest.approx([peak * share for share in shares])
        (group,) = plan.state.optimizers[name].param_groups
        assert group["betas"][0] == 0.3
        assert {id(p) for p in group["params"]} == {id(p) for p in plan.state.nets[name].parameters()}
    assert options == 10 * [{"r1": 2.5, "r1_every": 8}]
    assert {batch.shape for batch in batches} == {(8, 1, 32, 32)}


@pytest.mark.parametrize("decay", [0.8, 0.0])
def test_the_generator_of_a_plan_is_the_average_with_statistics_of_its_own(few_digits, decay):
    weights = []

    def update(state, real, rng, **options):
        figures = gan_step(state, real, rng, **options)
        weights.append([parameter.detach().clone() for parameter in state.nets["generator"].parameters()])
        return figures

    plan = gan_plan("dcgan", "quick", device="cpu", update=update, ema=decay, steps=5)
    fit(plan.step, plan.state, plan.images, plan.config)
    expected = weights[0]
    for now in weights[1:]:
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, now, strict=True)]
    kept, before = {k: v.clone() for k, v in plan.state.weights().items()}, torch.get_rng_state()
    generator, again = plan.generator(), plan.generator()
    assert_same_weights(generator, again)
    for found, value in zip(generator.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), value, rtol=1e-4, atol=1e-7)
    assert not generator.training and all(net.training for net in plan.state.nets.values())
    assert all(torch.equal(value, kept[name]) for name, value in plan.state.weights().items())
    assert torch.equal(torch.get_rng_state(), before)
    # The first layer's outputs are weighted sums of latents: a channel's variance is the mean over its 16 pixels of the
    # sum of squared weights, and its mean is 0.
    first, norm = (next(m for m in generator.layers if isinstance(m, k)) for k in (nn.ConvTranspose2d, nn.BatchNorm2d))
    variance = first.weight.detach().square().sum((0, 2, 3)) / 16
    torch.testing.assert_close(norm.running_var, variance, rtol=0.1, atol=0)
    assert (norm.running_mean.abs() < 0.1 * variance.sqrt()).all()


def test_a_trained_classifier_is_kept_read_back_and_draws_nothing(few_digits, digits, tmp_path):
    recipe, logged = recipes.build("classifier", "quick", seed=3, device="cpu"), []
    model = recipe.train(tmp_path, on_log=lambda step, figures: logged.append((step, figures)))
    again = recipe.load(tmp_path)
    assert_same_weights(model, again)
    assert not model.training and not again.training
    assert [(step, set(figures)) for step, figures in logged] == [(2, {"loss", "accuracy"})]
    card, test = checkpoints.load(tmp_path / "model").card, digits[False, 32]
    assert card["recipe"] == "classifier" and ClassifierConfig(**card["config"]) == model.config
    right = (again(test.images).argmax(1) == test.labels).float().mean().item()
    assert card["figures"] == {"accuracy on the test digits": pytest.approx(right)}
    with pytest.raises(CourseError, match="tells digits apart, it draws none: sample another recipe, such as dcgan"):
        recipe.sample(model, 3, rng_for(0))


def test_the_learning_rate_of_the_classifier_falls_in_the_second_half(few_digits, monkeypatch):
    rates = []

    def record(state, batch, rng):
        rates.append(state.optimizers["classifier"].param_groups[0]["lr"])
        assert batch.images.shape == (128, 1, 32, 32) and batch.labels.shape == (128,)
        return {}

    monkeypatch.setattr(recipes.judge, "classifier_step", record)
    monkeypatch.setitem(recipes.CLASSIFIERS, "quick", {"epochs": 5})
    recipes.build("classifier", "quick", device="cpu").train()
    assert rates == pytest.approx([2e-3 * share for share in (1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)])


def test_features_of_digits_do_not_depend_on_the_padding_or_the_company(digits):
    features = mnist_features(digits[True, 28][:20].images)
    assert features.shape == (20, 64) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, mnist_features(digits[True, 32][:20].images))
    torch.testing.assert_close(mnist_features(digits[True, 28][7:9].images), features[7:9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 30, 30), (2, 1, 28, 32), (2, 3, 32, 32), (2, 784)])
def test_features_of_other_images_are_refused(monkeypatch, shape):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(CourseError) as error:
        mnist_features(torch.zeros(shape))
    message = str(error.value)
    assert str(shape) in message and "(n, 1, 28, 28) or (n, 1, 32, 32)" in message and "\n" not in message


def test_the_figures_tell_digits_from_noise_and_from_half_of_the_digits(few_digits, digits):
    known, new = digits[True, 28][:150], digits[True, 28][150:]
    real = mnist_features(known.images)
    noise = 2 * torch.rand(150, 1, 28, 28, generator=rng_for("noise")) - 1
    features, half = mnist_features(new.images), mnist_features(new[new.labels < 5].images)
    found, bad, low = (digit_figures(rows, real) for rows in (features, mnist_features(noise), half))
    assert found.frechet == pytest.approx(frechet_distance(real, features))
    assert found.frechet < low.frechet / 3 < bad.frechet / 9
    assert found.precision > 0.7 and found.recall > 0.7 and bad.precision < 0.05 > bad.recall
    assert low.recall < found.recall - 0.2 and low.precision > 0.7
    assert found.sure > 0.95
    shares = new.labels.bincount(minlength=10) / 150
    torch.testing.assert_close(found.classes, shares, rtol=0, atol=0.021)
    assert low.classes[5:].sum() < 0.05
    # Without features of real digits, the test digits are taken.
    everything = digit_figures(features, mnist_features(digits[False, 32].images))
    assert digit_figures(features).frechet == everything.frechet != found.frechet
    # How sure the classifier is of an image: the softmax of the logits, above 0.9.
    judge = recipes.load_pretrained("classifier", device="cpu")
    blurred = nn.functional.avg_pool2d(digits[True, 32].images, 5, stride=1, padding=2)
    sure = judge(blurred).softmax(1).max(1).values > 0.9
    assert 0.02 < sure.float().mean() < 0.98
    assert digit_figures(mnist_features(blurred), real).sure == pytest.approx(sure.float().mean().item())


@pytest.mark.parametrize("name", ["gmm", "vae2d", "gan", "classifier"])
def test_a_model_of_another_profile_is_neither_read_nor_overwritten(few_images, few_digits, tmp_path, name):
    recipes.build(name, "quick", device="cpu").train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*")}
    full = recipes.build(name, "full", device="cpu")
    for call in (full.train, full.load):
        with pytest.raises(CourseError, match="profile quick, not full: add --profile quick") as caught:
            call(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*")} == before


@pytest.fixture
def shipped(few_images, tmp_path, monkeypatch):
    """A course's folder with two trained models in it."""
    monkeypatch.setattr(recipes.recipe, "course_dir", lambda: tmp_path)
    models = {}
    for name in ("gmm", "vae2d"):
        models[name] = recipes.build(name, "quick", seed=2, device="cpu").train(tmp_path / name)
        assert recipes.ship(name, tmp_path / name) == tmp_path / "data" / "checkpoints" / name
    return models


def test_shipped_models_are_loaded(shipped, tmp_path):
    assert recipes.pretrained() == ["gmm", "vae2d"]
    for name, model in shipped.items():
        found = recipes.load_pretrained(name, device="cpu")
        assert type(found) is type(model)
        sample = recipes.build(name, "quick", device="cpu").sample
        assert torch.equal(sample(found, 4, rng_for(7)), sample(model, 4, rng_for(7)))
        kept, here = (checkpoints.load(tmp_path / folder) for folder in (f"{name}/model", f"data/checkpoints/{name}"))
        assert here.card == kept.card and here.training is None
    assert not found.training
    assert [(row.path, row.ok) for row in recipes.check_pretrained()] == [
        ("checkpoints/gmm", True),
        ("checkpoints/vae2d", True),
    ]


def test_models_that_are_not_shipped_or_damaged_are_named(shipped, tmp_path):
    for name in ("gpt9", "iwae"):
        with pytest.raises(CourseError, match=f"no trained model '{name}' .*: choose from gmm, vae2d$"):
            recipes.load_pretrained(name)
    with pytest.raises(CourseError, match="gmm holds a model of the recipe gmm, not vae"):
        recipes.ship("vae", tmp_path / "gmm")
    (weights,) = (tmp_path / "data" / "checkpoints" / "vae2d").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="vae2d"):
        recipes.load_pretrained("vae2d")
    sound, damaged = recipes.check_pretrained()
    assert sound.ok and not damaged.ok and weights.name in damaged.message


def test_a_name_that_is_none_is_refused():
    with pytest.raises(CourseError, match="no recipe 'gpt9': choose from gmm"):
        recipes.build("gpt9")


def sound_card(name):
    card = recipes.card_of(name)
    assert card["recipe"] == name and card["profile"] == "full" and "torch" in card["machine"]
    assert card["command"] == f"aigc train {name} --profile full --seed {card['seed']}"
    return card


def test_the_models_that_come_with_the_course_are_whole():
    assert recipes.pretrained() == ["classifier", "dcgan", "iwae", "shakespeare", "tang", "vae", "vae2d"]
    assert all(row.ok for row in recipes.check_pretrained())


@pytest.mark.parametrize("name", VAES)
def test_a_vae_that_comes_with_the_course_is_what_its_card_says(name):
    card = sound_card(name)
    found = held_out_figures(recipes.load_pretrained(name, device="cpu"), card["seed"])
    assert found.keys() == card["figures"].keys()
    for figure, value in found.items():
        assert value == pytest.approx(card["figures"][figure], abs=0.05), figure


def test_the_classifier_that_comes_with_the_course_knows_digits():
    assert sound_card("classifier")["figures"]["accuracy on the test digits"] >= 0.992
    test = load_mnist(train=False, size=32)[:2000]
    with torch.no_grad():
        logits = recipes.load_pretrained("classifier", device="cpu")(test.images)
    assert (logits.argmax(1) == test.labels).float().mean() >= 0.985


def test_the_dcgan_that_comes_with_the_course_draws_digits():
    """Its distance to the test digits is that of other real digits, times a factor; here again from fewer samples."""
    histories = course_dir() / "data" / "histories"
    rows = json.loads((histories / "digit_scale.json").read_text(encoding="utf-8"))["rows"]
    scale = [row["frechet"] for row in rows if row["what"] == "training digits"]
    figures = sound_card("dcgan")["figures"]
    assert len(scale) == 6 and figures[FRECHET] <= 17 * sum(scale) / 6
    images = sample(recipes.load_pretrained("dcgan", device="cpu"), 2000, rng_for(0, "judge"))
    found = digit_figures(mnist_features(images), mnist_features(load_mnist(train=False, size=32)[:2000].images))
    assert found.frechet < 5 * figures[FRECHET]  # fewer images score a larger distance
    assert found.precision == pytest.approx(figures["precision"], abs=0.1)
    assert found.recall == pytest.approx(figures["recall"], abs=0.1)
    assert found.sure == pytest.approx(figures["share that the classifier is over 0.9 sure of"], abs=0.03)
    assert found.classes.min() > 0.06 and found.classes.max() < 0.14
