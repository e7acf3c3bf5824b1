"""Keywords that a language model chose are read from a file of answers.

This module only reads. `taco_nb.tools.captions.ask_keywords` and the command `taco-nb keywords` ask the model, once per
caption, which costs money.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taco_nb.errors import DataError
from taco_nb.files import data_root
from taco_nb.text.answers import Answers, Question, answer_key

PROMPT = (
    "You are given the caption of a picture. Name the words of the caption that matter most for what the picture looks "
    "like. Reply with these words only, spelled as in the caption and separated by commas."
)


def chat_keywords(data_dir: str | os.PathLike | None = None) -> ChatKeywords:
    """Return the source called "llm" in `keyword_sources`: the answers in chat_keywords.sqlite of the data folder."""
    return ChatKeywords(data_root(data_dir) / "chat_keywords.sqlite")


class ChatKeywords:
    """This source of keywords for `KeywordWeights` is a chat model's choice, looked up in the file of answers `path`.

    `model` and `prompt` say which answers. Temperature is 0, so that asking again would change little.
    """

    why = "llm"

    def __init__(self, path: str | os.PathLike, model: str = "gpt-4o-2024-11-20", prompt: str = PROMPT):
        self.path = Path(path)
        self.question = Question(model, prompt, 0.0)

    @property
    def name(self) -> str:
        return f"words chosen by {self.question.model}"

    def record(self) -> dict[str, Any]:
        return {"source": "llm", "model": self.question.model, "prompt": self.question.prompt}

    def key(self, caption: str) -> str:
        """Return the key under which the answer about a caption is kept."""
        digest = hashlib.sha256(b"caption:" + caption.encode(errors="surrogatepass")).hexdigest()
        return answer_key(digest[:40], self.question)

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return for each caption the places of the words that the model chose.

        Raises `DataError` for captions that it was never asked about.
        """
        return [_places(caption, words)[0] for caption, words in self._chosen(captions)]

    def ignored(self, captions: Sequence[str]) -> list[str]:
        """Return the words that the model named although their caption does not have them. They count for nothing."""
        return [word for caption, words in self._chosen(captions) for word in _places(caption, words)[1]]

    def _chosen(self, captions: Sequence[str]) -> list[tuple[str, list[str]]]:
        """Return each caption with the words in its answer. An answer that failed holds none, nor does a blank caption."""
        keys = {caption: self.key(caption) for caption in captions if caption.strip()}
        found = {}
        if keys and self.path.exists():  # reading creates no file
            with Answers(self.path) as answers:
                found = answers.get(keys.values())
        if unknown := [caption for caption, key in keys.items() if key not in found]:
            raise DataError(
                f"{self.path} has no keywords by {self.question.model} for {len(unknown):,} of {len(captions):,} "
                f"captions, such as {unknown[0]!r}. Have them chosen first: `taco-nb keywords --help`, or "
                "ask_keywords(…, confirm=True) of taco_nb.tools.captions."
            )
        chosen = []
        for caption in captions:
            answer = found.get(keys.get(caption))
            words = re.split(r"[,;\n]", answer.text) if answer and not answer.failure else []
            words = [word.strip(" \t\r.*-•\"'`“”‘’[]") for word in words]
            chosen.append((caption, [word for word in words if word]))
        return chosen


def _places(caption: str, words: Iterable[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return every place of the words in the caption, whole and in whatever case, and the words that have none."""
    places, ignored = [], []
    for word in words:
        pattern = r"\s+".join(map(re.escape, word.split()))
        found = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", caption, re.IGNORECASE)]
        places += found
        ignored += [] if found else [word]
    return places, ignored
