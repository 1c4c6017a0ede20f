"""n-gram models with interpolated Kneser-Ney smoothing: what counting can do, and the line that networks must beat.

Kneser and Ney (1995, Improved backing-off for m-gram language modeling, ICASSP, 181-184), in the interpolated form of
Chen and Goodman (1999, An empirical study of smoothing techniques for language modeling, Computer Speech & Language
13, 359-394).
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import torch
from jaxtyping import Float64
from torch import Generator, Tensor

from .runtime import CourseError

Context = tuple[int, ...]


class NGramError(CourseError):
    """Tokens or settings that cannot be counted with."""


class NGram:
    """p(token | the ``order`` - 1 tokens before it), for ids from 0 to ``vocab_size`` - 1.

    For n from 1 to ``order``, and a context h of n - 1 tokens,

        p_n(w | h) = (max(c(h, w) - D, 0) + D N(h) p_{n-1}(w | h')) / c(h)

    where c(h) is the sum of c(h, w) over all w, N(h) the number of different w that follow h, and h' is h without its
    first token; where h never occurred, p_n(w | h) = p_{n-1}(w | h'). At the highest order c(h, w) is how often h, w
    occurs, so order 1 is the unigram; at the orders below, how many different tokens occur before h, w. The end is
    p_0(w) = 1 / ``vocab_size``: nothing has probability 0, and every distribution sums to 1.

    ``discount`` is D at all orders, in (0, 1]. ``None`` gives each order its own, n1 / (n1 + 2 n2), where n1 and n2 are
    the numbers of n-grams whose c is 1 and 2; where none is 1, it is 0.5.

    A sequence begins with a marker that is not predicted, such as the id of ``<|endoftext|>``. To give the first tokens
    a full context too, it counts as repeated in front.
    """

    def __init__(self, order: int, vocab_size: int, discount: float | None = None) -> None:
        if order < 1 or vocab_size < 1:
            raise NGramError(f"order is {order}, vocab_size is {vocab_size}: both are at least 1")
        if discount is not None and not 0 < discount <= 1:
            raise NGramError(f"discount is {discount}: it must lie in (0, 1]")
        self.order, self.vocab_size, self.discount = order, vocab_size, discount
        self.counts: dict[int, dict[Context, dict[int, int]]] = {}  # counts[n][h][w] is c(h, w)
        self.totals: dict[int, dict[Context, int]] = {}  # totals[n][h] is c(h)
        self.discounts: dict[int, float] = {}

    def fit(self, sequences: Iterable[Iterable[SupportsIndex]]) -> "NGram":
        """Count the n-grams of ``sequences``, lists of ids with their markers; returns the model itself."""
        ngrams = Counter()
        for sequence in sequences:
            tokens = self._padded(sequence)
            ngrams.update(zip(*(tokens[i:] for i in range(self.order)), strict=False))
        if not ngrams:
            raise NGramError("there is nothing to count: every sequence needs a marker and at least one token after it")
        for n in range(self.order, 0, -1):
            counts: dict[Context, dict[int, int]] = {}
            for ngram, count in ngrams.items():
                counts.setdefault(ngram[:-1], {})[ngram[-1]] = count
            self.counts[n], self.totals[n] = counts, {h: sum(c.values()) for h, c in counts.items()}
            n1, n2 = (sum(count == times for count in ngrams.values()) for times in (1, 2))
            self.discounts[n] = self.discount or (n1 / (n1 + 2 * n2) if n1 else 0.5)
            ngrams = Counter(ngram[1:] for ngram in ngrams)  # an n-gram counts once, however often it occurred
        return self

    def log_prob(self, sequence: Iterable[SupportsIndex]) -> Float64[Tensor, "n"]:
        """log p, in nats, of every token of ``sequence`` but the first, given all that stand before it."""
        tokens, length = self._padded(sequence), self.order - 1
        logs = [math.log(self._prob(tokens[i - length : i], tokens[i])) for i in range(length, len(tokens))]
        return torch.tensor(logs, dtype=torch.float64)

    def _prob(self, context: Context, token: int) -> float:
        p = 1 / self.vocab_size
        for counts, total, discount in self._levels(context):
            p = (max(counts.get(token, 0) - discount, 0) + discount * len(counts) * p) / total
        return p

    def distribution(self, context: Iterable[SupportsIndex]) -> Float64[Tensor, "vocab"]:
        """p of every id after ``context``: a sequence so far, from its marker on, of which the last tokens count."""
        tokens = self._padded(context)
        p = torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)
        for counts, total, discount in self._levels(tokens[len(tokens) - self.order + 1 :]):
            followers, found = torch.tensor(list(counts)), torch.tensor(list(counts.values()), dtype=torch.float64)
            p *= discount * len(counts) / total
            p[followers] += (found - discount) / total
        return p

    def sample(self, rng: Generator, start: int | Iterable[int], end: int, max_length: int) -> list[int]:
        """A sequence that goes on from ``start``, a marker or a list that begins with one, token by token.

        It holds ``start``, and ends with the first ``end`` drawn, or with ``max_length`` tokens in all.
        """
        tokens = [start] if isinstance(start, int) else list(start)
        while len(tokens) < max_length:
            tokens.append(torch.multinomial(self.distribution(tokens), 1, generator=rng).item())
            if tokens[-1] == end:
                break
        return tokens

    def _levels(self, context: Context) -> Iterator[tuple[dict[int, int], int, float]]:
        """What is known of the tokens after ``context`` at each order, from 1 up: their counts, the sum, and D."""
        if not self.counts:
            raise NGramError("the model has counted nothing yet: call fit first")
        for n in range(1, self.order + 1):
            h = context[self.order - n :]
            if h in self.counts[n]:
                yield self.counts[n][h], self.totals[n][h], self.discounts[n]

    def _padded(self, sequence: Iterable[SupportsIndex]) -> Context:
        """The ids with as many markers in front as a context holds tokens; of order 1, none."""
        try:
            tokens = [operator.index(token) for token in sequence]
        except TypeError as error:
            raise NGramError(f"a sequence is a list of token ids, whole numbers ({error})") from error
        if not tokens:
            raise NGramError("a sequence is empty: it begins with a marker, such as the id of <|endoftext|>")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise NGramError(f"ids go from {min(tokens)} to {max(tokens)}: expected 0 to {self.vocab_size - 1}")
        return (tokens[0],) * (self.order - 1) + tuple(tokens[1:])
