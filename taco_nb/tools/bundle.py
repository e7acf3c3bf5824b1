"""`taco-nb bundle` makes bundled codecs of finished runs, with cards that say what they are, and shows where they stand.

    taco-nb bundle                                    # all bundled codecs beside JPEG, WebP and AVIF on Kodak
    taco-nb bundle demo-mine=runs/mine ... --data "500 photographs of ..., for research use"

Nobody types the figures of a card: they are measured on real files, of the sample's validation images and of Kodak.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from taco_nb import checkpoint
from taco_nb.codec import Codec, load
from taco_nb.control import control, heard, listening
from taco_nb.data import CaptionedImages, datasets
from taco_nb.errors import SettingError
from taco_nb.evaluation import QUALITIES, evaluate, evaluate_peers, means
from taco_nb.evaluation.peers import available_peers
from taco_nb.files import atomic_write, bundled, sha256
from taco_nb.metrics.rate import bd_rate, few_points, rate_at
from taco_nb.provenance import provenance
from taco_nb.tools.recipe import follow, read_recipe

LARGEST = 8_000_000
"""The bytes that one bundled codec may have, since all of them travel with the repository."""
PEER_QUALITIES = (1, *QUALITIES)
"""Qualities on the other codecs' own scales. The lowest is among them because the demo codecs' PSNR is low."""
RECIPE = (
    "sizes", "text_encoder", "lmbda", "perceptual", "k_P", "k_J", "crop", "batch_size", "optimizer", "learning_rate",
    "schedule", "precision", "seed",
)  # fmt: skip
"""The settings that a card gives for each run on the way to a codec, beside its ablations."""
SCENES = 192
"""The scenes on which codecs of the shapes are measured, half of each kind."""
SHAPES_DO_NOT_SHOW = (
    "what text is worth on photographs or under TACO's loss: in this world the caption decides what the loss "
    "weighs"
)
NOT_TO_BE_CLAIMED = (
    "what TACO or the report's changes are worth: the codec is small, its CLIP knows little, and it was trained for a few "
    "hundred steps with them"
)


def bundle(
    runs: Mapping[str, str | os.PathLike],
    data: str,
    shelf: str | os.PathLike,
    *,
    kept: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
) -> dict[str, dict[str, Any]]:
    """Write a codec `name.safetensors` and its card `name.json` for each finished run {name: folder}; return the cards.

    The files go into the folder `shelf`, with the kernels in half precision. `data` says in words what the runs were trained
    on and under which terms. A card counts the steps and hours of the runs that a run started from. If only some names are
    to be `kept`, the results of all go into results.csv on the shelf: those of photographs on Kodak's crops, for
    `taco_nb.control.siblings`, and those of the shapes by what they hear. Raises `SettingError` for a run that is not
    finished or a file above `LARGEST`, and `CheckpointError` for a run that cannot be read; then nothing is written.
    """
    with tempfile.TemporaryDirectory(dir=shelf, prefix=".") as scratch:
        made = {name: Path(scratch, f"{name}.safetensors") for name in runs}
        cards = {name: _compact(Path(run), name, made[name], data_dir) for name, run in runs.items()}
        codecs = {name: load(path) for name, path in made.items()}
        names = list(made) if kept is None else kept
        of_shapes = all(card["experiment"]["train_data"] == "shapes" for card in cards.values())
        if of_shapes:
            heard_by_all = pd.concat(
                [listening(codec, SCENES) for codec in codecs.values()], ignore_index=True
            )
            # A kind of scene takes the place of a data set.
            table = heard(heard_by_all).rename(columns={"kind": "dataset"}).round(4)
            # Rows of results.csv also have the settings in which the experiments differ from each other.
            stated = pd.DataFrame({name: card["experiment"] for name, card in cards.items()}).T
            stated = stated.drop(columns="init")
            differ = [name for name in stated if stated[name].map(str).nunique() > 1]
            of_all = table.join(stated[differ], on="codec")
        else:
            sets = datasets("sample", "kodak", data_dir=data_dir)
            table = standing([codecs[name] for name in names], sets)[0].round(4)
            of_all = None if kept is None else _on_crops(codecs.values(), data_dir).round(4)
        # JSON has no NaN; null says that another codec's curve does not reach this PSNR.
        table = table.astype(object).where(table.notna(), None)
        for name in names:
            results = table[table["codec"] == name].drop(columns="codec").set_index("dataset")
            cards[name] = {
                "sha256": sha256(made[name]),
                "what": _what(codecs[name]),
                "data": data,
                **cards[name],
                "results": results.to_dict("index"),
                "not_to_be_used_to_claim": SHAPES_DO_NOT_SHOW if of_shapes else NOT_TO_BE_CLAIMED,
            }
        for name in names:
            made[name].replace(Path(shelf) / made[name].name)
            with atomic_write(Path(shelf, f"{name}.json"), "w") as file:
                json.dump(cards[name], file, indent=1)
    if kept is not None:
        with atomic_write(Path(shelf, "results.csv"), "w") as file:
            of_all.to_csv(file, index=False)
    return {name: cards[name] for name in names}


def _on_crops(codecs: Iterable[Codec], data_dir: str | os.PathLike | None) -> pd.DataFrame:
    """Return what codecs make of Kodak's crops, for `taco_nb.control.siblings`: a row per codec, picture and condition."""
    tables = []
    for codec in codecs:
        kind = checkpoint.trained_as(codec.about).dataset_captions
        sets, read = (datasets("kodak-256", data_dir=data_dir, captions=of) for of in ("published", kind))
        tables.append(control(codec, sets, conditions=("own", "another's"), read=read))
    columns = ["codec", "name", "condition", "bytes", "psnr", "ms_ssim", "mini_distance", "mini_score"]
    return pd.concat(tables, ignore_index=True)[columns]


