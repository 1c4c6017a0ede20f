"""Sliders over callables: exploration for readers with a kernel, a plain note for those without."""

from collections.abc import Callable
from functools import lru_cache

from matplotlib.figure import Figure

from .plots import png


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
    bundle = ipywidgets.VBox([*sliders.values(), picture])._repr_mimebundle_()
    bundle["text/plain"] = f"Interactive: run this cell in JupyterLab and move the sliders. {alt}"
    display(bundle, raw=True)
