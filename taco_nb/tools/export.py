"""`taco-nb export out/01_baseline.ipynb` writes an executed notebook as one HTML file that opens without a network.

nbconvert lays out the page, and it embeds the pictures of the text. It would still fetch MathJax, require.js and a widget
manager, and no option embeds these. So formulas become MathML, which browsers set by themselves; plotly's script is put
into the page once; and in place of a widget, which needs a kernel, stands the static picture that it also gives.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from jinja2 import pass_context
from math_core import LatexError, LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from taco_nb.errors import DataError
from taco_nb.files import atomic_write

_PLOTLY, _WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
_PICTURES = ("image/png", "image/jpeg")
"""The first of them is lossless, and taken where an output has both."""
_PLOTLY_SCRIPT = re.compile(r"<script[^>]*>\s*/\*\*\s*\* plotly\.js v\d.*?</script>", re.DOTALL)
"""The whole of plotly, which its notebook renderer puts into an output."""
_SCRIPT = re.compile(r"<script.*?</script>", re.DOTALL)
_TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_js -%}{{ resources.plotly_script }}{%- endblock -%}
{%- block html_head_css -%}
<style>.jp-OutputArea-output, .jp-InputArea-editor, .jp-InputArea-editor pre {overflow-x: auto}</style>
{%- endblock -%}
{%- block data_latex scoped -%}
<div class="jp-RenderedHTMLCommon jp-OutputArea-output">{{ output.data['text/latex'] | markdown2html }}</div>
{%- endblock -%}
"""
_LINK = re.compile(r"""(<a [^>]*\bhref=["'][\w./-]+)\.ipynb(?=["'#])""")
"""A link to another notebook, which leads to its page here. An address with a scheme has a colon, and is left alone."""
_FETCHING = ("src", "data", "poster", "background", "href", "xlink:href")
"""The attributes that name what a page fetches. A link's `href` is only followed on a click, and may lead anywhere."""
_CANDIDATE = re.compile(r"[\s,]*(\S*[^\s,])(?:,|[^,]*)")
"""One entry of a srcset: an address, perhaps followed by a width or density."""
_FETCHING_CSS = re.compile(r"""@import\s|url\((?!\s*(?:["']?\s*(?:data:|#|\))|""|''))""", re.IGNORECASE)
"""CSS that fetches: any @import, and any url(...) but an embedded one, one into the page itself, and an empty one."""


def export_html(notebook_path: str | os.PathLike, html_path: str | os.PathLike | None = None) -> Path:
    """Write an executed notebook as one HTML file, and return its path: `html_path`, or beside the notebook.

    Figures stay interactive. Every picture has an alternative text: its own (`IPython.display.Image(..., alt=...)`) or the
    heading above it. Raises `DataError` for a file that is no notebook, for a formula that cannot be turned into MathML, and
    for HTML or CSS that would fetch something (what scripts do is not examined); an older file at `html_path` then stays.
    """
    source = Path(notebook_path)
    target = source.with_suffix(".html") if html_path is None else Path(html_path)
    try:
        notebook = nbformat.read(source, as_version=4)
    except FileNotFoundError:
        raise DataError(f"There is no notebook {source}.") from None
    except Exception as error:  # nbformat passes on whatever JSON and its schema raise
        raise DataError(f"{source} cannot be read as a notebook: {str(error).splitlines()[0]}") from None
    resources = {"metadata": {"name": source.stem, "path": str(source.resolve().parent)}}
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    draws = any(_PLOTLY in data or "Plotly.newPlot" in data.get("text/html", "") for data in outputs)
    resources["plotly_script"] = f"<script>{get_plotlyjs()}</script>" if draws else ""
    headings = _make_static(notebook)
    notebook.metadata["title"] = headings[0] if headings else source.stem
    notebook.metadata.pop("widgets", None)
    try:
        page, _ = _Exporter().from_notebook_node(notebook, resources)
        page = _LINK.sub(r"\1.html", page)
        _refuse_fetching(BeautifulSoup(page, "html.parser"))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    with atomic_write(target, "w") as file:
        file.write(page)
    return target