def _compact(run: Path, name: str, path: Path, data_dir: str | os.PathLike | None) -> dict[str, Any]:
    """Write a run's weights in half precision to `path`, and return what the card says of how they were trained."""
    net, about = checkpoint.load_net(run / checkpoint.WEIGHTS)
    done, wanted = about.get("steps", 0), about.get("total_steps", 1)
    if done != wanted:
        raise SettingError(f"{run} is not a finished run: {done} steps of {wanted}.")
    exp = checkpoint.trained_as(about)
    history = _history(run / checkpoint.WEIGHTS, about, data_dir)
    steps, hours = (sum(link[key] for link in history) for key in ("steps", "hours"))
    # A published file does not name the folders of the machine that it was made on.
    exp = exp.replace(train_data=Path(exp.train_data).name, init=Path(exp.init).name)
    experiment = json.loads(exp.to_json())
    about |= {"name": name, "experiment": experiment, "steps": steps, "total_steps": steps, "hours": hours}
    checkpoint.save_weights(path, net, about, torch.float16)
    if (size := path.stat().st_size) > LARGEST:
        raise SettingError(
            f"{name} has {size:,} bytes, more than the {LARGEST:,} that a bundled codec may have."
        )
    perception = "".join(f" + {key}" for key in ("k_P", "k_J") if getattr(exp, key))
    return {
        "lmbda": exp.lmbda,
        "loss": f"lmbda * 255^2 * MSE + bpp{perception}",
        "steps": steps,
        "hours": round(hours, 2),
        "history": history,
        "experiment": experiment,
        "text_tower": exp.text_encoder,
        "hardware": f"{about['device']}: {provenance()['hardware']['cpu']}",
        "stored_in": "float16 kernels, float32 otherwise",
    }


def _history(
    weights: Path, about: dict[str, Any], data_dir: str | os.PathLike | None
) -> list[dict[str, Any]]:
    """Return the runs that led to these weights, the earliest first; a bundled codec has them on its card."""
    if weights.with_suffix(".json").is_file():
        return checkpoint.card_of(weights)["history"]
    exp = checkpoint.trained_as(about)
    run = weights.parent.name if weights.name == checkpoint.WEIGHTS else weights.stem
    told = {*RECIPE, *exp.ablations}
    settings = {name: value for name, value in json.loads(exp.to_json()).items() if name in told}
    link = {"run": run, "steps": about["steps"], "hours": round(about["hours"], 2), "settings": settings}
    if not exp.init:
        return [link]
    before = checkpoint.find(exp.init, data_dir)
    return [*_history(before, checkpoint.read_weights(before)[1], data_dir), link]


