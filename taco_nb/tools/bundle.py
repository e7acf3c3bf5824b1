"""The bundled demo codecs: how runs become such, with cards that say what they are, and where they stand.

    taco-nb bundle                                    # all bundled codecs beside JPEG, WebP and AVIF on Kodak
    taco-nb bundle demo-mine=runs/mine ... --data "500 photographs of ..., for research use"

A card is measured, never typed: real files on the sample's validation images, and on Kodak where that is there.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taco_nb import checkpoint
from taco_nb.codec import Codec, load
from taco_nb.data import CaptionedImages, datasets
from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation import QUALITIES, evaluate, evaluate_peers, means
from taco_nb.evaluation.peers import available_peers
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write, bundled, sha256
from taco_nb.metrics.rate import bd_rate, rate_at
from taco_nb.model import TACO, ModelConfig
from taco_nb.provenance import provenance
from taco_nb.training.start import family, initial_weights

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 8_000_000
"""Bytes that one bundled codec may have."""
PEER_QUALITIES = (1, *QUALITIES)
"""Of the other codecs' own scales: the lowest too, for the PSNR of a demo codec is low."""
RECIPE = (
    "sizes",
    "lmbda",
    "crop",
    "batch_size",
    "optimizer",
    "learning_rate",
    "schedule",
    "precision",
    "seed",
)
"""The settings that a card gives of each run on the way to a codec, beside its ablations."""
NOT_TO_BE_CLAIMED = (
    "anything about text in image compression, TACO or the report: the text tower knows no meanings, the training set is "
    "tiny and the training short"
)


def bundle(
    runs: Mapping[str, str | os.PathLike],
    data: str,
    shelf: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
) -> dict[str, dict[str, Any]]:
    """Write of each finished run {name: folder} a codec `name.safetensors`, kernels in half precision, into the folder
    `shelf`, with its card `name.json`; the cards.

    `data` says in words what they were trained on and under which terms. Steps and hours of what a run started from are
    counted in. Raises `SettingError` for a run that is not finished or a file above `LARGEST`, `CheckpointError` for one
    that cannot be read; nothing is written then.
    """
    with tempfile.TemporaryDirectory(dir=shelf, prefix=".") as scratch:
        made = {name: Path(scratch, f"{name}.safetensors") for name in runs}
        cards = {name: _compact(Path(run), name, made[name], data_dir) for name, run in runs.items()}
        codecs = {name: load(path) for name, path in made.items()}
        table, _ = standing(list(codecs.values()), _sets(data_dir))
        for name, card in cards.items():
            rows = table[table["codec"] == name].drop(columns="codec").to_dict("records")
            results = {
                row.pop("dataset"): {key: _rounded(value) for key, value in row.items()} for row in rows
            }
            first = {"sha256": sha256(made[name]), "what": _what(codecs[name]), "data": data}
            cards[name] = {**first, **card, "results": results, "not_to_be_used_to_claim": NOT_TO_BE_CLAIMED}
        for name, path in made.items():
            path.replace(Path(shelf) / path.name)
            with atomic_write(Path(shelf, f"{name}.json"), "w") as file:
                json.dump(cards[name], file, indent=1)
    return cards


def renew_integer_models(shelf: str | os.PathLike) -> None:
    """Write the bundled codecs on a shelf anew with integer forms derived from their weights, and their cards' SHA-256.

    The weights stay what they are. Files that were written with an earlier integer form no longer decode afterwards.
    """
    for path in sorted(Path(shelf).glob("*.safetensors")):
        card = checkpoint.card_of(path)
        state, about = checkpoint.read_weights(path)
        net = TACO(ModelConfig(**about.pop("config")))
        net.load_state_dict({name: value for name, value in state.items() if name != checkpoint.INTEGERS})
        checkpoint.save_weights(path, net, about, torch.float16)
        with atomic_write(path.with_suffix(".json"), "w") as file:
            json.dump(card | {"sha256": sha256(path)}, file, indent=1)


def _compact(run: Path, name: str, path: Path, data_dir: str | os.PathLike | None) -> dict[str, Any]:
    """Write the run's weights in half precision to `path`; what its card says of the way there."""
    net, about = checkpoint.load_net(run / checkpoint.WEIGHTS)
    if about.get("steps", 0) != about.get("total_steps", 1):
        raise SettingError(
            f"{run} is not a finished run: {about.get('steps', 0)} steps of {about.get('total_steps')}."
        )
    exp, history = (
        Experiment().replace(**about["experiment"]),
        _history(run / checkpoint.WEIGHTS, about, data_dir),
    )
    steps, hours = (sum(link[key] for link in history) for key in ("steps", "hours"))
    # where things lay is nobody's business
    exp = exp.replace(train_data=Path(exp.train_data).name, init=Path(exp.init).name)
    experiment = json.loads(exp.to_json())
    about |= {"name": name, "experiment": experiment, "steps": steps, "total_steps": steps, "hours": hours}
    checkpoint.save_weights(path, net, about, torch.float16)
    if path.stat().st_size > LARGEST:
        raise SettingError(
            f"{name} has {path.stat().st_size:,} bytes, more than the {LARGEST:,} of a demo codec."
        )
    return {
        "lmbda": exp.lmbda,
        "loss": "lmbda * 255^2 * MSE + bpp"
        + "".join(f" + {key}" for key in ("k_P", "k_J") if getattr(exp, key)),
        "steps": steps,
        "hours": round(hours, 2),
        "history": history,
        "experiment": experiment,
        "text_tower": f"{exp.text_encoder}: fixed random weights behind CLIP's tokenizer",
        "hardware": f"{about['device']}: {provenance()['hardware']['cpu']}",
        "stored_in": "float16 kernels, float32 otherwise",
    }


