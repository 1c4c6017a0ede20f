"""The runner of lessons, the pages it makes and the command line, on notebooks small enough to start in a second."""

import html
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from aigc_course import cli, course, datasets, doctor, pages, recipes
from aigc_course.runtime import CourseError

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PARAMETERS = 'PROFILE = "quick"\nSEED = 0'
TEXT = r"""# A lesson on 1 < 2 & more

It goes on in [the next](02_next.ipynb), after [a paper](https://example.org/paper).

$$\log p(x) \ge \mathbb{E}_q[\log p(x, z)] \tag{1.1}$$"""


def finish(name: str, passed: bool = True) -> str:
    """A last cell that leaves the record which lessons.finish() would leave."""
    figure = {"name": "bound", "value": 1.25, "unit": "nats", "low": 1.0, "high": 1.5, "passed": passed}
    record = {"lesson": name, "passed": passed, "claims": [{"tag": "1.1", "passed": passed}], "figures": [figure]}
    return f"""import json, os
record = json.loads({json.dumps(json.dumps(record))})
record["profile"] = [PROFILE, os.environ["AIGC_PROFILE"]]
with open(os.path.join(os.environ["AIGC_RECORD_DIR"], "{name}.json"), "w", encoding="utf-8") as file:
    json.dump(record, file)"""


def write(folder, name, *sources, parameters=PARAMETERS):
    cells = [new_markdown_cell(TEXT)]
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb = new_notebook(cells=[*cells, *map(new_code_cell, sources)])
    nb.metadata.kernelspec = {"display_name": "any", "language": "python", "name": "some-other-kernel"}
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path


@pytest.fixture
def notebooks(tmp_path):
    return tmp_path / "notebooks"


def test_the_course_goes_on_after_a_failing_lesson_and_reports_it(notebooks, tmp_path, monkeypatch, capsys):
    allocate = "block = bytearray(150_000_000)\nimport time; time.sleep(0.6)"
    paths = [
        write(
            notebooks, "01_fails", "print('before')", "raise ValueError('a <b> in\\nthe middle')", finish("01_fails")
        ),
        write(notebooks, "02_passes", allocate, finish("02_passes")),
    ]
    monkeypatch.setattr(course, "lessons", lambda: paths)
    out = tmp_path / "out"
    assert course.run_course(profile="quick", out=out) == 1
    printed = capsys.readouterr().out
    assert "01_fails: FAILED: In [3]: ValueError: a <b> in (" in printed
    assert re.search(r"^02_passes +\d.*passed$", printed, re.MULTILINE)
    assert "bound: 1.25 nats (band 1 to 1.5)" in printed

    index = (out / "index.html").read_text(encoding="utf-8")
    assert '<html lang="en">' in index and "A lesson on 1 &lt; 2 &amp; more" in index
    assert "a &lt;b&gt; in" in index and "<b>" not in index
    assert index.count("FAILED") == 1 and index.count(">passed<") == 1
    peak = int(re.findall(r'<td class="n">(\d+)</td>', index)[-1])
    assert 150 < peak < 1000, "the kernel's memory in MB, with the block that the lesson holds"
    for name in ("01_fails", "02_passes"):
        assert f'href="{name}.html"' in index and (out / f"{name}.html").is_file()
    assert "a &lt;b&gt; in" in (out / "01_fails.html").read_text(encoding="utf-8"), "the traceback is on its page"


@pytest.mark.parametrize(
    ("last_cell", "complaint"),
    [
        ("pass", "it left no 01_x.json"),
        (finish("01_x", passed=False), "its record says that it failed: claim 1.1; bound: 1.25 nats"),
        ("import os\nopen(os.environ['AIGC_RECORD_DIR'] + '/01_x.json', 'w').write('{}')", "cannot be read"),
        ("import os\nos._exit(1)", "cell 3 ended its kernel"),
    ],
    ids=["no record", "a record of failure", "an empty record", "a dead kernel"],
)
def test_a_lesson_without_a_record_that_says_passed_has_failed(last_cell, complaint, notebooks, tmp_path):
    path, out = write(notebooks, "01_x", last_cell), tmp_path / "out"
    (out / "records").mkdir(parents=True)
    stale = {"lesson": "01_x", "passed": True, "claims": [], "figures": []}
    (out / "records" / "01_x.json").write_text(json.dumps(stale), encoding="utf-8")
    result = course.run_lesson(path, out)
    assert not result.passed and complaint in result.error and "\n" not in result.error


