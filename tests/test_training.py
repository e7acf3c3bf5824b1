"""Training: what is learned, by which optimizer, and that a run that was killed ends as one that was not."""

import io
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import open_clip
import pytest
import torch
from conftest import fresh_process
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from taco_nb import load
from taco_nb.checkpoint import INTEGERS, read_weights
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.experiment import Experiment, baseline
from taco_nb.files import REPOSITORY
from taco_nb.model import TACO, ModelConfig
from taco_nb.processes import Group
from taco_nb.training import activation_memory, fit, loop, step_times
from taco_nb.training.loop import Batches, Trainer, learning_rate_factor, saved_steps
from taco_nb.training.loss import TacoLoss

SIZES = {"N": 16, "M": 24, "groups": (4, 4, 4, 4, 8), "text_dim": 64, "heads": 8, "context_widths": (16, 16)}
COLUMNS = ["step", "epoch", "loss", "bpp", "mse", "aux", "lr", "seconds"]


def tiny(pictures, **changes):
    """An experiment of seconds: 16 epochs of five batches, the last of them smaller than the others."""
    settings = {
        "profile": "sample", "sizes": SIZES, "text_encoder": "untrained-64", "train_data": str(pictures), "crop": 64,
        "lmbda": 0.01, "k_P": 0, "k_J": 0, "epochs": 16, "batch_size": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    return Experiment(**settings | changes)


def paint(folder, **captions):
    """Smooth pictures a little larger than the crop, so that where it lies makes a difference."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name in captions:
        coarse = Image.fromarray(noise.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((90, 80), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    (folder / "captions.json").write_text(
        json.dumps({f"{name}.png": said for name, said in captions.items()})
    )
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    captions = {
        "barn": ["a red barn", "a barn", "snow"],
        "dog": ["a dog", "two dogs"],
        "river": ["boats"] * 4,
    }
    return paint(tmp_path_factory.mktemp("data") / "pictures", **captions)


LATE = 63
"""A step between those of two rows of the log, and shortly before the end of an epoch."""


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run that nothing has interrupted. What it had saved after the step `LATE` is kept beside it, in "late"."""
    home, save = tmp_path_factory.mktemp("runs"), Trainer._save

    def keep(self):
        if self.step in (LATE, self.total):
            save(self)

    def look(self, *_):
        if self.step == LATE + 1:  # the step before has been saved, and what TensorBoard shows of it written
            shutil.copytree(self.folder, home / "late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", keep)
        patch.setattr(Trainer, "_reason_to_stop", look)
        return fit(tiny(pictures), home / "whole", device="cpu", save_minutes=0)


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory):
    """A run after its first step."""
    return fit(tiny(pictures), tmp_path_factory.mktemp("runs") / "stopped", device="cpu", max_hours=0)


@pytest.fixture
def late(whole, tmp_path):
    """A copy of the run as it was when it had lost all since the step `LATE`, to go on with."""
    return shutil.copytree(whole.dir.parent / "late", tmp_path / "late")


@pytest.fixture
def begun(stopped, tmp_path):
    """A copy of the run after its first step, to go on with."""
    return shutil.copytree(stopped.dir, tmp_path / "begun")


def weights(run):
    return read_weights(run.dir / "weights.safetensors")[0]


def state_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def assert_same_bits(run, other):
    assert run.steps == other.steps
    assert_equal(weights(run), weights(other))
    for part in ("net", "optimizer", "aux_optimizer", "step", "sums"):
        assert_equal(state_of(run.dir)[part], state_of(other.dir)[part])
    assert run.log.drop(columns="seconds").equals(other.log.drop(columns="seconds"))


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# --- What a run does --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Fifty epochs of one step on one picture, and what each optimizer was about to do at each of its steps."""
    one = paint(tmp_path_factory.mktemp("one") / "pictures", barn="a red barn")
    seen = []

    def watch(optimizer, *_):
        (group,) = optimizer.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
        seen.append({"params": group["params"], "lr": group["lr"], "norm": norm})

    handle = register_optimizer_step_pre_hook(watch)
    try:
        run = fit(
            tiny(one, epochs=50, gradient_clip=0.5), tmp_path_factory.mktemp("runs") / "watched", device="cpu"
        )
    finally:
        handle.remove()
    assert run.finished and run.total_steps == 50 and len(seen) == 100
    return run, seen[0::2], seen[1::2]


