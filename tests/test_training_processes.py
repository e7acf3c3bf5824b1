"""Training on several processes and in pieces: how a batch is divided changes the order of sums and nothing else."""

import json
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from test_training import SIZES, paint, state_of, tiny, weights

from taco_nb.errors import SettingError
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY
from taco_nb.metrics import perception
from taco_nb.processes import run_in_processes
from taco_nb.text import clip_model, text_tower
from taco_nb.training import fit
from taco_nb.training.loop import Batches, read_run, saved_steps, split_evenly
from taco_nb.training.loss import JointLoss

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"width": 64, "heads": 2, "layers": 1},
}
SLOW = {
    "learning_rate": 1e-4
}  # Adam's first steps go by a gradient's sign: of a gradient that is all but zero, by chance


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def pictures(home):
    """Nine pairs: batches of four, four and one."""
    return paint(
        home / "pictures",
        barn=["a red barn", "a barn", "snow"],
        dog=["a dog", "two dogs"],
        river=["boats"] * 4,
    )


@pytest.fixture(scope="module")
def clip(home):
    """The name of a small CLIP with random weights; a process that knows it must add its configuration first."""
    (home / "taco-test-processes.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(home / "taco-test-processes.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("taco-test-processes").state_dict(), home / "clip.pt")
    return f"taco-test-processes/{home / 'clip.pt'}"


def experiment(pictures, **changes):
    return tiny(pictures, **SLOW | {"epochs": 2, "batch_size": 4} | changes)


# --- How a batch is divided -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, parts", [(8, 2), (8, 3), (1, 4), (0, 2), (7, 7)])
def test_parts_are_all_of_it_in_order_and_nearly_equal(size, parts):
    cut = split_evenly(size, parts)
    assert [i for share in cut for i in share] == list(range(size)) and len(cut) == parts
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_each_batch(processes):
    """Of 9 in batches of 4 the last has one image: the others compute an image that counts for nothing."""
    whole = Batches(9, 4, seed=3)
    split = [list(Batches(9, 4, 3, rank, processes)) for rank in range(processes)]
    assert [whole.size(step) for step in range(6)] == [4, 4, 1] * 2
    for step, batch in enumerate(whole):
        parts = [own[step] for own in split]
        assert all(parts)
        counted = [part for part, share in zip(parts, split_evenly(len(batch), processes)) if share]
        assert sum(counted, []) == batch


def assert_close(run, other, rtol=1e-5):
    """The same run but for the order of sums."""
    log, expected = (r.log.drop(columns="seconds") for r in (run, other))
    assert list(log.columns) == list(expected.columns) and len(log) == len(expected)
    assert np.allclose(log, expected, rtol=rtol, atol=0)
    theirs = weights(other)
    for name, value in weights(run).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5)


def test_accumulation_changes_no_result(pictures, home):
    exp = experiment(pictures)
    whole, pieces = (fit(exp, home / f"pieces-{n}", device="cpu", accumulation=n) for n in (1, 3))
    assert_close(pieces, whole)


def test_accumulation_changes_no_result_of_the_loss_that_compares_a_whole_batch(pictures, clip, home):
    """J's slope in a batch of four is not that of its halves: to ignore this would show at once."""
    exp = experiment(pictures, text_encoder=clip, k_J=0.5)
    whole, pieces = (fit(exp, home / f"joint-{n}", device="cpu", accumulation=n) for n in (1, 2))
    assert_close(pieces, whole)
    halves = fit(exp.replace(batch_size=2), home / "joint-halves", device="cpu")
    assert not np.isclose(halves.log["joint"][0], whole.log["joint"][0], rtol=0.1)


def test_bfloat16_is_good_enough_for_the_frozen_networks(pictures, clip, home):
    exp = experiment(pictures, text_encoder=clip, k_J=0.5, epochs=1)
    single, half = (
        fit(exp.replace(precision=precision), home / precision, device="cpu", max_hours=0).log["joint"][0]
        for precision in ("float32", "bfloat16")
    )
    assert half == pytest.approx(single, rel=0.02) and half != single


def test_js_text_comes_from_the_states_that_are_there_already(clip, home):
    joint, tower = JointLoss(*clip_model(clip)), text_tower(clip, length=38)
    captions = ["a red barn in the snow", "", "two dogs"]
    torch.testing.assert_close(joint.embed_text(captions, tower(captions)), joint.embed_text(captions))
    assert tower(captions).shape[1] == 38
    cut = [*captions, "word " * 60]  # more than the adapter's tower reads
    assert torch.equal(joint.embed_text(cut, tower(cut)), joint.embed_text(cut))
    joint.clip.encode_text = None
    joint.embed_text(captions, tower(captions))  # without running it again


# --- Two processes ----------------------------------------------------------------------------------------------------

