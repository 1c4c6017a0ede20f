"""GPT-2: the numbers of transformers, a cache that changes none of them, checkpoints both ways, clear errors."""

import json
import math
import time

import jaxtyping
import pytest
import safetensors.torch
import torch
import transformers

from aigc_course.gpt2 import (
    GPT2,
    IGNORE,
    CausalSelfAttention,
    GPT2Config,
    GPT2Error,
    KVCache,
    gelu,
    lm_losses,
    lm_step,
)
from aigc_course.runtime import CourseError, rng_for
from aigc_course.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"vocab_size": 53, "block_size": 20, "n_layer": 2, "n_head": 2, "n_embd": 12, "dropout": 0.1}
SHAPES = {
    "small": SMALL,
    "one head": {**SMALL, "n_head": 1, "n_layer": 1},
    "heads of one number": {**SMALL, "n_head": 6, "n_embd": 6},
    "odd": {"vocab_size": 31, "block_size": 17, "n_layer": 3, "n_head": 5, "n_embd": 35, "dropout": 0.0},
    "eps": {**SMALL, "layer_norm_eps": 1e-2},
    "one token": {"vocab_size": 1, "block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1},
}


def model_of(*key, std: float = 0.4, **config) -> GPT2:
    """A model all of whose parameters, LayerNorms and biases too, are random and strong."""
    model, rng = GPT2(GPT2Config(**{**SMALL, **config}), rng_for(*key)), rng_for(*key, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def ids_of(*key, model: GPT2, shape=(3, 9)) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=rng_for(*key, "ids"))


def twin_of(folder) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def assert_close(left, right, atol):
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


def assert_refused(call, *parts):
    with pytest.raises(GPT2Error) as error:
        call()
    message = str(error.value)
    assert isinstance(error.value, CourseError) and "\n" not in message
    for part in parts:
        assert str(part) in message, message


def padding(b: int, t: int, pads: list[int]) -> torch.Tensor:
    return (torch.arange(t) >= torch.tensor(pads)[:, None]).long()


# ---- the same numbers as transformers ----


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_those_of_transformers(shape, tmp_path):
    model = model_of(shape, **SHAPES[shape])
    twin = twin_of(model.save_pretrained(tmp_path))
    for t in {min(t, model.config.block_size) for t in (1, 2, 9, 20)}:
        ids = ids_of(t, model=model, shape=(2, t))
        expected = twin(ids).logits
        assert_close(model(ids), expected, 1e-4)
        assert model(ids).dtype == torch.float32
        assert expected.std() > 0.1 or shape == "one token"


@torch.no_grad()
def test_padding_and_cache_as_transformers(tmp_path):
    for seed in range(3):
        model = model_of(seed)
        twin = twin_of(model.save_pretrained(tmp_path))
        ids, mask = ids_of(seed, model=model, shape=(4, 12)), padding(4, 12, [0, 1, 4, 7])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        expected = twin(ids, attention_mask=mask, position_ids=positions).logits
        assert_close(model(ids, attention_mask=mask)[mask == 1], expected[mask == 1], 1e-4)
        past = twin(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8]).past_key_values
        cache = KVCache()
        model(ids[:, :8], attention_mask=mask[:, :8], cache=cache)
        for i in range(8, 12):
            seen, where = mask[:, : i + 1], positions[:, i : i + 1]
            expected = twin(ids[:, i : i + 1], attention_mask=seen, position_ids=where, past_key_values=past).logits
            assert_close(model(ids[:, i : i + 1], attention_mask=seen, cache=cache), expected, 1e-4)


def test_gradients_are_those_of_transformers(tmp_path):
    """Also through the tied embedding, and for targets that are padding."""
    model = model_of("gradients", std=0.2, dropout=0.0)
    twin = twin_of(model.save_pretrained(tmp_path))
    batch = ids_of(0, model=model)
    batch[1, 6:] = IGNORE
    (lm_losses(model, batch).sum() / (batch[:, 1:] != IGNORE).sum()).backward()
    twin(batch.clamp_min(0), labels=batch).loss.backward()
    assert_close(model.wte.weight.grad, twin.transformer.wte.weight.grad, 1e-5)
    assert_close(model.wpe.weight.grad, twin.transformer.wpe.weight.grad, 1e-5)
    for ours, theirs in zip(model.blocks, twin.transformer.h, strict=True):
        assert_close(ours.attn.qkv.weight.grad.T, theirs.attn.c_attn.weight.grad, 1e-5)
        assert_close(ours.mlp.proj.bias.grad, theirs.mlp.c_proj.bias.grad, 1e-5)


