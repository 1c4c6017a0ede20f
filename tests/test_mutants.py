"""The ledger must bite: a classic mistake patched into the package turns a named claim of the lesson red.

A mutant is one line of the package rewritten. The cells that lead to the claim, found by the names they define and
use, run in this process with the mutated function in place; the claim must be red, and green without the mutation.
"""

import ast
import contextlib
import importlib
import inspect
import textwrap
from dataclasses import dataclass

import nbformat
import pytest

from aigc_course import lessons, plots, widgets
from aigc_course.runtime import course_dir


@dataclass(frozen=True)
class Mutant:
    lesson: str
    what: str
    target: str  # module.function or module.Class
    old: str
    new: str
    tag: str

    def __str__(self):
        return f"{self.lesson[:2]}: {self.what}"


GMM = "01_gaussian_mixtures"
MUTANTS = [
    Mutant(GMM, "log-determinant with the wrong sign", "gmm.gaussian_log_prob", "- log_det", "+ log_det", "1.5"),
    Mutant(GMM, "the constant without d", "gmm.gaussian_log_prob", "x.shape[1] * math.log", "math.log", "1.5"),
]


def defined(cell: str) -> set[str]:
    """The names that a cell binds at its top level."""
    names = set()
    for node in ast.parse(cell).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                names.add(inner.id)
            elif isinstance(inner, ast.alias):
                names.add((inner.asname or inner.name).split(".")[0])
    return names


def used(cell: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def cells_leading_to(lesson: str, tag: str) -> list[str]:
    """The code cells that verify ``tag`` and, going backwards, every cell that binds a name they need."""
    notebook = nbformat.read(course_dir() / "notebooks" / f"{lesson}.ipynb", as_version=4)
    chosen, needed = [], {"PROFILE"}
    for cell in reversed([cell.source for cell in notebook.cells if cell.cell_type == "code"]):
        quoted = f'"{tag}"'
        if ("verify(" in cell and quoted in cell) or "begin(" in cell or defined(cell) & needed:
            chosen.insert(0, cell)
            needed |= used(cell)
    return chosen


def outcome(lesson: str, tag: str) -> set[bool]:
    """Run the cells that lead to ``tag``; what its claims came to."""
    namespace = {"__name__": "lesson"}
    for cell in cells_leading_to(lesson, tag):
        with contextlib.suppress(Exception):  # a mutant may also make a cell fail; only the ledger counts
            exec(compile(cell, lesson, "exec"), namespace)
    return {claim.passed for claim in lessons._ledger.claims.values() if claim.tag == tag}


@contextlib.contextmanager
def applied(mutant: Mutant):
    module_name, name = mutant.target.split(".")
    module = importlib.import_module(f"aigc_course.{module_name}")
    original = getattr(module, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutant.old) == 1, f"{mutant.target} has {source.count(mutant.old)} times: {mutant.old}"
    exec(compile(source.replace(mutant.old, mutant.new), f"mutant of {mutant.target}", "exec"), module.__dict__)
    try:
        yield
    finally:
        setattr(module, name, original)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(plots, "present", lambda figure, alt: None)
    monkeypatch.setattr(widgets, "explorer", lambda *args, **ranges: None)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_turns_its_claim_red(mutant):
    with applied(mutant):
        assert False in outcome(mutant.lesson, mutant.tag)


@pytest.mark.parametrize(("lesson", "tag"), sorted({(m.lesson, m.tag) for m in MUTANTS}))
def test_without_a_mutation_the_claim_is_green(lesson, tag):
    assert outcome(lesson, tag) == {True}


@pytest.mark.parametrize("lesson", sorted({m.lesson for m in MUTANTS}))
def test_a_lesson_has_three_mutants_at_least(lesson):
    assert sum(m.lesson == lesson for m in MUTANTS) >= 3
