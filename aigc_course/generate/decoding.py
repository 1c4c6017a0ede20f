"""Writing with a language model: one token after another, by sampling, greedily or by beam search.

Axes: b sequences, t tokens, v entries of the vocabulary. Greedy and beam search give the ids that the ``generate`` of
Hugging Face transformers gives with ``pad_token_id=eos_token_id``; the filters leave the distributions that its logits
processors leave. Prompts of unlike lengths stand in one batch with padding on the left, which a mask marks with 0.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from ..gpt2 import GPT2, Decoder, KVCache
from .checks import GenerateError, GenerateWarning, check, check_choice, check_prompt, check_rng

Logits = Float[Tensor, "b v"]
Ids = Int64[Tensor, "b t"]
Mask = Shaped[Tensor, "b t"] | None
Longer = Int64[Tensor, "b t_and_new"]
Rng = torch.Generator | None
Number = int | float
DEAD_END = "no_repeat_ngram_size={} leaves no token to go on with: take a larger one, or 0"


# ---- filters ----


def penalize_repetition(logits: Logits, ids: Ids, penalty: Number, mask: Mask = None) -> Logits:
    """Lower the logit l of every token that occurs in its row of ``ids``: l / penalty if l > 0, else l · penalty.

    Keskar et al. 2019 (CTRL, arXiv:1909.05858, section 4.1) divide either way, which would raise a negative logit.
    Tokens of ``ids`` whose ``mask`` is 0 are padding and do not count.
    """
    check(repetition_penalty=penalty)
    if penalty == 1:
        return logits
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(_among(ids, mask, logits.shape[1]), lowered, logits)


def forbid_repeated_ngrams(logits: Logits, ids: Ids, n: int, mask: Mask = None) -> Logits:
    """Set to -inf the logit of every token that would make an n-gram of its row occur again; n = 0 forbids nothing."""
    check(no_repeat_ngram_size=n)
    if n == 0 or ids.shape[1] < n:
        return logits
    ngrams = ids.unfold(1, n, 1)  # (b, t - n + 1, n)
    begun = ids[:, None, ids.shape[1] - n + 1 :]
    repeated = (ngrams[..., :-1] == begun).all(-1)
    if mask is not None:
        repeated &= mask.bool().unfold(1, n, 1).all(-1)
    return logits.masked_fill(_among(ngrams[..., -1], repeated, logits.shape[1]), -math.inf)


def _among(ids: Tensor, counts: Tensor | None, v: int) -> Tensor:
    """(b, v): whether the token is one of those in ``ids`` that count."""
    if counts is not None:
        ids = ids.masked_fill(~counts.bool(), v)  # a column of its own, cut off again
    return torch.zeros(len(ids), v + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)[:, :v]


def filter_logits(
    logits: Logits, *, temperature: Number = 1.0, top_k: int | None = None, top_p: Number | None = None,
    min_p: Number | None = None
) -> Logits:  # fmt: skip
    """Divide the logits by ``temperature``, then set to -inf those of tokens that shall not be drawn, in this order:

    * ``top_k``: less likely than the k-th most likely token (Fan et al. 2018, arXiv:1805.04833);
    * ``top_p``: outside the smallest set of tokens whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751,
      section 3.1);
    * ``min_p``: less likely than p times the most likely token (Nguyen et al. 2024, arXiv:2407.01082).

    Each sees what the one before has left, renormalised. At least one token stays.
    """
    check(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if temperature == 0:
        raise GenerateError("temperature is 0, and logits cannot be divided by it: take logits.argmax(-1), the limit")
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        outside = probs.cumsum(-1) - probs >= top_p  # the more likely ones reach p without it
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    if min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits


# ---- one step ----


def next_log_probs(model: GPT2, ids: Ids, attention_mask: Mask = None) -> Logits:
    """The log-probability, in nats, of every token to come next."""
    return _Reader(model, ids, attention_mask, stacklevel=3).next_logits().log_softmax(-1)


def next_token(
    logits: Logits, ids: Ids, mask: Mask = None, *, temperature: Number = 1.0, top_k: int | None = None,
    top_p: Number | None = None, min_p: Number | None = None, repetition_penalty: Number = 1.0,
    no_repeat_ngram_size: int = 0, rng: Rng = None
) -> Int64[Tensor, "b"]:  # fmt: skip
    """The token that goes after each row of ``ids``: drawn with ``rng`` or, at temperature 0, the most likely one."""
    logits = penalize_repetition(logits, ids, repetition_penalty, mask)
    logits = forbid_repeated_ngrams(logits, ids, no_repeat_ngram_size, mask)
    if (logits.amax(-1) == -math.inf).any():
        raise GenerateError(DEAD_END.format(no_repeat_ngram_size))
    if temperature == 0:
        return logits.argmax(-1)
    check_rng(rng)
    probs = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).softmax(-1)
    return torch.multinomial(probs.to(rng.device), 1, generator=rng)[:, 0].to(ids.device)


class _Reader:
    """A model that reads on: the prompt once, then only what is appended, for the cache holds the rest.

    A row that outgrows the model's context goes on from the last half of it: the cache is built anew, from position 0.
    """

    def __init__(self, model: GPT2, ids: Tensor, attention_mask: Tensor | None, stacklevel: int = 4):
        self.model, self.ids, self.real = model, ids, check_prompt(model, ids, attention_mask)
        self.decoder = Decoder(model) if Decoder.plain(model) else None
        self.seen = self.real.clone()  # what of it the model looks at
        size, longest = model.config.block_size, int(self.real.sum(1).max())
        if longest > size:
            message = f"the prompt has {longest} tokens, of which the model sees the last {size}, its whole context"
            warnings.warn(message, GenerateWarning, stacklevel=stacklevel)  # the line that called us
        self._look_back(size)

    @torch.inference_mode()
    def next_logits(self) -> Logits:
        """The logits of the token after the last one."""
        size = self.model.config.block_size
        if self.ids.shape[1] - self.start > size and (full := self.seen.sum(1) > size).any():
            self._look_back(max(size // 2, 1), full)
        unread = self.ids[:, self.start + self.cache.length :]
        mask = self.seen[:, self.start :].long() if self.padded else None
        with _eval_mode(self.model):
            if self.decoder and unread.shape[1] == 1 and mask is None and self.cache.length > 0:
                hidden = self.decoder.hidden(unread[:, 0], self.cache)
            else:
                hidden = self.model.hidden(unread, attention_mask=mask, cache=self.cache)[:, -1]
            logits = self.model.logits(hidden)
        if not logits.sum().isfinite():
            raise GenerateError(
                "the model's logits are NaN or infinite: its weights are spoilt, train or load it again"
            )
        return logits

    def append(self, token: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Add one token to each row or, if given, to copies of ``rows``, which then take the place of all."""
        if isinstance(rows, Tensor):
            self.cache.reorder(rows)
        self.ids = torch.cat([self.ids[rows], token[:, None]], dim=1)
        self.real, self.seen = (F.pad(mask[rows], (0, 1), value=True) for mask in (self.real, self.seen))

    def _look_back(self, n: int, rows: Tensor | slice = slice(None)) -> None:
        self.seen[rows, :-n] = False
        self.cache, self.start = KVCache(), int(self.seen.any(0).int().argmax())  # padding of all rows is not read
        self.padded = not self.seen[:, self.start :].all()


