"""Figures and sliders: what is drawn is what was given, and nobody who cannot see it is left out."""

import io
import json
import re
import warnings
from collections import Counter

import matplotlib.image
import numpy as np
import pytest
import torch

from aigc_course import plots, widgets
from aigc_course.datasets import verified_bytes
from aigc_course.runtime import CourseError, course_dir

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


def test_a_place_is_displayed_once_and_updated_afterwards(monkeypatch):
    calls = []

    class Handle:
        def update(self, bundle, **options):
            calls.append(("update", bundle, options))

    def display(bundle, **options):
        assert options.pop("display_id") is True
        calls.append(("display", bundle, options))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    live = widgets.Place()
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


def test_two_places_are_apart(monkeypatch):
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
    live, other = widgets.Place(), widgets.Place()
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


def test_a_list_to_choose_from_and_a_box_for_a_text(monkeypatch):
    import ipywidgets

    boxes, drawn = [], []
    original = ipywidgets.VBox
    monkeypatch.setattr(ipywidgets, "VBox", lambda children: boxes.append(original(children)) or boxes[-1])
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: None)

    def draw(text, way):
        drawn.append((text, way))
        with plots.canvas() as (figure, axes):
            axes.set_title(f"{text} {way}")
        return figure

    widgets.explorer(draw, "A title.", text="To be", way=("greedy", "drawn"))
    text, way, picture = boxes[0].children
    first = picture.value
    way.value = "drawn"
    text.value = "Or not"
    assert picture.value != first
    assert drawn == [("To be", "greedy"), ("To be", "drawn"), ("Or not", "drawn")]
    assert way.options == ("greedy", "drawn") and not text.continuous_update


# --- Chinese characters -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_fonts():
    """What was found out about the fonts is forgotten before the test, and after it."""
    caches = (plots._families, plots._drawable)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def poem_figure(text="白日依山尽，黄河入海流。"):
    with plots.canvas(1, 2) as (figure, (left, right)):
        plots.attention_map(left, torch.eye(len(text)), list(text), f"注意力: {text}")
        plots.probability_bars(right, torch.full((len(text),), 0.05), list(text), "Each of these is 0.05")
        plots.lines(
            left, [0, 1], {"困惑度": [0.0, 1.0], "PPL": [1.0, 0.0]}, title="《登鹳雀楼》", xlabel="步", ylabel="¥"
        )
    return figure


def test_chinese_characters_are_drawn_everywhere_and_leave_no_box():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.png(poem_figure("白日依山尽")) != plots.png(poem_figure("黄河入海流"))


def test_bold_text_falls_back_without_a_word(fresh_fonts, caplog):
    with plots.canvas() as (figure, ax):
        ax.set_title("黄河 and more", weight="bold")
    assert plots.png(figure) and not caplog.records


def test_without_the_font_figures_are_drawn_and_one_line_says_so(fresh_fonts, monkeypatch, tmp_path):
    """The control of the test above: boxes do raise matplotlib's warning."""
    monkeypatch.setattr(plots, "course_dir", lambda: tmp_path)
    with pytest.warns(UserWarning) as caught:
        assert plots.png(poem_figure()) and plots.png(poem_figure())
        assert plots.readable("白 日") == "?␣?"
    ours = [str(warning.message) for warning in caught if "boxes" in str(warning.message)]
    assert len(ours) == 1 and str(tmp_path / "data" / plots.FONT) in ours[0] and "\n" not in ours[0]
    assert any("Glyph" in str(warning.message) and "missing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a bird: 🦜", r"U\+1F99C \(\\N\{PARROT\}\)"),
        ("no letter: \ufdd0", r"U\+FDD0"),
        ("$\\lambda$ 春", r"U\+6625 \(in a formula\)"),
    ],
)
@pytest.mark.parametrize("place", ["title", "tick", "annotation"])
def test_a_character_that_no_font_has_is_an_error_that_names_it(text, told, place):
    with plots.canvas() as (figure, axes):
        if place == "title":
            axes.set_title(text)
        elif place == "tick":
            axes.set_xticks([0.5], [text])
        else:
            axes.annotate(text, (0.5, 0.5))
    with pytest.raises(CourseError, match=told) as caught:
        plots.bundle(figure, "A figure with a text.")
    assert "plots.readable" in str(caught.value) and "\n" not in str(caught.value)


def test_other_warnings_stay_warnings():
    with plots.canvas() as (figure, axes):
        axes.set_title("plain")
        figure.draw = lambda *args, draw=figure.draw: warnings.warn("something else", stacklevel=1) or draw(*args)
    with pytest.warns(UserWarning, match="something else"):
        assert plots.png(figure)


