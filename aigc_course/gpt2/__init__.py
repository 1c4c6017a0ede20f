"""GPT-2: the model, its cache, its training step, and Hugging Face checkpoints in and out."""

from .decoder import Decoder
from .files import GPT2Error
from .int8 import Int8GPT2, Int8Linear
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
    "Decoder",
    "GPT2Config",
    "GPT2Error",
    "Int8GPT2",
    "Int8Linear",
    "KVCache",
    "gelu",
    "lm_losses",
    "lm_step",
]
