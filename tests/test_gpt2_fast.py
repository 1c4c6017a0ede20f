"""What makes GPT-2 fast changes nothing, or as much as is stated: the cache, the decoder, eight bits."""

import pytest
import torch

from aigc_course import recipes
from aigc_course.generate import generate
from aigc_course.gpt2 import GPT2, Decoder, GPT2Config, GPT2Error, Int8GPT2, Int8Linear, KVCache, lm_losses
from aigc_course.recipes.language import texts, token_rows
from aigc_course.runtime import rng_for

CONFIG = GPT2Config(vocab_size=97, block_size=300, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def model() -> GPT2:
    model = GPT2(CONFIG, rng_for("fast"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=rng_for("ids", *shape))


# ---- the cache ----


def test_a_cache_holds_what_was_appended_across_its_rooms():
    """Also after its room is used up, in other pieces, and after a part has been forgotten and written anew."""
    cache, keys = KVCache(), torch.randn(2, 3, 2 * KVCache.ROOM + 40, 5, generator=rng_for("keys"))
    start = 0
    for size in (7, 1, 1, KVCache.ROOM, 1, 30, KVCache.ROOM, 3):
        new = keys[:, :, start : start + size]
        for layer in range(2):
            k, v = cache.append(layer, new + layer, -new)
            start_to_end = keys[:, :, : start + size]
            assert torch.equal(k, start_to_end + layer) and torch.equal(v, -start_to_end)
        start += size
        assert cache.length == start
        if start > 100:
            cache.crop(start - 2)
            start -= 2
            assert cache.length == start
    cache.reorder(torch.tensor([1, 1, 0]))
    k, v = cache.append(0, keys[[0, 0, 0], :, :1], keys[[0, 0, 0], :, :1])
    assert torch.equal(k[:, :, :-1], keys[[1, 1, 0], :, :start]) and k.shape[2] == start + 1


def test_what_a_cache_gave_is_not_overwritten_later():
    cache, x = KVCache(), torch.randn(1, 2, 10, 4, generator=rng_for("x"))
    k, _ = cache.append(0, x, x)
    kept = k.clone()
    for i in range(200):
        cache.append(0, x[:, :, :1] + i, x[:, :, :1])
    assert torch.equal(k, kept)


def test_a_cache_goes_from_one_mode_of_autograd_to_another(model):
    ids = ids_of(1, 6)
    whole = model(ids).detach()
    for first, second in [(torch.inference_mode, torch.no_grad), (torch.enable_grad, torch.no_grad)]:
        cache = KVCache()
        with first():
            model(ids[:, :4], cache=cache)
        with second():
            logits = [model(ids[:, column : column + 1], cache=cache) for column in (4, 5)]
        torch.testing.assert_close(torch.cat(logits, 1), whole[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(GPT2Error, match="length is -1"):
        cache.crop(-1)


def test_gradients_pass_through_a_cache(model):
    ids = ids_of(2, 12)
    cache = KVCache()
    pieces = torch.cat([model(part, cache=cache) for part in ids.split(5, dim=1)], dim=1)
    whole = model(ids)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    weight = model.blocks[0].attn.qkv.weight
    a, b = (torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (pieces, whole))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


# ---- the decoder ----


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_the_decoder_gives_what_the_model_gives(model, kind, rows):
    net = {"fp32": lambda: model, "bf16": model.bfloat16, "int8": lambda: Int8GPT2(model)}[kind]()
    ids, caches = ids_of(rows, 40), (KVCache(), KVCache())
    for cache in caches:
        net.hidden(ids[:, :9], cache=cache)
    decoder = Decoder(net)
    for column in range(9, 40):
        whole = net.hidden(ids[:, column : column + 1], cache=caches[0])[:, 0]
        assert torch.equal(decoder.hidden(ids[:, column], caches[1]), whole)


def test_what_is_hooked_into_a_model_is_heard_at_every_token(model):
    """People watch and steer a model by hooks; with any, or with parts of its own, a model reads by its modules."""
    ids, heard = ids_of(1, 5), []
    assert Decoder.plain(model)
    hook = model.blocks[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    generate(model, ids, max_new_tokens=4, temperature=0)
    assert len(heard) == 4 and not Decoder.plain(model)
    hook.remove()

    class Muted(type(model.blocks[0].mlp)):
        def forward(self, x):
            return 0 * x

    model.blocks[0].mlp = Muted(CONFIG)
    assert not Decoder.plain(model)
    assert generate(model, ids, max_new_tokens=4, temperature=0).shape == (1, 9)


@torch.inference_mode()
def test_attention_over_a_cache_in_bfloat16_is_close_to_that_in_float32(model):
    ids = ids_of(2, 60)
    exact, cache = model(ids), KVCache()
    net = model.bfloat16()
    logits = torch.cat([net(part, cache=cache) for part in ids.split([20, *[1] * 40], dim=1)], dim=1)
    assert (logits - exact).norm() < 0.05 * exact.norm()


# ---- eight bits ----


def test_products_of_whole_numbers_are_exact():
    """Where weights and inputs are whole numbers times a scale, and reach 127, nothing is lost."""
    rng = rng_for("whole")
    weight = torch.randint(-127, 128, (50, 30), generator=rng).float()
    x = torch.randint(-127, 128, (4, 6, 30), generator=rng).float()
    weight[:, 0], x[..., 0] = 127, -127
    bias = torch.randn(50, generator=rng)
    layer = Int8Linear(weight * 0.25, bias)
    torch.testing.assert_close(
        layer(x * 2), torch.nn.functional.linear(x * 2, weight * 0.25, bias), rtol=1e-6, atol=1e-3
    )
    assert layer.weight.dtype == torch.int8 and layer.weight.untyped_storage().nbytes() == 50 * 30
    assert torch.equal(layer(torch.zeros(1, 30)), bias[None]), "a row of zeros has no scale"


def test_rounding_is_by_half_a_scale_of_each_row():
    weight, x = torch.randn(40, 64, generator=rng_for("w")), torch.randn(5, 64, generator=rng_for("x"))
    weight[3] *= 1000
    layer = Int8Linear(weight, None)
    kept = layer.weight.t() * layer.scale[:, None]
    assert ((kept - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()
    error = (layer(x) - x @ weight.T).abs() / (x.norm(dim=1)[:, None] * weight.norm(dim=1))
    assert error.max() < 0.01


@pytest.mark.parametrize("name", ["tang", "shakespeare"])
@torch.no_grad()
def test_the_perplexity_of_a_trained_model_is_within_a_percent(name):
    """On texts that it has not learnt from."""
    model, tokenizer = recipes.load_pretrained(name, device="cpu")
    rows = [
        torch.tensor([row[: model.config.block_size + 1]]) for row in token_rows(tokenizer, texts(name, "test"))[:60]
    ]

    def perplexity(net: GPT2) -> float:
        return torch.cat([lm_losses(net, row).flatten() for row in rows]).mean().exp().item()

    plain, eight = perplexity(model), perplexity(Int8GPT2(model))
    print(f"{name}: perplexity {plain:.3f}, in int8 {eight:.3f}")
    assert abs(eight / plain - 1) < 0.01


def test_int8_leaves_its_model_alone_and_is_not_saved(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    eight = Int8GPT2(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(GPT2Error, match="save the model that they were made from"):
        eight.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
