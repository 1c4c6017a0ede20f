"""Figures from arrays: one style, colours for colour-blind readers, alternative text on every figure."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from .runtime import CourseError

# Okabe and Ito (2008), "Color universal design": told apart with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.size": 10,
    "legend.frameon": False,
}


@contextmanager
def canvas(
    rows: int = 1, columns: int = 1, *, width: float = 7.5, height: float = 3.2, **options
) -> Iterator[tuple[Figure, Axes]]:
    """A new figure in the course's style and its axes (one, or an array of them), ``width`` by ``height`` inches.

    Use as ``with canvas() as (figure, axes): …``; hand the figure to ``present`` afterwards.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, **options)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


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
