"""Poems and plays: each part of a corpus as a list of texts, split so that nothing held out is known from training."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from ..runtime import rng_for
from .files import DataError, damage, data_root, verified_bytes

IGNORE = -100  # a target that is no target: the value that torch's cross_entropy skips
POEM_PARTS = ("regulated", "train", "valid", "test", "tang300", "song100")
WORK_PARTS = ("all", "train", "valid", "test", "sonnets")
HELD_OUT = 0.05  # the share of the groups of poems in each of valid and test
# Whole works are held out. The Passionate Pilgrim prints two of the sonnets and lines of Love's Labour's Lost.
WORKS_APART = {"TWELFTH NIGHT; OR, WHAT YOU WILL": "valid", "OTHELLO, THE MOOR OF VENICE": "test"}
WORKS_APART |= {"THE SONNETS": "sonnets", "THE PASSIONATE PILGRIM": None}
PUNCTUATION = re.compile(r"[，。？！；：、“”‘’《》〈〉（）…—·\s]+")
ODD = re.compile("[\\0-\\x08\\x0b\\r-\\x1f\\x7f\\ufeff]")  # control characters, and the mark of a byte order
REGULATED = re.compile(r"(?:[^\W\d_]{5}，[^\W\d_]{5}。|[^\W\d_]{7}，[^\W\d_]{7}。)+")


class Poem(NamedTuple):
    """A poem: its title, its poet, and its text with punctuation in one line."""

    title: str
    poet: str
    text: str

    @property
    def verses(self) -> list[str]:
        """The verses without punctuation: 白日依山尽, 黄河入海流, …"""
        return [verse for verse in PUNCTUATION.split(self.text) if verse]


class Work(NamedTuple):
    """A play, a long poem, or one sonnet: its title and its text, lines ending in newlines."""

    title: str
    text: str


def is_regulated(text: str) -> tuple[int, int] | None:
    """The number of verses, and of characters in each, if ``text`` has the form of regulated verse exactly, else None.

    The form: 4 or 8 verses, all of 5 or all of 7 characters, that end in ， and 。 in turn, and nothing else.
    """
    if not REGULATED.fullmatch(text):
        return None
    lengths = [len(verse) for verse in re.split("[，。]", text)[:-1]]
    return (len(lengths), lengths[0]) if len(lengths) in (4, 8) and len(set(lengths)) == 1 else None


def load_poems(part: str = "train", root: str | Path | None = None) -> list[Poem]:
    """The poems of a part of the corpus, in simplified characters.

    ``"regulated"`` is the regulated verse of the Complete Tang Poems, 36,156 poems; ``"train"``, ``"valid"`` and
    ``"test"`` are its split, about 90, 5 and 5 %. Poems that share a verse, directly or through others, stay together,
    and groups with a poem of the 300 Tang Poems, or with a verse that differs from one of theirs in a single character,
    are in ``"train"``. ``"tang300"`` and ``"song100"`` are two anthologies.
    Raises ``DataError`` for another part, and for a file that is missing or damaged.
    """
    if part not in POEM_PARTS:
        raise DataError(f"there are no poems {part!r}: choose from {', '.join(POEM_PARTS)}")
    if part in ("tang300", "song100"):
        return _read_poems(f"poems/{part}.txt", root)
    poems = _read_poems("poems/tang_regulated.txt.gz", root)
    if part == "regulated":
        return poems
    famous = tuple(verse for poem in _read_poems("poems/tang300.txt", root) for verse in poem.verses)
    return [poem for poem, place in zip(poems, _split(tuple(poems), famous), strict=True) if place == part]


def _read_poems(name: str, root: str | Path | None) -> list[Poem]:
    blocks = _text(name, root).strip("\n").split("\n\n")
    poems = []
    for block in blocks:
        title, poet, *lines = [*block.split("\n"), "", ""]
        if not (title and poet and "".join(lines)):
            raise damage(data_root(root), name, "a title, a poet and verses in each block", f"{block[:40]!r}")
        poems.append(Poem(title, poet, "".join(lines)))
    return poems


@lru_cache(maxsize=1)
def _split(poems: tuple[Poem, ...], famous: tuple[str, ...]) -> list[str]:
    """For each poem "train", "valid" or "test": connected components of the graph whose edges are shared verses."""
    label, members = list(range(len(poems))), {i: [i] for i in range(len(poems))}
    first_with: dict[str, int] = {}
    for i, poem in enumerate(poems):
        for verse in poem.verses:
            one, other = label[i], label[first_with.setdefault(verse, i)]
            if one != other:
                small, large = sorted((one, other), key=lambda name: len(members[name]))
                for j in members[small]:
                    label[j] = large
                members[large] += members.pop(small)
    components = sorted(map(sorted, members.values()))
    known = _one_off(famous)
    free = [
        component
        for component in components
        if known.isdisjoint(_one_off([verse for i in component for verse in poems[i].verses]))
    ]
    places = ["train"] * len(poems)
    held = round(HELD_OUT * len(components))
    for number, chosen in enumerate(torch.randperm(len(free), generator=rng_for("split of the poems"))[: 2 * held]):
        for i in free[chosen]:
            places[i] = "valid" if number < held else "test"
    return places


def _one_off(verses: Iterable[str]) -> set[str]:
    """Each verse with each of its characters blanked: two verses that share one differ in at most that character."""
    return {f"{verse[:i]}_{verse[i + 1 :]}" for verse in verses for i in range(len(verse))}


def load_shakespeare(part: str = "train", root: str | Path | None = None) -> list[Work]:
    """Works of Shakespeare in modern spelling, ASCII.

    ``"valid"`` is Twelfth Night, ``"test"`` Othello, ``"sonnets"`` the 154 sonnets one by one; ``"train"`` are 38
    others, without The Passionate Pilgrim, which prints some of the sonnets; ``"all"`` are all 42.
    Raises ``DataError`` for another part, and for a file that is missing or damaged.
    """
    if part not in WORK_PARTS:
        raise DataError(f"there are no works {part!r}: choose from {', '.join(WORK_PARTS)}")
    works, name = [], "shakespeare/works.txt"
    for text in _text(name, root).split("\f\n"):
        title, _, lines = text.lstrip("\n").partition("\n")
        if not (title.strip() and lines.strip()):
            raise damage(data_root(root), name, "a title and a text between form feeds", f"{text[:40]!r}")
        works.append(Work(title.strip(), text))
    if part == "all":
        return works
    chosen = [work for work in works if WORKS_APART.get(work.title, "train") == part]
    if not chosen:
        titles = [title for title, place in WORKS_APART.items() if place == part]
        expected = f"the work {titles[0]!r}" if titles else "a work to train on"
        raise damage(data_root(root), name, expected, f"{len(works)} others")
    if part != "sonnets":
        return chosen
    # a sonnet: a Roman numeral alone in a line, an empty line, and the verses up to the next numeral
    pieces = re.split(r"\n([IVXLC]+)\.?\n\n", chosen[0].text)
    if len(pieces) == 1:
        raise damage(data_root(root), name, "sonnets under Roman numerals in THE SONNETS", "none")
    return [Work(number, verses.rstrip() + "\n") for number, verses in zip(pieces[1::2], pieces[2::2], strict=True)]


def _text(name: str, root: str | Path | None) -> str:
    content = verified_bytes(name, root)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damage(data_root(root), name, "text in UTF-8", f"byte {error.start} that is none") from error
    if odd := ODD.search(text):
        found = f"{ascii(odd[0])} at character {odd.start()}"
        raise damage(data_root(root), name, "plain text with \\n at the end of a line", found)
    return text


class TokenDataset:
    """Token ids in rows of at most ``block_size`` + 1, as ``fit`` takes them: ``data[indices]`` is a batch (b, t + 1).

    Tokens 0 to t - 1 of a row are what a model reads, tokens 1 to t what it must predict.
    """

    def __init__(self, ids: Int64[Tensor, "..."], block_size: int | None):
        self.ids, self.block_size = ids, block_size

    @classmethod
    def stream(cls, ids: Int[Tensor, "n"], block_size: int) -> "TokenDataset":
        """Every window of one long text: row i holds tokens i to i + ``block_size``."""
        if len(ids) <= block_size:
            raise DataError(f"the text has {len(ids)} tokens: a window of {block_size} needs at least one more")
        return cls(ids.long(), block_size)

    @classmethod
    def rows(cls, sequences: Sequence[Sequence[int]], block_size: int) -> "TokenDataset":
        """One sequence a row, filled up on the right with ``IGNORE``. ``DataError`` for one of over block_size + 1."""
        if not sequences or min(map(len, sequences)) < 2:
            raise DataError("each of the sequences needs two tokens: one to read and one to predict")
        longest = max(map(len, sequences))
        if longest > block_size + 1:
            raise DataError(f"a sequence has {longest} tokens: a block_size of {block_size} takes {block_size + 1}")
        ids = torch.full((len(sequences), longest), IGNORE)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        return cls(ids, None)

    def __len__(self) -> int:
        return len(self.ids) if self.block_size is None else len(self.ids) - self.block_size

    def __getitem__(self, indices: Int[Tensor, "b"]) -> Int64[Tensor, "b t"]:
        """The rows at ``indices``; columns that are padding in all of them are left out."""
        if self.block_size is not None:
            return self.ids[indices[:, None] + torch.arange(self.block_size + 1, device=indices.device)]
        rows = self.ids[indices]
        return rows[:, : int((rows != IGNORE).sum(1).max())]

    def to(self, device: str | torch.device) -> "TokenDataset":
        """The same rows on ``device``."""
        return TokenDataset(self.ids.to(device), self.block_size)
