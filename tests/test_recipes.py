"""Recipes: what is trained can be kept, read back and sampled; PCA by the properties that define it."""

import pytest
import torch

from aigc_course import checkpoints, recipes
from aigc_course.checkpoints import CheckpointError
from aigc_course.datasets import binarize, load_mnist
from aigc_course.recipes import PCA, held_out_figures
from aigc_course.runtime import CourseError, rng_for
from aigc_course.vae import VAE, VAEConfig, active_units, elbo

VAES = ("vae", "vae2d", "iwae")


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
    monkeypatch.setattr(recipes, "load_mnist", lambda **_: images)
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

    monkeypatch.setattr(recipes, "iwae_step" if name == "iwae" else "vae_step", record)
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


@pytest.mark.parametrize("name", ["gmm", "vae2d"])
def test_a_model_of_another_profile_is_neither_read_nor_overwritten(few_images, tmp_path, name):
    recipes.build(name, "quick", device="cpu").train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    full = recipes.build(name, "full", device="cpu")
    for call in (full.train, full.load):
        with pytest.raises(CourseError, match="profile quick, not full: add --profile quick") as caught:
            call(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture
def shipped(few_images, tmp_path, monkeypatch):
    """A course's folder with two trained models in it."""
    monkeypatch.setattr(recipes, "course_dir", lambda: tmp_path)
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


def test_the_models_that_come_with_the_course_are_what_their_cards_say():
    assert recipes.pretrained() == ["iwae", "vae", "vae2d"]
    for name in recipes.pretrained():
        card = checkpoints.load(recipes.course_dir() / "data" / "checkpoints" / name).card
        assert card["recipe"] == name and card["profile"] == "full" and "torch" in card["machine"]
        assert card["command"] == f"aigc train {name} --profile full --seed {card['seed']}"
        found = held_out_figures(recipes.load_pretrained(name, device="cpu"), card["seed"])
        assert found.keys() == card["figures"].keys()
        for figure, value in found.items():
            assert value == pytest.approx(card["figures"][figure], abs=0.05), (name, figure)
    assert all(row.ok for row in recipes.check_pretrained())
