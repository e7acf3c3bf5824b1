"""Runs on disk as one table, and what follows from it: points, BD-rates, and a card that says how to repeat each run.

A run is a folder with `evaluation.csv` and `evaluation.json`, as `taco_nb.evaluate` leaves them: beside the weights that
`fit` trained, or alone, where a checkpoint from elsewhere was evaluated. What measurements say of the published figures
is `taco_nb.verdicts`' to say.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taco_nb.checkpoint import bundled_codecs
from taco_nb.errors import DataError, SettingError
from taco_nb.experiment import ABLATIONS, Experiment, baseline
from taco_nb.files import bundled, sha256, short_path
from taco_nb.metrics.rate import BD_POINTS, bd_rate

if TYPE_CHECKING:
    import pandas as pd

DATASETS = {"MS-COCO": "coco", "CLIC": "clic", "Kodak": "kodak"}
"""The report's names of its data sets, and ours."""
IMAGES = {"coco": 30504, "clic": 428, "kodak": 24}
"""How many images the report's protocol has of each; those of MS-COCO that are too small for its crop count as seen."""
PUBLISHED_AS = {"lpips": "lpips_01", "psnr": "psnr_taco"}
"""Columns in which TACO's protocol is followed, where the metric's plain name has another."""
WHOLE_SET = ("fid", "cmmd")
"""Metrics of a whole data set; each of its rows repeats the value."""
MEASURES = (
    "bpp", "psnr", "ms_ssim", "psnr_taco", "ms_ssim_taco", "lpips", "lpips_01", "clip_score", "fid", "cmmd",
    "encode_s", "decode_s",
)  # fmt: skip

_VARIATIONS = (
    "linformer_k",
    "linformer_sharing",
    "text_tokens",
    "text_length",
    "keyword_weight",
    "keyword_sources",
)
ABLATION_FIELDS = (*ABLATIONS, *_VARIATIONS)
"""The settings of an `Experiment` in which an ablation may differ from its baseline."""
_PROTOCOL = (
    "sizes", "init", "text_encoder", "train_data", "crop", "k_P", "k_J", "batch_size", "learning_rate", "aux_learning_rate",
    "optimizer", "schedule", "gradient_clip", "text_length", "keyword_weight", "keyword_sources",
)  # fmt: skip
_SAID = {
    "codec", "fingerprint", "weights", "data", "finished", "seconds", "hardware", "packages", "python", "commit",
}  # fmt: skip
_HARDWARE, _DATA = {"cpu", "cores", "gpus"}, {"images", "sha256"}
"""What an evaluation.json must say, and what of the machine and of each data set."""
_USUAL = {"caption": "first", "mode": "exact", "patch-size": 256, "text-encoder": Experiment().text_encoder}
"""How one evaluates; a label says what is otherwise."""
_RUN_COLUMNS = (
    "run", "folder", "label", "codec", "ablation", "fingerprint", "profile", "lmbda", "epochs", "steps", "seed", "experiment",
    "hours", "evaluated_s", "options", "finished", "commit", "versions", "hardware",
)  # fmt: skip
_ROW_COLUMNS = ("dataset", "images", "data_sha256", "unjudged", "name")


def collect(*folders: str | os.PathLike) -> pd.DataFrame:
    """Every run at or below the folders in one tidy table: a row per run and image, a column per metric.

    What is measured of an image has `evaluate`'s column names (see `MEASURES`; one that a run lacks is NaN). What is so of
    the run is repeated in each row: run (its folder, relative to the one given), folder (where it is), label (what to call
    it in a figure), codec, fingerprint, ablation ("baseline", "context", "linformer", "keywords", "keywords-tokens", joined
    by " + "), profile, lmbda, epochs (taken, perhaps a fraction), steps, seed, experiment (its JSON, "" for a checkpoint
    from elsewhere), hours of training; evaluated_s (seconds), options (of its command), finished, commit, versions and
    hardware of the evaluation. Of the data set: dataset, images, data_sha256, unjudged (why its figures neither
    reproduce nor refute published ones, "" if they may).

    A folder with half a run, or a damaged one, is named in a printed line and left out, and so is one that does not exist.
    No runs give an empty table.
    """
    import pandas as pd

    tables: dict[str, pd.DataFrame] = {}
    for root in map(Path, folders):
        if not root.is_dir():
            print(f"There is no folder {root}, so no run in it.")
        for folder in _runs_below(root):
            try:
                name = root.name if folder == root else str(folder.relative_to(root))
                name = str(folder) if name in tables else name
                tables[name] = _read(folder).assign(run=name, folder=str(folder))
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
    """The mean of each metric over the images of each run and data set, with what is so of the run: a row per both."""
    by = runs.groupby(["run", "dataset"], sort=False, as_index=False)
    kept = [name for name in (*_RUN_COLUMNS, *_ROW_COLUMNS) if name not in ("run", "dataset", "name")]
    return by.agg({**dict.fromkeys(kept, "first"), **dict.fromkeys(MEASURES, "mean")})


