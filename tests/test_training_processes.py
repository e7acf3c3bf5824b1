"""Training on several processes and in pieces, and how a run is stopped: real processes, real signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import psutil
import pytest
import torch
from test_training import SIZES, assert_same_bits, paint, state_of, tiny, weights

from taco_nb.errors import DataError, SettingError
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY
from taco_nb.metrics import perception
from taco_nb.text import clip_model, text_tower
from taco_nb.training import fit, loop
from taco_nb.training.__main__ import main
from taco_nb.training.loop import Batches, read_run, shares
from taco_nb.training.loss import JointLoss
from taco_nb.training.signals import on_warning

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
        home / "pictures", barn=["a red barn", "a barn", "snow"], dog=["a dog", "two dogs"], river=["boats"] * 4
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
def test_shares_are_all_of_it_in_order_and_nearly_equal(size, parts):
    cut = shares(size, parts)
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
        counted = [part for part, share in zip(parts, shares(len(batch), processes)) if share]
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
perception._pretrained = lambda: random
for name in sys.argv[3:]:
    exp = Experiment.from_json((home / f"{name}.json").read_text())
    hours = 0 if name == "coco" else None
    fit(exp, home / f"{name}-{suffix}", data_dir=home / "data", device="cpu", max_hours=hours,
        accumulation=2 if "pieces" in name and suffix == "two" else 1)
if suffix == "two":
    torch.distributed.destroy_process_group()
"""
# Runs the experiments so named, of which "coco" takes one step; AlexNet's weights are random, as CLIP's are.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def launched(processes, *command, **options):
    several = ["--multi_gpu"] if processes > 1 else []  # which is accelerate's word for several processes, on CPUs too
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
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-4000:]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["", str(home), "one", *experiments])
        patch.setattr(perception, "_pretrained", None)  # so that it is put back
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
    """`num_processes` starts them; what is wrong with one of them is said here as if it had happened here."""
    one, _ = both["plain"]
    two = fit(one.experiment, home / "notebook", device="cpu", num_processes=2)
    assert_close(two, one)
    assert two.dir == home / "notebook" and two.finished
    said = capsys.readouterr()
    assert "Finished: 6 steps" in said.out and "6/6" in said.err and "loss=" in said.err
    assert fit(one.experiment, home / "notebook", device="cpu", num_processes=2) == two

    lost = shutil.copytree(pictures, home / "lost")
    for picture in lost.glob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"lost.*cannot be read as an image"):
        fit(experiment(lost), home / "lost-run", device="cpu", num_processes=2)


@pytest.mark.parametrize(
    "given",
    [{"num_processes": 0}, {"num_processes": 1.5}, {"num_processes": True}, {"num_workers": -1}, {"accumulation": 0}],
)
def test_counts_out_of_range(pictures, tmp_path, given):
    (name,) = given
    with pytest.raises(SettingError, match=f"{name} must be a whole number"):
        fit(experiment(pictures), tmp_path / "run", **{"device": "cpu"} | given)
    assert not (tmp_path / "run").exists()


# --- Time limits and signals ------------------------------------------------------------------------------------------


