"""Data sets are opened by name: images with their captions to evaluate on, and pairs of both to train on."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from taco_nb.data.captioned import CaptionedFolder, CaptionedImages, Sample
from taco_nb.data.coco import Coco, TrainPairs
from taco_nb.errors import DataError, SettingError
from taco_nb.files import bundled
from taco_nb.settings import check_count

__all__ = [
    "CONTEXT",
    "CaptionedFolder",
    "CaptionedImages",
    "Coco",
    "Sample",
    "TrainPairs",
    "datasets",
    "training_pairs",
]

CONTEXT = "captions_context.json"
FETCHED = ("coco", "clic", "kodak")
"""The data sets that `taco-nb fetch` gets."""
STAGING = ".fetch"
"""The hidden folder inside a data set's own in which its unfinished download lies."""


class _Known(NamedTuple):
    """A data set that has a name: its folder in the data folder, what that folder must hold, and how it is read."""

    folder: str
    holds: str
    read: Callable[[Path], CaptionedImages]


_SAMPLE_TRAIN = _Known(
    "sample",
    "images/*.png and annotations/captions_train.json",
    lambda root: Coco(root, "train", name="sample-train"),
)
_EVALUATION = {
    "sample": _Known(
        "sample",
        "images/*.png and annotations/captions_val.json",
        lambda root: Coco(root, "val", name="sample"),
    ),
    "sample-train": _SAMPLE_TRAIN,
    "kodak": _Known(
        "kodak",
        "kodim01.png to kodim24.png and captions_ofa.json",
        lambda root: CaptionedFolder(root, root / "captions_ofa.json", name="kodak"),
    ),
    "clic": _Known(
        "clic",
        "the 428 PNG images of CLIC 2020's test set and captions_ofa.json",
        lambda root: CaptionedFolder(root, root / "captions_ofa.json", name="clic"),
    ),
    "coco": _Known(
        "coco",
        "val2014/*.jpg and dataset_coco.json",
        lambda root: Coco(root, "restval", karpathy=True, name="coco").centre_crop(256),
    ),
}
_TRAINING = {
    "sample": _SAMPLE_TRAIN,
    "coco": _Known(
        "coco",
        "train2014/*.jpg and annotations/captions_train2014.json",
        lambda root: Coco(root, "train", name="coco-train"),
    ),
}


def datasets(
    *names: str,
    data_dir: str | os.PathLike | None = None,
    limit: int | None = None,
    captions: str = "published",
) -> list[CaptionedImages]:
    """Return the data sets that a codec is evaluated on, in the order asked for.

    The names are "sample" (the bundled validation images) and "sample-train", "kodak" (24 images) and "clic" (CLIC 2020
    test) with TACO's OFA captions, and "coco" (Karpathy's restval, centre crop 256). They lie in `data_root(data_dir)`;
    images are opened only when they are used. `limit` keeps the first images of each. `captions` are the "published"
    ones, or the paragraphs with "context" that lie beside them in captions_context.json.

    Raises `SettingError` for an unknown name, another kind of captions or limit < 1, and `DataError` if a data set is
    absent or inconsistent.
    """
    if limit is not None:
        check_count(limit, "limit")
    found = [_open(_EVALUATION, name, data_dir, captions) for name in names]
    return found if limit is None else [dataset.head(limit) for dataset in found]


def training_pairs(
    name: str | os.PathLike,
    crop: int,
    data_dir: str | os.PathLike | None = None,
    seed: int = 0,
    captions: str = "published",
) -> TrainPairs:
    """Return the (crop, caption) pairs of "sample", of "coco" (train2014), or of a folder with a captions.json in it.

    `captions` is as for `datasets`. Raises what `datasets` and `TrainPairs` raise.
    """
    if str(name) not in _TRAINING and Path(name).is_dir():
        folder = CaptionedFolder(name, Path(name, "captions.json"))
        return TrainPairs(_captioned(folder, Path(name), data_dir, captions), crop, seed)
    return TrainPairs(_open(_TRAINING, name, data_dir, captions), crop, seed)


def _captioned(
    dataset: CaptionedImages, root: Path, data_dir: str | os.PathLike | None, captions: str
) -> CaptionedImages:
    """Return the data set under the captions that were asked for. Kodak's paragraphs are bundled."""
    if captions == "published":
        return dataset
    if captions != "context":
        raise SettingError(f'captions must be "published" or "context", but is {captions!r}.')
    own = root / f"{dataset.name}_{CONTEXT}"
    found = [
        place
        for place in (own, root / CONTEXT, bundled(f"reference/{own.name}", data_dir))
        if place.is_file()
    ]
    if not found:
        raise DataError(
            f"There are no context captions for {dataset.name}: neither {own} nor {CONTEXT} beside it is there. "
            'Notebook 02 generates it, or write one: {"file.png": "a paragraph", ...}.'
        )
    view = dataset.recaptioned(found[0])
    view.captioned = captions
    return view


def _open(
    known: dict[str, _Known], name: str | os.PathLike, data_dir: str | os.PathLike | None, captions: str
) -> CaptionedImages:
    if str(name) not in known:
        close = get_close_matches(str(name), known, n=1, cutoff=0)[0]
        or_own = ", or a folder with a captions.json" if known is _TRAINING else ""
        raise SettingError(
            f"There is no data set {str(name)!r}; known: {', '.join(known)}{or_own}. Is {close!r} meant?"
        )
    folder, holds, read = known[str(name)]
    root = bundled(folder, data_dir)
    try:
        dataset = read(root)
    except DataError as error:
        raise DataError(
            f"The data set {name} cannot be read: {error} {root} must hold {holds}.{_remedy(folder, root, data_dir)}"
        ) from error
    return _captioned(dataset, root, data_dir, captions)


def _remedy(folder: str, root: Path, data_dir: str | os.PathLike | None) -> str:
    """Return how to get a data set that can be fetched, as a sentence that follows others."""
    if folder not in FETCHED:
        return ""
    state = "Its download is unfinished; to go on" if (root / STAGING).exists() else "To fetch it"
    return f" {state}, run: taco-nb fetch {folder}" + (f" --data-dir {data_dir}" if data_dir else "")
