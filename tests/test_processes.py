"""Several processes on one machine: what they compute on, who started them, locks, signals, agreement, and errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from taco_nb.errors import DataError, ProcessError, SettingError
from taco_nb.files import REPOSITORY
from taco_nb.model.precision import arithmetic
from taco_nb.processes import (
    alone_in,
    check_device,
    cpu_count,
    launched_processes,
    run_in_processes,
    stop_requests,
)

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def in_a_new_process(code, **environment):
    """What a program prints, and what it says on stderr, in an environment with these variables more."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# --- What there is to compute on --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(name, capability, cudnn, archs)` makes PyTorch say that it sees such a GPU, and that it was built so."""

    def pretend(name, capability, cudnn=92600, archs=("sm_75", "sm_80", "sm_90", "sm_120")):
        monkeypatch.setattr(torch.version, "cuda", "13.2")
        for function, answer in {
            "device_count": 1, "get_device_name": name, "get_device_capability": capability, "get_arch_list": list(archs),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        return torch.device("cuda", 0)

    return pretend


@pytest.mark.parametrize("device", ["gpu", "cuda:0", None])
def test_an_unknown_device(device):
    with pytest.raises(SettingError, match='device must be "auto", "cpu" or "cuda", but is'):
        check_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(SettingError, match="no CUDA device"):
        check_device("cuda")
    check_device("auto", 8)
    check_device("cpu", 8)


def test_fewer_gpus_than_processes(gpu):
    gpu("NVIDIA H100", (9, 0))
    check_device("cuda", 1)
    with pytest.raises(SettingError, match="num_processes=2 needs a GPU for each, but here are 1"):
        check_device("auto", 2)
    check_device("cpu", 2)


@pytest.mark.parametrize(
    "name, capability, built",
    [
        ("Tesla V100-SXM2-16GB", (7, 0), {}),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), {}),
        # kernels for it, but a cuDNN that knows it no more, and the other way round
        ("Tesla V100-SXM2-16GB", (7, 0), {"cudnn": 91500, "archs": ["sm_70", "sm_80"]}),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), {"cudnn": 91002, "archs": ["sm_70", "sm_80"]}),
    ],
)
def test_a_gpu_that_this_pytorch_is_too_new_for(gpu, name, capability, built):
    gpu(name, capability, **built)
    with pytest.raises(SettingError) as refusal:
        check_device("auto")
    said = str(refusal.value)
    assert said.startswith(f"{name} has compute capability {capability[0]}.{capability[1]}, but PyTorch ")
    assert 'pip install "torch<2.15" torchvision --index-url https://download.pytorch.org/whl/cu126' in said
    check_device("cpu")  # as the sentence says


@pytest.mark.parametrize(
    "name, capability, built",
    [
        ("Tesla V100-SXM2-16GB", (7, 0), {"cudnn": 91002, "archs": ["sm_50", "sm_60", "sm_70", "sm_90"]}),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), {"cudnn": 91002, "archs": ["sm_50", "sm_60", "sm_70"]}),
        ("Tesla T4", (7, 5), {}),
        ("NVIDIA H200", (9, 0), {"archs": ["sm_75", "sm_90a", "compute_120"]}),
        ("NVIDIA B200", (10, 0), {}),
    ],
)
def test_gpus_that_are_computed_on(gpu, name, capability, built):
    gpu(name, capability, **built)
    check_device("cuda")


