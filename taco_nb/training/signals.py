"""Warnings that a process is about to be ended: SIGTERM, and SIGUSR1 as Slurm's `--signal` is usually set to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WARNINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def on_warning(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act(signal's number)` at the first warning within the block; at its end deliver those that came after it.

    One that came in a block around this, before it began, counts as come at its beginning.

    A batch system may signal a launcher and its processes both, and the launcher then its processes once more: the second
    must not kill what the first has asked to save. Python lets only its main thread handle signals; in another one the
    block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 1:
            act(number)

    handle.came = came
    before = {number: signal.signal(number, handle) for number in WARNINGS}
    for number in getattr(before[signal.SIGTERM], "came", [])[:1]:
        act(number)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came[1:]:
            signal.raise_signal(number)


def ignore_warnings(_: int) -> None:
    """For a data loader's worker, whose process decides when it ends: a worker that dies would end the run."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