def bd_rates(
    runs: pd.DataFrame,
    published: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    metrics: Sequence[str] = ("psnr", "ms_ssim", "lpips_01"),
) -> pd.DataFrame:
    """BD-rates between the curves that runs of one label draw over lambda: each against its baseline and the published.

    A row per data set, metric, anchor and label, with both curves' numbers of points, the BD-rate in percent (negative: fewer
    bits than the anchor at equal quality) and, where there is none, a note that says why; a curve with too few points has
    one row in all. `published` are curves on Kodak, as `published_curves` gives them.
    """
    import pandas as pd

    table, rows = (
        points(runs).drop_duplicates(["dataset", "label", "bpp"]),
        [],
    )  # a codec may have been evaluated twice
    for (dataset, label), curve in table.groupby(["dataset", "label"], sort=False):
        if len(curve) < BD_POINTS:
            few = f"too few points: a BD-rate needs {BD_POINTS}, so train at more lambda"
            rows.append({"dataset": dataset, "curve": label, "points": len(curve), "note": few})
            continue
        same = (table["dataset"] == dataset) & (table["profile"] == curve["profile"].iloc[0])
        same &= (table["ablation"] == "baseline") & (curve["ablation"].iloc[0] != "baseline")
        anchors = dict(iter(table[same].groupby("label", sort=False)))
        if dataset == "kodak":
            anchors |= {name: pd.DataFrame(c) for name, c in (published or {}).items()}
        for anchor, other in anchors.items():
            for metric in metrics:
                if metric in other and other[metric].notna().any() and curve[metric].notna().any():
                    found = {"dataset": dataset, "metric": metric, "anchor": anchor, "curve": label}
                    rows.append(found | _bd_rate(other, curve, metric))
    columns = [
        "dataset",
        "metric",
        "anchor",
        "curve",
        "points of the anchor",
        "points",
        "BD-rate in %",
        "note",
    ]
    return pd.DataFrame(rows, columns=columns)


def _bd_rate(anchor: pd.DataFrame, curve: pd.DataFrame, metric: str) -> dict[str, Any]:
    curves = [c[["bpp", metric]].dropna() for c in (anchor, curve)]
    figures = {
        "points of the anchor": len(curves[0]),
        "points": len(curves[1]),
        "BD-rate in %": math.nan,
        "note": "",
    }
    if min(map(len, curves)) < BD_POINTS:
        return figures | {"note": f"too few points: a BD-rate needs {BD_POINTS} on both curves"}
    try:
        return figures | {"BD-rate in %": bd_rate(*(c[name] for c in curves for name in ("bpp", metric)))}
    except SettingError as error:
        return figures | {"note": str(error)}


