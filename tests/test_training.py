"""The loop: what it computes, what it leaves behind, and that an interruption changes nothing."""

import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from aigc_course import checkpoints
from aigc_course.runtime import CourseError, only_process, rng_for
from aigc_course.state import NotFiniteError, TrainConfig, TrainState
from aigc_course.training import epoch_order, fit, step_rng
from faults import workers

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


def never(state, batch, rng):
    raise AssertionError("no step was to be taken")


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


@pytest.fixture
def ctrl_c():
    """What Ctrl-C does in a terminal, also where the tests run as a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_step_it_interrupts_and_the_run_goes_on(tmp_path, ctrl_c):
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


def test_a_second_ctrl_c_is_not_held_back(ctrl_c):
    def impatient(state, batch, rng):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was held back")

    with pytest.raises(KeyboardInterrupt):
        fit(impatient, new_state(), DATA, config())


def test_an_ignored_ctrl_c_stays_ignored(ctrl_c):
    def interrupted(state, batch, rng):
        signal.raise_signal(signal.SIGINT)
        return denoise_step(state, batch, rng)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert fit(interrupted, new_state(), DATA, config()).step_count == 25


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
    with pytest.raises(NotFiniteError, match=rf"step 13: the {where}.* 'model'.*checkpoint is that of step 10"):
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


def test_every_row_is_seen_once_an_epoch():
    seen = []

    def step(state, batch, rng):
        seen.append(batch[:, 0].clone())
        return {}

    rows = torch.arange(32.0).reshape(32, 1)
    fit(step, TrainState({}, {}), rows, config(steps=8, batch_size=8, ema={}))
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == rows[:, 0].tolist()
    assert [b.tolist() for b in seen[:4]] != [b.tolist() for b in seen[4:]]


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
    monkeypatch.setattr("aigc_course.training.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    fit(denoise_step, new_state(), DATA, config(log_every=1))
    assert displays == [True]
    assert lines[0].startswith("step 1/25") and lines[-1].startswith("step 25/25")


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"seed": 1}, {"steps": 5}, {"ema": {}}, {"precision": "bf16"}])
def test_another_configuration_in_the_same_folder_is_refused(tmp_path, change):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    with pytest.raises(CourseError, match=f"holds a run .*{next(iter(change))}.*choose another out"):
        fit(denoise_step, new_state(), DATA, config(**{"steps": 10, **change}), out=tmp_path)


@pytest.mark.parametrize("data", [DATA[:50], DATA * 2, DATA.double()], ids=["fewer", "others", "another dtype"])
def test_other_data_in_the_same_folder_are_refused(tmp_path, data):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    with pytest.raises(CourseError, match="holds a run with data 100 rows"):
        fit(denoise_step, new_state(), data, config(steps=10), out=tmp_path)


def test_the_learning_rate_and_the_clipping_may_change_on_the_way_and_fit_says_so(tmp_path, capsys):
    """What the error about a loss that is not finite advises can be done."""
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    changed = fit(denoise_step, new_state(lr=0.0), DATA, config(clip_norm=1.0), out=tmp_path)
    said = capsys.readouterr().out
    assert "going on from step 10 of 25" in said and "clip_norm changed from None to 1.0" in said and "lr" in said
    before = checkpoints.load(tmp_path / "checkpoints" / "step-000010").weights
    assert torch.equal(changed.weights()["model/layers.0.weight"], before["model/layers.0.weight"])


def test_a_finished_run_is_read_back_and_fit_says_so(tmp_path, capsys):
    state = fit(denoise_step, new_state(), DATA, config(), out=tmp_path)
    again = fit(never, new_state(), DATA, config(), out=tmp_path)
    assert_identical(state, again)
    assert "finished" in capsys.readouterr().out


def test_a_schedule_that_the_step_writes_survives_an_interruption(tmp_path):
    def step(state, batch, rng):
        if state.step_count == stop:
            raise RuntimeError("power cut")
        state.optimizers["model"].param_groups[0]["lr"] = 0.01 / (1 + state.step_count)
        return denoise_step(state, batch, rng)

    stop = None
    uninterrupted = fit(step, new_state(), DATA, config())
    stop = 12
    with pytest.raises(RuntimeError):
        fit(step, new_state(), DATA, config(checkpoint_every=5), out=tmp_path)
    stop = None
    assert_identical(uninterrupted, fit(step, new_state(), DATA, config(checkpoint_every=5), out=tmp_path))


def test_what_cannot_be_saved_is_found_out_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    masked = new_state()
    masked.nets["model"].register_buffer("mask", torch.tensor(-math.inf))
    for state, out, message in [(new_state(), tmp_path / "file" / "run", "file"), (masked, tmp_path / "run", "mask")]:
        with pytest.raises(CourseError, match=message):
            fit(never, state, DATA, config(), out=out)


def test_an_exception_in_the_middle_of_a_step_is_rewound(tmp_path):
    def step(state, batch, rng):
        denoise_step(state, batch, rng)
        raise RuntimeError("after the first of two updates")

    state = new_state()
    with pytest.raises(RuntimeError):
        fit(step, state, DATA, config(), out=tmp_path)
    fit(denoise_step, state, DATA, config(), out=tmp_path)
    assert_identical(fit(denoise_step, new_state(), DATA, config()), state)


def test_a_figure_may_be_a_parameter_or_a_plain_number():
    def step(state, batch, rng):
        state.minimize("model", state.nets["model"](batch).square().mean())
        return {"bias": state.nets["model"].layers[4].bias[:1], "third": 0.1}

    every, seldom = (fit(step, new_state(), DATA, config(log_every=n)).history for n in (1, 7))
    assert every == seldom and len(set(every["bias"])) == 25
    assert every["third"] == [0.1] * 25


def test_logged_means_do_not_depend_on_when_checkpoints_are_written(tmp_path):
    def means(**changes):
        logged = []
        options = {"out": tmp_path} if changes else {}
        fit(
            denoise_step,
            new_state(),
            DATA,
            config(log_every=10, **changes),
            on_log=lambda *a: logged.append(a),
            **options,
        )
        return logged

    assert means() == means(checkpoint_every=7)


def test_the_history_survives_an_exception():
    def step(state, batch, rng):
        return denoise_step(state, batch, rng) if state.step_count < 12 else 1 / 0

    state = new_state()
    with pytest.raises(ZeroDivisionError):
        fit(step, state, DATA, config())
    assert len(state.history["loss"]) == state.step_count == 12


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_second_forward_in_a_step_sees_the_first_update(precision):
    """autocast keeps cast copies of the weights; a GAN's generator must meet the new discriminator."""
    seen = []

    def step(state, batch, rng):
        critic = state.nets["critic"]
        state.minimize("critic", critic(batch).float().mean())
        seen.append((critic(batch).float().mean().item(), (batch @ critic.weight.T).mean().item()))
        return {}

    critic = nn.Linear(3, 1, bias=False)
    state = TrainState({"critic": critic}, {"critic": torch.optim.SGD(critic.parameters(), lr=5.0)})
    fit(step, state, DATA, config(steps=3, ema={}, precision=precision))
    for by_forward, by_hand in seen:
        assert by_forward == pytest.approx(by_hand, rel=0.02, abs=0.02)