def test_the_profile_and_the_parameters_arrive(notebooks, tmp_path, monkeypatch):
    monkeypatch.setenv("AIGC_PROFILE", "quick")
    before = dict(os.environ)
    path = write(
        notebooks, "01_x", "assert SEED == 7", "import os\nassert os.path.isfile('01_x.ipynb')", finish("01_x")
    )
    result = course.run_lesson(path, tmp_path / "out", profile="full", parameters={"SEED": 7})
    assert result.passed, result.error
    assert result.figures["bound"]["value"] == 1.25 and result.seconds > 0
    record = json.loads((tmp_path / "out" / "records" / "01_x.json").read_text(encoding="utf-8"))
    assert record["profile"] == ["full", "full"]
    assert dict(os.environ) == before


def test_a_profile_left_open_is_set_without_an_injected_cell(notebooks, tmp_path, monkeypatch):
    monkeypatch.setenv("AIGC_PROFILE", "full")
    path = write(notebooks, "01_x", finish("01_x"), parameters="PROFILE = None")
    result = course.run_lesson(path, tmp_path / "out", profile="quick")
    assert result.passed and len(nbformat.read(result.notebook, as_version=4).cells) == 3
    record = json.loads((tmp_path / "out" / "records" / "01_x.json").read_text(encoding="utf-8"))
    assert record["profile"] == [None, "quick"]


@pytest.mark.parametrize(
    ("profile", "given", "limit"), [("quick", None, 300), ("full", None, 0), ("quick", 0, 0), ("full", 7, 7)]
)
def test_how_long_a_cell_may_take(profile, given, limit, notebooks, tmp_path, monkeypatch):
    """That a cell which takes longer fails its lesson is injected in tests/faults."""
    seen = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **options: seen.update(options))
    course.run_lesson(write(notebooks, "01_x"), tmp_path / "out", profile=profile, cell_timeout=given)
    assert seen["execution_timeout"] == limit


@pytest.mark.parametrize(("parameters", "known"), [(PARAMETERS, "PROFILE, SEED"), (None, "none")])
def test_an_unknown_parameter_is_refused_by_name(parameters, known, notebooks, tmp_path):
    path = write(notebooks, "01_x", "pass", parameters=parameters)
    with pytest.raises(CourseError, match=f"no parameter SPEED: its parameters are {known}"):
        course.run_lesson(path, tmp_path, parameters={"SPEED": 1})


def test_lessons_are_picked_by_number(monkeypatch, notebooks):
    paths = [write(notebooks, name) for name in ("00_a", "03_b")]
    monkeypatch.setattr(course, "lessons", lambda: paths)
    assert course.pick_lessons() == paths and course.pick_lessons([3]) == paths[1:]
    with pytest.raises(CourseError, match="no lesson 2 in notebooks/: the lessons are 0, 3"):
        course.pick_lessons([3, 2])


def littered():
    """A notebook with all the debris that clean() is to remove; and, in its metadata, something that it is to keep."""
    view = {WIDGET_VIEW: {"model_id": "1"}}
    outputs = [
        new_output("stream", name="stdout", text="a"),
        new_output("stream", name="stdout", text="b"),
        new_output("stream", name="stderr", text="warning"),
        new_output("display_data", {**view, "text/plain": "move the slider"}),
        new_output("display_data", view),
        new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": 'A "dot" & no more'}}),
    ]
    timed = {"papermill": {"duration": 1}, "execution": {"iopub.status.busy": "now"}, "tags": ["remains"]}
    code = new_code_cell("print('ab')", outputs=outputs, execution_count=1, metadata=timed)
    injected = new_code_cell("SEED = 1", metadata={"tags": ["injected-parameters"]})
    marker = new_markdown_cell("An exception", metadata={"tags": ["papermill-error-cell-tag"]})
    nb = new_notebook(cells=[marker, new_markdown_cell(TEXT), injected, code])
    nb.metadata.update(papermill={"input_path": "x"}, widgets={"state": {}}, authors=["A"])
    nb.metadata.language_info = {"name": "python", "version": "3.11.0"}
    nb.metadata.kernelspec = {"display_name": "my machine", "language": "python", "name": "my-kernel"}
    return nb


def test_clean_leaves_no_debris_and_what_is_the_lessons_own():
    nb = littered()
    before = nbformat.writes(nb)
    cleaned = course.clean(nb)
    text, code = cleaned.cells
    assert [text.id, code.id] == [nb.cells[1].id, nb.cells[3].id]
    assert code.metadata == {"tags": ["remains"]} and code.execution_count == 1
    assert [output.get("name") or dict(output.data) for output in code.outputs] == [
        "stdout",
        "stderr",
        {"text/plain": "move the slider"},
        {"image/png": PIXEL},
    ]
    assert code.outputs[0].text == "ab"
    assert cleaned.metadata.kernelspec.name == "python3" and cleaned.metadata.language_info == {"name": "python"}
    assert set(cleaned.metadata) == {"kernelspec", "language_info", "authors"}
    nbformat.validate(cleaned)
    assert nbformat.writes(nb) == before, "the notebook that was handed in is as it was"


