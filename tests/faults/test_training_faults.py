"""Rows 2, 11 and 14: a run that is killed, whose loss is lost, or one of whose ranks is."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch import nn

from aigc_course import checkpoints
from aigc_course.runtime import rng_for
from aigc_course.state import NotFiniteError, TrainConfig, TrainState
from aigc_course.training import fit
from faults import workers
from faults.table import FULL
from faults.tiny import KINDS, build, differences, everything

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the workers are forked, and killed")


# ---- 2: killed in mid-epoch ----


def train(kind, out=None, beat=None):
    """A whole run of a tiny model; ``beat`` is a file that grows by a byte with each step."""
    step, state, data, config = build(kind)

    def counted(state, batch, rng):
        figures = step(state, batch, rng)
        if beat is not None:
            with open(beat, "ab") as file:
                file.write(b".")
            time.sleep(0.01)
        return figures

    return everything(fit(counted, state, data, config, out=out))


def assert_goes_on(kind, out, saved, beat, whole):
    """Taken up again, the run takes the steps after ``saved`` and no other, and ends as ``whole`` did."""
    beat.write_bytes(b"")
    resumed = workers.run(train, kind, out, beat)
    assert (resumed.code, resumed.message) == (0, "")
    assert beat.stat().st_size == 30 - saved, "not the steps after its checkpoint"
    assert not differences(resumed.value, whole)


@pytest.mark.fault("2")
def test_a_run_killed_in_mid_epoch_ends_as_if_it_had_not_been(fault, tmp_path):
    cases = [KINDS[i % len(KINDS)] for i in range(fault.n)]
    whole = dict(zip(KINDS, workers.run_each(train, [(kind,) for kind in KINDS]), strict=True))
    for i, kind in enumerate(cases):
        out, beat, n = tmp_path / f"{i}", tmp_path / f"beat{i}", fault.rng.randrange(1, 29)
        with fault.case(f"{kind}, killed after step {n}"):
            process = workers.start(train, kind, out, beat)
            try:
                workers.wait_until(lambda beat=beat, n=n: beat.exists() and beat.stat().st_size >= n)
                time.sleep(fault.rng.random() * 0.01)
            finally:
                process.kill()
                process.join()
            assert process.exitcode == -signal.SIGKILL
            saved = checkpoints.newest_valid(out / "checkpoints").card["step"]
            assert n - 8 < saved < 30
            assert_goes_on(kind, out, saved, beat, whole[kind].value)


# ---- 11: NaN or infinity ----


UPDATED = {"gan": ("discriminator", "generator"), "dcgan": ("discriminator", "generator"), "iwae": ("vae",)}


def spoil(kind, k, spoilt, value, where, out):
    """Train until step ``k`` spoils the loss or the gradient of the network ``spoilt`` with ``value``."""
    step, state, data, config = build(kind)
    minimize, weights = state.minimize, []

    def spoilt_minimize(name, loss):
        if state.step_count != k:
            return minimize(name, loss)
        weights.append({n: t.clone() for n, t in state.weights().items() if "running" not in n and "num_b" not in n})
        if name != spoilt:
            return minimize(name, loss)
        number = state.optimizers[name].param_groups[0]["params"][0].flatten()[0]
        return minimize(name, loss + ((number * 0).sqrt() if where == "gradient" else number * value))

    state.minimize = spoilt_minimize
    try:
        fit(step, state, data, config, out=out)
    except NotFiniteError as error:
        now = state.weights()
        moved = {name.split("/")[0] for name, tensor in weights[0].items() if not torch.equal(tensor, now[name])}
        return state.step_count, len(weights), moved, str(error)


@pytest.mark.fault("11")
def test_a_loss_that_is_lost_stops_the_run_within_a_step_and_spoils_nothing(fault, tmp_path):
    whole = dict(zip(KINDS, workers.run_each(train, [(kind,) for kind in KINDS]), strict=True))
    values = [(float("nan"), "loss"), (float("inf"), "loss"), (-float("inf"), "loss"), (0.0, "gradient")]
    cases = []
    for i in range(fault.n):
        turn, kind = divmod(i, len(KINDS))
        names = UPDATED.get(KINDS[kind], (KINDS[kind],))
        spoilt = values[(i + turn // 2) % 4]  # in eight turns each of two networks meets each of them
        cases.append((KINDS[kind], fault.rng.randrange(30), names[turn % len(names)], *spoilt, tmp_path / str(i)))
    for case, outcome in zip(cases, workers.run_each(spoil, cases), strict=True):
        kind, k, name, value, where, out = case
        with fault.case(f"{kind}, step {k}, {where} of {name} {value}"):
            assert (outcome.code, outcome.message) == (0, "")
            step_count, attempts, moved, message = outcome.value
            before = UPDATED.get(kind, (kind,)).index(name)  # networks that this step had updated already
            assert (step_count, attempts, moved) == (k, before + 1, set(UPDATED.get(kind, ())[:before]))
            cause = f"the gradient of the loss '{name}' has norm" if where == "gradient" else f"the loss '{name}' is"
            number = "-?inf" if value in (float("inf"), -float("inf")) else "nan"
            assert re.match(rf"step {k}: {cause} {number}; ", message) and "\n" not in message, message
            kept = checkpoints.newest_valid(out / "checkpoints").card["step"]
            assert kept == k // 4 * 4 and f"the last checkpoint is that of step {kept} in {out}" in message
            assert_goes_on(kind, out, kept, tmp_path / f"beat{out.name}", whole[kind].value)


# ---- 14: one of two ranks is lost ----


def train_together(out, lost=-1, at=-1, how=""):
    """Train a small network; rank ``lost`` is killed, raises an error, or is stopped in step ``at``.

    Returns the number of steps that this took, and all that a rank leaves; of BatchNorm's buffers those of rank 0.
    """
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng_for(0)))
    state = TrainState({"net": net}, {"net": torch.optim.Adam(net.parameters(), lr=0.01)})
    data, rank, steps = torch.rand(100, 3, generator=rng_for("ranks")), int(os.environ["RANK"]), []

    def step(state, batch, rng):
        steps.append(state.step_count)
        if state.step_count == at and rank == lost:
            if how == "raising":
                raise ValueError("this rank has had enough")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        loss = (state.nets["net"](batch) - batch.flip(1)).square().mean()
        state.minimize("net", loss)
        return {"loss": loss}

    config = TrainConfig(steps=30, batch_size=16, device="cpu", checkpoint_every=4, log_every=3)
    fit(step, state, data, config, out=out)
    return len(steps), {name: value for name, value in everything(state).items() if rank == 0 or "running" not in name}


SCRIPT = """
import sys
from faults.test_training_faults import train_together
train_together(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def by_torchrun(out, lost, at, how, tmp_path):
    """Lose a rank under the real launcher; how it ended, and the processes that it left behind."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out]
    environment = {**os.environ, "AIGC_RANK_TIMEOUT": "8", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, str(lost), str(at), how], env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            told = process.communicate(timeout=150)[1]
        except subprocess.TimeoutExpired:
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
            raise
    left = [p.pid for p in psutil.process_iter() if str(script) in " ".join(_command_of(p))]
    return process.returncode, told, left


def _command_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.fault("14")
def test_a_rank_that_is_lost_ends_the_others_and_the_run_goes_on(fault, tmp_path):
    whole = [outcome.value for outcome in workers.run_ranks(train_together, tmp_path / "whole")]
    ways = ("killed", "raising", "stopped")
    for i in range(fault.n):
        how, lost, at, out = ways[i % 3], fault.rng.randrange(2), fault.rng.randrange(1, 29), tmp_path / str(i)
        launcher = FULL and i < 3
        with fault.case(f"rank {lost} {how} in step {at}{', torchrun' if launcher else ''}"):
            if launcher:
                code, told, left = by_torchrun(out, lost, at, how, tmp_path)
                assert code != 0 and not left
                assert ("this rank has had enough" if how == "raising" else "has lost the other ranks") in told
            else:
                ranks = workers.start_ranks(train_together, out, lost, at, how, timeout=5)
                try:
                    assert ranks[1 - lost].pipe.poll(12), "the other rank waits"
                    ranks[1 - lost].process.join(5)
                    assert ranks[1 - lost].process.exitcode == 0, "the other rank has told, and lives on"
                finally:
                    other = workers.end_ranks(ranks, timeout=1)[1 - lost]
                assert other.error == "RankError" and "has lost the other ranks" in other.message, other
                assert "\n" not in other.message
            assert checkpoints.newest_valid(out / "checkpoints").card["step"] == at // 4 * 4
            resumed = [outcome.value for outcome in workers.run_ranks(train_together, out)]
            for (steps, ended), (_, expected) in zip(resumed, whole, strict=True):
                assert steps == 30 - at // 4 * 4, "not the steps after its checkpoint"
                assert not differences(ended, expected)
