"""Evaluation from the command line: `taco-nb evaluate`, or `accelerate launch -m taco_nb.evaluation` on every GPU."""

from __future__ import annotations

from pathlib import Path

import click

from taco_nb.command import Command, data_dir_option, device_option
from taco_nb.errors import SettingError


@click.command("evaluate", cls=Command)
@click.argument("codec")
@click.argument("sets", nargs=-1)
@click.option("--out", metavar="FOLDER", help="Where to keep the evaluation; a run's own folder by default.")
@data_dir_option
@click.option(
    "--captions", help="Which captions: published or context. By default what the codec was trained on."
)
@click.option(
    "--caption", default="first", show_default=True, help="Which of an image's captions: first, last or best."
)
@click.option("--limit", type=int, help="Measure only this many images of each set.")
@click.option("--batch-size", default=16, show_default=True, help="Crops that are coded together.")
@click.option("--patch-size", default=256, show_default=True, help="Side of FID's patches on whole images.")
@click.option(
    "--mode",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="fast computes g_a and g_s in bfloat16 where that is quicker.",
)
@device_option
@click.option("--text-encoder", help="Use this text tower in place of the one that the weights name.")
def evaluate_command_line(
    codec, sets, out, data_dir, captions, caption, limit, batch_size, patch_size, mode, device, text_encoder
) -> None:
    """Measure a codec on data sets, with real files.

    CODEC is a run's folder, a checkpoint file or a bundled codec's name. Without SETS, it is measured on those of the paper:
    kodak, clic and coco.
    """
    from accelerate import PartialState

    from taco_nb.codec import load
    from taco_nb.data import datasets
    from taco_nb.evaluation.records import means
    from taco_nb.evaluation.run import evaluate
    from taco_nb.processes import check_device, launched_processes

    check_device(device)
    launched_processes()
    process = PartialState(cpu=device == "cpu")
    loaded = load(codec, data_dir=data_dir, mode=mode, device=str(process.device), text_encoder=text_encoder)
    out = out or (codec if Path(codec).is_dir() else None)
    if out is None:
        raise SettingError(f"{codec} is no folder to keep the evaluation in: say where, by --out.")
    captions = captions or loaded.about.get("experiment", {}).get("captions", "published")
    found = datasets(*(sets or ("kodak", "clic", "coco")), data_dir=data_dir, limit=limit, captions=captions)
    results = evaluate(loaded, found, out, caption=caption, batch_size=batch_size, patch_size=patch_size)
    if process.is_main_process:
        click.echo(means(results).to_string(index=False))


if __name__ == "__main__":
    evaluate_command_line(prog_name="python -m taco_nb.evaluation")