@torch.no_grad()
def test_the_published_size_once(tmp_path, capsys):
    """All 124 million parameters, random: through a file and both models, one short sequence."""
    begun = time.monotonic()
    model = GPT2(GPT2Config.named("gpt2"), rng_for(0)).eval()
    ids = ids_of(0, model=model, shape=(1, 12))
    ours = model(ids)
    model.save_pretrained(tmp_path)
    del model
    theirs = twin_of(tmp_path)(ids).logits
    assert ours.shape == (1, 12, 50257)
    assert_close(ours, theirs, 1e-4)
    assert_close(GPT2.from_pretrained(tmp_path)(ids), ours, 1e-6)
    with capsys.disabled():
        print(f"  [124M: {time.monotonic() - begun:.1f} s]", end="")


def test_gelu_is_the_form_with_a_tanh():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert_close(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), 1e-12)
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert 1e-5 < (gelu(x) - exact).abs().max() < 1e-3


# ---- sizes, initialisation ----


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("gpt2", (12, 12, 768), 124_439_808),
        ("gpt2-medium", (24, 16, 1024), 354_823_168),
        ("gpt2-large", (36, 20, 1280), 774_030_080),
        ("gpt2-xl", (48, 25, 1600), 1_557_611_200),
    ],
)
def test_the_published_sizes(name, size, parameters):
    config = GPT2Config.named(name)
    assert (config.n_layer, config.n_head, config.n_embd) == size
    model = GPT2(config, None)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_parameters == parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_by_formula(shape):
    model = model_of(0, **SHAPES[shape])
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.n_parameters


def test_initial_weights():
    """std 0.02; 0.01 for positions; 0.02 / sqrt(2 n_layer) where a layer writes into the residual stream."""
    state = torch.get_rng_state()
    config = GPT2Config(vocab_size=500, block_size=300, n_layer=8, n_head=2, n_embd=64)
    model = GPT2(config, rng_for(3))
    assert torch.equal(state, torch.get_rng_state())
    residual = 0.02 / math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            std = 0.01 if name == "wpe.weight" else residual if "proj" in name else 0.02
            error = 4 * std / math.sqrt(parameter.numel())
            assert abs(parameter.std().item() - std) < error and abs(parameter.mean().item()) < error, name
    again, other = GPT2(config, rng_for(3)), GPT2(config, rng_for(4))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not torch.equal(model.wte.weight, other.wte.weight)
    losses = lm_losses(model, ids_of(0, model=model, shape=(4, 50)))
    assert abs(losses.mean().item() - math.log(500)) < 0.1  # it begins knowing nothing


def test_the_output_layer_is_the_embedding():
    model = model_of("tied")
    hidden = model.hidden(ids_of(0, model=model))
    assert_close(model.logits(hidden), hidden @ model.wte.weight.T, 1e-5)
    assert sum(value.shape == (53, 12) for value in model.state_dict().values()) == 1


