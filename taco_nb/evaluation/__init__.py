"""Evaluation: `evaluate` measures a codec on data sets, by real files; on the command line, `taco-nb evaluate`.

    run.py       evaluate: what is measured, by which processes, and what is said of it
    measure.py   some images through the codec and back, and their figures
    records.py   what is kept on disk, and how tables are written, read and averaged
    protocol.py  labels, commands that repeat an evaluation, and why figures may not be judged
    peers.py     JPEG, WebP, AVIF

The names below are imported when they are first used, so that the command line answers before PyTorch loads.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "QUALITIES": "peers",
    "check_caption": "run",
    "evaluate": "run",
    "evaluate_matched": "peers",
    "evaluate_peers": "peers",
    "means": "records",
    "read_evaluation": "records",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taco_nb.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"taco_nb.evaluation.{_HOMES[name]}"), name)
