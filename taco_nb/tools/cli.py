"""`taco-nb` is one command for all that is not a notebook. `taco-nb --help` lists what it does.

The commands import what is heavy only when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import click

from taco_nb.command import Command, data_dir_option, device_option
from taco_nb.evaluation.__main__ import evaluate
from taco_nb.training.__main__ import train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, measure and operate TACO codecs, which compress images with the help of a caption.

    The notebooks show what they are and how they work. `taco-nb COMMAND --help` explains a command.
    """


main.add_command(train)
main.add_command(evaluate)


def _profile_option(function: Any) -> Any:
    """Add `--profile` to a command."""
    choice = click.Choice(["paper", "sample"])
    return click.option("--profile", type=choice, help="Everything that this profile needs.")(function)


@main.command("fetch", cls=Command)
@click.argument("names", nargs=-1)
@_profile_option
@data_dir_option
@click.pass_context
def fetch_command(
    context: click.Context, names: tuple[str, ...], profile: str | None, data_dir: str | None
) -> None:
    """Download data sets and pretrained networks.

    Give NAMES, which `taco-nb status` lists, or a profile to get everything that it needs. If the command is stopped or
    killed, run it again: it goes on where it was.
    """
    if not names and not profile:
        raise click.UsageError("Give --profile paper, or names; `taco-nb status` lists them.")
    from taco_nb.tools.fetch import fetch_all

    context.exit(fetch_all(names, profile, data_dir))


@main.command("status", cls=Command)
@click.argument("names", nargs=-1)
@_profile_option
@data_dir_option
@click.pass_context
def status_command(
    context: click.Context, names: tuple[str, ...], profile: str | None, data_dir: str | None
) -> None:
    """Show which data and networks are here and which are missing.

    Sizes and folders are shown too, and nothing is downloaded. Without NAMES or a profile, everything is listed. The exit
    status is 1 if anything is missing, so that a job can check before it starts.
    """
    from taco_nb.tools.fetch import show_status

    context.exit(show_status(names, profile, data_dir))


def _numbers(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[float, ...]:
    """Read numbers that are given with commas between them, or in several options, or both."""
    try:
        return tuple(float(number) for text in texts for number in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{error}. Give numbers, such as 0.0004,0.0016.") from None


@main.command("sweep", cls=Command)
@click.argument("notebooks", nargs=-1, required=True, type=click.Path())
@click.option(
    "--lmbda", "lmbdas", multiple=True, metavar="NUMBERS", callback=_numbers,
    help="The lambda to run at, with commas between them. Default: 0.0004,0.0008,0.0016,0.004,0.009,0.015",
)  # fmt: skip
@click.option("--out", default="runs", show_default=True, help="Folder for runs and executed notebooks.")
@click.option(
    "-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a notebook's parameter."
)
@click.option("--task", type=int, metavar="N", help="Run one lambda only, by its number from 0.")
@click.option("--list", "listing", is_flag=True, help="Run nothing; list what is done and what is to do.")
@click.pass_context
def sweep_command(context, notebooks, lmbdas, out, parameters, task, listing) -> None:
    """Run notebooks at several lambda.

    Each lambda has a folder of its own, in which the NOTEBOOKS run one after the other. What is done already is skipped, and
    if a notebook fails, the others go on. `-p max_hours 10` stops after ten hours; the same command then goes on. In a Slurm
    array, `--task $SLURM_ARRAY_TASK_ID` makes each job run one lambda. The exit status is 1 if anything failed.
    """
    from taco_nb.tools import sweep as tool

    lmbdas = lmbdas or tool.LMBDAS
    given = {name: _value(text) for name, text in parameters}
    todo = tool.members(notebooks, lmbdas, out, given, task)
    if listing:
        for member in todo:
            click.echo(f"task {lmbdas.index(member.lmbda)}: {member}: {'done' if member.done else 'to do'}")
        return
    failed = tool.sweep(todo)
    for member, reason in failed.items():
        click.echo(f"Failed: {member}: {reason}", err=True)
    context.exit(1 if failed else 0)


def _value(text: str) -> Any:
    """Return the number, True, False or None that the text reads as in Python, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@main.command("export", cls=Command)
@click.argument("notebooks", nargs=-1, required=True, type=click.Path())
def export_command(notebooks: tuple[str, ...]) -> None:
    """Turn executed notebooks into web pages.

    Beside each of the NOTEBOOKS an HTML file is written, which is complete in itself: any browser opens it, without a
    network and without Jupyter.
    """
    from taco_nb.tools.export import export_html

    for notebook in notebooks:
        click.echo(export_html(notebook))


@main.command("bench", cls=Command)
@device_option
@click.option(
    "--repeats", type=click.IntRange(1), default=9, show_default=True, help="How often each codec is timed."
)
@click.option("--out", type=Path, default=Path("out/bench"), show_default=True, help="Folder for the tables.")
@click.option("--large", is_flag=True, help="Measure memory on a 6000x4000 image too.")
def bench_command(device: str, repeats: int, out: Path, large: bool) -> None:
    """Measure speed and memory beside CompressAI's ELIC.

    ELIC is the same codec without the text. All networks have the paper's size and random weights.
    """
    from taco_nb.tools.bench import bench

    bench(device, repeats, out, large)


@main.command("bundle", cls=Command)
@click.argument("runs", nargs=-1, metavar="[NAME=RUN]...")
@click.option("--data", help="In words: what the runs were trained on, and under which terms.")
@data_dir_option
def bundle_command(runs: tuple[str, ...], data: str | None, data_dir: str | None) -> None:
    """Make bundled codecs of finished runs, or show how good they are.

    With NAME=RUN, such as demo-mine=runs/mine, the folder's codec gets a name that `load` knows, and a card with its history
    and measured results. Without runs, the bundled codecs are measured on Kodak beside JPEG, WebP and AVIF.
    """
    from taco_nb.tools import bundle as tool

    if not runs:
        tool.print_standing(data_dir)
    elif not data:
        raise click.UsageError("Say by --data what the runs were trained on, and under which terms.")
    else:
        tool.bundle_named(runs, data, data_dir)


if __name__ == "__main__":
    sys.exit(main())
