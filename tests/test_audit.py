"""The audit: each claim names code and cells that exist, is judged by computing, and could be judged otherwise."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from compressai.utils.plot.__main__ import parse_json_file
from test_verdicts import KEYWORDS, of_run

from taco_nb import audit
from taco_nb.audit import arithmetic, captions, cost, runs, structure
from taco_nb.audit.material import Material
from taco_nb.errors import DataError
from taco_nb.experiment import Experiment
from taco_nb.files import REPOSITORY
from taco_nb.metrics.joint_space import SIGMA
from taco_nb.model import ModelConfig
from taco_nb.report import collect, write_curves
from taco_nb.verdicts import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED
from taco_nb.widgets import claims_page

CLAIMS = audit.read_claims()
FIGURES = ("arithmetic", "structure")
"""Kinds of claim that a test can judge in a second."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(collect(), tmp_path_factory.mktemp("runs"))


def stated(**changes):
    """Material of which only the report's figures are known, some of them changed: {"keywords": {"epochs": 50}}."""
    figures = json.loads((REPOSITORY / "data/reference/report.json").read_text(encoding="utf-8"))
    for part, values in changes.items():
        figures[part] |= values
    return SimpleNamespace(stated=figures, seed=0)


# --- The list ---------------------------------------------------------------------------------------------------------


def test_every_claim_names_code_and_a_cell_that_exist():
    cells = {
        path.stem: {cell.id for cell in nbformat.read(path, 4).cells}
        for path in (REPOSITORY / "notebooks").glob("*.ipynb")
    }
    for claim in CLAIMS:
        assert callable(audit.test_of(claim)), claim["id"]
        notebook, _, cell = claim["cell"].partition("#")
        assert cell in cells[notebook], claim["id"]


def test_claims_have_names_of_their_own_and_say_what_they_need():
    assert len(CLAIMS) >= 40
    assert max(Counter(claim["id"] for claim in CLAIMS).values()) == 1
    assert {claim["kind"] for claim in CLAIMS} == set(audit.KINDS)
    for claim in CLAIMS:
        if claim["kind"] == "quality" or claim["test"].startswith("taco_nb.audit.runs"):
            assert claim.get("needs"), claim["id"]


def test_every_function_that_judges_is_named_by_a_claim():
    named = {claim["test"] for claim in CLAIMS}
    for module in (
        arithmetic,
        captions,
        cost,
        runs,
        structure,
        audit.import_module("taco_nb.audit.keywords"),
    ):
        for name, value in vars(module).items():
            own = (
                getattr(value, "__module__", "") == module.__name__
                and callable(value)
                and not name.startswith("_")
            )
            assert not own or f"{module.__name__}:{name}" in named, name


