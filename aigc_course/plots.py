"""Figures from arrays: one style, colours for colour-blind readers, alternative text on every figure."""

import functools
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.patches import Ellipse
from PIL import Image
from torch import Tensor

from .datasets import DataError, verified_bytes
from .runtime import CourseError, course_dir

# Okabe and Ito (2008), "Color universal design": told apart with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # no search for room above tick labels, which are never on top: a figure is drawn quicker
    "axes.labelsize": 10,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.size": 10,
    "legend.frameon": False,
}
FONT = "fonts/aigc-course-cjk.otf"
GREY = "#BBBBBB"


@functools.cache
def _families() -> list[str]:
    """The fonts that a text is drawn with, each where the one before has no glyph; a missing file is told once."""
    try:
        verified_bytes(FONT, course_dir() / "data")
    except DataError as error:
        warnings.warn(f"Chinese characters are drawn as boxes: {error}", stacklevel=3)
        return ["DejaVu Sans"]
    fontManager.addfont(course_dir() / "data" / FONT)
    fontManager.ttflist.append(replace(fontManager.ttflist[-1], weight=700))  # its one weight serves for bold text too
    return ["DejaVu Sans", "AIGC Course CJK"]


def _style() -> dict[str, Any]:
    return STYLE | {"font.family": _families()}


@functools.cache
def _drawable() -> frozenset[int]:
    """The code points that at least one of the fonts has a glyph for."""
    files = (fontManager.findfont(family) for family in _families())
    return frozenset().union(*(get_font(file).get_charmap() for file in files))


def readable(text: str) -> str:
    """``text``, such as a token, as figures show it on one line: a space as ``␣``, a line's end as ``⏎``.

    A character that no font has becomes ``〓`` (the printers' sign for a missing type), and a dollar sign starts no
    formula.
    """
    missing = "〓" if ord("〓") in _drawable() else "?"
    text = text.replace(" ", "␣").replace("\n", "⏎")
    return "".join(c if ord(c) in _drawable() else missing for c in text).replace("$", r"\$")


@contextmanager
def canvas(
    rows: int = 1, columns: int = 1, *, width: float = 7.5, height: float = 3.2, **options
) -> Iterator[tuple[Figure, Axes]]:
    """A new figure in the course's style and its axes (one, or an array of them), ``width`` by ``height`` inches.

    Use as ``with canvas() as (figure, axes): …``; hand the figure to ``present`` afterwards. Any text may hold Chinese
    characters, but not together with a formula between dollar signs.
    """
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, **options)


def png(figure: Figure, compress_level: int = 6) -> bytes:
    """The figure as a PNG file. Raises ``CourseError`` if a text in it has a character that no font has."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_style()), _no_boxes():
        # as figure.savefig does, which draws everything twice, the first time for the layout alone
        drawn = FigureCanvasAgg(figure)
        drawn.draw()
    pixels = np.asarray(drawn.buffer_rgba())[..., :3]  # nothing shines through, and the fourth channel is an eighth
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


@contextmanager
def _no_boxes() -> Iterator[None]:
    """Matplotlib warns of a missing glyph and draws a box, or a wrong sign in a formula; here that is an error.

    Not so where the font of the course is missing: then boxes were announced.
    """
    if len(_families()) == 1:
        yield
        return
    formulas = logging.getLogger("matplotlib.mathtext")
    formulas.addFilter(_refuse)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"Glyph \d+ ", UserWarning)
            yield
    except UserWarning as warning:
        if (found := re.match(r"Glyph (\d+) \((.*?)\) missing", str(warning))) is None:
            raise
        raise _boxed(int(found[1]), found[2]) from None
    finally:
        formulas.removeFilter(_refuse)


def _refuse(record: logging.LogRecord) -> bool:
    """A filter for what the parser of formulas says: a character that it replaces is an error."""
    if "does not have a glyph" in record.msg:
        raise _boxed(record.args[2], "in a formula")
    return True


def _boxed(code: int, where: str) -> CourseError:
    remedy = "write it in another way, or hand the text through plots.readable"
    return CourseError(f"a figure's text has U+{code:04X} ({where}), which no font of the course can draw: {remedy}")


def bundle(figure: Figure, alt: str) -> tuple[dict, dict]:
    """The figure as a notebook stores it, and the metadata that carry ``alt``, a sentence on what it shows."""
    if not alt.strip():
        raise CourseError("present(figure, alt): say in a sentence what the figure shows")
    return {"image/png": png(figure), "text/plain": alt}, {"image/png": {"alt": alt}}


def present(figure: Figure, alt: str) -> None:
    """Display ``figure`` in the notebook; ``alt`` says in a sentence what it shows, for those who cannot see it."""
    from IPython.display import display

    data, metadata = bundle(figure, alt)
    display(data, metadata=metadata, raw=True)


def image_grid(
    axes: Axes, images: Float[Tensor, "n c h w"], *, columns: int = 10, title: str = "", pad: int = 1
) -> None:
    """Draw ``images`` in [-1, 1] (one channel or three) as a grid, row by row."""
    axes.imshow(_tile(images, columns, pad), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def save_image_grid(images: Float[Tensor, "n c h w"], path: str | Path, *, columns: int = 8) -> None:
    """Write ``images`` in [-1, 1] as one PNG file, pixel for pixel."""
    tile = (255 * _tile(images, columns, 2)).round().astype("uint8")
    matplotlib.image.imsave(str(path), tile if tile.ndim == 3 else tile[..., None].repeat(3, axis=-1))


def _tile(images: Tensor, columns: int, pad: int):
    n, channels, height, width = images.shape
    if channels not in (1, 3) or n == 0:
        raise CourseError(f"images are {n} of {channels} channels: a grid takes at least one, of 1 or 3 channels")
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = torch.full((rows * columns, channels, height + pad, width + pad), 1.0)
    grid[:n, :, :height, :width] = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    grid = grid.reshape(rows, columns, channels, height + pad, width + pad).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (height + pad), columns * (width + pad), channels)[: -pad or None, : -pad or None]
    return (grid[..., 0] if channels == 1 else grid).numpy()


def scatter(
    axes: Axes, x: Float[Tensor, "n 2"], responsibilities: Float[Tensor, "n k"] | None = None, *, size: float = 6
) -> None:
    """Draw points in the plane; with ``responsibilities`` each point mixes its components' colours."""
    colours = "#666666"
    if responsibilities is not None:
        palette = torch.tensor([matplotlib.colors.to_rgb(c) for c in COLOURS], dtype=responsibilities.dtype)
        k = responsibilities.shape[1]
        colours = (responsibilities @ palette[torch.arange(k) % len(COLOURS)]).clamp(0, 1).numpy()
    axes.scatter(x[:, 0], x[:, 1], s=size, c=colours, linewidths=0)
    axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")


