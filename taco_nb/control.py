"""Is it the text? Two controls for any codec: the same pictures under other captions, and the shapes, where text must matter.

`control` is the negative control. It encodes every picture under its own caption and under five others. A codec that uses
what captions say does worse under the others; how much worse, at most, is what its text is worth.

`listening` is the positive control: it shows that this instrument sees an effect where there is one. In the world of
`taco_nb.data.shapes` only the caption says which shape matters. **Listening** is the PSNR of the named shape under the
caption that names it, less its PSNR under one that names another shape of the same picture. Both captions are of the same
kind, so over many scenes the files are equally large, which `bytes_own` and `bytes_other` show. A codec that reads a
constant caption writes the same file both times, and its listening is exactly zero.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pandas as pd
import torch

from taco_nb.checkpoint import trained_as
from taco_nb.codec import Codec
from taco_nb.data import CaptionedImages
from taco_nb.data.images import to_image
from taco_nb.data.shapes import Scene, long_caption, scene, short_caption
from taco_nb.errors import SettingError
from taco_nb.evaluation.measure import measure
from taco_nb.evaluation.records import TEXT, batch_ranges, write_csv
from taco_nb.evaluation.run import BATCH_SIZE, check_sets
from taco_nb.files import bundled
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.interval import interval, interval_of
from taco_nb.metrics.networks import OF_SETS, find_networks, say_missing
from taco_nb.processes import progress_bar
from taco_nb.settings import check_count
from taco_nb.text.conditioning import CONSTANT_CAPTION
from taco_nb.text.tokens import clip_tokenizer

CONDITIONS = {
    "own": "each picture's own caption",
    "another's": "the caption of another picture",
    "constant": f'"{CONSTANT_CAPTION}" for every picture',
    "empty": "no words at all",
    "NA": '"NA" for every picture, as a user of the authors\' weights tried',
    "nonsense": "words drawn at random, as many tokens as the own caption has",
}
TABLE = "control.csv"
EFFECTS = {
    "bytes": "bits, %", "psnr": "PSNR, dB", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "mini_distance": "mini_distance",
    "clip_score": "CLIP score", "mini_score": "mini_score",
}  # fmt: skip
"""The metrics of which effects are given, each with its unit. All are differences, but for bits, which are in per cent."""
_SAID = ("bytes", "psnr")
"""The metrics that sentences are about."""


# The same pictures under other captions -------------------------------------------------------------------------------


def control(
    codec: Codec,
    sets: Sequence[CaptionedImages],
    out_dir: str | os.PathLike | None = None,
    *,
    seed: int = 0,
    conditions: Sequence[str] = tuple(CONDITIONS),
    read: Sequence[CaptionedImages] | None = None,
) -> pd.DataFrame:
    """Encode each picture under its own caption and the others of `conditions`: a row per picture and condition.

    Columns: codec, dataset, condition, the columns of `taco_nb.evaluate` that are of one picture ("caption" is what the
    encoder read), and captions, the first digits of a SHA-256 over all that was read under this condition. Scores of
    picture against caption are always against the picture's *own* caption in `sets`. Its first one is taken. `read` are the
    same pictures with other captions, such as paragraphs, if the encoder is to read those: codecs that read different kinds
    of captions can then be compared by one score.

    Real files are written and decoded. With `out_dir` they are kept there, a folder per condition, beside control.csv.
    Raises `SettingError` for sets of fewer than two pictures, which have no other's caption, and what `evaluate` raises.
    """
    check_sets(sets)
    found, absent = find_networks()
    if absent:
        say_missing(tuple(absent))
    networks = {name: network.load(codec.device) for name, network in found.items() if name not in OF_SETS}
    rows = []
    total = len(conditions) * sum(map(len, sets))
    with (
        tempfile.TemporaryDirectory() if out_dir is None else nullcontext(out_dir) as folder,
        progress_bar(total=total, desc=f"control of {codec.name}", unit="file") as bar,
    ):
        for dataset, source in zip(sets, read or sets):
            own = [source.captions(i)[0] for i in range(len(dataset))]
            for condition in conditions:
                captions = captions_under(condition, own, seed)
                digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:12]
                about = {"codec": codec.name, "dataset": dataset.name, "condition": condition}
                for batch in _batches(dataset):
                    samples = [dataset[i] for i in batch]
                    files = Path(folder, condition, dataset.name)
                    read_here = [captions[i] for i in batch]
                    measured, _ = measure(codec, samples, files, networks, read=read_here)
                    rows += [{**about, **row, "captions": digest} for row in measured]
                    bar.update(len(batch))
        table = pd.DataFrame(rows)
        if out_dir is not None:
            write_csv(Path(folder, TABLE), table, (*TEXT, "condition", "captions"))
    return table


def captions_under(condition: str, own: Sequence[str], seed: int = 0) -> list[str]:
    """Return what the encoder reads under a condition, for pictures with these captions of their own.

    Raises `SettingError` for an unknown condition, and for "another's" of fewer than two pictures.
    """
    if condition == "own":
        return list(own)
    if condition == "another's":
        return [own[i] for i in derangement(len(own), seed)]
    if condition == "nonsense":
        return [_nonsense(caption, Random(f"{seed} {i}")) for i, caption in enumerate(own)]
    fixed = {"constant": CONSTANT_CAPTION, "empty": "", "NA": "NA"}
    if condition not in fixed:
        raise SettingError(f"condition is one of {', '.join(CONDITIONS)}, not {condition!r}.")
    return [fixed[condition]] * len(own)


def derangement(count: int, seed: int = 0) -> list[int]:
    """Return the numbers from 0 to `count` - 1 in an order that leaves none in its place: a random cycle through all.

    This is Sattolo's shuffle (1986): as Fisher and Yates's, but no number is exchanged with itself. Raises `SettingError`
    for fewer than two.
    """
    check_count(count, "The number of pictures, each of which gets another's caption,", least=2)
    order, rng = list(range(count)), Random(seed)
    for last in range(count - 1, 0, -1):
        other = int(rng.random() * last)
        order[last], order[other] = order[other], order[last]
    return order


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """Return what each other caption changes against the own one: a row per codec, data set, condition and metric.

    Columns: effect, the mean over the pictures of the difference to the same picture under its own caption, with `unit`;
    low and high, its 95 % bootstrap interval (NaN for fewer than ten pictures); and images, over how many it is.
    """
    rows = []
    for (codec, dataset), of_set in table.groupby(["codec", "dataset"], sort=False):
        own = of_set[of_set["condition"] == "own"].set_index("name")
        for condition in CONDITIONS:
            other = of_set[of_set["condition"] == condition].set_index("name")
            if condition != "own" and len(other):
                about = {"codec": codec, "dataset": dataset, "condition": condition}
                rows += [{**about, **row} for row, _ in _changes([(own, other.loc[own.index])])]
    return pd.DataFrame(rows)


def _changes(
    seeds: Sequence[tuple[pd.DataFrame, pd.DataFrame]],
) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """Yield what every metric changes by: a row with its mean over pictures and seeds, and the mean of each seed by itself.

    `seeds` holds for each seed the figures of the pictures before the change and after it, a row per picture.
    """
    for metric, unit in EFFECTS.items():
        if not seeds or metric not in seeds[0][0]:
            continue
        changes = [after[metric] - before[metric] for before, after in seeds]
        if metric == "bytes":
            changes = [100 * change / before[metric] for change, (before, _) in zip(changes, seeds)]
        change = (sum(changes) / len(changes)).dropna()
        low, high = interval_of(metric, change)
        row = {"metric": metric, "unit": unit, "effect": change.mean(), "low": low, "high": high}
        yield {**row, "images": len(change)}, [of_seed.mean() for of_seed in changes]


def said(found: pd.DataFrame, condition: str = "another's") -> str:
    """Say in sentences what a condition changes, from a table of `effects`: how large an effect is, or below what it lies."""
    sentences = []
    for (codec, dataset), of_set in found[found["condition"] == condition].groupby(["codec", "dataset"]):
        parts = [_in_words(row, row.low, row.high) for row in of_set.itertuples() if row.metric in _SAID]
        sentences.append(
            f"{codec} on {dataset}: reading {CONDITIONS[condition]} in place of the own one changes "
            f"{', and '.join(parts)}."
        )
    return "\n".join(sentences)


def _in_words(row: Any, low: float, high: float) -> str:
    """Say how large an effect on bits or PSNR is, if `low` and `high` are on one side of zero, or below what it lies."""
    what, unit = EFFECTS[row.metric].split(", ")
    if math.isnan(low):
        return f"{what} by {row.effect:+.3f} {unit}, of {row.images} pictures, too few for an interval"
    if low == high == 0:
        return f"{what} not at all: the files are the same"
    if low <= 0 <= high:
        return (
            f"{what} by less than {max(-low, high):.2g} {unit} either way, which cannot be told from nothing"
        )
    return f"{what} by {row.effect:+.2g} {unit} ({low:+.2g} to {high:+.2g})"


def _batches(dataset: CaptionedImages) -> list[range]:
    """Return the pictures that go through the networks together: crops of one size by the batch, whole pictures alone."""
    return batch_ranges(len(dataset), BATCH_SIZE if dataset.crop else 1)


def _nonsense(caption: str, rng: Random) -> str:
    """Return whole words of CLIP's vocabulary that have nothing to do with each other, one for each token of the caption."""
    vocabulary = _whole_words()
    count = len(clip_tokenizer().encode(caption))
    return " ".join(vocabulary[int(rng.random() * len(vocabulary))] for _ in range(count))


