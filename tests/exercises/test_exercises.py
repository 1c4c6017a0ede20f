"""Each exercise accepts right answers, and answers each of the usual mistakes with the hint that belongs to it."""

import contextlib
import importlib
import re
import time
from dataclasses import replace

import nbformat
import pytest
import torch

from aigc_course import course, exercises
from aigc_course.exercises import Choice, Exercise, Function, Goal, Number
from aigc_course.exercises.exercise import MIME

NOTEBOOKS = {int(path.stem[:2]): path for path in course.lessons()}
ALL = {
    (lesson, name): exercise for lesson in exercises.LESSONS for name, exercise in exercises.of_lesson(lesson).items()
}
each_lesson = pytest.mark.parametrize("lesson", exercises.LESSONS, ids="{:02d}".format)
each = pytest.mark.parametrize(
    ("lesson", "name"), ALL, ids=lambda value: f"{value:02d}" if value in range(9) else value
)


def answers(lesson: int) -> dict:
    return importlib.import_module(f"answers_{lesson:02d}").ANSWERS


def cells(lesson: int, tag: str) -> list:
    nb = nbformat.read(NOTEBOOKS[lesson], as_version=4)
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", [])]


def stub_of(lesson: int, name: str) -> str:
    (source,) = [
        cell.source for cell in cells(lesson, "exercise") if re.search(rf"^{name}\(", cell.source, re.MULTILINE)
    ]
    return source


@pytest.fixture(scope="module")
def after_the_imports():
    """What a lesson's names are once its parameters and imports have run."""
    known = {}

    def names(lesson: int) -> dict:
        if lesson not in known:
            code = [cell.source for cell in nbformat.read(NOTEBOOKS[lesson], 4).cells if cell.cell_type == "code"]
            known[lesson] = {}
            for source in code[:2]:
                exec(compile(source, f"lesson {lesson}", "exec"), known[lesson])
        return dict(known[lesson])

    return names


def run(source: str, names: dict):
    """Execute a cell; returns the value of its last line."""
    *_, last = source.strip().splitlines()
    exec(compile(source.strip()[: -len(last)], "stub", "exec"), names)
    return eval(last, names)


# ---- how many, of which kinds, and how they stand in the lesson ----


@each_lesson
def test_a_lesson_has_four_to_six_of_all_kinds(lesson):
    found = exercises.of_lesson(lesson)
    assert 4 <= len(found) <= 6
    assert {exercise.kind for exercise in found.values()} >= {"derivation", "prediction", "repair", "open"}
    assert [exercise.number for exercise in found.values()] == [f"{lesson}.{i + 1}" for i in range(len(found))]
    assert set(answers(lesson)) == set(found)


@each_lesson
def test_the_cards_of_a_lesson(lesson):
    """Heading, kind, time, difficulty, what it trains; then the stub, two hints, a worked answer, all folded away."""
    text = [cell.source for cell in cells(lesson, "exercise") if cell.cell_type == "markdown"]
    heads = [re.match(r"### Exercise (\S+) · (.+)\n\n\*(.+)\*\n\n(.|\n)+", source) for source in text]
    assert all(heads), [source[:60] for source, head in zip(text, heads, strict=True) if not head]
    found = exercises.of_lesson(lesson)
    assert [(head[1], head[2]) for head in heads] == [(exercise.number, exercise.title) for exercise in found.values()]
    for head, exercise in zip(heads, found.values(), strict=True):
        kind, minutes, circles, trains = head[3].split(" · ", 3)
        assert kind.lower() == exercise.kind
        assert re.fullmatch(r"\d+ minutes", minutes) and circles in ("●○○", "●●○", "●●●")
        assert trains.startswith("trains: ")
    for tag, count in (("hints", 2), ("solution", 1)):
        folded = cells(lesson, tag)
        assert len(folded) == len(found)
        for cell in folded:
            assert cell.source.count("<details>") == cell.source.count("</details>") == count, cell.id
            assert cell.source.startswith("<details>") and cell.source.endswith("</details>"), cell.id
    (teacher,) = cells(lesson, "teacher")
    assert teacher.source.startswith("<details>") and "90" in teacher.source
    order = [
        cell.metadata["tags"][0] for cell in nbformat.read(NOTEBOOKS[lesson], 4).cells if cell.metadata.get("tags")
    ]
    order = [tag for tag in order if tag in ("exercise", "hints", "solution")]
    assert order == ["exercise", "exercise", "hints", "solution"] * len(found)


@each_lesson
def test_lessons_without_exercises_lack_nothing_else(lesson):
    """Those who skip them: no later cell uses a name that only an exercise makes."""
    made = {
        name
        for cell in cells(lesson, "exercise")
        for name in re.findall(r"^(?:def )?(\w+)(?:\(| =)", cell.source, re.M)
    }
    made -= set(exercises.of_lesson(lesson))
    for cell in nbformat.read(NOTEBOOKS[lesson], 4).cells:
        if cell.cell_type == "code" and "exercise" not in cell.metadata.get("tags", []):
            for name in made:
                assert not re.search(rf"\b{name}\b", cell.source), f"{cell.id} uses {name}"


# ---- right, wrong, and neither ----


@each
def test_an_untouched_stub_is_not_tried_yet(lesson, name, after_the_imports, capsys):
    names = after_the_imports(lesson)
    capsys.readouterr()
    verdict = run(stub_of(lesson, name), names)
    assert verdict.status == "untried", verdict
    assert not capsys.readouterr().out


