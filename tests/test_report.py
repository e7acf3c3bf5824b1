"""Runs on disk become one table, damaged ones are named, and notebook 06 makes a page of it, with runs and without."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import bs4
import nbformat
import pandas as pd
import pytest
import torch
from conftest import PLAIN, make_net, with_answers

from taco_nb import Codec, baseline, datasets, evaluate, fit, load
from taco_nb.audit import read_claims
from taco_nb.data import CaptionedImages
from taco_nb.data.captioned import Entry
from taco_nb.evaluation import means, protocol, read_evaluation
from taco_nb.evaluation.protocol import FOLDER, ablation_of, of_data_set, train_command
from taco_nb.evaluation.records import write_evaluation
from taco_nb.experiment import Experiment
from taco_nb.metrics.networks import Network
from taco_nb.model import ModelConfig
from taco_nb.report import MEASURES, bd_rates, cards, collect, points, published_curves
from taco_nb.tools.export import export_html
from taco_nb.training import __main__ as training
from taco_nb.verdicts import NOT_MEASURED, verdicts
from taco_nb.widgets import difference_plot, rate_panels

SIZES = {"N": 16, "M": 24, "groups": (4, 4, 4, 4, 8), "text_dim": 64, "heads": 8, "context_widths": (16, 16)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of real runs: baseline and linformer, a checkpoint as the authors publish theirs, one that was just begun."""
    home = tmp_path_factory.mktemp("runs")
    sets = datasets("sample", limit=2)
    exp = baseline("sample", init="", sizes=SIZES, crop=64, epochs=2, batch_size=6, **PLAIN)
    for name, changed in {
        "baseline": exp,
        "linformer": exp.replace(attention="linformer", linformer_k=8),
    }.items():
        run = fit(changed, home / "deeper" / name)
        evaluate(run.codec, sets, run.dir)
    fit(exp.replace(lmbda=0.5), home / "begun", max_hours=0)
    torch.save({"state_dict": make_net().state_dict(), "epoch": 49}, home / "0.0004.pth.tar")
    evaluate(load(home / "0.0004.pth.tar", text_encoder="untrained-16"), sets, home / "authors")
    return home


@pytest.fixture
def run(home, tmp_path):
    """A copy of one run, to be damaged."""
    return shutil.copytree(home / "deeper" / "baseline", tmp_path / "run")


def said(run):
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))


def edit(run, **changes):
    """Change what the run's evaluation.json says of the run."""
    about = said(run) | changes
    write_evaluation(run, {k: v for k, v in about.items() if k not in ("rows", "rows_sha256")}, about["rows"])


def edit_set(run, **changes):
    """Change what it says of its only data set; None takes something out."""
    ((name, of_set),) = said(run)["data"].items()
    edit(run, data={name: {k: v for k, v in (of_set | changes).items() if v is not None}})


def rewrite(run, change):
    """Put other rows in place of the run's."""
    about = said(run)
    rows = change(pd.DataFrame(about["rows"])).to_dict("records")
    write_evaluation(run, {k: v for k, v in about.items() if k not in ("rows", "rows_sha256")}, rows)


# --- The table --------------------------------------------------------------------------------------------------------


def test_every_run_is_in_the_table_and_the_one_begun_is_named(home, capsys):
    table = collect(home)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Left out: ") and "begun: it has not been evaluated" in line
    assert list(table.groupby("run", sort=False).size().items()) == [
        ("authors", 2), ("deeper/baseline", 2), ("deeper/linformer", 2),
    ]  # fmt: skip
    by_run = table.drop_duplicates("run").set_index("run")
    assert by_run["ablation"].to_dict() == {
        "authors": "baseline", "deeper/baseline": "baseline", "deeper/linformer": "linformer",
    }  # fmt: skip
    assert by_run.loc["authors", "lmbda"] == 0.0004 and by_run.loc["deeper/baseline", "lmbda"] == 0.0067
    assert by_run.loc["authors", "label"] == "TACO's own weights, text-encoder=untrained-16"
    settings = (
        "init=none, linformer_k=8, text_encoder=untrained-64, crop=64, k_P=0.0, k_J=0.0, batch_size=6, N=16, M=24, "
        "groups=(4, 4, 4, 4, 8), text_dim=64, context_widths=(16, 16)"
    )
    assert by_run.loc["deeper/linformer", "label"] == f"linformer, {settings}, sample, 2 epochs"
    assert by_run.loc["deeper/linformer", "folder"] == str(home / "deeper" / "linformer")
    assert (
        by_run.loc["deeper/linformer", "fingerprint"] == load(home / "deeper" / "linformer").fingerprint.hex()
    )
    assert by_run.loc["deeper/linformer", "epochs"] == 2 and by_run.loc["deeper/linformer", "steps"] > 0
    assert by_run.loc["authors", "data_sha256"] == said(home / "authors")["data"]["sample"]["sha256"]
    assert tuple(table["name"].unique()) == datasets("sample", limit=2)[0].names


