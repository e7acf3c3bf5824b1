"""What every captioner does: find out which captions are missing, say what they cost, ask, keep, and write the JSON."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm.auto import tqdm

from taco_nb.data.captioned import check_count, few
from taco_nb.errors import SettingError, TacoError
from taco_nb.files import atomic_write
from taco_nb.tools.captions.cache import CaptionCache, Jobs, Question, answer_key, image_id

if TYPE_CHECKING:
    from taco_nb.data import CaptionedImages


class ServiceError(TacoError, RuntimeError):
    """The captioning service refuses to work or cannot be reached; what it has answered so far is in the cache."""


class Task(NamedTuple):
    """An image that lacks captions: its place in the data set, its (width, height), and the keys to be answered."""

    row: int
    size: tuple[int, int]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """What the missing captions will take. Tokens and dollars are rough; `dollars` is None where no price is known."""

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
    """What a call to a captioner came to; `str` says it in sentences, with the way to go on."""

    dataset: str
    wanted: int
    """Captions: images times count."""
    missing: dict[str, list[str]] = field(repr=False)
    """Names of images that lack captions, with the reason for each caption that they lack."""
    new: int
    """Answers in this call, captions or not."""
    input_tokens: int
    """Of those answers, as the service counted them."""
    output_tokens: int
    dollars: float | None
    """Their price; None where no price is known, or nothing is paid."""
    estimate: Estimate | None
    """What was still to be paid for when the call began; None for nothing."""
    path: Path | None
    """The captions file, if it is complete and was written."""
    advice: str

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        lacking = sum(map(len, self.missing.values()))
        if self.path:
            head = f"All {self.wanted:,} captions of {self.dataset} are in {self.path}"
        else:
            head = f"{self.wanted - lacking:,} of {self.wanted:,} captions of {self.dataset} are there"
        cost = (
            ""
            if self.dollars is None
            else f", about ${self.dollars:,.2f} by the service's own count of tokens"
        )
        head += f" ({self.new:,} new answers{cost})."
        if not self.missing:
            return head
        examples = few(f"{name} ({'; '.join(sorted(set(why)))})" for name, why in self.missing.items())
        return f"{head} {lacking:,} are missing, so no captions file was written: {examples}. {self.advice}"


_ADVICE = {
    "unanswered": "Calling again asks for what has no answer yet.",
    "submitted": "What is in a batch comes with OpenAIBatchCaptioner's describe() or collect(), once it is finished.",
    "failed": "retry_failed=True asks again for what was answered with something else than a caption.",
}


@dataclass(kw_only=True)
class Captioner(ABC):
    """Anything that writes captions for images: one interface for paid services and local models."""

    cache: str | os.PathLike = field(kw_only=False)
    """The file that keeps every answer; see `CaptionCache`. One file may serve many data sets, models and prompts."""

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
    ) -> Report:
        """Write `count` captions for every image of `dataset` to the captions file `path`, and say how it went.

        Only what the cache lacks is asked, so that a call after a crash, or for a larger `count`, pays for the rest
        alone; with everything in the cache it needs no network and no key. The file, `{"image.png": ["one", ...]}` as
        `CaptionedFolder` reads it, is written only when it is complete. Nothing is sent to a paid service without
        confirm=True: the estimate is printed and the report says what is missing. Answers that are no captions
        (refused, cut off, empty, malformed) stay missing; retry_failed=True asks, and pays, for them again.

        Raises `SettingError` for a count below 1 or a missing key, `DataError` for an image or a cache that cannot be
        read, `ServiceError` where going on would be in vain.
        """
        with CaptionCache(self.cache) as cache:
            survey = Survey(dataset, self.question, count)
            tasks = survey.tasks(cache, retry_failed)
            estimate, agreed = self._agree(survey, tasks, cache, confirm)
            reasons = {}
            if tasks and agreed:
                cache.note(self.question)
                reasons = self._ask(dataset, tasks, cache)
            return self._report(survey, cache, reasons, estimate, agreed, Path(path))

    @abstractmethod
    def _ask(self, dataset: CaptionedImages, tasks: list[Task], cache: CaptionCache) -> dict[str, str]:
        """Bring answers into the cache; return, by key, why there is none where there is none."""

    def _estimate(self, tasks: list[Task]) -> Estimate | None:
        """What answering the tasks will take, None where it is free."""
        return None

    def _dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        return None

    def _agree(
        self, survey: Survey, tasks: list[Task], cache: CaptionCache, confirm: bool
    ) -> tuple[Estimate | None, bool]:
        """Print what there is to do and what it costs; the estimate, and whether to go ahead."""
        unasked = without(tasks, Jobs(self.cache).keys)
        to_ask = sum(len(task.keys) for task in unasked)
        submitted = sum(len(task.keys) for task in tasks) - to_ask
        estimate = self._estimate(unasked) if unasked else None
        cached = sum(cache.has_caption(key) for row in range(len(survey.images)) for key in survey.keys(row))
        text = f"{survey.dataset}: {len(survey.images):,} images, {survey.wanted:,} captions wanted, {cached:,} cached"
        if submitted:
            text += f", {submitted:,} submitted before"
        if unasked:
            text += f", {estimate}" if estimate else f", {to_ask:,} to be written here"
        print(f"{text}. Model: {self.question.model}.")
        return estimate, confirm or not (estimate or submitted)

    def _report(
        self,
        survey: Survey,
        cache: CaptionCache,
        reasons: dict[str, str],
        estimate: Estimate | None,
        agreed: bool,
        path: Path | None,
    ) -> Report:
        missing: dict[str, list[str]] = {}
        kinds = set()
        submitted = Jobs(self.cache).keys
        for row, name in enumerate(survey.names):
            for key in survey.keys(row):
                if cache.has_caption(key):
                    continue
                if key in submitted:
                    kind, why = "submitted", submitted[key]
                elif cache.has_failed(key):
                    kind, why = "failed", cache[key].failure
                else:
                    kind, why = "unanswered", reasons.get(key, "not asked yet")
                kinds.add(kind)
                missing.setdefault(name, []).append(why)
        written = path if path and not missing else None
        if written:
            survey.write(cache, written)
        advice = [sentence for kind, sentence in _ADVICE.items() if kind in kinds]
        return Report(
            dataset=survey.dataset,
            wanted=survey.wanted,
            missing=missing,
            new=cache.added,
            input_tokens=cache.input_tokens,
            output_tokens=cache.output_tokens,
            dollars=self._dollars(cache.input_tokens, cache.output_tokens),
            estimate=estimate,
            path=written,
            advice=" ".join(advice)
            if agreed
            else "Nothing was sent: confirm=True sends it, and pays for it.",
        )


class Survey:
    """Which captions a data set needs; every image is read for its `image_id` and size, and not kept."""

    def __init__(self, dataset: CaptionedImages, question: Question, count: int):
        check_count(count, "count, the number of captions per image,")
        self.dataset = dataset.name
        self.names = dataset.names
        self.question = question
        self.count = count

        def look(i: int) -> tuple[str, tuple[int, int]]:
            image = dataset[i].image
            return image_id(image), image.size

        rows = range(len(dataset))
        with ThreadPoolExecutor() as pool:
            seen = tqdm(pool.map(look, rows), f"Reading {dataset.name}", len(rows), unit="image", leave=False)
            self.images, self._sizes = zip(*seen)

    @property
    def wanted(self) -> int:
        return len(self.images) * self.count

    def keys(self, row: int) -> Iterator[str]:
        """The cache's keys of the captions of one image, in order."""
        return (answer_key(self.images[row], self.question, index) for index in range(self.count))

    def tasks(self, cache: CaptionCache, retry_failed: bool) -> list[Task]:
        """What has no answer, or with `retry_failed` no caption; a picture that occurs twice is asked once."""
        rows = {image: row for row, image in reversed(list(enumerate(self.images)))}
        tasks = []
        for row in sorted(rows.values()):
            keys = (key for key in self.keys(row) if not cache.has_caption(key))
            keys = tuple(key for key in keys if retry_failed or not cache.has_failed(key))
            if keys:
                tasks.append(Task(row, self._sizes[row], keys))
        return tasks

    def write(self, cache: CaptionCache, path: Path) -> None:
        """Write the captions file, an image at a time."""
        with atomic_write(path, "w") as file:
            for row, name in enumerate(self.names):
                captions = [cache[key].text for key in self.keys(row)]
                file.write(("{\n" if row == 0 else ",\n") + f"{json.dumps(name)}: {json.dumps(captions)}")
            file.write("\n}\n")


def without(tasks: list[Task], keys: Container[str]) -> list[Task]:
    """The tasks that remain once `keys` are answered."""
    left = (task._replace(keys=tuple(key for key in task.keys if key not in keys)) for task in tasks)
    return [task for task in left if task.keys]


def check_range(name: str, value: float, lowest: float, highest: float, whole: bool = False) -> None:
    """Raise `SettingError` unless `value` is a (whole) number between the two."""
    if type(value) not in ((int,) if whole else (int, float)) or not lowest <= value <= highest:
        kind = "whole number" if whole else "number"
        raise SettingError(f"{name} must be a {kind} from {lowest} to {highest}, but is {value!r}.")
