"""Real files, measured: a row per image, and where every number came from."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from taco_nb import errors
from taco_nb.checkpoint import save_weights
from taco_nb.codec import Codec, load
from taco_nb.data import CaptionedImages, Sample
from taco_nb.data.captioned import check_count
from taco_nb.data.images import to_tensor
from taco_nb.errors import MissingWeightsError, SettingError, TacoError
from taco_nb.evaluation.measure import CAPTIONS, measure, rate
from taco_nb.evaluation.peers import PeerResult, available_peers, match_bpp, peer_curve
from taco_nb.evaluation.unfinished import Part, Unfinished
from taco_nb.experiment import PAPER_SIZES
from taco_nb.files import atomic_write, sha256
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.fid import PATCH_SIZE, check_patch_size, frechet_distance
from taco_nb.metrics.joint_space import cmmd
from taco_nb.metrics.networks import (
    METRICS,
    Network,
    find_networks,
    given_networks,
    say_missing,
    state_digest,
)
from taco_nb.processes import check_device
from taco_nb.provenance import code_digest, provenance

if TYPE_CHECKING:
    import pandas as pd

QUALITIES = (5, 10, 20, 35, 50, 65, 80, 90)
"""Of the other codecs' own scales, for their rate-distortion curves."""
BATCH_SIZE = 16
"""Crops of one size that go through the networks together."""
_MEASURES = (
    "model",
    "text",
    "metrics",
    "codec.py",
    "evaluation",
    "data/captioned.py",
    "data/images.py",
)
"""The code that figures depend on."""
_TEXT = ("codec", "dataset", "name", "caption")  # the columns of a table that are not numbers


