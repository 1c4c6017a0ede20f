"""Kneser-Ney: numbers worked by hand, a twin in fractions that counts anew for every question, real poems."""

import importlib.util
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_course import ngram
from aigc_course.datasets import load_poems
from aigc_course.metrics import bits_per_character
from aigc_course.ngram import NGram
from aigc_course.runtime import CourseError, rng_for

pytestmark = pytest.mark.usefixtures("one_thread")
A, B, END = 0, 1, 2
TINY = [[END, A, B, END], [END, A, A, END]]


# ---- by hand ----


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        # Bigrams: end-a twice; a-b, b-end, a-a, a-end once. Before a stand 2 different tokens, before b 1, before end
        # 2; so with D = 1/2, p_1 = (1.5, 0.5, 1.5) / 5 + 0.5 · 3/5 · 1/3 = (0.4, 0.2, 0.4).
        (END, [1.5 / 2 + 0.25 * 0.4, 0.25 * 0.2, 0.25 * 0.4]),
        (A, [0.5 / 3 + 0.5 * 0.4, 0.5 / 3 + 0.5 * 0.2, 0.5 / 3 + 0.5 * 0.4]),
        (B, [0.5 * 0.4, 0.5 * 0.2, 0.5 + 0.5 * 0.4]),
    ],
)
def test_bigrams_by_hand(context, expected):
    model = NGram(2, 3, discount=0.5).fit(TINY)
    assert model.distribution([context]).tolist() == pytest.approx(expected)
    assert model.distribution([END, B, B, context]).tolist() == pytest.approx(expected)


def test_unigrams_by_hand():
    """Order 1 counts occurrences, and not the marker in front: a 3, b 1, end 2 of 6."""
    model = NGram(1, 4, discount=0.5).fit(TINY)
    share = 0.5 * 3 / 6 / 4
    expected = [2.5 / 6 + share, 0.5 / 6 + share, 1.5 / 6 + share, share]
    assert model.distribution([END]).tolist() == pytest.approx(expected)
    assert model.log_prob([END, A, 3]).exp().tolist() == pytest.approx([expected[A], expected[3]])


def test_discounts_by_hand():
    """Four bigrams occur once and one twice: 4/6. Of the tokens, one has one predecessor and two have two: 1/5."""
    assert NGram(2, 3).fit(TINY).discounts == pytest.approx({2: 4 / 6, 1: 1 / 5})
    assert NGram(1, 3).fit(TINY).discounts == pytest.approx({1: 1 / 3})
    assert NGram(2, 3, discount=0.7).fit(TINY).discounts == {2: 0.7, 1: 0.7}


def test_where_nothing_occurs_once_there_is_a_discount_all_the_same():
    model = NGram(1, 3).fit([[END, A, A, B, B]])
    assert model.discounts == {1: 0.5} and (model.distribution([END]) > 0).all()


def test_a_continuation_count_is_no_frequency():
    """Francisco is frequent, but after San only: in a new context a rarer word of many places is more likely."""
    san, francisco, glass = 3, 4, 5
    places = [[END, word, glass, END] for word in range(6, 10)]
    sequences = [[END, san, francisco, END]] * 20 + places
    model = NGram(2, 11).fit(sequences)
    new = model.distribution([10])
    assert new[glass] > 2 * new[francisco]
    unigram = NGram(1, 11).fit(sequences).distribution([END])
    assert unigram[francisco] > 2 * unigram[glass]


def test_the_marker_fills_the_context_of_the_first_tokens():
    """After the marker only a ever came, at every order, however seldom a is elsewhere."""
    sequences = [[END, A, B, B, B, B, END]] * 5 + [[END, A, B, END]] * 5
    for order in (2, 3, 4):
        assert NGram(order, 3).fit(sequences).distribution([END])[A] > 0.9, order


# ---- a twin in fractions ----


