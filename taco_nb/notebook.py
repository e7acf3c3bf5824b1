"""The first cell of every notebook: parameters are checked before anything is computed."""

from __future__ import annotations

import ast
import time
import types
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import plotly.io
from pydantic import Field, StrictFloat, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from taco_nb.errors import DataError, SettingError, StorageError, check_known
from taco_nb.experiment import Experiment, baseline, choose_profile
from taco_nb.files import check_writable, default_runs, short_path
from taco_nb.processes import check_device
from taco_nb.settings import STRICT, CaptionChoice, Count, Device, Positive, Precision, Seed, plain_errors

if TYPE_CHECKING:
    from taco_nb.data import CaptionedImages

_PASSED = "_parameters_passed"
"""The name that marks a notebook whose parameters have passed the check."""
_OF_SOME = ("checkpoint", "n_pairs")
"""Parameters that a notebook has only if it says so."""
_INTERNAL = ("settings", "started_in", "began")
"""Fields of `Parameters` that are no parameters of a notebook."""


@plain_errors
@dataclass(frozen=True, config=STRICT)
class Parameters:
    """These say what a notebook was asked to do. None leaves a setting to the profile.

    Raises `SettingError`, with one sentence, for a value of the wrong type or out of range.
    """

    profile: Literal["auto", "paper", "sample"] = "auto"
    data_dir: StrictStr | None = None
    out_dir: StrictStr | None = None
    checkpoint: StrictStr | None = None
    lmbda: Positive | None = None
    epochs: Count | None = None
    init: StrictStr | None = None
    text_encoder: StrictStr | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    seed: Seed | None = None
    device: Device = "auto"
    precision: Precision | None = None
    eval_limit: Count | None = None
    caption: CaptionChoice = "first"
    n_pairs: Count | None = None
    max_hours: Annotated[StrictFloat, Field(ge=0)] | None = None
    num_processes: Count = 1
    num_workers: Annotated[StrictInt, Field(ge=0)] | None = None
    accumulation: Count = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """The notebook's own parameters: settings of the `Experiment` that it changes."""
    started_in: Path = field(default_factory=Path.cwd)
    """The folder that a relative `out_dir` is relative to."""
    began: float = field(default_factory=time.monotonic, compare=False)
    """The time at which `max_hours` began."""

    @property
    def runs(self) -> Path:
        """The folder of the runs. It is absolute, so that no later change of directory moves it.

        Without an `out_dir` it is the same for whoever starts the notebook: `taco_nb.files.default_runs`.
        """
        if self.out_dir is None:
            return default_runs()
        return (self.started_in / Path(self.out_dir).expanduser()).resolve()

    @property
    def peers(self) -> Path:
        """The folder of the other codecs' curves. In a sweep, all lambdas share one, which lies beside theirs."""
        return (self.runs.parent if self.runs.name.startswith("lmbda-") else self.runs) / "peers"

    @property
    def trains(self) -> bool:
        """True if the notebook trains. With a checkpoint it only evaluates that, unless `epochs` is given too."""
        return self.checkpoint is None or self.epochs is not None

    @property
    def torch_device(self) -> str:
        """ "cuda" or "cpu", where `device` may say "auto"."""
        import torch

        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def experiment(self) -> Experiment:
        """Return the profile's baseline with the settings that were given."""
        settings = {setting.name for setting in fields(Experiment)} - {"profile"}
        given = {name: v for name, v in vars(self).items() if name in settings and v is not None}
        exp = baseline(self.profile, data_dir=self.data_dir, **given)
        if self.text_encoder is not None:
            from taco_nb.text.clip import text_width

            exp = exp.replace(sizes=replace(exp.sizes, text_dim=text_width(self.text_encoder)))
        return exp

    def datasets(self, captions: str = "published", whole: bool = False) -> list[CaptionedImages]:
        """Return the profile's evaluation sets that are on this machine, and name the others in a printed line each.

        In `sample` these are the centre crops of Kodak's 24 pictures, enough for an interval and small enough for a CPU;
        with `whole`, its first three pictures uncropped. Raises `DataError` if there is none.
        """
        from taco_nb.data import datasets

        if self.profile == "sample":
            name, most = ("kodak", 3) if whole else ("kodak-256", 24)
            limit = min(most, self.eval_limit or most)
            return datasets(name, data_dir=self.data_dir, limit=limit, captions=captions)
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
    """Return a notebook's parameters from its `globals()`, and print which profile was chosen, and why.

    `own` names what is a parameter of this notebook alone: settings of an `Experiment`, which come back as `settings`, or
    "checkpoint" or "n_pairs".

    Raises `SettingError`, with one sentence, for a name that is no parameter (papermill would pass it silently), for a
    value of the wrong type or out of range, and for an `out_dir` that cannot be written to. A name that is refused is
    deleted, so that the corrected cell can be run again. Once a check has passed, further names are the notebook's own,
    and a second check ignores them.
    """
    shared = [parameter.name for parameter in fields(Parameters)]
    known = [name for name in shared if name not in (*_INTERNAL, *_OF_SOME)]
    known += [name for name in own if name not in known]
    given = {}
    for name in _names_given(namespace, known):
        value = namespace[name]
        if name.startswith("_") or callable(value) or isinstance(value, types.ModuleType):
            continue
        if name not in known and _PASSED in namespace:
            continue
        try:
            check_known([name], known, "This notebook has no parameter")
        except SettingError:
            del namespace[name]
            raise
        given[name] = value
    settings = {name: given.pop(name) for name in own if name in given and name not in shared}
    settings = {name: value for name, value in settings.items() if value is not None}
    parameters = Parameters(**given, settings=settings)
    profile, sentence = choose_profile(parameters.profile, parameters.data_dir)
    parameters = replace(parameters, profile=profile)
    parameters.experiment().replace(**settings)
    check_device(parameters.device, parameters.num_processes)
    try:
        check_writable(parameters.runs)
    except StorageError as error:
        raise SettingError(
            f"out_dir must be a folder that can be written to, but {parameters.out_dir or short_path(parameters.runs)!r} is "
            f"not: {error.__cause__.strerror}."
        ) from None
    # Figures carry plotly's script with them, so that an executed notebook shows them without a network.
    plotly.io.renderers.default = "plotly_mimetype+notebook"
    namespace[_PASSED] = True
    print(sentence)
    return parameters


def _names_given(namespace: dict[str, Any], known: Iterable[str]) -> list[str]:
    """Return the names to check: those that the cell with the parameters, or papermill's cell below it, has set.

    IPython keeps the cells that have run in `In`. The cell with the parameters is one that sets a known parameter, and
    papermill's begins with a comment. What a startup file of the user's has set is in neither, and is left alone. A
    namespace without such a history, as of a program, is checked whole.
    """
    names: set[str] = set()
    for source in namespace.get("In", ()):
        with suppress(SyntaxError):
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            stored = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
            if source.startswith("# Parameters\n") or not stored.isdisjoint(known):
                names |= stored
    return [name for name in namespace if not names or name in names]
