"""What a GPU would see of training, counted on a CPU: how much it is given to do, and how often it is waited for."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import open_clip
import psutil
import pytest
import torch
from compressai.models import Elic2022Official
from conftest import command, make_codec, make_lpips, precision_put_back
from test_training import SIZES, tiny
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from taco_nb.metrics.networks import given_networks, placed
from taco_nb.metrics.perception import MiniDistance
from taco_nb.model.precision import PEAKS, full_float32, peak_flops, quick_training
from taco_nb.pretrained import MINI
from taco_nb.text import clip_model, text_tower
from taco_nb.text.clip import clip_ids
from taco_nb.text.tokens import clip_tokenizer, tokenized
from taco_nb.tools import bench, gpu_check
from taco_nb.training import loop
from taco_nb.training.loop import Resources, Trainer, make_accelerator
from taco_nb.training.loss import JointLoss

VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
"""Operations that launch nothing: they look at a tensor's memory in another way."""
READ = {"_local_scalar_dense", "nonzero", "masked_select"}
"""Operations whose result the processor needs, and a GPU has to be waited for."""
FETCH = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "cuda"}


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be given, and those for whose result it would be waited for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        return sum(count for name, count in self.counts.items() if name not in VIEWS)

    @property
    def waits(self) -> int:
        return sum(self.counts[name] for name in READ)


class Copies(TorchFunctionMode):
    """Notes what would copy between processor and GPU and wait for it; on a CPU PyTorch does nothing there."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        # PyTorch's own code moves tensors to where they are already; ours only to where they may not be.
        ours = "taco_nb" in sys._getframe(1).f_code.co_filename
        to_device = (
            name == "to" and ours and any(isinstance(v, torch.device) for v in (*args, *kwargs.values()))
        )
        made_there = name in ("tensor", "as_tensor") and kwargs.get("device") is not None
        if (
            name in FETCH
            or name == "new_tensor"
            or made_there
            or (to_device and not kwargs.get("non_blocking"))
        ):
            self.waits.append(name)
        return function(*args, **kwargs)


def narrow_clip(folder, layers):
    """The name of a CLIP with random weights, narrow, and so deep."""
    name = f"taco-test-gpu-{layers}"
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": layers, "width": 32, "head_width": 16, "patch_size": 32},
        "text_cfg": {"width": 64, "heads": 2, "layers": layers},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.save(open_clip.create_model(name).state_dict(), folder / "clip.pt")
    return f"{name}/{folder / 'clip.pt'}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """As deep as the reference's."""
    return narrow_clip(tmp_path_factory.mktemp("clip"), 12)


@pytest.fixture
def trainer(clip, monkeypatch):
    """`trainer(**changes)` is one in the middle of a run with all terms of the paper's loss; `compile` as `fit` has it."""
    lpips = loop.METRICS["lpips"]._replace(load=lambda device: make_lpips())
    monkeypatch.setitem(loop.METRICS, "lpips", lpips)

    def make(compile="off", **changes):
        settings = {"text_encoder": clip, "k_P": 3.5, "k_J": 0.0025, "batch_size": 4} | changes
        exp = tiny("sample", **settings)
        made = Trainer(
            exp, Path(os.devnull), Resources(compile=compile), make_accelerator("cpu", exp.precision)
        )
        made.given = made.batches_to_come()
        return made

    return make


def step(trainer) -> None:
    trainer.train_step(*next(trainer.given))


# --- What a step launches, and what it waits for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, launches",
    [
        ({}, 3500),
        ({"precision": "bfloat16"}, 4400),
        ({"text_length": "windows", "k_J": 0.0}, 2700),
        ({"text_pooling": "keywords", "keyword_sources": "tfidf", "k_J": 0.0, "k_P": 0.0}, 2600),
    ],
    ids=["float32", "bfloat16", "windows", "keywords"],
)
def test_a_step_waits_for_nothing_and_launches_no_more_than_it_did(trainer, changes, launches):
    trainer = trainer(**changes)
    step(trainer)  # in the first the optimizers make their state
    batch = next(trainer.given)
    with Launches() as given, Copies() as copies:
        trainer.train_step(*batch)
    assert given.waits == 0 and copies.waits == []
    assert 0.8 * launches < given.launches <= launches


def test_a_row_of_the_log_waits_once(trainer):
    trainer = trainer(k_J=0.0, k_P=0.0)
    step(trainer)
    with Launches() as given, Copies() as copies:
        row = trainer._log_row()
    assert copies.waits == ["tolist"]
    # a norm for each weight, which a GPU computes in a few launches, and what finds the largest
    assert given.launches < 2 * len(list(trainer.net.parameters()))
    assert set(row) >= {"loss", "bpp", "mse", "aux"}
    trainer.bare_net.h_a.reduction[0].weight.data[0, 0, 0, 0] = torch.nan
    step(trainer)
    with pytest.raises(loop.SettingError, match="no finite numbers"):
        trainer._log_row()


