"""The bundled demo codecs: how a run becomes one, with the card that says what it is, and where they stand.

    python -m taco_nb.demo                                    # all bundled codecs beside JPEG, WebP and AVIF on Kodak
    python -m taco_nb.demo bundle runs/mine --name demo-mine --data "500 photographs of ..., for research use"

A card is measured, never typed: real files on the sample's validation images, and on Kodak where that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taco_nb import checkpoint
from taco_nb.codec import Codec, load
from taco_nb.data import CaptionedImages, datasets
from taco_nb.errors import DataError, SettingError, TacoError
from taco_nb.evaluation import QUALITIES, evaluate, evaluate_peers, means
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write, bundled, sha256
from taco_nb.metrics.rate import bd_rate, rate_at
from taco_nb.peers import available_peers
from taco_nb.provenance import provenance
from taco_nb.report import SWITCHES

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 8_000_000
"""Bytes that one bundled codec may have."""
PEER_QUALITIES = (1, *QUALITIES)
"""Of the other codecs' own scales: the lowest too, for the PSNR of a demo codec is low."""
NOT_TO_BE_CLAIMED = (
    "anything about text in image compression, TACO or the report: the text tower knows no meanings, the training set is "
    "tiny and the training short"
)


def bundle(
    run: str | os.PathLike, name: str, data: str, shelf: str | os.PathLike, *, data_dir: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Write `name.safetensors` (kernels in half precision) and its card `name.json` into the folder `shelf`; the card.

    `run` is a finished run's folder, `data` says in words what it was trained on and under which terms. Steps and hours
    of what the run started from are counted in. Raises `SettingError` for a run that is not finished or a file above
    `LARGEST`, `CheckpointError` for one that cannot be read; nothing is written then.
    """
    weights = Path(run) / checkpoint.WEIGHTS
    net, about = checkpoint.load_net(weights)
    if about.get("steps", 0) != about.get("total_steps", 1):
        raise SettingError(f"{run} is not a finished run: {about.get('steps', 0)} steps of {about.get('total_steps')}.")
    exp = Experiment().replace(**about["experiment"])
    exp = exp.replace(train_data=Path(exp.train_data).name)  # where it lay is nobody's business
    before = _card_of(exp.init, data_dir)
    steps, hours = about["steps"] + before["steps"], about["hours"] + before["hours"]
    about |= {"name": name, "experiment": asdict(exp), "steps": steps, "total_steps": steps, "hours": hours}
    path = Path(shelf) / f"{name}.safetensors"
    with tempfile.TemporaryDirectory(dir=shelf, prefix=".") as scratch:
        made = Path(scratch) / path.name
        checkpoint.save_weights(made, net, about, torch.float16)
        if made.stat().st_size > LARGEST:
            raise SettingError(f"{name} has {made.stat().st_size:,} bytes, more than the {LARGEST:,} of a demo codec.")
        card = _card(made, exp, about, data, before, data_dir)
        made.replace(path)
    with atomic_write(path.with_suffix(".json"), "w") as file:
        json.dump(card, file, indent=1)
    return card


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
    baselines = [codec.name for codec in codecs if not _changes(codec)]
    rows, gaps = [], []
    for dataset, group in ours.groupby("dataset", sort=False):
        for row in group.to_dict("records"):
            at = {
                f"{peer}, %": 100 * (row["bpp"] / _rate_at(curves[dataset, peer], row["psnr"]) - 1)
                for peer in available_peers()
            }
            rows.append({key: row[key] for key in ("codec", "dataset", "images", "bpp", "psnr", "ms_ssim")} | at)
        points = group[group["codec"].isin(baselines)]
        for peer in available_peers():
            curve = curves[dataset, peer]
            several = len(points) > 1
            gap = bd_rate(curve["bpp"], curve["psnr"], points["bpp"], points["psnr"]) if several else float("nan")
            gaps.append({"dataset": dataset, "peer": peer, "BD-rate (PSNR), %": gap})
    return pd.DataFrame(rows), pd.DataFrame(gaps)


def _rate_at(curve: pd.DataFrame, psnr: float) -> float:
    try:
        return rate_at(curve["bpp"], curve["psnr"], psnr)
    except SettingError:  # beyond the ends of the peer's curve
        return float("nan")


def _card_of(init: str, data_dir: str | os.PathLike | None) -> dict[str, Any]:
    """What the weights that a run started from had behind them: the card of a bundled codec, a run's own words."""
    if not init:
        return {"steps": 0, "hours": 0.0}
    path = checkpoint.find(init, data_dir)
    _, about = checkpoint.read_weights(path)
    return {"name": init, "sha256": sha256(path), "steps": about.get("steps", 0), "hours": about.get("hours", 0.0)}


def _changes(codec: Codec) -> dict[str, str]:
    """The ablations that a codec was trained with: {} for the baseline."""
    plain = Experiment()
    differences = plain.diff(plain.replace(**codec.about.get("experiment", {})))
    return {name: now for name, (_, now) in differences.items() if name in SWITCHES}


def _card(
    path: Path, exp: Experiment, about: dict, data: str, before: dict, data_dir: str | os.PathLike | None
) -> dict[str, Any]:
    codec = load(path)
    machine = provenance()
    kind = ", ".join(f"{key}={value}" for key, value in _changes(codec).items())
    kind = kind or "baseline (softmax attention, published captions)"
    sets = datasets("sample", data_dir=data_dir)
    try:
        sets += datasets("kodak", data_dir=data_dir)
    except DataError as error:
        print(f"Not on the card: {error}")
    table, _ = standing([codec], sets)
    return {
        "sha256": sha256(path),
        "what": f"TACO at small size, {sum(p.numel() for p in codec.net.parameters()) / 1e6:.2f} million parameters, {kind}",
        "lmbda": exp.lmbda,
        "steps": about["steps"],
        "hours": round(about["hours"], 2),
        "started_from": before if exp.init else None,
        "experiment": json.loads(exp.to_json()),
        "loss": "lmbda * 255^2 * MSE + bpp" + "".join(f" + {key}" for key in ("k_P", "k_J") if getattr(exp, key)),
        "data": data,
        "text_tower": f"{exp.text_encoder}: fixed random weights behind CLIP's tokenizer",
        "hardware": f"{about['device']}: {machine['hardware']['cpu']}",
        "stored_in": "float16 kernels, float32 otherwise",
        "results": {
            row.pop("dataset"): {key: _rounded(value) for key, value in row.items()}
            for row in table.drop(columns="codec").to_dict("records")
        },
        "not_to_be_used_to_claim": NOT_TO_BE_CLAIMED,
    }


def _rounded(value: float) -> float | None:
    """As JSON holds it, which knows no NaN."""
    return None if value != value else round(value, 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line above; 0, or 1 after a sentence that says what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m taco_nb.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="the data folder, with kodak/ in it; default: the repository's data/")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("bundle", help="make a finished run a demo codec, with its card")
    adding.add_argument("run", help="the run's folder")
    adding.add_argument("--name", required=True, help="of the demo codec, as load() takes it")
    adding.add_argument("--data", required=True, help="what it was trained on and under which terms, in words")
    given = parser.parse_args(arguments)
    shelf = bundled("checkpoints", given.data_dir)
    try:
        if given.command == "bundle":
            print(json.dumps(bundle(given.run, given.name, given.data, shelf, data_dir=given.data_dir), indent=1))
            return 0
        codecs = [load(path.stem, data_dir=given.data_dir) for path in sorted(shelf.glob("*.safetensors"))]
        table, gaps = standing(codecs, datasets("kodak", data_dir=given.data_dir))
        print(table.round(4).to_string(index=False))
        print(gaps.round(1).to_string(index=False))
    except TacoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
