"""Every notebook: its form by static checks, and what its last cell recorded when nbval executed it just before."""

import json
import re
import subprocess
import sys

import nbformat
import pytest

from aigc_course import course, lessons
from conftest import COURSE, RECORDS

LESSONS = course.lessons()
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
PARAMETERS = {"PROFILE": "None", "SEED": "0", "DEVICE": '"auto"', "LIVE": "False"}


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def outputs(path):
    return [(cell, output) for cell in cells(path) for output in cell.outputs]


def test_the_lessons_are_there():
    assert [path.stem for path in LESSONS] == [
        "00_start_here",
        "01_gaussian_mixtures",
        "02_variational_autoencoder",
        "03_the_gan_objective",
        "04_dcgan_on_mnist",
        "05_transformer_from_scratch",
        "06_gpt2_text_generation",
    ]


@each_lesson
def test_the_parameters_cell(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == cells(path)[:1]
    found = dict(re.findall(r"^(\w+) = ([^ #\n]+)", tagged[0].source, re.MULTILINE))
    assert found == PARAMETERS


@each_lesson
def test_it_was_executed_in_order_at_the_quick_profile(path):
    assert [cell.execution_count for cell in cells(path)] == list(range(1, len(cells(path)) + 1))


@each_lesson
def test_the_last_cell_finishes(path):
    assert cells(path)[-1].source == "finish()"
    assert nbformat.read(path, as_version=4).cells[-1].cell_type == "code"
    assert sum("begin(" in cell.source for cell in cells(path)) == 1


@each_lesson
def test_no_output_is_an_error_a_warning_or_debris(path):
    for cell, output in outputs(path):
        assert output.output_type != "error", cell.id
        assert output.get("name") != "stderr", cell.id
        assert not any("widget" in mime for mime in output.get("data", {})), cell.id
        assert output.get("data", {"": ""}) and output.get("text", " "), cell.id
    metadata = nbformat.read(path, as_version=4).metadata
    assert "widgets" not in metadata and "papermill" not in metadata


@each_lesson
def test_a_checked_output_is_there_to_be_compared(path):
    """nbval passes a tagged cell without outputs or without an execution count."""
    for cell in cells(path):
        if "nbval-check-output" in cell.metadata.get("tags", []):
            assert cell.outputs and cell.execution_count, cell.id


def test_some_outputs_are_checked():
    tags = [tag for path in LESSONS for cell in cells(path) for tag in cell.metadata.get("tags", [])]
    assert tags.count("nbval-check-output") >= 3


@each_lesson
def test_it_is_small(path):
    assert path.stat().st_size < 1_500_000


@each_lesson
def test_every_figure_says_in_words_what_it_shows(path):
    for cell, output in outputs(path):
        if "image/png" in output.get("data", {}):
            alt = output.metadata.get("image/png", {}).get("alt", "")
            assert len(alt.split()) >= 6, cell.id
    for cell in cells(path, "markdown"):
        assert "![](" not in cell.source, cell.id


@each_lesson
def test_links_lead_to_files_that_exist(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            if not re.match(r"https?://|#", target):
                assert (path.parent / target.split("#")[0]).exists(), f"{cell.id}: {target}"


@each_lesson
def test_equation_numbers_belong_to_the_lesson_and_count_up(path):
    tags = [tag for cell in cells(path, "markdown") for tag in re.findall(r"\\tag\{([^}]+)\}", cell.source)]
    assert tags == [f"{int(path.stem[:2])}.{i}" for i in range(1, len(tags) + 1)]
    assert tags


@each_lesson
def test_numbers_of_equations_in_the_text_exist(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    tags = set(re.findall(r"\\tag\{([^}]+)\}", text))
    for number in re.findall(r"\((\d+\.\d+)\)", text):
        if number.startswith(f"{int(path.stem[:2])}."):
            assert number in tags, number


@each_lesson
def test_no_widget_or_figure_is_left_to_chance(path):
    """Each exploration has a static twin in the next code cell."""
    code = cells(path)
    for cell, following in zip(code, code[1:], strict=False):
        if re.search(r"^explorer\(", cell.source, re.MULTILINE):
            assert any("image/png" in output.get("data", {}) for output in following.outputs), cell.id


@each_lesson
def test_a_code_cell_shows_a_screenful_at_most(path):
    for cell in cells(path):
        assert len(cell.source.splitlines()) <= 25, cell.id
        assert max(map(len, cell.source.splitlines())) <= 110, cell.id
        for output in cell.outputs:
            if output.output_type == "stream":
                assert len(output.text.splitlines()) <= 25, cell.id


@each_lesson
def test_what_the_executed_lesson_recorded(path, executed_lessons):
    if path.stem not in executed_lessons:
        pytest.skip("nbval did not execute this lesson in this session: run pytest without arguments")
    record = json.loads((RECORDS / f"{path.stem}.json").read_text(encoding="utf-8"))
    assert record["passed"] and record["profile"] == "quick"
    assert {claim["tag"] for claim in record["claims"]} == set(lessons.lesson_tags(path.stem))
    for figure in record["figures"]:
        assert figure["low"] <= figure["value"] <= figure["high"], figure["name"]
        assert not figure["low"] <= figure["control"] <= figure["high"], figure["name"]


BANDS = sorted((COURSE / "data" / "bands").glob("*.json"))


@pytest.mark.parametrize("path", BANDS, ids=lambda path: path.stem)
def test_a_band_comes_from_five_seeds_and_says_how(path):
    bands = json.loads(path.read_text(encoding="utf-8"))
    assert "quick" in bands["profiles"] and bands["profiles"].keys() == bands["command"].keys()
    for profile, figures in bands["profiles"].items():
        assert bands["command"][profile] == f"aigc course --bands --profile {profile} {int(path.stem[:2])}"
        for values in figures.values():
            assert len(values) >= 5 and len(set(values)) > 1


def test_every_lesson_that_records_has_bands():
    recording = {path.stem for path in LESSONS if any("record(" in cell.source for cell in cells(path))}
    assert recording == {path.stem for path in BANDS}


def test_papermill_runs_a_lesson_with_injected_parameters(tmp_path):
    """Another seed and the other profile arrive in the kernel, and the lesson still passes."""
    result = course.run_lesson(LESSONS[0], tmp_path, profile="full", parameters={"SEED": 4})
    assert result.passed, result.error
    record = json.loads((tmp_path / "records" / "00_start_here.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["profile"]) == (4, "full")


def test_the_kernels_of_these_tests_have_no_network():
    """The lessons above passed without one: here is the proof that the barrier stands."""
    attempt = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    result = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, encoding="utf-8")
    assert result.returncode != 0 and "the tests run offline" in result.stderr