def _make_static(notebook: NotebookNode) -> list[str]:
    """Leave in each output what a page without kernel and network can show, and return the notebook's headings."""
    headings: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#+\s+(.+?)\s*$", cell.source, re.MULTILINE)
            headings += [re.sub(r"[`*$\\]", "", heading) for heading in found]
        elif cell.cell_type == "code":
            where = headings[-1] if headings else "picture"
            cell.outputs = [kept for output in cell.outputs for kept in _static(output, where)]
    return headings


def _static(output: NotebookNode, where: str) -> Iterator[NotebookNode]:
    """Yield the output as a page can show it, under the heading `where`, or nothing if it cannot."""
    data = output.get("data", {})
    if _PLOTLY in data:
        data = output.data = {"text/html": _figure(data[_PLOTLY], where)}
    elif data.pop(_WIDGET, None) is not None and data.keys() <= {"text/plain"}:
        return  # a progress bar, or another widget whose only text is the name of its Python class
    elif _PLOTLY_SCRIPT.search(data.get("text/html", "")):
        data["text/html"] = _PLOTLY_SCRIPT.sub("", data["text/html"])
        if not _SCRIPT.sub("", data["text/html"]).strip():
            return
    if "text/html" not in data:  # nbconvert prefers HTML, and gives its own pictures no alternative text
        svg, kind = data.get("image/svg+xml"), next((kind for kind in _PICTURES if kind in data), "")
        alt = html.escape(output.get("metadata", {}).get(kind, {}).get("alt", where), quote=True)
        if svg:  # in the page itself, so that its text can be searched and read aloud
            picture = f'<div role="img" aria-label="{alt}">{svg[svg.index("<svg") :]}</div>'
            output.data = {"text/html": picture}
        elif kind:
            code = data[kind].replace("\n", "")
            output.data = {"text/html": f'<img alt="{alt}" src="data:{kind};base64,{code}"/>'}
    yield output


def _figure(figure: dict[str, Any], where: str) -> str:
    title = figure.get("layout", {}).get("title", {}).get("text") or where
    code = to_html(
        {"data": figure.get("data", []), "layout": figure.get("layout", {})},
        include_plotlyjs=False, include_mathjax=False, full_html=False, default_width="100%", validate=False,
    )  # fmt: skip
    return f'<div role="figure" aria-label="{html.escape(title, quote=True)}">{code}</div>'


class _Renderer(IPythonRenderer):
    """Renders Markdown as nbconvert does, but with formulas as MathML."""

    def block_math(self, body: str) -> str:
        return _mathml(body, block=True)

    def inline_math(self, body: str) -> str:
        return _mathml(body, block=False)

    def latex_environment(self, name: str, body: str) -> str:
        return _mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", block=True)

    def block_html(self, html: str) -> str:
        """Leave HTML as it is. nbconvert would close a <details> where its first block ends, and show what is in it."""
        return html


def _mathml(code: str, block: bool) -> str:
    try:
        return LatexToMathML(fancy_error=False).convert_with_local_state(code.strip(), displaystyle=block)
    except LatexError as error:
        raise DataError(f"the formula {code.strip()!r} cannot be turned into MathML: {error}") from None


class _Exporter(HTMLExporter):
    """nbconvert's exporter, with our template and our renderer."""

    raw_template = _TEMPLATE

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        path = context["resources"]["metadata"]["path"]
        how = {"escape": False, "embed_images": True, "exclude_anchor_links": True}
        return MarkdownWithMath(renderer=_Renderer(attachments=attachments, path=path, **how)).render(source)


def _refuse_fetching(page: BeautifulSoup) -> None:
    """Raise `DataError` if the page's HTML or CSS names something that is not in the page."""
    addresses, styles = [], [style.string or "" for style in page("style")]
    for tag in page(True):
        attributes = {} if tag.name in ("a", "area") else tag.attrs
        addresses += [attributes[name].strip() for name in _FETCHING if attributes.get(name)]
        addresses += _CANDIDATE.findall(attributes.get("srcset") or "")
        styles.append(tag.get("style") or "")
    fetched = [one for one in addresses if one and not one.lower().startswith(("data:", "#"))]
    fetched += [style for style in styles if _FETCHING_CSS.search(style)]
    if fetched:
        raise DataError(f"the page would fetch {fetched[0][:200]!r}, and cannot without a network. Embed it.")
