"""Evaluation: `evaluate` measures a codec on data sets, by real files; on the command line, `taco-nb evaluate`.

The names below are imported when they are first used, so that the command line answers before PyTorch loads.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    name: "run"
    for name in (
        "QUALITIES",
        "check_caption",
        "evaluate",
        "evaluate_matched",
        "evaluate_peers",
        "means",
        "read_evaluation",
    )
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taco_nb.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"taco_nb.evaluation.{_HOMES[name]}"), name)
