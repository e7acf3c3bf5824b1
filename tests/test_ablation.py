"""The three ablations: each one field of an experiment, alone or together, run by its notebook and measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from browser import opens_without_a_network
from conftest import PLAIN, make_codec, with_answers
from PIL import Image

from taco_nb import baseline, datasets, fit, load
from taco_nb.ablation import differences, evaluate_runs, same_steps, train
from taco_nb.checkpoint import load_fitting, save_weights
from taco_nb.data import CaptionedFolder, training_pairs
from taco_nb.errors import CheckpointError, DataError, SettingError
from taco_nb.files import REPOSITORY
from taco_nb.inspection import cost_table, look_at_attention, text_contribution
from taco_nb.model import TACO, ModelConfig
from taco_nb.notebook import Parameters
from taco_nb.text import Conditioning, KeywordWeights, text_tower
from taco_nb.tools.export import export_html
from taco_nb.widgets import sortable

CAPTION = "A red barn in Venice"
TINY = {"N": 16, "M": 24, "groups": (4, 4, 4, 4, 8), "text_dim": 64, "heads": 8, "context_widths": (16, 16)}
ALL_THREE = {"attention": "linformer", "captions": "context", "text_pooling": "keywords"}


@pytest.fixture(scope="module")
def keywords():
    return KeywordWeights.fit(["a red barn", "a blue boat", "a dog on a boat"], "tfidf+rules")


def tiny(**changes):
    return baseline("sample", init="", sizes=TINY, crop=64, epochs=1, batch_size=6, **PLAIN, **changes)


# --- Conditioning -----------------------------------------------------------------------------------------------------


def test_what_reaches_the_adapter(keywords):
    tower = text_tower("untrained-64", length=38)
    plain, mask = Conditioning(tower)([CAPTION])
    assert torch.equal(plain, tower([CAPTION])) and mask is None
    assert Conditioning(tower, pooling="keywords", keywords=keywords)([CAPTION])[0].shape == (1, 1, 64)
    assert Conditioning(tower, pooling="keywords-tokens", keywords=keywords)([CAPTION])[0].shape == (
        1,
        38,
        64,
    )
    long, mask = Conditioning(tower, length="windows")([CAPTION, "word " * 200])
    assert mask.shape == long.shape[:2] and mask[1].sum() > 200 > mask[0].sum()


def test_a_codec_of_the_negative_control_reads_one_sentence_whatever_it_is_given(tmp_path):
    exp = tiny(captions="constant")
    assert exp.ablations == {"captions": "constant"} and exp.dataset_captions == "published"
    path = tmp_path / "constant.safetensors"
    save_weights(path, TACO(exp.model_config()), {"experiment": json.loads(exp.to_json())})
    codec = load(path)
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    files = {codec.encode(image, caption) for caption in (CAPTION, "", "two dogs")}
    assert len(files) == 1
    listening = load(path)
    listening.text_length = "truncate"
    assert torch.equal(codec.conditioning(["two dogs"])[0], listening.conditioning(["A photograph."])[0])


@pytest.mark.parametrize("setting", [{"text_pooling": "keywords"}, {"text_length": "windows"}])
def test_a_constant_caption_has_no_words_to_weigh(setting):
    with pytest.raises(SettingError, match='captions="constant" leaves no words'):
        tiny(captions="constant", **setting)


@pytest.mark.parametrize(
    "settings, said",
    [({"length": "cut"}, "text_length"), ({"pooling": "keywords"}, "keyword weights"),
     ({"length": "windows", "pooling": "keywords"}, "truncate")],
)  # fmt: skip
def test_conditioning_that_cannot_be(settings, said):
    with pytest.raises(SettingError, match=said):
        Conditioning(text_tower("untrained-16"), **settings)


def test_one_key_gives_every_position_the_same_text(keywords):
    codec = make_codec(text_dim=16)
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    spread = {}
    for pooling in ("none", "keywords", "keywords-tokens"):
        codec.conditioning = Conditioning(codec.tower, pooling=pooling, keywords=keywords)
        field = text_contribution(codec, image, CAPTION)
        assert field.shape == (8, 16, 16)
        spread[pooling] = float(field.std(dim=(1, 2)).norm() / field.norm())
    assert spread["keywords"] < 1e-6 < 1e-4 < spread["none"]


# --- Looking inside ---------------------------------------------------------------------------------------------------


def test_attentions_are_those_that_ran():
    codec = make_codec()
    records = look_at_attention(codec, Image.effect_noise((100, 70), 80).convert("RGB"), CAPTION)
    assert [record.name for record in records] == ["Injector 8", "Extractor 14", "Injector 15"]
    assert [tuple(r.weights.shape) for r in records] == [(2, 32 * 32, 8), (2, 8, 256), (2, 256, 8)]
    for record in records:
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:2]))
        assert record.over_image(3).shape == record.grid
    # of an Injector, what all tokens get of one position adds up to one
    total = sum(records[0].over_image(token) for token in range(8))
    torch.testing.assert_close(total, torch.ones(records[0].grid))


def test_the_cost_of_long_captions():
    rows = {
        row["tokens"]: row["Linformer / softmax"] for row in cost_table((256,), (8, 38, 4096), dim=192, k=32)
    }
    assert rows[8] > 1 > rows[38] > rows[4096]


# --- Experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "linformer", "linformer_k": 5, "linformer_sharing": "layerwise"},
        {"captions": "context", "text_tokens": 77},
        {"captions": "context", "text_length": "windows"},
        {"text_pooling": "keywords", "keyword_weight": 3.0},
        {"text_pooling": "keywords-tokens"},
        ALL_THREE,
    ],
    ids=lambda changes: "+".join(changes),
)
def test_a_change_trains_and_its_codec_writes_files(changes, tmp_path):
    exp = tiny(**changes)
    run = fit(exp, tmp_path)
    sample = datasets("sample", captions=exp.captions)[0][0]
    codec = run.codec
    data = codec.encode(sample.image, sample.captions[0])
    assert codec.decode(data).size == sample.image.size
    assert load(tmp_path).encode(sample.image, sample.captions[0]) == data
    assert (codec.text_length, codec.text_pooling) == (exp.text_length, exp.text_pooling)
    assert codec.net.config == exp.model_config()
    # a picture of another shape than the training crops'
    assert codec.decode(codec.encode(sample.image.resize((200, 70)), "")).size == (200, 70)


def test_the_diff_is_the_change():
    exp = tiny()
    table = differences(exp, exp.replace(**ALL_THREE))
    assert dict(zip(table["setting"], table["here"])) == ALL_THREE


def test_same_steps_for_fewer_captions():
    exp = tiny().replace(epochs=3, batch_size=2)
    changed = same_steps(exp, exp.replace(captions="context"))
    steps = [
        e.epochs * -(-len(training_pairs("sample", 64, captions=e.captions)) // 2) for e in (exp, changed)
    ]
    assert steps[0] == steps[1] == 45
    assert same_steps(exp, exp.replace(attention="linformer")).epochs == 3


def test_context_captions_that_are_missing(tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text('{"a.png": "grey"}')
    assert len(training_pairs(tmp_path, 64)) == 1
    with pytest.raises(DataError, match="captions_context.json"):
        training_pairs(tmp_path, 64, captions="context")
    (tmp_path / "captions_context.json").write_text('{"b.png": "another"}')
    with pytest.raises(DataError, match="a.png"):
        training_pairs(tmp_path, 64, captions="context")
    with pytest.raises(SettingError, match="published"):
        training_pairs(tmp_path, 64, captions="long")


def test_kodak_has_context_captions(shared, tmp_path):
    (tmp_path / "kodak").symlink_to(shared / "kodak")
    (kodak,) = datasets("kodak", data_dir=tmp_path, captions="context")
    assert len(kodak) == 24 and all(len(kodak.captions(i)[0].split()) > 50 for i in range(24))


# --- Starting from other weights --------------------------------------------------------------------------------------


def test_weights_that_fit_are_loaded_and_the_others_named(tmp_path, capsys):
    start = fit(tiny(), tmp_path / "start")
    exp = tiny(attention="linformer").replace(init=str(start.dir))
    fit(exp, tmp_path / "next")
    said = capsys.readouterr().out
    assert "6 weights start from random weights" in said and "project_k" in said
    net = TACO(exp.model_config())
    new, unused = load_fitting(net, start.dir / "weights.safetensors")
    assert len(new) == 6 and not unused
    saved = dict(start.codec.net.named_parameters())
    assert all(torch.equal(p, saved[name]) for name, p in net.named_parameters() if name not in new)


def test_another_model_is_no_start(tmp_path):
    save_weights(tmp_path / "other.safetensors", make_codec().net, {})
    net = TACO(ModelConfig(**TINY))
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(CheckpointError, match="another model"):
        load_fitting(net, tmp_path / "other.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


# --- The notebooks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of the runs, in which the three notebooks find the same baseline."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=["02_context", "03_linformer", "04_keywords"])
def executed(request, runs, tmp_path_factory) -> tuple[str, Path]:
    """Name and folder of a notebook run headless, from an unrelated folder, on the bundled pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    notebook = with_answers(request.param, tmp_path_factory.mktemp("answers"))
    given = {"profile": "sample", "epochs": 1, "batch_size": 9, "eval_limit": 1, "out_dir": runs}
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb"]
    command += [word for name, value in given.items() for word in ("-p", name, str(value))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


def test_the_notebook_runs(executed, runs):
    name, folder = executed
    notebook = nbformat.read(folder / "out.ipynb", 4)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in shown) >= 1
    printed = "".join(output.get("text", "") for output in shown)
    assert "demo against demo-constant, " in printed
    label = name.partition("_")[2]
    (run,) = runs.glob(f"{label}-*")
    assert len(list(runs.glob("baseline-*"))) == 1
    about = json.loads((run / "evaluation.json").read_text())
    assert about["codec"] == label and about["weights"]["experiment"]["profile"] == "sample"
    assert list(run.glob("files/kodak-256/*.taco"))


