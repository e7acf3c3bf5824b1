"""This module reads MS-COCO's annotations and Karpathy's splits of them, and cuts the crops that TACO trains on."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from taco_nb.data.captioned import (
    CaptionedImages,
    Entry,
    check_plain_names,
    few,
    image_files,
    nfc,
    read_json,
)
from taco_nb.data.images import pixels
from taco_nb.errors import DataError, SettingError
from taco_nb.settings import check_count

SPLITS = ("train", "val")
KARPATHY_SPLITS = ("train", "restval", "val", "test")


class Coco(CaptionedImages):
    """This is a split of MS-COCO 2014 (Chen et al. 2015, arXiv:1504.00325), or of images described in its format.

    The split "train" or "val" reads `annotations/captions_{split}2014.json` with images in `{split}2014/`, or, if there is
    no such file, `annotations/captions_{split}.json` with images in `images/`. With karpathy=True the split is "train",
    "restval", "val" or "test" as `dataset_coco.json` has it (Karpathy & Fei-Fei 2015, arXiv:1412.2306). TACO is
    evaluated on "restval". Captions keep their order in the file.

    Raises `SettingError` for another split, and `DataError` (with file and id) for missing files and images, malformed
    content, missing or repeated ids, and images without captions.
    """

    def __init__(self, root: str | os.PathLike, split: str, karpathy: bool = False, name: str | None = None):
        splits = KARPATHY_SPLITS if karpathy else SPLITS
        if split not in splits:
            raise SettingError(f"MS-COCO has no split {split!r} here: choose one of {', '.join(splits)}.")
        read = _karpathy if karpathy else _annotations
        super().__init__(name or f"coco-{split}", read(Path(root), split))
        own = [f"captions_{split}{year}.json" for year in ("2014", "")]
        names = ["dataset_coco.json"] if karpathy else own
        self.captions_file = next((n for n in names if Path(root, "annotations", n).exists()), names[0])


class TrainPairs(Dataset):
    """In TACO's training set every (image, caption) pair is a sample, cropped at random, neither resized nor flipped.

    `pairs[i]` is (x, caption), with x uint8 of shape (3, crop, crop): as floats the batches of eight workers would not fit
    into the 64 MB of shared memory that Docker gives. Images with a side shorter than `crop` are left out, and `skipped`
    says how many. Where the crop lies depends on (seed, epoch, i) alone, so that neither the number of workers nor a resume
    changes what is trained on.

    Raises `SettingError` for crop < 1 or seed < 0, and `DataError` if no image is large enough or one cannot be read.
    """

    def __init__(self, dataset: CaptionedImages, crop: int = 256, seed: int = 0):
        check_count(crop, "crop")
        check_count(seed, "seed", least=0)
        large = [i for i in range(len(dataset)) if dataset.short_side(i) >= crop]
        if not large:
            raise DataError(f"No image of {dataset.name} has both sides >= {crop}: train on a smaller crop.")
        self.dataset, self.crop, self.seed = dataset, crop, seed
        self.skipped = len(dataset) - len(large)
        self._pairs = [(i, caption) for i in large for caption in dataset.captions(i)]
        # In shared memory, so that data loaders' workers that outlive an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Move all crops to where this epoch has them. Call it before iterating over the epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        i = range(len(self))[i]  # a negative index is the same sample and so has the same crop
        k, caption = self._pairs[i]
        try:
            name, image, _ = self.dataset[k]
        except DataError as error:
            raise DataError(
                f"{error} With the copy a run that has begun goes on; without the image, begin a new run in another out_dir."
            ) from error
        if min(image.size) < self.crop:
            size = f"{image.width}x{image.height}"
            raise DataError(f"{name} in {self.dataset.name} is {size}, less than annotated.")
        position = np.random.default_rng((self.seed, int(self._epoch), i))
        left = int(position.integers(image.width - self.crop, endpoint=True))
        top = int(position.integers(image.height - self.crop, endpoint=True))
        return pixels(image.crop((left, top, left + self.crop, top + self.crop))), caption


def _annotations(root: Path, split: str) -> list[Entry]:
    source, folder = root / "annotations" / f"captions_{split}2014.json", root / f"{split}2014"
    if not source.exists():
        plain = root / "annotations" / f"captions_{split}.json"
        if not plain.exists():
            raise DataError(f"There is neither {source} nor {plain}.")
        source, folder = plain, root / "images"
    content = read_json(source)
    captions, ids = defaultdict(list), []
    for where, annotation in _records(content, "annotations", source):
        ids.append(_get(annotation, "id", int, where))
        captions[_get(annotation, "image_id", int, where)].append(_get(annotation, "caption", str, where))
    if twice := _repeated(ids):
        raise DataError(f"{source} has annotation ids more than once: {twice}.")
    listed = []
    for where, image in _records(content, "images", source):
        key, name = _get(image, "id", int, where), nfc(_get(image, "file_name", str, where))
        listed.append((key, Entry(name, folder / name, tuple(captions.pop(key, ())), _short_side(image))))
    entries = _entries(listed, root, source)
    if captions:
        raise DataError(
            f"{source} has captions of image ids that it does not list: {few(map(str, captions))}."
        )
    return entries


def _karpathy(root: Path, split: str) -> list[Entry]:
    source = root / "dataset_coco.json"
    sides: dict[str, dict[str, int | None]] = {}
    listed = []
    for where, image in _records(read_json(source), "images", source):
        if _get(image, "split", str, where) == split:
            key, name = _get(image, "cocoid", int, where), nfc(_get(image, "filename", str, where))
            folder = _get(image, "filepath", str, where)
            if folder not in ("train2014", "val2014"):
                raise DataError(f"{where} (id {key}): filepath must be train2014 or val2014, not {folder!r}.")
            sentences = _records(image, "sentences", where)
            captions = tuple(_get(sentence, "raw", str, at) for at, sentence in sentences)
            if folder not in sides:
                sides[folder] = _annotated_sides(root / "annotations" / f"captions_{folder}.json")
            listed.append((key, Entry(name, root / folder / name, captions, sides[folder].get(name))))
    return _entries(listed, root, source)


def _annotated_sides(source: Path) -> dict[str, int | None]:
    """Return short sides by file name. Karpathy's file has none; COCO's own, if there, spares opening every image."""
    if not source.exists():
        return {}
    images = _records(read_json(source), "images", source)
    return {nfc(_get(image, "file_name", str, where)): _short_side(image) for where, image in images}


def _entries(listed: list[tuple[int, Entry]], root: Path, source: Path) -> list[Entry]:
    """Return the entries that an annotations file lists by id, with the paths of the files on disk, once all is well."""
    if not listed:
        raise DataError(f"{source} lists no image of this split.")
    if twice := _repeated(key for key, _ in listed):
        raise DataError(f"{source} has image ids more than once: {twice}.")
    if twice := _repeated(entry.name for _, entry in listed):
        raise DataError(f"{source} has file names more than once: {twice}.")
    check_plain_names((entry.name for _, entry in listed), root, source)
    if bare := [f"{entry.name} (id {key})" for key, entry in listed if not entry.captions]:
        raise DataError(f"Missing captions: {source} has none for {few(bare)}.")
    on_disk = {folder: image_files(folder) for folder in {entry.path.parent for _, entry in listed}}
    paths = [on_disk[entry.path.parent].get(entry.name) for _, entry in listed]
    if missing := [f"{entry.name} (id {key})" for (key, entry), path in zip(listed, paths) if path is None]:
        folders = " and ".join(sorted(map(str, on_disk)))
        raise DataError(f"{source} lists images that are not in {folders}: {few(missing)}.")
    return [entry._replace(path=path) for (_, entry), path in zip(listed, paths)]


def _records(parent: Any, key: str, where: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of the list parent[key], each after the words that say where it stands."""
    for n, record in enumerate(_get(parent, key, list, where)):
        yield f"{where}, {key}[{n}]", record


def _get(record: Any, key: str, kind: type, where: Any) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not kind:  # isinstance would let true and false pass as ids
        raise DataError(f"{where} must have {key!r} of type {kind.__name__}, but is {shorten(record)}.")
    return value


def _short_side(image: dict) -> int | None:
    sides = image.get("width"), image.get("height")
    return min(sides) if all(type(side) is int for side in sides) else None


def _repeated(values: Iterable) -> str:
    return few(str(value) for value, count in Counter(values).items() if count > 1)
