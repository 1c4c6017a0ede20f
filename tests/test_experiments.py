"""Side experiments: what is recorded can be made again, and a lesson reads it; here on few digits and for a moment."""

import copy
import importlib
import json
from dataclasses import replace

import pytest
import torch

from aigc_course import experiments, gan, metrics, recipes
from aigc_course.datasets import binarize, load_mnist
from aigc_course.experiments import AutoregressiveVAE, collapse_step, unpack_images
from aigc_course.experiments.adversarial import VARIANTS, attached_step, mixed_step, pack_images
from aigc_course.runtime import CourseError, course_dir, rng_for
from aigc_course.state import TrainState
from aigc_course.vae import VAEConfig, vae_step

CPU = torch.device("cpu")


@pytest.fixture
def few_images(monkeypatch):
    images = load_mnist(train=False)[:600]
    for module in (experiments.variational, recipes.variational):
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


# ---- GANs ----

FIGURES = {"frechet", "sure", "precision", "recall", "classes"}
CURVES = {"d_loss", "g_loss", "d_real", "d_fake"}


@pytest.fixture
def few_digits(monkeypatch):
    """Tiny networks that see few digits, and 150 samples instead of 10,000: what was asked for is in the list."""
    digits, asked = {train: load_mnist(train=False, size=32)[:500] for train in (True, False)}, []
    digits[False] = load_mnist(train=False, size=32)[500:800]

    def sample(generator, n, rng):
        asked.append(n)
        return gan.sample(generator, min(n, 150), rng)

    for module in (experiments.adversarial, importlib.import_module("aigc_course.recipes.adversarial"), recipes.judge):
        monkeypatch.setattr(module, "load_mnist", lambda train=True, **_: digits[train])
    monkeypatch.setattr(experiments.adversarial, "sample", sample)
    settings = recipes.GANS["dcgan", "quick"]
    tiny = replace(settings, config=replace(settings.config, width=4, z_dim=4), batch_size=4)
    monkeypatch.setitem(recipes.GANS, ("dcgan", "quick"), tiny)
    for name, variant in VARIANTS.items():
        if "config" in variant:
            config = replace(variant["config"], width=4, z_dim=4)
            monkeypatch.setitem(VARIANTS, name, variant | {"config": config})
    return asked


def test_packed_images_are_what_they_were_to_8_bits():
    images = 2.2 * torch.rand(3, 2, 5, 4, generator=rng_for("pack")) - 1.1
    packed = json.loads(json.dumps(pack_images(images)))
    found = unpack_images(packed)
    assert found.shape == images.shape and found.dtype == torch.float32
    assert (found - images.clamp(-1, 1)).abs().max() <= 0.5001 / 127.5
    assert found.min() == -1 and found.max() == 1
    assert torch.equal(unpack_images(pack_images(found)), found)


def test_the_scale_goes_from_real_digits_to_noise(few_digits, monkeypatch):
    def first_rows(images):
        return all_features(images[:300])

    all_features = recipes.mnist_features
    monkeypatch.setattr(recipes, "mnist_features", first_rows)
    rows = rows_of("digit_scale")
    assert all(set(row) == {"what", "n", "frechet", "kernel", "precision", "recall"} for row in rows)
    assert [row["what"] for row in rows[:3]] == ["training digits", "noise", "blurred digits"]
    assert {row["what"] for row in rows[3:]} == {"a sample of the training digits"} and len(rows) == 3 + 35
    assert [row["n"] for row in rows[3::5]] == [100, 200, 300, 300, 300, 300, 300]  # all that there are
    digits, noise, blurred = rows[:3]
    assert digits["frechet"] < blurred["frechet"] / 3 and blurred["frechet"] < noise["frechet"]
    assert digits["kernel"] < blurred["kernel"] < noise["kernel"]
    assert digits["precision"] > 0.7 > 0.05 > noise["precision"] and digits["recall"] > 0.7 > 0.05 > noise["recall"]
    fewest, more = ([row["frechet"] for row in rows[i : i + 5]] for i in (3, 8))
    assert sum(fewest) > sum(more) and len({*fewest, *more}) == 10
    train, test = (all_features(load_mnist(train=False, size=32)[a:b].images) for a, b in ((0, 300), (500, 800)))
    assert digits["frechet"] == pytest.approx(metrics.frechet_distance(test, train), rel=1e-3)
    precision, recall = metrics.precision_recall(test, train)
    assert digits["precision"] == precision != recall == digits["recall"]


