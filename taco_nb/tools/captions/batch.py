"""Captions through OpenAI's Batch API: the same answers for half the price, within a day, for many thousand images.

A batch is a file of requests, its number on the service, and later one file of answers and one of errors. It costs when
the service accepts it, so this order is kept, and a crash anywhere in it is made good by the next call:

    1. the job (a name of its own, and its keys) is written to the cache
    2. the request file is uploaded                              crash before 3: no batch has the name, the job is dropped
    3. the batch is created, with the job's name as metadata     crash before 4: it is found by the name, not paid again
    4. the batch's number is written to the cache
    5. the answers of a finished batch are added to the cache    crash before 6: added again, which changes nothing
    6. the job is removed from the cache; keys without an answer are asked again in another batch
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm.auto import tqdm

from taco_nb.data.captioned import check_count
from taco_nb.errors import SettingError
from taco_nb.text.answers import Answer
from taco_nb.tools.captions.cache import CaptionCache, Job
from taco_nb.tools.captions.captioner import Estimate, Picture, ServiceError, count_keys, unanswered
from taco_nb.tools.captions.openai_captioner import OpenAICaptioner
from taco_nb.tools.captions.service import (
    REJECTED,
    STOP_AFTER,
    UnknownToService,
    read_answer,
    said_by,
    without_key,
)

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

    from taco_nb.data import CaptionedImages

MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
"""Limits of one request file, as OpenAI's reference of POST /batches gives them; MB read as the smaller, decimal unit."""
ENDPOINT = "/v1/chat/completions"
FINISHED = ("completed", "failed", "expired", "cancelled")
METADATA = "taco_nb_job"


class NoReply(ServiceError):
    """The service cannot be reached, or is overburdened, after all of the client's retries."""


