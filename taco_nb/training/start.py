"""What a run starts from: its initial weights, and a digest of them and of the training data."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taco_nb import checkpoint
from taco_nb.experiment import Experiment
from taco_nb.files import bundled, sha256
from taco_nb.model import TACO

if TYPE_CHECKING:
    from taco_nb.data import TrainPairs

FAMILY = "demo"
"""With what the names of the bundled codecs begin; the one that has no more to its name is the baseline."""


def initial_weights(exp: Experiment, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The file of the weights that `exp.init` means, None for random ones. Raises `CheckpointError` if there is none.

    Of the bundled codecs as wide as `exp`'s "demo" means those that were trained with its ablation, or else with none, and of
    these the one at the nearest lambda: what is compared after a few more steps is then what has been trained as long before.
    """
    if not exp.init:
        return None
    if exp.init != FAMILY:
        return checkpoint.find(exp.init, data_dir)
    siblings = {name: there for name, there in family(data_dir).items() if _widths(there) == _widths(exp)}
    alike = [name for name, there in siblings.items() if there.ablations == exp.ablations]
    alike = alike or [name for name, there in siblings.items() if not there.ablations]
    nearest = min(alike, key=lambda name: abs(math.log(siblings[name].lmbda / exp.lmbda)), default=FAMILY)
    return checkpoint.find(nearest, data_dir)


def _widths(exp: Experiment) -> tuple[Any, ...]:
    """The sizes that most weights take their shapes from. The width of the text is none of them: few weights read it."""
    config = exp.model_config()
    return config.N, config.M, config.groups, config.context_widths


def family(data_dir: str | os.PathLike | None = None) -> dict[str, Experiment]:
    """The bundled codecs by name, and how each was trained, as the cards say. Raises `CheckpointError` for a bad card."""
    return {
        path.stem: Experiment().replace(**checkpoint.card_of(path)["experiment"])
        for path in sorted(bundled("checkpoints", data_dir).glob(f"{FAMILY}*.safetensors"))
    }


def initial_net(exp: Experiment, data_dir: str | os.PathLike | None = None, say: bool = True) -> TACO:
    """The network that `exp` starts from: random weights drawn from its seed, those that fit replaced by `exp.init`'s.

    Weights that find no partner are named in a line, if `say`. Raises `CheckpointError` if most do not.
    """
    torch.manual_seed(exp.seed)
    net = TACO(exp.model_config())
    if path := initial_weights(exp, data_dir):
        new, unused = checkpoint.load_fitting(net, path)
        if say and path.stem != exp.init and exp.init == FAMILY:
            print(
                f"init={exp.init!r}: starts from {path.stem}, of the bundled codecs the one trained most alike."
            )
        for names, fate in ((new, "start from random weights"), (unused, "were not used")):
            if names and say:
                print(f"init={exp.init!r}: {len(names)} weights {fate}: {', '.join(names)}")
    return net


def training_digest(exp: Experiment, pairs: TrainPairs, data_dir: str | os.PathLike | None) -> str:
    """A digest of what a run is trained on: the images' names, their captions, and the initial weights."""
    path = initial_weights(exp, data_dir)
    digest = hashlib.sha256(sha256(path).encode() if path else b"")
    for i, name in enumerate(pairs.dataset.names):
        digest.update(json.dumps([name, pairs.dataset.captions(i)]).encode())
    return digest.hexdigest()
