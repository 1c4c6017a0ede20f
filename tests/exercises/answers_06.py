"""Answers to the exercises of lesson 06: right ones, and what people write who make a known mistake."""

import math

import torch
from answers import Answers
from torch.nn import functional as F

from aigc_course.generate import filter_logits
from aigc_course.gpt2 import KVCache

# ---- 6.1 ----


def positions_by_rows(real, past):
    rows = []
    for row in real.tolist():
        first = row.index(1)
        rows.append([max(column - first, 0) for column in range(past, len(row))])
    return torch.tensor(rows)


def counted_anew(real, past):
    new = real[:, past:]
    found, count = torch.zeros_like(new), torch.zeros(len(new), dtype=torch.long)
    for column in range(new.shape[1]):
        found[:, column] = count
        count = count + new[:, column]
    return found


def counted_in_the_call(real, past):
    t = real.shape[1] - past
    return torch.stack([torch.arange(t) for _ in real])


def columns(real, past):
    return torch.tensor([list(range(past, real.shape[1]))] * len(real))


def from_one(real, past):
    before = (real == 0).sum(1, keepdim=True)
    return (torch.arange(1, real.shape[1] + 1) - before).clamp_min(0)[:, past:]


def below_zero(real, past):
    return (real.cumsum(1) - torch.ones_like(real))[:, past:]


def whole_rows(real, past):
    return torch.where(real == 1, real.cumsum(1) - 1, 0)


def down_the_batch(real, past):
    return torch.clamp(torch.cumsum(real, 0)[:, past:] - 1, min=0)


# ---- 6.2 ----


