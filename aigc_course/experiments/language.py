"""Side experiments with language models: what they write, held to what they were trained on."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from .. import recipes
from ..datasets import is_regulated, load_poems
from ..metrics import longest_copied_span
from ..runtime import rng_for

Row = dict[str, Any]


def language_memory(
    device: torch.device, *, temperatures: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25), n: int = 300
) -> Iterator[Row]:
    """How much of the training poems the shipped model ``tang`` repeats, over the temperature that it is drawn at.

    The first row is the yardstick: as many held-out poems by people, which share verses with no poem of the training.
    A span is counted in characters, punctuation among them; a verse is copied if it stands in a training poem as a
    verse. Poems are drawn without a filter, and end where the model ends them or the context does.
    """
    language = recipes.load_pretrained("tang", device=str(device))
    train, test = load_poems("train"), load_poems("test")
    corpus, verses = "\n".join(poem.text for poem in train), {verse for poem in train for verse in poem.verses}
    chosen = torch.randperm(len(test), generator=rng_for(0, "memory", "held out"))[:n]
    yield {"source": "held-out poems", "temperature": None, **_copies([test[i].text for i in chosen], corpus, verses)}
    for temperature in temperatures:
        rng = rng_for(0, "memory", f"{temperature:g}", device=device)
        texts = recipes.sample_texts(language, n, rng, temperature=temperature)
        yield {"source": "samples", "temperature": temperature, **_copies(texts, corpus, verses)}


def _copies(texts: list[str], corpus: str, verses: set[str]) -> Row:
    spans = [longest_copied_span(text, corpus) for text in texts]
    lengths = [len(span) for span in spans]
    whole = [any(verse in verses for verse in _verses(text)) for text in texts]
    return {
        "texts": len(texts),
        "mean span": statistics.mean(lengths),
        "longest span": max(lengths),
        "the longest": max(spans, key=len),
        "share with a copied verse": sum(whole) / len(texts),
        "share in form": sum(is_regulated(text) is not None for text in texts) / len(texts),
        "spans": sorted(lengths),
    }


def _verses(text: str) -> list[str]:
    return text.replace("。", "，").strip("，").split("，")
