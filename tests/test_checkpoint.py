"""What was saved is what is loaded, and nothing else is: no damaged file, no stranger's code."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_net
from PIL import Image

from taco_nb import Codec, checkpoint, load
from taco_nb.errors import CheckpointError, WrongWeightsError
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write, sha256
from taco_nb.model import TACO

ABOUT = {"name": "tiny", "experiment": {"text_encoder": "untrained-16", "text_tokens": 8}, "steps": 7}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
CAPTION = "a red barn"


def own_codec(net: TACO) -> Codec:
    return Codec(net, ABOUT["experiment"]["text_encoder"], ABOUT["experiment"]["text_tokens"])


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "tiny.safetensors"
    checkpoint.save_weights(path, make_net(), ABOUT)
    return path


# The project's own files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"heads": 4, "context_widths": (12, 5)}, {"groups": (16,)}])
def test_a_saved_codec_is_the_same_codec(tmp_path, sizes):
    before = own_codec(make_net(**sizes))
    data = before.encode(IMAGE, CAPTION)
    checkpoint.save_weights(tmp_path / "tiny.safetensors", before.net, ABOUT)
    after = load(tmp_path / "tiny.safetensors")
    assert after.net.config == before.net.config
    assert after.fingerprint == before.fingerprint
    assert after.encode(IMAGE, CAPTION) == data
    assert after.decode(data) == before.decode(data)
    assert after.name == "tiny" and after.about.items() >= ABOUT.items()
    assert not after.net.training


def test_half_precision_is_half_the_file(tmp_path):
    net = make_net(N=32, M=64, groups=(16, 48))
    for dtype in (torch.float32, torch.float16):
        checkpoint.save_weights(tmp_path / f"{dtype}.safetensors", net, ABOUT, dtype)
    whole, half = (load(tmp_path / f"{dtype}.safetensors") for dtype in (torch.float32, torch.float16))
    sizes = [(tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in (torch.float32, torch.float16)]
    assert sizes[1] < 0.6 * sizes[0]
    data = half.encode(IMAGE, CAPTION)
    difference = np.abs(np.int16(half.decode(data)) - np.int16(whole.decode(whole.encode(IMAGE, CAPTION))))
    assert difference.mean() < 2
    assert load(tmp_path / f"{torch.float16}.safetensors").decode(data) == half.decode(data)
    with pytest.raises(WrongWeightsError):
        whole.decode(data)
    for weight in half.net.state_dict().values():
        assert weight.dtype in (torch.float32, torch.int32)


def test_the_tables_of_z_are_kept_and_not_made_anew(tmp_path):
    before = own_codec(make_net())
    before.net.update()
    before.net.entropy_bottleneck._quantized_cdf[:, 3] += (
        1  # as another machine's rounding might have made them
    )
    data = before.encode(IMAGE, CAPTION)
    checkpoint.save_weights(tmp_path / "tiny.safetensors", before.net, ABOUT)
    after = load(tmp_path / "tiny.safetensors")
    assert after.decode(data) == before.decode(data)
    assert torch.equal(
        after.net.entropy_bottleneck.quantized_cdf, before.net.entropy_bottleneck.quantized_cdf
    )
    after.net.update()
    assert not torch.equal(
        after.net.entropy_bottleneck.quantized_cdf, before.net.entropy_bottleneck.quantized_cdf
    )


def test_a_save_that_is_interrupted_leaves_the_old_file(saved):
    before = saved.read_bytes()
    with pytest.raises(KeyboardInterrupt), atomic_write(saved) as file:
        file.write(before[:1000])
        raise KeyboardInterrupt
    broken = make_net(1)
    broken.g_s.synthesis_transform[1].weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoint.save_weights(saved, broken, ABOUT)
    with pytest.raises(TypeError):
        checkpoint.save_weights(saved, make_net(1), ABOUT | {"net": object()})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


# The authors' files --------------------------------------------------------------------------------------------------


def reference_checkpoint(net: TACO) -> dict:
    """What the authors' training loop saves, CompressAI's older names and empty tables included."""
    state = {}
    for key, value in net.state_dict().items():
        for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
            key = key.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}")
        state[f"module.{key}"] = value
    optimizer = torch.optim.Adam([weight := torch.nn.Parameter(torch.zeros(3))], 1e-4)
    weight.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [45, 48])
    return {
        "epoch": 49,
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "aux_optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "best_psnr": np.float64(31.5),
        "best_loss": np.float32(0.5),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_reference_checkpoint_is_a_codec(tmp_path, zipped):
    net = make_net(heads=8)
    path = tmp_path / "0.0004.pth.tar"
    torch.save(reference_checkpoint(net), path, _use_new_zipfile_serialization=zipped)
    codec = load(path, text_encoder="untrained-16")
    assert codec.about["epoch"] == 49 and codec.about["best_psnr"] == 31.5
    assert codec.name == "0.0004.pth.tar"
    assert codec.text_tokens == 38
    ours = Codec(net, "untrained-16", 38)
    data = ours.encode(IMAGE, CAPTION)
    assert codec.encode(IMAGE, CAPTION) == data
    assert codec.decode(data) == ours.decode(data)


def test_a_bare_state_dict_is_a_checkpoint(tmp_path):
    net = make_net(heads=8)
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth").fingerprint == Codec(net).fingerprint


@pytest.mark.parametrize("before, after", [("", ""), ("module.", ""), ("", "module.")])
def test_the_weights_of_a_compiled_network_are_a_checkpoint(tmp_path, before, after):
    """`torch.compile` puts a prefix before all names, within or around that of several processes."""
    net = make_net(heads=8)
    compiled = torch.compile(net).state_dict()
    assert all(key.startswith("_orig_mod.") for key in compiled)
    state = {f"{before}_orig_mod.{after}{key[10:]}": value for key, value in compiled.items()}
    torch.save({"state_dict": state}, tmp_path / "compiled.pth.tar")
    assert load(tmp_path / "compiled.pth.tar").fingerprint == Codec(net).fingerprint
    assert checkpoint.load_fitting(make_net(1, heads=8), tmp_path / "compiled.pth.tar") == ([], [])


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_numpy_scalar_is_read_by_the_name_of_either_numpy(tmp_path, module):
    """NumPy 1 and NumPy 2 write one function under two names, and the other's was refused."""
    torch.save(reference_checkpoint(make_net()), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    written = next(name for name in (b"numpy.core.multiarray", b"numpy._core.multiarray") if name in content)
    (tmp_path / "a.pth").write_bytes(content.replace(written, module))
    assert checkpoint.read_weights(tmp_path / "a.pth")[1]["best_psnr"] == 31.5


class Malicious:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_strangers_code_does_not_run(tmp_path, kind):
    path, victim = tmp_path / "malicious.pth.tar", tmp_path / "victim"
    content = reference_checkpoint(make_net()) | {"best_psnr": Malicious(victim)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["best_psnr"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        CheckpointError, match="malicious.pth.tar is not a checkpoint that can be read safely"
    ):
        load(path)
    assert not victim.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert victim.exists()  # so the pickle was loaded, it would have run


@pytest.mark.parametrize(
    "content",
    [None, 5, [], {}, {"state_dict": {}}, {"state_dict": [1]}, {"state_dict": {"a": 1}}, {3: torch.zeros(1)}],
)
def test_a_pickle_without_a_state_dict_is_none(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth holds no state dict"):
        load(tmp_path / "other.pth")


# Damage --------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, count: int):
    """Truncations and overwritten ranges, most near the beginning, where formats have their structure."""
    rng = random.Random(0)
    yield from (data[: int(len(data) * share)] for share in (0, 0.001, 0.1, 0.5, 0.9))
    yield data[:-1]
    for _ in range(count):
        at = int(len(data) * rng.random() ** 4)
        yield data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at + 4 :]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_an_error_or_whole(tmp_path):
    path = tmp_path / "damaged.pth.tar"
    for zipped in (True, False):
        torch.save(reference_checkpoint(make_net()), path, _use_new_zipfile_serialization=zipped)
        for data in damaged(path.read_bytes(), 60):
            path.write_bytes(data)
            try:
                checkpoint.read_weights(path)
            except CheckpointError as error:
                assert "damaged.pth.tar" in str(error)


def test_a_damaged_safetensors_file_is_an_error_or_whole(saved):
    refused = 0
    for data in damaged(saved.read_bytes(), 60):
        saved.write_bytes(data)
        try:
            checkpoint.load_net(saved)
        except CheckpointError as error:
            assert "tiny.safetensors" in str(error)
            refused += 1
    assert refused > 10


def test_truncated_safetensors_are_named(saved):
    data = saved.read_bytes()
    for length in (0, 7, 8, 1000, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="tiny.safetensors is damaged"):
            load(saved)


@pytest.mark.parametrize("name", ["notes.safetensors", "notes.pth.tar", "notes"])
def test_a_text_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).write_text("These are notes about a checkpoint, and no checkpoint.\n" * 9)
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path / name)


