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
from taco_nb.evaluation.__main__ import evaluate_command_line
from taco_nb.files import default_runs
from taco_nb.training.__main__ import train_command_line


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, measure and operate TACO codecs, which compress images with the help of a caption.

    The notebooks show what they are and how they work. `taco-nb COMMAND --help` explains a command.
    """


main.add_command(train_command_line)
main.add_command(evaluate_command_line)


def _names_options(function: Any) -> Any:
    """Add what says which data sets and networks are meant to a command that is given them."""
    choice, described = click.Choice(["paper", "sample"]), "Everything that this profile needs."
    function = click.option("--profile", type=choice, help=described)(data_dir_option(function))
    return click.argument("names", nargs=-1)(click.pass_context(function))


@main.command("fetch", cls=Command)
@_names_options
def fetch_command(context, names, profile, data_dir) -> None:
    """Download data sets and pretrained networks.

    Give NAMES, which `taco-nb status` lists, or a profile to get everything that it needs. If the command is stopped or
    killed, run it again: it goes on where it was.
    """
    if not names and not profile:
        raise click.UsageError("Give --profile paper, or names; `taco-nb status` lists them.")
    from taco_nb.tools.fetch import fetch_all

    context.exit(fetch_all(names, profile, data_dir))


@main.command("status", cls=Command)
@_names_options
def status_command(context, names, profile, data_dir) -> None:
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


def _value(text: str) -> Any:
    """Return the number, True, False or None that the text reads as in Python, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@main.command("sweep", cls=Command)
@click.argument("notebooks", nargs=-1, required=True, type=click.Path())
@click.option(
    "--lmbda", "lmbdas", multiple=True, metavar="NUMBERS", callback=_numbers,
    help="The lambda to run at, with commas between them. Default: 0.0004,0.0008,0.0016,0.004,0.009,0.015",
)  # fmt: skip
@click.option("--out", help="Folder for runs and executed notebooks; default: out/runs in the repository.")
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
    todo = tool.members(notebooks, lmbdas, out or default_runs(), given, task)
    if listing:
        for member in todo:
            click.echo(f"task {lmbdas.index(member.lmbda)}: {member}: {'done' if member.done else 'to do'}")
        return
    failed = tool.sweep(todo)
    for member, reason in failed.items():
        click.echo(f"Failed: {member}: {reason}", err=True)
    context.exit(1 if failed else 0)


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
@click.option("--gpu-check", is_flag=True, help="Check in eight minutes all that only a GPU can show.")
@click.pass_context
def bench_command(context, device: str, repeats: int, out: Path, large: bool, gpu_check: bool) -> None:
    """Measure speed and memory beside CompressAI's ELIC.

    ELIC is the same codec without the text. All networks have the paper's size and random weights. With --gpu-check, files,
    training, resuming and notebooks are checked on a GPU instead, and gpu_check.md says what was found; the exit status is
    1 if anything failed.
    """
    if gpu_check:
        from taco_nb.tools.gpu_check import gpu_check as check

        context.exit(0 if check(device, out) else 1)
    from taco_nb.tools.bench import bench

    bench(device, repeats, out, large)


@main.command("results", cls=Command)
@click.argument("names", nargs=-1)
@click.option("--check", is_flag=True, help="Measure only what takes seconds, and fail if a page is stale.")
@click.pass_context
def results_command(context: click.Context, names: tuple[str, ...], check: bool) -> None:
    """Measure the tables and figures of the READMEs, and fill them in.

    Without NAMES, everything that is out of date is measured. With --check, the exit status is 1 if a page shows something
    else than what is kept in data/results, or does not say of a table that its weights, data or code have changed since.
    """
    from taco_nb.tools import results as tool

    if not check:
        tool.fill(names)
        return
    wrong = tool.check()
    for sentence in wrong:
        click.echo(sentence, err=True)
    context.exit(1 if wrong else 0)


@main.command("bundle", cls=Command)
@click.argument("runs", nargs=-1, metavar="[NAME=RUN]...")
@click.option("--data", help="In words: what the runs were trained on, and under which terms.")
@click.option("--recipe", type=Path, metavar="FILE", help="Train what a recipe says, then bundle it.")
@click.option(
    "--out", type=Path, default="out/recipe", show_default=True, help="The folder of the recipe's runs."
)
@data_dir_option
def bundle_command(
    runs: tuple[str, ...], data: str | None, recipe: Path | None, out: Path, data_dir: str | None
) -> None:
    """Make bundled codecs of finished runs, or show how good they are.

    With NAME=RUN, such as demo-mine=runs/mine, the folder's codec gets a name that `load` knows, and a card with its history
    and measured results. With --recipe, runs are trained as the file says, and those that it names are bundled; RUNs then
    name the only ones to train. Without either, the bundled codecs are measured on Kodak beside JPEG, WebP and AVIF.
    """
    from taco_nb.tools import bundle as tool

    if recipe is not None:
        tool.bundle_recipe(recipe, out, runs, data_dir)
    elif not runs:
        tool.print_standing(data_dir)
    elif not data:
        raise click.UsageError("Say by --data what the runs were trained on, and under which terms.")
    else:
        tool.bundle_named(runs, data, data_dir)


