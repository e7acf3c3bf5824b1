"""Evaluations of whole sets: their figures, and that they are the same after a kill, and never old ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import fresh_process, make_codec, make_inception, make_lpips, make_networks
from test_evaluation import folder

from taco_nb import evaluate
from taco_nb.data import CaptionedFolder, CaptionedImages
from taco_nb.data.images import to_tensor
from taco_nb.errors import DataError, MissingWeightsError, SettingError
from taco_nb.evaluation import means, read_evaluation
from taco_nb.metrics.fid import frechet_distance, patches
from taco_nb.metrics.joint_space import cmmd

CROPS = {f"{i}.png": (70 + 3 * i, 90 - 2 * i) for i in range(7)}
PHOTOS = {"barn.png": (96, 130), "cat.png": (40, 30), "dog.png": (64, 64)}
SETTINGS = {"batch_size": 3, "patch_size": 32}
TIMES = ["encode_s", "decode_s"]


def two_sets(home: Path) -> list[CaptionedImages]:
    """Seven crops of 64 x 64, in parts of 3, 3 and 1, and three whole photographs; three captions each."""
    if not home.exists():
        home.mkdir()
        folder(home / "crops", CROPS, captions=3)
        folder(home / "photos", PHOTOS, captions=3)
    names = ("crops", "photos")
    crops, photos = (CaptionedFolder(home / name, home / name / "captions.json") for name in names)
    return [crops.centre_crop(64), photos]


class Counted(CaptionedImages):
    """Counts the images that are asked for, and dies with the whole process when there are to be no more."""

    def __init__(self, dataset: CaptionedImages, at_most: int | None = None):
        super().__init__(dataset.name, dataset._entries)
        self.crop, self.asked, self.at_most = dataset.crop, [], at_most

    def __getitem__(self, i: int):
        if len(self.asked) == self.at_most:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked.append(i)
        return super().__getitem__(i)


@pytest.fixture(scope="module")
def networks():
    return make_networks()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, networks, tiny_codec):
    """(data sets, results, folder) of an evaluation in one process, by all metrics, their networks random."""
    home = tmp_path_factory.mktemp("evaluated")
    sets = two_sets(home / "data")
    return sets, evaluate(tiny_codec, sets, home / "out", networks=networks, **SETTINGS), home / "out"


@pytest.fixture
def small(tmp_path, networks):
    """(a codec, a function that evaluates four crops in batches of 3 with settings that it is given), LPIPS alone."""
    home, codec = tmp_path / "data", make_codec()
    folder(home, {name: CROPS[name] for name in list(CROPS)[:4]}, captions=2)

    def run(**changes):
        dataset = Counted(CaptionedFolder(home, home / "captions.json").centre_crop(64))
        settings = {"networks": {"lpips": networks["lpips"]}, **SETTINGS, **changes}
        return dataset.asked, evaluate(codec, [dataset], tmp_path / "out", **settings)

    return codec, run


def without_times(results: pd.DataFrame) -> pd.DataFrame:
    return results.drop(columns=TIMES)


def kept(out: Path, name: str) -> dict:
    """What evaluation.json says of a data set."""
    return json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["data"][name]


def pictures(sets, results, out, codec) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Originals and what their files decode to, as 8-bit pictures (1,3,H,W), of each data set."""
    found = {}
    for dataset in sets:
        found[dataset.name] = []
        for i in range(len(dataset)):
            sample = dataset[i]
            decoded = to_tensor(codec.decode(out / "files" / dataset.name / f"{sample.name}.taco"))
            found[dataset.name].append(
                tuple((255 * x).round().byte()[None] for x in (to_tensor(sample.image), decoded))
            )
    return found


# --- Figures of a whole set -------------------------------------------------------------------------------------------