def test_a_training_is_watched_at_moments_evenly_spaced_in_the_logarithm(few_digits, monkeypatch):
    monkeypatch.setitem(recipes.GANS, ("dcgan", "quick"), replace(recipes.GANS["dcgan", "quick"], steps=16))
    rows = rows_of("dcgan_growth", moments=4, first=2)
    assert [row["step"] for row in rows] == [2, 4, 8, 16] and few_digits == 4 * [10_000]
    assert all(set(row) == {"step", "samples", *CURVES, *FIGURES} for row in rows)
    images = [unpack_images(row["samples"]) for row in rows]
    assert images[0].shape == (40, 1, 32, 32) and not torch.equal(images[0], images[3])
    # The same training in one go: each row has the means of the steps since the one before.
    plan = recipes.gan_plan("dcgan", "quick", device="cpu")
    experiments.adversarial.fit(plan.step, plan.state, plan.images, plan.config)
    for name in CURVES:
        values = plan.state.history[name]
        for row, (start, end) in zip(rows, ((0, 2), (2, 4), (4, 8), (8, 16)), strict=True):
            assert row[name] == pytest.approx(sum(values[start:end]) / (end - start), rel=1e-4)
    generator = plan.generator()
    fixed = gan.latents(generator, 40, rng_for(0, "dcgan_growth"))
    assert (images[3] - gan.generate(generator, fixed)).abs().max() < 0.01  # 8 bits a pixel
    judged = recipes.mnist_features(gan.sample(generator, 150, rng_for(0, "judge")))
    found = recipes.digit_figures(judged)
    for name in ("frechet", "sure", "precision", "recall"):
        assert rows[3][name] == pytest.approx(getattr(found, name), rel=1e-2, abs=1e-2), name
    assert rows[3]["classes"] == pytest.approx(found.classes.tolist(), abs=0.02)


def test_each_guideline_is_broken_on_its_own(few_digits):
    """Every variant differs from the recipe, in one field of its settings or of its networks."""
    recipe = recipes.GANS["dcgan", "quick"]
    for name, variant in VARIANTS.items():
        assert len(variant) == (name != "the recipe")
        settings = replace(recipe, **{k: v for k, v in variant.items() if k != "update"})
        assert (settings == recipe) == (name in ("the recipe", "one mixed batch in D")), name
    rows = rows_of("dcgan_ablations", seeds=1, steps=20)
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, 0) for name in VARIANTS]
    assert all(set(row) == {"variant", "seed", *CURVES, *FIGURES} for row in rows)
    assert all(len(row[name]) == 1 for row in rows for name in CURVES)
    assert few_digits == len(VARIANTS) * [10_000]
    losses = {row["variant"]: row["d_loss"] for row in rows}
    for name, loss in losses.items():  # the average changes what is judged, not how it is trained
        assert (loss == losses["the recipe"]) == (name in ("the recipe", "no average of weights")), name
    frechet = {row["variant"]: row["frechet"] for row in rows}
    assert frechet["no average of weights"] != frechet["the recipe"]


def test_seeds_are_counted_for_every_variant(few_digits, monkeypatch):
    batches = []

    def step(state, real, rng, **options):
        batches.append(len(real))
        return gan.gan_step(state, real, rng, **options)

    monkeypatch.setattr(experiments.adversarial, "VARIANTS", {"the recipe": {}, "no R1": {"r1": 0.0}})
    rows = rows_of("dcgan_ablations", seeds=2, steps=40, batch_size=2, update=step)
    assert batches == 4 * 40 * [2]
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("the recipe", 0),
        ("the recipe", 1),
        ("no R1", 0),
        ("no R1", 1),
    ]
    assert rows[0]["d_loss"] != rows[1]["d_loss"] and len(rows[0]["d_loss"]) == 2


def test_three_patients_are_ill_in_ways_that_their_curves_show(few_digits, monkeypatch):
    plans, original = [], recipes.gan_plan

    def keep(*args, **options):
        plans.append(original(*args, **options))
        return plans[-1]

    monkeypatch.setattr(recipes, "gan_plan", keep)
    rows = rows_of("dcgan_sick", steps=20)
    assert [row["patient"] for row in rows] == ["healthy", "A", "B", "C"]
    assert all(set(row) == {"patient", "samples", *CURVES, *FIGURES} for row in rows)
    assert all(unpack_images(row["samples"]).shape == (20, 1, 32, 32) for row in rows)
    assert few_digits == 4 * [10_000, 20]
    assert len({tuple(row["d_loss"]) for row in rows}) == 4
    assert [plan.images.min().item() for plan in plans] == [-1, 0, -1, -1]
    assert all(plan.images.max() == 1 for plan in plans)
    owned = [len(plan.state.optimizers["discriminator"].param_groups[0]["params"]) for plan in plans]
    discriminator, generator = (len(list(plans[0].state.nets[k].parameters())) for k in ("discriminator", "generator"))
    assert owned == [discriminator, discriminator, discriminator + generator, discriminator]
    rates = [[plan.state.optimizers[k].param_groups[0]["lr"] for k in ("generator", "discriminator")] for plan in plans]
    assert rates[0][0] == rates[0][1] and rates[3][0] == pytest.approx(40 * rates[3][1])