def _asking_options(function: Any) -> Any:
    """Add the options of both commands that ask a model about a data set."""
    url = "A server that speaks OpenAI's API; default: OpenAI's own."
    confirm = "Send the requests, and pay. Without it, only say the price."
    function = click.option("--confirm", is_flag=True, help=confirm)(data_dir_option(function))
    function = click.option("--base-url", metavar="URL", help=url)(function)
    function = click.option("--limit", type=int, metavar="N", help="Only the first pictures.")(function)
    return click.argument("dataset")(function)


@main.command("caption", cls=Command)
@_asking_options
@click.option("--out", type=Path, required=True, help="The captions file to write, as data sets read it.")
@click.option(
    "--captioner", type=click.Choice(["openai", "batch", "coca"]), default="openai", show_default=True,
    help="OpenAI's chat API, its Batch API at half the price, or open_clip's CoCa on this machine.",
)  # fmt: skip
@click.option("--count", default=1, show_default=True, metavar="N", help="Captions of each picture.")
@click.option("--cache", type=Path, help="The file of answers; default: captions.sqlite beside --out.")
@click.option("--model", help="Default: the report's gpt-4o-2024-11-20, or CoCa fine-tuned on MS-COCO.")
@click.option("--no-wait", is_flag=True, help="Come back another time for the batches that are not finished.")
@click.option("--retry-failed", is_flag=True, help="Ask again for answers that are no captions.")
@click.option(
    "--retry-flagged", is_flag=True, help="Ask again for captions that speak of the asker or the task."
)
@click.pass_context
def caption_command(
    context, dataset, out, captioner, count, cache, model, base_url, no_wait, confirm, retry_failed, retry_flagged,
    limit, data_dir,
) -> None:  # fmt: skip
    """Write captions for the pictures of DATASET, a name such as coco-train or a folder.

    Every answer is kept, so the same command goes on where it was stopped, and nothing is paid for twice. The key of a
    paid service is read from the environment variable OPENAI_API_KEY. The exit status is 1 if captions are missing
    although --confirm was given.
    """
    from taco_nb.tools import captions as tool

    if (base_url and captioner == "coca") or (no_wait and captioner != "batch"):
        raise click.UsageError("--base-url is for the captioners openai and batch, and --no-wait for batch.")
    kinds = {"openai": tool.OpenAICaptioner, "batch": tool.OpenAIBatchCaptioner, "coca": tool.CoCaCaptioner}
    settings = {"model": model, "base_url": base_url, "wait": False if no_wait else None}
    given = {name: value for name, value in settings.items() if value is not None}
    pictures = tool.open_pictures(dataset, data_dir, limit)
    chosen = kinds[captioner](cache or out.parent / "captions.sqlite", **given)
    report = chosen.describe(pictures, out, count, confirm, retry_failed, retry_flagged)
    click.echo(report)
    context.exit(1 if confirm and not report.complete else 0)


@main.command("keywords", cls=Command)
@_asking_options
@click.option(
    "--captions", type=click.Choice(["published", "context"]), default="published", show_default=True,
    help="The kind of captions to ask about.",
)  # fmt: skip
def keywords_command(dataset, captions, limit, base_url, confirm, data_dir) -> None:
    """Have a language model choose the keywords of DATASET's captions, for keyword_sources="tfidf+llm".

    The answers go to chat_keywords.sqlite in the data folder; no caption is asked about, and paid for, twice. The key is
    read from the environment variable OPENAI_API_KEY.
    """
    from taco_nb.text.chat_keywords import chat_keywords
    from taco_nb.tools import captions as tool

    pictures = tool.open_pictures(dataset, data_dir, limit, captions)
    texts = [text for row in range(len(pictures)) for text in pictures.captions(row)]
    tool.ask_keywords(chat_keywords(data_dir), texts, confirm, base_url=base_url)


if __name__ == "__main__":
    sys.exit(main())
