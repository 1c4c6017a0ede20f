"""Figures and sliders: what is drawn is what was given, and nobody who cannot see it is left out."""

import io

import matplotlib.image
import numpy as np
import pytest
import torch

from aigc_course import plots, widgets
from aigc_course.runtime import CourseError

RAMP = torch.linspace(-1, 1, 2 * 1 * 3 * 4).reshape(2, 1, 3, 4)


def test_save_image_grid_keeps_every_pixel(tmp_path):
    plots.save_image_grid(RAMP, tmp_path / "grid.png", columns=8)
    stored = matplotlib.image.imread(tmp_path / "grid.png")[..., 0]
    assert stored.shape == (3, 4 + 2 + 4)
    for i, left in enumerate((0, 6)):
        assert np.allclose(stored[:, left : left + 4], (RAMP[i, 0] + 1) / 2, atol=0.51 / 255)


def test_a_grid_fills_row_by_row_and_keeps_colours(tmp_path):
    images = torch.full((3, 3, 2, 2), -1.0)
    for i in range(3):
        images[i, i] = 1.0  # red, green, blue
    plots.save_image_grid(images, tmp_path / "rgb.png", columns=2)
    stored = matplotlib.image.imread(tmp_path / "rgb.png")[..., :3]
    assert stored.shape == (2 + 2 + 2, 2 + 2 + 2, 3)
    assert np.allclose(stored[0, 0], [1, 0, 0]) and np.allclose(stored[0, 4], [0, 1, 0])
    assert np.allclose(stored[4, 0], [0, 0, 1]) and np.allclose(stored[4, 4], [1, 1, 1])


def test_values_beyond_the_range_are_clipped_not_rescaled(tmp_path):
    plots.save_image_grid(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 1, 1, 3), tmp_path / "clip.png")
    assert np.allclose(matplotlib.image.imread(tmp_path / "clip.png")[0, :, 0], [0, 0.5, 1], atol=0.51 / 255)


def test_two_channels_are_no_picture():
    with pytest.raises(CourseError, match="2 channels"), plots.canvas() as (_, axes):
        plots.image_grid(axes, torch.zeros(1, 2, 3, 3))


def test_ellipses_lie_at_one_and_two_standard_deviations():
    """Every point of an ellipse has the same Mahalanobis distance from its mean."""
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    covariance = torch.tensor([[[2.0, 0.9], [0.9, 0.7]]], dtype=torch.float64)
    with plots.canvas() as (_, axes):
        plots.ellipses(axes, mean, covariance)
    for radius, patch in zip((1, 2), axes.patches, strict=True):
        outline = patch.get_patch_transform().transform(patch.get_path().interpolated(1).vertices[:-1:3])
        offset = torch.from_numpy(outline) - mean
        distance = (offset * torch.linalg.solve(covariance[0], offset.T).T).sum(1).sqrt()
        assert torch.allclose(distance, torch.full_like(distance, radius), rtol=1e-3)


def test_a_figure_is_shown_with_its_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **options: shown.append((bundle, options)))
    with plots.canvas() as (figure, axes):
        plots.lines(axes, [1, 2], {"a": [1.0, 2.0], "b": [2.0, 1.0]}, title="t", xlabel="x", ylabel="y")
    plots.present(figure, "Two lines that cross.")
    bundle, options = shown[0]
    assert options["metadata"]["image/png"]["alt"] == bundle["text/plain"] == "Two lines that cross."
    assert matplotlib.image.imread(io.BytesIO(bundle["image/png"])).ndim == 3
    with pytest.raises(CourseError, match="present"):
        plots.present(figure, " ")


def test_the_same_figure_gives_the_same_file():
    def draw():
        with plots.canvas() as (figure, axes):
            plots.scatter(axes, torch.eye(2), torch.eye(2))
        return plots.png(figure)

    assert draw() == draw()


def test_moving_a_slider_draws_anew_and_moving_back_does_not(monkeypatch):
    import ipywidgets

    boxes, drawn, shown = [], [], []
    original = ipywidgets.VBox

    def keep(children):
        boxes.append(original(children))
        return boxes[-1]

    def draw(step, start):
        drawn.append((step, start))
        with plots.canvas() as (figure, axes):
            axes.plot([step, start])
        return figure

    monkeypatch.setattr(ipywidgets, "VBox", keep)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    widgets.explorer(draw, "A line.", step=(0, 9, 0), start=(1, 5, 3))
    step, _, picture = boxes[0].children
    first = picture.value
    step.value = 4
    assert picture.value != first
    step.value = 0
    assert picture.value == first
    assert drawn == [(0, 3), (4, 3)]
    assert "application/vnd.jupyter.widget-view+json" in shown[0]
    assert "run this cell" in shown[0]["text/plain"] and "A line." in shown[0]["text/plain"]
