"""Training from the command line: `python -m taco_nb.training`, or `accelerate launch -m taco_nb.training`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from taco_nb.errors import CheckpointError, SettingError, TacoError
from taco_nb.experiment import Experiment, baseline
from taco_nb.training.signals import on_warning

UNFINISHED = 3
"""What `--status` exits with while there is something left to do."""

EXAMPLES = """examples:
  python -m taco_nb.training --profile sample --set epochs=2 --out runs/try
  accelerate launch --num_processes 4 -m taco_nb.training --profile paper --set lmbda=0.0016 --out runs/paper-0.0016
  accelerate launch --num_processes 2 -m taco_nb.training --out runs/paper-0.0016     (goes on with it)
  python -m taco_nb.training --out runs/paper-0.0016 --status

A run ends when it is finished, when --max-hours are over, or at SIGTERM or SIGUSR1; in the last two cases it is saved between
two steps, and the same command goes on with it. The exit code is 0 in all of them, 1 after an error. --status exits with 0
if the run is finished and with 3 if it is not.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m taco_nb.training",
        description="Train a TACO as an experiment says, into a folder, or go on with the run that is there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the run's folder")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--profile", choices=("auto", "paper", "sample"), help="the baseline of this profile")
    which.add_argument("--experiment", type=Path, metavar="FILE", help="an experiment.json; default: the folder's own")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
                   help="change a setting of the experiment, such as attention=linformer; repeatable")  # fmt: skip
    p.add_argument("--data-dir", metavar="FOLDER", help="the data folder; default: the repository's data/")
    p.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one"
    )
    p.add_argument("--max-hours", type=float, metavar="HOURS", help="stop cleanly after so long")
    p.add_argument("--save-minutes", type=float, default=5.0, metavar="MINUTES", help="save every so often (default 5)")
    p.add_argument("--num-workers", type=int, metavar="N", help="processes that load images, for each that trains")
    p.add_argument("--accumulation", type=int, default=1, metavar="N",
                   help="cut each process's share of a batch into N pieces, which need less memory (default 1)")  # fmt: skip
    p.add_argument("--status", action="store_true", help="train nothing; say how far the run has come")
    return p


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    with on_warning(lambda _: None):  # what comes while PyTorch loads, `fit` acts on
        return _main(args)


def _main(args: argparse.Namespace) -> int:
    import torch

    from taco_nb.training.loop import fit

    try:
        if args.status:
            return _status(args.out)
        run = fit(
            _experiment(args), args.out, data_dir=args.data_dir, device=args.device, max_hours=args.max_hours,
            save_minutes=args.save_minutes, num_workers=args.num_workers, accumulation=args.accumulation,
        )  # fmt: skip
    except TacoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    if run.finished and os.environ.get("RANK", "0") == "0":
        print(f"Finished: {run.total_steps} steps, in {run.dir}.")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _experiment(args: argparse.Namespace) -> Experiment:
    """What the arguments ask for. Raises `SettingError`."""
    from taco_nb.training.loop import EXPERIMENT

    source = args.experiment or args.out / EXPERIMENT
    if args.profile:
        exp = baseline(args.profile, data_dir=args.data_dir)
    elif source.is_file():
        exp = Experiment.from_json(source.read_text(encoding="utf-8"))
    else:
        raise SettingError(f"There is no experiment in {source}. Say which: --profile or --experiment, and --set.")
    changes = {}
    for change in args.changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise SettingError(f"--set takes NAME=VALUE, such as lmbda=0.0016, but was given {change!r}.")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value  # text needs no quotes
    return exp.replace(**changes)


def _status(folder: Path) -> int:
    from taco_nb.training.loop import EXPERIMENT, read_run, saved_steps

    if not (folder / EXPERIMENT).is_file():
        raise SettingError(f"There is no run in {folder}.")
    with suppress(CheckpointError):  # its weights come last
        if (run := read_run(folder)).finished:
            print(f"{folder}: {run.steps} of {run.total_steps} steps, finished.")
            return 0
    saved = saved_steps(folder)
    print(f"{folder}: {saved[0]} of {saved[1]} steps." if saved else f"{folder}: begun, and nothing is saved yet.")
    return UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
