"""In the report's third ablation words that matter weigh more, and the hidden states are pooled by these weights.

    caption        a   rhododendron          in   Venice
    matters            TF-IDF                     a named entity
    token   start  a   rho  dod  end  ron    in   venice          end   padding …
    weight  1      1   1.5  1.5  1.5  1.5    1    1.5             1     0          and these divided by their sum

The report leaves some things open. They are read here as follows:

- A word matters if any source names it; `taco_nb.text.keyword_sources` says when TF-IDF does.
- The report takes stop words out of TF-IDF. Here they never matter, whether inside a named entity ("Statue of Liberty")
  or as one ("two"). They still weigh 1, like every word that does not matter: to drop their tokens from the sum would be
  a second change beside the weight of 1.5. The list is scikit-learn's, which has "fire", "side", "top" and "bottom" too.
- A word that no training caption had gets no score, so it weighs 1 unless another source names it.
- Start-of-text and end-of-text are real tokens; the state at the end is CLIP's own summary of the caption. They spell no
  word that could matter, so they weigh 1. An empty caption therefore has weights as well: one half each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.text.clip import TextTower
from taco_nb.text.keyword_sources import Entities, Source, TfIdf
from taco_nb.text.tokens import caption_list

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
WORD = re.compile(r"\w+|[^\w\s]+")  # letters and digits, or what stands between them: punctuation, emoji


class Word(NamedTuple):
    """This is a word of a caption, `caption[start:end]`, or a run of punctuation or emoji."""

    text: str
    start: int
    end: int
    weight: float
    """`keyword_weight` if the word matters, else 1."""
    why: str
    """The grounds on which it matters: "tfidf", "entity", "llm", or several joined by "+"; "" if it does not matter."""


class KeywordWeights:
    """Words and tokens are weighted by what matters in a caption: TF-IDF, named entities, a language model.

    A word that any of the `sources` names matters, and weighs `keyword_weight`: a number above 0, 1.5 in the report. Every
    other word weighs 1. Raises `SettingError` without a source, or for another weight.
    """

    def __init__(self, sources: Sequence[Source], keyword_weight: float = 1.5):
        if not 1 <= len(sources) <= 8:  # a byte has a bit for each, see `_known`
            raise SettingError(f"Keyword weights need one to eight sources of keywords, not {len(sources)}.")
        number = isinstance(keyword_weight, (int, float)) and not isinstance(keyword_weight, bool)
        if not number or not 0 < keyword_weight < math.inf:
            raise SettingError(f"keyword_weight must be a number above 0, but is {keyword_weight!r}.")
        self.sources = list(sources)
        self.keyword_weight = float(keyword_weight)
        # What the sources said, since training meets every caption once an epoch. MS-COCO has 414,113 of them, so each
        # takes a byte per word, in which bit i is set if source i named the word.
        self._known: dict[str, bytes] = {}

    @classmethod
    def fit(
        cls,
        captions: Iterable[str],
        sources: str | Sequence[str | Source] = "tfidf+en_core_web_sm",
        keyword_weight: float = 1.5,
    ) -> KeywordWeights:
        """Return keyword weights whose TF-IDF is fitted on the training captions, an iterable that is read once.

        `sources` are names joined by "+": "tfidf", a spaCy model or "rules" (see `Entities`); or a sequence of names and
        of sources such as `ChatKeywords`. Raises `SettingError` for an unknown source, a bad weight or a caption that is
        not a string, `DataError` if the captions hold no word to count, and `MissingWeightsError`, before it reads a
        caption, if the spaCy model is not on this machine.
        """
        names = sources.split("+") if isinstance(sources, str) else sources
        others = {name: name if callable(name) else Entities(name) for name in names if name != "tfidf"}
        for source in others.values():
            source([])  # loads what the source needs, or raises
        found = [others[name] if name in others else TfIdf.fit(captions) for name in names]
        return cls(found, keyword_weight)

    def __repr__(self) -> str:
        return f"KeywordWeights({' + '.join(source.name for source in self.sources)}, weight {self.keyword_weight:g})"

    def words(self, caption: str) -> list[Word]:
        """Return the words of a caption in order, punctuation included, with their weights and why they have them."""
        return self._words(caption_list([caption]))[0]

    def token_weights(self, captions: str | Iterable[str], tower: TextTower) -> Tensor:
        """Return a weight per position of the tower: that of the word that its token spells, or spells a piece of.

        The weights (B, tower.length), float32, on the CPU, are 0 at padding and sum to 1 over each caption's real tokens.
        Every piece of a word has the whole weight of the word, whether or not truncation cut other pieces off. A single
        string counts as one caption. Raises `SettingError` without a caption, or for one that is not a string.
        """
        captions, rows = caption_list(captions), []
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
        # spaCy takes plain text only, and no caption that knows its tokens.
        new = [str(caption) for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            for caption, *ranges in zip(new, *(source(new) for source in self.sources)):
                self._known[caption] = bytes(_named_by(match, ranges) for match in WORD.finditer(caption))
        return [
            [self._word(match, bits) for match, bits in zip(WORD.finditer(caption), self._known[caption])]
            for caption in captions
        ]

    def _word(self, match: re.Match, bits: int) -> Word:
        why = dict.fromkeys(source.why for i, source in enumerate(self.sources) if bits >> i & 1)
        return Word(match[0], *match.span(), self.keyword_weight if why else 1.0, "+".join(why))

    def to_json(self) -> str:
        """Return all that decides the weights, to be saved with a run: the settings, and each source's `record()`."""
        records = [source.record() for source in self.sources]
        saved = {"format": FORMAT, "keyword_weight": self.keyword_weight, "sources": records}
        return json.dumps(saved, indent=1)

    @classmethod
    def from_json(cls, text: str, sources: Sequence[Source] = ()) -> KeywordWeights:
        """Return the keyword weights of which `to_json` gave `text`.

        `sources` are those of the saved sources that a text cannot hold, such as a `ChatKeywords` with its answers.
        Raises `SettingError` if one of them is not given, and `CheckpointError` if the text is damaged or of another
        version of this format.
        """
        try:
            saved = json.loads(text)
            if saved["format"] != FORMAT:
                raise CheckpointError(
                    f"The keyword weights were saved in version {saved['format']!r} of their format; this program reads "
                    f"version {FORMAT}. Use the program they were saved with, or fit them again."
                )
            loaded = [_source_of(record, sources) for record in saved["sources"]]
            return cls(loaded, saved["keyword_weight"])
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise CheckpointError(f"Saved keyword weights are damaged ({error!r}). Fit them again.") from None


