"""A vision model behind OpenAI's chat API writes captions, one per request, several requests at a time."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal

import pydantic.dataclasses

from taco_nb.data import CaptionedImages
from taco_nb.settings import STRICT, Count, plain_errors
from taco_nb.text.answers import Question
from taco_nb.tools.captions.captioner import CaptionCache, Captioner, Estimate, Picture, unanswered
from taco_nb.tools.captions.service import PRICES, ChatService, Price

MODEL = "gpt-4o-2024-11-20"
PROMPT = "Describe the image in detail. Reason about the image. Return the response in paragraph form."
QUALITY = 90
"""Quality of the JPEG that is sent."""
_SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string"}},
    "required": ["caption"],
    "additionalProperties": False,
}
STRUCTURE = {"type": "json_schema", "json_schema": {"name": "caption", "strict": True, "schema": _SCHEMA}}
"""The `response_format` of a structured answer."""


@plain_errors
@pydantic.dataclasses.dataclass(kw_only=True, config=STRICT)
class OpenAICaptioner(ChatService, Captioner):
    """GPT-4o, or any model behind a server that speaks OpenAI's chat API, writes captions; each is paid for once.

    The defaults are the report's. For the other settings, the key and the errors see `ChatService`.
    """

    model: str = MODEL
    prompt: str = PROMPT
    detail: Literal["auto", "low", "high"] = "auto"
    """How closely the model looks: "low" (a fixed number of tokens), "high" (tiles of 512x512), or "auto"."""
    longest_side: Count = 2048
    """Larger images are scaled down to this many pixels before they are sent; GPT-4o itself looks at no more."""
    structured: bool = False
    """Ask for a JSON object with a caption in it, as the API's structured output: a model then refuses in the API's field
    for that, and adds no "Here is a caption:". Off, since the report's model was not asked so. A server that rejects it is
    asked for plain text instead, except in a batch."""

    @property
    def question(self) -> Question:
        return Question(self.model, self.prompt, self.temperature)

    def _estimate(self, left: dict[str, Picture]) -> Estimate:
        # A token is about four characters, and the message around the prompt about ten tokens. Where the model's rule of
        # image tokens is not known, the report's model stands in.
        prompt, price = 10 + math.ceil(len(self.prompt) / 4), self.known_price() or PRICES[MODEL]
        images = sum(
            image_tokens(scaled(picture.size, self.longest_side), self.detail, price)
            for picture in left.values()
        )
        return self.estimate(len(left), images + len(left) * prompt)

    def _requests(
        self, dataset: CaptionedImages, left: dict[str, Picture]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the key and the request of each caption that is lacking; an image is read when its turn comes."""
        for picture, keys in groupby(left, left.get):
            image = dataset[picture.row].image.resize(scaled(picture.size, self.longest_side))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=QUALITY)
            url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
            content = [
                {"type": "text", "text": self.prompt},
                {"type": "image_url", "image_url": {"url": url, "detail": self.detail}},
            ]
            body = self.request([{"role": "user", "content": content}])
            if self.structured:
                body["response_format"] = STRUCTURE
            yield from ((key, body) for key in keys)

    def _ask(self, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache) -> dict[str, str]:
        left = unanswered(pictures, cache)
        return self.send(self._requests(dataset, left), len(left), f"Captions of {dataset.name}", cache)


def image_tokens(size: tuple[int, int], detail: str, price: Price) -> int:
    """Return the tokens of an image of (width, height), by the rule that OpenAI publishes for GPT-4o.

    detail="low" is the base alone. Otherwise the image is scaled down to fit 2048x2048, then to a short side of 768, and
    each tile of 512x512 that it takes to cover it is added. "auto" is counted as "high", the most it can be.
    """
    if detail == "low":
        return price.image_base
    width, height = scaled(size, 2048)
    shrink = min(1, 768 / min(width, height))
    tiles = math.ceil(round(width * shrink) / 512) * math.ceil(round(height * shrink) / 512)
    return price.image_base + price.image_tile * tiles


def scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return a size of the same shape whose longer side has at most so many pixels."""
    shrink = min(1, longest / max(size))
    return tuple(max(1, round(side * shrink)) for side in size)
