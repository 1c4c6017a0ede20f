"""GPTs in training and GPT-2 writing: the rows of language, against the usual loop and ``transformers``."""

import copy
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aigc_course.datasets import load_shakespeare
from aigc_course.generate import beam_search, generate
from aigc_course.gpt2 import GPT2, GPT2Config, Int8GPT2, lm_losses, lm_step
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit

from .clock import Pair, Row, both
from .peers import small_gpt

# ---- training ----

SMALL = GPT2Config(vocab_size=256, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
LARGER = GPT2Config(vocab_size=256, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.0)


@lru_cache(maxsize=1)
def shakespeare() -> Tensor:
    """The training texts one after another, a byte a token."""
    text = "".join(work.text for work in load_shakespeare("train"))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()


def twin(model: GPT2) -> small_gpt.GPT:
    """The peer's network with the weights of ``model``."""
    size = model.config
    theirs = small_gpt.GPT(
        small_gpt.GPTConfig(
            block_size=size.block_size, vocab_size=size.vocab_size, n_layer=size.n_layer, n_head=size.n_head,
            n_embd=size.n_embd, dropout=size.dropout
        )
    )  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("blocks.", "h.").replace("attn.qkv", "attn.c_attn").replace("attn.proj", "attn.c_proj")
        weights["transformer." + name.replace("mlp.fc", "mlp.c_fc").replace("mlp.proj", "mlp.c_proj")] = tensor
    theirs.load_state_dict({**weights, "lm_head.weight": model.wte.weight})
    return theirs


def optimizer_of(model: GPT2) -> torch.optim.AdamW:
    """The peer's settings, fused."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def training(config: GPT2Config, batch_size: int, steps: int) -> Pair:
    """``steps`` steps a sample on either side, from equal weights; each sample goes on where the last one ended."""
    text = shakespeare()
    windows = text.unfold(0, config.block_size + 1, config.block_size + 1).contiguous()
    model = GPT2(config, rng_for("benchmark", "gpt2")).train()
    theirs = twin(model)
    optimizer = small_gpt.configure_optimizer(theirs)
    fixed = windows[:: len(windows) // 8][:8]

    def check(model: GPT2, theirs: small_gpt.GPT, within: float = 0.5) -> None:
        """The batches differ, so the two agree as far as two runs do; a single batch may hold an odd page."""
        with torch.no_grad():
            their_loss = theirs(fixed[:, :-1], fixed[:, 1:].contiguous())[1]
            same("loss of eight windows", lm_losses(model, fixed).mean(), their_loss, within)

    check(model, theirs, within=1e-5)
    state = TrainState({"gpt2": model}, {"gpt2": optimizer_of(model)})

    def run_ours() -> GPT2:
        settings = TrainConfig(
            steps=state.step_count + steps, batch_size=batch_size, device="cpu", precision="fp32", clip_norm=1.0
        )
        return fit(lm_step, state, windows, settings).nets["gpt2"]

    def run_theirs() -> small_gpt.GPT:
        small_gpt.train(theirs, optimizer, text, batch_size=batch_size, steps=steps)
        return theirs

    return Pair(
        ours=run_ours, theirs=run_theirs, check=check, units=steps, unit="step",
        flops=steps * batch_size * training_flops(config)
    )  # fmt: skip


def training_flops(config: GPT2Config) -> float:
    """Of one window of a full context, forward and back: 6 for each weight of a matrix and token, and attention, where
    a token looks at half of the context on average."""
    d, t = config.n_embd, config.block_size
    weights = 12 * config.n_layer * d**2 + config.vocab_size * d
    return t * (6 * weights + 6 * config.n_layer * d * t)


def same(what: str, ours: Tensor | float, theirs: Tensor | float, within: float) -> None:
    """Raise ``AssertionError`` unless the two numbers differ by no more than ``within``."""
    ours, theirs = float(ours), float(theirs)
    if not abs(ours - theirs) <= within:  # NaN is no agreement
        raise AssertionError(f"the {what} is {ours:.6g}, the peer's {theirs:.6g}")


# ---- writing ----

PROMPT = 32
SMALLEST = GPT2Config.named("gpt2")


def lively(config: GPT2Config) -> GPT2:
    """A GPT-2 with random weights whose greedy text varies: the published weights are not at hand everywhere."""
    rng = rng_for("benchmark", "lively", 0)
    model = GPT2(config, rng)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 10 if name == "wpe.weight" else 4
            # gains of either sign, or what the embedding of the last token adds to its own logit would win for ever
            if name == "ln_f.weight":
                parameter.normal_(0, 5, generator=rng)
    return model.eval()


@lru_cache(maxsize=2)
def _saved(config: GPT2Config) -> tempfile.TemporaryDirectory:
    """A lively model as a Hugging Face folder, which goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="aigc-benchmark-", ignore_cleanup_errors=True)
    lively(config).save_pretrained(folder.name)
    return folder


