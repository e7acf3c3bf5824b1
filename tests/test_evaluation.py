"""Evaluation: the numbers are those of the files that it keeps, and say where they came from, and nothing else."""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import environment_of, fresh_process, make_codec, make_net, precision_put_back, run_python

from taco_nb import datasets, evaluate, load
from taco_nb.checkpoint import save_weights
from taco_nb.data import CaptionedFolder, CaptionedImages
from taco_nb.data.images import to_tensor
from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation import evaluate_matched, evaluate_peers, means, read_evaluation
from taco_nb.evaluation.peers import available_peers
from taco_nb.evaluation.records import write_csv
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY
from taco_nb.metrics.distortion import psnr
from taco_nb.metrics.perception import Lpips
from taco_nb.processes import cpu_count
from taco_nb.provenance import code_digest, commit
from taco_nb.widgets import rate_distortion

SIZES = {"barn.png": (176, 192), "cat.png": (70, 45), "dog.png": (161, 163)}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not on this machine")


def picture(width: int, height: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).uniform(0, 255, (height // 8 + 2, width // 8 + 2, 3))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def folder(root: Path, sizes=SIZES, captions: int = 2) -> CaptionedFolder:
    from PIL import Image

    root.mkdir()
    for seed, (name, size) in enumerate(sizes.items()):
        Image.fromarray(picture(*size, seed)).save(root / name)
    texts = {name: [f"caption {i} of {name}" for i in range(captions)] for name in sizes}
    (root / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
    return CaptionedFolder(root, root / "captions.json")


def overshooting_codec():
    """A codec whose pictures leave [0, 1] far enough for clamping to show."""
    codec = make_codec()
    with torch.no_grad():
        codec.net.g_s.synthesis_transform[-1].bias.copy_(torch.tensor([1.3, -0.4, 0.5]))
    return codec


@pytest.fixture(scope="module")
def network():
    """LPIPS over a backbone of fixed random weights."""
    import lpips

    with torch.random.fork_rng(devices=[]), pytest.warns(UserWarning):
        torch.manual_seed(0)
        return lpips.LPIPS(pnet_rand=True, verbose=False, eval_mode=False)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, network):
    """(codec, data set, results, the folder that evaluate filled)"""
    home = tmp_path_factory.mktemp("evaluated")
    codec, dataset = overshooting_codec(), folder(home / "photos")
    results = evaluate(codec, [dataset], home / "out", networks={"lpips": Lpips(model=network)})
    return codec, dataset, results, home / "out"


# --- A row per image, of a real file ----------------------------------------------------------------------------------


def test_a_row_per_image_with_its_first_caption(evaluated):
    codec, dataset, results, _ = evaluated
    assert list(results["name"]) == list(dataset.names) == sorted(SIZES)
    assert [tuple(size) for size in results[["width", "height"]].to_numpy()] == [
        SIZES[n] for n in results["name"]
    ]
    assert list(results["caption"]) == [f"caption 0 of {name}" for name in results["name"]]
    assert set(results["codec"]) == {codec.name} and set(results["dataset"]) == {"photos"}
    assert (results[["encode_s", "decode_s"]] > 0).all(axis=None)


def test_bytes_are_those_of_the_files_and_bpp_follows(evaluated):
    _, _, results, out = evaluated
    for row in results.itertuples():
        assert row.bytes == (out / "files" / "photos" / f"{row.name}.taco").stat().st_size
        assert row.bpp == 8 * row.bytes / (row.width * row.height)
    assert len(list((out / "files").rglob("*.taco"))) == len(results)


def test_a_kept_file_is_what_encode_gives_for_that_caption(evaluated):
    codec, dataset, _, out = evaluated
    for name, image, captions in (dataset[i] for i in range(len(dataset))):
        kept = (out / "files" / "photos" / f"{name}.taco").read_bytes()
        assert kept == codec.encode(image, captions[0]) != codec.encode(image, captions[1])


def test_decoding_the_kept_files_gives_the_psnr_of_the_table(evaluated):
    codec, dataset, results, out = evaluated
    for i, row in enumerate(results.itertuples()):
        decoded = codec.decode(out / "files" / "photos" / f"{row.name}.taco")
        assert psnr(to_tensor(dataset[i].image), to_tensor(decoded)) == row.psnr
        error = np.asarray(dataset[i].image, float) - np.asarray(decoded, float)
        assert row.psnr == pytest.approx(10 * math.log10(255**2 / np.mean(error**2)), abs=1e-4)


def test_psnr_taco_is_that_of_the_floats(evaluated):
    codec, dataset, results, out = evaluated
    for i, row in enumerate(results.itertuples()):
        x_hat = codec.decode_tensor(out / "files" / "photos" / f"{row.name}.taco").double().numpy()
        assert x_hat.min() < -0.2 and x_hat.max() > 1.2
        x = np.asarray(dataset[i].image, float).transpose(2, 0, 1) / 255
        assert row.psnr_taco == pytest.approx(-10 * math.log10(np.mean((x - x_hat) ** 2)), abs=1e-4)
        assert row.psnr_taco < row.psnr - 0.1  # only there does it cost to leave [0, 1]


def test_small_pictures_have_ms_ssim_by_the_reference_protocol_only(evaluated):
    results = evaluated[2].set_index("name")
    assert results["ms_ssim"].isna().to_dict() == {"barn.png": False, "cat.png": True, "dog.png": False}
    assert results["ms_ssim_taco"].notna().all()


def test_lpips_in_both_conventions(evaluated, network):
    codec, dataset, results, out = evaluated
    for i, row in enumerate(results.itertuples()):
        path = out / "files" / "photos" / f"{row.name}.taco"
        x, shown, floats = (
            to_tensor(dataset[i].image),
            to_tensor(codec.decode(path)),
            codec.decode_tensor(path),
        )
        with torch.no_grad():
            assert row.lpips == pytest.approx(network(2 * shown[None] - 1, 2 * x[None] - 1).item())
            assert row.lpips_01 == pytest.approx(network(floats[None], x[None]).item())
        assert row.lpips != pytest.approx(row.lpips_01, rel=0.01)


def test_without_weights_one_line_says_so(tmp_path):
    """In a process of its own that has no cache of weights, and must not ask for one."""
    program = """
import socket, sys
from pathlib import Path
from conftest import make_codec
from test_evaluation import folder
from taco_nb import evaluate

def refuse(*_):
    raise AssertionError("An evaluation asked the network for something.")

socket.socket.connect = socket.getaddrinfo = refuse
for seed in range(2):
    results = evaluate(make_codec(seed), [folder(Path(sys.argv[1]) / str(seed), {"a.png": (64, 64)})])
    assert not {"lpips", "lpips_01", "fid", "cmmd", "clip_score"} & set(results), results.columns
"""
    caches = dict.fromkeys(("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"), str(tmp_path / "cache"))
    lines = run_python(program, tmp_path, env=environment_of(**caches)).stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "Without LPIPS, FID, CMMD and CLIP score, whose networks are not on "
    )
    assert " run: taco-nb fetch " in lines[0]


def test_without_a_folder_nothing_is_kept(tmp_path, tiny_codec, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = folder(tmp_path / "photos", {"a.png": (40, 30)})
    before = sorted(tmp_path.rglob("*"))
    assert len(evaluate(tiny_codec, [dataset], networks={"lpips": Lpips(model=network)})) == 1
    assert sorted(tmp_path.rglob("*")) == before


# --- What is kept beside the files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, network):
    """(experiment, data set, results, folder) of a codec from a file, in a process with something to hide"""
    home = tmp_path_factory.mktemp("saved")
    experiment = baseline("sample", seed=7).replace(text_encoder="untrained-16", text_tokens=8)
    about = {"name": "a run", "experiment": asdict(experiment), "steps": 3}
    save_weights(home / "weights.safetensors", make_net(), about)
    dataset = folder(home / "photos")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OPENAI_API_KEY", "HF_TOKEN", "USER", "LOGNAME", "HOSTNAME", "HOME"):
            patch.setenv(name, f"secret-of-{name}")
        codec = load(home / "weights.safetensors")
        results = evaluate(codec, [dataset], home / "out", networks={"lpips": Lpips(model=network)})
    return experiment, dataset, results, home / "out"


def test_the_csv_holds_every_digit(saved):
    _, _, results, out = saved
    pd.testing.assert_frame_equal(pd.read_csv(out / "evaluation.csv", float_precision="round_trip"), results)


def test_the_json_says_where_the_numbers_came_from(saved):
    experiment, dataset, results, out = saved
    said = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert said["codec"] == said["weights"]["name"] == "a run"
    assert said["weights"]["experiment"] == json.loads(experiment.to_json())
    assert said["text_encoder"] == "untrained-16"
    assert said["fingerprint"] == load(out.parent / "weights.safetensors").fingerprint.hex()
    assert (said["ablation"], said["lmbda"]) == ("baseline", experiment.lmbda)
    of_photos = said["data"]["photos"]
    assert (of_photos["images"], of_photos["skipped"], of_photos["sha256"]) == (3, 0, dataset.checksum())
    captions = {"kind": "published", "file": "captions.json", "sha256": dataset.captions_digest()}
    assert of_photos["captions"] == captions
    assert of_photos["label"].startswith("baseline, ") and "profile sample" in of_photos["unjudged"]
    assert of_photos["python"] == platform.python_version()
    assert of_photos["packages"]["torch"] == metadata.version("torch")
    assert of_photos["packages"].keys() >= {"torch", "compressai", "lpips", "numpy", "pillow"}
    assert of_photos["commit"] == commit()
    assert of_photos["hardware"]["cores"] == cpu_count() and of_photos["hardware"]["cpu"]
    pd.testing.assert_frame_equal(pd.DataFrame(said["means"]), means(results))


def test_the_json_says_how_many_were_left_out_and_which_captions(tmp_path, tiny_codec):
    whole = folder(tmp_path / "photos", {"small.png": (40, 30), "large.png": (70, 66)})
    paragraphs = datasets("sample", limit=1, captions="context")[0]
    evaluate(tiny_codec, [whole.centre_crop(64), paragraphs], tmp_path, networks={})
    said = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["data"]
    of = {name: (data["images"], data["skipped"], data["captions"]["kind"]) for name, data in said.items()}
    assert of == {"photos": (1, 1, "published"), "sample": (1, 0, "context")}


def test_the_json_is_json_even_of_pictures_too_small_for_ms_ssim(tmp_path, tiny_codec, network):
    dataset = folder(tmp_path / "photos", {"a.png": (40, 30)})
    evaluate(tiny_codec, [dataset], tmp_path, networks={"lpips": Lpips(model=network)})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    said = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert said["means"][0]["ms_ssim"] is None


def test_no_file_names_the_machine_the_user_or_the_environment(saved):
    out = saved[3]
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) == 2 * len(SIZES) + 2
    for path in files:
        content = path.read_bytes()
        assert b"secret-of-" not in content, path
        if path.suffix != ".taco":
            for private in (str(Path.home()), str(out.parent)):
                assert private.encode() not in content, path
            for private in (platform.node(), getpass.getuser()):
                assert not re.search(rf"\b{re.escape(private)}\b", content.decode()), path


def test_an_unreadable_image_is_named_and_no_table_is_left(tmp_path, tiny_codec, network):
    dataset = folder(tmp_path / "photos")
    (tmp_path / "photos" / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises(DataError, match=r"cat\.png cannot be read"):
        evaluate(tiny_codec, [dataset], tmp_path / "out", networks={"lpips": Lpips(model=network)})
    assert not list((tmp_path / "out").glob("evaluation.*"))


def test_bad_lists_of_data_sets(tmp_path, tiny_codec, network):
    dataset = folder(tmp_path / "photos", {"a.png": (40, 30)})
    networks = {"lpips": Lpips(model=network)}
    for bad, message in (
        (dataset, "a list"),
        ([], "at least one"),
        ([dataset, dataset.head(1)], "the same name"),
    ):
        with pytest.raises(SettingError, match=message):
            evaluate(tiny_codec, bad, networks=networks)
        with pytest.raises(SettingError, match=message):
            evaluate_peers(bad)


class Watched(CaptionedImages):
    """Counts how many of the images that it has given out are alive whenever another one is asked for."""

    def __init__(self, dataset: CaptionedImages):
        super().__init__("watched", dataset._entries)
        self.given: list[weakref.ref] = []
        self.most = 0

    def __getitem__(self, i: int):
        sample = super().__getitem__(i)
        self.given.append(weakref.ref(sample.image))
        self.most = max(self.most, sum(image() is not None for image in self.given))
        return sample


def test_images_pass_by_one_at_a_time(tmp_path, tiny_codec, network):
    photos = folder(tmp_path / "photos", {f"{i}.png": (40, 32) for i in range(4)})
    watched = [Watched(photos) for _ in range(3)]
    results = evaluate(tiny_codec, [watched[0]], networks={"lpips": Lpips(model=network)})
    evaluate_matched(results, [watched[1]])
    evaluate_peers([watched[2]], [20])
    for dataset in watched:
        assert len(dataset.given) == 4 and dataset.most <= 2


def test_the_tower_is_loaded_before_the_first_image_is_timed(tmp_path, network):
    codec = make_codec()
    codec.text_encoder = "untrained-32"  # of a width that these weights do not read
    watched = Watched(folder(tmp_path / "photos", {"a.png": (40, 32)}))
    with pytest.raises(SettingError, match="32"):
        evaluate(codec, [watched], networks={"lpips": Lpips(model=network)})
    assert not watched.given


# --- One folder, and what is in it ------------------------------------------------------------------------------------

ODD = [
    "a boat\r",
    "a\rb",
    "a\r\nb",
    "\n",
    '"',
    "a,b",
    "",
    "nan",
    "NA",
    "a\0b",
    " x ",
    "\u2028",
    "日本",
    "=1+1",
    "1.50",
    "\\",
]


def test_tables_hold_captions_and_names_as_they_are(tmp_path, tiny_codec):
    """A carriage return made invented rows on Python before 3.11.9, in which its CSV writer does not quote it."""
    from PIL import Image

    for i in range(len(ODD)):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "a\rb.png").write_bytes((tmp_path / "0.png").read_bytes())
    texts = {f"{i}.png": text for i, text in enumerate(ODD)} | {"a\rb.png": "a name with a carriage return"}
    (tmp_path / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
    dataset = CaptionedFolder(tmp_path, tmp_path / "captions.json", name="odd")
    results = evaluate(tiny_codec, [dataset], tmp_path / "out", networks={})
    assert dict(zip(results["name"], results["caption"])) == texts and set(results["dataset"]) == {"odd"}
    assert read_evaluation(tmp_path / "out").equals(results)
    text = {"dtype": dict.fromkeys(("name", "caption"), str), "keep_default_na": False}
    for engine in ("c", "python"):
        table = pd.read_csv(tmp_path / "out" / "evaluation.csv", engine=engine, **text)
        found = dict(zip(table["name"], table["caption"]))
        assert found == {name: caption.replace("\0", "\ufffd") for name, caption in texts.items()}


def test_a_table_that_reads_otherwise_than_it_was_written_is_refused(tmp_path):
    write_csv(tmp_path / "a.csv", pd.DataFrame({"name": ["a", "b"], "psnr": [1.0, math.nan]}))
    with pytest.raises(DataError, match=r"b\.csv, read back, does not hold the rows"):
        write_csv(
            tmp_path / "b.csv", pd.DataFrame({"name": ["a", "b"], "text of no known column": ["01", "2"]})
        )


def test_another_data_set_is_kept_beside_the_first(tmp_path, capsys):
    codec, photos, more = (
        make_codec(),
        folder(tmp_path / "photos"),
        folder(tmp_path / "more", {"a.png": (40, 30)}),
    )
    first = evaluate(codec, [photos], tmp_path / "out", networks={})
    second = evaluate(codec, [more], tmp_path / "out", networks={}, caption="last")
    assert set(second["dataset"]) == {"more"}
    both = read_evaluation(tmp_path / "out")
    assert list(both["dataset"]) == ["photos"] * 3 + ["more"] and both[:3].equals(first)
    assert len(pd.read_csv(tmp_path / "out" / "evaluation.csv")) == 4
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    rules = {name: of_set["caption"]["rule"] for name, of_set in said["data"].items()}
    assert rules == {"photos": "first", "more": "last"}
    capsys.readouterr()
    assert (
        evaluate(codec, [more, photos], tmp_path / "out", networks={}, caption="last")["dataset"][0] == "more"
    )
    assert "Evaluating photos again" in capsys.readouterr().out
    with torch.no_grad():
        codec.net.g_a.analysis_transform[0].bias.add_(0.01)
    evaluate(codec, [more], tmp_path / "out", networks={})
    assert "The earlier figures of photos" in capsys.readouterr().out
    assert set(read_evaluation(tmp_path / "out")["dataset"]) == {"more"}


def evaluate_under(rule: str, home: str) -> None:
    """In a process of its own: evaluate, and fail unless every row is of the rule that is asked for, and reported."""
    photos = CaptionedFolder(Path(home) / "photos", Path(home) / "photos" / "captions.json")
    results = evaluate(make_codec(), [photos], Path(home) / "out", caption=rule, networks={})
    turn = {"first": 0, "last": 1}[rule]
    assert list(results["caption"]) == [f"caption {turn} of {name}" for name in photos.names]


def test_two_evaluations_in_one_folder_wait_for_each_other(tmp_path, tiny_codec):
    """Each gets its own rows, and what is left says what it is."""
    photos = folder(tmp_path / "photos", {f"{i:02}.png": (200, 160) for i in range(12)})
    said = [tmp_path / "first said", tmp_path / "last said"]
    both = [
        fresh_process(evaluate_under, rule, str(tmp_path), output=output)
        for rule, output in zip(("first", "last"), said)
    ]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], [path.read_text() for path in said]
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    rule = about["data"]["photos"]["caption"]["rule"]
    turn = {"first": 0, "last": 1}[rule]
    assert {row["caption"] for row in about["rows"]} == {f"caption {turn} of {name}" for name in photos.names}
    results = evaluate(tiny_codec, [photos], tmp_path / "out", caption=rule, networks={})
    assert [row["psnr"] for row in about["rows"]] == list(results["psnr"])


def test_the_second_of_two_says_that_it_waits(tmp_path, tiny_codec, capsys):
    photos = folder(tmp_path / "photos", {"a.png": (40, 30)})
    code = """
import sys, time
from pathlib import Path
from taco_nb.processes import alone_in
with alone_in(Path(sys.argv[1]), "evaluating"):
    print("held", flush=True)
    time.sleep(2)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"],
        env=environment_of(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    evaluate(tiny_codec, [photos], tmp_path / "out", networks={})
    assert holder.wait(600) == 0
    assert f"is evaluating in {tmp_path / 'out'}: waiting for it to end." in capsys.readouterr().out


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="a setting of PyTorch 2.9 and later"
)
def test_a_lowered_precision_around_it_neither_stops_it_nor_changes_a_figure(tmp_path, tiny_codec):
    sets, times = [folder(tmp_path / "photos", {"a.png": (40, 30)})], ["encode_s", "decode_s"]
    plain = evaluate(tiny_codec, sets, networks={})
    with precision_put_back():
        torch.backends.fp32_precision = "tf32"
        lowered = evaluate(tiny_codec, sets, networks={})
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    pd.testing.assert_frame_equal(lowered.drop(columns=times), plain.drop(columns=times), check_exact=True)


def evaluate_one(home: str) -> None:
    print(len(evaluate(make_codec(), [folder(Path(home) / "photos", {"a.png": (40, 30)})], networks={})))


def test_a_leftover_of_a_launcher_keeps_nobody_waiting(tmp_path):
    process = fresh_process(evaluate_one, str(tmp_path), output=tmp_path / "said", WORLD_SIZE="2")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0 and "1" in said.splitlines(), said


def test_captions_that_were_replaced_are_not_called_published(tmp_path, tiny_codec):
    """The experiment of effl-lab/TACO#2: every caption is "NA". The report must not judge it."""
    sample = datasets("sample", limit=1)[0]
    (tmp_path / "na.json").write_text(json.dumps(dict.fromkeys(sample.names, "NA")))
    replaced = sample.recaptioned(tmp_path / "na.json")
    evaluate(tiny_codec, [replaced], tmp_path / "out", networks={})
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["data"]["sample"]
    digest = replaced.captions_digest()
    assert said["captions"] == {"kind": "replaced", "file": "na.json", "sha256": digest}
    assert digest != sample.captions_digest()
    assert "evaluated with captions replaced, not published" in said["unjudged"]
    assert "captions=replaced" in said["label"] and said["evaluate"] is None


def test_names_too_long_for_a_file_system_get_short_files(tmp_path, tiny_codec):
    from PIL import Image

    names = [letter + "図" * 80 + ".jpg" for letter in "ab"]
    for name in names:
        Image.fromarray(picture(64, 64, len(name))).save(tmp_path / name)
    (tmp_path / "captions.json").write_text(json.dumps(dict.fromkeys(names, "")))
    dataset = CaptionedFolder(tmp_path, tmp_path / "captions.json", name="long")
    assert list(evaluate(tiny_codec, [dataset], tmp_path / "out", networks={})["name"]) == names
    files = list((tmp_path / "out").rglob("*.taco"))
    assert len(files) == 2 and all(len(os.fsencode(path.name)) < 220 for path in files)


# --- Other codecs -----------------------------------------------------------------------------------------------------


def test_peers_have_a_row_per_image_and_quality(tmp_path):
    dataset = folder(tmp_path / "photos")
    rows = evaluate_peers([dataset], [30, 80], ["JPEG", "WebP"])
    assert len(rows) == 3 * 2 * 2
    assert not rows.duplicated(["codec", "dataset", "name", "quality"]).any()
    assert rows["bpp"].to_numpy() == pytest.approx(8 * rows["bytes"] / (rows["width"] * rows["height"]))
    by_quality = rows.pivot(index=["codec", "name"], columns="quality", values=["bytes", "psnr"])
    for column in ("bytes", "psnr"):
        assert (by_quality[column][80] > by_quality[column][30]).all()
    assert set(evaluate_peers([dataset.head(1)], [50])["codec"]) == set(available_peers())


def test_matched_peers_stay_within_the_budget(evaluated):
    _, dataset, results, _ = evaluated
    budgets = {"barn.png": 3000, "cat.png": 100, "dog.png": 2000}
    matched = evaluate_matched(results.assign(bytes=results["name"].map(budgets)), [dataset])
    assert len(matched) == 3 * len(available_peers())
    over = matched["bytes"] > matched["name"].map(budgets)
    assert (over == matched["above_target"]).all()
    assert over.any() and not over.all()
    smallest = evaluate_peers([dataset], [1], ["JPEG"]).set_index("name")["bytes"]
    for row in matched[over & (matched["codec"] == "JPEG")].itertuples():
        assert row.chosen_quality == 1 and row.bytes == smallest[row.name]


def test_matching_needs_one_budget_per_image(evaluated):
    _, dataset, results, _ = evaluated
    with pytest.raises(SettingError, match="single codec"):
        evaluate_matched(pd.concat([results, results.assign(codec="another")]), [dataset])
    with pytest.raises(SettingError, match=r"dog\.png of photos is not in these results"):
        evaluate_matched(results.iloc[:2], [dataset])


def test_curves_are_kept_as_long_as_they_are_true(tmp_path, monkeypatch):
    dataset = folder(tmp_path / "photos", {"a.png": (40, 32), "b.png": (64, 64)})
    curves = evaluate_peers([dataset], [30, 80], ["JPEG"], tmp_path / "peers")
    pd.testing.assert_frame_equal(curves, evaluate_peers([dataset], [30, 80], ["JPEG"]))
    with monkeypatch.context() as patch:
        patch.setattr("taco_nb.evaluation.peers.peer_curve", lambda *_: pytest.fail("encoded once more"))
        again = evaluate_peers([dataset], [30, 80], ["JPEG"], tmp_path / "peers")
    pd.testing.assert_frame_equal(again, curves)
    assert len(evaluate_peers([dataset], [30], ["JPEG", "WebP"], tmp_path / "peers")) == 4
    shutil.copy(tmp_path / "photos" / "b.png", tmp_path / "photos" / "a.png")
    other = evaluate_peers([dataset], [30, 80], ["JPEG"], tmp_path / "peers")
    assert set(other["width"]) == {64}


def test_a_picture_that_comes_back_unharmed_does_not_hide_a_curve(tmp_path):
    """JPEG reproduces a white page exactly, and a PSNR of it is infinite, or whatever it is capped to."""
    from PIL import Image

    dataset = folder(tmp_path / "photos", {"noise.png": (200, 200)})
    Image.new("RGB", (200, 200), "white").save(tmp_path / "photos" / "white.png")
    texts = {"noise.png": "noise", "white.png": "paper"}
    (tmp_path / "photos" / "captions.json").write_text(json.dumps(texts))
    dataset = CaptionedFolder(tmp_path / "photos", tmp_path / "photos" / "captions.json")
    table = means(evaluate_peers([dataset], [20, 80], ["JPEG"], tmp_path / "peers"))
    assert np.isfinite(table["psnr"]).all() and (table["images"] == 2).all()
    (curve,) = [trace for trace in rate_distortion(table_of(dataset)).data if "lines" in trace.mode]
    assert all(y is not None for y in curve.y)


def table_of(dataset) -> pd.DataFrame:
    return evaluate_peers([dataset], [20, 80], ["JPEG"])


# --- Means and the report ---------------------------------------------------------------------------------------------


def test_means_of_frames_put_together(evaluated):
    _, dataset, results, _ = evaluated
    other = results.assign(codec="other", psnr=results["psnr"] + 2)
    peers = evaluate_peers([dataset], [30, 80], ["JPEG"])
    together = pd.concat([results, other, peers])
    assert not together.index.is_unique
    table = means(together)
    assert list(table["codec"]) == [results["codec"][0], "other", "JPEG", "JPEG"]
    assert not {"width", "height"} & set(table)
    for row, codec, quality in zip(table.itertuples(), table["codec"], table["quality"]):
        part = [
            record
            for record in together.to_dict("records")
            if record["codec"] == codec and (record["quality"] == quality or math.isnan(quality))
        ]
        assert row.images == len(part) == 3
        for column in ("bytes", "bpp", "psnr", "ms_ssim", "psnr_taco", "lpips_01"):
            known = [record[column] for record in part if not math.isnan(record[column])]
            expected = sum(known) / len(known) if known else math.nan
            assert getattr(row, column) == pytest.approx(expected, nan_ok=True)


def test_means_say_over_how_many_images_they_are():
    rows = pd.DataFrame({"codec": "a", "dataset": "d", "name": list("pqrs"), "bpp": [1.0, 2.0, 3.0, 4.0]})
    rows = rows.assign(psnr=[30.0, math.inf, 32.0, math.inf], ms_ssim=[0.5, 0.7, math.nan, 0.6], fid=math.nan)
    (table,) = means(rows).to_dict("records")
    assert (table["images"], table["bpp"], table["psnr"], table["ms_ssim"]) == (
        4,
        2.5,
        31,
        pytest.approx(0.6),
    )
    assert (table["psnr_images"], table["ms_ssim_images"]) == (2, 3)
    assert not {"bpp_images", "fid_images"} & table.keys()
    assert list(means(rows, ["images", "ms_ssim", "lpips"])) == ["images", "ms_ssim", "ms_ssim_images"]
    figure = rate_distortion(rows)
    assert "mean of 4 images (psnr of 2) (ms_ssim of 3)" in figure.data[0].text


def test_means_keep_data_sets_apart(evaluated):
    results = evaluated[2]
    table = means(pd.concat([results, results.assign(dataset="elsewhere", bpp=9.0)])).set_index("dataset")
    assert table.loc["elsewhere", "bpp"] == 9 and table.loc["photos", "bpp"] == pytest.approx(
        results["bpp"].mean()
    )


# --- The commit -------------------------------------------------------------------------------------------------------


def commit_of(root: Path) -> str:
    """What `commit()` says in a copy of the package at `root`."""
    program = "from taco_nb.provenance import code_digest, commit; print(commit())"
    return run_python(program, env=dict(os.environ), cwd=root).stdout.strip()


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


@needs_git
def test_the_commit_is_that_of_this_code_or_none(tmp_path):
    root = tmp_path / "outer" / "inner"
    shutil.copytree(REPOSITORY / "taco_nb", root / "taco_nb", ignore=shutil.ignore_patterns("__pycache__"))
    assert commit_of(root) == "None"

    git(root.parent, "init", "--quiet")
    git(root.parent, "commit", "--quiet", "--allow-empty", "-m", "somebody else's work")
    assert commit_of(root) == "None", "that is the commit of the repository around it"

    git(root, "init", "--quiet")
    assert commit_of(root) == "None", "nothing is committed yet"
    git(root, "add", "taco_nb")
    git(root, "commit", "--quiet", "-m", "all of it")
    head = git(root, "rev-parse", "HEAD")
    assert commit_of(root) == head
    with open(root / "taco_nb" / "files.py", "a", encoding="utf-8") as file:
        file.write("\n")
    assert commit_of(root) == f"{head}+changes"


def test_a_digest_of_code_changes_with_what_it_computes_and_not_with_its_words(tmp_path, monkeypatch):
    shutil.copytree(
        REPOSITORY / "taco_nb", tmp_path / "taco_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    here = code_digest("model", "codec.py")
    monkeypatch.setattr("taco_nb.provenance.__file__", str(tmp_path / "taco_nb" / "provenance.py"))
    assert code_digest("model", "codec.py") == here != code_digest("model")
    path = tmp_path / "taco_nb" / "codec.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace('"""The file', '"""The bytes of a file').replace("\n\n\n", "\n\n# changed\n\n")
    )
    assert path.read_text() != text and code_digest("model", "codec.py") == here
    path.write_text(text.replace("VERSION = 2", "VERSION = 3"))
    assert code_digest("model", "codec.py") != here
