"""Decoding: the very tokens of transformers, exact frequencies, one result however the model is read, clear errors."""

import itertools
import math
import warnings

import jaxtyping
import pytest
import torch
import transformers

from aigc_course.generate import (
    GenerateError,
    GenerateWarning,
    beam_search,
    filter_logits,
    forbid_repeated_ngrams,
    generate,
    next_log_probs,
    next_token,
    penalize_repetition,
    stream,
)
from aigc_course.gpt2 import GPT2, Decoder, GPT2Config
from aigc_course.runtime import CourseError, rng_for

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, NEW = 61, 12


def model_of(*key, **config) -> GPT2:
    """A small model with strong random weights, so that its tokens vary and depend on all that came before."""
    config = {"vocab_size": VOCAB, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 24, **config}
    model, rng = GPT2(GPT2Config(**config), rng_for(*key)), rng_for(*key, "weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1 if name in ("ln_f.weight", "wpe.weight") else 0.3 if parameter.ndim == 2 else 0.1
            mean = 1 if name.endswith(("ln_1.weight", "ln_2.weight")) else 0
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def ids_of(*key, shape=(3, 6), vocab=VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=rng_for(*key, "ids"))


def padded(ids: torch.Tensor, pads: list[int], filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids`` with so many of the first tokens of each row made padding, and the mask."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    return ids.where(mask == 1, filler), mask


# ---- the same tokens as transformers ----


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Models and their twins in transformers, with prompts for them."""
    found = []
    for seed in (3, 7, 11):  # where the ways of early stopping give unlike texts
        model = model_of(seed, "pair")
        folder = model.save_pretrained(tmp_path_factory.mktemp("twin"))
        twin = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        twin.generation_config = transformers.GenerationConfig()
        found.append((model, twin, ids_of(seed, "pair")))
    return found


def theirs(twin, ids, *, stop=None, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    return twin.generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=stop, pad_token_id=stop, max_new_tokens=NEW, **settings
    )


def stops_of(model, ids):
    """No stop token; one that the greedy text comes to early; one that is frequent."""
    new = generate(model, ids, max_new_tokens=NEW, temperature=0)[:, ids.shape[1] :]
    return [None, new[0, 3].item(), new.flatten().mode().values.item()]


PENALTIES = [
    {"repetition_penalty": penalty, "no_repeat_ngram_size": n}
    for penalty, n in [(1.0, 0), (1.5, 0), (0.7, 0), (1.0, 1), (1.0, 2), (1.3, 3)]
]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_greedy_as_transformers(pairs, penalties):
    for model, twin, ids in pairs:
        for stop in stops_of(model, ids):
            ours = generate(model, ids, max_new_tokens=NEW, temperature=0, stop=stop, **penalties)
            assert torch.equal(ours, theirs(twin, ids, stop=stop, **penalties))


def test_the_test_models_are_worth_testing(pairs):
    """Their texts differ between rows, do not repeat one token, and their stop tokens occur at unlike places."""
    distinct, ends = set(), set()
    for model, _, ids in pairs:
        new = generate(model, ids, max_new_tokens=NEW, temperature=0)[:, ids.shape[1] :]
        assert all(len(set(row)) > 3 for row in new.tolist())
        distinct |= {tuple(row) for row in new.tolist()}
        for stop in stops_of(model, ids)[1:]:
            best = beam_search(model, ids, num_beams=3, max_new_tokens=NEW, stop=stop)[:, ids.shape[1] :]
            ends |= {(row + [stop]).index(stop) for row in best.tolist()}
    assert len(distinct) >= 9 and len(ends) >= 5, (distinct, ends)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_beam_search_as_transformers(pairs, length_penalty, early_stopping):
    cases = itertools.cycle(itertools.product([2, 3, 4, 5], PENALTIES[:2] + PENALTIES[4:]))
    for (model, twin, ids), stop in itertools.product(pairs, range(3)):
        num_beams, penalties = next(cases)
        stop = stops_of(model, ids)[stop]
        settings = {"length_penalty": length_penalty, "early_stopping": early_stopping, **penalties}
        settings["num_beams"] = num_beams
        ours = beam_search(model, ids, max_new_tokens=NEW, stop=stop, **settings)
        assert torch.equal(ours, theirs(twin, ids, stop=stop, **settings)), settings


def test_the_settings_of_a_widely_copied_article_as_transformers(pairs):
    settings = {"num_beams": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "early_stopping": True}
    for model, twin, ids in pairs:
        for stop in stops_of(model, ids):
            ours = beam_search(model, ids, max_new_tokens=NEW, stop=stop, **settings)
            assert torch.equal(ours, theirs(twin, ids, stop=stop, **settings))
            new = [row[: (row + [stop]).index(stop)] for row in ours.tolist()]
            for row in new:  # the prompt is random, and may hold a 2-gram twice itself
                assert len(set(zip(row[5:], row[6:], strict=False))) == len(row[6:])


def test_padded_batches_as_transformers(pairs):
    """Without n-grams, for transformers counts padding among them; the repetition penalty passes over it in both."""
    for model, twin, ids in pairs:
        ids, mask = padded(ids, [0, 2, 5], filler=7)
        for stop in stops_of(model, ids):
            ours = generate(model, ids, max_new_tokens=NEW, temperature=0, attention_mask=mask, stop=stop)
            assert torch.equal(ours, theirs(twin, ids, stop=stop, mask=mask))
            for settings in ({"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.4, "early_stopping": True}):
                ours = beam_search(model, ids, max_new_tokens=NEW, attention_mask=mask, stop=stop, **settings)
                assert torch.equal(ours, theirs(twin, ids, stop=stop, mask=mask, **settings))


# ---- filters ----


def twin_processors(temperature=1.0, top_k=None, top_p=None, min_p=None):
    made = [
        transformers.TemperatureLogitsWarper(temperature),
        top_k and transformers.TopKLogitsWarper(top_k),
        top_p not in (None, 1) and transformers.TopPLogitsWarper(top_p),
        min_p is not None and transformers.MinPLogitsWarper(min_p),
    ]
    return transformers.LogitsProcessorList([processor for processor in made if processor])


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5, "top_k": 3},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 3.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_filters_as_transformers(settings, scale):
    logits = scale * torch.randn(20, 50, generator=rng_for(0, "logits"))
    expected = twin_processors(**settings)(None, logits)
    assert torch.equal(filter_logits(logits, **settings), expected)


def test_the_filters_of_generate_come_in_the_order_of_transformers(pairs):
    """Their own assembly of processors, from their configuration of a generation."""
    _, twin, ids = pairs[0]
    settings = {"temperature": 1.8, "top_k": 25, "top_p": 0.7, "min_p": 0.1}
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    config = transformers.GenerationConfig(do_sample=True, **settings, **penalties)
    processors = twin._get_logits_processor(config, input_ids_seq_length=6, device="cpu")
    ids = torch.cat([ids, ids[:, :3]], dim=1)
    logits = 3 * torch.randn(len(ids), VOCAB, generator=rng_for(1, "logits"))
    expected = processors(ids, logits).softmax(-1)
    penalized = forbid_repeated_ngrams(penalize_repetition(logits, ids, 1.3), ids, 2)
    ours = filter_logits(penalized, **settings).softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    drawn = [next_token(logits, ids, rng=rng_for(i), **settings, **penalties) for i in range(100)]
    assert all((expected.gather(1, token[:, None]) > 0).all() for token in drawn)


def test_what_is_kept_is_renormalised_and_in_proportion():
    logits = torch.randn(30, 40, generator=rng_for(0))
    for settings in FILTERS:
        kept = filter_logits(logits, **settings).softmax(-1)
        before = (logits / settings.get("temperature", 1)).softmax(-1)
        torch.testing.assert_close(kept.sum(-1), torch.ones(30))
        expected = torch.where(kept > 0, before, 0)
        torch.testing.assert_close(kept, expected / expected.sum(-1, keepdim=True))
        assert (kept.argmax(-1) == logits.argmax(-1)).all()


def test_filters_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8, shuffled: exact in binary, so that borders can be hit."""
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log2() * math.log(2)

    def kept(**settings):
        return filter_logits(logits, **settings).isfinite()[0].nonzero().flatten().tolist()

    assert kept(top_k=1) == [1] and kept(top_k=2) == [1, 3]
    assert kept(top_k=3) == [0, 1, 2, 3]  # the third and the fourth tie
    assert kept(top_p=0.49) == [1] and kept(top_p=0.51) == [1, 3] and kept(top_p=0.74) == [1, 3]
    assert len(kept(top_p=0.76)) == 3 and kept(top_p=0.999) == [0, 1, 2, 3]
    assert kept(min_p=0.24) == [0, 1, 2, 3] and kept(min_p=0.26) == [1, 3] and kept(min_p=0.51) == [1]
    assert kept(top_k=2, top_p=0.66) == [1]  # of the two that top_k leaves, the first has 2/3
    # hot enough, four tokens are alike: temperature comes first
    assert kept(temperature=100, min_p=0.9) == [0, 1, 2, 3]


def test_the_smallest_set_that_reaches_p():
    for i, p in itertools.product(range(20), (0.1, 0.5, 0.93)):
        probs = torch.randn(1, 30, generator=rng_for(i)).softmax(-1)
        kept = filter_logits(probs.log(), top_p=p).isfinite()
        assert probs[kept].sum() >= p - 1e-6 and probs[kept].sum() - probs[kept].min() < p + 1e-6
        assert probs[kept].min() >= probs.masked_fill(kept, 0).max()


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.0, 3.0, -2.0]])
    ids, mask = torch.tensor([[0, 1, 1, 3]]), torch.tensor([[0, 1, 1, 1]])
    assert penalize_repetition(logits, ids, 2.0).tolist() == [[1.0, -2.0, 0.0, 1.5, -2.0]]
    assert penalize_repetition(logits, ids, 2.0, mask).tolist() == [[2.0, -2.0, 0.0, 1.5, -2.0]]
    twice = torch.tensor([[0, 0, 3, 0]])  # padding and text may share an id
    assert penalize_repetition(logits, twice, 2.0, mask).tolist() == [[1.0, -1.0, 0.0, 1.5, -2.0]]
    assert penalize_repetition(logits, ids, 1.0).equal(logits)