@contextmanager
def _eval_mode(model: GPT2) -> Iterator[None]:
    mode = model.training
    try:
        yield model.eval() if mode else None
    finally:
        if mode:
            model.train()


def _start(model, ids, attention_mask, max_new_tokens, stop, rng, choice) -> _Reader:
    check(max_new_tokens=max_new_tokens)
    check_choice(**choice)
    if choice.get("temperature", 1) != 0:
        check_rng(rng)
    if stop is not None and not (type(stop) is int and 0 <= stop < model.config.vocab_size):
        raise GenerateError(f"stop is {stop!r}: it is one id, from 0 to {model.config.vocab_size - 1}, or None")
    return _Reader(model, ids, attention_mask)


# ---- sampling ----


def generate(
    model: GPT2, ids: Ids, *, max_new_tokens: int, attention_mask: Mask = None, stop: int | None = None,
    rng: Rng = None, **choice: Number | None
) -> Longer:  # fmt: skip
    """Append up to ``max_new_tokens`` tokens to each row, drawn with ``rng``; ``temperature=0`` takes the most likely.

    ``choice`` is how: ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and
    ``no_repeat_ngram_size``, as for ``next_token``. After the token ``stop`` a row is filled up with it, until all end.

    Of a prompt longer than the model's context only the end is read, with a ``GenerateWarning``; where the context
    fills up on the way, writing goes on from its last half. What is returned always begins with the whole ``ids``.
    Raises ``GenerateError`` for an empty prompt, padding that is not on the left, and settings out of range.
    """
    reader = _start(model, ids, attention_mask, max_new_tokens, stop, rng, choice)
    for _ in _tokens(reader, max_new_tokens, stop, rng, choice):
        pass
    return reader.ids


def stream(
    model: GPT2, ids: Ids, *, max_new_tokens: int, attention_mask: Mask = None, stop: int | None = None,
    rng: Rng = None, **choice: Number | None
) -> Iterator[int]:  # fmt: skip
    """The ids that ``generate`` would append to the single row of ``ids``, each as soon as it is drawn."""
    reader = _start(model, ids, attention_mask, max_new_tokens, stop, rng, choice)
    if len(ids) != 1:
        raise GenerateError(f"ids hold {len(ids)} rows: stream writes one, and generate writes many at once")
    return (int(token) for token in _tokens(reader, max_new_tokens, stop, rng, choice))


