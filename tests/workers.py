"""What the new processes of a test do. It imports little, so that they are there at once."""

import os
import signal
import time

from taco_nb.errors import DataError, SettingError
from taco_nb.processes import Group, progress_bar, stop_requests


def wait_for_a_request(folder):
    """Until a stop is requested, which is written down, and the time it takes to save."""
    with stop_requests() as requests:
        (folder / f"begun-{os.environ['RANK']}").write_text(str(os.getpid()))
        while not requests:
            time.sleep(0.05)
        time.sleep(1)
        (folder / f"saved-{os.environ['RANK']}").touch()


def agree(folder):
    """What two processes agree on, a file of each; the folder "held" is held by the test."""
    from accelerate import PartialState

    group = Group(PartialState(cpu=True))
    with progress_bar(total=3, unit="word", disable=not group.is_main) as bar:
        refusal = ""
        try:
            with group.alone_in(folder / "held", "working"):
                refusal = "none"
        except SettingError as error:
            refusal = str(error)
        bar.update()
        with group.alone_in(folder / "free", "working"):
            told = (
                group.from_main({"rank": group.rank}),
                group.largest(group.rank),
                group.largest(-group.rank),
            )
        bar.update()
        equal = group.all_equal(7), group.all_equal(group.rank)
        group.wait()
        bar.set_postfix_str("loss=1")
        bar.update()
    (folder / f"{group.rank}").write_text(repr((group.size, told, equal, "is knitting" in refusal)))
    print(f"Said by {group.rank}: é")


def fail(how, folder=None):
    """One of two processes fails, while the other waits for it."""
    from accelerate import PartialState

    group = Group(PartialState(cpu=True))
    if group.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"ours": DataError("a.png is no image."), "other": ZeroDivisionError("by nothing\nat all")}[how]
    group.wait()
