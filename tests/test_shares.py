"""An evaluation shared by several processes, started from a notebook or by accelerate: the table that one leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from conftest import command, make_net, make_networks
from test_unfinished import SETTINGS, kept, two_sets, without_times

from taco_nb import evaluate
from taco_nb.checkpoint import save_weights
from taco_nb.errors import DataError
from taco_nb.evaluation import read_evaluation
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY


def test_two_processes_leave_the_table_that_one_leaves(tmp_path, tiny_codec):
    sets, networks, one, two = (
        two_sets(tmp_path / "data"),
        make_networks(),
        tmp_path / "one",
        tmp_path / "two",
    )
    results = evaluate(tiny_codec, sets, one, networks=networks, **SETTINGS)
    shared = evaluate(tiny_codec, sets, two, networks=networks, num_processes=2, **SETTINGS)
    pd.testing.assert_frame_equal(without_times(shared), without_times(results), check_exact=True)
    for path in (one / "files").rglob("*.taco"):
        assert (two / "files" / path.relative_to(one / "files")).read_bytes() == path.read_bytes()
    for name in ("crops", "photos"):
        assert kept(two, name)["settings"] == kept(one, name)["settings"]
        assert kept(two, name)["label"] == kept(one, name)["label"]
    assert {path.name for path in two.iterdir()} >= {"evaluation.csv", "evaluation.json", "files"}


def test_what_stops_one_of_two_processes_is_raised(tmp_path, tiny_codec):
    sets = two_sets(tmp_path / "data")
    path = tmp_path / "data" / "crops" / "5.png"
    path.write_bytes(path.read_bytes()[:100])  # the header, by which it is large enough, and no more
    with pytest.raises(DataError, match=r"5\.png cannot be read"):
        evaluate(tiny_codec, sets, tmp_path / "out", networks={}, num_processes=2, **SETTINGS)
    assert not list((tmp_path / "out").glob("evaluation.*"))


@pytest.fixture(scope="module")
def paper_data(tmp_path_factory, shared):
    """A data folder with Kodak and MS-COCO in the layout of the profile paper, and a run of a tiny codec."""
    home = tmp_path_factory.mktemp("paper")
    (home / "data").mkdir()
    (home / "data" / "kodak").symlink_to(shared / "kodak")
    (home / "data" / "coco").symlink_to(shared / "minicoco")
    experiment = baseline("sample", text_encoder="untrained-16", text_tokens=8)
    save_weights(
        home / "run" / "weights.safetensors", make_net(), {"name": "run", "experiment": asdict(experiment)}
    )
    return home


def test_the_command_line_on_two_processes_of_accelerate_and_on_one(
    paper_data, tmp_path, capsys, monkeypatch
):
    """Kodak by patches, MS-COCO's restval by crops in batches, from real files, the same table both ways."""
    for name in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    arguments = ["kodak", "coco", "--limit", "3", "--batch-size", "2", "--data-dir", str(paper_data / "data")]
    arguments += ["--device", "cpu", "--caption", "last"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [*launch, "-m", "taco_nb.evaluation", str(paper_data / "run"), *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("whose networks are not on this machine") == 1, "one process speaks for both"
    assert command("evaluate", paper_data / "run", *arguments, "--out", tmp_path / "one") == 0
    assert "coco" in capsys.readouterr().out
    two, one = read_evaluation(paper_data / "run"), read_evaluation(tmp_path / "one")
    pd.testing.assert_frame_equal(without_times(two), without_times(one), check_exact=True)
    assert list(one["dataset"]) == ["kodak"] * 3 + ["coco"] * 3 and set(one["width"][3:]) == {256}
    assert one["encode_s"][3] == one["encode_s"][4] != one["encode_s"][5], "one batch of two, one of one"


def test_the_command_lines_mode_is_that_of_the_transforms(tmp_path):
    experiment = baseline("sample", text_encoder="untrained-16", text_tokens=8)
    save_weights(tmp_path / "weights.safetensors", make_net(), {"experiment": asdict(experiment)})
    assert command("evaluate", tmp_path, "sample", "--limit", 1, "--device", "cpu", "--mode", "fast") == 0
    assert kept(tmp_path, "sample")["settings"]["mode"] == "fast"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the CUDA device that is asked for")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert command("evaluate", tmp_path, "--device", "cuda") == 1
    assert 'device="cuda", but PyTorch sees no CUDA device here' in capsys.readouterr().err


def test_the_command_line_says_what_is_wrong_in_one_line(paper_data, capsys):
    data = ["--data-dir", str(paper_data / "data"), "--device", "cpu"]
    for wrong, words in (
        ([paper_data / "run", "kodok"], "There is no data set 'kodok'"),
        ([paper_data / "nothing"], "No checkpoint "),
        ([paper_data / "run" / "weights.safetensors", "kodak"], "--out"),
        ([paper_data / "run", "kodak", "--caption", "worst"], "caption must be"),
        ([paper_data / "run", "kodak", "--patch-size", "5"], "even number"),
    ):
        assert command("evaluate", *wrong, *data) == 1
        said = capsys.readouterr().err
        assert said.startswith("Error: ") and words in said and said.count("\n") == 1
    assert command("evaluate") == 2
    assert "Missing argument 'CODEC'" in capsys.readouterr().err
