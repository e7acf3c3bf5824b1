"""What an evaluation has measured so far, kept so that a kill at any moment costs one image, or one batch, at most.

    unfinished/about.json                 what is evaluated, on what, and how; with other values, nothing here counts
    unfinished/<data set>/000016.safetensors    from image 16 on: rows as JSON in the metadata, features as tensors

Each file is written whole or not at all, by whichever process measured it, so several need not speak with each other, and
what they wrote in any order is read in the order of the images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from taco_nb.errors import DataError
from taco_nb.files import atomic_write


class Part(NamedTuple):
    """Neighbouring images of a data set, which are measured together."""

    dataset: str
    start: int
    stop: int


class Unfinished:
    """The folder `unfinished` in the folder of an evaluation."""

    def __init__(self, folder: Path):
        self.folder = folder / "unfinished"
        self._about = self.folder / "about.json"

    @property
    def exists(self) -> bool:
        return self._about.is_file()

    def about(self) -> dict[str, Any]:
        """What the parts here were measured of. {} where there are none, or nobody can tell."""
        try:
            return json.loads(self._about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def begin(self, about: dict[str, Any]) -> None:
        """Forget what is here, and begin."""
        self.forget()
        with atomic_write(self._about, "w") as file:
            json.dump(about, file, indent=1)

    def forget(self) -> None:
        self._about.unlink(missing_ok=True)  # first, so that half of a folder is none
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, part: Part) -> Path:
        return self.folder / part.dataset / f"{part.start:06d}.safetensors"

    def write(
        self, part: Part, rows: list[dict[str, Any]], features: dict[str, Tensor], seconds: float
    ) -> None:
        """Keep the rows of a part's images, in their order, its features by name, and what it took."""
        metadata = {"rows": json.dumps(rows), "seconds": repr(seconds)}
        with atomic_write(self.path(part)) as file:
            file.write(save({name: value.contiguous() for name, value in features.items()}, metadata))

    def rows(self, part: Part) -> tuple[list[dict[str, Any]], float]:
        """The rows, every number as it was, and the seconds. Raises `DataError` for a damaged file."""
        with self._open(part) as file:
            metadata = file.metadata()
            return json.loads(metadata["rows"]), float(metadata["seconds"])

    def features(self, parts: list[Part], name: str) -> Iterator[Tensor]:
        """The features of that name, a part at a time."""
        for part in parts:
            with self._open(part) as file:
                yield file.get_tensor(name)

    def _open(self, part: Part) -> Any:
        try:
            return safe_open(self.path(part), "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.path(part)} is damaged ({error}). Delete it and evaluate again: the rest is kept."
            ) from None