def test_forbidden_ngrams_by_hand():
    def forbidden(ids, n, mask=None):
        mask = None if mask is None else torch.tensor([mask])
        found = forbid_repeated_ngrams(torch.zeros(1, 6), torch.tensor([ids]), n, mask)
        assert set(found.flatten().tolist()) <= {0.0, -math.inf}
        return found.isinf()[0].nonzero().flatten().tolist()

    assert forbidden([1, 2, 3, 1, 2, 5, 1], 2) == [2]
    assert forbidden([1, 2, 1, 3, 1], 2) == [2, 3]
    assert forbidden([1, 2, 3, 4, 1, 2], 3) == [3] and forbidden([1, 2, 3, 4, 5, 2], 3) == []
    assert forbidden([4, 1, 4], 1) == [1, 4]
    assert forbidden([1, 2], 3) == forbidden([1, 2], 0) == forbidden([1, 1], 3) == []
    assert forbidden([1, 1], 2) == [1]
    assert forbidden([0, 0, 5, 0], 2, [0, 0, 1, 1]) == []  # 0 0 and 0 5 begin in the padding
    assert forbidden([0, 0, 5, 0], 2) == [0, 5]
    assert forbidden([0, 0, 5, 0], 1, [0, 1, 1, 1]) == [0, 5]


