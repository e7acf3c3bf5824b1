"""An evaluation keeps in its folder what it has measured, together with what tells whether that is still true.

    files/<data set>/<image>.taco   the image, as the codec keeps it
    files/<data set>/<image>.json   its record: its row, and a digest of all that the row was measured under
    features/<data set>/            what FID and CMMD see of each batch, until the data set is finished
    evaluation.json                 of what, how, when and on what machine all was measured; then the rows, one a line
    evaluation.csv                  the same rows for people

A record is written when its row is known, so a kill at any moment costs one batch. Any number of processes may write,
since no two write the same one. Nothing in the folder is believed unless its digest is the one that is wanted now.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save
from torch import Tensor

from taco_nb.data import CaptionedImages
from taco_nb.errors import DataError
from taco_nb.files import atomic_write, fitting_name, sha256
from taco_nb.metrics.networks import OF_SETS

ABOUT, TABLE = "evaluation.json", "evaluation.csv"
TEXT = ("codec", "dataset", "name", "caption")
"""The columns of a table that are no numbers."""


def batch_ranges(count: int, size: int) -> list[range]:
    """Cut the numbers from 0 to `count` - 1 into ranges of `size`, of which the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


# The records of one data set ------------------------------------------------------------------------------------------


class Records:
    """The records of a data set's images, as far as they hold under `settings`.

    `settings` is everything besides an image and its captions that figures depend on, as JSON can hold it. Images that go
    through the network together change each other's last digits, so a record's digest is one of its whole batch.
    """

    def __init__(self, folder: Path, dataset: CaptionedImages, settings: Mapping[str, Any]):
        self.folder, self.dataset, self.settings = folder, dataset, settings
        self.files = folder / "files" / dataset.name
        self._features = folder / "features" / dataset.name

    @property
    def batches(self) -> list[range]:
        """The images that are measured together, in order. This follows from the settings alone, so the figures do."""
        return batch_ranges(len(self.dataset), self.settings["batch_size"])

    def read(self, batch: range) -> list[dict[str, Any]] | None:
        """Return the records of a batch; None if one is missing or damaged, or was measured under anything else."""
        records = []
        for i in batch:
            name = self.dataset.names[i]
            try:
                record = json.loads(file_of(self.files, name, ".json").read_text(encoding="utf-8"))
                record["image"] = self.identify(i, record["image"])
                # A kill between both leaves a new file beside the record of an old one.
                if file_of(self.files, name, ".taco").stat().st_size != record["row"]["bytes"]:
                    return None
            except (OSError, ValueError, KeyError, TypeError):
                return None
            records.append(record)
        digest = self._digest(batch, [record["image"] for record in records])
        return records if all(record["measured_under"] == digest for record in records) else None

    def write(
        self,
        batch: range,
        images: Sequence[list[Any]],
        rows: Sequence[dict[str, Any]],
        features: Mapping[str, Tensor],
        seconds: float,
    ) -> None:
        """Keep what was measured of a batch in so many seconds. `images` are what `identify` says of them."""
        digest = self._digest(batch, images)
        if features:  # before the records, which vouch for them
            with atomic_write(self._features_of(digest), durable=False) as file:
                file.write(save({name: value.contiguous() for name, value in features.items()}))
        for image, row in zip(images, rows):
            record = {"measured_under": digest, "image": image, "seconds": seconds / len(rows), "row": row}
            with atomic_write(file_of(self.files, row["name"], ".json"), "w", durable=False) as file:
                file.write(as_json(record))

    def left(self) -> set[range]:
        """Return the batches that are not measured yet, or whose features are gone where figures need them."""
        needed = self.settings["networks"].keys() & {*OF_SETS}
        left = set()
        for batch in self.batches:
            found = self.read(batch)
            if not found or (needed and not self._features_of(found[0]["measured_under"]).is_file()):
                left.add(batch)
        return left

    def features(self, digests: Sequence[str], name: str) -> Iterator[Tensor]:
        """Yield the features of that name, a batch at a time."""
        for digest in digests:
            yield load_file(self._features_of(digest))[name]

    def _features_of(self, digest: str) -> Path:
        return self._features / f"{digest}.safetensors"

    def forget_features(self) -> None:
        shutil.rmtree(self._features, ignore_errors=True)

    def identify(self, i: int, before: Sequence[Any] = ()) -> list[Any]:
        """Return size, time of change in ns and SHA-256 of an image file, read only if the first two are not as before.

        Raises `DataError` where it is gone.
        """
        path = self.dataset.path(i)
        if not path.is_file():
            raise DataError(f"There is no image file {path}.")
        found = path.stat()
        if list(before[:2]) == [found.st_size, found.st_mtime_ns]:
            return list(before)
        return [found.st_size, found.st_mtime_ns, sha256(path)]

    def _digest(self, batch: range, images: Sequence[Sequence[Any]]) -> str:
        seen = [
            [self.dataset.names[i], image[2], self.dataset.captions(i)] for i, image in zip(batch, images)
        ]
        return hashlib.sha256(json.dumps([self.settings, seen], sort_keys=True).encode()).hexdigest()


