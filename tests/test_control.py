"""The controls: conditions, a codec that cannot hear, one that does, and what is said of either."""

from __future__ import annotations

import math
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import torch
from browser import opens_without_a_network
from conftest import with_answers

from taco_nb import control as controls
from taco_nb import datasets, load
from taco_nb.checkpoint import bundled_codecs
from taco_nb.codec import Codec
from taco_nb.control import (
    CONDITIONS,
    against,
    captions_under,
    control,
    derangement,
    effects,
    heard,
    listening,
    said,
    said_of_siblings,
    shape_psnr,
    siblings,
)
from taco_nb.data.shapes import scene
from taco_nb.errors import SettingError
from taco_nb.model.adapter import Injector
from taco_nb.text.tokens import clip_tokenizer
from taco_nb.tools.export import export_html


def deaf(name: str = "demo") -> Codec:
    """Return a bundled codec whose Injectors add nothing."""
    codec = load(name)
    for layer in codec.net.g_a.analysis_transform:
        if isinstance(layer, Injector):
            torch.nn.init.zeros_(layer.gamma)
    return codec


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    sets = [dataset.head(2) for dataset in datasets("kodak-256")]
    out = tmp_path_factory.mktemp("control")
    tables = [control(codec, sets, out / codec.name) for codec in (load("demo"), named(deaf(), "deaf"))]
    assert sorted(path.name for path in (out / "deaf").iterdir()) == sorted([*CONDITIONS, "control.csv"])
    assert len(list((out / "deaf" / "NA").rglob("*.taco"))) == 2
    return pd.concat(tables, ignore_index=True)


def named(codec: Codec, name: str) -> Codec:
    codec.name = name
    return codec


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_a_derangement_leaves_nothing_in_its_place(count):
    for seed in range(20):
        order = derangement(count, seed)
        assert sorted(order) == list(range(count)) and all(i != k for i, k in enumerate(order))
    assert len({tuple(derangement(100, seed)) for seed in range(5)}) == 5
    assert derangement(100, 3) == derangement(100, 3)


def test_one_picture_has_no_other_whose_caption_it_could_get():
    with pytest.raises(SettingError, match="another's caption"):
        captions_under("another's", ["a red barn"])


def test_what_the_encoder_reads_under_each_condition():
    own = ["a red barn by a lake", "two parrots"]
    read = {condition: captions_under(condition, own) for condition in CONDITIONS}
    assert read["own"] == own and read["another's"] == own[::-1]
    assert (
        read["constant"] == ["A photograph."] * 2 and read["empty"] == [""] * 2 and read["NA"] == ["NA"] * 2
    )
    encode = clip_tokenizer().encode
    assert [len(encode(text)) for text in read["nonsense"]] == [len(encode(text)) for text in own]
    assert not set(" ".join(read["nonsense"]).split()) & set(" ".join(own).split())
    with pytest.raises(SettingError, match="one of own, another's, constant"):
        captions_under("none", own)


def test_digests_tell_the_conditions_apart_and_rows_say_what_was_read(table):
    assert table.groupby("codec")["captions"].nunique().tolist() == [len(CONDITIONS)] * 2
    of_demo = table[table["codec"] == "demo"]
    assert len(of_demo) == 2 * len(CONDITIONS)
    own = of_demo[of_demo["condition"] == "own"].set_index("name")
    (dataset,) = datasets("kodak-256", limit=2)
    assert [own["caption"][name] for name in dataset.names] == [dataset.captions(i)[0] for i in range(2)]


def test_scores_ask_for_the_own_caption_whatever_the_encoder_read(table):
    """The files of a deaf codec are the same under every caption, so all that is measured of them is the same too."""
    same = table[table["codec"] == "deaf"].groupby("name")[["bytes", "psnr", "mini_distance", "mini_score"]]
    assert (same.nunique() == 1).all(axis=None)


