"""The loop: what it computes, what it leaves behind, and that an interruption changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from aigc_course import checkpoints
from aigc_course.runtime import CourseError
from aigc_course.state import NotFiniteError, TrainConfig, TrainState
from aigc_course.training import epoch_order, fit, step_rng

DATA = torch.randn(100, 3, generator=torch.Generator().manual_seed(5))


class Model(nn.Module):
    """A little of everything that a resumed run must get right: buffers, dropout, two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        rng = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=rng)

    def forward(self, x):
        return self.layers(x)


def new_state(lr: float = 0.01) -> TrainState:
    model = Model()
    return TrainState({"model": model}, {"model": torch.optim.Adam(model.parameters(), lr=lr)})


def denoise_step(state, batch, rng):
    noise = torch.randn(batch.shape, generator=rng)
    loss = (state.nets["model"](batch + noise) - batch).square().mean()
    state.minimize("model", loss)
    return {"loss": loss, "noise": noise.mean()}


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 25, "batch_size": 16, "device": "cpu", "ema": {"model": 0.9}, **changes})


def everything(state: TrainState) -> dict:
    moments = {
        f"{name}.{index}.{key}": value
        for name, optimizer in state.optimizers.items()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    return {**state.weights(), **moments}


def assert_identical(a: TrainState, b: TrainState) -> None:
    first, second = everything(a), everything(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert a.history == b.history
    assert a.step_count == b.step_count


def test_fit_equals_the_naive_loop_bit_for_bit():
    """The bare loop, written out; without dropout, which draws from the global generator that fit sets."""
    state, by_hand = new_state(), Model()
    for model in (state.nets["model"], by_hand):
        model.layers[3].p = 0.0
    fit(denoise_step, state, DATA, config(ema={}))

    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    losses = []
    for step in range(25):
        epoch, position = divmod(step, 100 // 16)
        batch = DATA[epoch_order(0, epoch, 100)[position * 16 : (position + 1) * 16]]
        noise = torch.randn(batch.shape, generator=step_rng(0, step))
        loss = (by_hand(batch + noise) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, state.nets["model"].state_dict()[name]), name
    assert state.history["loss"] == losses


def test_the_average_is_the_exponential_moving_average():
    trace = []

    def step(state, batch, rng):
        figures = denoise_step(state, batch, rng)
        trace.append(state.nets["model"].layers[0].weight.detach().clone())
        return figures

    state = fit(step, new_state(), DATA, config())
    average = trace[0]
    for weight in trace[1:]:
        average = 0.9 * average + 0.1 * weight
    torch.testing.assert_close(state.ema["model"].module.layers[0].weight, average)


@pytest.mark.parametrize("stop", [1, 7, 10, 24])
def test_a_resumed_run_ends_bit_identical(tmp_path, stop):
    """Interrupted between two checkpoints: what came after the last one is computed again, and alike."""
    uninterrupted = fit(denoise_step, new_state(), DATA, config(checkpoint_every=10), out=tmp_path / "a")

    def interrupted(state, batch, rng):
        if state.step_count == stop:
            raise RuntimeError("power cut")
        return denoise_step(state, batch, rng)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(interrupted, new_state(), DATA, config(checkpoint_every=10), out=tmp_path / "b")
    torch.manual_seed(stop)  # whatever the global generator holds, the result is the same
    resumed = fit(denoise_step, new_state(), DATA, config(checkpoint_every=10), out=tmp_path / "b")
    assert_identical(uninterrupted, resumed)
    assert json.loads((tmp_path / "b" / "history.json").read_text(encoding="utf-8")) == resumed.history


def test_ctrl_c_saves_the_step_it_interrupts_and_the_run_goes_on(tmp_path):
    uninterrupted = fit(denoise_step, new_state(), DATA, config())

    def interrupted(state, batch, rng):
        if state.step_count == 12:
            signal.raise_signal(signal.SIGINT)
        return denoise_step(state, batch, rng)

    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, new_state(), DATA, config(), out=tmp_path)
    assert checkpoints.newest_valid(tmp_path / "checkpoints").card["step"] == 13
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_identical(uninterrupted, fit(denoise_step, new_state(), DATA, config(), out=tmp_path))


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_training import DATA, config, denoise_step, fit, new_state

def slow_step(state, batch, rng):
    figures = denoise_step(state, batch, rng)
    print(state.step_count, flush=True)
    time.sleep(0.005)
    return figures

fit(slow_step, new_state(), DATA, config(steps=400, checkpoint_every=3), out={out!r})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and SIGTERM are POSIX")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_killed_run_resumes_bit_identical(tmp_path, number):
    script = KILLED.format(tests=os.path.dirname(__file__), out=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 50:
                time.sleep(0.02)
                process.send_signal(number)
                break
        process.stdout.read()
    assert process.returncode == -number
    step = checkpoints.newest_valid(tmp_path / "checkpoints").card["step"]
    assert 45 <= step < 400
    if number == signal.SIGKILL:
        assert step % 3 == 0
    long = config(steps=400, checkpoint_every=3)
    resumed = fit(denoise_step, new_state(), DATA, long, out=tmp_path)
    assert_identical(fit(denoise_step, new_state(), DATA, long), resumed)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path, where):
    def step(state, batch, rng):
        if state.step_count == 13:
            before.update({name: value.clone() for name, value in everything(state).items()})
            output = state.nets["model"](batch)
            # sqrt has an infinite slope at 0: the loss is finite, its gradient is not
            loss = output.sum() * math.nan if where == "loss" else (output * 0).sum().sqrt()
            state.minimize("model", loss)
        return denoise_step(state, batch, rng)

    before, state = {}, new_state()
    with pytest.raises(NotFiniteError, match=rf"step 13: the {where}.* 'model'.*step-0*10"):
        fit(step, state, DATA, config(checkpoint_every=5), out=tmp_path)
    parameters = {name for name, _ in state.nets["model"].named_parameters()}
    for name, value in everything(state).items():
        if name.removeprefix("model/") in parameters or not name.startswith("model/"):
            assert torch.equal(value, before[name]), name
    assert len(state.history["loss"]) == 13
    assert checkpoints.newest_valid(tmp_path / "checkpoints").card["step"] == 10
    mended = fit(denoise_step, new_state(), DATA, config(checkpoint_every=5), out=tmp_path)
    assert_identical(fit(denoise_step, new_state(), DATA, config()), mended)


def test_minimize_moves_only_its_own_parameters_and_leaves_no_gradient():
    generator, discriminator = nn.Linear(2, 2), nn.Linear(2, 1)
    state = TrainState(
        {"generator": generator, "discriminator": discriminator},
        {"generator": torch.optim.SGD(generator.parameters(), lr=1.0)},
    )
    before = discriminator.weight.clone(), generator.weight.clone()
    state.minimize("generator", discriminator(generator(torch.ones(3, 2))).mean())
    assert torch.equal(discriminator.weight, before[0]) and not torch.equal(generator.weight, before[1])
    assert all(p.grad is None for p in (*generator.parameters(), *discriminator.parameters()))


def test_clipping_bounds_the_update():
    for bound, moved in [(None, 30.0), (0.5, 0.5), (100.0, 30.0)]:
        parameter = nn.Parameter(torch.zeros(9))
        state = TrainState({}, {"p": torch.optim.SGD([parameter], lr=1.0)})
        state.clip_norm = bound
        state.minimize("p", 10 * parameter.sum())
        assert parameter.norm().item() == pytest.approx(moved, rel=1e-5)


def test_every_row_is_seen_once_an_epoch_and_ranks_share_a_batch(monkeypatch):
    seen = []

    def step(state, batch, rng):
        seen.append(batch[:, 0].clone())
        return {}

    rows = torch.arange(32.0).reshape(32, 1)
    fit(step, TrainState({}, {}), rows, config(steps=8, batch_size=8, ema={}))
    alone = [set(batch.tolist()) for batch in seen]
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == rows[:, 0].tolist()
    assert [b.tolist() for b in seen[:4]] != [b.tolist() for b in seen[4:]]

    shares = []
    for rank in range(2):
        seen.clear()
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
        fit(step, TrainState({}, {}), rows, config(steps=8, batch_size=8, ema={}))
        shares.append([set(batch.tolist()) for batch in seen])
    assert [a | b for a, b in zip(*shares, strict=True)] == alone
    assert all(not a & b for a, b in zip(*shares, strict=True))


def test_the_global_generator_is_left_as_it_was():
    state = new_state()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit(denoise_step, state, DATA, config(steps=3))
    assert torch.equal(torch.rand(2), expected)


def test_history_and_log_agree():
    logged = []
    state = fit(
        denoise_step, new_state(), DATA, config(log_every=10), on_log=lambda n, f: logged.append((n, f["loss"]))
    )
    losses = state.history["loss"]
    assert len(losses) == 25
    spans = {10: losses[:10], 20: losses[10:20], 25: losses[20:]}
    assert logged == [(n, pytest.approx(sum(span) / len(span))) for n, span in spans.items()]


def test_a_figure_that_not_every_step_returns_keeps_its_place():
    def step(state, batch, rng):
        return {"penalty": torch.tensor(2.0)} if state.step_count % 3 == 2 else {"loss": torch.tensor(1.0)}

    history = fit(step, TrainState({}, {}), DATA, config(steps=7, ema={}, log_every=2)).history
    assert [n for n, v in enumerate(history["penalty"]) if v == 2.0] == [2, 5]
    assert len(history["penalty"]) == len(history["loss"]) == 7
    assert math.isnan(history["loss"][2])


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    seen = []

    def step(state, batch, rng):
        output = state.nets["model"](batch)
        seen.append(output.dtype)
        state.minimize("model", output.float().square().mean())
        return {}

    state = fit(step, new_state(), DATA, config(steps=2, precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in state.nets["model"].parameters())


def test_progress_is_a_bar_in_a_terminal_and_silent_elsewhere(capsys, monkeypatch):
    fit(denoise_step, new_state(), DATA, config(log_every=1))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fit(denoise_step, new_state(), DATA, config(log_every=1))
    shown = capsys.readouterr().err
    assert shown.endswith("s\n") and "[####################] step 25/25" in shown
    assert shown.count("\r") <= 4  # twice a second at most, and the last


def test_progress_in_a_notebook_is_one_display_that_is_updated(monkeypatch):
    class Handle:
        def update(self, bundle, raw):
            lines.append(bundle["text/plain"])

    def display(bundle, raw, display_id):
        lines.append(bundle["text/plain"])
        displays.append(display_id)
        return Handle()

    lines, displays = [], []
    monkeypatch.setattr("aigc_course.training._in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    fit(denoise_step, new_state(), DATA, config(log_every=1))
    assert displays == [True]
    assert lines[0].startswith("step 1/25") and lines[-1].startswith("step 25/25")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"steps": 5}, "steps"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(tmp_path, change, message):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    with pytest.raises(CourseError, match=message):
        fit(denoise_step, new_state(), DATA, config(**{"steps": 10, **change}), out=tmp_path)


@pytest.mark.parametrize(
    ("state", "data", "message"),
    [
        (lambda: new_state(lr=0.5), DATA, "settings"),
        (new_state, DATA[:50], "data_size"),
    ],
)
def test_another_learning_rate_or_data_set_is_refused(tmp_path, state, data, message):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    with pytest.raises(CourseError, match=message):
        fit(denoise_step, state(), data, config(steps=10), out=tmp_path)


def test_more_steps_go_on_where_the_run_ended(tmp_path):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    longer = fit(denoise_step, new_state(), DATA, config(), out=tmp_path)
    assert_identical(fit(denoise_step, new_state(), DATA, config()), longer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(batch_size=0), "batch_size"),
        (lambda: config(steps=-1), "steps"),
        (lambda: config(clip_norm=0.0), "clip_norm"),
        (lambda: config(ema={"model": 1.0}), "ema"),
        (lambda: fit(denoise_step, new_state(), DATA[:5], config()), "batch_size"),
        (lambda: fit(denoise_step, new_state(), DATA, config(ema={"modell": 0.9})), "modell"),
        (lambda: fit(denoise_step, new_state(), DATA, config(device="tpu9")), "device"),
        (lambda: fit(denoise_step, new_state(), DATA, config(precision="fp8")), "precision"),
        (lambda: new_state().minimize("vae", torch.zeros(())), "vae"),
        (lambda: new_state().minimize("model", torch.zeros(3)), "shape"),
        (lambda: new_state().minimize("model", torch.zeros((), requires_grad=True)), "reaches no parameter"),
    ],
)
def test_bad_input_gets_one_clear_error(make, message):
    with pytest.raises(CourseError, match=message):
        make()
