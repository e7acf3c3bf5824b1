"""Captions by a vision model behind OpenAI's chat API, one request per caption, several at a time."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taco_nb.data.captioned import check_count
from taco_nb.errors import SettingError
from taco_nb.text.answers import Question
from taco_nb.tools.captions.cache import CaptionCache
from taco_nb.tools.captions.captioner import Captioner, Estimate, Picture, count_keys, unanswered
from taco_nb.tools.captions.service import PRICES, STRUCTURE, ChatService, Price

if TYPE_CHECKING:
    from PIL import Image

    from taco_nb.data import CaptionedImages

MODEL = "gpt-4o-2024-11-20"
PROMPT = "Describe the image in detail. Reason about the image. Return the response in paragraph form."
QUALITY = 90
"""Quality of the JPEG that is sent."""


@dataclass(kw_only=True)
class OpenAICaptioner(ChatService, Captioner):
    """Captions by GPT-4o or any model behind a server that speaks OpenAI's chat API; every answer is paid for once.

    The defaults are the report's. For the other settings, the key and the errors see `ChatService`.
    """

    model: str = MODEL
    prompt: str = PROMPT
    detail: str = "auto"
    """How closely the model looks: "low" (a fixed number of tokens), "high" (tiles of 512x512), or "auto"."""
    longest_side: int = 2048
    """Larger images are scaled down to this many pixels before they are sent; GPT-4o itself looks at no more."""
    structured: bool = False
    """Ask for a JSON object with a caption in it, as the API's structured output: a model then refuses in the API's field
    for that, and adds no "Here is a caption:". Off, since the report's model was not asked so. A server that rejects it is
    asked for plain text instead, except in a batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detail not in ("auto", "low", "high"):
            raise SettingError(f'detail must be "auto", "low" or "high", but is {self.detail!r}.')
        check_count(self.longest_side, "longest_side")

    @property
    def question(self) -> Question:
        return Question(self.model, self.prompt, self.temperature)

    def _estimate(self, pictures: list[Picture]) -> Estimate:
        requests = count_keys(pictures)
        # A token is about four characters, and the message around the prompt about ten tokens. Where the model's rule of
        # image tokens is not known, the report's model stands in.
        prompt, price = 10 + math.ceil(len(self.prompt) / 4), self.price or PRICES[MODEL]
        images = sum(
            len(picture.keys) * image_tokens(scaled(picture.size, self.longest_side), self.detail, price)
            for picture in pictures
        )
        return self.estimate(requests, images + requests * prompt)

    def _requests(
        self, dataset: CaptionedImages, pictures: Iterable[Picture]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the key and the request of each caption that is lacking; an image is read when its turn comes."""
        for picture in pictures:
            image = dataset[picture.row].image.resize(scaled(picture.size, self.longest_side))
            content = [
                {"type": "text", "text": self.prompt},
                {"type": "image_url", "image_url": {"url": image_url(image), "detail": self.detail}},
            ]
            body = self.request([{"role": "user", "content": content}])
            if self.structured:
                body["response_format"] = STRUCTURE
            yield from ((key, body) for key in picture.keys)

    def _ask(self, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache) -> dict[str, str]:
        with cache.asking():
            left = unanswered(pictures, cache)  # which another process may have answered in the meantime
            what = f"Captions of {dataset.name}"
            return self.send(self._requests(dataset, left), count_keys(left), what, cache)


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


def image_url(image: Image.Image) -> str:
    """Return the image as a JPEG in a URL, as the API takes it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