def test_its_figures_are_those_of_the_evaluations(home):
    table = points(collect(home)).set_index("run")
    for run in table.index:
        (mean,) = said(home / run)["means"]
        for metric in set(MEASURES) & mean.keys():
            assert table.loc[run, metric] == pytest.approx(mean[metric], rel=1e-12)
    rows = pd.read_csv(home / "deeper" / "linformer" / "evaluation.csv")
    assert table.loc["deeper/linformer", "psnr"] == pytest.approx(float(means(rows)["psnr"].iloc[0]))


def test_folders_one_by_one_and_none(home, tmp_path, capsys):
    both = collect(home / "deeper" / "baseline", home / "authors")
    assert list(both["run"].unique()) == ["baseline", "authors"]
    twice = collect(home / "authors", shutil.copytree(home / "authors", tmp_path / "authors"))
    assert twice["run"].nunique() == 2
    empty = collect(tmp_path / "nowhere")
    assert empty.empty and set(both.columns) - {"caption", "width", "height", "bytes"} == set(empty.columns)
    assert "no folder" in capsys.readouterr().out
    assert points(empty).empty and cards(empty).empty and bd_rates(empty, published_curves()).empty


def test_names_are_text_and_what_lies_in_a_run_is_its_own(run, home):
    rewrite(run, lambda rows: rows.assign(name=["007", "NA"], caption=["", "None"]))
    shutil.copytree(home / "authors", run / "files" / "nested")
    table = collect(run)
    assert list(table["name"]) == ["007", "NA"] and list(table["caption"]) == ["", "None"]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leave_out(run, key):
    path = run / "evaluation.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def without(run, key):
    about = said(run)
    rows = about.pop("rows")
    del about["rows_sha256"], about[key]
    write_evaluation(run, about, rows)


