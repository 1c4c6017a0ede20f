"""The classifier of digits: its shapes, what a step teaches it, and what it leaves alone."""

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from aigc_course.classifier import Classifier, ClassifierConfig, ClassifierError, classifier_step
from aigc_course.datasets import Images
from aigc_course.runtime import CourseError, rng_for
from aigc_course.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ClassifierConfig(width=4, features=6)


def digits(n=12, key="digits"):
    """Stripes, a number of them per class, inside a black margin."""
    labels = torch.arange(n) % 4
    images = torch.full((n, 1, 32, 32), -1.0)
    for image, label in zip(images, labels, strict=True):
        image[0, 4:28, 4 : 6 + 6 * int(label) : 2] = 1.0
    noise = 0.05 * torch.rand(n, 1, 32, 32, generator=rng_for("test_classifier", key))
    return Images((images + noise).clamp(-1, 1), labels)


def test_the_shapes_and_the_head_on_the_features():
    model, x = Classifier(TINY, rng_for(0)).eval(), digits(3).images
    features, logits = model.features(x), model(x)
    assert features.shape == (3, 6) and (features >= 0).all() and features.max() > 0
    assert logits.shape == (3, 10) and torch.equal(logits, model.head(features))
    assert Classifier(ClassifierConfig(width=2, n_classes=4), rng_for(0)).eval()(x).shape == (3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(x).dtype == model(x).dtype == torch.float32


def test_weights_come_from_the_generator_given_and_no_other():
    before, rng = torch.get_rng_state(), rng_for("weights")
    first, second, again = Classifier(TINY, rng), Classifier(TINY, rng), Classifier(TINY, rng_for("weights"))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, c), name
        assert a.ndim < 2 or not torch.equal(a, b), name


def test_weights_keep_the_scale_of_what_passes():
    """He et al. 2015 (arXiv:1502.01852), eq. 10: a variance of two over the number of inputs."""
    model = Classifier(ClassifierConfig(width=8), rng_for("scale"))
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            inputs, n = weight[0].numel(), weight.numel()
            assert (weight.std() / (2 / inputs) ** 0.5 - 1).abs() < 4.5 / (2 * n) ** 0.5, name


def test_in_evaluation_an_image_has_one_answer_whatever_its_company():
    model, x = Classifier(TINY, rng_for(0)), digits(6).images
    before = torch.get_rng_state()
    model.eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x[2:3]), model(x)[2:3])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        model.train()
        assert not torch.equal(model(x), model(x))


def test_steps_lower_the_loss_and_say_how_often_the_class_is_right():
    data = digits()
    model = Classifier(ClassifierConfig(width=4, features=16, dropout=0.0), rng_for(1))
    adam, figures = torch.optim.Adam(model.parameters(), lr=1e-2), []
    state = TrainState({"classifier": model}, {"classifier": adam})
    for number in range(25):
        figures.append(classifier_step(state, data, rng_for("step", number)))
    assert set(figures[0]) == {"loss", "accuracy"}
    losses, accuracies = ([f[name].item() for f in figures] for name in ("loss", "accuracy"))
    assert losses[0] > 1.5 and sum(losses[-3:]) / 3 < 0.5 * losses[0]
    assert accuracies[0] < 0.7 and sum(accuracies[-3:]) / 3 > 0.8
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_is_on_the_cross_entropy_of_images_shifted_by_up_to_two_pixels():
    """All 25 shifts occur, no other, and none loses a pixel of the digit to the other side."""

    class Probe(TrainState):
        def minimize(self, name, loss):
            self.loss = loss

    model, data, seen = Classifier(TINY, rng_for(0)).eval(), digits(8), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    probe, shifts = Probe({"classifier": model}, {}), set()
    padded = F.pad(data.images[:, :, 2:30, 2:30], (4, 4, 4, 4), value=-1.0)
    inner = Images(padded[:, :, 2:34, 2:34], data.labels)
    for seed in range(150):
        figures = classifier_step(probe, inner, rng_for("shift", seed))
        found = {
            (i, j) for i in range(5) for j in range(5) if torch.equal(seen[-1], padded[:, :, i:, j:][..., :32, :32])
        }
        assert len(found) == 1
        shifts |= found
    assert len(shifts) == 25
    logits = model(seen[149])
    expected = -logits.log_softmax(1)[torch.arange(8), data.labels].mean()
    torch.testing.assert_close(figures["loss"], expected)
    torch.testing.assert_close(probe.loss, expected)
    assert figures["accuracy"] == (logits.argmax(1) == data.labels).float().mean()
    model.eval()
    assert len({classifier_step(probe, inner, rng_for("again"))["loss"].item() for _ in range(2)}) == 1


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 32, 32), (2, 1024), (1, 32, 32)])
def test_images_of_another_shape_are_refused(monkeypatch, shape):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    model = Classifier(TINY, rng_for(0))
    for call in (model, model.features):
        with pytest.raises(ClassifierError) as error:
            call(torch.zeros(shape))
        message = str(error.value)
        assert isinstance(error.value, CourseError) and "\n" not in message
        assert str(shape) in message and "(n, 1, 32, 32)" in message and "mnist_features" in message
