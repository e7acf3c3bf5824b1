"""Downloads go on where they stopped, are checked before they are trusted, and get their name only when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from filelock import FileLock
from tqdm.auto import tqdm

from taco_nb.errors import DownloadError
from taco_nb.files import human_size

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PATIENCE = 60
"""Seconds without a byte after which a connection counts as broken."""
BLOCK = 1 << 16
"""Bytes that are written at a time, and so are lost at most when a connection breaks."""


@dataclass(frozen=True)
class Remote:
    """A file on the web has an address, a size in bytes, and checksums that it must have, "md5:… sha256:…".

    `vouched` says who published the checksums. Without any, a file of the right size is taken as it comes.
    """

    url: str
    size: int
    checksums: str = ""
    vouched: str = ""

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def download(remote: Remote, path: Path) -> str:
    """Fetch a file to `path` and return its SHA-256. If it is there already and has the checksums, it is left.

    The bytes gather beside it in `.<name>.part`. The next call, after a kill too, goes on from there with a Range
    request, or from the start if the server knows no such requests. A connection that breaks is taken up again as long
    as that brings further bytes. If several processes fetch the same file, one does and the others wait.

    Raises `DownloadError` if the file cannot be had, or is another one.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if _size(path) == remote.size:
                return _verify(remote, path)
            while (had := _size(part)) < remote.size:
                try:
                    _transfer(remote, part)
                except OSError as error:  # the errors of requests are OSErrors too
                    if error.errno in FULL or _size(part) <= had:
                        raise
            checksum = _verify(remote, part)
            os.replace(part, path)
            return checksum
    except OSError as error:
        kept = _size(part)
        if part.exists() and not kept:
            part.unlink()
        reason = f"the disk or quota of {path.parent} is full" if error.errno in FULL else _reason(error)
        resume = f" What has come so far, {human_size(kept)}, is kept: the same command goes on." * bool(kept)
        raise DownloadError(
            f"{remote.url} ({human_size(remote.size)}) could not be fetched: {reason}.{resume}"
        ) from error


def check_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Raise `DownloadError` unless the disks have room for all bytes that are needed, given per folder."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        disk = folder.stat().st_dev
        disks[disk] = (folder, disks.get(disk, (folder, 0))[1] + size)
    for folder, size in disks.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise DownloadError(
                f"The disk of {folder} has {human_size(free)} free, but {human_size(size)} are needed, unpacking included: "
                "nothing was fetched. Make room, or name a folder on a larger disk: TACO_NB_DATA, HF_HOME, TORCH_HOME."
            )


def _transfer(remote: Remote, part: Path) -> None:
    """Make one request, for the bytes that `part` lacks.

    Pooch would begin every download anew, in a temporary file that a kill leaves behind: of MS-COCO's 20 GB, all.
    """
    had = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={had}-"} if had else {})
    with requests.get(remote.url, headers=headers, stream=True, timeout=PATIENCE) as response:
        response.raise_for_status()
        # A server that knows no Range requests begins again, and says 200.
        start = had if response.status_code == 206 else 0
        length = int(response.headers.get("Content-Length", remote.size - start))
        if start + length != remote.size:
            raise DownloadError(
                f"{remote.url} has {start + length:,} bytes, not {remote.size:,}: the file has changed at its source, "
                "or a proxy answers in its place."
            )
        bar = tqdm(total=remote.size, initial=start, desc=remote.name, unit="B", unit_scale=True, delay=1)
        with open(part, "ab") as file, bar:
            file.seek(file.truncate(start))
            for chunk in response.iter_content(BLOCK):
                if file.tell() + len(chunk) > remote.size:
                    raise DownloadError(f"{remote.url} sends more than its {remote.size:,} bytes.")
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
            os.fsync(file.fileno())


def _verify(remote: Remote, path: Path) -> str:
    """Return a file's SHA-256 as "sha256:…". If size or checksums are others, delete it and raise `DownloadError`."""
    if remote.size > 1e9:  # which takes a while
        print(f"Checking {remote.name} ({human_size(remote.size)}).")
    wanted = remote.checksums.split()
    algorithms = dict.fromkeys(["sha256", *(checksum.partition(":")[0] for checksum in wanted)])
    found = {name: f"{name}:{pooch.file_hash(str(path), name)}" for name in algorithms}
    wrong = set(wanted) - set(found.values())
    if wrong or _size(path) != remote.size:
        found["size"] = f"{_size(path):,} bytes"
        path.unlink()
        raise DownloadError(
            f"What came from {remote.url} is not the file that was expected: it has {', '.join(found.values())}, "
            f"not {', '.join(sorted(wrong)) or f'{remote.size:,} bytes'}. It was deleted. Try again; if that does not "
            "help, the file has changed at its source, or a proxy answers in its place."
        )
    return found["sha256"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """Return what lies at the bottom of an error, without the layers of libraries around it."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error).rstrip(".") or type(error).__name__
