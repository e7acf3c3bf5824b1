"""What the processes of a test do that are told to stop. It imports little, so that they are there at once."""

import os
import time

from taco_nb.processes import stop_requests


def wait_for_a_request(folder):
    """Until a stop is requested, which is written down, and the time it takes to save."""
    with stop_requests() as requests:
        (folder / f"begun-{os.environ['RANK']}").write_text(str(os.getpid()))
        while not requests:
            time.sleep(0.05)
        time.sleep(1)
        (folder / f"saved-{os.environ['RANK']}").touch()
