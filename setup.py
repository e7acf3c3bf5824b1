"""What pyproject.toml cannot say: a wheel holds the repository's small data, as `taco_nb/_data`.

The folders stay at the top of the repository, where people look for them; `taco_nb.files.BUNDLED` finds them in either
place. An editable install reads the repository's own.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = ("checkpoints", "joint_space", "kodak", "reference", "results", "sample", "shapes")


class BuildWithData(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            packed = Path(self.build_lib, "taco_nb", "_data")
            shutil.rmtree(packed, ignore_errors=True)  # of an earlier build
            for name in BUNDLED:
                shutil.copytree(Path(__file__).parent / "data" / name, packed / name)


setup(cmdclass={"build_py": BuildWithData})