def test_captions_are_cut_once(trainer, monkeypatch):
    trainer, cut = trainer(), []
    encode = type(clip_tokenizer()).encode
    monkeypatch.setattr(
        type(clip_tokenizer()), "encode", lambda self, text: cut.append(text) or encode(self, text)
    )
    x, captions, *_ = next(trainer.given)
    assert cut == captions and x.dtype == torch.uint8
    trainer.train_step(x, captions)
    assert cut == captions


def test_clips_ids_are_open_clips():
    captions = ["a red barn", "", "snow &amp; ice " * 40]
    expected = clip_tokenizer()(captions, context_length=77)
    assert torch.equal(clip_ids(captions), expected)
    assert torch.equal(clip_ids([tokenized(caption) for caption in captions]), expected)


def test_a_resumed_optimizer_counts_on_the_processor(trainer, tmp_path):
    """A count on the device would have to be read back for every weight at every step."""
    trainer = trainer(optimizer="muon", k_J=0.0, k_P=0.0)
    step(trainer)
    trainer.folder = tmp_path
    trainer._save()
    trainer.device = torch.device(
        "meta"
    )  # which holds no numbers, as a GPU holds none that can be read at once
    trainer._restore()
    with Launches() as given:
        trainer.optimizer.step()
    counts = [state["step"] for state in trainer.optimizer.optimizer.state.values() if "step" in state]
    assert counts and all(count.device.type == "cpu" for count in counts if isinstance(count, torch.Tensor))
    assert given.counts["copy_"] == 0


# --- Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, parts", [("float32", "network loss CLIP CLIP"), ("bfloat16", "network loss")]
)
def test_networks_compile_to_one_graph_each_and_train_alike(trainer, tmp_path, monkeypatch, precision, parts):
    """What is traced runs as it is: code for a processor would take a minute to generate, and gradients as long to trace."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compile, how = torch.compile, {"backend": backend, "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda part, mode, dynamic: compile(part, dynamic=dynamic, **how))
    torch.compiler.reset()
    terms = {"k_J": 0.0, "k_P": 0.0, "text_encoder": "untrained-64", "sizes": {**SIZES, "groups": (4, 20)}}
    if "CLIP" in parts:  # with a gradient, and without
        terms = {"text_encoder": narrow_clip(tmp_path, 1), "sizes": terms["sizes"]}
    rows = []
    for setting in ("off", "default"):
        one = trainer(setting, precision=precision, batch_size=2, **terms)
        for _ in range(3):
            step(one)
        rows.append(one._log_row())
    torch.compiler.reset()
    assert one.arithmetic == f"the CPU in {precision}, compiled (default)"
    assert len(graphs) == len(parts.split())
    plain, compiled = rows
    for name in one.loss.names:
        assert compiled[name] == pytest.approx(plain[name], rel=1e-3), name


def test_what_is_compiled_and_where(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for has_triton, processes, expected in (
        (True, 1, "reduce-overhead"),
        (True, 2, "default"),
        (False, 1, "off"),
    ):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda has_triton=has_triton: has_triton)
        assert loop.compile_mode("auto", cpu, processes, 5000) == "off"
        assert loop.compile_mode("auto", gpu, processes, 500) == "off"
        assert loop.compile_mode("auto", gpu, processes, 5000) == expected
        assert loop.compile_mode("default", cpu, processes, 5) == "default"
    with pytest.raises(loop.SettingError, match="compile cannot be 'max'"):
        Resources(compile="max")


# --- Precision --------------------------------------------------------------------------------------------------------


def precisions() -> list:
    backends = torch.backends
    owners = (backends.mkldnn.conv, backends.mkldnn.matmul, backends.cudnn.conv, backends.cuda.matmul)
    return [owner.fp32_precision for owner in owners]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9")
@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'ieee'",
        "torch.backends.cudnn.fp32_precision = 'tf32'",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.backends.cudnn.allow_tf32 = True",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.fp32_precision = 'bf16'",
        "torch.set_float32_matmul_precision('high')",
    ],
)
def test_whatever_the_caller_has_set_exact_is_exact_and_put_back(setting):
    with precision_put_back():
        exec(setting)
        before = precisions()
        with full_float32("cpu"):
            assert precisions() == ["ieee"] * 4
        assert precisions() == before
        with quick_training(torch.device("cuda")):
            assert precisions()[2:] == ["tf32", "tf32"] and torch.backends.cudnn.benchmark
            with full_float32("cpu"):
                assert precisions() == ["ieee"] * 4
            assert precisions()[2:] == ["tf32", "tf32"]
        assert precisions() == before and not torch.backends.cudnn.benchmark
        with quick_training(torch.device("cpu")):
            assert precisions() == before


def test_the_text_is_read_in_full_float32():
    seen, tower = [], text_tower("untrained-16")
    handle = tower.module.ln_final.register_forward_hook(lambda *_: seen.append(precisions()))
    try:
        with quick_training(torch.device("cuda")):
            tower(["a red barn"])
    finally:
        handle.remove()
    assert seen == [["ieee"] * 4]


def test_kernels_kept_in_bfloat16_give_what_autocast_gives():
    clip, tokenizer = clip_model(MINI.name)
    x, y = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lpips, mini, joint = make_lpips(), MiniDistance(clip), JointLoss(clip, tokenizer)
    runs = (lambda: lpips.distance(x, y), lambda: mini.distance(x, y), lambda: joint.embed(x))
    with torch.autocast("cpu", torch.bfloat16):
        before = [run() for run in runs]
        lpips.model, mini.model = map(loop.with_half_kernels, (lpips.model, mini.model))
        joint.visual = loop.with_half_kernels(joint.visual)
        with Launches() as given:
            after = [run() for run in runs]
    assert all(map(torch.equal, before, after))
    kinds = {weight.dtype for weight in clip.parameters()}
    assert kinds == {torch.float32}  # others look through it too
    assert given.counts["_to_copy"] < 200


def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(monkeypatch):
    assert peak_flops(torch.device("cpu"), "float32") is None
    for name, (tf32, bf16) in {
        "NVIDIA H100 80GB HBM3": (495e12, 989e12),
        "NVIDIA H100 PCIe": (378e12, 756e12),
        "NVIDIA A100-SXM4-40GB": (156e12, 312e12),
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert peak_flops(torch.device("cuda"), "float32") == tf32
        assert peak_flops(torch.device("cuda"), "bfloat16") == bf16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU of tomorrow")
    assert peak_flops(torch.device("cuda"), "bfloat16") is None
    assert all(low < high for low, high in PEAKS.values())


# --- Networks on devices of their own ---------------------------------------------------------------------------------


def test_a_given_network_goes_where_it_is_asked_to_and_the_givers_stays():
    lpips = make_lpips()
    found, _ = given_networks({"lpips": lpips})
    assert found["lpips"].load(torch.device("cpu")) is lpips
    moved = found["lpips"].load(torch.device("meta"))
    assert moved.device.type == next(moved.model.parameters()).device.type == "meta"
    assert lpips.device.type == next(lpips.model.parameters()).device.type == "cpu"
    assert placed(moved, torch.device("meta")) is moved


# --- The check itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_bench(monkeypatch):
    """The benchmark's networks, as small as they can be."""
    elic = bench.Elic.__new__(bench.Elic)
    elic.net, elic.device = Elic2022Official(N=16, M=144).eval(), "cpu"
    elic.net.update()
    monkeypatch.setattr(bench, "SIZE", (64, 64))
    monkeypatch.setattr(bench, "Elic", lambda device: elic)
    monkeypatch.setattr(
        bench, "paper_codecs", lambda device: {mode: make_codec() for mode in ("exact", "fast")}
    )


