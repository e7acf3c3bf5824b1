"""What a computation may run on."""

from __future__ import annotations

from taco_nb.errors import SettingError


def check_device(device: str, num_processes: int = 1) -> None:
    """Raise `SettingError` for a device that is unknown or not on this machine, or with fewer GPUs than processes."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise SettingError(f'device must be "auto", "cpu" or "cuda", but is {device!r}.')
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise SettingError('device="cuda", but PyTorch sees no CUDA device here. Use device="auto" or "cpu".')
    if 0 < gpus < num_processes:
        raise SettingError(f"num_processes={num_processes} needs a GPU for each, but here are {gpus}.")