def file_of(folder: Path, name: str, ending: str) -> Path:
    """Return the path of an image's file of results."""
    return folder / (fitting_name(name) + ending)


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON, on one line unless indented. Infinite and missing numbers, which it does not know, become null."""
    return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Tables ---------------------------------------------------------------------------------------------------------------


def write_evaluation(folder: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write evaluation.json, with what is to be known first and then a row on every line, and evaluation.csv."""
    lines = ",\n".join(map(as_json, rows))
    head = as_json({**about, "rows_sha256": _rows_digest(rows)}, indent=1)
    with atomic_write(folder / ABOUT, "w") as file:
        file.write(head.removesuffix("\n}") + f',\n "rows": [\n{lines}\n]\n}}\n')
    write_csv(folder / TABLE, as_table(json.loads(f"[{lines}]")))  # as readers of the JSON will have them


def write_csv(path: Path, table: pd.DataFrame, text_columns: Sequence[str] = TEXT) -> None:
    """Write a table for people, unless it is there already, and check that it holds the same rows when it is read.

    All text in it is quoted: before 3.11.9, Python's writer leaves a bare carriage return unquoted, where readers begin a
    new row. NUL, which ends text for pandas' reader, becomes U+FFFD. Raises `DataError` for a table that is read otherwise.
    """
    table = table.replace("\0", "\ufffd", regex=True)
    text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").encode()
    if path.is_file() and path.read_bytes() == text:
        return
    with atomic_write(path) as file:
        file.write(text)
    again = pd.read_csv(
        path,
        float_precision="round_trip",
        dtype=dict.fromkeys(text_columns, str),
        keep_default_na=False,  # "" and "nan" are captions
        na_values=dict.fromkeys(table.columns.difference(text_columns), ""),
    )
    if not again.equals(table):
        raise DataError(f"{path}, read back, does not hold the rows that were written to it.")


def read_evaluation(folder: str | os.PathLike, sets: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the table that `evaluate` has left in a folder, or its rows of some data sets, in the order asked for.

    Raises `DataError` where there is none, or one that is damaged.
    """
    rows = read_about(folder)["rows"]
    if sets is not None:
        rows = [row for name in sets for row in rows if row["dataset"] == name]
    return as_table(rows)


def read_about(folder: str | os.PathLike) -> dict[str, Any]:
    """Return what evaluation.json says. Raises `DataError` where it is missing or damaged, or its rows have been changed."""
    path = Path(folder, ABOUT)
    if not path.is_file():
        state = (
            "its evaluation is unfinished" if Path(folder, "files").is_dir() else "it has not been evaluated"
        )
        raise DataError(f"{folder}: {state}, there is no {ABOUT}.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or _rows_digest(about.get("rows")) != about.get("rows_sha256"):
            raise ValueError("its rows are not those that were written")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {ABOUT} is damaged ({error}). Evaluate again.") from None
    return about


def _rows_digest(rows: Any) -> str:
    return hashlib.sha256(as_json(rows).encode()).hexdigest()


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows from JSON as a data frame, with NaN for the numbers that are null there."""
    return pd.DataFrame(
        [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    )


def means(results: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the mean of every measured column over the images of each data set, per codec (and quality, for peers).

    `images` says how many there are. Some have no figure: MS-SSIM is not defined for small pictures, nor PSNR for one that
    comes back without an error. Where a mean is so over fewer of them, a column such as `ms_ssim_images` says over how many.
    `columns` chooses and orders what is returned; such counts stay beside their means.
    """
    results = results.reset_index(drop=True)  # frames put together repeat their row numbers
    keys = [key for key in ("codec", "dataset", "quality") if key in results]
    numbers = results.drop(columns=[*keys, "width", "height"], errors="ignore").select_dtypes("number")
    table = mean_by(results[keys].join(numbers), keys, list(numbers)).reset_index()
    if columns is None:
        return table
    kept = [name for wanted in columns for name in (wanted, f"{wanted}_images") if name in table]
    return table[kept]


def mean_by(rows: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return, by `keys`, the means of the columns over their finite values, the counts of these, and `images`, of all."""
    values = rows[[*keys, *columns]].replace([math.inf, -math.inf], math.nan)
    groups = values.groupby(list(keys), sort=False, dropna=False)
    table, counts, images = groups.mean(), groups.count(), groups.size()
    for name in reversed(columns):
        few = (counts[name] > 0) & (counts[name] < images)
        if few.any():
            table.insert(table.columns.get_loc(name) + 1, f"{name}_images", counts[name])
    return table.assign(images=images)
