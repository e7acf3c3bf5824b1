"""Which words of a caption matter: TF-IDF, named entities, and a language model, each saying so of stretches of text.

A source is called with captions and answers for each with the character ranges that matter in it. `why` says in one
word on what grounds, `name` says it to a reader, `record()` is what a run saves of it. What weight follows from this is
`taco_nb.text.keywords`' to say, not the sources'.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from taco_nb.errors import CheckpointError, DataError, MissingWeightsError, SettingError

if TYPE_CHECKING:
    from spacy.language import Language

TERM = re.compile(r"(?u)\b\w\w+\b")  # scikit-learn's notion of a word: two or more letters or digits
RULES = "rules"

# Names that are also common words ("turkey", "china", "apple") are left out: captions are often lower case throughout.
GAZETTEER = {
    "GPE": "afghanistan, africa, america, amsterdam, antarctica, argentina, asia, australia, barcelona, beijing, berlin, "
    "boston, brazil, california, canada, chicago, cuba, egypt, england, europe, florida, france, germany, hawaii, hong "
    "kong, india, ireland, istanbul, italy, japan, kenya, las vegas, london, los angeles, madrid, mexico, morocco, moscow, "
    "nepal, netherlands, new york, new york city, new zealand, norway, paris, peru, portugal, rome, russia, san "
    "francisco, scotland, seattle, shanghai, south africa, spain, sweden, switzerland, sydney, texas, thailand, tokyo, "
    "united kingdom, united states, venice, vietnam, washington",
    "FAC": "big ben, eiffel tower, golden gate bridge, statue of liberty, taj mahal, times square",
    "ORG": "adidas, bmw, boeing, british airways, burger king, coca-cola, disney, facebook, ferrari, google, "
    "harley-davidson, honda, ikea, lego, mcdonald's, mercedes, microsoft, nasa, nike, nintendo, nokia, pepsi, samsung, "
    "sony, spacex, starbucks, toyota, volkswagen, yamaha",
    "EVENT": "christmas, easter, halloween, thanksgiving, valentine's day",
}


class Source(Protocol):
    """What `KeywordWeights` asks of anything that finds keywords."""

    name: str
    why: str

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        """For each caption the (start, end) of the stretches that matter, in any order."""

    def record(self) -> dict[str, Any]:
        """What a run saves: enough to know the source again, in JSON's types."""


