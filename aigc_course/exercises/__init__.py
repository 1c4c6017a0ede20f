"""The exercises of the lessons: ``from aigc_course.exercises.lesson02 import check_kl``, one module per lesson."""

import importlib

from .exercise import Choice, Exercise, Function, Goal, Mistake, Number, Verdict, Wrong

LESSONS = (1, 2, 3, 4, 5, 6)


def of_lesson(number: int) -> dict[str, Exercise]:
    """The exercises of a lesson by the names of their checks, in the order of the lesson."""
    module = importlib.import_module(f"{__name__}.lesson{number:02d}")
    return {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}


__all__ = ["LESSONS", "Choice", "Exercise", "Function", "Goal", "Mistake", "Number", "Verdict", "Wrong", "of_lesson"]