def ellipses(axes: Axes, means: Float[Tensor, "k 2"], covariances: Float[Tensor, "k 2 2"]) -> None:
    """Draw each component's mean, and the ellipses at one and two standard deviations."""
    for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        variances, directions = torch.linalg.eigh(covariance)
        angle = torch.rad2deg(torch.atan2(directions[1, 1], directions[0, 1])).item()
        for radius in (1, 2):
            major, minor = (2 * radius * variances[i].clamp_min(0).sqrt().item() for i in (1, 0))
            axes.add_patch(
                Ellipse(mean.tolist(), major, minor, angle=angle, fill=False, color=colour, lw=2.2 - 0.6 * radius)
            )
        axes.plot(*mean.tolist(), marker="P", color=colour, markeredgecolor="white", markersize=8)


def lines(
    axes: Axes,
    x: Sequence[float | int] | Tensor,
    curves: dict[str, Sequence[float | int] | Tensor],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw named curves over ``x`` with a title that says what to see, and labelled axes."""
    styles = ("-", "--", "-.", ":")
    for i, (name, y) in enumerate(curves.items()):
        axes.plot(x, y, styles[i % len(styles)], label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        axes.legend()


def attention_map(
    axes: Axes, weights: Float[Tensor, "t t"], tokens: Sequence[str], title: str, *, top: float = 1.0
) -> None:
    """Draw attention weights: row i shows how the position of token i spreads its attention over the tokens.

    The colours go from white at 0 to dark blue at ``top``. Raises ``CourseError`` unless there are t tokens.
    """
    if len(tokens) != len(weights):
        raise CourseError(f"{len(tokens)} tokens for attention weights of {len(weights)} positions: give one for each")
    image = axes.imshow(weights.detach().float().cpu().numpy(), cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    labels = [readable(token) for token in tokens]
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(title=title, xlabel="attended to", ylabel="attending")
    axes.figure.colorbar(image, ax=axes, label="attention weight")


def probability_bars(
    axes: Axes,
    probabilities: Float[Tensor, "n"],
    labels: Sequence[str],
    title: str,
    kept: Bool[Tensor, "n"] | None = None,
) -> None:
    """Draw a distribution over tokens as horizontal bars, the first on top, each with its probability.

    Where ``kept`` is false a bar is grey: the token was filtered out. Raises ``CourseError`` unless there are as many
    labels as bars.
    """
    n = len(probabilities)
    if len(labels) != n:
        raise CourseError(f"{n} probabilities, {len(labels)} labels: give one for each")
    shown = [True] * n if kept is None else kept.tolist()
    colours = [COLOURS[0] if keep else GREY for keep in shown]
    bars = axes.barh(range(n), probabilities.detach().float().cpu().numpy(), color=colours)
    axes.bar_label(bars, fmt="{:.3f}", padding=3)
    axes.set_yticks(range(n), [readable(label) for label in labels])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel="probability")
    if not all(shown):
        names = [name for name, present in (("kept", any(shown)), ("filtered out", True)) if present]
        handles = [bars[shown.index(name == "kept")] for name in names]
        axes.legend(handles, names, loc="lower right")
