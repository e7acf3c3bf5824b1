"""Pieces of HTML bring their style, script and pictures with them: no kernel, network or second file is needed."""

from __future__ import annotations

import base64
import html
import io
import math
import numbers
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML
from PIL import Image

FOLDER = Path(__file__).parent
"""The folder of the widgets' scripts and style sheets."""
ROWS = 500
"""A longer table is cut, and a line says so: nobody reads thirty thousand rows, and a page with them is slow."""
_LONGEST_WEBP_SIDE = 16383  # pixels; the format has 14 bits for a side

# The cells hold their values in `data-value`, since 1000 and 30 would sort as "1000" and "30" by their text. Empty values
# stay last in both directions, and numbers come before text.
_SORT = """
(() => {
  const table = document.getElementById("ID");
  table.querySelectorAll("th").forEach((heading, column) => heading.addEventListener("click", () => {
    const rising = heading.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = row => {
      const text = row.cells[column].dataset.value, number = Number(text);
      return text === "" ? null : Number.isNaN(number) ? text : number;
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1;
      return rising ? order : -order;
    };
    const body = table.tBodies[0];
    [...body.rows].sort(compare).forEach(row => body.append(row));
  }));
})();
"""


def self_contained(name: str, body: str) -> str:
    """Return `body` in an element of the class `taco-<name>`, with its style and the script that brings it to life.

    They are <name>.css and <name>.js. The script is the module that the live widget runs too, and its function `enhance`
    takes the element. Where no script runs, the reader sees `body` as it is.
    """
    key = f"{name}-{uuid.uuid4().hex[:8]}"
    style, script = ((FOLDER / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<div class="taco-{name}" id="{key}">{body}</div><style>{style}</style>'
        f'<script type="module">{script}\nenhance(document.getElementById("{key}"));</script>'
    )


def picture_url(picture: Image.Image) -> str:
    """Return the picture as lossless WebP in a data URL: a fifth smaller than PNG, and made sooner.

    A side that is too long for WebP makes it a PNG.
    """
    file = io.BytesIO()
    kind = "webp" if max(picture.size) <= _LONGEST_WEBP_SIDE else "png"
    picture.save(file, kind, lossless=True, method=0)  # options of WebP, which PNG does not look at
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_tag(picture: Image.Image, alt: str) -> str:
    """Return an <img> that holds its picture."""
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{html.escape(alt)}" src="{picture_url(picture)}">'


def shortened(caption: str) -> str:
    """Return the first 90 characters of a caption; a paragraph would fill the place of what it belongs to."""
    return caption if len(caption) <= 90 else f"{caption[:90]} …"


def sortable(table: pd.DataFrame, digits: int = 3, fold: str = "") -> HTML:
    """Return a table in HTML that sorts by the column whose heading is clicked.

    Floats have `digits` decimals, and NaN is a dash. Only the first `ROWS` rows are shown. With `fold`, these words stand
    there in place of the table, and a click on them unfolds it.
    """
    name = f"table-{uuid.uuid4().hex[:8]}"
    headings = "".join(
        f'<th style="cursor:pointer" title="sort">{html.escape(str(column))}</th>' for column in table.columns
    )
    rows = "".join(
        f"<tr>{''.join(_cell(value, digits) for value in row)}</tr>"
        for row in table[:ROWS].itertuples(index=False)
    )
    cut = f"<p>The first {ROWS} of {len(table)} rows.</p>" if len(table) > ROWS else ""
    body = f'<table id="{name}"><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>{cut}'
    if fold:
        body = f"<details><summary>{html.escape(fold)}</summary>{body}</details>"
    return HTML(f"{body}<script>{_SORT.replace('ID', name)}</script>")


def _cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '<td data-value="" style="text-align:right">–</td>'
    number = isinstance(value, numbers.Number) and not isinstance(value, bool)
    text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    key = str(value).replace("inf", "Infinity") if number else str(value)  # as JavaScript spells it
    align = "right" if number else "left"
    return f'<td data-value="{html.escape(key)}" style="text-align:{align}">{html.escape(text)}</td>'
