"""The training loop. It reads from top to bottom; accelerate carries it to other devices.

A run is a folder: `experiment.json`, `state.pt` (all that is needed to go on), `log.csv`, and in the end
`weights.safetensors`. Every number that a step draws depends on the seed and on the step's number alone, so a run that
was killed and started again ends, on a CPU, with the very bits of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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
from taco_nb.files import atomic_write, sha256
from taco_nb.model import TACO
from taco_nb.text import Conditioning, KeywordWeights, text_tower
from taco_nb.text.chat_keywords import chat_keywords
from taco_nb.training.loss import JointLoss, TacoLoss

if TYPE_CHECKING:
    import pandas as pd

DECAYS = (45 / 50, 48 / 50)
"""Where the learning rate falls to a tenth, as shares of the run: the reference's epochs 45 and 48 of 50."""
WARM_UP = 1 / 100
"""The share of a run in which the schedule "cosine" rises from zero."""
LOG_STEPS = 20
"""A row of the log is the mean over so many steps, or over a 40th of a short run."""
_EXPERIMENT, _STATE, _LOG = "experiment.json", "state.pt", "log.csv"


@dataclass(frozen=True)
class Run:
    """What `fit` leaves behind: a folder, and how to read it."""

    dir: Path
    experiment: Experiment
    steps: int
    """Steps taken so far."""
    total_steps: int

    @property
    def finished(self) -> bool:
        return self.steps == self.total_steps

    @property
    def codec(self) -> Codec:
        """The trained codec, from the run's weights, on the CPU."""
        return load(self.dir)

    @property
    def log(self) -> pd.DataFrame:
        """The means of the loss's terms over every few steps, with step, epoch, learning rate and seconds."""
        import pandas as pd

        return pd.read_csv(self.dir / _LOG)


def fit(
    exp: Experiment,
    out_dir: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    device: str = "auto",
    max_hours: float | None = None,
    save_minutes: float = 5.0,
    num_workers: int = 0,
) -> Run:
    """Train as `exp` says, into the folder `out_dir`; resume what was begun there; return at once what is finished.

    `device` is "auto" (a GPU where there is one), "cpu" or "cuda". After `max_hours` of this call the run is saved
    between two steps and returned unfinished; the same call goes on with it. The state is saved every `save_minutes`.
    Raises `SettingError` if the folder holds another experiment's run, if the training data changed since it was begun,
    or if the loss stops being a finite number; `CheckpointError` for a damaged state; what `exp` needs and lacks besides.
    """
    started = time.monotonic()
    folder = Path(out_dir)
    if run := _finished(folder, exp):
        return run
    with torch.random.fork_rng():  # the caller's random numbers are the caller's
        trainer = _Trainer(exp, folder, data_dir, device, num_workers)
        with atomic_write(folder / _EXPERIMENT, "w") as file:  # only now: what cannot be trained claims no folder
            file.write(exp.to_json())
        return trainer.run(started, max_hours, save_minutes)