class Clock:
    """Hours, of which each look takes one."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 3600.0
        return self.now


def test_max_hours_by_the_clock(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "time", Clock())  # one look as `fit` is called, one as it begins, one after each step
    run = fit(experiment(pictures, epochs=20), tmp_path / "run", device="cpu", max_hours=5, save_minutes=1e9)
    assert (run.steps, run.total_steps) == (4, 60) and not run.finished
    assert state_of(run.dir)["step"] == 4
    assert "Stopped by max_hours after step 4 of 60" in (said := capsys.readouterr().out)
    assert f"python -m taco_nb.training --out {run.dir}" in said


def begin(processes, folder, exp, *arguments):
    """A run on the command line, in processes of its own that form a group, once it has taken its first steps."""
    folder.parent.mkdir(exist_ok=True)
    (folder.parent / "exp.json").write_text(exp.to_json())
    command = ["-m", "taco_nb.training", "--experiment", folder.parent / "exp.json", "--out", folder, "--device", "cpu"]
    command += ["--save-minutes", "0", *arguments]
    if processes:
        process = launched(processes, *command)
    else:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def trainers(process):
    return [child for child in psutil.Process(process.pid).children() if "taco_nb.training" in child.cmdline()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_between_two_steps_and_the_bits_are_those_of_an_undisturbed_run(pictures, home, name, tmp_path):
    """To the whole group and with workers, as a batch system does."""
    exp = experiment(pictures, epochs=16)
    process = begin(0, tmp_path / "undisturbed", exp, "--num-workers", "2")
    os.killpg(process.pid, getattr(signal, name))
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint
    stopped = read_run(tmp_path / "undisturbed")
    assert 0 < stopped.steps < 48 and f"Stopped by {name} after step {stopped.steps} of 48" in said
    assert state_of(stopped.dir)["step"] == stopped.steps
    undisturbed = fit(exp, home / "undisturbed", device="cpu")
    assert_same_bits(fit(exp, stopped.dir, device="cpu"), undisturbed)


@pytest.mark.parametrize("to", ["one of the processes", "the launcher"])
def test_a_signal_to_one_process_stops_both_after_the_same_step(pictures, to, tmp_path):
    exp = experiment(pictures, epochs=500)
    process = begin(2, tmp_path / "run", exp)
    if to == "the launcher":
        process.send_signal(signal.SIGTERM)  # handed on by it
    else:
        trainers(process)[1].send_signal(signal.SIGUSR1)
    said, complaint = process.communicate(timeout=120)
    assert (process.returncode == 0) == (to != "the launcher"), complaint[-2000:]
    run = read_run(tmp_path / "run")
    assert 0 < run.steps < run.total_steps and state_of(run.dir)["step"] == run.steps
    assert re.search(rf"Stopped by SIG\w+ after step {run.steps} of 1500", said)
    assert not [p for p in psutil.process_iter() if str(run.dir) in " ".join(p.cmdline())]


def test_the_readmes_batch_script_resubmits_what_it_did_not_finish(pictures, tmp_path):
    """The script itself, with a small experiment, on CPUs, and a `scontrol` that only notes what it is asked."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exp = experiment(pictures, epochs=500)
    (tmp_path / "exp.json").write_text(exp.to_json())
    for old, new in (
        ("--profile paper --set lmbda=0.0016", f"--experiment {tmp_path}/exp.json --device cpu --save-minutes 0"),
        ("--num_processes 4", "--multi_gpu --num_processes 2 --main_process_port 0"),
    ):
        assert script.count(old) == 1
        script = script.replace(old, new)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    path = os.pathsep.join([str(tools), os.path.dirname(sys.executable), os.environ["PATH"]])
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=ENVIRONMENT | {"PATH": path, "SLURM_JOB_ID": "77"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    folder = tmp_path / "runs" / "paper-0.0016"
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B: has it
    said, complaint = process.communicate(timeout=120)
    run = read_run(folder)
    assert 0 < run.steps < run.total_steps and f"Stopped by SIGUSR1 after step {run.steps} of" in said, complaint
    assert (tmp_path / "asked").read_text() == "requeue 77\n" and process.returncode == 0


def test_handlers_are_put_back_and_a_second_signal_is_delivered():
    mine, came, acted = signal.getsignal(signal.SIGUSR1), [], []
    signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        with on_warning(acted.append):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert acted == [signal.SIGUSR1] and not came
            os.kill(os.getpid(), signal.SIGUSR1)
            assert acted == [signal.SIGUSR1] and not came
        assert came == [signal.SIGUSR1]
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    finally:
        signal.signal(signal.SIGUSR1, mine)


def test_in_another_thread_signals_are_left_alone(pictures, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(fit, experiment(pictures), tmp_path / "run", device="cpu", max_hours=0).result()
    assert run.steps == 1 and signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_in_a_notebook_saves_and_leaves_no_process(pictures, tmp_path):
    (tmp_path / "exp.json").write_text(experiment(pictures, epochs=500).to_json())
    code = (
        "import sys; from pathlib import Path; from taco_nb.experiment import Experiment; from taco_nb.training import fit\n"
        "exp = Experiment.from_json(Path(sys.argv[1]).read_text())\n"
        "try: fit(exp, sys.argv[2], device='cpu', num_processes=2, save_minutes=0)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "exp.json", folder], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said, complaint = process.communicate(timeout=120)
    assert said.endswith("interrupted\n"), complaint[-2000:]
    run = read_run(folder)
    assert 0 < run.steps < run.total_steps and state_of(folder)["step"] == run.steps
    assert not [p for p in psutil.process_iter() if str(folder) in " ".join(p.cmdline())]


# --- One folder, one run ----------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(pictures, tmp_path):
    """The second is refused and says by whom; a process that is killed leaves the folder free."""
    exp = experiment(pictures, epochs=500)
    process = begin(0, tmp_path / "run", exp)
    try:
        with pytest.raises(SettingError, match=rf"process {process.pid} on .* is training in .*run already"):
            fit(exp, tmp_path / "run", device="cpu")
    finally:
        process.kill()
        process.communicate()
    assert fit(exp, tmp_path / "run", device="cpu", max_hours=0).steps >= 2


# --- The command line -------------------------------------------------------------------------------------------------


def test_the_command_line_trains_goes_on_and_says_where_it_stands(pictures, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    settings = ["sizes={\"N\": 16, \"M\": 24, \"groups\": [4, 4, 4, 4, 8], \"text_dim\": 64, \"heads\": 8, \"context_widths\": [16, 16]}"]  # fmt: skip # noqa: E501
    settings += [f"train_data={pictures}", "crop=64", "epochs=1", "lmbda=0.02", "init=", "attention=linformer"]
    changes = [word for setting in settings for word in ("--set", setting)]
    assert main(["--profile", "sample", *changes, *out, "--device", "cpu", "--max-hours", "0"]) == 0
    assert "Stopped by max_hours after step 1 of 3" in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert (run.experiment.lmbda, run.experiment.attention, run.experiment.init) == (0.02, "linformer", "")
    assert main([*out, "--status"]) == 3
    assert capsys.readouterr().out.endswith("1 of 3 steps.\n")
    assert main([*out, "--device", "cpu"]) == 0
    assert "Finished: 3 steps" in capsys.readouterr().out
    assert main([*out, "--status"]) == 0
    assert capsys.readouterr().out.endswith("3 of 3 steps, finished.\n")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "There is no experiment in .*run"),
        (["--profile", "sample", "--set", "lmbda"], "--set takes NAME=VALUE.*'lmbda'"),
        (["--profile", "sample", "--set", "lambda=1"], "no setting 'lambda'"),
        (["--profile", "sample", "--set", "lmbda=high"], "lmbda must be a number, but is 'high'"),
        (["--status"], "There is no run in .*run"),
    ],
)
def test_the_command_line_complains_in_a_sentence(tmp_path, capsys, arguments, complaint):
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert re.match(rf"SettingError: .*{complaint}", said) and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