def test_store_keeps_what_passes_and_leaves_alone_what_fails(notebooks, tmp_path):
    bad = write(notebooks, "01_bad", "1 / 0", finish("01_bad"))
    good = write(notebooks, "02_good", "print('seen')", finish("02_good"))
    before, ids = bad.read_bytes(), [cell.id for cell in nbformat.read(good, as_version=4).cells]
    assert [result.passed for result in course.store([bad, good], tmp_path / "out")] == [False, True]
    assert bad.read_bytes() == before
    stored = nbformat.read(good, as_version=4)
    assert [cell.id for cell in stored.cells] == ids, "no injected cell, and the ids are kept"
    assert stored.cells[2].outputs[0].text == "seen\n"
    text = good.read_text(encoding="utf-8")
    assert text.endswith("}\n") and "papermill" not in text and str(tmp_path) not in text
    assert sorted(path.name for path in notebooks.iterdir()) == ["01_bad.ipynb", "02_good.ipynb"]


def test_a_page_loads_nothing_from_elsewhere_and_says_what_its_pictures_show(tmp_path):
    path, page = tmp_path / "01_x.ipynb", tmp_path / "pages" / "01_x.html"
    path.write_text(nbformat.writes(littered()), encoding="utf-8")
    pages.render(path, page)
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*src=[\"']?([^\"'> ]*)", text) == ["mathjax.js"]
    loads = r"<(?:link|img|iframe|source|object|embed)\b[^>]*(?:src|href|data)=[\"']?\s*(?!data:)([^\"'> ]+)"
    assert not re.findall(loads, text)
    assert not re.findall(r"@import|url\(\s*[\"']?(?:https?:)?//|import\s*\(|from\s+[\"']https?:|fetch\(", text)
    assert 'href="https://example.org/paper"' in text, "ordinary links stay"
    assert 'href="02_next.html"' in text and "02_next.ipynb" not in text
    assert "<title>A lesson on 1 &lt; 2 &amp; more</title>" in text
    alts = [double or single for double, single in re.findall(r"<img[^>]* alt=(?:\"([^\"]*)\"|'([^']*)')", text)]
    assert [html.unescape(alt) for alt in alts] == ['A "dot" & no more']
    assert r"\tag{1.1}" in text and "widget-view" not in text and "move the slider" in text
    mathjax = (page.parent / "mathjax.js").read_text(encoding="utf-8")
    settings, component = mathjax.split("\n", 1)
    assert settings.startswith("window.MathJax = {tex:") and "enableMenu: false" in settings
    assert len(component) > 1_000_000, "the component that holds fonts and extensions, not a loader of them"


def test_a_damaged_notebook_is_named(tmp_path):
    (tmp_path / "01_x.ipynb").write_text("{", encoding="utf-8")
    with pytest.raises(CourseError, match=r"01_x\.ipynb is not a notebook"):
        course.run_lesson(tmp_path / "01_x.ipynb", tmp_path / "out")


# --- The command line -------------------------------------------------------------------------------------------------


def run_cli(*words) -> int:
    try:
        return cli.main([*map(str, words)])
    except SystemExit as leaving:  # argparse
        return leaving.code


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["dance"], "dance"),
        (["course", "one"], "one"),
        (["course", "--profile", "slow"], "slow"),
        (["course", "97"], "97"),
        (["course", "--store", "--profile", "full"], "--store"),
        (["course", "--cell-timeout", "-1"], "--cell-timeout"),
        (["train", "no-such-model"], "choose from " + recipes.NAMES[0]),
        (["train", recipes.NAMES[0], "--profile", "slow"], "slow"),
        (["sample", "no-such-model"], "no-such-model"),
        (["sample", recipes.NAMES[0], "--run", "/no/such/run"], "run"),
        (["sample", recipes.NAMES[0], "--n", "0"], "--n"),
        (["sample", recipes.NAMES[0], "--out", "picture"], ".png"),
        (["sample", "tang"], 'aigc generate "" --model tang'),
        (["data"], "COMMAND"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_takes_one_line_and_exit_status_2(words, named, capsys):
    assert run_cli(*words) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"aigc: .+\n", captured.err) and named in captured.err
    assert not captured.out


