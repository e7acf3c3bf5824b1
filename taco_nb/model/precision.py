"""Float32 is computed in full here, whatever the program around the codec allows convolutions and matrix products.

On recent GPUs cuDNN computes float32 convolutions in TF32, with ten bits of mantissa, unless it is told not to;
`torch.set_float32_matmul_precision("medium")` allows bfloat16, on processors too; an autocast region replaces float32
altogether. Good for training, but figures in mode "exact" are to be the weights' own, and the integer arithmetic of
`taco_nb.model.integer` needs all 24 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
from torch import backends

from taco_nb.errors import SettingError

_NEW = hasattr(backends, "fp32_precision")  # from PyTorch 2.9 on, where the older names may raise
# Every setting that lowers float32: its owner, its name, and the owner's own parent. Of a GPU's the first is for
# convolutions, the second for matrix products.
if _NEW:
    _FULL, _TF32 = "ieee", "tf32"
    _ON_GPUS = [
        (backends.cudnn.conv, "fp32_precision", backends.cudnn),
        (backends.cuda.matmul, "fp32_precision", None),
    ]
    _ON_CPUS = [
        (backends.mkldnn.conv, "fp32_precision", backends.mkldnn),
        (backends.mkldnn.matmul, "fp32_precision", backends.mkldnn),
    ]
else:
    _FULL, _TF32 = False, True
    _ON_GPUS = [(backends.cudnn, "allow_tf32", None), (backends.cuda.matmul, "allow_tf32", None)]
    _ON_CPUS = []

_lock = Lock()
_inside = 0
"""How many threads are in `full_float32` now. What it sets, PyTorch keeps for the whole process: the first to enter
sets it, the last to leave puts it back."""
_strict = ExitStack()


def _set(until: ExitStack, owner: Any, name: str, parent: Any, value: Any) -> None:
    """Change a setting until the stack is closed.

    What was inherited is inherited again then, lest a later change of the parent be missed.
    """
    before = getattr(owner, name)
    inherited = parent is not None and before == getattr(parent, name)
    until.callback(setattr, owner, name, "none" if inherited else before)
    setattr(owner, name, value)


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute float32 in float32 inside: no TF32, no bfloat16, and no autocast of the caller's on `device_type`.

    Several threads may be inside at once. Settings that another thread changes meanwhile are not noticed.
    """
    global _inside
    with _lock:
        if _inside == 0:
            if not _NEW:
                # it also reaches oneDNN's matrix products, and changes cuda.matmul.allow_tf32: put back last
                _strict.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("highest")
            for setting in _ON_CPUS + _ON_GPUS:
                _set(_strict, *setting, _FULL)
        _inside += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _strict.close()


@contextmanager
def quick_training(device: torch.device) -> Iterator[None]:
    """Let a GPU train as fast as it can inside: products of float32 in TF32, where it has that, and cuDNN's best algorithms.

    TF32 keeps ten bits of each factor, as float16 does, and the range of float32. `arithmetic` says where it is used. cuDNN
    tries its algorithms at the first step, and keeps the quickest for each shape.
    """
    with ExitStack() as until_done:
        if device.type == "cuda":
            for setting in _ON_GPUS:
                _set(until_done, *setting, _TF32)
            _set(until_done, backends.cudnn, "benchmark", None, True)
        yield


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
    lowered = [has_tf32 and getattr(owner, setting) == _TF32 for owner, setting, _ in _ON_GPUS]
    parts = [part for part, low in zip(("convolutions", "matrix products"), lowered) if low]
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
