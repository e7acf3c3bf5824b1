"""Weights in and out: the project's own safetensors, and the checkpoints of TACO's authors."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from taco_nb.errors import CheckpointError
from taco_nb.files import atomic_write, data_root, sha256
from taco_nb.model import TACO, ModelConfig

WEIGHTS = "weights.safetensors"
_FORMAT = "taco_nb weights 1"
_GAUSSIAN_TABLES = ("_offset", "_quantized_cdf", "_cdf_length")


def save_weights(path: str | os.PathLike, net: TACO, about: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write the network's weights and what is known `about` them, atomically.

    `dtype` is that of the kernels; biases, norms and the small model of z stay in float32. The Gaussian model's coder
    tables follow from its fixed table of scales alone and are left out; those of z, which follow from the weights, are
    kept, so that a file stays decodable wherever it goes.
    """
    net.tables()
    state = {
        key: value.cpu().to(dtype if value.ndim > 1 and not key.startswith("entropy_bottleneck") else value.dtype)
        for key, value in net.state_dict().items()
        if key not in {f"gaussian_conditional.{table}" for table in _GAUSSIAN_TABLES}
    }
    state = {key: value.contiguous() for key, value in state.items()}
    metadata = {"format": _FORMAT, "heads": str(net.config.heads), "about": json.dumps(about)}
    with atomic_write(path) as file:
        file.write(save(state, metadata))


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict and what is known about it, from `.safetensors` or from a reference's `.pth.tar`.

    Pickles are read with `weights_only`, so a checkpoint from a stranger cannot run code. Raises `CheckpointError`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely: {reason}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict, neither by itself nor under the key 'state_dict'.")
    facts = {key: content[key] for key in ("epoch", "best_psnr") if isinstance(content.get(key), (int, float))}
    return state, {"name": path.name, **facts}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}.") from None
    about = json.loads(metadata.get("about", "{}")) | ({"heads": int(metadata["heads"])} if "heads" in metadata else {})
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, about


def load_net(path: str | os.PathLike) -> tuple[TACO, dict[str, Any]]:
    """The network in a checkpoint, in evaluation mode, and what is known about it. Raises `CheckpointError`."""
    state, about = read_weights(path)
    net = TACO(ModelConfig.of_state_dict(state, heads=about.get("heads", 8)))
    try:
        net.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return net.eval(), about


def find(source: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Path:
    """The checkpoint file that `source` means: a bundled codec's name, a run's folder, or a file.

    A bundled codec is checked against the SHA-256 in its card. Raises `CheckpointError` naming what was looked for.
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
    shelf = data_root(data_dir) / "checkpoints"
    bundled = shelf / f"{source}.safetensors"
    if bundled.is_file() and bundled.parent == shelf:
        expected = json.loads(bundled.with_suffix(".json").read_text())["sha256"]
        if sha256(bundled) != expected:
            raise CheckpointError(f"{bundled} is not the file that its card describes (SHA-256 differs): get it again.")
        return bundled
    names = ", ".join(sorted(p.stem for p in shelf.glob("*.safetensors"))) or "none"
    raise CheckpointError(
        f"No checkpoint {str(source)!r}: neither a file, nor a run's folder with {WEIGHTS} in it, nor one of the bundled "
        f"codecs in {shelf} ({names})."
    )