def _what(codec: Codec) -> str:
    kind = ", ".join(
        f"{name}={value}" for name, value in checkpoint.trained_as(codec.about).ablations.items()
    )
    kind = kind or "baseline (softmax attention, published captions)"
    return f"TACO at small size, {sum(p.numel() for p in codec.net.parameters()) / 1e6:.2f} million parameters, {kind}"


def standing(codecs: Sequence[Codec], sets: Sequence[CaptionedImages]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return where codecs stand beside this machine's JPEG, WebP and AVIF, all of them measured on real files.

    The first table has a row per codec and data set: bpp, psnr and ms_ssim are means over the images, and "JPEG, %" and so
    on say by how many percent the codec's rate is above (or, negative, below) that of JPEG at the codec's mean PSNR. NaN
    says that JPEG's curve does not reach that PSNR.

    The second has a row per data set and other codec: the BD-rate (PSNR) of the curve through those of `codecs` that are
    baselines, NaN if they are fewer than two; both curves' numbers of points; and a note where these are too few.
    """
    # Without networks, for none of their figures (LPIPS, FID and so on) is wanted here.
    ours = means(pd.concat([evaluate(codec, sets, networks={}) for codec in codecs], ignore_index=True))
    theirs = means(evaluate_peers(sets, PEER_QUALITIES))
    curves = {key: curve.sort_values("bpp") for key, curve in theirs.groupby(["dataset", "codec"])}
    baselines = [codec.name for codec in codecs if not checkpoint.trained_as(codec.about).ablations]
    rows, gaps = [], []
    for dataset, group in ours.groupby("dataset", sort=False):
        points = group[group["codec"].isin(baselines)]
        for row in group[["codec", "dataset", "images", "bpp", "psnr", "ms_ssim"]].to_dict("records"):
            for peer in available_peers():
                curve, row[f"{peer}, %"] = curves[dataset, peer], math.nan
                with suppress(SettingError):  # the PSNR may lie beyond the ends of the peer's curve
                    rate = rate_at(curve["bpp"], curve["psnr"], row["psnr"])
                    row[f"{peer}, %"] = 100 * (row["bpp"] / rate - 1)
            rows.append(row)
        for peer in available_peers():
            gap, curve = math.nan, curves[dataset, peer]
            if len(points) > 1:
                gap = bd_rate(curve["bpp"], curve["psnr"], points["bpp"], points["psnr"])
            row = {"dataset": dataset, "peer": peer, "BD-rate (PSNR), %": gap}
            row |= {"points of the peer": len(curve), "points": len(points)}
            gaps.append({**row, "note": few_points(len(curve), len(points))})
    return pd.DataFrame(rows), pd.DataFrame(gaps)


def print_standing(data_dir: str | os.PathLike | None = None) -> None:
    """Print where every bundled codec stands beside JPEG, WebP and AVIF on Kodak."""
    kodak = datasets("kodak", data_dir=data_dir)
    codecs = [load(name, data_dir=data_dir) for name in checkpoint.bundled_codecs(data_dir)]
    table, gaps = standing(codecs, kodak)
    print(table.round(4).to_string(index=False), "\n")
    print(gaps.round(1).to_string(index=False))


def bundle_recipe(
    recipe: Path, out: Path, only: Sequence[str] = (), data_dir: str | os.PathLike | None = None
) -> None:
    """Train what a recipe says, or `only` some of its runs, below `out`; if all are there, bundle those that it names.

    Raises what `taco_nb.tools.recipe.follow` and `bundle` raise.
    """
    folders, stated = follow(recipe, out, data_dir, only), read_recipe(recipe)
    if not only:
        shelf = bundled(stated.get("shelf", "checkpoints"), data_dir)
        cards = bundle(folders, stated["about"], shelf, kept=stated["bundled"], data_dir=data_dir)
        print(json.dumps(cards, indent=1))


def bundle_named(runs: Sequence[str], data: str, data_dir: str | os.PathLike | None = None) -> None:
    """Bundle runs that are given as "NAME=RUN", and print their cards. Raises `SettingError` for another form."""
    if bad := [run for run in runs if not re.fullmatch(r"[\w-]+=.+", run)]:
        raise SettingError(f"{bad[0]!r} is not NAME=RUN, such as demo-mine=runs/mine.")
    named = dict(run.split("=", 1) for run in runs)
    print(json.dumps(bundle(named, data, bundled("checkpoints", data_dir), data_dir=data_dir), indent=1))
