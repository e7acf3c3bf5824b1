"""Training: `fit` turns an `Experiment` into a `Run`; on the command line, `taco-nb train` does.

The names below are imported when they are first used, so that the command line can listen for signals before PyTorch
loads.
"""

from importlib import import_module
from typing import Any

_HOMES = {"Run": "loop", "activation_memory": "profiling", "fit": "loop", "step_times": "profiling"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taco_nb.training' has no attribute {name!r}")
    return getattr(import_module(f"taco_nb.training.{_HOMES[name]}"), name)
