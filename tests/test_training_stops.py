"""How a run is stopped and begun again: time limits, real signals to real processes, the lock, the command line."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import PLAIN, command, fresh_process
from test_training import assert_same_bits, paint, state_of
from test_training_processes import ENVIRONMENT, experiment, launched

from taco_nb.errors import SettingError
from taco_nb.files import REPOSITORY
from taco_nb.training import fit, loop
from taco_nb.training.loop import read_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine pairs: batches of four, four and one."""
    captions = {
        "barn": ["a red barn", "a barn", "snow"],
        "dog": ["a dog", "two dogs"],
        "river": ["boats"] * 4,
    }
    return paint(tmp_path_factory.mktemp("stops") / "pictures", **captions)


# --- Time limits and signals ------------------------------------------------------------------------------------------


class Clock:
    """Hours, of which each look takes one."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 3600.0
        return self.now


def test_max_hours_by_the_clock(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        loop, "time", Clock()
    )  # one look as `fit` is called, one as it begins, one after each step
    folder = tmp_path / "my runs" / "first one"
    run = fit(experiment(pictures, epochs=20), folder, device="cpu", max_hours=5, save_minutes=1e9)
    assert (run.steps, run.total_steps) == (4, 60) and not run.finished
    assert state_of(run.dir)["step"] == 4
    said = capsys.readouterr().out
    assert said.startswith("Training first one in 1 process on the CPU in float32.\n")
    (again,) = re.findall("Stopped by max_hours after step 4 of 60; the same call, or (.*), goes on", said)
    assert shlex.split(again) == ["taco-nb", "train", "--out", str(folder)]
    assert command(*shlex.split(again)[1:], "--device", "cpu", "--max-hours", 0) == 0
    assert read_run(folder).steps == 5


def running(folder):
    """The processes that were told of the folder; one that is just ending tells its command line no more."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(folder) in " ".join(process.info["cmdline"] or [])]


def train_words(folder, exp):
    """What a command line that trains takes, after its name."""
    (folder.parent / "exp.json").write_text(exp.to_json())
    words = [
        "--experiment",
        folder.parent / "exp.json",
        "--out",
        folder,
        "--device",
        "cpu",
        "--save-minutes",
        "0",
    ]
    return list(map(str, words))


def train(words):
    sys.exit(command("train", *words))


def begin(folder, exp, *more):
    """A run in a process of its own that heads a group, once it has taken its first steps."""
    process = fresh_process(train, [*train_words(folder, exp), *more], output=folder.parent / "said")
    while not (folder / "state.pt").exists() and process.is_alive():
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_between_two_steps_and_the_bits_are_those_of_an_undisturbed_run(
    pictures, name, tmp_path, monkeypatch
):
    """To the whole group and with workers, as a batch system does."""
    exp = experiment(pictures, epochs=500)
    process = begin(tmp_path / "run", exp, "--num-workers", "2")
    os.killpg(process.pid, getattr(signal, name))
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said
    run = read_run(tmp_path / "run")
    assert 0 < run.steps < 1500 and f"Stopped by {name} after step {run.steps} of 1500" in said

    def look(trainer, *_):
        return "a test" if trainer.step == run.steps else None

    monkeypatch.setattr(loop.Trainer, "_reason_to_stop", look)
    undisturbed = fit(exp, tmp_path / "undisturbed", device="cpu")
    assert_same_bits(run, undisturbed)