# ---- sampling ----


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """How many standard deviations the statistic lies above its mean."""
    expected = counts.sum() * probs[probs > 0]
    assert counts[probs == 0].sum() == 0
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom >= 2
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}], ids=str)
def test_first_tokens_have_their_probabilities(settings):
    model = model_of("frequencies", vocab_size=12)
    prompt = ids_of(0, shape=(1, 4), vocab=12)
    probs = filter_logits(next_log_probs(model, prompt), **settings).softmax(-1)[0]
    new = generate(model, prompt.expand(4000, -1), max_new_tokens=1, rng=rng_for(1), **settings)[:, -1]
    assert chi_square(new.bincount(minlength=12), probs) < 4


def test_pairs_of_tokens_have_their_probabilities():
    """The chain rule: p(first) p(second | first), computed without the cache."""
    model, prompt = model_of("chain", vocab_size=5), ids_of(1, shape=(1, 4), vocab=5)
    after = torch.cat([prompt.expand(5, -1), torch.arange(5)[:, None]], dim=1)
    probs = (next_log_probs(model, prompt).T + next_log_probs(model, after)).exp()
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
    new = generate(model, prompt.expand(5000, -1), max_new_tokens=2, rng=rng_for(2))[:, -2:]
    assert chi_square((5 * new[:, 0] + new[:, 1]).bincount(minlength=25), probs.flatten()) < 4