def test_cmmd_is_that_of_all_pictures_of_a_set(evaluated, networks, tiny_codec):
    sets, results, out = evaluated
    for name, pairs in pictures(sets, results, out, tiny_codec).items():
        x, x_hat = (torch.cat([networks["cmmd"](picture) for picture in side]) for side in zip(*pairs))
        figures = results.loc[results["dataset"] == name, "cmmd"]
        assert figures.nunique() == 1 and figures.iloc[0] == pytest.approx(cmmd(x, x_hat), rel=1e-4)


def test_fid_is_over_crops_or_over_patches(evaluated, networks, tiny_codec):
    sets, results, out = evaluated
    seen = pictures(sets, results, out, tiny_codec)
    cut = {
        "crops": [torch.cat(side) for side in zip(*seen["crops"])],
        "photos": [torch.cat([patches(picture[0], 32) for picture in side]) for side in zip(*seen["photos"])],
    }
    counts = {"crops": 7, "photos": 3 * 4 + 2 * 3 + 0 + 2 * 2 + 1}  # of the cat, no square of 32 pixels
    for name, (x, x_hat) in cut.items():
        figures = results.loc[results["dataset"] == name, "fid"]
        expected = frechet_distance([(networks["fid"](x), networks["fid"](x_hat))])
        assert expected > 0
        assert figures.nunique() == 1 and figures.iloc[0] == pytest.approx(expected, rel=1e-4)
        assert kept(out, name)["metrics"]["fid"]["count"] == len(x) == counts[name]
    assert kept(out, "photos")["metrics"]["fid"]["of"] == "patches of 32x32"


def test_clip_score_is_that_of_the_picture_and_the_caption_of_its_row(evaluated, networks, tiny_codec):
    sets, results, out = evaluated
    seen = [pair for pairs in pictures(sets, results, out, tiny_codec).values() for pair in pairs]
    for row, (_, x_hat) in zip(results.itertuples(), seen, strict=True):
        assert row.clip_score == pytest.approx(networks["clip_score"](x_hat, [row.caption])[0], abs=1e-3)
    assert results["clip_score"].min() >= 0 and results["clip_score"].max() > 0


def test_means_have_the_figures_of_the_set(evaluated):
    _, results, _ = evaluated
    table = means(results).set_index("dataset")
    for name, rows in results.groupby("dataset"):
        assert table.loc[name, ["fid", "cmmd"]].tolist() == pytest.approx(
            rows[["fid", "cmmd"]].iloc[0].tolist()
        )


def test_the_json_says_by_which_protocol_and_what_is_absent(evaluated, small, tmp_path):
    said, mini = kept(evaluated[2], "crops"), {"mini_distance", "mini_mmd", "mini_score"}
    assert said["absent"].keys() == mini
    assert said["caption"]["rule"] == "first" and said["settings"]["batch_size"] == 3
    for metric, words in {
        "fid": "299 x 299",
        "cmmd": "sigma 10",
        "clip_score": "no prompt",
        "lpips": "[0, 1]",
    }.items():
        assert words in said["metrics"][metric]["protocol"] and said["metrics"][metric]["weights"].startswith(
            "given"
        )
    small[1]()
    assert kept(tmp_path / "out", "data")["absent"].keys() == {"fid", "cmmd", "clip_score"} | mini


def test_few_patches_are_said_to_be_few(tmp_path, tiny_codec, capsys):
    dataset, networks = folder(tmp_path / "photos", PHOTOS), {"fid": make_inception(24)}
    for size, words in (
        (32, "FID of photos is over 23 patches of 32x32, no more than the 24 features"),
        (130, "No FID"),
    ):
        results = evaluate(tiny_codec, [dataset], networks=networks, patch_size=size)
        assert [line.startswith(words) for line in capsys.readouterr().out.splitlines()] == [True]
        assert results["fid"].isna().all() == (size == 130)


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_crops_go_through_in_batches_and_whole_images_alone(tmp_path, evaluated, networks):
    codec, sizes = make_codec(), []
    encode_batch = codec.encode_batch
    codec.encode_batch = lambda images, captions: sizes.append(len(images)) or encode_batch(images, captions)
    results = evaluate(codec, two_sets(tmp_path / "data"), networks={"lpips": networks["lpips"]}, **SETTINGS)
    assert sizes[-6:] == [3, 3, 1, 1, 1, 1]
    assert results.loc[:2, "encode_s"].nunique() == 1 and results.loc[2:3, "encode_s"].nunique() == 2


