"""The peers of language do what ours do, the rows notice when they do not, and cost against size is told in full."""

import copy
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from aigc_course.gpt2 import GPT2, GPT2Config, KVCache, lm_step
from aigc_course.runtime import rng_for
from aigc_course.state import TrainState
from benchmarks import language, sizes
from benchmarks.peers import small_gpt

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = GPT2Config(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
WRITER = replace(TINY, vocab_size=997, block_size=96)  # the prompt and 64 tokens


def batch_of(*key) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (3, TINY.block_size + 1), generator=rng_for(*key))


# ---- training ----


def test_the_small_gpt_is_ours():
    """With our weights it has our losses and, after each of three steps of either loop, our parameters."""
    model = GPT2(TINY, rng_for("bench")).train()
    theirs = language.twin(model)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert sum(p.numel() for p in theirs.parameters()) == TINY.n_parameters
    state = TrainState({"gpt2": model}, {"gpt2": language.optimizer_of(model)})
    state.clip_norm, optimizer, before = 1.0, small_gpt.configure_optimizer(theirs), model.wte.weight.detach().clone()
    for step in range(3):
        batch = batch_of("bench", "batch", step)
        loss = small_gpt.update(theirs, optimizer, batch[:, :-1], batch[:, 1:].contiguous())
        figures = lm_step(state, batch, rng_for("unused"))
        assert loss.item() == pytest.approx(figures["loss"].item(), abs=1e-5)
        stepped = language.twin(model).state_dict()
        for name, tensor in theirs.state_dict().items():
            # the gradient of the keys' bias is 0 but for rounding, so that Adam moves it by noise
            if name.endswith("c_attn.bias"):
                tensor, stepped[name] = (torch.cat(part.chunk(3)[::2]) for part in (tensor, stepped[name]))
            torch.testing.assert_close(tensor, stepped[name], rtol=0, atol=1e-5)
    assert (model.wte.weight - before).abs().max() > 1e-3


def test_batches_of_the_small_gpt():
    """Targets are the inputs moved on by one, and every offset can be drawn."""
    data = torch.arange(8)
    drawn = [small_gpt.get_batch(data, 4, 3) for _ in range(30)]
    assert all(torch.equal(x + 1, y) and x.shape == (4, 3) for x, y in drawn)
    assert {row[0].item() for x, _ in drawn for row in x} == {0, 1, 2, 3, 4}


def test_training_pair():
    """Both sides train as long, go on where they ended, and learn as much."""
    pair = language.training(TINY, 8, 20)
    text = language.shakespeare()[: 16 * 17].view(16, 17)

    def losses() -> tuple[float, float]:
        ours, theirs = pair.ours(), pair.theirs()
        pair.check(ours, theirs)
        with torch.no_grad():
            return language.lm_losses(ours, text).mean().item(), theirs(text[:, :-1], text[:, 1:].contiguous())[
                1
            ].item()

    first = losses()
    last = [losses() for _ in range(3)][-1]
    assert last[0] < first[0] - 0.3 and last[1] < first[1] - 0.3
    assert (pair.units, pair.unit, pair.format) == (20, "step", "fp32")
    for damage in (50.0, float("nan")):
        spoilt = copy.deepcopy(pair.ours())
        spoilt.ln_f.weight.data *= damage
        with pytest.raises(AssertionError, match="the loss of eight windows is"):
            pair.check(spoilt, pair.theirs())


def test_training_flops():
    """6 for each weight of a matrix and token, and attention, as counted from the modules themselves."""
    model = GPT2(TINY, rng_for("bench"))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "wpe.weight")
    attention = 3 * 2 * 2 * TINY.n_layer * TINY.n_embd * TINY.block_size**2 / 2  # of q·k and weights·v, half of it
    assert language.training_flops(TINY) == 6 * matrices * TINY.block_size + attention


# ---- writing ----


@pytest.mark.parametrize(
    ("write", "batch", "choice"),
    [(language.greedily, 1, language.GREEDY), (language.greedily, 3, language.GREEDY),
     (language.by_beams, 1, language.BEAMS)],
)  # fmt: skip
def test_identical_ids(write, batch, choice):
    """transformers writes the same ids with the same weights; a change of one is found where it is."""
    pair = language.writing(write, batch=batch, new=40, config=WRITER, **choice)
    ours, theirs = pair.ours(), pair.theirs()
    pair.check(ours, theirs)
    assert ours.shape == (batch, 32 + 40) and pair.units == batch * 40
    ours[batch - 1, 50] += 1
    with pytest.raises(AssertionError, match=f"token 50 of text {batch - 1} is"):
        pair.check(ours, theirs)
    with pytest.raises(AssertionError, match="have shape"):
        pair.check(ours[:, :-1], theirs)