@pytest.mark.parametrize("change", [{"n_layer": 0}, {"n_head": 5}, {"n_embd": 12.0}, {"vocab_size": -1},
                                    {"block_size": 0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str)  # fmt: skip
def test_configs_that_are_refused(unchecked, change):
    assert_refused(lambda: GPT2Config(**{**SMALL, **change}), *change.values())


def test_a_size_that_is_none_is_refused():
    assert_refused(lambda: GPT2Config.named("gpt3"), "'gpt3'", "gpt2-medium")


# ---- attention, causality, cache ----


@torch.no_grad()
def test_causality():
    """A later token changes nothing before it, and something from it on."""
    model = model_of("causal")
    ids = ids_of(0, model=model)
    for i in range(9):
        changed = ids.clone()
        changed[:, i] = (ids[:, i] + 1) % 53
        before, after = model(ids), model(changed)
        assert torch.equal(before[:, :i], after[:, :i])
        assert ((before - after)[:, i:].abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_attention_weights_by_hand():
    model = model_of("weights")
    attention, x = model.blocks[0].attn, torch.randn(2, 5, 12, generator=rng_for(0))
    weights = attention.weights(x)
    assert_close(weights.sum(-1), torch.ones(2, 2, 5), 1e-5)
    assert not weights.triu(1).any()
    rows = attention.qkv(x)
    by_hand = torch.empty(2, 5, 12)
    for b in range(2):
        for head in range(2):
            q, k, v = (rows[b, :, part * 12 + head * 6 :][:, :6] for part in range(3))
            for i in range(5):
                scores = torch.stack([q[i] @ k[j] / math.sqrt(6) for j in range(i + 1)])
                assert_close(weights[b, head, i, : i + 1], scores.softmax(0), 1e-5)
                by_hand[b, i, head * 6 : head * 6 + 6] = scores.softmax(0) @ v[: i + 1]
    assert_close(attention(x), attention.proj(by_hand), 1e-5)
    assert isinstance(attention, CausalSelfAttention)


@torch.no_grad()
def test_trace_is_what_flows():
    model = model_of("trace", dropout=0.5).train()
    ids = ids_of(0, model=model)
    flow = model.trace(ids)
    model.eval()
    assert list(flow) == ["embedding", "attention 0", "block 0", "attention 1", "block 1", "ln_f", "logits"]
    assert_close(flow["logits"], model(ids), 1e-5)
    assert_close(flow["ln_f"], model.hidden(ids), 1e-5)
    assert_close(flow["embedding"], model.wte(ids) + model.wpe(torch.arange(9)), 1e-6)
    assert_close(flow["block 1"], model.blocks[1](model.blocks[0](flow["embedding"])), 1e-5)
    assert flow["attention 1"].shape == (3, 2, 9, 9)


@pytest.mark.parametrize("parts", [[12], [1] * 12, [5, 7], [5, 1, 1, 3, 2], [11, 1]], ids=str)
@pytest.mark.parametrize("pads", [None, [0, 0, 0], [0, 2, 5], [3, 1, 4]], ids=str)
@torch.no_grad()
def test_the_cache_changes_nothing(parts, pads):
    model = model_of("cache")
    ids = ids_of(1, model=model, shape=(3, 12))
    mask = None if pads is None else padding(3, 12, pads)
    expected, cache, found = model(ids, attention_mask=mask), KVCache(), []
    assert cache.length == 0
    for part in ids.split(parts, dim=1):
        seen = None if mask is None else mask[:, : cache.length + part.shape[1]]
        found.append(model(part, attention_mask=seen, cache=cache))
    assert cache.length == 12
    real = torch.ones_like(ids) if mask is None else mask
    assert_close(torch.cat(found, dim=1)[real == 1], expected[real == 1], 1e-5)


@torch.no_grad()
def test_padding_changes_nothing():
    """Whatever stands under the padding, and however much of it: a row is as alone."""
    model = model_of("padding")
    ids, pads = ids_of(0, model=model), [0, 3, 8]
    mask = padding(3, 9, pads)
    found = model(ids, attention_mask=mask)
    assert found.isfinite().all()
    for row, pad in enumerate(pads):
        assert_close(found[row, pad:], model(ids[row : row + 1, pad:])[0], 1e-5)
    other = ids.where(mask == 1, 7)
    assert_close(model(other, attention_mask=mask)[mask == 1], found[mask == 1], 1e-6)
    wide = torch.cat([torch.zeros(3, 16, dtype=torch.int64), ids], dim=1)  # longer than the context, but for padding
    assert_close(model(wide, attention_mask=padding(3, 25, [16, 19, 24]))[:, 16:][mask == 1], found[mask == 1], 1e-5)


@torch.no_grad()
def test_the_cache_reordered_and_cropped():
    model = model_of("reorder")
    ids, rows = ids_of(0, model=model), torch.tensor([2, 0, 0, 1])
    cache = KVCache()
    model(ids[:, :6], cache=cache)
    cache.reorder(rows)
    assert_close(model(ids[rows, 6:8], cache=cache), model(ids[rows, :8])[:, 6:], 1e-5)
    cache.crop(4)
    assert cache.length == 4
    assert_close(model(ids[rows, 4:], cache=cache), model(ids[rows])[:, 4:], 1e-5)


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: without the checks of shapes that the tests switch on."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_ids_that_are_refused(unchecked):
    model = model_of("ids")
    ids = ids_of(0, model=model)
    assert_refused(lambda: model(ids[:, :0]), "(3, 0)", "at least one token")
    assert_refused(lambda: model(ids - 53), "-", "52", "tokenizer")
    assert_refused(lambda: model(torch.full_like(ids, 53)), "53", "52", "tokenizer")
    assert_refused(lambda: model(ids.repeat(1, 3)), "27", "20")
    assert_refused(lambda: model(ids, attention_mask=torch.ones(3, 8)), "(3, 8)", "(3, 9)")
    cache = KVCache()
    model(ids, cache=cache), model(ids, cache=cache)
    assert_refused(lambda: model(ids[:, :3], cache=cache), "21", "20")
    assert_refused(lambda: model(ids[:, :1], attention_mask=torch.ones(3, 1), cache=cache), "(3, 1)", "(3, 19)")
    assert_refused(lambda: model.trace(ids + 53), "52")


# ---- checkpoints, both ways ----


@pytest.fixture
def saved(tmp_path):
    """A folder that transformers wrote, with its model."""
    torch_state = torch.get_rng_state()
    config = transformers.GPT2Config(vocab_size=53, n_positions=20, n_embd=12, n_layer=2, n_head=2)
    twin = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng_for(parameter.numel())))
    twin.save_pretrained(tmp_path)
    torch.set_rng_state(torch_state)
    return tmp_path, twin


def rewrite(folder, change=None, *, config=None, dtype=None):
    """Change the tensors of a checkpoint, its settings, or the type of its numbers."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    tensors = (change or (lambda t: t))(tensors)
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    if config:
        path = folder / "config.json"
        settings = {**json.loads(path.read_text(encoding="utf-8")), **config}
        settings = {name: value for name, value in settings.items() if value is not ...}
        path.write_text(json.dumps(settings), encoding="utf-8")


def logits_of(folder):
    model = GPT2.from_pretrained(folder)
    assert not model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        return model(torch.arange(10)[None])


def expected_of(twin):
    with torch.no_grad():
        return twin(torch.arange(10)[None]).logits


def test_ours_is_read_as_it_was_written(tmp_path):
    model = model_of("round trip", n_layer=3, layer_norm_eps=1e-6, dropout=0.25)
    assert model.save_pretrained(str(tmp_path / "new" / "folder")) == tmp_path / "new" / "folder"
    again = GPT2.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert list(model.state_dict()) == list(again.state_dict())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_transformers_reads_every_weight_and_setting_of_ours(tmp_path):
    model = model_of("out", dropout=0.25)
    twin, report = transformers.GPT2LMHeadModel.from_pretrained(
        model.save_pretrained(tmp_path), output_loading_info=True
    )
    assert not any(report.values()), report
    config = twin.config
    assert (config.n_positions, config.n_ctx if hasattr(config, "n_ctx") else 20, config.eos_token_id) == (20, 20, 52)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is transformers.GPT2Config


def test_what_transformers_wrote(saved):
    folder, twin = saved
    assert_close(logits_of(folder), expected_of(twin), 1e-5)
    assert GPT2.from_pretrained(str(folder)).config == GPT2Config(**SMALL)


PLAIN = "transformer."
FORMS = {
    "without the prefix": lambda t: {name.removeprefix(PLAIN): tensor for name, tensor in t.items()},
    "with causal masks, as older files": lambda t: {
        **t,
        **{f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(2)},
        **{f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)},
    },
    "as the first hub files": lambda t: {
        **{name.removeprefix(PLAIN): tensor for name, tensor in t.items()},
        **{f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(2)},
    },
    "with the tied output layer": lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_checkpoints(saved, form):
    folder, twin = saved
    rewrite(folder, FORMS[form])
    assert_close(logits_of(folder), expected_of(twin), 1e-5)


def test_the_model_without_its_head(saved, tmp_path_factory):
    _, twin = saved
    folder = tmp_path_factory.mktemp("base")
    twin.transformer.save_pretrained(folder)
    assert_close(logits_of(folder), expected_of(twin), 1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.05), (torch.bfloat16, 0.5)])
def test_half_precision_becomes_float32(saved, dtype, atol):
    folder, twin = saved
    rewrite(folder, dtype=dtype)
    assert_close(logits_of(folder), expected_of(twin), atol)
    weight = twin.transformer.wte.weight.to(dtype).float()
    assert torch.equal(GPT2.from_pretrained(folder).wte.weight, weight)


def test_a_checkpoint_in_shards(saved, tmp_path_factory):
    _, twin = saved
    folder = tmp_path_factory.mktemp("shards")
    twin.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_close(logits_of(folder), expected_of(twin), 1e-5)
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.unlink()
    assert_refused(lambda: GPT2.from_pretrained(folder), "model.safetensors.index.json", first.name)


@pytest.mark.parametrize("names", ["3", "[]", '{"a": 3}', '{"a": ["b"]}', '{"a": "../x"}', "{"])
def test_a_broken_index_of_shards(saved, names):
    folder, _ = saved
    (folder / "model.safetensors").rename(folder.parent / "x")  # there, but outside
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}', encoding="utf-8")
    assert_refused(lambda: GPT2.from_pretrained(folder), "model.safetensors.index.json")


def dropped(name):
    return lambda t: {n: tensor for n, tensor in t.items() if n != name}


WQKV = "transformer.h.1.attn.c_attn.weight"
WRONG_WEIGHTS = {
    "missing": (dropped("transformer.h.1.mlp.c_fc.bias"), ["h.1.mlp.c_fc.bias"]),
    "no embedding": (dropped("transformer.wte.weight"), ["wte.weight"]),
    "extra": (lambda t: {**t, "transformer.h.2.ln_1.weight": torch.ones(12)}, ["1 more", "h.2.ln_1.weight"]),
    "a strange bias": (lambda t: {**t, "transformer.h.1.crossattention.bias": torch.ones(12)}, ["crossattention.bias"]),
    "transposed": (lambda t: {**t, WQKV: t[WQKV].T}, ["(12, 36)", "(36, 12)", "h.1.attn.c_attn.weight"]),
    "too long": (
        lambda t: {**t, "transformer.wpe.weight": torch.ones(21, 12)},
        ["(20, 12)", "(21, 12)", "config.json"],
    ),
    "whole numbers": (lambda t: {**t, WQKV: t[WQKV].to(torch.int8)}, ["int8", "float16"]),
    "float64": (lambda t: {**t, WQKV: t[WQKV].double()}, ["float64"]),
    "not a number": (lambda t: {**t, WQKV: t[WQKV] * math.nan}, ["NaN"]),
    "infinite": (lambda t: {**t, WQKV: t[WQKV] / 0}, ["infinity"]),
    "an output layer of its own": (
        lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1},
        ["tied", "transformers"],
    ),
    "an output layer of another size": (lambda t: {**t, "lm_head.weight": torch.ones(3, 12)}, ["tied"]),
    "empty": (lambda t: {}, ["wte.weight"]),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_are_refused(saved, case):
    folder, _ = saved
    change, parts = WRONG_WEIGHTS[case]
    rewrite(folder, change)
    assert_refused(lambda: GPT2.from_pretrained(folder), folder, *parts)


WRONG_SETTINGS = [
    ({"model_type": "llama"}, "model_type 'gpt2'", "'llama'"),
    ({"model_type": ...}, "model_type"),
    ({"activation_function": "relu"}, "activation_function", "'relu'"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"n_inner": 13}, "n_inner", "13"),
    ({"n_layer": ...}, "n_layer", "None"),
    ({"n_layer": "2"}, "n_layer", "'2'"),
    ({"n_layer": True}, "n_layer", "True"),
    ({"n_layer": -1}, "n_layer", "-1"),
    ({"n_layer": 10**9}, "n_layer"),
    ({"n_embd": None}, "n_embd"),
    ({"n_embd": {}}, "n_embd"),
    ({"n_embd": [12]}, "n_embd"),
    ({"n_embd": 13}, "n_embd"),
    ({"n_head": 5}, "5"),
    ({"vocab_size": 0}, "vocab_size", "0"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
    ({"resid_pdrop": 0.3}, "dropout", "0.3"),
    ({"resid_pdrop": 1.0, "embd_pdrop": 1.0, "attn_pdrop": 1.0}, "dropout"),
    ({"resid_pdrop": "0.1"}, "dropout"),
]


@pytest.mark.parametrize("case", WRONG_SETTINGS, ids=str)
def test_settings_that_are_refused(saved, case):
    folder, _ = saved
    change, *parts = case
    rewrite(folder, config=change)
    assert_refused(lambda: GPT2.from_pretrained(folder), *parts)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "gpt2"', "\x00\xff", "[" * 100_000], ids=repr)
def test_a_broken_config(saved, text):
    folder, _ = saved
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert_refused(lambda: GPT2.from_pretrained(folder), folder / "config.json")


def test_files_that_are_missing_or_damaged(saved):
    folder, _ = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:6], whole[:-5], b"\xff" * 8 + whole[8:], whole[:40] + b"\x00" * 9 + whole[49:]):
        weights.write_bytes(damaged)
        assert_refused(lambda: GPT2.from_pretrained(folder), weights, "safetensors", "again")
    weights.unlink()
    assert_refused(lambda: GPT2.from_pretrained(folder), weights, "no such file")
    (folder / "config.json").unlink()
    assert_refused(lambda: GPT2.from_pretrained(folder), folder / "config.json")


class Bomb:
    """What a pickle can do when it is read."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was read')",)


