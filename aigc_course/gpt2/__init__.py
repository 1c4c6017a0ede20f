"""GPT-2: the model, its cache, its training step, and Hugging Face checkpoints in and out."""

from .files import GPT2Error
from .model import (
    GPT2,
    IGNORE,
    MLP,
    Block,
    CausalSelfAttention,
    GPT2Config,
    KVCache,
    gelu,
    lm_losses,
    lm_step,
)

__all__ = [
    "GPT2",
    "IGNORE",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "GPT2Config",
    "GPT2Error",
    "KVCache",
    "gelu",
    "lm_losses",
    "lm_step",
]