def cards(runs: pd.DataFrame) -> pd.DataFrame:
    """The reproducibility card: for each run its seed, data, hardware, versions, times, and the commands that repeat it."""
    import pandas as pd

    columns = [
        "run",
        "what",
        "fingerprint",
        "seed",
        "data, SHA-256",
        "training",
        "evaluation",
        "hardware",
        "commit",
        "versions",
    ]
    rows = []
    for name, of_run in runs.groupby("run", sort=False):
        run, sets = of_run.iloc[0], of_run.drop_duplicates("dataset")
        data = "; ".join(
            f"{s['dataset']}: {s['images']} images, {s['data_sha256'][:12]}" for _, s in sets.iterrows()
        )
        seed = "–" if math.isnan(run["seed"]) else f"{run['seed']:.0f}"
        trained = "elsewhere" if math.isnan(run["hours"]) else _duration(3600 * run["hours"])
        measured = f"{_duration(run['evaluated_s'])}, {run['finished'][:10]}"
        commit = run["commit"][:12] + ("+changes" if run["commit"].endswith("+changes") else "")
        of = [
            name,
            run["label"],
            run["fingerprint"],
            seed,
            data,
            trained,
            measured,
            run["hardware"],
            commit,
            run["versions"],
        ]
        rows.append([*of, " && ".join(_commands(run, sets))])
    return pd.DataFrame(rows, columns=[*columns, "to repeat it"])


def published_curves(
    data_dir: str | os.PathLike | None = None, up_to: float = math.inf
) -> dict[str, dict[str, list[float]]]:
    """Published rate-distortion curves on Kodak, {codec: {"bpp": [...], "psnr": [...]}}, MS-SSIM where it was published.

    Points at rates above `up_to` bits per pixel are left out.
    """
    text = bundled("reference/kodak_published_rd.json", data_dir).read_text(encoding="utf-8")
    return {
        name: {
            m: [v for v, rate in zip(values, curve["bpp"]) if rate <= up_to]
            for m, values in curve.items()
            if values
        }
        for name, curve in json.loads(text)["codecs"].items()
    }


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds < 100
        else f"{seconds / 60:.3g} min"
        if seconds < 6000
        else f"{seconds / 3600:.3g} h"
    )


def _runs_below(root: Path) -> Iterator[Path]:
    """Folders that are, or were to become, runs; what lies inside one is its own (a data set's files may be thousands)."""
    for folder, below, files in os.walk(root):
        if {"experiment.json", "evaluation.json", "evaluation.csv"} & set(files):
            yield Path(folder)
            below.clear()
        below.sort()


def _read(folder: Path) -> pd.DataFrame:
    """The table of one run. Raises `DataError`, with a sentence that names the folder, for one that cannot be trusted."""
    about, rows = _record(folder)
    exp = _experiment(folder, about)
    weights, hardware = about["weights"], about["hardware"]
    rows["images"] = rows["dataset"].map(rows["dataset"].value_counts())
    counts = {name: sum(rows["dataset"] == name) for name in about["data"]}
    expected = {name: data["images"] for name, data in about["data"].items()}
    if counts != expected or rows.duplicated(["dataset", "name"]).any():
        raise DataError(
            f"{folder}: evaluation.csv has rows of {counts}, but evaluation.json says {expected}."
        )
    steps, total = weights.get("steps", math.nan), weights.get("total_steps", weights.get("steps", math.nan))
    epochs = math.nan if exp is None else exp.epochs * (1.0 if math.isnan(total) else steps / total)
    unjudged = {name: "; ".join(_unjudged(exp, about, epochs, name)) for name in counts}
    lmbda = _lmbda_in(weights.get("name", "")) if exp is None else exp.lmbda
    of_run = {
        "label": _label(exp, about, epochs), "ablation": "baseline" if exp is None else ablation_of(exp), "lmbda": lmbda,
        "codec": about["codec"], "fingerprint": about["fingerprint"], "profile": "" if exp is None else exp.profile,
        "epochs": epochs, "steps": steps, "seed": math.nan if exp is None else exp.seed,
        "experiment": "" if exp is None else exp.to_json(), "hours": weights.get("hours", math.nan),
        "evaluated_s": about["seconds"],
        "options": " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in _options(exp, about).items()),
        "finished": about["finished"], "commit": about["commit"] or "",
        "versions": f"Python {about['python']}, " + ", ".join(f"{k} {v}" for k, v in about["packages"].items() if v),
        "hardware": ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]]),
    }  # fmt: skip
    return rows.assign(
        **of_run,
        unjudged=rows["dataset"].map(unjudged),
        data_sha256=rows["dataset"].map({name: data["sha256"] for name, data in about["data"].items()}),
    )


