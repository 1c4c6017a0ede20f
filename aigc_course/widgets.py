"""Controls over callables, for readers with a kernel; a figure that is redrawn while a model is trained."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import bundle, canvas, lines, png
from .runtime import CourseError, in_notebook

Range = tuple[int, int, int] | tuple[str, ...] | str


def explorer(draw: Callable[..., Figure], alt: str, **ranges: Range) -> None:
    """Display ``draw(**values)`` under one control for each of ``ranges``, which give the values it may take.

    Three whole numbers (first, last, at the start) make a slider; strings a list to choose from, the first at the
    start; one string a box for a text of the reader's own, read at the press of Enter. A picture already drawn is kept,
    so moving back is instant. Where no kernel runs, a line says so; put a static figure beside it that shows the same.
    """
    import ipywidgets
    from IPython.display import display

    controls = {name: _control(name.replace("_", " "), values) for name, values in ranges.items()}
    picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})

    @lru_cache(maxsize=64)
    def picture_of(*values) -> bytes:
        with _one_thread():
            figure = draw(**dict(zip(controls, values, strict=True)))
        return png(figure, compress_level=1)  # quick: it is neither sent far nor stored

    def redraw(_=None) -> None:
        picture.value = picture_of(*(control.value for control in controls.values()))

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    data = ipywidgets.VBox([*controls.values(), picture])._repr_mimebundle_()
    data["text/plain"] = f"Interactive: run this cell in JupyterLab and move the sliders. {alt}"
    display(data, raw=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A move computes little: a second thread would wait for the first, and for long where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _control(label: str, values: Range):
    import ipywidgets

    options = {"description": label, "style": {"description_width": "initial"}}
    if isinstance(values, str):
        return ipywidgets.Text(values, continuous_update=False, **options)
    if all(isinstance(value, str) for value in values):
        return ipywidgets.Dropdown(options=values, value=values[0], **options)
    low, high, start = values
    return ipywidgets.IntSlider(start, low, high, **options)


class Place:
    """One place in a cell's output whose figure ``update`` replaces; the notebook stores the last one."""

    def __init__(self):
        self.handle = None

    def update(self, figure: Figure, alt: str) -> None:
        """Show ``figure``, with ``alt`` as for ``plots.present``, in place of the one before."""
        from IPython.display import display

        data, metadata = bundle(figure, alt)
        if self.handle is None:
            self.handle = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self.handle.update(data, metadata=metadata, raw=True)


class LiveFigure:
    """A training run in one figure that is redrawn as it goes on: ``fit(…, on_log=LiveFigure(config.steps, …))``.

    ``curves`` maps names of the step's figures to what the legend calls them (by default all of them, as they are);
    they are drawn over the steps, with ``title`` and ``ylabel``. ``picture(axes)`` draws whatever belongs beside them,
    such as samples of the model as it is by then; it must leave the networks as it finds them. ``alt`` says in a
    sentence what the last figure shows, which is the one that the notebook stores.

    The line on top says how far the run is, and about how long it still takes. A new figure comes every ``every``
    seconds at most, and less often where drawing would take more than ``SHARE`` of the time; the last step always has
    one. ``fit``'s own line of progress tells the numbers of the moment, this the course that they took. Outside
    notebooks lines take the place of figures, unless ``fit`` draws its bar in a terminal.

    ``history`` holds what was logged, by name, and under "step" at which steps; NaN stands where a figure was missing.
    """

    SHARE = 0.05

    def __init__(
        self,
        steps: int,
        curves: dict[str, str] | None = None,
        picture: Callable[[Axes], object] | None = None,
        *,
        title: str,
        ylabel: str,
        alt: str,
        every: float = 2.0,
    ):
        self.steps, self.curves, self.picture = steps, curves, picture
        self.title, self.alt, self.ylabel, self.every = title, alt, ylabel, every
        self.history: dict[str, list[float]] = {"step": []}
        self.place, self.first, self.due = Place(), None, 0.0

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Take in the ``figures`` logged at ``step``, and draw if it is time to."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.due = (step, now), now + self.every
        self._keep(step, figures)
        if now < self.due and step < self.steps:
            return
        line = self._line(step, now)
        if in_notebook():
            self.place.update(self._figure(line), self.alt)
        elif not sys.stderr.isatty():
            print(f"{line}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}", flush=True)
        after = time.monotonic()
        self.due = after + max(self.every, (1 / self.SHARE - 1) * (after - now))

    def _keep(self, step: int, figures: dict[str, float]) -> None:
        before = len(self.history["step"])
        self.history["step"].append(step)
        for name in figures:
            self.history.setdefault(name, [math.nan] * before)
        for name, values in self.history.items():
            if name != "step":
                values.append(figures.get(name, math.nan))
        if missing := [name for name in self.curves or () if name not in self.history]:
            raise CourseError(f"there is no figure {missing[0]!r} to draw: the step returns {', '.join(figures)}")

    def _line(self, step: int, now: float) -> str:
        if step >= self.steps:
            return f"after {step} steps"  # without times: the stored figure is the same in every run
        begun, start = self.first
        if step == begun:
            return f"step {step} of {self.steps}"
        left = (now - start) * (self.steps - step) / (step - begun)
        return f"step {step} of {self.steps}, about {f'{left:.0f} s' if left < 100 else f'{left / 60:.0f} min'} left"

    def _figure(self, line: str) -> Figure:
        names = self.curves or {name: name for name in self.history if name != "step"}
        panels = 1 + (self.picture is not None)
        with canvas(1, panels, width=3.0 + 3.0 * panels, squeeze=False) as (figure, axes):
            drawn = {label: self.history[name] for name, label in names.items()}
            lines(axes[0, 0], self.history["step"], drawn, title=self.title, xlabel="step", ylabel=self.ylabel)
            axes[0, 0].set_xlim(0, self.steps)
            for curve in axes[0, 0].lines:
                curve.set_marker("o" if len(self.history["step"]) == 1 else "")  # a line through one point is nothing
            if self.picture is not None:
                self.picture(axes[0, 1])
            figure.suptitle(line, x=0.01, ha="left", fontsize="medium", color="0.3")
        return figure
