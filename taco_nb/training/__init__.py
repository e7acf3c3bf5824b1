"""Training: `fit` turns an `Experiment` into a `Run`; on the command line, `taco-nb train` does.

The names below are imported when they are first used, so that the command line can listen for signals before PyTorch
loads.
"""

from taco_nb.lazy import lazy_names

_HOMES = {"Run": "loop", "activation_memory": "profiling", "fit": "loop", "step_times": "profiling"}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
