"""A run is watched while it trains: the terms of its loss, and a picture that it has not seen, as real files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.io
from PIL import Image

from taco_nb.data.images import to_rgb, to_tensor
from taco_nb.errors import TacoError
from taco_nb.metrics.distortion import psnr
from taco_nb.widgets.figures import training_curves
from taco_nb.widgets.html_parts import shortened
from taco_nb.widgets.pictures import side_by_side

if TYPE_CHECKING:
    from taco_nb.codec import Codec
    from taco_nb.training import Run

SHARE = 1 / 40
"""Each of the two displays may take this share of the time since training began; the last state is always shown."""
SIDE = 256
"""The central crop of the picture that is encoded has at most this many pixels on a side."""


class TrainingMonitor:
    """A function for `fit`'s `on_log`: curves and a picture appear below the cell, and change as the run goes on.

    Each is a display that is replaced, so that a notebook run headless keeps the last of each. What was slow to draw is
    drawn less often, for each display takes at most a 40th of the time.
    """

    def __init__(self, image: Any, caption: str):
        image = to_rgb(image)
        left, top = max(0, image.width - SIDE) // 2, max(0, image.height - SIDE) // 2
        right, bottom = min(left + SIDE, image.width), min(top + SIDE, image.height)
        self.image, self.caption = image.crop((left, top, right, bottom)), caption
        self._run: Path | None = None
        self._draw_curves([], "")  # plotly loads its parts on first use, which is not the run's time

    def __call__(self, run: Run, log: list[dict[str, float]], codec: Callable[[], Codec]) -> None:
        """Show the state of a run: its log so far, and what the codec that `codec` returns makes of the picture."""
        if run.dir != self._run:
            self._run, self._first = run.dir, None
            self._curves, self._picture = _Display(), _Display()
        title = f"{run.dir.name}, step {run.steps} of {run.total_steps}"
        self._curves.show(lambda: self._draw_curves(log, title), always=run.finished)
        self._picture.show(lambda: self._draw_picture(run, codec), always=run.finished)

    def _draw_curves(self, log: list[dict[str, float]], title: str) -> dict[str, Any]:
        figure = training_curves(pd.DataFrame(log, columns=None if log else ["step", "loss"]), title=title)
        # Only the bare figure: the notebook's own renderers would send plotly's script along with each change.
        return plotly.io.renderers["plotly_mimetype"].to_mimebundle(figure.to_dict())

    def _draw_picture(self, run: Run, codec: Callable[[], Codec]) -> dict[str, Any]:
        try:
            coder = codec()
            file = coder.encode(self.image, self.caption)
            picture = coder.decode(file)
        except TacoError as error:  # weights that cannot code yet are no reason to end a run
            return {"text/plain": f"No picture after step {run.steps}: {error}"}
        quality = psnr(to_tensor(self.image), to_tensor(picture))
        said = f"after {run.steps} step{'s' * (run.steps != 1)}\n{len(file)} bytes, {quality:.2f} dB"
        self._first = self._first or {said: picture}
        original = {f"original\n{shortened(self.caption)}": self.image}
        sheet = side_by_side({**original, **self._first, said: picture})
        return {"image/png": sheet._repr_png_(), "text/plain": said}


class _Display:
    """An output of the cell that is replaced by its successor, unless that would take too much of the time."""

    def __init__(self) -> None:
        self._handle, self._due = None, 0.0

    def show(self, draw: Callable[[], dict[str, Any]], always: bool) -> None:
        """Draw and show the next state if it is due, or `always`."""
        from IPython.display import display

        started = time.monotonic()
        if started < self._due and not always:
            return
        bundle = draw()
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        now = time.monotonic()
        self._due = now + (now - started) / SHARE


def training_monitor(image: Image.Image, caption: str) -> TrainingMonitor:
    """Show losses, bits and a picture, live, while `fit(..., on_log=training_monitor(image, caption))` runs.

    The central crop of the picture is encoded to a real file and decoded, at first and now; size and PSNR are the file's.
    """
    return TrainingMonitor(image, caption)
