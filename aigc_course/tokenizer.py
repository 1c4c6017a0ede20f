"""Text to token ids and back: GPT-2's byte-level BPE (byte-pair encoding), over the ``tokenizers`` library.

A text is cut into words by GPT-2's pattern (Radford et al. 2019, section 2.2), each word is its UTF-8 bytes, and pairs
of neighbours are merged as learnt (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1). Any text can be encoded, and
decodes to itself.
"""

import json
import operator
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from .datasets import verified_bytes
from .datasets.files import damage
from .runtime import CourseError, data_dir

END = "<|endoftext|>"
N_BYTES = 256
PROBE = " Moving\tpictures\r\n don't  move: 白日依山尽，\u2028caf\u00e9 \u0301\0 1,000 \U0001f600\n\n"

# A byte is written as one printable character: itself where it has one, else the next character from U+0100 on.
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_UNPRINTABLE = sorted(set(range(N_BYTES)) - set(map(ord, _ALPHABET)))
BYTE_OF = {char: ord(char) if ord(char) < N_BYTES else _UNPRINTABLE[ord(char) - N_BYTES] for char in _ALPHABET}


class TokenizerError(CourseError):
    """A text, an id or a folder that the tokenizer cannot take; the message says what mends it."""


class Tokenizer:
    """Byte-level BPE. ``vocab_size`` counts all ids from 0 on; ``end`` is the id of ``<|endoftext|>``."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # a text that spells a special token is text; see ``encode``
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.end = backend.token_to_id(END)

    def __reduce__(self) -> tuple:
        return type(self), (self.backend,)  # a copy of the backend alone would forget how it takes special tokens

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own, of 50,257 tokens, from ``data/gpt2-bpe``. Raises ``DataError`` if the files are damaged."""
        vocab, merges = _read_vocab("gpt2-bpe/encoder.json"), _read_merges("gpt2-bpe/vocab.bpe")
        expected = len(vocab) - N_BYTES - 1
        if not len(merges) == len(set(merges)) == expected:
            found = f"{len(merges)}, {len(set(merges))} of them different"
            raise damage(data_dir(), "gpt2-bpe/vocab.bpe", f"{expected} pairs, as encoder.json has tokens", found)
        try:
            return cls(_backend(vocab, merges, isolate_han=False))
        except Exception as error:  # the library raises no narrower class
            raise damage(data_dir(), "gpt2-bpe/vocab.bpe", "pairs of tokens of encoder.json", f"{error}") from error

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int, *, isolate_han: bool = False) -> "Tokenizer":
        """Learn ``vocab_size`` tokens from a text or several: the 256 bytes, then one a merge, and ``END`` as the last.

        Of the most frequent pairs the one with the smaller ids is merged, so the same texts give the same tokens. With
        ``isolate_han`` every Han character is a word of its own, and no token holds parts of two. Raises
        ``TokenizerError`` if ``vocab_size`` is below 257, or more than the text has pairs for.
        """
        if vocab_size < N_BYTES + 1:
            raise TokenizerError(f"vocab_size is {vocab_size}: the bytes and {END} alone make {N_BYTES + 1}")
        learner = _backend({}, [], isolate_han)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=_ALPHABET, show_progress=False)
        learner.train_from_iterator(map(_checked, [text] if isinstance(text, str) else text), trainer)
        learnt = json.loads(learner.to_str())["model"]
        vocab = learnt["vocab"]
        if len(vocab) < vocab_size - 1:
            raise TokenizerError(
                f"vocab_size is {vocab_size}, but the text has pairs for {len(vocab) + 1} only: lower it or add text"
            )
        return cls(_backend({**vocab, END: len(vocab)}, [tuple(pair) for pair in learnt["merges"]], isolate_han))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of ``text``; nothing is put in front or behind.

        ``"<|endoftext|>"`` in the text is thirteen characters as any others, so that no text from outside can end a
        document; with ``special`` it is the one id ``end``. Raises ``TokenizerError`` for a lone surrogate, which is
        no character and has no bytes.
        """
        first, *others = _checked(text).split(END) if special else [_checked(text)]
        ids = self.backend.encode(first, add_special_tokens=False).ids
        for other in others:
            ids += [self.end, *self.backend.encode(other, add_special_tokens=False).ids]
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids``, a list or a row of a tensor; bytes that are not UTF-8 become U+FFFD.

        A token may be part of a character, so decode the tokens of a text together. Raises ``TokenizerError`` if there
        is no such id.
        """
        return b"".join([self._bytes[id] for id in self._known(ids)]).decode("utf-8", errors="replace")

    def token_bytes(self, id: SupportsIndex) -> bytes:
        """The bytes that one token stands for. Raises ``TokenizerError`` if there is no such id."""
        return self._bytes[self._known([id])[0]]

    def _known(self, ids: Iterable[SupportsIndex]) -> list[int]:
        try:
            indices = [operator.index(id) for id in ids]
        except TypeError as error:
            raise TokenizerError(f"a token id is a whole number ({error})") from error
        for index in indices:
            if not 0 <= index < self.vocab_size:
                raise TokenizerError(f"there is no token {index}: ids go from 0 to {self.vocab_size - 1}")
        return indices

    @cached_property
    def _bytes(self) -> list[bytes]:
        tokens = map(self.backend.id_to_token, range(self.vocab_size))
        return [
            bytes(map(BYTE_OF.get, token)) if BYTE_OF.keys() >= set(token) else token.encode("utf-8")
            for token in tokens
        ]

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` reads as well.

        There, unlike here, ``"<|endoftext|>"`` in a text is always the one id ``end``.
        """
        # The class is the general one: GPT2Tokenizer would put its own pre-tokenizer in place of the file's.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": END for role in ("bos", "eos", "unk", "pad")},
            "clean_up_tokenization_spaces": False,
        }
        files = {"tokenizer.json": self.backend.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (Path(folder) / name).write_text(content + "\n", encoding="utf-8", newline="\n")
        except OSError as error:
            raise TokenizerError(f"{folder} cannot be written ({error.strerror}): name another folder") from error

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read what ``save``, or ``save_pretrained`` of a byte-level BPE tokenizer of ``transformers``, has written.

        Raises ``TokenizerError`` if a file is missing or damaged, or if it is the tokenizer of another kind of model.
        """
        path, config_path = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_str(_read(path)))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises no narrower class
            raise _fault(path, f"it describes no tokenizer ({error})") from error
        try:
            eos = json.loads(_read(config_path)).get("eos_token", END)
        except (ValueError, AttributeError, RecursionError) as error:
            raise _fault(config_path, f"it is no object in JSON ({error})") from error
        if (eos.get("content") if isinstance(eos, dict) else eos) != END:
            raise _fault(config_path, f"the end of a text is {eos!r:.80}, not {END}")
        if tokenizer.end is None:
            raise _fault(path, f"it has no token {END}")
        if None in map(tokenizer.backend.id_to_token, range(tokenizer.vocab_size)):
            raise _fault(path, f"its ids are not 0 to {tokenizer.vocab_size - 1}")
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise _fault(path, "it does not give texts back unchanged, as byte-level BPE does")
        return tokenizer


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], isolate_han: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if isolate_han:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"), words])
    backend.pre_tokenizer, backend.decoder = words, decoders.ByteLevel()
    if vocab:
        backend.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    return backend


def _read_vocab(name: str) -> dict[str, int]:
    """GPT-2's ``encoder.json``: every token with its id."""
    try:
        vocab = json.loads(verified_bytes(name))
    except (ValueError, RecursionError) as error:
        raise damage(data_dir(), name, "tokens with their ids in JSON", f"{error}") from error
    if not isinstance(vocab, dict):
        found = f"a {type(vocab).__name__}"
    elif {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != list(range(len(vocab))):
        found = "other ids"
    elif END not in vocab or not vocab.keys() >= set(_ALPHABET) >= set("".join(vocab)):
        found = "other tokens"
    else:
        return vocab
    raise damage(data_dir(), name, f"the {N_BYTES} bytes, tokens made of them and {END}, with the ids from 0 on", found)


def _read_merges(name: str) -> list[tuple[str, str]]:
    """GPT-2's ``vocab.bpe``: a line with the version, then two tokens a line."""
    try:
        version, *lines = verified_bytes(name).decode("utf-8").splitlines()
        if not version.startswith("#version"):
            raise ValueError(f"the first line {version!r:.80}")
        return [(one, other) for one, other in map(str.split, lines)]
    except ValueError as error:
        raise damage(data_dir(), name, "#version and then two tokens in each line, in UTF-8", f"{error}") from error


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"a text is a str, not {type(text).__name__}: decode bytes first")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has half of a surrogate pair at character {error.start}, which is no character: "
            'mend it by text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
        ) from error
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _fault(path, "there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(path, f"it cannot be read ({error})") from error


def _fault(path: Path, found: str) -> TokenizerError:
    return TokenizerError(f"{path}: {' '.join(found.split())}; restore the folder, or write it anew by Tokenizer.save")
