"""Sliders over callables, for readers with a kernel; a figure that is redrawn while something runs."""

from collections.abc import Callable
from functools import lru_cache

from matplotlib.figure import Figure

from .plots import bundle, png


def explorer(draw: Callable[..., Figure], alt: str, **ranges: tuple[int, int, int]) -> None:
    """Display ``draw(**values)`` under one integer slider for each of ``ranges``: name to (first, last, at the start).

    A picture already drawn is kept, so moving back is instant. Where no kernel runs, a line says so; put a static
    figure beside it that shows the same.
    """
    import ipywidgets
    from IPython.display import display

    sliders = {
        name: ipywidgets.IntSlider(
            start, low, high, description=name.replace("_", " "), style={"description_width": "initial"}
        )
        for name, (low, high, start) in ranges.items()
    }
    picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
    picture_of = lru_cache(maxsize=64)(lambda *values: png(draw(**dict(zip(sliders, values, strict=True)))))

    def redraw(_=None) -> None:
        picture.value = picture_of(*(slider.value for slider in sliders.values()))

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    redraw()
    data = ipywidgets.VBox([*sliders.values(), picture])._repr_mimebundle_()
    data["text/plain"] = f"Interactive: run this cell in JupyterLab and move the sliders. {alt}"
    display(data, raw=True)


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
