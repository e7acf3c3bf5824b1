"""The runs are held against the published figures: each figure beside what was measured, the difference, and a verdict.

The rules, which notebook 06 states to its readers as well:

- Only a run that follows the report's protocol is judged: the profile `paper`, its settings, at least as many epochs, every
  image of the data set (of MS-COCO all that are large enough for the crop), evaluated in the mode "exact", with FID of
  whole images over patches of 256 pixels, and on MS-COCO with the best of an image's captions. `unjudged` in
  `taco_nb.report.collect` says what is amiss. All other runs are shown, and are "not yet measured".
- A **figure** is "reproduced" if the measured mean is within `TOLERANCE` of it, else "not reproduced". Beside it stands
  a 95 % bootstrap interval of the mean, and whether the figure lies in it; the interval covers the choice of images alone.
- A **sentence** ("better on all data sets") is judged on each data set by the difference to the baseline at the same lambda
  and number of steps, paired by image: "reproduced" if the whole 95 % interval of the mean difference is on the side that the
  sentence says, else "not reproduced", which so includes differences too small to tell. "Similar" means within `TOLERANCE` of
  the baseline's mean. Metrics of a whole data set (FID, CMMD) have no interval; there the difference itself is judged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from taco_nb.experiment import Experiment, baseline
from taco_nb.files import bundled
from taco_nb.metrics.interval import DRAWS, interval_of
from taco_nb.report import ABLATION_FIELDS, DATASETS, MEASURES, PUBLISHED_AS, points

REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not yet measured"
TOLERANCE = 0.05
"""By this share of a published figure, a measured one may differ."""
SAME_STEPS = 0.05
"""By this share two runs' numbers of steps may differ, and still be compared, since whole epochs differ in length."""
COMPARED = tuple(name for name in MEASURES if not name.endswith("_s"))
"""The metrics that `paired` compares: all but the times, which other work on the machine changes."""
OF_CAPTIONS = ("clip_score", "mini_score")
"""The metrics that hold a picture against the caption that it was encoded with."""


class Claim(NamedTuple):
    """A sentence of the report that compares an ablation with the baseline, in a form that a measurement can decide."""

    ablation: str
    text: str
    """Its key in `report.json`, under the ablation's "text"."""
    metric: str
    sides: dict[str, str]
    """{our name of a data set: "lower" or "higher" than the baseline, or "similar" to it}."""
    limit: float = math.inf
    """The largest difference, in the metric's unit, that the sentence allows."""


def _everywhere(side: str) -> dict[str, str]:
    return dict.fromkeys(DATASETS.values(), side)


CLAIMS = (
    Claim("context", "lpips", "lpips", _everywhere("lower")),
    Claim("context", "psnr", "psnr", _everywhere("higher")),
    Claim("context", "fid", "fid", _everywhere("similar")),
    # "accuracy" is not defined there; this is our reading
    Claim("linformer", "accuracy", "psnr", _everywhere("lower")),
    Claim("linformer", "accuracy", "lpips", _everywhere("higher")),
    Claim("keywords", "psnr", "psnr", {"coco": "lower", "kodak": "lower", "clic": "higher"}, limit=0.5),
    Claim("keywords", "fid", "fid", {"clic": "higher"}),
)


