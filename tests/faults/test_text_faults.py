"""Texts meant to break something: the tokenizer against tiktoken, hostile prompts, prompts around the context's length.

Only the first row needs hypothesis and tiktoken, and imports them itself: each worker imports this module.
"""

import os
import re
import sys
import time
import traceback
import warnings
from typing import NamedTuple

import pytest
import torch

from aigc_course import cli, recipes
from aigc_course.generate import GenerateError, GenerateWarning, beam_search, generate, next_token, stream
from aigc_course.gpt2 import GPT2, GPT2Config
from aigc_course.runtime import CourseError, course_dir, rng_for
from aigc_course.tokenizer import END, Tokenizer, TokenizerError
from faults import workers
from faults.table import FULL, clear_error

pytestmark = pytest.mark.usefixtures("one_thread")
MB = 2**20


# ---- the tokenizer against tiktoken ----

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u200b", "\u3000"]
SHORTENED = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'LL",
    "’s",
    "'",
    "''",
    "'sd",
    " 's",
    "'\n's",
    "l",
    "x ",
]
NUMBERS = ["0", "12", "007", "3.14", "1,000", "-5", "1e-9", "٣", "²", "½", "Ⅷ", "万", "0x1F", "१२३", "\U0001d7d8", " "]
EMOJI = ["\U0001f469", "\u200d", "\U0001f52c", "\U0001f3fd", "\ufe0f", "\U0001f1e8\U0001f1f3", "\u20e3", "❤", "1", "☺ "]
SPECIAL = [END, "<|endoftext", "|>", "<|", "endoftext", END[:-1], "<|im_start|>", "<|ENDOFTEXT|>", " ", "\n", "a", "Ġ"]
PLAIN = ["Hello", " world", "don't", " the", "白日依山尽，", "黄河", "。", "é", "e\u0301", "Ǆ", "ﬁ", "\ufeff", "\0"]
# tiktoken dies of the first: its stack overflows
LONG = [" " * MB + "a", " " * MB, "a" * MB, "'" * MB, END * 20_000, "\U0001f600" * 50_000, "a\u0301" * 50_000, "1" * MB]


def texts(st):
    """Strings of many kinds, as strategies of hypothesis."""

    def made_of(pieces):
        return st.lists(st.sampled_from(pieces), max_size=30).map("".join)

    planes = [(0, 0x7F), (0x80, 0x7FF), (0x300, 0x36F), (0x590, 0x8FF), (0x2E80, 0xD7FF), (0xE000, 0xFFFF)]
    planes += [(0x10000, 0x1FFFF), (0x20000, 0x3FFFF), (0xE0000, 0x10FFFF)]
    kinds = [made_of(pieces) for pieces in (SPACES, SHORTENED, NUMBERS, EMOJI, SPECIAL, PLAIN)]
    kinds += [st.text(st.characters(min_codepoint=first, max_codepoint=last), max_size=40) for first, last in planes]
    kinds += [st.text(st.characters(categories=[kind]), max_size=30) for kind in ("Cc", "Cf", "Mn", "N", "Z", "Cn")]
    kinds += [st.text(), st.text(st.characters(codec="utf-8") | st.characters(categories=["Cs"]), max_size=20)]
    kinds += [st.binary(max_size=80).map(lambda data: data.decode("utf-8", errors="replace"))]
    kinds += [st.builds(str.__mul__, st.text(min_size=1, max_size=4), st.integers(50, 2000))]
    some = st.one_of(kinds)
    return some | st.lists(some, max_size=6).map("".join)


def by_tiktoken(theirs, text, special, failed):
    """The ids that tiktoken gives; None where it fails, by a panic too, which is no ``Exception``: ``failed`` grows."""
    try:
        return theirs.encode(text, allowed_special={END} if special else set(), disallowed_special=())
    except KeyboardInterrupt:
        raise
    except BaseException:
        failed.add(text)
        return None


