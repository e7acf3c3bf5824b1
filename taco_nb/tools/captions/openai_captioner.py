"""Captions by a vision model behind OpenAI's chat API, one request per caption, several at a time."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from taco_nb.data.captioned import check_count
from taco_nb.errors import SettingError
from taco_nb.tools.captions.cache import Answer, CaptionCache, Jobs, Question
from taco_nb.tools.captions.captioner import Captioner, Estimate, ServiceError, Task, check_range, without

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError
    from PIL import Image

    from taco_nb.data import CaptionedImages

MODEL = "gpt-4o-2024-11-20"
PROMPT = "Describe the image in detail. Reason about the image. Return the response in paragraph form."
STOP_AFTER = 10
"""So many requests in a row without an answer mean that the rest would fare no better."""
REJECTED = (400, 413, 415, 422)
"""HTTP statuses that say something about one request; others are about the service and its mood."""


class UnknownToService(ServiceError):
    """The service has no such model, batch or file."""


@dataclass(frozen=True)
class Price:
    """What a model costs, in dollars per million tokens, and how many tokens an image is to it."""

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


@dataclass(kw_only=True)
class OpenAICaptioner(Captioner):
    """Captions by GPT-4o or any model behind a server that speaks OpenAI's chat API; every answer is paid for once.

    The defaults are the report's. The key is read from the environment variable OPENAI_API_KEY when the first request is
    sent, and kept nowhere. The openai client repeats requests that meet a rate limit, an error of the service, a
    time-out or a broken connection, and waits as long as Retry-After says; a reply lost on its way may be paid for
    although nothing was received. Raises `SettingError` for a setting out of range.
    """

    model: str = MODEL
    prompt: str = PROMPT
    temperature: float = 1.0
    base_url: str | None = None
    """The server, such as "http://localhost:8000/v1"; None for OpenAI's, or what OPENAI_BASE_URL says."""
    detail: str = "auto"
    """How closely the model looks: "low" (a fixed number of tokens), "high" (tiles of 512x512), or "auto"."""
    longest_side: int = 2048
    """Larger images are scaled down to this many pixels before they are sent; GPT-4o itself looks at no more."""
    quality: int = 90
    """Of the JPEG that is sent."""
    max_tokens: int = 1024
    """An answer is cut off here; what is cut off is no caption."""
    max_retries: int = 6
    timeout: float = 120.0
    """Seconds until a request counts as lost."""
    workers: int = 8
    """Requests at a time."""
    expected_tokens: int = 200
    """Length of a caption, for the estimate."""
    price: Price | None = None
    """For the estimate; None looks the model up in `PRICES`."""

    def __post_init__(self) -> None:
        if self.detail not in ("auto", "low", "high"):
            raise SettingError(f'detail must be "auto", "low" or "high", but is {self.detail!r}.')
        if self.base_url is not None and not re.match(r"https?://[^/]", self.base_url):
            raise SettingError(f'base_url must be like "http://localhost:8000/v1", but is {self.base_url!r}.')
        for name in ("longest_side", "max_tokens", "workers", "expected_tokens"):
            check_count(getattr(self, name), name)
        check_range("temperature", self.temperature, 0, 2)
        check_range("quality", self.quality, 1, 100, whole=True)
        check_range("max_retries", self.max_retries, 0, 1000, whole=True)
        check_range("timeout", self.timeout, 0.001, 86400)

    @property
    def question(self) -> Question:
        return Question(self.model, self.prompt, self.temperature)

    # --- What it costs ------------------------------------------------------------------------------------------------

    def _estimate(self, tasks: list[Task]) -> Estimate:
        price = self._price()
        prompt = 10 + math.ceil(
            len(self.prompt) / 4
        )  # a token is about four characters; the message around it, ten
        images = sum(image_tokens(self._fit(size), self.detail, price) * len(keys) for _, size, keys in tasks)
        requests = sum(len(task.keys) for task in tasks)
        tokens = images + requests * prompt, requests * self.expected_tokens
        source = (
            price.source if self._known_price() else f"no price is known for {self.model}: give one as price="
        )
        return Estimate(requests, *tokens, self._dollars(*tokens), source)

    def _dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        price = self._known_price()
        return price and (input_tokens * price.input + output_tokens * price.output) / 1e6

    def _known_price(self) -> Price | None:
        return self.price or PRICES.get(self.model)

    def _price(self) -> Price:
        """For its rule of image tokens: that of the default model where none is known."""
        return self._known_price() or PRICES[MODEL]

    # --- What is sent -------------------------------------------------------------------------------------------------

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        return scaled(size, self.longest_side / max(size))

    def _requests(
        self, dataset: CaptionedImages, tasks: Iterable[Task]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, body of the request) for each missing caption; an image is read when its turn comes."""
        for row, size, keys in tasks:
            image = dataset[row].image
            image_url = {"url": data_url(image.resize(self._fit(size)), self.quality), "detail": self.detail}
            content = [{"type": "text", "text": self.prompt}, {"type": "image_url", "image_url": image_url}]
            body = {
                "model": self.model,
                "temperature": self.temperature,
                "max_completion_tokens": self.max_tokens,
                "messages": [{"role": "user", "content": content}],
            }
            yield from ((key, body) for key in keys)

    def _client(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(
            api_key=api_key(), base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries
        )

    # --- The direct way -----------------------------------------------------------------------------------------------

    def _ask(self, dataset: CaptionedImages, tasks: list[Task], cache: CaptionCache) -> dict[str, str]:
        from openai import OpenAIError

        reasons: dict[str, str] = {}
        in_a_row = 0
        rejected: list[
            tuple[str, Answer]
        ] = []  # kept only once others are answered: else it is not about the image
        tasks = without(tasks, Jobs(self.cache).keys)
        requests = self._requests(dataset, tasks)
        total = sum(len(task.keys) for task in tasks)
        running: dict[Future, str] = {}

        def settle(done: Iterable[Future]) -> list[tuple[str, BaseException | None]]:
            """Save the answers first of all; the errors are left to the caller."""
            settled = [(running.pop(future), future) for future in done]
            cache.add((key, future.result()) for key, future in settled if not future.exception())
            bar.update(len(settled))
            return [(key, future.exception()) for key, future in settled]

        with (
            ThreadPoolExecutor(self.workers) as pool,
            self._client() as client,
            tqdm(total=total, desc=f"Captions of {dataset.name}", unit="caption") as bar,
        ):
            try:
                while True:
                    for key, body in islice(requests, self.workers - len(running)):
                        running[pool.submit(self._ask_once, client, body)] = key
                    if not running:
                        cache.add(rejected)
                        return reasons
                    for key, error in settle(wait(running, return_when=FIRST_COMPLETED).done):
                        if error is None:
                            cache.add(rejected)
                            in_a_row, rejected = 0, []
                            continue
                        if not isinstance(error, OpenAIError):
                            raise error
                        in_a_row, verdict = in_a_row + 1, self._verdict(error)
                        if isinstance(verdict, Answer):
                            rejected.append((key, verdict))
                        else:
                            reasons[key] = verdict
                    if in_a_row >= max(STOP_AFTER, self.workers):
                        raise ServiceError(
                            f"{in_a_row} requests in a row brought no answer, the last one because: "
                            f"{verdict.failure if isinstance(verdict, Answer) else verdict}. What was answered before is "
                            "in the cache. Put right what this says, or wait, and call again."
                        )
            except KeyboardInterrupt:
                print(f"Interrupted; waiting for the {len(running)} answers that are being paid for.")
                raise
            finally:
                settle(wait(running).done)  # whatever ends the loop, what is in flight is being paid for

    @staticmethod
    def _ask_once(client: OpenAI, body: dict[str, Any]) -> Answer:
        response = client.chat.completions.with_raw_response.create(**body)
        return read_answer(without_key(response.http_response.text))

    def _verdict(self, error: OpenAIError) -> Answer | str:
        """Of a request without an answer: a failure to be recorded, or the reason why it may be asked again.

        Raises `ServiceError` where every other request would fare the same.
        """
        status, code = getattr(error, "status_code", None), getattr(error, "code", None)
        body = getattr(error, "body", None)
        said = said_by(body) or without_key(str(error))
        if status in (401, 403):
            raise ServiceError(
                f"The service refuses the key in OPENAI_API_KEY (HTTP {status}). Set a key that is valid for "
                f"{self.base_url or 'it'} and may use {self.model}; answers so far are in the cache."
            )
        if status == 404:
            raise UnknownToService(
                f"The service does not know {self.model}, or what else was asked for: {said}."
            )
        if code == "insufficient_quota":
            raise ServiceError(f"The account has no credit left: {said}. Answers so far are in the cache.")
        if status in REJECTED:
            return Answer("", f"rejected by the service ({status}): {said}")
        return said if status is None else f"HTTP {status}: {said}"


def api_key() -> str:
    """The key in OPENAI_API_KEY; raises `SettingError`, which does not show it, if there is none that can be sent."""
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
    """What a service said, in case it repeats the key to us."""
    return text.replace(api_key(), "[OPENAI_API_KEY]")


def said_by(body: Any) -> str | None:
    """The message in the body of an error, shortened to a line; None if it has none."""
    message = body.get("message") if isinstance(body, dict) else None
    if not isinstance(message, str):
        return None
    line = " ".join(without_key(message).split())[:200].rstrip(".")
    return line.encode(
        errors="replace"
    ).decode()  # JSON can hold half a surrogate pair, which cannot be printed


# Without structured output a model refuses in plain words, and the API's `refusal` stays empty.
_REFUSAL = re.compile(
    r"(i['’]?m|i am) (sorry|unable|not able)|sorry\b|(unfortunately, )?i (can['’]?t|cannot|won['’]?t)", re.I
)


def read_answer(body: Any) -> Answer:
    """Tell a caption from what is none in a chat completion, given as JSON or as what that decodes to.

    No captions are refusals, in the API's field or in so many words; texts cut off at max_tokens or by the content filter;
    empty ones; and everything that is no chat completion.
    """
    try:
        completion = json.loads(body) if isinstance(body, str) else body
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = (message.get("content") or "").strip(), message.get("refusal")
        f"{text}{refusal}".encode()  # half a surrogate pair is valid JSON, but no text
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return Answer("", f"malformed: no chat completion ({type(error).__name__})")
    if refusal or _REFUSAL.match(text):
        return Answer(text, "refused: " + " ".join(str(refusal or text).split())[:100], *tokens)
    if finish == "content_filter":
        return Answer(text, "stopped by the content filter", *tokens)
    if finish == "length":
        return Answer(text, "cut off at max_tokens", *tokens)
    if not text:
        return Answer(text, "empty", *tokens)
    return Answer(text, None, *tokens)


def image_tokens(size: tuple[int, int], detail: str, price: Price) -> int:
    """Tokens of an image of (width, height), by the rule that OpenAI publishes for GPT-4o in its guide to vision.

    detail="low" is the base alone. Otherwise the image is scaled down to fit 2048x2048, then to a short side of 768, and
    each tile of 512x512 that it takes to cover it is added. "auto" is counted as "high", the most it can be.
    """
    if detail == "low":
        return price.image_base
    size = scaled(size, 2048 / max(size))
    width, height = scaled(size, 768 / min(size))
    return price.image_base + price.image_tile * math.ceil(width / 512) * math.ceil(height / 512)


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """The size times a factor, if that is below 1."""
    return tuple(max(1, round(side * min(1.0, factor))) for side in size)


def data_url(image: Image.Image, quality: int) -> str:
    """The image as a JPEG in a URL, as the API takes it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
