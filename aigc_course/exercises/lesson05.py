"""The exercises of lesson 05, a transformer from scratch."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .. import gpt2
from ..runtime import rng_for
from ..state import TrainState
from .exercise import Function, Goal, Mistake, Number, Untried, Wrong

IGNORE = gpt2.IGNORE

# ---- 5.1 bits per character, from the means of batches ----


def _evaluations(rng: Generator) -> list[tuple]:
    cases = []
    for n_batches in (3, 5, 1):
        means = 2 + 3 * torch.rand(n_batches, generator=rng, dtype=torch.float64)
        n_tokens = torch.randint(20, 60, (n_batches,), generator=rng) * torch.arange(1, n_batches + 1)
        cases.append((means, n_tokens, int(n_tokens.sum() * 3) // 2 + 7))
    return cases


def _bits(nats: Tensor, n_characters: int | Tensor) -> Tensor:
    return nats / (math.log(2) * n_characters)


check_pooled_bits = Function(
    number="5.1",
    title="Bits per character of a whole evaluation",
    kind="by hand",
    praise="Only sums of nats can be added up; every mean has to be turned back into one first.",
    reference=lambda means, n_tokens, n_characters: _bits((means * n_tokens).sum(), n_characters),
    cases=_evaluations,
    rtol=1e-5,
    mistakes=[
        Mistake(
            "mean-of-means",
            "Each batch counts the same here, however many tokens it holds: a token in a short batch weighs more "
            "than one in a long batch; (5.2) is a mean over tokens.",
            lambda means, n, n_characters: _bits(means.mean() * n.sum(), n_characters),
        ),
        Mistake(
            "in-nats",
            "This is a number of nats per character: a bit is a smaller unit, of which a nat holds about 1.44.",
            lambda means, n, n_characters: (means * n).sum() / n_characters,
        ),
        Mistake(
            "wrong-way-to-bits",
            "The change of unit goes the wrong way: there are more bits than nats in the same text, not fewer.",
            lambda means, n, n_characters: (means * n).sum() * math.log(2) / n_characters,
        ),
        Mistake(
            "per-token",
            "These are bits per token: they change with the tokenizer, and a model with long tokens looks worse. "
            "What is the cost of the whole text to be shared among?",
            lambda means, n, n_characters: _bits((means * n).sum(), n.sum()),
        ),
        Mistake(
            "mean-perplexity",
            "This goes through the batches' perplexities. The exponential is convex, so a mean of perplexities is too "
            "high, and its logarithm is not the mean of the losses.",
            lambda means, n, n_characters: _bits(means.exp().mean().log() * n.sum(), n_characters),
        ),
        Mistake(
            "sum-of-means",
            "The means are added as they are, each as if its batch held a single token: what did all tokens of a "
            "batch cost together?",
            lambda means, n, n_characters: _bits(means.sum(), n_characters),
        ),
    ],
)

# ---- 5.2 Kneser-Ney on a table of counts ----


def _tables(rng: Generator) -> list[tuple]:
    cases = []
    for size in (5, 6, 8):
        counts = torch.randint(1, 9, (size, size), generator=rng)
        counts *= torch.rand(size, size, generator=rng) < 0.6
        counts[:, 0] = 0  # token 0 comes after the last one only, and before every other: before and after differ
        counts[size - 1, 0], counts[0, 1:] = 4, torch.arange(1, size)
        counts[torch.arange(size), (torch.arange(size) + 1) % size] += 1  # something follows each token
        counts[torch.arange(size), torch.arange(size)] = 0  # and something never does
        discount = 0.3 + 0.6 * torch.rand(1, generator=rng, dtype=torch.float64).item()
        cases.append((counts.double(), discount))
    return cases


def _kneser_ney(counts: Tensor, discount: float, *, taken=None, kinds_after=None, shares=None) -> Tensor:
    seen = (counts > 0).to(counts)
    taken = (counts - discount).clamp_min(0) if taken is None else taken
    kinds_after = seen.sum(1, keepdim=True) if kinds_after is None else kinds_after
    shares = seen.sum(0) / seen.sum() if shares is None else shares
    return (taken + discount * kinds_after * shares) / counts.sum(1, keepdim=True)


def _only_renormalised(counts: Tensor, discount: float) -> Tensor:
    kept = (counts - discount).clamp_min(0)
    return kept / kept.sum(1, keepdim=True)


check_kneser_ney = Function(
    number="5.2",
    title="Kneser and Ney on a table of counts",
    kind="by hand",
    praise="Each row sums to one, and what never followed has the chance that its many different contexts give it.",
    reference=_kneser_ney,
    cases=_tables,
    mistakes=[
        Mistake(
            "by-frequency",
            "What was taken is shared out by how often a character occurs. Kneser and Ney ask after how many different "
            "ones it occurs: a character that comes often but always in the same word is no good guess elsewhere.",
            lambda counts, D: _kneser_ney(counts, D, shares=counts.sum(0) / counts.sum()),
        ),
        Mistake(
            "wrong-side",
            "The shares count the different characters after w where those before w are asked for: which axis of the "
            "table is v, and which is w?",
            lambda counts, D: _kneser_ney(counts, D, shares=(counts > 0).sum(1) / (counts > 0).sum()),
        ),
        Mistake(
            "one-discount-given",
            "The rows sum to less than one. D was taken from every count of the row that is there, but it is given "
            "back once only.",
            lambda counts, D: _kneser_ney(counts, D, kinds_after=1.0),
        ),
        Mistake(
            "unseen-discounted",
            "D is taken off counts of nought too, and the rows sum to less than one: from what was never seen nothing "
            "can be taken.",
            lambda counts, D: _kneser_ney(counts, D, taken=counts - D),
        ),
        Mistake(
            "nothing-given",
            "The second half of the formula is missing: the rows sum to less than one, and what was never seen has "
            "probability nought.",
            lambda counts, D: _kneser_ney(counts, D, shares=0.0),
        ),
        Mistake(
            "renormalised",
            "The rows do sum to one, but only because they were divided by their sums: what was taken went back to the "
            "pairs that had been seen, and the others still have probability nought.",
            _only_renormalised,
        ),
        Mistake(
            "kinds-before",
            "What is handed out in row v is weighed by the number of different characters before v; it has to match "
            "what was taken in that row, which depends on the number after v.",
            lambda counts, D: _kneser_ney(counts, D, kinds_after=(counts > 0).sum(0)[:, None]),
        ),
    ],
)

# ---- 5.3 how a query learns ----


def _one_query(rng: Generator) -> list[tuple]:
    sizes = [(5, 8, 3), (7, 2, 4), (1, 6, 2), (4, 3, 5)]  # positions, width of keys, width of values
    return [
        tuple(torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((d,), (t, d), (t, e), (e,)))
        for t, d, e in sizes
    ]


def _query_slope(q: Tensor, K: Tensor, V: Tensor, g: Tensor) -> Tensor:
    a, worth = (K @ q / math.sqrt(len(q))).softmax(0), V @ g
    return K.T @ (a * (worth - a @ worth)) / math.sqrt(len(q))


def _without_the_sum(q: Tensor, K: Tensor, V: Tensor, g: Tensor) -> Tensor:
    a = (K @ q / math.sqrt(len(q))).softmax(0)
    return K.T @ (a * (V @ g)) / math.sqrt(len(q))


def _diagonal_only(q: Tensor, K: Tensor, V: Tensor, g: Tensor) -> Tensor:
    a = (K @ q / math.sqrt(len(q))).softmax(0)
    return K.T @ (a * (1 - a) * (V @ g)) / math.sqrt(len(q))


def _plain_mean(q: Tensor, K: Tensor, V: Tensor, g: Tensor) -> Tensor:
    a, worth = (K @ q / math.sqrt(len(q))).softmax(0), V @ g
    return K.T @ (a * (worth - worth.mean())) / math.sqrt(len(q))


def _unscaled(q: Tensor, K: Tensor, V: Tensor, g: Tensor) -> Tensor:
    return _query_slope(q * math.sqrt(len(q)), K, V, g) * math.sqrt(len(q))


def _by_positions(q: Tensor, K: Tensor, V: Tensor, g: Tensor) -> Tensor:
    ratio = math.sqrt(len(q) / len(K))
    return _query_slope(q * ratio, K, V, g) * ratio


check_query_slope = Function(
    number="5.3",
    title="How a query learns",
    kind="derivation",
    praise="A query moves by the covariance of keys and worths under its weights; where one weight is all, by nought.",
    reference=_query_slope,
    cases=_one_query,
    mistakes=[
        Mistake(
            "first-term-only",
            "Only the δ in (5.9) is there: a logit that rises takes weight from all the other positions too. With a "
            "single position the weight is always one, and the slope has to be nought.",
            _without_the_sum,
        ),
        Mistake(
            "diagonal-only",
            "Only the diagonal of (5.9) is there, each weight differentiated by its own logit. Each weight depends on "
            "every logit, so that there is a sum over two positions.",
            _diagonal_only,
        ),
        Mistake(
            "plain-mean",
            "The worths are compared with their plain mean: the sum in (5.9) weighs each position by its share of the "
            "attention.",
            _plain_mean,
        ),
        Mistake(
            "scale-once",
            "The weights are scaled, but the slope is not: the logits are q · k / √d, and the chain rule "
            "passes through that division as well.",
            lambda q, K, V, g: _query_slope(q, K, V, g) * math.sqrt(len(q)),
        ),
        Mistake(
            "scale-outside",
            "The slope is divided by √d, but the weights inside it are those of unscaled logits.",
            lambda q, K, V, g: _query_slope(q * math.sqrt(len(q)), K, V, g),
        ),
        Mistake(
            "no-scale",
            "This is the slope of attention without any √d, neither in the weights nor in the chain rule.",
            _unscaled,
        ),
        Mistake(
            "wrong-width",
            "The scale is the root of the number of positions; (5.7) is about the number of terms in an inner product "
            "of a query and a key.",
            _by_positions,
        ),
    ],
)

# ---- 5.4 a head that looks back ----

ENOUGH, LONGEST = 0.9, 5.0  # the weight that is asked for; the length allowed, in units of √d


def _read_head(exercise: Goal, answer: tuple, T: int, d: int, back: int) -> Tensor:
    """The logits of a head, if its queries and keys have the form that was asked for."""
    if not isinstance(answer, tuple | list) or len(answer) != 2 or not all(isinstance(x, Tensor) for x in answer):
        raise Wrong(f"look_back({T}, {d}, {back}) should return two tensors, the queries and the keys.")
    if any(x.shape != (T, d) for x in answer):
        shapes = " and ".join(str(tuple(x.shape)) for x in answer)
        raise exercise.wrong("wrong-shape", f"(shapes {shapes}, expected {(T, d)} twice)")
    q, k = (x.detach().cpu().double() for x in answer)
    if not (q.isfinite().all() and k.isfinite().all()):
        raise Wrong(f"some numbers of look_back({T}, {d}, {back}) are infinite or not a number.")
    length = max(q.norm(dim=1).max().item(), k.norm(dim=1).max().item())
    if length > LONGEST * math.sqrt(d) * (1 + 1e-4):
        raise exercise.wrong("too-long", f"(the longest has {length:.4g}; {LONGEST * math.sqrt(d):.4g} is allowed)")
    return q @ k.T / math.sqrt(d)


def _most(places: Tensor) -> tuple[int, float]:
    """The commonest number, and its share."""
    values, times = places.unique(return_counts=True)
    return values[times.argmax()].item(), times.max().item() / len(places)


def _look_back(exercise: Goal, look_back) -> float:
    """The smallest weight, over all trials and positions, on the place that was asked for."""
    if not callable(look_back):
        raise Wrong("hand over the function itself, without calling it")
    rng = torch.Generator()
    rng.seed()
    trials = [(48, 16, 6)]
    for d, backs in ((16, (8, 9, 10, 11, 12)), (24, (1, 2, 3, 4)), (32, (8, 9, 10, 11, 12))):
        T, i = torch.randint(30, 49, (1,), generator=rng).item(), torch.randint(len(backs), (1,), generator=rng).item()
        trials.append((T, d, backs[i]))
    answers = [look_back(*trial) for trial in trials]
    if all(answer is None or answer is ... for answer in answers):
        raise Untried
    heads = [_read_head(exercise, answer, *trial) for answer, trial in zip(answers, trials, strict=True)]

    worst, distances = [], []
    for logits, (T, _, back) in zip(heads, trials, strict=True):
        t, later = torch.arange(back, T), torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(later, -math.inf).softmax(1)
        worst.append(weights[t, t - back])
        distances.append(_most(t - weights[t].argmax(1)))
    if min(weight.min() for weight in worst) >= ENOUGH:
        return min(weight.min().item() for weight in worst)

    i = next(i for i, weight in enumerate(worst) if weight.min() < ENOUGH)
    logits, (T, d, back) = heads[i], trials[i]
    at = int(worst[i].argmin()) + back
    detail = f"(T = {T}, d = {d}, back = {back}: position {at} gives {worst[i].min():.3g} to position {at - back})"
    if (logits.amax(1) - logits.amin(1)).max() < 1e-6:
        raise Wrong(f"All places look the same to your queries, and each gets an equal share. {detail}")
    ahead, share = _most(logits[: T - back].argmax(1) - torch.arange(T - back))
    if ahead == back and share > 0.5:
        raise exercise.wrong("ahead", detail)
    distance, share = distances[i]
    if share > 0.5 and len({most for most, _ in distances}) == 1:
        raise exercise.wrong("same-distance", f"(each time {distance} back) {detail}")
    if share > 0.5 and abs(distance - back) == 1:
        raise exercise.wrong("off-by-one", f"(mostly {distance} back) {detail}")
    row = logits[at, : at + 1].softmax(0)
    place, rivals = at - back, row.clone()
    rivals[max(0, place - 1) : place + 2] = 0  # neighbours differ little; that is another fault
    rival = int(rivals.argmax())
    between = row[min(place, rival) : max(place, rival) + 1].min()
    if min(row[place], row[rival]) >= 0.9 * row.max() and between < 0.5 * row.max():
        twice = f"(position {at} gives as much, {row[rival]:.3g}, to position {rival})"
        raise exercise.wrong("repeats", f"{twice} {detail}")
    if (share > 0.5 and distance == back) or row[place] >= 0.9 * row.max():
        raise exercise.wrong("too-soft", detail)
    raise Wrong(f"Most of the attention goes elsewhere. {detail}")


check_look_back = Goal(
    number="5.4",
    title="A head that looks one verse back",
    kind="open",
    praise="Positions alone can steer a head, within any width, as long as no two of their vectors are too much alike.",
    measure=_look_back,
    mistakes=[
        Mistake(
            "wrong-shape",
            "Queries and keys are asked for as two tensors of T rows and d columns: a head has d numbers for each "
            "position, however many positions there are.",
        ),
        Mistake(
            "too-long",
            "Some query or key is longer than 5 √d. Great length makes any small difference count, as it does where "
            "the scale is left out; try to make the vectors of different positions less alike instead.",
        ),
        Mistake(
            "ahead",
            "The queries point to a position that comes later, as far ahead as they should look back, and the mask "
            "hides it. Which of the two, query or key, is to be made for the other's position?",
        ),
        Mistake(
            "off-by-one",
            "The head looks at a neighbour of the right place: count from where to where the distance goes, on a small "
            "example.",
        ),
        Mistake(
            "same-distance",
            "The head looks equally far back whatever distance is asked for: does the argument back enter the queries, "
            "or the keys?",
        ),
        Mistake(
            "repeats",
            "Two places that are far apart have the same key, so that the query cannot tell one from the other: your "
            "vectors repeat within T positions.",
        ),
        Mistake(
            "too-soft",
            "The head looks at the right place, but not firmly enough: the logit there has to exceed the others "
            "by several units, after the division by √d. How long are your vectors, and how alike are neighbours?",
        ),
    ],
)

# ---- 5.5 labels two ahead ----

LETTERS, RUN, INPUTS = 8, 3, 24


def _tripled_loss(ahead: int) -> float:
    """The least loss, in nats, of labels ``ahead`` places on: ln 8 where the label is of a later run, else 0."""
    later = [(t + ahead) // RUN > t // RUN for t in range(INPUTS)]
    return math.log(LETTERS) * sum(later) / INPUTS


def _loss_of_the_mean() -> float:
    free = 1 - _tripled_loss(2) / math.log(LETTERS)
    return -math.log(free + (1 - free) / LETTERS)


check_tripled = Number(
    number="5.5",
    title="Labels shifted twice, on a text that one can see through",
    kind="prediction",
    praise="Now let it run, and try tripled_run(0), tripled_run(1) and tripled_run(3) as well.",
    truth=lambda: _tripled_loss(2),
    rtol=0.01,
    atol=0.005,
    mistakes=[
        Mistake(
            "not-shifted",
            "Nought is what a model reaches that is asked for the very letter it has just read: labels not shifted.",
            lambda: _tripled_loss(0),
        ),
        Mistake(
            "shifted-once",
            "That is the loss where the label is the next letter, one place ahead. Here it is the next but one: go "
            "through the three places of a run, and ask for each whether that letter belongs to the same run.",
            lambda: _tripled_loss(1),
        ),
        Mistake(
            "nothing-known",
            "That is the loss of somebody who knows nothing, at every place. At some places the letter that was just "
            "read tells the label.",
            lambda: math.log(LETTERS),
        ),
        Mistake(
            "in-bits",
            "That is right in bits; a loss in PyTorch is in nats.",
            lambda: _tripled_loss(2) / math.log(2),
        ),
        Mistake(
            "perplexity",
            "That is the perplexity; the loss is its logarithm.",
            lambda: math.exp(_tripled_loss(2)),
        ),
        Mistake(
            "mean-inside-the-log",
            "The probabilities were averaged, and then the logarithm was taken. The loss is a mean of logarithms, "
            "a number for each place.",
            _loss_of_the_mean,
        ),
    ],
)

# ---- 5.6 a step to mend ----


def _padded_batches(rng: Generator) -> list[tuple]:
    cases = []
    for lengths in ((9, 4, 6), (7,), (5, 11)):
        batch = torch.randint(11, (len(lengths), max(lengths)), generator=rng)
        for row, length in zip(batch, lengths, strict=True):
            row[length:] = IGNORE
        cases.append((batch,))
    return cases


def _after_one_step(step, batch: Tensor) -> tuple | None:
    """The loss that the step gives for a small network, and the network's parameters after it."""
    size = gpt2.GPT2Config(vocab_size=11, block_size=12, n_layer=1, n_head=2, n_embd=8, dropout=0.0)
    net = gpt2.GPT2(size, rng_for(5, "exercise"))
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.4, generator=rng_for(5, name))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    state = TrainState({"gpt2": net}, {"gpt2": torch.optim.SGD(net.parameters(), lr=0.5)})
    figures = step(state, batch, rng_for(5, "step"))
    if figures is None or figures is ...:
        if any(not torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True)):
            raise Wrong('The step moves the weights but returns nothing: a step returns its figures, {"loss": …}.')
        return None
    if not isinstance(figures, dict) or set(figures) != {"loss"}:
        raise Wrong('The step should return a dict with its loss, {"loss": loss}.')
    return figures["loss"], dict(net.named_parameters())


