"""Images with their captions: what every data set here yields, and the plainest of them, a folder with a JSON."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from taco_nb.data.images import short_side, to_rgb
from taco_nb.errors import DataError, SettingError
from taco_nb.files import sha256

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}


class Sample(NamedTuple):
    """One image of a data set: its file name, the 8-bit RGB picture, and one or more captions."""

    name: str
    image: Image.Image
    captions: tuple[str, ...]


class Entry(NamedTuple):
    """Where a sample is to be found; `short_side` in pixels if the annotations tell it."""

    name: str
    path: Path
    captions: tuple[str, ...]
    short_side: int | None = None


class CaptionedImages(Dataset):
    """Image files with captions, in the order of their names; each is opened only when it is asked for.

    `dataset[i]` is a `Sample` and raises `DataError`, naming the file, if the image cannot be read. `name` is the data
    set's name, `skipped` how many images `centre_crop` has left out, `captioned` the kind of its captions: "published", those
    that came with it, "context", or "replaced", from a file that somebody has put in their place. `captions_file` is that
    file's name.
    """

    def __init__(self, name: str, entries: Iterable[Entry]):
        self.name = name
        self.skipped = 0
        self.captioned = "published"
        self.captions_file = ""
        self._entries = sorted(entries)
        self._crop: int | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> Sample:
        name, path, captions, _ = self._entries[i]
        image = to_rgb(path)
        if self._crop is not None:
            image = _centre(image, self._crop, path)
        return Sample(name, image, captions)

    @property
    def crop(self) -> int | None:
        """The side of the central square that is taken of every image; None where images are whole."""
        return self._crop

    @property
    def names(self) -> tuple[str, ...]:
        """The file names, in order."""
        return tuple(entry.name for entry in self._entries)

    def path(self, i: int) -> Path:
        """Return where the file of image i lies."""
        return self._entries[i].path

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of image i, without opening it."""
        return self._entries[i].captions

    def short_side(self, i: int) -> int:
        """Pixels on the shorter side of image i: from the annotations, or else from the header of the file."""
        entry = self._entries[i]
        return self._crop or entry.short_side or short_side(entry.path)

    def head(self, count: int) -> CaptionedImages:
        """A view of the first `count` images (of all, if there are fewer). Raises `SettingError` unless count >= 1."""
        check_count(count, f"The number of images of {self.name}")
        view = copy.copy(self)
        view._entries = self._entries[:count]
        return view

    def centre_crop(self, side: int) -> CaptionedImages:
        """A view of the central side x side pixels of each image, TACO's evaluation protocol for MS-COCO.

        Smaller images are left out, and the view's `skipped` says how many: padding them would measure the padding, and
        training leaves them out as well. An odd margin is split as torchvision's CenterCrop does, to an even offset.
        Raises `SettingError` unless side >= 1, `DataError` if no image is large enough.
        """
        check_count(side, "The side of the centre crop")
        view = copy.copy(self)
        view._entries = [entry for i, entry in enumerate(self._entries) if self.short_side(i) >= side]
        if not view._entries:
            raise DataError(f"No image of {self.name} has both sides >= {side}.")
        view.skipped = self.skipped + len(self) - len(view)
        view._crop = side
        return view

    def recaptioned(self, source: str | os.PathLike) -> CaptionedImages:
        """A view of the same images with the captions of another JSON file, in `CaptionedFolder`'s form.

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

        `digest_of` gives the SHA-256 of an image file, for callers that know it without reading the file again.
        """
        from tqdm.auto import tqdm

        digest = hashlib.sha256()
        for name, path, captions, _ in tqdm(
            self._entries, f"reading {self.name}", unit="image", leave=False, delay=2
        ):
            digest.update(json.dumps([name, digest_of(path), captions]).encode())
        return digest.hexdigest()


