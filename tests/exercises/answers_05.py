"""Answers to the exercises of lesson 05, right and wrong."""

import math

import torch
from answers import Answers
from torch.nn import functional as F

from aigc_course.datasets import IGNORE
from aigc_course.metrics import bits_per_character

# ---- 5.1 ----


def bits_token_by_token(means, n_tokens, n_characters):
    nats = torch.cat([mean.repeat(int(n)) for mean, n in zip(means, n_tokens, strict=True)])
    return bits_per_character(nats, n_characters)


def bits_by_batches(means, n_tokens, n_characters):
    """Each batch's own bits per token, averaged, times the tokens for a character."""
    per_token = [mean.item() / math.log(2) for mean in means]
    return sum(per_token) / len(per_token) * int(n_tokens.sum()) / n_characters


def natural_logs(means, n_tokens, n_characters):
    return torch.dot(means, n_tokens.to(means)).item() / n_characters


def multiplied_by_ln2(means, n_tokens, n_characters):
    total = 0.0
    for mean, n in zip(means.tolist(), n_tokens.tolist(), strict=True):
        total += mean * n * math.log(2)
    return total / n_characters


def shared_by_tokens(means, n_tokens, n_characters):
    weights = n_tokens / n_tokens.sum()
    return (weights * means).sum() * math.log2(math.e)


def through_perplexities(means, n_tokens, n_characters):
    perplexity = sum(math.exp(mean) for mean in means.tolist()) / len(means)
    return n_tokens.sum().item() * math.log2(perplexity) / n_characters


def means_as_they_are(means, n_tokens, n_characters):
    return bits_per_character(means, n_characters)


# ---- 5.2 ----


def kneser_ney_by_loops(counts, discount):
    size = len(counts)
    pairs = [(v, w) for v in range(size) for w in range(size) if counts[v, w] > 0]
    q = torch.zeros(size, size, dtype=torch.float64)
    for v in range(size):
        total = float(sum(counts[v]))
        left = 1 - sum(max(float(counts[v, w]) - discount, 0) / total for w in range(size))
        for w in range(size):
            share = len([pair for pair in pairs if pair[1] == w]) / len(pairs)
            q[v, w] = max(float(counts[v, w]) - discount, 0) / total + left * share
    return q


def back_to_the_unigram(counts, discount):
    kept = torch.relu(counts - discount) / counts.sum(1)[:, None]
    unigram = counts.sum(0) / counts.sum()
    return kept + torch.outer(1 - kept.sum(1), unigram)


def followers_for_predecessors(counts, discount):
    kept = torch.relu(counts - discount) / counts.sum(1)[:, None]
    followers = torch.tensor([row.count_nonzero() for row in counts], dtype=torch.float64)
    return kept + torch.outer(1 - kept.sum(1), followers / followers.sum())


def one_discount_for_a_row(counts, discount):
    out = torch.zeros_like(counts)
    predecessors = counts.bool().sum(0)
    for v, row in enumerate(counts):
        for w, c in enumerate(row):
            share = predecessors[w] / predecessors.sum()
            out[v, w] = max(c - discount, 0) / row.sum() + discount / row.sum() * share
    return out


def without_max(counts, discount):
    total, kinds = counts.sum(1, keepdim=True), counts.count_nonzero(1)[:, None]
    continuation = counts.count_nonzero(0) / counts.count_nonzero()
    return counts / total - discount / total + discount * kinds / total * continuation


def discount_only(counts, discount):
    return torch.stack([torch.where(row > discount, row - discount, 0) / row.sum() for row in counts])


def normalised_again(counts, discount):
    return F.normalize(torch.where(counts > 0, counts - discount, 0), p=1, dim=1)


def weighed_by_column(counts, discount):
    seen = counts.bool().double()
    taken = discount * seen.sum(0) / counts.sum(1)  # N(., v) D / c(v), for each v
    kept = (counts - discount).clamp(min=0) / counts.sum(1, keepdim=True)
    return kept + torch.outer(taken, seen.mean(0) / seen.mean(0).sum())


# ---- 5.3 ----


def by_autograd(q, K, V, g):
    q = q.clone().requires_grad_()
    y = F.scaled_dot_product_attention(q[None], K, V)[0]
    return torch.autograd.grad(y @ g, q)[0]


def jacobian_of(weights):
    return torch.diag(weights) - torch.outer(weights, weights)


def delta_only(q, K, V, g):
    a = F.softmax(K @ q * len(q) ** -0.5, dim=0)
    return sum(a[s] * (V[s] @ g) * K[s] for s in range(len(K))) / len(q) ** 0.5


