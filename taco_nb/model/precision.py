"""Float32 is computed in full here, whatever the program around the codec allows convolutions and matrix products.

On recent GPUs cuDNN computes float32 convolutions in TF32, with ten bits of mantissa, unless it is told not to;
`torch.set_float32_matmul_precision("medium")` allows bfloat16, on processors too; an autocast region replaces float32
altogether. Good for training, but figures in mode "exact" are to be the weights' own, and the integer arithmetic of
`taco_nb.model.integer` needs all 24 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

from taco_nb.errors import SettingError

_lock = Lock()
_inside = 0
"""How many threads are in `full_float32` now. What it sets, PyTorch keeps for the whole process: the first to enter
sets it, the last to leave puts it back."""
_before: list[tuple[Any, str, Any]] = []


def _switches() -> list[tuple[Any, str, Any, Any]]:
    """Every setting that lowers float32: its owner, its name, its strict value, and its owner's own parent."""
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):  # from PyTorch 2.9 on
        return [
            (backends.mkldnn.conv, "fp32_precision", "ieee", backends.mkldnn),
            (backends.mkldnn.matmul, "fp32_precision", "ieee", backends.mkldnn),
            (backends.cudnn.conv, "fp32_precision", "ieee", backends.cudnn),
            (backends.cuda.matmul, "fp32_precision", "ieee", None),
        ]
    return [
        (backends.cudnn, "allow_tf32", False, None),
        (backends.cuda.matmul, "allow_tf32", False, None),
    ]


def _set_strict() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        # also reaches oneDNN's matrix products; setting it changes cuda.matmul.allow_tf32, so it is put back last
        _before.append((None, "", torch.get_float32_matmul_precision()))
        torch.set_float32_matmul_precision("highest")
    for owner, name, strict, parent in _switches():
        value = getattr(owner, name)
        if parent is not None and value == getattr(parent, name):
            value = "none"  # inherited: put back as inherited, lest a later change of the parent be missed
        _before.append((owner, name, value))
        setattr(owner, name, strict)


def _put_back() -> None:
    while _before:
        owner, name, value = _before.pop()
        if owner is None:
            torch.set_float32_matmul_precision(value)
        else:
            setattr(owner, name, value)


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute float32 in float32 inside: no TF32, no bfloat16, and no autocast of the caller's on `device_type`.

    Several threads may be inside at once. Settings that another thread changes meanwhile are not noticed.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _set_strict()
        _inside += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _put_back()


def arithmetic(device: torch.device, precision: str) -> str:
    """Return a few words that say on what, and in which numbers, the transforms are computed.

    On a GPU "float32" is not the whole truth: from Ampere on, cuDNN computes convolutions of float32 tensors in TF32, which
    keeps 10 bits of each factor, unless `torch.backends.cudnn` says otherwise. Raises `SettingError` for bfloat16 on a GPU
    that only emulates it, and so is slower at it than at float32.
    """
    if device.type != "cuda":
        return f"the CPU in {precision}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if precision == "bfloat16":
        if torch.version.cuda is not None and capability < (8, 0):
            raise SettingError(
                f'precision="bfloat16", but {name} has no arithmetic for it and would emulate it slowly. Use "float32".'
            )
        return f"{name} in bfloat16"
    if torch.version.cuda is not None and capability >= (8, 0) and _convolutions_in_tf32():
        return f"{name} in float32, its convolutions in TF32"
    return f"{name} in float32"


def _convolutions_in_tf32() -> bool:
    cudnn = torch.backends.cudnn
    if hasattr(torch.backends, "fp32_precision"):  # from PyTorch 2.9 on, where the older name may raise
        return cudnn.conv.fp32_precision == "tf32"
    return cudnn.allow_tf32