def test_a_codec_that_cannot_hear_has_no_effect_at_all_and_one_that_reads_has_some(table):
    found = effects(table)
    assert (found[found["codec"] == "deaf"]["effect"] == 0).all()
    of_demo = found[(found["codec"] == "demo") & (found["metric"] == "psnr")]
    assert (of_demo["effect"] != 0).all() and set(of_demo["condition"]) == set(CONDITIONS) - {"own"}
    assert found["low"].isna().all(), "two pictures have no interval"


def test_the_sentence_follows_the_figures():
    rows = [
        {"codec": "c", "dataset": "d", "condition": condition, "name": str(i), "bytes": size, "psnr": psnr}
        for i in range(20)
        for condition, size, psnr in (("own", 1000, 30.0), ("another's", 1000 + i % 2, 29.0 - i % 2 / 10))
    ]
    sentence = said(effects(pd.DataFrame([*rows, *_others(rows)])))
    assert (
        "changes bits by +0.05 % (" in sentence
        and "PSNR by -1.1 dB (" in sentence
        and "another picture" in sentence
    )
    for row in rows:
        row["psnr"] = 30 + (int(row["name"]) % 2 - 0.5 if row["condition"] != "own" else 0)
        row["bytes"] = 1000
    sentence = said(effects(pd.DataFrame([*rows, *_others(rows)])))
    assert "bits not at all: the files are the same" in sentence
    assert "PSNR by less than 0.2" in sentence and "cannot be told from nothing" in sentence


def _others(rows: list[dict]) -> list[dict]:
    """Return rows of the conditions that these lack."""
    own = [row for row in rows if row["condition"] == "own"]
    return [
        row | {"condition": name} for name in CONDITIONS if name not in ("own", "another's") for row in own
    ]


def test_a_listening_codec_is_recognised_and_a_deaf_one_is_not():
    hears = heard(listening(load("shapes-softmax"), 32)).set_index("kind")
    assert hears["low"]["free"] > 1, "the named shape gains more than a decibel"
    for codec in (load("shapes-constant"), deaf("shapes-softmax")):
        table = listening(codec, 16)
        assert (table["listening"] == 0).all() and (table["bytes_own"] == table["bytes_other"]).all()


def test_every_pair_of_shapes_has_its_turn():
    table = listening(deaf("shapes-softmax"), 24)
    of_kind = table[table["kind"] == "free"]
    pairs = set()
    for row in of_kind.itertuples():
        names = scene(row.seed, False).names
        pairs.add((names.index(row.named), names.index(row.other)))
    assert len(of_kind) == 12 == len(pairs)


def test_the_psnr_of_a_shape_looks_at_its_pixels_alone():
    shown = scene(1)
    x_hat = shown.image / 255
    x_hat[:, shown.masks[2]] = 0
    assert shape_psnr(shown, 0, x_hat) == pytest.approx(60, abs=0.1)
    values = shown.image[:, shown.masks[2]].double()
    assert shape_psnr(shown, 2, x_hat) == pytest.approx(
        10 * math.log10(255**2 / values.square().mean()), abs=1e-4
    )


def test_whole_pictures_go_alone_and_crops_by_the_batch():
    whole, crops = datasets("kodak", "kodak-256")
    assert [len(batch) for batch in controls._batches(whole)] == [1] * 24
    assert [len(batch) for batch in controls._batches(crops)] == [16, 8]


def test_control_refuses_what_is_no_list_of_sets():
    with pytest.raises(SettingError, match="a list"):
        control(load("demo"), datasets("kodak-256")[0])


# --- The notebook -----------------------------------------------------------------------------------------------------


def test_notebook_07_runs_and_its_page_opens_without_a_network(tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(with_answers("07_control", tmp_path)),
        "out.ipynb",
    ]
    for name, value in (("profile", "sample"), ("eval_limit", "2"), ("out_dir", "here")):
        command += ["-p", name, value]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / "out.ipynb", 4)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in shown)
    assert "demo on kodak-256: reading the caption of another picture" in printed
    assert (tmp_path / "here" / "control-demo" / "control.csv").is_file()
    seen = opens_without_a_network(export_html(tmp_path / "out.ipynb"))
    assert seen["figures"] >= 3 and seen["pictures"] >= 2