DAMAGE = {
    "evaluation.json is damaged": lambda run: halve(run / "evaluation.json"),
    "evaluation.json does not say weights": lambda run: without(run, "weights"),
    "evaluation.json does not say python": lambda run: edit_set(run, python=None),
    "evaluation.json does not say cores": lambda run: edit_set(run, hardware={"cpu": "a", "gpus": []}),
    "evaluation.json does not say sha256": lambda run: edit_set(run, sha256=None),
    "evaluation.json is damaged (": lambda run: (run / "evaluation.json").write_text("[1]"),
    "it has not been evaluated, there is no evaluation.json": lambda run: (
        (run / "evaluation.json").unlink(), shutil.rmtree(run / "files"),
    ),
    "its evaluation is unfinished": lambda run: (run / "evaluation.json").unlink(),
    "{'sample': 1}, but says {'sample': 2}": lambda run: rewrite(run, lambda rows: rows[:1]),
    "(its rows are not those that were written)": lambda run: (run / "evaluation.json").write_text(
        (run / "evaluation.json").read_text().replace('"psnr": ', '"psnr": 1')
    ),
    "its experiment cannot be read": lambda run: halve(run / "experiment.json"),
    "not what experiment.json describes": lambda run: (run / "experiment.json").write_text(Experiment(seed=1).to_json()),
}  # fmt: skip


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_run_is_named_and_the_others_are_there(words, run, home, capsys):
    DAMAGE[words](run)
    table = collect(run, home / "authors")
    assert list(table["run"].unique()) == ["authors"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Left out: {run}: ") and words in line


def test_two_data_sets_of_a_run_have_labels_and_commands_of_their_own(run):
    """As where MS-COCO was evaluated with the best of its captions, and the others with the first."""
    codec, train = load(run), datasets("sample-train", limit=1)
    evaluate(codec, train, run, caption="last")
    table = collect(run).drop_duplicates("dataset").set_index("dataset")
    assert "caption=last" in table.loc["sample-train", "label"]
    assert "caption" not in table.loc["sample", "label"]
    (card,) = cards(collect(run)).to_dict("records")
    assert card["to repeat it"].count("taco-nb train ") == 1
    assert card["to repeat it"].count("taco-nb evaluate ") == 2
    assert len(points(collect(run))) == 2


def test_points_say_over_how_many_images_a_mean_is(run):
    rewrite(run, lambda rows: rows.assign(ms_ssim=[0.5, math.nan]))
    (point,) = points(collect(run)).to_dict("records")
    assert (point["images"], point["ms_ssim_images"], point["ms_ssim"]) == (2, 1, 0.5)
    figure = rate_panels(points(collect(run)).assign(psnr_images=1))
    assert "mean of 1 images" in figure.data[0].text[0]


# --- What may be judged -----------------------------------------------------------------------------------------------

PAPER = Experiment()


def described(
    dataset, images, exp=None, steps=100, skipped=0, kind="published", networks=None, mode="exact", **how
):
    """What would be said of an evaluation of a codec of `exp`, or of one from elsewhere, on so many images."""
    about = (
        {} if exp is None else {"experiment": json.loads(exp.to_json()), "steps": steps, "total_steps": 100}
    )
    text_encoder = "ViT-B-32-quickgelu/openai" if exp is None else exp.text_encoder
    codec = Codec(make_net(), text_encoder, mode=mode, name="a codec", about=about)
    codec.net.config = ModelConfig()
    entries = [Entry(f"{i}.png", Path(f"{i}.png"), (f"caption {i}",)) for i in range(images)]
    data = CaptionedImages(dataset, entries)
    data.skipped, data.captioned = skipped, kind
    how = {"caption": "first", "batch_size": 16, "patch_size": 256} | how
    return of_data_set(codec, data, how, networks or {}, [data])


@pytest.fixture
def any_captions(monkeypatch):
    """Take any captions for those that were published."""
    monkeypatch.setattr(protocol, "PUBLISHED_CAPTIONS", {})


@pytest.mark.parametrize(
    "experiment, steps, dataset, images, reasons",
    [
        (PAPER, 100, "kodak", 24, ""),
        (PAPER.replace(precision="bfloat16", seed=3, lmbda=0.009), 100, "kodak", 24, ""),
        (PAPER.replace(text_pooling="keywords", epochs=27), 100, "clic", 428, ""),
        (PAPER.replace(attention="linformer", epochs=30, linformer_k=64), 100, "kodak", 24, ""),
        (PAPER, 50, "kodak", 24, "25 of 50 epochs"),
        (PAPER.replace(attention="linformer", epochs=20), 100, "kodak", 24, "20 of 30 epochs"),
        (PAPER, 100, "kodak", 23, "23 of 24 images"),
        (PAPER.replace(init="demo", batch_size=4), 100, "clic", 428, "init is demo; batch_size is 4"),
        (
            PAPER.replace(keyword_weight=3.0, text_pooling="keywords"),
            100,
            "kodak",
            24,
            "keyword_weight is 3.0",
        ),
        (PAPER.replace(text_tokens=77), 100, "kodak", 24, "text_tokens is 77"),
        (PAPER.replace(text_tokens=77, captions="context"), 100, "kodak", 24, ""),
        (baseline("sample"), 100, "kodak", 24, "profile sample"),
        (baseline("sample"), 100, "sample", 3, "profile sample; sample is not a data set of the report"),
    ],
)
def test_who_follows_the_protocol(experiment, steps, dataset, images, reasons, any_captions):
    found = described(dataset, images, experiment, steps, kind=experiment.captions)
    assert "; ".join(found["unjudged"]) == reasons


BEST, SKIPPED = {"caption": "best"}, {"skipped": 30_502}


@pytest.mark.parametrize(
    "dataset, images, how, reasons",
    [
        ("coco", 2, BEST | SKIPPED, ""),  # the others are too small for the crop
        ("coco", 1, BEST | SKIPPED, "1 of 30,504 images"),
        ("coco", 2, SKIPPED, "evaluated with caption first"),
        ("coco", 2, BEST | SKIPPED | {"patch_size": 64}, ""),  # FID is over crops
        ("kodak", 24, {"caption": "last"}, ""),  # of one
        ("kodak", 24, {"patch_size": 64}, "evaluated with patch-size 64"),
        ("kodak", 24, {"mode": "fast"}, "evaluated with mode fast"),
        ("kodak", 24, {"kind": "context"}, "evaluated with captions context, not published"),
        ("kodak", 24, {"kind": "replaced"}, "evaluated with captions replaced, not published"),
        (
            "kodak", 24, {"networks": {"lpips": Network("alexnet, 1 byte", None), "fid": Network("given, SHA-256 0", None)}},
            "fid through weights that were given to it",
        ),
    ],
)  # fmt: skip
def test_who_was_evaluated_by_the_protocol(dataset, images, how, reasons, any_captions):
    assert "; ".join(described(dataset, images, PAPER, **how)["unjudged"]) == reasons
    assert "; ".join(described(dataset, images, **how)["unjudged"]) == reasons, "of the authors' weights"


def test_captions_are_published_only_if_they_are_the_published_ones(shared, tmp_path):
    """Whatever file they lie in: a user may have written others over it."""
    shutil.copytree(shared / "kodak", tmp_path / "kodak")
    codec = Codec(make_net(), about={"experiment": json.loads(PAPER.to_json()), "steps": 1, "total_steps": 1})
    how = {"caption": "first", "batch_size": 16, "patch_size": 256}
    (kodak,) = datasets("kodak", data_dir=tmp_path)
    assert of_data_set(codec, kodak, how, {}, [kodak])["unjudged"] == []
    (tmp_path / "kodak" / "captions_ofa.json").write_text(json.dumps(dict.fromkeys(kodak.names, "NA")))
    (kodak,) = datasets("kodak", data_dir=tmp_path)
    assert of_data_set(codec, kodak, how, {}, [kodak])["unjudged"] == [
        "its captions are not those that TACO's authors published"
    ]


def test_the_authors_weights_count_at_paper_size_and_through_clip(home):
    amiss = [
        "captions read through untrained-16",
        "not a model of the paper's size",
        "sample is not a data set of the report",
    ]
    assert said(home / "authors")["data"]["sample"]["unjudged"] == amiss
    assert set(collect(home / "authors")["unjudged"]) == {"; ".join(amiss)}
    assert "--text-encoder untrained-16" in collect(home / "authors")["to_evaluate"].iloc[0]


def test_nothing_of_the_sample_reproduces_or_refutes_anything(home):
    table = verdicts(collect(home))
    assert set(table["verdict"]) == {NOT_MEASURED}
    on_kodak = collect(home).assign(dataset="kodak", cmmd=0.069)
    assert set(verdicts(on_kodak)["verdict"]) == {NOT_MEASURED}
    assert "profile sample" in " ".join(verdicts(on_kodak)["run, or why not"])


def test_ablations_have_names():
    assert ablation_of(PAPER) == "baseline"
    all_three = PAPER.replace(attention="linformer", captions="context", text_pooling="keywords-tokens")
    assert ablation_of(all_three) == "context + linformer + keywords-tokens"


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3}, {"batch_size": 4}, {"k_P": 1.0}, {"init": "demo"}, {"precision": "bfloat16"},
        {"optimizer": "muon"}, {"schedule": "cosine"}, {"seed": 3}, {"epochs": 10}, {"text_tokens": 77},
        {"attention": "linformer"}, {"sizes": vars(PAPER.sizes) | {"N": 128}},
    ],
    ids=str,
)  # fmt: skip
def test_runs_have_a_label_in_common_if_they_differ_in_lambda_alone(change):
    labels = {described("kodak", 1, exp)["label"] for exp in (PAPER, PAPER.replace(lmbda=0.01))}
    assert labels == {"baseline, 50 epochs"}
    changed = PAPER.replace(**change)
    assert described("kodak", 1, changed)["label"] not in labels
    others = [{"mode": "fast"}, {"caption": "best"}, {"patch_size": 64}, {"kind": "context"}]
    assert len({described("kodak", 1, PAPER, **other)["label"] for other in others} - labels) == len(others)
    assert "init" not in described("kodak", 1, baseline("sample"))["label"]