def test_a_pickle_is_refused_unread(saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit):
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert_refused(lambda: GPT2.from_pretrained(folder), "pytorch_model.bin", "not opened", "safetensors")


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "someone/some-model"])
def test_a_name_on_the_hub_without_a_network(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    repository = name if "/" in name else f"openai-community/{name}"
    assert_refused(lambda: GPT2.from_pretrained(name), f"'{name}'", repository, "online", "local copy")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("path", ["./none", "/none/here", "~/none", "a/b/c", "../none"])
def test_a_path_that_does_not_exist(path):
    assert_refused(lambda: GPT2.from_pretrained(path), "none" if "none" in path else "a/b/c", "folder")


def test_nothing_is_written_of_a_spoilt_model(tmp_path):
    model = model_of("spoilt")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.wpe.weight[3, 3] = math.inf
    assert_refused(lambda: model.save_pretrained(tmp_path), "wpe.weight", "infinity")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


# ---- objective, step ----


def state_of(model: GPT2, lr: float = 3e-3) -> TrainState:
    return TrainState({"gpt2": model}, {"gpt2": torch.optim.AdamW(model.parameters(), lr=lr)})


@torch.no_grad()
def test_losses_by_hand():
    model = model_of("losses")
    batch = ids_of(0, model=model, shape=(2, 7))
    batch[1, 4:] = IGNORE
    losses = lm_losses(model, batch)
    assert losses.shape == (2, 6)
    for row in range(2):
        for i in range(6):
            if batch[row, i + 1] == IGNORE:
                assert losses[row, i] == 0
            else:
                probs = model(batch[row : row + 1, : i + 1])[0, -1].softmax(-1)  # sees i + 1 tokens, predicts the next
                assert_close(losses[row, i], -probs[batch[row, i + 1]].log(), 1e-4)


def test_padding_does_not_teach():
    """More padding on the right, or other rows of it: the same loss and the same update."""
    batch = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, IGNORE, IGNORE]])
    wider = torch.cat([batch, torch.full((2, 6), IGNORE)], dim=1)
    found = []
    for rows in (batch, wider):
        model = model_of("padding", std=0.2, dropout=0.0).train()
        state = state_of(model)
        state.prepare(torch.device("cpu"), None, {})
        loss = lm_step(state, rows, rng_for(0))["loss"]
        found.append((loss, model))
    (loss, model), (loss_of_wider, wide) = found
    losses = lm_losses(model_of("padding", std=0.2), batch)
    assert_close(loss, losses.sum().detach() / 6, 1e-5)  # a mean over the six real targets, not over eight
    assert_close(loss_of_wider, loss, 1e-5)
    for left, right in zip(model.parameters(), wide.parameters(), strict=True):
        assert_close(left, right, 1e-3)