def test_the_notebook_s_page_opens_without_a_network(executed):
    name, folder = executed
    assert (folder / "out.ipynb").stat().st_size < 15_000_000
    seen = opens_without_a_network(export_html(folder / "out.ipynb"))
    assert seen["figures"] >= 1 and seen["pictures"] >= 5
    assert seen["compare" if name == "02_context" else "attention"] == 1


def test_one_allowance_of_time_is_for_all_that_a_notebook_does(tmp_path, capsys):
    """It counts from when the parameters were checked, and what it has stopped is not evaluated."""
    how = {"profile": "sample", "out_dir": str(tmp_path), "device": "cpu"}
    p = Parameters(**how, max_hours=1.0, began=time.monotonic() - 3600)
    runs = train(p, {"baseline": tiny(), "linformer": tiny(attention="linformer")})
    assert [(run.steps, run.finished) for run in runs.values()] == [(1, False), (1, False)]
    capsys.readouterr()
    assert evaluate_runs(p, runs).empty and not list(tmp_path.rglob("evaluation.*"))
    total = runs["baseline"].total_steps
    assert capsys.readouterr().out.splitlines() == [
        f"Not evaluated: {label}, which has taken 1 of {total} steps." for label in runs
    ]
    for path in sorted(
        (REPOSITORY / "notebooks").glob("0[2-4]_*.ipynb")
    ):  # which then show no table of nothing
        drawn: list[object] = []
        namespace = {"p": p, "runs": runs, "sortable": sortable, "display": drawn.append}
        sources = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        for source in (s for s in sources if "evaluate_runs(p, runs)" in s):
            exec(source, namespace)
        assert namespace["results"].empty and not drawn

    finished = runs | {"baseline": fit(runs["baseline"].experiment, runs["baseline"].dir)}
    assert set(evaluate_runs(Parameters(**how, eval_limit=1), finished)["codec"]) == {"baseline"}