def test_a_row_of_a_batch_is_the_row_of_its_image(evaluated, tiny_codec, networks):
    sets, results, _ = evaluated
    alone = evaluate(tiny_codec, sets, networks=networks, **SETTINGS | {"batch_size": 1})
    for column in results.columns.difference(TIMES):
        if pd.api.types.is_numeric_dtype(results[column]):
            assert alone[column].to_numpy() == pytest.approx(
                results[column].to_numpy(), rel=1e-3, nan_ok=True
            ), column
        else:
            assert (alone[column] == results[column]).all()


# --- Which caption ----------------------------------------------------------------------------------------------------


def test_the_best_caption_is_that_of_the_lowest_lpips(tmp_path, networks):
    codec, sets = make_codec(), two_sets(tmp_path / "data")
    results = evaluate(codec, sets, tmp_path / "out", caption="best", networks=networks, **SETTINGS)
    samples = [(dataset, dataset[i]) for dataset in sets for i in range(len(dataset))]
    turns = []
    for row, (dataset, sample) in zip(results.itertuples(), samples, strict=True):
        files = [codec.encode(sample.image, caption) for caption in sample.captions]
        x = to_tensor(sample.image)
        distances = [networks["lpips"](x, codec.decode_tensor(data))["lpips_01"] for data in files]
        if math.isnan(distances[0]):  # a side of 30 pixels is too short for LPIPS
            assert row.caption == sample.captions[0] and row.name == "cat.png"
            continue
        assert row.lpips_01 == pytest.approx(min(distances), rel=1e-3)
        turn = sample.captions.index(row.caption)
        assert distances[turn] == pytest.approx(min(distances), rel=1e-3)
        data = (tmp_path / "out" / "files" / dataset.name / f"{sample.name}.taco").read_bytes()
        assert len(data) == row.bytes and codec.decode(data) is not None
        turns.append(turn)
    assert len(set(turns)) > 1, "else the rule is not seen to choose"
    assert kept(tmp_path / "out", "crops")["caption"]["rule"] == "best"


def test_the_last_caption_and_captions_of_different_number(tmp_path, small, networks):
    _, run = small
    assert all(caption.startswith("caption 1") for caption in run(caption="last")[1]["caption"])
    home = tmp_path / "data"
    texts = {name: [f"{k} of {name}" for k in range(1 + i)] for i, name in enumerate(list(CROPS)[:4])}
    (home / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
    assert list(run(caption="last")[1]["caption"]) == [captions[-1] for captions in texts.values()]
    assert run(caption="best")[1]["caption"][0] == "0 of 0.png"


def test_the_best_caption_needs_lpips_and_rules_have_names(small):
    _, run = small
    with pytest.raises(MissingWeightsError, match='caption="best" is chosen by LPIPS'):
        run(caption="best", networks={})
    with pytest.raises(SettingError, match='caption must be "first" or "last" or "best", but is \'worst\''):
        run(caption="worst")


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"num_processes": 0}, "num_processes must be"),
        ({"num_processes": 1.5}, "num_processes must be"),
        ({"patch_size": 7}, "even number of pixels, but it is 7"),
        ({"networks": {"fido": None}}, "No metric is called 'fido'"),
    ],
)
def test_bad_settings(small, bad, words):
    with pytest.raises(SettingError, match=words):
        small[1](**bad)


def test_processes_without_a_gpu_each(small, monkeypatch):
    codec, run = small
    monkeypatch.setattr(type(codec), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SettingError, match="num_processes=3 needs a GPU for each, but here are 2"):
        run(num_processes=3)


