"""Several processes train as one: the same parameters, one folder, one end."""

import os
import signal
import sys
from functools import partial

import pytest
import torch
from torch import nn

from aigc_course import checkpoints, ranks, recipes
from aigc_course.datasets import TokenDataset
from aigc_course.gan import DCGANConfig, Discriminator, Generator, gan_step
from aigc_course.gpt2 import GPT2, GPT2Config, lm_step
from aigc_course.runtime import CourseError, pick_device, rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit
from faults import workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the workers are forked")
DATA = torch.rand(100, 3, generator=rng_for("ranks"))
TEXTS = TokenDataset.rows([[token % 20 for token in range(i, i + 2 + i * i % 10)] for i in range(100)], 11)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **{"steps": 20, "batch_size": 16, "checkpoint_every": 7, "log_every": 5, "device": "cpu", **changes}
    )


def linear_state(seed=0, optimizer=SGD) -> TrainState:
    net = nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng_for(seed)))
    return TrainState({"net": net}, {"net": optimizer(net.parameters())})


def linear_step(state, batch, rng):
    loss = (state.nets["net"](batch) - batch.flip(1)).square().mean()
    state.minimize("net", loss)
    return {"loss": loss}


def values(outcomes):
    assert [(outcome.code, outcome.message) for outcome in outcomes] == [(0, "")] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def trained(step, state, data, config, out):
    """The weights and history of a rank, what it was shown, and what ``on_log`` was told."""
    shares, told = [], []

    def shown(state, batch, rng):
        shares.append(batch.tolist())
        return step(state, batch, rng)

    fit(shown, state, data, config, out=out, on_log=lambda *log: told.append(log))
    return {"weights": state.weights(), "history": state.history, "shares": shares, "told": told}


def train_linear(out, optimizer=SGD, clip_norm=None, unlike=False):
    state = linear_state(ranks.join()[0] if unlike else 0, optimizer)
    return trained(linear_step, state, DATA, config(clip_norm=clip_norm), out)


def train_gpt2(out):
    """On texts of 2 to 11 tokens: the ranks see unequal numbers of them."""
    sizes = {"vocab_size": 20, "block_size": 10, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.0}
    net = GPT2(GPT2Config(**sizes), rng_for(0))
    return trained(lm_step, TrainState({"gpt2": net}, {"gpt2": SGD(net.parameters())}), TEXTS, config(), out)


@pytest.mark.parametrize(
    ("train", "options"),
    [(train_linear, ()), (train_linear, (SGD, 0.05)), (train_linear, (ADAM, 0.05)), (train_gpt2, ())],
    ids=["SGD", "SGD, clipped", "Adam, clipped", "GPT-2"],
)
def test_two_ranks_train_as_one_with_twice_the_batch(tmp_path, train, options):
    first, second = values(workers.run_ranks(train, tmp_path, *options))
    (alone,) = values([workers.run(train, None, *options)])
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, atol=1e-5, rtol=0)
    assert first["history"] == second["history"]
    assert first["history"]["loss"] == pytest.approx(alone["history"]["loss"], abs=1e-5)
    assert [step for step, _ in first["told"]] == [5, 10, 15, 20] and not second["told"]
    assert checkpoints.newest_valid(tmp_path / "checkpoints").card["world"] == 2


def test_ranks_share_each_batch_and_see_every_row_once_an_epoch(tmp_path):
    first, second = (value["shares"] for value in values(workers.run_ranks(train_linear, None)))
    seen = []
    fit(lambda state, batch, rng: seen.append(batch.tolist()) or {}, linear_state(), DATA, config())
    for one, other, both in zip(first, second, seen, strict=True):
        assert len(one) == len(other) == 8 and sorted(one + other) == sorted(both)
    epoch = [tuple(row) for share in (*first[:6], *second[:6]) for row in share]
    assert len(set(epoch)) == len(epoch) == 96


def test_ranks_that_begin_unlike_train_as_rank_0_began():
    unlike = workers.run_ranks(train_linear, None, SGD, None, True)
    alike, unlike = values(workers.run_ranks(train_linear, None)), values(unlike)
    for one, other in zip(alike, unlike, strict=True):
        assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def train_dcgan(out):
    networks = DCGANConfig(width=4, size=16, z_dim=4)
    nets = {"generator": Generator(networks, rng_for(0)), "discriminator": Discriminator(networks, rng_for(1))}
    for net in nets.values():
        net.to(memory_format=torch.channels_last)
    adams = {name: torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999)) for name, net in nets.items()}
    state, images = TrainState(nets, adams), torch.rand(40, 1, 16, 16, generator=rng_for("images")) * 2 - 1
    fit(gan_step, state, images, config(steps=6, batch_size=8, ema={"generator": 0.9}), out=out)
    return state.weights()


def test_a_dcgan_ends_with_equal_parameters_and_rank_0s_buffers(tmp_path):
    first, second = values(workers.run_ranks(train_dcgan, tmp_path))
    buffers = {name for name in first if "running_" in name and not name.startswith("ema")}
    assert buffers and any(not torch.equal(first[name], second[name]) for name in buffers)
    for name in first.keys() - {name for name in first if "running_" in name}:
        assert torch.equal(first[name], second[name]), name
    saved = checkpoints.newest_valid(tmp_path / "checkpoints").weights
    assert all(torch.equal(saved[name], first[name]) for name in first)


def draw():
    draws = []

    def step(state, batch, rng):
        draws.append((torch.rand((), generator=rng).item(), torch.rand(()).item()))
        return {}

    fit(step, linear_state(), DATA, config())
    return draws