@cache  # since it looks through the whole vocabulary
def _whole_words() -> list[str]:
    """Return the words that are one token of CLIP's, of five letters or more, so that each is one token again."""
    words = (token.removesuffix("</w>") for token in clip_tokenizer().encoder if token.endswith("</w>"))
    return [word for word in words if len(word) >= 5 and word.isascii() and word.isalpha()]


# Codecs that were trained alike ---------------------------------------------------------------------------------------


def siblings(data_dir: str | os.PathLike | None = None) -> pd.DataFrame:
    """Return what every run of the bundled codecs' recipe made of the centre crops of Kodak's pictures.

    There is a row per run, picture and condition ("own", "another's"), with the columns of `control`. Runs that differ in
    their seeds alone have the same name in `codec`, and `seed` tells them apart.
    """
    table = pd.read_csv(bundled("checkpoints/results.csv", data_dir))
    run = table["codec"].str.extract(r"^(.+?)(?:-seed(\d+))?$")
    return table.assign(codec=run[0], seed=run[1].fillna("1").astype(int))


def against(table: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return what a codec does otherwise than its sibling, each reading its own captions: a row per pair and metric.

    `table` comes from `siblings`, and a pair names the codec and the sibling that it is held against. Columns: codec,
    sibling, metric and unit; effect, the mean over pictures and over the seeds that both have; low and high, its 95 %
    bootstrap interval over the pictures; seeds, the mean of each seed by itself; and images.
    """
    own = table[table["condition"] == "own"]
    runs = {key: run.set_index("name") for key, run in own.groupby(["codec", "seed"])}
    rows = []
    for codec, sibling in pairs:
        seeds = [
            (runs[sibling, seed], run)
            for (name, seed), run in runs.items()
            if name == codec and (sibling, seed) in runs
        ]
        for row, of_seeds in _changes(seeds):
            rows.append({"codec": codec, "sibling": sibling, **row, "seeds": tuple(of_seeds)})
    columns = ["codec", "sibling", "metric", "unit", "effect", "low", "high", "seeds", "images"]
    return pd.DataFrame(rows, columns=columns)


def said_of_siblings(found: pd.DataFrame) -> str:
    """Say in sentences how siblings differ, from a table of `against`, or how small a difference would have been seen.

    A difference counts if neither the interval over the pictures nor the range of the seeds has zero in it.
    """
    sentences = []
    for (codec, sibling), of in found.groupby(["codec", "sibling"], sort=False):
        parts = [
            _in_words(row, min(row.low, *row.seeds), max(row.high, *row.seeds))
            for row in of.itertuples()
            if row.metric in _SAID
        ]
        count = len(of["seeds"].iloc[0])
        of_seeds = f"over {count} seeds" if count > 1 else "with one seed"
        sentences.append(f"{codec} against {sibling}, {of_seeds}: {', and '.join(parts)}.")
    return "\n".join(sentences)


# The shapes -----------------------------------------------------------------------------------------------------------


def listening(codec: Codec, scenes: int = 96, first: int = 0) -> pd.DataFrame:
    """Return how well a codec hears which shape of a scene is named: a row per scene.

    Columns: codec, kind ("free", "crossed"), seed, named, other (the shape that the other caption names), psnr_own, and so on
    and psnr_empty (of the named shape's pixels, under the caption that names it, the one that names the other, and none),
    listening = psnr_own - psnr_other, bytes_own, bytes_other and bytes_empty. The scenes have the seeds from `first` on,
    half of each kind, and none was trained on. A codec that was trained on paragraphs is given paragraphs.

    Raises `SettingError` unless scenes >= 2.
    """
    check_count(scenes, "The number of scenes", least=2)
    exp = trained_as(codec.about)
    long = exp is not None and exp.captions == "context"
    turns = []
    for i in range(scenes):
        # The kinds take turns, and of each kind every pair of the four shapes, in either order, in every twelve scenes.
        kind, number = ("free", "crossed")[i % 2], i // 2
        named, apart = number % 4, 1 + number // 4 % 3
        shown = scene(first + number, kind == "crossed")
        turns.append(_Turn(first + number, kind, shown, named, (named + apart) % 4))
    rows = []
    with progress_bar(total=scenes, desc=f"listening of {codec.name}", unit="scene") as bar:
        for batch in batch_ranges(scenes, BATCH_SIZE):
            part = turns[batch.start : batch.stop]
            images = [to_image(turn.shown.image / 255) for turn in part]
            read = {
                "own": [turn.caption(turn.named, long) for turn in part],
                "other": [turn.caption(turn.other, long) for turn in part],
                "empty": [""] * len(part),
            }
            files = {which: codec.encode_batch(images, captions) for which, captions in read.items()}
            decoded = {which: codec.decode_batch(of) for which, of in files.items()}
            for i, (seed, kind, shown, named, other) in enumerate(part):
                row = {"codec": codec.name, "kind": kind, "seed": seed}
                row |= {"named": shown.names[named], "other": shown.names[other]}
                row |= {f"psnr_{which}": shape_psnr(shown, named, decoded[which][i]) for which in read}
                row |= {"listening": row["psnr_own"] - row["psnr_other"]}
                rows.append(row | {f"bytes_{which}": len(files[which][i]) for which in read})
            bar.update(len(part))
    return pd.DataFrame(rows)


class _Turn(NamedTuple):
    """This is a scene, the number of the shape that is named, and that of another one, which the other caption names."""

    seed: int
    kind: str
    shown: Scene
    named: int
    other: int

    def caption(self, k: int, long: bool) -> str:
        names = [self.shown.names[k]]
        return long_caption(self.shown, names) if long else short_caption(names, self.seed)


def shape_psnr(shown: Scene, k: int, x_hat: torch.Tensor) -> float:
    """Return the PSNR in dB over the pixels of a scene's shape k, of a reconstruction (3, 64, 64) clamped to 8 bits."""
    # The shape's pixels in a row are a picture of their own.
    x, x_hat = (picture[:, shown.masks[k]][:, None] for picture in (shown.image / 255, x_hat.cpu()))
    return distortion(x, x_hat)["psnr"]


def heard(tables: pd.DataFrame) -> pd.DataFrame:
    """Return the mean listening of each codec and kind of scene, with its 95 % interval over the scenes, from `listening`.

    Columns: codec, kind, listening, low, high, psnr_own, psnr_other, psnr_empty, bytes (of the files under the own caption),
    "bits, %" (of those under the other caption, against the own), scenes.
    """
    rows = []
    for (codec, kind), of in tables.groupby(["codec", "kind"], sort=False):
        low, high = interval(of["listening"])
        row = {"codec": codec, "kind": kind, "listening": of["listening"].mean(), "low": low, "high": high}
        row |= {name: of[name].mean() for name in ("psnr_own", "psnr_other", "psnr_empty")}
        row |= {"bytes": of["bytes_own"].mean()}
        row |= {"bits, %": 100 * (of["bytes_other"].sum() / of["bytes_own"].sum() - 1)}
        rows.append({**row, "scenes": len(of)})
    return pd.DataFrame(rows)


def results_of_shapes(data_dir: str | os.PathLike | None = None) -> pd.DataFrame:
    """Return what `heard` gave for every run of the shapes' recipe, those of other seeds too, with their settings."""
    return pd.read_csv(bundled("shapes/results.csv", data_dir)).rename(columns={"dataset": "kind"})


def over_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """Return the mean listening of runs that differ in their seeds alone, and its spread: a row per name and kind of scene.

    Columns: codec, kind, seeds (how many), listening (their mean), low and high (the lowest and the highest of the seeds),
    psnr_own, psnr_other and bytes.
    """
    plain = results.assign(codec=results["codec"].str.replace(r"-seed\d+$", "", regex=True))
    of_seeds = {"seeds": "size", "listening": "mean", "low": "min", "high": "max"}
    columns = {name: ("listening", how) for name, how in of_seeds.items()}
    columns |= {name: (name, "mean") for name in ("psnr_own", "psnr_other", "bytes")}
    return plain.groupby(["codec", "kind"], sort=False, as_index=False).agg(**columns)