def test_a_lesson_draws_in_no_other_way():
    """Each of its figures goes through ``plots.png``, which finds boxes."""
    for path in (course_dir() / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                assert not re.search(r"pyplot|savefig|plt\.|rcParams|use\(", "".join(cell["source"])), cell["id"]


# --- One style --------------------------------------------------------------------------------------------------------

# What a linear colour becomes for the three forms of colour blindness in full (Machado et al. 2009, severity 1).
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def cielab(colour, matrix):
    """Lightness and two colour axes, in which distances are about what people see (2.3 is just noticeable)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (np.array(matrix) @ linear).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_curves_are_told_apart_by_everyone(blindness):
    """Up to four curves in a figure: each differs from the others, and from the white of the page."""
    seen = [cielab(colour, BLINDNESS[blindness]) for colour in (*plots.COLOURS[:4], "white")]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 10
    with plots.canvas() as (_, axes):
        plots.lines(axes, [0, 1], {str(i): [0, i] for i in range(4)}, title="t", xlabel="x", ylabel="y")
    assert [line.get_color() for line in axes.lines] == list(plots.COLOURS[:4])
    assert len({line.get_linestyle() for line in axes.lines}) == 4  # and without any colour


def test_red_and_green_would_not_pass():
    """The control of the test above."""
    red, green = (cielab(colour, BLINDNESS["deuteranopia"]) for colour in ("#8B6914", "#6B8E23"))
    assert np.linalg.norm(red - green) < 10


def test_every_text_can_be_read_from_the_back_row():
    """No text is smaller than 10 points, in figures that are at most 9.6 inches wide."""
    figures = [poem_figure()]
    with plots.canvas() as (figure, axes):
        plots.probability_bars(axes, torch.tensor([0.5, 0.3]), ["a", "b"], "t", torch.tensor([True, False]))
    figures.append(figure)
    live = widgets.LiveFigure(
        2, None, lambda axes: plots.scatter(axes, RAMP.view(-1, 2)), title="t", ylabel="y", alt="a"
    )
    for step in (1, 2):
        live._keep(step, {"a": 1.0, "b": 2.0})
    figures.append(live._figure("after 2 steps"))
    for figure in figures:
        plots.png(figure)
        sizes = {text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()}
        assert min(sizes) >= 10, sizes


def test_the_poems_can_be_drawn():
    """All of the two anthologies, and nearly all of the rare characters of the large collection."""
    for name in ("tang300", "song100"):
        assert "〓" not in plots.readable(verified_bytes(f"poems/{name}.txt").decode("utf-8").replace("\n", ""))
    counts = Counter(verified_bytes("poems/tang_regulated.txt.gz").decode("utf-8"))
    missing = {c: n for c, n in counts.items() if plots.readable(c) == "〓"}
    assert len(missing) < 80 and sum(missing.values()) < 1e-3 * counts.total()


@pytest.mark.parametrize(
    ("token", "drawn"),
    [
        (" the", "␣the"),
        ("\n", "⏎"),
        ("$5 and $6", r"\$5␣and␣\$6"),
        ("\ufffd", "\ufffd"),
        ("𰬸人\0", "〓人〓"),
        ("", ""),
    ],
)
def test_a_token_is_made_readable(token, drawn):
    assert plots.readable(token) == drawn


# --- Attention and next-token distributions ---------------------------------------------------------------------------


def texts(labels):
    return [label.get_text() for label in labels]


@pytest.mark.parametrize(("tokens", "rotation"), [(list("春眠不"), 0), (["First", " Citizen", ":"], 90)])
def test_an_attention_map_has_queries_as_rows_and_keys_as_columns(tokens, rotation):
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.2, 0.3]], requires_grad=True)
    with plots.canvas() as (figure, axes):
        plots.attention_map(axes, weights, tokens, "Only the past is seen")
    image = axes.images[0]
    assert np.allclose(image.get_array(), weights.detach()) and image.get_clim() == (0, 1)
    assert tuple(image.get_extent()) == (-0.5, 2.5, 2.5, -0.5)  # row 0 on top
    expected = [token.replace(" ", "␣") for token in tokens]
    assert texts(axes.get_xticklabels()) == texts(axes.get_yticklabels()) == expected
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {rotation}
    assert (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) == (
        "Only the past is seen",
        "attended to",
        "attending",
    )
    assert len(figure.axes) == 2 and figure.axes[1].get_ylabel() == "attention weight"
    with plots.canvas() as (_, axes):
        plots.attention_map(axes, weights / 4, tokens, "Paler", top=0.5)
    assert axes.images[0].get_clim() == (0, 0.5)
    with pytest.raises(CourseError, match="2 tokens .* 3 positions"), plots.canvas() as (_, axes):
        plots.attention_map(axes, weights, ["a", "b"], "t")


def test_probability_bars_show_each_probability_and_grey_out_what_was_filtered():
    p, kept = torch.tensor([0.5, 0.3, 0.1]), torch.tensor([True, True, False])
    with plots.canvas() as (_, axes):
        plots.probability_bars(axes, p, ["。", " a", "$"], "top-k of 2", kept)
    bars = axes.containers[0]
    assert np.allclose([bar.get_width() for bar in bars], p)
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars]
    assert colours[0] == colours[1] == plots.COLOURS[0].lower() != colours[2] == plots.GREY.lower()
    assert texts(axes.get_yticklabels()) == ["。", "␣a", r"\$"] and axes.yaxis_inverted()
    assert texts(axes.texts) == ["0.500", "0.300", "0.100"]
    assert texts(axes.get_legend().get_texts()) == ["kept", "filtered out"]
    for handle, colour in zip(axes.get_legend().legend_handles, (colours[0], colours[2]), strict=True):
        assert matplotlib.colors.to_hex(handle.get_facecolor()) == colour


@pytest.mark.parametrize("kept", [None, torch.tensor([True, True])])
def test_bars_of_which_none_was_filtered_need_no_legend(kept):
    with plots.canvas() as (_, axes):
        plots.probability_bars(axes, torch.tensor([0.9, 0.1]), ["a", "b"], "t", kept)
    assert axes.get_legend() is None


def test_bars_without_their_labels_are_refused():
    with pytest.raises(CourseError, match="2 probabilities, 1 labels"), plots.canvas() as (_, axes):
        plots.probability_bars(axes, torch.tensor([0.9, 0.1]), ["a"], "t")
