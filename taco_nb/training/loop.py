"""The training loop. It reads from top to bottom; accelerate carries it to other devices and over several processes.

A run is a folder: `experiment.json`, `state.pt` (all that is needed to go on), `log.csv`, `tensorboard/`, and in the end
`weights.safetensors`. Every number that a step draws depends on the seed, the step and the image alone. So a run that was
killed and started again ends, on a CPU, with the very bits of one that was not; and how a batch is divided, among
processes or into pieces that fit into memory, changes the order of sums and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from taco_nb import checkpoint
from taco_nb.codec import Codec, load
from taco_nb.data import TrainPairs, training_pairs
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write
from taco_nb.model import TACO
from taco_nb.processes import check_device
from taco_nb.text import Conditioning, KeywordWeights, text_tower
from taco_nb.text.chat_keywords import chat_keywords
from taco_nb.training.board import Board
from taco_nb.training.launch import launch
from taco_nb.training.lock import alone_in
from taco_nb.training.loss import JointLoss, TacoLoss
from taco_nb.training.noise import image_noise
from taco_nb.training.signals import ignore_warnings, on_warning
from taco_nb.training.start import initial_net, training_digest

if TYPE_CHECKING:
    import pandas as pd

DECAYS = (45 / 50, 48 / 50)
"""Where the learning rate falls to a tenth, as shares of the run: the reference's epochs 45 and 48 of 50."""
WARM_UP = 1 / 100
"""The share of a run in which the schedule "cosine" rises from zero."""
LOG_STEPS = 20
"""A row of the log is the mean over so many steps, or over a 40th of a short run."""
PICTURES = 20
"""How often in a run TensorBoard gets a picture."""
EXPERIMENT, _STATE, _LOG = "experiment.json", "state.pt", "log.csv"


@dataclass(frozen=True)
class Run:
    """What `fit` leaves behind: a folder, and how to read it."""

    dir: Path
    experiment: Experiment
    steps: int
    """Steps taken so far."""
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
        import pandas as pd

        return pd.read_csv(self.dir / _LOG)


OnLog = Callable[[Run, "list[dict[str, float]]", Callable[[], Codec]], None]
"""What `fit` tells: the run so far, the rows of its log, and a function that gives the codec as it stands."""


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
    on_log: OnLog | None = None,
) -> Run:
    """Train as `exp` says, into the folder `out_dir`; resume what was begun there; return at once what is finished.

    `device` is "auto" (a GPU where there is one), "cpu" or "cuda". After `max_hours` of this call, or at SIGTERM or
    SIGUSR1, the run is saved between two steps and returned unfinished; the same call goes on with it. The state is
    saved every `save_minutes`.

    How a result is computed, and not what it is: `num_processes` share each batch, on a GPU each where they are on GPUs;
    `num_workers` load the images of each (None: none on a CPU, up to 8 on a GPU); `accumulation` is into how many pieces
    a process's share of a batch is cut to need less memory. In a process that `accelerate launch` has started,
    `num_processes` has been decided and is left at 1.

    `on_log` is told of each row of the log, with the run so far and a function that gives its codec as it stands (see
    `taco_nb.widgets.training_monitor`); of a run that is finished already, or trained by several processes, once in the end.

    Raises `SettingError` if the folder holds another experiment's run or another process trains there, if the training
    data changed since it was begun, or if the loss stops being a finite number; `CheckpointError` for a damaged state;
    `ProcessError` where one of several processes dies; what `exp` needs and lacks besides.
    """
    started = time.monotonic()
    folder = Path(out_dir)
    for name, value, least in (("num_processes", num_processes, 1), ("num_workers", num_workers or 0, 0),
                               ("accumulation", accumulation, 1)):  # fmt: skip
        if type(value) is not int or value < least:
            raise SettingError(f"{name} must be a whole number of {least} or above, but is {value!r}.")
    run = _finished(folder, exp)
    if not run and num_processes > 1:
        run = launch(
            exp, folder, num_processes, data_dir=data_dir, device=device, max_hours=max_hours, save_minutes=save_minutes,
            num_workers=num_workers, accumulation=accumulation,
        )  # fmt: skip
    if not run:
        signals: list[int] = []
        with (
            on_warning(signals.append),
            torch.random.fork_rng(),
        ):  # the caller's random numbers are the caller's
            trainer = Trainer(exp, folder, data_dir, device, num_workers, accumulation)
            with trainer.alone():
                run = _finished(folder, exp)  # by somebody else, in the meantime
                if not run:
                    return trainer.run(started, max_hours, save_minutes, signals, on_log)
    run = replace(run, data_dir=data_dir)
    if on_log:
        on_log(run, run.log.to_dict("records"), lambda: run.codec)
    return run