def test_the_check_for_a_gpu_runs_on_a_processor(small_bench, tmp_path, capsys):
    assert command("bench", "--gpu-check", "--device", "cpu", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["device"] == "cpu" and found["packages"]["torch"]
    rows = {name: check["rows"] for name, check in found["checks"].items()}
    assert rows.keys() == {*gpu_check.FILES, *gpu_check.TIMED}
    assert len(rows["golden files"]) == 10 and len(rows["portable files"]) == 4
    assert [row["arithmetic"] for row in rows["training"]] == ["the CPU in float32", "the CPU in bfloat16"]
    assert {row["codec"] for row in rows["beside ELIC"]} == {bench.REFERENCE, "exact", "fast"}
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out and "FAILED" not in table
    assert table.count("\n| ") == 2 + sum(map(len, rows.values()))


def test_a_check_that_fails_is_named_and_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(device, folder):
        yield {"ok": True}
        raise RuntimeError("CUDA error: an illegal memory access\nand much more")

    monkeypatch.setattr(gpu_check, "FILES", {"broken": broken})
    monkeypatch.setattr(gpu_check, "TIMED", {"sound": lambda *_: iter([{"ok": True}])})
    assert command("bench", "--gpu-check", "--device", "cpu", "--out", tmp_path) == 1
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| broken | FAILED | error RuntimeError: CUDA error: an illegal memory access |" in table
    assert "| sound | ok |" in table


def test_a_program_of_the_check_that_hangs_ends_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PROGRAM_SECONDS", 2)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = "import subprocess, sys, time; subprocess.Popen(['sleep', '1234.5']); "
    (tmp_path / "hangs.py").write_text(
        start + "print('half way', file=sys.stderr, flush=True); time.sleep(99)"
    )
    began = time.monotonic()
    row = gpu_check._run("hangs")
    assert row == {"ok": False, "error": "not over after 2 seconds"} and time.monotonic() - began < 20
    programs = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any("1234.5" in words for words in programs)
