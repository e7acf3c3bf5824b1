"""Every result is written together with where it came from: versions, commit and hardware."""

from __future__ import annotations

import ast
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
    """Return a SHA-256 over what these modules, and folders of modules, of this package compute.

    Comments, docstrings and layout do not count; any other change does, also one that happens to leave all results as
    they are. A version number to be raised by hand would be finer, but it is what everybody forgets.
    """
    package, digest = Path(__file__).parent, hashlib.sha256()
    for source in sources:
        for path in sorted((package / source).rglob("*.py")) or [package / source]:
            code = _WithoutText().visit(ast.parse(path.read_text(encoding="utf-8")))
            digest.update(path.relative_to(package).as_posix().encode() + ast.unparse(code).encode())
    return digest.hexdigest()


class _WithoutText(ast.NodeTransformer):
    """Removes docstrings, and other strings that stand by themselves."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


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
