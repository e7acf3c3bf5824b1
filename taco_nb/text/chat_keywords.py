"""Keywords chosen by a language model, over any API that speaks OpenAI's, each caption asked about once.

Asking costs money, so nothing here asks by itself: `ask` does, and only when told to. What was answered lies in a file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from taco_nb.errors import DataError
from taco_nb.files import data_root
from taco_nb.text.tokens import caption_list
from taco_nb.tools.captions.cache import Answer, CaptionCache, answer_key
from taco_nb.tools.captions.captioner import Estimate, Task
from taco_nb.tools.captions.openai_captioner import OpenAICaptioner

PROMPT = (
    "You are given the caption of a picture. Name the words of the caption that matter most for what the picture looks "
    "like. Reply with these words only, spelled as in the caption and separated by commas."
)


def chat_keywords(data_dir: str | os.PathLike | None = None) -> ChatKeywords:
    """The source called "llm" in an experiment's `keyword_sources`: answers in the data folder's chat_keywords.jsonl."""
    return ChatKeywords(data_root(data_dir) / "chat_keywords.jsonl")


class ChatKeywords:
    """A source of keywords for `KeywordWeights`: a chat model's choice, read from a cache file that `ask` fills.

    Args:
        cache: file of answers by caption, model and prompt, see `CaptionCache`; created where absent.
        model, prompt: what is asked. Temperature is 0, so that asking again would change little.
        base_url: an OpenAI-compatible server; None for `OPENAI_BASE_URL`, or else OpenAI's own.

    Raises:
        SettingError: `base_url` is no address.
    """

    why = "llm"

    def __init__(
        self,
        cache: str | os.PathLike,
        model: str = "gpt-4o-2024-11-20",
        prompt: str = PROMPT,
        base_url: str | None = None,
    ):
        self.cache = cache
        self._asker = _Asker(
            cache=cache, model=model, prompt=prompt, base_url=base_url, temperature=0.0, max_tokens=256,
            expected_tokens=20,
        )  # fmt: skip
        self._answers: dict[str, Answer] = {}

    @property
    def name(self) -> str:
        return f"words chosen by {self._asker.model}"

    def record(self) -> dict[str, Any]:
        return {"source": "llm", "model": self._asker.model, "prompt": self._asker.prompt}

    def ask(self, captions: str | Iterable[str], confirm: bool = False) -> None:
        """Ask about the captions that the cache has no answer to; print how many these are, and stop there unless told.

        Answers are on disk as they come in: asking again after a crash goes on from there. Refusals and other answers
        without words are kept and counted, and not asked again: their captions have no keywords.

        Args:
            captions: as many as there are; those that occur twice are asked about once.
            confirm: True to send the requests, which may cost money. The key is taken from `OPENAI_API_KEY`.

        Raises:
            SettingError: captions that are no strings, or no key in `OPENAI_API_KEY`.
            ServiceError: the server cannot be reached or refuses to work.
            DataError: the cache file is damaged or in use.
        """
        captions = list(dict.fromkeys(caption_list(captions)))
        with CaptionCache(self.cache) as cache:
            self._load(captions, cache)
            new = {self._key(caption): caption for caption in captions if caption not in self._answers}
            cost = self._asker.estimate(new.values()) if new else "nothing to ask"
            print(
                f"{len(captions):,} captions, {len(captions) - len(new):,} of them answered in {self.cache}; {cost}."
            )
            if new and not confirm:
                print("Nothing was sent: ask(captions, confirm=True) sends the requests, and pays.")
                return
            reasons = self._asker.send(new, cache) if new else {}
            self._load(captions, cache)
        answered = [caption for caption in captions if caption in self._answers]
        failed = sum(self._answers[caption].failure is not None for caption in answered)
        print(
            f"{len(answered):,} answers, {failed:,} of them without words; "
            f"{len(self.ignored(answered)):,} words ignored that are not in their caption."
        )
        if reasons:
            print(
                f"{len(reasons):,} captions got no answer; ask again. The last reason: {[*reasons.values()][-1]}."
            )

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where the caption has the words that the model chose. Raises `DataError` for captions never asked about."""
        return [_places(caption, words)[0] for caption, words in zip(captions, self._words(captions))]

    def ignored(self, captions: Sequence[str]) -> list[str]:
        """The words that the model named although their caption does not hold them, and that therefore count nothing."""
        chosen = zip(captions, self._words(captions))
        return [word for caption, words in chosen for word in _places(caption, words)[1]]

    def _words(self, captions: Sequence[str]) -> Iterator[list[str]]:
        if any(caption not in self._answers for caption in captions):
            with CaptionCache(self.cache) as cache:
                self._load(captions, cache)
        unknown = [caption for caption in captions if caption not in self._answers]
        if unknown:
            raise DataError(
                f"{self.cache} has no keywords by {self._asker.model} for {len(unknown):,} of {len(captions):,} "
                f"captions, such as {unknown[0]!r}. Have them chosen first: ChatKeywords(…).ask(captions, confirm=True)."
            )
        for answer in map(self._answers.__getitem__, captions):
            words = re.split(r"[,;\n]", "" if answer.failure else answer.text)
            yield [word for word in (word.strip(" \t\r.*-•\"'`“”‘’[]") for word in words) if word]

    def _load(self, captions: Iterable[str], cache: CaptionCache) -> None:
        for caption in captions:
            key = self._key(caption)
            if caption not in self._answers and (cache.has_caption(key) or cache.has_failed(key)):
                self._answers[caption] = cache[key]

    def _key(self, caption: str) -> str:
        digest = hashlib.sha256(b"caption:" + caption.encode(errors="surrogatepass")).hexdigest()
        return answer_key(digest[:40], self._asker.question, 0)


class _Captions(NamedTuple):
    """What `_Asker` asks about, in the place of a captioner's data set."""

    name: str
    by_key: dict[str, str]


@dataclass(kw_only=True)
class _Asker(OpenAICaptioner):
    """The captioner's way of asking (concurrent, retried, every answer saved at once), with a caption for an image."""

    def send(self, by_key: dict[str, str], cache: CaptionCache) -> dict[str, str]:
        """Bring answers into the cache; by key, why there is none where there is none."""
        cache.note(self.question)
        return self._ask(_Captions(os.fspath(self.cache), by_key), [Task(0, (0, 0), tuple(by_key))], cache)

    def estimate(self, captions: Iterable[str]) -> Estimate:
        """Roughly: a token is about four characters, the messages around them ten."""
        inputs = [10 + math.ceil((len(self.prompt) + len(caption)) / 4) for caption in captions]
        tokens = sum(inputs), len(inputs) * self.expected_tokens
        source = price.source if (price := self._known_price()) else f"no price is known for {self.model}"
        return Estimate(len(inputs), *tokens, self._dollars(*tokens), source)

    def _requests(self, dataset: _Captions, tasks: Iterable[Task]) -> Iterator[tuple[str, dict[str, Any]]]:
        for key in (key for task in tasks for key in task.keys):
            body = {
                "model": self.model,
                "temperature": self.temperature,
                "max_completion_tokens": self.max_tokens,
                "messages": [
                    {"role": "system", "content": self.prompt},
                    {"role": "user", "content": dataset.by_key[key]},
                ],
            }
            yield key, body


def _places(caption: str, words: Iterable[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Every place of the words in the caption, whole and in whatever case, and the words that have none."""
    places, ignored = [], []
    for word in words:
        pattern = r"\s+".join(map(re.escape, word.split()))
        found = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", caption, re.IGNORECASE)]
        places += found
        ignored += [] if found else [word]
    return places, ignored
