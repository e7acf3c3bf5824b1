"""Data sets are opened by name: images with their captions to evaluate on, and pairs of both to train on."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from taco_nb.data.captioned import CaptionedFolder, CaptionedImages, Sample
from taco_nb.data.coco import Coco, TrainPairs
from taco_nb.data.shapes import ShapesPairs
from taco_nb.errors import DataError, SettingError
from taco_nb.files import BUNDLED, bundled
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
FETCHED = ("coco", "clic")
"""The data sets that `taco-nb fetch` gets."""
STAGING = ".fetch"
"""The hidden folder inside a data set's own in which its unfinished download lies."""


class _Known(NamedTuple):
    """A data set that has a name has a folder in the data folder, things that it must hold, and a way to be read."""

    folder: str
    holds: str
    read: Callable[[Path], CaptionedImages]


def _kodak(root: Path) -> CaptionedImages:
    """Return Kodak's whole pictures under the names `kodim01.png` and so on, by which TACO captioned them.

    They are bundled as WebP, which is as lossless and a third smaller. A folder may hold the PNG files in their place.
    """
    return CaptionedFolder(root, root / "captions_ofa.json", name="kodak", aliases={".webp": ".png"})


def _kodak_crops(root: Path) -> CaptionedImages:
    """Return the central 256x256 pixels of Kodak's pictures, under a name of their own: they are another data set."""
    crops = _kodak(root).centre_crop(256)
    crops.name = "kodak-256"
    return crops


def _clic(root: Path) -> CaptionedImages:
    return CaptionedFolder(root, root / "captions_ofa.json", name="clic")


def _restval(root: Path) -> CaptionedImages:
    return Coco(root, "restval", karpathy=True, name="coco").centre_crop(256)


_SAMPLE = "images/*.png and annotations/captions_{}.json"
_SAMPLE_TRAIN = _Known("sample", _SAMPLE.format("train"), partial(Coco, split="train", name="sample-train"))
_KODAK = "kodim01.png to kodim24.png, or the same as .webp, and captions_ofa.json"
_EVALUATION = {
    "sample": _Known("sample", _SAMPLE.format("val"), partial(Coco, split="val", name="sample")),
    "sample-train": _SAMPLE_TRAIN,
    "kodak": _Known("kodak", _KODAK, _kodak),
    "kodak-256": _Known("kodak", _KODAK, _kodak_crops),
    "clic": _Known("clic", "the 428 PNG images of CLIC 2020's test set and captions_ofa.json", _clic),
    "coco": _Known("coco", "val2014/*.jpg and dataset_coco.json", _restval),
}
_COCO_TRAIN = "train2014/*.jpg and annotations/captions_train2014.json"
_TRAINING = {
    "sample": _SAMPLE_TRAIN,
    "coco": _Known("coco", _COCO_TRAIN, partial(Coco, split="train", name="coco-train")),
}


def datasets(
    *names: str,
    data_dir: str | os.PathLike | None = None,
    limit: int | None = None,
    captions: str = "published",
) -> list[CaptionedImages]:
    """Return the data sets that a codec is evaluated on, in the order asked for.

    The names are "sample" (the bundled validation images) and "sample-train", "kodak" (24 images, bundled), "kodak-256"
    (their centre crops) and "clic" (CLIC 2020 test) with TACO's OFA captions, and "coco" (Karpathy's restval, centre crop
    256). They lie in `data_root(data_dir)`, where what is bundled need not be repeated; images are opened only when they
    are used. `limit` keeps the first images of each. `captions` are the "published" ones, or the paragraphs with "context"
    that lie beside them in captions_context.json.

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
) -> TrainPairs | ShapesPairs:
    """Return the (crop, caption) pairs of "sample", of "coco" (train2014), or of a folder with a captions.json in it.

    "shapes" is the world of `taco_nb.data.shapes`, which needs no files. `captions` is as for `datasets`. Raises what
    `datasets`, `TrainPairs` and `ShapesPairs` raise.
    """
    if str(name) == "shapes":
        return ShapesPairs(crop, seed, captions)
    if str(name) not in _TRAINING and Path(name).is_dir():
        folder = CaptionedFolder(name, Path(name, "captions.json"))
        return TrainPairs(_captioned(folder, captions, Path(name)), crop, seed)
    return TrainPairs(_open(_TRAINING, name, data_dir, captions), crop, seed)


def _captioned(dataset: CaptionedImages, captions: str, *folders: Path) -> CaptionedImages:
    """Return the data set under the captions that were asked for, which lie in the first of `folders` that has them."""
    if captions == "published":
        return dataset
    if captions != "context":
        raise SettingError(f'captions must be "published" or "context", but is {captions!r}.')
    own = f"{dataset.name}_{CONTEXT}"
    found = [path for folder in folders for path in (folder / own, folder / CONTEXT) if path.is_file()]
    if not found:
        raise DataError(
            f"There are no context captions for {dataset.name}: neither {folders[0] / own} nor {CONTEXT} beside it is "
            'there. Notebook 02 generates it, or write one: {"file.png": "a paragraph", ...}.'
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
    return _captioned(dataset, captions, root, BUNDLED / folder)


def _remedy(folder: str, root: Path, data_dir: str | os.PathLike | None) -> str:
    """Return how to get a data set that is bundled or can be fetched, as a sentence that follows others."""
    if (BUNDLED / folder).is_dir() and root != BUNDLED / folder:
        return " Without this folder, the bundled pictures are taken."
    if folder not in FETCHED:
        return ""
    state = "Its download is unfinished; to go on" if (root / STAGING).exists() else "To fetch it"
    return f" {state}, run: taco-nb fetch {folder}" + (f" --data-dir {data_dir}" if data_dir else "")