def evaluate(
    codec: Codec,
    sets: Sequence[CaptionedImages],
    out_dir: str | os.PathLike | None = None,
    *,
    caption: str = "first",
    batch_size: int = BATCH_SIZE,
    patch_size: int = PATCH_SIZE,
    num_processes: int = 1,
    networks: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Encode every image with a caption to a `.taco` file, decode the file, and measure both: a row per image.

    Columns: codec, dataset, name, width, height, bytes (the file's size), bpp, caption, psnr and ms_ssim of the 8-bit
    picture, psnr_taco and ms_ssim_taco by the reference's protocol; then, where the weights are on the machine, lpips (of
    the 8-bit picture, in [-1, 1] as the library wants) and lpips_01 (of the floats, in [0, 1], as TACO published),
    clip_score (0 to 100, picture against caption), and fid and cmmd of the whole data set, the same in each of its rows
    (`taco_nb.metrics` says by which protocol); encode_s and decode_s (seconds, wall clock, without the loading of tower
    and tables; of a batch, each image has its share).

    Args:
        caption: which of an image's captions: "first"; "last", as the reference's released script; or "best", the one with
            the lowest lpips_01, as the paper meant it for the five of MS-COCO.
        batch_size: how many images of a data set that is cropped to one size go through the networks together. Others go
            one by one.
        patch_size: side in pixels of the patches that FID is measured on where a data set is not cropped to one size.
        num_processes: how many processes share the images, each on a GPU of its own if the codec is on one. In a
            process of `accelerate launch` the processes there do, and this is ignored.
        networks: {"lpips": Lpips, "fid": Inception, "cmmd": CmmdEmbedding, "clip_score": ClipScore}, any of them, to look
            through in place of those on this machine.

    With `out_dir`, `files/<dataset>/<name>.taco`, `evaluation.csv` and `evaluation.json` (means, protocols, experiment,
    versions, commit, hardware, checksums of the data) are kept there. Killed, it goes on from the image, or batch, where it
    was when it is called again; finished, it returns what is there, at once; but if weights, data, settings or this program
    have changed, it says so and starts over.

    Raises `DataError` for an image that cannot be read, `SettingError` if `sets` is no list of data sets with names of
    their own, a setting is out of range or there are fewer GPUs than processes, `MissingWeightsError` for caption="best"
    without LPIPS.
    """
    from accelerate import PartialState

    _check_sets(sets)
    processes = PartialState()
    found, absent = find_networks() if networks is None else given_networks(networks)
    if networks is None and processes.is_main_process:
        for metric in absent:
            say_missing(metric)
    settings = {"caption": caption, "batch_size": batch_size, "patch_size": patch_size}
    _check_settings(settings, num_processes, found, absent)
    if processes.num_processes == 1:
        check_device(codec.device.type, num_processes)
    elif out_dir is None:
        raise SettingError("Several processes need a folder that they share: give out_dir.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if out_dir is None else out_dir)
        unfinished = Unfinished(folder)
        parts = _parts(sets, batch_size)
        if processes.is_main_process:
            subject = _subject(codec, sets, settings, found)
            _begin(folder, subject, parts)
        processes.wait_for_everyone()
        if unfinished.exists:
            if num_processes > 1 and processes.num_processes == 1:
                _launch(codec, sets, folder, settings, networks, num_processes)
            else:
                _share(codec, sets, folder, settings, found, processes.process_index, processes.num_processes)
            processes.wait_for_everyone()
            if processes.is_main_process:
                _finish(codec, sets, folder, settings, found, absent)
            processes.wait_for_everyone()
        return read_evaluation(folder).assign(
            codec=codec.name
        )  # it may have had another when it was measured


def read_evaluation(folder: str | os.PathLike) -> pd.DataFrame:
    """The table that `evaluate` left in a folder, every number and caption as it was."""
    import pandas as pd

    path = Path(folder, "evaluation.csv")
    numbers = pd.read_csv(path, nrows=0).columns.difference(_TEXT)
    return pd.read_csv(
        path,
        float_precision="round_trip",
        dtype=dict.fromkeys(_TEXT, str),
        keep_default_na=False,  # "" and "nan" are captions
        na_values=dict.fromkeys(numbers, ""),
    )


def evaluate_peers(
    sets: Sequence[CaptionedImages],
    qualities: Iterable[int] = QUALITIES,
    peers: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The rate-distortion curves of JPEG, WebP, AVIF (and JPEG XL where Pillow has it): a row per image and quality.

    Columns as `evaluate`'s, as far as they apply, and quality. `peers` defaults to all that this machine's Pillow has.
    """
    import pandas as pd

    qualities = list(qualities)
    rows = [
        {**_peer_row(dataset, sample, result), "quality": result.quality}
        for dataset, sample in _samples(sets, "encoding with other codecs")
        for peer in (available_peers() if peers is None else peers)
        for result in peer_curve(sample.image, peer, qualities)
    ]
    return pd.DataFrame(rows)


def evaluate_matched(results: pd.DataFrame, sets: Sequence[CaptionedImages]) -> pd.DataFrame:
    """The other codecs at no more bytes than `results` (from `evaluate`) spent on the same image: a row per both.

    Where even a peer's smallest file is larger, that file is measured, and `above_target` is true in its row. Raises
    `SettingError` unless `results` holds each image of `sets` exactly once.
    """
    import pandas as pd

    budget = results.set_index(["dataset", "name"])["bytes"]
    if not budget.index.is_unique:
        raise SettingError("These results have more than one row per image: give those of a single codec.")
    rows = []
    for dataset, sample in _samples(sets, "matching other codecs"):
        if (dataset.name, sample.name) not in budget.index:
            raise SettingError(
                f"{sample.name} of {dataset.name} is not in these results: evaluate the same data sets."
            )
        for peer in available_peers():
            result = match_bpp(sample.image, peer, int(budget[dataset.name, sample.name]))
            choice = {"chosen_quality": result.quality, "above_target": result.above_target}
            rows.append({**_peer_row(dataset, sample, result), **choice})
    return pd.DataFrame(rows)


def means(results: pd.DataFrame) -> pd.DataFrame:
    """The mean of every measured column over the images of each data set, per codec (and quality, for peers)."""
    results = results.reset_index(
        drop=True
    )  # frames put together keep their row numbers, which would be ambiguous
    keys = [key for key in ("codec", "dataset", "quality") if key in results]
    numbers = results.drop(columns=[*keys, "width", "height"]).select_dtypes("number")
    table = results[keys].join(numbers).groupby(keys, sort=False, dropna=False).mean()
    return table.assign(images=results.groupby(keys, sort=False, dropna=False).size()).reset_index()


def _samples(sets: Sequence[CaptionedImages], what: str) -> Iterator[tuple[CaptionedImages, Sample]]:
    """One image in memory at a time, under a progress bar."""
    from tqdm.auto import tqdm

    _check_sets(sets)
    with tqdm(total=sum(map(len, sets)), desc=what, unit="image") as bar:
        for dataset in sets:
            for i in range(len(dataset)):
                yield dataset, dataset[i]
                bar.update()


def _peer_row(dataset: CaptionedImages, sample: Sample, result: PeerResult) -> dict[str, Any]:
    return {
        "codec": result.format,
        "dataset": dataset.name,
        **rate(sample, len(result.data)),
        **distortion(to_tensor(sample.image), to_tensor(result.image)),
    }


def _check_sets(sets: Sequence[CaptionedImages]) -> None:
    if isinstance(sets, CaptionedImages) or not sets:
        raise SettingError(
            "The data sets are a list with at least one in it, as taco_nb.datasets gives them."
        )
    if len({dataset.name for dataset in sets}) < len(sets):
        raise SettingError(
            f"Two data sets have the same name, of {[dataset.name for dataset in sets]}: rename one."
        )


def _check_settings(
    settings: Mapping[str, Any], num_processes: int, found: Mapping[str, Network], absent: Mapping[str, str]
) -> None:
    check_caption(settings["caption"])
    check_count(settings["batch_size"], "batch_size")
    check_count(num_processes, "num_processes")
    check_patch_size(settings["patch_size"])
    if settings["caption"] == "best" and "lpips" not in found:
        raise MissingWeightsError(f'caption="best" is chosen by LPIPS, and there is none: {absent["lpips"]}.')


def check_caption(caption: str) -> None:
    """Raise `SettingError` unless `caption` is a rule by which `evaluate` chooses among an image's captions."""
    if caption not in CAPTIONS:
        raise SettingError(f"caption must be {' or '.join(map(json.dumps, CAPTIONS))}, but is {caption!r}.")


def _parts(sets: Sequence[CaptionedImages], batch_size: int) -> list[Part]:
    """What is measured together, in order. It depends on nothing else, so neither do the figures."""
    steps = [batch_size if dataset.crop else 1 for dataset in sets]
    return [
        Part(dataset.name, start, min(start + step, len(dataset)))
        for dataset, step in zip(sets, steps)
        for start in range(0, len(dataset), step)
    ]


def _subject(
    codec: Codec, sets: Sequence[CaptionedImages], settings: Mapping[str, Any], found: Mapping[str, Network]
) -> dict[str, Any]:
    """All that the figures depend on; where it is the same, they are."""
    tower = Path(codec.text_encoder.partition("/")[2]).expanduser()
    keywords = codec.keywords and hashlib.sha256(codec.keywords.encode()).hexdigest()
    text = [codec.text_encoder, codec.text_tokens, codec.text_length, codec.text_pooling, keywords]
    return {
        "weights": state_digest(codec.net),
        "mode": codec.mode,
        "text encoder": [*text, sha256(tower) if tower.is_file() else None],
        "data": [[dataset.name, len(dataset), dataset.crop, dataset.checksum()] for dataset in sets],
        **settings,
        "networks": {metric: network.weights for metric, network in found.items()},
        "kind of device": codec.device.type,
        "program": code_digest(*_MEASURES),
        "packages": provenance()["packages"],
    }


def _begin(folder: Path, subject: dict[str, Any], parts: Sequence[Part]) -> None:
    """Leave `unfinished` to be gone on with, or fresh, or, if all is done, none; and say which, but for a fresh one."""
    unfinished = Unfinished(folder)
    finished = _finished(folder)
    if finished and not _changed(finished, subject):
        unfinished.forget()
        print(
            f"Evaluated before, and nothing has changed since: the figures are those of {folder / 'evaluation.csv'}."
        )
        return
    before = unfinished.about() if unfinished.exists else None
    if before == subject:
        total = sum(part.stop - part.start for part in parts)
        print(
            f"Going on with the evaluation in {folder}: {_done(unfinished, parts)} of {total} images are done."
        )
        return
    if before is not None or finished:
        changes = ", ".join(_changed(before or finished or {}, subject)) or "networks"
        print(f"Evaluating from the start in {folder}: other than the last time are {changes}.")
    unfinished.begin(subject)


def _done(unfinished: Unfinished, parts: Iterable[Part]) -> int:
    """How many images are measured."""
    return sum(part.stop - part.start for part in parts if unfinished.path(part).exists())


def _finished(folder: Path) -> dict[str, Any] | None:
    """Of what the whole evaluation in a folder is, None where there is none, or its table is not the one it was."""
    try:
        said = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return said["subject"] if said["csv_sha256"] == sha256(folder / "evaluation.csv") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changed(before: Mapping[str, Any], subject: Mapping[str, Any]) -> list[str]:
    """In what they differ, by name. Networks that are not there any more do not count: their figures are."""
    still = {**(before.get("networks") or {}), **subject["networks"]}
    return [
        key
        for key, value in subject.items()
        if key not in before or before[key] != (still if key == "networks" else value)
    ]


def _share(
    codec: Codec,
    sets: Sequence[CaptionedImages],
    folder: Path,
    settings: Mapping[str, Any],
    found: Mapping[str, Network],
    index: int,
    count: int,
) -> None:
    """Measure what is not measured yet, every `count`-th part of it, from part `index` on."""
    from tqdm.auto import tqdm

    unfinished, by_name = Unfinished(folder), {dataset.name: dataset for dataset in sets}
    parts = _parts(sets, settings["batch_size"])[index::count]
    left = [part for part in parts if not unfinished.path(part).exists()]
    if not left:
        return
    codec.decode(
        codec.encode(Image.new("RGB", (64, 64)), "")
    )  # what is loaded once is no part of the first row's time
    networks = {metric: network.load(codec.device) for metric, network in found.items()}
    what = f"evaluating {codec.name}" + (f", 1 process of {count}" if count > 1 else "")
    with tqdm(total=sum(p.stop - p.start for p in left), desc=what, unit="image", disable=index > 0) as bar:
        for part in left:
            clock, dataset = time.perf_counter(), by_name[part.dataset]
            rows, features = measure(
                codec,
                [dataset[i] for i in range(part.start, part.stop)],
                folder / "files" / part.dataset,
                networks,
                caption=settings["caption"],
                patch_size=None if dataset.crop else settings["patch_size"],
            )
            unfinished.write(part, rows, features, time.perf_counter() - clock)
            bar.update(len(rows))


def _finish(
    codec: Codec,
    sets: Sequence[CaptionedImages],
    folder: Path,
    settings: Mapping[str, Any],
    found: Mapping[str, Network],
    absent: Mapping[str, str],
) -> None:
    """Put the parts together: the table and what is to be known of it; then the parts are forgotten."""
    import pandas as pd

    unfinished, clock = Unfinished(folder), time.perf_counter()
    subject, seconds, tables = unfinished.about(), 0.0, []
    metrics = {
        metric: {"protocol": METRICS[metric].protocol, "weights": found[metric].weights} for metric in found
    }
    for dataset in sets:
        parts = _parts([dataset], settings["batch_size"])
        rows = []
        for part in parts:
            some, spent = unfinished.rows(part)
            rows += some
            seconds += spent
        table = pd.DataFrame(rows)
        table.insert(0, "codec", codec.name)
        table.insert(1, "dataset", dataset.name)
        if "fid" in found:
            figure, about = _fid(dataset, unfinished, parts, settings["patch_size"])
            table.insert(table.columns.get_loc("encode_s"), "fid", figure)
            metrics["fid"].setdefault("sets", {})[dataset.name] = about
        if "cmmd" in found:
            x, x_hat = (
                torch.cat(list(unfinished.features(parts, f"cmmd.{name}"))) for name in ("x", "x_hat")
            )
            table.insert(table.columns.get_loc("encode_s"), "cmmd", cmmd(x, x_hat, codec.device))
            metrics["cmmd"].setdefault("sets", {})[dataset.name] = {"images": len(x)}
        tables.append(table)
    results = pd.concat(tables, ignore_index=True)
    with atomic_write(folder / "evaluation.csv", "w") as file:
        results.to_csv(file, index=False)
    about = {
        "codec": codec.name,
        "fingerprint": codec.fingerprint.hex(),
        "weights": codec.about,
        "mode": codec.mode,
        "text_encoder": codec.text_encoder,
        "sizes": {name: getattr(codec.net.config, name) for name in PAPER_SIZES},
        "data": {
            dataset.name: {
                "images": n,
                "skipped": dataset.skipped,
                "captions": dataset.captioned,
                "sha256": digest,
            }
            for dataset, (_, n, _, digest) in zip(sets, subject["data"])
        },
        "caption": {"rule": settings["caption"], "chosen": CAPTIONS[settings["caption"]]},
        "batch_size": settings["batch_size"],
        "metrics": metrics,
        "absent": dict(absent),
        "means": json.loads(means(results).to_json(orient="records", double_precision=15)),  # null for NaN
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds + time.perf_counter() - clock, 1),  # of all processes together
        **provenance(),
        "subject": subject,
        "csv_sha256": sha256(folder / "evaluation.csv"),
    }
    with atomic_write(folder / "evaluation.json", "w") as file:
        json.dump(about, file, indent=1)
    unfinished.forget()