def _history(
    weights: Path, about: dict[str, Any], data_dir: str | os.PathLike | None
) -> list[dict[str, Any]]:
    """The runs that led to these weights, the first one first; a bundled codec's are on its card."""
    if weights.with_suffix(".json").is_file():
        return checkpoint.card_of(weights)["history"]
    exp = Experiment().replace(**about["experiment"])
    run = weights.parent.name if weights.name == checkpoint.WEIGHTS else weights.stem
    told = {*RECIPE, *exp.ablations}
    settings = {name: value for name, value in json.loads(exp.to_json()).items() if name in told}
    link = {"run": run, "steps": about["steps"], "hours": round(about["hours"], 2), "settings": settings}
    before = initial_weights(exp, data_dir)
    return [*(_history(before, checkpoint.read_weights(before)[1], data_dir) if before else []), link]


def _what(codec: Codec) -> str:
    kind = ", ".join(f"{name}={value}" for name, value in experiment_of(codec).ablations.items())
    kind = kind or "baseline (softmax attention, published captions)"
    return f"TACO at small size, {sum(p.numel() for p in codec.net.parameters()) / 1e6:.2f} million parameters, {kind}"


def _sets(data_dir: str | os.PathLike | None) -> list[CaptionedImages]:
    """The sample's validation pictures, and Kodak where it is there."""
    sets = datasets("sample", data_dir=data_dir)
    try:
        return sets + datasets("kodak", data_dir=data_dir)
    except DataError as error:
        print(f"Not on the cards: {error}")
        return sets


def standing(codecs: Sequence[Codec], sets: Sequence[CaptionedImages]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Where codecs stand beside this machine's JPEG, WebP and AVIF, real files all of them.

    The first table has a row per codec and data set: bpp, psnr and ms_ssim, means over images, and per peer "JPEG, %" and
    so on, the codec's rate less the peer's in percent of it, at the codec's mean PSNR (NaN where the peer's curve does
    not reach it). The second has a row per data set and peer: the BD-rate (PSNR) of the curve through those codecs that are
    baselines, NaN for fewer than two of them.
    """
    import pandas as pd

    ours = means(pd.concat([evaluate(codec, sets) for codec in codecs], ignore_index=True))
    theirs = means(evaluate_peers(sets, PEER_QUALITIES))
    curves = {key: curve.sort_values("bpp") for key, curve in theirs.groupby(["dataset", "codec"])}
    baselines = [codec.name for codec in codecs if not experiment_of(codec).ablations]
    rows, gaps = [], []
    for dataset, group in ours.groupby("dataset", sort=False):
        for row in group.to_dict("records"):
            at = {
                f"{peer}, %": 100 * (row["bpp"] / _rate_at(curves[dataset, peer], row["psnr"]) - 1)
                for peer in available_peers()
            }
            rows.append(
                {key: row[key] for key in ("codec", "dataset", "images", "bpp", "psnr", "ms_ssim")} | at
            )
        points = group[group["codec"].isin(baselines)]
        for peer in available_peers():
            curve = curves[dataset, peer]
            several = len(points) > 1
            gap = (
                bd_rate(curve["bpp"], curve["psnr"], points["bpp"], points["psnr"])
                if several
                else float("nan")
            )
            gaps.append({"dataset": dataset, "peer": peer, "BD-rate (PSNR), %": gap})
    return pd.DataFrame(rows), pd.DataFrame(gaps)


def _rate_at(curve: pd.DataFrame, psnr: float) -> float:
    try:
        return rate_at(curve["bpp"], curve["psnr"], psnr)
    except SettingError:  # beyond the ends of the peer's curve
        return float("nan")


def baselines(data_dir: str | os.PathLike | None = None, device: str = "cpu") -> list[Codec]:
    """The bundled codecs that are baselines, by rising lambda: together a rate-distortion curve."""
    lmbdas = {name: exp.lmbda for name, exp in family(data_dir).items() if not exp.ablations}
    return [load(name, device=device, data_dir=data_dir) for name in sorted(lmbdas, key=lmbdas.get)]


def experiment_of(codec: Codec) -> Experiment:
    """How a codec was trained, by its own words."""
    return Experiment().replace(**codec.about.get("experiment", {}))


def _rounded(value: float) -> float | None:
    """As JSON holds it, which knows no NaN."""
    return None if value != value else round(value, 4)


def print_standing(data_dir: str | os.PathLike | None = None) -> None:
    """Print where every bundled codec stands beside JPEG, WebP and AVIF on Kodak."""
    shelf = bundled("checkpoints", data_dir)
    codecs = [load(path.stem, data_dir=data_dir) for path in sorted(shelf.glob("*.safetensors"))]
    table, gaps = standing(codecs, datasets("kodak", data_dir=data_dir))
    print(table.round(4).to_string(index=False))
    print(gaps.round(1).to_string(index=False))


def bundle_named(runs: Sequence[str], data: str, data_dir: str | os.PathLike | None = None) -> None:
    """Bundle runs given as "NAME=RUN", and print their cards. Raises `SettingError` for another form."""
    if bad := [run for run in runs if not re.fullmatch(r"[\w-]+=.+", run)]:
        raise SettingError(f"{bad[0]!r} is not NAME=RUN, such as demo-mine=runs/mine.")
    named = dict(run.split("=", 1) for run in runs)
    print(json.dumps(bundle(named, data, bundled("checkpoints", data_dir), data_dir=data_dir), indent=1))
