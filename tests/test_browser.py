"""The notebooks in a real JupyterLab, read by a browser, where the widgets do what a reader asks of them."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import nbformat
import pytest
from browser import CHROMIUM, chromium, swipe
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from taco_nb import datasets, load
from taco_nb.files import REPOSITORY

NOTEBOOKS = ("01_baseline", "03_linformer")
PATIENCE = 500  # seconds, less than pytest's own limit: a busy machine is no fault
KEPT = (
    "profile: str", "# Parameters", "check_parameters(", "codec.encode(sample", "made = {", "compare(sample.image",
    "caption_lab(", "upload_box(", "explorer(", "look_at_attention(", "low_rank_sheet(", "where_the_text_looks(",
)  # fmt: skip
"""In the cells that widgets need. The others measure and train for minutes, and papermill runs them elsewhere."""
MEASURED = """from taco_nb import evaluate
from taco_nb.evaluation import evaluate_peers
results = evaluate(codec, sets, p.runs / "evaluation")
runs, after, curves, context, title = {}, results[:0], evaluate_peers(sets, folder=p.peers), {}, "kodak"
"""
"""What the explorer asks of the cells that are left out."""
QUIET = {  # Lab asks whether it may fetch news, which a test has no answer to
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/apputils-extension/themes": {"theme": "JupyterLab Light"},
}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """JupyterLab on a port of its own, with a notebook of the cells that widgets need: the notebook's address."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    home = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook()
    for name in NOTEBOOKS:
        given = {"profile": "sample", "eval_limit": 1, "out_dir": str(home / "runs")}
        whole = parameterize_notebook(
            load_notebook_node(str(REPOSITORY / "notebooks" / f"{name}.ipynb")), given
        )
        notebook.metadata = whole.metadata
        notebook.cells += [cell for cell in whole.cells if any(words in cell.source for words in KEPT)]
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
        cell.source = MEASURED * ("explorer(" in cell.source) + cell.source
    nbformat.write(notebook, home / "widgets.ipynb")
    for name, settings in QUIET.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    port, token = free_port(), secrets.token_hex(8)
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_DATA_DIR": str(home / "data"), "IPYTHONDIR": str(home / "ipython"),
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--ServerApp.root_dir={home}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}"]  # fmt: skip
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, (home / "server.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/widgets.ipynb?token={token}&reset"
    finally:
        process.terminate()  # Lab shuts its kernels down
        process.wait()


@pytest.fixture(scope="module")
def errors() -> list[str]:
    """What the browser's console has said of errors so far."""
    return []


@pytest.fixture(scope="module")
def lab(server, errors) -> Iterator[Any]:
    """The page of the notebook, in which all cells have run."""
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda said: (
                errors.append(f"{said.text} ({said.location['url']})") if said.type == "error" else None
            ),
        )
        page.goto(server)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function(
            "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
        )
        page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_until_run(page)
        yield page


