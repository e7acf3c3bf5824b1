"""Training: `fit` turns an `Experiment` into a `Run`; on the command line, `python -m taco_nb.training`."""

from taco_nb.training.loop import Run, fit
from taco_nb.training.profiling import activation_memory, step_times

__all__ = ["Run", "activation_memory", "fit", "step_times"]