# --- Killed, and gone on with -----------------------------------------------------------------------------------------


def evaluate_until_killed(home: str, images: int) -> None:
    """In a process of its own: it dies by SIGKILL when it asks for one image more."""
    crops, photos = two_sets(Path(home) / "data")
    sets = [Counted(crops, images), Counted(photos, max(images - len(crops), 0))]
    evaluate(make_codec(), sets, Path(home) / "out", networks=make_networks(), **SETTINGS)


def test_after_kill_9_it_goes_on_where_it_was(tmp_path, evaluated, networks, tiny_codec, capsys):
    """Killed in the second batch of crops; what the first one gave is read from the disk, and not measured again."""
    sets, finished = two_sets(tmp_path / "data"), 3
    process = fresh_process(evaluate_until_killed, str(tmp_path), 5, output=tmp_path / "said")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()[-2000:]
    out = tmp_path / "out"
    assert not list(out.glob("evaluation.*"))
    names = [f"{i}.png.json" for i in range(finished)]
    assert sorted(path.name for path in (out / "files").rglob("*.json")) == names
    rows = [json.loads((out / "files" / "crops" / name).read_text(encoding="utf-8"))["row"] for name in names]
    assert len(list((out / "features").rglob("*.safetensors"))) == 1

    counted = [Counted(dataset) for dataset in sets]
    results = evaluate(tiny_codec, counted, out, networks=networks, **SETTINGS)
    assert (
        f"Going on with the evaluation in {out}: {finished} of 10 images are done." in capsys.readouterr().out
    )
    assert [dataset.asked for dataset in counted] == [[3, 4, 5, 6], [0, 1, 2]]
    for column in (
        "name",
        "psnr",
        "clip_score",
        *TIMES,
    ):  # the very same, as they were measured before the kill
        assert list(results[column][:finished]) == [row[column] for row in rows]
    pd.testing.assert_frame_equal(without_times(results), without_times(evaluated[1]), check_exact=True)
    assert not list((out / "features").rglob("*.*"))


def test_an_error_leaves_what_was_measured(tmp_path, small):
    _, run = small
    image = (tmp_path / "data" / "3.png").read_bytes()
    (tmp_path / "data" / "3.png").write_bytes(image[:100])
    with pytest.raises(DataError, match=r"3\.png"):
        run()
    assert len(list((tmp_path / "out" / "files").rglob("*.json"))) == 3
    (tmp_path / "data" / "3.png").write_bytes(image)
    assert run()[0] == [3]


@pytest.mark.parametrize("damage", ["halved", "another digest", "no .taco", "foreign"])
def test_a_record_that_is_not_true_is_measured_again(damage, tmp_path, small):
    _, run = small
    _, results = run()
    path = tmp_path / "out" / "files" / "data" / "1.png.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    if damage == "halved":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "another digest":
        path.write_text(json.dumps(record | {"measured_under": "0" * 64}))
    elif damage == "no .taco":
        path.with_suffix(".taco").unlink()
    else:
        path.write_text("[]")
    asked, again = run()
    assert asked == [0, 1, 2], "the batch of 3 that it belongs to, and not the other one"
    pd.testing.assert_frame_equal(without_times(again), without_times(results), check_exact=True)


def test_features_that_are_gone_are_made_again(tmp_path, tiny_codec, networks):
    crops, _ = two_sets(tmp_path / "data")
    how = SETTINGS | {"networks": {"fid": networks["fid"]}}
    with pytest.raises(DataError):
        first = Counted(crops)
        first._entries = [*first._entries[:3], first._entries[3]._replace(path=tmp_path / "none.png")]
        evaluate(tiny_codec, [first], tmp_path / "out", **how)
    shutil.rmtree(tmp_path / "out" / "features")
    counted = Counted(crops)
    results = evaluate(tiny_codec, [counted], tmp_path / "out", **how)
    assert counted.asked == list(range(7)) and results["fid"].notna().all()