def test_next_log_probs_are_those_of_the_model():
    model, ids = model_of("log probs"), ids_of(2)
    log_probs = next_log_probs(model, ids)
    torch.testing.assert_close(log_probs, model(ids)[:, -1].log_softmax(-1))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))
    ids, mask = padded(ids, [0, 1, 4])
    for row, pad in enumerate([0, 1, 4]):
        alone = next_log_probs(model, ids[row : row + 1, pad:])
        torch.testing.assert_close(next_log_probs(model, ids, mask)[row : row + 1], alone, atol=1e-4, rtol=0)


def test_randomness_is_the_generators():
    model, ids = model_of("rng"), ids_of(3)
    state = torch.get_rng_state()
    first = generate(model, ids, max_new_tokens=10, rng=rng_for(1))
    assert torch.equal(first, generate(model, ids, max_new_tokens=10, rng=rng_for(1)))
    assert not torch.equal(first, generate(model, ids, max_new_tokens=10, rng=rng_for(2)))
    assert (
        len({tuple(row) for row in generate(model, ids[:1].expand(8, -1), max_new_tokens=9, rng=rng_for(1)).tolist()})
        > 1
    )
    generate(model, ids, max_new_tokens=3, temperature=0)
    beam_search(model, ids, num_beams=2, max_new_tokens=3)
    assert torch.equal(state, torch.get_rng_state())


def test_greedy_is_the_limit_of_a_low_temperature():
    model, ids = model_of("limit"), ids_of(4)
    greedy = generate(model, ids, max_new_tokens=10, temperature=0)
    for settings in ({"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert torch.equal(generate(model, ids, max_new_tokens=10, rng=rng_for(0), **settings), greedy)
    assert torch.equal(beam_search(model, ids, num_beams=1, max_new_tokens=10), greedy)


SETTINGS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "no_repeat_ngram_size": 2},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_stream_yields_what_generate_returns(settings):
    for seed in range(3):
        model, ids = model_of(seed, "stream"), ids_of(seed, shape=(1, 5))
        plain = generate(model, ids, max_new_tokens=45, rng=rng_for(seed), **settings)[0, 5:]
        for stop in (None, plain[7].item()):
            streamed = list(stream(model, ids, max_new_tokens=45, stop=stop, rng=rng_for(seed), **settings))
            whole = generate(model, ids, max_new_tokens=45, stop=stop, rng=rng_for(seed), **settings)
            assert streamed == whole[0, 5:].tolist() and all(type(i) is int for i in streamed)
            assert stop is None or streamed.index(stop) == len(streamed) - 1 <= 7


def tokens_read(model, monkeypatch) -> list[int]:
    """How many tokens a row each reading took, kept up to date."""
    reads, whole, one = [], model.hidden, Decoder.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **more: reads.append(ids.shape[1]) or whole(ids, **more))
    monkeypatch.setattr(Decoder, "hidden", lambda self, ids, cache: reads.append(1) or one(self, ids, cache))
    return reads


def test_stream_comes_token_by_token(monkeypatch):
    """It runs the model once for each token asked for; a mistake is told at the call, not at the first token."""
    model, ids = model_of("lazy"), ids_of(5, shape=(1, 5))
    calls = tokens_read(model, monkeypatch)
    tokens = stream(model, ids, max_new_tokens=8, temperature=0)
    assert calls == []
    next(tokens), next(tokens), next(tokens)
    assert calls == [5, 1, 1]  # the prompt once, then one token at a time
    with pytest.raises(GenerateError):
        stream(model, ids, max_new_tokens=8)


def test_a_full_window_is_read_anew_from_its_last_half(monkeypatch):
    model = model_of("reads", block_size=8)
    reads = tokens_read(model, monkeypatch)
    ids, mask = padded(ids_of(5), [1, 2, 4])
    generate(model, ids, max_new_tokens=14, temperature=0, attention_mask=mask)
    # 5 tokens of the longest row, then 8; the second row is full one token later and the third two after that
    assert reads[:4] == [5, 1, 1, 1] and max(reads) <= 8 and len(reads) == 14
    alone = ids[:1, 1:]
    reads.clear()
    generate(model, alone, max_new_tokens=14, temperature=0)
    assert reads == [5, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1, 1]