def test_the_loss_falls(watched):
    run, _, _ = watched
    assert list(run.log["step"]) == list(run.log["epoch"]) == list(range(1, 51))
    loss = run.log["loss"]
    assert loss[-10:].mean() < 0.3 * loss[:10].mean()
    assert run.log["aux"].is_monotonic_decreasing
    assert np.allclose(loss, 0.01 * 65025 * run.log["mse"] + run.log["bpp"], rtol=1e-4)


def test_the_learning_rate_falls_as_the_references_at_epochs_45_and_48_of_50(watched):
    _, steps, aux_steps = watched
    assert [step["lr"] for step in steps] == pytest.approx([1e-3] * 45 + [1e-4] * 3 + [1e-5] * 2)
    assert {step["lr"] for step in aux_steps} == {1e-3}


def test_the_learning_rate_is_scaled_to_the_length_of_the_run(whole):
    """Of 80 steps, those shares are 72 and 76.8. A row tells the rate of the last of its two steps."""
    assert list(whole.log["step"]) == list(range(2, 81, 2))
    assert list(whole.log["lr"]) == pytest.approx([1e-3] * 36 + [1e-4] * 2 + [1e-5] * 2)


def test_the_cosine_rises_shortly_and_falls_to_zero():
    factors = [learning_rate_factor("cosine", step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 10) and factors.index(max(factors)) == 9
    assert max(factors) == pytest.approx(1, abs=1e-3) and factors[-1] < 1e-4
    assert all(a > b for a, b in zip(factors[9:], factors[10:]))
    assert learning_rate_factor("cosine", 0, 1) == 1  # a run of one step takes it


def test_a_run_follows_its_schedule(pictures, tmp_path):
    run = fit(tiny(pictures, schedule="cosine", epochs=2), tmp_path / "run", device="cpu")
    expected = [1e-3 * learning_rate_factor("cosine", step, 10) for step in range(10)]
    assert list(run.log["lr"]) == pytest.approx(expected)


def test_two_optimizers_share_the_parameters_between_them(watched):
    _, steps, aux_steps = watched
    (quantiles,) = aux_steps[0]["params"]
    assert quantiles.shape == (SIZES["N"], 1, 3)
    others = {id(p) for p in steps[0]["params"]}
    assert len(others) == len(steps[0]["params"]) and id(quantiles) not in others
    names = dict(TACO(ModelConfig(**SIZES)).named_parameters())
    assert sorted(p.shape for p in [*steps[0]["params"], quantiles]) == sorted(
        p.shape for p in names.values()
    )
    assert names["entropy_bottleneck.quantiles"].shape == quantiles.shape


def test_quantiles_are_moved_by_the_second_optimizer_only(pictures, stopped, tmp_path):
    """Adam's first step has the length of the learning rate: twice the rate is twice the step, and nothing else."""
    faster = fit(tiny(pictures, aux_learning_rate=2e-3), tmp_path / "faster", device="cpu", max_hours=0)
    start = TACO(ModelConfig(**SIZES)).entropy_bottleneck.quantiles  # the same in every new network
    usual, fast = state_of(stopped.dir)["net"], state_of(faster.dir)["net"]
    for name, value in usual.items():
        if name.endswith("quantiles"):
            torch.testing.assert_close(fast[name] - start, 2 * (value - start), atol=1e-5, rtol=0)
            torch.testing.assert_close((value - start).abs(), torch.full_like(start, 1e-3), atol=1e-5, rtol=0)
        else:
            assert torch.equal(value, fast[name]), name


def test_muon_moves_kernels_by_orthogonal_matrices_and_all_else_by_adam(pictures):
    """To be seen in a first step: Adam's is as long for every weight, Muon's as long in every direction of a matrix."""
    exp = tiny(pictures, optimizer="muon")
    net = TACO(ModelConfig(**SIZES))
    optimizer, aux = loop.make_optimizers(exp, net)
    names = {id(p): name for name, p in net.named_parameters()}
    moved = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted([*moved, "entropy_bottleneck.quantiles"]) == sorted(names.values())
    assert [names[id(p)] for p in aux.param_groups[0]["params"]] == ["entropy_bottleneck.quantiles"]

    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    kernels = 0
    for name, p in net.named_parameters():
        step = (p.detach() - before[name]) / exp.learning_rate
        if name.startswith("entropy_bottleneck.") or p.ndim == 1:
            assert step.abs().max() - step.abs().min() < 0.01, name
        else:
            stretch = torch.linalg.svdvals(step.flatten(1)) / (0.2 * max(step.flatten(1).shape) ** 0.5)
            assert stretch.quantile(0.2) > 0.5 and stretch.max() < 1.5, (
                name
            )  # a few directions hardly have a gradient
            kernels += 1
    assert kernels > 80


def test_the_loss_has_no_slope_in_the_quantiles():
    net = TACO(ModelConfig(**SIZES)).train()
    x, text = torch.rand(2, 3, 64, 64), torch.randn(2, 38, 64)
    TacoLoss(0.01)(net(x, text), x, ["", ""])["loss"].backward()
    slope = net.entropy_bottleneck.quantiles.grad
    assert slope is None or not slope.any()
    assert net.entropy_bottleneck.matrices[0].grad.abs().sum() > 0


def test_the_gradient_is_clipped(watched):
    _, steps, _ = watched
    norms = [step["norm"] for step in steps]
    assert max(norms) <= 0.5 * (1 + 1e-4)
    assert norms[0] == pytest.approx(0.5, rel=1e-3)  # a new network's is far larger


def test_a_run_is_a_codec(whole):
    codec = whole.codec
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    decoded = codec.decode(codec.encode(picture, "noise"))
    assert decoded.size == (70, 50) and decoded.mode == "RGB"
    assert codec.text_encoder == "untrained-64" and codec.name == "whole"
    about = codec.about
    assert (about["steps"], about["total_steps"], about["device"]) == (80, 80, "cpu")
    assert Experiment.from_json(json.dumps(about["experiment"])) == whole.experiment
    assert 0 < about["hours"] < 1


def test_an_unfinished_run_is_a_codec_too_and_says_so(stopped):
    assert not stopped.finished and (stopped.steps, stopped.total_steps) == (1, 80)
    about = stopped.codec.about
    assert (about["steps"], about["total_steps"]) == (1, 80)
    saved = state_of(stopped.dir)["net"]
    assert all(torch.equal(p, saved[name]) for name, p in stopped.codec.net.named_parameters())


def test_the_log_has_its_columns_from_the_start(stopped, whole):
    assert list(whole.log.columns) == list(stopped.log.columns) == COLUMNS
    assert len(stopped.log) == 0
    assert whole.log.notna().all(axis=None)
    assert whole.log["seconds"].is_monotonic_increasing


def test_the_folder_holds_what_it_should_and_nothing_else(whole):
    names = [".lock", "experiment.json", "log.csv", "state.pt", "tensorboard", "weights.safetensors"]
    assert sorted(os.listdir(whole.dir)) == names
    assert Experiment.from_json((whole.dir / "experiment.json").read_text()) == whole.experiment


def test_the_callers_random_numbers_are_untouched(pictures, tmp_path):
    def states():
        kind, *rest = np.random.get_state()
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            kind,
            [np.asarray(part).tolist() for part in rest],
        )

    before = states()
    fit(tiny(pictures), tmp_path / "run", device="cpu", max_hours=0)
    assert states() == before