@each
def test_the_worked_answer_is_right(lesson, name, after_the_imports):
    index = list(exercises.of_lesson(lesson)).index(name)
    (code,) = re.findall(r"```python\n(.*?)```", cells(lesson, "solution")[index].source, re.DOTALL)
    stub, names = stub_of(lesson, name), after_the_imports(lesson)
    run(stub, names)
    exec(compile(code, "worked answer", "exec"), names)
    verdict = eval(stub.strip().splitlines()[-1], names)
    assert verdict.status == "right", verdict


@each
def test_a_second_answer_is_right(lesson, name):
    verdict = ALL[lesson, name](answers(lesson)[name].second)
    assert verdict.status == "right", verdict


@each
def test_each_usual_mistake_gets_its_hint(lesson, name):
    exercise, wrong = ALL[lesson, name], answers(lesson)[name].wrong
    assert len(wrong) >= 4
    hints = {mistake.key: mistake.hint for mistake in exercise.mistakes}
    assert len(hints) == len(set(hints.values())) == len(exercise.mistakes)
    for key, attempts in wrong.items():
        assert attempts
        for attempt in attempts:
            verdict = exercise(attempt)
            assert (verdict.status, verdict.mistake) == ("wrong", key), verdict
            assert hints[key] in verdict.text
            if isinstance(exercise, Function):
                assert re.search(r"\d", verdict.text), verdict


@each
def test_answers_that_do_nothing_raise_or_do_not_end(lesson, name):
    exercise = ALL[lesson, name]
    assert exercise(None).status == exercise(...).status == "untried"
    if isinstance(exercise, Function | Goal):
        assert exercise(object()).status in ("wrong", "raised")
    if not isinstance(exercise, Function):
        return

    def broken(*arguments, **options):
        raise ZeroDivisionError("all is lost")

    def endless(*arguments, **options):
        while True:
            time.sleep(0.01)

    assert exercise(lambda *arguments, **options: None).status == "untried"
    raised = exercise(broken)
    assert raised.status == "raised" and "ZeroDivisionError" in raised.text and "all is lost" in raised.text
    assert replace(exercise, seconds=0.2)(endless).status == "slow"


# ---- the machinery ----


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


TOY = Function(
    number="0.1",
    title="Square",
    kind="by hand",
    reference=square,
    cases=lambda rng: [(torch.randn(3, 4, generator=rng),) for _ in range(3)],
    mistakes=[],
)


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (lambda x: x**2, "right", "right"),
        (lambda x: -(x**2), "wrong", "but for the sign"),
        (lambda x: 3 * x * x, "wrong", "3 times"),
        (lambda x: (x * x).sum(1), "wrong", r"shape.*\(3,\), expected \(3, 4\)"),
        (lambda x: (x * x).tolist(), "wrong", "values are asked for|tensor is asked for"),
        (lambda x: torch.where(x > 1e9, x, torch.inf), "wrong", "infinite"),
        (lambda x: torch.cat([x[:1] ** 3, x[1:] ** 2]), "wrong", "67% of your numbers are right"),
        (lambda x: {"y": x}, "wrong", "a dict"),
        (lambda: 0, "raised", "TypeError"),
        (7, "wrong", "function itself"),
    ],
)
def test_what_is_said_of_an_unknown_mistake(answer, status, words):
    verdict = TOY(answer)
    assert verdict.status == status
    assert re.search(words, verdict.text), verdict


def test_an_answer_that_changes_its_input_does_not_fool_the_comparison():
    assert TOY(lambda x: x.mul_(x)).status == "right"
    assert TOY(lambda x: x.zero_()).status == "wrong"


def test_an_answer_cannot_catch_the_end_of_its_time():
    def stubborn(x):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    assert replace(TOY, seconds=0.2)(stubborn).status == "slow"


def test_the_line_of_an_error_is_told():
    names = {}
    exec(compile("def f(x):\n    y = x\n    return y / 0 + undefined\n", "<cell>", "exec"), names)
    assert "line 3" in TOY(names["f"]).text


def test_a_verdict_is_a_line_to_read_and_facts_to_count():
    bundle = TOY(square)._repr_mimebundle_()
    assert bundle["text/plain"] == "✓ Exercise 0.1: right."
    shown = exercises.Verdict("0.1", "wrong", "<b> & *co*, x_1 [k].")._repr_mimebundle_()["text/markdown"]
    assert shown == r"✗ Exercise 0.1: &lt;b&gt; &amp; \*co\*, x\_1 \[k\]."
    assert bundle[MIME] == {"exercise": "0.1", "status": "right", "mistake": "", "text": "right."}
    assert TOY(None)._repr_mimebundle_()["text/plain"].startswith("…")
    assert repr(TOY(lambda x: -x)).startswith("✗")


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    TOY(square)
    assert torch.equal(before, torch.get_rng_state())


def test_numbers_and_choices_take_only_what_is_asked_for():
    number = Number(number="0.2", title="Ten", kind="prediction", mistakes=[], truth=lambda: 10.0)
    assert [number(value).status for value in (10, 10.1, torch.tensor(10.0), True, "10", 9, float("nan"))] == [
        *["right"] * 3,
        *["wrong"] * 4,
    ]
    assert "too low" in number(9).text and "too high" in number(11).text
    choice = Choice(number="0.3", title="Which", kind="prediction", mistakes=[], truth="up")
    assert [choice(value).status for value in ("up", " Up", "down", 3)] == ["right", "right", "wrong", "wrong"]


def test_an_exercise_is_of_a_known_kind():
    with pytest.raises(exercises.exercise.CourseError, match="kind"):
        Exercise(number="0.4", title="None", kind="riddle", mistakes=[])