def test_another_decay_or_no_average_takes_effect_on_a_second_fit():
    state = fit(denoise_step, new_state(), DATA, config(ema={"model": 0.9}))
    fit(denoise_step, state, DATA, config(steps=30, ema={"model": 0.0}))
    assert torch.equal(state.ema["model"].module.layers[0].weight, state.nets["model"].layers[0].weight)
    fit(denoise_step, state, DATA, config(steps=35, ema={}))
    assert state.ema == {}


def hold(folder, pipe):
    with only_process(folder):
        pipe.send("held")
        pipe.recv()


@pytest.mark.skipif(sys.platform == "win32", reason="the workers are forked, and killed")
@pytest.mark.parametrize("ending", ["lets go", "is killed"])
def test_a_run_folder_is_one_process_s_at_a_time(tmp_path, ending):
    ours, theirs = multiprocessing.Pipe()
    process = workers.start(hold, tmp_path, theirs)
    assert ours.recv() == "held"
    with pytest.raises(CourseError) as caught:
        fit(never, new_state(), DATA, config(), out=tmp_path)
    message = str(caught.value)
    assert (
        message.startswith(f"{tmp_path} is in use by another process (process {process.pid})") and "\n" not in message
    )
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.pid"}
    ours.send("let go") if ending == "lets go" else process.kill()
    process.join()
    resumed = fit(denoise_step, new_state(), DATA, config(), out=tmp_path)
    assert_identical(fit(denoise_step, new_state(), DATA, config()), resumed)


def test_a_run_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(AssertionError, match="no step was to be taken"):
        fit(never, new_state(), DATA, config(), out=tmp_path)
    assert fit(denoise_step, new_state(), DATA, config(), out=tmp_path).step_count == 25


