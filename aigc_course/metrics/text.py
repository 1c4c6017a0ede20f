"""How well a language model predicts, how varied its texts are, and how much of them is copied."""

import math
from collections.abc import Hashable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from .features import MetricError

# ---- prediction ----


def perplexity(nats: Float[Tensor, "..."]) -> float:
    """exp of the mean of ``nats``: -log p of each token, in any shape.

    It is the inverse of the geometric mean of the tokens' probabilities. Give every token of the held-out text at once
    and leave padding out: a mean of the means of batches weighs the tokens of small batches more. Figures of unlike
    tokenizers do not compare; bits per character do. Raises ``MetricError`` if ``nats`` is empty or holds a NaN or a
    number below 0.
    """
    return _nats(nats).mean().exp().item()


def bits_per_character(nats: Float[Tensor, "..."] | float, n_characters: int) -> float:
    """The sum of ``nats``, in bits, over the number of characters: it compares models whatever their tokens are.

    ``nats`` is -log p of each token, or their sum, of everything that is predicted (a text and its end, say), and
    ``n_characters`` the length of the text. Raises ``MetricError`` as ``perplexity`` does, and if ``n_characters`` is
    below 1.
    """
    if n_characters < 1:
        raise MetricError(f"n_characters is {n_characters}: a text has at least 1")
    total = nats if isinstance(nats, Tensor) else torch.tensor(nats, dtype=torch.float64)
    return _nats(total).sum().item() / (math.log(2) * n_characters)


def _nats(nats: Tensor) -> Tensor:
    """The same in float64 on the CPU, once it is known to be sound."""
    nats = nats.detach().cpu().double()
    if nats.numel() == 0:
        raise MetricError("nats is empty: expected -log p of at least one token")
    if bad := nats.isnan().sum().item():
        raise MetricError(f"nats: {bad} of {nats.numel()} numbers are NaN: did the model diverge?")
    if (least := nats.min().item()) < -1e-4:  # more than rounding
        raise MetricError(f"nats holds {least:g}: -log p is never below 0; turn the sign of log-probabilities")
    return nats


# ---- variety and copies ----


def distinct_n(sequences: Iterable[Iterable[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of the sequences, in (0, 1]; Li et al. (2016, arXiv:1510.03055, section 5.2).

    A sequence is a list of tokens, a tensor of ids, or a string, whose tokens are its characters; no n-gram reaches
    from one into the next. The figure falls as more text comes in, so compare equal amounts only. Raises
    ``MetricError`` for a single string, an ``n`` below 1, and sequences that are all shorter than ``n``.
    """
    if isinstance(sequences, str):
        raise MetricError("sequences is one string: expected a list of them, such as [text]")
    if n < 1:
        raise MetricError(f"n is {n}: an n-gram has at least 1 token")
    ngrams = []
    for sequence in sequences:
        tokens = sequence.tolist() if isinstance(sequence, Tensor) else list(sequence)
        ngrams += zip(*(tokens[i:] for i in range(n)), strict=False)
    if not ngrams:
        raise MetricError(f"there are no {n}-grams: every sequence is shorter than {n}")
    return len(set(ngrams)) / len(ngrams)


def longest_copied_span(text: str, corpus: str) -> str:
    """The longest stretch of ``text`` that occurs in ``corpus``, character for character; the first of equals, or "".

    Every character counts, punctuation and line breaks too. One search of the corpus a character of ``text``: where
    a stretch has been found, only longer ones are looked for.
    """
    longest = ""
    for start in range(len(text)):
        while start + len(longest) < len(text) and text[start : start + len(longest) + 1] in corpus:
            longest = text[start : start + len(longest) + 1]
    return longest
