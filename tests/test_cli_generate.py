"""``aigc generate``: what it prints is what the model wrote, character by character, and a mistake takes one line."""

import random
import re
import shutil

import pytest
import torch

from aigc_course import checkpoints, cli, generate, recipes
from aigc_course.gpt2 import GPT2, GPT2Config
from aigc_course.runtime import rng_for
from aigc_course.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。To be, or not to be."


@pytest.fixture(scope="module")
def language():
    """A tiny untrained model; its tokens are bytes, or parts of characters, as often as characters."""
    tokenizer = Tokenizer.train(TEXT, 280)
    config = GPT2Config(vocab_size=280, block_size=48, n_layer=1, n_head=2, n_embd=16, dropout=0.0)
    model = GPT2(config, rng_for(3, "tiny"))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # an untrained model is close to uniform, and this one has its favourites,
        model.wpe.weight.mul_(40)  # which change from place to place
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def folder(language, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    language[0].save_pretrained(path)
    language[1].save(path)
    return path


@pytest.fixture
def run(capsys):
    """The exit status, and what was written to each stream."""

    def command(*words):
        try:
            status = cli.main(["generate", *map(str, words), "--device", "cpu"])
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return command


def written(language, prompt, new, *, start=False, seed=0, i=0, **choice):
    """The text by ``generate.generate``, which does not stream."""
    model, tokenizer = language
    ids = [*([tokenizer.end] if start else []), *tokenizer.encode(prompt)]
    all_ids = generate.generate(
        model,
        torch.tensor([ids]),
        max_new_tokens=new,
        stop=tokenizer.end,
        rng=rng_for(seed, "generate", i),
        **choice,
    )[0].tolist()
    return prompt + tokenizer.decode([id for id in all_ids[len(ids) :] if id != tokenizer.end])


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ([], {}),
        (["--temperature", 0], {"temperature": 0}),
        (["--temperature", 0.5], {"temperature": 0.5}),
        (["--top-k", 2, "--seed", 4], {"top_k": 2, "seed": 4}),
        (["--top-p", 0.4], {"top_p": 0.4}),
        (["--min-p", 0.3], {"min_p": 0.3}),
        (["--repetition-penalty", 3, "--top-k", 3], {"repetition_penalty": 3.0, "top_k": 3}),
        (["--no-repeat-ngram", 1, "--top-k", 1], {"no_repeat_ngram_size": 1, "top_k": 1}),
    ],
)
def test_every_option_does_what_its_namesake_does(language, folder, run, options, choice):
    expected = written(language, "To be", 12, **choice)
    assert choice == {} or expected != written(language, "To be", 12)
    assert run("To be", "--model", folder, "--max-new-tokens", 12, *options) == (0, expected.rstrip("\n") + "\n", "")


def test_beams_print_the_best_beam(language, folder, run):
    model, tokenizer = language
    ids = tokenizer.encode("黄河")
    settings = {"max_new_tokens": 9, "stop": tokenizer.end, "no_repeat_ngram_size": 2}
    best = generate.beam_search(model, torch.tensor([ids]), num_beams=3, **settings)[0, len(ids) :].tolist()
    expected = "黄河" + tokenizer.decode([id for id in best if id != tokenizer.end])
    words = ("黄河", "--model", folder, "--beams", 3, "--max-new-tokens", 9, "--no-repeat-ngram", 2)
    assert run(*words) == (0, expected + "\n", "")


def test_several_texts_are_several_draws_and_the_first_is_that_of_one(language, folder, run):
    words = ("To", "--model", folder, "--max-new-tokens", 8, "--seed", 7)
    _, one, _ = run(*words)
    status, three, _ = run(*words, "--n", 3)
    texts = [written(language, "To", 8, seed=7, i=i) for i in range(3)]
    assert status == 0 and len(set(texts)) == 3
    assert one == texts[0] + "\n" and three == "\n\n".join(texts) + "\n"


def test_without_a_length_the_context_is_filled_and_no_prompt_is_the_end_token(language, folder, run):
    assert run("", "--model", folder)[1] == written(language, "", 47, start=True) + "\n"
    assert run("不", "--model", folder, "--beams", 1)[0] == 0  # beam search refuses more than the context holds


def test_a_run_of_the_poets_recipe_writes_poems(language, folder, run, tmp_path):
    """Of a run's folder the model in it is taken, and what its card says of it."""
    shutil.copytree(folder, tmp_path / "run" / "model")
    expected = written(language, "白日", 15, start=True)
    assert expected != written(language, "白日", 15)
    for recipe, shown in (("tang", expected.replace("。", "。\n")), ("shakespeare", written(language, "白日", 15))):
        checkpoints.seal(tmp_path / "run" / "model", {"recipe": recipe})
        assert run("白日", "--model", tmp_path / "run", "--max-new-tokens", 15)[1].rstrip("\n") == shown.rstrip("\n")
    (tmp_path / "run" / "model" / "tokenizer.json").write_text("{}", encoding="utf-8")
    status, out, err = run("白日", "--model", tmp_path / "run")
    assert status == 2 and out == "" and "tokenizer.json" in err


class Screen:
    """A stream that shows nothing before it is flushed."""

    def __init__(self):
        self.waiting = self.text = ""

    def write(self, text):
        self.waiting += text

    def flush(self):
        self.text, self.waiting = self.text + self.waiting, ""