TWO = """
import sys
from pathlib import Path
import lpips, open_clip, torch
from taco_nb.experiment import Experiment
from taco_nb.metrics import perception
from taco_nb.training import fit
home, suffix = Path(sys.argv[1]), sys.argv[2]
if suffix == "two":
    open_clip.add_model_config(home / "taco-test-processes.json")
torch.manual_seed(0)
random = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
perception._pretrained_lpips = lambda: random
for name in sys.argv[3:]:
    exp = Experiment.from_json((home / f"{name}.json").read_text())
    hours = 0 if name == "coco" else None
    fit(exp, home / f"{name}-{suffix}", data_dir=home / "data", device="cpu", max_hours=hours,
        accumulation=2 if "pieces" in name and suffix == "two" else 1)
if suffix == "two":
    torch.distributed.destroy_process_group()
"""
# Runs the experiments so named, of which "coco" takes one step; AlexNet's weights are random, as CLIP's are.
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def launched(processes, *command, **options):
    several = (
        ["--multi_gpu"] if processes > 1 else []
    )  # which is accelerate's word for several processes, on CPUs too
    return subprocess.Popen(
        [*LAUNCH, *several, "--num_processes", str(processes), *map(str, command)], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(pictures, clip, home, shared):
    """Experiments by name, each run by one process and by two, the latter all in one launch."""
    (home / "data").mkdir()
    (home / "data" / "coco").symlink_to(shared / "minicoco")
    small = {"sizes": SIZES, "text_encoder": clip, "crop": 64, "batch_size": 6}
    experiments = {
        "coco": baseline("paper", **small),  # with LPIPS and J
        "plain": experiment(pictures),
        "joint": experiment(pictures, text_encoder=clip, k_J=0.5, epochs=1),
        "joint-pieces": experiment(pictures, text_encoder=clip, k_J=0.5, epochs=1, batch_size=5),
        "resumed": experiment(pictures),
    }
    (home / "two.py").write_text(TWO)
    for name, exp in experiments.items():
        (home / f"{name}.json").write_text(exp.to_json())
    fit(experiments["resumed"], home / "resumed-two", device="cpu", max_hours=0)
    with launched(2, home / "two.py", home, "two", *experiments) as process:
        _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-4000:]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["", str(home), "one", *experiments])
        patch.setattr(perception, "_pretrained_lpips", None)  # so that it is put back
        exec(TWO, {})
    return {name: [read_run(home / f"{name}-{suffix}") for suffix in ("one", "two")] for name in experiments}


def test_the_paper_profile_on_minicoco_with_two_processes(both):
    one, two = both["coco"]
    assert (one.steps, two.steps) == (1, 1) and one.total_steps > 1000
    assert len(two.log) == 0 and two.experiment == one.experiment
    sums, expected = (state_of(run.dir)["sums"] for run in (two, one))
    assert sums.keys() == expected.keys() == {"loss", "bpp", "mse", "lpips", "joint", "aux", "steps"}
    assert all(float(sums[name]) == pytest.approx(float(expected[name]), rel=1e-5) for name in sums)


@pytest.mark.parametrize("name", ["plain", "joint", "joint-pieces"])
def test_two_processes_give_what_one_gives_with_twice_the_batch(both, name):
    """The last batch of an epoch, of a single image, among them."""
    one, two = both[name]
    assert two.finished
    assert_close(two, one)


def test_a_run_begun_by_one_process_goes_on_with_two(both):
    one, two = both["resumed"]
    assert two.finished
    assert_close(two, one)


def test_one_of_two_processes_writes(both):
    _, two = both["plain"]
    assert sorted(os.listdir(two.dir)) == [
        ".lock", "experiment.json", "log.csv", "state.pt", "tensorboard", "weights.safetensors"
    ]  # fmt: skip
    assert len(os.listdir(two.dir / "tensorboard")) == 1


def test_two_processes_from_a_notebook(pictures, both, home, capsys):
    """`num_processes` starts them, and what they say is told here."""
    one, _ = both["plain"]
    begun = fit(one.experiment, home / "notebook", device="cpu", num_processes=2, max_hours=0)
    assert (begun.steps, begun.total_steps) == (1, 6)
    said = capsys.readouterr().out
    assert "Training notebook in 2 processes on the CPU in float32.\n" in said
    assert said.count("Stopped by max_hours after step 1 of 6") == 1
    told = []
    two = fit(
        one.experiment, home / "notebook", device="cpu", num_processes=2, on_log=lambda *now: told.append(now)
    )
    assert two.dir == home / "notebook" and two.finished
    assert_close(two, one)
    assert [(run, len(rows)) for run, rows, _ in told] == [(two, len(two.log))]
    bar = capsys.readouterr().err
    assert "training notebook on 2 processes: 100%" in bar and "6/6" in bar and "loss=" in bar
    assert fit(one.experiment, home / "notebook", device="cpu", num_processes=2) == two


def fit_in_own_folder(exp, home):
    """`fit`, in a folder that the other processes do not see, as on machines that share no disk."""
    fit(exp, home / os.environ["RANK"], device="cpu")


def test_processes_that_do_not_see_the_same_state_do_not_go_on(pictures, tmp_path):
    exp = experiment(pictures)
    fit(exp, tmp_path / "0", device="cpu", max_hours=0)
    with pytest.raises(
        SettingError, match="would go on from different steps.*on a disk that all of them share"
    ):
        arguments = {"exp": exp, "home": tmp_path}
        run_in_processes("test_training_processes:fit_in_own_folder", arguments, 2, "training", "step")
    assert saved_steps(tmp_path / "0") == (1, 6)


@pytest.mark.parametrize(
    "given",
    [
        {"num_processes": 0},
        {"num_processes": 1.5},
        {"num_processes": True},
        {"num_workers": -1},
        {"accumulation": 0},
    ],
)
def test_counts_out_of_range(pictures, tmp_path, given):
    (name,) = given
    with pytest.raises(SettingError, match=f"{name} must be a whole number"):
        fit(experiment(pictures), tmp_path / "run", **{"device": "cpu"} | given)
    assert not (tmp_path / "run").exists()