def words_by_source(captions: Sequence[str], sources: Sequence[Source]) -> pd.DataFrame:
    """Return which words of each caption every source names: a row per caption, and a column per source by its name.

    The columns `caption` and `agree` say of which caption, and whether all sources name the same words. Words are those
    that `KeywordWeights` would weigh more, so a stop word inside a name ("the Summer Palace") makes no difference.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = [{"caption": caption} for caption in captions]
    for source in sources:
        for row, words in zip(rows, KeywordWeights([source])._words(caption_list(captions))):
            row[source.name] = " ".join(word.text for word in words if word.why)
    names = [source.name for source in sources]
    return pd.DataFrame(
        [{**row, "agree": len({row[name] for name in names}) == 1} for row in rows],
        columns=["caption", *names, "agree"],
    )


def pool(hidden: Tensor, weights: Tensor, mode: str) -> Tensor:
    """Weigh the hidden states (B, T, D) of a text tower, each first scaled to Euclidean length 1, as the report does.

    `weights` (B, T) come from `KeywordWeights.token_weights`. The mode "keywords" sums over tokens, to (B, 1, D);
    "keywords-tokens" keeps one weighted vector per token, (B, T, D), 0 at padding. The result has the type and device of
    `hidden`. Raises `SettingError` for another mode, or shapes that do not belong together.
    """
    if mode not in ("keywords", "keywords-tokens"):
        raise SettingError(f'Weighted pooling is "keywords" or "keywords-tokens", not {mode!r}.')
    if hidden.ndim != 3 or weights.shape != hidden.shape[:2]:
        raise SettingError(
            f"Hidden states {tuple(hidden.shape)} and weights {tuple(weights.shape)} do not fit: they must be (B, T, D) "
            "and (B, T)."
        )
    weighted = functional.normalize(hidden, dim=-1) * weights.to(hidden)[..., None]
    return weighted.sum(dim=1, keepdim=True) if mode == "keywords" else weighted


def _source_of(record: dict[str, Any], sources: Sequence[Source]) -> Source:
    """Return the source that saved this record: one of those given, or a new one made from it."""
    for source in sources:
        if source.record() == record:
            return source
    if record["source"] == "tfidf":
        return TfIdf(record["idf"])
    if record["source"] == "entities":
        return Entities(record["model"])
    settings = {name: value for name, value in record.items() if isinstance(value, str)}
    raise SettingError(
        f"The keywords came from {settings}, which a text cannot hold. Give the source itself, with the same settings, "
        "as from_json(text, sources=[…])."
    )


def _named_by(match: re.Match, ranges: Sequence[list[tuple[int, int]]]) -> int:
    """Return a bit per source, set if one of its ranges touches the word; no bit is set for a stop word."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    if match[0].lower() in ENGLISH_STOP_WORDS:
        return 0
    start, end = match.span()
    return sum(1 << i for i, named in enumerate(ranges) if any(a < end and start < b for a, b in named))