def paired(runs: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Compare every ablation, image by image, with every baseline that differs from it in nothing else.

    There is a row per pair of runs, data set and metric: the means over the images for which both have a figure, how many
    these are, the mean difference (ablation less baseline), and its bootstrap interval, low and high, as `interval_of`
    gives it. Pairs have the same lambda and seed, and numbers of steps within `SAME_STEPS` of each other.
    """
    pairs, rows = list(_pairs(points(runs))), []
    for changed, base in tqdm(pairs, desc="bootstrap", disable=len(runs) < 10_000):
        of = [runs[(runs["run"] == r["run"]) & (runs["dataset"] == r["dataset"])] for r in (changed, base)]
        both = of[0].merge(of[1], on="name", suffixes=("", "_baseline"))
        about = {name: changed[name] for name in ("ablation", "dataset", "lmbda", "label", "run")}
        about |= {"baseline_run": base["run"], "epochs": changed["epochs"], "baseline_epochs": base["epochs"]}
        about["unjudged"] = "; ".join(dict.fromkeys(r["unjudged"] for r in (changed, base) if r["unjudged"]))
        captions = {Experiment.from_json(r["experiment"]).dataset_captions for r in (changed, base)}
        for metric in COMPARED:
            if metric in OF_CAPTIONS and len(captions) > 1:
                continue  # each was scored against captions of its own
            values = both[[metric, f"{metric}_baseline"]].replace([math.inf, -math.inf], math.nan).dropna()
            if values.empty:
                continue
            here, there = values.to_numpy().T
            low, high = interval_of(metric, here - there, draws, seed)
            figures = {"metric": metric, "baseline": there.mean(), "here": here.mean()}
            rows.append({**about, **figures, "difference": (here - there).mean(), "low": low, "high": high})
            rows[-1]["images"] = len(values)
    columns = [
        "ablation", "dataset", "lmbda", "label", "run", "baseline_run", "epochs", "baseline_epochs", "unjudged", "metric",
        "baseline", "here", "difference", "low", "high", "images",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def verdicts(
    runs: pd.DataFrame, ablation: str | None = None, data_dir: str | os.PathLike | None = None, seed: int = 0
) -> pd.DataFrame:
    """Return what the report states, about one ablation ("baseline" is one too) or all, beside what `runs` measured.

    There is a row per statement and run that bears on it, or one with NaN where none does. Its columns are of, what,
    published, measured, images, difference (to the published figure; for a sentence, to the baseline), its 95 % interval or
    the mean's, verdict, and the run or the reason. See the module for the rules.
    """
    stated = json.loads(bundled("reference/report.json", data_dir).read_text(encoding="utf-8"))
    names = [name for name in ("baseline", "context", "linformer", "keywords") if ablation in (None, name)]
    means, pairs, rows = points(runs), paired(runs, seed=seed), []
    for name in names:
        for dataset in DATASETS:
            for metric, value in stated[name].get(dataset, {}).items():
                rows += _figure_rows(runs, means, name, dataset, metric, value, stated, seed)
        for key, sentence in stated[name].get("text", {}).items():
            claims = [claim for claim in CLAIMS if (claim.ablation, claim.text) == (name, key)]
            rows += [row for claim in claims for row in _claim_rows(pairs, claim, sentence)]
            if not claims:
                rows.append(_row(name, key, sentence, why="notebook 05 measures time"))
    return pd.DataFrame(rows)


def _figure_rows(runs, means, ablation, dataset, metric, value, stated, seed) -> list[dict[str, Any]]:
    column, ours = PUBLISHED_AS.get(metric, metric), DATASETS[dataset]
    lmbda = stated["keywords"]["lmbda"]  # the only one that the report states
    found = means[(means["ablation"] == ablation) & (means["dataset"] == ours) & means[column].notna()]
    bearing = found[(found["unjudged"] == "") & np.isclose(found["lmbda"], lmbda)]
    rows = []
    for _, run in (found if bearing.empty else bearing).iterrows():
        amiss = [run["unjudged"]] if run["unjudged"] else []
        if not np.isclose(run["lmbda"], lmbda):
            amiss.append(f"lambda {run['lmbda']:g}, taken as published at {lmbda}")
        values = runs.loc[(runs["run"] == run["run"]) & (runs["dataset"] == ours), column]
        values = values[np.isfinite(values)]
        low, high = interval_of(metric, values, seed=seed)
        within = abs(run[column] - value) <= TOLERANCE * value
        rows.append(
            _row(
                ablation, f"{metric}, {dataset}", value, run[column], len(values), run[column] - value, low, high,
                NOT_MEASURED if amiss else REPRODUCED if within else NOT_REPRODUCED, "; ".join(amiss) or run["run"],
            )
        )  # fmt: skip
    return rows or [_row(ablation, f"{metric}, {dataset}", value, why="no run here has measured it")]


def _claim_rows(pairs, claim: Claim, sentence: str) -> list[dict[str, Any]]:
    column = PUBLISHED_AS.get(claim.metric, claim.metric)
    found = pairs[(pairs["ablation"] == claim.ablation) & (pairs["metric"] == column)]
    bearing = found[found["dataset"].isin(claim.sides) & (found["unjudged"] == "")]
    rows = []
    for _, pair in (found if bearing.empty else bearing).iterrows():
        amiss = pair["unjudged"]
        if not amiss and pair["dataset"] not in claim.sides:
            amiss = f"the sentence does not speak of {pair['dataset']}"
        verdict = NOT_MEASURED if amiss else REPRODUCED if holds(claim, pair) else NOT_REPRODUCED
        rows.append(
            _row(
                claim.ablation, f"{claim.metric}, {pair['dataset']}, lambda {pair['lmbda']:g}", sentence, pair["here"],
                pair["images"], pair["difference"], pair["low"], pair["high"], verdict,
                amiss or f"{pair['run']}, {pair['baseline_run']}",
            )
        )  # fmt: skip
    why = "no pair of runs at the same lambda and number of steps has measured it"
    return rows or [_row(claim.ablation, claim.metric, sentence, why=why)]


def holds(claim: Claim, pair: Any) -> bool:
    """Tell whether a difference, as a row of `paired`, is what the sentence says, by the module's rules."""
    side = claim.sides[pair["dataset"]]
    low, high = (pair["difference"],) * 2 if math.isnan(pair["low"]) else (pair["low"], pair["high"])
    if side == "similar":
        return abs(pair["difference"]) <= TOLERANCE * abs(pair["baseline"])
    return (high < 0 if side == "lower" else low > 0) and abs(pair["difference"]) <= claim.limit


def published_changes(pairs: pd.DataFrame, data_dir: str | os.PathLike | None = None) -> pd.DataFrame:
    """Return by how many per cent the report's keywords changed each figure that it states of both, and what was measured.

    `pairs` comes from `paired`; pairs that are not judged do not count. Columns: label, published; measured, low and high,
    the mean over the runs and their interval, NaN where nothing was measured. The report states no change in per cent: it is
    computed here from its figures.
    """
    stated = json.loads(bundled("reference/report.json", data_dir).read_text(encoding="utf-8"))
    rows = []
    for dataset, name in DATASETS.items():
        for metric, before in stated["baseline"].get(dataset, {}).items():
            if (after := stated["keywords"].get(dataset, {}).get(metric)) is None:
                continue
            ours = (pairs["ablation"] == "keywords") & (pairs["unjudged"] == "") & (pairs["dataset"] == name)
            of = pairs[ours & (pairs["metric"] == PUBLISHED_AS.get(metric, metric))]
            relative = of[["difference", "low", "high"]].div(of["baseline"], axis=0).mean() * 100
            row = {
                "label": f"keywords, {metric.upper()} on {dataset}",
                "published": 100 * (after / before - 1),
            }
            rows.append(row | dict(zip(("measured", "low", "high"), relative)))
    return pd.DataFrame(rows)


def _row(
    of, what, published, measured=math.nan, images=0, difference=math.nan, low=math.nan, high=math.nan,
    verdict=NOT_MEASURED, why="",
) -> dict[str, Any]:  # fmt: skip
    known = not math.isnan(low)
    inside = known and not isinstance(published, str)
    return {
        "of": of, "what": what, "published": published, "measured": measured, "images": images, "difference": difference,
        "95 % interval": f"{low:.4f} to {high:.4f}" if known else "–",
        "published in it": ("yes" if low <= published <= high else "no") if inside else "–",
        "verdict": verdict, "run, or why not": why,
    }  # fmt: skip


def _pairs(means: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Yield rows of `points` in pairs, of an ablation and of its baseline on the same data set.

    Settings that belong to an ablation may differ, but only by the ablation's doing: where the baseline has other values
    than its profile, the ablation must have the same.
    """
    told = means[means["experiment"] != ""]
    known = [(run, Experiment.from_json(run["experiment"])) for _, run in told.iterrows()]
    for (changed, exp), (base, plain) in product(known, known):
        if changed["ablation"] == "baseline" or base["ablation"] != "baseline":
            continue
        free = {*ABLATION_FIELDS} - plain.diff(baseline(plain.profile)).keys() | {"epochs"}
        same_steps = abs(changed["steps"] - base["steps"]) <= SAME_STEPS * base["steps"]
        if changed["dataset"] == base["dataset"] and same_steps and not plain.diff(exp).keys() - free:
            yield changed, base
