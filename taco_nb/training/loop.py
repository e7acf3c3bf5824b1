"""The training loop, which reads from top to bottom: `fit`, the `Trainer` and its step, then what a step is made of.

A run is a folder: `experiment.json`, `state.pt` (all that is needed to go on), `log.csv`, `tensorboard/`, and in the end
`weights.safetensors`. Every number that a step draws depends on the seed, the step and the image alone. So a run that was
killed and started again ends, on a CPU, with the very bits of one that was not; and how a batch is divided, among
processes or into pieces that fit into memory, changes the order of sums and nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate

from taco_nb import checkpoint
from taco_nb.codec import Codec, load
from taco_nb.data import TrainPairs, datasets, training_pairs
from taco_nb.data.images import to_tensor
from taco_nb.errors import CheckpointError, SettingError, check_known
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write, sha256
from taco_nb.inspection import training_flops
from taco_nb.metrics.networks import METRICS
from taco_nb.model import TACO
from taco_nb.model.precision import arithmetic, peak_flops, quick_training
from taco_nb.processes import (
    Group,
    check_device,
    cpu_count,
    ignore_stop_signals,
    launched_processes,
    progress_bar,
    run_in_processes,
    stop_requests,
)
from taco_nb.settings import check_count
from taco_nb.text import Conditioning, KeywordWeights, clip_model, text_tower
from taco_nb.text.chat_keywords import chat_keywords
from taco_nb.text.tokens import tokenized
from taco_nb.training.loss import JointLoss, TacoLoss
from taco_nb.training.muon import Muon

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DECAYS = (45 / 50, 48 / 50)
"""Where the learning rate falls to a tenth, as shares of the run: the reference's epochs 45 and 48 of 50."""
WARM_UP = 1 / 100
"""The share of a run in which the schedules "cosine" and "constant" rise from zero."""
LOG_STEPS = 20
"""A row of the log is the mean over so many steps, or over a 40th of a short run."""
PICTURES = 20
"""How often in a run TensorBoard gets a picture."""
PICTURE_SIDE = 256
"""The side of that picture, or the training crops' where they are smaller, so that it costs no more than a few steps."""
COMPILED_FROM = 2000
"""The steps that a run must have to be compiled unasked. On an H200, with the paper's experiment, compiling took a minute for
each shape of a batch and saved 0.12 s of each step's 0.16 s."""
COMPILE = ("auto", "off", "default", "reduce-overhead")
EXPERIMENT, STATE, LOG = "experiment.json", "state.pt", "log.csv"


# What is given and what comes back ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run is what `fit` leaves in a folder. This says how far it has come, and reads what is there."""

    dir: Path
    experiment: Experiment
    steps: int
    """How many steps have been taken so far."""
    total_steps: int
    data_dir: str | os.PathLike | None = None
    """The data folder that `fit` was given; the codec reads a language model's keywords there."""

    @property
    def finished(self) -> bool:
        return self.steps == self.total_steps

    @property
    def codec(self) -> Codec:
        """The trained codec, from the run's weights, on the CPU."""
        return load(self.dir, data_dir=self.data_dir)

    @property
    def log(self) -> pd.DataFrame:
        """The means of the loss's terms over every few steps, with step, epoch, learning rate and seconds."""
        return pd.read_csv(self.dir / LOG)


@dataclass(frozen=True)
class Resources:
    """These say with what, where and for how long a run is computed, not what its result is. `fit` explains them."""

    data_dir: str | os.PathLike | None = None
    device: str = "auto"
    max_hours: float | None = None
    save_minutes: float = 5.0
    num_workers: int | None = None
    accumulation: int = 1
    compile: str = "auto"

    def __post_init__(self) -> None:
        check_count(self.num_workers or 0, "num_workers", least=0)
        check_count(self.accumulation, "accumulation")
        check_known([self.compile], COMPILE, "compile cannot be")


OnLog = Callable[[Run, "list[dict[str, float]]", Callable[[], Codec]], None]
"""What `fit` calls: with the run so far, the rows of its log, and a function that gives the codec as it stands."""


