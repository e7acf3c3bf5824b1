"""Intervals that cover what they should, pairs that compare like with like, and verdicts by the stated rules alone."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

from taco_nb.experiment import Experiment, baseline
from taco_nb.files import REPOSITORY
from taco_nb.metrics.interval import interval
from taco_nb.report import DATASETS, MEASURES, collect
from taco_nb.verdicts import (
    CLAIMS,
    NOT_MEASURED,
    NOT_REPRODUCED,
    REPRODUCED,
    TOLERANCE,
    Claim,
    holds,
    paired,
    published_changes,
    verdicts,
)

STATED = json.loads((REPOSITORY / "data" / "reference" / "report.json").read_text(encoding="utf-8"))
KEYWORDS = {"text_pooling": "keywords"}


def of_run(run, exp=None, dataset="kodak", images=24, steps=1000, unjudged="", **measures):
    """Rows as `collect` gives them: measures are a value for all images, or one for each."""
    exp = exp or Experiment()
    rows = pd.DataFrame({"name": [f"{i}.png" for i in range(images)]}).assign(**measures)
    changed = "baseline" if exp.text_pooling == "none" else exp.text_pooling
    changed = {"linformer": "linformer"}.get(
        exp.attention, "context" if exp.captions == "context" else changed
    )
    rows = rows.assign(
        run=run, label=changed, ablation=changed, dataset=dataset, images=images, unjudged=unjudged, lmbda=exp.lmbda,
        profile=exp.profile, epochs=exp.epochs, steps=steps, seed=exp.seed, experiment=exp.to_json(),
    )  # fmt: skip
    return rows.reindex(columns=collect().columns).astype(dict.fromkeys(MEASURES, float))


def spread(mean, deviation, images=24, seed=0):
    """Values with exactly this mean and standard deviation."""
    values = np.random.default_rng(seed).normal(size=images)
    return mean + deviation * (values - values.mean()) / values.std()


# --- The bootstrap ----------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_all_resamples():
    """Of four values there are 256 equally likely resamples: the percentiles of their means, counted one by one."""
    values = [0.0, 1.0, 3.0, 7.0]
    every = sorted(sum(sample) / 4 for sample in itertools.product(values, repeat=4))
    low, high = interval(values, draws=20_000)
    assert (low, high) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.26)
    many = spread(0, 1)
    assert interval(many) == interval(many) != interval(many, seed=1)


def test_it_is_that_of_the_central_limit_for_many_values():
    values = spread(5.0, 2.0, 10_000)
    assert interval(values) == pytest.approx((5 - 1.96 * 0.02, 5 + 1.96 * 0.02), abs=0.003)


def test_it_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(3.0, 1.0, 40), draws=300) for _ in range(400)]
    assert 0.91 <= np.mean([low <= 3 <= high for low, high in found]) <= 0.98


def test_what_has_no_interval():
    assert all(map(math.isnan, interval([1.0]) + interval([]) + interval([1.0, math.inf])))
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def test_images_are_paired_by_name_in_any_order():
    noise, effect = spread(30.0, 5.0), spread(-0.1, 0.05, seed=1)
    base = of_run("b", psnr=noise, bpp=0.2, fid=0.8)
    changed = of_run("k", Experiment(**KEYWORDS), psnr=noise + effect, bpp=0.2, fid=0.9)[::-1]
    table = paired(pd.concat([base, changed])).set_index("metric")
    row = table.loc["psnr"]
    assert row["difference"] == pytest.approx(-0.1) and [row["low"], row["high"]] == pytest.approx(
        interval(effect[::-1])
    )
    assert row["high"] < 0, "unpaired, five dB of difference between images would drown a tenth"
    assert (table.loc["bpp", "low"], table.loc["bpp", "high"], table.loc["bpp", "images"]) == (0, 0, 24)
    assert table.loc["fid", "difference"] == pytest.approx(0.1) and math.isnan(table.loc["fid", "low"])
    assert "encode_s" not in table.index
    fewer = paired(pd.concat([base[:10], changed])).set_index("metric")
    assert fewer.loc["psnr", "images"] == 10


@pytest.mark.parametrize(
    "changes, steps, compared",
    [
        ({}, 1000, True),
        ({"keyword_weight": 3.0}, 1000, True),
        ({"epochs": 27}, 1040, True),
        ({}, 1100, False),
        ({"lmbda": 0.0008}, 1000, False),
        ({"seed": 1}, 1000, False),
        ({"crop": 128}, 1000, False),
        ({"init": "demo"}, 1000, False),
    ],
    ids=str,
)
def test_only_like_is_compared_with_like(changes, steps, compared):
    changed = of_run("k", Experiment(**KEYWORDS | changes), steps=steps, psnr=1.0)
    assert len(paired(pd.concat([of_run("b", psnr=1.0), changed]))) == compared
    elsewhere = changed.assign(dataset="clic")
    assert paired(pd.concat([of_run("b", psnr=1.0), elsewhere])).empty


def test_a_baseline_differs_from_the_profile_s_only_as_the_ablation_does():
    def compared(base, changed):
        return not paired(pd.concat([of_run("b", base, psnr=1.0), of_run("k", changed, psnr=1.0)])).empty

    long = Experiment(text_tokens=77)
    assert not compared(long, Experiment(**KEYWORDS)) and not compared(long, Experiment(captions="context"))
    assert compared(long, long.replace(**KEYWORDS)) and compared(long, long.replace(captions="context"))
    assert compared(Experiment(), long.replace(captions="context"))
    assert not compared(Experiment(linformer_k=8), Experiment(attention="linformer"))
    sample = baseline("sample")
    assert compared(sample, sample.replace(keyword_sources="tfidf", **KEYWORDS))
    assert not compared(sample, sample.replace(init="demo-keywords", **KEYWORDS)), "it starts elsewhere"


# --- Figures ----------------------------------------------------------------------------------------------------------


def judged(runs, what, of="baseline"):
    table = verdicts(runs, of)
    return table[table["what"] == what].to_dict("records")


@pytest.mark.parametrize("share, verdict", [(0, REPRODUCED), (0.049, REPRODUCED), (-0.049, REPRODUCED),
                                            (0.051, NOT_REPRODUCED), (-0.051, NOT_REPRODUCED)])  # fmt: skip
def test_a_figure_within_tolerance_is_reproduced(share, verdict):
    published = STATED["baseline"]["MS-COCO"]["lpips"]
    runs = of_run("b", dataset="coco", images=50, lpips_01=published * (1 + share), lpips=9.0)
    (row,) = judged(runs, "lpips, MS-COCO")
    assert TOLERANCE == 0.05 and row["verdict"] == verdict and row["run, or why not"] == "b"
    assert row["difference"] == pytest.approx(published * share, abs=1e-12) and row["published"] == published


def test_the_interval_says_whether_the_figure_is_in_it():
    published = STATED["baseline"]["MS-COCO"]["lpips"]
    for mean, deviation, inside in ((1.03, 0.5, "yes"), (1.03, 0.001, "no")):
        values = spread(published * mean, published * deviation, 50)
        (row,) = judged(of_run("b", dataset="coco", images=50, lpips_01=values), "lpips, MS-COCO")
        assert (row["published in it"], row["verdict"]) == (inside, REPRODUCED)
    (row,) = judged(of_run("b", dataset="coco", fid=0.82), "fid, MS-COCO")
    assert (row["published in it"], row["95 % interval"], row["verdict"]) == ("–", "–", REPRODUCED)


def test_a_run_that_may_not_be_judged_is_shown_and_not_judged():
    exact = {"cmmd": STATED["baseline"]["Kodak"]["cmmd"]}
    sample = of_run("s", baseline("sample", lmbda=0.0004), unjudged="profile sample", **exact)
    other = of_run("o", Experiment(lmbda=0.0016), **exact)
    for runs, why in ((sample, "profile sample"), (other, "lambda 0.0016, taken as published at 0.0004")):
        (row,) = judged(runs, "cmmd, Kodak")
        assert (row["verdict"], row["measured"], row["run, or why not"]) == (NOT_MEASURED, exact["cmmd"], why)
    # one that may be judged takes their place
    (row,) = judged(pd.concat([sample, other, of_run("p", **exact)]), "cmmd, Kodak")
    assert (row["verdict"], row["run, or why not"]) == (REPRODUCED, "p")


def test_everything_stated_has_a_row_even_with_no_runs():
    table = verdicts(collect())
    assert set(table["verdict"]) == {NOT_MEASURED} and table["measured"].isna().all()
    for name in ("baseline", "context", "linformer", "keywords"):
        of = table[table["of"] == name]
        figures = sum(len(STATED[name].get(dataset, {})) for dataset in DATASETS)
        sentences = STATED[name].get("text", {})
        assert len(of) >= figures + len(sentences) and set(sentences.values()) <= set(of["published"])
        assert len(verdicts(collect(), name)) == len(of)


# --- Sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, limit, difference, low, high, as_said",
    [
        ("lower", math.inf, -0.2, -0.3, -0.1, True),
        ("lower", math.inf, -0.1, -0.3, 0.1, False),
        ("lower", math.inf, 0.2, 0.1, 0.3, False),
        ("higher", math.inf, 0.2, 0.1, 0.3, True),
        ("higher", math.inf, 0.1, -0.1, 0.3, False),
        ("lower", 0.5, -0.4, -0.6, -0.3, True),
        ("lower", 0.5, -0.6, -0.7, -0.5, False),
        ("higher", math.inf, 0.1, math.nan, math.nan, True),
        ("higher", math.inf, 0.0, math.nan, math.nan, False),
        ("similar", math.inf, 0.04, math.nan, math.nan, True),
        ("similar", math.inf, -0.06, math.nan, math.nan, False),
    ],
)
def test_what_a_sentence_says_of_a_difference(side, limit, difference, low, high, as_said):
    pair = {"dataset": "kodak", "difference": difference, "low": low, "high": high, "baseline": 1.0}
    assert holds(Claim("context", "psnr", "psnr", {"kodak": side}, limit), pair) == as_said


def test_sentences_are_the_reports_own():
    for claim in CLAIMS:
        assert claim.text in STATED[claim.ablation]["text"] and set(claim.sides) <= set(DATASETS.values())


def test_a_sentence_is_judged_on_each_data_set():
    """The report: with keywords PSNR is slightly lower on MS-COCO and Kodak, higher on CLIC, by at most 0.5 dB."""
    base = {"kodak": 30.0, "clic": 31.0, "coco": 28.0}
    changes = {"kodak": spread(-0.2, 0.1), "clic": spread(-0.2, 0.1), "coco": spread(-0.7, 0.1)}
    runs = pd.concat(
        [of_run("b", dataset=name, psnr_taco=value) for name, value in base.items()]
        + [of_run("k", Experiment(**KEYWORDS), name, psnr_taco=base[name] + d) for name, d in changes.items()]
    )
    table = verdicts(runs, "keywords").set_index("what")["verdict"]
    found = {name: table[f"psnr, {name}, lambda 0.0004"] for name in base}
    assert found == {"kodak": REPRODUCED, "clic": NOT_REPRODUCED, "coco": NOT_REPRODUCED}
    small = runs.assign(unjudged=np.where(runs["run"] == "k", "3 of 24 images", ""))
    table = verdicts(small, "keywords").set_index("what")
    assert table.loc["psnr, kodak, lambda 0.0004", "verdict"] == NOT_MEASURED
    assert table.loc["psnr, kodak, lambda 0.0004", "run, or why not"] == "3 of 24 images"


def test_a_data_set_of_which_the_sentence_says_nothing_is_shown_and_not_judged():
    """The report: with keywords FID is slightly higher on CLIC."""
    runs = pd.concat([of_run("b", fid=0.8), of_run("k", Experiment(**KEYWORDS), fid=0.9)])
    (row,) = judged(runs, "fid, kodak, lambda 0.0004", "keywords")
    assert (row["verdict"], row["run, or why not"]) == (NOT_MEASURED, "the sentence does not speak of kodak")


def test_changes_in_per_cent_are_computed_and_what_was_measured_stands_beside_them():
    nothing = published_changes(paired(collect()))
    assert nothing["published"].round().tolist() == [27, -1, 16, 43] and nothing["measured"].isna().all()
    changed = Experiment(**KEYWORDS)
    runs = pd.concat(
        [of_run("b", dataset="coco", lpips_01=0.02), of_run("k", changed, "coco", lpips_01=0.03)]
    )
    changes = published_changes(paired(runs)).set_index("label")
    assert changes["measured"].notna().sum() == 1
    assert changes.loc[lambda table: table["measured"].notna(), "measured"].item() == pytest.approx(50)
    assert published_changes(paired(runs.assign(unjudged="profile sample")))["measured"].isna().all()


def test_scores_against_captions_are_compared_only_where_the_captions_are_the_same():
    runs = [
        of_run("b", psnr=30.0, mini_score=25.0),
        of_run("k", Experiment(**KEYWORDS), psnr=30.0, mini_score=26.0),
    ]
    runs.append(of_run("c", Experiment(captions="context"), psnr=30.0, mini_score=35.0))
    pairs = paired(pd.concat(runs))
    assert set(pairs[pairs["run"] == "k"]["metric"]) == {"psnr", "mini_score"}
    assert set(pairs[pairs["run"] == "c"]["metric"]) == {"psnr"}
