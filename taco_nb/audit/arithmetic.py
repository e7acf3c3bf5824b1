"""Claims that follow, or do not, from the report's own figures are judged here by arithmetic."""

from __future__ import annotations

import math
from statistics import mean, stdev

import torch
from torch.nn.functional import normalize

from taco_nb.audit.material import Finding, Material, found
from taco_nb.experiment import Experiment
from taco_nb.metrics.joint_space import cmmd
from taco_nb.report import DATASETS
from taco_nb.training.loop import learning_rate_factor
from taco_nb.verdicts import NOT_MEASURED, TOLERANCE


def ablations_differ_in_one_thing(material: Material) -> Finding:
    """Compare the epochs that the report states for each change with the baseline's."""
    baseline = material.stated["protocol"]["epochs_baseline"]
    epochs = {name: of["epochs"] for name, of in material.stated.items() if "epochs" in of}
    other = {name: count for name, count in epochs.items() if count != baseline}
    listed = ", ".join(f"{name} {count}" for name, count in epochs.items())
    return found(
        not other,
        f"The baseline took {baseline} epochs, and the changes took others: {listed}. So each of these differs from it in "
        "two things, and for the paragraphs no number is given.",
    )


def keywords_trained_like_the_baseline(material: Material) -> Finding:
    """Compare the steps, and the steps at a lowered learning rate, of the keyword model and the baseline."""
    epochs, baseline = material.stated["keywords"]["epochs"], material.stated["protocol"]["epochs_baseline"]
    return found(
        epochs == baseline,
        f"The keyword model took {epochs} epochs of the baseline's {baseline}, {1 - epochs / baseline:.0%} fewer. "
        f"{_unlowered(epochs, baseline)} A loss may be due to either.",
    )


def learning_rate_had_fallen(material: Material, ablation: str) -> Finding:
    """Say what is known of a training that stopped early; only training on can tell how much it would have gained."""
    epochs, baseline = material.stated[ablation]["epochs"], material.stated["protocol"]["epochs_baseline"]
    return Finding(
        NOT_MEASURED,
        f"No run here has trained for {epochs} and for {baseline} epochs. {_unlowered(epochs, baseline)} A trend before that "
        "does not tell what follows it.",
    )


def fifty_epochs_take_days(material: Material) -> Finding:
    """Multiply the report's minutes per epoch by the baseline's epochs, in days."""
    days = _hours(material) / 24
    return found(
        3 <= days <= 4,
        f"{_multiplied(material)} are {days:.1f} days, at the keyword model's {_minutes(material)} minutes.",
    )


def fifty_epochs_exceed_a_job(material: Material) -> Finding:
    """Multiply the report's minutes per epoch by the baseline's epochs, in hours."""
    hours, limit = _hours(material), material.stated["keywords"]["hours_limit"]
    return found(
        hours > limit and math.floor(hours) == 83,
        f"{_multiplied(material)} are {hours:.1f} hours. A run that goes on in a second job needs {math.ceil(hours / limit)} "
        f"of {limit} hours each; TACO's checkpoints hold what it takes to go on.",
    )


def job_holds_27_epochs(material: Material) -> Finding:
    """Divide a job's hours by the minutes of an epoch."""
    limit, epochs = (material.stated["keywords"][key] for key in ("hours_limit", "epochs"))
    most = math.floor(60 * limit / _minutes(material))
    return found(
        epochs <= most,
        f"{epochs} epochs take {epochs * _minutes(material) / 60:.0f} of the {limit} hours; {most} would have fitted.",
    )


def change_is_small(material: Material, metric: str) -> Finding:
    """Compare the report's figures with keywords and without, by the share within which we call figures similar."""
    changes = _changes(material, metric)
    return found(
        all(abs(change) <= TOLERANCE for change in changes.values()),
        f"{_listed(material, metric, changes)} We call figures similar within {TOLERANCE:.0%}.",
    )


def change_is_more_than_similar(material: Material, metric: str) -> Finding:
    """Ask whether a fall is larger than what we, and the report elsewhere, call similar."""
    changes = _changes(material, metric)
    return found(
        all(change < -TOLERANCE for change in changes.values()),
        f"{_listed(material, metric, changes)} That is within {TOLERANCE:.0%}, which we call similar, as the report does "
        "with paragraphs; one training of each cannot tell it from chance.",
    )


def figure_rises_on_all_sets(material: Material, metric: str) -> Finding:
    """See whether a figure rises with keywords on all data sets, as far as the report's text states it."""
    changes = _changes(material, metric)
    known = f"Its text has figures for {len(changes)} of {len(DATASETS)} data sets. {_listed(material, metric, changes)}"
    if len(changes) < len(DATASETS) and all(change > 0 for change in changes.values()):
        return Finding(NOT_MEASURED, known)
    return found(all(change > 0 for change in changes.values()), known)


def cmmd_is_unbiased(material: Material) -> Finding:
    """Draw two sets from one distribution again and again, and average their CMMD, which would be 0 without a bias."""
    generator = torch.Generator().manual_seed(material.seed)
    # Vectors around a common one, as CLIP's are. The official program's estimator pairs each vector with itself as well.
    centre = torch.randn(64, generator=generator)
    sizes, draws, averages, unbiased = (12, 24, 48, 96), 40, [], True
    for size in sizes:
        values = []
        for _ in range(draws):
            both = normalize(centre + torch.randn(2 * size, 64, generator=generator), dim=1)
            values.append(cmmd(*both.split(size)))
        averages.append(mean(values))
        unbiased &= abs(averages[-1]) <= 3 * stdev(values) / math.sqrt(draws)  # three standard errors
    listed = ", ".join(f"{average:.3f} with {size}" for size, average in zip(sizes, averages))
    kodak = material.stated["baseline"]["Kodak"]["cmmd"], material.stated["keywords"]["Kodak"]["cmmd"]
    return found(
        unbiased,
        f"Between two sets of one and the same distribution its mean is {listed} vectors each: it halves with each doubling "
        f"and is not 0. The report took {kodak[0]} and {kodak[1]} of Kodak's 24 pictures.",
    )


# The report's figures -------------------------------------------------------------------------------------------------


def _minutes(material: Material) -> float:
    return material.stated["keywords"]["minutes_per_epoch"]


def _hours(material: Material) -> float:
    return material.stated["protocol"]["epochs_baseline"] * _minutes(material) / 60


def _multiplied(material: Material) -> str:
    return f"{material.stated['protocol']['epochs_baseline']} times {_minutes(material)} minutes"


def _unlowered(epochs: int, baseline: int) -> str:
    """Say whether training for fewer epochs, under the baseline's schedule, reached its lower learning rates."""
    schedule = Experiment().schedule
    falls = next(n for n in range(baseline) if learning_rate_factor(schedule, n, baseline) < 1)
    reached = "had fallen by then" if epochs > falls else "had not fallen yet"
    return f"The baseline's learning rate falls after {falls} epochs, so if it was kept it {reached}."


def _changes(material: Material, metric: str) -> dict[str, float]:
    """Return by how much, as a share, a figure changes with keywords on each data set that has both figures."""
    changes = {}
    for name in DATASETS:
        old, new = (material.stated[of].get(name, {}) for of in ("baseline", "keywords"))
        if metric in old and metric in new:
            changes[name] = new[metric] / old[metric] - 1
    return changes


def _listed(material: Material, metric: str, changes: dict[str, float]) -> str:
    listed = []
    for name, change in changes.items():
        old, new = (material.stated[of][name][metric] for of in ("baseline", "keywords"))
        listed.append(f"{name}: {old} to {new}, {change:+.0%}")
    return "; ".join(listed) + "."
