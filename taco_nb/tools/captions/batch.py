"""OpenAI's Batch API gives the same answers for half the price, within a day, for many thousand images.

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
from dataclasses import replace
from typing import IO, Any

import pydantic.dataclasses
from openai import OpenAI, OpenAIError
from openai.types import Batch
from tqdm.auto import tqdm

from taco_nb.data import CaptionedImages
from taco_nb.errors import SettingError
from taco_nb.settings import STRICT, Count, plain_errors
from taco_nb.text.answers import Answer
from taco_nb.tools.captions.captioner import CaptionCache, Picture, ServiceError, unanswered
from taco_nb.tools.captions.openai_captioner import OpenAICaptioner
from taco_nb.tools.captions.service import (
    REJECTED,
    Price,
    UnknownToService,
    read_answer,
    said_by,
    without_key,
)

MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
"""Limits of one request file, as OpenAI's reference of POST /batches gives them; MB read as the smaller, decimal unit."""
ENDPOINT = "/v1/chat/completions"
FINISHED = ("completed", "failed", "expired", "cancelled")
METADATA = "taco_nb_job"
PATIENCE = 100
"""How often a look at a batch is repeated, at most 8 seconds apart: a network may fail for some minutes in a day."""


class NoReply(ServiceError):
    """The service cannot be reached, or is overburdened, after all of the client's retries."""