@lru_cache(maxsize=2)
def ours(config: GPT2Config) -> GPT2:
    """That model as our users load it, once seen to write varied text by clear margins."""
    model = GPT2.from_pretrained(Path(_saved(config).name))
    written = generate(model, prompt(config, 1), max_new_tokens=40, temperature=0)
    different = len(set(written[0, PROMPT:].tolist()))
    with torch.no_grad():
        first, second = model(written)[0, PROMPT - 1 : -1].topk(2).values.unbind(1)
    if different < 20 or (margin := (first - second).min().item()) < 0.01:
        raise AssertionError(f"40 tokens, {different} different, smallest margin {margin:.4f}: take another seed")
    return model


@lru_cache(maxsize=4)
def peer(config: GPT2Config, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights in ``transformers``, as its users load them; it never ends a text early."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(_saved(config).name, dtype=dtype, local_files_only=True)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(config: GPT2Config, batch: int) -> Tensor:
    """Random ids (batch, 32)."""
    return torch.randint(0, config.vocab_size, (batch, PROMPT), generator=rng_for("benchmark", "prompt"))


def writing(
    write: Callable[[GPT2, Tensor, int], Tensor], *, batch: int, new: int, config: GPT2Config = SMALLEST,
    model: Callable[[GPT2Config], GPT2] = ours, dtype: torch.dtype = torch.float32, identical: bool = True,
    bytes_per_weight: int = 4, format: str = "fp32", gap: float = 1e-4, **choice: Any
) -> Pair:  # fmt: skip
    """``new`` tokens for each of ``batch`` prompts, by ``write`` and by ``transformers`` with ``choice`` in ``dtype``.

    A forward pass reads every weight but the table of positions; the first one also reads the prompt.
    """
    mine, theirs, ids = model(config), peer(config, dtype), prompt(config, batch)
    with torch.inference_mode():
        near(mine(ids), theirs(ids).logits, gap)
    mask, pad = torch.ones_like(ids), config.vocab_size - 1
    read = (config.n_parameters - config.block_size * config.n_embd) * bytes_per_weight
    return Pair(
        ours=lambda: write(mine, ids, new),
        theirs=lambda: theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new, use_cache=True, pad_token_id=pad, **choice
        ),
        check=same_ids if identical else same_shape,
        units=batch * new,
        unit="token",
        bytes=float(new * read),
        format=format,
    )


def near(ours: Tensor, theirs: Tensor, gap: float) -> None:
    """Raise ``AssertionError`` unless the logits differ by at most ``gap`` of their norm."""
    found = ((ours - theirs).norm() / theirs.norm()).item()
    if not found <= gap:
        raise AssertionError(f"the logits of the prompt differ by {found:.3g} of their norm, more than {gap:g}")


