"""Byte-level BPE: GPT-2's against tiktoken, training against a naive twin, files against transformers, refusals."""

import copy
import importlib.util
import itertools
import json
import os
import pickle
import re
import shutil
import time
from collections import Counter

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from aigc_course import tokenizer as module
from aigc_course.datasets import DataError, load_poems
from aigc_course.runtime import CourseError, course_dir
from aigc_course.tokenizer import END, PROBE, Tokenizer, TokenizerError

COUPLETS = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
PIECES = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "'s", "'ll", "'S", "’s", "don't", " the", "Hello", "2026"]
PIECES += ["3.14", "，", "。", "山", "白日", "é", "e\u0301", "\u200d", "\U0001f600", "\U0001f469\u200d\U0001f52c", "\0"]
PIECES += ["\x7f", "\ufeff", "\ufffd", "\uffff", "²", "٣", "ǅ", "ﬁ", "Ġ", END, "<|end", "oftext|>", "<|endoftext|> "]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join)


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """GPT-2's encoding by tiktoken, from the same two files, read by its own reader; nothing is downloaded."""
    folder = course_dir() / "data" / "gpt2-bpe"
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})


@pytest.fixture(scope="module")
def poems():
    """The 300 Tang Poems."""
    return [poem.text for poem in load_poems("tang300")]


@pytest.fixture(scope="module")
def tang(poems):
    return Tokenizer.train(poems, 1500, isolate_han=True)


@pytest.fixture(params=["gpt2", "tang"])
def either(request):
    return request.getfixturevalue(request.param)


# ---- GPT-2's own ----


