"""An exported notebook is one file that needs neither network nor kernel, and lacks nothing that the notebook showed."""

from __future__ import annotations

import re

import bs4
import nbformat
import pytest
from conftest import command
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from taco_nb.errors import DataError
from taco_nb.files import REPOSITORY
from taco_nb.tools.export import export_html

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CELLS = [
    'import pandas as pd, plotly.express as px\nfrom PIL import Image\nfrom IPython.display import SVG, Latex, display\n'
    'from taco_nb.notebook import check_parameters\nprofile = "sample"\np = check_parameters(globals())',
    'px.line(x=[1, 2], y=[3, 4], title="a curve & more")',
    "px.line(x=[1, 2], y=[4, 3])",
    'Image.new("RGB", (40, 30), "blue")',
    'import IPython\nIPython.display.Image(Image.new("RGB", (9, 9))._repr_png_(), alt="a \\"dog\\"")',
    """SVG('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>')""",
    'from taco_nb.widgets import sortable\nsortable(pd.DataFrame({"codec": ["demo"], "psnr": [31.25]}))',
    "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), desc='bar'): pass",
    "import ipywidgets\nclass Both(ipywidgets.IntSlider):\n    def _repr_mimebundle_(self, **kwargs):\n"
    "        return {**super()._repr_mimebundle_(**kwargs), 'text/html': '<b>the static one</b>'}\nBoth()",
    r"Latex(r'$\frac{1}{2}$')",
]  # fmt: skip

PAGE_LINK = '<a class="x" href="04_keywords.ipynb#cell-id=b">there</a>'


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A notebook with one of everything, run by a kernel; the soup of its page, and the page."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "cat.png").write_bytes((REPOSITORY / "data/sample/images/chelsea.png").read_bytes())
    text = "# The $\\lambda$ of it\n\n$$\\sum_i x_i$$\n\n![a cat](cat.png) and [a link](https://arxiv.org/abs/2403.02944)"
    notebook = new_notebook(cells=[new_markdown_cell(text), *map(new_code_cell, CELLS)])
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    nbformat.write(notebook, folder / "all.ipynb")
    page = export_html(folder / "all.ipynb").read_text(encoding="utf-8")
    return bs4.BeautifulSoup(page, "html.parser"), page, notebook


def test_a_link_to_another_notebook_leads_to_its_page(tmp_path):
    text = "[one](05_timing.ipynb#cell-id=a) [two](https://example.org/x.ipynb) `<a href='b.ipynb'>`"
    cells = [
        new_markdown_cell(text),
        new_code_cell("", outputs=[new_output("display_data", {"text/html": PAGE_LINK})]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    soup = bs4.BeautifulSoup(export_html(tmp_path / "a.ipynb").read_text(encoding="utf-8"), "html.parser")
    links = [a["href"] for a in soup("a")]
    assert links == ["05_timing.html#cell-id=a", "https://example.org/x.ipynb", "04_keywords.html#cell-id=b"]
    assert "b.ipynb" in soup.select_one("code").get_text()


def test_an_answer_stays_folded_with_the_code_in_it(tmp_path):
    text = "1. Why?\n\n<details><summary>Answers</summary>\n\n1. Because.\n\n```python\nprint(1)\n```\n\n</details>\n"
    nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), tmp_path / "a.ipynb")
    soup = bs4.BeautifulSoup(export_html(tmp_path / "a.ipynb").read_text(encoding="utf-8"), "html.parser")
    (folded,) = soup.select("details")
    assert "Because." in folded.get_text() and folded.select("pre") and "Why?" not in folded.get_text()


def test_nothing_is_fetched(exported):
    soup, page, _ = exported
    for tag in soup.find_all(True):
        for name in ("src", "href", "data", "srcset", "poster", "xlink:href"):
            address = tag.get(name, "data:")
            assert tag.name == "a" or address.startswith(("data:", "#")), tag
    assert not re.search(
        r"@import|url\(\s*['\"]?(?!data:|#|['\")])", "".join(s.get_text() for s in soup("style"))
    )
    own = [script.get_text() for script in soup("script") if len(script.get_text()) < 1_000_000]
    assert not any("http" in script.replace("http://www.w3.org", "") for script in own)
    assert "cdn" not in "".join(own).lower()


def test_plotly_is_there_once(exported):
    soup, page, _ = exported
    large = [script for script in soup("script") if "plotly.js v" in script.get_text()[:200]]
    assert len(large) == 1 and large[0].parent.name == "head"
    assert page.count("Plotly.newPlot(") - large[0].get_text().count("Plotly.newPlot(") == 2


def test_every_figure_and_picture_is_there_with_a_text(exported):
    soup, _, _ = exported
    assert [tag["aria-label"] for tag in soup.select("[role=figure]")] == [
        "a curve & more",
        "The lambda of it",
    ]
    assert [img["alt"] for img in soup("img")] == ["a cat", "The lambda of it", 'a "dog"']
    assert {img["src"][:27] for img in soup("img")} == {"data:image/png;base64,iVBOR"}
    assert len(soup("circle")) == 1
    assert [cell.get_text() for cell in soup.select("table td")] == ["demo", "31.250"]


