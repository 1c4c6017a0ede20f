"""The recipes of language models: what is trained, scored, kept, sampled and shipped."""

import json
import math
from dataclasses import replace

import pytest
import torch

from aigc_course import checkpoints, recipes
from aigc_course.datasets import IGNORE, is_regulated, load_poems
from aigc_course.gpt2 import GPT2, GPT2Config, lm_losses
from aigc_course.ngram import NGram
from aigc_course.recipes import language as module
from aigc_course.runtime import CourseError, course_dir, rng_for
from aigc_course.tokenizer import Tokenizer
from aigc_course.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")

POEMS = {
    part: [poem.text for poem in load_poems(part)[:n]] for part, n in (("train", 300), ("valid", 40), ("test", 40))
}
PLAY = "What, ho! Who's there?\nNay, answer me: stand, and unfold yourself.\n" * 40
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "steps": 6, "evaluate_every": 2, "vocab_size": 400}


@pytest.fixture
def few_texts(monkeypatch):
    """A corpus of a few hundred poems and one small play, and models that train in a second."""
    module.trained_tokenizer.cache_clear()
    monkeypatch.setattr(module, "texts", lambda name, part: POEMS[part] if name == "tang" else [PLAY])
    small = {
        key: replace(
            settings, **SMALL | ({"block_size": 200} if key[0] == "tang" else {"block_size": 32, "vocab_size": 280})
        )
        for key, settings in module.LANGUAGE.items()
    }
    monkeypatch.setattr(module, "LANGUAGE", small)
    yield
    module.trained_tokenizer.cache_clear()


@pytest.mark.parametrize("name", recipes.LANGUAGE_NAMES)
def test_training_lowers_the_loss_and_keeps_the_best_weights(few_texts, name, tmp_path):
    recipe, seen = recipes.build(name, "quick", device="cpu"), []
    language = recipe.train(tmp_path, on_log=lambda step, figures: seen.append((step, figures)))
    card = checkpoints.read_card(tmp_path / "model")
    assert [point["step"] for point in card["curve"]] == [2, 4, 6] == [step for step, _ in seen]
    assert seen[-1][1]["loss"] < seen[0][1]["loss"]
    best = min(point["valid"] for point in card["curve"])
    scored = recipes.held_out_bits(*language, module.texts(name, "valid"))
    assert scored == pytest.approx(best, rel=1e-6) == card["figures"]["held-out bits per character"]


def test_the_best_weights_are_kept_when_the_last_are_worse(few_texts, tmp_path, monkeypatch):
    """Scores that rise after step 2 must leave the weights of step 2 in the folder."""
    weights, scores = {}, iter([9.0, 5.0, 9.0, 6.0, 9.0, 7.0])

    def score(model, tokenizer, texts):
        value = next(scores)
        weights[value] = model.wte.weight.detach().clone()
        return value

    monkeypatch.setattr(module, "held_out_bits", score)
    language = recipes.build("tang", "quick", device="cpu").train(tmp_path)
    assert torch.equal(language.model.wte.weight, weights[5.0]) and not torch.equal(weights[5.0], weights[7.0])
    assert checkpoints.read_card(tmp_path / "model")["figures"]["at step"] == 2