def test_a_grid_of_modes_is_watched_on_the_way():
    (row,) = rows_of("gan_grid", seeds=1, steps=6, moments=3)
    assert set(row) == {"seed", "step", "modes", "high quality", "samples"}
    assert row["step"] == [2, 4, 6] and len(row["modes"]) == len(row["high quality"]) == 3
    assert torch.tensor(row["samples"]).shape == (1000, 2)
    assert all(0 <= modes <= 25 for modes in row["modes"]) and all(0 <= share <= 1 for share in row["high quality"])


def twins(**options):
    """A state whose networks are always the same at the start, and a batch for them."""
    config = gan.DCGANConfig(size=16, width=2, z_dim=3, init_std=0.2, **options)
    rng = rng_for("twins")
    nets = {"generator": gan.Generator(config, rng), "discriminator": gan.Discriminator(config, rng)}
    sgds = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.items()}
    return TrainState(nets, sgds), torch.randn(6, 1, 16, 16, generator=rng).tanh()


@pytest.mark.parametrize("norm", [False, True])
def test_the_mixed_step_differs_from_the_gan_step_in_what_batch_norm_sees_alone(norm):
    figures, weights, batches = [], [], []
    for step in (gan.gan_step, mixed_step):
        state, real = twins(batch_norm=norm)
        state.nets["discriminator"].register_forward_hook(lambda _, args, output: batches.append(len(output)))
        for number in range(3):
            state.step_count = number
            found = step(state, real, rng_for("step", number), r1=2.0, r1_every=2)
        figures.append({name: value.item() for name, value in found.items()})
        weights.append(torch.cat([p.detach().flatten() for net in state.nets.values() for p in net.parameters()]))
    assert batches == [6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6] + [12, 6, 6, 12, 6, 12, 6, 6]
    assert figures[0].keys() == figures[1].keys()
    if norm:
        assert figures[0]["d_loss"] != pytest.approx(figures[1]["d_loss"], rel=1e-3)
    else:
        assert figures[0] == pytest.approx(figures[1], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_the_attached_step_moves_the_generator_in_the_discriminators_update():
    """Down the discriminator's loss, if its optimizer holds both networks; otherwise the update is that of gan_step."""
    moved = {}
    for name in ("both", "its own"):
        state, real = twins()
        if name == "both":
            both = [p for net in state.nets.values() for p in net.parameters()]
            state.optimizers["discriminator"] = torch.optim.SGD(both, lr=0.1)
        state.optimizers["generator"] = torch.optim.SGD(state.nets["generator"].parameters(), lr=0.0)
        start, (g, d) = copy.deepcopy(state.nets), (state.nets["generator"], state.nets["discriminator"])
        figures = attached_step(state, real, rng_for("attached"), r1=1.0, r1_every=8)
        assert set(figures) == {"d_loss", "g_loss", "d_real", "d_fake"}
        moved[name] = [(a - b).detach() for a, b in zip(g.parameters(), start["generator"].parameters(), strict=True)]
        assert not torch.equal(next(d.parameters()), next(start["discriminator"].parameters()))
        if name == "both":
            z = torch.randn(6, 3, generator=rng_for("attached"))
            real_logits, fake_logits = start["discriminator"](real), start["discriminator"](start["generator"](z))
            loss = gan.discriminator_loss(real_logits, fake_logits)
            gradients = torch.autograd.grad(loss, list(start["generator"].parameters()))
            torch.testing.assert_close(moved[name], [-0.1 * gradient for gradient in gradients], rtol=1e-3, atol=1e-7)
            assert figures["d_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    twin, real = twins()
    gan.gan_step(twin, real, rng_for("attached"), r1=1.0, r1_every=8)
    for name, value in state.nets["discriminator"].named_parameters():
        torch.testing.assert_close(value, twin.nets["discriminator"].get_parameter(name), rtol=1e-4, atol=1e-7)
    assert max(change.abs().max() for change in moved["both"]) > 0
    assert max(change.abs().max() for change in moved["its own"]) == 0


def test_a_recording_is_kept_and_read_back(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "course_dir", lambda: tmp_path)
    monkeypatch.setitem(experiments.EXPERIMENTS, "vae_beta", lambda device: iter([{"beta": 1.0}, {"beta": 2.0}]))
    path = experiments.record("vae_beta", "cpu")
    assert path == str(tmp_path / "data" / "histories" / "vae_beta.json")
    capsys.readouterr()
    found = experiments.recorded("vae_beta")
    assert found["rows"] == [{"beta": 1.0}, {"beta": 2.0}] == experiments.recorded("vae_beta", live=True)["rows"]
    assert "aigc experiment vae_beta" in capsys.readouterr().out


ODD = '{"rows": [], "command": "", "machine": "", "seconds": "many"}'


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": []}', '{"rows"', "[" * 100_000, ODD])
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