def _step(objective):
    """A step on ``objective``, a function of the logits at all tokens but the last, and of the batch."""

    def step(state: TrainState, batch: Tensor, rng: Generator) -> dict[str, Tensor]:
        loss = objective(state.nets["gpt2"](batch[:, :-1].clamp_min(0)), batch)
        state.minimize("gpt2", loss)
        return {"loss": loss}

    return step


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(b, t), 0 for padding."""
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")


def _mean_of_real(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE)


def _mean_of_means(logits: Tensor, batch: Tensor) -> Tensor:
    labels = batch[:, 1:]
    return (_losses(logits, labels).sum(1) / (labels != IGNORE).sum(1)).mean()


def _without_update(state: TrainState, batch: Tensor, rng: Generator) -> dict[str, Tensor]:
    return {"loss": gpt2.lm_losses(state.nets["gpt2"], batch).sum() / (batch[:, 1:] != IGNORE).sum()}


check_mended_step = Function(
    number="5.6",
    title="A step that learns the wrong thing",
    kind="repair",
    praise="One shift, and a mean over the tokens that are there: this is (5.21).",
    reference=gpt2.lm_step,
    cases=_padded_batches,
    outcome=_after_one_step,
    mistakes=[
        Mistake(
            "not-mended",
            "The step does what it did before: neither of its mistakes is gone. For a text of five tokens, write down "
            "which label belongs to which logits; then ask what the mean is divided by.",
            _step(lambda logits, batch: _losses(logits[:, :-1], batch[:, 2:]).mean()),
        ),
        Mistake(
            "shifted-twice",
            "The mean is right now, but the label is still the next token but one: inputs and labels were already one "
            "apart when the logits came out of the network.",
            _step(lambda logits, batch: _mean_of_real(logits[:, :-1], batch[:, 2:])),
        ),
        Mistake(
            "not-shifted",
            "Now there is no shift left: each position is asked for the token that it has just read.",
            _step(lambda logits, batch: _mean_of_real(logits, batch[:, :-1])),
        ),
        Mistake(
            "last-label-lost",
            "Each label stands beside the right logits now, but the last label of a row is never asked for: a text "
            "of T + 1 tokens gives T predictions.",
            _step(lambda logits, batch: _mean_of_real(logits[:, :-1], batch[:, 1:-1])),
        ),
        Mistake(
            "padding-counted",
            "The labels are right, but the padding counts in the mean: its losses are noughts, which make the loss "
            "smaller the more of a batch is padding.",
            _step(lambda logits, batch: _losses(logits, batch[:, 1:]).mean()),
        ),
        Mistake(
            "mean-of-means",
            "This is the mean over the texts of the mean of each: a token of a short text counts more than one "
            "of a long text; (5.21) has one mean over all tokens.",
            _step(_mean_of_means),
        ),
        Mistake(
            "padding-as-token",
            "Padding is taken for token 0 and is learnt like any other: the model is taught to fill up the end of "
            "every text.",
            _step(lambda logits, batch: F.cross_entropy(logits.transpose(1, 2), batch[:, 1:].clamp_min(0))),
        ),
        Mistake(
            "summed",
            "The losses are added up and never divided: a larger batch makes a larger step, and a learning rate means "
            "something else each time.",
            _step(lambda logits, batch: _losses(logits, batch[:, 1:]).sum()),
        ),
        Mistake(
            "no-update",
            "The loss is right, but no weight has moved: a step computes a loss and then follows its gradient.",
            _without_update,
        ),
    ],
)
