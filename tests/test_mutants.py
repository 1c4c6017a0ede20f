"""The ledger must bite: a classic mistake patched into the package turns a named claim of the lesson red.

A mutant is one line of the package rewritten. The cells that lead to the claim, found by the names they define and
use, run in this process with the mutated function in place; the claim must be red, and green without the mutation.
"""

import ast
import contextlib
import importlib
import inspect
import textwrap
from dataclasses import dataclass, replace

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
GAN, DCGAN = "03_the_gan_objective", "04_dcgan_on_mnist"
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
    Mutant(GAN, "the fakes forgotten", "gan.discriminator_loss", " + F.softplus(fake_logits).mean()", "", "3.1"),
    Mutant(
        GAN,
        "real and fake exchanged",
        "gan.discriminator_loss",
        "F.softplus(-real_logits).mean() + F.softplus(fake_logits)",
        "F.softplus(real_logits).mean() + F.softplus(-fake_logits)",
        "3.2",
    ),
    Mutant(
        GAN,
        "half of the loss",
        "gan.discriminator_loss",
        "return F.softplus(-real_logits)",
        "return 0.5 * F.softplus(-real_logits)",
        "3.2",
    ),
    Mutant(
        GAN,
        "a sum over the batch",
        "gan.generator_loss",
        "-F.softplus(fake_logits).mean()",
        "-F.softplus(fake_logits).sum()",
        "3.3",
    ),
    Mutant(
        GAN,
        "the generator helps D",
        "gan.generator_loss",
        "return -F.softplus(fake_logits)",
        "return F.softplus(fake_logits)",
        "3.4",
    ),
    Mutant(
        GAN,
        "both kinds the same",
        "gan.generator_loss",
        "F.softplus(-fake_logits).mean()",
        "-F.softplus(fake_logits).mean()",
        "3.4",
    ),
    Mutant(
        GAN,
        "logarithm of a sigmoid",
        "gan.generator_loss",
        "F.softplus(-fake_logits).mean()",
        "-fake_logits.sigmoid().log().mean()",
        "3.5",
    ),
    Mutant(
        GAN,
        "logit taken for the probability",
        "gan.generator_loss",
        "F.softplus(-fake_logits)",
        "F.softplus(-fake_logits.sigmoid())",
        "3.6",
    ),
    Mutant(GAN, "gradient pulled to 0", "gan.gradient_penalty", "between) - 1).square()", "between)).square()", "3.10"),
    Mutant(GAN, "squared norm", "gan.gradient_norms", ".norm(dim=1)", ".square().sum(1)", "3.10"),
    Mutant(GAN, "spectral norm forgotten", "gan.Discriminator", "spectral_norm(layer)", "pass", "3.11"),
    Mutant(
        GAN,
        "both maximise the score",
        "gan.generator_loss",
        "return -fake_logits.mean()",
        "return fake_logits.mean()",
        "3.13",
    ),
    Mutant(
        GAN,
        "critic's sign",
        "gan.discriminator_loss",
        "fake_logits.mean() - real_logits.mean()",
        "real_logits.mean() - fake_logits.mean()",
        "3.13",
    ),
    Mutant(
        GAN,
        "G learns from the reals",
        "gan.gan_step",
        "generator_loss(discriminator(fake), kind",
        "generator_loss(discriminator(real + 0 * fake), kind",
        "3.14",
    ),
    Mutant(
        GAN,
        "the generator's sign in the step",
        "gan.gan_step",
        "generator_loss(discriminator(fake), kind",
        "generator_loss(-discriminator(fake), kind",
        "3.14",
    ),
    Mutant(GAN, "R1 without its half", "gan.r1_penalty", "0.5 * ", "", "3.15"),
    Mutant(GAN, "R1 forgotten", "gan.gan_step", "r1_penalty(discriminator, real)", "0", "3.15"),
    Mutant(
        GAN,
        "twice the loss",
        "gan.generator_loss",
        "return F.softplus(-fake_logits)",
        "return 2 * F.softplus(-fake_logits)",
        "3.16",
    ),
    Mutant(
        DCGAN,
        "too much padding",
        "gan.conv_discriminator",
        "2 * width, 4, stride=2, padding=1",
        "2 * width, 4, stride=2, padding=2",
        "4.1",
    ),
    Mutant(
        DCGAN, "doublings from 3 x 3", "gan.conv_generator", "config.z_dim, width, 4", "config.z_dim, width, 3", "4.2"
    ),
    Mutant(
        DCGAN,
        "no padding",
        "gan.conv_generator",
        "width // 2, 4, stride=2, padding=1",
        "width // 2, 4, stride=2, padding=0",
        "4.2",
    ),
    Mutant(
        DCGAN,
        "a bias at the start",
        "gan._initialised",
        "nn.init.zeros_(layer.bias)",
        "nn.init.ones_(layer.bias)",
        "4.3",
    ),
    Mutant(
        DCGAN,
        "kernels of 6",
        "gan.conv_generator",
        "width // 2, 4, stride=2, padding=1",
        "width // 2, 6, stride=2, padding=2",
        "4.4",
    ),
    Mutant(
        DCGAN,
        "kernels of 3",
        "gan.conv_generator",
        "width // 2, 4, stride=2, padding=1",
        "width // 2, 3, stride=2, padding=1",
        "4.4",
    ),
    Mutant(
        DCGAN,
        "the momentum given as eps",
        "gan.conv_discriminator",
        "nn.BatchNorm2d(2 * width)",
        "nn.BatchNorm2d(2 * width, 0.8)",
        "4.5",
    ),
    Mutant(
        DCGAN,
        "each image normalised alone",
        "gan.conv_discriminator",
        "nn.BatchNorm2d(2 * width)",
        "nn.InstanceNorm2d(2 * width, affine=True)",
        "4.5",
    ),
    Mutant(
        DCGAN,
        "real and fake in one batch",
        "gan.gan_step",
        "discriminator(real), discriminator(fake.detach())",
        "discriminator(torch.cat([real, fake.detach()])).chunk(2)",
        "4.6",
    ),
    Mutant(
        DCGAN, "the cross term once", "metrics.frechet_distance_gaussians", "- 2 * root_trace", "- root_trace", "4.7"
    ),
    Mutant(
        DCGAN,
        "means compared, not squared",
        "metrics.frechet_distance_gaussians",
        "(mean_a - mean_b).square()",
        "(mean_a - mean_b).abs()",
        "4.7",
    ),
    Mutant(
        DCGAN,
        "rows paired with themselves",
        "metrics.kernel_distance",
        "(_kernel_sum(a, a) - _kernel_trace(a)) / (n * (n - 1))",
        "_kernel_sum(a, a) / n**2",
        "4.8",
    ),
    Mutant(
        DCGAN, "the cross term once", "metrics.kernel_distance", "- 2 * _kernel_sum(a, b)", "- _kernel_sum(a, b)", "4.8"
    ),
    Mutant(DCGAN, "n and m exchanged", "metrics.kernel_distance", "(m * (m - 1))", "(n * (n - 1))", "4.8"),
    Mutant(DCGAN, "a kernel of degree two", "metrics.polynomial_kernel", "** 3", "** 2", "4.8"),
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
    for name in ("gan", "dcgan"):
        monkeypatch.setitem(recipes.GANS, (name, "quick"), replace(recipes.GANS[name, "quick"], steps=2))


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
