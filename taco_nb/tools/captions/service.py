"""This module asks a chat model behind OpenAI's API, or any server that speaks it, and reads its answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import pydantic.dataclasses
from openai import BadRequestError, OpenAI, OpenAIError
from pydantic import Field, StrictFloat, StrictInt
from tqdm.auto import tqdm

from taco_nb.errors import SettingError
from taco_nb.settings import STRICT, Count, Positive, plain_errors
from taco_nb.text.answers import Answer, Answers
from taco_nb.tools.captions.captioner import Estimate, ServiceError

STOP_AFTER = 10
"""So many requests in a row without an answer mean that the rest would fare no better."""
REJECTED = (400, 413, 415, 422)
"""HTTP statuses that say something about one request; others are about the service and its mood."""
Temperature = Annotated[StrictFloat, Field(ge=0, le=2)]
_THOUGHTS = re.compile(
    r".*</(think|thinking|thought)>|<(think|thinking|thought)>.*", re.IGNORECASE | re.DOTALL
)
"""What a reasoning model thinks before it answers. Some servers swallow the opening tag; a cut-off one has no end."""


class UnknownToService(ServiceError):
    """The service has no such model, batch or file."""


@dataclass(frozen=True)
class Price:
    """A model costs so many dollars per million tokens, and an image is so many tokens to it."""

    input: float
    output: float
    source: str
    image_base: int = 85
    """Tokens of any image; all of them with detail="low"."""
    image_tile: int = 170
    """Tokens of each tile of 512x512 pixels."""


_SOURCE = "prices of April 2026, https://developers.openai.com/api/docs/pricing"
PRICES = {
    "gpt-4o-2024-11-20": Price(2.50, 10.00, _SOURCE),
    "gpt-4o": Price(2.50, 10.00, _SOURCE),
    "gpt-4o-mini": Price(0.15, 0.60, _SOURCE, image_base=2833, image_tile=5667),
}


@plain_errors
@pydantic.dataclasses.dataclass(kw_only=True, config=STRICT)
class ChatService:
    """A chat model is asked several things at a time; each answer is saved at once and paid for once.

    The key is read from the environment variable OPENAI_API_KEY when the first request is sent, and kept nowhere. The
    openai client repeats requests that meet a rate limit, an error of the service, a time-out or a broken connection, and
    waits as long as Retry-After says. A reply that is lost on its way may have been paid for.
    Raises `SettingError` for a setting out of range.
    """

    model: str
    temperature: Temperature = 1.0
    base_url: str | None = None
    """The server, such as "http://localhost:8000/v1"; None for OpenAI's, or what OPENAI_BASE_URL says."""
    max_tokens: Count = 1024
    """An answer is cut off here, and then counts as a failure."""
    max_retries: Annotated[StrictInt, Field(ge=0)] = 6
    timeout: Positive = 120.0
    """Seconds until a request counts as lost."""
    workers: Count = 8
    """Requests at a time."""
    expected_tokens: Count = 200
    """The length of an answer, for the estimate."""
    price: Price | None = None
    """For the estimate; None looks the model up in `PRICES`."""

    def __post_init__(self) -> None:
        if self.base_url is not None and not re.match(r"https?://[^/]", self.base_url):
            raise SettingError(f'base_url must be like "http://localhost:8000/v1", but is {self.base_url!r}.')

    def known_price(self) -> Price | None:
        """Return what the model costs here, None where nobody has said it."""
        return self.price or PRICES.get(self.model)

    def _dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        price = self.known_price()
        return price and (input_tokens * price.input + output_tokens * price.output) / 1e6

    def estimate(self, requests: int, input_tokens: int) -> Estimate:
        """Return what so many requests will take."""
        price, output_tokens = self.known_price(), requests * self.expected_tokens
        source = price.source if price else f"no price is known for {self.model}: give one as price="
        dollars = self._dollars(input_tokens, output_tokens)
        return Estimate(requests, input_tokens, output_tokens, dollars, source)

    def client(self) -> OpenAI:
        """Return a client of the server. Raises `SettingError` where there is no key."""
        return OpenAI(
            api_key=api_key(), base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries
        )

    def request(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of a request."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_completion_tokens": self.max_tokens,
            "messages": messages,
        }

    def send(
        self, requests: Iterator[tuple[str, dict[str, Any]]], total: int, what: str, answers: Answers
    ) -> dict[str, str]:
        """Send requests, given by the keys of their answers, and save each answer as it comes in.

        Returns, by key, why there is no answer where there is none. `total` and `what` are for the progress bar. Raises
        `ServiceError` as soon as going on would be in vain, after what is in flight, and so paid for, has come in.
        """
        reasons: dict[str, str] = {}
        rejected: list[tuple[str, Answer]] = []
        in_a_row = 0  # requests without an answer
        came: list[tuple[str, Answer | Exception]] = []  # by the workers, whom Ctrl-C does not interrupt
        saved = 0

        def ask(key: str, body: dict[str, Any]) -> None:
            came.append((key, _ask_once(client, body)))

        def settle() -> list[tuple[str, Answer | Exception]]:
            """Save the answers that have come since, first of all; the errors are left to the caller."""
            nonlocal saved
            new = came[saved:]
            answers.add((key, result) for key, result in new if isinstance(result, Answer))
            saved += len(new)
            bar.update(len(new))
            return new

        with (
            self.client() as client,
            tqdm(total=total, desc=what, unit="answer") as bar,
            ExitStack() as at_the_end,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            at_the_end.callback(settle)  # after the pool has waited for what is in flight, and so paid for
            running: set[Future] = set()
            try:
                while True:
                    # No more requests than workers are made ahead: each holds a picture.
                    for key, body in islice(requests, self.workers - len(running)):
                        running.add(pool.submit(ask, key, body))
                    if not running:
                        answers.add(rejected)
                        return reasons
                    running = wait(running, return_when=FIRST_COMPLETED).not_done
                    for key, result in settle():
                        if isinstance(result, Answer):
                            # The service does answer, so what it rejected before was about those requests.
                            answers.add(rejected)
                            in_a_row, rejected = 0, []
                            continue
                        in_a_row, verdict = in_a_row + 1, self.verdict(result)
                        if isinstance(verdict, Answer):
                            rejected.append((key, verdict))
                        else:
                            reasons[key] = verdict
                    if in_a_row >= max(STOP_AFTER, self.workers):
                        why = verdict.failure if isinstance(verdict, Answer) else verdict
                        raise ServiceError(
                            f"{in_a_row} requests in a row brought no answer, the last one because: {why}. What was "
                            "answered before is in the cache. Put right what this says, or wait, and call again."
                        )
            except KeyboardInterrupt:
                print("Interrupted; waiting for the answers that are being paid for.")
                raise

    def verdict(self, error: Exception) -> Answer | str:
        """Return what became of a request without an answer: a failure to record, or why it may be sent again.

        Raises `ServiceError` where every other request would fare the same, and `error` itself if it is not the client's.
        """
        if not isinstance(error, OpenAIError):
            raise error
        status = getattr(error, "status_code", None)
        said = said_by(getattr(error, "body", None)) or without_key(str(error))
        if status in (401, 403):
            raise ServiceError(
                f"The service refuses the key in OPENAI_API_KEY (HTTP {status}). Set a key that is valid for "
                f"{self.base_url or 'it'} and may use {self.model}; answers so far are in the cache."
            )
        if status == 404:
            raise UnknownToService(
                f"The service does not know {self.model}, or what else was asked for: {said}."
            )
        if getattr(error, "code", None) == "insufficient_quota":
            raise ServiceError(f"The account has no credit left: {said}. Answers so far are in the cache.")
        if status in REJECTED:
            return Answer("", f"rejected by the service ({status}): {said}")
        return said if status is None else f"HTTP {status}: {said}"


def _ask_once(client: OpenAI, body: dict[str, Any]) -> Answer | Exception:
    """Send one request. A server that rejects a structured answer is asked for a plain one; rejections cost nothing."""
    create = client.chat.completions.with_raw_response.create
    try:
        try:
            response = create(**body)
        except BadRequestError:
            if "response_format" not in body:
                raise
            response = create(**{name: value for name, value in body.items() if name != "response_format"})
        return read_answer(without_key(response.http_response.text))
    except Exception as error:  # for `verdict`, once the answers that came with it are saved
        return error


def api_key() -> str:
    """Return the key in OPENAI_API_KEY. Raises `SettingError`, which does not show it, if none there can be sent."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise SettingError(
            "The environment variable OPENAI_API_KEY is not set. Set it where this program is started: it is never a "
            "parameter, so that it ends up in no notebook. For a local server that asks for no key any word will do."
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise SettingError("OPENAI_API_KEY holds spaces or characters that no key has. Copy the key again.")
    return key


def without_key(text: str) -> str:
    """Return what a service said, with the key taken out in case that it was repeated to us."""
    return text.replace(api_key(), "[OPENAI_API_KEY]")


def said_by(body: Any) -> str | None:
    """Return the message in the body of an error, shortened to a line; None if it has none."""
    message = body.get("message") if isinstance(body, dict) else None
    if not isinstance(message, str):
        return None
    line = " ".join(without_key(message).split())[:200].rstrip(".")
    return line.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, which no file takes


def read_answer(body: Any) -> Answer:
    """Read a chat completion, given as JSON or as what that decodes to.

    The API's own fields decide what failed: `refusal`, and a `finish_reason` of "length" or "content_filter"; so does an
    empty text, or something that is no chat completion. A reasoning model's thoughts are cut off. What a refusal in
    plain words looks like cannot be known: `is_flagged` marks such texts, and they are kept.
    """
    try:
        completion = json.loads(body) if isinstance(body, str) else body
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = _THOUGHTS.sub("", message.get("content") or "").strip(), message.get("refusal")
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # of most texts, which are no JSON
            text = json.loads(text)["caption"].strip()  # in the form that a structured answer has
        f"{text}{refusal}".encode()  # half a surrogate pair is valid JSON, but no text
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return Answer("", f"malformed: no chat completion ({type(error).__name__})")
    failure = None
    if refusal:
        failure = "refused: " + " ".join(str(refusal).split())[:100]
    elif finish == "content_filter":
        failure = "stopped by the content filter"
    elif finish == "length":
        failure = "cut off at max_tokens"
    elif not text:
        failure = "empty"
    return Answer(text, failure, *tokens)