class Trainer:
    """A run in this process, alone or as one of several that `accelerate launch` has started. Writes nothing before `run`."""

    def __init__(
        self,
        exp: Experiment,
        folder: Path,
        data_dir: str | os.PathLike | None = None,
        device: str = "auto",
        num_workers: int | None = None,
        accumulation: int = 1,
    ):
        self.exp, self.folder, self.data_dir, self.accumulation = exp, folder, data_dir, accumulation
        self.accelerator = _accelerator(device, exp.precision)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        on_gpu = self.accelerator.device.type == "cuda"
        self.device = (
            self.accelerator.device if on_gpu else torch.device("cpu")
        )  # which accelerate may call "cpu:0"
        self.is_main = self.accelerator.is_main_process
        # decisions are made on the CPU, so that no GPU has to be waited for
        self.group = torch.distributed.new_group(backend="gloo") if self.processes > 1 else None

        self.pairs = training_pairs(exp.train_data, exp.crop, data_dir, exp.seed, exp.captions)
        self.batches = Batches(len(self.pairs), exp.batch_size, exp.seed, self.rank, self.processes)
        self.total = exp.epochs * len(self.batches)
        self.log_steps = max(1, min(LOG_STEPS, self.total // 40))
        self.picture_steps = max(1, self.total // PICTURES)
        if num_workers is None:
            num_workers = min(8, (os.cpu_count() or 1) // torch.cuda.device_count()) if on_gpu else 0
        self.loader = DataLoader(
            self.pairs,
            batch_sampler=self.batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_warnings,
            pin_memory=on_gpu,
        )

        net = (
            initial_net(exp, data_dir, say=self.is_main)
            .to(self.device, memory_format=torch.channels_last)
            .train()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch is about to rename broadcast_buffers
            self.net, self.optimizer, self.aux_optimizer = self.accelerator.prepare(
                net, *make_optimizers(exp, net)
            )
        self.bare_net = net
        self.keywords = fit_keywords(exp, self.pairs, data_dir)
        self.data = training_digest(exp, self.pairs, data_dir)
        tower = text_tower(exp.text_encoder, length=exp.text_tokens, device=str(self.device))
        self.conditioning = Conditioning(tower, exp.text_length, exp.text_pooling, self.keywords)
        if tower.dim != net.config.text_dim:
            raise SettingError(
                f"{exp.text_encoder} is {tower.dim} wide, but sizes say text_dim={net.config.text_dim}."
            )
        self.loss = make_loss(exp, self.device)
        self.step, self.rows, self.sums, self.seconds = 0, [], Counter(), 0.0
        self.part = contextlib.nullcontext
        """Called with the name of each part of a step, for whoever wants to know how long they take."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's lock: the main process does, and tells the others if it cannot."""
        with contextlib.ExitStack() as stack:
            refusal = [None]
            if self.is_main:
                try:
                    stack.enter_context(alone_in(self.folder))
                except SettingError as error:
                    refusal = [str(error)]
            if self.processes > 1:
                torch.distributed.broadcast_object_list(refusal, group=self.group)
            if refusal[0]:
                raise SettingError(refusal[0])
            yield

    def run(
        self,
        started: float,
        max_hours: float | None,
        save_minutes: float,
        signals: Sequence[int],
        on_log: OnLog | None = None,
    ) -> Run:
        from tqdm.auto import tqdm

        if self.is_main:
            with atomic_write(self.folder / EXPERIMENT, "w") as file:
                file.write(self.exp.to_json())
        self._restore()
        saved = clock = time.monotonic()
        stopped = None
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=self.total, initial=self.step, desc=f"training {self.folder.name}", unit="step",
                     disable=not self.is_main)
            )  # fmt: skip
            if self.is_main:
                board = stack.enter_context(Board(self.folder, self.step, self.exp.crop, self.data_dir))
            for x, captions in self.batches_to_come():
                self.train_step(x, captions)
                bar.update()
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
                if self.step % self.log_steps == 0 or self.step == self.total:
                    row = self._log()
                    bar.set_postfix({name: f"{row[name]:.4g}" for name in ("loss", "bpp", "mse")})
                    if self.is_main:
                        board.add_row(row)
                        if on_log:
                            on_log(
                                Run(self.folder, self.exp, self.step, self.total, self.data_dir),
                                self.rows,
                                self._codec,
                            )
                if self.is_main and (self.step % self.picture_steps == 0 or self.step == self.total):
                    board.add_picture(self.bare_net, self.conditioning, self.step)
                if self.is_main and now - saved >= 60 * save_minutes and self.step < self.total:
                    self._save()
                    board.flush()
                    saved = time.monotonic()
                if stopped := self._stop(
                    signals, max_hours is not None and now - started >= 3600 * max_hours
                ):
                    break
            if self.is_main:
                self._save()
                self._export()
            if self.is_main and stopped and self.step < self.total:
                again = f"python -m taco_nb.training --out {self.folder}"
                print(
                    f"Stopped by {stopped} after step {self.step} of {self.total}; the same call, or {again}, goes on."
                )
        self.accelerator.free_memory()
        return Run(self.folder, self.exp, self.step, self.total, self.data_dir)

    def _codec(self) -> Codec:
        """The codec as it stands, on a copy of the weights, so that training is not disturbed."""
        codec = Codec(
            copy.deepcopy(self.bare_net),
            self.exp.text_encoder,
            self.exp.text_tokens,
            text_length=self.exp.text_length,
            text_pooling=self.exp.text_pooling,
            name=self.folder.name,
        )
        codec.conditioning = (
            self.conditioning
        )  # with the tower and the keyword weights that are loaded already
        return codec

    def _stop(self, signals: Sequence[int], late: bool) -> str | None:
        """Why to stop here, if so: what any of the processes was told, so that all of them end with the same step."""
        reason = torch.tensor(
            signals[0] if signals else int(late)
        )  # no signal of `on_warning` has the number 1
        if self.processes > 1:
            torch.distributed.all_reduce(reason, torch.distributed.ReduceOp.MAX, self.group)
        return {0: None, 1: "max_hours"}[n] if (n := int(reason)) < 2 else signal.Signals(n).name

    def batches_to_come(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """This process's share of every batch from the present step on."""
        while self.step < self.total:
            self.batches.epoch, self.batches.skip = divmod(self.step, len(self.batches))
            self.pairs.set_epoch(self.batches.epoch)
            yield from self.loader

    def train_step(self, x: torch.Tensor, captions: Sequence[str]) -> None:
        """One step of both optimizers, on this process's share of the next batch.

        The loss is one of the whole batch. What is a mean over images is a weighted sum over pieces and processes. J
        compares every image with all others, but its slope in an image's embedding is the same wherever the others were
        embedded, and through it J is descended piece by piece (Gao et al. 2021, arXiv:2101.06983). To know the embeddings
        before there is a slope, a share in several pieces is reconstructed once more, without a gradient.
        """
        rate = self.exp.learning_rate * learning_rate_factor(self.exp.schedule, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pieces, at_once = self._pieces(x, captions), self.accumulation == 1
        if self.exp.k_J:
            with torch.set_grad_enabled(at_once):
                outs = [self._reconstruct(piece) for piece in pieces]
            joint, slopes = self._joint(pieces, [out["seen"] for out in outs])

        sums = 0.0
        for i, piece in enumerate(pieces):
            with self.accelerator.no_sync(self.net) if i + 1 < len(pieces) else contextlib.nullcontext():
                out = outs[i] if self.exp.k_J and at_once else self._reconstruct(piece)
                with self.part("losses"), self.accelerator.autocast():
                    means = self.loss.means(out, piece.x)
                    objective = piece.share * self.loss.total(means)
                    if self.exp.k_J:
                        objective = (
                            objective + self.exp.k_J * (out["seen"][: len(slopes[i])] * slopes[i]).sum()
                        )
                with self.part("backward"):
                    self.accelerator.backward(self.processes * objective)  # of which DDP takes the mean
            sums += piece.share * torch.stack(list(means.values())).detach()
        terms = dict(zip(means, self.accelerator.reduce(sums, "sum")))
        terms |= {"joint": joint} if self.exp.k_J else {}

        with self.part("optimizer"):
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.exp.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            aux_loss = self.bare_net.aux_loss()  # of weights alone: the same in every process
            aux_loss.backward()
            self.aux_optimizer.step()
            self.aux_optimizer.zero_grad()
        self.step += 1
        self.sums.update({"loss": self.loss.total(terms), **terms, "aux": aux_loss.detach(), "steps": 1})
        self.learning_rate = rate

    def _pieces(self, x: torch.Tensor, captions: Sequence[str]) -> list[_Piece]:
        """This process's share of the next batch, cut into pieces, with all that frozen networks say of them."""
        size = self.batches.size(self.step)
        own = shares(size, self.processes)[self.rank]
        x = x.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        pieces = []
        for part in shares(len(captions), min(self.accumulation, len(captions))):
            piece = _Piece(x[part.start : part.stop], len(part) / size if own else 0.0)
            said = captions[part.start : part.stop]
            piece.seeds = [_mixed(self.exp.seed, self.step, own.start + i) for i in part]
            with self.part("text"):
                piece.text, piece.mask = self.conditioning(said)
                if self.exp.k_J:
                    plain = self.exp.text_length == "truncate" and self.exp.text_pooling == "none"
                    piece.words = self.loss.joint.embed_text(said, piece.text if plain else None)
            if self.exp.k_J:
                with self.part("losses"), self.accelerator.autocast(), torch.no_grad():
                    piece.original = self.loss.joint.embed(piece.x)
            pieces.append(piece)
        return pieces

    def _reconstruct(self, piece: _Piece) -> dict[str, Any]:
        """What the network makes of a piece; where J wants to know, also how CLIP sees that."""
        with self.part("model"), image_noise(self.bare_net, piece.seeds):
            out = self.net(piece.x, piece.text, piece.mask)
        if self.exp.k_J:
            with self.part("losses"), self.accelerator.autocast():
                out["seen"] = self.loss.joint.embed(out["x_hat"])
        return out

    def _joint(
        self, pieces: list[_Piece], seen: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """J of the whole batch, and its slopes in the embeddings of each of this process's pieces."""
        image = self._gathered(torch.cat(seen).detach()).requires_grad_()
        original, text = (
            self._gathered(torch.cat([getattr(p, name) for p in pieces])) for name in ("original", "words")
        )
        joint = JointLoss.of_embeddings(image, original, text)
        (slope,) = torch.autograd.grad(joint, image)
        own = shares(len(image), self.processes)[self.rank]
        return joint.detach(), list(
            slope[own.start : own.stop].split([len(piece.x) for piece in pieces] if own else 1)
        )

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        """A row for each image of this process's share, (n, d) -> those of the whole batch, (B, d)."""
        if self.processes == 1:
            return own
        counts = [len(share) for share in shares(self.batches.size(self.step), self.processes)]
        most = max(counts)  # processes exchange tensors of one shape
        padded = torch.nn.functional.pad(own[: counts[self.rank]], (0, 0, 0, most - counts[self.rank]))
        gathered = self.accelerator.gather(padded).split(most)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])

    def _log(self) -> dict[str, float]:
        self._check_finite()
        count = self.sums.pop("steps")
        means = {name: float(total) / count for name, total in self.sums.items()}
        self.sums.clear()
        epoch = self.step / len(self.batches)
        row = {"step": self.step, "epoch": epoch, **means, "lr": self.learning_rate, "seconds": self.seconds}
        self.rows.append(row)
        return row

    def _check_finite(self) -> None:
        """Keep a run that has diverged out of the log, and from being saved over the state it had before."""
        sums = {name: float(total) for name, total in self.sums.items()}
        if not all(map(math.isfinite, sums.values())) or not all(
            p.isfinite().all() for p in self.net.parameters()
        ):
            raise SettingError(
                f"The loss or the weights are no finite numbers any more at step {self.step} (sums since the last row "
                f"of the log: {sums}). Lower learning_rate and give another out_dir; what was saved before is kept in "
                f"{self.folder}."
            )

    def _save(self) -> None:
        self._check_finite()
        state = {
            "net": self.bare_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "step": self.step,
            "total_steps": self.total,
            "data": self.data,
            "rows": self.rows,
            "sums": dict(self.sums),
            "seconds": self.seconds,
        }
        with atomic_write(self.folder / _STATE) as file:
            torch.save(state, file)
        import pandas as pd

        columns = ["step", "epoch", *self.loss.names, "aux", "lr", "seconds"]
        with atomic_write(self.folder / _LOG, "w") as file:
            pd.DataFrame(self.rows, columns=columns).to_csv(file, index=False)

    def _restore(self) -> None:
        path = self.folder / _STATE
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.bare_net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.aux_optimizer.load_state_dict(state["aux_optimizer"])
            self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
            self.sums, data = Counter(state["sums"]), state["data"]
        except Exception as error:
            raise _damaged(path, error) from error
        if data != self.data:
            raise SettingError(
                f"The run in {self.folder} was begun on other training data or other initial weights: the images or captions "
                f"of {self.exp.train_data!r}, or what init={self.exp.init!r} names, have changed. Restore them, or give "
                "another out_dir."
            )

    def _export(self) -> None:
        about = {
            "name": self.folder.name,
            "experiment": asdict(self.exp),
            "steps": self.step,
            "total_steps": self.total,
            "hours": self.seconds / 3600,
            "device": str(self.device),
            "keywords": self.keywords and self.keywords.to_json(),
        }
        checkpoint.save_weights(self.folder / checkpoint.WEIGHTS, self.bare_net.eval(), about)


@dataclass
class _Piece:
    """Images that are computed together, and what stays the same however often they are."""

    x: torch.Tensor
    share: float
    """Of the whole batch; 0 for what only keeps a process busy that has no image of its own."""
    seeds: list[int] = field(default_factory=list)
    """Of each image's noise."""
    text: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    words: torch.Tensor | None = None
    """The captions' embeddings, for J."""
    original: torch.Tensor | None = None
    """The images' embeddings, for J."""


class Batches(Sampler):
    """The index batches of one epoch, in an order that depends on (seed, epoch) alone, the first `skip` left out.

    Of several `processes`, the one of this `rank` gets its share of each batch. Where an epoch's last batch has fewer
    images than there are processes, those without an image get the first, to compute it without effect.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1):
        self.count, self.batch_size, self.seed, self.rank, self.processes = (
            count,
            batch_size,
            seed,
            rank,
            processes,
        )
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.count // self.batch_size)

    def size(self, step: int) -> int:
        """Images in the batch of a step, counted from the start of the run: the last of an epoch may have fewer."""
        return min(self.batch_size, self.count - step % len(self) * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        for batch in order.split(self.batch_size)[self.skip :]:
            own = shares(len(batch), self.processes)[self.rank] or range(1)
            yield batch[own.start : own.stop].tolist()


def shares(size: int, parts: int) -> list[range]:
    """The positions 0 to `size` cut into so many parts, in order, as equal as can be; some are empty if parts > size."""
    return [range(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


def make_optimizers(exp: Experiment, net: TACO) -> tuple[torch.optim.Optimizer, torch.optim.Adam]:
    """The optimizer that `exp` names of all weights but z's quantiles, and the one of those.

    "muon" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves each kernel, flattened to a matrix of rows
    per channel, by the orthogonal matrix nearest to its gradient's running mean. Steps are as long as Adam's in the root
    mean square (Liu et al. 2025, arXiv:2502.16982), so a learning rate of Adam's suits it. Biases, and the model of z, which
    is one small network for each channel and no matrix, are moved by Adam with Nesterov's momentum.
    """
    weights = dict(net.named_parameters())
    aux = torch.optim.Adam([weights.pop("entropy_bottleneck.quantiles")], exp.aux_learning_rate, fused=True)
    if exp.optimizer == "adam":
        return torch.optim.Adam(weights.values(), exp.learning_rate, fused=True), aux
    from timm.optim import Muon

    of_z = [weights.pop(name) for name in list(weights) if name.startswith("entropy_bottleneck.")]
    groups = [{"params": list(weights.values())}, {"params": of_z, "use_fallback": True}]
    return Muon(groups, exp.learning_rate, nesterov=True, adjust_lr_fn="match_rms_adamw"), aux


def learning_rate_factor(schedule: str, step: int, total: int) -> float:
    """The share of its highest value that the learning rate has at a step, 0 <= step < total.

    "steps" falls to a tenth at each of `DECAYS`; "cosine" rises linearly over `WARM_UP`, then falls along half a period
    (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts).
    """
    if schedule == "steps":
        return 0.1 ** sum(step >= share * total for share in DECAYS)
    return min((step + 1) / (WARM_UP * total), 1) * (1 + math.cos(math.pi * step / total)) / 2


def _mixed(*numbers: int) -> int:
    """A seed that depends on all of them, in the 32 bits that are all torch's CPU generator keeps of one."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def fit_keywords(
    exp: Experiment, pairs: TrainPairs, data_dir: str | os.PathLike | None = None
) -> KeywordWeights | None:
    """Keyword weights fitted on the training captions, each counted once; None where `exp` does not pool by them."""
    if exp.text_pooling == "none":
        return None
    captions = (caption for i in range(len(pairs.dataset)) for caption in pairs.dataset.captions(i))
    sources = [chat_keywords(data_dir) if name == "llm" else name for name in exp.keyword_sources.split("+")]
    return KeywordWeights.fit(captions, sources, exp.keyword_weight)


def make_loss(exp: Experiment, device: torch.device) -> TacoLoss:
    """The loss of `exp`, with the frozen networks that its terms need. Raises `MissingWeightsError`."""
    lpips = joint = None
    if exp.k_P:
        from taco_nb.metrics.perception import Lpips

        lpips = Lpips(device=device).distance
    if exp.k_J:
        from taco_nb.text import clip_model

        joint = JointLoss(*clip_model(exp.text_encoder, device=str(device)))
    return TacoLoss(exp.lmbda, exp.k_P, exp.k_J, lpips, joint)


def _accelerator(device: str, precision: str) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    check_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train several experiments
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )


def _finished(folder: Path, exp: Experiment) -> Run | None:
    """The run of `exp` in the folder, if nothing is left to do. Raises `SettingError` if it is another experiment's."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(
            f"out_dir={str(folder)!r} is a file. Give a folder, or the name of one that is to be made."
        )
    claim, weights = folder / EXPERIMENT, folder / checkpoint.WEIGHTS
    if not claim.is_file():
        return None
    try:
        there = Experiment.from_json(claim.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{claim} does not say whose run this is: {error} Give another out_dir.") from None
    if differences := there.diff(exp):
        said = "; ".join(f"{name} is {was!r} there, {now!r} here" for name, (was, now) in differences.items())
        raise SettingError(f"{folder} holds the run of another experiment ({said}). Give another out_dir.")
    if weights.is_file():
        run = read_run(folder)
        return run if run.finished else None
    return None


def read_run(folder: str | os.PathLike) -> Run:
    """The run in a folder, as far as it has come. Raises `CheckpointError` if it has no weights there yet."""
    _, about = checkpoint.read_weights(Path(folder) / checkpoint.WEIGHTS)
    exp = Experiment.from_json(Path(folder, EXPERIMENT).read_text(encoding="utf-8"))
    return Run(Path(folder), exp, about.get("steps", 0), about.get("total_steps", 1))


def saved_steps(folder: str | os.PathLike) -> tuple[int, int] | None:
    """The steps taken when the run in a folder was last saved, however it ended, and all; None if it never was.

    Raises `CheckpointError` for a damaged state.
    """
    path = Path(folder, _STATE)
    if not path.is_file():
        return None
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )  # of which no weight is read
        return state["step"], state["total_steps"]
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """Torch and pickle each have errors of their own for a damaged state."""
    reason = str(error).split("\n")[0]
    return CheckpointError(f"{path} cannot be read ({reason}). Delete it to start this run again.")
