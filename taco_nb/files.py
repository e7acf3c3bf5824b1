"""This module says where files live, and writes them so that nobody ever sees half of one."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from taco_nb.errors import DataError, StorageError

REPOSITORY = Path(__file__).resolve().parents[1]
_PACKED = Path(__file__).resolve().parent / "_data"
BUNDLED = _PACKED if _PACKED.is_dir() else REPOSITORY / "data"
"""The data that comes with the code: `data/` of a checkout, which setup.py packs into a wheel as `taco_nb/_data`."""
LONGEST_NAME = 200
"""Bytes of a file name that every common file system takes; most take 255, those that encrypt names fewer."""

_MAKE_ROOM = "Make room there, or give a folder on another disk."
_REASONS = {
    errno.ENOSPC: ("the disk is full", _MAKE_ROOM),
    errno.EDQUOT: ("the disk quota is used up", _MAKE_ROOM),
    errno.EFBIG: ("the system allows no file of this size", "Give a folder on another disk, or raise the limit."),
    errno.EROFS: ("the disk can only be read", "Give a folder on another disk."),
    errno.EACCES: ("permission is denied", "Give a folder that you may write to."),
    errno.EPERM: ("permission is denied", "Give a folder that you may write to."),
}  # fmt: skip


# Finding data ---------------------------------------------------------------------------------------------------------


def data_root(data_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder that holds the downloaded data sets, and in a checkout what is bundled as well.

    `data_dir` wins, then the environment variable `TACO_NB_DATA`, then the `data/` of the checkout. A package that was
    installed from a wheel has no checkout, and keeps its downloads in the user's cache, on Linux `~/.cache/taco-nb`.
    Raises `DataError` if the folder that was asked for does not exist.
    """
    asked = data_dir or os.environ.get("TACO_NB_DATA")
    if not asked and BUNDLED == _PACKED:
        import pooch

        return Path(pooch.os_cache("taco-nb"))
    root = Path(asked or BUNDLED).expanduser().resolve()
    if not root.is_dir():
        raise DataError(
            f"The data folder {root} does not exist. Give an existing folder as data_dir or TACO_NB_DATA."
        )
    return root


def default_runs() -> Path:
    """Return the folder of runs if none is given: `out/runs` of the checkout, or of the working directory without one."""
    return (Path.cwd() if BUNDLED == _PACKED else REPOSITORY) / "out" / "runs"


def bundled(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Return the path of a file or folder that comes with the code, such as "reference/report.json".

    If the data folder in use has one of that name, it is taken instead. A data folder elsewhere thus need not copy what
    is bundled.
    """
    own, here = data_root(data_dir) / name, BUNDLED / name
    return here if here.exists() and not own.exists() else own


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a TOML file. Raises `OSError`, and `ValueError` for one that is malformed."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", durable: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path` for writing, which takes the name `path` only once it is whole.

    `mode` is "wb" or "w" (UTF-8). If the block raises, or the process dies in it, whatever stood at `path` before stands
    there still. With `durable`, that holds for a power failure too, at the price of waiting for the disk (fsync). Leave
    it out for the many small files that can be made again.

    Raises `StorageError` where the file cannot be written: the disk is full, the folder is read-only, and so on.
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only the beginning of the name, so that the temporary's is not too long where `path` itself would do.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    raw = _RecordingFile(descriptor, "w")
    buffered = io.BufferedWriter(raw)
    try:
        with buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8") as file:
            yield file
            with storage_errors(path):
                file.flush()
                if durable:
                    os.fsync(descriptor)
        with storage_errors(path):
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; ours are as readable as others
            os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if raw.failure and isinstance(error, Exception):
            with storage_errors(path):
                raise raw.failure from error
        raise


class _RecordingFile(io.FileIO):
    """This file remembers why a write failed, because some writers hide it.

    `torch.save` on a full disk, for instance, raises `RuntimeError: unexpected pos 11625920 vs 11625808`.
    """

    failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def storage_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn an `OSError` that comes of writing `path` within the block into a `StorageError` that says why."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason, advice = _REASONS.get(error.errno, (error.strerror or str(error), "Give another folder."))
        raise StorageError(f"{path} cannot be written: {reason}. {advice}") from error


def check_writable(folder: str | os.PathLike) -> None:
    """Make `folder` if it is not there yet, and raise `StorageError` unless files can be written in it."""
    with storage_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # which a full disk has no room for


# Names and sizes ------------------------------------------------------------------------------------------------------


def fitting_name(name: str) -> str:
    """Return a file name that is short enough for any file system: `name` itself, or a shorter one in its place.

    The shorter name keeps the beginning and the extension, and has the first 12 digits of the name's SHA-256 between
    them, so that two long names that begin alike stay apart.
    """
    whole = name.encode()
    if len(whole) <= LONGEST_NAME:
        return name
    tail = f"~{hashlib.sha256(whole).hexdigest()[:12]}{Path(name).suffix[:20]}"
    return whole[: LONGEST_NAME - len(tail.encode())].decode(errors="ignore") + tail


def short_path(path: Path) -> str:
    """Return a path as short as it can be said: relative to the working directory if it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def human_size(size: int) -> str:
    """Return a number of bytes as people say it, such as "13.5 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:.0f} {name}"
    return f"{size} bytes"


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's contents, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