class TfIdf:
    """Words that are frequent in their caption and rare in the training captions, scored as scikit-learn does.

    `idf` maps the words of the training captions, lower case and without stop words, to ln((1 + n) / (1 + df)) + 1:
    n captions, df of them with the word. `fit` makes it; raises `CheckpointError` for something else.
    """

    why = "tfidf"

    def __init__(self, idf: dict[str, float]):
        if not isinstance(idf, dict) or not all(
            isinstance(v, float) and 1 <= v < math.inf for v in idf.values()
        ):
            raise CheckpointError(
                "The table of TF-IDF is damaged: it must map words to numbers from 1. Fit it again on the training captions."
            )
        self.idf = idf

    @property
    def name(self) -> str:
        return f"TF-IDF ({len(self.idf):,} words)"

    @classmethod
    def fit(cls, captions: Iterable[str]) -> TfIdf:
        """Count words over captions, which may be any iterable and are read once.

        Raises `SettingError` for something other than strings, `DataError` if no word is left to count.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(stop_words="english", token_pattern=TERM.pattern)
        try:
            vectorizer.fit(_strings(captions))
        except SettingError:
            raise
        except ValueError:
            raise DataError(
                "TF-IDF has nothing to count: there are no training captions, or they hold nothing but stop words. "
                "Fit it on the captions of the training set."
            ) from None
        return cls(dict(zip(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_.tolist())))

    def scores(self, caption: str) -> dict[str, float]:
        """TF-IDF of a caption's words, of Euclidean length 1, as scikit-learn's `transform` gives it.

        Stop words, single letters and words that no training caption had get no score.
        """
        counts = Counter(term for term in map(str.lower, TERM.findall(caption)) if term in self.idf)
        scores = {term: count * self.idf[term] for term, count in counts.items()}
        length = math.hypot(*scores.values())
        return {term: score / length for term, score in scores.items()}

    def keywords(self, caption: str) -> set[str]:
        """The words whose score is at least the mean score of the caption's words.

        This is our reading: the report does not say when a score makes a word matter. It needs no threshold to tune,
        is independent of the caption's length, and lets a caption's only scored word matter.
        """
        scores = self.scores(caption)
        mean = math.fsum(scores.values()) / max(len(scores), 1)
        return {
            term for term, score in scores.items() if score >= mean * (1 - 1e-9)
        }  # equal but for rounding counts

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        ranges = []
        for caption in captions:
            keywords = self.keywords(caption)
            ranges.append([term.span() for term in TERM.finditer(caption) if term[0].lower() in keywords])
        return ranges

    def record(self) -> dict[str, Any]:
        return {"source": "tfidf", "idf": self.idf}


class Entities:
    """Named entities by spaCy, loaded when the first caption is asked about.

    `model` is the name of an installed spaCy model, "en_core_web_sm" being the report's, or "rules": a few patterns on
    a blank pipeline, for where no model is at hand, and called rule-based wherever its name is shown. The trained model
    goes by capitals too: of an all lower-case caption it names little.

    Raises `SettingError` for something that is no name of a model, and, once called, `MissingWeightsError` if the model
    is not on this machine.
    """

    why = "entity"

    def __init__(self, model: str = "en_core_web_sm"):
        if model != RULES and not re.fullmatch(r"[a-z]{2,3}_\w+_(sm|md|lg|trf)", str(model)):
            raise SettingError(
                f'There is no source of keywords {model!r}: choose among "tfidf", "rules" and the name of a spaCy model '
                'such as "en_core_web_sm", several joined by "+".'
            )
        self.model = model

    @property
    def name(self) -> str:
        return "rule-based entities, no trained model" if self.model == RULES else f"spaCy {self.model}"

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        pipeline = _rules() if self.model == RULES else _model(self.model)
        texts = map(_without_title_case, captions) if self.model == RULES else captions
        return [
            [(entity.start_char, entity.end_char) for entity in text.ents] for text in pipeline.pipe(texts)
        ]

    def record(self) -> dict[str, Any]:
        return {"source": "entities", "model": self.model}


@lru_cache(maxsize=2)
def _model(name: str) -> Language:
    import spacy

    try:
        # Entities need none of these, which are most of the work.
        return spacy.load(name, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer"])
    except OSError:
        raise MissingWeightsError(
            f"The spaCy model {name} is not on this machine{' (12 MB)' * (name == 'en_core_web_sm')}. Get it with "
            f"`python -m spacy download {name}`, or install its wheel from "
            "https://github.com/explosion/spacy-models/releases. Without it, choose "
            '"rules", a small rule-based stand-in.'
        ) from None


@lru_cache(maxsize=1)
def _rules() -> Language:
    """Known names in any case, runs of capitalised words inside a sentence, and numbers."""
    import spacy

    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    ruler = pipeline.add_pipe("entity_ruler", config={"phrase_matcher_attr": "LOWER"})
    ruler.add_patterns(
        [
            {"label": label, "pattern": name}
            for label, names in GAZETTEER.items()
            for name in names.split(", ")
        ]
    )
    name = {"IS_TITLE": True, "IS_SENT_START": False, "LENGTH": {">": 1}}
    ruler.add_patterns([{"label": "NAME", "pattern": [name | {"OP": "+"}]}])
    ruler.add_patterns([{"label": "CARDINAL", "pattern": [{"LIKE_NUM": True}]}])
    return pipeline


def _without_title_case(caption: str) -> str:
    """A Caption Like This, or LIKE THIS, in lower case, its length unchanged: capitals name nothing in it."""
    words = TERM.findall(caption)
    if sum(word[0].isupper() for word in words) <= len(words) / 2:
        return caption
    return "".join(character.lower()[0] for character in caption)


def _strings(captions: Iterable[str]) -> Iterable[str]:
    if isinstance(captions, str):
        raise SettingError("Training captions are a collection of strings, not one string.")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise SettingError(f"Training caption {index} must be a string, but is {caption!r}.")
        yield caption