@given(texts)
@settings(deadline=None, max_examples=200)
def test_gpt2_is_tiktoken(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.encode(text, special=True) == reference.encode(text, allowed_special="all")
    assert gpt2.decode(gpt2.encode(text)) == text == gpt2.decode(gpt2.encode(text, special=True))


@pytest.mark.parametrize("text", ["", END, "\n" * 3 + "a", PROBE, "a" * 5000, "  " * 500, "山" * 500, END * 3])
def test_gpt2_on_hostile_strings(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


def test_the_tokens_of_gpt2(gpt2, reference):
    assert gpt2.vocab_size == reference.n_vocab == 50257 and gpt2.end == reference.eot_token == 50256
    for i in (*range(300), *range(300, 50256, 7)):
        assert gpt2.token_bytes(i) == reference.decode_single_token_bytes(i)
    assert gpt2.token_bytes(50256) == END.encode()


def test_known_ids(gpt2):
    """The documentation of transformers, and the count that the lessons quote."""
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.encode(" Hello world") == [18435, 995]
    assert len(COUPLETS) == 24 and len(gpt2.encode(COUPLETS)) == 55


def test_a_character_may_take_one_to_three_tokens(gpt2):
    assert {len(gpt2.encode(char)) for char in COUPLETS} == {1, 2, 3}


@pytest.mark.parametrize("unit", [" ", "山"])
def test_a_megabyte_of_one_thing_is_encoded_in_seconds(gpt2, unit):
    text = unit * (2**20 // len(unit.encode()))
    start = time.process_time()  # not the clock on the wall: others may be at work
    ids = gpt2.encode(text)
    assert time.process_time() - start < 5
    assert gpt2.decode(ids) == text


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    shutil.copytree(course_dir() / "data" / "gpt2-bpe", tmp_path / "gpt2-bpe")
    monkeypatch.setenv("AIGC_DATA_DIR", str(tmp_path))
    for name, content in [("vocab.bpe", b"#version: 0.2\n"), ("encoder.json", b"{}")]:
        kept = (tmp_path / "gpt2-bpe" / name).read_bytes()
        (tmp_path / "gpt2-bpe" / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            Tokenizer.gpt2()
        (tmp_path / "gpt2-bpe" / name).write_bytes(kept)
    assert Tokenizer.gpt2().vocab_size == 50257


# ---- text and special tokens ----


def test_the_end_is_text_unless_asked_for(either):
    ids = either.encode(f"a{END}b")
    assert either.end not in ids and either.decode(ids) == f"a{END}b"
    asked = either.encode(f"a{END}b{END}", special=True)
    assert asked == [*either.encode("a"), either.end, *either.encode("b"), either.end]
    assert either.encode(f"a{END}b") == ids, "a request for special tokens must not last"
    assert either.encode(END, special=True) == [either.end] and either.decode([either.end]) == END


def test_a_copy_is_the_same(tang):
    for twin in (copy.deepcopy(tang), pickle.loads(pickle.dumps(tang))):
        assert twin.encode(f"山{END}", special=True) == tang.encode(f"山{END}", special=True)
        assert twin.encode(f"山{END}") == tang.encode(f"山{END}") and twin.end == tang.end


def test_nothing_is_put_in_front_or_behind(either):
    assert either.encode("") == [] == either.encode("", special=True)
    assert either.decode([]) == ""


def test_broken_characters_are_decoded_to_the_replacement_character(gpt2):
    ids = gpt2.encode("黄")
    assert len(ids) > 1 and gpt2.decode(ids[:1]) == "\ufffd" == gpt2.decode(ids[-1:])
    assert b"".join(map(gpt2.token_bytes, ids)) == "黄".encode()


@given(st.lists(st.integers(0, 50256), max_size=12))
@settings(deadline=None, max_examples=100)
def test_any_ids_are_decoded_as_tiktoken_does(gpt2, reference, ids):
    assert gpt2.decode(ids) == reference.decode(ids)


def test_ids_may_come_from_tensors_and_arrays(gpt2):
    ids = torch.tensor(gpt2.encode(COUPLETS))
    assert gpt2.decode(ids) == COUPLETS == gpt2.decode(ids.numpy())


@given(texts)
@settings(deadline=None, max_examples=100)
def test_a_trained_tokenizer_gives_every_text_back(tang, text):
    """Also one of characters that it never saw, for the bytes are tokens."""
    assert tang.decode(tang.encode(text)) == text
    assert all(0 <= i < tang.end for i in tang.encode(text))


# ---- training ----


def naive_bpe(words: list[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Count all pairs anew before each merge; of the most frequent, the pair with the smaller ids is merged."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    ids = {bytes([b]): i for i, b in enumerate(order)}
    split = Counter(tuple(bytes([b]) for b in word.encode()) for word in words)
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in split.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids[b"".join(best)] = len(ids)
        merged = Counter()
        for word, count in split.items():
            new = []
            for part in word:
                if new and (new[-1], part) == best:
                    new[-1] = new[-1] + part
                else:
                    new.append(part)
            merged[tuple(new)] += count
        split = merged
    return merges


def merges_of(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    pairs = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    return [tuple(bytes(module.BYTE_OF[char] for char in part) for part in pair) for pair in pairs]


def test_merges_by_hand():
    """Pairs of ab: 3 times; bc: 2; ca: 1. Then abc, made of ab and c: twice."""
    tokenizer = Tokenizer.train(["abcab", "abc"], 259)
    assert merges_of(tokenizer) == [(b"a", b"b"), (b"ab", b"c")]
    assert [tokenizer.token_bytes(i) for i in (256, 257, 258)] == [b"ab", b"abc", END.encode()]
    assert tokenizer.encode("abcabb") == [257, 256, tokenizer.encode("b")[0]]
    assert tokenizer.vocab_size == 259 and tokenizer.end == 258


@pytest.mark.parametrize("isolate_han", [True, False])
def test_merges_against_a_naive_twin(poems, isolate_han):
    text = "".join(poems[:40])
    words = re.findall(r"[，。？！]+|[^，。？！]" + ("" if isolate_han else "+"), text)
    tokenizer = Tokenizer.train(text, 256 + 60 + 1, isolate_han=isolate_han)
    assert merges_of(tokenizer) == naive_bpe(words, 60)


def test_the_vocabulary_is_as_asked(tang):
    assert tang.vocab_size == 1500 and tang.end == 1499 and tang.token_bytes(1499) == END.encode()
    assert {tang.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert len({tang.token_bytes(i) for i in range(1500)}) == 1500
    assert Tokenizer.train("", 257).vocab_size == 257


def han_characters(data: bytes) -> int:
    """How many characters of three bytes the bytes belong to, whole or in part."""
    starts = sum(byte >= 0xE0 for byte in data)
    return starts + (bool(data) and 0x80 <= data[0] < 0xC0)


def test_no_token_spans_two_han_characters(tang, poems):
    assert max(han_characters(tang.token_bytes(i)) for i in range(256, 1499)) == 1
    assert len(tang.encode("白日依山")) >= 4 and tang.token_bytes(tang.encode("山")[0]) == "山".encode()
    free = Tokenizer.train(poems, 1500)
    assert max(han_characters(free.token_bytes(i)) for i in range(256, 1499)) > 1
    ends = set(itertools.accumulate(len(tang.token_bytes(i)) for i in tang.encode(COUPLETS)))
    assert ends >= set(range(3, 73, 3)), "every character ends where a token ends"


def test_training_is_a_function_of_the_text(poems, tang, monkeypatch):
    """With one thread or many."""
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        again = Tokenizer.train(iter(poems), 1500, isolate_han=True)
        assert again.backend.to_str() == tang.backend.to_str()


def test_one_text_or_several():
    """No pair reaches from one text into the next."""
    assert Tokenizer.train("abab", 259).vocab_size == 259
    assert merges_of(Tokenizer.train(["ab", "ab"], 258)) == [(b"a", b"b")]
    with pytest.raises(TokenizerError, match="the text has pairs for 258 only"):
        Tokenizer.train(["ab", "ab"], 259)


# ---- files ----


@pytest.fixture
def folder(tang, tmp_path):
    tang.save(tmp_path / "new" / "tang")
    return tmp_path / "new" / "tang"


def test_saved_and_loaded(either, poems, tmp_path):
    either.save(tmp_path)
    loaded = Tokenizer.load(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (loaded.vocab_size, loaded.end) == (either.vocab_size, either.end)
    for text in (*poems[:20], PROBE, END, "To be, or not to be"):
        assert loaded.encode(text) == either.encode(text)
        assert loaded.encode(text, special=True) == either.encode(text, special=True)
    before = (tmp_path / "tokenizer.json").read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_reads_the_same(either, poems, tmp_path, with_model):
    """Also beside the settings of a GPT-2, whose own class of tokenizers knows no isolated characters."""
    from transformers import AutoTokenizer, GPT2Config

    if with_model:
        GPT2Config(vocab_size=either.vocab_size, n_layer=1, n_head=1, n_embd=4).save_pretrained(tmp_path)
    either.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*poems[:50], PROBE, "To be, or not to be: that's the question .", "", " ", "\n\n"):
        assert theirs(text)["input_ids"] == either.encode(text)
        assert theirs.decode(either.encode(text)) == text
    assert theirs(f"a{END}b")["input_ids"] == either.encode(f"a{END}b", special=True)
    assert len(theirs) == theirs.vocab_size == either.vocab_size
    assert {theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id} == {either.end}
    theirs.padding_side = "left"
    rows = theirs(["白日", "白日依山尽"], padding=True)["input_ids"]
    assert len(rows[0]) == len(rows[1]) and rows[0][0] == either.end
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.load(tmp_path / "theirs")
    assert all(ours.encode(text) == either.encode(text) for text in (*poems[:20], PROBE, END))
    assert (ours.vocab_size, ours.end) == (either.vocab_size, either.end)


def edited(path, *keys, value):
    """Set one entry of a JSON file."""
    content = place = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def lowercased(path):
    edited(path, "normalizer", value={"type": "Lowercase"})


def without_end(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["model"]["vocab"][END]
    path.write_text(json.dumps({**content, "added_tokens": []}), encoding="utf-8")


def with_a_gap(path):
    edited(path, "model", "vocab", "Ā", value=9999)


def with_a_space_in_front(path):
    edited(path, "pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokenizer.json", lambda path: path.unlink(), "there is no such file"),
        ("tokenizer.json", cut, "it describes no tokenizer"),
        ("tokenizer.json", lambda path: path.write_bytes(b""), "it describes no tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("[]", encoding="utf-8"), "it describes no tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("{}", encoding="utf-8"), "it describes no tokenizer"),
        ("tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "it cannot be read"),
        ("tokenizer.json", lambda path: (path.unlink(), path.mkdir()), "it cannot be read"),
        ("tokenizer.json", without_end, r"it has no token <\|endoftext\|>"),
        ("tokenizer.json", with_a_gap, "its ids are not 0 to 1499"),
        ("tokenizer.json", lowercased, "it does not give texts back unchanged"),
        ("tokenizer.json", with_a_space_in_front, "it does not give texts back unchanged"),
        ("tokenizer_config.json", lambda path: path.unlink(), "there is no such file"),
        ("tokenizer_config.json", cut, "it is no object in JSON"),
        ("tokenizer_config.json", lambda path: path.write_text("[]", encoding="utf-8"), "it is no object in JSON"),
        ("tokenizer_config.json", lambda path: edited(path, "eos_token", value="</s>"), "the end of a text is '</s>'"),
        ("tokenizer_config.json", lambda path: edited(path, "eos_token", value={"content": "x"}), "the end of a text"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, name, damage, message):
    damage(folder / name)
    with pytest.raises(TokenizerError, match=message) as refusal:
        Tokenizer.load(folder)
    said = str(refusal.value)
    assert "\n" not in said and said.startswith(str(folder / name)) and "Tokenizer.save" in said


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere.tokenizer.json: there is no such file"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_file_is_no_folder_to_write(tang, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TokenizerError, match="file cannot be written"):
        tang.save(tmp_path / "file")


def test_the_older_form_of_the_end_of_text_is_read(folder):
    edited(folder / "tokenizer_config.json", "eos_token", value={"__type": "AddedToken", "content": END})
    assert Tokenizer.load(folder).vocab_size == 1500


def test_padding_and_truncation_of_others_are_dropped(folder, tang):
    """transformers keeps them in the file, if the tokenizer was last used with them."""
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edited(folder / "tokenizer.json", "truncation", value=truncation)
    padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": END}
    edited(folder / "tokenizer.json", "padding", value=padding)
    assert Tokenizer.load(folder).encode(COUPLETS) == tang.encode(COUPLETS)


# ---- what is refused ----


@pytest.fixture(scope="module")
def plain():
    """The module as its users import it: without the checks of types, which refuse bad arguments before it does."""
    spec = importlib.util.spec_from_file_location("aigc_course.tokenizer", module.__file__)
    twin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twin)
    return twin


@pytest.fixture(scope="module")
def small(plain):
    return plain.Tokenizer.train("abab", 258)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode("ab\ud800c"), "half of a surrogate pair at character 2"),
        (lambda t: t.encode("\udfff", special=True), "half of a surrogate pair at character 0"),
        (lambda t: t.encode(f"a{END}\ud800", special=True), "half of a surrogate pair at character 14"),
        (lambda t: t.encode(b"ab"), "a text is a str, not bytes"),
        (lambda t: t.encode(None), "a text is a str, not NoneType"),
        (lambda t: t.encode(["ab"]), "a text is a str, not list"),
        (lambda t: t.decode([0, 258]), "there is no token 258: ids go from 0 to 257"),
        (lambda t: t.decode([-1]), "there is no token -1"),
        (lambda t: t.decode([2**70]), "there is no token 1180591620717411303424"),
        (lambda t: t.decode([1.0]), "a token id is a whole number .*float"),
        (lambda t: t.decode(["a"]), "a token id is a whole number .*str"),
        (lambda t: t.decode([[1, 2]]), "a token id is a whole number"),
        (lambda t: t.decode(torch.zeros(2, 3).long()), "a token id is a whole number"),
        (lambda t: t.token_bytes(258), "there is no token 258"),
        (lambda t: type(t).train("abab", 256), "vocab_size is 256: .* make 257"),
        (lambda t: type(t).train("ab", 300), "the text has pairs for 258 only: lower it"),
        (lambda t: type(t).train(["ab", "a\ud800"], 258), "half of a surrogate pair at character 1"),
        (lambda t: type(t).train([b"ab"], 258), "a text is a str, not bytes"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_one_line(plain, small, call, message):
    with pytest.raises(plain.TokenizerError, match=message) as refusal:
        call(small)
    assert "\n" not in str(refusal.value) and isinstance(refusal.value, CourseError)


def test_the_remedy_for_half_a_pair_works(small):
    """Two halves make a character; one is replaced."""
    mended = "a\ud83d\ude00\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended == "a\U0001f600\ufffd" and small.decode(small.encode(mended)) == mended