def test_the_callers_random_numbers_do_not_matter_but_the_seed_does(pictures, stopped, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        again = fit(tiny(pictures), tmp_path / "again", device="cpu", max_hours=0)
        other = fit(tiny(pictures, seed=101), tmp_path / "other", device="cpu", max_hours=0)
    assert_equal(weights(again), weights(stopped))
    assert not torch.equal(
        weights(other)["h_a.reduction.0.weight"], weights(stopped)["h_a.reduction.0.weight"]
    )


def test_only_the_random_numbers_of_the_own_device_are_kept_aside(pictures, tmp_path, monkeypatch):
    """Those of every GPU of the machine would be fetched, with a warning, if none were named."""
    named, fork_rng, single = [], torch.random.fork_rng, tiny(pictures, batch_size=9, epochs=1)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices=None, **k: named.append(devices) or fork_rng(devices, **k)
    )
    fit(single, tmp_path / "run", device="cpu")
    step_times(single, 1, device="cpu")
    assert len(named) >= 2 and not any(devices is None or list(devices) for devices in named)


def test_the_largest_seed(pictures, tmp_path):
    assert fit(tiny(pictures, seed=(1 << 32) - 1), tmp_path / "run", device="cpu", max_hours=0).steps == 1


def test_bfloat16_differs_little(tmp_path):
    one = paint(tmp_path / "pictures", barn="a red barn")
    single = fit(tiny(one, epochs=3), tmp_path / "float32", device="cpu")
    half = fit(tiny(one, epochs=3, precision="bfloat16"), tmp_path / "bfloat16", device="cpu")
    assert half.finished and not half.log["loss"].equals(single.log["loss"])
    assert np.allclose(half.log["loss"], single.log["loss"], rtol=0.05)
    near = weights(half)
    for name, value in weights(single).items():
        assert near[name].dtype == value.dtype
        if (
            value.is_floating_point()
        ):  # Adam's three steps have at most about the length of the rate, either way
            torch.testing.assert_close(near[name], value, atol=6.6e-3, rtol=0)