# --- BD-rates ---------------------------------------------------------------------------------------------------------


def curve(label, ablation, bpp, psnr, dataset="kodak"):
    """A row per point, as `collect` gives them for runs of one image."""
    rows = pd.DataFrame({"run": [f"{label} {i}" for i in range(len(bpp))], "bpp": bpp, "psnr": psnr})
    rows = rows.assign(
        label=label, ablation=ablation, dataset=dataset, profile="paper", name="a", lmbda=0.0004, images=24
    )
    return rows.assign(unjudged="").reindex(columns=collect().columns)


def test_bd_rates_against_baseline_and_published():
    published = published_curves(up_to=1.0)
    vtm = published["VTM"]
    fewer = [0.9 * rate for rate in vtm["bpp"]]
    runs = pd.concat(
        [curve("b", "baseline", vtm["bpp"], vtm["psnr"]), curve("l", "linformer", fewer, vtm["psnr"])]
    )
    table = bd_rates(runs, published).set_index(["curve", "anchor", "metric"])["BD-rate in %"]
    assert table["l", "b", "psnr"] == pytest.approx(-10)
    assert table["b", "VTM", "psnr"] == pytest.approx(0, abs=1e-6) and table[
        "l", "VTM", "psnr"
    ] == pytest.approx(-10)
    assert table["b", "JPEG", "psnr"] < -50
    assert ("b", "b", "psnr") not in table.index
    elsewhere = bd_rates(runs.assign(dataset="clic"), published)
    fewer_pictures = bd_rates(runs.assign(images=4), published)
    assert set(elsewhere["anchor"]) == set(fewer_pictures["anchor"]) == {"b"}, (
        "published are means over all 24"
    )


