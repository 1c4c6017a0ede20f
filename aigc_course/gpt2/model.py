"""GPT-2: the network, its objective and its step, after Radford et al. (2019).

"Language models are unsupervised multitask learners", OpenAI, with the code that was published with it.

Axes: b sequences, t tokens, d numbers for each token (``n_embd``), h heads, v entries of the vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from .. import linear, ranks
from ..state import TrainState
from . import files
from .files import GPT2Error

IGNORE = -100  # a target that is padding


# ---- network ----


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The size of a GPT-2; the defaults are those of the smallest published one. ``block_size`` is the context."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise GPT2Error(
                    f"GPT2Config.{name} is {getattr(self, name)!r}: it must be a whole number of at least 1"
                )
        if self.n_embd % self.n_head:
            raise GPT2Error(f"n_embd is {self.n_embd}: it must be a multiple of the {self.n_head} heads")
        if not 0 <= self.dropout < 1:
            raise GPT2Error(f"GPT2Config.dropout is {self.dropout}: it must lie in [0, 1)")

    @classmethod
    def named(cls, name: str) -> "GPT2Config":
        """One of the four published sizes: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"."""
        sizes = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
        sizes["gpt2-xl"] = (48, 25, 1600)
        if name not in sizes:
            raise GPT2Error(f"there is no size {name!r}: choose from {', '.join(sizes)}")
        n_layer, n_head, n_embd = sizes[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)

    @property
    def n_parameters(self) -> int:
        """The number of parameters, by formula; the output layer shares the embedding's and adds none."""
        d = self.n_embd
        return (self.vocab_size + self.block_size) * d + self.n_layer * (12 * d * d + 13 * d) + 2 * d


class Linear(linear.Linear):
    """A linear layer that draws no weights of its own: ``GPT2`` draws them."""

    def reset_parameters(self) -> None: ...


class Embedding(nn.Embedding):
    """``nn.Embedding`` that draws no weights of its own: ``GPT2`` draws them."""

    def reset_parameters(self) -> None: ...