def test_ranks_draw_apart():
    first, second = values(workers.run_ranks(draw))
    assert not {x for pair in first for x in pair} & {x for pair in second for x in pair}


def train_on_other_data():
    fit(linear_step, linear_state(), DATA + ranks.join()[0], config())


def train_with_a_batch_that_cannot_be_shared():
    fit(linear_step, linear_state(), DATA, config(batch_size=15))


def train_gmm():
    recipes.build("gmm", "quick", device="cpu").train()


def disk_is_gone(out):
    out.write_text("a file", encoding="utf-8")
    fit(linear_step, linear_state(), DATA, config(), out=out / "run")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (train_on_other_data, "the ranks do not train alike: data is"),
        (train_with_a_batch_that_cannot_be_shared, "batch_size is 15: it must be a multiple of the 2 ranks"),
        (train_gmm, "start it without torchrun"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_on_every_rank(target, message):
    for outcome in workers.run_ranks(target):
        assert message in outcome.message and "\n" not in outcome.message, outcome


def test_what_rank_0_cannot_do_is_an_error_on_every_rank(tmp_path):
    first, second = workers.run_ranks(disk_is_gone, tmp_path / "file")
    assert first.message == second.message and str(tmp_path / "file") in first.message


def interrupted(out, number):
    stopped = []
    signal.signal(number, lambda *_: stopped.append(number))

    def step(state, batch, rng):
        if state.step_count == 10 and ranks.join()[0] == 1:
            os.kill(os.getpid(), number)
        return linear_step(state, batch, rng)

    state = fit(step, linear_state(), DATA, config(), out=out)
    return stopped, state.step_count


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_rank_ends_all_of_them_and_the_run_goes_on(tmp_path, number):
    assert values(workers.run_ranks(interrupted, tmp_path / "a", number)) == [([number], 11), ([number], 11)]
    assert checkpoints.newest_valid(tmp_path / "a" / "checkpoints").card["step"] == 11
    resumed, _ = values(workers.run_ranks(train_linear, tmp_path / "a"))
    alone, _ = values(workers.run_ranks(train_linear, tmp_path / "b"))
    assert all(torch.equal(value, resumed["weights"][name]) for name, value in alone["weights"].items())
    assert resumed["history"] == alone["history"]


def test_one_process_is_rank_0_of_1(monkeypatch):
    assert ranks.join() == (0, 1)
    assert ranks.on_first(lambda: 7) == 7 and ranks.largest(3) == 3
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert ranks.join() == (0, 1)


def test_a_timeout_that_is_none_is_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "AIGC_RANK_TIMEOUT": "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CourseError, match="AIGC_RANK_TIMEOUT is 'soon'"):
        ranks.join()


def train_with_figures_of_its_own():
    def step(state, batch, rng):
        figures = linear_step(state, batch, rng) | {"x": 0.5}
        return dict(reversed(figures.items())) if ranks.join()[0] else figures

    fit(step, linear_state(), DATA, config())


def log_on_rank_0():
    fit(linear_step, linear_state(), DATA, config(), on_log=print if ranks.join()[0] == 0 else None)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            train_with_figures_of_its_own,
            "the ranks do not train alike: figures is ['loss', 'x'] on rank 0, ['x', 'loss']",
        ),
        (log_on_rank_0, "the ranks do not train alike: an on_log is True on rank 0, False on rank 1"),
    ],
)
def test_ranks_that_do_not_call_alike_are_told_at_once(target, message):
    for outcome in workers.run_ranks(target):
        assert outcome.error == "RankError" and message in outcome.message, outcome


def enough(step, figures):
    raise ValueError("that is enough")


def stop_early():
    fit(linear_step, linear_state(), DATA, config(), on_log=enough)


def test_an_error_of_rank_0s_own_is_told_to_the_others():
    first, second = workers.run_ranks(stop_early)
    assert (first.error, first.message) == ("ValueError", "that is enough")
    assert (second.error, second.message) == ("RankError", "rank 0 ended with ValueError: that is enough")


def joined_by_the_caller(out):
    torch.distributed.init_process_group("gloo")
    return train_linear(out)["weights"]


def test_a_group_that_the_caller_joined_is_taken_as_it_is(tmp_path):
    for one, other in zip(
        values(workers.run_ranks(joined_by_the_caller, tmp_path)),
        values(workers.run_ranks(train_linear, None)),
        strict=True,
    ):
        assert all(torch.equal(value, other["weights"][name]) for name, value in one.items())


def terminated_twice(out):
    signal.signal(signal.SIGTERM, lambda *_: None)

    def step(state, batch, rng):
        if state.step_count == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return linear_step(state, batch, rng)

    return fit(step, linear_state(), DATA, config(), out=out).step_count


def test_a_second_sigterm_is_held_back_like_the_first(tmp_path):
    """torchrun and the scheduler above it may send one each."""
    assert values(workers.run_ranks(terminated_twice, tmp_path)) == [11, 11]
    assert checkpoints.newest_valid(tmp_path / "checkpoints").card["step"] == 11


def two_gpus_at_most(monkeypatch, n):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


def test_each_rank_of_a_machine_takes_its_own_gpu(monkeypatch):
    two_gpus_at_most(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1") and pick_device("cpu").type == "cpu"
    two_gpus_at_most(monkeypatch, 1)
    with pytest.raises(CourseError, match="this machine has 1 GPUs and more ranks: start 1 with --nproc_per_node"):
        pick_device("auto")
