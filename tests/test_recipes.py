"""Recipes: what is trained can be kept, read back and sampled; PCA by the properties that define it."""

import pytest
import torch

from aigc_course import recipes
from aigc_course.datasets import load_mnist
from aigc_course.recipes import PCA
from aigc_course.runtime import CourseError, rng_for


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


def test_a_model_of_another_profile_is_neither_read_nor_overwritten(few_images, tmp_path):
    recipes.build("gmm", "quick", device="cpu").train(tmp_path)
    full = recipes.build("gmm", "full", device="cpu")
    for call in (full.train, full.load):
        with pytest.raises(CourseError, match="profile quick, not full"):
            call(tmp_path)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(CourseError, match="no recipe 'gpt9': choose from gmm"):
        recipes.build("gpt9")
