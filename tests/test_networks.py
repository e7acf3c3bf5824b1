"""Feature networks are found where their libraries keep them, and loaded by the real loaders; missing ones are named."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import command, make_inception, save_inception
from safetensors.torch import save_file
from test_evaluation import folder

from taco_nb import evaluate
from taco_nb.errors import SettingError
from taco_nb.metrics.networks import (
    METRICS,
    find_networks,
    given_networks,
    perceptual_distance,
    say_missing,
    state_digest,
)
from taco_nb.pretrained import CLIP_B32, CLIP_L14, INCEPTION
from taco_nb.text.clip import both_halves


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty folders in place of those where libraries keep what they download; any use of the network fails the test."""
    from huggingface_hub import constants

    def refuse(*_):
        raise AssertionError("something was asked of the network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    say_missing.cache_clear()
    perceptual_distance.cache_clear()
    yield tmp_path
    say_missing.cache_clear()
    perceptual_distance.cache_clear()


@pytest.fixture
def filled(caches, monkeypatch):
    """Files in the places of the real ones, with random weights: Inception, and CLIPs small enough for a test.

    open_clip is told their sizes under the names of CLIP B/32 and L/14@336.
    """
    INCEPTION.home.mkdir(parents=True)
    os.truncate(save_inception(INCEPTION.file), INCEPTION.size)
    sizes = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    paths = open_clip.factory._MODEL_CONFIG_PATHS
    with monkeypatch.context() as patch:
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*paths])
        for network, side in ((CLIP_B32, 32), (CLIP_L14, 48)):
            config = {
                "embed_dim": 12,
                "vision_cfg": sizes | {"image_size": side},
                "text_cfg": text,
                "quick_gelu": True,
            }
            model, tag = network.name.split("/")
            (caches / f"{model}.json").write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(caches / f"{model}.json")
            repository = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].strip("/").replace("/", "--")
            place = caches / "hub" / f"models--{repository}"
            for name in ("refs", "snapshots/abc"):
                (place / name).mkdir(parents=True)
            (place / "refs" / "main").write_text("abc")
            clip = open_clip.create_model(model, pretrained=None)
            save_file(clip.state_dict(), place / "snapshots" / "abc" / "open_clip_model.safetensors")
        both_halves.cache_clear()
        yield caches
        both_halves.cache_clear()
    open_clip.factory._rescan_model_configs()


def test_missing_networks_are_named_in_one_line_with_the_command_that_gets_them(caches, capsys):
    found, absent = find_networks()
    assert (
        found.keys() == {"mini_distance", "mini_mmd", "mini_score"}
        and absent.keys() == METRICS.keys() - found.keys()
    )
    for reason in absent.values():  # it goes into evaluation.json, which names no folder of a machine
        assert "run: taco-nb fetch " in reason and str(Path.home()) not in reason and "/tmp" not in reason
    say_missing(tuple(absent))
    say_missing(tuple(absent))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Without LPIPS, FID, CMMD and CLIP score, whose networks are not on this machine.")
    fetched = line.partition("run: taco-nb fetch ")[2].split()
    assert fetched == [METRICS[name].pretrained.name for name in absent]


def test_the_bundled_distance_stands_in_for_lpips_and_has_a_name_of_its_own(caches):
    distance = perceptual_distance()
    x = torch.rand(3, 64, 64)
    assert distance(x, x) == {"mini_distance": 0.0} and distance(x, 1 - x)["mini_distance"] > 0


def test_weights_on_this_machine_are_found_loaded_and_used(filled, tiny_codec, tmp_path, capsys):
    dataset = folder(tmp_path / "photos", {"a.png": (70, 64), "b.png": (64, 90)})
    results = evaluate(tiny_codec, [dataset], tmp_path / "out", patch_size=32)
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["data"]["photos"]
    assert said["absent"].keys() == {"lpips"} and capsys.readouterr().out.count("Without LPIPS, ") == 1
    assert said["metrics"]["fid"]["weights"] == "inception, 95,628,359 bytes"
    assert said["metrics"]["cmmd"]["weights"].startswith("ViT-L-14-336-quickgelu/openai, ")
    for metric in ("fid", "cmmd", "clip_score", "mini_distance", "mini_mmd", "mini_score"):
        assert results[metric].notna().all() and (results[metric] >= 0).all()


def test_given_networks_must_be_named_after_metrics():
    found, absent = given_networks({"fid": make_inception()})
    assert found["fid"].weights == f"given, SHA-256 {state_digest(make_inception().model)}"
    assert absent.keys() == METRICS.keys() - {"fid"}
    with pytest.raises(SettingError, match="No metric is called 'psnr'"):
        given_networks({"psnr": None})


def test_a_digest_follows_the_weights():
    network = make_inception().model
    before = state_digest(network)
    assert before == state_digest(make_inception().model) != state_digest(make_inception(7).model)
    with torch.no_grad():
        network[1].bias[0] += 1e-6
    assert state_digest(network) != before


def test_the_command_line_explains_itself(capsys):
    assert command("evaluate", "--help") == 0
    said = capsys.readouterr().out
    for option in ("--out", "--caption", "--captions", "--batch-size", "--patch-size", "--device", "--mode"):
        assert option in said