def test_ctrl_c_ends_with_130_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def raises(error):
        def report():
            raise error

        monkeypatch.setattr(doctor, "report", report)

    raises(KeyboardInterrupt())
    assert run_cli("doctor") == 130
    assert capsys.readouterr().err == "aigc: stopped\n"
    raises(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run_cli("doctor")


def test_help_and_version_do_not_import_torch():
    code = (
        "import sys; from aigc_course import cli\ntry: cli.main([sys.argv[1]])\nfinally: print('torch' in sys.modules)"
    )
    for option, expected in (("--help", "doctor"), ("--version", "aigc 0.")):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
        assert done.stdout.endswith("False\n")


def test_data_check_names_the_damaged_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AIGC_DATA_DIR", str(tmp_path))
    name = datasets.check_data()[0].path
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"not what it should be")
    assert run_cli("data", "check") == 1
    assert re.search(rf"^error  {re.escape(name)}  .*expected", capsys.readouterr().out, re.MULTILINE)


# --- The doctor -------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_this_machine_fit(capsys):
    rows = {row.topic: row for row in doctor.report()}
    assert {"system", "processor", "memory", "Python", "torch", "device", "runs folder", "network"} <= rows.keys()
    assert not [row for row in rows.values() if row.level == "error"]
    assert run_cli("doctor") == 0
    assert rows["processor"].value in capsys.readouterr().out


def test_the_doctor_says_what_is_too_old_missing_damaged_or_shut(tmp_path, monkeypatch, capsys):
    lines = ["torch>=99", "no-such-package>=1", "numpy>=1", 'pytest>=99; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setenv("AIGC_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    levels = {}
    for row in doctor.report():
        levels.setdefault(row.topic, row.level)
    errors = {topic for topic, level in levels.items() if level == "error"}
    assert errors == {"torch", "no-such-package", "runs folder", "data"} and levels["numpy"] == "ok"
    assert "pytest" not in levels
    assert run_cli("doctor") == 1
    assert "missing; >=1 is needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "cores", "gigabytes", "topics"),
    [("cuda", 8, 16, {"slow here"}), ("cpu", 8, 16, {"no GPU"}), ("cuda", 2, 4, {"cores", "memory"})],
)
def test_what_will_be_slow_follows_from_the_facts(device, cores, gigabytes, topics):
    rows = doctor.speed_rows(device, cores, gigabytes * 2**30)
    assert {row.topic for row in rows} == topics
    assert all((row.level == "slow") == (row.topic != "slow here") for row in rows)


def test_the_parity_check_lets_float32_pass_and_catches_a_device_that_is_off(monkeypatch):
    assert doctor.parity("cpu") == 0
    exact, calls = doctor.F.conv2d, []

    def second_time_wrong(*args, **options):
        calls.append(args)
        return exact(*args, **options) * (1.01 if len(calls) == 2 else 1)

    monkeypatch.setattr(doctor.F, "conv2d", second_time_wrong)
    assert doctor.parity("cpu") > doctor.PARITY


@pytest.mark.parametrize("ending", ["all pass", "one fails", "Ctrl-C"])
def test_bands_are_stored_when_every_seed_has_passed_and_else_left_alone(tmp_path, monkeypatch, ending):
    def run_each(paths, out, profile, parameters, cell_timeout):
        assert os.environ["AIGC_BANDS"] == "measure"
        seed = parameters["SEED"]
        if ending == "Ctrl-C" and seed == 3:
            raise KeyboardInterrupt
        figures = {"loss": {"value": 1.0 + seed}}
        passed = ending != "one fails" or seed != 3
        facts = {"lesson": "01_x", "title": "x", "notebook": paths[0], "seconds": 1.0, "peak_mb": 1.0}
        yield paths[0], pages.Result(**facts, passed=passed, figures=figures)

    monkeypatch.setattr(course, "course_dir", lambda: tmp_path)
    monkeypatch.setattr(course, "_run_each", run_each)
    (tmp_path / "data" / "bands").mkdir(parents=True)
    stored = tmp_path / "data" / "bands" / "01_x.json"
    old = {"command": {"full": "…"}, "profiles": {"full": {"loss": [1.0, 2.0]}}}
    stored.write_text(json.dumps(old), encoding="utf-8")
    if ending == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            course.measure_bands([tmp_path / "01_x.ipynb"], "quick")
    else:
        assert course.measure_bands([tmp_path / "01_x.ipynb"], "quick") is (ending == "all pass")
    bands = json.loads(stored.read_text(encoding="utf-8"))
    assert bands["profiles"]["full"] == old["profiles"]["full"]
    assert bands["profiles"].get("quick") == ({"loss": [1.0, 2.0, 3.0, 4.0, 5.0]} if ending == "all pass" else None)
    assert "AIGC_BANDS" not in os.environ