# ---- one result, however the model is read ----


def without_cache(model, ids, new):
    """Greedy decoding as plainly as can be, over all that is in the window: the slow twin."""
    size = model.config.block_size
    seen = ids[:, -size:]
    for _ in range(new):
        if seen.shape[1] > size:
            seen = seen[:, -max(size // 2, 1) :]
        token = model(seen)[:, -1].argmax(-1, keepdim=True)
        ids, seen = torch.cat([ids, token], dim=1), torch.cat([seen, token], dim=1)
    return ids


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("t", [1, 3, 8])
def test_the_cache_and_the_window_change_no_token(block_size, t):
    model = model_of(block_size, t, block_size=block_size)
    ids = ids_of(block_size, t, shape=(2, t))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        ours = generate(model, ids, max_new_tokens=40, temperature=0)
        assert torch.equal(ours, without_cache(model, ids, 40))
    assert ours.shape == (2, t + 40) and torch.equal(ours[:, :t], ids)
    assert [w.category for w in caught] == [GenerateWarning] * (t > block_size)


def test_a_long_prompt_is_cropped_with_one_line():
    model = model_of("long", block_size=8)
    ids = ids_of(0, shape=(2, 20))
    with pytest.warns(GenerateWarning, match="the prompt has 20 tokens, .* the last 8") as caught:
        cropped = generate(model, ids, max_new_tokens=5, temperature=0)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert torch.equal(cropped[:, :20], ids)
    assert torch.equal(cropped[:, 12:], generate(model, ids[:, 12:], max_new_tokens=5, temperature=0))
    with pytest.warns(GenerateWarning):
        torch.testing.assert_close(next_log_probs(model, ids), next_log_probs(model, ids[:, 12:]))


def test_what_has_left_the_window_still_counts_as_said():
    """The penalties look at the whole text, as a reader of it would."""
    model = model_of("memory", block_size=4)
    ids = torch.randperm(VOCAB, generator=rng_for(0))[None, :7]
    with pytest.warns(GenerateWarning):
        text = generate(model, ids, max_new_tokens=VOCAB - 7, temperature=0, no_repeat_ngram_size=1)
    assert sorted(text[0].tolist()) == list(range(VOCAB))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_rows_of_a_padded_batch_are_those_alone(settings):
    """Also where the window moves on, at unlike times for rows of unlike lengths."""
    pads = [0, 3, 5, 5]
    for seed in range(3):
        model = model_of(seed, "rows", block_size=14)
        ids, mask = padded(ids_of(seed, "rows", shape=(4, 6)), pads, filler=ids_of(seed, shape=(1, 1)).item())
        mask = mask.to([torch.int64, torch.bool, torch.float32][seed])
        batch = generate(model, ids, max_new_tokens=25, attention_mask=mask, **settings)
        assert torch.equal(batch[:, :6], ids)
        for row, pad in enumerate(pads):
            alone = generate(model, ids[row : row + 1, pad:], max_new_tokens=25, **settings)
            assert torch.equal(batch[row, pad:], alone[0])


def test_rows_of_a_padded_batch_of_beams_are_those_alone():
    for seed in range(3):
        model = model_of(seed, "beams")
        ids = ids_of(seed, "rows")
        stop, frequent = stops_of(model, ids)[1:]
        ids, mask = padded(ids, [0, 1, 4], filler=frequent)
        for settings in ({}, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "early_stopping": True}):
            settings = {"num_beams": 4, "max_new_tokens": NEW, "stop": stop, **settings}
            batch = beam_search(model, ids, attention_mask=mask, **settings)
            for row, pad in enumerate([0, 1, 4]):
                alone = beam_search(model, ids[row : row + 1, pad:], **settings)[0]
                assert torch.equal(batch[row, pad : pad + len(alone)], alone)
                assert (batch[row, pad + len(alone) :] == stop).all()


def test_padding_of_a_whole_column_needs_no_room():
    """The model's context is for text: what is padding in every row does not fill it."""
    model = model_of("room", block_size=6)
    ids, mask = padded(ids_of(0, shape=(2, 9)), [7, 8])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = generate(model, ids, max_new_tokens=3, temperature=0, attention_mask=mask)
    assert torch.equal(batch[:1, 7:], generate(model, ids[:1, 7:], max_new_tokens=3, temperature=0))


def test_nothing_of_the_model_changes():
    model = model_of("trace", dropout=0.5)
    ids = ids_of(0)
    expected = [
        generate(model, ids, max_new_tokens=6, temperature=0),
        beam_search(model, ids, num_beams=2, max_new_tokens=6),
    ]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [
        generate(model, ids, max_new_tokens=6, temperature=0),
        beam_search(model, ids, num_beams=2, max_new_tokens=6),
    ]
    assert all(map(torch.equal, expected, found))  # no dropout
    log_probs = next_log_probs(model, ids)
    tokens = stream(model, ids[:1], max_new_tokens=6, temperature=0)
    next(tokens)
    assert all(module.training for module in model.modules()) and not log_probs.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="broken"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT2, "logits", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        generate(model, ids, max_new_tokens=6, temperature=0)
    assert model.training
    model.eval()
    generate(model, ids, max_new_tokens=2, temperature=0)
    assert not model.training


def test_stop_fills_up_and_ends():
    model, ids = model_of("stop"), ids_of(9)
    plain = generate(model, ids, max_new_tokens=NEW, temperature=0)[:, 6:].tolist()
    lengths = set()
    for stop in range(VOCAB):
        ends = [(row + [stop]).index(stop) for row in plain]
        found = generate(model, ids, max_new_tokens=NEW, temperature=0, stop=stop)[:, 6:].tolist()
        for row, end, whole in zip(found, ends, plain, strict=True):
            assert len(row) == min(max(ends) + 1, NEW)
            assert row[:end] == whole[:end] and set(row[end:]) <= {stop}
        lengths.add((len(found[0]), len(set(ends))))
    assert any(length < NEW and unlike > 1 for length, unlike in lengths), lengths


def test_a_row_that_has_stopped_runs_into_no_dead_end():
    """No token may come twice. The first row has said all but the stop token; the second still has others to say."""
    ids, mask = padded(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]]), [0, 3])
    lengths = set()
    for seed in range(8):
        model = model_of(seed, "few", vocab_size=5)
        text = generate(
            model, ids, max_new_tokens=4, temperature=0, attention_mask=mask, no_repeat_ngram_size=1, stop=4
        )
        assert (text[0, 4:] == 4).all() and len(set(text[1, 3:].tolist())) == text.shape[1] - 3
        lengths.add(text.shape[1] - 4)
    assert max(lengths) > 1
    with pytest.raises(GenerateError, match="no_repeat_ngram_size=1 leaves no token"):
        generate(model, ids, max_new_tokens=4, temperature=0, attention_mask=mask, no_repeat_ngram_size=1)