@pytest.mark.parametrize(
    "metadata",
    [{"about": "{"}, {"about": "[1]"}, {"config": "{"}, {"config": "[1, 2]"}, {"config": '{"N": 7}'}, {"config": "3"},
     {"config": '{"size": 7}'}, {"config": '{"N": 16}'}, {"config": '{"groups": 4}'}],
)  # fmt: skip
def test_damaged_metadata_are_named(saved, metadata):
    from safetensors.torch import load_file, save_file

    save_file(load_file(saved), saved, metadata)
    with pytest.raises(CheckpointError, match="tiny.safetensors"):
        load(saved)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: state.pop("module.g_s.synthesis_transform.1.bias"), "g_s.synthesis_transform.1.bias"),
        (
            lambda state: state.pop("module.g_a.analysis_transform.16.weight"),
            "g_a.analysis_transform.16.weight",
        ),
        (lambda state: state.update(other=torch.zeros(1)), "other"),
        (lambda state: state.update({"module.h_s.increase.2.bias": torch.zeros(2)}), "h_s.increase.2.bias"),
        (
            lambda state: state["module.h_s.increase.2.bias"].fill_(float("inf")),
            "h_s.increase.2.bias.*not finite",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_with_their_file(tmp_path, change, said):
    content = reference_checkpoint(make_net(heads=8))
    change(content["state_dict"])
    torch.save(content, tmp_path / "unfit.pth.tar")
    with pytest.raises(CheckpointError, match=f"(?s)unfit.pth.tar.*{said}"):
        load(tmp_path / "unfit.pth.tar")


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(saved, tmp_path) -> Path:
    """A data folder in which `tiny` is bundled."""
    shelf = tmp_path / "data" / "checkpoints"
    shelf.mkdir(parents=True)
    bundled = saved.rename(shelf / saved.name)
    bundled.with_suffix(".json").write_text(json.dumps({"sha256": sha256(bundled), "experiment": {}}))
    return tmp_path / "data"


def test_a_bundled_codec_has_a_name(shelf):
    assert load("tiny", data_dir=shelf).fingerprint == Codec(make_net()).fingerprint


def test_the_bundled_codecs_are_listed_with_how_they_were_trained(shelf, tmp_path):
    card = shelf / "checkpoints" / "tiny.json"
    card.write_text(card.read_text().replace('"experiment": {}', '"experiment": {"attention": "linformer"}'))
    assert checkpoint.bundled_codecs(shelf) == {"tiny": Experiment(attention="linformer")}
    known = checkpoint.bundled_codecs()
    assert known["demo"].ablations == {} and known["demo-linformer"].ablations == {"attention": "linformer"}
    card.write_text("{}")
    with pytest.raises(CheckpointError, match="tiny.json"):
        checkpoint.bundled_codecs(shelf)


def test_a_bundled_codec_is_checked(shelf):
    path = shelf / "checkpoints" / "tiny.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="tiny.safetensors.*SHA-256 differs"):
        load("tiny", data_dir=shelf)


@pytest.mark.parametrize(
    "card", [None, "", "[]", "{}", '{"sha": 1}', '{"sha256": "0"}', '{"sha256": 1, "experiment": {}}']
)
def test_a_card_that_says_nothing_is_an_error(shelf, card):
    path = shelf / "checkpoints" / "tiny.json"
    path.unlink() if card is None else path.write_text(card)
    with pytest.raises(CheckpointError, match="tiny.json"):
        load("tiny", data_dir=shelf)


def test_a_runs_folder_is_a_checkpoint(tmp_path):
    checkpoint.save_weights(tmp_path / "run" / checkpoint.WEIGHTS, make_net(), ABOUT)
    assert load(tmp_path / "run").fingerprint == Codec(make_net()).fingerprint


@pytest.mark.parametrize("name", ["other", "../checkpoints/tiny", "tiny.safetensors", "folder"])
def test_unknown_names_get_the_known_ones(shelf, name, monkeypatch):
    monkeypatch.chdir(shelf)
    (shelf / "folder").mkdir()
    with pytest.raises(CheckpointError, match=rf"No checkpoint '{name}'.*\(.*\btiny\)"):
        load(name, data_dir=shelf)


def test_an_empty_name_is_none(shelf):
    with pytest.raises(CheckpointError, match="empty name"):
        load("", data_dir=shelf)


def test_a_data_folder_without_codecs_leaves_the_bundled_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"\(demo, demo-"):
        load("other", data_dir=tmp_path)
    for shelf in checkpoint.SHELVES:
        (tmp_path / shelf).mkdir()
    with pytest.raises(CheckpointError, match=r"\(none\)"):
        load("other", data_dir=tmp_path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent.pth.tar"):
        checkpoint.read_weights(tmp_path / "absent.pth.tar")
