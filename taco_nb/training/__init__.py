"""Training: `fit` turns an `Experiment` into a `Run`."""

from taco_nb.training.loop import Run, fit

__all__ = ["Run", "fit"]