# ---- beam search ----


def best_by_hand(model, ids, new, length_penalty, stop):
    """The best of all texts, by trying every one: exact where there are beams enough."""
    best, best_score = None, -math.inf
    v = model.config.vocab_size
    for text in itertools.product(range(v), repeat=new):
        if stop in text:
            text = text[: text.index(stop) + 1]
        whole = torch.cat([ids, torch.tensor([text])], dim=1)
        log_probs = model(whole[:, :-1]).log_softmax(-1)[0, ids.shape[1] - 1 :]
        score = log_probs[range(len(text)), list(text)].sum().item() / len(text) ** length_penalty
        if score > best_score + 1e-6:
            best, best_score = list(text), score
    return best


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_with_beams_enough_the_search_is_exhaustive(length_penalty):
    for seed in range(3):
        model, ids = model_of(seed, "all", vocab_size=4), ids_of(seed, shape=(1, 2), vocab=4)
        settings = {"num_beams": 64, "max_new_tokens": 3, "length_penalty": length_penalty, "stop": 3}
        with torch.no_grad():
            expected = best_by_hand(model, ids, 3, length_penalty, 3)
        assert beam_search(model, ids, early_stopping="never", **settings)[0, 2:].tolist() == expected


def test_more_beams_find_what_is_at_least_as_likely_on_average():
    def nats(model, ids, text):
        return model(text[:, :-1]).log_softmax(-1).gather(2, text[:, 1:, None])[:, ids.shape[1] - 1 :].sum().item()

    totals = torch.zeros(3)
    with torch.no_grad():
        for seed in range(6):
            model, ids = model_of(seed, "beams"), ids_of(seed)
            for i, beams in enumerate((1, 3, 8)):
                totals[i] += nats(model, ids, beam_search(model, ids, num_beams=beams, max_new_tokens=10))
    assert totals[0] < totals[1] < totals[2]