def reading_with_holes(model, beginnings, further):
    """Padding on the right can be right: the logits are taken where a text ends, and the mask keeps its hole."""
    lengths = torch.tensor([len(ids) for ids in beginnings])
    batch = torch.zeros(len(beginnings), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(batch, beginnings, strict=True):
        row[: len(ids)] = ids
    real = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
    cache = KVCache()
    first = model(batch, attention_mask=real, cache=cache)[torch.arange(len(batch)), lengths - 1]
    later = []
    for t in range(further.shape[1]):
        real = torch.cat([real, torch.ones(len(real), 1, dtype=torch.long)], dim=1)
        later.append(model(further[:, t : t + 1], attention_mask=real, cache=cache))
    return torch.cat([first[:, None], *later], dim=1)


def reader(*, side="left", first=True, later=True, ones=1, new=1, one_cache=True):
    """The reading of a reader who pads on a ``side``, gives the mask at ``first`` and ``later``, or does not."""

    def read(model, beginnings, further):
        width = max(len(ids) for ids in beginnings)
        rows, masks = [], []
        for ids in beginnings:
            fill = torch.zeros(width - len(ids), dtype=torch.long)
            signs = [torch.full_like(ids, ones), torch.full_like(fill, 1 - ones)]
            rows.append(torch.cat([fill, ids] if side == "left" else [ids, fill]))
            masks.append(torch.cat(signs[::-1] if side == "left" else signs))
        ids, mask, cache = torch.stack(rows), torch.stack(masks), KVCache()
        found = [model(ids, attention_mask=mask, cache=cache) if first else model(ids, cache=cache)]
        for t in range(further.shape[1]):
            mask = torch.cat([mask, torch.full((len(mask), 1), new)], dim=1)
            if not one_cache:
                cache = KVCache()
            options = {"attention_mask": mask} if later else {}
            found.append(model(further[:, t, None], cache=cache, **options))
        return torch.cat([logits[:, -1:] for logits in found], dim=1)

    return read


# ---- 6.3 ----

P = [0.64, 0.16, 0.09, 0.04, 0.04, 0.01, 0.01, 0.01]
ROOTS = [0.8, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1]


# ---- 6.4 ----


def nucleus(logits):
    """Top-p by a loop over each sorted row."""
    found = torch.zeros_like(logits)
    for row, probs in zip(found, logits.softmax(-1), strict=True):
        mass = 0.0
        for v in probs.argsort(descending=True).tolist():
            row[v] = probs[v]
            mass += probs[v].item()
            if mass >= 0.85 - 1e-9:
                break
    return found / found.sum(1, keepdim=True)


def nucleus_without_the_crossing_token(logits):
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = probs * (probs.cumsum(-1) <= 0.8)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def greedy(logits):
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()


def cut_without_renormalising(logits):
    probs = logits.softmax(-1)
    return probs.where(probs >= 0.06 * probs.amax(-1, keepdim=True), 0.0)


def softmax_over_the_batch(logits):
    return logits.softmax(0)


def cut_then_warmed(logits):
    return filter_logits(filter_logits(logits, min_p=0.06), temperature=3.0).softmax(-1)


def cut_then_cooled(logits):
    return (filter_logits(logits, min_p=0.06) * 2).softmax(-1)


# ---- 6.5 ----


def slope_by_backpropagation(logits, temperature):
    warmth = torch.full((len(logits), 1), temperature, dtype=torch.float64, requires_grad=True)
    surprise = -((logits / warmth).softmax(-1) * logits.log_softmax(-1)).sum()
    return torch.autograd.grad(surprise, warmth)[0][:, 0]


def spread(weights, values):
    """Var = E[x²] − E[x]², row by row."""
    return torch.stack([(w * x.square()).sum() - (w * x).sum().square() for w, x in zip(weights, values, strict=True)])


def at(logits, temperature):
    powers = (logits / temperature - (logits / temperature).logsumexp(-1, keepdim=True)).exp()
    return powers


def slope_of_the_entropy(logits, temperature):
    warmth = torch.full((len(logits), 1), temperature, dtype=torch.float64, requires_grad=True)
    drawn = (logits / warmth).softmax(-1)
    return torch.autograd.grad(-(drawn * drawn.log()).sum(), warmth)[0][:, 0]


def slope_in_beta(logits, temperature):
    beta = torch.full((len(logits), 1), 1 / temperature, dtype=torch.float64, requires_grad=True)
    surprise = -((logits * beta).softmax(-1) * logits.log_softmax(-1)).sum()
    return torch.autograd.grad(surprise, beta)[0][:, 0]


# ---- 6.6 ----


def score_by_loops(log_probs, tokens, stop, alpha):
    return torch.tensor([total / n**alpha for total, n in walked(log_probs, tokens, stop)])


def walked(log_probs, tokens, stop, with_stop=True):
    """Sum and length of each text, token for token."""
    for table, row in zip(log_probs, tokens.tolist(), strict=True):
        total, n = 0.0, 0
        for place, token in enumerate(row):
            if token == stop and not with_stop:
                break
            total, n = total + table[place, token].item(), n + 1
            if token == stop:
                break
        yield total, n


def everything(log_probs, tokens, stop, alpha):
    b, n = tokens.shape
    chosen = log_probs[torch.arange(b)[:, None], torch.arange(n), tokens]
    return chosen.sum(-1) / n**alpha


def by_the_width(log_probs, tokens, stop, alpha):
    return torch.tensor([total / tokens.shape[1] ** alpha for total, _ in walked(log_probs, tokens, stop)])


def without_the_stop(log_probs, tokens, stop, alpha):
    return torch.tensor([total / n**alpha for total, n in walked(log_probs, tokens, stop, with_stop=False)])


def one_too_short(log_probs, tokens, stop, alpha):
    sums = torch.tensor([total for total, _ in walked(log_probs, tokens, stop)])
    return sums / (tokens != stop).sum(1).float().pow(alpha)


def with_lengths(change):
    """A score that makes something else of the sum, the length and alpha."""
    return lambda log_probs, tokens, stop, alpha: torch.tensor(
        [change(total, n, alpha) for total, n in walked(log_probs, tokens, stop)]
    )


ANSWERS = {
    "check_positions": Answers(
        second=positions_by_rows,
        wrong={
            "starts-again": [counted_anew],
            "columns-again": [counted_in_the_call],
            "counts-padding": [columns],
            "from-one": [from_one],
            "negative": [below_zero],
            "all-columns": [whole_rows],
            "over-rows": [down_the_batch],
        },
    ),
    "check_reading": Answers(
        second=reading_with_holes,
        wrong={
            "both": [reader(side="right", later=False)],
            "padding-right": [reader(side="right")],
            "mask-dropped": [reader(later=False)],
            "no-mask": [reader(first=False, later=False)],
            "starts-again": [reader(later=False, one_cache=False)],
            "mask-reversed": [reader(ones=0, new=0)],
            "new-masked": [reader(new=0)],
        },
    ),
    "check_nucleus": Answers(
        second=ROOTS[0] / sum(ROOTS[:4]),
        wrong={
            "filter-first": [0.8 / 1.2, 2 / 3],
            "crossing-dropped": [0.8 / (0.8 + 0.4 + 0.3)],
            "not-renormalised": [math.sqrt(P[0]) / sum(map(math.sqrt, P)), 0.364],
            "multiplied": [1.0, 1],
            "no-temperature": [0.64 / (0.64 + 0.16)],
            "nothing-done": [P[0]],
            "percent": [47.06, 47],
        },
    ),
    "check_tail": Answers(
        second=nucleus,
        wrong={
            "tail-kept": [
                lambda logits: logits.softmax(-1),
                lambda logits: filter_logits(logits, top_k=900).softmax(-1),
            ],
            "too-few": [
                greedy,
                lambda logits: filter_logits(logits, top_k=5).softmax(-1),
                lambda logits: filter_logits(logits, top_k=50).softmax(-1),
                lambda logits: filter_logits(logits, top_p=0.5).softmax(-1),
                lambda logits: filter_logits(logits, min_p=0.5).softmax(-1),
            ],
            "same-number": [
                lambda logits: filter_logits(logits, top_k=150).softmax(-1),
                lambda logits: filter_logits(logits, top_k=300).softmax(-1),
            ],
            "too-wide": [
                lambda logits: filter_logits(logits, min_p=0.01).softmax(-1),
                lambda logits: filter_logits(logits, top_p=0.95).softmax(-1),
            ],
            "no-distribution": [cut_without_renormalising, softmax_over_the_batch, lambda logits: logits],
            "nothing-left": [nucleus_without_the_crossing_token],
            "proportions": [
                cut_then_warmed,
                cut_then_cooled,
                lambda logits: filter_logits(logits, temperature=0.5).softmax(-1),
            ],
        },
    ),
    "check_surprise": Answers(
        second=slope_by_backpropagation,
        wrong={
            "entropy-slope": [slope_of_the_entropy],
            "falls": [lambda logits, t: -slope_by_backpropagation(logits, t)],
            "by-beta": [slope_in_beta],
            "no-chain-rule": [lambda logits, t: spread(at(logits, t), logits)],
            "under-p": [lambda logits, t: spread(logits.softmax(-1), logits) / t**2],
            "no-mean": [lambda logits, t: torch.einsum("bv,bv->b", at(logits, t), logits.square()) / (t * t)],
            "scaled-logits": [lambda logits, t: spread(at(logits, t), logits / t) / t**2],
            "unweighted": [lambda logits, t: (logits - logits.mean(-1, keepdim=True)).square().mean(-1) / t**2],
        },
    ),
    "check_score": Answers(
        second=score_by_loops,
        wrong={
            "filling-counts": [everything],
            "width-for-length": [by_the_width],
            "stop-left-out": [without_the_stop],
            "stop-not-in-length": [one_too_short],
            "multiplied": [with_lengths(lambda total, n, alpha: total * n**alpha)],
            "always-the-mean": [with_lengths(lambda total, n, alpha: total / n)],
            "alpha-times-n": [with_lengths(lambda total, n, alpha: total / (alpha * n))],
            "only-the-sum": [with_lengths(lambda total, n, alpha: total)],
        },
    ),
}
