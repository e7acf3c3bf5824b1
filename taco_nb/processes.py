"""Several processes on one machine, for training and evaluation alike.

    alone_in(folder, "training")            one process, or one group of processes, works in a folder at a time
    stop_requests()                         SIGTERM and SIGUSR1 ask for a stop between two steps, and are never fatal
    Group(state)                            the processes that share a piece of work agree on what to do next
    run_in_processes("module:function", …)  the same call in several new processes, with their errors and progress here

Nothing here imports PyTorch at the top, so that a command line can listen for signals before PyTorch loads.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from taco_nb import errors
from taco_nb.errors import ProcessError, SettingError, TacoError
from taco_nb.files import atomic_write, check_writable

if TYPE_CHECKING:
    from accelerate import PartialState
    from tqdm import tqdm

PATIENCE = 300
"""Seconds that new processes have to end their step and save, before they are killed."""
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""SIGTERM ends jobs everywhere; SIGUSR1 is what Slurm's `--signal` is usually set to."""
_PROGRESS = "TACO_NB_PROGRESS"
"""The environment variable that tells a new process where to write its progress."""


# What there is to compute on ------------------------------------------------------------------------------------------


def check_device(device: str, num_processes: int = 1) -> None:
    """Raise `SettingError` for a device that is unknown or not on this machine, or with fewer GPUs than processes."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise SettingError(f'device must be "auto", "cpu" or "cuda", but is {device!r}.')
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise SettingError('device="cuda", but PyTorch sees no CUDA device here. Use device="auto" or "cpu".')
    if 0 < gpus < num_processes:
        raise SettingError(f"num_processes={num_processes} needs a GPU for each, but here are {gpus}.")


def cpu_count() -> int:
    """Return the number of processor cores that this process may use, which a batch system may have limited."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# One process at a time in a folder ------------------------------------------------------------------------------------


@contextmanager
def alone_in(folder: Path, doing: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder. The system takes it back from a process that dies, however it dies.

    `doing` completes the sentence "process 12 is … in the folder", such as "training". Where another process holds the
    lock, `wait=True` says so in a line and waits, and `wait=False` raises `SettingError`, saying who it is.
    """
    from filelock import FileLock, Timeout

    check_writable(folder)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = path.read_text(encoding="utf-8") or "Another process is at work"
        if not wait:
            raise SettingError(f"{holder} in {folder}. Wait for it, or give another out_dir.") from None
        print(f"{holder} in {folder}: waiting for it to end.")
        lock.acquire()
    try:
        path.write_text(f"Process {os.getpid()} on {platform.node()} is {doing}", encoding="utf-8")
        yield
    finally:
        lock.release()


# Stopping between two steps -------------------------------------------------------------------------------------------


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect the numbers of the stop signals that come within the block, in the list that it gives.

    The first signal is a request, which the block is to look for between two steps. A batch system may signal a launcher
    and its processes both, and the launcher then its processes once more; so later signals are collected too, and
    delivered at the end of the block, when nothing can be lost any more. Blocks may be nested: a request that came in
    the outer one before the inner one began counts in the inner one as well.

    Python lets only its main thread handle signals. In another thread the list stays empty.
    """
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def handle(number: int, _: object) -> None:
        requests.append(number)

    handle.requests = requests
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    inherited = getattr(before[signal.SIGTERM], "requests", [])[:1]
    requests += inherited
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in requests[1:]:
            signal.raise_signal(number)


def ignore_stop_signals(_: int = 0) -> None:
    """Leave it to the main process when to stop. This is for a data loader's worker, whose death would end the run."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# Agreeing with each other ---------------------------------------------------------------------------------------------


class Group:
    """The processes that share a piece of work: this one alone, or those that a launcher has started together.

    They speak over gloo, on the processor, so that no GPU has to be waited for.
    """

    def __init__(self, state: PartialState):
        import torch

        self.rank, self.size = state.process_index, state.num_processes
        self._gloo = torch.distributed.new_group(backend="gloo") if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        self.largest(0)

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that the processes bring, the same in all of them."""
        if self._gloo is None:
            return number
        import torch

        brought = torch.tensor(number)
        torch.distributed.all_reduce(brought, torch.distributed.ReduceOp.MAX, self._gloo)
        return int(brought)

    def from_main(self, value: Any) -> Any:
        """Return the value that the main process brings, in every process."""
        if self._gloo is None:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, group=self._gloo)
        return values[0]

    @contextmanager
    def alone_in(self, folder: Path, doing: str, wait: bool = False) -> Iterator[None]:
        """As the function `alone_in`, for all: the main process holds the lock, and all raise what it raises."""
        with ExitStack() as stack:
            refusal = None
            if self.is_main:
                try:
                    stack.enter_context(alone_in(folder, doing, wait))
                except TacoError as error:
                    refusal = error
            if refusal := self.from_main(refusal):
                raise refusal
            yield


