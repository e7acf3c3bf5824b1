"""Every data set here is a `CaptionedImages`; the plainest is a folder of images with their captions in a JSON file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from taco_nb.data.images import short_side, to_rgb
from taco_nb.errors import DataError
from taco_nb.files import sha256
from taco_nb.settings import check_count

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows by name, but cannot read everywhere or without another program."""


class Sample(NamedTuple):
    """A sample is an image of a data set: its file name, the 8-bit RGB picture, and one or more captions."""

    name: str
    image: Image.Image
    captions: tuple[str, ...]


class Entry(NamedTuple):
    """An entry is a sample's name, file and captions. `short_side` is in pixels, or None if no annotation gives it."""

    name: str
    path: Path
    captions: tuple[str, ...]
    short_side: int | None = None


class CaptionedImages(Dataset):
    """These are image files with captions, in the order of their names; each is opened only when it is asked for.

    `dataset[i]` is a `Sample`. It raises `DataError`, naming the file, if the image cannot be read; how images are read is
    said in `taco_nb.data.images.to_rgb`. `name` is the data set's name. `crop` is the side of the central square that is
    taken of every image, or None if images are whole, and `skipped` says how many images `centre_crop` has left out.
    `captioned` is the kind of the captions: "published" if they came with the data set, "context", or "replaced" if they
    were taken from another file, and `captions_file` is the name of the file they come from.
    """

    def __init__(self, name: str, entries: Iterable[Entry]):
        self.name = name
        self.skipped = 0
        self.captioned = "published"
        self.captions_file = ""
        self.crop: int | None = None
        self._entries = sorted(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> Sample:
        name, path, captions, _ = self._entries[i]
        try:
            image = to_rgb(path)
        except DataError as error:
            raise DataError(
                f"{error} Replace it with a sound copy, or remove it and its captions from the data set."
            ) from error
        if self.crop is not None:
            image = _centre(image, self.crop, path)
        return Sample(name, image, captions)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the file names, in order."""
        return tuple(entry.name for entry in self._entries)

    def path(self, i: int) -> Path:
        """Return where the file of image i lies."""
        return self._entries[i].path

    def captions(self, i: int) -> tuple[str, ...]:
        """Return the captions of image i, without opening it."""
        return self._entries[i].captions

    def short_side(self, i: int) -> int:
        """Return the pixels on the shorter side of image i: from the annotations, or else from the file's header."""
        entry = self._entries[i]
        return self.crop or entry.short_side or short_side(entry.path)

    def head(self, count: int) -> CaptionedImages:
        """Return a view of the first `count` images, or of all if there are fewer; `SettingError` unless count >= 1."""
        check_count(count, f"The number of images of {self.name}")
        view = copy.copy(self)
        view._entries = self._entries[:count]
        return view

    def centre_crop(self, side: int) -> CaptionedImages:
        """Return a view of the central side x side pixels of each image, TACO's evaluation protocol for MS-COCO.

        Smaller images are left out, and the view's `skipped` says how many: to pad them would be to measure the padding,
        and training leaves them out as well. Raises `SettingError` unless side >= 1, and `DataError` if no image is
        large enough.
        """
        check_count(side, "The side of the centre crop")
        view = copy.copy(self)
        view._entries = [entry for i, entry in enumerate(self._entries) if self.short_side(i) >= side]
        if not view._entries:
            raise DataError(f"No image of {self.name} has both sides >= {side}.")
        view.skipped = self.skipped + len(self) - len(view)
        view.crop = side
        return view

    def recaptioned(self, source: str | os.PathLike) -> CaptionedImages:
        """Return a view of the same images with the captions of another JSON file in `CaptionedFolder`'s form.

        The file may caption more images than these. Raises `DataError` if it captions fewer, or is malformed.
        """
        by_name = _captions_by_name(Path(source))
        if missing := [entry.name for entry in self._entries if entry.name not in by_name]:
            raise DataError(f"Missing captions: {source} has no entry for {few(missing)} of {self.name}.")
        view = copy.copy(self)
        view._entries = [entry._replace(captions=by_name[entry.name]) for entry in self._entries]
        view.captioned, view.captions_file = "replaced", Path(source).name
        return view

    def captions_digest(self) -> str:
        """Return a SHA-256 over the names and captions, in whatever file and layout they came."""
        listed = [[entry.name, entry.captions] for entry in self._entries]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def checksum(self, digest_of: Callable[[Path], str] = sha256) -> str:
        """Return a SHA-256 over names, image files and captions, which says exactly what an evaluation ran on.

        `digest_of` gives the SHA-256 of an image file. Callers that know it need not read all files again.
        """
        from tqdm.auto import tqdm

        digest = hashlib.sha256()
        for name, path, captions, _ in tqdm(
            self._entries, f"reading {self.name}", unit="image", leave=False, delay=2
        ):
            digest.update(json.dumps([name, digest_of(path), captions]).encode())
        return digest.hexdigest()


class CaptionedFolder(CaptionedImages):
    """This is a folder of images with their captions in a JSON file, the form in which TACO publishes its captions.

    `captions` is a JSON file of `{"file.png": "caption"}` or `{"file.png": ["one", "another"]}`; the two may be mixed,
    and "" is a caption. Every image that lies directly in `root` needs an entry, and every entry an image. An image is
    any file that Pillow can read by its extension and that is not hidden. Accented names match however the accents are
    encoded (NFC or NFD), and are given in NFC. `name` is by default that of the folder. With `aliases` such as
    {".webp": ".png"}, a.webp goes by the name a.png, unless there is a file a.png, which is then taken.

    Raises `DataError` if the folder, the file or anything in them is missing or malformed, if a name leads out of the
    folder, or if a caption cannot be written as UTF-8.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        captions: str | os.PathLike,
        name: str | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        root, source = Path(root), Path(captions)
        images = image_files(root)
        for extension, alias in (aliases or {}).items():
            for file in [file for file in images if file.endswith(extension)]:
                images.setdefault(file.removesuffix(extension) + alias, images.pop(file))
        if not images:
            raise DataError(f"The folder {root} holds no image: no file with an extension that Pillow reads.")
        by_name = _captions_by_name(source)
        check_plain_names(by_name, root, source)
        if missing := by_name.keys() - images.keys():
            raise DataError(f"{source} has captions for images that are not in {root}: {few(missing)}.")
        if missing := images.keys() - by_name.keys():
            raise DataError(f"Missing captions: {source} has no entry for {few(missing)} in {root}.")
        super().__init__(name or root.resolve().name, (Entry(n, images[n], by_name[n]) for n in by_name))
        self.captions_file = source.name


def _captions_by_name(source: Path) -> dict[str, tuple[str, ...]]:
    content = read_json(source)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f'{source} must hold an object {{"file.png": "caption", ...}}, not a {kind}.')
    by_name = {}
    for name, captions in content.items():
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{source}: the captions of {name} must be a string or a list of strings.")
        if not captions:
            raise DataError(f'{source}: the list of captions of {name} is empty. For no caption write "".')
        if nfc(name) in by_name:
            raise DataError(
                f"{source} has the same key more than once, with its accents encoded in two ways: {name}."
            )
        by_name[nfc(name)] = tuple(captions)
    return by_name


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions, in lower case, of all image files that Pillow reads by itself."""
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NO_PICTURES
    )


