"""One process at a time trains in a folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taco_nb.errors import SettingError

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies, however it dies.

    Raises `SettingError`, saying who holds it, where another process does.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        with FileLock(path, blocking=False):
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
            yield
    except Timeout:
        holder = path.read_text(encoding="utf-8") or "another process"
        raise SettingError(
            f"{holder} is training in {folder} already. Wait for it, or give another out_dir."
        ) from None
