"""Training and evaluation share this: several processes on one machine that work together.

    check_device("auto", 4)                 there is something to compute on, and this PyTorch can use it
    launched_processes()                    how many processes a launcher such as accelerate's has started
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
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Raise `SettingError` for a device that cannot be computed on.

    It is unknown, or not on this machine, or has fewer GPUs than processes, or has a GPU that is too old for this PyTorch.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise SettingError(f'device must be "auto", "cpu" or "cuda", but is {device!r}.')
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise SettingError('device="cuda", but PyTorch sees no CUDA device here. Use device="auto" or "cpu".')
    if 0 < gpus < num_processes:
        raise SettingError(f"num_processes={num_processes} needs a GPU for each, but here are {gpus}.")
    for index in range(min(gpus, num_processes)):
        _check_gpu(index)


def _check_gpu(index: int) -> None:
    """Raise `SettingError` where this PyTorch, or its cuDNN, was built for newer GPUs only."""
    import torch

    if torch.version.cuda is None:  # AMD's GPUs are counted otherwise
        return
    built_for = [int(arch) for arch in re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    oldest = min(built_for, default=0)
    if (torch.backends.cudnn.version() or 0) >= 91100:
        oldest = max(oldest, 75)  # cuDNN 9.11 dropped all before Turing, as its release notes say
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor < oldest:
        raise SettingError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, but PyTorch {torch.__version__} "
            f"is built for {oldest / 10} and above. Install one that is built for CUDA 12.6, which are those before 2.15 "
            '(pip install "torch<2.15" torchvision --index-url https://download.pytorch.org/whl/cu126), or give device="cpu".'
        )


def cpu_count() -> int:
    """Return the number of processor cores that this process may use, which a batch system may have limited."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Who else was started -------------------------------------------------------------------------------------------------

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables by which a launcher tells a process which one it is, and where the others meet."""


def launched_processes() -> int:
    """Return how many processes a launcher, such as accelerate's, has started together with this one: 1 without one.

    Call it before anything asks accelerate, which takes a WORLD_SIZE that a job's script or a container has left in the
    environment for a launcher's, and waits for processes that do not exist. Here only all of a launcher's variables
    together count; where some are missing the others are removed, and a line says so.

    Raises `SettingError` where `accelerate launch` was asked for several processes and has started one.
    """
    there = {name for name in _LAUNCHERS if name in os.environ}
    if len(there) == len(_LAUNCHERS):
        return int(os.environ["WORLD_SIZE"])
    # For a single process accelerate sets a place to meet only if it was asked for more than one.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and there == {"MASTER_ADDR", "MASTER_PORT"}:
        raise SettingError(
            "accelerate launch was asked for several processes, but has started one. It wants --multi_gpu for several, on "
            "CPUs too: accelerate launch --multi_gpu --num_processes 2 -m ..."
        )
    if left := sorted(there & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}):
        missing = ", ".join(sorted(set(_LAUNCHERS) - there))
        said = ", ".join(f"{name}={os.environ.pop(name)}" for name in left)
        print(
            f"Computing in one process: {said} in the environment is no launcher's, as {missing} is missing."
        )
    return 1


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
        holder = _read_if_there(path) or "Another process is at work"
        if not wait:
            raise SettingError(f"{holder} in {folder}. Wait for it, or give another out_dir.") from None
        print(f"{holder} in {folder}: waiting for it to end.", flush=True)
        lock.acquire()
    try:
        path.write_text(f"Process {os.getpid()} on {platform.node()} is {doing}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _read_if_there(path: Path) -> str:
    """Return the text of a file that another process writes: "" while it is not there, or, on Windows, is locked."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


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
    """These processes share a piece of work: this one alone, or those that a launcher has started together.

    They speak over gloo, on the processor, so that no GPU has to be waited for.
    """

    def __init__(self, state: PartialState):
        import torch

        self.rank, self.size = state.process_index, state.num_processes
        self.is_main = self.rank == 0
        if self.size > 1:
            # The default of half an hour is too short to wait for one that has more to do, or that waits for a lock.
            self._gloo = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait(self) -> None:
        """Return when every process has come here."""
        self._brought(None)

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that the processes bring, the same in all of them."""
        return max(self._brought(number))

    def all_equal(self, number: int) -> bool:
        """Say whether all processes bring the same number."""
        return len(set(self._brought(number))) == 1

    def from_main(self, value: Any) -> Any:
        """Return the value that the main process brings, in every process."""
        return self._brought(value)[0]

    def _brought(self, value: Any) -> list[Any]:
        """Return the values that the processes bring, by rank, as soon as all have brought theirs."""
        if self.size == 1:
            return [value]
        from torch.distributed import all_gather_object

        values = [None] * self.size
        all_gather_object(values, value, group=self._gloo)
        return values

    @contextmanager
    def alone_in(self, folder: Path, doing: str, wait: bool = False) -> Iterator[None]:
        """Hold the lock of a folder for all: the main process calls `alone_in`, and all raise what it raises."""
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
    if _PROGRESS not in os.environ:
        from tqdm.auto import tqdm

        return tqdm(**settings)
    from tqdm import tqdm as plain

    path = Path(os.environ[_PROGRESS])

    class ReportedBar(plain):
        def display(self, *_: Any, **__: Any) -> None:
            now = {"n": self.n, "total": self.total, "postfix": self.postfix or ""}
            path.with_suffix(".new").write_text(json.dumps(now), encoding="utf-8")
            path.with_suffix(".new").replace(path)  # so that nobody reads half of it

    return ReportedBar(**settings)


def run_in_processes(target: str, arguments: dict[str, Any], count: int, what: str, unit: str) -> None:
    """Call a function, "module:function", with the same arguments in `count` new processes, and wait for their end.

    They are new, rather than forked, since neither a GPU nor OpenMP in use survives a fork. PyTorch's launcher starts
    them, and ends all of them when one fails. What they print is printed here; the progress of the main one moves a bar
    with the label `what`. Ctrl-C, SIGTERM and SIGUSR1 here ask them to stop between two steps.

    Raises the `TacoError` that ended the first of them to fail, or `ProcessError` where one died of anything else.
    """
    from tqdm.auto import tqdm

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        home = Path(scratch)
        (home / "job.pickle").write_bytes(pickle.dumps((target, arguments)))
        # Files rather than pipes: nothing stops for want of a reader, however much is said.
        said, complaints = (stack.enter_context(open(home / name, "w+")) for name in ("said", "complaints"))
        said_so_far = stack.enter_context(open(home / "said", encoding="utf-8", errors="replace"))
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # what is pickled here is imported there
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // count))),
        }
        command = f"-m torch.distributed.run --standalone --nproc-per-node {count} -m taco_nb.processes"
        launcher = subprocess.Popen(
            [sys.executable, *command.split(), str(home)],
            env=os.environ | environment,
            stdout=said,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C is for this process, which asks the others in a gentler way
        )
        bar = stack.enter_context(tqdm(desc=f"{what} on {count} processes", unit=unit))
        try:
            with stop_requests() as requests:
                asked = False
                while launcher.poll() is None:
                    asked = asked or (bool(requests) and _ask_to_stop(launcher, home, count))
                    _show(bar, home, said_so_far)
                    time.sleep(0.1)
        finally:
            _end(launcher, home, count)
            _show(bar, home, said_so_far)
        if launcher.returncode:
            raise _error(home)


def _show(bar: tqdm, home: Path, said_so_far: Any) -> None:
    """Print what the processes have printed, and move the bar to where the main one's own stands."""
    if text := said_so_far.read():
        print(text, end="")
    if progress := _read_if_there(home / "progress.json"):
        now = json.loads(progress)
        if bar.total != now["total"]:
            bar.reset(now["total"])  # which tells a notebook's bar its length, too
        bar.set_postfix_str(now["postfix"], refresh=False)
        bar.update(now["n"] - bar.n)


