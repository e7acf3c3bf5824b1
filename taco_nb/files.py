"""Where files live, and how they are written so that nobody ever sees half of one."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from taco_nb.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]


def data_root(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder that holds `sample/`, `checkpoints/` and the downloaded data sets.

    `data_dir` wins, then the environment variable `TACO_NB_DATA`, then the repository's own `data/`.
    Raises `DataError` if the folder does not exist.
    """
    root = Path(data_dir or os.environ.get("TACO_NB_DATA") or REPOSITORY / "data").expanduser().resolve()
    if not root.is_dir():
        raise DataError(
            f"The data folder {root} does not exist. Give an existing folder as data_dir or TACO_NB_DATA."
        )
    return root


def bundled(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """A file or folder that comes with the repository, such as "reference/report.json", or the user's own instead.

    The data folder in use wins where it has one of that name; a data folder elsewhere need not copy what is bundled.
    """
    own, here = data_root(data_dir) / name, REPOSITORY / "data" / name
    return here if here.exists() and not own.exists() else own


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", durable: bool = True) -> Iterator[IO]:
    """Open a temporary neighbour of `path` for writing; it takes the name `path` only once it is whole and on disk.

    If the block raises, or the process dies in it, whatever stood at `path` before stands there still. With
    `durable=False` the disk is not waited for: after a power failure the file may be empty. That suits thousands of small
    files that are checked when they are read, and can be made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(
            temporary, 0o666 & ~umask
        )  # mkstemp makes files private; a result is as readable as any other
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's contents, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