def nfc(name: str) -> str:
    """Return a file name with its accents composed: macOS tells "é" as "e" and an accent, most others as one letter."""
    return unicodedata.normalize("NFC", name)


def image_files(folder: Path) -> dict[str, Path]:
    """Return the image files that lie directly in `folder`, by their names in NFC.

    Raises `DataError` if the folder is absent, if a link leads out of it, or if two names are the same in NFC.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder of images at {folder}.")
    home = folder.resolve()
    images: dict[str, Path] = {}
    with os.scandir(folder) as listing:
        for item in listing:
            extension = os.path.splitext(item.name)[1].lower()
            if item.name.startswith(".") or extension not in image_extensions() or not item.is_file():
                continue
            path = Path(item.path)
            # Only links are resolved, since that takes time and MS-COCO has 82,783 files in one folder.
            if item.is_symlink() and not path.resolve().is_relative_to(home):
                raise DataError(f"{path} is a link that leads out of the folder: put the image itself there.")
            if nfc(item.name) in images:
                raise DataError(f"{folder} has two files that are both called {nfc(item.name)}: rename one.")
            images[nfc(item.name)] = path
    return images


def check_plain_names(names: Iterable[str], folder: Path, source: Path) -> None:
    """Raise `DataError` unless each name that `source` lists is the plain name of a file in `folder`."""
    if strays := [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name]:
        raise DataError(
            f"{source} leads out of the folder {folder}: {few(strays)}. Write plain file names there."
        )


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises `DataError`, naming the file, if it is missing or malformed (with line and column), if it has a key twice in
    one object, of which Python's reader would drop the first without a word, or if it holds text that no file can hold.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = (key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise DataError(f"{path} has the same key more than once: {few(twice)}.")
        if escaped_surrogates:
            _check_text(content, path)
        return content

    try:
        text = path.read_text(encoding="utf-8-sig")
        # An escape is the only way by which half a character can come out of UTF-8, and few files have one.
        escaped_surrogates = "\\ud" in text or "\\uD" in text
        return json.loads(text, object_pairs_hook=checked)
    except FileNotFoundError as error:
        raise DataError(f"There is no captions file {path}.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path} is not JSON: {error.msg} at {where}.") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error


def _check_text(content: dict[str, Any], path: Path) -> None:
    """Raise `DataError` if a key or text in a JSON object has half a character in it, as an emoji cut in two leaves it."""
    for key, value in content.items():
        for text in (key, *(value if isinstance(value, list) else [value])):
            try:
                if isinstance(text, str):
                    text.encode()
            except UnicodeEncodeError as error:
                # Of MS-COCO's files the whole record is said, which has the image's id; of a captions file, the image.
                record = shorten(content if len(content) < 5 else key)
                raise DataError(
                    f"{path}: the text {shorten(text)} in {record} has half a character, {text[error.start]!r}, which "
                    "cannot be written as UTF-8. Perhaps an emoji was cut in two. Correct it."
                ) from error


def few(names: Iterable[str]) -> str:
    """Return the first five names in order, and how many more there are: enough to find them, short enough to read."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _centre(image: Image.Image, side: int, path: Path) -> Image.Image:
    # Where a margin is odd, round() splits it as torchvision's CenterCrop does, to an even offset.
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    if left < 0 or top < 0:
        raise DataError(f"{path} is {image.width}x{image.height}, smaller than {side} and than annotated.")
    return image.crop((left, top, left + side, top + side))
