"""Exercises of lesson 06: reading through a cache, choosing tokens, and what the choice does to a text.

Axes: b texts, t or n tokens, v entries of the vocabulary; log-probabilities and surprise in nats.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..generate import filter_logits
from ..gpt2 import GPT2, GPT2Config, KVCache
from .exercise import Function, Goal, Mistake, Number, Wrong

# ---- 6.1: the position of a token ----


def _positions(real: Tensor, past: int) -> Tensor:
    return (real.cumsum(1) - 1).clamp_min(0)[:, past:]


def _mask_cases(rng: torch.Generator) -> list[tuple[Tensor, int]]:
    def mask(width: int, padding: Sequence[int]) -> Tensor:
        rows = torch.arange(width) >= torch.tensor(padding)[:, None]
        return rows[torch.randperm(len(padding), generator=rng)].long()

    more = int(torch.randint(0, 4, (), generator=rng))
    return [
        (mask(6 + more, (0, 2, 4, 5)), 0),  # the prompt
        (mask(8 + more, (0, 3, 6)), 7 + more),  # one new token
        (mask(7, (5, 1)), 4),  # several, padding among them
        (mask(7 + more, (0,)), 5),
    ]


check_positions = Function(
    number="6.1",
    title="The position of a token",
    kind="by hand",
    reference=_positions,
    cases=_mask_cases,
    praise="One sum along each row is all that a batch of unlike texts and a cache need.",
    mistakes=[
        Mistake(
            "starts-again",
            "You count the real tokens among the new columns only, so the first token after a cache gets position 0 "
            "however much the model has read. Count from the beginning of the text, then keep the new columns.",
            lambda real, past: _positions(real[:, past:], 0),
        ),
        Mistake(
            "columns-again",
            "These are the numbers of the columns handed in by this call, the same in every row. They know neither how "
            "much lies in the cache nor where a text begins.",
            lambda real, past: torch.arange(real.shape[1] - past).expand(len(real), -1),
        ),
        Mistake(
            "counts-padding",
            "You number the columns, and padding takes a number too: a short text then begins at a position other "
            "than 0 and reads other position embeddings than it would alone.",
            lambda real, past: torch.arange(past, real.shape[1]).expand(len(real), -1),
        ),
        Mistake(
            "from-one",
            "The first real token of each text has position 1 in your answer. The table of positions starts at row 0, "
            "and so does a text that is read alone.",
            lambda real, past: real.cumsum(1)[:, past:],
        ),
        Mistake(
            "negative",
            "Real tokens are right, but padding gets position −1, for which the table of position embeddings has no "
            "row. The task asks for 0 there.",
            lambda real, past: (real.cumsum(1) - 1)[:, past:],
        ),
        Mistake(
            "all-columns",
            "These are the positions of the cached tokens and of the new ones. The cache has read its own already: "
            "only the new columns are asked for.",
            lambda real, past: _positions(real, 0),
        ),
        Mistake(
            "over-rows",
            "You count down the batch, from one text to the next. Which axis of the mask is time?",
            lambda real, past: (real.cumsum(0) - 1).clamp_min(0)[:, past:],
        ),
    ],
)


# ---- 6.2: texts of unlike lengths in one batch ----


def _read_alone(model: GPT2, beginnings: list[Tensor], further: Tensor) -> Tensor:
    """Each text for itself, without a cache."""
    pairs = zip(beginnings, further, strict=True)
    return torch.stack([model(torch.cat([ids, new])[None])[0, len(ids) - 1 :] for ids, new in pairs])


def _read_together(
    model: GPT2, beginnings: list[Tensor], further: Tensor, *, right: bool = False, mask: str = "goes on"
) -> Tensor:
    """All in one batch, with padding left or ``right`` and the ``mask`` treated in one way or another."""
    width = max(map(len, beginnings))
    sides = [(0, width - len(ids)) if right else (width - len(ids), 0) for ids in beginnings]
    batch = torch.stack([F.pad(ids, side) for ids, side in zip(beginnings, sides, strict=True)])
    real = torch.stack([F.pad(torch.ones_like(ids), side) for ids, side in zip(beginnings, sides, strict=True)])
    real = 1 - real if mask == "turned round" else real
    cache = KVCache()
    found = [model(batch, attention_mask=None if mask == "none" else real, cache=cache)[:, -1]]
    for new in further.unbind(1):
        real = F.pad(real, (0, 1), value=int(mask not in ("turned round", "goes on with 0")))
        kept = real if mask in ("goes on", "turned round", "goes on with 0") else None
        again = mask == "dropped with the cache"
        found.append(model(new[:, None], attention_mask=kept, cache=None if again else cache)[:, -1])
    return torch.stack(found, 1)


def _reading_cases(rng: torch.Generator) -> list[tuple[GPT2, list[Tensor], Tensor]]:
    config = GPT2Config(vocab_size=23, block_size=40, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
    model = GPT2(config, rng).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0, 0.3, generator=rng)  # large enough for positions to matter

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 23, shape, generator=rng)

    return [(model, [ids(n) for n in lengths], ids(len(lengths), 4)) for lengths in ((7, 3, 12, 1), (5,), (2, 9))]


@torch.no_grad()
def _without_gradients(function, *arguments):
    return function(*arguments)


check_reading = Function(
    number="6.2",
    title="Texts of unlike lengths in one batch",
    kind="repair",
    reference=_read_alone,
    cases=_reading_cases,
    outcome=_without_gradients,
    atol=1e-3,
    rtol=1e-3,
    praise="Each row has the logits that its text has alone.",
    mistakes=[
        Mistake(
            "both",
            "Both mistakes are still there. Look at what stands in the last column of a short text, and at what the "
            "second call of the model is told about padding.",
            partial(_read_together, right=True, mask="dropped"),
        ),
        Mistake(
            "padding-right",
            "Only the first logits of the short texts are wrong now: they are taken from a column of padding, not from "
            "the last token of the text.",
            partial(_read_together, right=True),
        ),
        Mistake(
            "mask-dropped",
            "The beginnings are read rightly, and every token after them wrongly: in those calls the model is not told "
            "what in the cache is padding, so it attends to it and counts it as positions.",
            partial(_read_together, mask="dropped"),
        ),
        Mistake(
            "no-mask",
            "The model never hears what is padding: it reads it as tokens, and a short text begins at the position of "
            "its column. A text of full length does not notice, so test with a short one.",
            partial(_read_together, mask="none"),
        ),
        Mistake(
            "starts-again",
            "After the beginning each token is read as if it were the first: at position 0, with nothing before it. "
            "What was read before lies in one cache, which has to be the same in all calls.",
            partial(_read_together, mask="dropped with the cache"),
        ),
        Mistake(
            "mask-reversed",
            "The mask is the wrong way round: the model attends to padding and to nothing else. In this package, as in "
            "transformers, which number stands for a token?",
            partial(_read_together, mask="turned round"),
        ),
        Mistake(
            "new-masked",
            "You let the mask grow, but with 0: the new tokens count as padding, stay at one position and do not see "
            "each other. (F.pad fills with 0 unless it is told otherwise.)",
            partial(_read_together, mask="goes on with 0"),
        ),
    ],
)


# ---- 6.3: temperature, then the nucleus ----

EIGHT = (0.64, 0.16, 0.09, 0.04, 0.04, 0.01, 0.01, 0.01)  # the card in the lesson has them, and both settings
WARM, NUCLEUS = 2.0, 0.75


def _top_share(power: float, keep: int) -> float:
    """The share of the first of ``EIGHT``, raised to ``power``, in the sum of the first ``keep``."""
    return EIGHT[0] ** power / sum(p**power for p in EIGHT[:keep])


check_nucleus = Number(
    number="6.3",
    title="Warmer, then cut",
    kind="prediction",
    truth=lambda: filter_logits(torch.tensor([EIGHT]).log(), temperature=WARM, top_p=NUCLEUS).softmax(-1).max().item(),
    rtol=0.01,
    praise="At this temperature it takes four tokens to reach P; at T = 1 two would do.",
    mistakes=[
        Mistake(
            "filter-first",
            "This is what comes out if the set is chosen by the probabilities at temperature 1 and the temperature is "
            "applied to what is left. Here the temperature comes first, and it decides how many tokens it takes.",
            _top_share(1 / WARM, 2),
        ),
        Mistake(
            "crossing-dropped",
            "You dropped the token with which the sum passes P, so less than P is left. The nucleus is the smallest "
            "set that reaches P, and the token that makes it do so belongs to it.",
            _top_share(1 / WARM, 3),
        ),
        Mistake(
            "not-renormalised",
            "That is the probability at this temperature before the cut. Those of the tokens that are kept have to sum "
            "to one again.",
            _top_share(1 / WARM, len(EIGHT)),
        ),
        Mistake(
            "multiplied",
            "You have one token left. Logits multiplied by T raise the probabilities to the power T, and the first "
            "reaches P alone; a temperature above 1 makes it less likely, not more.",
            _top_share(WARM, 1),
        ),
        Mistake(
            "no-temperature",
            "This is the nucleus at temperature 1, renormalised. What does T do before the set is chosen?",
            _top_share(1.0, 2),
        ),
        Mistake(
            "nothing-done",
            "This is the probability that the model gave, before the temperature and before the cut.",
            EIGHT[0],
        ),
        Mistake("percent", "That looks like per cent: give a number between 0 and 1.", 100 * _top_share(1 / WARM, 4)),
    ],
)


# ---- 6.4: a filter of one's own ----

TAIL, LIMIT = 0.15, 0.03


def tail_rows(rng: torch.Generator, n: int = 64, v: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2 n, v) of a model that gives ``TAIL`` of each distribution to nonsense; which tokens make sense; and
    which rows are sharp, with 1 to 4 of those, while the others have 60 to 200."""
    sharp = torch.arange(2 * n) % 2 == 0
    few, many = (torch.randint(*bounds, (2 * n,), generator=rng) for bounds in ((1, 5), (60, 201)))
    order = torch.rand(2 * n, v, generator=rng, dtype=torch.float64).argsort(1).argsort(1)
    sense = order < few.where(sharp, many)[:, None]
    weights = (0.4 * torch.randn(2 * n, v, generator=rng, dtype=torch.float64)).exp()
    inside, outside = weights * sense, weights * ~sense
    probs = (1 - TAIL) * inside / inside.sum(1, keepdim=True) + TAIL * outside / outside.sum(1, keepdim=True)
    return probs.log() + torch.randn(2 * n, 1, generator=rng, dtype=torch.float64), sense, sharp