def _fid(
    dataset: CaptionedImages, unfinished: Unfinished, parts: list[Part], patch_size: int
) -> tuple[float, dict[str, Any]]:
    """FID of a data set, and what it is over; figures of too few pictures come with a warning."""
    of = "crops" if dataset.crop else f"patches of {patch_size}x{patch_size}"
    counted = [0, 0]

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pair in zip(*(unfinished.features(parts, f"fid.{name}") for name in ("x", "x_hat"))):
            counted[:] = counted[0] + len(pair[0]), pair[0].shape[1]
            yield pair

    figure = frechet_distance(pairs())
    count, features = counted
    if count < 2:
        print(f"No FID of {dataset.name}: there are {count} {of} in its images, and two are the least.")
    elif count <= features:
        print(
            f"FID of {dataset.name} is over {count:,} {of}, no more than the {features:,} features of each: it comes out too "
            "high. Compare it only with figures over as many."
        )
    return figure, {"of": of, "images": len(dataset), "count": count}


# --- Several processes ------------------------------------------------------------------------------------------------


def _launch(
    codec: Codec,
    sets: Sequence[CaptionedImages],
    folder: Path,
    settings: Mapping[str, Any],
    networks: Mapping[str, Any] | None,
    count: int,
) -> None:
    """Measure in `count` new processes, by PyTorch's launcher, which ends all of them when one fails.

    New rather than forked ones: a GPU or an OpenMP in use does not survive a fork. Raises the error that ended them.
    """
    from tqdm.auto import tqdm

    unfinished, parts = Unfinished(folder), _parts(sets, settings["batch_size"])
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        experiment = {
            name: getattr(codec, name)
            for name in ("text_encoder", "text_tokens", "text_length", "text_pooling")
        }
        about = {
            **codec.about,
            "experiment": codec.about.get("experiment", {}) | experiment,
            "keywords": codec.keywords,
        }
        save_weights(home / "codec.safetensors", codec.net, {**about, "name": codec.name})
        job = (codec.device.type, codec.mode, list(sets), folder.resolve(), settings, networks)
        (home / "job.pickle").write_bytes(pickle.dumps(job))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(count),
        ]
        command += ["-m", "taco_nb.evaluation.run", str(home)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with (
            open(home / "log", "wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, env=environment) as launched,
            tqdm(
                total=sum(p.stop - p.start for p in parts), desc=f"evaluating {codec.name}", unit="image"
            ) as bar,
        ):
            try:
                while launched.poll() is None:
                    time.sleep(0.5)
                    if new := _done(unfinished, parts) - bar.n:
                        bar.update(new)
            finally:
                launched.terminate()  # if this process was interrupted; the launcher ends its own
        if reported := sorted(home.glob("error-*.json")):
            kind, message = json.loads(reported[0].read_text(encoding="utf-8"))
            raise getattr(errors, kind)(message)
        if launched.returncode:
            end = (home / "log").read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"A process of the evaluation ended with {launched.returncode}:\n{end}")


def _work(home: Path) -> None:
    """What one of the processes of `_launch` does."""
    from accelerate import PartialState

    device, mode, sets, folder, settings, networks = pickle.loads((home / "job.pickle").read_bytes())
    process = PartialState(cpu=device == "cpu")
    try:
        codec = load(home / "codec.safetensors", mode=mode, device=str(process.device))
        found, _ = find_networks() if networks is None else given_networks(networks)
        _share(codec, sets, folder, settings, found, process.process_index, process.num_processes)
    except TacoError as error:
        with atomic_write(home / f"error-{process.process_index}.json", "w") as file:
            json.dump([type(error).__name__, str(error)], file)
        raise


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
