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


device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where to compute; auto takes a GPU if there is one.",
)  # fmt: skip
data_dir_option = click.option(
    "--data-dir", metavar="FOLDER", help="The data folder; default: TACO_NB_DATA, else data/."
)
"""Decorators that add an option which several commands have."""