def _measure_tail(exercise: Goal, rule) -> None:
    if not callable(rule):
        raise Wrong("the answer is not a function: hand over a function of the logits, without calling it")
    rng = torch.Generator()
    rng.seed()
    logits, sense, sharp = tail_rows(rng)
    found = rule(logits.clone())
    if not isinstance(found, Tensor) or found.shape != logits.shape:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise Wrong(f"your rule returns {what}: probabilities of the shape {tuple(logits.shape)} are asked for")
    found = found.detach().double()
    empty = ~found.isfinite().all(1) | (found == 0).all(1)
    if empty.any():
        raise exercise.wrong("nothing-left", f"({empty.double().mean():.0%} of the rows)")
    sums = found.sum(1)
    if found.min() < 0 or (sums - 1).abs().max() > 1e-3:
        raise exercise.wrong("no-distribution", f"(sums from {sums.min():.3g} to {sums.max():.3g})")

    def given(those: Tensor) -> Tensor:
        """The model's probabilities, conditioned on ``those``."""
        return logits.masked_fill(~those, -math.inf).softmax(1)

    def in_both(values: Tensor) -> list[float]:
        return [values[rows].mean().item() for rows in (sharp, ~sharp)]

    far, bent = (in_both(0.5 * (found - given(those)).abs().sum(1)) for those in (sense, found > 0))
    tail, lost = in_both((found * ~sense).sum(1)), in_both((given(sense) * (found == 0)).sum(1))
    if max(far) <= LIMIT:
        return
    figures = f"(sharp rows {far[0]:.3g} away, flat rows {far[1]:.3g}; at most {LIMIT} is asked for)"
    if min(tail) > 0.8 * TAIL:
        raise exercise.wrong("tail-kept", figures)
    if max(bent) > LIMIT:
        raise exercise.wrong("proportions", figures)
    if max(lost) > max(tail):
        raise exercise.wrong("too-few", f"({max(lost):.0%} lost) {figures}")
    raise exercise.wrong("same-number" if tail[0] > 1.05 * tail[1] else "too-wide", figures)


