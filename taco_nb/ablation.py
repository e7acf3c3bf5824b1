"""What the three ablation notebooks share: train the change and the baseline alike, measure both, quote the report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taco_nb.codec import load
from taco_nb.data import training_pairs
from taco_nb.evaluation import evaluate, means
from taco_nb.experiment import Experiment
from taco_nb.files import bundled
from taco_nb.notebook import Parameters
from taco_nb.report import COLUMNS, DATASETS
from taco_nb.training import Run, fit
from taco_nb.training.loop import Batches

if TYPE_CHECKING:
    import pandas as pd


def differences(baseline: Experiment, changed: Experiment) -> pd.DataFrame:
    """The settings in which two experiments differ, a row each: the whole of an ablation."""
    import pandas as pd

    rows = [(name, str(was), str(now)) for name, (was, now) in baseline.diff(changed).items()]
    return pd.DataFrame(rows, columns=["setting", "baseline", "here"])


def same_steps(baseline: Experiment, changed: Experiment, data_dir: str | None = None) -> Experiment:
    """`changed` with its epochs set so that it takes as many steps as `baseline`, as nearly as whole epochs can.

    Epochs differ in length where captions do in number: the published ones are five to an image, paragraphs may be one.
    """
    steps = [
        len(Batches(len(pairs), exp.batch_size, exp.seed))
        for exp in (baseline, changed)
        for pairs in [training_pairs(exp.train_data, exp.crop, data_dir, captions=exp.captions)]
    ]
    return changed.replace(epochs=max(1, round(baseline.epochs * steps[0] / steps[1])))


def train(p: Parameters, experiments: Mapping[str, Experiment]) -> dict[str, Run]:
    """Train each experiment into a folder of its own below `p.runs`, or resume it, or find it finished.

    `p.max_hours` is for all of them together; one that its end stops is returned unfinished.
    """
    started, runs = time.monotonic(), {}
    for label, exp in experiments.items():
        folder = p.runs / f"{label.replace(' ', '-')}-{exp.key}"
        hours = None if p.max_hours is None else max(0.0, p.max_hours - (time.monotonic() - started) / 3600)
        runs[label] = fit(exp, folder, data_dir=p.data_dir, device=p.device, max_hours=hours)
        taken, total = runs[label].steps, runs[label].total_steps
        print(f"{label}: {taken} of {total} steps" + ("" if runs[label].finished else "; run this again to go on"))
    return runs


def measure(p: Parameters, runs: Mapping[str, Run]) -> pd.DataFrame:
    """Evaluate every run on the profile's data sets, under the captions it was trained on; `codec` is its label."""
    import pandas as pd

    tables = []
    for label, run in runs.items():
        codec = load(run.dir, device=p.torch_device)
        codec.name = label
        tables.append(evaluate(codec, p.datasets(run.experiment.captions), run.dir))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def beside_report(p: Parameters, ablation: str, runs: Mapping[str, Run], results: pd.DataFrame) -> pd.DataFrame:
    """What the report says of an ablation ("context", "linformer" or "keywords"), beside what `results` say.

    `runs` and `results` hold the baseline first and the ablation second. A figure is compared with the mean measured
    under the same metric on the same data set; a sentence with the differences to the baseline on every data set
    that both were measured on.
    What is not measured (yet) is a dash.
    """
    import pandas as pd

    report = json.loads(bundled("reference/report.json", p.data_dir).read_text(encoding="utf-8"))
    baseline, label = list(runs)[:2]
    table = means(results).set_index(["codec", "dataset"])
    epochs = report[ablation].get("epochs", report["protocol"]["epochs_baseline"])
    here = f"{runs[label].steps / runs[label].total_steps * runs[label].experiment.epochs:g}"
    sets = {name: set(results["dataset"][results["codec"] == name]) for name in (baseline, label)}
    both = [dataset for dataset in dict.fromkeys(results["dataset"]) if dataset in sets[baseline] & sets[label]]
    rows = []
    for dataset, figures in _figures(report[ablation]).items():
        for metric, value in figures.items():
            column, key = COLUMNS.get(metric, metric), (label, DATASETS[dataset])
            found = f"{table.loc[key, column]:.4f}" if key in table.index and column in table else "–"
            rows.append((f"{metric}, {dataset}", f"{value}", f"{epochs}", found, here))
    for metric, sentence in report[ablation].get("text", {}).items():
        column = COLUMNS.get(metric, metric)
        columns = ["bpp", "psnr"] if metric == "accuracy" else [column]
        changes = [
            f"{dataset}: {name} {table.loc[(label, dataset), name] - table.loc[(baseline, dataset), name]:+.4f}"
            for dataset in both
            for name in columns
            if name in table
        ]
        rows.append((metric, sentence, f"{epochs}", "; ".join(changes) or "–", here))
    columns = ["what", "the report", "its epochs", f"here, {label} against {baseline}", "epochs here"]
    return pd.DataFrame(rows, columns=columns)


def _figures(stated: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures per data set among what the report states of an ablation."""
    return {name: value for name, value in stated.items() if name in DATASETS}