def own_logit_only(q, K, V, g):
    a = F.softmax(K @ q * len(q) ** -0.5, dim=0)
    return (V @ g) @ torch.diag(jacobian_of(a).diagonal()) @ K / len(q) ** 0.5


def against_the_mean_value(q, K, V, g):
    a = F.softmax(K @ q * len(q) ** -0.5, dim=0)
    centred = V - V.mean(0)
    return torch.einsum("t,te,e,td->d", a, centred, g, K) / len(q) ** 0.5


def inner_scale_forgotten(q, K, V, g):
    a = F.softmax(K @ q * len(q) ** -0.5, dim=0)
    return (V @ g) @ jacobian_of(a) @ K


def scaled_at_the_end(q, K, V, g):
    a = F.softmax(K @ q, dim=0)
    return (V @ g) @ jacobian_of(a) @ K / K.shape[1] ** 0.5


def never_scaled(q, K, V, g):
    q = q.clone().requires_grad_()
    return torch.autograd.grad((K @ q).softmax(0) @ V @ g, q)[0]


def scaled_by_positions(q, K, V, g):
    scale = 1 / math.sqrt(K.shape[0])
    a = F.softmax(K @ q * scale, dim=0)
    return (V @ g) @ jacobian_of(a) @ K * scale


# ---- 5.4 ----


def random_codes(T, d, back):
    """Random directions are nearly at right angles to each other."""
    k = F.normalize(torch.randn(T, d, generator=torch.Generator().manual_seed(3)), dim=1) * 5 * math.sqrt(d)
    return k.roll(back, dims=0), k


