"""Debian's Chromium, driven by Playwright, for the tests that need to see what a reader sees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync"]  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; without one on this machine the test is skipped, saying so."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press the mouse at one place and let go at another."""
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=5)
    page.mouse.up()


def swipe(page: Any, compare: Any, share: float) -> None:
    """Drag the handle of a `compare` to a share of its width, and see that the boundary went along."""
    handle, stage = compare.locator(".tc-handle"), compare.locator(".tc-stage")
    stage.scroll_into_view_if_needed()
    box, grip = stage.bounding_box(), handle.bounding_box()
    middle = grip["y"] + grip["height"] / 2
    drag(page, (grip["x"] + grip["width"] / 2, middle), (box["x"] + share * box["width"], middle))
    assert abs(float(handle.get_attribute("aria-valuenow")) - 100 * share) <= 1
    clip = compare.locator(".tc-right").evaluate("node => getComputedStyle(node).clipPath")
    assert abs(float(clip.removesuffix("%)").split()[-1]) - 100 * share) <= 1


def opens_without_a_network(path: Path) -> dict[str, int]:
    """Open a page with the network off and see every picture of it; returns how many there are, by kind.

    Fails for a request that is not for the file itself, an error of its scripts, a picture or figure that is not drawn, a
    formula that is not MathML, and a `compare` that does not swipe.
    """
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        page = context.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        page.wait_for_function(
            "[...document.querySelectorAll('.taco-compare, .taco-attention')].every(n => n.dataset.ready)"
        )
        page.wait_for_function(
            "[...document.querySelectorAll('.js-plotly-plot')].every(n => n.querySelector('.main-svg'))"
        )
        broken = page.evaluate(
            "() => Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0, () => false)))"
            ".then(all => all.filter(good => !good).length)"
        )
        assert broken == 0, f"{broken} pictures are not drawn"
        assert [url[:80] for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
        assert errors == []
        counts = {
            "pictures": page.evaluate("document.images.length"),
            "figures": page.locator(".js-plotly-plot").count(),
            "formulas": page.locator("math").count(),
            "compare": page.locator(".taco-compare").count(),
            "attention": page.locator(".taco-attention").count(),
        }
        assert page.locator("div[id].plotly-graph-div").count() == counts["figures"]
        for i in range(counts["compare"]):
            swipe(page, page.locator(".taco-compare").nth(i), 0.25)
        assert "$$" not in page.inner_text("body")
        return counts