def evaluate_and_ask_to_stop(home: str) -> None:
    """In a process of its own: a batch system signals it while it measures the second batch."""
    crops, photos = two_sets(Path(home) / "data")

    class Signalled(Counted):
        def __getitem__(self, i: int):
            if i == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(i)

    evaluate(make_codec(), [Signalled(crops), photos], Path(home) / "out", networks={}, **SETTINGS)


def test_a_signal_stops_it_between_two_batches(tmp_path, tiny_codec):
    process = fresh_process(evaluate_and_ask_to_stop, str(tmp_path), output=tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1 and "StoppedError: The evaluation in" in said, said[-2000:]
    counted = [Counted(dataset) for dataset in two_sets(tmp_path / "data")]
    evaluate(tiny_codec, counted, tmp_path / "out", networks={}, **SETTINGS)
    assert [dataset.asked for dataset in counted] == [[6], [0, 1, 2]]


def test_files_of_results_do_not_wait_for_the_disk(small, monkeypatch):
    """A run over MS-COCO writes 152,000 of them."""
    waited = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: waited.append(descriptor))
    _, run = small
    run(caption="best")
    assert len(waited) <= 2, "evaluation.json and evaluation.csv alone"


# --- Finished: the same again, or from the start ----------------------------------------------------------------------


def test_a_finished_evaluation_is_returned_at_once(small, tmp_path, capsys, monkeypatch):
    _, run = small
    _, results = run()

    def written():
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    files = written()
    capsys.readouterr()

    def refuse(path):
        raise AssertionError(f"{path} was read once more")

    monkeypatch.setattr("taco_nb.evaluation.records.sha256", refuse)
    asked, again = run()
    assert asked == [] and capsys.readouterr().out.startswith(
        "Evaluated before, and nothing has changed since"
    )
    pd.testing.assert_frame_equal(again, results, check_exact=True)
    assert files == written()


def test_a_copy_of_the_same_images_is_the_same(small, tmp_path):
    _, run = small
    run()
    for path in (tmp_path / "data").glob("*.png"):
        os.utime(path, (1, 1))
    assert run()[0] == []


def other_weights(codec, home):
    with torch.no_grad():
        codec.net.g_a.analysis_transform[0].bias.add_(
            0.01
        )  # of the encoder: the decoder, and the fingerprint, stay


def other_caption(codec, home):
    path = home / "captions.json"
    path.write_text(path.read_text(encoding="utf-8").replace("caption 0 of 1.png", "a cat"), encoding="utf-8")


def other_image(codec, home):
    shutil.copy(home / "2.png", home / "1.png")


def other_tower(codec, home):
    codec.text_tokens = 7
    codec.__dict__.pop("tower", None), codec.__dict__.pop("conditioning", None)


CHANGES = {
    "weights": other_weights,
    "data": [other_caption, other_image],
    "text encoder": other_tower,
    "mode": lambda codec, home: setattr(codec, "mode", "fast"),
    "caption": {"caption": "last"},
    "batch_size": {"batch_size": 2},
    "networks": {"networks": lambda: {"lpips": make_lpips(1)}},
}


