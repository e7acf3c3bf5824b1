"""The report's third ablation: words that matter weigh more, and the hidden states are pooled by these weights.

    caption        a   rhododendron          in   Venice
    matters            TF-IDF                     a named entity
    token   start  a   rho  dod  end  ron    in   venice          end   padding …
    weight  1      1   1.5  1.5  1.5  1.5    1    1.5             1     0          and these divided by their sum

What the report leaves open, and how it is read here:

- A word matters if any source names it; see `taco_nb.text.keyword_sources` for when TF-IDF does.
- "Stop words out": they are no words of TF-IDF, and never matter, within a named entity ("Statue of Liberty") or as one
  ("two") either. They weigh 1 like every word that does not matter; to drop their tokens from the sum would be a second
  change beside the weight of 1.5. The list is scikit-learn's, which also has "fire", "side", "top" and "bottom".
- A word that no training caption had gets no score, so it weighs 1 unless another source names it.
- Start-of-text and end-of-text are real tokens, the end's state being CLIP's own summary of the caption. They spell no
  word that could matter and weigh 1. So the weights of an empty caption are defined too: one half each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.text.clip import TextTower, _check_captions
from taco_nb.text.keyword_sources import Entities, Source, TfIdf

FORMAT = 1
WORD = re.compile(r"\w+|[^\w\s]+")  # letters and digits, or what stands between them: punctuation, emoji


class Word(NamedTuple):
    """A word of a caption, `caption[start:end]`, or a run of punctuation or emoji."""

    text: str
    start: int
    end: int
    weight: float
    """`keyword_weight` if it matters, else 1."""
    why: str
    """On what grounds it matters: "tfidf", "entity", "llm", several joined by "+"; "" if it does not."""


class KeywordWeights:
    """Weights of words and tokens by what matters in a caption: TF-IDF, named entities, a language model.

    What the sources say of a caption is kept, since training meets every caption once an epoch.

    Args:
        sources: what finds keywords; a word that any of them names matters.
        keyword_weight: weight of a word that matters, above 0; the report's is 1.5. Every other word weighs 1.

    Raises:
        SettingError: no source, or a weight out of range.
    """

    def __init__(self, sources: Sequence[Source], keyword_weight: float = 1.5):
        if not 1 <= len(sources) <= 8:
            raise SettingError(
                f"Keyword weights need one to eight sources of keywords, but got {len(sources)}."
            )
        number = isinstance(keyword_weight, (int, float)) and not isinstance(keyword_weight, bool)
        if not number or not 0 < keyword_weight < math.inf:
            raise SettingError(f"keyword_weight must be a number above 0, but is {keyword_weight!r}.")
        self.sources = list(sources)
        self.keyword_weight = float(keyword_weight)
        self._known: dict[
            str, bytes
        ] = {}  # caption -> a byte per word, bit i set where source i names the word

    @classmethod
    def fit(
        cls,
        captions: Iterable[str],
        sources: str | Sequence[str | Source] = "tfidf+en_core_web_sm",
        keyword_weight: float = 1.5,
    ) -> KeywordWeights:
        """Keyword weights with TF-IDF fitted on the training captions.

        Args:
            captions: any iterable of strings, read once; the other sources need none.
            sources: names joined by "+": "tfidf", a spaCy model or "rules" (see `Entities`); or a sequence of names and
                of sources such as `ChatKeywords`.
            keyword_weight: as above.

        Raises:
            SettingError: an unknown source, a bad weight, captions that are no strings.
            DataError: no word to count.
            MissingWeightsError: the spaCy model is not on this machine; before anything is read.
        """
        names = sources.split("+") if isinstance(sources, str) else sources
        others = {name: name if callable(name) else Entities(name) for name in names if name != "tfidf"}
        for source in others.values():
            source([])  # loads what it needs
        return cls(
            [others[name] if name in others else TfIdf.fit(captions) for name in names], keyword_weight
        )

    def __repr__(self) -> str:
        return f"KeywordWeights({' + '.join(source.name for source in self.sources)}, weight {self.keyword_weight:g})"

    def words(self, caption: str) -> list[Word]:
        """The words of a caption in order, punctuation included, with their weights and why."""
        return self._words(_check_captions([caption]))[0]

    def token_weights(self, captions: str | Iterable[str], tower: TextTower) -> Tensor:
        """A weight per position of the tower: that of the word that its token spells, or spells a piece of.

        Args:
            captions: several captions, or a single string, which counts as one caption.
            tower: cuts them into tokens.

        Returns:
            Weights (B, tower.length), float32, on the CPU: 0 at padding, summing to 1 over each caption's real tokens.
            The pieces of a word weigh what it weighs, each of them; so do those that truncation leaves of it.

        Raises:
            SettingError: there is no caption, or one is not a string.
        """
        captions, rows = _check_captions(captions), []
        for caption, words in zip(captions, self._words(captions)):
            keywords = [word for word in words if word.why]
            rows.append([self._token_weight(span, keywords) for span in tower.spans(caption)])
        weights = torch.tensor(rows)
        return weights / weights.sum(dim=1, keepdim=True)

    def _token_weight(self, span: tuple[int, int] | None, keywords: list[Word]) -> float:
        if span is None:
            return 0.0
        start, end = span
        return self.keyword_weight if any(word.start < end and start < word.end for word in keywords) else 1.0

    def _words(self, captions: Sequence[str]) -> list[list[Word]]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            for caption, *ranges in zip(new, *(source(new) for source in self.sources)):
                self._known[caption] = bytes(_named(match, ranges) for match in WORD.finditer(caption))
        return [
            [self._word(match, named) for match, named in zip(WORD.finditer(caption), self._known[caption])]
            for caption in captions
        ]

    def _word(self, match: re.Match, named: int) -> Word:
        why = dict.fromkeys(source.why for bit, source in enumerate(self.sources) if named >> bit & 1)
        return Word(match[0], *match.span(), self.keyword_weight if why else 1.0, "+".join(why))

    def to_json(self) -> str:
        """Everything that decides the weights, to be saved with a run: settings, and per source its `record()`."""
        records = [source.record() for source in self.sources]
        return json.dumps(
            {"format": FORMAT, "keyword_weight": self.keyword_weight, "sources": records}, indent=1
        )

    @classmethod
    def from_json(cls, text: str, sources: Sequence[Source] = ()) -> KeywordWeights:
        """The inverse of `to_json`.

        Args:
            text: what `to_json` gave.
            sources: those that a text cannot hold, such as a `ChatKeywords` with its cache; the ones that were saved.

        Raises:
            CheckpointError: the text is damaged or of another version of this format.
            SettingError: a source that was saved must be given in `sources`, and is not.
        """
        try:
            saved = json.loads(text)
            if saved["format"] != FORMAT:
                raise CheckpointError(
                    f"The keyword weights were saved in version {saved['format']!r} of their format; this program reads "
                    f"version {FORMAT}. Use the program they were saved with, or fit them again."
                )
            loaded = [_load(record, sources) for record in saved["sources"]]
            return cls(loaded, saved["keyword_weight"])
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"The saved keyword weights are damaged ({error!r}). Fit them again."
            ) from None


def pool(hidden: Tensor, weights: Tensor, mode: str) -> Tensor:
    """Weigh hidden states, each first scaled to Euclidean length 1, as the report does.

    Args:
        hidden: (B, T, D), the states of a text tower.
        weights: (B, T), from `KeywordWeights.token_weights`.
        mode: "keywords" sums over tokens; "keywords-tokens" keeps one weighted vector per token, 0 at padding.

    Returns:
        (B, 1, D) or (B, T, D), of `hidden`'s type and on its device.

    Raises:
        SettingError: another mode, or shapes that do not belong together.
    """
    if mode not in ("keywords", "keywords-tokens"):
        raise SettingError(f'Weighted pooling is "keywords" or "keywords-tokens", not {mode!r}.')
    if hidden.ndim != 3 or weights.shape != hidden.shape[:2]:
        raise SettingError(
            f"Hidden states {tuple(hidden.shape)} and weights {tuple(weights.shape)} do not fit: (B, T, D) and (B, T)."
        )
    weighted = functional.normalize(hidden, dim=-1) * weights.to(hidden)[..., None]
    return weighted.sum(dim=1, keepdim=True) if mode == "keywords" else weighted


def _load(record: dict[str, Any], sources: Sequence[Source]) -> Source:
    """The source that a record is of: one of those given, or made anew."""
    for source in sources:
        if source.record() == record:
            return source
    if record["source"] == "tfidf":
        return TfIdf(record["idf"])
    if record["source"] == "entities":
        return Entities(record["model"])
    settings = {name: value for name, value in record.items() if isinstance(value, str)}
    raise SettingError(
        f"The keywords came from {settings}, which a text cannot hold: give the source itself, with these very settings, "
        "as from_json(text, sources=[…])."
    )


def _named(match: re.Match, ranges: Sequence[list[tuple[int, int]]]) -> int:
    """A bit per source, set if one of its ranges touches the word; none for a stop word."""
    if match[0].lower() in _stop_words():
        return 0
    start, end = match.span()
    return sum(1 << bit for bit, named in enumerate(ranges) if any(a < end and start < b for a, b in named))


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS
