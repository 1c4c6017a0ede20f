"""Controls over callables, for readers with a kernel; a figure that is redrawn while something runs."""

from collections.abc import Callable
from functools import lru_cache

from matplotlib.figure import Figure

from .plots import bundle, png

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
    picture_of = lru_cache(maxsize=64)(lambda *values: png(draw(**dict(zip(controls, values, strict=True)))))

    def redraw(_=None) -> None:
        picture.value = picture_of(*(control.value for control in controls.values()))

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    data = ipywidgets.VBox([*controls.values(), picture])._repr_mimebundle_()
    data["text/plain"] = f"Interactive: run this cell in JupyterLab and move the sliders. {alt}"
    display(data, raw=True)


def _control(label: str, values: Range):
    import ipywidgets

    options = {"description": label, "style": {"description_width": "initial"}}
    if isinstance(values, str):
        return ipywidgets.Text(values, continuous_update=False, **options)
    if all(isinstance(value, str) for value in values):
        return ipywidgets.Dropdown(options=values, value=values[0], **options)
    low, high, start = values
    return ipywidgets.IntSlider(start, low, high, **options)


class LiveFigure:
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