def twin(order, vocab_size, sequences, discount, context, token):
    """p(token | context) from the definition, with every count taken anew from the sequences."""
    windows = []
    for sequence in sequences:
        long = [sequence[0]] * 9 + sequence
        windows += [tuple(long[i - order + 1 : i + 1]) for i in range(10, len(long))]

    def count(n, gram):
        if n == order:
            return windows.count(gram)
        return len({window[-n - 1 :] for window in windows if window[-n:] == gram})

    def p(n, h, w):
        if n == 0:
            return Fraction(1, vocab_size)
        shorter = p(n - 1, h[1:], w)
        total = sum(count(n, (*h, v)) for v in range(vocab_size))
        if total == 0:
            return shorter
        d = discount
        if d is None:
            counts = Counter(count(n, gram) for gram in {window[-n:] for window in windows})
            d = Fraction(counts[1], counts[1] + 2 * counts[2]) if counts[1] else Fraction(1, 2)
        followers = sum(count(n, (*h, v)) > 0 for v in range(vocab_size))
        return (max(count(n, (*h, w)) - d, 0) + d * followers * shorter) / total

    return p(order, tuple(([context[0]] * 9 + context)[10 - order :][-(order - 1) :]) if order > 1 else (), token)


corpora = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(lambda s: [4, *s]), min_size=1, max_size=4)
contexts = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@given(st.integers(1, 3), corpora, contexts, st.sampled_from([None, Fraction(1, 4), Fraction(1)]))
@settings(deadline=None, max_examples=60)
def test_every_probability_against_the_twin(order, sequences, context, discount):
    model = NGram(order, 5, discount and float(discount)).fit(sequences)
    expected = [float(twin(order, 5, sequences, discount, context, token)) for token in range(5)]
    assert model.distribution(context).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert sum(expected) == pytest.approx(1, abs=1e-12)
    whole = [*context, 0]
    steps = [twin(order, 5, sequences, discount, whole[:i], whole[i]) for i in range(1, len(whole))]
    assert model.log_prob(whole).exp().tolist() == pytest.approx([float(step) for step in steps], rel=1e-9)


# ---- real poems ----


@pytest.fixture(scope="module")
def poems():
    """Ids, character by character, of half of the other poems and of the held-out ones; the vocabulary; 0 is the end.

    The test part counts as other poems here: it shares no verse with the valid part either.
    """
    held = [poem.text for poem in load_poems("valid")]
    known = set(held)
    others = [poem.text for poem in load_poems("regulated") if poem.text not in known][::2]
    chars = sorted(set("".join(held + others)))
    ids = {char: i for i, char in enumerate(chars, start=1)}
    train, valid = ([[0, *map(ids.get, text), 0] for text in texts] for texts in (others, held))
    return train, valid, len(chars) + 1


@pytest.fixture(scope="module")
def models(poems):
    train, _, vocab_size = poems
    return {order: NGram(order, vocab_size).fit(train) for order in (1, 2, 3)}


def test_more_context_helps(models, poems):
    _, valid, _ = poems
    valid = valid[::3]
    characters = sum(len(sequence) - 2 for sequence in valid)
    bits = {
        order: bits_per_character(-torch.cat([model.log_prob(sequence) for sequence in valid]), characters)
        for order, model in models.items()
    }
    assert 9.5 < bits[1] < 9.75 and 8 < bits[2] < 8.4 and 8 < bits[3] < bits[2] - 0.05, bits


@pytest.mark.parametrize("order", [1, 2, 3])
def test_distributions_sum_to_one(models, poems, order):
    _, valid, vocab_size = poems
    for length in (1, 2, 3, 10):
        p = models[order].distribution(valid[length][:length])
        assert p.shape == (vocab_size,) and p.dtype == torch.float64
        assert p.sum().item() == pytest.approx(1, abs=1e-12) and (p > 0).all()


def test_both_roads_to_a_probability_agree(models, poems):
    sequence = poems[1][0][:20]
    for model in models.values():
        steps = [model.distribution(sequence[:i])[sequence[i]].log().item() for i in range(1, len(sequence))]
        assert model.log_prob(sequence).tolist() == pytest.approx(steps, rel=1e-9)