def test_an_entry_that_is_not_whole_is_named(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/claims.toml").write_text('[[claim]]\nid = "a"\nkind = "count"\nsays = "so"\n')
    with pytest.raises(DataError, match="the claim 'a' lacks cell, section, test"):
        audit.read_claims(tmp_path)


# --- Judging ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(material):
    """The claims that take no time to judge, as `audit` gives them."""
    quick = [claim for claim in CLAIMS if claim["kind"] in FIGURES or "runs:" in claim["test"]]
    quick = [claim for claim in quick if "keywords:" not in claim["test"] and "cost:" not in claim["test"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "read_claims", lambda data_dir=None: quick)
        return audit.audit(material)


def test_each_has_a_verdict_its_evidence_and_its_source(judged):
    assert set(judged["verdict"]) == {REPRODUCED, NOT_REPRODUCED, NOT_MEASURED}
    for claim in judged.to_dict("records"):
        assert claim["evidence"].endswith(".") and len(claim["evidence"]) > 20, claim["id"]
        assert bool(claim["needs"]) == (claim["verdict"] == NOT_MEASURED), claim["id"]
        source = (REPOSITORY / claim["code"]).read_text(encoding="utf-8").splitlines()
        assert source[claim["line"] - 1].startswith(f"def {claim['test'].partition(':')[2]}(")
        assert claim["source"].splitlines()[0] == source[claim["line"] - 1]


def test_the_network_decides_about_structure(judged):
    verdict = judged.set_index("id")["verdict"]
    for name in ("elic-backbone", "text-in-the-encoder-only", "width-does-not-follow-length"):
        assert verdict[name] == REPRODUCED, name
    for name in ("input-is-a-concatenation", "input-is-192", "the-sum-keeps-the-words"):
        assert verdict[name] == NOT_REPRODUCED, name


def test_a_network_built_otherwise_would_be_judged_otherwise():
    """Text as wide as the picture's features makes all three attentions of one width."""
    config = ModelConfig(text_dim=192, image_grid=8)
    with torch.random.fork_rng(devices=[]):
        other = SimpleNamespace(paper_net=structure.TACO(config).eval(), paper_config=config)
    assert structure.attention_inputs_are_192_wide(other).verdict == REPRODUCED


def test_figures_decide_about_arithmetic():
    assert arithmetic.ablations_differ_in_one_thing(stated()).verdict == NOT_REPRODUCED
    same = stated(keywords={"epochs": 50}, linformer={"epochs": 50})
    assert arithmetic.ablations_differ_in_one_thing(same).verdict == REPRODUCED
    assert arithmetic.keywords_trained_like_the_baseline(same).verdict == REPRODUCED
    assert "83.3 hours" in arithmetic.fifty_epochs_exceed_a_job(stated()).evidence
    assert (
        arithmetic.fifty_epochs_exceed_a_job(stated(keywords={"hours_limit": 100})).verdict == NOT_REPRODUCED
    )
    assert "28 would have fitted" in arithmetic.job_holds_27_epochs(stated()).evidence
    assert (
        arithmetic.job_holds_27_epochs(stated(keywords={"minutes_per_epoch": 110})).verdict == NOT_REPRODUCED
    )
    assert arithmetic.change_is_small(stated(), "cmmd").verdict == NOT_REPRODUCED
    assert (
        arithmetic.change_is_small(stated(keywords={"Kodak": {"cmmd": 0.07}}), "cmmd").verdict == REPRODUCED
    )
    assert "+27%" in arithmetic.change_is_small(stated(), "lpips").evidence
    better = stated(keywords={"MS-COCO": {"fid": 0.7}})
    assert arithmetic.change_is_more_than_similar(better, "fid").verdict == REPRODUCED
    assert "had not fallen yet" in arithmetic.learning_rate_had_fallen(stated(), "linformer").evidence


def test_an_unbiased_estimator_would_be_called_so(monkeypatch):
    assert arithmetic.cmmd_is_unbiased(stated()).verdict == NOT_REPRODUCED

    def unbiased(x, y):
        """Gretton et al., JMLR 2012, eq. 3: no vector is paired with itself."""
        kernel = lambda a, b: torch.exp(-torch.cdist(a.double(), b.double()).square() / (2 * SIGMA**2))  # noqa: E731
        within = sum((kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y))
        return float(1000 * (within - 2 * kernel(x, y).mean()))

    monkeypatch.setattr(arithmetic, "cmmd", unbiased)
    assert arithmetic.cmmd_is_unbiased(stated()).verdict == REPRODUCED


@pytest.mark.parametrize("power, verdict", [(1, NOT_REPRODUCED), (2, REPRODUCED)])
def test_what_grows_with_the_square_would_be_found(material, monkeypatch, power, verdict):
    monkeypatch.setattr(cost, "_attention_operations", lambda config: 1e9 + 1e3 * config.text_tokens**power)
    assert cost.operations_are_quadratic(material).verdict == verdict


@pytest.mark.parametrize(
    "ratio, faster, same", [(0.5, REPRODUCED, NOT_REPRODUCED), (0.97, NOT_REPRODUCED, REPRODUCED)]
)
def test_a_notable_saving_would_be_found(material, tmp_path, ratio, faster, same):
    """Times are read from notebook 05's run at the paper's size, where there is one."""
    folder = tmp_path / f"timing-{Experiment().key}-cuda"
    folder.mkdir()
    rows = [
        {"side": 256, "tokens": tokens, "part": part, "attention": kind, "median_ms": factor * time}
        for tokens in (38, 77)
        for part, time in (("attention", tokens / 38), ("encoder", 10))
        for kind, factor in (("softmax", 1), ("linformer", ratio))
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "lengths.csv", index=False)
    there = Material(collect(), tmp_path)
    assert cost.linformer_makes_the_encoder_faster(there).verdict == faster
    finding = cost.both_attentions_take_the_same_time(there)
    assert finding.verdict == same and "by notebook 05, on cuda" in finding.evidence
    assert "10%" in cost.attention_takes_most_of_the_time(there).evidence
    assert "power 1.00" in cost.time_is_quadratic(there).evidence


def test_captions_decide_about_counts(material):
    other = Material(collect(), material.folder)
    other.captions = ["A red barn. A blue door."] * 3
    other.paragraphs = ["word " * 30] * 2
    assert captions.captions_are_one_sentence(material).verdict == REPRODUCED
    assert captions.captions_are_one_sentence(other).verdict == NOT_REPRODUCED
    assert captions.paragraphs_reach_the_network(material).verdict == NOT_REPRODUCED
    assert captions.positions_hold_15_words(material).verdict == NOT_REPRODUCED
    other.words_within = lambda positions: 15.0
    assert captions.positions_hold_15_words(other).verdict == REPRODUCED
    assert captions.reasoning_reaches_the_network(material).verdict == NOT_REPRODUCED


def test_a_caption_is_not_in_its_file(material):
    finding = captions.captions_are_sent(material)
    assert finding.verdict == NOT_REPRODUCED and "byte for byte" in finding.evidence


def test_runs_decide_about_pictures_once_they_follow_the_protocol():
    def verdict_of(ours, unjudged="", **settings):
        base = of_run("b", dataset="kodak", psnr_taco=30.0)
        changed = of_run("k", Experiment(**KEYWORDS), "kodak", psnr_taco=30.0 + ours, unjudged=unjudged)
        material = Material(pd.concat([base, changed]), "runs")
        return runs.judged_by_runs(material, "keywords", "psnr")

    assert verdict_of(-0.2).verdict == REPRODUCED
    assert verdict_of(0.2).verdict == NOT_REPRODUCED
    finding = verdict_of(-0.2, "3 of 24 images")
    assert finding.verdict == NOT_MEASURED and "3 of 24 images" in finding.evidence


# --- What is made of it -----------------------------------------------------------------------------------------------


def test_the_page_shows_every_claim_and_its_code_and_fetches_nothing(judged):
    page = claims_page(judged, "06_report").data
    for claim in judged.to_dict("records"):
        assert f'id="claim-{claim["id"]}"' in page and f"line {claim['line']}" in page
    assert page.count("<details>") == len(judged) and "<script" not in page and "src=" not in page
    assert 'href="#cell-id=claims"' in page and 'href="04_keywords.ipynb#cell-id=3d688c73"' in page


def test_the_counts_are_of_all_claims(judged):
    table = audit.counts(judged).set_index("kind")
    assert table.loc["all"].sum() == len(judged) and (table.loc["time"] == 0).all()
    assert (
        table.loc["structure", REPRODUCED]
        == (judged[judged["kind"] == "structure"]["verdict"] == REPRODUCED).sum()
    )


def test_the_summary_has_the_numbers_of_the_audit_and_fits_a_page(judged, tmp_path):
    whole = pd.DataFrame(CLAIMS).assign(verdict=REPRODUCED, evidence="It is so.")
    whole.loc[whole["kind"] == "quality", "verdict"] = NOT_MEASURED
    text = audit.summary(whole)
    quality = (whole["kind"] == "quality").sum()
    assert f"{len(CLAIMS)} claims" in text and f"{quality} are not yet measured" in text.replace("\n", " ")
    assert "{" not in text and 250 < len(text.split()) < 700
    audit.write_audit(tmp_path, judged, text)
    kept = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert [claim["id"] for claim in kept["claims"]] == list(judged["id"]) and "hardware" in kept
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == text


def test_curves_are_read_by_compressais_plot(tmp_path):
    points = [(0.002, 28.0, 0.9), (0.01, 31.0, 0.95)]
    tables = [
        of_run(f"r{lmbda}", Experiment(lmbda=lmbda), bpp=10 * lmbda, psnr=psnr, ms_ssim=ms_ssim)
        for lmbda, psnr, ms_ssim in points
    ]
    (name,) = write_curves(tmp_path / "curves", pd.concat(tables))
    for metric in ("psnr", "ms-ssim"):
        curve = parse_json_file(tmp_path / name, metric)
        assert curve["name"] == "baseline" and curve["xs"] == pytest.approx([0.02, 0.1])
    assert parse_json_file(tmp_path / name, "psnr")["ys"] == pytest.approx([28.0, 31.0])
    assert write_curves(tmp_path, collect()) == []
