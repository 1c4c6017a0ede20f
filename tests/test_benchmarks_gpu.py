"""The comparison for GPUs, run on the CPU at tiny sizes: that it runs, and that both sides do as much work."""

import pytest

from aigc_course.gpt2 import GPT2Config
from benchmarks import gpu

TINY = GPT2Config(vocab_size=500, block_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def lively_enough(monkeypatch):
    """A model this small repeats itself sooner than the comparison of the CPU rows allows."""
    monkeypatch.setattr(gpu.language, "in_bf16", lambda config: gpu.language.lively(config).bfloat16())


def test_training_steps_on_either_side():
    pair = gpu.dcgan_pair("cpu", steps=2)
    assert pair.ours().step_count == 2 and len(pair.theirs()) == 2 and pair.units == 128


def test_writing_on_either_side(lively_enough):
    pair = gpu.writing_pair("cpu", TINY, batch=2, new=5)
    pair.check(pair.ours(), pair.theirs())
    assert pair.ours().shape == (2, 37) and pair.units == 10


def test_share_of_the_matrix_rate():
    found = gpu.share_of_the_matrix_rate("cpu", TINY, batch=2, steps=2)
    assert 0 < found["share"] < 1 and found["tokens per second"] > 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.sys, "argv", ["gpu"])
    if gpu.torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main() == 1 and "needs a CUDA device" in capsys.readouterr().err