@dataclass(kw_only=True)
class OpenAIBatchCaptioner(OpenAICaptioner):
    """Like `OpenAICaptioner`, but through the Batch API: half the price, and answers within 24 hours.

    `describe` submits, waits and collects until everything is answered, and may be stopped and called again at any
    time. Unfinished requests of batches that failed, expired or were cancelled are submitted again, as long as each turn
    brings an answer.
    """

    open_batches: int = 8
    """Batches at a time; an account may have so many input tokens under way, and a full file holds about 700,000."""
    wait: bool = True
    """False: `describe` collects what is finished and submits what is not, and leaves the rest to the next call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.open_batches, "open_batches")

    def _estimate(self, pictures: list[Picture]) -> Estimate:
        estimate = super()._estimate(pictures)
        return replace(estimate, prices=estimate.prices + ", halved for a batch")

    def _dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        dollars = super()._dollars(input_tokens, output_tokens)
        return dollars and dollars / 2

    def give_up(self, batch: str) -> None:
        """Forget a batch that the service has lost. What it would have answered is asked, and paid for, again."""
        with CaptionCache(self.cache) as cache:
            jobs = [job for job in cache.jobs() if job.batch == batch]
            if not jobs:
                raise SettingError(f"{self.cache} knows of no batch {batch!r} under way.")
            cache.close_job(jobs[0])

    def _ask(self, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache) -> dict[str, str]:
        reasons: dict[str, str] = {}
        total = sum(len(cache.submitted(picture.keys)) for picture in pictures)
        total += count_keys(unanswered(pictures, cache))
        with self.client() as client, tqdm(total=total, desc=f"Captions of {dataset.name}") as bar:
            finished, answered = self._finished(client, cache, bar), 1
            while True:
                if finished:
                    answered = sum([self._collect(client, *one, cache, reasons) for one in finished])
                    bar.update(answered)
                if answered:  # else submitting more is in vain, for now or for good
                    self._submit(client, dataset, pictures, cache)
                if not self.wait or not cache.jobs():
                    return reasons
                finished = self._wait(client, cache, bar)

    # --- Submitting ---------------------------------------------------------------------------------------------------

    def _submit(
        self, client: OpenAI, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache
    ) -> None:
        """Submit what has no answer and is in no batch, until `open_batches` batches are under way."""
        with cache.asking():
            files = self._request_files(dataset, unanswered(pictures, cache))
            while len(cache.jobs()) < self.open_batches and (following := next(files, None)):
                file, keys = following
                job = Job(uuid.uuid4().hex, None)
                cache.open_job(job, keys)
                file.seek(0)
                uploaded = self._call(client.files.create, file=(f"{job.name}.jsonl", file), purpose="batch")
                cache.number_job(job, self._create(client, job, uploaded.id))

    def _request_files(
        self, dataset: CaptionedImages, pictures: list[Picture]
    ) -> Iterator[tuple[IO[bytes], list[str]]]:
        """Cut the requests into files of JSON lines within the service's limits; one exists at a time."""
        with tempfile.TemporaryFile(dir=Path(self.cache).parent) as file:
            keys: list[str] = []
            for key, body in self._requests(dataset, pictures):
                request = {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}
                line = json.dumps(request).encode() + b"\n"
                if keys and (len(keys) == MAX_REQUESTS or file.tell() + len(line) > MAX_BYTES):
                    yield file, keys
                    keys = []
                    file.seek(0)
                    file.truncate()
                file.write(line)
                keys.append(key)
            if keys:
                yield file, keys

    def _create(self, client: OpenAI, job: Job, file: str) -> str:
        """Create the batch exactly once, and return its number.

        The client's own retries would create, and pay for, another one where only the reply to the first was lost; here
        each attempt is preceded by a look whether the last one did succeed.
        """
        once = client.with_options(max_retries=0)
        for attempt in range(self.max_retries + 1):
            try:
                batch = self._call(
                    once.batches.create,
                    input_file_id=file,
                    endpoint=ENDPOINT,
                    completion_window="24h",
                    metadata={METADATA: job.name},
                )
                return batch.id
            except NoReply as error:
                failure = error
            time.sleep(min(2**attempt, 60))
            if found := self._find(client, job):
                return found
        raise failure

    def _find(self, client: OpenAI, job: Job) -> str | None:
        """Return the number of the batch that has the job's name, if there is one."""
        batches = self._call(lambda: list(client.batches.list(limit=100)))
        return next((batch.id for batch in batches if (batch.metadata or {}).get(METADATA) == job.name), None)

    def _recover(self, client: OpenAI, cache: CaptionCache) -> None:
        """Give the jobs that a crash left without a batch's number their number, or drop them."""
        if all(job.batch for job in cache.jobs()):
            return
        with cache.asking():  # else the job may be one that another process is submitting
            for job in cache.jobs():
                if job.batch is None and (found := self._find(client, job)):
                    cache.number_job(job, found)
                elif job.batch is None:
                    cache.close_job(job)

    # --- Collecting ---------------------------------------------------------------------------------------------------

    def _finished(self, client: OpenAI, cache: CaptionCache, bar: tqdm) -> list[tuple[Job, Batch]]:
        """Look at the batches under way, say in the bar how they stand, and return those that are finished."""
        self._recover(client, cache)
        batches = []
        for job in cache.jobs():
            if job.batch is None:  # another process is submitting it
                continue
            try:
                batches.append((job, self._call(client.batches.retrieve, job.batch)))
            except UnknownToService:
                raise ServiceError(
                    f"The service does not know {job.batch}, which is under way. Use the server and the account that it "
                    "was submitted with. If the service has lost it, forget it: "
                    f"OpenAIBatchCaptioner({str(self.cache)!r}).give_up({job.batch!r})."
                ) from None
        counts = Counter(batch.status for _, batch in batches)
        bar.set_postfix_str(", ".join(f"{count} {status}" for status, count in counts.items()))
        return [(job, batch) for job, batch in batches if batch.status in FINISHED]

    def _wait(self, client: OpenAI, cache: CaptionCache, bar: tqdm) -> list[tuple[Job, Batch]]:
        """Look at growing intervals until at least one batch is finished; return those that are."""
        pause, failures = 30.0, 0
        while cache.jobs():  # another process may have collected them
            try:
                if finished := self._finished(client, cache, bar):
                    return finished
                failures = 0
            except NoReply:
                failures += 1
                if failures == STOP_AFTER:
                    raise
            time.sleep(pause)
            pause = min(1.5 * pause, 600)
        return []

    def _collect(
        self, client: OpenAI, job: Job, batch: Batch, cache: CaptionCache, reasons: dict[str, str]
    ) -> int:
        """Save the answers of a finished batch and close its job; return how many requests it has answered.

        `reasons` gets why the others were not. A request that must have been paid for, but whose answer cannot be read or
        is gone, counts as answered with a failure, so that it is not paid for again unasked.
        """
        keys = cache.keys_of(job)
        if not keys:
            return 1  # another process has collected it
        answers: dict[str, Answer] = {}
        unfinished: dict[str, str] = {}
        lines, readable = self._download(client, batch)
        for line in lines:
            try:
                key, outcome = read_line(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                readable = False
                continue
            (answers if isinstance(outcome, Answer) else unfinished)[key] = outcome
        problems = [error.message for error in (batch.errors and batch.errors.data) or [] if error.message]
        why = f"{batch.id} {batch.status}" + "".join(f": {said_by({'message': m})}" for m in problems[:1])
        for key in keys:
            if key in unfinished:
                reasons[key] = unfinished[key]
            elif key not in answers and readable and batch.status != "completed":
                reasons[key] = why
            elif key not in answers:
                answers[key] = Answer("", f"malformed: {batch.id} holds no readable answer")
        answered = [(key, answers[key]) for key in keys if key in answers]
        cache.add(answered)
        cache.close_job(job)
        return len(answered)

    def _download(self, client: OpenAI, batch: Batch) -> tuple[list[str], bool]:
        """Return the lines of a batch's answers and errors, and whether both files were to be had."""
        lines: list[str] = []
        readable = True
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            try:
                content = self._call(client.files.content, file).content
            except UnknownToService:  # the service keeps the files of a batch for 30 days
                readable = False
                continue
            # Not splitlines(), which also cuts at line separators inside of JSON's strings.
            lines += filter(None, without_key(content.decode("utf-8", "replace")).split("\n"))
        return lines, readable

    def _call(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """Call the service; its errors become `ServiceError`, after the client's own retries."""
        from openai import OpenAIError

        try:
            return function(*arguments, **settings)
        except OpenAIError as error:
            failure = error
        # Outside of the except clause, so that no traceback shows what the service said, which may be the key.
        verdict = self.verdict(failure)
        if isinstance(verdict, Answer):
            raise ServiceError(f"The request was {verdict.failure}.")
        raise NoReply(f"The service did not do its part: {verdict}. Nothing is lost; call again to go on.")


def read_line(line: str) -> tuple[str, Answer | str]:
    """Return the key of a line in a batch's files, and its answer, or why there is none and it may be asked again."""
    record = json.loads(line)
    response = record.get("response") or {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        return record["custom_id"], read_answer(body)
    said = said_by(record.get("error")) or said_by((body or {}).get("error")) or "no reason given"
    if status in REJECTED:
        return record["custom_id"], Answer("", f"rejected by the service ({status}): {said}")
    return record["custom_id"], f"HTTP {status}: {said}" if status else said