def test_a_run_taken_up_again_keeps_its_curve_and_ends_the_same(few_texts, tmp_path):
    whole = recipes.build("tang", "quick", device="cpu").train(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(step, figures):
        if step == 4:
            raise Stop

    recipe = recipes.build("tang", "quick", device="cpu")
    with pytest.raises(Stop):
        recipe.train(tmp_path / "cut", on_log=stop)
    resumed = recipe.train(tmp_path / "cut")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    cards = [checkpoints.read_card(tmp_path / run / "model") for run in ("whole", "cut")]
    assert cards[0]["curve"] == cards[1]["curve"]


def test_a_run_killed_while_it_saved_the_model_goes_on(few_texts, tmp_path, monkeypatch):
    real, recipe = GPT2.save_pretrained, recipes.build("tang", "quick", device="cpu")
    calls = iter(range(10))

    def killed_at_the_second(model, folder):
        real(model, folder)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(GPT2, "save_pretrained", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(tmp_path)
    monkeypatch.setattr(GPT2, "save_pretrained", real)
    assert len(checkpoints.read_card(tmp_path / "model")["curve"]) == 1 and recipe.load(tmp_path), "the first best one"
    language = recipe.train(tmp_path)
    curve = checkpoints.read_card(tmp_path / "model")["curve"]
    assert recipes.held_out_bits(*language, POEMS["valid"]) == pytest.approx(min(p["valid"] for p in curve), rel=1e-6)


def test_the_plan_is_the_training(few_texts, monkeypatch):
    """A lesson that calls fit on the plan gets the very weights of the recipe."""
    once = {key: replace(settings, evaluate_every=settings.steps) for key, settings in module.LANGUAGE.items()}
    monkeypatch.setattr(module, "LANGUAGE", once)  # the only score is that of the last step
    plan = recipes.language_plan("tang", "quick", seed=3, device="cpu")
    fit(plan.step, plan.state, plan.data, plan.config)
    trained = recipes.build("tang", "quick", seed=3, device="cpu").train().model.state_dict()
    for name, tensor in plan.model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert [group["weight_decay"] for group in plan.state.optimizers["gpt2"].param_groups] == [0.1, 0.0]


def uniform(vocab_size, block_size):
    """A model that gives every token the same probability."""
    config = GPT2Config(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=1, n_embd=4, dropout=0.0)
    model = GPT2(config, rng_for(0))
    model.wte.weight.data.zero_()
    return model


@pytest.mark.parametrize("block_size", [4, 7, 16, 33, 400])
def test_every_token_is_scored_once_whatever_the_context(block_size):
    tokenizer = Tokenizer.train("to be or not to be, that is the question " * 9, 270)
    texts = ["to be", "whether 'tis nobler in the mind to suffer", "x" * 90, "o"]
    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)  # and the end
    bits = recipes.held_out_bits(uniform(270, block_size), tokenizer, texts)
    assert bits == pytest.approx(n_tokens * math.log2(270) / sum(map(len, texts)), rel=1e-5)


def test_a_text_within_the_context_is_scored_as_its_probability():
    tokenizer = Tokenizer.train("to be or not to be, that is the question " * 9, 270)
    config = GPT2Config(vocab_size=270, block_size=64, n_layer=2, n_head=2, n_embd=8, dropout=0.5)
    model = GPT2(config, rng_for(1))
    model.wte.weight.data *= 30
    log_prob, texts = 0.0, ["to be or not", "question"]
    model.eval()
    for text in texts:
        ids = torch.tensor([[tokenizer.end, *tokenizer.encode(text), tokenizer.end]])
        log_probs = model(ids[:, :-1]).log_softmax(-1)
        log_prob += sum(log_probs[0, i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1))
    model.train()
    bits = recipes.held_out_bits(model, tokenizer, texts)
    assert bits == pytest.approx(-log_prob / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert model.training


def test_windows_overlap_by_half_a_context():
    """A token is never predicted from less than half a context, but for the first ones of the text."""
    seen = []

    class Spy(GPT2):
        def hidden(self, ids, **keywords):
            seen.append(ids)
            return super().hidden(ids, **keywords)

    config = GPT2Config(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=4, dropout=0.0)
    tokenizer, text = Tokenizer.train("abc", 257), "abcdefghijklmnopqrstu"
    recipes.held_out_bits(Spy(config, rng_for(0)), tokenizer, [text])
    row = [tokenizer.end, *tokenizer.encode(text), tokenizer.end]
    windows = [window.tolist() for batch in seen for window in batch]
    starts = sorted(row.index(window[0]) for window in windows)
    assert starts == [0, 4, 8, 12, 16][: len(starts)] and len(starts) >= 4


def test_rows_of_poems_end_and_are_padded(few_texts):
    plan = recipes.language_plan("tang", "quick", device="cpu")
    batch = plan.data[torch.arange(5)]
    for row, text in zip(batch.tolist(), POEMS["train"], strict=False):
        tokens = [token for token in row if token != IGNORE]
        assert row[len(tokens) :] == [IGNORE] * (len(row) - len(tokens))
        assert tokens[0] == tokens[-1] == plan.tokenizer.end and plan.tokenizer.decode(tokens[1:-1]) == text
    assert (lm_losses(plan.model, batch)[batch[:, 1:] == IGNORE] == 0).all()


def test_the_tokenizer_is_learnt_from_training_texts_alone(few_texts, monkeypatch):
    asked = []
    real = module.texts
    monkeypatch.setattr(module, "texts", lambda name, part: asked.append(part) or real(name, part))
    module.trained_tokenizer("tang", 400)
    assert asked == ["train"]


def test_the_learning_rate_rises_and_falls():
    rates = [module._schedule(step, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0) == max(rates)
    assert rates[100] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)


def test_a_model_and_a_tokenizer_that_do_not_match_are_refused(few_texts, tmp_path):
    recipe = recipes.build("tang", "quick", device="cpu")
    recipe.train(tmp_path)
    Tokenizer.train(POEMS["train"], 300, isolate_han=True).save(tmp_path / "model")
    with pytest.raises(CourseError, match=r"tokenizer\.json: expected .* bytes"):
        recipe.load(tmp_path)  # the seal is broken
    checkpoints.seal(tmp_path / "model", {"profile": "quick"})
    with pytest.raises(CourseError, match="the model knows 400 tokens, the tokenizer 300"):
        recipe.load(tmp_path)


def test_a_trained_model_is_shipped_with_its_figures_and_its_card(few_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.recipe, "course_dir", lambda: tmp_path)
    monkeypatch.setattr(recipes.shipping, "texts", lambda name, part: POEMS[part])
    recipes.build("tang", "quick", device="cpu").train(tmp_path / "run")
    folder = recipes.ship("tang", tmp_path / "run")
    assert folder == tmp_path / "data" / "checkpoints" / "gpt2-tang" and recipes.pretrained() == ["tang"]
    trained, shipped = (
        recipes.build("tang", "quick", device="cpu").load(tmp_path / "run"),
        recipes.load_pretrained("tang"),
    )
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, shipped.model.state_dict()[name]), name
    figures = recipes.card_of("tang")["figures"]
    assert figures["test: bits per character"] == pytest.approx(recipes.held_out_bits(*shipped, POEMS["test"]))
    # the lines to beat, by the definition: what whole poems cost, their ends included
    rows = recipes.token_rows(shipped.tokenizer, POEMS["test"])
    bigram = NGram(2, shipped.tokenizer.vocab_size).fit(recipes.token_rows(shipped.tokenizer, POEMS["train"]))
    bits = -sum(bigram.log_prob(row).sum().item() for row in rows) / math.log(2) / len("".join(POEMS["test"]))
    assert figures["test: bits per character, Kneser-Ney of order 2"] == pytest.approx(bits)
    corpus = "\n".join(POEMS["train"])
    largest = int(figures["longest span shared with training, held-out texts: largest"])
    runs = {text[i : i + n] for text in POEMS["test"] for n in (largest, largest + 1) for i in range(len(text) - n + 1)}
    assert {len(run) for run in runs if run in corpus} == {largest}
    words = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {what} | {value:.4g} |" in words for what, value in figures.items())
    with pytest.raises(CourseError, match="run holds a model of the recipe tang, not shakespeare"):
        recipes.ship("shakespeare", tmp_path / "run")
    (folder / "README.md").write_text(words + " ", encoding="utf-8")
    (row,) = recipes.check_pretrained()
    assert not row.ok and "README.md" in row.message


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path):
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("x", encoding="utf-8")
    checkpoints.seal(tmp_path / "model", {"a": 1})
    assert checkpoints.read_card(tmp_path / "model") == {"a": 1}
    path = tmp_path / "model" / checkpoints.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"]["../secret"] = manifest["files"].pop("file")
    del manifest["sha256"]
    manifest["sha256"] = checkpoints._digest(manifest)
    path.write_bytes(checkpoints._manifest_bytes(manifest))
    with pytest.raises(checkpoints.CheckpointError, match="expected files in this folder, found '../secret'"):
        checkpoints.read_card(tmp_path / "model")


