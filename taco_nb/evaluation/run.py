"""`evaluate` codes images as real files, measures each of them, and writes down where every number came from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from taco_nb.checkpoint import load_net, save_weights
from taco_nb.codec import Codec
from taco_nb.data import CaptionedImages
from taco_nb.errors import DataError, MissingWeightsError, SettingError, StoppedError
from taco_nb.evaluation.measure import CAPTIONS, measure
from taco_nb.evaluation.protocol import of_codec, of_data_set
from taco_nb.evaluation.records import (
    TABLE,
    Records,
    as_json,
    as_table,
    means,
    read_about,
    read_evaluation,
    write_csv,
    write_evaluation,
)
from taco_nb.files import sha256
from taco_nb.metrics.fid import PATCH_SIZE, check_patch_size, frechet_distance
from taco_nb.metrics.joint_space import cmmd
from taco_nb.metrics.networks import (
    METRICS,
    Network,
    find_networks,
    given_networks,
    placed,
    say_missing,
    state_digest,
)
from taco_nb.processes import (
    Group,
    check_device,
    launched_processes,
    progress_bar,
    run_in_processes,
    stop_requests,
)
from taco_nb.provenance import code_digest, provenance
from taco_nb.settings import check_count

BATCH_SIZE = 16
"""Crops of one size that go through the networks together."""
_COMPUTES = (
    "model", "text", "metrics", "codec.py", "evaluation/measure.py", "data/captioned.py", "data/colour.py", "data/images.py",
)  # fmt: skip
"""The code that figures depend on."""
_PACKAGES = (
    "torch", "torchvision", "compressai", "open_clip_torch", "lpips", "pytorch-msssim", "torch-fidelity",
)  # fmt: skip
"""The packages whose arithmetic figures depend on. Half an evaluation is not gone on with under another version."""


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

    Columns: codec, dataset, name, width, height, bytes (the file's size), bpp, caption; psnr and ms_ssim of the 8-bit
    picture, psnr_taco and ms_ssim_taco by the reference's protocol; where the weights are on the machine, lpips (of the
    8-bit picture, in [-1, 1]), lpips_01 (of the floats, in [0, 1], as TACO published), clip_score (0 to 100), and fid and
    cmmd of the whole set, the same in each of its rows; in the space of the bundled CLIP, mini_distance (0 to 8),
    mini_score (0 to 100) and mini_mmd (of the whole set); encode_s and decode_s (seconds; each image's share of its batch).

    `caption` chooses among an image's captions: "first"; "last", as the reference's script; or "best", the one with the
    lowest lpips_01, as its paper. `batch_size` images of a set that is cropped to one size go through the networks
    together, others alone. `patch_size` is the side of FID's patches on whole images. `num_processes` share the images, on
    a GPU each where the codec is on one; those of `accelerate launch` do so by themselves. `networks` {"lpips": Lpips,
    "fid": Inception, "cmmd": CmmdEmbedding, "clip_score": ClipScore} replace those on this machine, any of them.

    With `out_dir`, the files and tables that `taco_nb.evaluation.records` describes are kept there, beside those of other
    data sets. One call at a time works in a folder; a second one waits. A call that was stopped goes on where it was; one
    that was finished returns what is there, unless what is measured, or how, has changed, which is then said.

    Raises `DataError` for an image that cannot be read, `SettingError` for sets or settings that cannot be,
    `MissingWeightsError` for caption="best" without LPIPS, `StoppedError` when a signal asks for a stop.
    """
    check_sets(sets)
    launched_processes()
    group = Group(PartialState())
    how = {"caption": caption, "batch_size": batch_size, "patch_size": patch_size}
    found, absent = find_networks() if networks is None else given_networks(networks)
    if caption not in CAPTIONS:
        raise SettingError(f"caption must be {' or '.join(map(json.dumps, CAPTIONS))}, but is {caption!r}.")
    check_count(batch_size, "batch_size")
    check_count(num_processes, "num_processes")
    check_patch_size(patch_size)
    if caption == "best" and "lpips" not in found:
        raise MissingWeightsError(f'caption="best" is chosen by LPIPS, and there is none: {absent["lpips"]}.')
    if group.size > 1 and out_dir is None:
        raise SettingError("Several processes need a folder that they share: give out_dir.")
    with tempfile.TemporaryDirectory() if out_dir is None else nullcontext(out_dir) as folder:
        if num_processes > 1 and group.size == 1:
            _evaluate_in_processes(codec, num_processes, sets, folder, {**how, "networks": networks})
        else:
            if absent and networks is None and group.is_main:
                say_missing(tuple(absent))
            _Evaluation(codec, sets, Path(folder), how, (found, absent), group).run()
        results = read_evaluation(folder, [dataset.name for dataset in sets])
    return results.assign(codec=codec.name)  # it may have had another name when it was measured


