"""`taco-nb`: one command for all that is not a notebook. `taco-nb --help` lists what it does.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import click

from taco_nb.command import Command, data_dir_option
from taco_nb.evaluation.__main__ import evaluate_command_line
from taco_nb.training.__main__ import train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, evaluate and operate text-guided image codecs; the notebooks show what they are."""


main.add_command(train)
main.add_command(evaluate_command_line)


def _profile_option(function: Any) -> Any:
    choice = click.Choice(["paper", "sample"])
    return click.option("--profile", type=choice, help="All that this profile needs.")(function)


@main.command(cls=Command)
@click.argument("names", nargs=-1)
@_profile_option
@data_dir_option
@click.pass_context
def fetch(context: click.Context, names: tuple[str, ...], profile: str | None, data_dir: str | None) -> None:
    """Get data sets and pretrained networks, by NAME or all that a profile needs.

    Stopped or killed, the same command goes on where it was. `taco-nb status` lists the names.
    """
    if not names and not profile:
        raise click.UsageError("Say what to fetch: --profile paper, or names, which `taco-nb status` lists.")
    from taco_nb.tools.fetch import fetch_all

    context.exit(fetch_all(names, profile, data_dir))


@main.command(cls=Command)
@click.argument("names", nargs=-1)
@_profile_option
@data_dir_option
@click.pass_context
def status(context: click.Context, names: tuple[str, ...], profile: str | None, data_dir: str | None) -> None:
    """Say what data is here, what is missing, how large it is, and where it was looked for.

    The exit status is 1 if anything is missing, so that a job can ask before it starts.
    """
    from taco_nb.tools.fetch import show_status

    context.exit(show_status(names, profile, data_dir))


@main.command(cls=Command)
@click.argument("notebooks", nargs=-1, required=True, type=click.Path())
@click.option(
    "--lmbda", multiple=True, type=float, help="A lambda; repeatable. Default: the six of the companion."
)
@click.option("--out", default="runs", show_default=True, help="Where runs and executed notebooks are kept.")
@click.option(
    "-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter, as papermill's."
)
@click.option("--task", type=int, help="Only the lambda of this number, from 0: $SLURM_ARRAY_TASK_ID.")
@click.option("--list", "listing", is_flag=True, help="Run nothing; list the tasks and what of them is done.")
@click.pass_context
def sweep(context, notebooks, lmbda, out, parameters, task, listing) -> None:
    """Run NOTEBOOKS at every lambda, each lambda in a folder of its own. What is done is skipped."""
    from taco_nb.tools import sweep as tool

    given, lmbdas = {name: _value(text) for name, text in parameters}, lmbda or tool.LMBDAS
    if listing:
        for member in tool.members(notebooks, lmbdas, out, given):
            click.echo(f"task {lmbdas.index(member.lmbda)}: {member}: {'done' if member.done else 'to do'}")
        return
    failed = tool.sweep(notebooks, lmbdas, out, given, task)
    for member, reason in failed.items():
        click.echo(f"Failed: {member}: {reason}", err=True)
    context.exit(1 if failed else 0)


def _value(text: str) -> Any:
    """A number, True, False or None where it reads as one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@main.command(cls=Command)
@click.argument("notebooks", nargs=-1, required=True, type=click.Path())
def export(notebooks: tuple[str, ...]) -> None:
    """Write each executed notebook as one HTML file beside it, which opens without a network."""
    from taco_nb.tools.export import export_html

    for notebook in notebooks:
        click.echo(export_html(notebook))


@main.command(cls=Command)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--repeats", default=9, show_default=True, help="Measured runs of each codec, taken in turn.")
@click.option("--out", type=Path, default=Path("out/bench"), show_default=True, help="Folder for the tables.")
@click.option("--large", is_flag=True, help="Measure the memory of a 6000x4000 image too.")
def bench(device: str, repeats: int, out: Path, large: bool) -> None:
    """Measure speed and memory beside CompressAI's ELIC."""
    from taco_nb.tools.bench import bench as tool

    tool(device, repeats, out, large)


@main.command(cls=Command)
@click.argument("runs", nargs=-1, metavar="[NAME=RUN]...")
@click.option("--data", help="What the runs were trained on and under which terms, in words.")
@data_dir_option
def bundle(runs: tuple[str, ...], data: str | None, data_dir: str | None) -> None:
    """Make bundled codecs of finished runs, with their cards; without runs, print where the bundled ones stand on Kodak."""
    from taco_nb.tools import bundle as tool

    if not runs:
        tool.print_standing(data_dir)
    elif not data:
        raise click.UsageError("--data says what the runs were trained on and under which terms.")
    else:
        tool.bundle_named(runs, data, data_dir)


if __name__ == "__main__":
    sys.exit(main())