@pytest.mark.parametrize(
    "what, change",
    [
        (what, one)
        for what, change in CHANGES.items()
        for one in (change if isinstance(change, list) else [change])
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_has_changed_is_said_and_evaluated(small, tmp_path, capsys, what, change):
    codec, run = small
    _, before = run()
    if callable(change):
        change(codec, tmp_path / "data")
        change = {}
    change = {key: value() if callable(value) else value for key, value in change.items()}
    capsys.readouterr()
    asked, after = run(**change)
    assert asked == ([0, 1, 2] if what == "data" else [0, 1, 2, 3]), "of the data, one batch has changed"
    assert (
        f"Evaluating data again in {tmp_path / 'out'}: other than the last time are {what}."
        in capsys.readouterr().out
    )
    assert run(**change)[0] == []
    if what in ("weights", "data", "caption", "networks"):
        assert not without_times(after).equals(without_times(before))


def test_a_codec_under_another_name_is_the_same(small, tmp_path):
    """As a notebook names it by its label, and the command line by its run."""
    codec, run = small
    codec.name = "one"
    _, before = run()
    codec.name = "another"
    asked, after = run()
    assert asked == [] and set(before["codec"]) == {"one"} and set(after["codec"]) == {"another"}
    pd.testing.assert_frame_equal(after.assign(codec="one"), before, check_exact=True)


def test_what_does_not_change_the_figures_changes_nothing(small, monkeypatch):
    """Crops know no patches, and Pillow gives the same pixels whatever its version; that of torch may not."""
    from taco_nb.evaluation import run as module

    _, run = small
    _, before = run()
    assert run(patch_size=16)[0] == []
    true = module.provenance()
    for package, version in (("pillow", "99.0"), ("torch", "99.0")):
        changed = true | {"packages": true["packages"] | {package: version}}
        monkeypatch.setattr(module, "provenance", lambda changed=changed: changed)
        asked, after = run()
        assert asked == [] and after.equals(before)


def test_half_an_evaluation_is_not_gone_on_with_under_another_torch(small, tmp_path, monkeypatch):
    from taco_nb.evaluation import run as module

    _, run = small
    true = module.provenance()
    for package, asked in (("pillow", [0, 1, 2]), ("torch", [0, 1, 2, 3])):
        run()
        (tmp_path / "out" / "evaluation.json").unlink()
        (tmp_path / "out" / "files" / "data" / "0.png.json").unlink()
        changed = true | {"packages": true["packages"] | {package: "99.0"}}
        monkeypatch.setattr(module, "provenance", lambda changed=changed: changed)
        assert run()[0] == asked


def test_a_change_of_what_is_computed_starts_over(small, monkeypatch):
    _, run = small
    run()
    monkeypatch.setattr("taco_nb.evaluation.run.code_digest", lambda *_: "another program")
    assert run()[0] == [0, 1, 2, 3]


def test_a_table_that_somebody_has_edited_is_not_believed(small, tmp_path, capsys):
    """The one for people is restored; of the one that is read, only what the records say."""
    _, run = small
    _, results = run()
    table, about = tmp_path / "out" / "evaluation.csv", tmp_path / "out" / "evaluation.json"
    for path, was, other in ((table, '"3.png",64', '"3.png",65'), (about, '"width": 64', '"width": 65')):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(was, other), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != text
        asked, again = run()
        assert asked == [] and again.equals(results) and read_evaluation(tmp_path / "out").equals(results)
    assert "65" not in table.read_text(encoding="utf-8").split(",")


def test_figures_outlive_their_networks(small, networks):
    """On a machine without the weights, what was measured with them is still true; new weights are a reason to measure."""
    _, run = small
    run(networks={name: networks[name] for name in ("lpips", "cmmd")})
    asked, results = run()
    assert asked == [] and "cmmd" in results
    asked, results = run(networks=networks)
    assert asked and {"cmmd", "fid", "clip_score"} <= set(results)


def test_captions_that_look_like_nothing_are_read_as_they_are(tmp_path, tiny_codec, networks):
    dataset = folder(tmp_path / "photos", {name: (40, 32) for name in ("a.png", "b.png", "c.png", "d.png")})
    texts = {"a.png": "", "b.png": "nan", "c.png": "NA", "d.png": '1, "2"\n3'}
    (tmp_path / "photos" / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
    dataset = CaptionedFolder(tmp_path / "photos", tmp_path / "photos" / "captions.json")
    results = evaluate(tiny_codec, [dataset], tmp_path / "out", networks={"lpips": networks["lpips"]})
    assert list(results["caption"]) == list(texts.values())
    assert results["ms_ssim"].isna().all() and results["ms_ssim"].dtype == float
    pd.testing.assert_frame_equal(read_evaluation(tmp_path / "out"), results)
