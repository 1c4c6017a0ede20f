"""Metrics of language: closed forms, naive twins, hand-worked cases, refusals."""

import importlib.util
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_course import metrics
from aigc_course.metrics import bits_per_character, distinct_n, longest_copied_span, perplexity, text
from aigc_course.runtime import CourseError, rng_for

pytestmark = pytest.mark.usefixtures("one_thread")
LN2 = math.log(2)
probabilities = st.lists(st.floats(1e-6, 1), min_size=1, max_size=30)


def nats_of(*p: float) -> torch.Tensor:
    return -torch.tensor(p, dtype=torch.float64).log()


# ---- prediction ----


@pytest.mark.parametrize("vocabulary", [1, 2, 50257])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(vocabulary):
    assert perplexity(nats_of(*[1 / vocabulary] * 7)) == pytest.approx(vocabulary)


@given(probabilities)
@settings(deadline=None, max_examples=50)
def test_perplexity_is_the_inverse_of_the_geometric_mean(p):
    assert perplexity(nats_of(*p)) == pytest.approx(math.prod(p) ** (-1 / len(p)), rel=1e-9)


def test_perplexity_is_no_mean_over_batches():
    """One token in a batch of its own does not weigh as much as the three of the other batch."""
    small, large = nats_of(1 / 256), nats_of(1 / 2, 1 / 2, 1 / 4)
    whole = torch.cat([small, large])
    assert perplexity(whole) == pytest.approx(2 ** ((8 + 1 + 1 + 2) / 4))  # 8
    assert math.exp((small.mean() + large.mean()) / 2) == pytest.approx(2 ** ((8 + 4 / 3) / 2))  # 25.4
    assert (perplexity(small) + perplexity(large)) / 2 == pytest.approx((256 + 2 ** (4 / 3)) / 2)  # 129.3
    halves = whole[:2], whole[2:]  # in equal batches, exp of the mean of means is right; the mean of exps never is
    assert perplexity(whole) == pytest.approx(math.exp((halves[0].mean() + halves[1].mean()) / 2))
    assert perplexity(whole) < 0.9 * (perplexity(halves[0]) + perplexity(halves[1])) / 2


def test_bits_of_a_uniform_code():
    assert bits_per_character(nats_of(*[1 / 8] * 5), 5) == pytest.approx(3)
    assert bits_per_character(nats_of(*[1 / 8] * 5), 15) == pytest.approx(1)  # a token of three characters
    assert bits_per_character(10 * LN2, 4) == pytest.approx(2.5)  # a sum