def test_sampling_pair():
    pair = language.writing(language.by_top_k, batch=1, new=20, config=WRITER, identical=False, **language.SAMPLING)
    ours, theirs = pair.ours(), pair.theirs()
    pair.check(ours, theirs)
    assert not torch.equal(ours, theirs)
    with pytest.raises(AssertionError, match="have shape"):
        pair.check(ours, theirs[:, :-1])


def test_weights_that_are_read():
    """All but the table of positions, once a token."""
    pair = language.writing(language.greedily, batch=1, new=3, config=WRITER, **language.GREEDY)
    read = [p.numel() for name, p in language.ours(WRITER).named_parameters() if name != "wpe.weight"]
    assert pair.bytes == 3 * 4 * sum(read)


def test_peer_in_bf16():
    """The same weights, rounded."""
    exact, rounded = (
        dict(language.peer(WRITER, dtype).named_parameters()) for dtype in (torch.float32, torch.bfloat16)
    )
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in exact.items())


def test_rows():
    """Each row has a key of its own and asks for no more than it aims at; only the loops are written here."""
    rows = language.ROWS
    assert len({row.key for row in rows}) == len(rows) == 14
    assert all(row.required <= row.aim and isinstance(row.pair, partial) for row in rows)
    assert {row.key.removesuffix("-onednn") for row in rows if row.written_here} == {"gpt-small", "gpt-larger"}
    assert all(row.helper == row.key.endswith("-onednn") for row in rows)


# ---- cost against size ----

MADE_UP = [
    sizes.Series(
        panel="Writing", name="a model", size="tokens", unit="token", memory="cache", sizes=(128, 256, 1024),
        seconds=(0.0123, 0.5, 2.5), megabytes=(1.5, 3.0, 1234.0)
    ),
    sizes.Series(
        panel="EM", name="a mixture", size="samples", unit="iteration", memory="peak memory", sizes=(1000,),
        seconds=(1e-4,), megabytes=(None,)
    ),
]  # fmt: skip


def test_table():
    """A line for each size."""
    assert sizes.table(MADE_UP).splitlines()[2:] == [
        "| Writing: a model | 128 tokens | 12.3 ms per token | 1.5 MB, cache |",
        "| Writing: a model | 256 tokens | 500 ms per token | 3.0 MB, cache |",
        "| Writing: a model | 1,024 tokens | 2.5 s per token | 1,234.0 MB, cache |",
        "| EM: a mixture | 1,000 samples | 0.1 ms per iteration | not known |",
    ]


def test_drawing(tmp_path):
    """A picture, also where a memory is not known."""
    sizes.draw(MADE_UP, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_peak_growth():
    """What is held at once at the most counts, also if it is freed at once, and each time anew."""
    for _ in range(2):
        assert sizes.peak_growth(lambda: torch.ones(10_000_000) + 1) == pytest.approx(80, abs=8)
    assert sizes.peak_growth(lambda: None) < 8


def test_measurements():
    """Small versions of all series: a figure for each size, and more memory for more."""
    tiny = replace(TINY, block_size=64)
    series = [
        sizes.writing("tiny", tiny, (16, 64), tokens=3),
        sizes.training("VAE", sizes.vae, (4, 8), steps=1),
        sizes.training("DCGAN", sizes.dcgan, (2, 4), steps=1),
        sizes.mixture((100, 1000), iterations=2),
    ]
    assert all(len(one.sizes) == len(one.seconds) == len(one.megabytes) == 2 for one in series)
    assert all(seconds > 0 for one in series[:3] for seconds in one.seconds)
    # a key and a value of d float32 for each layer and token, and for those that there is room for
    each = 2 * tiny.n_layer * tiny.n_embd * 4 / 1e6
    assert series[0].megabytes == pytest.approx([(n + KVCache.ROOM) * each for n in (16, 64)])
    assert len(sizes.table(series).splitlines()) == 2 + 8