class _Trainer:
    def __init__(
        self,
        exp: Experiment,
        folder: Path,
        data_dir: str | os.PathLike | None,
        device: str,
        num_workers: int,
    ):
        self.exp, self.folder = exp, folder
        self.accelerator = _accelerator(device, exp.precision)
        self.pairs = training_pairs(exp.train_data, exp.crop, data_dir, exp.seed, exp.captions)
        self.batches = Batches(len(self.pairs), exp.batch_size, exp.seed)
        self.total = exp.epochs * len(self.batches)
        self.log_steps = max(1, min(LOG_STEPS, self.total // 40))

        net = initial_net(exp, data_dir).to(self.accelerator.device, memory_format=torch.channels_last).train()
        quantiles = [p for name, p in net.named_parameters() if name.endswith(".quantiles")]
        others = [p for name, p in net.named_parameters() if not name.endswith(".quantiles")]
        loader = DataLoader(
            self.pairs,
            batch_sampler=self.batches,
            num_workers=num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.net, self.optimizer, self.aux_optimizer, self.loader = self.accelerator.prepare(
            net,
            torch.optim.Adam(others, exp.learning_rate, fused=True),
            torch.optim.Adam(quantiles, exp.aux_learning_rate, fused=True),
            loader,
        )
        self.keywords = fit_keywords(exp, self.pairs, data_dir)
        self.data = training_digest(exp, self.pairs, data_dir)
        tower = text_tower(exp.text_encoder, length=exp.text_tokens, device=str(self.accelerator.device))
        self.conditioning = Conditioning(tower, exp.text_length, exp.text_pooling, self.keywords)
        if tower.dim != net.config.text_dim:
            raise SettingError(f"{exp.text_encoder} is {tower.dim} wide, but sizes say text_dim={net.config.text_dim}.")
        self.loss = make_loss(exp, self.accelerator.device)
        self.step, self.rows, self.sums, self.seconds = 0, [], Counter(), 0.0

    def run(self, started: float, max_hours: float | None, save_minutes: float) -> Run:
        from tqdm.auto import tqdm

        self._restore()
        saved = clock = time.monotonic()
        bar = tqdm(total=self.total, initial=self.step, desc=f"training {self.folder.name}", unit="step")
        for x, captions in self._batches_to_come():
            self._train_step(x, captions)
            bar.update()
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % self.log_steps == 0 or self.step == self.total:
                row = self._log()
                bar.set_postfix({name: f"{row[name]:.4g}" for name in ("loss", "bpp", "mse")})
            if now - saved >= 60 * save_minutes and self.step < self.total:
                self._save()
                saved = time.monotonic()
            if max_hours is not None and now - started >= 3600 * max_hours:
                break
        bar.close()
        self._save()
        self._export()
        self.accelerator.free_memory()
        return Run(self.folder, self.exp, self.step, self.total)

    def _batches_to_come(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        while self.step < self.total:
            self.batches.epoch, self.batches.skip = divmod(self.step, len(self.batches))
            self.loader.set_epoch(self.batches.epoch)  # accelerate hands it on to the pairs, and would undo their own
            yield from self.loader

    def _train_step(self, x: torch.Tensor, captions: list[str]) -> None:
        torch.manual_seed(_mixed(self.exp.seed, self.step))  # the noise that stands for rounding
        rate = self.exp.learning_rate * learning_rate_factor(self.exp.schedule, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        out = self.net(x.contiguous(memory_format=torch.channels_last), *self.conditioning(captions))
        terms = self.loss(out, x, captions)
        self.accelerator.backward(terms["loss"])
        self.accelerator.clip_grad_norm_(self.net.parameters(), self.exp.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

        aux_loss = self.accelerator.unwrap_model(self.net).aux_loss()
        self.accelerator.backward(aux_loss)
        self.aux_optimizer.step()
        self.aux_optimizer.zero_grad()
        self.step += 1
        self.sums.update({name: term.detach() for name, term in {**terms, "aux": aux_loss}.items()} | {"steps": 1})
        self.learning_rate = rate

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
        if not all(map(math.isfinite, sums.values())) or not all(p.isfinite().all() for p in self.net.parameters()):
            raise SettingError(
                f"The loss or the weights are no finite numbers any more at step {self.step} (sums since the last row "
                f"of the log: {sums}). Lower learning_rate and give another out_dir; what was saved before is kept in "
                f"{self.folder}."
            )

    def _save(self) -> None:
        self._check_finite()
        state = {
            "net": self.accelerator.unwrap_model(self.net).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "step": self.step,
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
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self.accelerator.unwrap_model(self.net).load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.aux_optimizer.load_state_dict(state["aux_optimizer"])
            self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
            self.sums, data = Counter(state["sums"]), state["data"]
        except Exception as error:  # torch and pickle each have errors of their own for a damaged file
            reason = str(error).split("\n")[0]
            raise CheckpointError(f"{path} cannot be read ({reason}). Delete it to start this run again.") from error
        if data != self.data:
            raise SettingError(
                f"The run in {self.folder} was begun on other training data or other initial weights: the images or captions "
                f"of {self.exp.train_data!r}, or what init={self.exp.init!r} names, have changed. Restore them, or give "
                "another out_dir."
            )

    def _export(self) -> None:
        net = self.accelerator.unwrap_model(self.net).eval()
        about = {
            "name": self.folder.name,
            "experiment": self.exp.__dict__,
            "steps": self.step,
            "total_steps": self.total,
            "hours": self.seconds / 3600,
            "device": str(self.accelerator.device),
            "keywords": self.keywords and self.keywords.to_json(),
        }
        checkpoint.save_weights(self.folder / checkpoint.WEIGHTS, net, about)


class Batches(Sampler):
    """The index batches of one epoch, in an order that depends on (seed, epoch) alone, the first `skip` left out."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        yield from (batch.tolist() for batch in order.split(self.batch_size)[self.skip :])


def learning_rate_factor(schedule: str, step: int, total: int) -> float:
    """The share of its highest value that the learning rate has at a step, 0 <= step < total.

    "steps" falls to a tenth at each of `DECAYS`; "cosine" rises linearly over `WARM_UP`, then falls along half a period
    (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts).
    """
    if schedule == "steps":
        return 0.1 ** sum(step >= share * total for share in DECAYS)
    return min((step + 1) / (WARM_UP * total), 1) * (1 + math.cos(math.pi * step / total)) / 2


def _mixed(seed: int, number: int) -> int:
    """A seed that depends on both, in the 32 bits that are all torch's CPU generator keeps of one."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def initial_net(exp: Experiment, data_dir: str | os.PathLike | None = None) -> TACO:
    """The network that `exp` starts from: random weights drawn from its seed, those that fit replaced by `exp.init`'s.

    Weights that find no partner are named in a line. Raises `CheckpointError` if most do not.
    """
    torch.manual_seed(exp.seed)
    net = TACO(exp.model_config())
    if exp.init:
        new, unused = checkpoint.load_fitting(net, checkpoint.find(exp.init, data_dir))
        for names, fate in ((new, "start from random weights"), (unused, "were not used")):
            if names:
                print(f"init={exp.init!r}: {len(names)} weights {fate}: {', '.join(names)}")
    return net


def training_digest(exp: Experiment, pairs: TrainPairs, data_dir: str | os.PathLike | None) -> str:
    """A digest of what a run is trained on: the images' names, their captions, and the initial weights."""
    digest = hashlib.sha256(sha256(checkpoint.find(exp.init, data_dir)).encode() if exp.init else b"")
    for i, name in enumerate(pairs.dataset.names):
        digest.update(json.dumps([name, pairs.dataset.captions(i)]).encode())
    return digest.hexdigest()


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
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if device not in ("auto", "cpu", "cuda"):
        raise SettingError(f'device must be "auto", "cpu" or "cuda", but is {device!r}.')
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError('device="cuda", but PyTorch sees no CUDA device here. Use device="auto" or "cpu".')
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train several experiments
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bfloat16" else "no",
    )


def _finished(folder: Path, exp: Experiment) -> Run | None:
    """The run of `exp` in the folder, if nothing is left to do. Raises `SettingError` if it is another experiment's."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"out_dir={str(folder)!r} is a file. Give a folder, or the name of one that is to be made.")
    claim, weights = folder / _EXPERIMENT, folder / checkpoint.WEIGHTS
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
        _, about = checkpoint.read_weights(weights)
        if about.get("steps", 0) == about.get("total_steps", 1):
            return Run(folder, exp, about["steps"], about["total_steps"])
    return None
