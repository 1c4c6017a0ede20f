"""The figure of a run in progress: what it shows, what it costs, and that it changes nothing; and quick explorers."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aigc_course import generate, plots, recipes, training, widgets
from aigc_course.runtime import CourseError, course_dir, rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit

DATA = torch.randn(64, 4, generator=rng_for(0, "data"))


@pytest.fixture
def notebook(monkeypatch):
    """As if in a notebook: what is displayed, in order, as (the figure's bundle, whether it replaces another)."""
    shown = []

    def display(data, *, raw, display_id=None, metadata=None):
        if "image/png" in data:
            shown.append((data, False))
        update = lambda data, **_: shown.append((data, True)) if "image/png" in data else None  # noqa: E731
        return SimpleNamespace(update=update)

    monkeypatch.setattr(widgets, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    return shown


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on."""
    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr(widgets, "time", SimpleNamespace(monotonic=lambda: hands.now))
    return hands


def live_figure(steps=100, curves=None, picture=None, **options):
    words = {"title": "The loss falls", "ylabel": "loss (nats)", "alt": "A falling curve."}
    return widgets.LiveFigure(steps, curves, picture, **words | options)


def texts(figure):
    """The title line, and for each of the axes its title and the labels of its legend."""
    legends = [axes.get_legend() for axes in figure.axes]
    names = [[text.get_text() for text in legend.get_texts()] if legend else [] for legend in legends]
    return figure.get_suptitle(), [axes.get_title(loc="left") for axes in figure.axes], names


@pytest.fixture
def figures(monkeypatch):
    """Every figure that a LiveFigure draws, in order."""
    drawn, original = [], widgets.LiveFigure._figure
    monkeypatch.setattr(
        widgets.LiveFigure, "_figure", lambda self, line: drawn.append(original(self, line)) or drawn[-1]
    )
    return drawn


def test_one_figure_is_replaced_every_two_seconds_and_the_last_step_has_one(notebook, clock, figures):
    live = live_figure(steps=200)
    for step in range(10, 201, 10):
        clock.now += 0.5
        live(step, {"loss": 1 / step})
    assert len(notebook) == 5  # after 2, 4, 6 and 8 seconds, and at the end
    assert [replaces for _, replaces in notebook] == [False] + [True] * (len(notebook) - 1)
    assert len({data["image/png"] for data, _ in notebook}) == len(notebook)
    assert {data["text/plain"] for data, _ in notebook} == {"A falling curve."}
    curve = figures[-1].axes[0].lines[0]
    assert list(curve.get_xdata()) == list(range(10, 201, 10)) and curve.get_ydata()[-1] == 1 / 200
    assert figures[-1].axes[0].get_xlim() == (0, 200)
    assert (figures[-1].axes[0].get_xlabel(), figures[-1].axes[0].get_ylabel()) == ("step", "loss (nats)")


def test_the_line_on_top_tells_the_time_left_until_the_end(notebook, clock, figures):
    live = live_figure(steps=100)
    for step in range(10, 101, 10):
        live(step, {"loss": 1.0})
        clock.now += 1.0
    lines = [texts(figure)[0] for figure in figures]
    assert lines[0] == "step 30 of 100, about 7 s left"
    assert lines[-2:] == ["step 90 of 100, about 1 s left", "after 100 steps"]
    slow = live_figure(steps=1000)
    for step in (10, 20):
        slow(step, {"loss": 1.0})
        clock.now += 60.0
    assert texts(figures[-1])[0] == "step 20 of 1000, about 98 min left"


def test_drawing_that_is_slow_happens_less_often(notebook, clock):
    """Each picture takes a second here, so there is one in twenty seconds, though two seconds are allowed."""
    spent = []

    def picture(axes):
        clock.now += 1.0
        spent.append(1.0)

    live, start = live_figure(steps=10_000, picture=picture), clock.now
    for step in range(1, 1200):
        clock.now += 0.1
        live(step, {"loss": 1.0})
    assert len(spent) in (6, 7) and sum(spent) <= 0.051 * (clock.now - start) + 1.0


def test_a_figure_that_comes_late_leaves_a_gap(notebook, clock, figures):
    live = live_figure(steps=3, picture=lambda axes: axes.set_title("samples"))
    live(1, {"d_loss": 1.0})
    live(2, {"d_loss": 0.5, "g_loss": 2.0})
    live(3, {"g_loss": 3.0})
    assert live.history["step"] == [1, 2, 3]
    assert math.isnan(live.history["g_loss"][0]) and live.history["g_loss"][1:] == [2.0, 3.0]
    assert live.history["d_loss"][:2] == [1.0, 0.5] and math.isnan(live.history["d_loss"][2])
    assert texts(figures[-1]) == ("after 3 steps", ["The loss falls", "samples"], [["d_loss", "g_loss"], []])


def test_chosen_curves_have_their_names(notebook, clock, figures):
    live = live_figure(steps=1, curves={"d_loss": "discriminator", "g_loss": "generator"})
    live(1, {"other": 7.0, "g_loss": 2.0, "d_loss": 1.0})
    assert texts(figures[-1])[2] == [["discriminator", "generator"]]
    assert [list(line.get_ydata()) for line in figures[-1].axes[0].lines] == [[1.0], [2.0]]
    with pytest.raises(CourseError, match="no figure 'loss' to draw: the step returns d_loss, g_loss"):
        live_figure(curves={"loss": "loss"})(1, {"d_loss": 1.0, "g_loss": 2.0})


def test_outside_notebooks_there_are_lines_but_not_beside_the_bar_of_fit(clock, capsys, monkeypatch):
    monkeypatch.setattr(widgets.LiveFigure, "_figure", lambda self, line: pytest.fail("a figure that nobody sees"))

    def run():
        live = live_figure(steps=40)
        for step in range(10, 41, 10):
            live(step, {"loss": 1 / step, "kl": 2.0})
            clock.now += 2.0
        return capsys.readouterr().out.splitlines()

    assert run() == [
        "step 20 of 40, about 4 s left: loss 0.05, kl 2",
        "step 30 of 40, about 2 s left: loss 0.03333, kl 2",
        "after 40 steps: loss 0.025, kl 2",
    ]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run() == []


# --- Together with fit -----------------------------------------------------------------------------------------------


def train(on_log=None, steps=6, pause=0.0):
    """A run whose step draws from its own generator and from the global one (dropout)."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=rng_for(0, "start", parameter.numel()))

    def step(state, batch, rng):
        noise = torch.randn(batch.shape, generator=rng)
        loss = (state.nets["net"](batch + noise) - batch).square().mean()
        state.minimize("net", loss)
        time.sleep(pause)
        return {"loss": loss}

    state = TrainState({"net": net}, {"net": torch.optim.Adam(net.parameters())})
    config = TrainConfig(steps=steps, batch_size=16, seed=0, device="cpu", precision="fp32", log_every=1)
    fit(step, state, DATA, config, on_log=on_log)
    return {**state.weights()}, state.history, net


def test_a_run_ends_with_the_same_bits_with_and_without_a_figure(notebook):
    """Also if the picture draws from the global generator, which a lesson should not do."""
    plain, history, _ = train()
    live = live_figure(steps=6, picture=lambda axes: axes.plot(torch.randn(5), torch.rand(5)), every=0.0)
    live.SHARE = 1.0
    watched, watched_history, _ = train(live)
    assert len(notebook) == 6 and live.history["loss"] == pytest.approx(history["loss"])
    assert history == watched_history
    assert plain.keys() == watched.keys() and all(torch.equal(plain[name], watched[name]) for name in plain)


def test_two_runs_leave_the_same_figure(notebook):
    """What a notebook stores does not depend on the clock."""
    for pause in (0.0, 0.01):
        train(live_figure(steps=6, every=0.0), pause=pause)
    last = [data["image/png"] for data, _ in notebook]
    ends = [i for i, (_, replaces) in enumerate(notebook) if not replaces][1:]
    assert last[ends[0] - 1] == last[-1]


def test_a_figure_takes_a_small_share_of_a_run(notebook, one_thread):
    """With the clock of this machine: all figures but the last, which is drawn when the training is done."""
    spent, original = [], widgets.Place.update
    live = live_figure(steps=100, picture=lambda axes: plots.image_grid(axes, torch.zeros(40, 1, 28, 28)), every=0.05)

    def update(self, figure, alt):
        start = time.monotonic()
        original(self, figure, alt)
        spent.append(time.monotonic() - start)

    live.place.update = update.__get__(live.place)
    start = time.monotonic()
    train(live, steps=100, pause=0.03)
    assert len(spent) >= 2 and sum(spent[:-1]) < 0.1 * (time.monotonic() - start)


@pytest.mark.parametrize("begun", [0, 40])
def test_the_line_of_fit_tells_the_time_left(monkeypatch, begun):
    """Reckoned from the steps of this call alone: a run that was resumed had the others for nothing."""
    hands = SimpleNamespace(now=5.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: hands.now))
    with training.Progress(100, begun) as progress:
        hands.now += 10.0
        progress.update(begun + 10, {"loss": 1.5})
        assert progress.line == f"step {begun + 10}/100 · loss 1.5 · 10 s, about {90 - begun} s left"
        hands.now += 6000.0
        progress.update(begun + 20, {"loss": 1.5})
        assert progress.line.endswith(f"· 6010 s, about {6010 * (80 - begun) / 20 / 60:.0f} min left")
        progress.update(100, {"loss": 1.5})
        assert progress.line == "step 100/100 · loss 1.5 · 6010 s"


# --- Explorers --------------------------------------------------------------------------------------------------------


def cell(lesson, name):
    path = next((course_dir() / "notebooks").glob(f"{lesson}_*.ipynb"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if cell["id"] == name))


@pytest.fixture
def moves(monkeypatch):
    """Run an explorer's cells as they stand in a lesson; returns a function that moves a control and times it."""
    import ipywidgets

    boxes, original = [], ipywidgets.VBox
    monkeypatch.setattr(ipywidgets, "VBox", lambda children: boxes.append(original(children)) or boxes[-1])
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: None)

    def prepare(lesson, cells, **names):
        for name in cells:
            exec(compile(cell(lesson, name), name, "exec"), names)
        *controls, picture = boxes[-1].children
        controls = {control.description: control for control in controls}

        def move(name, value):
            before, start = picture.value, time.process_time()  # not the time that other processes take
            controls[name].value = value
            seconds = time.process_time() - start
            assert picture.value != before
            return seconds

        return move

    return prepare


def median(seconds):
    return sorted(seconds)[len(seconds) // 2]


# A move takes less than 100 ms on two quiet cores. Here shapes are checked and caches shared with other processes.
MOVE = 0.3


def test_the_map_of_digits_follows_its_sliders(moves, one_thread):
    flat = recipes.load_pretrained("vae2d", device="cpu").eval()
    move = moves("02", ["explore"], torch=torch, flat=flat, plots=plots, explorer=widgets.explorer)
    assert median([move("z1", value) for value in (3, 8, -5, 12, 29)]) < MOVE


def test_the_playground_follows_its_controls(moves, one_thread):
    bard = recipes.load_pretrained("shakespeare", device="cpu")
    names = {"torch": torch, "math": math, "plots": plots, "generate": generate, "rng_for": rng_for}
    names |= {"device": torch.device("cpu"), "real": None, "SEED": 0, "bard": bard, "explorer": widgets.explorer}
    move = moves("06", ["explore", "explore-run"], **names)
    seconds = [move("temperature x10", value) for value in (8, 9, 13, 6)] + [move("strategy", "greedy")]
    assert median(seconds) < MOVE