check_tail = Goal(
    number="6.4",
    title="Cut the tail, keep the rest",
    kind="open",
    measure=_measure_tail,
    praise="Your rule cuts the tail of sharp and of flat distributions alike.",
    mistakes=[
        Mistake(
            "tail-kept",
            "The nonsense still has nearly all of its probability: what your rule does leaves the tail in place.",
        ),
        Mistake(
            "too-few",
            "Your rule gives no probability to tokens that make sense: it takes too few. Look at a flat row, where "
            "more than a hundred may be in use, and none of them is likely.",
        ),
        Mistake(
            "same-number",
            "Nonsense is still kept, and more of it in sharp rows than in flat ones: it seems that as many tokens stay "
            "where three make sense as where a hundred do. Let the distribution decide how many stay.",
        ),
        Mistake(
            "too-wide",
            "Nonsense is still kept, and in flat rows no less than in sharp ones: the kind of rule may do, but its "
            "bound is too generous.",
        ),
        Mistake(
            "no-distribution",
            "What your rule returns are not probabilities: each row has to be at least 0 everywhere and to sum to 1 "
            "over the vocabulary.",
        ),
        Mistake(
            "nothing-left",
            "In some rows your rule keeps no token at all, and there is nothing to draw. Think of a row whose first "
            "token has more than your bound all by itself.",
        ),
        Mistake(
            "proportions",
            "Among the tokens that your rule keeps, the proportions are not the model's. A filter conditions on a set; "
            "it levels or sharpens nothing inside of it.",
        ),
    ],
)


