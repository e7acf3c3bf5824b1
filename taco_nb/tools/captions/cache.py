"""Captioners also keep the batches under way in the file of answers, and one process asks at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from taco_nb.text.answers import Answers


class CaptionCache(Answers):
    """The answers in a file, and the keys of requests that are in batches under way.

    A batch is in the file from just before it is submitted until its answers are. It goes by a name of our own, a job,
    since the service names it only once it has accepted it.
    """

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

    def jobs(self) -> dict[str, str | None]:
        """Return the jobs under way, the oldest first, each with the service's name of its batch, if that is known."""
        return dict(self._read("SELECT job, batch FROM submitted GROUP BY job ORDER BY min(rowid)"))

    def keys_of(self, job: str) -> list[str]:
        """Return the keys of the answers that a job will bring."""
        return [key for (key,) in self._read("SELECT key FROM submitted WHERE job = ?", job)]

    def submitted(self, keys: Iterable[str]) -> dict[str, str]:
        """Return, for those of the keys that are in a batch, the service's name of the batch."""
        rows = self._read(
            "SELECT key, batch FROM submitted WHERE key IN (SELECT value FROM json_each(?))",
            json.dumps(list(keys)),
        )
        return {key: batch or "a batch that may not exist" for key, batch in rows}

    def open_job(self, job: str, keys: Iterable[str]) -> None:
        """Write down that a job is going to be submitted, before it is."""
        with self._writing() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO submitted VALUES (?, ?, NULL)", [(key, job) for key in keys]
            )

    def name_batch(self, job: str, batch: str) -> None:
        """Write down the service's name for a job that was submitted."""
        with self._writing() as connection:
            connection.execute("UPDATE submitted SET batch = ? WHERE job = ?", (batch, job))

    def close_job(self, job: str) -> None:
        """Forget a job: its answers are in the file, or it never came to be."""
        with self._writing() as connection:
            connection.execute("DELETE FROM submitted WHERE job = ?", (job,))