def test_the_notebooks_first_cell_says_that_a_gpu_is_too_old(gpu, tmp_path):
    from taco_nb.notebook import check_parameters

    gpu("Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(SettingError, match=r"Tesla V100.*7\.0.*cu126"):
        check_parameters({"profile": "sample", "out_dir": str(tmp_path)})


def test_float32_on_a_gpu_says_whether_it_is_tf32(gpu):
    assert arithmetic(torch.device("cpu"), "float32") == "the CPU in float32"
    device = gpu("NVIDIA H200", (9, 0))
    assert arithmetic(device, "float32") == "NVIDIA H200 in float32, its convolutions in TF32"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert arithmetic(device, "float32") == "NVIDIA H200 in float32"
    assert arithmetic(device, "bfloat16") == "NVIDIA H200 in bfloat16"
    assert arithmetic(gpu("Tesla T4", (7, 5)), "float32") == "Tesla T4 in float32"


def test_bfloat16_that_a_gpu_would_emulate_is_refused(gpu):
    with pytest.raises(SettingError, match='precision="bfloat16", but Tesla T4 .* Use "float32"'):
        arithmetic(gpu("Tesla T4", (7, 5)), "bfloat16")
    assert arithmetic(torch.device("cpu"), "bfloat16") == "the CPU in bfloat16"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such limits here")
def test_the_cores_are_those_that_a_batch_system_leaves(monkeypatch):
    (one, *_) = os.sched_getaffinity(0)
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from taco_nb.processes import cpu_count; print(cpu_count())"
    assert in_a_new_process(code) == "1\n"
    assert cpu_count() == len(os.sched_getaffinity(0))


# --- Who else was started ---------------------------------------------------------------------------------------------

LAUNCHED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    for name in [*LAUNCHED, *(name for name in os.environ if name.startswith("ACCELERATE_"))]:
        monkeypatch.delenv(name, raising=False)
    return lambda given: [monkeypatch.setenv(name, value) for name, value in given.items()]


def test_a_launcher_is_known_by_all_that_it_says(environment, capsys):
    assert launched_processes() == 1
    environment(LAUNCHED)
    assert launched_processes() == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "RANK", "MASTER_PORT"])
def test_what_a_launcher_has_left_is_dropped_and_named(environment, capsys, missing):
    environment({name: value for name, value in LAUNCHED.items() if name != missing})
    assert launched_processes() == 1
    said = capsys.readouterr().out
    assert "WORLD_SIZE=4" in said and f"{missing} is missing" in said and said.count("\n") == 1
    assert launched_processes() == 1 and capsys.readouterr().out == ""
    assert "WORLD_SIZE" not in os.environ


