"""A sweep runs real notebooks over lambda: resumed after a kill, undone by no single failure, never done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import command
from nbformat.v4 import new_code_cell, new_notebook

from taco_nb.errors import SettingError
from taco_nb.files import REPOSITORY
from taco_nb.tools.sweep import LMBDAS, members, sweep, unfinished_runs

BODY = """
import json, os, pathlib, time
import numpy
from safetensors.numpy import save_file
folder = pathlib.Path(out_dir) / f"run-{lmbda}"
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "log", "a") as log:
    print("began", file=log)
while os.path.exists(os.environ.get("SLOW", "") + str(lmbda)):
    time.sleep(0.05)
if lmbda == 13.0:
    raise ValueError("thirteen")
about = json.dumps({"steps": 1 if max_hours == 0 else 2, "total_steps": 2})
(folder / "experiment.json").write_text("{}")
save_file({"w": numpy.zeros(1)}, folder / "weights.safetensors", {"about": about})
with open(folder / "log", "a") as log:
    print(f"ended with {epochs!r}", file=log)
"""


def tiny_notebook(folder, name="tiny"):
    parameters = "lmbda: float = 0.1\nout_dir: str = ''\nepochs: int = None\nmax_hours: float = None"
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(BODY)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def log(out, lmbda):
    path = out / f"lmbda-{lmbda:g}" / f"run-{lmbda}" / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_it_runs_all_keeps_the_notebooks_and_does_nothing_twice(tmp_path, capsys):
    notebooks = [tiny_notebook(tmp_path / "src", name) for name in ("first", "second")]
    out = tmp_path / "out"
    assert sweep(members(notebooks, (0.1, 0.25), out, {"epochs": 3})) == {}
    for lmbda in (0.1, 0.25):
        assert log(out, lmbda) == ["began", "ended with 3"] * 2
        kept = [nbformat.read(out / f"lmbda-{lmbda:g}" / f"{name}.ipynb", 4) for name in ("first", "second")]
        assert [n.metadata.papermill.parameters["lmbda"] for n in kept] == [lmbda, lmbda]
    assert sweep(members(notebooks, (0.1, 0.25), out, {"epochs": 3})) == {}
    assert log(out, 0.1) == log(out, 0.25) == ["began", "ended with 3"] * 2
    assert [member.done for member in members(notebooks, (0.1, 0.25), out, {"epochs": 3})] == [True] * 4
    # other parameters, or another text of the notebook, are another matter; how long it may take is not
    assert not any(member.done for member in members(notebooks, (0.1, 0.25), out, {"epochs": 4}))
    assert all(member.done for member in members(notebooks, (0.1,), out, {"epochs": 3, "max_hours": 5.0}))
    edited = nbformat.read(notebooks[0], 4)
    edited.cells[1].source += "\n1"
    nbformat.write(edited, notebooks[0])
    assert [m.done for m in members(notebooks, (0.1,), out, {"epochs": 3})] == [False, True]


def lmbdas(*values: float) -> list[str]:
    """The words of a command line that ask for these lambda."""
    return [word for value in values for word in ("--lmbda", str(value))]


def test_one_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    notebook, out = tiny_notebook(tmp_path / "src"), tmp_path / "out"
    arguments = ["sweep", notebook, *lmbdas(0.1, 13, 0.2), "--out", out, "-p", "epochs", "None"]
    assert command(*arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Failed: lambda 13, tiny: ValueError: thirteen"
    assert log(out, 0.2) == ["began", "ended with None"] and log(out, 13.0) == ["began"]
    assert (out / "lmbda-13" / "tiny.ipynb").is_file(), "with the error in it"
    assert command(*arguments, "--list") == 0
    states = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done", "to do", "done"]


def test_killed_in_the_middle_it_goes_on(tmp_path):
    notebook, out = tiny_notebook(tmp_path / "src"), tmp_path / "out"
    slow = tmp_path / "slow-"
    (tmp_path / "slow-0.2").touch()
    words = [sys.executable, "-m", "taco_nb.tools.cli", "sweep", notebook, *lmbdas(0.1, 0.2), "--out", out]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "SLOW": str(slow)}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    patience = time.monotonic() + 500
    while not log(out, 0.2):
        assert time.monotonic() < patience and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "slow-0.2").unlink()
    done = [member.done for member in members([notebook], (0.1, 0.2), out)]
    assert done == [True, False]
    assert subprocess.run(words, env=environment, capture_output=True).returncode == 0
    assert log(out, 0.1) == ["began", "ended with None"]
    assert log(out, 0.2).count("began") == 2 and "ended with None" in log(out, 0.2)
    assert all(member.done for member in members([notebook], (0.1, 0.2), out))


def test_training_that_its_time_stopped_is_not_done(tmp_path):
    notebook, out = tiny_notebook(tmp_path / "src"), tmp_path / "out"
    failed = sweep(members([notebook], (0.1, 0.2), out, {"max_hours": 0}))
    assert failed == {
        "lambda 0.1, tiny": "run-0.1 not trained to the end; run the sweep again to go on",
        "lambda 0.2, tiny": "not begun, since max_hours are over; run the sweep again to go on",
    }
    assert not log(out, 0.2) and unfinished_runs(out / "lmbda-0.1") == ["run-0.1"]
    assert (
        sweep(members([notebook], (0.1, 0.2), out, {"max_hours": 1.0})) == {}
        and unfinished_runs(out / "lmbda-0.1") == []
    )
    killed = out / "lmbda-0.1" / "killed"  # before it had any weights
    killed.mkdir()
    (killed / "experiment.json").write_text("{}")
    assert unfinished_runs(out / "lmbda-0.1") == ["killed"] and not members([notebook], (0.1,), out)[0].done
    (member,) = members([notebook], (0.2,), out)
    given = nbformat.read(member.executed, 4).metadata.papermill.parameters
    assert member.done and 0 < given["max_hours"] < 1, "what the first has left of it"


def test_a_slurm_array_runs_a_lambda_for_each_task(tmp_path):
    notebook, out = tiny_notebook(tmp_path / "src"), tmp_path / "out"
    assert command("sweep", notebook, *lmbdas(0.1, 0.2), "--out", out, "--task", 1) == 0
    assert [path.name for path in out.iterdir()] == ["lmbda-0.2"]
    with pytest.raises(SettingError, match="from 0 to 1"):
        members([notebook], (0.1, 0.2), out, task=2)


def test_the_real_notebooks_make_a_sweep():
    notebooks = sorted((REPOSITORY / "notebooks").glob("0[1-4]_*.ipynb"))
    todo = members(notebooks, parameters={"profile": "sample", "epochs": 1})
    assert len(todo) == 4 * len(LMBDAS) and len({member.executed for member in todo}) == len(todo)


@pytest.mark.parametrize(
    "given, said",
    [
        (["-p", "epoch", "2"], "tiny.ipynb has no parameter 'epoch'. Did you mean 'epochs'"),
        (["-p", "lmbda", "2"], "The sweep itself sets lmbda"),
        (["--lmbda", "0.1", "--lmbda", "0.1"], "given twice"),
        (["--task", "6"], "Tasks run from 0 to 5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_runs(given, said, tmp_path, capsys):
    notebook = tiny_notebook(tmp_path / "src")
    assert command("sweep", notebook, "--out", tmp_path / "out", *given) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert command("sweep", tmp_path / "none.ipynb") == 1
    assert "There is no notebook" in capsys.readouterr().err


@pytest.mark.parametrize("at", [1, 2], ids=["in the middle", "in the last cell"])
def test_a_notebook_whose_kernel_died_is_not_done(at, tmp_path):
    """As when memory runs out. Papermill then calls every cell completed, those after it included."""
    notebook, out = tiny_notebook(tmp_path / "src"), tmp_path / "out"
    dying = nbformat.read(notebook, 4)
    code = "import os, signal\nif not os.path.exists(out_dir + '/once'):\n    open(out_dir + '/once', 'x').close()\n"
    dying.cells.insert(at, new_code_cell(code + "    os.kill(os.getpid(), signal.SIGKILL)"))
    nbformat.write(dying, notebook)
    assert sweep(members([notebook], (0.1,), out)) == {"lambda 0.1, tiny": "DeadKernelError: Kernel died"}
    assert not members([notebook], (0.1,), out)[0].done
    assert sweep(members([notebook], (0.1,), out)) == {} and log(out, 0.1)[-1] == "ended with None"


@pytest.mark.parametrize("lost", ["executed", "marker"])
def test_what_is_lost_or_damaged_is_run_again(lost, tmp_path):
    notebook, out = tiny_notebook(tmp_path / "src"), tmp_path / "out"
    assert sweep(members([notebook], (0.1,), out)) == {}
    (member,) = members([notebook], (0.1,), out)
    assert member.done
    member.marker.write_bytes(
        member.marker.read_bytes()[:-9]
    ) if lost == "marker" else member.executed.unlink()
    assert not member.done
