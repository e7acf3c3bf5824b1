"""Captions through OpenAI's Batch API: the same answers for half the price, within a day, for many thousand images.

A batch is a file of requests, its number on the service, and later one file of answers and one of errors. It costs when
the service accepts it, so this order is kept, and a crash anywhere in it is made good by the next call:

    1. the job (a name of its own, and its keys) is written to the state file beside the cache
    2. the request file is uploaded                              crash before 3: no batch has the name, the job is dropped
    3. the batch is created, with the job's name as metadata     crash before 4: it is found by the name, not paid again
    4. the batch's number is written to the state file
    5. the answers of a finished batch are added to the cache    crash before 6: added again, which changes nothing
    6. the job is removed from the state file; keys without an answer are asked again in another batch
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm.auto import tqdm

from taco_nb.data.captioned import check_count
from taco_nb.tools.captions.cache import Answer, CaptionCache, Job, Jobs
from taco_nb.tools.captions.captioner import Estimate, Report, ServiceError, Survey, Task, without
from taco_nb.tools.captions.openai_captioner import (
    REJECTED,
    STOP_AFTER,
    OpenAICaptioner,
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


class _NoReply(ServiceError):
    """The service cannot be reached, or is overburdened, after all of the client's retries."""


@dataclass(kw_only=True)
class OpenAIBatchCaptioner(OpenAICaptioner):
    """As `OpenAICaptioner`, but through the Batch API: half the price, answers within 24 hours.

    `describe` submits, waits and collects until everything is answered, and may be stopped and called again at any
    time. `submit`, `poll` and `collect` are its steps, for those who would rather come back tomorrow. Unfinished requests
    of batches that failed, expired or were cancelled are submitted again, as long as each round brings an answer.
    """

    open_batches: int = 8
    """Batches at a time; an account may have so many input tokens under way, and a full file holds about 700,000."""
    sleep: Callable[[float], None] = time.sleep
    """Waits so many seconds between two looks at the batches: 30 at first, half as many more each time, up to 600."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.open_batches, "open_batches")

    def _estimate(self, tasks: list[Task]) -> Estimate:
        estimate = super()._estimate(tasks)
        return replace(estimate, prices=estimate.prices + ", halved for a batch")

    def _dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        dollars = super()._dollars(input_tokens, output_tokens)
        return dollars and dollars / 2

    # --- The steps ----------------------------------------------------------------------------------------------------

    def submit(
        self, dataset: CaptionedImages, count: int = 1, confirm: bool = False, retry_failed: bool = False
    ) -> Report:
        """Submit what is neither answered nor under way, in at most `open_batches` batches; prints the price first.

        Arguments and errors as for `describe`.
        """
        with CaptionCache(self.cache) as cache:
            survey = Survey(dataset, self.question, count)
            tasks = survey.tasks(cache, retry_failed)
            estimate, agreed = self._agree(survey, tasks, cache, confirm)
            if tasks and agreed:
                cache.note(self.question)
                with self._client() as client:
                    jobs = self._recovered(client)
                    self._fill(client, jobs, self._request_files(dataset, without(tasks, jobs.keys)))
            return self._report(survey, cache, {}, estimate, agreed, None)

    def poll(self) -> dict[str, str]:
        """The status of each batch under way, by its number on the service: "in_progress", "completed", and so on."""
        with CaptionCache(self.cache), self._client() as client:
            return {job.batch: self._retrieve(client, job).status for job in self._recovered(client)}

    def collect(self) -> int:
        """Bring the answers of finished batches into the cache; how many there were. Never pays."""
        with CaptionCache(self.cache) as cache, self._client() as client:
            jobs = self._recovered(client)
            batches = [(job, self._retrieve(client, job)) for job in jobs]
            return sum(
                len(self._collect(client, jobs, job, batch, cache, {}))
                for job, batch in batches
                if batch.status in FINISHED
            )

    def _ask(self, dataset: CaptionedImages, tasks: list[Task], cache: CaptionCache) -> dict[str, str]:
        reasons: dict[str, str] = {}
        total = sum(len(task.keys) for task in tasks)
        with (
            self._client() as client,
            tqdm(total=total, desc=f"Captions of {dataset.name}", unit="caption") as bar,
        ):
            jobs = self._recovered(client)
            while tasks:
                files = self._request_files(dataset, without(tasks, jobs.keys))
                answered = self._round(client, jobs, files, cache, reasons, bar)
                if not answered:
                    break
                tasks = without(tasks, answered)
        return reasons

    def _round(
        self,
        client: OpenAI,
        jobs: Jobs,
        files: Iterator[tuple[IO[bytes], list[str]]],
        cache: CaptionCache,
        reasons: dict[str, str],
        bar: tqdm,
    ) -> set[str]:
        """Submit, wait and collect until no batch is open; the keys that were answered."""
        answered: set[str] = set()
        in_vain = False
        while True:
            if not in_vain:  # else the service takes no more for now, or nothing of this kind
                self._fill(client, jobs, files)
            if not jobs:
                return answered
            bar.set_postfix_str(f"{len(jobs)} batches under way")
            got: set[str] = set()
            for job, batch in self._wait(client, jobs):
                got |= self._collect(client, jobs, job, batch, cache, reasons)
            bar.update(len(got))
            in_vain = not got
            answered |= got

    # --- Submitting ---------------------------------------------------------------------------------------------------

    def _request_files(
        self, dataset: CaptionedImages, tasks: list[Task]
    ) -> Iterator[tuple[IO[bytes], list[str]]]:
        """Cut the requests into files of JSON lines within the service's limits; one exists at a time."""
        with tempfile.TemporaryFile(dir=Path(self.cache).parent) as file:
            keys: list[str] = []
            for key, body in self._requests(dataset, tasks):
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

    def _fill(self, client: OpenAI, jobs: Jobs, files: Iterator[tuple[IO[bytes], list[str]]]) -> None:
        """Submit files until enough batches are open."""
        while len(jobs) < self.open_batches and (following := next(files, None)):
            file, keys = following
            job = Job(uuid.uuid4().hex, keys)
            jobs.append(job)
            jobs.save()
            file.seek(0)
            uploaded = self._call(client.files.create, file=(f"{job.name}.jsonl", file), purpose="batch")
            job.batch = self._create(client, job, uploaded.id)
            jobs.save()

    def _create(self, client: OpenAI, job: Job, file: str) -> str:
        """Create the batch exactly once, and give its number.

        The client's own retries would create, and pay for, another one where only the reply to the first was lost; here
        each attempt is preceded by a look whether the last one did succeed.
        """
        from openai import APIError

        once = client.with_options(max_retries=0)
        metadata = {METADATA: job.name}
        for attempt in range(self.max_retries + 1):
            try:
                created = once.batches.create(
                    input_file_id=file, endpoint=ENDPOINT, completion_window="24h", metadata=metadata
                )
                return created.id
            except APIError as error:
                failure = error
            verdict = self._verdict(failure)
            if isinstance(verdict, Answer):
                raise ServiceError(
                    f"The batch was {verdict.failure}. What was submitted before it is under way."
                )
            self.sleep(min(2**attempt, 60))
            if found := self._find(client, job):
                return found
        raise ServiceError(f"The batch could not be created: {verdict}. Call again, and it will be.")

    def _find(self, client: OpenAI, job: Job) -> str | None:
        """The number of the batch that has the job's name, if there is one."""
        batches = self._call(lambda: list(client.batches.list(limit=100)))
        return next((batch.id for batch in batches if (batch.metadata or {}).get(METADATA) == job.name), None)

    # --- Collecting ---------------------------------------------------------------------------------------------------

    def _recovered(self, client: OpenAI) -> Jobs:
        """The jobs under way, after those that a crash left without a batch's number got it, or were dropped."""
        jobs = Jobs(self.cache)
        for job in [job for job in jobs if job.batch is None]:
            job.batch = self._find(client, job)
            if job.batch is None:
                jobs.remove(job)
        jobs.save()
        return jobs

    def _wait(self, client: OpenAI, jobs: Jobs) -> list[tuple[Job, Batch]]:
        """Look at the batches at growing intervals until at least one is finished; those that are."""
        pause, failures = 30.0, 0
        while True:
            try:
                batches = [(job, self._retrieve(client, job)) for job in jobs]
                failures = 0
            except _NoReply:
                batches, failures = [], failures + 1
                if failures == STOP_AFTER:
                    raise
            if finished := [(job, batch) for job, batch in batches if batch.status in FINISHED]:
                return finished
            self.sleep(pause)
            pause = min(1.5 * pause, 600)

    def _retrieve(self, client: OpenAI, job: Job) -> Batch:
        try:
            return self._call(client.batches.retrieve, job.batch)
        except UnknownToService:
            raise ServiceError(
                f"The service does not know {job.batch}, which is under way. Use the server and the account that it was "
                f"submitted with; if it is lost, remove it from {Jobs(self.cache).path}."
            ) from None

    def _collect(
        self, client: OpenAI, jobs: Jobs, job: Job, batch: Batch, cache: CaptionCache, reasons: dict[str, str]
    ) -> set[str]:
        """Save the answers of a finished batch and close its job; the keys that were answered.

        `reasons` gets why the others were not. A request that must have been paid for, but whose answer cannot be read or
        is gone, counts as answered with a failure, so that it is not paid for again unasked.
        """
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
        why = (
            f"{batch.id} {batch.status}: {said_by({'message': problems[0]})}"
            if problems
            else f"{batch.id} {batch.status}"
        )
        for key in job.keys:
            if key in unfinished:
                reasons[key] = unfinished[key]
            elif key not in answers and readable and batch.status != "completed":
                reasons[key] = why
            elif key not in answers:
                answers[key] = Answer("", f"malformed: {batch.id} holds no readable answer")
        cache.add((key, answers[key]) for key in job.keys if key in answers)
        jobs.remove(job)
        jobs.save()
        return answers.keys() & set(job.keys)

    def _download(self, client: OpenAI, batch: Batch) -> tuple[list[str], bool]:
        """The lines of a batch's answers and errors, and whether both files were to be had."""
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
        verdict = self._verdict(failure)
        if isinstance(verdict, Answer):
            raise ServiceError(f"The request was {verdict.failure}.")
        raise _NoReply(f"The service did not do its part: {verdict}. Nothing is lost; call again to go on.")


def read_line(line: str) -> tuple[str, Answer | str]:
    """The key of a line in a batch's files, and its answer, or why there is none and it may be asked again."""
    record = json.loads(line)
    response = record.get("response") or {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        return record["custom_id"], read_answer(body)
    said = said_by(record.get("error")) or said_by((body or {}).get("error")) or "no reason given"
    if status in REJECTED:
        return record["custom_id"], Answer("", f"rejected by the service ({status}): {said}")
    return record["custom_id"], f"HTTP {status}: {said}" if status else said
