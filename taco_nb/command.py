"""All commands of the package are built on `Command`: an error of ours becomes one line on stderr and exit status 1."""

from __future__ import annotations

from typing import Any

import click

from taco_nb.errors import TacoError


class Command(click.Command):
    """A click command that prints a `TacoError` as one line, which says what to do, in place of a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except TacoError as error:
            raise click.ClickException(str(error)) from error


def device_option(function: Any) -> Any:
    """Add `--device` to a command."""
    return click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where to compute; auto takes a GPU if there is one.",
    )(function)  # fmt: skip


def data_dir_option(function: Any) -> Any:
    """Add `--data-dir` to a command."""
    return click.option(
        "--data-dir", metavar="FOLDER", help="The data folder; default: TACO_NB_DATA, else data/."
    )(function)
