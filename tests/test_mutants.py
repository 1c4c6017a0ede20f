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

from aigc_course import lessons, plots, recipes, widgets
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


GMM, VAE = "01_gaussian_mixtures", "02_variational_autoencoder"
MUTANTS = [
    Mutant(GMM, "log-determinant with the wrong sign", "gmm.gaussian_log_prob", "- log_det", "+ log_det", "1.5"),
    Mutant(GMM, "the constant without its d", "gmm.gaussian_log_prob", "x.shape[1] * math.log", "math.log", "1.5"),
    Mutant(GMM, "no weights in Bayes' rule", "gmm.e_step", "weights.log() + ", "", "1.5"),
    Mutant(GMM, "softmax over the samples", "gmm.e_step", "softmax(1)", "softmax(0)", "1.6"),
    Mutant(
        GMM, "naive logarithm of a sum", "gmm.e_step", "log_joint.logsumexp(1)", "log_joint.exp().sum(1).log()", "1.7"
    ),
    Mutant(GMM, "posterior sharpened", "gmm.e_step", "softmax(1)", "mul(2).softmax(1)", "1.11"),
    Mutant(
        GMM, "weights never learnt", "gmm.m_step", "counts / len(x)", "torch.ones_like(counts) / len(counts)", "1.12"
    ),
    Mutant(GMM, "means over all samples", "gmm.m_step", "@ x / counts[:, None]", "@ x / len(x)", "1.13"),
    Mutant(GMM, "second moments about zero", "gmm.m_step", "(x[rows] - means[:, None])", "x[rows]", "1.14"),
    Mutant(GMM, "responsibilities squared", "gmm.m_step", ".T.sqrt()", ".T", "1.14"),
    Mutant(GMM, "a floor nobody asked for", "gmm.m_step", "add_(reg_covar)", "add_(reg_covar + 0.1)", "1.14"),
    Mutant(GMM, "bound that cannot touch", "gmm.e_step", "softmax(1)", "mul(0.5).softmax(1)", "1.15"),
    Mutant(GMM, "BIC with the wrong sign", "gmm.GaussianMixture", "return -2 *", "return 2 *", "1.17"),
    Mutant(GMM, "weights counted as free", "gmm.GaussianMixture", "return (k - 1) +", "return k +", "1.17"),
    Mutant(VAE, "standard deviation exp(logvar)", "vae.reparameterize", "(0.5 * logvar)", "logvar", "2.6"),
    Mutant(VAE, "no noise", "vae.reparameterize", "* noise", "* 0 * noise", "2.6"),
    Mutant(VAE, "entropy of q with the wrong sign", "vae.log_weight", "+ logvar", "- logvar", "2.6"),
    Mutant(VAE, "the rate added", "vae.elbo", "- beta * kl", "+ beta * kl", "2.7"),
    Mutant(VAE, "KL without its half", "vae.kl_to_standard_normal", "0.5 * (", "(", "2.9"),
    Mutant(VAE, "sign of the log-variance", "vae.kl_to_standard_normal", "- 1 - logvar", "- 1 + logvar", "2.9"),
    Mutant(VAE, "KL as a mean over units", "vae.kl_to_standard_normal", "sum(-1)", "mean(-1)", "2.9"),
    Mutant(VAE, "the rate without a gradient", "vae.elbo", "normal(mu, logvar)", "normal(mu, logvar).detach()", "2.13"),
    Mutant(VAE, "pixels averaged", "vae.bernoulli_log_prob", "sum(-1)", "mean(-1)", "2.14"),
    Mutant(VAE, "ones and noughts exchanged", "vae.bernoulli_log_prob", "(x * logits", "((1 - x) * logits", "2.14"),
    Mutant(VAE, "beta forgotten", "vae.elbo", "beta * kl", "kl", "2.16"),
    Mutant(VAE, "a sum of weights for their mean", "vae.importance_weighted_bound", "- math.log(k)", "", "2.19"),
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


def needed_by(cell: str) -> set[str]:
    """The names that a cell uses and does not bind itself, at its top level or inside its functions."""
    nodes = list(ast.walk(ast.parse(cell)))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names - bound - {n.arg for n in nodes if isinstance(n, ast.arg)} - defined(cell)


def cells_leading_to(lesson: str, tag: str) -> list[str]:
    """The code cells that verify ``tag`` and, going backwards, the nearest cell that binds each name they need."""
    notebook = nbformat.read(course_dir() / "notebooks" / f"{lesson}.ipynb", as_version=4)
    chosen, needed = [], set()
    for cell in reversed([cell.source for cell in notebook.cells if cell.cell_type == "code"]):
        claims = "verify(" in cell and f'"{tag}"' in cell
        if claims or "begin(" in cell or defined(cell) & needed:
            chosen.insert(0, cell)
            needed = (needed - defined(cell)) | needed_by(cell)
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
def no_figures_and_short_training(monkeypatch):
    monkeypatch.setattr(plots, "present", lambda figure, alt: None)
    monkeypatch.setattr(widgets, "explorer", lambda *args, **ranges: None)
    monkeypatch.setitem(recipes.VAES, ("vae", "quick"), {**recipes.VAES["vae", "quick"], "epochs": 1})


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