@given(probabilities, st.integers(1, 60))
@settings(deadline=None, max_examples=50)
def test_bits_do_not_depend_on_how_the_text_is_cut(p, n_characters):
    """Tokens joined in pairs have the product of the probabilities: perplexity changes, bits per character do not."""
    nats = nats_of(*p)
    joined = torch.stack([part.sum() for part in nats.split(2)])
    bits = bits_per_character(nats, n_characters)
    assert bits == pytest.approx(bits_per_character(joined, n_characters), abs=1e-9)
    assert bits == pytest.approx(bits_per_character(nats.sum().item(), n_characters), abs=1e-9)
    assert bits == pytest.approx(math.log2(perplexity(nats)) * len(p) / n_characters, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_any_shape_and_type_is_taken_and_left_alone(shape, dtype):
    nats = (torch.arange(12.0) / 4).reshape(shape).to(dtype).requires_grad_()
    assert perplexity(nats) == pytest.approx(math.exp(5.5 / 4))
    assert bits_per_character(nats, 11) == pytest.approx(16.5 / 11 / LN2)
    assert nats.dtype == dtype and nats.requires_grad


def test_long_texts_are_summed_in_float64():
    nats = torch.full((2**24,), 0.1)
    assert bits_per_character(nats, 2**24) == pytest.approx(float(nats[0]) / LN2, rel=1e-10)
    assert perplexity(nats) == pytest.approx(math.exp(float(nats[0])), rel=1e-10)


def test_a_token_held_impossible_is_no_error():
    assert perplexity(nats_of(0.5, 0.0)) == math.inf == bits_per_character(nats_of(0.5, 0.0), 2)


def test_rounding_below_zero_is_taken():
    assert perplexity(torch.tensor([-1e-7, 1e-7])) == pytest.approx(1)


# ---- variety ----


@pytest.mark.parametrize(
    ("sequences", "n", "expected"),
    [
        (["aaaa"], 1, 1 / 4),
        (["aaaa"], 2, 1 / 3),
        (["aaaa"], 4, 1.0),
        (["abab"], 2, 2 / 3),
        (["ab", "ab"], 2, 1 / 2),
        (["ab", "ab"], 1, 2 / 4),
        (["ab", "cd"], 2, 1.0),  # two bigrams, for none reaches over: with "bc" it would be 3 of 3 as well,
        (["aa", "aa"], 2, 1 / 2),  # and here 1 of 3
        (["abc", "a", ""], 2, 1.0),  # short ones have no bigrams
        ([[1, 2, 1, 2, 1]], 3, 2 / 3),
        ([["to", "be"], ["not", "to", "be"]], 2, 2 / 3),
        ([(1, 23), (12, 3)], 2, 1.0),  # tokens are not glued together
    ],
)
def test_distinct_n_by_hand(sequences, n, expected):
    assert distinct_n(sequences, n) == pytest.approx(expected)
    assert distinct_n(iter(sequences), n) == pytest.approx(expected)


def test_distinct_n_of_tensors():
    """Rows of a tensor, whose elements are objects of their own, each with its own hash."""
    assert distinct_n(torch.tensor([[1, 2, 1, 2]]), 1) == 1 / 2
    assert distinct_n([torch.tensor([1, 2, 3]), torch.tensor([2, 3])], 2) == 2 / 3


@given(st.lists(st.text("abc", max_size=8), min_size=1, max_size=5), st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_distinct_n_against_a_naive_count(sequences, n):
    ngrams = [s[i : i + n] for s in sequences for i in range(len(s)) if i + n <= len(s)]
    if not ngrams:
        with pytest.raises(metrics.MetricError):
            distinct_n(sequences, n)
    else:
        assert distinct_n(sequences, n) == sum(g not in ngrams[:i] for i, g in enumerate(ngrams)) / len(ngrams)


# ---- copies ----

SMALL = st.text("ab，\n", max_size=25)


@given(SMALL, SMALL)
@settings(deadline=None, max_examples=300)
def test_the_longest_copy_against_every_substring(generated, corpus):
    spans = [generated[i:j] for i in range(len(generated)) for j in range(i + 1, len(generated) + 1)]
    copied = [span for span in spans if span in corpus]
    assert longest_copied_span(generated, corpus) == max(copied, key=len, default="")


@pytest.mark.parametrize(
    ("generated", "corpus", "expected"),
    [
        ("", "", ""),
        ("白日", "", ""),
        ("", "白日", ""),
        ("花落知多少", "夜来风雨声，花落知多少。", "花落知多少"),
        ("月落乌啼", "月落日，乌啼月", "月落"),  # the first of equals
        ("春眠不觉晓，处处", "觉晓，处处闻啼鸟", "觉晓，处处"),  # at the end of one, the start of the other
        ("abcd", "abxcd abc", "abc"),
        ("To be", "to be", "o be"),
        ("a\nb", "a b", "a"),
    ],
)
def test_the_longest_copy_by_hand(generated, corpus, expected):
    assert longest_copied_span(generated, corpus) == expected


def test_a_corpus_of_two_million_characters_is_searched_at_once():
    corpus = "".join(map(chr, torch.randint(0x4E00, 0x5E00, (2_000_000,), generator=rng_for("corpus")).tolist()))
    generated = corpus[77:100] + "，" + corpus[1_999_950:] + corpus[:27]
    start = time.process_time()  # not the clock on the wall: others may be at work
    assert longest_copied_span(generated, corpus) == corpus[1_999_950:]
    assert time.process_time() - start < 2


# ---- what is refused ----


@pytest.fixture(scope="module")
def plain():
    """The module as its users import it: without the checks of types, which refuse bad arguments before it does."""
    spec = importlib.util.spec_from_file_location("aigc_course.metrics.text", text.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAN, SOME = torch.tensor([1.0, math.nan, math.nan]), torch.tensor([1.0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("perplexity", (torch.zeros(0),), "nats is empty"),
        ("perplexity", (torch.zeros(3, 0),), "nats is empty"),
        ("perplexity", (NAN,), "2 of 3 numbers are NaN"),
        ("perplexity", (-SOME,), "nats holds -1: .*sign"),
        ("perplexity", (torch.tensor([-math.inf, 1.0]),), "nats holds -inf"),
        ("bits_per_character", (torch.zeros(0), 3), "nats is empty"),
        ("bits_per_character", (NAN, 3), "2 of 3 numbers are NaN"),
        ("bits_per_character", (math.nan, 3), "1 of 1 numbers are NaN"),
        ("bits_per_character", (-2.5, 3), "nats holds -2.5"),
        ("bits_per_character", (SOME, 0), "n_characters is 0"),
        ("bits_per_character", (SOME, -1), "n_characters is -1"),
        ("distinct_n", ("abc", 1), "sequences is one string"),
        ("distinct_n", (["abc"], 0), "n is 0"),
        ("distinct_n", (["abc"], 4), "there are no 4-grams"),
        ("distinct_n", ([], 1), "there are no 1-grams"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(plain, name, arguments, message):
    with pytest.raises(plain.MetricError, match=message) as refusal:
        getattr(plain, name)(*arguments)
    assert "\n" not in str(refusal.value) and isinstance(refusal.value, CourseError)


def test_all_metrics_are_in_one_place():
    assert set(metrics.__all__) >= {"frechet_distance", "perplexity", "MetricError", "longest_copied_span"}
    assert all(hasattr(metrics, name) for name in metrics.__all__)