def test_a_short_sequence_is_learned():
    """Each token after the first is certain, where the inputs tell them apart."""
    model = GPT2(GPT2Config(**{**SMALL, "n_embd": 32, "dropout": 0.0}), rng_for(0)).train()
    batch = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8], [2, 7, 18, 28, IGNORE, IGNORE, IGNORE, IGNORE]])
    state = state_of(model, lr=1e-2)
    state.prepare(torch.device("cpu"), 1.0, {})
    losses = [lm_step(state, batch, rng_for(0, i))["loss"].item() for i in range(60)]
    assert abs(losses[0] - math.log(53)) < 0.3 and losses[-1] < 0.05
    with torch.no_grad():
        assert torch.equal(model.eval()(batch[:1, :-1]).argmax(-1), batch[:1, 1:])


def test_dropout_is_for_training_only():
    model = model_of("dropout", dropout=0.5)
    ids = ids_of(0, model=model)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))
        attention, x = model.blocks[0].attn, torch.randn(2, 5, 12, generator=rng_for(0))
        assert not torch.equal(attention(x), attention(x))


def test_logits_are_float32_whatever_the_weights():
    model = model_of("bf16", std=0.1)
    ids = ids_of(0, model=model)
    with torch.no_grad():
        expected, found = model(ids), model.bfloat16()(ids)
    assert found.dtype == torch.float32
    assert_close(found, expected, 0.05)
