"""Writing with GPT-2: filters of the next token's distribution, sampling, greedy and beam search."""

from .checks import GenerateError, GenerateWarning
from .decoding import (
    beam_search,
    filter_logits,
    forbid_repeated_ngrams,
    generate,
    next_log_probs,
    next_token,
    penalize_repetition,
    stream,
)

__all__ = [
    "GenerateError",
    "GenerateWarning",
    "beam_search",
    "filter_logits",
    "forbid_repeated_ngrams",
    "generate",
    "next_log_probs",
    "next_token",
    "penalize_repetition",
    "stream",
]
