"""The linear layer gives torch's numbers whichever way it takes, and takes the private one only where that pays."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from aigc_course import linear as module
from aigc_course.linear import Linear, linear, road, taking
from aigc_course.runtime import CourseError, rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit

SHAPES = [(128, 784, 400), (64, 256, 784), (1, 768, 2304), (3, 40, 5000), (700, 96, 33)]


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(module, "_chosen", None)


@pytest.fixture
def onednn():
    if not module._right():
        pytest.skip("this build of torch has no such way")
    with taking("onednn"):
        yield


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int]]:
    """The sizes of the products that oneDNN was asked for."""
    asked, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda x, w, b: asked.append((*x.shape, len(w))) or product(x, w, b))
    return asked


def tensors(rows: int, inputs: int, outputs: int, *leading: int) -> list[torch.Tensor]:
    rng = rng_for("linear", rows, inputs, outputs)
    shapes = (*leading, rows, inputs), (outputs, inputs), (outputs,), (*leading, rows, outputs)
    return [torch.randn(shape, generator=rng).requires_grad_(i < 3) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_torch(onednn, products, shape, leading, bias):
    x, weight, offset, grad = tensors(*shape, *leading)
    inputs = [x, weight, offset][: 2 + bias]
    ours = linear(*inputs)
    assert products, "these are large enough"
    plain = F.linear(*inputs)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * math.sqrt(shape[1]))
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_gradients_of_gradients_are_those_of_torch(onednn):
    """A penalty on the norm of a gradient, as GANs pay it."""
    x, weight, offset, _ = tensors(130, 300, 200)

    def penalty(layer) -> list[torch.Tensor]:
        (slope,) = torch.autograd.grad(layer(x, weight, offset).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), (x, weight, offset)))

    for a, b in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_gradient_that_nobody_asks_for_is_not_computed(onednn, products):
    """The generator's update passes through the discriminator's layers and leaves their weights alone."""
    x, ours, theirs, last = tensors(128, 300, 200)[0], Linear(300, 250), Linear(250, 300), Linear(300, 300)
    loss = last(theirs(ours(x))).square().mean()
    products.clear()
    loss.backward(inputs=list(ours.parameters()))
    assert theirs.weight.grad is None and ours.weight.grad is not None and x.grad is None
    assert products == [(128, 300, 300), (128, 300, 250), (250, 128, 300)]


def test_batches_of_all_sizes_have_few_shapes(onednn, products):
    """oneDNN keeps a program for each: gigabytes, where every batch had another number of rows."""
    weight = torch.ones(200, 100, requires_grad=True)
    for n in range(27, 1025):
        y = linear(torch.ones(n, 100), weight)
        assert y.shape == (n, 200)
        y.sum().backward()
        assert weight.grad[0, 0] == n
        weight.grad = None
        rows = products[0][0]
        assert n <= rows <= n * 9 / 8
        products.clear()
        if n > 64:
            assert rows % 8 == 0 and rows // (rows & -rows) < 16  # at most four digits in base 2, and zeros


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_way_is_found_out_in_any_mode_of_autograd(monkeypatch, context):
    monkeypatch.setattr(module, "_faster", lambda: True)
    with context():
        assert road() == ("onednn" if module._right() else "torch")


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("wish", [None, "auto", "torch", "onednn"])
def test_onednn_must_be_right_and_unless_forced_faster(monkeypatch, right, faster, wish):
    monkeypatch.setattr(module, "_right", lambda: right)
    monkeypatch.setattr(module, "_faster", lambda: faster)
    monkeypatch.delenv("AIGC_LINEAR", raising=False)
    if wish is not None:
        monkeypatch.setenv("AIGC_LINEAR", wish)
    assert road() == ("onednn" if right and (faster or wish == "onednn") and wish != "torch" else "torch")


def wrong(x, weight, bias):
    return F.linear(x, weight, bias) * 1.01


def missing(x, weight, bias):
    return torch.ops.mkldnn._no_such_operator(x, weight, bias)


@pytest.mark.parametrize("product", [wrong, missing])
def test_a_wrong_or_missing_operator_is_not_used(monkeypatch, product):
    monkeypatch.setattr(module, "_product", product)
    monkeypatch.setenv("AIGC_LINEAR", "onednn")
    assert road() == "torch"
    x, weight, bias, _ = tensors(128, 300, 200)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(CourseError, match="no way 'onednn'"), taking("onednn"):
        pass


def test_an_unknown_wish_is_told(monkeypatch):
    monkeypatch.setenv("AIGC_LINEAR", "mkl")
    with pytest.raises(CourseError, match="AIGC_LINEAR is 'mkl': choose"):
        road()


def test_what_does_not_fit_goes_the_public_way(onednn, products):
    x, weight, bias, _ = tensors(128, 300, 200)
    cases = {
        "float64": (x.double(), weight.double(), bias.double()),
        "one vector": (x[0], weight, bias),
        "a small product": (x[:2, :5], weight[:, :5], bias),
    }
    for name, inputs in cases.items():
        assert torch.equal(linear(*inputs), F.linear(*inputs)), name
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counted:
        linear(x, weight, bias)
    assert counted.get_total_flops() == 2 * 128 * 300 * 200
    slopes = torch.func.grad(lambda w: linear(x, w, bias).square().sum())(weight)
    assert slopes.shape == weight.shape
    assert not products


def test_overlapping_rows_and_transposed_weights(onednn, products):
    """What a view repeats or turns round is multiplied as if it were a tensor of its own."""
    x, weight, bias, grad = tensors(128, 300, 200)
    rows, turned = x[:1].expand(128, 300), weight.detach().t().contiguous().t().requires_grad_()
    ours, plain = linear(rows, turned, bias), F.linear(rows, turned, bias)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-3)
    inputs = (x, turned, bias)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    wide = weight.detach()[:1].expand(200, 300)
    torch.testing.assert_close(linear(x, wide, bias), F.linear(x, wide, bias), rtol=1e-5, atol=1e-3)
    assert products


def test_one_row_in_bfloat16_is_the_same_product():
    x, weight, bias, _ = (t.detach().bfloat16() for t in tensors(1, 768, 2304))
    with torch.no_grad():
        ours, exact = linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    assert ours.shape == (1, 2304) and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=0.3)


def test_training_goes_either_way_to_the_same_weights(onednn):
    """Twenty steps of fit end within rounding of each other, and a finished run tells that the way has changed."""

    def trained(name: str, out=None) -> torch.Tensor:
        with taking(name):
            net = nn.Sequential(Linear(300, 200), nn.Tanh(), Linear(200, 300))
            rng = rng_for("weights")
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=0.05, generator=rng)
            state = TrainState({"net": net}, {"net": torch.optim.SGD(net.parameters(), lr=0.1)})

            def step(state, batch, rng):
                loss = (net(batch) - batch).square().mean()
                state.minimize("net", loss)
                return {"loss": loss}

            data = torch.randn(400, 300, generator=rng_for("data"))
            fit(step, state, data, TrainConfig(steps=20, batch_size=100, device="cpu"), out=out)
        return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    torch.testing.assert_close(trained("onednn"), trained("torch"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("began", ["onednn", "torch"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_run_goes_on_the_way_that_it_began(onednn, monkeypatch, tmp_path, capsys, began, forced):
    """Whatever the clock says the second time, unless the reader says otherwise, which is told."""
    taken, other = [], {"onednn": "torch", "torch": "onednn"}[began]

    def run(name: str, steps: int) -> None:
        net = nn.Linear(2, 2)
        state = TrainState({"net": net}, {"net": torch.optim.SGD(net.parameters(), lr=0.1)})

        def step(state, batch, rng):
            taken.append(road())
            state.minimize("net", net(batch).square().mean())
            return {}

        with taking(name):
            fit(step, state, torch.ones(8, 2), TrainConfig(steps=steps, batch_size=4, device="cpu"), out=tmp_path)
            assert road() == name

    monkeypatch.delenv("AIGC_LINEAR", raising=False)
    run(began, 1)
    if forced:
        monkeypatch.setenv("AIGC_LINEAR", other)
    run(other, 2)
    assert taken == [began, other if forced else began]
    assert (f"linear changed from {began} to {other}" in capsys.readouterr().out) == forced