def test_the_length_penalty_favours_long_texts():
    lengths = {}
    for penalty in (-2.0, 0.0, 2.0):
        lengths[penalty] = 0
        for seed in range(5):
            model, ids = model_of(seed, "length"), ids_of(seed)
            stop = stops_of(model, ids)[2]
            settings = {"num_beams": 4, "max_new_tokens": NEW, "stop": stop, "early_stopping": "never"}
            text = beam_search(model, ids, length_penalty=penalty, **settings)
            lengths[penalty] += (text[:, 6:] != stop).sum().item()
    assert lengths[-2.0] < lengths[0.0] < lengths[2.0]


def test_beams_with_few_tokens():
    """More beams than tokens, and a ban that leaves fewer continuations than beams."""
    model, ids = model_of("few", vocab_size=3), torch.tensor([[0, 1]])
    assert beam_search(model, ids, num_beams=7, max_new_tokens=5).shape == (1, 7)
    text = beam_search(model, ids, num_beams=7, max_new_tokens=6, no_repeat_ngram_size=2, stop=2)[0].tolist()
    assert text[:2] == [0, 1] and text[-1] == 2
    with pytest.raises(GenerateError, match="no_repeat_ngram_size=1 leaves no token"):
        beam_search(model, ids, num_beams=2, max_new_tokens=3, no_repeat_ngram_size=1)


