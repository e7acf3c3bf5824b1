"""`taco-nb sweep notebooks/0[1-4]_*.ipynb --out runs -p profile paper` runs notebooks at several lambda.

Each lambda has a folder of its own, in which the notebooks run one after the other, so that an ablation finds the baseline
that an earlier notebook has trained. The lambdas share nothing: run them in sequence, or each as a job of a Slurm array
(`--task $SLURM_ARRAY_TASK_ID`). A second call skips what is done and runs again what failed or was stopped; training goes
on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from tqdm.auto import tqdm

from taco_nb.errors import CheckpointError, SettingError, check_known
from taco_nb.files import atomic_write

LMBDAS = (0.0004, 0.0008, 0.0016, 0.004, 0.009, 0.015)
_HOW = ("max_hours", "device", "num_processes", "num_workers", "accumulation")
"""Parameters that say how to compute and not what: with other values of them, a result is still the same result."""


@dataclass(frozen=True)
class Member:
    """A sweep runs each notebook at each lambda. `folder` keeps all runs and executed notebooks of the lambda."""

    notebook: Path
    lmbda: float
    folder: Path
    parameters: Mapping[str, Any]

    @property
    def executed(self) -> Path:
        return self.folder / self.notebook.name

    @property
    def marker(self) -> Path:
        """The file that says that the notebook ran to its end. Papermill's own records do not: where a kernel dies, or
        Ctrl-C stops it, they call every cell completed."""
        return self.folder / f"{self.notebook.stem}.done.json"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on: the parameters and the notebook's cells."""
        cells = [cell.source for cell in nbformat.read(self.notebook, as_version=4).cells]
        of_result = {name: value for name, value in self.parameters.items() if name not in _HOW}
        return {"parameters": of_result, "cells": hashlib.sha256(json.dumps(cells).encode()).hexdigest()}

    @property
    def done(self) -> bool:
        """True if this very notebook has run to its end with these parameters, and left no training unfinished."""
        try:
            marked = json.loads(self.marker.read_text(encoding="utf-8")) == self.identity
        except (OSError, ValueError):  # it has not run, or the marker is damaged
            return False
        return marked and self.executed.is_file() and not unfinished_runs(self.folder)

    def run(self, parameters: Mapping[str, Any]) -> str:
        """Execute the notebook. Return why it is not done, or "" if it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marker.unlink(missing_ok=True)
        given = {**parameters, "lmbda": self.lmbda, "out_dir": str(self.folder)}
        try:
            papermill.execute_notebook(str(self.notebook), str(self.executed), given, progress_bar=False)
            with atomic_write(self.marker, "w") as file:
                json.dump(self.identity, file)
        except Exception as error:  # of a cell, a dead kernel or a full disk; the other notebooks go on
            name, said = (getattr(error, part, "") for part in ("ename", "evalue"))  # papermill's, for a cell
            return f"{name}: {said}" if name else f"{type(error).__name__}: {error}"
        left = ", ".join(unfinished_runs(self.folder))
        return f"{left} not trained to the end; run the sweep again to go on" if left else ""

    def __str__(self) -> str:
        return f"lambda {self.lmbda:g}, {self.notebook.stem}"


def members(
    notebooks: Sequence[str | os.PathLike],
    lmbdas: Sequence[float] = LMBDAS,
    out_dir: str | os.PathLike = "runs",
    parameters: Mapping[str, Any] | None = None,
    task: int | None = None,
) -> list[Member]:
    """Return all that a sweep consists of, lambda by lambda, or only what `task` is: the lambda of this number, from 0.

    Raises `SettingError` for a notebook that does not exist or has no such parameter, for a lambda or a notebook that is
    given twice, and for a task that does not exist.
    """
    parameters, out = dict(parameters or {}), Path(out_dir).expanduser().resolve()
    paths = [Path(notebook).resolve() for notebook in notebooks]
    for path in paths:
        if not path.is_file():
            raise SettingError(f"There is no notebook {path}.")
        known = list(papermill.inspect_notebook(str(path)))
        check_known([*parameters, "lmbda", "out_dir"], known, f"{path.name} has no parameter")
    if taken := {"lmbda", "out_dir"} & parameters.keys():
        raise SettingError(f"The sweep itself sets {' and '.join(sorted(taken))}: use --lmbda and --out.")
    if len(set(lmbdas)) < len(lmbdas) or len({path.name for path in paths}) < len(paths):
        raise SettingError("A lambda or a notebook is given twice.")
    if task is not None:
        if not 0 <= task < len(lmbdas):
            raise SettingError(f"Tasks run from 0 to {len(lmbdas) - 1}, one per lambda: there is no {task}.")
        lmbdas = [lmbdas[task]]
    return [Member(path, lmbda, out / f"lmbda-{lmbda:g}", parameters) for lmbda in lmbdas for path in paths]


def sweep(todo: Sequence[Member]) -> dict[str, str]:
    """Run what is not done yet of the `members` of a sweep. Return what failed, and why.

    If one fails, the others go on. The parameter `max_hours` is for the whole call: each notebook gets what the earlier ones
    have left of it, and what there is no time left for counts as failed.
    """
    failed, began = {}, None
    for member in (bar := tqdm(todo, desc="sweep", unit="notebook")):
        if member.done:
            tqdm.write(f"{member}: done already")
            continue
        bar.set_description(str(member))
        given = dict(member.parameters)
        if began is None:  # the clock of max_hours starts with the first notebook that has to run
            began = time.monotonic()
        elif given.get("max_hours") is not None:
            given["max_hours"] -= (time.monotonic() - began) / 3600
            if given["max_hours"] <= 0:
                failed[str(member)] = "not begun, since max_hours are over; run the sweep again to go on"
                continue
        if reason := member.run(given):
            failed[str(member)] = reason
        tqdm.write(f"{member}: {reason or 'done'}")
    return failed


def unfinished_runs(folder: Path) -> list[str]:
    """Return the names of the runs in `folder` whose training has not ended."""
    from taco_nb.training.loop import EXPERIMENT, read_run

    left = []
    for path in sorted(folder.glob(f"*/{EXPERIMENT}")):
        try:
            finished = read_run(path.parent).finished
        except CheckpointError:  # it was killed before it had any weights
            finished = False
        if not finished:
            left.append(path.parent.name)
    return left