def fit(
    exp: Experiment,
    out_dir: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    device: str = "auto",
    max_hours: float | None = None,
    save_minutes: float = 5.0,
    num_processes: int = 1,
    num_workers: int | None = None,
    accumulation: int = 1,
    compile: str = "auto",
    on_log: OnLog | None = None,
) -> Run:
    """Train as `exp` says, into the folder `out_dir`; resume what was begun there; return at once what is finished.

    `device` is "auto" (a GPU where there is one), "cpu" or "cuda". After `max_hours` of this call, or at SIGTERM or
    SIGUSR1, the run is saved between two steps and returned unfinished; the same call goes on with it. The state is
    saved every `save_minutes`.

    The rest changes how a result is computed, and not what it is. `num_processes` share each batch, each on a GPU of its
    own where there are GPUs; in a process that a launcher such as accelerate's has started it is ignored. `num_workers`
    load the images of each process (None: none on a CPU, up to 8 on a GPU). `accumulation` says into how many pieces a
    process cuts its share of a batch, to need less memory. `compile` is "off", or a mode of `torch.compile`: "default", or
    "reduce-overhead", which also records a GPU's work to replay it at once ("auto": that for a long run on a GPU where Triton
    is there, else "off"); what is compiled rounds otherwise, by less than a thousandth of the loss.

    `on_log` is called with each row of the log (see `taco_nb.widgets.training_monitor`), and once in the end where the
    run was finished already or was trained by several processes.

    Raises `SettingError` if the folder holds another experiment's run or another process trains there, if the training
    data changed since it was begun, or if the loss stops being a finite number; `CheckpointError` for a damaged state;
    `ProcessError` where one of several processes dies; and the errors of whatever `exp` needs and lacks.
    """
    started, folder = time.monotonic(), Path(out_dir)
    resources = Resources(data_dir, device, max_hours, save_minutes, num_workers, accumulation, compile)
    check_count(num_processes, "num_processes")
    launched = launched_processes()
    run = finished_run(folder, exp)
    if run is None and num_processes > 1 and launched == 1:
        check_device(device, num_processes)
        arguments = {"exp": exp, "out_dir": folder, **asdict(resources)}
        run_in_processes(f"{__name__}:fit", arguments, num_processes, f"training {folder.name}", "step")
        run = read_run(folder)
    if run is None:
        accelerator = make_accelerator(device, exp.precision)
        gpus = [accelerator.device] if accelerator.device.type == "cuda" else []
        # The caller's random numbers stay as they are. Without the names of GPUs, those of all would be fetched.
        quick = quick_training(accelerator.device)
        with stop_requests() as requests, torch.random.fork_rng(gpus), quick:
            trainer = Trainer(exp, folder, resources, accelerator)
            with trainer.group.alone_in(folder, "training"):
                # Another process may have finished the run, and then left the folder.
                run = trainer.group.from_main(finished_run(folder, exp))
                if run is None:
                    return trainer.run(started, requests, on_log)
    run = replace(run, data_dir=data_dir)
    if on_log:
        on_log(run, run.log.to_dict("records"), lambda: run.codec)
    return run


# The loop and its step ------------------------------------------------------------------------------------------------