def test_names_that_are_none_are_refused():
    with pytest.raises(CourseError, match="no language model 'gpt9': choose 'tang' or 'shakespeare'"):
        recipes.language_plan("gpt9")


# ---- the shipped models ----


@pytest.mark.parametrize("name", recipes.LANGUAGE_NAMES)
def test_a_shipped_model_opens_in_transformers_and_agrees(name):
    transformers = pytest.importorskip("transformers")
    folder = course_dir() / "data" / "checkpoints" / f"gpt2-{name}"
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = recipes.load_pretrained(name, device="cpu")
    text = "白日依山尽，黄河入海流。" if name == "tang" else "If music be the food of love, play on"
    ids = ours.tokenizer.encode(text)
    assert their_tokenizer.encode(text) == ids and their_tokenizer.eos_token_id == ours.tokenizer.end
    ids = torch.tensor([[ours.tokenizer.end, *ids]])
    with torch.no_grad():
        assert (theirs(ids).logits - ours.model(ids)).abs().max() < 1e-4
    assert theirs.config.eos_token_id == ours.tokenizer.end == ours.model.config.vocab_size - 1
    words = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("license: mit", "**Data**", "**Split**", "**Limits**", "## Figures", "Longest span shared"):
        assert part in words


def test_the_shipped_models_are_small_and_as_good_as_their_cards_say():
    size = 0
    for name in recipes.LANGUAGE_NAMES:
        folder = course_dir() / "data" / "checkpoints" / f"gpt2-{name}"
        size += sum(path.stat().st_size for path in folder.iterdir())
        card = recipes.card_of(name)
        assert card["recipe"] == name and card["profile"] == "full" and "torch" in card["machine"]
        assert card["command"] == f"aigc train {name} --profile full --seed {card['seed']}"
        best = min(point["valid"] for point in card["curve"])
        assert card["figures"]["valid: bits per character"] == pytest.approx(best, rel=1e-4)
    assert size <= 30e6
    figures = recipes.card_of("tang")["figures"]
    assert figures["test: bits per character"] < figures["test: bits per character, Kneser-Ney of order 3"] - 1.5
    assert figures["share of 1,000 samples in the form of regulated verse"] > 0.9


def test_the_poems_of_the_shipped_model_have_the_form():
    language = recipes.load_pretrained("tang", device="cpu")
    poems = recipes.sample_texts(language, 100, rng_for(1))
    assert sum(is_regulated(poem) is not None for poem in poems) >= 85
    assert len(set(poems)) == 100
    assert recipes.sample_texts(language, 3, rng_for(1)) != recipes.sample_texts(language, 3, rng_for(2))


def test_the_shipped_tokenizer_is_the_one_that_training_learns():
    learnt = module.trained_tokenizer("tang", 4096)
    kept = recipes.load_pretrained("tang", device="cpu").tokenizer
    assert json.loads(learnt.backend.to_str()) == json.loads(kept.backend.to_str())
