"""Several processes from within one, such as a notebook's kernel: `accelerate launch` with its progress shown here.

A process of its own for each, rather than a fork of this one, since a kernel that has touched a GPU cannot be forked.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from taco_nb import errors
from taco_nb.experiment import Experiment
from taco_nb.files import REPOSITORY
from taco_nb.processes import check_device
from taco_nb.training.signals import on_warning

if TYPE_CHECKING:
    from tqdm import tqdm

    from taco_nb.training.loop import Run

PATIENCE = 300
"""Seconds that the processes have to end a step and save, before they are killed."""


def launch(
    exp: Experiment, folder: Path, num_processes: int, *, device: str, max_hours: float | None, **options: Any
) -> Run:
    """`taco_nb.training.fit` on so many processes, with the same folder, the same result and the same errors.

    Ctrl-C, SIGTERM and SIGUSR1 here let them save and stop between two steps. `options` are those of the command line.
    Raises `SettingError` where there are fewer GPUs than processes, `ProcessError` where one of them dies.
    """
    from tqdm.auto import tqdm

    from taco_nb.training.loop import read_run

    check_device(device, num_processes)
    options |= {"device": device, "max_hours": max_hours, "out": folder}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(exp.to_json())
        file.flush()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += [
            "--num_processes",
            str(num_processes),
            "--main_process_port",
            "0",
            "--mixed_precision",
            "no",
        ]
        command += ["--dynamo_backend", "no", "-m", "taco_nb.training", "--experiment", file.name]
        for name, value in options.items():
            command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is for this process, which passes on something gentler
        )  # fmt: skip
        last_words: deque[str] = deque(maxlen=1000)
        with tqdm(desc=f"training {folder.name} on {num_processes} processes", unit="step") as bar:
            reader = threading.Thread(target=_follow, args=(process.stderr, bar, last_words), daemon=True)
            reader.start()
            try:
                with on_warning(lambda _: _ask_to_stop(process)):
                    for line in process.stdout:
                        print(line, end="")
                    process.wait()
            finally:
                _end(process)
                reader.join()
    if process.returncode:
        raise _error(last_words)
    return read_run(folder)


def _follow(stream: IO[str], bar: tqdm, last_words: deque[str]) -> None:
    """Move `bar` as the main process's own bar moves, and keep what else the processes say."""
    for line in stream:
        if progress := re.match(r"training .*?\s(\d+)/(\d+) \[[^,]*(?:, [^,]*)?(?:, (.*))?\]", line):
            bar.total = int(progress[2])
            bar.set_postfix_str(progress[3] or "", refresh=False)
            bar.update(int(progress[1]) - bar.n)
        elif line.strip():
            last_words.append(line.rstrip())


def _ask_to_stop(process: subprocess.Popen) -> None:
    """Warn the processes that the launcher has started; the launcher itself would die of the signal."""
    import psutil

    try:
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGUSR1)
    except psutil.NoSuchProcess:
        pass  # they have ended by themselves


def _end(process: subprocess.Popen) -> None:
    """Leave nothing running, whatever has happened here."""
    if process.poll() is None:
        _ask_to_stop(process)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # which makes the launcher kill its processes
            process.wait()


def _error(last_words: deque[str]) -> errors.TacoError:
    """The error that the first process to fail has told of, as if it had been raised here."""
    for line in last_words:
        name, _, message = line.partition(": ")
        if isinstance(kind := getattr(errors, name, None), type) and issubclass(kind, errors.TacoError):
            return kind(message)
    said = [
        line
        for line in last_words
        if re.match(r"(\[rank\d+\]: )?\w[\w.]*(Error|Exception|Interrupt)\b", line)
    ]
    words = (said or list(last_words)[-5:])[:5]
    return errors.ProcessError(
        "A training process died; what was saved is kept, and the same call goes on. Its last words: "
        + " | ".join(words)
    )
