"""The ablation notebooks train a change and the baseline alike and evaluate both; the steps that they share are here."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pandas as pd

from taco_nb.codec import Codec, load
from taco_nb.data import training_pairs
from taco_nb.evaluation import evaluate
from taco_nb.experiment import Experiment
from taco_nb.notebook import Parameters
from taco_nb.training import Run, fit
from taco_nb.training.loop import Batches, OnLog


def differences(baseline: Experiment, changed: Experiment) -> pd.DataFrame:
    """Return a row for each setting in which two experiments differ. These few rows are the whole of an ablation."""
    rows = [(name, str(was), str(now)) for name, (was, now) in baseline.diff(changed).items()]
    return pd.DataFrame(rows, columns=["setting", "baseline", "here"])


def same_steps(baseline: Experiment, changed: Experiment, data_dir: str | None = None) -> Experiment:
    """Return `changed` with the whole number of epochs that takes most nearly as many steps as `baseline`.

    An epoch is longer where images have more captions: the published ones are five to an image, paragraphs may be one.
    """
    steps = [
        len(Batches(len(pairs), exp.batch_size, exp.seed))
        for exp in (baseline, changed)
        for pairs in [training_pairs(exp.train_data, exp.crop, data_dir, captions=exp.dataset_captions)]
    ]
    return changed.replace(epochs=max(1, round(baseline.epochs * steps[0] / steps[1])))


def train(
    p: Parameters, experiments: Mapping[str, Experiment], on_log: OnLog | None = None
) -> dict[str, Run]:
    """Train each experiment into a folder of its own below `p.runs`, or resume it, or find it finished.

    `on_log` is passed to `fit`. `p.max_hours` is for all runs together, and counts from when the parameters were checked.
    Where its end or a signal stops one, it is returned unfinished, and those after it take a single step.
    """
    runs = {}
    for label, exp in experiments.items():
        folder = p.runs / f"{label.replace(' ', '-')}-{exp.key}"
        hours = None if p.max_hours is None else max(0.0, p.max_hours - (time.monotonic() - p.began) / 3600)
        runs[label] = fit(
            exp, folder, data_dir=p.data_dir, device=p.device,
            max_hours=hours if all(run.finished for run in runs.values()) else 0.0,
            num_processes=p.num_processes, num_workers=p.num_workers, accumulation=p.accumulation,
            on_log=on_log,
        )  # fmt: skip
        advice = "" if runs[label].finished else "; run this again to go on"
        print(f"{label}: {runs[label].steps} of {runs[label].total_steps} steps{advice}")
    return runs


def codecs(p: Parameters, runs: Mapping[str, Run]) -> dict[str, Codec]:
    """Return the codec of every run, named by its label, on the device that was asked for."""
    loaded = {label: load(run.dir, device=p.torch_device, data_dir=p.data_dir) for label, run in runs.items()}
    for label, codec in loaded.items():
        codec.name = label
    return loaded


def evaluate_runs(p: Parameters, runs: Mapping[str, Run], whole: bool = False) -> pd.DataFrame:
    """Evaluate every run on the profile's data sets, and name it in the table by its label.

    Each is given captions of the kind that it was trained on. A run whose training was stopped is named in a line and left
    out, since its figures would not stay. `whole` is as for `Parameters.datasets`.
    """
    for label, run in runs.items():
        if not run.finished:
            print(f"Not evaluated: {label}, which has taken {run.steps} of {run.total_steps} steps.")
    tables = []
    for label, codec in codecs(p, {label: run for label, run in runs.items() if run.finished}).items():
        sets = p.datasets(runs[label].experiment.dataset_captions, whole)
        tables.append(
            evaluate(codec, sets, runs[label].dir, caption=p.caption, num_processes=p.num_processes)
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