# ---- errors ----


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: without the checks of shapes that the tests switch on."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
RNG = rng_for(0)
WRONG_PROMPTS = [
    ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty, .*end token"),
    ({"ids": torch.zeros(0, 3, dtype=torch.int64)}, "the prompt is empty"),
    ({"ids": [1, 2, 3]}, "ids are list, expected int64 of shape .b, t."),
    ({"ids": torch.tensor([1, 2, 3])}, r"ids are torch.int64 of shape \(3,\)"),
    ({"ids": torch.tensor([[1.0, 2.0]])}, "ids are torch.float32"),
    ({"ids": torch.tensor([[1, VOCAB]])}, f"ids go from 1 to {VOCAB}, the vocabulary from 0 to {VOCAB - 1}"),
    ({"ids": torch.tensor([[-1, 3]])}, "ids go from -1 to 3"),
    ({"ids": IDS.to("meta")}, "ids are on meta, the model on cpu"),
    ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be as ids, of shape \(2, 3\)"),
    ({"attention_mask": [[1, 1, 1]] * 2}, "attention_mask must be as ids"),
    ({"attention_mask": 2 * torch.ones(2, 3)}, "1 for a token, 0 for padding"),
    ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "row 1 is all padding"),
    ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "row 0 has padding after a token: it belongs on"),
    ({"attention_mask": torch.tensor([[0, 1, 1], [1, 0, 1]])}, "row 1 has padding after a token"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number from 1 on"),
    ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
    ({"stop": VOCAB}, f"stop is {VOCAB}: it is one id, from 0 to {VOCAB - 1}"),
    ({"stop": -1}, "stop is -1"),
    ({"stop": [3]}, r"stop is \[3\]"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be a number"),
    ({"repetition_penalty": -1.5}, "repetition_penalty is -1.5"),
    ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
    ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5"),
]  # fmt: skip
WRONG_SAMPLING = [
    ({"rng": None}, "rng is None, and tokens are drawn with a torch.Generator: pass one"),
    ({"rng": 0}, "rng is 0"),
    ({"temperature": -0.5}, "temperature is -0.5: it must be 0 or a number from"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": 1e-30}, "temperature is 1e-30"),
    ({"temperature": "1"}, "temperature is '1'"),
    ({"temperature": None}, "temperature is None"),
    ({"top_k": 0}, "top_k is 0: it must be None or a whole number from 1 on"),
    ({"top_k": 2.0}, "top_k is 2.0"),
    ({"top_k": True}, "top_k is True"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": 1.1}, "min_p is 1.1: it must be None or a number from 0 to 1"),
    ({"topk": 3}, "there is no setting 'topk': choose from .*top_k"),
    ({"do_sample": True}, "there is no setting 'do_sample'"),
    ({"num_beams": 3}, "num_beams is a setting of beam_search"),
]
WRONG_BEAMS = [
    ({"num_beams": 0}, "num_beams is 0"),
    ({"num_beams": 2.0}, "num_beams is 2.0"),
    ({"num_beams": 1001}, "num_beams is 1001: it must be a whole number from 1 to 1000"),
    ({"length_penalty": math.inf}, "length_penalty is inf"),
    ({"early_stopping": "always"}, "early_stopping is .always.: it must be .never. or True or False"),
    ({"early_stopping": 1}, "early_stopping is 1"),
    ({"max_new_tokens": 30}, "3 ids and 30 new ones do not fit into the context of 32"),
    ({"ids": torch.ones(1, 33, dtype=torch.int64)}, "33 ids and 29 new ones do not fit"),
]


def assert_refused(call, message, **arguments):
    with pytest.raises(GenerateError, match=message) as error:
        call(**arguments)
    assert isinstance(error.value, CourseError) and "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "message"), WRONG_PROMPTS, ids=str)
def test_prompts_and_settings_that_are_refused(unchecked, change, message):
    model = model_of("errors")
    good = {"model": model, "ids": IDS, "max_new_tokens": 4}
    generate(**good, rng=RNG), beam_search(**good, num_beams=2)
    assert_refused(generate, message, **{**good, "rng": RNG, **change})
    assert_refused(beam_search, message, **{**good, "num_beams": 2, **change})
    one_row = {
        name: value[1:] if torch.is_tensor(value) and len(value) == 2 else value for name, value in change.items()
    }
    if "row 0" not in message:
        message = message.replace("row 1", "row 0").replace(r"\(2, 3\)", r"\(1, 3\)")
        assert_refused(stream, message, **{**good, "ids": IDS[1:], "rng": RNG, **one_row})


@pytest.mark.parametrize(("change", "message"), WRONG_SAMPLING, ids=str)
def test_ways_of_sampling_that_are_refused(unchecked, change, message):
    model = model_of("errors")
    for call, ids in ((generate, IDS), (stream, IDS[:1])):
        assert_refused(call, message, **{"model": model, "ids": ids, "max_new_tokens": 4, "rng": RNG, **change})
    if change.keys() <= {"temperature", "top_k", "top_p", "min_p"}:
        assert_refused(filter_logits, message, **{"logits": torch.zeros(1, 4), **change})


@pytest.mark.parametrize(("change", "message"), WRONG_BEAMS, ids=str)
def test_beam_searches_that_are_refused(unchecked, change, message):
    good = {"model": model_of("errors"), "ids": IDS, "max_new_tokens": 29, "num_beams": 2}
    beam_search(**good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is refused is not warned of besides
        assert_refused(beam_search, message, **{**good, **change})


def test_functions_of_logits_refuse_alike(unchecked):
    logits = torch.zeros(2, VOCAB)
    assert_refused(filter_logits, "temperature is 0, .*argmax", logits=logits, temperature=0)
    assert_refused(penalize_repetition, "repetition_penalty is 0", logits=logits, ids=IDS, penalty=0)
    assert_refused(forbid_repeated_ngrams, "no_repeat_ngram_size is -2", logits=logits, ids=IDS, n=-2)
    assert_refused(next_token, "rng is None", logits=logits, ids=IDS)
    assert_refused(stream, "ids hold 2 rows", model=model_of("errors"), ids=IDS, max_new_tokens=2, temperature=0)


def test_spoilt_weights_are_told():
    model = model_of("nan")
    with torch.no_grad():
        model.wte.weight[7, 0] = math.nan
    for call in (generate, beam_search):
        settings = {"temperature": 0} if call is generate else {"num_beams": 2}
        assert_refused(call, "logits are NaN or infinite", model=model, ids=IDS, max_new_tokens=3, **settings)
