"""Rows 19 and 20: the course in another locale, path and encoding, and what a lesson's file may not hold."""

import base64
import getpass
import html
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from aigc_course import course
from aigc_course.exercises.exercise import MIME
from conftest import COURSE
from faults.table import FULL

# --- row 19 ---

# Fast tests that touch files, paths, text and processes; a draw runs the first two.
FAST = ["lessons", "cli_generate", "text_data", "image_folder", "datasets", "tokenizer", "checkpoints"]
FAST = [f"tests/test_{name}.py" for name in FAST] + ["tests/faults/test_pickle_faults.py"]
HERE = Path("tests") / "test_here.py"
COMMON = r'''
"""Written by tests/faults/test_course_faults.py: this is the copy, under the setting that was asked for."""
import codecs, locale, os, subprocess, sys
from pathlib import Path
import pytest
import aigc_course
from aigc_course import cli, runtime

COURSE = Path(__file__).resolve().parent.parent


def test_the_course_is_this_copy():
    assert Path(aigc_course.__file__) == COURSE / "aigc_course" / "__init__.py"
    assert runtime.course_dir() == COURSE and cli.__file__.startswith(str(COURSE))


@pytest.mark.parametrize("words", [["generate", "白日依山尽", "--max-new-tokens", "30"], ["data", "check"]])
def test_the_command_speaks_in_this_setting(words):
    """In a process of its own, with a pipe in the encoding of the locale."""
    run = [sys.executable, "-c", "from aigc_course.cli import main; raise SystemExit(main())", *words]
    result = subprocess.run(run, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode(locale.getencoding()) and not result.stderr
'''
LESSON = """

def test_the_first_lesson_runs(tmp_path):
    from aigc_course import course

    result = course.run_lesson(course.lessons()[0], tmp_path, profile="quick")
    assert result.passed, result.error
"""
GBK = """
def test_the_locale_is_not_utf_8():
    assert codecs.lookup(locale.getencoding()).name == "{codec}" and not sys.flags.utf8_mode
    with pytest.raises(UnicodeError):
        (COURSE / "notebooks" / "02_variational_autoencoder.ipynb").read_text()
"""
PLACE = """
def test_the_path_is_an_awkward_one():
    assert COURSE.name == "课程 aigc (1)"
"""
WARNING = """
def test_a_missing_encoding_is_an_error():
    with pytest.raises(EncodingWarning):
        open(__file__)
    missing = [sys.executable, "-c", f"open({__file__!r})"]
    assert subprocess.run(missing, stderr=subprocess.DEVNULL).returncode
"""
# Of ours alone: what packages do is their affair.
FILTER = """
import warnings
warnings.simplefilter("ignore", EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module=r"aigc_course|conftest|test_|faults|__main__")
"""


def copied(folder: Path, own_tests: str) -> Path:
    """A copy of the course with its data, without what was built; ``own_tests`` are added to its tests."""
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("aigc_course", "data", "notebooks", "tests"):
        shutil.copytree(COURSE / name, folder / name, ignore=unwanted)
    for path in COURSE.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    (folder / HERE).write_text(COMMON + own_tests + LESSON * FULL, encoding="utf-8")
    return folder


def in_another_locale(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """GBK where a locale can be made of it; else C without Python's coercion, whose encoding is ASCII."""
    locales = tmp_path / "locales"
    locales.mkdir()
    made = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "zh_CN", "-f", "GBK", str(locales / "zh_CN.GBK")], capture_output=True
    )
    if (locales / "zh_CN.GBK" / "LC_CTYPE").exists() and made:
        codec, settings = "gbk", {"LOCPATH": str(locales), "LC_ALL": "zh_CN.GBK"}
    else:
        codec, settings = "ascii", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    return copied(tmp_path / "course", GBK.replace("{codec}", codec)), settings | {"PYTHONUTF8": "0"}