def test_a_world_size_that_is_left_makes_nothing_wait(tmp_path):
    """PyTorch would wait half an hour for the other 1 of 2 processes."""
    code = f"""
from taco_nb import baseline, datasets, evaluate, fit, load
evaluate(load("demo"), datasets("sample", limit=1), networks={{}})
exp = baseline("sample", init="", epochs=1, crop=64, text_encoder="untrained-16", k_P=0.0, k_J=0.0,
               sizes={{"N": 8, "M": 16, "groups": (4, 12), "text_dim": 16, "heads": 2, "context_widths": (8, 8)}})
run = fit(exp, {str(tmp_path / "run")!r}, device="cpu", max_hours=0)
print(run.steps)
"""
    said = in_a_new_process(code, WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    assert "RANK=0, WORLD_SIZE=2 in the environment is no launcher's" in said and said.endswith("1\n")


def test_accelerate_without_multi_gpu_is_refused(tmp_path):
    """It starts a single process, on a machine without GPUs, and says nothing of the other."""
    if torch.cuda.device_count() > 1:
        pytest.skip("accelerate starts several processes by itself where there are several GPUs")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "taco_nb.training",
        "--profile",
        "sample",
    ]
    done = subprocess.run(
        [*launch, "--out", "run", "--device", "cpu"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "accelerate launch --multi_gpu --num_processes 2 -m" in said


# --- One process at a time in a folder --------------------------------------------------------------------------------

HOLD = """
import sys; from pathlib import Path
from taco_nb.processes import alone_in
with alone_in(Path(sys.argv[1]), "knitting"): print("in", flush=True); sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `tmp_path` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "in\n"
        yield process
        process.kill()


def test_a_folder_is_held_by_one_and_free_when_that_one_dies(tmp_path, holder):
    expected = rf"Process {holder.pid} on .+ is knitting in .+\. Wait for it, or give another out_dir"
    with pytest.raises(SettingError, match=expected), alone_in(tmp_path, "training"):
        raise AssertionError("two in one folder")
    holder.kill()
    holder.wait()
    with alone_in(tmp_path, "training"):
        assert f"Process {os.getpid()}" in (tmp_path / ".lock").read_text()
    with alone_in(tmp_path / "new" / "folder", "training"):
        pass


def test_who_may_wait_is_told_and_waits(tmp_path, holder, capsys):
    threading.Timer(0.5, holder.stdin.close).start()
    with alone_in(tmp_path, "evaluating", wait=True):
        assert holder.wait() == 0
    assert (
        f"Process {holder.pid} on " in (said := capsys.readouterr().out) and "waiting for it to end" in said
    )


# --- Stopping ---------------------------------------------------------------------------------------------------------


@posix
def test_a_first_signal_is_a_request_and_a_second_one_is_delivered_afterwards():
    mine, came = signal.getsignal(signal.SIGUSR1), []
    signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        with stop_requests() as requests:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert requests == [signal.SIGUSR1] and not came
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not came
        assert came == [signal.SIGUSR1]
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    finally:
        signal.signal(signal.SIGUSR1, mine)


@posix
def test_a_request_that_came_in_a_block_around_counts():
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_requests():
            os.kill(os.getpid(), signal.SIGTERM)
            with stop_requests() as requests:
                assert requests == [signal.SIGTERM]
        with stop_requests() as requests:
            assert not requests
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_in_another_thread_signals_are_left_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def look():
        with stop_requests() as requests:
            found.append((requests, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [([], before)]


def test_nothing_heavy_is_loaded_before_signals_are_listened_for():
    code = "import sys, taco_nb.processes; print(sorted({'torch', 'accelerate', 'tqdm', 'psutil'} & sys.modules.keys()))"
    assert in_a_new_process(code) == "[]\n"


# --- New processes ----------------------------------------------------------------------------------------------------


def test_two_processes_agree_and_are_heard_here(tmp_path, holder, capsys):
    (tmp_path / "held").symlink_to(tmp_path, target_is_directory=True)
    run_in_processes("workers:agree", {"folder": tmp_path}, 2, "agreeing", "word")
    expected = (2, ({"rank": 0}, 1, 0), (True, False), True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [repr(expected)] * 2
    said = capsys.readouterr()
    assert "Said by 0: é\n" in said.out and "Said by 1: é\n" in said.out
    assert "agreeing on 2 processes: 100%" in said.err and "3/3" in said.err and "loss=1" in said.err


@posix
@pytest.mark.parametrize(
    "how, kind, words",
    [
        ("ours", DataError, r"a\.png is no image\."),
        (
            "other",
            ProcessError,
            "One of the processes died: ZeroDivisionError: by nothing. What was saved is kept",
        ),
        ("killed", ProcessError, "One of the processes was killed by SIGKILL. What was saved is kept"),
    ],
)
def test_the_error_of_one_of_two_processes_is_raised_here(how, kind, words):
    with pytest.raises(kind, match=f"^{words}"):
        run_in_processes("workers:fail", {"how": how}, 2, "failing", "step")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_here_lets_them_save_and_leaves_nothing_running(tmp_path, number):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from taco_nb.processes import run_in_processes
try: run_in_processes("workers:wait_for_a_request", {{"folder": Path({str(tmp_path)!r})}}, 2, "waiting", "step")
except KeyboardInterrupt: print("interrupted")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while len(list(tmp_path.glob("begun-*"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    said, complaint = process.communicate()
    assert process.returncode == 0, complaint[-2000:]
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert said == ("interrupted\n" if number == signal.SIGINT else "")
    pids = [int(path.read_text()) for path in tmp_path.glob("begun-*")]
    assert not any(psutil.pid_exists(pid) for pid in pids)
