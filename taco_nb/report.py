"""Runs on disk become one table here. From it follow points, BD-rates, and a card that says how to repeat each run.

A run is a folder in which `taco_nb.evaluate` has left its tables: that of the weights that `fit` trained, or one of its own
for a checkpoint from elsewhere. What measurements say of the published figures is for `taco_nb.verdicts` to say.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd

from taco_nb.checkpoint import trained_as
from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation.protocol import FOLDER, IMAGES
from taco_nb.evaluation.records import ABOUT, TABLE, as_table, mean_by, read_about
from taco_nb.experiment import ABLATIONS, Experiment
from taco_nb.files import atomic_write, bundled, fitting_name, short_path
from taco_nb.metrics.rate import BD_POINTS, bd_rate

DATASETS = {"MS-COCO": "coco", "CLIC": "clic", "Kodak": "kodak"}
"""The report's names of its data sets, and ours."""
PUBLISHED_AS = {"lpips": "lpips_01", "psnr": "psnr_taco"}
"""Columns in which TACO's protocol is followed, where the metric's plain name has another."""
MEASURES = (
    "bpp", "psnr", "ms_ssim", "psnr_taco", "ms_ssim_taco", "lpips", "lpips_01", "clip_score", "fid", "cmmd",
    "mini_distance", "mini_score", "mini_mmd",
    "encode_s", "decode_s",
)  # fmt: skip

ABLATION_FIELDS = (
    *ABLATIONS, "linformer_k", "linformer_sharing", "text_tokens", "text_length", "keyword_weight", "keyword_sources",
)  # fmt: skip
"""The settings of an `Experiment` in which an ablation may differ from its baseline."""
_RUN_COLUMNS = (
    "run", "folder", "label", "codec", "ablation", "fingerprint", "profile", "lmbda", "epochs", "steps", "seed", "experiment",
    "hours", "evaluated_s", "to_train", "to_evaluate", "finished", "commit", "versions", "hardware",
)  # fmt: skip
_ROW_COLUMNS = ("dataset", "images", "data_sha256", "unjudged", "name")
_BD_FIGURES = ("points of the anchor", "points", "BD-rate in %", "note")


