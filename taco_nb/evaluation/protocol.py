"""This module gives an evaluation its label, the commands that repeat it, and the reasons not to judge the report by it.

`evaluate` knows all this and writes it down, so that no reader of its files has to guess.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from taco_nb.checkpoint import trained_as
from taco_nb.codec import Codec, load
from taco_nb.data import CaptionedImages
from taco_nb.experiment import Experiment, baseline
from taco_nb.files import bundled
from taco_nb.metrics.networks import Network, state_digest
from taco_nb.settings import Sizes

IMAGES = {"coco": 30504, "clic": 428, "kodak": 24}
"""The report's protocol has so many images of each set. MS-COCO's that are too small for its crop are counted too."""
PUBLISHED_CAPTIONS = {
    "clic": "a9edc7d6a40e7334acb991134300affe21d50a86f6e25c8f8af0884251b2de83",
    "kodak": "4dc48c7a97d8314c1c4b4c9ef526816f15157702216636164c0bdac74552c2f8",
}
"""`captions_digest` of the captions that TACO's authors published for these sets."""
FOLDER = "{folder}"
"""Stands for an evaluation's own folder in the commands that repeat it, so that the folder may be moved."""
_FIXED = (
    "sizes", "init", "text_encoder", "train_data", "crop", "perceptual", "k_P", "k_J", "batch_size", "learning_rate",
    "aux_learning_rate", "optimizer", "schedule", "gradient_clip", "text_length", "keyword_weight", "keyword_sources",
)  # fmt: skip
"""The settings of an experiment that the report's protocol fixes."""
_USUAL = {"caption": "first", "mode": "exact", "patch-size": 256, "text-encoder": Experiment().text_encoder}
"""How one evaluates, as options of the command line; a label says what is otherwise."""


def of_codec(codec: Codec) -> dict[str, Any]:
    """Return what evaluation.json says of the codec: what it is, what it was trained for, and by which command."""
    exp, about = trained_as(codec.about), codec.about
    return {
        "codec": codec.name,
        "fingerprint": codec.fingerprint.hex(),
        "weights": about,
        "text_encoder": codec.text_encoder,
        "sizes": _sizes_of(codec),
        "ablation": "baseline" if exp is None else ablation_of(exp),
        "lmbda": _lmbda_in(about.get("name", "")) if exp is None else exp.lmbda,
        "epochs": _epochs_taken(exp, about),
        "train": None if exp is None or is_bundled(codec) else train_command(exp),
    }


def of_data_set(
    codec: Codec,
    dataset: CaptionedImages,
    how: Mapping[str, Any],
    found: Mapping[str, Network],
    sets: Sequence[CaptionedImages],
) -> dict[str, Any]:
    """Return what evaluation.json says of a data set beside its figures: label, command, captions, and what is amiss.

    `how` has caption, batch_size and patch_size, as `evaluate` takes them; `sets` are all that it was called with.
    """
    captions = {"kind": dataset.captioned, "file": dataset.captions_file, "sha256": dataset.captions_digest()}
    exp = trained_as(codec.about)
    options = {"captions": dataset.captioned, "caption": how["caption"], "mode": codec.mode}
    options |= {"batch-size": how["batch_size"], "patch-size": how["patch_size"]}
    if exp is None:
        options["text-encoder"] = codec.text_encoder
    reasons = _amiss_in_training(codec, exp) + _amiss_in_evaluation(exp, dataset, options, captions, found)
    return {
        "images": len(dataset),
        "skipped": dataset.skipped,
        "captions": captions,
        "label": label_of(codec, exp, options),
        "unjudged": reasons,
        "evaluate": evaluate_command(codec, exp, sets, options),
    }


def ablation_of(exp: Experiment) -> str:
    """Return "baseline", or the names of what an experiment changes in the model or its text, joined by " + "."""
    return " + ".join(exp.ablations.values()) or "baseline"


@functools.cache
def _bundled_digest(name: str) -> str | None:
    path = bundled(f"checkpoints/{name}.safetensors")
    return state_digest(load(path).net) if path.is_file() else None


def is_bundled(codec: Codec) -> bool:
    """Tell by its weights whether this is the bundled codec of its name, since a run may be called like one."""
    digest = _bundled_digest(codec.name)
    return digest is not None and digest == state_digest(codec.net)


def label_of(codec: Codec, exp: Experiment | None, options: Mapping[str, Any]) -> str:
    """Return what to call the curve that this is a point of: the same for runs that differ in lambda alone."""
    usual = _USUAL | {"captions": "published" if exp is None else exp.dataset_captions}
    measured = [f"{name}={value}" for name, value in options.items() if value != usual.get(name, value)]
    if exp is None:
        name = re.sub(r"(lambda_)?[\d.]+\.pth\.tar$", "TACO's own weights", codec.name)
        return ", ".join([name, *measured])
    if is_bundled(codec):
        return ", ".join([ablation_of(exp), "bundled demo codec", *measured])
    plain = baseline(exp.profile)
    varied = {name: now for name, (_, now) in plain.diff(exp).items()}
    varied |= {name: now for name, now in vars(exp.sizes).items() if now != getattr(plain.sizes, name)}
    # These are not in the label, or have a place of their own in it.
    for name in ("lmbda", "epochs", "sizes", *exp.ablations):
        varied.pop(name, None)
    settings = [f"{name}={'none' if now == '' else now}" for name, now in varied.items()]
    profile = [] if exp.profile == "paper" else [exp.profile]
    epochs = _epochs_taken(exp, codec.about)
    length = f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"
    return ", ".join([ablation_of(exp), *settings, *measured, *profile, length])


