"""Keyword weights: from characters to words to tokens to pooled vectors, and the three sources that say what matters."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from taco_nb.errors import CheckpointError, DataError, MissingWeightsError, SettingError, TacoError
from taco_nb.text import text_tower
from taco_nb.text.keyword_sources import GAZETTEER, Entities, TfIdf
from taco_nb.text.keywords import FORMAT, KeywordWeights, pool
from taco_nb.text.tokens import clip_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAINING = [
    "a red barn in the snow",
    "a man rides a horse past a red barn",
    "a dog on a couch",
    "a dog and a cat on a couch",
    "two dogs play in the snow",
    "a man in front of a snow-covered mountain",
    "a photo of the Golden Gate Bridge in San Francisco",
    "snowboarders carry their snowboards up a hill",
    "it's a dog's life, isn't it?",
]
CAPTIONS = {
    "plain": "a red barn in the snow",
    "punctuation": '  A red barn, in the (deep) snow: "cold"!  ',
    "hyphens": "a snow-covered barn - red",
    "apostrophes": "It's the dog’s barn, isn't it?",
    "emoji": "🐶🌈 a dog 👩\u200d🚀 in the snow ❤️",
    "upper case": "A RED BARN IN THE SNOW",
    "entities": "Two dogs near the Golden Gate Bridge and a Coca-Cola sign in New York",
    "HTML": "black &amp; white snow, caf&eacute;&nbsp;barn",
    "typography": "“ﬁve” red ｂａｒｎｓ\ufeff in snow…",
    "accents": "a cafe\u0301 déjà vu in the snow",
    "capitals that lower case lengthens": "İstanbul, ΟΔΟΣ, STRASSE in the snow",
    "mojibake": "a cafÃ© in the snow",
    "CJK": "红色的 barn 雪の中の赤い納屋",
    "repeated": "snow and snow and a barn and Snow",
    "only stop words": "it is the one in between",
    "never seen": "zebras graze",
    "empty": "",
    "white space": " \n\t ",
    "long": "a red barn in the snow, " * 30,
}


@pytest.fixture(scope="module")
def tower():
    return text_tower("untrained-16", length=38)


@pytest.fixture(scope="module")
def tfidf():
    return KeywordWeights.fit(TRAINING, "tfidf")


@pytest.fixture(scope="module")
def keywords():
    return KeywordWeights.fit(TRAINING, "tfidf+rules")


class Named:
    """A source that names given words, and counts the captions that it is asked about."""

    name, why = "given words", "given"

    def __init__(self, *words):
        self.words = words
        self.asked = []

    def __call__(self, captions):
        self.asked += captions
        return [[m.span() for word in self.words for m in re.finditer(word, caption)] for caption in captions]

    def record(self):
        return {"source": "given", "words": list(self.words)}


def _why(keywords, caption):
    return {word.text: word.why for word in keywords.words(caption) if word.why}


def _pieces(tower, caption):
    """Per real token what the vocabulary has for it."""
    ids, mask = tower.tokenize(caption)
    return [clip_tokenizer().decoder[token] for token in ids[mask].tolist()]


# --- Which characters a token spells ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 7, 77])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_spans_have_a_place_for_every_real_token(kind, length):
    tower, caption = text_tower("untrained-16", length), CAPTIONS[kind]
    spans = tower.spans(caption)
    real = [span for span in spans if span is not None]
    mask = tower.tokenize(caption)[1][0]
    assert len(spans) == length and [span is not None for span in spans] == mask.tolist()
    assert real[0] == (0, 0) and real[-1] == (len(caption), len(caption))
    assert all(start < end for start, end in real[1:-1])
    assert real == sorted(real)


@pytest.mark.parametrize("kind", [kind for kind in CAPTIONS if kind != "capitals that lower case lengthens"])
def test_the_characters_of_a_word_clean_to_its_tokens(kind):
    tower, caption = text_tower("untrained-16", 77), CAPTIONS[kind]
    ids = tower.tokenize(caption)[0][0].tolist()
    word, first = [], None
    for token, span in list(zip(ids, tower.spans(caption)))[1:76]:
        if span is None or span[0] == len(caption):
            break
        word, first = [*word, token], span[0] if first is None else first
        if clip_tokenizer().decoder[token].endswith("</w>"):
            assert (
                clip_tokenizer().clean_fn(caption[first : span[1]]) == clip_tokenizer().decode(word).strip()
            )
            word, first = [], None
    assert not word


@pytest.mark.parametrize(
    "caption, spelled",
    [
        ("the dog’s “red” barn", ["the", "dog", "’s", "“", "red", "”", "barn"]),
        ("black &amp; caf&eacute;&nbsp;bar", ["black", "&amp;", "caf&eacute;", "bar"]),
        ("a  cafe\u0301\n", ["a", "cafe\u0301"]),
        ("İstanbul", ["İ", "İ", "stanbul"]),
        ("ﬁve ｂａｒｎｓ", ["ﬁve", "ｂａｒｎｓ"]),
        ("\0 a&nbsp;dog", ["a", "dog"]),
        ("a cafÃ© by a barn", ["a", "cafÃ©", "by", "a", "barn"]),
        ("👩\u200d🚀", ["👩\u200d", "🚀"]),
        ("<start_of_text> dog </w>", ["<start_of_text>", "dog", "</", "w", ">"]),
    ],
)
def test_spans_are_of_the_caption_as_it_was_given(tower, caption, spelled):
    spans = [span for span in tower.spans(caption) if span is not None]
    assert [caption[start:end] for start, end in spans[1:-1]] == spelled


def test_spans_stay_in_order_and_in_range_for_random_text(tower):
    parts = [*"aİΣß’“&#;<👩🚀一ﬁ", "red", "Ã©", "â€œ", "&amp;", "&nbsp;", "&eacute;"]
    parts += [" ", "\n", "\x1b[36m", "\0", "\x85", "\xa0", "\ufeff", "\u0301", "\u200d", "\ud83d", "\udc36"]
    generator = random.Random(0)
    for _ in range(1000):
        caption = "".join(generator.choices(parts, k=generator.randrange(12)))
        spans = [span for span in tower.spans(caption) if span is not None]
        assert len(spans) == tower.tokenize(caption)[1].sum(), repr(caption)
        assert all(0 <= start < end <= len(caption) for start, end in spans[1:-1]), repr(caption)
        assert spans == sorted(spans), repr(caption)


def test_spans_refuse_what_is_not_a_string(tower):
    with pytest.raises(SettingError, match="must be a string"):
        tower.spans(None)


# --- TF-IDF -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn():
    vectorizer = TfidfVectorizer(stop_words="english").fit(TRAINING)
    source = TfIdf.fit(TRAINING)
    captions = [*TRAINING, *(caption for kind, caption in CAPTIONS.items() if "lengthens" not in kind)]
    words = vectorizer.get_feature_names_out()
    for caption, row in zip(captions, vectorizer.transform(captions)):
        expected = {words[column]: value for column, value in zip(row.indices, row.data)}
        assert source.scores(caption) == pytest.approx(expected, abs=1e-12)
        assert source.keywords(caption) == {
            w for w, score in expected.items() if score >= row.data.mean() - 1e-12
        }


def test_rare_words_matter_more_than_frequent_ones_and_than_unseen_ones(tfidf):
    assert _why(tfidf, "a dog near a mountain and zebras") == {"mountain": "tfidf"}
    assert _why(tfidf, "a dog and zebras") == {"dog": "tfidf"}  # the only word with a score
    assert _why(tfidf, CAPTIONS["never seen"]) == {}


def test_words_of_equal_score_all_matter():
    training = [
        f"{word} {word}s" for word in ("lion", "tiger", "panther", "leopard", "jaguar", "puma", "lynx")
    ]
    source = TfIdf.fit(training)
    for count in range(1, 15):
        assert len(source.keywords(" ".join(" ".join(training).split()[:count]))) == count


def test_repeated_words_all_weigh_the_same(tfidf):
    assert [word.weight for word in tfidf.words(CAPTIONS["repeated"]) if word.text.lower() == "snow"] == [
        1.5
    ] * 3
    assert tfidf.sources[0].scores("snow snow barn")["snow"] > tfidf.sources[0].scores("snow barn")["snow"]


def test_fitting_streams_and_does_not_depend_on_the_order():
    shuffled = random.Random(1).sample(TRAINING, len(TRAINING))
    read = []
    fitted = KeywordWeights.fit((read.append(caption) or caption for caption in shuffled), "tfidf+rules")
    assert read == shuffled
    assert fitted.to_json() == KeywordWeights.fit(TRAINING, "tfidf+rules").to_json()


@pytest.mark.parametrize("captions", [[], ["", "the"], iter(())])
def test_training_captions_without_words_are_refused(captions):
    with pytest.raises(DataError, match="stop words"):
        KeywordWeights.fit(captions, "tfidf")


@pytest.mark.parametrize("captions", ["a red barn", ["a red barn", None]])
def test_training_captions_must_be_strings(captions):
    with pytest.raises(SettingError, match="Training caption"):
        KeywordWeights.fit(captions, "tfidf")


# --- Named entities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, entities",
    [
        ("A man in New York, near Times Square.", "New York Times Square"),
        ("a man in new york drinks coca-cola at mcdonald's", "new york coca - cola mcdonald ' s"),
        ("The picture shows Eileen Collins in orange.", "Eileen Collins"),
        ("Dogs run. Cats sit quietly on Fifth Avenue.", "Fifth Avenue"),
        ("A Red Barn In The Deep Snow Of Norway", "Norway"),
        ("A RED BARN IN NORWAY", "NORWAY"),
        ("The Statue of Liberty at night", "Statue Liberty"),
        ("747 people, two dogs and seven cats", "747 seven"),
        ("a turkey on a china plate beside an apple", ""),
        ("A dog", ""),
        ("👩\u200d🚀 in San Francisco ❤️", "San Francisco"),
        ("", ""),
    ],
)
def test_rule_based_entities(caption, entities):
    keywords = KeywordWeights([Entities("rules")])
    words = keywords.words(caption)
    assert [word.text for word in words if word.why] == entities.split()
    assert {word.why for word in words if word.why} <= {"entity"}


def test_rules_say_that_they_are_rules(keywords):
    assert "rule-based" in Entities("rules").name and "rule-based" in repr(keywords)
    assert "en_core_web_sm" in Entities("en_core_web_sm").name


def test_every_known_name_is_found_in_any_case():
    names = [name for names in GAZETTEER.values() for name in names.split(", ")]
    captions = [form(name) for name in names for form in (str, str.upper)]
    for caption, ranges in zip(captions, Entities("rules")(captions)):
        assert (0, len(caption)) in ranges


@pytest.fixture(scope="module")
def spacy_package(tmp_path_factory):
    """A folder with an installed spaCy model, small and trained on the spot: it knows two persons and a place."""
    import spacy
    from spacy.training import Example
    from spacy.util import fix_random_seed

    fix_random_seed(0)
    pipeline = spacy.blank("en", meta={"name": "tiny_test_sm", "version": "0.0.1"})
    pipeline.add_pipe("sentencizer", name="tagger")  # only by its name: it must be left out
    pipeline.add_pipe("ner")
    text, ents = (
        "Ada Lovelace met Alan Turing in Bletchley",
        [(0, 12, "PERSON"), (17, 28, "PERSON"), (32, 41, "GPE")],
    )
    examples = [Example.from_dict(pipeline.make_doc(text), {"entities": ents})]
    optimizer = pipeline.initialize(lambda: examples)
    for _ in range(30):
        pipeline.update(examples, sgd=optimizer)

    site = tmp_path_factory.mktemp("site")
    (site / "en_tiny_test_sm").mkdir()
    pipeline.to_disk(site / "en_tiny_test_sm" / "en_tiny_test_sm-0.0.1")
    (site / "en_tiny_test_sm" / "meta.json").write_text(json.dumps(pipeline.meta))
    (site / "en_tiny_test_sm" / "__init__.py").write_text(
        "from spacy.util import load_model_from_init_py\n"
        "def load(**overrides):\n    return load_model_from_init_py(__file__, **overrides)\n"
    )
    (site / "en_tiny_test_sm-0.0.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: en-tiny-test-sm\nVersion: 0.0.1\n"
    (site / "en_tiny_test_sm-0.0.1.dist-info" / "METADATA").write_text(metadata)
    return site


def test_entities_of_an_installed_spacy_model(spacy_package, monkeypatch):
    monkeypatch.syspath_prepend(spacy_package)
    keywords = KeywordWeights.fit(TRAINING, "tfidf+en_tiny_test_sm")
    assert _why(keywords, "Ada Lovelace met Alan Turing in Bletchley") == dict.fromkeys(
        ["Ada", "Lovelace", "Alan", "Turing", "Bletchley"], "entity"
    )
    assert KeywordWeights.from_json(keywords.to_json()).sources[1].model == "en_tiny_test_sm"
    # An all lower-case caption is legitimate, whatever the model makes of it.
    assert len(keywords.words("a dog")) == 2


def test_a_missing_spacy_model_is_known_before_anything_is_read():
    unread = iter(TRAINING)
    with pytest.raises(MissingWeightsError, match="To have it, run: taco-nb fetch en_absent_test_sm .*rules"):
        KeywordWeights.fit(unread, "tfidf+en_absent_test_sm")
    assert next(unread) == TRAINING[0]


def test_the_reports_model():
    import spacy

    if spacy.util.is_package("en_core_web_sm"):
        caption = "The picture shows Barack Obama in Paris."
        assert {"Barack", "Obama", "Paris"} <= _why(KeywordWeights([Entities()]), caption).keys()
    else:
        with pytest.raises(MissingWeightsError, match="12.8 MB.*run: taco-nb fetch en_core_web_sm .*rules"):
            KeywordWeights.fit(TRAINING)


# --- Words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAPTIONS)
def test_words_are_the_caption_without_its_white_space(keywords, kind):
    caption = CAPTIONS[kind]
    words = keywords.words(caption)
    assert all(word.text == caption[word.start : word.end] for word in words)
    assert "".join(word.text for word in words) == "".join(caption.split())
    assert all(word.weight == (1.5 if word.why else 1.0) for word in words)
    assert not any(word.why for word in words if word.text.lower() in ENGLISH_STOP_WORDS)


def test_why_names_every_source_that_named_the_word(keywords):
    why = _why(keywords, "a horse by the Golden Gate Bridge in New York")
    assert why == {"horse": "tfidf", "Golden": "tfidf+entity", "Gate": "tfidf+entity", "Bridge": "tfidf+entity",
                   "New": "entity", "York": "entity"}  # fmt: skip


def test_case_changes_nothing_for_tfidf(tfidf, tower):
    lower, upper = tfidf.token_weights([CAPTIONS["plain"], CAPTIONS["upper case"]], tower)
    assert torch.equal(lower, upper) and len(set(lower.tolist())) == 3


def test_captions_are_looked_at_once(tower):
    source = Named("barn")
    keywords = KeywordWeights([source])
    for _ in range(3):
        keywords.token_weights(["a barn", "a dog", "a barn"], tower)
        keywords.words("a dog")
    assert source.asked == ["a barn", "a dog"]


# --- Tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 38, 77])
def test_token_weights_sum_to_one_over_real_tokens(keywords, length):
    tower, captions = text_tower("untrained-16", length), list(CAPTIONS.values())
    weights = keywords.token_weights(captions, tower)
    mask = tower.tokenize(captions)[1]
    assert weights.shape == (len(captions), length) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(len(captions)))
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    relative = weights / weights[:, :1]  # the start of text weighs 1
    assert set(relative[mask].mul(1e5).round().tolist()) <= {100000.0, 150000.0}
    assert torch.equal(relative[torch.arange(len(captions)), mask.sum(1) - 1], torch.ones(len(captions)))


def test_every_piece_of_a_keyword_weighs_its_weight(tower):
    keywords = KeywordWeights([Named("rhododendron", "snow-covered", "dog’s")], keyword_weight=2.5)
    caption = "a rhododendron in a snow-covered field, a dog’s dinner"
    weights = keywords.token_weights(caption, tower)[0]
    heavy = (weights / weights[0]).isclose(torch.tensor(2.5)).tolist()
    pieces = [piece.removesuffix("</w>") for piece in _pieces(tower, caption)]
    assert [piece for piece, it_is in zip(pieces, heavy) if it_is] == [
        "rho", "dod", "end", "ron", "snow", "-", "covered", "dog", "'s"
    ]  # fmt: skip


def test_a_keyword_that_truncation_cuts_keeps_its_weight_in_what_is_left(tower):
    keywords = KeywordWeights([Named("supercalifragilistic", "barn")])
    caption = "a supercalifragilistic barn"
    pieces = _pieces(tower, caption)
    assert len(pieces) > 6
    for length in range(2, len(pieces)):
        weights = keywords.token_weights(caption, text_tower("untrained-16", length))[0]
        heavy = torch.tensor([1.0, 1.0] + [1.5] * (length - 3))[: length - 1]
        expected = torch.cat([heavy, torch.ones(1)])
        torch.testing.assert_close(weights, expected / expected.sum())


@pytest.mark.parametrize("kind", ["empty", "white space", "only stop words", "never seen"])
def test_without_keywords_all_real_tokens_weigh_the_same(keywords, tower, kind):
    weights = keywords.token_weights([CAPTIONS[kind]], tower)
    mask = tower.tokenize([CAPTIONS[kind]])[1]
    torch.testing.assert_close(weights, mask / mask.sum())
    assert pool(tower([CAPTIONS[kind]]), weights, "keywords").isfinite().all()


def test_weights_do_not_depend_on_the_batch_and_a_string_is_one_caption(keywords, tower):
    together = keywords.token_weights(iter(CAPTIONS.values()), tower)
    for caption, row in zip(CAPTIONS.values(), together):
        assert torch.equal(keywords.token_weights(caption, tower), row[None])


def test_published_captions_all_get_weights(tower):
    files = [SHARED / "kodak" / "captions_ofa.json", SHARED / "kodak" / "captions_context.json"]
    if not all(file.is_file() for file in files):
        pytest.skip("../shared with captions is absent")
    captions = [caption for file in files for caption in json.loads(file.read_text()).values()]
    weights = KeywordWeights.fit(captions, "tfidf+rules").token_weights(captions, tower)
    assert all(len(row[row > 0].unique()) == 2 for row in weights)


@pytest.mark.parametrize("captions", [[], [None], ["a barn", 3], 7])
def test_bad_captions_are_refused(keywords, tower, captions):
    with pytest.raises(SettingError, match=r"[Cc]aption"):
        keywords.token_weights(captions, tower)


# --- Pooling ----------------------------------------------------------------------------------------------------------


def test_pooling_is_the_weighted_sum_of_unit_vectors(keywords, tower):
    captions = list(CAPTIONS.values())
    hidden, weights = tower(captions), keywords.token_weights(captions, tower)
    states = hidden.double().numpy()
    tokens = states / np.linalg.norm(states, axis=2, keepdims=True) * weights.double().numpy()[:, :, None]
    np.testing.assert_allclose(pool(hidden, weights, "keywords-tokens"), tokens, atol=1e-6)
    np.testing.assert_allclose(pool(hidden, weights, "keywords"), tokens.sum(1, keepdims=True), atol=1e-6)


def test_padding_leaves_nothing_behind_and_keywords_stand_out(tower):
    weights = KeywordWeights([Named("barn")]).token_weights("a barn here", tower)
    tokens = pool(tower("a barn here"), weights, "keywords-tokens")
    norms = tokens.norm(dim=-1)[0]
    assert (norms[5:] == 0).all()
    torch.testing.assert_close(norms[:5] / norms[0], torch.tensor([1, 1, 1.5, 1, 1]))


def test_pooling_does_not_depend_on_the_length_of_the_padding(keywords):
    pooled = [
        pool(tower(["a red barn"]), keywords.token_weights(["a red barn"], tower), "keywords")
        for tower in (text_tower("untrained-16", length) for length in (5, 38, 77))
    ]
    torch.testing.assert_close(pooled[0], pooled[1])
    torch.testing.assert_close(pooled[0], pooled[2])


def test_pooling_keeps_the_type():
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert pool(hidden, torch.full((2, 3), 1 / 3), "keywords").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "hidden, weights, mode, message",
    [
        ((2, 3, 4), (2, 3), "mean", '"keywords-tokens"'),
        ((2, 3, 4), (2, 4), "keywords", "do not fit"),
        ((3, 4), (3,), "keywords", "do not fit"),
    ],
)
def test_pooling_refuses_bad_arguments(hidden, weights, mode, message):
    with pytest.raises(SettingError, match=message):
        pool(torch.ones(hidden), torch.ones(weights), mode)


# --- Settings and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, -1.5, float("nan"), float("inf"), "1.5", True, None])
def test_bad_keyword_weights_are_refused(weight):
    with pytest.raises(SettingError, match="keyword_weight"):
        KeywordWeights.fit(TRAINING, "tfidf", keyword_weight=weight)


@pytest.mark.parametrize("sources", ["", "tf-idf", "tfidf+rule", "tfidf+en_core_web_small", [], [7]])
def test_unknown_sources_are_refused(sources):
    with pytest.raises(SettingError, match="source"):
        KeywordWeights.fit(TRAINING, sources)


def test_saved_weights_are_the_same_to_the_bit(keywords, tower):
    captions = [*CAPTIONS.values(), *TRAINING]
    keywords = KeywordWeights(keywords.sources, keyword_weight=1.7)
    text = keywords.to_json()
    loaded = KeywordWeights.from_json(text)
    assert loaded.to_json() == text and text.isascii()
    assert torch.equal(loaded.token_weights(captions, tower), keywords.token_weights(captions, tower))
    assert [loaded.words(caption) for caption in captions] == [
        keywords.words(caption) for caption in captions
    ]
    saved = json.loads(text)
    assert saved["keyword_weight"] == 1.7 and saved["sources"][1] == {"source": "entities", "model": "rules"}
    assert len(text) < 40 * len(saved["sources"][0]["idf"]) + 300


def test_another_version_of_the_format_is_refused(tfidf):
    newer = json.loads(tfidf.to_json()) | {"format": FORMAT + 1}
    with pytest.raises(CheckpointError, match=f"version {FORMAT + 1}.*version {FORMAT}"):
        KeywordWeights.from_json(json.dumps(newer))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "",
        lambda text: "[1]",
        lambda text: text.replace("sources", "source_s"),
        lambda text: text.replace('"idf"', '"fdi"'),
        lambda text: text.replace("1.", "-1."),
        lambda text: re.sub(r"\[.*\]", "[3]", text, flags=re.DOTALL),
        lambda text: text.replace("1.5", '"1.5"'),
    ],
)
def test_damaged_text_is_refused(tfidf, damage):
    with pytest.raises(TacoError, match="damaged|keyword_weight"):
        KeywordWeights.from_json(damage(tfidf.to_json()))


def test_a_source_that_a_text_cannot_hold_must_be_given(tower):
    keywords = KeywordWeights.fit(TRAINING, ["tfidf", Named("red")])
    with pytest.raises(SettingError, match="sources="):
        KeywordWeights.from_json(keywords.to_json())
    with pytest.raises(SettingError, match="sources="):
        KeywordWeights.from_json(keywords.to_json(), sources=[Named("blue")])
    loaded = KeywordWeights.from_json(keywords.to_json(), sources=[Named("blue"), Named("red")])
    assert torch.equal(loaded.token_weights(TRAINING, tower), keywords.token_weights(TRAINING, tower))