def test_samples_follow_the_distribution(models):
    """Characters 1 to 5 and the rest, as the first of 500 poems: chi-square with 5 degrees of freedom."""
    model, rng = models[2], rng_for("samples of bigrams")
    p = model.distribution([0])
    groups = p.topk(5).indices
    first = torch.tensor([model.sample(rng, 0, 0, 2)[1] for _ in range(500)])
    found = torch.stack([(first == token).sum() for token in groups])
    expected = 500 * torch.cat([p[groups], 1 - p[groups].sum(dim=0, keepdim=True)])
    found = torch.cat([found, 500 - found.sum(dim=0, keepdim=True)])
    assert ((found - expected).square() / expected).sum() < 25  # exceeded once in 7,000 times


def test_samples_end(models):
    model = models[3]
    whole = model.sample(rng_for("one"), 0, 0, 10**6)
    assert whole[0] == 0 == whole[-1] and 0 not in whole[1:-1] and len(whole) > 5
    assert model.sample(rng_for("one"), [0], 0, 10**6) == whole
    assert model.sample(rng_for("one"), 0, 0, 5) == whole[:5]
    assert model.sample(rng_for("one"), whole[:3], 0, 3) == whole[:3]
    assert model.sample(rng_for("one"), whole[:3], 0, 12)[:3] == whole[:3]
    assert any(model.sample(rng_for("other", i), 0, 0, 50) != whole[:50] for i in range(3))


def test_fitting_again_forgets():
    model = NGram(2, 3).fit([[END, B, B, B, END]])
    assert model.fit(TINY).distribution([A]).tolist() == NGram(2, 3).fit(iter(TINY)).distribution([A]).tolist()


def test_tensors_are_taken():
    model = NGram(3, 3).fit(torch.tensor(TINY))
    assert model.distribution(torch.tensor([END, A])).tolist() == NGram(3, 3).fit(TINY).distribution([END, A]).tolist()
    assert model.log_prob(torch.tensor(TINY[0])).tolist() == model.log_prob(TINY[0]).tolist()


# ---- what is refused ----


@pytest.fixture(scope="module")
def plain():
    """The module as its users import it: without the checks of types, which refuse bad arguments before it does."""
    spec = importlib.util.spec_from_file_location("aigc_course.ngram", ngram.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.NGram(0, 3), "order is 0"),
        (lambda m: m.NGram(2, 0), "vocab_size is 0"),
        (lambda m: m.NGram(2, 3, discount=0.0), "discount is 0.0"),
        (lambda m: m.NGram(2, 3, discount=1.1), "discount is 1.1"),
        (lambda m: m.NGram(2, 3, discount=math.nan), "discount is nan"),
        (lambda m: m.NGram(2, 3).fit([]), "nothing to count"),
        (lambda m: m.NGram(2, 3).fit([[END]]), "nothing to count"),
        (lambda m: m.NGram(2, 3).fit([[END, A], []]), "a sequence is empty"),
        (lambda m: m.NGram(2, 3).fit([END, A]), "a sequence is a list of token ids"),
        (lambda m: m.NGram(2, 3).fit(["ab"]), "a sequence is a list of token ids"),
        (lambda m: m.NGram(2, 3).fit([[END, 3]]), "ids go from 2 to 3: expected 0 to 2"),
        (lambda m: m.NGram(2, 3).fit([[END, -1]]), "ids go from -1 to 2"),
        (lambda m: m.NGram(2, 3).fit([[END, 1.0]]), "a sequence is a list of token ids"),
        (lambda m: m.NGram(2, 3).fit(TINY).log_prob([END, 3]), "ids go from 2 to 3"),
        (lambda m: m.NGram(2, 3).fit(TINY).log_prob([]), "a sequence is empty"),
        (lambda m: m.NGram(2, 3).fit(TINY).distribution([]), "a sequence is empty"),
        (lambda m: m.NGram(2, 3).log_prob([END, A]), "call fit first"),
        (lambda m: m.NGram(1, 3).distribution([END]), "call fit first"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(plain, call, message):
    with pytest.raises(plain.NGramError, match=message) as refusal:
        call(plain)
    assert "\n" not in str(refusal.value) and isinstance(refusal.value, CourseError)


def test_the_marker_alone_has_nothing_to_predict():
    assert NGram(2, 3).fit(TINY).log_prob([END]).shape == (0,)
