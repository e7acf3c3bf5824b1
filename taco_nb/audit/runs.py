"""Claims about decoded pictures are judged here by runs that followed the report's protocol, and else not at all."""

from __future__ import annotations

from taco_nb.audit.material import Finding, Material, found
from taco_nb.verdicts import NOT_MEASURED, REPRODUCED


def judged_by_runs(
    material: Material, ablation: str, metric: str | None = None, figures: bool = False
) -> Finding:
    """Sum up the verdicts on an ablation: on its sentences about one metric or all, or on its figures if `figures` is true.

    A baseline has figures only. The claim is reproduced if all its verdicts that have been reached say so.
    """
    table = material.verdicts
    number = table["published"].map(lambda published: not isinstance(published, str))
    wanted = (
        (table["of"] == ablation)
        & (number == (figures or ablation == "baseline"))
        & (table["what"] != "time")
    )
    if metric is not None:
        wanted &= table["what"].str.split(",").str[0] == metric
    table = table[wanted]
    judged, shown = table[table["verdict"] != NOT_MEASURED], table[table["measured"].notna()]
    if shown.empty:
        return Finding(NOT_MEASURED, "No run here bears on it.")
    if judged.empty:
        why = "; ".join(dict.fromkeys(shown["run, or why not"]))
        said = f"{len(shown)} measurements here bear on it, and none follows the report's protocol: {why}."
        return Finding(NOT_MEASURED, said)
    as_said = (judged["verdict"] == REPRODUCED).sum()
    return found(
        as_said == len(judged),
        f"{as_said} of {len(judged)} comparisons came out as stated, of {len(table)} that it takes.",
    )


def unmeasured(material: Material) -> Finding:
    """Say that nothing on this machine bears on a claim; its entry says what would."""
    return Finding(NOT_MEASURED, "Nothing on this machine bears on it.")
