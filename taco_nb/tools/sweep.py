"""Notebooks over lambda: `taco-nb sweep notebooks/0[1-4]_*.ipynb --out runs -p profile paper`.

Each lambda is a task of its own, with its own folder below `out`, and runs its notebooks in turn, so that the ablations of
one lambda find the baseline that the first of them trained. Tasks share nothing: run all in sequence, or each as a job of
a Slurm array (`--task $SLURM_ARRAY_TASK_ID`). What is done is skipped; what was stopped, or failed, is run again, and the
training inside it goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taco_nb.errors import CheckpointError, SettingError, check_known

LMBDAS = (0.0004, 0.0008, 0.0016, 0.004, 0.009, 0.015)
_HOW = (
    "max_hours",
    "device",
    "num_processes",
    "num_workers",
    "accumulation",
)  # parameters that are no part of a result


@dataclass(frozen=True)
class Member:
    """One notebook at one lambda."""

    notebook: Path
    lmbda: float
    folder: Path
    """Where its runs and its executed notebook are kept, with those of the other notebooks at this lambda."""
    parameters: Mapping[str, Any]

    @property
    def executed(self) -> Path:
        return self.folder / self.notebook.name

    @property
    def given(self) -> dict[str, Any]:
        return {**self.parameters, "lmbda": self.lmbda, "out_dir": str(self.folder)}

    @property
    def done(self) -> bool:
        """Whether this very notebook was run to its end with these parameters, and left no training unfinished."""
        import nbformat

        try:
            executed = nbformat.read(self.executed, as_version=4)
            ran = all(
                c.metadata.papermill.status == "completed" for c in executed.cells if c.cell_type == "code"
            )
            own = [
                c.source for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])
            ]
            same = own == [cell.source for cell in nbformat.read(self.notebook, as_version=4).cells]
            were = executed.metadata.papermill.parameters
            of_result = [{k: v for k, v in given.items() if k not in _HOW} for given in (were, self.given)]
            return ran and same and of_result[0] == of_result[1] and not unfinished(self.folder)
        except (OSError, ValueError, AttributeError):
            return False  # there is none, or half of one

    def __str__(self) -> str:
        return f"lambda {self.lmbda:g}, {self.notebook.stem}"


def members(
    notebooks: Sequence[str | os.PathLike],
    lmbdas: Sequence[float] = LMBDAS,
    out_dir: str | os.PathLike = "runs",
    parameters: Mapping[str, Any] | None = None,
) -> list[Member]:
    """All of a sweep, lambda by lambda. Raises `SettingError` for a notebook that is not there or lacks a parameter."""
    import papermill

    parameters, out = dict(parameters or {}), Path(out_dir).expanduser().resolve()
    paths = [Path(notebook).resolve() for notebook in notebooks]
    for path in paths:
        if not path.is_file():
            raise SettingError(f"There is no notebook {path}.")
        known = list(papermill.inspect_notebook(str(path)))
        check_known([*parameters, "lmbda", "out_dir"], known, f"{path.name} has no parameter")
    if taken := {"lmbda", "out_dir"} & parameters.keys():
        raise SettingError(f"{', '.join(sorted(taken))} is the sweep's to set: use --lmbda and --out.")
    if len(set(lmbdas)) < len(lmbdas) or len({path.name for path in paths}) < len(paths):
        raise SettingError("A lambda or a notebook is given twice.")
    return [Member(path, lmbda, out / f"lmbda-{lmbda:g}", parameters) for lmbda in lmbdas for path in paths]


def sweep(
    notebooks: Sequence[str | os.PathLike],
    lmbdas: Sequence[float] = LMBDAS,
    out_dir: str | os.PathLike = "runs",
    parameters: Mapping[str, Any] | None = None,
    task: int | None = None,
) -> dict[str, str]:
    """Run every notebook at every lambda, or those of the lambda that `task` counts from 0; returns what failed, and why.

    Executed notebooks are kept as `out_dir/lmbda-<lambda>/<notebook>`, their runs beside them. A member that fails is named,
    and the others go on. A parameter `max_hours` is for the whole call; what it leaves no time for counts as failed.
    Raises `SettingError` as `members` does, and for a task that does not exist.
    """
    from tqdm.auto import tqdm

    todo = members(notebooks, lmbdas, out_dir, parameters)
    if task is not None:
        if not 0 <= task < len(lmbdas):
            raise SettingError(
                f"Tasks count from 0 to {len(lmbdas) - 1}, one for each lambda, but {task} was asked for."
            )
        todo = [member for member in todo if member.lmbda == lmbdas[task]]
    failed, began = {}, None
    for member in tqdm(todo, desc="sweep", unit="notebook"):
        if member.done:
            tqdm.write(f"{member}: done already")
            continue
        given = member.given
        if began is None:
            began = time.monotonic()
        elif given.get("max_hours") is not None:
            given["max_hours"] -= (time.monotonic() - began) / 3600
            if given["max_hours"] <= 0:
                failed[str(member)] = "not begun, max_hours are over; run the sweep again to go on"
                continue
        if reason := _run(member, given):
            failed[str(member)] = reason
        tqdm.write(f"{member}: {reason or 'done'}")
    return failed


def _run(member: Member, given: Mapping[str, Any]) -> str:
    """Execute one notebook; returns why it is not done, or ""."""
    import papermill

    member.folder.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(str(member.notebook), str(member.executed), given, progress_bar=False)
        left = ", ".join(unfinished(member.folder))
        return f"{left} not trained to the end; run the sweep again to go on" if left else ""
    except (
        Exception
    ) as error:  # a cell's own, a dead kernel's, a full disk's: whatever it is, the others go on
        said = [
            getattr(error, name, "") for name in ("ename", "evalue")
        ]  # of the cell that stopped a notebook
        return ": ".join(said) if all(said) else f"{type(error).__name__}: {error}"


def unfinished(folder: Path) -> list[str]:
    """Names of the runs below `folder` whose training has not ended."""
    from taco_nb.training.loop import EXPERIMENT, read_run

    left = []
    for path in sorted(folder.glob(f"*/{EXPERIMENT}")):
        try:
            finished = read_run(path.parent).finished
        except CheckpointError:  # begun, and killed before it had any weights
            finished = False
        if not finished:
            left.append(path.parent.name)
    return left
