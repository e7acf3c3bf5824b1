"""A table that sorts at a click on a heading, in one piece of HTML that needs no kernel and no network."""

from __future__ import annotations

import html
import math
import numbers
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML

_SCRIPT = """
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


ROWS = 500
"""Of a longer table only so many are shown, and a line says so; a page of thirty thousand rows is of use to nobody."""


def sortable(table: pd.DataFrame, digits: int = 3) -> HTML:
    """`table` as HTML that sorts by the column whose heading is clicked; floats with `digits` decimals, NaN as a dash."""
    from IPython.display import HTML

    name = f"table-{uuid.uuid4().hex[:8]}"
    head = "".join(
        f'<th style="cursor:pointer" title="sort">{html.escape(str(c))}</th>' for c in table.columns
    )
    rows = "".join(
        f"<tr>{''.join(_cell(v, digits) for v in row)}</tr>" for row in table[:ROWS].itertuples(index=False)
    )
    more = f"<p>The first {ROWS} of {len(table)} rows.</p>" if len(table) > ROWS else ""
    return HTML(
        f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}'
        f"<script>{_SCRIPT.replace('ID', name)}</script>"
    )


def _cell(value: Any, digits: int) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    number = isinstance(value, numbers.Number) and not isinstance(value, bool)
    text = "–" if missing else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    key = (
        "" if missing else str(value).replace("inf", "Infinity") if number else str(value)
    )  # as JavaScript reads it
    align = "right" if number or missing else "left"
    return (
        f'<td data-value="{html.escape(key, quote=True)}" style="text-align:{align}">{html.escape(text)}</td>'
    )