def _record(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    import pandas as pd

    if not (folder / "evaluation.json").is_file():
        state = (
            "its evaluation is unfinished"
            if (folder / "unfinished").is_dir()
            else "it has not been evaluated"
        )
        raise DataError(f"{folder}: {state}, there is no evaluation.json.")
    try:
        about = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        missing = _SAID - about.keys()
        for part, names in [
            (about.get("hardware"), _HARDWARE),
            *((d, _DATA) for d in about.get("data", {}).values()),
        ]:
            missing |= names - (part or {}).keys()
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: evaluation.json is damaged ({error}). Evaluate again.") from None
    if missing:
        raise DataError(f"{folder}: evaluation.json does not say {', '.join(sorted(missing))}.")
    table = folder / "evaluation.csv"
    if "csv_sha256" in about and table.is_file() and sha256(table) != about["csv_sha256"]:
        raise DataError(
            f"{folder}: evaluation.csv is not the one that evaluation.json describes. Evaluate again."
        )
    try:
        rows = pd.read_csv(
            table,
            dtype=dict.fromkeys(("codec", "dataset", "name", "caption"), str),
            keep_default_na=False,
            na_values={name: [""] for name in MEASURES},
        )
        measured = [name for name in MEASURES if name in rows]
        rows[measured] = rows[measured].astype(float)
        absent = {"dataset", "name", "bpp", "psnr"} - set(rows)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{folder}: evaluation.csv is missing or damaged ({reason}). Evaluate again."
        ) from None
    if absent or not (rows["bpp"] > 0).all() or rows["psnr"].isna().any():
        lacking = f"has no {', '.join(sorted(absent))}" if absent else "has rows without bpp or psnr"
        raise DataError(f"{folder}: evaluation.csv {lacking}. Evaluate again.")
    return about, rows.drop(columns="codec", errors="ignore")


def _experiment(folder: Path, about: Mapping[str, Any]) -> Experiment | None:
    """The experiment whose weights were evaluated; None where they come from elsewhere."""
    stated = about["weights"].get("experiment")
    try:
        evaluated = None if stated is None else Experiment.from_json(json.dumps(stated))
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


def ablation_of(exp: Experiment) -> str:
    """What an experiment changes in the model or its text: "baseline", or the names of the changes joined by " + "."""
    return " + ".join(exp.ablations.values()) or "baseline"


def _label(exp: Experiment | None, about: Mapping[str, Any], epochs: float) -> str:
    """What to call the curve that a run is a point of: the same for runs that differ in lambda alone."""
    usual = _USUAL | {"captions": "published" if exp is None else exp.captions}
    measured = [f"{name}={v}" for name, v in _options(exp, about).items() if v != usual.get(name, v)]
    if exp is None:
        return ", ".join(
            [re.sub(r"(lambda_)?[\d.]+\.pth\.tar$", "TACO's own weights", about["codec"]), *measured]
        )
    if _is_bundled(about["codec"], about["fingerprint"]):
        return ", ".join([ablation_of(exp), "bundled demo codec", *measured])
    plain = baseline(exp.profile)
    changed = {
        name: now for name, (_, now) in plain.diff(exp).items() if name not in ("lmbda", "epochs", *ABLATIONS)
    }
    changed |= {
        name: now for name, now in changed.pop("sizes", {}).items() if now != getattr(plain.sizes, name)
    }
    if starts_from_sibling(exp) and starts_from_sibling(plain):
        changed.pop("init", None)
    varied = [f"{name}={'none' if now == '' else now}" for name, now in changed.items()]
    profile = [] if exp.profile == "paper" else [exp.profile]
    length = f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"
    return ", ".join([ablation_of(exp), *varied, *measured, *profile, length])


def starts_from_sibling(exp: Experiment) -> bool:
    """Say whether a run starts from a bundled codec with its own ablation, as its baseline does from one without."""
    there = bundled_codecs().get(exp.init)
    return there is not None and there.ablations == exp.ablations


@functools.cache
def _is_bundled(codec: str, fingerprint: str) -> bool:
    """Whether it is the bundled codec of this name, by its weights: a run may be called like one."""
    path = bundled(f"checkpoints/{codec}.safetensors")
    if not path.is_file():
        return False
    from taco_nb.codec import load

    return load(path).fingerprint.hex() == fingerprint