# ---- 6.5: surprise and temperature ----


def _variance(logits: Tensor, temperature: float) -> Tensor:
    drawn = (logits / temperature).softmax(-1)
    return (drawn * (logits - (drawn * logits).sum(-1, keepdim=True)) ** 2).sum(-1)


def _temperature_cases(rng: torch.Generator) -> list[tuple[Tensor, float]]:
    def case(b: int, v: int, low: float, high: float) -> tuple[Tensor, float]:
        logits = 1.5 * torch.randn(b, v, generator=rng, dtype=torch.float64) + 1.0
        return logits, low + (high - low) * torch.rand((), generator=rng).item()

    return [case(3, 7, 0.5, 0.8), case(1, 5, 1.3, 2.5), case(6, 4, 1.3, 2.5)]


check_surprise = Function(
    number="6.5",
    title="What warmth does to surprise",
    kind="derivation",
    reference=lambda logits, temperature: _variance(logits, temperature) / temperature**2,
    cases=_temperature_cases,
    praise="A higher temperature never makes a text less surprising to the model that wrote it.",
    mistakes=[
        Mistake(
            "entropy-slope",
            "This is the slope of the entropy of the distribution that is drawn from, as in (6.6). The surprise is "
            "measured with p, at temperature 1, so only the weights of the mean depend on T.",
            lambda logits, temperature: _variance(logits, temperature) / temperature**3,
        ),
        Mistake(
            "falls",
            "The size is right, and the sign says that warmer texts surprise less. There are two minus signs on the "
            "way: surprise is minus a logarithm, and β falls as T rises.",
            lambda logits, temperature: -_variance(logits, temperature) / temperature**2,
        ),
        Mistake(
            "by-beta",
            "This is the slope with respect to β = 1/T, which falls where T rises: see to the sign as well when you go "
            "over to T.",
            lambda logits, temperature: -_variance(logits, temperature),
        ),
        Mistake(
            "no-chain-rule",
            "The variance is right, and stands alone. The mean is a function of β, and β one of T: the derivative of β "
            "with respect to T is a factor that is missing.",
            _variance,
        ),
        Mistake(
            "under-p",
            "The variance is taken under p, but tokens are drawn at temperature T: with what weights is the mean of "
            "the surprise taken?",
            lambda logits, temperature: _variance(logits, 1.0) / temperature**2,
        ),
        Mistake(
            "no-mean",
            "This is the mean of the squared logits, which changes when a constant is added to all of them, and the "
            "slope must not. A variance measures from the mean.",
            lambda logits, temperature: ((logits / temperature).softmax(-1) * logits**2).sum(-1) / temperature**2,
        ),
        Mistake(
            "scaled-logits",
            "You divided by T twice: the logits inside of your variance are divided by T already. Which quantity has "
            "β as its factor in the exponent?",
            lambda logits, temperature: _variance(logits, temperature) / temperature**4,
        ),
        Mistake(
            "unweighted",
            "Your variance counts all tokens alike. The likely ones are drawn more often.",
            lambda logits, temperature: logits.var(-1, correction=0) / temperature**2,
        ),
    ],
)