def test_bd_rates_that_cannot_be_say_why():
    three = curve("b", "baseline", [0.1, 0.2, 0.3], [30.0, 31.0, 32.0])
    (row,) = bd_rates(pd.concat([three, three.assign(run=three["run"] + " again")])).to_dict("records")
    assert row["points"] == 3 and "a BD-rate needs 4" in row["note"] and math.isnan(row["BD-rate in %"])
    bent = curve("b", "baseline", [0.1, 0.2, 0.3, 0.4], [30.0, 31.0, 30.5, 32.0])
    notes = bd_rates(bent, {"other": {"bpp": [0.1, 0.2, 0.3, 0.4], "psnr": [29.0, 30.0, 31.0, 32.0]}})["note"]
    assert list(notes.str.contains("turns or stands still")) == [True]


# --- The card ---------------------------------------------------------------------------------------------------------


def test_the_card_and_the_evaluation_it_repeats(tmp_path, monkeypatch):
    sets = datasets("sample", limit=1)
    evaluate(load("demo"), sets, tmp_path / "runs" / "evaluation-demo")
    (card,) = cards(collect(tmp_path / "runs")).to_dict("records")
    assert card["fingerprint"] == load("demo").fingerprint.hex()
    assert card["data, SHA-256"] == f"sample: 1 images, {sets[0].checksum()[:12]}"
    assert f"torch {torch.__version__.partition('+')[0]}" in card["versions"]
    before = read_evaluation(tmp_path / "runs" / "evaluation-demo")
    shutil.move(tmp_path / "runs", tmp_path / "before")
    assert card["what"] == "baseline, bundled demo codec"
    assert card["to repeat it"].endswith(f"--out {tmp_path / 'runs' / 'evaluation-demo'}")
    command = card["to repeat it"]
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # where taco-nb is installed
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    after = read_evaluation(tmp_path / "runs" / "evaluation-demo")
    times = ["encode_s", "decode_s"]
    pd.testing.assert_frame_equal(after.drop(columns=times), before.drop(columns=times), check_exact=True)


@pytest.mark.parametrize(
    "exp", [baseline("sample", epochs=3, init=""), PAPER.replace(text_pooling="keywords")]
)
def test_the_command_that_trains_names_all_settings(exp):
    words = train_command(exp)
    assert words[:2] == ["taco-nb", "train"] and words[-2:] == ["--out", FOLDER]
    asked = training.train_command_line.make_context("train", words[2:]).params
    asked = training._experiment(
        *(asked[name] for name in ("out", "profile", "experiment", "changes", "data_dir"))
    )
    assert asked == exp


def test_commands_are_quoted_and_follow_a_folder_that_was_moved(run, tmp_path):
    folder = shutil.move(run, tmp_path / "my run's")
    command = collect(folder)["to_train"].iloc[0] + "\n" + collect(folder)["to_evaluate"].iloc[0]
    train, again = map(shlex.split, command.splitlines())
    assert train == ["taco-nb", "train", "--experiment", f"{folder}/experiment.json", "--out", str(folder)]
    assert again[:5] == ["taco-nb", "evaluate", str(folder), "sample", "--limit"] and again[-1] == str(folder)


def test_the_command_of_a_whole_set_has_no_limit(any_captions):
    assert "--limit" not in described("kodak", 24, PAPER)["evaluate"]
    assert "--limit" in described("kodak", 23, PAPER)["evaluate"]