def collect(*folders: str | os.PathLike) -> pd.DataFrame:
    """Return every run at or below the folders in one tidy table: a row per run and image, a column per metric.

    What is measured of an image has `evaluate`'s column names (see `MEASURES`; one that a run lacks is NaN). What is so of
    the run is repeated in each row: run (its folder, relative to the one given), folder (where it is), codec, fingerprint,
    ablation ("baseline", "context", "linformer", "keywords", "keywords-tokens", joined by " + "), profile, lmbda, epochs
    (taken, perhaps a fraction), steps, seed, experiment (its JSON, "" for a checkpoint from elsewhere), hours of training
    and to_train, the command. Of the data set: dataset, images, data_sha256, label (what to call the run in a figure),
    unjudged (why its figures neither reproduce nor refute published ones, "" if they may), and of its evaluation:
    evaluated_s (seconds), to_evaluate (the command), finished, commit, versions and hardware.

    A folder with half a run, or a damaged one, is named in a printed line and left out, and so is one that does not exist.
    No runs give an empty table.
    """
    tables: dict[str, pd.DataFrame] = {}
    for root in map(Path, folders):
        if not root.is_dir():
            print(f"There is no folder {root}, so no run in it.")
        for folder in _runs_below(root):
            try:
                name = root.name if folder == root else str(folder.relative_to(root))
                name = str(folder) if name in tables else name
                tables[name] = _read_run(folder).assign(run=name, folder=str(folder))
            except DataError as error:
                print(f"Left out: {error}")
    columns = [*_RUN_COLUMNS, *_ROW_COLUMNS]
    if not tables:
        numbers = ("lmbda", "epochs", "steps", "seed", "hours", "evaluated_s", "images", *MEASURES)
        return pd.DataFrame(columns=[*columns, *MEASURES]).astype(dict.fromkeys(numbers, float))
    return pd.concat(tables.values(), ignore_index=True).reindex(
        columns=[*columns, "caption", "width", "height", "bytes", *MEASURES]
    )


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run and data set, with the mean of each metric over the images and what is so of the run.

    As in `taco_nb.evaluation.means`, a column such as `ms_ssim_images` says where a mean is over fewer than all images.
    """
    keys = ["run", "dataset"]
    kept = [name for name in (*_RUN_COLUMNS, *_ROW_COLUMNS) if name not in (*keys, "name")]
    firsts = runs.groupby(keys, sort=False)[kept].first()
    return firsts.join(mean_by(runs, keys, MEASURES).drop(columns="images")).reset_index()


def bd_rates(
    runs: pd.DataFrame,
    published: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    metrics: Sequence[str] = ("psnr", "ms_ssim", "lpips_01"),
) -> pd.DataFrame:
    """Return the BD-rates of the curves that runs of one label draw over lambda, against their baseline and published ones.

    There is a row per data set, metric, anchor and label, with both curves' numbers of points, the BD-rate in percent
    (negative: fewer bits than the anchor at equal quality) and, where there is none, a note that says why. A curve with too
    few points has one row in all. `published` are curves over all of Kodak, as `published_curves` gives them.
    """
    rows = []
    table = points(runs).drop_duplicates(["dataset", "label", "bpp"])  # a codec may have been evaluated twice
    for (dataset, label), curve in table.groupby(["dataset", "label"], sort=False):
        if len(curve) < BD_POINTS:
            few = f"too few points: a BD-rate needs {BD_POINTS}, so train at more lambda"
            rows.append({"dataset": dataset, "curve": label, "points": len(curve), "note": few})
            continue
        same = (table["dataset"] == dataset) & (table["profile"] == curve["profile"].iloc[0])
        same &= (table["ablation"] == "baseline") & (curve["ablation"].iloc[0] != "baseline")
        anchors = dict(iter(table[same].groupby("label", sort=False)))
        # Published curves are means over all of Kodak, so only such means may be held against them.
        if dataset == "kodak" and curve["images"].min() >= IMAGES["kodak"]:
            anchors |= {name: pd.DataFrame(c) for name, c in (published or {}).items()}
        for anchor, other in anchors.items():
            for metric in metrics:
                if metric in other and other[metric].notna().any() and curve[metric].notna().any():
                    found = {"dataset": dataset, "metric": metric, "anchor": anchor, "curve": label}
                    rows.append(found | _bd_rate(other, curve, metric))
    return pd.DataFrame(rows, columns=["dataset", "metric", "anchor", "curve", *_BD_FIGURES])


def _bd_rate(anchor: pd.DataFrame, curve: pd.DataFrame, metric: str) -> dict[str, Any]:
    curves = [c[["bpp", metric]].dropna() for c in (anchor, curve)]
    figure, note = math.nan, ""
    if min(map(len, curves)) < BD_POINTS:
        note = f"too few points: a BD-rate needs {BD_POINTS} on both curves"
    else:
        try:
            figure = bd_rate(*(c[name] for c in curves for name in ("bpp", metric)))
        except SettingError as error:
            note = str(error)
    return dict(zip(_BD_FIGURES, (*map(len, curves), figure, note)))


def cards(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the reproducibility card: each run's seed, data, hardware, versions, times, and commands that repeat it."""
    columns = ["run", "what", "fingerprint", "seed", "data, SHA-256", "training", "evaluation", "hardware", "commit",
               "versions", "to repeat it"]  # fmt: skip
    rows = []
    for name, of_run in runs.groupby("run", sort=False):
        run, sets = of_run.iloc[0], of_run.drop_duplicates("dataset")

        def told(column: str, sets: pd.DataFrame = sets) -> str:
            """What the run's evaluations say, once where they say the same."""
            return "; ".join(dict.fromkeys(filter(None, sets[column])))

        data = "; ".join(
            f"{s['dataset']}: {s['images']} images, {s['data_sha256'][:12]}" for _, s in sets.iterrows()
        )
        commands = [run["to_train"], *sets["to_evaluate"]]
        rows.append([
            name,
            told("label"),
            run["fingerprint"],
            "–" if math.isnan(run["seed"]) else f"{run['seed']:.0f}",
            data,
            "elsewhere" if math.isnan(run["hours"]) else _duration(3600 * run["hours"]),
            f"{_duration(sets['evaluated_s'].sum())}, {max(sets['finished'])[:10]}",
            told("hardware"),
            told("commit"),
            told("versions"),
            " && ".join(dict.fromkeys(filter(None, commands))),
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def published_curves(
    data_dir: str | os.PathLike | None = None, up_to: float = math.inf
) -> dict[str, dict[str, list[float]]]:
    """Return published rate-distortion curves on Kodak: {codec: {"bpp": [...], "psnr": [...], perhaps "ms_ssim": [...]}}.

    Points at rates above `up_to` bits per pixel are left out.
    """
    text = bundled("reference/kodak_published_rd.json", data_dir).read_text(encoding="utf-8")
    curves = json.loads(text)["codecs"]
    for name, curve in curves.items():
        kept = [rate <= up_to for rate in curve["bpp"]]
        curves[name] = {metric: list(compress(values, kept)) for metric, values in curve.items() if values}
    return curves


def write_curves(folder: str | os.PathLike, runs: pd.DataFrame) -> list[str]:
    """Write the rate-distortion curves of runs as CompressAI's results, a JSON file for each data set and label.

    `python -m compressai.utils.plot -f FOLDER/*.json` draws them, beside those that CompressAI publishes. Returns the files'
    names, with the folder's before them.
    """
    names = []
    for (dataset, label), curve in points(runs).groupby(["dataset", "label"], sort=False):
        curve = curve.sort_values("bpp")
        results = {
            theirs: curve[ours].tolist()
            for ours, theirs in (("bpp", "bpp"), ("psnr", "psnr-rgb"), ("ms_ssim", "ms-ssim-rgb"))
            if curve[ours].notna().all()
        }
        name = fitting_name(re.sub(r"[^\w.-]+", "-", f"{dataset}-{label}") + ".json")
        about = f"{dataset}, means over {curve['images'].iloc[0]:.0f} images, from real files"
        with atomic_write(Path(folder, name), "w") as file:
            json.dump({"name": label, "description": about, "results": results}, file, indent=1)
        names.append(f"{Path(folder).name}/{name}")
    return names


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


# Reading a run --------------------------------------------------------------------------------------------------------


def _runs_below(root: Path) -> Iterator[Path]:
    """Yield the folders that are, or were to become, runs. What lies inside one is its own, and may be thousands of files."""
    for folder, below, files in os.walk(root):
        if {"experiment.json", ABOUT, TABLE} & set(files) or {".lock", "files"} <= {*files, *below}:
            yield Path(folder)
            below.clear()
        below.sort()


def _read_run(folder: Path) -> pd.DataFrame:
    """Return the table of one run. Raises `DataError`, with a sentence that names the folder, for one that is not whole."""
    about = read_about(folder)
    try:
        return _table_of_run(folder, about)
    except KeyError as error:
        raise DataError(f"{folder}: {ABOUT} does not say {error.args[0]}. Evaluate again.") from error
    except (AttributeError, TypeError) as error:
        raise DataError(f"{folder}: {ABOUT} is damaged ({error}). Evaluate again.") from error


def _table_of_run(folder: Path, about: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table of a run by its evaluation.json. Raises `KeyError` for what that does not say."""
    exp = _evaluated_experiment(folder, about)
    counts = dict(Counter(row["dataset"] for row in about["rows"]))
    expected = {name: of_set["images"] for name, of_set in about["data"].items()}
    if counts != expected:
        raise DataError(f"{folder}: {ABOUT} has rows of {counts}, but says {expected}. Evaluate again.")
    number = lambda value: math.nan if value is None else value  # noqa: E731
    of_run = {
        "codec": about["codec"], "fingerprint": about["fingerprint"], "ablation": about["ablation"],
        "lmbda": number(about["lmbda"]), "epochs": number(about["epochs"]), "steps": about["weights"].get("steps", math.nan),
        "hours": about["weights"].get("hours", math.nan), "to_train": _command(about["train"], folder),
        "profile": "" if exp is None else exp.profile, "seed": math.nan if exp is None else exp.seed,
        "experiment": "" if exp is None else exp.to_json(),
    }  # fmt: skip
    tables = []
    for name, of_set in about["data"].items():
        hardware, packages = of_set["hardware"], of_set["packages"]
        versions = [f"Python {of_set['python']}", *(f"{k} {v}" for k, v in packages.items() if v)]
        table = as_table([row for row in about["rows"] if row["dataset"] == name]).assign(
            **of_run,
            images=of_set["images"],
            data_sha256=of_set["sha256"],
            label=of_set["label"],
            unjudged="; ".join(of_set["unjudged"]),
            evaluated_s=of_set["seconds"],
            to_evaluate=_command(of_set["evaluate"], folder),
            finished=of_set["finished"],
            commit=of_set["commit"] or "",
            versions=", ".join(versions),
            hardware=", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]]),
        )
        measured = [metric for metric in MEASURES if metric in table]
        tables.append(table.astype(dict.fromkeys(measured, float)))
    return pd.concat(tables, ignore_index=True)


def _evaluated_experiment(folder: Path, about: Mapping[str, Any]) -> Experiment | None:
    """Return the experiment whose weights were evaluated; None where they come from elsewhere."""
    try:
        evaluated = trained_as(about["weights"])
        if not (folder / "experiment.json").is_file():
            return evaluated
        claimed = Experiment.from_json((folder / "experiment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: its experiment cannot be read ({error})") from None
    if evaluated != claimed:
        raise DataError(
            f"{folder}: what was evaluated is not what experiment.json describes. Evaluate again."
        )
    return claimed


def _command(words: Sequence[str] | None, folder: Path) -> str:
    """Return a command as it is typed, for a folder that may have been moved since; "" for none."""
    return shlex.join(word.replace(FOLDER, short_path(folder)) for word in words or ())
