"""Every claim of the report is listed in data/reference/claims.toml, and judged here by the function that it names.

A claim about structure, arithmetic, counts or time is judged by computing on this machine; one about decoded pictures by runs
that followed the report's protocol. All others are "not yet measured", with the command that would measure them.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from taco_nb.audit.material import Finding, Material
from taco_nb.errors import DataError
from taco_nb.files import REPOSITORY, atomic_write, bundled, read_toml
from taco_nb.provenance import provenance
from taco_nb.verdicts import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED

__all__ = ["Finding", "Material", "audit", "counts", "read_claims", "summary", "test_of", "write_audit"]

KINDS = ("structure", "arithmetic", "count", "time", "quality")
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_MEASURED)
_OF_CLAIM = ("id", "section", "kind", "says", "test", "cell")
"""Every entry of claims.toml has these."""


def read_claims(data_dir: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """Return the claims of claims.toml, in the report's order. Raises `DataError` for an entry that is not whole."""
    path = bundled("reference/claims.toml", data_dir)
    claims = read_toml(path)["claim"]
    for claim in claims:
        if (missing := {*_OF_CLAIM} - claim.keys()) or claim["kind"] not in KINDS:
            what = ", ".join(sorted(missing)) or "a known kind"
            raise DataError(f"{path}: the claim {claim.get('id', '?')!r} lacks {what}. Add it.")
    return claims


def test_of(claim: dict[str, Any]) -> Callable[[Material], Finding]:
    """Return the function that a claim names, module:function, with the claim's arguments."""
    module, _, name = claim["test"].partition(":")
    return partial(getattr(import_module(module), name), **claim.get("with", {}))


test_of.__test__ = False  # pytest would take it for a test


def audit(material: Material) -> pd.DataFrame:
    """Judge every claim: a row for each, in the report's order.

    Columns are those of claims.toml and verdict, evidence, code (the file below the repository), line and source. `needs` is
    "" where there is a verdict.
    """
    rows = []
    for claim in read_claims(material.data_dir):
        function = test_of(claim)
        row = {key: claim[key] for key in _OF_CLAIM} | function(material)._asdict()
        row["needs"] = claim.get("needs", "") if row["verdict"] == NOT_MEASURED else ""
        code = Path(inspect.getsourcefile(function.func)).resolve().relative_to(REPOSITORY)
        lines, line = inspect.getsourcelines(function.func)
        rows.append({**row, "code": code.as_posix(), "line": line, "source": "".join(lines)})
    return pd.DataFrame(rows)


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many claims of each kind have which verdict, with their sum in the last row."""
    counted = pd.crosstab(table["kind"], table["verdict"])
    counted = counted.reindex(index=KINDS, columns=VERDICTS, fill_value=0)
    counted.loc["all"] = counted.sum()
    return counted.rename_axis(columns=None).reset_index()


def write_audit(folder: str | os.PathLike, table: pd.DataFrame, page: str) -> list[str]:
    """Write claims.json, for programs, and the summary as summary.md to a folder; return the names of both files."""
    claims = table.drop(columns="source").to_dict("records")
    with atomic_write(Path(folder, "claims.json"), "w") as file:
        json.dump({"claims": claims, **provenance()}, file, indent=1)
    with atomic_write(Path(folder, "summary.md"), "w") as file:
        file.write(page)
    return ["claims.json", "summary.md"]


def summary(table: pd.DataFrame, data_dir: str | os.PathLike | None = None) -> str:
    """Return the one-page summary of the ML Reproducibility Challenge, in Markdown, with the numbers of an audit.

    Its text is data/reference/summary.md. There {all} is the number of claims, {count_reproduced} and so on are counts of a
    kind and a verdict, and {evidence[id]} is the evidence on the claim of this id.
    """
    by_kind = counts(table).set_index("kind")
    short = dict(zip(VERDICTS, ("reproduced", "refuted", "open")))
    numbers = {f"{kind}_{short[v]}": by_kind.loc[kind, v] for kind in (*KINDS, "all") for v in VERDICTS}
    numbers |= {f"{kind}_all": by_kind.loc[kind].sum() for kind in KINDS}
    evidence = dict(zip(table["id"], table["evidence"]))
    text = bundled("reference/summary.md", data_dir).read_text(encoding="utf-8")
    return text.format(all=len(table), evidence=evidence, **numbers)
