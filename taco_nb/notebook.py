"""The first cell of every notebook: parameters checked before anything is computed."""

from __future__ import annotations

import difflib
import time
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from taco_nb.errors import DataError, SettingError
from taco_nb.experiment import Experiment, baseline, choose_profile
from taco_nb.processes import check_device

_IPYTHON = {"In", "Out", "get_ipython", "exit", "quit", "open"}
_PASSED = "_parameters_passed"
_OF_SOME = ("checkpoint", "n_pairs")
"""Parameters that a notebook has only if it says so."""
_TYPES = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
}


@dataclass(frozen=True)
class Parameters:
    """What a notebook was asked to do. None leaves a setting to the profile."""

    profile: str = "auto"
    data_dir: str | None = None
    out_dir: str = "runs"
    checkpoint: str | None = None
    lmbda: float | None = None
    epochs: int | None = None
    init: str | None = None
    text_encoder: str | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    device: str = "auto"
    precision: str | None = None
    eval_limit: int | None = None
    caption: str = "first"
    n_pairs: int | None = None
    max_hours: float | None = None
    num_processes: int = 1
    num_workers: int | None = None
    accumulation: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """The notebook's own parameters: fields of the `Experiment` that it changes."""
    started_in: Path = field(default_factory=Path.cwd)
    """What a relative `out_dir` is relative to."""
    began: float = field(default_factory=time.monotonic, compare=False)
    """When `max_hours` began."""

    @property
    def runs(self) -> Path:
        """Where runs are kept, absolute, so that no later change of directory moves it."""
        return (self.started_in / Path(self.out_dir).expanduser()).resolve()

    @property
    def peers(self) -> Path:
        """Where the other codecs' curves are kept. A sweep gives each lambda a folder below one, which all of them share."""
        return (self.runs.parent if self.runs.name.startswith("lmbda-") else self.runs) / "peers"

    @property
    def trains(self) -> bool:
        """Whether to train: a checkpoint that is given is only validated, unless `epochs` is given too."""
        return self.checkpoint is None or self.epochs is not None

    @property
    def torch_device(self) -> str:
        return ("cuda" if _has_cuda() else "cpu") if self.device == "auto" else self.device

    def experiment(self) -> Experiment:
        """The profile's baseline with the settings that were given. Raises `SettingError` for one out of range."""
        names = (
            "init",
            "text_encoder",
            "lmbda",
            "epochs",
            "batch_size",
            "learning_rate",
            "seed",
            "precision",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        exp = baseline(self.profile, data_dir=self.data_dir, **given)
        if self.text_encoder is not None:
            from taco_nb.text.clip import text_width

            exp = exp.replace(sizes=exp.sizes | {"text_dim": text_width(self.text_encoder)})
        return exp

    def datasets(self, captions: str = "published") -> list:
        """The evaluation sets of the profile that are on this machine; those that are not are named in a line each."""
        from taco_nb.data import datasets

        if self.profile == "sample":
            return datasets("sample", data_dir=self.data_dir, limit=self.eval_limit, captions=captions)
        found = []
        for name in ("kodak", "clic", "coco"):
            try:
                found += datasets(name, data_dir=self.data_dir, limit=self.eval_limit, captions=captions)
            except DataError as error:
                print(f"Not evaluated: {error}")
        if not found:
            raise DataError("None of the evaluation sets kodak, clic and coco is in the data folder.")
        return found


def check_parameters(namespace: dict[str, Any], *own: str) -> Parameters:
    """The notebook's parameters, from its `globals()`, with the profile chosen and a sentence printed that says why.

    `own` names what is a parameter of this notebook alone: fields of an `Experiment`, which come as `settings`, or
    "checkpoint" or "n_pairs".

    Raises `SettingError`, with one sentence, for a name that is not a parameter (papermill would pass it silently), for
    a value of the wrong type, and for a value out of range. A name that is refused is deleted, so that the corrected cell
    can be run again. After a check has passed, further names are the notebook's own, and running it again ignores them.
    """
    shared = {field.name: field.type for field in fields(Parameters)}
    known = {
        name: shared[name] for name in shared if name not in ("settings", "started_in", "began", *_OF_SOME)
    }
    known |= {name: shared.get(name) for name in own}
    given = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _IPYTHON and not isinstance(value, (types.ModuleType, type))
        and not callable(value) and (name in known or not namespace.get(_PASSED))
    }  # fmt: skip
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"The parameters are {', '.join(known)}."
            del namespace[name]
            raise SettingError(f"This notebook has no parameter {name!r}. {hint}")
        if known[name] is not None:  # the types of an experiment's fields it checks itself
            _check_type(name, value, known[name])
    settings = {name: given.pop(name) for name in own if name in given and name not in shared}
    given["settings"] = {name: value for name, value in settings.items() if value is not None}
    parameters = Parameters(**given)
    profile, sentence = choose_profile(parameters.profile, parameters.data_dir)
    least_values = {
        "eval_limit": 1, "n_pairs": 1, "max_hours": 0, "num_processes": 1, "num_workers": 0, "accumulation": 1,
    }  # fmt: skip
    for name, least in least_values.items():
        value = getattr(parameters, name)
        if value is not None and not value >= least:  # so that NaN is refused too
            raise SettingError(f"{name} must be {least} or above, but is {value!r}.")
    from taco_nb.evaluation import check_caption

    check_caption(parameters.caption)
    check_device(parameters.device, parameters.num_processes)
    if parameters.runs.exists() and not parameters.runs.is_dir():
        raise SettingError(
            f"out_dir must be a folder, or the name of one to make, but {parameters.out_dir!r} is a file."
        )
    parameters = Parameters(**{**given, "profile": profile})
    parameters.experiment().replace(**parameters.settings)
    _embed_plotly()
    namespace[_PASSED] = True
    print(sentence)
    return parameters


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _embed_plotly() -> None:
    """Let figures carry plotly's script with them, so that an executed notebook shows them without a network."""
    import plotly.io

    plotly.io.renderers.default = "plotly_mimetype+notebook"


def _check_type(name: str, value: Any, wanted: str) -> None:
    kind, _, optional = wanted.partition(" | ")
    types_, words = _TYPES[kind]
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, types_):
        raise SettingError(f"{name} must be {words}{' or None' if optional else ''}, but is {value!r}.")