def test_what_a_killed_run_left_is_swept_when_it_goes_on(tmp_path):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    unfinished = checkpoints.step_folder(tmp_path / "checkpoints", 99)
    unfinished.mkdir()
    (unfinished / "weights-0123456789ab.safetensors.tmp").write_bytes(b"half a file")
    fit(denoise_step, new_state(), DATA, config(), out=tmp_path)
    assert not unfinished.exists()


def test_more_steps_go_on_where_the_run_ended(tmp_path):
    fit(denoise_step, new_state(), DATA, config(steps=10), out=tmp_path)
    longer = fit(denoise_step, new_state(), DATA, config(), out=tmp_path)
    assert_identical(fit(denoise_step, new_state(), DATA, config()), longer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(lambda *_: None, new_state(), DATA, config()), "must return its figures"),
        (lambda: fit(lambda *_: {"loss": torch.zeros(2)}, new_state(), DATA, config()), "'loss' has shape"),
        (lambda: new_state().minimize("model", torch.zeros(())), "without a gradient"),
        (lambda: TrainState({}, {"a": torch.optim.LBFGS([nn.Parameter(torch.zeros(1))])}), "LBFGS"),
        (
            lambda: fit(
                never, TrainState({}, {"a": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}), DATA, config(ema={})
            ),
            "of no network",
        ),
        (lambda: new_state().load_weights({"other/weight": torch.zeros(1)}), "other/weight"),
        (lambda: config(batch_size=0), "batch_size"),
        (lambda: config(steps=-1), "steps"),
        (lambda: config(clip_norm=0.0), "clip_norm"),
        (lambda: config(ema={"model": 1.0}), "ema"),
        (lambda: fit(denoise_step, new_state(), DATA[:5], config()), "batch_size"),
        (lambda: fit(denoise_step, new_state(), DATA, config(ema={"modell": 0.9})), "modell"),
        (lambda: fit(denoise_step, new_state(), DATA, config(device="tpu9")), "device"),
        (lambda: fit(denoise_step, new_state(), DATA, config(precision="fp8")), "precision"),
        (lambda: new_state().minimize("vae", torch.zeros(())), "vae"),
        (lambda: new_state().minimize("model", torch.zeros(3, requires_grad=True)), "shape"),
        (lambda: new_state().minimize("model", torch.zeros((), requires_grad=True)), "reaches no parameter"),
    ],
)
def test_bad_input_gets_one_clear_error(make, message):
    with pytest.raises(CourseError, match=message):
        make()


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_the_moments_of_weights_in_another_order_of_memory_are_restored_in_it(tmp_path, options):
    """A fused optimizer pairs weights and moments by their place in memory, so both must be in channels_last."""

    def trained(steps: int, out) -> torch.Tensor:
        net = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.normal_(net.weight, generator=rng_for("conv"))
        net.to(memory_format=torch.channels_last)
        state = TrainState({"net": net}, {"net": torch.optim.Adam(net.parameters(), lr=0.1, **options)})

        def step(state, batch, rng):
            state.minimize("net", net(batch).square().mean())
            return {}

        data = torch.randn(8, 3, 6, 6, generator=rng_for("images"))
        fit(step, state, data, TrainConfig(steps=steps, batch_size=4, device="cpu"), out=out)
        return net.weight.detach()

    trained(3, tmp_path / "half")
    assert torch.equal(trained(6, tmp_path / "half"), trained(6, tmp_path / "whole"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_steps_do_not_fetch_their_memory_anew():
    """A language model of a wide vocabulary: its later steps touch few new pages of 4 KB."""
    program = """
import resource, torch
from aigc_course.gpt2 import GPT2, GPT2Config, lm_step
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit

net, faults = GPT2(GPT2Config(vocab_size=4096, block_size=64, n_layer=2, n_head=4, n_embd=192), rng_for(0)), []

def step(state, batch, rng):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return lm_step(state, batch, rng)

state = TrainState({"gpt2": net}, {"gpt2": torch.optim.AdamW(net.parameters(), fused=True)})
texts = torch.randint(4096, (400, 65), generator=rng_for(1))
texts[torch.arange(65) > torch.randint(30, 65, (400, 1), generator=rng_for(2))] = -100
fit(step, state, texts, TrainConfig(steps=60, batch_size=16, device="cpu"))
print((faults[-1] - faults[-21]) / 20)
"""
    command, env = [sys.executable, "-c", program], os.environ | {"AIGC_LINEAR": "torch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", check=True)
    assert float(done.stdout.splitlines()[-1]) < 1000
