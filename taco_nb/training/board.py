"""What TensorBoard shows of a run: the rows of its log, and what a picture has come to look like."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from taco_nb.data import datasets
from taco_nb.data.images import to_tensor
from taco_nb.model import TACO
from taco_nb.text import Conditioning

BOARD = "tensorboard"
SIDE = 256
"""Of the picture, or the training crops' where they are smaller: it is to cost no more than a few steps."""


class Board:
    """Event files in a run's folder, for `tensorboard --logdir runs`.

    They go on from `step`: what a run that was killed had written beyond the state it resumes from is not shown twice.
    """

    def __init__(self, folder: Path, step: int, crop: int, data_dir: str | os.PathLike | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / BOARD), purge_step=step + 1)
        # A bundled picture that no run is trained on, and that is there whatever data sets are.
        (dataset,) = datasets("sample", data_dir=data_dir, limit=1)
        sample = dataset.centre_crop(min(SIDE, crop))[0]
        self.picture, self.caption = to_tensor(sample.image)[None], sample.captions[0]

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def flush(self) -> None:
        """Put on disk what was added, as the run's state is."""
        self.writer.flush()

    def add_row(self, row: Mapping[str, float]) -> None:
        for name in row.keys() - {"step", "seconds"}:
            self.writer.add_scalar(f"training/{name}", row[name], row["step"])

    @torch.no_grad()
    def add_picture(self, net: TACO, conditioning: Conditioning, step: int) -> None:
        """The picture, and beside it what `net` makes of it; a network in training is left in training."""
        training = net.training
        net.eval()
        x = self.picture.to(net.medians().device)
        x_hat = net(x, *conditioning([self.caption]))["x_hat"].clamp(0, 1)
        net.train(training)
        self.writer.add_image("validation", torch.cat([x, x_hat], -1)[0], step)
