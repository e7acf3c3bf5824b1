"""Weights are written and read here: the project's own safetensors files, and the checkpoints of TACO's authors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write, bundled, sha256
from taco_nb.model import TACO, ModelConfig
from taco_nb.model.taco import CODER_TABLES, modern_key

WEIGHTS = "weights.safetensors"
SHELVES = ("checkpoints", "shapes")
"""The folders of bundled codecs: those for photographs, and those for the shapes. No name is on both."""
_FORMAT = "taco_nb weights 2"
INTEGERS = "integer_model"
"""The key in a safetensors file under which `IntegerModel.state` is kept, as bytes."""
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS = [
    (_scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 names it in a pickle,
    (_scalar, "numpy._core.multiarray.scalar"),  # and as NumPy 2 does
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]
"""Besides tensors, these types may occur in a checkpoint: training loops save numbers of NumPy, such as the best PSNR so far.
Unpickling them runs no code."""


def save_weights(
    path: str | os.PathLike, net: TACO, about: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write the network's weights and what is known `about` them, atomically.

    `dtype` is that of the kernels; biases, norms and the small model of z stay in float32. The Gaussian model's coder
    tables follow from its fixed table of scales alone and are left out; those of z, which follow from the weights, are
    kept. With the weights goes the integer form by which files decode on every machine (`IntegerModel.state`): that of
    the weights as they are written, rounded to `dtype`.
    """
    net.tables()
    state = {}
    for key, value in net.state_dict().items():
        if key in {f"gaussian_conditional.{table}" for table in CODER_TABLES}:
            continue
        is_kernel = value.ndim > 1 and not key.startswith("entropy_bottleneck")
        # a copy, since safetensors refuses tensors that share memory
        kind = dtype if is_kernel else value.dtype
        state[key] = value.cpu().to(kind).clone(memory_format=torch.contiguous_format)
    if dtype != torch.float32:
        written = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        net = TACO(net.config)
        net.load_state_dict(written)
    state[INTEGERS] = torch.frombuffer(bytearray(net.integer_model().state()), dtype=torch.uint8)
    metadata = {"format": _FORMAT, "config": json.dumps(asdict(net.config)), "about": json.dumps(about)}
    with atomic_write(path) as file:
        file.write(save(state, metadata))


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict and what is known about it, from `.safetensors` or from a reference's `.pth.tar`.

    Pickles are read with `weights_only`, so a checkpoint from a stranger cannot run code. Names are as the file has them;
    `modern_key` gives today's. Raises `CheckpointError`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files torch and pickle raise nearly anything
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")[0].split(". ")[0]
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely: {reason}.") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if (
        not state
        or not isinstance(state, dict)
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        raise CheckpointError(f"{path} holds no state dict, neither by itself nor under 'state_dict'.")
    numbers = {key: content.get(key) for key in ("epoch", "best_psnr")}
    facts = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
    return state, {"name": path.name, **facts}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        about = json.loads(metadata.get("about", "{}"))
        about["config"] = json.loads(metadata.get("config", "null"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}.") from None
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, about


def load_net(path: str | os.PathLike) -> tuple[TACO, dict[str, Any]]:
    """Return the network in a checkpoint, in evaluation mode, and what is known about it. Raises `CheckpointError`."""
    state, about = read_weights(path)
    try:
        config, integers = about.pop("config", None), state.pop(INTEGERS, None)
        if config:
            net = TACO(ModelConfig(**config))
            net.load_state_dict(state)
        else:
            net = TACO.from_state_dict(state)
        net.float().tables()  # whatever the program's default precision is
        if integers is not None:
            net.keep_integer_model(integers.byte().numpy().tobytes())
    except (CheckpointError, SettingError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return net.eval(), about


def load_fitting(net: TACO, path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Copy those weights in `path` into `net` that fit it by name and shape.

    Returns the names of the weights of `net` that found no partner in the file, and of those in the file that found none
    in `net`. Raises `CheckpointError` if fewer than half of the net's parameters fit: that is another model.
    """
    state = {modern_key(key): value for key, value in read_weights(path)[0].items() if key != INTEGERS}
    own = dict(net.named_parameters())
    fitting = {key for key, value in own.items() if key in state and state[key].shape == value.shape}
    if 2 * sum(own[key].numel() for key in fitting) < sum(value.numel() for value in own.values()):
        raise CheckpointError(f"{path} is of another model: fewer than half of the weights fit {net.config}.")
    with torch.no_grad():
        for key in fitting:
            own[key].copy_(state[key])
    tables = {key for key in state if key not in own and key in net.state_dict()}
    return sorted(own.keys() - fitting), sorted(state.keys() - fitting - tables)


def card_of(codec: Path) -> dict[str, Any]:
    """Return the card beside a bundled codec: its SHA-256, how it was trained, its results. Raises `CheckpointError`."""
    card = codec.with_suffix(".json")
    try:
        content = json.loads(card.read_text(encoding="utf-8"))
        if not isinstance(content["sha256"], str) or not isinstance(content["experiment"], dict):
            raise ValueError("its entries are of another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"The card {card} of {codec.name} cannot be read: {error!r}. Get both again."
        raise CheckpointError(message) from None
    return content


def trained_as(about: Mapping[str, Any]) -> Experiment | None:
    """Return the experiment that weights come from, by what is known `about` them; None for weights from elsewhere.

    Raises `SettingError` for what is no experiment.
    """
    stated = about.get("experiment")
    return None if stated is None else Experiment.from_json(json.dumps(stated))


def bundled_codecs(data_dir: str | os.PathLike | None = None) -> dict[str, Experiment]:
    """Return the bundled codecs for photographs by name, each with how it was trained, as its card says.

    Raises `CheckpointError` for a card that cannot be read.
    """
    return {
        path.stem: trained_as(card_of(path))
        for path in sorted(bundled("checkpoints", data_dir).glob("*.safetensors"))
    }


def find(source: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Path:
    """Return the checkpoint file that `source` means: a bundled codec's name, a run's folder, or a file.

    A bundled codec is checked against the SHA-256 in its card. Raises `CheckpointError`, which lists what was looked for.
    """
    if not str(source):
        raise CheckpointError(
            "An empty name means no checkpoint. Give a bundled codec's name, a run's folder or a file."
        )
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    shelves = [bundled(shelf, data_dir) for shelf in SHELVES]
    named = (shelf / f"{source}.safetensors" for shelf in shelves if Path(source).name == str(source))
    if codec := next(filter(Path.is_file, named), None):
        if sha256(codec) != card_of(codec)["sha256"]:
            raise CheckpointError(f"{codec} is not what its card describes (SHA-256 differs): get it again.")
        return codec
    names = ", ".join(sorted(p.stem for shelf in shelves for p in shelf.glob("*.safetensors"))) or "none"
    raise CheckpointError(
        f"No checkpoint {str(source)!r}: neither a file, nor a run's folder with {WEIGHTS} in it, nor one of the bundled "
        f"codecs in {shelves[0]} and {shelves[1].name} ({names})."
    )
