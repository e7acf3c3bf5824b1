"""The command line answers at once, in plain words, and knows its commands."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from taco_nb.files import REPOSITORY
from taco_nb.tools.cli import main

HELP = """
import sys, time
from taco_nb.tools.cli import main
for words in ([], *([name] for name in main.commands)):
    main([*words, "--help"], standalone_mode=False)
print(round(time.process_time(), 3), *(name for name in sys.modules if "." not in name))
"""


def test_help_answers_at_once():
    """The limit is on processor time, of all commands together, and of the best of three: the machine may be busy."""
    answers = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", HELP], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout.splitlines()[-1].split())
    assert (
        min(float(seconds) for seconds, *_ in answers) < 0.6
    )  # a third of a second, on a slow machine that is busy
    assert not {"torch", "numpy", "pandas", "papermill", "nbformat", "accelerate"} & set(answers[0])


@pytest.mark.parametrize("name", main.commands)
def test_every_command_explains_itself(name):
    said = CliRunner().invoke(main, [name, "--help"])
    assert said.exit_code == 0 and said.output.startswith(f"Usage: main {name} ")
    unexplained = [
        o.opts[0] for o in main.commands[name].params if isinstance(o, click.Option) and not o.help
    ]
    assert not unexplained


def test_accelerate_can_start_both_modules():
    for module in ("taco_nb.training", "taco_nb.evaluation"):
        words = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(f"Usage: python -m {module} "), done.stderr