def test_a_run_called_like_the_bundled_codec_is_none(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(
        home / "deeper" / "baseline", tmp_path / "demo", ignore=shutil.ignore_patterns("evaluation.*")
    )
    codec = load(tmp_path / "demo")
    codec.name = "demo"
    evaluate(codec, datasets("sample", limit=1), tmp_path / "demo")
    (card,) = cards(collect("demo")).to_dict("records")
    assert "bundled" not in card["what"]
    assert card["to repeat it"].startswith("taco-nb train --experiment demo/experiment.json --out demo && ")


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_panels_show_what_there_is_and_name_what_there_is_not():
    runs = pd.concat([
        curve("b", "baseline", [0.3, 0.1], [32.0, 30.0]).assign(cmmd=0.07),
        curve("l", "linformer", [0.1], [30.0]).assign(unjudged="profile sample"),
    ])  # fmt: skip
    figure = rate_panels(
        points(runs), published={"VTM": {"bpp": [0.1], "psnr": [31]}}, stated={"baseline": {"cmmd": 0.069}}
    )
    few = "b, only 2 points"
    drawn = [(trace.name, trace.yaxis or "y", list(trace.x)) for trace in figure.data]
    assert drawn == [
        (few, "y", [0.1, 0.3]), ("l", "y", [0.1]), ("VTM, published", "y", [0.1]), (few, "y2", [0.1, 0.3]),
        ("the report, baseline", "y2", [0, 0.3]),
    ]  # fmt: skip
    assert [list(trace.marker.symbol) for trace in figure.data[:2]] == [["circle", "circle"], ["circle-open"]]
    assert "lpips, fid" in figure.layout.title.text
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        few,
        "l",
        "VTM, published",
        "the report, baseline",
    ]
    nothing = rate_panels(points(collect()), title="Kodak")
    assert not nothing.data and "lpips, psnr, fid, cmmd" in nothing.layout.title.text


# --- Notebook 06 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["with runs", "with none"])
def page(request, home, tmp_path_factory):
    """Notebook 06, run by papermill somewhere else, its exported page, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("report")
    runs = home if request.param == "with runs" else folder / "nothing"
    notebook = with_answers("06_report", tmp_path_factory.mktemp("answers"))
    command = [sys.executable, "-m", "papermill", str(notebook), "06.ipynb"]
    command += ["-p", "profile", "sample", "-p", "out_dir", str(runs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    soup = bs4.BeautifulSoup(export_html(folder / "06.ipynb").read_text(encoding="utf-8"), "html.parser")
    return request.param, nbformat.read(folder / "06.ipynb", 4), soup, runs


def test_the_report_opens_with_runs_and_without(page, home):
    which, notebook, soup, runs = page
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    printed = "".join(output.get("text", "") for output in outputs)
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) == len(soup.select("[role=figure]")) == (5 if which == "with runs" else 4)
    assert "0 reproduced; 0 not reproduced; " in printed
    if which == "with runs":
        assert "begun: it has not been evaluated" in printed
        assert "1 of the 4 points that a BD-rate needs" in printed
        assert f"taco-nb train --experiment {home}/deeper/linformer/experiment.json" in printed
    else:
        assert "No runs in" in printed and "papermill notebooks/01_baseline.ipynb" in printed
        assert "Notebooks 02 to 04 train both" in printed
    claims = [row["id"].removeprefix("claim-") for row in soup.select("tr[id^=claim-]")]
    assert sorted(claims) == sorted(claim["id"] for claim in read_claims())
    kept = json.loads((runs / "claims.json").read_text(encoding="utf-8"))["claims"]
    assert {claim["verdict"] for claim in kept if claim["kind"] == "quality"} == {NOT_MEASURED}
    assert (runs / "curves").is_dir() == (which == "with runs")
    assert soup.select('a[href="04_keywords.html#cell-id=3d688c73"]')
    headings = [heading.get_text() for heading in soup.select("h2")]
    assert headings[-3:] == ["Reproducibility card", "What this shows, and what it does not", "Exercises"]


def test_differences_are_drawn_only_where_there_are_intervals(home):
    from taco_nb.verdicts import paired

    pairs = paired(collect(home))
    assert set(pairs["images"]) == {2} and not difference_plot(pairs).data, (
        "two images say nothing of a spread"
    )
    figure = difference_plot(pairs.assign(low=pairs["difference"] - 1, high=pairs["difference"] + 1))
    assert [list(trace.x) for trace in figure.data] == [
        [pytest.approx(d)]
        for d in pairs.set_index("metric").loc[
            ["bpp", "psnr", "ms_ssim", "mini_distance", "mini_score"], "difference"
        ]
    ]