@plain_errors
@pydantic.dataclasses.dataclass(kw_only=True, config=STRICT)
class OpenAIBatchCaptioner(OpenAICaptioner):
    """Ask as `OpenAICaptioner` does, but through the Batch API: at half the price, for answers within 24 hours.

    `describe` submits, waits and collects until everything is answered, and may be stopped and called again at any
    time. Unfinished requests of batches that failed, expired or were cancelled are submitted again, as long as each turn
    brings an answer. While it waits, others who ask for answers that go to the same file wait for it.
    """

    open_batches: Count = 8
    """Batches at a time; an account may have so many input tokens under way, and a full file holds about 700,000."""
    wait: bool = True
    """False: `describe` collects what is finished and submits what is not, and leaves the rest to the next call."""

    def known_price(self) -> Price | None:
        price = super().known_price()
        halves = price and {"input": price.input / 2, "output": price.output / 2}
        return price and replace(price, **halves, source=f"{price.source}, halved for a batch")

    def give_up(self, batch: str) -> None:
        """Forget a batch that the service has lost. What it would have answered is asked, and paid for, again."""
        with CaptionCache(self.cache) as cache:
            jobs = {name: job for job, name in cache.jobs().items()}
            if batch not in jobs:
                raise SettingError(f"{self.cache} knows of no batch {batch!r} under way.")
            cache.close_job(jobs[batch])

    def _ask(self, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache) -> dict[str, str]:
        reasons: dict[str, str] = {}
        total = len(unanswered(pictures, cache)) + sum(len(cache.keys_of(job)) for job in cache.jobs())
        with self.client() as client, tqdm(total=total, desc=f"Captions of {dataset.name}") as bar:
            # A crash has left these jobs without a batch, or without knowing the one that has their name.
            for job in [job for job, batch in cache.jobs().items() if batch is None]:
                if found := self._find(client, job):
                    cache.name_batch(job, found)
                else:
                    cache.close_job(job)
            submit, pause = True, 30.0
            while True:
                if finished := self._finished(client, cache, bar):
                    answered = sum([self._collect(client, *one, cache, reasons) for one in finished])
                    bar.update(answered)
                    submit, pause = answered > 0, 30.0  # without an answer, submitting it again is in vain
                if submit:
                    self._submit(client, dataset, pictures, cache)
                    submit = False
                if not self.wait or not cache.jobs():
                    return reasons
                # Some batches take minutes and most take hours: look ever less often, at last every ten minutes.
                time.sleep(pause)
                pause = min(1.5 * pause, 600)

    def _submit(
        self, client: OpenAI, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache
    ) -> None:
        """Submit what has no answer and is in no batch, until `open_batches` batches are under way."""
        files = self._request_files(dataset, unanswered(pictures, cache))
        while len(cache.jobs()) < self.open_batches and (following := next(files, None)):
            file, keys = following
            job = uuid.uuid4().hex
            cache.open_job(job, keys)
            file.seek(0)
            uploaded = self._call(client.files.create, file=(f"{job}.jsonl", file), purpose="batch")
            cache.name_batch(job, self._create(client, job, uploaded.id))

    def _request_files(
        self, dataset: CaptionedImages, left: dict[str, Picture]
    ) -> Iterator[tuple[IO[bytes], list[str]]]:
        """Cut the requests into files of JSON lines within the service's limits; one exists at a time."""
        with tempfile.TemporaryFile(dir=self.cache.parent) as file:
            keys: list[str] = []
            for key, body in self._requests(dataset, left):
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

    def _create(self, client: OpenAI, job: str, file: str) -> str:
        """Create the batch exactly once, and return its name.

        The client's own retries would create, and pay for, another one where only the reply to the first was lost; here
        each attempt after the first is preceded by a look whether the last one did succeed.
        """
        once = client.with_options(max_retries=0)
        for attempt in range(self.max_retries + 1):
            try:
                return self._call(
                    once.batches.create,
                    input_file_id=file,
                    endpoint=ENDPOINT,
                    completion_window="24h",
                    metadata={METADATA: job},
                ).id
            except NoReply as error:
                failure = error
            time.sleep(min(2**attempt, 60))
            if found := self._find(client, job):
                return found
        raise failure

    def _find(self, client: OpenAI, job: str) -> str | None:
        """Return the name of the batch of a job, if there is one."""
        batches = self._call(lambda: list(client.batches.list(limit=100)))
        return next((batch.id for batch in batches if (batch.metadata or {}).get(METADATA) == job), None)

    # --- Collecting ---------------------------------------------------------------------------------------------------

    def _finished(self, client: OpenAI, cache: CaptionCache, bar: tqdm) -> list[tuple[str, Batch]]:
        """Look at the batches under way, say in the bar how they stand, and return those that are finished."""
        patient = client.with_options(
            max_retries=max(PATIENCE, self.max_retries) if self.wait else self.max_retries
        )
        batches = []
        for job, name in cache.jobs().items():
            try:
                batches.append((job, self._call(patient.batches.retrieve, name)))
            except UnknownToService:
                raise ServiceError(
                    f"The service does not know {name}, which is under way. Use the server and the account that it "
                    "was submitted with. If the service has lost it, forget it: "
                    f"OpenAIBatchCaptioner({str(self.cache)!r}).give_up({name!r})."
                ) from None
        counts = Counter(batch.status for _, batch in batches)
        bar.set_postfix_str(", ".join(f"{count} {status}" for status, count in counts.items()))
        return [(job, batch) for job, batch in batches if batch.status in FINISHED]

    def _collect(
        self, client: OpenAI, job: str, batch: Batch, cache: CaptionCache, reasons: dict[str, str]
    ) -> int:
        """Save the answers of a finished batch and close its job; return how many requests it has answered.

        `reasons` gets why the others were not. A request that must have been paid for, but whose answer cannot be read or
        is gone, counts as answered with a failure, so that it is not paid for again unasked.
        """
        outcomes: dict[str, Answer | str] = {}
        readable = True
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            try:
                content = self._call(client.files.content, file).content
            except UnknownToService:  # the service keeps the files of a batch for 30 days
                readable = False
                continue
            # Not splitlines(), which also cuts at line separators inside of JSON's strings.
            for line in filter(None, without_key(content.decode("utf-8", "replace")).split("\n")):
                try:
                    key, outcome = read_line(line)
                    outcomes[key] = outcome
                except (ValueError, KeyError, TypeError, AttributeError):
                    readable = False
        problems = [error.message for error in (batch.errors and batch.errors.data) or [] if error.message]
        unread = f"{batch.id} {batch.status}" + "".join(f": {said_by({'message': m})}" for m in problems[:1])
        if batch.status == "completed" or not readable:
            unread = Answer("", f"malformed: {batch.id} holds no readable answer")
        answered = []
        for key in cache.keys_of(job):
            outcome = outcomes.get(key, unread)
            if isinstance(outcome, Answer):
                answered.append((key, outcome))
            else:
                reasons[key] = outcome
        cache.add(answered)
        cache.close_job(job)
        return len(answered)

    def _call(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """Call the service; its errors become `ServiceError`, after the client's own retries."""
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