def _unjudged(exp: Experiment | None, about: Mapping[str, Any], epochs: float, dataset: str) -> list[str]:
    """Why figures neither reproduce nor refute published ones; [] where they may."""
    paper, reasons, data = Experiment(), [], about["data"][dataset]
    if exp is None:
        if about.get("text_encoder") != paper.text_encoder:
            reasons.append(f"captions read through {about.get('text_encoder')}")
        if "sizes" not in about:
            reasons.append("its model's size is not recorded")
        elif json.dumps(about["sizes"]) != json.dumps(vars(paper.sizes)):
            reasons.append("not a model of the paper's size")
    elif exp.profile != "paper":
        reasons.append(f"profile {exp.profile}")
    else:
        fixed = (
            _PROTOCOL if exp.captions == "context" else (*_PROTOCOL, "text_tokens")
        )  # paragraphs may take more
        reasons += [f"{name} is {now}" for name, (_, now) in paper.diff(exp).items() if name in fixed]
        stated = json.loads(bundled("reference/report.json").read_text(encoding="utf-8"))
        needed = stated.get(ablation_of(exp), {}).get("epochs", stated["protocol"]["epochs_baseline"])
        if epochs < needed:
            reasons.append(f"{epochs:.3g} of {needed} epochs")
    reasons += [
        f"{metric} through weights that were given to it"
        for metric, network in about.get("metrics", {}).items()
        if network["weights"].startswith("given")
    ]
    asked = {"mode": "exact"} | ({"caption": "best"} if dataset == "coco" else {"patch-size": 256})
    done = _options(exp, about)
    reasons += [
        f"evaluated with {name} {done.get(name)}" for name, value in asked.items() if done.get(name) != value
    ]
    if data.get("captions") != (kind := paper.captions if exp is None else exp.captions):
        reasons.append(f"evaluated with captions {data.get('captions', 'of an unknown kind')}, not {kind}")
    if dataset not in IMAGES:
        reasons.append(f"{dataset} is not a data set of the report")
    elif data["images"] + data.get("skipped", 0) < IMAGES[dataset]:
        reasons.append(f"{data['images']} of {IMAGES[dataset]:,} images")
    return reasons


def _lmbda_in(name: str) -> float:
    """The lambda in a checkpoint's file name, as TACO's authors write it (0.0004.pth.tar, lambda_0.0016.pth.tar)."""
    found = re.fullmatch(r"(?:lambda_)?(\d*\.\d+)\.pth\.tar", name)
    return float(found[1]) if found else math.nan


def _options(exp: Experiment | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """How the evaluation was made, as options of `taco-nb evaluate`; what is not known is left out."""
    kinds = {data.get("captions") for data in about["data"].values()}
    options = {
        "captions": kinds.pop() if len(kinds) == 1 else None,
        "caption": about.get("caption", {}).get("rule"),
        "mode": about.get("mode"),
        "batch-size": about.get("batch_size"),
        "patch-size": about.get("subject", {}).get("patch_size"),
        "text-encoder": about.get("text_encoder") if exp is None else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _commands(run: pd.Series, sets: pd.DataFrame) -> Iterator[str]:
    """What to type to train and to evaluate a run again."""
    folder, source = short_path(Path(run["folder"])), run["codec"]
    if run["experiment"] and not _is_bundled(run["codec"], run["fingerprint"]):
        exp = Experiment.from_json(run["experiment"])
        source = folder
        changes = {name: now for name, (_, now) in baseline(exp.profile).diff(exp).items()}
        given = [
            "--profile",
            exp.profile,
            *(word for name, now in changes.items() for word in ("--set", f"{name}={now}")),
        ]
        if "sizes" in changes:
            given = ["--experiment", f"{folder}/experiment.json"]
        yield shlex.join(["taco-nb", "train", *given, "--out", folder])
    whole = all(s["images"] == IMAGES.get(s["dataset"]) for _, s in sets.iterrows())
    limit = [] if whole else ["--limit", f"{max(sets['images'])}"]
    options = [*limit, *shlex.split(run["options"]), "--out", folder]
    yield shlex.join(["taco-nb", "evaluate", source, *sets["dataset"], *options])
