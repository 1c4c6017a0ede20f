"""The ledger must bite: a classic mistake patched into the package turns a named claim of the lesson red.

A mutant is one line of the package rewritten. The cells that lead to the claim, found by the names they define and
use, run in this process with the mutated function in place; the claim must be red, and green without the mutation.
"""

import ast
import contextlib
import importlib
import inspect
import sys
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
    target: str  # module.function, module.Class or module.Class.method, where it is defined
    old: str
    new: str
    tag: str

    def __str__(self):
        return f"{self.lesson[:2]}: {self.what}"


GMM, VAE = "01_gaussian_mixtures", "02_variational_autoencoder"
GAN, DCGAN = "03_the_gan_objective", "04_dcgan_on_mnist"
GPT, GPT2 = "05_transformer_from_scratch", "06_gpt2_text_generation"
MUTANTS = [
    Mutant(GMM, "log-determinant with the wrong sign", "gmm.gaussian_log_prob", "- log_det", "+ log_det", "1.5"),
    Mutant(GMM, "the constant without its d", "gmm.gaussian_log_prob", "x.shape[1] * math.log", "math.log", "1.5"),
    Mutant(GMM, "no weights in Bayes' rule", "gmm.e_step", "weights.log() + ", "", "1.5"),
    Mutant(
        GMM, "softmax over the samples", "gmm._softmax_and_logsumexp", "terms / total", "terms / terms.sum(0)", "1.6"
    ),
    Mutant(
        GMM,
        "naive logarithm of a sum",
        "gmm._softmax_and_logsumexp",
        "(top + total.log())[:, 0]",
        "x.exp().sum(1).log()",
        "1.7",
    ),
    Mutant(
        GMM,
        "posterior sharpened",
        "gmm.e_step",
        "return responsibilities,",
        "return (2 * log_joint).softmax(1),",
        "1.11",
    ),
    Mutant(
        GMM, "weights never learnt", "gmm.m_step", "counts / len(x)", "torch.ones_like(counts) / len(counts)", "1.12"
    ),
    Mutant(GMM, "means over all samples", "gmm.m_step", "@ x / counts[:, None]", "@ x / len(x)", "1.13"),
    Mutant(
        GMM, "second moments about zero", "gmm._scatter", "contiguous() - means[:, :, None]", "contiguous()", "1.14"
    ),
    Mutant(GMM, "responsibilities squared", "gmm._scatter", ".T.sqrt()", ".T", "1.14"),
    Mutant(GMM, "a floor nobody asked for", "gmm.m_step", "add_(reg_covar)", "add_(reg_covar + 0.1)", "1.14"),
    Mutant(
        GMM,
        "bound that cannot touch",
        "gmm.e_step",
        "return responsibilities,",
        "return (0.5 * log_joint).softmax(1),",
        "1.15",
    ),
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
        DCGAN,
        "the cross term once",
        "metrics.features.frechet_distance_gaussians",
        "- 2 * root_trace",
        "- root_trace",
        "4.7",
    ),
    Mutant(
        DCGAN,
        "means compared, not squared",
        "metrics.features.frechet_distance_gaussians",
        "(mean_a - mean_b).square()",
        "(mean_a - mean_b).abs()",
        "4.7",
    ),
    Mutant(
        DCGAN,
        "rows paired with themselves",
        "metrics.features.kernel_distance",
        "(_kernel_sum(a, a) - _kernel_trace(a)) / (n * (n - 1))",
        "_kernel_sum(a, a) / n**2",
        "4.8",
    ),
    Mutant(
        DCGAN,
        "the cross term once",
        "metrics.features.kernel_distance",
        "- 2 * _kernel_sum(a, b)",
        "- _kernel_sum(a, b)",
        "4.8",
    ),
    Mutant(DCGAN, "n and m exchanged", "metrics.features.kernel_distance", "(m * (m - 1))", "(n * (n - 1))", "4.8"),
    Mutant(DCGAN, "a kernel of degree two", "metrics.features.polynomial_kernel", "** 3", "** 2", "4.8"),
    Mutant(GPT, "mean of the perplexities", "metrics.text.perplexity", ".mean().exp()", ".exp().mean()", "5.2"),
    Mutant(
        GPT,
        "nats sold as bits",
        "metrics.text.bits_per_character",
        "(math.log(2) * n_characters)",
        "n_characters",
        "5.3",
    ),
    Mutant(GPT, "a space in front", "tokenizer._backend", "add_prefix_space=False", "add_prefix_space=True", "5.5"),
    Mutant(
        GPT,
        "no causal mask",
        "gpt2.model.CausalSelfAttention",
        "is_causal=mask is None and x.shape[1] > 1",
        "is_causal=False",
        "5.6",
    ),
    Mutant(GPT, "mask off by one", "gpt2.model.CausalSelfAttention", ".triu(1)", ".triu(2)", "5.10"),
    Mutant(GPT, "no scaling", "gpt2.model.CausalSelfAttention", "dropout_p=", "scale=1.0, dropout_p=", "5.10"),
    Mutant(GPT, "softmax over the queries", "gpt2.model.CausalSelfAttention", ".softmax(-1)", ".softmax(-2)", "5.10"),
    Mutant(
        GPT,
        "heads interleaved",
        "gpt2.model.CausalSelfAttention",
        "view(b, t, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)",
        "view(b, t, 3, d // self.n_head, self.n_head).permute(2, 0, 4, 1, 3)",
        "5.10",
    ),
    Mutant(
        GPT,
        "a large epsilon",
        "gpt2.model.Block",
        "self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)",
        "self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-3)",
        "5.12",
    ),
    Mutant(GPT, "a digit lost in the GELU", "gpt2.model.gelu", "0.044715", "0.44715", "5.13"),
    Mutant(GPT, "the exact GELU", "gpt2.model.MLP", 'approximate="tanh"', 'approximate="none"', "5.13"),
    Mutant(GPT, "residual path dropped", "gpt2.model.Block", "return x + self.drop", "return self.drop", "5.14"),
    Mutant(
        GPT,
        "layer norm after the sum",
        "gpt2.model.Block",
        "return x + self.drop(self.mlp(self.ln_2(x)))",
        "return self.ln_2(x + self.drop(self.mlp(x)))",
        "5.15",
    ),
    Mutant(
        GPT,
        "both parts read the same input",
        "gpt2.model.Block",
        "x = x + self.drop(self.attn(self.ln_1(x), mask, cache, layer))\n        return x",
        "y = x + self.drop(self.attn(self.ln_1(x), mask, cache, layer))\n        return y",
        "5.15",
    ),
    Mutant(
        GPT,
        "no positions",
        "gpt2.model.GPT2",
        "self.drop(self.wte(ids) + self.wpe(positions))",
        "self.drop(self.wte(ids))",
        "5.16",
    ),
    Mutant(GPT, "the last norm forgotten", "gpt2.model.GPT2", "return self.ln_f(x)", "return x", "5.16"),
    Mutant(
        GPT,
        "a look ahead",
        "gpt2.model.CausalSelfAttention",
        "is_causal=mask is None and x.shape[1] > 1",
        "is_causal=False",
        "5.17",
    ),
    Mutant(
        GPT,
        "weights not tied in the gradient",
        "gpt2.model.GPT2.logits",
        "linear.linear(hidden, self.wte.weight)",
        "linear.linear(hidden, self.wte.weight.detach())",
        "5.19",
    ),
    Mutant(
        GPT,
        "labels not shifted",
        "gpt2.model.lm_losses",
        "batch[:, :-1].clamp_min(0), batch[:, 1:]",
        "batch[:, :-1].clamp_min(0), batch[:, :-1]",
        "5.21",
    ),
    Mutant(
        GPT,
        "padding counted as tokens",
        "gpt2.model.lm_step",
        "(batch[:, 1:] != IGNORE).sum().float()",
        "torch.tensor(float(batch[:, 1:].numel()))",
        "5.21",
    ),
    Mutant(
        GPT,
        "a mean of the rows' means",
        "gpt2.model.lm_step",
        'lm_losses(state.nets["gpt2"], batch).sum() / n',
        '(lm_losses(state.nets["gpt2"], batch).sum(1) / (batch[:, 1:] != IGNORE).sum(1)).mean()',
        "5.21",
    ),
    Mutant(
        GPT2,
        "an output layer of its own",
        "gpt2.model.GPT2",
        "linear.linear(hidden, self.wte.weight)",
        "linear.linear(hidden, self.wte.weight.flip(0))",
        "6.1",
    ),
    Mutant(GPT2, "GELU's constant misplaced", "gpt2.model.gelu", "0.044715", "0.44715", "6.2"),
    Mutant(
        GPT2,
        "positions start again at zero",
        "gpt2.model.GPT2",
        "torch.arange(past, past + t, device=ids.device)\n        else",
        "torch.arange(t, device=ids.device)\n        else",
        "6.3",
    ),
    Mutant(
        GPT2,
        "positions counted with the padding",
        "gpt2.model.GPT2",
        "(attention_mask.long().cumsum(1) - 1)",
        "(torch.ones_like(attention_mask).cumsum(1) - 1)",
        "6.3",
    ),
    Mutant(
        GPT2,
        "padding attended to",
        "gpt2.model.GPT2",
        "(mask & attention_mask.bool()[:, None, None, :])",
        "(mask & torch.ones_like(attention_mask).bool()[:, None, None, :])",
        "6.3",
    ),
    Mutant(
        GPT2,
        "the cache puts new values first",
        "gpt2.model.KVCache.append",
        "rooms[1][:, :, past:length] = k, v",
        "rooms[1][:, :, :length] = k, torch.cat([v, rooms[1][:, :, :past]], dim=2)",
        "6.3",
    ),
    Mutant(
        GPT2,
        "an MLP twice as wide as it costs",
        "gpt2.model.MLP",
        "4 * config.n_embd)\n        self.proj = Linear(4 *",
        "8 * config.n_embd)\n        self.proj = Linear(8 *",
        "6.4",
    ),
    Mutant(
        GPT2,
        "temperature multiplied",
        "generate.decoding.filter_logits",
        "logits / temperature",
        "logits * temperature",
        "6.5",
    ),
    Mutant(GPT2, "top-k drops the k-th", "generate.decoding.filter_logits", "logits < kth", "logits <= kth", "6.7"),
    Mutant(
        GPT2,
        "top-p stops short of p",
        "generate.decoding.filter_logits",
        "probs.cumsum(-1) - probs >= top_p",
        "probs.cumsum(-1) >= top_p",
        "6.8",
    ),
    Mutant(
        GPT2,
        "min-p taken as absolute",
        "generate.decoding.filter_logits",
        "min_p * probs.amax(-1, keepdim=True)",
        "min_p",
        "6.7",
    ),
    Mutant(
        GPT2,
        "min-p before the temperature",
        "generate.decoding.filter_logits",
        "probs = logits.softmax(-1)\n        logits = logits.masked_fill(probs < min_p",
        "probs = (logits * temperature).softmax(-1)\n        logits = logits.masked_fill(probs < min_p",
        "6.9",
    ),
    Mutant(
        GPT2,
        "a negative logit divided too",
        "generate.decoding.penalize_repetition",
        "logits * penalty)",
        "logits / penalty)",
        "6.10",
    ),
    Mutant(
        GPT2,
        "drawn from squared probabilities",
        "generate.decoding.next_token",
        "torch.multinomial(probs.to",
        "torch.multinomial(probs.square().to",
        "6.11",
    ),
    Mutant(
        GPT2,
        "beams forget their past score",
        "generate.decoding.beam_search",
        "(scores.view(-1, 1) + log_probs)",
        "log_probs",
        "6.12",
    ),
    Mutant(
        GPT2,
        "length penalty the wrong way round",
        "generate.decoding.beam_search",
        "(totals / n**length_penalty)",
        "(totals * n**length_penalty)",
        "6.12",
    ),
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
    home, _, name = mutant.target.rpartition(".")
    try:
        module = owner = importlib.import_module(f"aigc_course.{home}")
    except ModuleNotFoundError:  # a method
        module = importlib.import_module(f"aigc_course.{home.rpartition('.')[0]}")
        owner = getattr(module, home.rpartition(".")[2])
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutant.old) == 1, f"{mutant.target} has {source.count(mutant.old)} times: {mutant.old}"
    holders = [owner]
    if owner is module:  # and who imported it
        loaded = [module for key, module in list(sys.modules.items()) if key.startswith("aigc_course")]
        holders = [module for module in loaded if getattr(module, name, None) is original]
    names = module.__dict__ if owner is module else dict(module.__dict__)
    exec(compile(source.replace(mutant.old, mutant.new), f"mutant of {mutant.target}", "exec"), names)
    mutated = names[name]
    try:
        for holder in holders:
            setattr(holder, name, mutated)
        yield
    finally:
        for holder in holders:
            setattr(holder, name, original)


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