# Whether figures may be judged ----------------------------------------------------------------------------------------


def _amiss_in_training(codec: Codec, exp: Experiment | None) -> list[str]:
    """Return in what the weights do not follow the report's protocol."""
    paper = Experiment()
    if exp is None:
        reasons = []
        if codec.text_encoder != paper.text_encoder:
            reasons.append(f"captions read through {codec.text_encoder}")
        if _sizes_of(codec) != vars(paper.sizes):
            reasons.append("not a model of the paper's size")
        return reasons
    if exp.profile != "paper":
        return [f"profile {exp.profile}"]
    # paragraphs may take more tokens
    fixed = _FIXED if exp.captions == "context" else (*_FIXED, "text_tokens")
    reasons = [f"{name} is {now}" for name, (_, now) in paper.diff(exp).items() if name in fixed]
    stated = json.loads(bundled("reference/report.json").read_text(encoding="utf-8"))
    needed = stated.get(ablation_of(exp), {}).get("epochs", stated["protocol"]["epochs_baseline"])
    epochs = _epochs_taken(exp, codec.about)
    return reasons + ([f"{epochs:.3g} of {needed} epochs"] if epochs < needed else [])


def _amiss_in_evaluation(
    exp: Experiment | None,
    dataset: CaptionedImages,
    options: Mapping[str, Any],
    captions: Mapping[str, str],
    found: Mapping[str, Network],
) -> list[str]:
    """Return in what the evaluation does not follow the report's protocol."""
    name = dataset.name
    given = [metric for metric, network in found.items() if network.weights.startswith("given")]
    reasons = [f"{metric} through weights that were given to it" for metric in given]
    # The paper chose the best caption of MS-COCO's five; on the other sets, FID is over patches.
    asked = {"mode": "exact"} | ({"caption": "best"} if name == "coco" else {"patch-size": 256})
    amiss = [option for option, value in asked.items() if options[option] != value]
    reasons += [f"evaluated with {option} {options[option]}" for option in amiss]
    wanted = "published" if exp is None else exp.dataset_captions
    right = PUBLISHED_CAPTIONS.get(name, captions["sha256"])
    if dataset.captioned != wanted:
        reasons.append(f"evaluated with captions {dataset.captioned}, not {wanted}")
    elif wanted == "published" and len(dataset) == IMAGES.get(name) and captions["sha256"] != right:
        reasons.append("its captions are not those that TACO's authors published")
    if name not in IMAGES:
        reasons.append(f"{name} is not a data set of the report")
    elif len(dataset) + dataset.skipped < IMAGES[name]:
        reasons.append(f"{len(dataset)} of {IMAGES[name]:,} images")
    return reasons


# Commands -------------------------------------------------------------------------------------------------------------


def train_command(exp: Experiment) -> list[str]:
    """Return the words of the command that trains an experiment again, into `FOLDER`."""
    changes = {name: now for name, (_, now) in baseline(exp.profile).diff(exp).items()}
    given = ["--profile", exp.profile]
    given += [word for name, now in changes.items() for word in ("--set", f"{name}={now}")]
    if "sizes" in changes:
        given = ["--experiment", f"{FOLDER}/experiment.json"]
    return ["taco-nb", "train", *given, "--out", FOLDER]


def evaluate_command(
    codec: Codec, exp: Experiment | None, sets: Sequence[CaptionedImages], options: Mapping[str, Any]
) -> list[str] | None:
    """Return the words of the command that evaluates again. None where captions were replaced, for which it has no option."""
    if "replaced" in {dataset.captioned for dataset in sets}:
        return None
    source = codec.name if exp is None or is_bundled(codec) else FOLDER
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if any(len(dataset) + dataset.skipped != IMAGES.get(dataset.name) for dataset in sets):
        words = ["--limit", str(max(map(len, sets))), *words]
    return ["taco-nb", "evaluate", source, *(dataset.name for dataset in sets), *words, "--out", FOLDER]


# Small facts ----------------------------------------------------------------------------------------------------------


def _epochs_taken(exp: Experiment | None, about: Mapping[str, Any]) -> float:
    """Return how many epochs weights were trained for, perhaps a fraction; NaN for weights from elsewhere."""
    if exp is None:
        return math.nan
    steps = about.get("steps", math.nan)
    total = about.get("total_steps", steps)
    return exp.epochs * (1.0 if math.isnan(total) else steps / total)


def _lmbda_in(name: str) -> float:
    """Return the lambda in a checkpoint's name, as TACO's authors write it (0.0004.pth.tar, lambda_0.0016.pth.tar)."""
    found = re.fullmatch(r"(?:lambda_)?(\d*\.\d+)\.pth\.tar", name)
    return float(found[1]) if found else math.nan


def _sizes_of(codec: Codec) -> dict[str, Any]:
    return {name: getattr(codec.net.config, name) for name in vars(Sizes())}