def assert_same_tokens(ours, theirs, text, failed):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        clear_error(lambda: ours.encode(text), "surrogate", f"character {error.start},", kind=TokenizerError)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as the message says
    for special in (False, True):
        ids, expected = ours.encode(text, special=special), by_tiktoken(theirs, text, special, failed)
        assert expected is None or ids == expected, "unlike tiktoken"
        assert ours.decode(ids) == text, "decoded to another text"


@pytest.mark.fault("15a")
def test_every_text_is_encoded_as_tiktoken_does_and_comes_back(fault, monkeypatch):
    """Half of a surrogate pair is refused, and once mended as the refusal says, it is a text like others."""
    import tiktoken
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    files = [str(course_dir() / "data" / "gpt2-bpe" / name) for name in ("vocab.bpe", "encoder.json")]
    ranks = data_gym_to_mergeable_bpe_ranks(*files)
    theirs = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    ours, seen, failed = Tokenizer.gpt2(), set(), set()
    long = LONG if FULL else LONG[:2]

    def compare(text):
        seen.add(text)
        with fault.case(f"{text!a:.60}"):
            assert_same_tokens(ours, theirs, text, failed)

    for text in long:
        compare(text)
    every = settings(
        max_examples=fault.n - len(long),
        phases=[Phase.generate],  # a case that breaks is counted, and not sought again
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    every(given(texts(st))(compare))()
    assert len(seen) > 0.8 * fault.n, "too many of the texts were the same"
    assert failed <= {LONG[0]}, "tiktoken failed where it is to be compared with"


# ---- hostile prompts ----


class Hostile(NamedTuple):
    """A prompt, a str or the bytes that a shell hands over; the options; what the refusal names, if it is one."""

    prompt: str | bytes
    options: str = ""
    refused: str = ""


PROMPTS = [
    "", " ", "\n", "\r\n\t\v\f", "\u3000\xa0\u2028\u2029", "\0", "--help", END, END * 1000, END[:-1], f"a{END}b",
    "\u202eabc\u202c \u2066x\u2069", "שלום עולם، مرحبا", "\x1b[2J\x1b[31m\x1b]0;title\x07", "\x9b31m\x90q\x9c",
    "".join(map(chr, range(32))) + "\x7f", "a\b\b\b\r", "a" + "\u0301" * 10_000, "%s %n {0} $HOME `id` ; rm -rf / \\",
    "-", "-5", "\U00020000" * 200, "\U0010ffff\uffff\ufdd0\U000f0000", "\ufeff\ufffd", "\U0001f469\u200d" * 500,
    "a" * 50_000 + "!", "\t \n" * 30_000, "(a+)+$" * 5000, "。" * 5000,
    "".join(chr(i) for i in range(0, 0x110000, 257) if not 0xD800 <= i < 0xE000),
    *(unit * (MB // len(unit.encode())) for unit in ("\0", " ", "\n", "a", "'", "山", " a", "\U0001f600")),
]  # fmt: skip
HOSTILE = [
    *map(Hostile, PROMPTS),
    Hostile("\ud800", refused="PROMPT is not UTF-8, with '\\ud800' at character 0"),
    Hostile("a" * MB + "\udfff", refused=f"at character {MB}"),
    Hostile(b"ab\xff\xfe", refused="'\\udcff' at character 2"),
    Hostile(b"caf\xe9 \xc0\xaf", refused="at character 3"),
    Hostile("山" * 300, "--beams 2", "do not fit into the context"),
    Hostile("--no-such", refused="PROMPT"),
    Hostile("a", "b\nc\x1b[2J --seed 1", r"b\nc\x1b[2J"),
    Hostile("--model=tang", refused="PROMPT"),
    Hostile("白日", "--temperature nan", "temperature is nan"),
    Hostile("白日", "--temperature inf", "temperature is inf"),
    Hostile("白日", "--temperature -1", "temperature is -1.0"),
    Hostile("白日", "--top-k 0", "top_k is 0"),
    Hostile("白日", "--top-p -0.5", "top_p is -0.5"),
    Hostile("白日", "--min-p 1e9", "min_p is 1000000000.0"),
    Hostile("白日", f"--top-k {'9' * 5000}", "--top-k"),
    Hostile("白日", "--repetition-penalty 0", "repetition_penalty is 0.0"),
    Hostile("白日", "--no-repeat-ngram -1", "no_repeat_ngram_size is -1"),
    Hostile("白日", "--max-new-tokens 0", "max_new_tokens is 0"),
    Hostile("白日", f"--beams {10**15}", f"num_beams is {10**15}"),
    Hostile("白日", f"--beams {10**30}", "num_beams is 1"),
    Hostile("白日", "--device \n", "there is no device"),
    Hostile("白日", "--model no\0where", "there is no model"),
]


def obey(words, prompt, model, folder):
    """In a worker: the exit status of ``aigc generate``, its streams in two files; then the same in Python."""
    for descriptor, name in (1, "out"), (2, "err"):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    began = time.process_time()  # not the clock on the wall: others may be at work
    try:
        status = cli.main(["generate", *map(os.fsdecode, words)])
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    seconds = time.process_time() - began
    language, tokenizer = recipes.load_pretrained(model, device="cpu")
    warnings.simplefilter("ignore", GenerateWarning)
    try:
        ids = tokenizer.encode(os.fsdecode(prompt))
    except CourseError as error:
        return status, seconds, str(error), ""
    start = torch.tensor([ids if ids and model != "tang" else [tokenizer.end, *ids]])
    settings = {"max_new_tokens": 4, "stop": tokenizer.end}
    whole = generate(language, start, rng=rng_for(0, "generate", 0), **settings)[0, start.shape[1] :].tolist()
    streamed = list(stream(language, start, rng=rng_for(0, "generate", 0), **settings))
    text = os.fsdecode(prompt) + tokenizer.decode([token for token in whole if token != tokenizer.end])
    return status, seconds, "" if whole == streamed else "stream and generate differ", text


def assert_obeyed(case, model, folder):
    """A text or one line; of a prompt that is none, the same from Python."""
    options = [*f"--max-new-tokens 4 --device cpu --model {model}".split(), *filter(None, case.options.split(" "))]
    after = case.prompt == "--help"  # a prompt, for it comes after --
    words = [*options, "--", case.prompt] if after else [case.prompt, *options]
    folder.mkdir()
    outcome = workers.run(obey, words, case.prompt, model, folder)
    assert outcome.code == 0 and not outcome.error, outcome
    status, seconds, wrong, text = outcome.value
    assert seconds < 5, f"it took {seconds:.1f} s"
    out, err = ((folder / name).read_bytes().decode("utf-8") for name in ("out", "err"))
    if case.refused:
        assert (status, out) == (2, "") and re.fullmatch(r"aigc: [^\n]+\n", err) and err[:-1].isprintable(), err[-300:]
        assert case.refused in err and "\n" not in wrong, err
        assert bool(wrong) == ("UTF-8" in err), wrong
        return
    assert status == 0 and not wrong, err[-300:] or wrong
    text = text.replace("。", "。\n") if model == "tang" else text
    assert out == text + "\n" * (not text.endswith("\n")), "printed is not what was written"
    assert not err or re.fullmatch(r"aigc: the prompt has \d+ tokens, [^\n]+\n", err), err[-300:]


@pytest.mark.skipif(sys.platform == "win32", reason="workers are forked")
@pytest.mark.fault("15b")
def test_a_hostile_prompt_gives_a_text_or_one_line(fault, tmp_path):
    for i, case in sorted(fault.rng.sample(list(enumerate(HOSTILE)), fault.n)):
        model = ("tang", "shakespeare")[i % 2]
        with fault.case(f"{i}, {model}: {case.prompt!a:.40} {case.options:.40}"):
            assert_obeyed(case, model, tmp_path / str(i))


# ---- prompts around the context's length ----

LENGTHS = {  # of a prompt, for a context of n tokens
    "none": lambda n: 0,
    "one less": lambda n: n - 1,
    "all": lambda n: n,
    "one more": lambda n: n + 1,
    "five times": lambda n: 5 * n,
}
STRATEGIES = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.5},
    "no_repeat_ngram": {"temperature": 0, "no_repeat_ngram_size": 2},
    "beam search": {"num_beams": 3},
}


def read_anew(model, ids, new, choice, rng):
    """What ``generate`` documents, without a cache: a window that is full is left for its last half."""
    size = model.config.block_size
    seen = ids[:, -size:]
    for _ in range(new):
        seen = seen[:, -(size // 2) :] if seen.shape[1] > size else seen
        with torch.no_grad():
            logits = model(seen)[:, -1]
        greedy = choice == STRATEGIES["greedy"]
        token = logits.argmax(-1) if greedy else next_token(logits, ids, rng=rng, **choice)
        ids, seen = (torch.cat([part, token[:, None]], dim=1) for part in (ids, seen))
    return ids


def written(call, warned):
    """What ``call`` returns; it warns of tokens that the model does not see, or of nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert [warning.category for warning in caught] == [GenerateWarning] * warned
    return result


def assert_defined(model, ids, new, choice):
    t, size, search = ids.shape[1], model.config.block_size, "num_beams" in choice
    if search:
        new = min(new, max(size - max(t, 1), 1))

    def write(ids=ids, call=beam_search if search else generate, new=new):
        rng = {} if search else {"rng": rng_for(t, "draw")}
        return call(model, ids, max_new_tokens=new, **rng, **choice)

    if t == 0:
        for call in (beam_search,) if search else (generate, stream):
            clear_error(lambda call=call: write(call=call), "empty", "end token", kind=GenerateError)
        ids = ids.new_zeros(1, 1)  # as the message says
    if search and t + new > size:
        message = written(lambda: clear_error(write, f"the context of {size}", kind=GenerateError), warned=False)
        assert f"{t} ids" in message
        return
    found = written(lambda: write(ids), warned=t > size)
    assert found.shape == (1, ids.shape[1] + new)
    if not search:
        assert torch.equal(found, read_anew(model, ids, new, choice, rng_for(t, "draw")))
        tokens = written(lambda: list(write(ids, stream)), warned=t > size)
        assert tokens == found[0, ids.shape[1] :].tolist()
    elif new == 1:
        assert torch.equal(found, read_anew(model, ids, 1, STRATEGIES["greedy"], None))
        clear_error(lambda: write(new=2), f"the context of {size}", kind=GenerateError)


@pytest.mark.fault("16")
def test_a_prompt_of_any_length_is_written_on_or_refused(fault):
    small = GPT2(GPT2Config(vocab_size=61, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0), rng_for(16))
    with torch.no_grad():
        small.wte.weight.mul_(20), small.wpe.weight.mul_(40)  # an untrained model likes all tokens alike
    tang = recipes.load_pretrained("tang", device="cpu").model
    cases = [(length, strategy) for length in LENGTHS for strategy in STRATEGIES]
    through_tang = cases if FULL else fault.rng.sample(cases, len(STRATEGIES))
    for length, strategy in cases:
        models = [(small.eval(), 12), (tang, 3)][: 1 + ((length, strategy) in through_tang)]
        with fault.case(f"a prompt of {length}, {strategy}"):
            for model, new in models:
                shape = 1, LENGTHS[length](model.config.block_size)
                ids = torch.randint(model.config.vocab_size, shape, generator=rng_for("prompt", *shape))
                assert_defined(model, ids, new, STRATEGIES[strategy])