def test_a_run_on_the_bundled_pictures(tmp_path):
    exp = tiny("sample", batch_size=1)
    run = fit(exp, tmp_path / "run", device="cpu", max_hours=0)
    captions = json.loads((REPOSITORY / "data/sample/annotations/captions_train.json").read_text())[
        "annotations"
    ]
    assert (run.steps, run.total_steps) == (1, 16 * len(captions))


# --- What it costs, and what is shown of it ---------------------------------------------------------------------------


def shown(run):
    """What TensorBoard shows of a run: {tag: [(step, value), ...]}, and the steps of its pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.dir / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, events.Images("validation")


def test_tensorboard_shows_the_log_and_a_picture(whole):
    scalars, pictures = shown(whole)
    assert scalars.keys() == {f"training/{name}" for name in ("epoch", "loss", "bpp", "mse", "aux", "lr")}
    for name in ("loss", "bpp", "lr"):
        steps, values = zip(*scalars[f"training/{name}"])
        assert list(steps) == list(whole.log["step"]) and np.allclose(values, whole.log[name])
    assert [picture.step for picture in pictures][-1] == 80 and len(pictures) > 2
    image = Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    assert image.size == (128, 64)  # the original and the reconstruction
    assert all(low < high for low, high in image.getextrema())


def test_tensorboard_shows_nothing_twice(pictures, whole, late):
    """A run that dies after it has logged more than it has saved: what it had logged beyond is logged again, once."""
    early = (late / "state.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", lambda self: None)  # as if it had died before
        patch.setattr(Trainer, "_reason_to_stop", lambda self, *_: "a test" if self.step == 70 else None)
        fit(tiny(pictures), late, device="cpu")
    assert (late / "state.pt").read_bytes() == early
    run = fit(tiny(pictures), late, device="cpu")
    assert run.finished
    again, once = shown(run), shown(whole)
    assert again[0] == once[0]
    assert [picture.step for picture in again[1]] == [picture.step for picture in once[1]]


def test_where_a_steps_time_goes(pictures, tmp_path):
    before = sorted(tmp_path.iterdir())
    times = step_times(tiny(pictures), 4, device="cpu")
    assert list(times["part"]) == ["data", "text", "model", "losses", "backward", "optimizer", "other"]
    assert times["share"].sum() == pytest.approx(1) and (times["ms"] > 0).all()
    assert times.set_index("part")["share"]["other"] < 0.3
    assert sorted(tmp_path.iterdir()) == before
    assert (
        len(step_times(tiny(pictures, epochs=1, batch_size=9), device="cpu", accumulation=2)) == 7
    )  # of a single step


def test_the_memory_of_a_step_grows_with_its_images():
    """Each image keeps the same, and the largest part is known: what the first convolution of g_a gives, at half size."""
    exp = Experiment(
        profile="sample", sizes=SIZES, text_encoder="untrained-64", train_data="sample", crop=128
    )
    one, two, four = (activation_memory(exp, images) for images in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert 4 * SIZES["N"] * 64 * 64 < one < 4 * SIZES["N"] * 64 * 64 * 40
    assert activation_memory(exp.replace(precision="bfloat16"), 2) < 0.75 * two


# --- The joint loss, on a small CLIP ----------------------------------------------------------------------------------


def test_training_with_the_joint_loss(pictures, tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
        "text_cfg": {"width": 64, "heads": 2, "layers": 1},
    }
    (tmp_path / "taco-test-training.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "taco-test-training.json")
    with torch.random.fork_rng():
        torch.save(open_clip.create_model("taco-test-training").state_dict(), tmp_path / "clip.pt")

    clip = f"taco-test-training/{tmp_path / 'clip.pt'}"
    run = fit(tiny(pictures, text_encoder=clip, k_J=0.5, epochs=1), tmp_path / "run", device="cpu")
    assert list(run.log.columns) == [*COLUMNS[:5], "joint", *COLUMNS[5:]]
    log = run.log
    assert (log["joint"] > 0).all()
    assert np.allclose(log["loss"], 0.01 * 65025 * log["mse"] + log["bpp"] + 0.5 * log["joint"], rtol=1e-4)
    assert weights(run).keys() - {INTEGERS} == TACO(ModelConfig(**SIZES)).state_dict().keys() - {
        f"gaussian_conditional.{table}" for table in ("_offset", "_quantized_cdf", "_cdf_length")
    }  # CLIP is no part of the codec


# --- Interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_kill_9_twice_and_the_bits_are_those_of_an_uninterrupted_run(pictures, whole, tmp_path):
    """Every step is saved, so that a blow at a random moment falls in the middle of a step, of a save, or between."""
    exp, folder, steps = tiny(pictures), tmp_path / "whole", []
    for _ in range(2):
        before = written(folder)
        process = fresh_process(fit_and_save_all, exp.to_json(), str(folder), output=tmp_path / "said")
        while written(folder) == before and process.is_alive():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.7))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
        steps.append(state_of(folder)["step"])
    assert 0 < steps[0] < steps[1] < 80
    assert_same_bits(fit(exp, folder, device="cpu"), whole)


def fit_and_save_all(exp, folder):
    fit(Experiment.from_json(exp), folder, device="cpu", save_minutes=0)


def written(folder):
    path = folder / "state.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def test_a_step_a_call_gives_the_same_bits(late, whole):
    for step in range(LATE + 1, LATE + 5):  # into another epoch, and between the steps of a row of the log
        assert fit(whole.experiment, late, device="cpu", max_hours=0).steps == step
    assert_same_bits(fit(whole.experiment, late, device="cpu"), whole)


def test_workers_give_the_same_bits(pictures, tmp_path):
    exp = tiny(pictures, epochs=2)  # for workers that go on from one epoch into the next
    alone = fit(exp, tmp_path / "alone", device="cpu")
    fit(exp, tmp_path / "workers", device="cpu", num_workers=2, max_hours=0)
    assert_same_bits(fit(exp, tmp_path / "workers", device="cpu", num_workers=2), alone)


@pytest.mark.parametrize(
    "ablation",
    [
        {
            "attention": "linformer",
            "linformer_k": 4,
            "text_pooling": "keywords",
            "keyword_sources": "tfidf+rules",
        },
        {
            "attention": "linformer",
            "linformer_sharing": "layerwise",
            "text_length": "windows",
            "optimizer": "muon",
        },
    ],
    ids=["keywords", "windows and muon"],
)
def test_ablations_combine_and_resume_to_the_same_bits(pictures, tmp_path, ablation):
    exp = tiny(pictures, epochs=1, **ablation)
    uninterrupted = fit(exp, tmp_path / "uninterrupted", device="cpu")
    fit(exp, tmp_path / "resumed", device="cpu", max_hours=0)
    assert_same_bits(fit(exp, tmp_path / "resumed", device="cpu"), uninterrupted)
    codec = uninterrupted.codec
    blob = codec.encode(Image.new("RGB", (64, 64), "teal"), "a red barn in the snow, and two dogs")
    assert codec.decode(blob).size == (64, 64)


def test_half_a_file_beside_the_state_is_in_nobodys_way(begun, stopped, whole):
    (begun / ".state.pt.abc123").write_bytes((stopped.dir / "state.pt").read_bytes()[:1000])
    assert fit(whole.experiment, begun, device="cpu", max_hours=0).steps == 2


def test_killed_after_the_last_step_but_before_the_weights(whole, tmp_path):
    folder = shutil.copytree(whole.dir, tmp_path / "whole")
    (folder / "weights.safetensors").unlink()
    (folder / "log.csv").unlink()
    assert_same_bits(fit(whole.experiment, folder, device="cpu"), whole)


def test_a_finished_run_is_returned_at_once_and_untouched(tmp_path):
    """Even where its data are gone."""
    one = paint(tmp_path / "pictures", barn="a red barn")
    run = fit(tiny(one, epochs=1), tmp_path / "run", device="cpu")
    shutil.rmtree(one)
    before = {path: path.stat().st_mtime_ns for path in run.dir.iterdir()}
    assert len(before) == 6 and run.finished and run.total_steps == 1
    assert fit(tiny(one, epochs=1), run.dir) == run
    assert {path: path.stat().st_mtime_ns for path in run.dir.iterdir()} == before


def test_a_run_that_somebody_else_finished_meanwhile_is_told_of(whole, tmp_path, monkeypatch):
    folder, told = tmp_path / "run", []

    def alone_in(group, where, doing):
        shutil.copytree(whole.dir, where)
        return held(group, where, doing)

    held = Group.alone_in
    monkeypatch.setattr(Group, "alone_in", alone_in)
    run = fit(
        whole.experiment, folder, device="cpu", on_log=lambda run, rows, _: told.append((run, len(rows)))
    )
    assert run.finished and told == [(run, len(whole.log))]


# --- Where a run starts -----------------------------------------------------------------------------------------------


def test_init_starts_from_a_runs_weights(pictures, whole, tmp_path):
    """With steps too short to be seen, where a run starts is where it ends."""
    still = {"learning_rate": 1e-30, "aux_learning_rate": 1e-30, "seed": 7}
    run = fit(tiny(pictures, init=str(whole.dir), **still), tmp_path / "run", device="cpu", max_hours=0)
    end = weights(run)
    for name, value in weights(whole).items():
        torch.testing.assert_close(end[name], value, atol=1e-25, rtol=0)


def test_init_means_the_codec_of_that_name_whatever_else_the_experiment_says(capsys):
    for name in ("demo", "demo-linformer"):
        exp = baseline("sample", attention="linformer", init=name)
        net, start = dict(loop.initial_net(exp).named_parameters()), load(name).net.state_dict()
        fitting = [key for key in net if key in start and net[key].shape == start[key].shape]
        assert all(torch.equal(net[key], start[key]) for key in fitting)
        new = len(net) - len(fitting)
        assert (new == 0) == (name == "demo-linformer")
        said = capsys.readouterr().out
        assert said == "" if new == 0 else f"init='demo': {new} weights start from random weights: " in said


def test_init_of_another_size_or_from_nowhere(pictures, whole, tmp_path):
    larger = {**SIZES, "N": 24}
    with pytest.raises(CheckpointError, match="whole.*fewer than half"):
        fit(tiny(pictures, init=str(whole.dir), sizes=larger), tmp_path / "run", device="cpu")
    with pytest.raises(CheckpointError, match="nowhere"):
        fit(tiny(pictures, init="nowhere"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


# --- What is refused --------------------------------------------------------------------------------------------------


def test_another_experiment_in_the_same_folder(pictures, begun):
    before = state_of(begun)
    with pytest.raises(SettingError, match=r"lmbda is 0\.01 there, 0\.02 here.*out_dir"):
        fit(tiny(pictures, lmbda=0.02), begun, device="cpu")
    assert_equal(state_of(begun), before)


def test_a_folder_that_does_not_say_whose_run_it_holds(pictures, begun):
    (begun / "experiment.json").write_text("{")
    with pytest.raises(SettingError, match="experiment.json"):
        fit(tiny(pictures), begun, device="cpu")


def test_an_out_dir_that_is_a_file(pictures, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(SettingError, match="out_dir=.*run"):
        fit(tiny(pictures), tmp_path / "run", device="cpu")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(random.Random(0).randbytes(1000))


def another_pickle(path):
    torch.save([1, 2, 3], path)


def another_network(path):
    torch.save(state_of(path.parent) | {"net": {"weight": torch.zeros(3)}}, path)


def without_a_part(path):
    state = state_of(path.parent)
    del state["aux_optimizer"]
    torch.save(state, path)


@pytest.mark.parametrize(
    "damage",
    [truncated, half, empty, noise, another_pickle, another_network, without_a_part],
    ids=lambda f: f.__name__,
)
def test_a_damaged_state_is_named(pictures, begun, damage):
    damage(begun / "state.pt")
    content = (begun / "state.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"begun.*state\.pt cannot be read"):
        fit(tiny(pictures), begun, device="cpu")
    assert (begun / "state.pt").read_bytes() == content


def test_the_status_of_a_state_without_its_steps_names_the_file(begun):
    state = state_of(begun)
    del state["total_steps"]
    torch.save(state, begun / "state.pt")
    with pytest.raises(CheckpointError, match=r"begun.*state\.pt cannot be read"):
        saved_steps(begun)


def test_data_that_changed_during_a_run(tmp_path):
    one = paint(tmp_path / "pictures", barn="a red barn")
    fit(tiny(one), tmp_path / "run", device="cpu", max_hours=0)
    for captions in (
        ["a red barn", "a barn", "another"],
        ["a blue barn"],
    ):  # with more steps, and with as many
        (one / "captions.json").write_text(json.dumps({"barn.png": captions}))
        with pytest.raises(SettingError, match="other training data.*pictures.*have changed"):
            fit(tiny(one), tmp_path / "run", device="cpu")


def test_a_run_that_diverges_stops_and_keeps_its_last_sound_state(pictures, tmp_path):
    exp = tiny(
        pictures, learning_rate=1e5, epochs=40
    )  # so long that a save comes before the first row of the log
    with pytest.raises(SettingError, match="no finite numbers.*Lower learning_rate"):
        fit(exp, tmp_path / "run", device="cpu", save_minutes=0)
    state = state_of(tmp_path / "run")
    assert state["step"] >= 1
    assert all(value.isfinite().all() for value in state["net"].values())
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_divergence_is_seen_though_nothing_is_saved_in_between(pictures, tmp_path):
    with pytest.raises(SettingError, match="no finite numbers"):
        fit(tiny(pictures, learning_rate=1e30), tmp_path / "run", device="cpu")
    assert {"state.pt", "log.csv", "weights.safetensors"}.isdisjoint(os.listdir(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, arguments, complaint",
    [
        ({}, {"device": "gpu"}, 'device must be "auto", "cpu" or "cuda"'),
        ({}, {"device": None}, 'device must be "auto", "cpu" or "cuda"'),
        ({"text_encoder": "untrained-32"}, {}, "untrained-32 is 32 wide, but sizes say text_dim=64"),
        ({"k_J": 0.0025}, {}, "untrained-64"),
        ({"text_encoder": "untrained-65"}, {}, "multiple of 16"),
        ({"sizes": {**SIZES, "M": 25}}, {}, "add up to 24"),
        ({"train_data": "cocoa"}, {}, "cocoa.*coco"),
    ],
)
def test_what_cannot_be_trained_claims_no_folder(pictures, tmp_path, changes, arguments, complaint):
    with pytest.raises(SettingError, match=complaint):
        fit(tiny(pictures, **changes), tmp_path / "run", **{"device": "cpu"} | arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(pictures, tmp_path):
    with pytest.raises(SettingError, match="no CUDA device"):
        fit(tiny(pictures), tmp_path / "run", device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_begins_as_the_cpu_does(pictures, tmp_path, precision):
    exp = tiny(pictures, epochs=1, precision=precision)
    cpu, cuda = fit(exp, tmp_path / "cpu", device="cpu"), fit(exp, tmp_path / "cuda", device="cuda")
    assert cuda.log["mse"][0] == pytest.approx(cpu.log["mse"][0], rel=0.02)


# --- Batches ----------------------------------------------------------------------------------------------------------


def epoch_of(count, batch_size, seed=0, epoch=0, skip=0):
    batches = Batches(count, batch_size, seed)
    batches.epoch, batches.skip = epoch, skip
    return list(batches)


@pytest.mark.parametrize("count, batch_size", [(1, 1), (1, 8), (7, 3), (8, 4), (100, 8)])
def test_an_epoch_is_a_permutation(count, batch_size):
    for epoch in range(3):
        batches = epoch_of(count, batch_size, epoch=epoch)
        assert len(batches) == len(Batches(count, batch_size, 0)) == -(-count // batch_size)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert sorted(sum(batches, [])) == list(range(count))


def test_the_order_depends_on_seed_and_epoch_alone():
    first = epoch_of(50, 4, seed=1, epoch=2)
    torch.manual_seed(99)
    assert epoch_of(50, 4, seed=1, epoch=2) == first
    assert epoch_of(50, 4, seed=1, epoch=3) != first
    assert epoch_of(50, 4, seed=2, epoch=2) != first
    assert sum(epoch_of(50, 7, seed=1, epoch=2), []) == sum(first, [])


@pytest.mark.parametrize("skip", [0, 1, 5, 12, 13])
def test_skipping_leaves_the_rest_as_it_was(skip):
    assert epoch_of(50, 4, epoch=3, skip=skip) == epoch_of(50, 4, epoch=3)[skip:]