def test_a_bundled_codec_is_shown_on_a_few_pictures_and_a_checkpoint_on_all(tmp_path):
    """Notebook 01 would else evaluate the toy codec on 30,504 images of MS-COCO before it trains."""
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    (tmp_path / "captions.json").write_text(json.dumps({f"{i:03}.png": "" for i in range(30)}))
    sets = [CaptionedFolder(tmp_path, tmp_path / "captions.json", name="many")]
    (source,) = [
        cell.source
        for cell in nbformat.read(REPOSITORY / "notebooks" / "01_baseline.ipynb", 4).cells
        if cell.cell_type == "code" and "results = evaluate(" in cell.source
    ]
    for checkpoint, images in ((None, 24), ("0.0004.pth.tar", 30)):
        p = Parameters(profile="sample", out_dir=str(tmp_path / str(images)), checkpoint=checkpoint)
        namespace = {"p": p, "sets": sets, "codec": make_codec()}
        exec(source, namespace)
        assert len(namespace["results"]) == images


def test_the_lambdas_of_a_sweep_share_the_curves_of_other_codecs(tmp_path):
    shared = [Parameters(out_dir=str(tmp_path / f"lmbda-{lmbda}")).peers for lmbda in (0.1, 0.2)]
    assert shared == [tmp_path.resolve() / "peers"] * 2
    assert Parameters(out_dir=str(tmp_path / "runs")).peers == tmp_path.resolve() / "runs" / "peers"


def test_windows_with_keywords_is_refused_before_anything_is_loaded():
    with pytest.raises(SettingError, match="text_pooling"):
        tiny(text_length="windows", text_pooling="keywords")
