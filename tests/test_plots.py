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


def test_a_live_figure_is_displayed_once_and_updated_in_place_afterwards(monkeypatch):
    calls = []

    class Handle:
        def update(self, bundle, **options):
            calls.append(("update", bundle, options))

    def display(bundle, **options):
        assert options.pop("display_id") is True
        calls.append(("display", bundle, options))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    live = widgets.LiveFigure()
    assert not calls
    for height in (1.0, 2.0, 3.0):
        with plots.canvas() as (figure, axes):
            axes.plot([0.0, height])
        live.update(figure, f"A line that rises to {height}.")
    assert [call[0] for call in calls] == ["display", "update", "update"]
    for (_, bundle, options), height in zip(calls, (1.0, 2.0, 3.0), strict=True):
        assert options["raw"] is True
        assert bundle["text/plain"] == options["metadata"]["image/png"]["alt"] == f"A line that rises to {height}."
    assert len({bundle["image/png"] for _, bundle, _ in calls}) == 3
    assert calls[-1][1]["image/png"] == plots.png(figure)
    with pytest.raises(CourseError, match="say in a sentence"):
        live.update(figure, "")
    assert len(calls) == 3


def test_two_live_figures_have_a_place_each(monkeypatch):
    """With IPython's own display: what is published has two names, and each is updated under its own."""
    published = []

    class Publisher:
        def publish(self, data, metadata, *, transient, update=False, **_):
            published.append((data["text/plain"], metadata["image/png"]["alt"], transient["display_id"], update))

    shell = type("Shell", (), {"display_pub": Publisher()})()
    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell.initialized", lambda: True)
    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell.instance", lambda: shell)
    with plots.canvas() as (figure, _):
        pass
    live, other = widgets.LiveFigure(), widgets.LiveFigure()
    for one, alt in ((live, "a"), (other, "b"), (live, "c"), (other, "d")):
        one.update(figure, alt)
    assert [(text, alt, update) for text, alt, _, update in published] == [
        ("a", "a", False),
        ("b", "b", False),
        ("c", "c", True),
        ("d", "d", True),
    ]
    names = [name for _, _, name, _ in published]
    assert names[0] == names[2] != names[1] == names[3]


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