class Script:
    """In place of ``stream``: writes the given tokens, and notes what stands on the screen before each."""

    def __init__(self, monkeypatch, language, tokens):
        self.screen, self.before, self.prompts, self.stops, self.tokens = Screen(), [], [], [], tokens
        monkeypatch.setattr("sys.stdout", self.screen)
        monkeypatch.setattr(generate, "stream", self.stream)
        monkeypatch.setattr(recipes, "load_pretrained", lambda name, device: language)

    def stream(self, model, ids, **settings):
        self.prompts.append(ids.tolist())
        self.stops.append(settings["stop"])
        for token in self.tokens:
            self.before.append(self.screen.text)
            yield token


def test_a_poem_starts_with_the_end_token_and_breaks_after_its_full_stops(language, monkeypatch, run):
    """Each character is on the screen as soon as its last byte was drawn, and never before."""
    _, tokenizer = language
    tokens = [*tokenizer.encode("山。流。"), tokenizer.end]
    script = Script(monkeypatch, language, tokens)
    status, _, _ = run("白日。依", "--model", "tang")
    assert status == 0 and script.prompts == [[[tokenizer.end, *tokenizer.encode("白日。依")]]]
    assert script.stops == [tokenizer.end]
    script.screen.flush()
    assert script.screen.text == "白日。\n依山。\n流。\n"
    so_far = b""
    for token, shown in zip(tokens, script.before, strict=True):
        assert shown == "白日。\n依" + so_far.decode("utf-8", errors="ignore").replace("。", "。\n")
        so_far += tokenizer.token_bytes(token)
    assert any(len(tokenizer.token_bytes(token)) < 3 for token in tokens)


def test_shakespeare_goes_on_from_the_prompt_as_it_is(language, monkeypatch, run):
    _, tokenizer = language
    script = Script(monkeypatch, language, tokenizer.encode(" not。\n"))
    status, _, _ = run("To be", "--model", "shakespeare")
    assert status == 0 and script.prompts == [[tokenizer.encode("To be")]]
    script.screen.flush()
    assert script.screen.text == "To be not。\n"


def test_characters_come_whole_however_the_bytes_are_cut():
    cut = random.Random(0)
    for _ in range(200):
        text = "".join(cut.choices("aé白𰬸🙂\n\u0301", k=cut.randrange(8)))
        data, pieces = text.encode("utf-8"), []
        while data:
            n = cut.randrange(5)
            pieces.append(data[:n])
            data = data[n:]
        shown = list(cli._characters(pieces))
        assert "".join(shown) == text and "\ufffd" not in "".join(shown)


@pytest.mark.parametrize("data", [b"\xe5\xb1", b"a\xff\xe5b", b"\xe5\xb1\xe5\xb1\xb1", b"\xf0\x9f"])
def test_bytes_that_are_no_text_are_shown_as_decode_shows_them(data):
    pieces = [bytes([byte]) for byte in data]
    assert "".join(cli._characters(pieces)) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "PROMPT"),
        (["a", "--model", "no-such-model"], "no-such-model"),
        (["a", "--n", "0"], "--n"),
        (["a", "--beams", "2", "--temperature", "0.5"], "--temperature"),
        (["a", "--beams", "2", "--top-k", "5"], "--top-k"),
        (["a", "--beams", "2", "--n", "2"], "--n"),
        (["a", "--model", "FOLDER", "--beams", "0"], "num_beams"),
        (["a", "--model", "FOLDER", "--top-p", "1.5"], "top_p"),
        (["a", "--model", "FOLDER", "--temperature", "nan"], "temperature"),
        (["a", "--model", "FOLDER", "--max-new-tokens", "0"], "max_new_tokens"),
        (["a", "--model", "EMPTY"], "config.json"),
        (["a", "--top-k", "few"], "--top-k"),
        (["a", "--model", "FOLDER", "--beams", "1001"], "num_beams is 1001: it must be a whole number from 1 to 1000"),
        (["a" * 99, "--model", "FOLDER", "--beams", "2"], "do not fit into the context of 48"),
        (["ab\udcff"], r"PROMPT is not UTF-8, with '\udcff' at character 2"),
        (["a", "b\nc\x1b[2J"], r"unrecognized arguments: b\nc\x1b[2J"),
    ],
)
def test_a_mistake_takes_one_line(folder, tmp_path, run, words, named):
    places = {"FOLDER": folder, "EMPTY": tmp_path}
    status, out, err = run(*(places.get(word, word) for word in words))
    assert status == 2 and re.fullmatch(r"aigc: .+\n", err) and named.lower() in err.lower()
    assert out == ""


def test_a_prompt_that_the_context_does_not_hold_is_told_once_in_one_line(folder, run):
    status, out, err = run("a" * 99, "--model", folder, "--max-new-tokens", 2, "--n", 2)
    assert status == 0 and out.count("a" * 99) == 2
    assert re.fullmatch(r"aigc: the prompt has 99 tokens, of which the model sees the last 48, .+\n", err)


def test_without_a_network_gpt2_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, run):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    status, out, err = run("To be", "--model", "gpt2")
    assert status == 2 and out == "" and re.fullmatch(r"aigc: .+\n", err)
    assert "gpt2" in err and "hub" in err and "tang" in err
