"""Side experiments: what is recorded can be made again, and a lesson reads it; here on few digits and for a moment."""

import json

import pytest
import torch

from aigc_course import experiments, recipes
from aigc_course.datasets import binarize, load_mnist
from aigc_course.experiments import AutoregressiveVAE, collapse_step
from aigc_course.runtime import CourseError, course_dir, rng_for
from aigc_course.state import TrainState
from aigc_course.vae import VAEConfig, vae_step

CPU = torch.device("cpu")


@pytest.fixture
def few_images(monkeypatch):
    images = load_mnist(train=False)[:600]
    for module in (experiments, recipes):
        monkeypatch.setattr(module, "load_mnist", lambda **_: images)
    return binarize(images.images, rng_for(0, "few"))


def rows_of(name, **options):
    return list(experiments.EXPERIMENTS[name](CPU, **options))


def test_a_higher_price_buys_less_information(few_images):
    cheap, dear = rows_of("vae_beta", betas=(0.1, 50.0), epochs=20)
    assert cheap["rate"] > dear["rate"] and cheap["distortion"] < dear["distortion"]
    assert cheap["rate"] + cheap["distortion"] == pytest.approx(-cheap["elbo"], rel=1e-5)


def test_no_pixel_sees_itself_or_a_later_one(few_images):
    model = AutoregressiveVAE(VAEConfig(z_dim=2, hidden=(8,)), rng=rng_for(0, "auto"))
    model.context.data.normal_(generator=rng_for(0, "context"))
    x, z = few_images[:1].repeat(2, 1, 1, 1), torch.zeros(2, 2)
    x[1, 0, 14, 14] = 1 - x[1, 0, 14, 14]
    # log p(x|z) as a sum over pixels, from two images that differ in one: the logits up to that pixel are equal.
    seen = torch.nn.functional.linear(x.flatten(1), model.context * model.before)
    changed = (seen[0] != seen[1]).nonzero().flatten()
    assert changed.min() == 14 * 28 + 15
    assert (model.log_prob(x, z)[0] - model.log_prob(x, z)[1]).abs() > 0


def test_the_collapse_step_without_remedy_is_the_vae_step(few_images):
    states = []
    for step in (vae_step, collapse_step):
        model = AutoregressiveVAE(VAEConfig(z_dim=4, hidden=(16,)), rng=rng_for(0, "twins"))
        state = TrainState({"vae": model}, {"vae": torch.optim.SGD(model.parameters(), lr=1e-3)})
        step(state, few_images[:50], rng_for(0, "noise"))
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*states, atol=1e-6)


def test_free_bits_leave_a_cheap_unit_alone(few_images):
    """With more free nats than any unit carries, only the reconstruction moves the parameters."""
    moved = []
    for options in ({"free_nats": 1e6}, {"beta": 0.0}):
        model = AutoregressiveVAE(VAEConfig(z_dim=4, hidden=(16,)), rng=rng_for(0, "twins"))
        state = TrainState({"vae": model}, {"vae": torch.optim.SGD(model.parameters(), lr=1e-3)})
        collapse_step(state, few_images[:50], rng_for(0, "noise"), **options)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*moved, atol=1e-6)


def test_the_three_remedies_are_recorded_epoch_by_epoch(few_images):
    rows = rows_of("vae_collapse", epochs=2, alone=1, z_dim=3)
    assert [row["remedy"] for row in rows] == ["none", "warm-up", "free bits"]
    for row in rows:
        assert row["epoch"] == [1, 2] and len(row["kl"]) == len(row["elbo"]) == len(row["active units"]) == 2


def test_the_table_judges_finished_runs_on_the_same_pixels(few_images, monkeypatch, tmp_path):
    monkeypatch.setenv("AIGC_RUN_DIR", str(tmp_path))
    for name in ("vae", "iwae"):
        settings = {**recipes.VAES[name, "full"], "config": VAEConfig(z_dim=2, hidden=(8,)), "epochs": 1}
        monkeypatch.setitem(recipes.VAES, (name, "full"), settings)
    rows = rows_of("vae_table", seeds=1, k=60)
    assert [(row["model"], row["images"]) for row in rows] == [("vae", 600), ("iwae", 600)]
    assert (tmp_path / "iwae-full-0" / "model").is_dir()
    for row in rows:
        assert row["-L1"] + 0.1 > row["-L50"] > 0  # such a model says next to nothing: its bounds lie close together
        assert row["-L50"] == pytest.approx(row["-L60"], abs=0.1)


def test_a_recording_is_kept_and_read_back(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "course_dir", lambda: tmp_path)
    monkeypatch.setitem(experiments.EXPERIMENTS, "vae_beta", lambda device: iter([{"beta": 1.0}, {"beta": 2.0}]))
    path = experiments.record("vae_beta", "cpu")
    assert path == str(tmp_path / "data" / "histories" / "vae_beta.json")
    capsys.readouterr()
    found = experiments.recorded("vae_beta")
    assert found["rows"] == [{"beta": 1.0}, {"beta": 2.0}] == experiments.recorded("vae_beta", live=True)["rows"]
    assert "aigc experiment vae_beta" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": []}', '{"rows"'])
def test_a_damaged_recording_says_how_to_mend_it(monkeypatch, tmp_path, content):
    monkeypatch.setattr(experiments, "course_dir", lambda: tmp_path)
    if content is not None:
        (tmp_path / "data" / "histories").mkdir(parents=True)
        (tmp_path / "data" / "histories" / "vae_beta.json").write_text(content, encoding="utf-8")
    with pytest.raises(CourseError, match="vae_beta.json cannot be read.*aigc experiment vae_beta"):
        experiments.recorded("vae_beta")


def test_a_name_that_is_none_is_refused():
    with pytest.raises(CourseError, match="no experiment 'gan_beta': choose from vae_table"):
        experiments.recorded("gan_beta")


def test_every_experiment_is_recorded_by_its_command():
    stored = sorted(path.stem for path in (course_dir() / "data" / "histories").glob("*.json"))
    assert stored == sorted(experiments.EXPERIMENTS)
    for name in stored:
        found = json.loads((course_dir() / "data" / "histories" / f"{name}.json").read_text(encoding="utf-8"))
        assert found["command"] == f"aigc experiment {name}" and found["seconds"] > 0 and found["rows"]


def test_the_recorded_table_says_what_the_lesson_says():
    """IWAE ahead of VAE by more than the spread over seeds; each bound above the looser one."""
    rows = json.loads((course_dir() / "data" / "histories" / "vae_table.json").read_text(encoding="utf-8"))["rows"]
    nll = {name: torch.tensor([r["-L5000"] for r in rows if r["model"] == name]) for name in ("vae", "iwae")}
    assert all(len(values) == 3 for values in nll.values())
    assert nll["vae"].min() - nll["iwae"].max() > nll["vae"].std() + nll["iwae"].std()
    assert all(r["-L1"] > r["-L50"] > r["-L5000"] and r["images"] == 10_000 for r in rows)
    gaps = {name: min(r["-L1"] - r["-L5000"] for r in rows if r["model"] == name) for name in nll}
    assert gaps["iwae"] > gaps["vae"]
    units = {name: [r["active units"] for r in rows if r["model"] == name] for name in nll}
    assert min(units["iwae"]) > max(units["vae"])
