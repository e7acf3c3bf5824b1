"""The audit's page: each claim of the report with its verdict, the evidence, its cell, and the code that judged it."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd
from IPython.display import HTML

from taco_nb.widgets.html_parts import FOLDER

HEADINGS = {
    "structure": "Structure: how the network and the text are built",
    "arithmetic": "Arithmetic: what follows from the report's own figures",
    "count": "Counts: operations, words, tokens, pictures",
    "time": "Time",
    "quality": "Quality: what decoded pictures look like",
}


def claims_page(table: pd.DataFrame, notebook: str) -> HTML:
    """Return an audit's table as a page by kind of claim, which needs no script, network or second file.

    The code behind a claim unfolds in place. `notebook` is the one that shows the page, such as "06_report": links to its own
    cells stay in the page, and those to other notebooks lead to these, beside it.
    """
    from taco_nb.audit import counts  # brings the networks with it

    parts = [counts(table).to_html(index=False, border=0)]
    for kind, heading in HEADINGS.items():
        claims = table[table["kind"] == kind].to_dict("records")
        body = "".join(_row(claim, notebook) for claim in claims)
        parts.append(
            f'<h4>{heading}</h4><table class="tc-claims"><colgroup><col style="width:31%"><col style="width:17%">'
            "<col></colgroup><thead><tr><th>the report says</th><th>verdict</th><th>evidence</th></tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )
    style = (FOLDER / "claims.css").read_text(encoding="utf-8")
    return HTML(f'<style>{style}</style><div class="taco-claims">{"".join(parts)}</div>')


def _row(claim: dict[str, Any], notebook: str) -> str:
    say = {
        key: html.escape(str(claim[key])) for key in ("id", "says", "section", "verdict", "evidence", "needs")
    }
    name, _, cell = claim["cell"].partition("#")
    target = "" if name == notebook else f"{name}.ipynb"
    needs = f'<div class="tc-about">To measure it: <code>{say["needs"]}</code></div>' if say["needs"] else ""
    function = claim["test"].partition(":")[2]
    return (
        f'<tr id="claim-{say["id"]}" data-verdict="{say["verdict"]}"><td>{say["says"]}'
        f'<div class="tc-about">{say["section"]}</div></td><td><span class="tc-verdict">{say["verdict"]}</span></td>'
        f'<td>{say["evidence"]}{needs}<div class="tc-about"><a href="{target}#cell-id={cell}">cell in {name}</a>'
        f"<details><summary>code: <code>{function}</code>, {claim['code']}, line {claim['line']}</summary>"
        f"<pre>{html.escape(claim['source'])}</pre></details></div></td></tr>"
    )