def test_widgets_become_what_they_look_like(exported):
    soup, page, notebook = exported
    assert "widgets" in notebook.metadata, "the kernel did make widgets"
    assert "the static one" in soup.get_text()
    assert "widget-view" not in page and "widget-state" not in page and "IntSlider(" not in page
    assert "HBox" not in page


def test_formulas_are_mathml(exported):
    soup, _, _ = exported
    assert len(soup("math")) == 3
    assert soup.find("mfrac") and soup.find("munder")
    said = [tag.get_text() for tag in soup.select(".jp-MarkdownCell, .jp-OutputArea-output")]
    assert not re.search(r"\$|\\frac|\\sum", "".join(said))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_formula_of_the_notebooks(path, tmp_path):
    soup = bs4.BeautifulSoup(
        export_html(path, tmp_path / "a.html").read_text(encoding="utf-8"), "html.parser"
    )
    said = " ".join(cell.get_text() for cell in soup.select(".jp-MarkdownCell"))
    assert not re.search(r"\$|\\[a-z]+\b", said)
    sources = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", "\n".join(sources), re.DOTALL)
    assert len(soup("math")) == len(formulas)
    assert soup.title.get_text() == re.search(r"# (.*)", sources[0])[1]


def written(tmp_path, *cells):
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    return tmp_path / "a.ipynb"


def fetched(html):
    return new_code_cell("1", outputs=[new_output("display_data", data={"text/html": html})])


@pytest.mark.parametrize(
    "cell, said",
    [
        (new_markdown_cell(r"$\notacommand{x}$"), r"notacommand.*MathML"),
        (new_markdown_cell("![x](nowhere.png)"), "would fetch 'nowhere.png'"),
        (
            fetched('<script src="https://cdn.example/x.js"></script>'),
            "would fetch 'https://cdn.example/x.js'",
        ),
        (fetched("<style>@import 'https://x.example/a.css'</style>"), "would fetch"),
        (fetched("<style>a {background: url(https://x.example/a.png)}</style>"), "would fetch"),
        (fetched("<p style=\"background: URL('https://x.example/a.png')\">"), "would fetch"),
        (
            fetched('<img srcset="data:image/png;base64,AA== 1x,https://x.example/a.png 2x">'),
            "would fetch 'https://x",
        ),
        (fetched('<video poster="a.png"></video>'), "would fetch 'a.png'"),
        (
            fetched('<svg><image href="https://x.example/a.png"/></svg>'),
            "would fetch 'https://x.example/a.png'",
        ),
        (fetched('<svg><image xlink:href="a.png"/></svg>'), "would fetch 'a.png'"),
    ],
    ids=["formula", "picture", "script", "import", "background", "style", "srcset", "poster", "svg", "xlink"],
)
def test_what_would_need_a_network_is_refused(cell, said, tmp_path):
    path = written(tmp_path, cell)
    (tmp_path / "a.html").write_text("before")
    with pytest.raises(DataError, match=f"a.ipynb: .*{said}"):
        export_html(path)
    assert (tmp_path / "a.html").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.ipynb"]


def test_what_needs_no_network_is_kept(tmp_path):
    html = (
        """<img src=""><img src=" data:image/gif;base64,AA=="><img srcset="data:image/gif;base64,AA== 1x,">"""
        """<p style="background: url('data:image/gif;base64,AA=='); mask: url( #a ), url()">"""
        """<style>p {background: url("data:image/gif;base64,AA==")}</style>"""
        """<a href="https://arxiv.org"></a><svg><use href="#a"/></svg>"""
    )
    assert "mask: url( #a )" in export_html(written(tmp_path, fetched(html))).read_text(encoding="utf-8")


def test_a_figure_that_brings_plotly_along_keeps_its_picture(tmp_path):
    import plotly.graph_objects as go

    own = go.Figure(go.Scatter(y=[1, 2])).to_html(full_html=False, include_plotlyjs=True)
    page = export_html(written(tmp_path, fetched(own))).read_text(encoding="utf-8")
    assert page.count("* plotly.js v") == 1 and "plotly-graph-div" in page


def test_files_that_are_no_notebooks(tmp_path, capsys):
    with pytest.raises(DataError, match="There is no notebook"):
        export_html(tmp_path / "a.ipynb")
    (tmp_path / "a.ipynb").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a notebook"):
        export_html(tmp_path / "a.ipynb")
    assert command("export", tmp_path / "a.ipynb") == 1
    assert "cannot be read as a notebook" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    path = written(tmp_path, new_markdown_cell("# Here"))
    assert command("export", path) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert "<h1" in (tmp_path / "a.html").read_text(encoding="utf-8")