class KVCache:
    """The keys and values of every layer for the tokens read so far, each (b, h, length, d / h).

    They stand in tensors with room for ``ROOM`` tokens more, so that a token is written, and all are copied seldom.
    """

    ROOM = 128

    def __init__(self):
        self._rooms: list[list[Tensor]] = []  # keys and values, each (b, h, room, d / h)
        self._lengths: list[int] = []

    @property
    def length(self) -> int:
        """The number of tokens read so far."""
        return self._lengths[0] if self._lengths else 0

    @property
    def nbytes(self) -> int:
        """The memory that they take, with the room."""
        return sum(room.nbytes for rooms in self._rooms for room in rooms)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens to those of ``layer``; returns all so far."""
        if layer == len(self._rooms):
            self._rooms.append([k[:, :, :0], v[:, :, :0]])
            self._lengths.append(0)
        rooms, past, length = self._rooms[layer], self._lengths[layer], self._lengths[layer] + k.shape[2]
        kept = k.requires_grad or rooms[0].requires_grad  # backward asks that nothing be overwritten
        locked = rooms[0].is_inference() and not torch.is_inference_mode_enabled()
        if length > rooms[0].shape[2] or kept or locked:
            for i, new in enumerate((k, v)):
                free = new.new_empty(*new.shape[:2], 0 if kept else self.ROOM, new.shape[3])
                rooms[i] = torch.cat([rooms[i][:, :, :past], new, free], dim=2)
        else:
            rooms[0][:, :, past:length], rooms[1][:, :, past:length] = k, v
        self._lengths[layer] = length
        return rooms[0][:, :, :length], rooms[1][:, :, :length]

    def reorder(self, rows: Int[Tensor, "b"]) -> None:
        """Let row i hold what row ``rows[i]`` held, as beam search asks for."""
        self._rooms = [[room[rows] for room in rooms] for rooms in self._rooms]

    def crop(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        if length < 0:
            raise GPT2Error(f"length is {length}: a cache keeps 0 tokens or more")
        self._lengths = [min(length, past) for past in self._lengths]


class CausalSelfAttention(nn.Module):
    """Each token takes a weighted mean of the values of the tokens up to itself (arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.proj = Linear(config.n_embd, config.n_embd)

    def heads(self, x: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each (b, h, t, d / h)."""
        b, t, d = x.shape
        return self.qkv(x).view(b, t, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4).unbind()

    def weights(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t t"]:
        """How much token i attends to token j, in each head; rows sum to 1. ``forward`` does without."""
        q, k, _ = self.heads(x)
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return logits.masked_fill(later, -math.inf).softmax(-1)

    def forward(
        self, x: Float[Tensor, "b t d"], mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b t d"]:
        q, k, v = self.heads(x)
        if cache is not None:
            if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # where attention is faster in float32
                q, k, v = q.float(), k.float(), v.float()
            k, v = cache.append(layer, k, v)
        # without a mask, more than one token means that no token came before them
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.dropout * self.training, is_causal=mask is None and x.shape[1] > 1
        ).to(x.dtype)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


def gelu(x: Tensor) -> Tensor:
    """The Gaussian error linear unit in the form with a tanh (arXiv:1606.08415, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class MLP(nn.Module):
    """Two layers applied to each token alone, four times as wide inside."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.fc = Linear(config.n_embd, 4 * config.n_embd)
        self.proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))  # the same as gelu above, in one kernel


class Block(nn.Module):
    """Attention and MLP, each normalised first and added to what came in."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "b t d"], mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b t d"]:
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """Token and position embeddings, ``n_layer`` blocks, a last LayerNorm; the logits reuse the token embedding.

    ``rng`` draws the initial weights: N(0, 0.02²), positions N(0, 0.01²), and the layers that write into the residual
    stream divided by the root of their number (section 2.3, and the code published with the paper). Without it the
    tensors have shapes and no content, for ``from_pretrained`` and for counting.
    """

    def __init__(self, config: GPT2Config, rng: torch.Generator | None):
        super().__init__()
        self.config = config
        with torch.device("meta" if rng is None else rng.device):
            self.wte = Embedding(config.vocab_size, config.n_embd)
            self.wpe = Embedding(config.block_size, config.n_embd)
            self.drop = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        if rng is not None:
            self._initialise(rng)

    @torch.no_grad()
    def _initialise(self, rng: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, 0.01 if module is self.wpe else 0.02, generator=rng)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        for block in self.blocks:
            for layer in (block.attn.proj, block.mlp.proj):
                layer.weight /= math.sqrt(2 * self.config.n_layer)

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b past_and_t"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """The logits of each next token, in float32.

        ``attention_mask`` has a 1 for a token and a 0 for padding, which stands on the left; with a ``cache``, ``ids``
        are the new tokens, and the mask covers those in the cache too. Raises ``GPT2Error`` for ids out of range and
        for more tokens than the context holds.
        """
        return self.logits(self.hidden(ids, attention_mask=attention_mask, cache=cache))

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """The scores of the vocabulary for what ``hidden`` returned."""
        return linear.linear(hidden, self.wte.weight).float()

    def hidden(
        self,
        ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b past_and_t"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """What the last LayerNorm gives for each token; arguments as for the call."""
        past = 0 if cache is None else cache.length
        positions, mask = self._positions_and_mask(ids, attention_mask, past)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        return self.ln_f(x)

    def _positions_and_mask(
        self, ids: Tensor, attention_mask: Tensor | None, past: int
    ) -> tuple[Tensor, Tensor | None]:
        t, size = ids.shape[1], self.config
        if ids.numel() == 0:
            raise GPT2Error(f"ids have shape {tuple(ids.shape)}: give at least one token, such as the end token")
        if ids.min() < 0 or ids.max() >= size.vocab_size:
            raise GPT2Error(
                f"ids lie in {ids.min().item()} to {ids.max().item()}, the vocabulary has 0 to {size.vocab_size - 1}: "
                "encode the text with this model's own tokenizer"
            )
        if attention_mask is not None and attention_mask.shape != (len(ids), past + t):
            raise GPT2Error(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(len(ids), past + t)}")
        if attention_mask is None or bool(attention_mask.all()):
            last, positions = past + t, torch.arange(past, past + t, device=ids.device)
        else:
            positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]  # a text starts at position 0
            last = int(positions.max()) + 1
        if last > size.block_size:
            raise GPT2Error(f"{last} tokens are more than the context of {size.block_size}: keep the last ones only")
        if positions.ndim == 1 and (past == 0 or t == 1):
            return positions, None
        ends = torch.arange(past, past + t, device=ids.device)[:, None]
        columns = torch.arange(past + t, device=ids.device)
        mask = columns <= ends
        if positions.ndim == 2:
            # padding attends to itself: a softmax over nothing would be NaN, and 0 * NaN spreads
            mask = (mask & attention_mask.bool()[:, None, None, :]) | (columns == ends)
        return positions, mask

    @torch.no_grad()
    def trace(self, ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """What flows through the model in eval mode: "embedding", then for each block i "attention i", its weights
        (b, h, t, t), and "block i", what it returns (b, t, d), then "ln_f" and "logits".
        """
        was_training = self.training
        self.eval()
        positions, _ = self._positions_and_mask(ids, None, 0)
        flow = {"embedding": self.wte(ids) + self.wpe(positions)}
        x = flow["embedding"]
        for i, block in enumerate(self.blocks):
            flow[f"attention {i}"] = block.attn.weights(block.ln_1(x))
            flow[f"block {i}"] = x = block(x)
        flow["ln_f"] = self.ln_f(x)
        flow["logits"] = self.logits(flow["ln_f"])
        self.train(was_training)
        return flow

    # ---- weights out and in ----

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` so that ``transformers`` opens ``folder``; returns it."""
        config = {files.OURS_TO_THEIRS[name]: value for name, value in asdict(self.config).items() if name != "dropout"}
        return files.write(Path(folder), config, self.config.dropout, self.state_dict())

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path) -> "GPT2":
        """The model in a Hugging Face folder, or of that name on the hub where there is a network, in eval mode.

        Weights in half precision become float32. Raises ``GPT2Error`` for a folder that does not hold just what a
        GPT-2 of its ``config.json`` has; only safetensors are read, never a pickle.
        """
        folder = files.find(path_or_name)
        settings = files.read_config(folder)
        model = cls(GPT2Config(**settings), None)
        weights = files.read_weights(folder, like={name: tensor.shape for name, tensor in model.state_dict().items()})
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(True)


# ---- objective, step ----


def lm_losses(model: GPT2, batch: Int64[Tensor, "b t_and_1"]) -> Float[Tensor, "b t"]:
    """The negative log-likelihood, in nats, of each token but the first given those before it; 0 for padding."""
    inputs, targets = batch[:, :-1].clamp_min(0), batch[:, 1:]
    real = targets != IGNORE
    logits = model.logits(model.hidden(inputs)[real])  # the vocabulary is wide: padding goes without
    losses = torch.zeros(targets.shape, device=targets.device)
    losses[real] = F.cross_entropy(logits, targets[real], reduction="none")
    return losses


def lm_step(state: TrainState, batch: Int64[Tensor, "b t_and_1"], rng: torch.Generator) -> dict[str, Tensor]:
    """One update of "gpt2" on the mean loss of the batch's real tokens, in nats; ``rng`` is not used."""
    n = (batch[:, 1:] != IGNORE).sum().float()
    ranks.average([n])  # of several ranks one may have longer texts: each token counts the same
    loss = lm_losses(state.nets["gpt2"], batch).sum() / n
    state.minimize("gpt2", loss)
    return {"loss": loss}
