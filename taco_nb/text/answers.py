"""Answers of language and vision models are kept by key in an SQLite file, so that no answer is paid for twice.

SQLite keeps whatever `Answers.add` has returned from, even if the process is killed or the power fails a moment later,
and lets several processes read and write one file. Its default journal is used: the quicker write-ahead log does not
work on the network drives of clusters.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from taco_nb.errors import DataError

PATIENCE = 60
"""Seconds to wait for another process that is writing, which takes it milliseconds."""
OPEN = "to be asked for again"
"""The `failure` of an answer that somebody rejected. Its text is kept until another one takes its place."""


class Question(NamedTuple):
    """A question is what a model is asked about every image or caption."""

    model: str
    prompt: str
    temperature: float

    @property
    def id(self) -> str:
        """Return 16 hexadecimal digits, which change with any of the three."""
        content = json.dumps([self.model, self.prompt, float(self.temperature)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Answer(NamedTuple):
    """This is the answer of a model. With `failure` set, that says why the text is no caption or no list of keywords."""

    text: str
    failure: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


def answer_key(subject: str, question: Question, index: int = 0) -> str:
    """Return the key of answer number `index` about the image or caption whose digest is `subject`.

    With the 40 digits of our digests a key has 58 characters and the index; a request in a batch may have 64.
    """
    return f"{subject}-{question.id}-{index}"


class Answers:
    """These are the answers in a file, which is created where it is absent. Use it as a context manager, in one thread.

    Raises `DataError`, which names the file and says what to do, if it cannot be read or written, or is damaged.
    """

    TABLES = """
        CREATE TABLE IF NOT EXISTS answers
            (key TEXT PRIMARY KEY, text TEXT, failure TEXT, input_tokens INTEGER, output_tokens INTEGER) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS questions (id TEXT PRIMARY KEY, model TEXT, prompt TEXT, temperature REAL);
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.added: list[tuple[int, int]] = []
        """The input and output tokens of each answer that was added since the file was opened."""

    def __enter__(self) -> Answers:
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=PATIENCE)
            try:
                self._connection.executescript(self.TABLES)
            except BaseException:
                self._connection.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Return the answers to those of the keys that have one. Each is looked up by the index of the table."""
        query = "SELECT * FROM answers WHERE key IN (SELECT value FROM json_each(?))"
        rows = self._read(query, json.dumps(list(keys)))
        return {key: Answer(*answer) for key, *answer in rows}

    def note(self, question: Question) -> None:
        """Write down what is asked, for whoever reads the file; the keys hold only its `id`."""
        with self._writing() as connection:
            values = (question.id, *question)
            connection.execute("INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?)", values)

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add answers by key, and return once they are on disk. One that did not fail is never replaced."""
        with self._writing() as connection:
            for key, answer in answers:
                done = connection.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET text = excluded.text,"
                    " failure = excluded.failure, input_tokens = excluded.input_tokens,"
                    " output_tokens = excluded.output_tokens WHERE failure IS NOT NULL",
                    (key, *answer),
                )
                if done.rowcount:
                    self.added.append((answer.input_tokens, answer.output_tokens))

    def reopen(self, answers: dict[str, Answer]) -> None:
        """Mark these answers as `OPEN`, so that they are asked for again, unless another process has replaced them."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE answers SET failure = ? WHERE key = ? AND text = ? AND failure IS ?",
                [(OPEN, key, answer.text, answer.failure) for key, answer in answers.items()],
            )

    def _read(self, query: str, *values: object) -> list[tuple]:
        with self._named_errors():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Write all that the block writes, or nothing of it."""
        with self._named_errors(), self._connection:
            yield self._connection

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:  # no right to write, a full disk, a folder
            raise DataError(
                f"The file of answers {self.path} cannot be read or written: {error}. What was answered before is safe."
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"The file of answers {self.path} is damaged, or is no SQLite file: {error}. Put a copy of it back, or "
                f"save what can be read with `sqlite3 {self.path} .recover | sqlite3 recovered.sqlite`. Only if its "
                "answers may be asked for, and paid for, once more: delete it."
            ) from error