def test_a_score_is_against_the_captions_of_the_set_whatever_is_read():
    plain, context = datasets("kodak-256", limit=2), datasets("kodak-256", limit=2, captions="context")
    codec = load("demo-constant")  # which writes the same files
    tables = [
        control(codec, sets, conditions=("own",), read=read)
        for sets, read in ((plain, None), (plain, context))
    ]
    assert list(tables[0]["mini_score"]) == list(tables[1]["mini_score"])
    assert set(tables[0]["caption"]).isdisjoint(tables[1]["caption"])
    assert list(control(codec, context, conditions=("own",))["mini_score"]) != list(tables[0]["mini_score"])


# --- Codecs that were trained alike -----------------------------------------------------------------------------------


def of_runs(**psnrs: tuple[float, ...]) -> pd.DataFrame:
    """A table as `siblings` gives it: a row per run and picture, 12 pictures, {name_seed: PSNR of each}."""
    rows = []
    for run, values in psnrs.items():
        codec, _, seed = run.rpartition("_")
        rows += [
            {
                "codec": codec,
                "seed": int(seed),
                "name": f"{i}.png",
                "condition": "own",
                "bytes": 1000,
                "psnr": value,
            }
            for i, value in enumerate(values)
        ]
    return pd.DataFrame(rows)


def test_siblings_are_held_against_each_other_seed_by_seed_and_picture_by_picture():
    base = tuple(30.0 + i for i in range(12))
    better = tuple(value + 0.5 for value in base)
    best = tuple(value + 0.7 for value in base)
    table = of_runs(a_1=base, a_2=base, b_1=better, b_2=best, b_3=best)
    found = against(table, [("b", "a"), ("b", "nobody")])
    row = found[found["metric"] == "psnr"].iloc[0]
    assert (
        row["effect"] == pytest.approx(0.6)
        and row["seeds"] == pytest.approx((0.5, 0.7))
        and row["images"] == 12
    )
    assert set(found["codec"]) == {"b"} and set(found["sibling"]) == {"a"}
    said = said_of_siblings(found)
    assert "b against a, over 2 seeds: bits not at all" in said and "PSNR by +0.6 dB (+0.5 to +0.7)" in said


def test_seeds_that_disagree_are_no_difference():
    base = (30.0,) * 12
    table = of_runs(a_1=base, a_2=base, b_1=(30.5,) * 12, b_2=(29.9,) * 12)
    assert "PSNR by less than 0.5 dB either way, which cannot be told from nothing" in said_of_siblings(
        against(table, [("b", "a")])
    )


def test_the_bundled_results_have_every_picture_and_more_than_one_seed():
    table = siblings()
    assert table.groupby(["codec", "seed", "condition"])["name"].nunique().eq(24).all()
    assert set(table["condition"]) == {"own", "another's"} and table.notna().all(axis=None)
    seeds = table.groupby("codec")["seed"].nunique()
    assert {*bundled_codecs()} <= {*seeds.index} and seeds["demo"] >= 2 and seeds["demo-constant"] >= 2
    constant = (
        table[table["codec"] == "demo-constant"].set_index(["seed", "condition", "name"])["bytes"].unstack(1)
    )
    assert (constant["own"] == constant["another's"]).all(), "it reads one caption only"
    codec, dataset = load("demo"), datasets("kodak-256", limit=2)
    rows = control(codec, dataset, conditions=("own",))
    kept = table[(table["codec"] == "demo") & (table["seed"] == 1) & (table["condition"] == "own")].set_index(
        "name"
    )
    assert [kept["bytes"][name] for name in rows["name"]] == pytest.approx(list(rows["bytes"]), rel=0.01)