# ---- 6.6: the score of a text ----


def _score(
    log_probs: Tensor, tokens: Tensor, stop: int, alpha: float, *, summed: str = "text", length: str = "text",
    sign: int = 1
) -> Tensor:  # fmt: skip
    """Sum over ``n ** alpha``; both over the "text" with its stop, the "words" before that or "all" columns."""
    chosen = log_probs.gather(2, tokens[..., None])[..., 0]
    is_stop = tokens == stop
    counted = {"text": is_stop.cumsum(1) - is_stop.long() == 0, "words": ~is_stop, "all": torch.ones_like(is_stop)}
    return (chosen * counted[summed]).sum(1) / counted[length].sum(1) ** (sign * alpha)


def _finished_cases(rng: torch.Generator) -> list[tuple[Tensor, Tensor, int, float]]:
    def case(n: int, v: int, stops: Sequence[int | None], alpha: float) -> tuple[Tensor, Tensor, int, float]:
        stop = int(torch.randint(0, v, (), generator=rng))
        tokens = (stop + torch.randint(1, v, (len(stops), n), generator=rng)) % v  # any but the stop
        for row, place in zip(tokens, stops, strict=True):
            row[n if place is None else place :] = stop
        log_probs = torch.randn(len(stops), n, v, generator=rng, dtype=torch.float64).log_softmax(-1)
        return log_probs, tokens, stop, alpha + 0.2 * torch.rand((), generator=rng).item()

    return [case(7, 9, (None, 6, 1, 3), 0.5), case(6, 5, (2,), 1.5), case(5, 11, (3, None), 1.5)]


check_score = Function(
    number="6.6",
    title="The score of a finished text",
    kind="by hand",
    reference=_score,
    cases=_finished_cases,
    praise="These are the scores by which beam search ranks what it has put aside.",
    mistakes=[
        Mistake(
            "filling-counts",
            "You count the columns that only fill up a row. A text ends with its first stop token; what stands after "
            "it was never predicted.",
            partial(_score, summed="all", length="all"),
        ),
        Mistake(
            "width-for-length",
            "The sum is right, but divided by a power of the width of the batch: a short text then has another score "
            "beside a long one than it has alone.",
            partial(_score, length="all"),
        ),
        Mistake(
            "stop-left-out",
            "You leave the stop token out. To end here is a prediction too, with a probability of its own: without it "
            "a text is scored as if it went on for ever.",
            partial(_score, summed="words", length="words"),
        ),
        Mistake(
            "stop-not-in-length",
            "The sum is right, but n is too small by one for texts that end: the stop token is one of the n.",
            partial(_score, length="words"),
        ),
        Mistake(
            "multiplied",
            "You multiply by the power of n. Log-probabilities are negative, so that pushes long texts down further, "
            "where (6.12) helps them up.",
            partial(_score, sign=-1),
        ),
        Mistake(
            "always-the-mean",
            "This divides by n whatever α is. It is right for α = 1 alone.",
            lambda log_probs, tokens, stop, alpha: _score(log_probs, tokens, stop, 1.0),
        ),
        Mistake(
            "alpha-times-n",
            "You divide by α · n. In (6.12) α is an exponent, not a factor.",
            lambda log_probs, tokens, stop, alpha: _score(log_probs, tokens, stop, 1.0) / alpha,
        ),
        Mistake(
            "only-the-sum",
            "This is the log-probability alone, the score for α = 0. Where has the length gone?",
            lambda log_probs, tokens, stop, alpha: _score(log_probs, tokens, stop, 0.0),
        ),
    ],
)