def at_another_path(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    return copied(tmp_path / "课程 aigc (1)", PLACE), {}


def with_warnings_of_encodings(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    folder = copied(tmp_path / "course", WARNING)
    with (folder / "tests" / "offline" / "sitecustomize.py").open("a", encoding="utf-8") as file:
        file.write(FILTER)
    return folder, {"PYTHONWARNDEFAULTENCODING": "1"}


def failures(folder: Path, settings: dict[str, str], tests: list[str]) -> str:
    """What pytest says of the tests of the copy in ``folder``; nothing if all have passed."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("AIGC_", "PYTHON", "LC_"))}
    known |= {"PYTHONPATH": os.pathsep.join([str(folder / "tests" / "offline"), str(folder)]), **settings}
    options = ["-p", "no:cacheprovider", "-p", "no:nbval", "-o", "addopts=", "-q", "--tb=line", "--no-header"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--basetemp", str(folder.parent / "pytest"), *tests],
        capture_output=True,
        cwd=folder,
        env=known,
        timeout=900,
    )
    (folder.parent / "pytest.txt").write_bytes(result.stdout + result.stderr)
    said = (result.stdout + result.stderr).decode(errors="replace").strip().splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return "" if result.returncode == 0 else "; ".join([*failed[:9], *said[-1:]]) or f"status {result.returncode}"


SETTINGS = [in_another_locale, at_another_path, with_warnings_of_encodings]


@pytest.mark.fault("19")
@pytest.mark.skipif(sys.platform == "win32", reason="the locales are those of POSIX")
def test_the_fast_tests_pass_elsewhere(fault, tmp_path):
    tests, runs = [str(HERE), *(FAST if FULL else FAST[:2])], {}
    with ThreadPoolExecutor(2) as pool:
        for setting in SETTINGS[: fault.n]:
            (tmp_path / setting.__name__).mkdir()
            folder, settings = setting(tmp_path / setting.__name__)
            name = f"{setting.__name__} {settings.get('LC_ALL', '')}"
            runs[name] = folder, pool.submit(failures, folder, settings, tests)
        for name, (folder, run) in runs.items():
            with fault.case(name):
                assert not (failed := run.result()), failed
            shutil.rmtree(folder)


# --- row 20 ---

KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "id", "metadata", "source", "execution_count", "outputs"},
}
OUTPUT_KEYS = {
    "stream": {"output_type", "name", "text"},
    "display_data": {"output_type", "data", "metadata"},
    "execute_result": {"output_type", "data", "metadata", "execution_count"},
}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TAGS = {"parameters", "nbval-check-output", "exercise", "hints", "solution", "teacher"}
MIMES = {"text/plain", "text/markdown", "image/png", MIME}
TAGS_OF_HTML = {"details", "summary", "p", "br", "sub", "sup"}
LINK = re.compile(
    r"\]\s*\(\s*<?([^)\s>]+)|^\s*\[[^]]+\]:\s*(\S+)|<([a-z][\w+.-]*:[^>\s]*)>", re.MULTILINE | re.IGNORECASE
)
USER, HOST = getpass.getuser(), socket.gethostname()
OWN_FOLDERS = "|".join(re.escape(str(folder)) for folder in (COURSE, Path.home()) if len(folder.parts) > 1)
# In no text of a lesson: neither in Markdown, nor in code, nor in what it printed.
FORBIDDEN = {
    "a script": r"<\s*/?\s*script|%%(javascript|js|html|svg)\b|\bJavascript\s*\(|\bIFrame\s*\(",
    "a frame": r"<\s*(iframe|embed|object|applet|frame|form|meta|base|link|svg|math|video|audio|img)\b",
    "a script's address": r"(java|vb)script\s*:|data\s*:\s*(text|image|application)/",
    "a handler": r"<[^>]*\bon[a-z]+\s*=",
    "a path of a machine": r"(?<![\w.])/(home|tmp|root|work|Users|usr|opt|mnt|var|etc|srv|private|content)/\w"
    r"|(?<![\w.])/(app|data|workspace|Volumes|kaggle)/\w"
    r"|\b[A-Z]:\\+(Users|Windows|Program|Temp)|(?<!\w)~/\w|file:/|\\\\\w+\\\w+\$?\\",
    "a folder of this machine": rf"(?<!\w)({OWN_FOLDERS})(?!\w)" if OWN_FOLDERS else r"(?!)",
    "a registry": r"p[y]pi\.|python[h]osted|n[p]mjs|ana[c]onda\.org|dock[e]r\.io|gh[c]r\.io|artifactory"
    r"|hugging[f]ace\.co|/si[m]ple/",  # the brackets keep these names out of this file
    "a token or key": r"\bgh[opsu]_\w{16}|github_pat_|\bsk-[\w-]{16}|\bAKIA[0-9A-Z]{12}|-----BEGIN|\bhf_[A-Za-z]{16}"
    r"|\bxox[bp]-|\bAIza[\w-]{20}|\bglpat-|\beyJ\w{10,}\.eyJ",
    "a password": r"://[^/\s:@]+:[^/\s@]+@|(passw(or)?d|api_?key|secret)\w*\s*[=:]\s*['\"]\w",
    "an address of a person": r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}",
}
# Not in an output either; a text may well hold the word, when a user is called data.
OWN_NAMES = {
    "this user": rf"(?<!\w){re.escape(USER)}@\w|[/\\]{re.escape(USER)}[/\\]",
    "this machine": rf"(\w@|//|\\\\){re.escape(HOST)}(?!\w)",
}


def faults_of(text: str) -> list[str]:
    """What the file of a lesson holds that it may not; ``text`` is the whole file."""
    lesson = json.loads(text)
    found = [f"the key {key}" for key in lesson.keys() ^ {"cells", "metadata", "nbformat", "nbformat_minor"}]
    found += ["metadata"] if lesson["metadata"] != METADATA else []
    for cell in lesson["cells"]:
        found += [f"{cell['id']}: {fault}" for fault in _faults_of_cell(cell)]
    return found


def _faults_of_cell(cell: dict) -> Iterator[str]:
    kind = cell["cell_type"]
    if cell.keys() != KEYS.get(kind):
        yield f"the keys {', '.join(cell)} of a {kind} cell"
    if not cell["metadata"].keys() <= {"tags"} or not set(cell["metadata"].get("tags", ())) <= TAGS:
        yield f"the metadata {cell['metadata']}"
    yield from _faults_of_text("".join(cell["source"]), rendered=kind != "code")
    for output in cell.get("outputs", ()):
        if output.keys() != OUTPUT_KEYS.get(output["output_type"]):
            yield f"the keys {', '.join(output)} of an output {output['output_type']}"
        yield from _faults_of_text("".join(output.get("text", "")), rendered=False, shown=True)
        for mime, data in output.get("data", {}).items():
            if mime not in MIMES:
                yield f"the type {mime}"
            elif mime == "image/png":
                yield from _faults_of_png("".join(data))
            elif mime == MIME:
                if data.keys() != {"exercise", "status", "mistake", "text"}:
                    yield f"the keys {', '.join(data)} of a verdict"
                yield from _faults_of_text(" ".join(map(str, data.values())), rendered=False, shown=True)
            else:
                yield from _faults_of_text("".join(data), rendered=mime == "text/markdown", shown=True)
        for mime, about in output.get("metadata", {}).items():
            if mime != "image/png" or about.keys() != {"alt"}:
                yield f"the metadata {mime} of an output"
            else:
                yield from _faults_of_text(about["alt"], rendered=False)


def _faults_of_text(text: str, rendered: bool, shown: bool = False) -> Iterator[str]:
    """``rendered``: it is Markdown. ``shown``: an output shows it."""
    plain = re.sub(r"[\0-\t\x0b-\x1f\u200b\ufeff]", "", html.unescape(text))
    for name, pattern in (FORBIDDEN | OWN_NAMES if shown else FORBIDDEN).items():
        for form in {text, plain}:
            if match := re.search(pattern, form, re.IGNORECASE):
                yield f"{name}: {match[0][:60]}"
    if not rendered:
        return
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for tag, rest in re.findall(r"<\s*/?\s*([a-z!?][\w:-]*)([^<>]*)>", plain, re.IGNORECASE):
        if tag.lower() not in TAGS_OF_HTML or rest.strip():
            yield f"the tag <{tag}{rest[:40]}>"
    for target in ("".join(parts) for parts in LINK.findall(plain)):
        address = re.sub(r"\s", "", html.unescape(target))
        beyond = re.match(r"[a-z][\w+.-]*:|//", address, re.IGNORECASE)
        if beyond and not re.match(r"https://", address) or address.startswith(("/", "\\")):
            yield f"the link {target[:60]}"
    for target in re.findall(r"!\[[^]]*\]\s*\(\s*<?\s*([^)\s]*)", plain):
        if not re.fullmatch(r"[\w-]+\.png", target):
            yield f"the picture {target[:60]}"


def _faults_of_png(data: str) -> Iterator[str]:
    """The picture is one, and its notes are as clean as the text."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=False)), formats=["PNG"]) as picture:
            picture.load()
            notes = " ".join(map(str, picture.text.values()))
    except (OSError, ValueError, SyntaxError) as error:
        yield f"a picture that is none ({error})"
        return
    yield from _faults_of_text(notes.replace("https://matplotlib.org/", ""), rendered=False, shown=True)


LESSONS = course.lessons()


@pytest.mark.fault("20")
def test_a_lesson_holds_nothing_that_runs_or_tells(fault):
    for path in LESSONS:
        with fault.case(path.stem):
            assert not (found := faults_of(path.read_text(encoding="utf-8"))), "; ".join(found[:9])


def markdown(text: str) -> Callable[[dict], None]:
    return lambda lesson: lesson["cells"][0].update(source=lesson["cells"][0]["source"] + [text])


def code(text: str) -> Callable[[dict], None]:
    return lambda lesson: lesson["cells"][-1].update(source=[text])


def output(mime: str, data: object, **metadata) -> Callable[[dict], None]:
    made = {"output_type": "display_data", "data": {mime: data}, "metadata": metadata}
    return lambda lesson: lesson["cells"][-1]["outputs"].append(made)


def printed(text: str) -> Callable[[dict], None]:
    made = {"output_type": "stream", "name": "stdout", "text": [text]}
    return lambda lesson: lesson["cells"][-1]["outputs"].append(made)


def png(**notes: str) -> str:
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for key, value in notes.items():
        info.add_text(key, value)
    Image.new("L", (2, 2)).save(file, "PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode("ascii")


POISON = {
    "a script in Markdown": markdown("<script>alert(1)</script>"),
    "a script in capitals, unclosed": markdown("< ScRiPt src=//example.org/x.js "),
    "a script in printed text": printed("<script src='x'></script>\n"),
    "a link that runs": markdown("[run](javascript:alert(1))"),
    "one in entities": markdown("[run](javascript&#58;alert(1))"),
    "one with a tab": markdown("[run](java\tscript:alert(1))"),
    "one by reference": markdown("\n[run]: vbscript:x\n"),
    "a link to data": markdown("[page](data:text/html;base64,AAAA)"),
    "an insecure link": markdown("[page](http://example.org/)"),
    "an autolink": markdown("<ftp://example.org/x>"),
    "a handler": markdown('<p onclick="steal()">text</p>'),
    "a style": markdown("<p style='position:fixed'>text</p>"),
    "a picture from elsewhere": markdown("![x](https://example.org/pixel.png)"),
    "an image tag": markdown("<img src=x>"),
    "a frame": markdown("<iframe src='https://example.org'></iframe>"),
    "a verdict that runs": output(MIME, dict.fromkeys(("exercise", "status", "mistake", "text"), "<script>1</script>")),
    "a verdict that lacks something": output(MIME, {"exercise": "1.1", "status": "right", "text": ""}),
    "an output in HTML": output("text/html", "<b>bold</b>"),
    "an output that runs": output("application/javascript", "alert(1)"),
    "a widget": output("application/vnd.jupyter.widget-view+json", {"model_id": "x"}),
    "a drawing": output("image/svg+xml", "<svg onload='x'/>"),
    "Markdown with a frame": output("text/markdown", "<embed src=x>"),
    "a picture that is none": output("image/png", base64.b64encode(b"GIF89a<script>").decode("ascii")),
    "a picture's note": output("image/png", png(Author=f"made in /{'home'}/alice/course")),
    "an output's metadata": output("text/plain", "x", isolated=True),
    "a magic": code("%%javascript\nalert(1)"),
    "a frame from code": code("IPython.display.IFrame('https://example.org', 1, 1)"),
    "a home": printed(f"/{'home'}/alice/course/data\n"),
    "a temporary folder": printed("saved to /tmp/x.png\n"),
    "a folder of Windows": printed("C:\\Windows\\alice\\course\n"),
    "a tilde": printed("~/course\n"),
    "a folder of a container": printed("/workspace/course\n"),
    "this course's folder": printed(f"{COURSE}\n"),
    "this user's folder": printed(f"\\\\disk\\{USER}\\course\n"),
    "this user": printed(f"{USER}@somewhere\n"),
    "this machine": printed(f"someone@{HOST}\n"),
    "this machine's page": printed(f"https://{HOST}:8888\n"),
    "a registry": printed(f"Looking in indexes: https://{'py'}pi.example.org/{'simple'}/\n"),
    "a token of GitHub": code(f"token = 'ghp_{'a1' * 18}'"),
    "a key of AWS": code(f"key = 'AKIA{'A1' * 8}'"),
    "a token of a hub": printed(f"hf_{'abcd' * 8}\n"),
    "a key of an API": printed(f"sk-{'ab1' * 12}\n"),
    "a private key": code("'''-----BEGIN RSA PRIVATE KEY-----'''"),
    "a password in an address": code("fetch('https://alice:pass1@example.org/x')"),
    "a password": code("password = 'hunter22'"),
    "an address of a person": printed("alice@example.org\n"),
    "an attachment": lambda lesson: lesson["cells"][0].update(attachments={"x.png": {"image/png": png()}}),
    "a signature": lambda lesson: lesson["metadata"].update(signature="sha256:0"),
    "a cell that is trusted": lambda lesson: lesson["cells"][-1]["metadata"].update(trusted=True),
    "an author": lambda lesson: lesson["metadata"].update(authors=[{"name": "alice"}]),
    "another kernel": lambda lesson: lesson["metadata"]["kernelspec"].update(name="bash"),
    "a raw cell": lambda lesson: lesson["cells"][0].update(cell_type="raw"),
    "an unknown tag": lambda lesson: lesson["cells"][-1]["metadata"].update(tags=["remove-input"]),
    "an error": lambda lesson: lesson["cells"][-1]["outputs"].append({"output_type": "error", "traceback": []}),
}  # fmt: skip


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_lesson_is_refused(kind):
    """The twin of row 20: the same lesson passes before, and not after."""
    text = LESSONS[0].read_text(encoding="utf-8")
    assert not faults_of(text)
    lesson = json.loads(text)
    POISON[kind](lesson)
    assert faults_of(json.dumps(lesson, ensure_ascii=False))