# New processes --------------------------------------------------------------------------------------------------------


def progress_bar(**settings: Any) -> tqdm:
    """Return a tqdm bar, which in a process of `run_in_processes` is shown by the process that started it."""
    from tqdm.auto import tqdm

    if _PROGRESS not in os.environ:
        return tqdm(**settings)
    from tqdm import tqdm as plain

    class Reported(plain):
        def display(self, *_: Any, **__: Any) -> None:
            with atomic_write(os.environ[_PROGRESS], "w") as file:
                json.dump({"n": self.n, "total": self.total, "postfix": self.postfix or ""}, file)

    return Reported(**settings)


def run_in_processes(target: str, arguments: dict[str, Any], count: int, what: str, unit: str) -> None:
    """Call a function, "module:function", with the same arguments in `count` new processes, and wait for their end.

    They are new, rather than forked, since neither a GPU nor OpenMP in use survives a fork. PyTorch's launcher starts
    them, and ends all of them when one fails. What they print is printed here; the progress of the main one moves a bar
    with the label `what`. Ctrl-C, SIGTERM and SIGUSR1 here ask them to stop between two steps.

    Raises the `TacoError` that ended the first of them to fail, or `ProcessError` where one died of anything else.
    """
    from tqdm.auto import tqdm

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / "job.pickle").write_bytes(pickle.dumps((target, arguments)))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(count),
        ]
        command += ["-m", "taco_nb.processes", str(home)]
        path = os.pathsep.join(filter(None, sys.path))  # so that what is pickled here can be imported there
        launcher = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is for this process, which asks the others in a gentler way
        )  # fmt: skip
        last_words: deque[str] = deque(maxlen=1000)
        readers = [
            threading.Thread(target=_print_lines, args=(launcher.stdout,), daemon=True),
            threading.Thread(target=_keep_lines, args=(launcher.stderr, last_words), daemon=True),
        ]
        with tqdm(desc=f"{what} on {count} processes", unit=unit) as bar:
            for reader in readers:
                reader.start()
            try:
                with stop_requests() as requests:
                    asked = False
                    while launcher.poll() is None:
                        if requests and not asked:
                            asked = True
                            _ask_to_stop(launcher)
                        _move(bar, home / "progress.json")
                        time.sleep(0.1)
            finally:
                _end(launcher)
                for reader in readers:
                    reader.join()
                _move(bar, home / "progress.json")
        if launcher.returncode:
            raise _error(home, last_words)


def _print_lines(stream: IO[str]) -> None:
    for line in stream:
        print(line, end="")


def _keep_lines(stream: IO[str], lines: deque[str]) -> None:
    lines.extend(line.rstrip() for line in stream if line.strip())


def _move(bar: tqdm, progress: Path) -> None:
    """Move the bar to where the main process's own stands."""
    try:
        now = json.loads(progress.read_text(encoding="utf-8"))
    except OSError:  # nothing is written yet
        return
    bar.total = now["total"]
    bar.set_postfix_str(now["postfix"], refresh=False)
    bar.update(now["n"] - bar.n)


def _ask_to_stop(launcher: subprocess.Popen) -> None:
    """Signal the processes that the launcher has started; the launcher itself would die of the signal."""
    import psutil

    try:
        for child in psutil.Process(launcher.pid).children():
            child.send_signal(STOP_SIGNALS[-1])
    except psutil.NoSuchProcess:
        pass  # they have ended by themselves


def _end(launcher: subprocess.Popen) -> None:
    """Leave nothing running, whatever has happened here."""
    if launcher.poll() is None:
        _ask_to_stop(launcher)
        try:
            launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # which makes the launcher kill its processes
            launcher.wait()


def _error(home: Path, last_words: deque[str]) -> TacoError:
    """Return the error that ended the first process to fail."""
    if reports := sorted(home.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns):
        kind, message = json.loads(reports[0].read_text(encoding="utf-8"))
        return getattr(errors, kind)(message)
    said = [
        line
        for line in last_words
        if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]
    ]
    words = " | ".join((said or list(last_words))[-5:])
    return ProcessError(
        f"One of the processes died. What was saved is kept, and the same call goes on. Its last words: {words}"
    )


def _work(home: Path) -> None:
    """Do what one of the new processes is for."""
    rank = int(os.environ["RANK"])
    if rank == 0:
        os.environ[_PROGRESS] = str(home / "progress.json")
    target, arguments = pickle.loads((home / "job.pickle").read_bytes())
    module, _, function = target.partition(":")
    try:
        with stop_requests():  # what comes while PyTorch loads counts too
            getattr(import_module(module), function)(**arguments)
    except TacoError as error:
        with atomic_write(home / f"error-{rank}.json", "w") as file:
            json.dump([type(error).__name__, str(error)], file)
        sys.exit(1)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