def same_shape(ours: Tensor, theirs: Tensor) -> None:
    """Raise ``AssertionError`` unless as many tokens were written."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"the ids have shape {tuple(ours.shape)}, the peer's {tuple(theirs.shape)}")


def same_ids(ours: Tensor, theirs: Tensor) -> None:
    """Raise ``AssertionError``, with the first place where they differ, unless the ids are identical."""
    same_shape(ours, theirs)
    if len(differences := (ours != theirs).nonzero()):
        row, column = min(differences.tolist(), key=lambda place: place[::-1])
        found = f"{ours[row, column].item()}, the peer's {theirs[row, column].item()}"
        raise AssertionError(f"token {column} of text {row} is {found}: {len(differences)} ids differ")


def greedily(model: GPT2, ids: Tensor, new: int) -> Tensor:
    return generate(model, ids, max_new_tokens=new, temperature=0)


def by_beams(model: GPT2, ids: Tensor, new: int) -> Tensor:
    return beam_search(model, ids, max_new_tokens=new, num_beams=5)


def by_top_k(model: GPT2, ids: Tensor, new: int) -> Tensor:
    return generate(model, ids, max_new_tokens=new, top_k=50, rng=rng_for("benchmark", "sampling"))


def in_bf16(config: GPT2Config) -> GPT2:
    return copy.deepcopy(ours(config)).bfloat16()


def in_int8(config: GPT2Config) -> GPT2:
    return Int8GPT2(ours(config))


# ---- rows ----

BF16 = {
    "model": in_bf16,
    "dtype": torch.bfloat16,
    "bytes_per_weight": 2,
    "format": "bf16",
    "identical": False,
    "gap": 0.05,
}
INT8 = {"model": in_int8, "bytes_per_weight": 1, "format": "int8", "identical": False, "gap": 0.15}
LOOP, TRANSFORMERS = "the usual small-GPT loop", f"transformers {version('transformers')}"
GREEDY, BEAMS = {"do_sample": False}, {"do_sample": False, "num_beams": 5}
SAMPLING = {"do_sample": True, "top_k": 50}
IN_FLOAT32 = [
    Row(
        key="gpt-small", workload="GPT training, 4 layers x 128, batch 12 x 64, fp32", peer=LOOP, written_here=True,
        pair=partial(training, SMALL, 12, 40), required=1.0, aim=2.0,
    ),
    Row(
        key="gpt-larger", workload="GPT training, 6 layers x 384, batch 4 x 256, fp32", peer=LOOP, written_here=True,
        pair=partial(training, LARGER, 4, 10), required=1.15, aim=3.0,
    ),
    Row(
        key="gpt2-greedy-1", workload="GPT-2 124M, greedy, batch 1, fp32, identical tokens", peer=TRANSFORMERS,
        pair=partial(writing, greedily, batch=1, new=48, **GREEDY), required=1.2, aim=3.0,
    ),
    Row(
        key="gpt2-greedy-8", workload="GPT-2 124M, greedy, batch 8, fp32, identical tokens", peer=TRANSFORMERS,
        pair=partial(writing, greedily, batch=8, new=24, **GREEDY), required=1.2, aim=5.0,
    ),
    Row(
        key="gpt2-beam-5", workload="GPT-2 124M, beam search with 5 beams, batch 1, fp32, identical tokens",
        peer=TRANSFORMERS, pair=partial(writing, by_beams, batch=1, new=24, **BEAMS), required=1.2, aim=3.0,
    ),
    Row(
        key="gpt2-top-k", workload="GPT-2 124M, sampling from the top 50, batch 1, fp32", peer=TRANSFORMERS,
        pair=partial(writing, by_top_k, batch=1, new=48, identical=False, **SAMPLING), required=1.2, aim=3.0,
    ),
]  # fmt: skip
ROWS = [
    *both(IN_FLOAT32),
    Row(
        key="gpt2-bf16", workload="GPT-2 124M, greedy, batch 1, bf16", peer=f"{TRANSFORMERS}, bf16",
        pair=partial(writing, greedily, batch=1, new=128, **BF16, **GREEDY), required=1.6, aim=2.4,
    ),
    Row(
        key="gpt2-int8", workload="GPT-2 124M, greedy, batch 1, int8 weights", peer=f"{TRANSFORMERS}, fp32",
        pair=partial(writing, greedily, batch=1, new=128, **INT8, **GREEDY), required=5.0, aim=9.0,
    ),
]  # fmt: skip
