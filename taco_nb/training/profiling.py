"""This module measures what a training step costs: where its time goes, and how much memory its images take."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from taco_nb.experiment import Experiment
from taco_nb.model import TACO
from taco_nb.model.precision import quick_training
from taco_nb.training.loop import Resources, Trainer, make_accelerator

PARTS = ("data", "text", "model", "losses", "backward", "optimizer")
WARM_UP_STEPS = 2


def step_times(
    exp: Experiment,
    steps: int = 10,
    *,
    data_dir: str | os.PathLike | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    accumulation: int = 1,
) -> pd.DataFrame:
    """Take the first steps of `exp` and return where their time goes, part by part; nothing is written.

    Columns: part, ms (the mean over so many steps, after two to warm up) and share of the step, in [0, 1]. "data" is the
    wait for the images, "text" the frozen text towers, "model" the network forward, "losses" the loss with its frozen
    networks, forward; "backward" goes back through both; "optimizer" is both optimizers. "other" is what lies between.
    On a GPU each part is waited for, which a real run does not do: there the parts overlap, and a step is shorter.
    """
    resources = Resources(data_dir, device, num_workers=num_workers, accumulation=accumulation)
    accelerator = make_accelerator(device, exp.precision)
    gpus = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), quick_training(accelerator.device):
        watch = _Stopwatch(accelerator.device)
        trainer = Trainer(exp, Path(os.devnull), resources, accelerator, timed=watch)
        warm_up = min(WARM_UP_STEPS, trainer.total - 1)  # the first steps choose algorithms, and fill caches
        steps = min(steps, trainer.total - warm_up)
        batches = trainer.batches_to_come()
        for step in tqdm(range(warm_up + steps), desc="timing steps", unit="step"):
            if step == warm_up:
                watch.seconds.clear()
            with watch("step"):
                with watch("data"):
                    batch = next(batches)
                trainer.train_step(*batch)
        batches.close()
        accelerator.free_memory()
    whole = watch.seconds.pop("step")
    spent = {part: watch.seconds[part] for part in PARTS}
    spent["other"] = whole - sum(spent.values())
    rows = [(part, 1000 * seconds / steps, seconds / whole) for part, seconds in spent.items()]
    return pd.DataFrame(rows, columns=["part", "ms", "share"])


def activation_memory(exp: Experiment, images: int, device: str = "cpu") -> int:
    """Return how many bytes autograd keeps of a forward pass of `images` crops through the network, to go backward with.

    They are counted, not measured: every storage that is saved, once, except the weights. The number grows with the images
    of a piece, and `accumulation` makes pieces smaller. Weights, gradients and Adam's two moments take 16 bytes a parameter
    besides.
    """
    net = TACO(exp.model_config()).train().to(device, memory_format=torch.channels_last)
    kept: dict[int, int] = {weight.untyped_storage().data_ptr(): 0 for weight in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    x = torch.rand(images, 3, exp.crop, exp.crop, device=device).contiguous(memory_format=torch.channels_last)
    text = torch.randn(images, exp.text_tokens, net.config.text_dim, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=exp.precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        net(x, text)
    return sum(kept.values())


class _Stopwatch:
    """This counts seconds by the name of a part; those of a part that runs several times are added up.

    `torch.profiler` would note each of some 23,000 operations in a step, and take longer to add them up than the steps take.
    On a GPU it tells when kernels ran; a stopwatch that waits for the GPU tells how long a part took.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self.seconds[part] += self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