def test_a_signal_to_one_process_stops_both_after_the_same_step(pictures, tmp_path):
    exp = experiment(pictures, epochs=500)
    process = launched(2, "-m", "taco_nb.training", *train_words(tmp_path / "run", exp))
    while not (tmp_path / "run" / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    trainers = [p for p in psutil.Process(process.pid).children() if "taco_nb.training" in p.cmdline()]
    trainers[1].send_signal(signal.SIGUSR1)
    said, complaint = process.communicate(timeout=600)
    assert process.returncode == 0, complaint[-2000:]
    run = read_run(tmp_path / "run")
    assert 0 < run.steps < run.total_steps and state_of(run.dir)["step"] == run.steps
    assert re.search(rf"Stopped by SIGUSR1 after step {run.steps} of 1500", said)
    assert not running(run.dir)


def test_the_readmes_batch_script_resubmits_what_it_did_not_finish(pictures, tmp_path):
    """The script itself, with a small experiment, on CPUs, and a `scontrol` that only notes what it is asked."""
    (script,) = re.findall(
        r"```bash\n(#!/bin/bash\n.*?)```", (REPOSITORY / "notebooks" / "README.md").read_text(), re.DOTALL
    )
    exp = experiment(pictures, epochs=500)
    (tmp_path / "exp.json").write_text(exp.to_json())
    for old, new in (
        (
            "--profile paper --set lmbda=0.0016",
            f"--experiment {tmp_path}/exp.json --device cpu --save-minutes 0",
        ),
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
    folder = tmp_path / "out" / "runs" / "paper-0.0016"
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B: has it
    said, complaint = process.communicate(timeout=600)
    run = read_run(folder)
    assert 0 < run.steps < run.total_steps and f"Stopped by SIGUSR1 after step {run.steps} of" in said, (
        complaint
    )
    assert (tmp_path / "asked").read_text() == "requeue 77\n" and process.returncode == 0


def test_a_signal_before_the_first_step_stops_after_it(pictures, tmp_path, monkeypatch):
    def digest(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return training_digest(*arguments)

    came, training_digest = [], loop.training_digest
    mine = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    monkeypatch.setattr(loop, "training_digest", digest)
    try:
        assert fit(experiment(pictures), tmp_path / "run", device="cpu").steps == 1 and not came
    finally:
        signal.signal(signal.SIGUSR1, mine)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_signal_while_pytorch_loads_stops_after_the_first_step(pictures, tmp_path):
    (tmp_path / "exp.json").write_text(experiment(pictures, epochs=500).to_json())
    command = [
        sys.executable,
        "-m",
        "taco_nb.training",
        "--experiment",
        "exp.json",
        "--out",
        "run",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    maps = Path("/proc", str(process.pid), "maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said, complaint = process.communicate(timeout=600)
    assert process.returncode == 0, complaint
    assert "Stopped by SIGUSR1 after step 1 of 1500" in said


def test_a_run_in_another_thread(pictures, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(fit, experiment(pictures), tmp_path / "run", device="cpu", max_hours=0).result()
    assert run.steps == 1


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
    said, complaint = process.communicate(timeout=600)
    assert said.endswith("interrupted\n"), complaint[-2000:]
    run = read_run(folder)
    assert 0 < run.steps < run.total_steps and state_of(folder)["step"] == run.steps
    assert not running(folder)


# --- One folder, one run ----------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(pictures, tmp_path):
    """The second is refused and says by whom; a process that is killed leaves the folder free."""
    exp = experiment(pictures, epochs=500)
    process = begin(tmp_path / "run", exp)
    try:
        with pytest.raises(SettingError, match=rf"Process {process.pid} on .* is training in .*run\."):
            fit(exp, tmp_path / "run", device="cpu")
    finally:
        process.kill()
        process.join()
    assert fit(exp, tmp_path / "run", device="cpu", max_hours=0).steps >= 2


# --- The command line -------------------------------------------------------------------------------------------------


def test_the_command_line_trains_goes_on_and_says_where_it_stands(pictures, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    settings = ["sizes={\"N\": 16, \"M\": 24, \"groups\": [4, 4, 4, 4, 8], \"text_dim\": 64, \"heads\": 8, \"context_widths\": [16, 16]}"]  # fmt: skip # noqa: E501
    settings += [
        f"train_data={pictures}",
        "crop=64",
        "epochs=1",
        "lmbda=0.02",
        "init=",
        "attention=linformer",
        *(f"{name}={value}" for name, value in PLAIN.items()),
    ]
    changes = [word for setting in settings for word in ("--set", setting)]
    assert command("train", "--profile", "sample", *changes, *out, "--device", "cpu", "--max-hours", 0) == 0
    assert "Stopped by max_hours after step 1 of 3" in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert (run.experiment.lmbda, run.experiment.attention, run.experiment.init) == (0.02, "linformer", "")
    assert command("train", *out, "--status") == 3
    assert capsys.readouterr().out.endswith("1 of 3 steps.\n")
    assert command("train", *out, "--device", "cpu") == 0
    assert "Finished: 3 steps" in capsys.readouterr().out
    assert command("train", *out, "--status") == 0
    assert capsys.readouterr().out.endswith("3 of 3 steps, finished.\n")


def test_status_is_what_was_saved_last_however_the_run_ended(pictures, tmp_path, monkeypatch, capsys):
    """The weights are written by a clean stop only; a run that was killed is beyond them, and not finished without."""
    folder, exp = tmp_path / "run", experiment(pictures, epochs=1)
    fit(exp, folder, device="cpu", max_hours=0)
    monkeypatch.setattr(loop.Trainer, "_export", lambda self: None)  # as if it had been killed before
    for hours, steps in ((0, 2), (None, 3)):
        fit(exp, folder, device="cpu", max_hours=hours)
        capsys.readouterr()
        assert command("train", "--out", folder, "--status") == 3
        assert capsys.readouterr().out == f"{folder}: {steps} of 3 steps.\n"
    (folder / "weights.safetensors").unlink()
    (folder / "state.pt").unlink()
    assert command("train", "--out", folder, "--status") == 3
    assert capsys.readouterr().out == f"{folder}: begun, and nothing is saved yet.\n"


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
    assert command("train", *arguments, "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert re.match(rf"Error: .*{complaint}", said) and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
