"""The ledger: what verify lets pass, what record and finish hold a lesson to, and what they leave behind."""

import json
import math

import nbformat
import pytest
import torch

from aigc_course import lessons
from aigc_course.lessons import LessonError, band, begin, finish, record, show, verify
from aigc_course.runtime import CourseError

LESSON = "09_example"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course with one lesson of two tags and one band, and an empty ledger for it."""
    monkeypatch.setattr(lessons, "course_dir", lambda: tmp_path)
    monkeypatch.setenv("AIGC_RECORD_DIR", str(tmp_path / "records"))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data" / "bands").mkdir(parents=True)
    text = r"Two claims, $a \tag{9.1}$ and $b \tag* {9.2}$; the first once more: $\tag{9.1}$."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, tmp_path / "notebooks" / f"{LESSON}.ipynb")
    bands = {"profiles": {"quick": {"distance": [1.0, 1.1, 0.9, 1.05, 0.95]}}}
    (tmp_path / "data" / "bands" / f"{LESSON}.json").write_text(json.dumps(bands), encoding="utf-8")
    begin(LESSON, "full", 3)
    return tmp_path


def record_of(course) -> dict:
    return json.loads((course / "records" / f"{LESSON}.json").read_text(encoding="utf-8"))


T = torch.tensor
PASSES = [
    (1.0, 1.0, {}),
    (1.0, 1.0 + 1e-9, {"atol": 1e-8}),
    (100.0, 100.5, {"rtol": 0.01}),
    (T([1.0, 2.0]), T([1.0, 2.0]), {}),
    (T([1.0, 1.0]), 1.0, {}),
    (0.1, T(0.1, dtype=torch.float64), {}),
    (1.0, 2.0, {"relation": "<="}),
    (2.0, 1.0, {"relation": ">="}),
    (1.0 + 1e-13, 1.0, {"relation": "<=", "atol": 1e-12}),
    (3.0, 3.39, {"stderr": 0.1}),
    (T([0.1, -0.1]), 0.0, {"stderr": T([0.05, 0.05])}),
]
FAILS = [
    (1.0, 1.0001, {}),
    (1.0, 1.0 + 1e-7, {"atol": 1e-8}),
    (T([1.0, 2.0]), T([1.0, 2.1]), {"atol": 0.01}),
    (2.0, 1.0, {"relation": "<="}),
    (1.0, 2.0, {"relation": ">="}),
    (3.0, 3.41, {"stderr": 0.1}),
    (T([0.0, 0.3]), 0.0, {"stderr": T([0.05, 0.05])}),
    (0.1, T(0.1), {"atol": 1e-10}),  # float32 holds another number than Python does
    (math.nan, math.nan, {"atol": 1.0}),
    (math.nan, 1.0, {"relation": "<="}),
    (math.inf, 1.0, {"atol": 1.0}),
    (1.0, math.inf, {"rtol": 1e-6}),
    (T([1.0, 5.0]), T([1.0, math.inf]), {"rtol": 1e-6}),
    (2.0, math.inf, {"relation": "<="}),
    (1.0, 2.0, {"atol": math.inf}),
    (T([]), T([]), {}),
]


@pytest.mark.parametrize(("left", "right", "options"), PASSES)
def test_what_holds_is_green(course, capsys, left, right, options):
    verify("9.1", left, right, **options)
    assert "✓ (9.1)" in capsys.readouterr().out


@pytest.mark.parametrize(("left", "right", "options"), FAILS)
def test_what_does_not_hold_is_red_and_stops_the_cell(course, capsys, left, right, options):
    with pytest.raises(LessonError, match="9.1"):
        verify("9.1", left, right, **options)
    assert "✗ (9.1)" in capsys.readouterr().out
    verify("9.2", 1, 1.0)
    with pytest.raises(LessonError, match=r"\(9.1\) does not hold"):
        finish()
    assert not record_of(course)["passed"]


def test_a_check_that_proves_nothing_is_refused(course):
    same = torch.ones(2)
    for call in (
        lambda: verify("9.1", same, same),
        lambda: verify("9.1", 1.0, 2.0, stderr=0.0),
        lambda: verify("9.1", 1.0, 2.0, stderr=math.inf),
        lambda: verify("9.1", 1.0, 2.0, relation="<"),
        lambda: verify("9.1", 1 + 1j, 1 + 2j),
        lambda: record("distance", 1.0),
    ):
        with pytest.raises((CourseError, TypeError)):
            call()


def test_a_corrected_cell_run_again_turns_green(course):
    with pytest.raises(LessonError):
        verify("9.1", 1.0, 2.0)
    verify("9.1", 1.0, 1)
    verify("9.2", 1.0, 1)
    finish()


def test_finish_wants_every_tag_and_knows_every_claim(course):
    verify("9.1", 1.0, 1)
    with pytest.raises(LessonError, match=r"\(9.2\) was not verified"):
        finish()
    verify("9.2", 1.0, 1)
    finish()
    verify("9.3", 1.0, 1)
    with pytest.raises(LessonError, match=r"\(9.3\) was verified but no equation carries it"):
        finish()


@pytest.mark.parametrize(
    ("value", "control", "message"),
    [
        (1.02, 5.0, None),
        (1.32, 5.0, "outside the band"),
        (0.68, 5.0, "outside the band"),
        (math.nan, 5.0, "must be finite"),
        (1.02, math.nan, "must be finite"),
        (1.02, 1.1, "holds the control"),
    ],
)
def test_figures_are_held_to_their_band_and_the_control_lies_outside(course, value, control, message):
    begin(LESSON, "quick")
    verify("9.1", 1.0, 1)
    verify("9.2", 1.0, 1)
    record("distance", value, control=control, unit="nats")
    if message is None:
        finish()
    else:
        with pytest.raises(LessonError, match=message):
            finish()
    (figure,) = record_of(course)["figures"]
    assert figure["passed"] is (message is None)
    assert figure["low"] == pytest.approx(1 - 4 * 0.0790569) and figure["high"] == pytest.approx(1 + 4 * 0.0790569)
    assert figure["unit"] == "nats"


def test_figures_and_bands_must_match(course, monkeypatch):
    begin(LESSON, "quick")
    verify("9.1", 1.0, 1)
    verify("9.2", 1.0, 1)
    with pytest.raises(LessonError, match="'distance' has a band but was not recorded"):
        finish()
    record("distance", 1.0, control=5.0)
    finish()
    record("renamed", 99.0, control=99.0)
    with pytest.raises(LessonError, match="'renamed' has no band"):
        finish()
    monkeypatch.setenv("AIGC_BANDS", "measure")
    finish()


ODD = '{"profiles": {"quick": {"distance": [1.0]}}}'


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"profiles": 1}', "<html>", ODD])
def test_damaged_bands_are_named(course, content):
    begin(LESSON, "quick")
    path = course / "data" / "bands" / f"{LESSON}.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CourseError, match=f"{path.name}: expected the measured bands.*git checkout"):
        finish()


def test_a_profile_without_bands_records_but_figures_must_be_finite(course):
    begin(LESSON, "full")
    verify("9.1", 1.0, 1)
    verify("9.2", 1.0, 1)
    record("speed", 3.0, control=1.0)
    finish()
    assert record_of(course)["figures"][0]["low"] is None
    record("speed", math.inf, control=1.0)
    with pytest.raises(LessonError, match="must be finite"):
        finish()


def test_the_record_says_what_was_verified(course, capsys):
    verify("9.1", 1.0, 1, note="by hand")
    verify("9.1", 2.0, 2, note="by machine")
    verify("9.2", 1.0, 1)
    finish()
    written = record_of(course)
    assert (written["lesson"], written["profile"], written["seed"], written["passed"]) == (LESSON, "full", 3, True)
    assert [claim["tag"] for claim in written["claims"]] == ["9.1", "9.1", "9.2"]
    assert "numbered claims verified: 2" in capsys.readouterr().out


def test_begin_forgets_the_lesson_before_and_refuses_what_is_not_there(course):
    verify("9.1", 1.0, 1)
    begin(LESSON, "quick")
    with pytest.raises(LessonError, match="9.1"):
        finish()
    with pytest.raises(CourseError, match="42_nothing"):
        begin("42_nothing")
    with pytest.raises(CourseError, match="fast"):
        begin(LESSON, "fast")


def test_the_profile_comes_from_the_argument_then_the_environment(course, monkeypatch):
    assert begin(LESSON) == "quick"
    monkeypatch.setenv("AIGC_PROFILE", "full")
    assert begin(LESSON) == "full"
    assert begin(LESSON, "quick") == "quick"


def test_a_band_is_four_standard_deviations_and_never_empty():
    low, high = band([1.0, 2.0, 3.0])
    assert (low, high) == (2 - 4 * 1.0, 2 + 4 * 1.0)
    low, high = band([5.0, 5.0, 5.0])
    assert low < 5.0 < high < 5.01


def test_show_prints_the_live_source(course, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: seen.append(bundle["text/plain"]))
    show(band, lessons.Claim)
    assert "lessons.py, line" in seen[0] and "\ndef band(" in seen[0] and "statistics.stdev" in seen[0]
    for code in seen:
        compile(code, "shown", "exec")  # indented as it stands in the file
