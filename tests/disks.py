"""Disks that are full or read-only, and folders of somebody else's, for tests of what is written where."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def small_disk(folder: Path, options: str = "size=1m") -> list[str]:
    """Return the beginning of a command that sees a disk of its own at `folder`: of 1 MiB, or with other options.

    The test is skipped where the system lets no user mount one.
    """
    command = ["unshare", "--user", "--mount", "--map-root-user", "sh", "-c"]
    command += [f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a disk of their own")
    return command


def bound_by_permissions() -> list[str]:
    """Return the beginning of a command that may write only where permissions let it, which root's otherwise ignores."""
    if os.name != "posix":
        pytest.skip("permissions of POSIX")
    if os.geteuid():
        return []
    command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    if not shutil.which("setpriv") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system lets root give no rights up")
    return command