def _tokens(reader: _Reader, max_new_tokens: int, stop: int | None, rng: Rng, choice: dict) -> Iterator[Tensor]:
    running = torch.ones(len(reader.ids), dtype=torch.bool, device=reader.ids.device)
    for _ in range(max_new_tokens):
        token = next_token(reader.next_logits(), reader.ids, reader.real, rng=rng, **choice)
        if stop is not None:
            token = token.where(running, stop)
            running = token != stop
        reader.append(token)
        reader.real &= running[:, None]  # a row that has stopped has nothing to repeat
        yield token
        if not running.any():
            return


# ---- beam search ----


def beam_search(
    model: GPT2, ids: Ids, *, num_beams: int, max_new_tokens: int, attention_mask: Mask = None,
    length_penalty: Number = 1.0, early_stopping: bool | str = False, repetition_penalty: Number = 1.0,
    no_repeat_ngram_size: int = 0, stop: int | None = None
) -> Longer:  # fmt: skip
    """Each row with the best continuation found by a search for high probability; rows are filled up with ``stop``.

    ``num_beams`` beginnings at a time are extended. A finished one scores its log-probability in nats, as the penalties
    leave it, divided by n ** length_penalty for n new tokens, ``stop`` among them: above 0 this favours long texts (a
    simpler form of Wu et al. 2016, arXiv:1609.08144, section 7). With ``early_stopping=True`` a row is done when
    ``num_beams`` have finished; with False when, besides, the best beginning, taken at its present length, scores no
    more than the worst of them; "never" takes it at the length that would score best. Raises ``GenerateError`` as
    ``generate`` does, and if prompt and new tokens together do not fit into the model's context.
    """
    settings = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    check(**settings, max_new_tokens=max_new_tokens)
    check_prompt(model, ids, attention_mask)
    (b, t), v, size = ids.shape, model.config.vocab_size, model.config.block_size
    if t + max_new_tokens > size:  # before a warning says that the end of them is read
        raise GenerateError(f"{t} ids and {max_new_tokens} new ones do not fit into the context of {size}: take fewer")
    penalties = {"repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size}
    reader = _start(model, ids, attention_mask, max_new_tokens, stop, None, {"temperature": 0, **penalties})
    row, end = torch.arange(b, device=ids.device)[:, None], -1 if stop is None else stop
    scores = torch.zeros(b, 1, device=ids.device)  # of the beams; at first there is one
    is_open = torch.ones_like(scores, dtype=torch.bool)
    finished = ids.new_full((b, num_beams, t + max_new_tokens), end)
    finished_scores = scores.new_full((b, num_beams), -math.inf)
    for n in range(1, max_new_tokens + 1):
        log_probs = reader.next_logits().log_softmax(-1)
        log_probs = penalize_repetition(log_probs, reader.ids, repetition_penalty, reader.real)
        log_probs = forbid_repeated_ngrams(log_probs, reader.ids, no_repeat_ngram_size, reader.real)
        totals = (scores.view(-1, 1) + log_probs).view(b, -1)
        # a beam can end in one way, so twice as many candidates leave enough to go on with
        totals, index = totals.topk(min(2 * num_beams, totals.shape[1]))
        beam, token = row * scores.shape[1] + index // v, index % v
        ends = (token == end) | (n == max_new_tokens)

        texts = F.pad(torch.cat([reader.ids[beam], token[..., None]], dim=-1), (0, max_new_tokens - n), value=end)
        counts = ends & is_open & (torch.arange(token.shape[1], device=ids.device) < num_beams)
        ended_scores = (totals / n**length_penalty).masked_fill(~counts, -math.inf)
        finished_scores, best = torch.cat([finished_scores, ended_scores], dim=1).topk(num_beams)
        finished = torch.cat([finished, texts], dim=1)[row, best]

        scores, best = totals.masked_fill(ends, -math.inf).topk(min(num_beams, totals.shape[1]))
        reader.append(token[row, best].flatten(), rows=beam[row, best].flatten())
        length, worst = n, finished_scores[:, -1:]
        if early_stopping == "never" and length_penalty > 0:
            length = max_new_tokens
        is_open &= worst.isinf() if early_stopping is True else scores[:, :1] / length**length_penalty > worst
        if not is_open.any():
            break
    if finished_scores[:, 0].isinf().any():
        raise GenerateError(DEAD_END.format(no_repeat_ngram_size))
    best = finished[:, 0]
    return best if stop is None else best[:, : t + 1 + int((best[:, t:] != stop).sum(1).max())]
