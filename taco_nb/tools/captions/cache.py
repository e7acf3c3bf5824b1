"""The file of answers as captioners use it: with the batches under way, and with one process asking at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from filelock import FileLock, Timeout

from taco_nb.text.answers import Answers


class Job(NamedTuple):
    """A batch of requests, from just before its file is uploaded until its answers are in the cache."""

    name: str
    """A name of our own, which the service keeps with the batch."""
    batch: str | None
    """The service's name for it, once that is known."""


class CaptionCache(Answers):
    """The answers in a file, and the keys of requests that are in batches under way."""

    TABLES = (
        Answers.TABLES + "CREATE TABLE IF NOT EXISTS submitted (key TEXT PRIMARY KEY, job TEXT, batch TEXT);"
    )

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Let one process ask at a time, so that no two pay for the same answer. Reading never waits for this."""
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"Another process is asking for answers that go to {self.path}: waiting for it to end.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def jobs(self) -> list[Job]:
        """Return the batches under way, the oldest first."""
        rows = self._read("SELECT job, batch FROM submitted GROUP BY job ORDER BY min(rowid)")
        return [Job(*row) for row in rows]

    def keys_of(self, job: Job) -> list[str]:
        """Return the keys of the answers that a batch will bring."""
        return [key for (key,) in self._read("SELECT key FROM submitted WHERE job = ?", job.name)]

    def submitted(self, keys: Iterable[str]) -> dict[str, str]:
        """Return, for those of the keys that are in a batch, the service's name of the batch."""
        rows = self._read(
            "SELECT key, batch FROM submitted WHERE key IN (SELECT value FROM json_each(?))",
            json.dumps(list(keys)),
        )
        return {key: batch or "a batch that may not exist" for key, batch in rows}

    def open_job(self, job: Job, keys: Iterable[str]) -> None:
        """Write down that a batch is going to be submitted, before it is."""
        with self._writing() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO submitted VALUES (?, ?, ?)", [(key, *job) for key in keys]
            )

    def number_job(self, job: Job, batch: str) -> None:
        """Write down the service's name for a batch that was submitted."""
        with self._writing() as connection:
            connection.execute("UPDATE submitted SET batch = ? WHERE job = ?", (batch, job.name))

    def close_job(self, job: Job) -> None:
        """Forget a batch: its answers are in the cache, or it never came to be."""
        with self._writing() as connection:
            connection.execute("DELETE FROM submitted WHERE job = ?", (job.name,))