def expect_soon(page: Any, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is true in the page."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(100)


def cells(page: Any) -> list[dict]:
    """The notebook as it stands in the browser: its cells, outputs included."""
    return page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells")


def wait_until_run(page: Any, timeout: float = PATIENCE) -> None:
    """Wait for the end of all cells, or for the first error of one."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        code = [cell for cell in cells(page) if cell["cell_type"] == "code" and "".join(cell["source"])]
        failed = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
        assert not failed, failed
        idle = page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
        if idle and all(cell["execution_count"] for cell in code):
            return
        page.wait_for_timeout(1000)
    raise AssertionError(f"not all cells had run after {timeout} s")


def output_of(page: Any, source: str) -> Any:
    """The output area of the cell whose code has `source` in it, scrolled into view."""
    found = [
        i
        for i, cell in enumerate(cells(page))
        if cell["cell_type"] == "code" and source in "".join(cell["source"])
    ]
    page.evaluate(f"jupyterapp.shell.currentWidget.content.scrollToItem({found[0]}, 'start')")
    cell = page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{found[0]}"]')
    cell.locator(".jp-OutputArea-output").first.wait_for()
    return cell


def test_the_handle_is_dragged_and_moved_by_keys(lab):
    compare = output_of(lab, "compare(sample.image").locator(".taco-compare")
    swipe(lab, compare, 0.3)
    handle = compare.locator(".tc-handle")
    handle.focus()
    for key, moved in (("ArrowRight", 2), ("ArrowLeft", -2), ("Shift+ArrowRight", 10)):
        before = float(handle.get_attribute("aria-valuenow"))
        lab.keyboard.press(key)
        assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(before + moved, abs=1)
    assert handle.evaluate("node => node === document.activeElement"), "Lab left the keys to the handle"


def test_pictures_zoom_together_and_subtract(lab):
    compare = output_of(lab, "compare(sample.image").locator(".taco-compare")
    compare.get_by_role("button", name="Zoom in").click()
    scenes = compare.locator(".tc-left .tc-scene, .tc-right .tc-scene")
    transforms = scenes.evaluate_all("nodes => nodes.map(node => getComputedStyle(node).transform)")
    assert len(set(transforms)) == 1 and "1.5" in transforms[0]
    compare.get_by_role("button", name="Difference").click()
    largest = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
                 .filter((_, i) => i % 4 < 3).reduce((most, value) => Math.max(most, value))"""
    canvas = compare.locator(".tc-difference canvas")
    expect_soon(lab, lambda: canvas.evaluate(largest) > 40)
    compare.get_by_label("where the bits went").check()
    assert compare.locator(".tc-difference .tc-bits").is_visible()
    compare.get_by_label("where the bits went").uncheck()
    compare.get_by_title("Back to the whole picture").click()
    compare.get_by_role("button", name="Swipe").click()


def test_an_edited_caption_changes_the_bits(lab):
    cell = output_of(lab, "caption_lab(")
    cell.locator(".taco-compare .tc-stage").wait_for()
    row = cell.locator("tr", has_text="OFA").first
    before = row.locator("td").nth(2).inner_text()
    text = cell.locator("input[type=text]")
    text.fill("two dogs run over a snowy field")
    text.press("Enter")
    new = cell.locator("tr", has_text="your own, 1")
    new.wait_for()
    caption = "two dogs run over a snowy field"
    sample = datasets("kodak")[0][0]
    file = load("demo").encode(sample.image, caption)
    assert new.locator("td").nth(2).inner_text() == f"{len(file):,}" != before
    assert f"{len(file):,} bytes" in cell.locator(".taco-compare .tc-caption").nth(1).inner_text()
    cell.get_by_role("button", name="empty").click()
    cell.locator(".tc-foot", has_text="this caption: empty").wait_for()


def test_a_picture_of_ones_own_becomes_a_file(lab, tmp_path):
    cell = output_of(lab, "upload_box(")
    image = datasets("sample")[0][2].image.crop((0, 0, 200, 150))
    image.save(tmp_path / "mine.png")
    with lab.expect_file_chooser() as chooser:
        cell.get_by_role("button", name="Picture").click()
    chooser.value.set_files(tmp_path / "mine.png")
    cell.locator("input[type=text]").fill("a cup")
    cell.locator("input[type=text]").press("Tab")
    cell.get_by_role("button", name="Encode").click()
    link = cell.get_by_role("link", name="Download mine.taco")
    link.wait_for()
    with lab.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "mine.taco")
    codec = load("demo")
    assert (tmp_path / "mine.taco").read_bytes() == codec.encode(image, "a cup")
    cell.locator(".taco-compare .tc-stage").wait_for()


def test_a_click_on_a_point_opens_its_image(lab):
    cell = output_of(lab, "explorer(")
    point = cell.locator(".js-plotly-plot .scatterlayer .trace .points path").first
    point.wait_for()
    point.scroll_into_view_if_needed()
    lab.wait_for_timeout(1000)  # the listener looks for the figure twice a second
    box = point.bounding_box()
    lab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    lab.locator(".hoverlayer .hovertext", has_text="kodim01.png").first.wait_for()
    lab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    cell.locator(".taco-compare .tc-stage").wait_for()
    assert "kodim01.png" in cell.inner_text()


def test_a_token_is_picked(lab):
    look = output_of(lab, "where_the_text_looks(").locator(".taco-attention")
    canvas = look.locator("canvas").first
    tokens = look.locator(".ta-tokens button")
    drawn = set()
    for token in ("brick", "doors"):
        tokens.get_by_text(token, exact=True).click()
        assert look.locator("button[aria-pressed=true]").inner_text() == token
        assert f"token {token}" in canvas.get_attribute("aria-label")
        drawn.add(canvas.evaluate("node => node.toDataURL()"))
    assert len(drawn) == 2
    assert look.locator(".ta-pane").count() == 2, "softmax beside Linformer"


def test_the_console_has_no_errors(lab, errors):
    assert errors == []
