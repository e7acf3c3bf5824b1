"""Training from the command line: `taco-nb train`, or `accelerate launch -m taco_nb.training` on several GPUs."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from taco_nb.command import Command, data_dir_option, device_option
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.experiment import Experiment, baseline
from taco_nb.processes import stop_requests

UNFINISHED = 3
"""The exit status of `--status` while there is something left to do."""

EXAMPLES = """\b
examples:
  taco-nb train --profile sample --set epochs=2 --out runs/try
  taco-nb train --profile paper --num-processes 4 --out runs/paper
  accelerate launch --multi_gpu --num_processes 4 -m taco_nb.training --profile paper --out runs/paper
  taco-nb train --out runs/paper              (goes on with it)
  taco-nb train --out runs/paper --status

A run ends when it is finished, when --max-hours are over, or at SIGTERM or SIGUSR1. In the last two cases it is saved
between two steps, and the same command goes on with it. The exit status is 0 in all of them and 1 after an error.
--status exits with 0 if the run is finished and with 3 if it is not.
"""


@click.command("train", cls=Command, epilog=EXAMPLES)
@click.option("--out", required=True, type=Path, metavar="FOLDER", help="The run's folder.")
@click.option(
    "--profile", type=click.Choice(["auto", "paper", "sample"]), help="Train this profile's baseline."
)
@click.option("--experiment", type=Path, metavar="FILE", help="Train what this experiment.json says.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a setting; may be repeated."
)
@data_dir_option
@device_option
@click.option("--max-hours", type=float, metavar="HOURS", help="Save and stop after this many hours.")
@click.option("--save-minutes", default=5.0, show_default=True, metavar="MINUTES", help="How often to save.")
@click.option(
    "--num-processes", default=1, show_default=True, metavar="N", help="Share each batch among N processes."
)
@click.option(
    "--num-workers", type=int, metavar="N", help="Processes that load images, for each process that trains."
)
@click.option(
    "--accumulation",
    default=1,
    show_default=True,
    metavar="N",
    help="Compute a batch in N pieces, to need less memory.",
)
@click.option(
    "--compile", type=click.Choice(["auto", "off", "default", "reduce-overhead"]), default="auto", show_default=True,
    help="How PyTorch compiles the networks; auto: on a GPU, for runs of 2,000 steps or more.",
)  # fmt: skip
@click.option("--status", is_flag=True, help="Train nothing; say how far the run has come.")
@click.pass_context
def train_command_line(
    context: click.Context,
    out: Path,
    profile: str | None,
    experiment: Path | None,
    changes: tuple[str, ...],
    status: bool,
    data_dir: str | None,
    **resources: Any,
) -> None:
    """Train a codec, or go on with a run.

    Say what to train by --profile or --experiment, and by --set; or give only --out, to go on with the run in that folder.
    """
    if profile and experiment:
        raise click.UsageError("Give --profile or --experiment, not both.")
    with stop_requests():  # those that come while PyTorch loads; `fit` looks for them
        import torch

        from taco_nb.training.loop import fit

        if status:
            context.exit(_status(out))
        exp = _experiment(out, profile, experiment, changes, data_dir)
        run = fit(exp, out, data_dir=data_dir, **resources)
        if run.finished and os.environ.get("RANK", "0") == "0":
            click.echo(f"Finished: {run.total_steps} steps, in {run.dir}.")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _experiment(
    out: Path, profile: str | None, file: Path | None, changes: tuple[str, ...], data_dir: str | None
) -> Experiment:
    """Return the experiment that the options ask for. Raises `SettingError`."""
    from taco_nb.training.loop import EXPERIMENT

    source = file or out / EXPERIMENT
    if profile:
        exp = baseline(profile, data_dir=data_dir)
    elif source.is_file():
        exp = Experiment.from_json(source.read_text(encoding="utf-8"))
    else:
        raise SettingError(
            f"There is no experiment in {source}. Say which: --profile or --experiment, and --set."
        )
    given = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise SettingError(f"--set takes NAME=VALUE, such as lmbda=0.0016, but was given {change!r}.")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value  # text needs no quotes
    return exp.replace(**given)


def _status(folder: Path) -> int:
    """Print how far the run in a folder has come, and return the exit status that says so."""
    from taco_nb.training.loop import EXPERIMENT, read_run, saved_steps

    if not (folder / EXPERIMENT).is_file():
        raise SettingError(f"There is no run in {folder}.")
    with suppress(CheckpointError):  # the weights are the last thing that is written
        if (run := read_run(folder)).finished:
            click.echo(f"{folder}: {run.steps} of {run.total_steps} steps, finished.")
            return 0
    saved = saved_steps(folder)
    how_far = f"{saved[0]} of {saved[1]} steps" if saved else "begun, and nothing is saved yet"
    click.echo(f"{folder}: {how_far}.")
    return UNFINISHED


if __name__ == "__main__":
    train_command_line(prog_name="python -m taco_nb.training")
