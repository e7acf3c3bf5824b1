"""Where a number came from: versions, commit and hardware, which are written beside every result."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from taco_nb.files import REPOSITORY
from taco_nb.processes import cpu_count

PACKAGES = (
    "torch", "torchvision", "compressai", "open_clip_torch", "lpips", "pytorch-msssim", "torchmetrics", "torch-fidelity",
    "accelerate", "numpy", "pillow",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Return the versions of what computes, this repository's commit, and the machine, without its name or its user's.

    "cores" are those that this process may use, which a batch system may have limited.
    """
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "hardware": {
            "cpu": _cpu(),
            "cores": cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """Return the commit of this repository, with "+changes" if the working tree differs; None outside a checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return None  # installed inside somebody else's checkout, whose commit says nothing of this code
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code_digest(*sources: str) -> str:
    """Return a SHA-256 over these modules and folders of modules of the package, which changes when any of them does."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for source in sources:
        for path in sorted((package / source).rglob("*.py")) or [package / source]:
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the processor's own name, which Linux keeps in a file and other systems give through `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
