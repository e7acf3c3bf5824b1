"""Every captioner finds which captions are missing, says what they cost, asks for them, keeps them and writes the JSON.

What it keeps are the answers and, of a service that answers within a day, the requests that are under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pydantic.dataclasses
from filelock import AcquireReturnProxy, FileLock, Timeout
from PIL import Image
from tqdm.auto import tqdm

from taco_nb.data import CaptionedFolder, CaptionedImages, datasets, training_pairs
from taco_nb.data.captioned import Entry, few, image_files
from taco_nb.errors import DataError, SettingError, TacoError
from taco_nb.files import atomic_write
from taco_nb.settings import STRICT, check_count
from taco_nb.text.answers import OPEN, Answer, Answers, Question, answer_key

_OFF_THE_PICTURE = re.compile(
    r"""\b(
        as\ an\ AI | language\ model | AI\ (assistant|model)                                    # who answers
      | the\ user | you\ asked | your\ (image|instructions?|photo|picture|prompt|question|request)  # who asks
      | (this|the)\ (prompt|request) | here(['’]s|\ is|\ are)\b[^.!?\n]{0,40}\b(captions?|descriptions?)  # the task
      | I\ apologi[sz]e | I(['’]m|\ am)(\ \w+)?\ sorry                                           # excuses to who asks
      | I(['’](m|ve|d|ll))?\b[^.!?\n]{0,60}\b(access|analy[sz]e|assist|caption|comply|describe|help|identify|view)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Words about the asker or the task. A caption may have them too, of a poster for instance: only a person can tell."""


class ServiceError(TacoError, RuntimeError):
    """The service refuses to work or cannot be reached; what it has answered so far is in the cache."""


class CaptionCache(Answers):
    """The file of answers also holds the keys of requests that are in batches under way.

    A batch is in the file from just before it is submitted until its answers are. It goes by a name of our own, a job,
    since the service names it only once it has accepted it.
    """

    TABLES = (
        Answers.TABLES + "CREATE TABLE IF NOT EXISTS submitted (key TEXT PRIMARY KEY, job TEXT, batch TEXT);"
    )

    def asking(self) -> AcquireReturnProxy:
        """Let one process ask at a time, so that no two pay for the same answer: `with cache.asking(): ...`.

        Reading never waits for this.
        """
        lock = FileLock(f"{self.path}.lock")
        try:
            return lock.acquire(blocking=False)
        except Timeout:
            print(f"Another process is asking for answers that go to {self.path}: waiting for it to end.")
            return lock.acquire()

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


class Picture(NamedTuple):
    """This is an image of a data set, with the keys of the captions that it is to have."""

    row: int
    name: str
    size: tuple[int, int]
    """Width and height."""
    keys: tuple[str, ...]


class Wanted(NamedTuple):
    """This is a caption that an image is to have, and how far it is."""

    picture: Picture
    key: str
    answer: Answer | None
    state: Literal["captioned", "submitted", "failed", "unanswered"]
    why: str = ""
    """Why there is no caption, where there is none."""


@dataclass(frozen=True)
class Estimate:
    """An estimate says what the missing answers will take.

    Tokens and dollars are rough; `dollars` is None where no price is known.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    dollars: float | None
    prices: str
    """Where the prices are from."""

    def __str__(self) -> str:
        cost = "an unknown number of dollars" if self.dollars is None else f"${self.dollars:,.2f}"
        return (
            f"{self.requests:,} to be paid for: about {self.input_tokens:,} input and {self.output_tokens:,} output "
            f"tokens, about {cost} (an estimate; {self.prices})"
        )


@dataclass(frozen=True)
class Report:
    """A report says how a call to a captioner went; its `text` does so in sentences, with the way to go on."""

    text: str
    missing: dict[str, list[str]]
    """For each image that lacks captions, the reason for each of them."""
    flagged: dict[str, list[str]]
    """For each image that has them, the captions that speak of the asker or the task, for a person to look at."""
    new: int
    """Answers in this call, captions or not."""
    dollars: float | None
    """Their price, by the service's count of tokens; None where no price is known, or nothing is paid."""
    estimate: Estimate | None
    """What was still to be paid for when the call began; None for nothing."""

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        return self.text


_ADVICE = {
    "unanswered": "Calling again asks for what has no answer yet.",
    "submitted": "What is in a batch comes once that is finished, when a batch captioner is called again.",
    "failed": "retry_failed=True (--retry-failed) asks again for what was answered with something else than a caption.",
}
"""These sentences say how to go on, by the state of what is missing."""
_NOT_AGREED = "Nothing was sent: confirm=True (--confirm) sends it, and pays for it."


@pydantic.dataclasses.dataclass(kw_only=True, config=STRICT)
class Captioner(ABC):
    """A captioner writes captions for images; paid services and local models have this one interface."""

    cache: Path = field(kw_only=False)
    """The SQLite file that keeps every answer. One file may serve many data sets, models and prompts."""

    @property
    @abstractmethod
    def question(self) -> Question:
        """What is asked about every image."""

    def describe(
        self,
        dataset: CaptionedImages,
        path: str | os.PathLike,
        count: int = 1,
        confirm: bool = False,
        retry_failed: bool = False,
        retry_flagged: bool = False,
    ) -> Report:
        """Write `count` captions for every image of `dataset` to the captions file `path`, and report how it went.

        Only what the cache lacks is asked, so that a call after a crash, or for a larger `count`, pays for the rest
        alone; with everything in the cache it needs no network and no key. The file, `{"image.png": ["one", ...]}` as
        `CaptionedFolder` reads it, is written only when it is complete. Nothing is sent to a paid service without
        confirm=True: the estimate is printed and the report says what is missing.

        Answers that are no captions (refused, cut off, empty, malformed) stay missing, and captions that speak of the
        asker or the task are reported; `retry_failed` and `retry_flagged` ask, and pay, for these again.

        Raises `SettingError` for a count below 1 or a missing key, `DataError` for an image or a cache that cannot be
        read, `ServiceError` where going on would be in vain.
        """
        check_count(count, "count, the number of captions per image,")
        with CaptionCache(self.cache) as cache:
            pictures = look_at(dataset, self.question, count)
            states = Counter(wanted.state for wanted in look_up(pictures, cache))
            left = unanswered(pictures, cache, retry_failed, retry_flagged)
            estimate = self._estimate(left) if left else None
            counts = [f"{len(pictures):,} images", f"{states.total():,} captions wanted"]
            counts.append(f"{states['captioned']:,} cached")
            if states["submitted"]:
                counts.append(f"{states['submitted']:,} submitted before")
            if left:
                counts.append(str(estimate or f"{len(left):,} to be written here"))
            print(f"{dataset.name}: {', '.join(counts)}. Model: {self.question.model}.")

            agreed = confirm or not (estimate or states["submitted"])
            reasons: dict[str, str] = {}
            if agreed and (left or states["submitted"]):
                cache.note(self.question)
                cache.reopen(cache.get(left))  # so that what is asked again counts as unanswered from here on
                with cache.asking():
                    reasons = self._ask(dataset, pictures, cache)

            captions: dict[str, list[str]] = {}
            missing: dict[str, list[str]] = {}
            flagged: dict[str, list[str]] = {}
            lacking = Counter()
            for picture, key, answer, state, why in look_up(pictures, cache):
                if answer and answer.failure is None:
                    captions.setdefault(picture.name, []).append(answer.text)
                    if is_flagged(answer):
                        flagged.setdefault(picture.name, []).append(answer.text)
                else:
                    lacking[state] += 1
                    why = reasons.get(key, why) if state == "unanswered" else why
                    missing.setdefault(picture.name, []).append(why)

        new, tokens = f"{len(cache.added):,} new answers", [sum(of) for of in zip(*cache.added)] or [0, 0]
        dollars = self._dollars(*tokens)
        if cache.added and dollars is not None:
            new += (
                f", about ${dollars:,.2f} by the service's own count of {tokens[0]:,} + {tokens[1]:,} tokens"
            )
        there, left_out, name = sum(map(len, captions.values())), lacking.total(), dataset.name
        if missing:
            kinds = Counter(why.partition(":")[0] for whys in missing.values() for why in whys)
            counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
            names = few(f"{image} ({'; '.join(sorted(set(whys)))})" for image, whys in missing.items())
            advice = " ".join(sentence for state, sentence in _ADVICE.items() if lacking[state])
            text = (
                f"{there:,} of {there + left_out:,} captions of {name} are there ({new}), so no captions file was written. "
                f"Missing: {left_out:,} ({counts}), of {names}. {advice if agreed else _NOT_AGREED}"
            )
        else:
            with atomic_write(path, "w") as file:
                json.dump(captions, file, indent=1)
            text = f"All {there:,} captions of {dataset.name} are in {path} ({new})."
        if flagged:
            names = few(f'{image} ("{texts[0][:80]}")' for image, texts in flagged.items())
            text += (
                f" To look at, since they may be words about the asker or the task: {sum(map(len, flagged.values())):,}, of "
                f"{names}. retry_flagged=True (--retry-flagged) asks for all of these again."
            )
        return Report(text, missing, flagged, len(cache.added), dollars, estimate)

    @abstractmethod
    def _ask(self, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache) -> dict[str, str]:
        """Bring what is still `unanswered` into the cache; return, by key, why there is no answer where there is none."""

    def _estimate(self, left: dict[str, Picture]) -> Estimate | None:
        """Return what it will take to answer these keys, None where that is free."""
        return None

    def _dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        """Return the price of so many tokens, None where it is unknown or nothing is paid."""
        return None


def open_pictures(
    name: str,
    data_dir: str | os.PathLike | None = None,
    limit: int | None = None,
    captions: str = "published",
) -> CaptionedImages:
    """Return a data set by its name, "coco-train" included, or the pictures of a folder, captioned or not.

    A folder's captions are those of its captions.json, if there is one. `limit` keeps the first pictures. `captions`
    and the errors are those of `datasets`.
    """
    try:
        if name == "coco-train":
            found = training_pairs("coco", 256, data_dir, captions=captions).dataset
        else:
            (found,) = datasets(name, data_dir=data_dir, captions=captions)
    except SettingError:
        folder = Path(name)
        if not folder.is_dir():
            raise
        if (folder / "captions.json").is_file():
            found = CaptionedFolder(folder, folder / "captions.json")
        else:
            files = image_files(folder)
            found = CaptionedImages(folder.resolve().name, (Entry(*file, ()) for file in files.items()))
    if not len(found):
        raise DataError(f"The folder {name} holds no image.")
    return found if limit is None else found.head(limit)


def look_at(dataset: CaptionedImages, question: Question, count: int) -> list[Picture]:
    """Read every image of a data set; return each with its size and with the keys of `count` captions."""

    def look(row: int) -> Picture:
        name, image, _ = dataset[row]
        subject = image_id(image)
        keys = tuple(answer_key(subject, question, index) for index in range(count))
        return Picture(row, name, image.size, keys)

    rows = range(len(dataset))
    # Pillow and hashlib work without Python's lock, so that threads read on all cores.
    with ThreadPoolExecutor() as pool:
        seen = tqdm(pool.map(look, rows), f"Reading {dataset.name}", len(rows), unit="image", leave=False)
        return list(seen)


def image_id(image: Image.Image) -> str:
    """Return 40 hexadecimal digits of the SHA-256 of an RGB image's size and pixels, whatever its file is."""
    digest = hashlib.sha256(b"%dx%d:" % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()[:40]


def look_up(pictures: list[Picture], cache: CaptionCache) -> Iterator[Wanted]:
    """Yield every caption that the pictures are to have, with what the cache knows of it."""
    for picture in pictures:
        answers, batches = cache.get(picture.keys), cache.submitted(picture.keys)
        for key in picture.keys:
            answer = answers.get(key)
            if key in batches:  # with its answer, where a crash came before the batch was closed
                yield Wanted(picture, key, answer, "submitted", f"in {batches[key]}")
            elif answer and answer.failure is None:
                yield Wanted(picture, key, answer, "captioned")
            elif answer and answer.failure != OPEN:
                yield Wanted(picture, key, answer, "failed", answer.failure)
            else:
                yield Wanted(picture, key, answer, "unanswered", "not asked yet")


def unanswered(
    pictures: list[Picture], cache: CaptionCache, retry_failed: bool = False, retry_flagged: bool = False
) -> dict[str, Picture]:
    """Return the keys that are to be asked for and are in no batch, each with its picture.

    A picture that occurs twice in a data set has the same keys both times, and is asked about once.
    """
    return {
        key: picture
        for picture, key, answer, state, _ in look_up(pictures, cache)
        if state == "unanswered"
        or (retry_failed and state == "failed")
        or (retry_flagged and state == "captioned" and is_flagged(answer))
    }


def is_flagged(answer: Answer) -> bool:
    """Return whether a caption speaks of the asker or the task, so that a person should look whether it is one."""
    return answer.failure is None and _OFF_THE_PICTURE.search(answer.text) is not None