class Trainer:
    """This trains a run, alone or as one of several processes that share every batch. It writes nothing before `run`.

    `timed` is called with the name of each part of a step, for a context in which that part runs: a stopwatch.
    """

    def __init__(
        self,
        exp: Experiment,
        folder: Path,
        resources: Resources,
        accelerator: Accelerator,
        timed: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.exp, self.folder, self.resources, self.timed = exp, folder, resources, timed
        self.accelerator, self.group = accelerator, Group(accelerator.state)
        on_gpu = accelerator.device.type == "cuda"
        # Of several processes accelerate calls the device of one "cpu:0", which is no name of a device elsewhere.
        self.device = accelerator.device if on_gpu else torch.device("cpu")
        self.arithmetic = arithmetic(self.device, exp.precision)

        # The data, in batches that all processes know and share.
        self.pairs = training_pairs(
            exp.train_data, exp.crop, resources.data_dir, exp.seed, exp.dataset_captions
        )
        self.batches = Batches(len(self.pairs), exp.batch_size, exp.seed, self.group.rank, self.group.size)
        self.total = exp.epochs * len(self.batches)
        workers = resources.num_workers
        if workers is None:  # the processes, one on each GPU, share the cores
            workers = min(8, cpu_count() // torch.cuda.device_count()) if on_gpu else 0
        self.loader = DataLoader(
            self.pairs,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_stop_signals,
            collate_fn=collate,
            pin_memory=on_gpu,
        )

        # The network and its two optimizers.
        net = initial_net(exp, resources.data_dir, say=self.group.is_main)
        net = net.to(self.device, memory_format=torch.channels_last).train()
        optimizers = make_optimizers(exp, net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch is about to rename broadcast_buffers
            self.net, self.optimizer, self.aux_optimizer = accelerator.prepare(net, *optimizers)
        self.bare_net = net  # without what accelerate has put around it

        # What the encoder reads, and what the loss asks: both by frozen networks.
        self.keywords = fit_keywords(exp, self.pairs, resources.data_dir)
        tower = text_tower(exp.text_encoder, length=exp.text_tokens, device=str(self.device))
        if tower.dim != net.config.text_dim:
            raise SettingError(
                f"{exp.text_encoder} is {tower.dim} wide, but sizes say text_dim={net.config.text_dim}."
            )
        self.conditioning = Conditioning(tower, *exp.text_settings.values(), self.keywords)
        self.loss = make_loss(exp, self.device)
        self._compile()
        self.data_digest = training_digest(exp, self.pairs, resources.data_dir)
        self.step, self.rows, self.sums, self.seconds = 0, [], Counter(), 0.0

    def _compile(self) -> None:
        """Name the parts of a step that are worth compiling, and compile them where that is wanted."""
        self.compiled = compile_mode(self.resources.compile, self.device, self.group.size, self.total)
        self.forward, self.means = self.net, self.loss.means
        self.embed = self.loss.joint.embed if self.exp.k_J else None
        if self.compiled != "off":
            # Shapes are those of a whole batch, or of an epoch's last; only windows of text have more lengths.
            how = {"mode": self.compiled, "dynamic": None if self.exp.text_length == "windows" else False}
            self.forward, self.means = (torch.compile(part, **how) for part in (self.forward, self.means))
            self.embed = self.embed and torch.compile(self.embed, **how)
            self.arithmetic += f", compiled ({self.compiled})"

    def run(self, started: float, requests: Sequence[int], on_log: OnLog | None = None) -> Run:
        """Train from where the folder's state stands to the end, or until the time is over or a stop is requested.

        `started` is when the time began to count, by `time.monotonic`. `requests` is the list of `stop_requests`.
        """
        is_main, name, stopped = self.group.is_main, self.folder.name, None
        if is_main:  # claim the folder for the experiment
            with atomic_write(self.folder / EXPERIMENT, "w") as file:
                file.write(self.exp.to_json())
            processes = "1 process" if self.group.size == 1 else f"{self.group.size} processes"
            print(f"Training {name} in {processes} on {self.arithmetic}.")
        self._restore()
        log_every, picture_every = max(1, min(LOG_STEPS, self.total // 40)), max(1, self.total // PICTURES)
        saved = before = time.monotonic()
        peak = is_main and peak_flops(self.device, self.exp.precision)
        # What an image would take if a GPU kept what its data sheet promises.
        least_seconds = training_flops(self.exp) / peak if peak else None
        counted = self.step, self.seconds  # up to where images per second have been shown
        bar = progress_bar(
            total=self.total, initial=self.step, desc=f"training {name}", unit="step", disable=not is_main
        )
        with bar, self._tensorboard() if is_main else nullcontext() as board:
            for batch in self.batches_to_come():
                self.train_step(*batch)
                bar.update()
                now = time.monotonic()
                self.seconds, before = self.seconds + now - before, now
                last = self.step == self.total
                if self.step % log_every == 0 or last:
                    row = self._log_row()  # by all processes, so that all see a run that diverges
                    images = sum(map(self.batches.size, range(counted[0], self.step)))
                    rate, counted = images / (self.seconds - counted[1]), (self.step, self.seconds)
                    shown = {term: f"{row[term]:.4g}" for term in ("loss", "bpp", "mse")}
                    shown["images/s"] = f"{rate:.1f}"
                    if least_seconds:  # the share of that which is reached, as nanoGPT has it
                        shown["MFU"] = f"{rate * least_seconds / self.group.size:.0%}"
                    bar.set_postfix(shown)
                    if is_main:
                        for term in row.keys() - {"step", "seconds"}:
                            board.add_scalar(f"training/{term}", row[term], self.step)
                    if is_main and on_log:
                        on_log(self._run(), self.rows, self._codec)
                if is_main and (self.step % picture_every == 0 or last):
                    board.add_image("validation", self._picture(), self.step)
                if is_main and now - saved >= 60 * self.resources.save_minutes and not last:
                    self._save()
                    board.flush()
                    saved = time.monotonic()
                if stopped := self._reason_to_stop(requests, now - started):
                    break
            if is_main:
                self._save()
                self._export()  # an unfinished run is a codec, too
        if is_main and stopped and self.step < self.total:
            again = ["taco-nb", "train", "--out", str(self.folder)]
            again += ["--data-dir", str(self.resources.data_dir)] if self.resources.data_dir else []
            so_far = f"Stopped by {stopped} after step {self.step} of {self.total}"
            print(f"{so_far}; the same call, or {shlex.join(again)}, goes on.")
        self.accelerator.free_memory()
        return self._run()

    def batches_to_come(self) -> Iterator[tuple[Tensor, list[str]] | tuple[Tensor, list[str], Tensor]]:
        """Yield this process's share of every batch from the present step on: images (n, 3, H, W) of bytes and n captions.

        Of the shapes, the weights (n, 1, H, W) of their pixels come with them.
        """
        while self.step < self.total:
            self.batches.epoch, self.batches.skip = divmod(self.step, len(self.batches))
            self.pairs.set_epoch(self.batches.epoch)
            yield from self.loader

    def train_step(self, x: Tensor, captions: Sequence[str], weight: Tensor | None = None) -> None:
        """Take one step with both optimizers, on this process's share of the next batch.

        The loss is that of the whole batch. Its terms are means over images, so they are weighted sums over pieces and
        processes. Only J compares every image with all others; it is descended by its slopes, see `_joint`.
        """
        rate = self.exp.learning_rate * learning_rate_factor(self.exp.schedule, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # what the last step has left may be overwritten
        pieces, sums = self._pieces(x, captions, weight), 0.0
        joint = {"joint": self._joint(pieces)} if self.exp.k_J else {}
        for piece in pieces:
            # Processes exchange gradients in a backward pass. Once a step, with the last piece, is enough.
            with nullcontext() if piece is pieces[-1] else self.accelerator.no_sync(self.net):
                out = piece.out or self._reconstruct(piece)
                with self.timed("losses"), self.accelerator.autocast():
                    means = self.means(out, piece.x, piece.weight)
                    objective = piece.share * self.loss.total(means)
                    if self.exp.k_J:
                        objective = objective + self.exp.k_J * (out["seen"] * piece.slope).sum()
                with self.timed("backward"):
                    # DDP takes the mean of the processes' gradients. Their sum is wanted: hence the factor.
                    self.accelerator.backward(self.group.size * objective)
            sums += piece.share * torch.stack(list(means.values())).detach()
        terms = dict(zip(means, self.accelerator.reduce(sums, "sum"))) | joint

        with self.timed("optimizer"):
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.exp.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            # The second optimizer moves z's quantiles alone: the median and the tails of its distribution, from which the
            # coder's tables are made. Its loss depends on weights and on no image, so it is the same in every process.
            aux_loss = self.bare_net.aux_loss()
            aux_loss.backward()
            self.aux_optimizer.step()
            self.aux_optimizer.zero_grad()
        self.step += 1
        self.learning_rate = rate
        self.sums.update({"loss": self.loss.total(terms), **terms, "aux": aux_loss.detach(), "steps": 1})

    def _pieces(self, x: Tensor, captions: Sequence[str], weight: Tensor | None) -> list[_Piece]:
        """Cut this process's share of the next batch into pieces, each with its text as the encoder reads it."""
        size, own = self.batches.size(self.step), self.batches.own(self.step)
        x = x.to(self.device, non_blocking=True).float() / 255
        x = x.contiguous(memory_format=torch.channels_last)
        weight = None if weight is None else weight.to(self.device, non_blocking=True)
        pieces = []
        for part in split_evenly(len(captions), min(self.resources.accumulation, len(captions))):
            at = slice(part.start, part.stop)
            with self.timed("text"):
                text, mask = self.conditioning(captions[at])
            share = len(part) / size if own else 0.0
            seeds = [mixed_seed(self.exp.seed, self.step, own.start + i) for i in part]
            of_pixels = None if weight is None else weight[at]
            pieces.append(_Piece(x[at], captions[at], of_pixels, text, mask, share, seeds))
        return pieces

    def _reconstruct(self, piece: _Piece) -> dict[str, Any]:
        """Return what the network makes of a piece and, where J is in the loss, how CLIP sees it, as "seen" (n, d)."""
        with self.timed("model"):
            noise = image_noise(self.bare_net, piece.x, piece.noise_seeds)
            out = self.forward(piece.x, piece.text, piece.mask, noise)
        if self.exp.k_J:
            with self.timed("losses"), self.accelerator.autocast():
                out["seen"] = self.embed(out["x_hat"])
        return out

    def _joint(self, pieces: list[_Piece]) -> Tensor:
        """Return J of the whole batch, and give each piece its slope in that piece's embeddings (n, d).

        J compares the embeddings of all images, and a batch is cut in pieces because their graphs do not fit into memory
        together. But by the chain rule an image needs of the others only the slope of J in its own embedding. So all
        pieces are reconstructed without a graph, which gives the slopes; then each is reconstructed once more, with a
        graph, and goes backward from its slope (GradCache: Gao et al. 2021, arXiv:2101.06983). A single piece keeps the
        graph of the first time.
        """
        # J reads captions by the encoder's tower, which need not run again where the text is its states as they are.
        plain = set(self.exp.text_settings.values()) == {"truncate", "none"}
        with self.timed("text"):
            embed_text = self.loss.joint.embed_text
            text = [embed_text(piece.captions, piece.text if plain else None) for piece in pieces]
        with self.timed("losses"), self.accelerator.autocast(), torch.no_grad():
            original = [self.embed(piece.x) for piece in pieces]
        with torch.set_grad_enabled(len(pieces) == 1):
            outs = [self._reconstruct(piece) for piece in pieces]
        if len(pieces) == 1:
            pieces[0].out = outs[0]
        image = self._of_whole_batch([out["seen"].detach() for out in outs]).requires_grad_()
        joint = JointLoss.of_embeddings(image, self._of_whole_batch(original), self._of_whole_batch(text))
        (slope,) = torch.autograd.grad(joint, image)
        at = self.batches.own(self.step).start
        for piece in pieces:
            piece.slope = slope[at : at + len(piece.x)] if piece.share else torch.zeros_like(outs[0]["seen"])
            at += len(piece.x)
        return joint.detach()

    def _of_whole_batch(self, of_pieces: Sequence[Tensor]) -> Tensor:
        """Put together the rows (n, d) of all pieces in all processes, a row per image of the batch: (B, d)."""
        own, at = torch.cat(of_pieces), self.batches.own(self.step)
        rows = own.new_zeros(self.batches.size(self.step), own.shape[1])
        rows[at.start : at.stop] = own[: len(at)]
        # Each row is zero in all processes but its own.
        return self.accelerator.reduce(rows, "sum")

    def _reason_to_stop(self, requests: Sequence[int], seconds: float) -> str | None:
        """Say why to stop here, if so: whatever any process was told, so that all of them end with the same step."""
        hours = self.resources.max_hours
        late = hours is not None and seconds >= 3600 * hours
        number = self.group.largest(requests[0] if requests else int(late))
        if number > 1:
            return signal.Signals(number).name
        return "max_hours" if number else None  # no signal that asks for a stop has the number 1

    def _run(self) -> Run:
        return Run(self.folder, self.exp, self.step, self.total, self.resources.data_dir)

    def _codec(self) -> Codec:
        """Return the codec as it stands, on a copy of the weights, so that training is not disturbed."""
        exp, keywords = self.exp, self.keywords and self.keywords.to_json()
        return Codec(
            copy.deepcopy(self.bare_net), exp.text_encoder, exp.text_tokens, **exp.text_settings, keywords=keywords,
            name=self.folder.name,
        )  # fmt: skip

    def _log_row(self) -> dict[str, float]:
        """Add a row to the log: the means since the last one."""
        means = {name: total / self.sums["steps"] for name, total in self._finite_sums().items()}
        self.sums.clear()
        epoch = self.step / len(self.batches)
        row = {"step": self.step, "epoch": epoch, **means, "lr": self.learning_rate, "seconds": self.seconds}
        self.rows.append(row)
        return row

    def _finite_sums(self) -> dict[str, float]:
        """Return the sums of the terms since the last row of the log.

        A run that has diverged is kept out of the log, and from being saved over the state it had before.
        """
        tensors = {name: total for name, total in self.sums.items() if name != "steps"}
        largest = torch._foreach_norm(list(self.net.parameters()), math.inf)
        # A GPU has to be waited for to tell a number, so all are fetched at once.
        *sums, weight = torch.stack([*tensors.values(), torch.stack(largest).max()]).tolist()
        sums = dict(zip(tensors, sums))
        if not all(map(math.isfinite, (*sums.values(), weight))):
            raise SettingError(
                f"The loss or the weights are no finite numbers any more at step {self.step} (sums since the last row "
                f"of the log: {sums}). Lower learning_rate and give another out_dir. What was saved before is kept in "
                f"{self.folder}."
            )
        return sums

    def _tensorboard(self) -> SummaryWriter:
        """Open the run's event files, for `tensorboard --logdir runs`, and the picture that they are to show."""
        from torch.utils.tensorboard import SummaryWriter

        # This bundled picture is there whatever data sets are, and no run is trained on it.
        (dataset,) = datasets("sample", data_dir=self.resources.data_dir, limit=1)
        self.sample = dataset.centre_crop(min(PICTURE_SIDE, self.exp.crop))[0]
        # What a run that was killed had logged beyond the state it resumes from is not shown twice.
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    @torch.no_grad()
    def _picture(self) -> Tensor:
        """Return a picture for TensorBoard and, beside it, what the network makes of it, (3, H, 2W)."""
        x = to_tensor(self.sample.image)[None].to(self.device)
        self.bare_net.eval()
        x_hat = self.bare_net(x, *self.conditioning([self.sample.captions[0]]))["x_hat"].clamp(0, 1)
        self.bare_net.train()
        return torch.cat([x, x_hat], -1)[0]

    def _save(self) -> None:
        """Write all that is needed to go on, and the log."""
        self._finite_sums()
        state = {
            "net": self.bare_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "step": self.step,
            "total_steps": self.total,
            "data": self.data_digest,
            "rows": self.rows,
            "sums": dict(self.sums),
            "seconds": self.seconds,
        }
        with atomic_write(self.folder / STATE) as file:
            torch.save(state, file)
        columns = ["step", "epoch", *self.loss.names, "aux", "lr", "seconds"]
        with atomic_write(self.folder / LOG, "w") as file:
            pd.DataFrame(self.rows, columns=columns).to_csv(file, index=False)

    def _restore(self) -> None:
        """Go on from the state in the folder, if there is one."""
        path, data = self.folder / STATE, self.data_digest
        if path.is_file():
            with _named_where_damaged(path):
                # Optimizers keep counts of steps on the processor, and put all else where the weights are.
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.bare_net.load_state_dict(state["net"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.aux_optimizer.load_state_dict(state["aux_optimizer"])
                self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
                self.sums, data = Counter(state["sums"]), state["data"]
        if data != self.data_digest:
            raise SettingError(
                f"The run in {self.folder} was begun on other training data or other initial weights: the images or captions "
                f"of {self.exp.train_data!r}, or what init={self.exp.init!r} names, have changed. Restore them, or give "
                "another out_dir."
            )
        if not self.group.all_equal(self.step):
            raise SettingError(
                f"The processes would go on from different steps, process {self.group.rank} from step {self.step}: they "
                f"do not see the same {self.folder}. Give an out_dir on a disk that all of them share."
            )

    def _export(self) -> None:
        """Write the weights as a codec."""
        about = {
            "name": self.folder.name,
            "experiment": asdict(self.exp),
            "steps": self.step,
            "total_steps": self.total,
            "hours": self.seconds / 3600,
            "device": str(self.device),
            "arithmetic": self.arithmetic,
            "keywords": self.keywords and self.keywords.to_json(),
        }
        checkpoint.save_weights(self.folder / checkpoint.WEIGHTS, self.bare_net.eval(), about)


@dataclass
class _Piece:
    """These are n images that are computed together, with all that stays the same however often they are."""

    x: Tensor
    captions: Sequence[str]
    weight: Tensor | None
    """This says how much the squared error of each pixel counts, where pixels are not all alike: (n, 1, H, W)."""
    text: Tensor
    mask: Tensor | None
    share: float
    """How much of the whole batch they are; 0 for an image that only keeps busy a process that has none of its own."""
    noise_seeds: Sequence[int]
    slope: Tensor | None = None
    """The slope of J in how CLIP sees the reconstructions, (n, d), from `_joint`."""
    out: dict[str, Any] | None = None
    """This is what the network makes of it, with its graph, where `_joint` has found that already."""


# Batches, noise and weights -------------------------------------------------------------------------------------------


class Batches(Sampler):
    """These are the batches of one epoch, as indices, in an order that (seed, epoch) alone decide, without the first `skip`.

    Where several `processes` share each batch, the one of this `rank` gets its part. Where an epoch's last batch has fewer
    images than there are processes, those without an image get the first, and compute it without effect: all must take
    part in the exchange of gradients.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.processes = rank, processes
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return -(-self.count // self.batch_size)

    def size(self, step: int) -> int:
        """Return how many images the batch of a step has; the step counts from the start of the run."""
        return min(self.batch_size, self.count - step % len(self) * self.batch_size)

    def own(self, step: int) -> range:
        """Return which images of a step's batch are this process's."""
        return split_evenly(self.size(step), self.processes)[self.rank]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        for batch in order.split(self.batch_size)[self.skip :]:
            own = split_evenly(len(batch), self.processes)[self.rank] or range(1)
            yield batch[own.start : own.stop].tolist()


def collate(samples: Sequence[tuple]) -> list:
    """Put samples together to a batch. Captions are cut into tokens here, in a worker, for all who read them later."""
    x, captions, *rest = default_collate(samples)
    return [x, [tokenized(caption) for caption in captions], *rest]


def split_evenly(size: int, parts: int) -> list[range]:
    """Cut the positions 0 to `size` into so many ranges, in order and nearly equal; some are empty if parts > size."""
    return [range(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


def mixed_seed(*numbers: int) -> int:
    """Return a seed that depends on all the numbers, in the 32 bits that are all torch's CPU generator keeps of one."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def image_noise(net: TACO, x: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return the noise of `net` in training for images x: that of image i, a row, is drawn from `seeds[i]` alone.

    In training, uniform noise in [-1/2, 1/2) stands for rounding, which has no slope (Balle et al. 2017, arXiv:1611.01704).
    CompressAI draws it for a batch as a whole, so that what an image gets would depend on those beside it, and the result of
    a step on how its batch is divided among processes.
    """
    images, numbers = net.noise_shape(x)
    noise = torch.empty(images, numbers, device=x.device)
    for row, seed in zip(noise, seeds):
        row.uniform_(generator=torch.Generator(x.device).manual_seed(seed))
    return noise - 0.5


def initial_net(exp: Experiment, data_dir: str | os.PathLike | None = None, say: bool = True) -> TACO:
    """Return the network that `exp` starts from: random weights drawn from its seed, those that fit replaced by `exp.init`'s.

    Weights that find no partner are named in a line, if `say`. Raises `CheckpointError` if most do not.
    """
    # Not torch.manual_seed, which sets the generators of all GPUs as well.
    torch.default_generator.manual_seed(exp.seed)
    net = TACO(exp.model_config())
    if exp.init:
        new, unused = checkpoint.load_fitting(net, checkpoint.find(exp.init, data_dir))
        for names, fate in ((new, "start from random weights"), (unused, "were not used")):
            if names and say:
                print(f"init={exp.init!r}: {len(names)} weights {fate}: {', '.join(names)}")
    return net


def training_digest(exp: Experiment, pairs: TrainPairs, data_dir: str | os.PathLike | None) -> str:
    """Return a digest of what a run is trained on: the initial weights, the images' names and their captions."""
    digest = hashlib.sha256(sha256(checkpoint.find(exp.init, data_dir)).encode() if exp.init else b"")
    for i, name in enumerate(pairs.dataset.names):
        digest.update(json.dumps([name, pairs.dataset.captions(i)]).encode())
    return digest.hexdigest()


# Optimizers, loss and what accelerates them ---------------------------------------------------------------------------


def make_optimizers(exp: Experiment, net: TACO) -> tuple[torch.optim.Optimizer, torch.optim.Adam]:
    """Return the optimizer that `exp` names, for all weights but z's quantiles, and Adam for those.

    `Muon` moves kernels as matrices. The model of z is one small network for each channel, and its kernels are no matrices,
    so they are left to Adam.
    """
    weights = dict(net.named_parameters())
    aux = torch.optim.Adam([weights.pop("entropy_bottleneck.quantiles")], exp.aux_learning_rate, fused=True)
    if exp.optimizer == "adam":
        return torch.optim.Adam(weights.values(), exp.learning_rate, fused=True), aux
    of_z = [weights.pop(name) for name in list(weights) if name.startswith("entropy_bottleneck.")]
    return Muon(weights.values(), of_z, exp.learning_rate), aux


def learning_rate_factor(schedule: str, step: int, total: int) -> float:
    """Return which part of its highest value the learning rate has at a step, 0 <= step < total.

    "steps" falls to a tenth at each of `DECAYS`. "cosine" and "constant" rise linearly over `WARM_UP`; then "cosine" falls
    along half a period (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts), and "constant" stays.
    """
    if schedule == "steps":
        return 0.1 ** sum(step >= share * total for share in DECAYS)
    rise = min((step + 1) / (WARM_UP * total), 1)
    return rise if schedule == "constant" else rise * (1 + math.cos(math.pi * step / total)) / 2


def fit_keywords(
    exp: Experiment, pairs: TrainPairs, data_dir: str | os.PathLike | None = None
) -> KeywordWeights | None:
    """Fit keyword weights on the training captions, each counted once; return None where `exp` does not pool by them."""
    if exp.text_pooling == "none":
        return None
    captions = (caption for i in range(len(pairs.dataset)) for caption in pairs.dataset.captions(i))
    sources = [chat_keywords(data_dir) if name == "llm" else name for name in exp.keyword_sources.split("+")]
    return KeywordWeights.fit(captions, sources, exp.keyword_weight)


def make_loss(exp: Experiment, device: torch.device) -> TacoLoss:
    """Return the loss of `exp`, with the frozen networks that its terms need. Raises `MissingWeightsError`."""
    perceptual = METRICS[exp.perceptual].load(device) if exp.k_P else None
    joint = JointLoss(*clip_model(exp.text_encoder, device=str(device))) if exp.k_J else None
    if exp.precision == "bfloat16":
        if perceptual:
            perceptual.model = with_half_kernels(perceptual.model)
        if joint:
            joint.visual = with_half_kernels(joint.visual)
    return TacoLoss(exp.lmbda, exp.k_P, exp.k_J, perceptual, joint)


def with_half_kernels(network: nn.Module) -> nn.Module:
    """Return a copy of a frozen network that keeps its kernels in bfloat16.

    Under autocast they are rounded to it at each use. What autocast has rounded it keeps for weights that learn, and only
    for those.
    """
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.bfloat16()
    return network


def compile_mode(setting: str, device: torch.device, processes: int, steps: int) -> str:
    """Return how to compile for a run of so many steps: "off", or a mode of `torch.compile`.

    "auto" compiles only where that saves more time than it takes. Recorded work cannot exchange gradients between processes,
    so that "auto" records none where there are several.
    """
    if setting != "auto":
        return setting
    if steps < COMPILED_FROM:
        return "off"
    from torch.utils._triton import has_triton

    compiler = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))  # Triton asks for one
    if device.type != "cuda" or not has_triton() or not compiler:
        return "off"
    return "reduce-overhead" if processes == 1 else "default"


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Return accelerate's view of the device and of the processes that a launcher has started. Raises `SettingError`."""
    check_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train several experiments
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        kwargs_handlers=[
            # The only buffers are the entropy coder's tables, which training does not change.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )


# What is in a run's folder --------------------------------------------------------------------------------------------


def finished_run(folder: Path, exp: Experiment) -> Run | None:
    """Return the run of `exp` in the folder if nothing is left to do.

    Raises `SettingError` if the folder holds the run of another experiment.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingError(
            f"out_dir={str(folder)!r} is a file. Give a folder, or the name of one to be made."
        )
    claim = folder / EXPERIMENT
    if not claim.is_file():
        return None
    try:
        there = Experiment.from_json(claim.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{claim} does not say whose run this is: {error} Give another out_dir.") from None
    if differences := there.diff(exp):
        said = "; ".join(f"{name} is {was!r} there, {now!r} here" for name, (was, now) in differences.items())
        raise SettingError(f"{folder} holds the run of another experiment ({said}). Give another out_dir.")
    run = read_run(folder) if (folder / checkpoint.WEIGHTS).is_file() else None
    return run if run and run.finished else None


def read_run(folder: str | os.PathLike) -> Run:
    """Return the run in a folder, as far as it has come. Raises `CheckpointError` if it has no weights there yet."""
    _, about = checkpoint.read_weights(Path(folder) / checkpoint.WEIGHTS)
    exp = Experiment.from_json(Path(folder, EXPERIMENT).read_text(encoding="utf-8"))
    return Run(Path(folder), exp, about.get("steps", 0), about.get("total_steps", 1))


def saved_steps(folder: str | os.PathLike) -> tuple[int, int] | None:
    """Return how many steps the run in a folder had taken when it was last saved, and of how many; None if it never was.

    Raises `CheckpointError` for a damaged state.
    """
    path = Path(folder, STATE)
    if not path.is_file():
        return None
    with _named_where_damaged(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # which reads no weights
        return state["step"], state["total_steps"]


@contextmanager
def _named_where_damaged(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong in reading a state, for which torch and pickle have errors of many kinds, into one."""
    try:
        yield
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason}). Delete it to start this run again."
        ) from error
