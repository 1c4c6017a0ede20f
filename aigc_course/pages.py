"""Notebooks as pages that read offline, equations included, and the index that links them."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime import CourseError, course_dir

if TYPE_CHECKING:
    from nbformat import NotebookNode

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MATHJAX_SETTINGS = (
    r"window.MathJax = {tex: {inlineMath: [['$', '$'], ['\\(', '\\)']], displayMath: [['$$', '$$'], ['\\[', '\\]']], "
    r"processEscapes: true, tags: 'ams'}, options: {enableMenu: false}};"
)
# JupyterLab's own look, less what a page would fetch, plus the alt text that stands in an output's metadata.
PAGE_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}<script src="mathjax.js"></script>{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>
/* MathJax's MathML for screen readers is taller than the picture of the formula. */
.jp-MarkdownOutput.jp-RenderedHTMLCommon { overflow: auto hidden; }
.jp-InputArea-editor { overflow: auto; }
/* The template gives code in rendered Markdown, such as the source that show() prints, the font of its text. */
.jp-RenderedHTMLCommon .highlight pre { font: 12px/1.4 monospace; }
</style>{% endblock %}
{% block data_png scoped %}
{%- set alt = output | get_metadata('alt', 'image/png') or '' -%}
{{ super() | replace('<img ', '<img alt="' ~ (alt | escape_html) ~ '" ') }}
{% endblock %}
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one lesson went: its executed notebook, the figures that it recorded, and one line of error if it failed."""

    lesson: str
    title: str
    notebook: Path
    seconds: float
    peak_mb: float
    passed: bool
    error: str = ""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


def render(notebook: Path, page: Path) -> None:
    """Write ``notebook`` as the HTML ``page``, with MathJax beside it: nothing is loaded from elsewhere."""
    from importlib.metadata import distribution

    from nbconvert import HTMLExporter

    nb = read_notebook(notebook)
    nb.metadata.pop("widgets", None)  # its mere presence makes the template load a widget manager
    nb.metadata.title = title_of(nb, notebook.stem)
    for cell in nb.cells:
        settle_outputs(cell)
    exporter = HTMLExporter(raw_template=PAGE_TEMPLATE, embed_images=True)
    resources = {"metadata": {"path": str(course_dir() / "notebooks")}}
    text, _ = exporter.from_notebook_node(nb, resources)
    text = re.sub(r'(href="\d\d_[\w.-]*)\.ipynb(["#])', r"\1.html\2", text)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    # The component draws equations as SVG and holds every TeX extension, so that it never loads a second file.
    component = "sphinx-mathjax-offline/static/mathjax/tex-svg-full.js"
    mathjax = Path(distribution("sphinx-mathjax-offline").locate_file(component)).read_text(encoding="utf-8")
    (page.parent / "mathjax.js").write_text(f"{MATHJAX_SETTINGS}\n{mathjax}", encoding="utf-8")


def index_page(results: Sequence[Result], out: Path) -> Path:
    """Write ``out/index.html``: a table with one row per lesson, linked to its page. Returns its path."""
    rows = []
    for result in results:
        figures = "<br>".join(html.escape(figure_line(name, fig)) for name, fig in result.figures.items())
        verdict = '<td class="pass">passed</td>' if result.passed else '<td class="fail">FAILED</td>'
        error = f"<p><code>{html.escape(result.error)}</code></p>" if result.error else ""
        link = f'<a href="{html.escape(result.lesson)}.html">{html.escape(result.title)}</a>'
        numbers = f'<td class="n">{result.seconds:.1f}</td><td class="n">{result.peak_mb:.0f}</td>'
        rows.append(f'<tr><th scope="row">{link}{error}</th>{verdict}{numbers}<td>{figures}</td></tr>')
    path = Path(out) / "index.html"
    path.write_text(INDEX.replace("ROWS", "\n".join(rows)), encoding="utf-8")
    return path


def read_notebook(path: Path) -> "NotebookNode":
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise CourseError(f"{path} is not a notebook that can be read: {first_line(str(error))}") from error


def title_of(nb: "NotebookNode", fallback: str) -> str:
    """The first heading of the notebook."""
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^#+ +(.+?) *#*$", cell.source, re.MULTILINE)):
            return match[1]
    return fallback


def first_line(text: str) -> str:
    return (text.strip() or "no message").splitlines()[0]


def figure_line(name: str, figure: dict[str, Any]) -> str:
    line = f"{name}: {figure['value']:.4g} {figure.get('unit', '')}".rstrip()
    if figure.get("low") is not None and figure.get("high") is not None:
        line += f" (band {figure['low']:.4g} to {figure['high']:.4g})"
    return line


def settle_outputs(cell: "NotebookNode") -> None:
    """Drop live widget views, and join the pieces that a kernel's timing has cut a stream into."""
    settled = []
    for output in cell.get("outputs", []):
        if output.get("data", {}).pop(WIDGET_VIEW, None) is not None and not output.data:
            continue
        if output.output_type == "stream" and settled and settled[-1].get("name") == output.name:
            settled[-1].text += output.text
        else:
            settled.append(output)
    if "outputs" in cell:
        cell.outputs = settled


INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AIGC: the course</title>
<style>
:root { color-scheme: light dark; --good: light-dark(#0b6b3a, #6fd39b); --bad: light-dark(#b00020, #ff8a9a); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .5rem .75rem; border-bottom: 1px solid #8886; }
th p { margin: .25rem 0 0; font-weight: normal; overflow-wrap: anywhere; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.pass { color: var(--good); }
.fail { color: var(--bad); font-weight: bold; }
</style>
</head>
<body><main><h1>AIGC: generative models from theory to practice</h1>
<table><thead><tr><th scope="col">Lesson</th><th scope="col">Result</th><th scope="col" class="n">Seconds</th>
<th scope="col" class="n">Peak memory, MB</th><th scope="col">Recorded figures</th></tr></thead>
<tbody>
ROWS
</tbody></table></main></body>
</html>
"""
