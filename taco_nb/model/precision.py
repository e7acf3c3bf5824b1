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


def _value_of(owner: Any, name: str, parent: Any) -> Any:
    """Return a setting as it is to be put back: as inherited where it is, lest a later change of the parent be missed."""
    value = getattr(owner, name)
    return "none" if parent is not None and value == getattr(parent, name) else value


def _set_strict() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        # also reaches oneDNN's matrix products; setting it changes cuda.matmul.allow_tf32, so it is put back last
        _before.append((None, "", torch.get_float32_matmul_precision()))
        torch.set_float32_matmul_precision("highest")
    for owner, name, strict, parent in _switches():
        _before.append((owner, name, _value_of(owner, name, parent)))
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


@contextmanager
def quick_training(device: torch.device) -> Iterator[None]:
    """Let a GPU train as fast as it can inside: products of float32 in TF32, where it has that, and cuDNN's best algorithms.

    TF32 keeps ten bits of each factor, as float16 does, and the range of float32. `arithmetic` says where it is used. cuDNN
    tries its algorithms at the first step, and keeps the quickest for each shape.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(torch.backends, "fp32_precision"):
        switches = [(cudnn.conv, "fp32_precision", "tf32", cudnn), (matmul, "fp32_precision", "tf32", None)]
    else:
        switches = [(cudnn, "allow_tf32", True, None), (matmul, "allow_tf32", True, None)]
    switches.append((cudnn, "benchmark", True, None))
    before = [_value_of(owner, name, parent) for owner, name, _, parent in switches]
    for owner, name, quick, _ in switches:
        setattr(owner, name, quick)
    try:
        yield
    finally:
        for (owner, name, *_), value in zip(switches, before):
            setattr(owner, name, value)


def arithmetic(device: torch.device, precision: str) -> str:
    """Return a few words that say on what, and in which numbers, the transforms are computed.

    On a GPU "float32" is not the whole truth: from Ampere on, cuDNN computes convolutions of float32 tensors in TF32, which
    keeps 10 bits of each factor, unless `torch.backends.cudnn` says otherwise; and training allows it for matrix products
    too. Raises `SettingError` for bfloat16 on a GPU that only emulates it, and so is slower at it than at float32.
    """
    if device.type != "cuda":
        return f"the CPU in {precision}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    has_tf32 = torch.version.cuda is not None and capability >= (8, 0)
    if precision == "bfloat16":
        if torch.version.cuda is not None and not has_tf32:  # the same generation brought both
            raise SettingError(
                f'precision="bfloat16", but {name} has no arithmetic for it and would emulate it slowly. Use "float32".'
            )
        return f"{name} in bfloat16"
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):  # from PyTorch 2.9 on, where the older names may raise
        lowered = [
            backends.cudnn.conv.fp32_precision == "tf32",
            backends.cuda.matmul.fp32_precision == "tf32",
        ]
    else:
        lowered = [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]
    parts = [part for part, low in zip(("convolutions", "matrix products"), lowered) if low and has_tf32]
    return f"{name} in float32" + (f", its {' and '.join(parts)} in TF32" if parts else "")


PEAKS = {
    "A100": (156, 312), "H100 PCIe": (378, 756), "H100": (495, 989), "H200": (495, 989), "L40S": (183, 362),
    "RTX 3090": (36, 71), "RTX 4090": (83, 165),
}  # fmt: skip
"""The 10^12 operations a second that some GPUs promise in their data sheets, without sparsity: in TF32, and in bfloat16."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return how many operations a second the GPU promises in this precision; None if we do not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [peaks for part, peaks in PEAKS.items() if part in name]
    return 1e12 * found[0][precision == "bfloat16"] if found else None