def waves(places, d, length, fastest=1.0, slowest=1e-4):
    w = torch.logspace(math.log10(fastest), math.log10(slowest), d // 2)
    angle = places[:, None] * w
    return length * math.sqrt(2 / d) * torch.cat([angle.cos(), angle.sin()], dim=1)


def moved(shift):
    """A head of waves whose queries stand ``shift(back)`` further on than their own positions."""

    def look(T, d, back):
        t = torch.arange(T)
        return waves(t + shift(back), d, 4.99 * math.sqrt(d), 3.0, 0.01), waves(t, d, 4.99 * math.sqrt(d), 3.0, 0.01)

    return look


def one_hot_positions(T, d, back):
    k = 30 * torch.eye(T)
    return torch.eye(T).roll(back, 0) * 30, k


def keys_only(T, d, back):
    t = torch.arange(T)
    return waves(t - back, d, 1.0)[:, :-1], waves(t, d, 1.0)[:, :-1]


def with_a_big_factor(T, d, back):
    t = torch.arange(T)
    return 1000 * waves(t - back, d, 1.0), waves(t, d, 1.0)


def one_hot_again_and_again(T, d, back):
    k = 15 * F.one_hot(torch.arange(T) % 16, d).float()
    return 15 * F.one_hot((torch.arange(T) - back) % 16, d).float(), k


def clock_of_twelve(T, d, back):
    t = torch.arange(T)
    w = 2 * math.pi / 12 * torch.arange(1, d // 2 + 1)
    return tuple(
        5 * math.sqrt(2) * torch.cat([(x[:, None] * w).cos(), (x[:, None] * w).sin()], 1) for x in (t - back, t)
    )


def plain_waves(T, d, back):
    t = torch.arange(T)
    return waves(t - back, d, math.sqrt(d / 2)), waves(t, d, math.sqrt(d / 2))


def slow_waves(T, d, back):
    t = torch.arange(T)
    return waves(t - back, d, 5 * math.sqrt(d), 0.05, 0.001), waves(t, d, 5 * math.sqrt(d), 0.05, 0.001)


# ---- 5.6 ----


def step_by_log_softmax(state, batch, rng):
    log_probs = state.nets["gpt2"](batch.clamp_min(0)).log_softmax(-1)[:, :-1]
    labels = batch[:, 1:]
    there = labels >= 0
    chosen = log_probs[there].gather(1, labels[there][:, None])
    loss = -chosen.sum() / there.sum()
    state.minimize("gpt2", loss)
    return {"loss": loss.detach()}


def step_of(loss_of):
    def step(state, batch, rng):
        net = state.nets["gpt2"]
        log_probs = net(batch[:, :-1].clamp_min(0)).log_softmax(-1)
        loss = loss_of(log_probs, batch)
        state.minimize("gpt2", loss)
        return {"loss": loss}

    return step


def nats(log_probs, labels):
    """One list for each text: the nats of its real labels."""
    return [
        torch.stack([-row[t, label] for t, label in enumerate(text.tolist()) if label != IGNORE])
        for row, text in zip(log_probs, labels, strict=True)
    ]


def both_mistakes(log_probs, batch):
    per_text = nats(log_probs, batch[:, 2:])
    return sum(losses.sum() for losses in per_text) / batch[:, 2:].numel()


def next_but_one(log_probs, batch):
    return torch.cat(nats(log_probs, batch[:, 2:])).mean()


def same_token(log_probs, batch):
    return torch.cat(nats(log_probs, batch[:, :-1])).mean()


def all_but_the_last(log_probs, batch):
    return torch.cat(nats(log_probs, batch[:, 1 : batch.shape[1] - 1])).mean()


def over_all_places(log_probs, batch):
    return torch.cat(nats(log_probs, batch[:, 1:])).sum() / (batch.shape[0] * (batch.shape[1] - 1))


def text_by_text(log_probs, batch):
    return torch.stack([losses.mean() for losses in nats(log_probs, batch[:, 1:])]).mean()


def nought_for_padding(log_probs, batch):
    labels = torch.where(batch == IGNORE, 0, batch)[:, 1:]
    return F.nll_loss(log_probs.flatten(0, 1), labels.flatten())


def never_divided(log_probs, batch):
    return torch.cat(nats(log_probs, batch[:, 1:])).sum()


def forgets_to_minimise(state, batch, rng):
    log_probs = state.nets["gpt2"](batch[:, :-1].clamp_min(0)).log_softmax(-1)
    loss = torch.cat(nats(log_probs, batch[:, 1:])).mean()
    loss.backward()
    return {"loss": loss}


ANSWERS = {
    "check_pooled_bits": Answers(
        second=bits_token_by_token,
        wrong={
            "mean-of-means": [bits_by_batches],
            "in-nats": [natural_logs],
            "wrong-way-to-bits": [multiplied_by_ln2],
            "per-token": [shared_by_tokens],
            "mean-perplexity": [through_perplexities],
            "sum-of-means": [means_as_they_are],
        },
    ),
    "check_kneser_ney": Answers(
        second=kneser_ney_by_loops,
        wrong={
            "by-frequency": [back_to_the_unigram],
            "wrong-side": [followers_for_predecessors],
            "one-discount-given": [one_discount_for_a_row],
            "unseen-discounted": [without_max],
            "nothing-given": [discount_only],
            "renormalised": [normalised_again],
            "kinds-before": [weighed_by_column],
        },
    ),
    "check_query_slope": Answers(
        second=by_autograd,
        wrong={
            "first-term-only": [delta_only],
            "diagonal-only": [own_logit_only],
            "plain-mean": [against_the_mean_value],
            "scale-once": [inner_scale_forgotten],
            "scale-outside": [scaled_at_the_end],
            "no-scale": [never_scaled],
            "wrong-width": [scaled_by_positions],
        },
    ),
    "check_look_back": Answers(
        second=random_codes,
        wrong={
            "wrong-shape": [one_hot_positions, keys_only],
            "too-long": [with_a_big_factor],
            "ahead": [moved(lambda back: back)],
            "off-by-one": [moved(lambda back: 1 - back), moved(lambda back: -1 - back)],
            "same-distance": [moved(lambda back: -6), moved(lambda back: 0)],
            "repeats": [one_hot_again_and_again, clock_of_twelve],
            "too-soft": [plain_waves, slow_waves],
        },
    ),
    "check_tripled": Answers(
        second=2 * math.log(2),  # two places of three, each with eight letters to choose from: 2/3 · 3 ln 2
        wrong={
            "not-shifted": [0, 0.0],
            "shifted-once": [0.693, 0.69],
            "nothing-known": [2.079],
            "in-bits": [2],
            "perplexity": [4.0],
            "mean-inside-the-log": [0.875],
        },
    ),
    "check_mended_step": Answers(
        second=step_by_log_softmax,
        wrong={
            "not-mended": [step_of(both_mistakes)],
            "shifted-twice": [step_of(next_but_one)],
            "not-shifted": [step_of(same_token)],
            "last-label-lost": [step_of(all_but_the_last)],
            "padding-counted": [step_of(over_all_places)],
            "mean-of-means": [step_of(text_by_text)],
            "padding-as-token": [step_of(nought_for_padding)],
            "summed": [step_of(never_divided)],
            "no-update": [forgets_to_minimise],
        },
    ),
}