def _ask_to_stop(launcher: subprocess.Popen, home: Path, count: int) -> bool:
    """Signal the processes that the launcher has started, if all of them listen already, and say whether they do.

    The launcher itself would die of the signal, and so would a process that does not listen yet.
    """
    import psutil

    if len(list(home.glob("listening-*"))) < count:
        return False
    with suppress(psutil.NoSuchProcess):  # they have ended by themselves
        for child in psutil.Process(launcher.pid).children():
            child.send_signal(STOP_SIGNALS[-1])
    return True


def _end(launcher: subprocess.Popen, home: Path, count: int) -> None:
    """Leave nothing running, whatever has happened here: not even after Ctrl-C, and Ctrl-C again while they save."""
    try:
        if launcher.poll() is None and _ask_to_stop(launcher, home, count):
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(PATIENCE)
    finally:
        if launcher.poll() is None:
            launcher.terminate()  # which makes the launcher kill its processes
            launcher.wait()


def _error(home: Path) -> TacoError:
    """Return the error that ended the first process to fail; those of the others follow from it."""
    reports = sorted(home.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    told = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
    for kind, message in told:
        if isinstance(found := getattr(errors, kind, None), type) and issubclass(found, TacoError):
            return found(message)
    complaints = (home / "complaints").read_text(encoding="utf-8", errors="replace")
    # The launcher says which signal has killed a process. By SIGTERM it ends the others itself.
    if killed := re.search(r"Signal \d+ \((SIG(?!TERM)\w+)\)", complaints):
        reason = f"was killed by {killed[1]}"
    elif told:
        reason = "died: " + ": ".join(told[0]).partition("\n")[0]
    else:
        reason = "died: " + complaints.strip().rpartition("\n")[2]
    return ProcessError(f"One of the processes {reason}. What was saved is kept, and the same call goes on.")


def _work(home: Path) -> None:
    """Be one of the new processes: call the function that `run_in_processes` was given."""
    rank = int(os.environ["RANK"])
    if rank == 0:
        os.environ[_PROGRESS] = str(home / "progress.json")
    with stop_requests():  # what comes while PyTorch loads counts too
        (home / f"listening-{rank}").touch()
        try:
            target, arguments = pickle.loads((home / "job.pickle").read_bytes())
            module, _, function = target.partition(":")
            getattr(import_module(module), function)(**arguments)
            if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
                distributed.destroy_process_group()
        except Exception as error:
            with atomic_write(home / f"error-{rank}.json", "w") as file:
                json.dump([type(error).__name__, str(error)], file)
            if isinstance(error, TacoError):
                sys.exit(1)
            raise


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
