"""What was asked of a captioner and what it answered, kept in a file that never loses or repeats an answer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from taco_nb.errors import DataError
from taco_nb.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Question:
    """What is asked about every image. With an image and an index, it decides what an answer is the answer to."""

    model: str
    prompt: str
    temperature: float

    @property
    def id(self) -> str:
        """16 hexadecimal digits that change with any of the three."""
        content = json.dumps([self.model, self.prompt, float(self.temperature)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """What came back: a caption, or, with `failure` set, whatever text there was and why it is no caption."""

    text: str
    failure: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


def image_id(image: Image.Image) -> str:
    """40 hexadecimal digits of the SHA-256 of an RGB image's size and pixels: the same picture, whatever its file."""
    digest = hashlib.sha256(b"%dx%d:" % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()[:40]


def answer_key(image: str, question: Question, index: int) -> str:
    """The cache's key of caption number `index` of an `image_id`; 58 characters and up, a batch's custom_id takes 64."""
    return f"{image}-{question.id}-{index}"


class CaptionCache:
    """An append-only JSON Lines file of answers, held by one process at a time; use it as a context manager.

    Each answer is one line, on disk before `add` returns: {"key": image-question-index, "text": ..., "failure": null or
    the reason, "tokens": [input, output]}. A line {"question": id, "model": ..., "prompt": ..., "temperature": ...}
    says what was asked. Of several lines with one key the last counts. Only the places of the lines are kept in memory.

    Raises `DataError`, naming the file, if it cannot be opened, another process holds it, or a line is no such line; a
    last line that a crash has cut short is removed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.added = 0
        """Answers added since the cache was opened."""
        self.input_tokens = 0
        self.output_tokens = 0
        self._places: dict[
            str, tuple[int, bool]
        ] = {}  # key: (where its last line begins, whether it is a caption)
        self._questions: set[str] = set()
        self._file: BinaryIO

    def __enter__(self) -> CaptionCache:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise DataError(f"The caption cache {self.path} cannot be opened: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise DataError(
                f"The caption cache {self.path} is in use by another process. Wait until that is done, or stop it: two "
                "at once would pay for the same captions twice."
            ) from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        start = 0
        for number, line in enumerate(self._file, 1):
            try:
                record = json.loads(line)
                self._index(record, start)
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise DataError(
                        f"Line {number} of the caption cache {self.path} is damaged. Correct or delete that line; what "
                        "it held will be asked again."
                    ) from None
                self._file.truncate(start)
                return
            start += len(line)
            if not line.endswith(b"\n"):
                self._file.write(b"\n")  # a whole answer, of which only the end of line was lost

    def _index(self, record: dict[str, Any], start: int) -> None:
        if "question" in record:
            self._questions.add(record["question"])
        else:
            self._places[record["key"]] = start, record["failure"] is None

    def has_caption(self, key: str) -> bool:
        return self._places.get(key, (0, False))[1]

    def has_failed(self, key: str) -> bool:
        """Whether there is an answer, which is no caption."""
        return key in self._places and not self.has_caption(key)

    def __getitem__(self, key: str) -> Answer:
        self._file.seek(self._places[key][0])
        record = json.loads(self._file.readline())
        return Answer(record["text"], record["failure"], *record["tokens"])

    def note(self, question: Question) -> None:
        """Append what is going to be asked, unless it is there already."""
        if question.id not in self._questions:
            asked = {"model": question.model, "prompt": question.prompt, "temperature": question.temperature}
            self._append({"question": question.id, **asked})

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Append answers by key, and return once they are on disk. A caption that is there already is kept."""
        for key, answer in answers:
            if not self.has_caption(key):
                tokens = [answer.input_tokens, answer.output_tokens]
                self._append({"key": key, "text": answer.text, "failure": answer.failure, "tokens": tokens})
                self.added += 1
                self.input_tokens += answer.input_tokens
                self.output_tokens += answer.output_tokens
        self._file.flush()
        os.fsync(self._file.fileno())

    def _append(self, record: dict[str, Any]) -> None:
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._index(record, start)


@dataclass
class Job:
    """A batch of requests from just before its file is uploaded until its answers are in the cache."""

    name: str
    keys: list[str]
    batch: str | None = None
    """Its number on the service, once that is known."""


class Jobs(list[Job]):
    """The batches under way, in a JSON file beside the cache, whose lock guards it too.

    Raises `DataError`, naming the file, if it is damaged.
    """

    def __init__(self, cache: str | os.PathLike):
        cache = Path(cache)
        self.path = cache.with_name(cache.name + ".batches.json")
        try:
            super().__init__(Job(**job) for job in json.loads(self.path.read_text()))
        except FileNotFoundError:
            super().__init__()
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.path} is damaged ({error}). It says which batches are under way: restore it, or, once no batch "
                "of yours is running any more, delete it; what those would have answered is then paid for again."
            ) from None

    def save(self) -> None:
        with atomic_write(self.path, "w") as file:
            json.dump([asdict(job) for job in self], file)

    @property
    def keys(self) -> dict[str, str]:
        """The keys that need not be submitted, each with where its answer will come from."""
        return {key: f"in {job.batch or 'a batch that may not exist'}" for job in self for key in job.keys}