class CaptionedFolder(CaptionedImages):
    """A folder of images with their captions in a JSON file, the form in which TACO publishes its captions.

    captions: a JSON file of `{"file.png": "caption"}` or `{"file.png": ["one", "another"]}`; the two may be mixed, and
    "" is a caption. Every image in `root` (PNG, JPEG, WebP, BMP, TIFF or PPM by extension; not in subfolders, not
    hidden) needs an entry and every entry an image. `name` defaults to the folder's.
    Raises `DataError` if folder, file or anything in them is missing, malformed, or leads out of the folder.
    """

    def __init__(self, root: str | os.PathLike, captions: str | os.PathLike, name: str | None = None):
        root, source = Path(root), Path(captions)
        images = image_files(root)
        if not images:
            raise DataError(f"The folder {root} holds no image ({', '.join(sorted(EXTENSIONS))}).")
        by_name = _captions_by_name(source)
        check_names(by_name, root, source)
        if missing := by_name.keys() - images.keys():
            raise DataError(f"{source} has captions for images that are not in {root}: {few(missing)}.")
        if missing := images.keys() - by_name.keys():
            raise DataError(f"Missing captions: {source} has no entry for {few(missing)} in {root}.")
        super().__init__(name or root.resolve().name, (Entry(n, images[n], by_name[n]) for n in by_name))
        self.captions_file = source.name


def _captions_by_name(source: Path) -> dict[str, tuple[str, ...]]:
    content = read_json(source)
    if not isinstance(content, dict):
        raise DataError(
            f'{source} must hold an object {{"file.png": "caption", ...}}, not a {type(content).__name__}.'
        )
    by_name = {}
    for name, captions in content.items():
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{source}: the captions of {name} must be a string or a list of strings.")
        if not captions:
            raise DataError(f'{source}: the list of captions of {name} is empty. For no caption write "".')
        by_name[name] = tuple(captions)
    return by_name


def image_files(folder: Path) -> dict[str, Path]:
    """The image files directly in `folder`, by name. Raises `DataError` if it is absent or a link leads out of it."""
    if not folder.is_dir():
        raise DataError(f"There is no folder of images at {folder}.")
    home = folder.resolve()
    images = {}
    with os.scandir(folder) as listing:
        for item in listing:
            if (
                item.name.startswith(".")
                or Path(item.name).suffix.lower() not in EXTENSIONS
                or not item.is_file()
            ):
                continue
            # only links are resolved: MS-COCO has 82,783 files in one folder
            if item.is_symlink() and not Path(item.path).resolve().is_relative_to(home):
                raise DataError(
                    f"{item.path} is a link that leads out of the folder: put the image itself there."
                )
            images[item.name] = Path(item.path)
    return images


def check_names(names: Iterable[str], folder: Path, source: Path) -> None:
    """Raise `DataError` unless each name that `source` lists is the plain name of a file in `folder`."""
    if strays := [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name]:
        raise DataError(
            f"{source} leads out of the folder {folder}: {few(strays)}. Write plain file names there."
        )


def check_count(value: int, what: str) -> None:
    """Raise `SettingError` unless `value` is a whole number of at least 1; `what` says which value it is."""
    if type(value) is not int or value < 1:  # isinstance would let True pass
        raise SettingError(f"{what} must be a whole number of at least 1, not {value!r}.")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises `DataError`, naming the file, if it is missing, malformed (with line and column), or has a key twice in one
    object, of which Python's reader would drop the first without a word.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = (key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise DataError(f"{path} has the same key more than once: {few(twice)}.")
        return content

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise DataError(f"There is no captions file {path}.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error


def few(names: Iterable[str]) -> str:
    """The first five names in order, and how many more there are: enough to find them, short enough to read."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _centre(image: Image.Image, side: int, path: Path) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    if left < 0 or top < 0:
        raise DataError(
            f"{path} is {image.width}x{image.height}: smaller than {side}, and than its annotation says."
        )
    return image.crop((left, top, left + side, top + side))