def check_sets(sets: Sequence[CaptionedImages]) -> None:
    """Raise `SettingError` unless this is a list of data sets that have names of their own."""
    if isinstance(sets, CaptionedImages) or not sets:
        raise SettingError(
            "The data sets are a list with at least one in it, as taco_nb.datasets gives them."
        )
    names = [dataset.name for dataset in sets]
    if len(set(names)) < len(names):
        raise SettingError(f"Two data sets have the same name, of {names}: rename one.")


class _Evaluation:
    """An evaluation while it runs. What it measures is held in memory, so that nothing in the folder can change it."""

    def __init__(
        self,
        codec: Codec,
        sets: Sequence[CaptionedImages],
        folder: Path,
        how: Mapping[str, Any],
        networks: tuple[dict[str, Network], dict[str, str]],
        group: Group,
    ):
        self.codec, self.sets, self.folder, self.how, self.group = codec, sets, folder, how, group
        self.found, self.absent = networks
        tower = Path(codec.text_encoder.partition("/")[2]).expanduser()
        keywords = codec.keywords and hashlib.sha256(codec.keywords.encode()).hexdigest()
        text = [codec.text_encoder, codec.text_tokens, codec.text_length, codec.text_pooling, keywords]
        packages = provenance()["packages"]
        settings = {
            "weights": state_digest(codec.net),
            "text encoder": [*text, sha256(tower) if tower.is_file() else None],
            "mode": codec.mode,
            "kind of device": codec.device.type,
            "caption": how["caption"],
            "networks": {metric: network.weights for metric, network in self.found.items()},
            "program": code_digest(*_COMPUTES),
            "packages": {name: packages[name] for name in _PACKAGES},
        }
        self.records = []
        for dataset in sets:
            cropped = {"crop": dataset.crop, "batch_size": how["batch_size"], "patch_size": None}
            whole = {"crop": None, "batch_size": 1, "patch_size": how["patch_size"]}
            self.records.append(Records(folder, dataset, settings | (cropped if dataset.crop else whole)))

    def run(self) -> None:
        """Measure what is not measured yet, together with the other processes, if any, and write the table."""
        with self.group.alone_in(self.folder, "evaluating", wait=True):
            before, rows = self._before()
            new = [records for records in self.records if not _holds(records, before)]
            left = {records: records.left() for records in new}
            if self.group.is_main:
                self._say(before, left)
            self.group.wait()  # for those that still look at what is there
            self._measure(left)
            self.group.wait()
            if self.group.is_main and new:
                self._finish(new, before, rows)
            elif self.group.is_main:
                write_csv(self.folder / TABLE, as_table(rows))  # which somebody may have changed or deleted
            self.group.wait()  # for the table, which all of them return

    def _before(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what the folder's evaluation.json says of each data set, and its rows; nothing if it cannot be believed."""
        try:
            about = read_about(self.folder)
            if all({"settings", "sha256"} <= of_set.keys() for of_set in about["data"].values()):
                return about["data"], about["rows"]
        except (DataError, KeyError, AttributeError):
            pass
        return {}, []

    def _say(self, before: Mapping[str, Any], left: Mapping[Records, set[range]]) -> None:
        """Print what was found in the folder, where anything was."""
        if not left:
            path = self.folder / TABLE
            print(f"Evaluated before, and nothing has changed since: the figures are those of {path}.")
        for records in left:
            if about := before.get(records.dataset.name):
                changes = ", ".join(_changes(about["settings"], records.settings)) or "data"
                print(
                    f"Evaluating {records.dataset.name} again in {self.folder}: other than the last time are {changes}."
                )
        total = sum(len(records.dataset) for records in left)
        done = total - sum(len(batch) for batches in left.values() for batch in batches)
        if done:
            print(f"Going on with the evaluation in {self.folder}: {done} of {total} images are done.")

    def _measure(self, left: Mapping[Records, set[range]]) -> None:
        """Measure this process's share of what is left. Raises `StoppedError` where a signal asks for a stop."""
        rank, count = self.group.rank, self.group.size
        # The share is one of all batches, done or not, so that no two processes ever take the same one.
        every = [(records, batch) for records in left for batch in records.batches]
        share = [(records, batch) for records, batch in every[rank::count] if batch in left[records]]
        if not share:
            return
        codec = self.codec
        codec.decode(codec.encode(Image.new("RGB", (64, 64)), ""))  # loads what would else count as time
        networks = {metric: network.load(codec.device) for metric, network in self.found.items()}
        what = f"evaluating {codec.name}" + (f", 1 process of {count}" if count > 1 else "")
        total = sum(len(batch) for _, batch in share)
        with (
            progress_bar(total=total, desc=what, unit="image", disable=rank > 0) as bar,
            stop_requests() as requests,
        ):
            for records, batch in share:
                if requests:
                    raise StoppedError(
                        f"The evaluation in {self.folder} was asked to stop. What is measured is kept, and the same call "
                        "goes on."
                    )
                clock, dataset = time.perf_counter(), records.dataset
                images = [records.identify(i) for i in batch]
                samples, patch_size = [dataset[i] for i in batch], records.settings["patch_size"]
                measured = measure(codec, samples, records.files, networks, self.how["caption"], patch_size)
                records.write(batch, images, *measured, time.perf_counter() - clock)
                bar.update(len(batch))

    def _finish(
        self, new: Sequence[Records], before: Mapping[str, Any], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Write the table and what is to be known of it, beside those of data sets that are not measured now."""
        data, now = dict(before), new[0].settings
        for records in new:
            data.pop(records.dataset.name, None)
        for name in list(data):
            if any(data[name]["settings"][key] != now[key] for key in ("weights", "text encoder")):
                del data[name]
                print(
                    f"The earlier figures of {name} in {self.folder} are left out: they are of other weights."
                )
        rows = [row for row in rows if row["dataset"] in data]
        for records in new:
            data[records.dataset.name], more = self._put_together(records)
            rows += more
        rows = [{**row, "codec": self.codec.name} for row in rows]
        about = {**of_codec(self.codec), "data": data, "means": means(as_table(rows)).to_dict("records")}
        write_evaluation(self.folder, about, rows)
        for records in new:
            records.forget_features()

    def _put_together(self, records: Records) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what evaluation.json says of a data set, and its rows, each measured under these very settings."""
        clock, dataset = time.perf_counter(), records.dataset
        batches = [records.read(batch) for batch in records.batches]
        if None in batches:
            raise DataError(
                f"Images or results of {dataset.name} in {self.folder} changed while they were evaluated. Evaluate again: "
                "what is right is kept."
            )
        digests = [batch[0]["measured_under"] for batch in batches]
        metrics = {
            metric: {"protocol": METRICS[metric].protocol, "weights": network.weights}
            for metric, network in self.found.items()
        }
        figures = {}
        if "fid" in self.found:
            figures["fid"], of = _fid(records, digests, self.how["patch_size"])
            metrics["fid"] |= of
        for metric in ("cmmd", "mini_mmd"):
            if metric in self.found:
                features = (records.features(digests, f"{metric}.{name}") for name in ("x", "x_hat"))
                figures[metric] = cmmd(*(torch.cat(list(of_set)) for of_set in features), self.codec.device)
        kept = [record for batch in batches for record in batch]
        seconds = sum(record["seconds"] for record in kept) + time.perf_counter() - clock
        about = {
            **of_data_set(self.codec, dataset, self.how, self.found, self.sets),
            "sha256": _checksum(records.dataset, kept),
            "caption": {"rule": self.how["caption"], "chosen": CAPTIONS[self.how["caption"]]},
            "settings": records.settings,
            "metrics": metrics,
            "absent": self.absent,
            "figures": json.loads(as_json(figures)),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),  # of all processes together
            **provenance(),
        }
        rows = [{"codec": self.codec.name, "dataset": dataset.name, **record["row"]} for record in kept]
        for row in rows:  # the set's figures stand before the times, which come last
            times = {key: row.pop(key) for key in ("encode_s", "decode_s")}
            row |= about["figures"] | times
        return about, rows


def _holds(records: Records, before: Mapping[str, Any]) -> bool:
    """Tell whether all that was measured of a data set before is what would be measured now."""
    about = before.get(records.dataset.name)
    if about is None or _changes(about["settings"], records.settings):
        return False
    earlier = Records(records.folder, records.dataset, about["settings"])
    batches = [earlier.read(batch) for batch in earlier.batches]
    if None in batches:
        return False
    return _checksum(records.dataset, [record for batch in batches for record in batch]) == about["sha256"]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that differ, and make finished figures untrue.

    They outlive the networks that they were measured with, as long as no others have come, and new versions of packages.
    """
    still_true = {"packages": before["packages"], "networks": {**before["networks"], **now["networks"]}}
    return [key for key, value in {**now, **still_true}.items() if before.get(key) != value]


def _checksum(dataset: CaptionedImages, kept: Sequence[Mapping[str, Any]]) -> str:
    """Return the data set's checksum, by the digests in its records in place of reading all images again."""
    known = {dataset.path(i): record["image"][2] for i, record in enumerate(kept)}
    return dataset.checksum(known.__getitem__)


def _fid(records: Records, digests: Sequence[str], patch_size: int) -> tuple[float, dict[str, Any]]:
    """Return the FID of a data set, and what it is over. Of too few pictures it comes with a warning."""
    name = records.dataset.name
    of = "crops" if records.dataset.crop else f"patches of {patch_size}x{patch_size}"
    count = features = 0

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal count, features
        for x, x_hat in zip(records.features(digests, "fid.x"), records.features(digests, "fid.x_hat")):
            count, features = count + len(x), x.shape[1]
            yield x, x_hat

    figure = frechet_distance(pairs())
    if count < 2:
        print(f"No FID of {name}: there are {count} {of} in its images, and two are the least.")
    elif count <= features:
        print(
            f"FID of {name} is over {count:,} {of}, no more than the {features:,} features of each: it comes out too "
            "high. Compare it only with figures over as many."
        )
    return figure, {"of": of, "images": len(records.dataset), "count": count}


# Several processes ----------------------------------------------------------------------------------------------------


def _evaluate_in_processes(
    codec: Codec,
    count: int,
    sets: Sequence[CaptionedImages],
    out_dir: str | os.PathLike,
    options: dict[str, Any],
) -> None:
    """Let `count` new processes do the same call, each with a copy of the codec."""
    check_device(codec.device.type, count)
    names = (
        "text_encoder", "text_tokens", "text_length", "text_pooling", "keywords", "mode", "name", "about", "data_dir",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        if networks := options["networks"]:
            # On their way they lie on the processor, and each process puts them on its own GPU.
            cpu = torch.device("cpu")
            options["networks"] = {name: placed(network, cpu) for name, network in networks.items()}
        weights = Path(scratch, "codec.safetensors")
        save_weights(weights, codec.net, {})
        arguments = {
            "weights": weights,
            "cpu": codec.device.type == "cpu",
            "codec": {name: getattr(codec, name) for name in names},
            "sets": list(sets),
            "out_dir": Path(out_dir).resolve(),
            "options": options,
        }
        target = "taco_nb.evaluation.run:evaluate_saved"
        run_in_processes(target, arguments, count, f"evaluating {codec.name}", "image")


def evaluate_saved(
    weights: Path,
    cpu: bool,
    codec: dict[str, Any],
    sets: list[CaptionedImages],
    out_dir: Path,
    options: dict[str, Any],
) -> None:
    """Do the work of one of these processes."""
    device = PartialState(cpu=cpu).device
    net, _ = load_net(weights)
    evaluate(Codec(net.to(device), **codec), sets, out_dir, **options)
