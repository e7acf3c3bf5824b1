"""A run of the profile paper touches no network: real loaders, the real caches, small random weights in them.

Nothing measured here means anything: CLIP, AlexNet and spaCy's model are stand-ins in the places of the real ones.
"""

import json
import os
import subprocess
import sys

import pytest

from taco_nb.files import REPOSITORY
from taco_nb.pretrained import ALEXNET, CLIP_B32, CLIP_L14, EN_CORE_WEB_SM


def clip(side: int) -> dict:
    """A CLIP for pictures of side x side that is as small as can be."""
    return {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": side, "layers": 1, "width": 64, "patch_size": 28},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }


GUARD = """
import os, socket, sys
from pathlib import Path

def refuse(call):
    def guarded(self, address, *rest):
        if self.family == socket.AF_UNIX:  # between processes of this machine
            return call(self, address, *rest)
        print("THE NETWORK WAS TOUCHED:", address, flush=True)
        os._exit(99)  # an exception might be caught
    return guarded

def resolve(host, *rest, **more):
    print("A NAME WAS ASKED FOR:", host, flush=True)
    os._exit(99)

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(getattr(socket.socket, name)))
socket.getaddrinfo = socket.gethostbyname = resolve
"""
RUN = (
    GUARD
    + """
import open_clip
open_clip.add_model_config(Path("clip"))  # the small ones in place of the real
from taco_nb import baseline, datasets, evaluate, fit

sizes = {"N": 8, "M": 16, "groups": (4, 12), "text_dim": 32, "heads": 2, "context_widths": (8, 8)}
exp = baseline("paper", sizes=sizes, crop=64, epochs=1, batch_size=4, text_pooling="keywords-tokens")
assert exp.k_P and exp.k_J and exp.train_data == "coco" and "en_core_web_sm" in exp.keyword_sources
run = fit(exp, "run", device="cpu", max_hours=1e-9)  # a step or two
results = evaluate(run.codec, datasets("coco", "kodak", limit=1), "run")
print("DONE", list(results["dataset"]), *(name for name in ("lpips", "cmmd", "clip_score") if name in results))
"""
)


@pytest.fixture
def prepared(tmp_path, shared, monkeypatch):
    """A folder to run in, with data and weights where a fetch puts them, and the environment that says so."""
    import open_clip
    import spacy
    import torch
    import torchvision
    from safetensors.torch import save_file

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coco").symlink_to(shared / "minicoco")
    (tmp_path / "data" / "kodak").symlink_to(shared / "kodak")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    ALEXNET.home.mkdir(parents=True)
    torch.save(torchvision.models.alexnet().state_dict(), ALEXNET.file, _use_new_zipfile_serialization=False)
    os.truncate(ALEXNET.file, ALEXNET.size)

    (tmp_path / "clip").mkdir()
    for network, side in ((CLIP_B32, 224), (CLIP_L14, 336)):
        repository = (
            open_clip.get_pretrained_cfg(*network.name.split("/"))["hf_hub"].strip("/").replace("/", "--")
        )
        snapshot = tmp_path / "hub" / f"models--{repository}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0123")
        weights = {
            name: weight.contiguous() for name, weight in open_clip.CLIP(**clip(side)).state_dict().items()
        }
        save_file(weights, snapshot / "open_clip_model.safetensors")
        (tmp_path / "clip" / f"{network.name.split('/')[0]}.json").write_text(json.dumps(clip(side)))

    package = tmp_path / "site" / EN_CORE_WEB_SM.name
    package.mkdir(parents=True)
    pipeline = spacy.blank("en", meta={"name": "core_web_sm", "version": "3.8.0"})
    pipeline.add_pipe("entity_ruler")
    pipeline.to_disk(package / f"{EN_CORE_WEB_SM.name}-3.8.0")
    (package / "meta.json").write_text(json.dumps(pipeline.meta))
    (package / "__init__.py").write_text(
        "from spacy.util import load_model_from_init_py\n"
        "def load(**overrides):\n    return load_model_from_init_py(__file__, **overrides)\n"
    )
    about = tmp_path / "site" / f"{EN_CORE_WEB_SM.name}-3.8.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: en-core-web-sm\nVersion: 3.8.0\n")
    return tmp_path, os.environ | {
        "TACO_NB_DATA": str(tmp_path / "data"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{REPOSITORY}",
        "OMP_NUM_THREADS": "1",
    }


def python(prepared, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    folder, environment = prepared
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | changes, cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_a_run_of_the_profile_paper_touches_no_network(prepared):
    names = [CLIP_B32.name, CLIP_L14.name, ALEXNET.name, EN_CORE_WEB_SM.name]
    status = python(prepared, "-m", "taco_nb.tools.cli", "status", *names)
    assert status.returncode == 0 and status.stdout.count(" there ") == 4, status.stdout + status.stderr
    done = python(prepared, "-c", RUN)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "DONE ['coco', 'kodak'] lpips cmmd clip_score"


def test_a_run_without_its_weights_says_what_to_fetch_and_asks_for_nothing(prepared):
    done = python(prepared, "-c", RUN, HF_HUB_CACHE=str(prepared[0] / "empty"), HF_HUB_OFFLINE="0")
    assert done.returncode == 1, done.stdout
    assert (
        f"MissingWeightsError: {CLIP_B32.name}" in done.stderr and f"run: {CLIP_B32.command}" in done.stderr
    )


def test_the_guard_guards(prepared):
    """What fetches does ask for what is not there."""
    fetch = GUARD + (
        "from taco_nb.tools.fetch import fetch_all\n"
        "for name in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        fetch_all([name], None)\n"
        "        os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
    )
    names = [CLIP_B32.name, "inception", "clic"]
    done = python(prepared, "-c", fetch, *names, HF_HUB_CACHE=str(prepared[0] / "empty"), HF_HUB_OFFLINE="0")
    assert done.stdout.splitlines().count("99") == done.stdout.count("WAS") == 3, done.stdout + done.stderr
