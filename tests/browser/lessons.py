"""Lessons in JupyterLab, as a reader has them: ``make browser``. No part of ``make test``, which goes by test_*.py."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import lab as driver
import pytest

from aigc_course import course, exercises
from conftest import COURSE

OUT = COURSE / "build" / "browser"
ADVICE = (
    "make browser needs Chromium: install the system's package (Debian, Ubuntu: sudo apt install chromium; Fedora: "
    "sudo dnf install chromium; macOS: brew install --cask chromium), or name a Chrome with AIGC_CHROMIUM=/path/to/it"
)


@dataclass(frozen=True)
class Scene:
    """What there is to see in a lesson: the cells with a live figure and with sliders, and whether it has exercises."""

    lesson: int
    live: tuple[str, ...] = ()
    slider: str = ""
    exercise: bool = True


SCENES = (
    Scene(0, exercise=False),
    Scene(2, live=("train-run",), slider="explore"),
    Scene(4, live=("train",), slider="replay"),
    Scene(6, live=("sonnets-train",), slider="explore-run"),
)


@pytest.fixture(scope="session")
def lab():
    if driver.chromium() is None:
        pytest.exit(ADVICE, returncode=1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with driver.Lab(OUT, COURSE / "notebooks") as running:
        yield running


@pytest.fixture(scope="session")
def page(lab):
    with driver.browser() as opened:
        yield opened


@pytest.fixture
def opened(lab, page):
    """A function that opens a notebook; its kernel is shut down after the test."""
    notebooks = []

    def open_one(name, cells=None):
        if cells is not None:
            made = [{"cell_type": "code", "id": key, "metadata": {}, "source": source} for key, source in cells.items()]
            lab.write(name, {"cells": made, "metadata": SPEC, "nbformat": 4, "nbformat_minor": 5})
        notebooks.append(driver.Notebook(lab, page, name))
        return notebooks[-1]

    yield open_one
    for notebook in notebooks:
        notebook.close()


def try_exercise(notebook, name, exercise):
    """Answer with a number that a known mistake gives, read its hint, then answer with the right one."""
    [key] = notebook.code(f"{name}(")
    source = notebook.source(key)
    answer = re.search(rf"^{name}\((\w+)\)", source, re.MULTILINE)[1]
    assert "not tried yet" in notebook.output(key)
    mistake = next(mistake for mistake in exercise.mistakes if mistake.gives is not None)
    wrong = mistake.gives() if callable(mistake.gives) else mistake.gives
    for value, words, shot in ((wrong, mistake.hint, "wrong"), (exercise.truth(), "right.", "right")):
        filled = source.replace(f"\n{name}({answer})", f"\n{answer} = {float(value)!r}\n{name}({answer})")
        said = " ".join(notebook.type_and_run(key, filled).split())
        assert " ".join(words.split()) in said, said
        notebook.screenshot(f"{Path(notebook.name).stem}-exercise-{shot}", key)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.lesson:02d}")
def test_a_lesson(opened, scene):
    path = next(path for path in course.lessons() if path.name.startswith(f"{scene.lesson:02d}_"))
    notebook = opened(path.name)
    notebook.run_all()
    pictures = notebook.follow(300)
    notebook.screenshot(f"{scene.lesson:02d}-end", notebook.cells[-1]["id"])
    for key in scene.live:
        notebook.screenshot(f"{scene.lesson:02d}-{key}", key)
        assert pictures.get(key, 0) >= 2, f"cell {key}: the live figure did not change while the cell ran: {pictures}"
    if scene.slider:
        notebook.screenshot(f"{scene.lesson:02d}-{scene.slider}-before", scene.slider)
        seconds = notebook.move_slider(scene.slider)
        notebook.screenshot(f"{scene.lesson:02d}-{scene.slider}-after", scene.slider)
        print(f"lesson {scene.lesson:02d}: the picture of {scene.slider} changed {1000 * seconds:.0f} ms after the key")
    if scene.exercise:
        checks = exercises.of_lesson(scene.lesson)
        name = next(name for name, exercise in checks.items() if isinstance(exercise, exercises.Number))
        try_exercise(notebook, name, checks[name])


# --- That these tests can fail ----------------------------------------------------------------------------------------

SPEC = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
SMALL = {
    "live": """import time
from aigc_course.widgets import LiveFigure
live = LiveFigure(40, title="A small run", ylabel="loss", alt="A falling curve.", every=0.2)
live.SHARE = 1.0
for step in range(1, 41):
    time.sleep(0.05)
    live(step, {"loss": 1 / step})""",
    "slider": """from aigc_course import plots
from aigc_course.widgets import explorer

def draw(x):
    with plots.canvas(width=3, height=2) as (figure, axes):
        axes.plot([0, x])
    return figure

explorer(draw, "A line.", x=(0, 9, 5))""",
    "exercise": """from aigc_course.exercises import Mistake, Number
check_sum = Number(number="0.1", title="A sum", kind="prediction", truth=lambda: 4.0,
                   mistakes=[Mistake("once", "You counted one of the two only.", 2.0)])
guess = None
check_sum(guess)""",
}


def test_the_driver_runs_looks_moves_and_types(opened):
    notebook = opened("small.ipynb", SMALL)
    notebook.run_all()
    assert notebook.follow(60)["live"] >= 3
    notebook.move_slider("slider")
    mistake = exercises.Mistake("once", "You counted one of the two only.", 2.0)
    check = exercises.Number(number="0.1", title="", kind="prediction", truth=lambda: 4.0, mistakes=[mistake])
    try_exercise(notebook, "check_sum", check)


def test_a_cell_that_raises_is_seen_at_once(opened):
    notebook = opened("raises.ipynb", {"good": "print(1)", "bad": "{}['a key']", "after": "print(2)"})
    notebook.run_all()
    start = time.monotonic()
    with pytest.raises(driver.CellError, match=r"(?s)raises.ipynb, cell bad: .*KeyError: 'a key'"):
        notebook.follow(60)
    assert time.monotonic() - start < 20


def test_a_figure_that_stands_still_and_a_slider_without_effect_are_seen(opened):
    still = SMALL["live"].replace("every=0.2", "every=60.0")
    deaf = SMALL["slider"].replace("axes.plot([0, x])", "axes.plot([0, 1])")
    notebook = opened("still.ipynb", {"live": still, "slider": deaf})
    notebook.run_all()
    assert notebook.follow(60).get("live", 0) < 2
    with pytest.raises(AssertionError, match="does not follow its slider"):
        notebook.move_slider("slider")
