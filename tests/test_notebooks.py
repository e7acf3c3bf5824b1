"""Notebooks: clean in git, strict about their parameters, and the first of them run for real by papermill."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
from browser import opens_without_a_network
from conftest import with_answers
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from pydantic import TypeAdapter
from test_compare import Page, pixels
from test_widgets import Cells

from taco_nb import datasets, load
from taco_nb.data import CaptionedFolder
from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation import evaluate_matched, means
from taco_nb.evaluation.peers import available_peers
from taco_nb.experiment import Experiment, baseline
from taco_nb.files import REPOSITORY
from taco_nb.notebook import Parameters, check_parameters
from taco_nb.tools.export import export_html

FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BASELINE = FOLDER / "01_baseline.ipynb"
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The first cell makes the folder of the runs in the working directory, which is not to be the repository."""
    monkeypatch.chdir(tmp_path)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_tagged(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def first_cells(path: Path) -> tuple[str, str]:
    """Sources of the cell with the parameters and of the code cell after it, which checks them."""
    cells = code_cells(nbformat.read(path, 4))
    at = [is_tagged(cell) for cell in cells].index(True)
    return cells[at].source, cells[at + 1].source


def defaults_in(path: Path) -> dict:
    """The parameters that a notebook sets, with their values."""
    namespace = {}
    exec(first_cells(path)[0], namespace)
    return {name: value for name, value in namespace.items() if not name.startswith("__")}


# --- As they are in git -----------------------------------------------------------------------------------------------


def test_the_baseline_is_among_them():
    assert BASELINE in NOTEBOOKS


@every_notebook
def test_a_notebook_is_valid_and_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None
        compile(cell.source, path.name, "exec")


@every_notebook
def test_cells_are_short_and_one_holds_the_parameters(path):
    cells = code_cells(nbformat.read(path, 4))
    assert sum(map(is_tagged, cells)) == 1
    assert is_tagged(cells[0])
    for cell in cells[1:]:
        assert len(cell.source.splitlines()) <= 25, cell.source


@every_notebook
def test_papermill_explains_every_parameter(path):
    explained = papermill.inspect_notebook(str(path))
    assert explained.keys() == defaults_in(path).keys()
    names = {"string": "str", "integer": "int", "number": "float"}
    declared = {
        name: names.get((schema.get("anyOf") or [schema])[0].get("type"))
        for settings in (Experiment, Parameters)
        for name, schema in TypeAdapter(settings).json_schema()["properties"].items()
    }
    for name, parameter in explained.items():
        assert len(parameter["help"]) > 5, name
        assert parameter["inferred_type_name"] == declared[name] is not None, name


@every_notebook
def test_parameters_are_the_shared_ones_and_settings_of_an_experiment(path):
    given, shared_ones = defaults_in(path), vars(Parameters())
    assert {"profile", "out_dir", "seed"} <= given.keys()
    for name, value in given.items():
        assert value == shared_ones[name] if name in shared_ones else name in vars(Experiment()), name
    if path == BASELINE:
        assert given.keys() == shared_ones.keys() - {"settings", "started_in", "began", "n_pairs"}


def test_a_step_is_timed_in_pieces_as_small_as_each_processs_and_after_all_is_measured(monkeypatch):
    cells = [cell.source for cell in code_cells(nbformat.read(BASELINE, 4))]
    (at,) = [i for i, cell in enumerate(cells) if "step_times(" in cell]
    assert "evaluate_runs(p, runs, whole=True)" in "".join(cells[:at])
    asked = []
    monkeypatch.setattr("taco_nb.training.step_times", lambda exp, **how: asked.append(how["accumulation"]))
    exec(
        cells[at],
        {
            "p": Parameters(num_processes=2, accumulation=3),
            "exp": None,
            "display": print,
            "sortable": lambda table, fold: table,
        },
    )
    assert asked == [6]


# --- Parameters -------------------------------------------------------------------------------------------------------


@every_notebook
def test_a_name_that_is_no_parameter_stops_every_notebook(path):
    parameters, check = first_cells(path)
    namespace = {}
    exec(parameters, namespace)
    namespace["profil"] = "sample"
    with pytest.raises(SettingError, match="'profil'.*'profile'"):
        exec(check, namespace)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"epoch": 2}, "no parameter 'epoch'. Did you mean 'epochs'"),
        ({"lambda_": 0.1}, "no parameter 'lambda_'"),
        ({"zzz": None}, "no parameter 'zzz'. Known: profile, .*lmbda, epochs"),
        ({"epochs": "many"}, "epochs must be a whole number or None, but is 'many'"),
        ({"epochs": 2.0}, "epochs must be a whole number"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"batch_size": [4]}, "batch_size must be a whole number"),
        ({"lmbda": "0.01"}, "lmbda must be a number or None"),
        ({"profile": 3}, 'profile must be "auto", "paper" or "sample", but is 3'),
        ({"profile": None}, 'profile must be "auto", "paper" or "sample", but is None'),
        ({"out_dir": 3}, "out_dir must be text"),
        ({"checkpoint": 4}, "checkpoint must be text or None"),
        ({"lmbda": -1}, "lmbda must be above 0, but is -1"),
        ({"lmbda": 0}, "lmbda must be above 0"),
        ({"lmbda": math.nan}, "lmbda must be above 0, but is nan"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0"),
        ({"epochs": 0}, "epochs must be 1 or above"),
        ({"batch_size": -4}, "batch_size must be 1 or above"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 1 << 32}, "seed must be from 0"),
        ({"eval_limit": 0}, "eval_limit must be 1 or above"),
        ({"max_hours": -0.5}, "max_hours must be 0 or above"),
        ({"max_hours": math.nan}, "max_hours must be 0 or above, but is nan"),
        ({"num_processes": 0}, "num_processes must be 1 or above, but is 0"),
        ({"num_processes": None}, "num_processes must be a whole number, but is None"),
        ({"num_workers": -1}, "num_workers must be 0 or above"),
        ({"accumulation": 0}, "accumulation must be 1 or above"),
        ({"device": "tpu"}, "device must be .*'tpu'"),
        ({"precision": "float16"}, "precision must be .*'float16'"),
        ({"caption": "worst"}, 'caption must be "first", "last" or "best", but is \'worst\''),
        ({"profile": "huge"}, "profile must be .*'huge'"),
        ({"text_encoder": "CLIP"}, "'CLIP' is not a text tower"),
        ({"settings": {"epochs": 2}}, "no parameter 'settings'"),
    ],
)
def test_bad_parameters_are_named_in_a_sentence(given, sentence):
    with pytest.raises(SettingError, match=sentence) as caught:
        check_parameters({"profile": "sample", **given}, "checkpoint")
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_a_notebook_has_parameters_of_its_own():
    assert check_parameters({"profile": "sample", "checkpoint": "a"}, "checkpoint").checkpoint == "a"
    with pytest.raises(SettingError, match="no parameter 'checkpoint'"):
        check_parameters({"profile": "sample", "checkpoint": "a"})
    assert check_parameters({"profile": "sample", "n_pairs": 7}, "n_pairs").n_pairs == 7
    with pytest.raises(SettingError, match="n_pairs must be 1 or above"):
        check_parameters({"profile": "sample", "n_pairs": 0}, "n_pairs")
    given = {"profile": "sample", "linformer_k": 8}
    assert check_parameters(dict(given), "linformer_k").settings == {"linformer_k": 8}
    with pytest.raises(SettingError, match="no parameter 'linformer_k'"):
        check_parameters(dict(given))
    for bad in (0, "many", 1.5):
        with pytest.raises(SettingError, match="linformer_k must be"):
            check_parameters(given | {"linformer_k": bad}, "linformer_k")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the CUDA device that is asked for")
def test_cuda_without_a_device():
    with pytest.raises(SettingError, match="device=.cuda., but"):
        check_parameters({"profile": "sample", "device": "cuda"})


def test_out_dir_must_be_a_folder_that_can_be_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for wrong in ("notes.txt", "notes.txt/runs", "x" * 300, "/proc/runs"):
        with pytest.raises(
            SettingError, match=r"out_dir must be a folder that can be written to, but .*is not: "
        ):
            check_parameters({"profile": "sample", "out_dir": str(tmp_path / wrong)})
    assert check_parameters({"profile": "sample", "out_dir": str(tmp_path / "new" / "runs")}).runs.is_dir()
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["runs"]


def test_what_is_given_changes_the_experiment_and_none_leaves_it():
    namespace = {"profile": "sample", "lmbda": 1, "epochs": None, "seed": 7, "precision": "bfloat16"}
    parameters = check_parameters(namespace)
    assert parameters.experiment() == baseline("sample", lmbda=1.0, seed=7, precision="bfloat16")


def test_the_profile_is_chosen_and_explained(capsys, tmp_path):
    parameters = check_parameters({"data_dir": str(tmp_path)})
    assert parameters.profile == "sample"
    assert "no MS-COCO" in capsys.readouterr().out


CHECK = "from taco_nb.notebook import check_parameters; p = check_parameters(globals())"


@pytest.fixture
def session():
    """A shell as a notebook's kernel has one, in which a startup file has set names, one that of a parameter."""
    shell = InteractiveShell(history_manager=None)
    shell.user_ns |= {"project": "thesis", "seed": "lucky", "exp": 3}
    yield shell
    shell.history_manager.end_session()


def run(shell: InteractiveShell, cell: str) -> None:
    shell.run_cell(cell, store_history=True).raise_error()


def test_only_what_the_cell_with_the_parameters_sets_is_a_parameter(session):
    run(session, "import os\nlines = 3")  # a cell of the reader's own
    run(session, 'profile: str = "sample"\nepochs: int = None')
    run(session, CHECK)
    assert session.user_ns["p"] == Parameters(profile="sample")
    assert (session.user_ns["project"], session.user_ns["seed"], session.user_ns["lines"]) == (
        "thesis",
        "lucky",
        3,
    )


def test_what_papermill_injects_is_checked(session):
    run(session, 'profile: str = "sample"\nepochs: int = None')
    run(session, "# Parameters\nepoch = 2")
    with pytest.raises(SettingError, match="'epoch'. Did you mean 'epochs'"):
        run(session, CHECK)
    run(session, "# Parameters\nseed = 2")
    run(session, CHECK)
    assert session.user_ns["p"] == Parameters(profile="sample", seed=2)


def test_a_misspelling_in_the_cell_with_the_parameters_can_be_corrected(session):
    run(session, 'profile: str = "sample"\nepoch: int = 2')
    with pytest.raises(SettingError, match="'epoch'. Did you mean 'epochs'"):
        run(session, CHECK)
    run(session, 'profile: str = "sample"\nepochs: int = 2')
    run(session, CHECK)
    assert session.user_ns["p"].epochs == 2 and session.user_ns["project"] == "thesis"


def test_a_cell_of_another_language_is_no_obstacle(session):
    run(session, "%time 1 + 1")
    session.run_cell("not Python", store_history=True)
    run(session, 'profile = "sample"')
    run(session, CHECK)


def test_the_cells_can_be_run_again_in_a_session():
    parameters, check = first_cells(BASELINE)
    namespace = {}
    exec(parameters.replace('"auto"', '"sample"', 1), namespace)
    exec(check, namespace)
    namespace |= {"said": "a cat", "rows": [1, 2], "sets": {}}  # what later cells leave behind
    namespace["epochs"] = 3
    exec(check, namespace)
    assert namespace["exp"].epochs == 3
    namespace["epochs"] = "many"
    with pytest.raises(SettingError, match="epochs must be a whole number"):
        exec(check, namespace)


def test_a_misspelling_can_be_corrected_in_the_session():
    namespace = {"profile": "sample", "epoch": 2}
    with pytest.raises(SettingError):
        check_parameters(namespace)
    namespace["epochs"] = 2
    assert check_parameters(namespace).epochs == 2


def test_runs_do_not_move_with_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Parameters().runs == REPOSITORY / "out" / "runs"
    runs = Parameters(out_dir="here/runs").runs
    assert runs == tmp_path.resolve() / "here" / "runs"
    assert Parameters(out_dir="~/runs").runs == (Path.home() / "runs").resolve()


def test_data_sets_of_the_profile_and_those_that_are_missing(tmp_path, capsys):
    crops, whole = (datasets(name)[0] for name in ("kodak-256", "kodak"))
    for limit in (None, 2, 30):
        p = Parameters(profile="sample", eval_limit=limit)
        assert [(d.name, d.names) for d in p.datasets()] == [("kodak-256", crops.names[:limit])]
        (few,) = p.datasets("context", whole=True)
        assert (few.name, few.captioned, few.names) == ("kodak", "context", whole.names[: min(3, limit or 3)])
    assert not capsys.readouterr().out
    assert [d.name for d in Parameters(profile="paper", data_dir=str(tmp_path)).datasets()] == ["kodak"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in said] == [
        ["Not", "evaluated:", "The", "data", "set", name] for name in ("clic", "coco")
    ]
    for name in ("kodak", "clic", "coco"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="None of the evaluation sets"):
        Parameters(profile="paper", data_dir=str(tmp_path)).datasets()


def test_the_paper_profile_evaluates_what_is_there(shared, tmp_path, capsys):
    (tmp_path / "kodak").symlink_to(shared / "kodak")
    sets = Parameters(profile="paper", data_dir=str(tmp_path), eval_limit=2).datasets()
    assert [(dataset.name, len(dataset)) for dataset in sets] == [("kodak", 2)]
    assert "clic" in capsys.readouterr().out


def test_the_other_codecs_are_matched_on_a_hundred_pictures(tmp_path):
    """It takes seconds for a large one, and comes before the training; the table is over the same pictures for all."""
    for i in range(101):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    (tmp_path / "captions.json").write_text(json.dumps({f"{i:03}.png": "" for i in range(101)}))
    dataset = CaptionedFolder(tmp_path, tmp_path / "captions.json", name="many")
    mine = {"codec": "mine", "dataset": "many", "name": dataset.names, "width": 8, "height": 8, "bytes": 1000}
    namespace = {
        "results": pd.DataFrame(mine).assign(bpp=1.0, psnr=1.0, fid=1.0),
        "few": [dataset],
        "means": means,
    }
    namespace |= {"evaluate_matched": evaluate_matched, "sortable": pd.DataFrame, "pd": pd}
    (source,) = [
        c.source for c in code_cells(nbformat.read(BASELINE, 4)) if "evaluate_matched(results" in c.source
    ]
    *_, last = source.splitlines()
    exec(source.replace(last, f"table = {last}"), namespace)
    table = namespace["table"].set_index("codec")
    assert (
        list(table.index) == ["mine", *available_peers()]
        and set(table["images"]) == {100}
        and "fid" not in table
    )


# --- Run by papermill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"epoch": 2}, {"epochs": "many"}, {"out_dir": "/proc/runs"}], ids=str)
def test_a_bad_parameter_stops_the_notebook_at_its_first_cell(given, tmp_path, monkeypatch):
    """The user has a startup file, whose variables are no parameters and stay."""
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text('project = "thesis"')
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(BASELINE, tmp_path / "out.ipynb", given, cwd=tmp_path, progress_bar=False)
    assert caught.value.ename == "SettingError"
    assert caught.value.source == first_cells(BASELINE)[1]
    assert re.search(rf"\b{next(iter(given))}\b", caught.value.evalue)
    assert {path.name for path in tmp_path.iterdir()} == {"out.ipynb", "ipython"}


def test_a_startup_file_of_the_users_does_not_stop_a_notebook(tmp_path, monkeypatch):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text('project = "thesis"\ndevice = "abacus"')
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(FOLDER / "06_report.ipynb", 4)
    at = [is_tagged(cell) for cell in notebook.cells].index(True)
    shown = nbformat.v4.new_code_cell("print(project, device, p.device, p.seed)")
    notebook.cells = [*notebook.cells[at : at + 2], shown]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    given = {"out_dir": str(tmp_path / "runs"), "seed": 7}
    done = papermill.execute_notebook(tmp_path / "in.ipynb", None, given, cwd=tmp_path, progress_bar=False)
    assert done.cells[-1].outputs[0].text == "thesis abacus auto 7\n"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(notebook, out_dir) of a run from papermill's command line, in a working directory of its own."""
    home = tmp_path_factory.mktemp("anywhere")
    out_dir = home / "results" / "runs"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [
        sys.executable,
        "-m",
        "papermill",
        with_answers("01_baseline", tmp_path_factory.mktemp("answers")),
        "out.ipynb",
        "-p",
        "profile",
        "sample",
        "-p",
        "epochs",
        "1",
    ]
    command += ["-p", "batch_size", "9", "-p", "eval_limit", "1", "-p", "out_dir", out_dir]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path.name for path in home.iterdir()} == {"out.ipynb", "results"}
    return nbformat.read(home / "out.ipynb", 4), out_dir


def outputs(notebook, kind: str) -> list:
    """The data of one MIME type among all outputs."""
    found = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [data[kind] for data in found if kind in data]


def test_it_runs_without_error_or_warning(executed):
    notebook, _ = executed
    for cell in code_cells(notebook):
        assert cell.execution_count
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            assert "Warning" not in output.get("text", "")


def test_it_writes_real_files(executed):
    _, out_dir = executed
    (run,) = out_dir.glob("baseline-*")
    image = datasets("kodak")[0][0]
    for codec, folder in ((load("demo"), out_dir / "evaluation-demo"), (load(run), run)):
        (kept,) = folder.glob("files/kodak/*.taco")
        assert kept.name == f"{image.name}.taco"
        assert codec.decode(kept).size == image.image.size
        said = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        assert said["fingerprint"] == codec.fingerprint.hex()
        assert said["means"][0]["bytes"] == kept.stat().st_size
        assert (folder / "evaluation.csv").is_file()
    assert said["weights"]["experiment"] == json.loads(baseline("sample", epochs=1, batch_size=9).to_json())
    assert said["weights"]["steps"] == said["weights"]["total_steps"] > 0
    assert (out_dir / kept.name).read_bytes() == (
        out_dir / "evaluation-demo/files/kodak" / kept.name
    ).read_bytes()


def test_it_shows_figures_and_pictures(executed):
    notebook, _ = executed
    assert len(outputs(notebook, "application/vnd.plotly.v1+json")) == 5
    assert len(outputs(notebook, "image/svg+xml")) == 1
    compared, captions = [Page(page) for page in outputs(notebook, "text/html") if "taco-compare" in page]
    shown = [figure["data-label"].partition(",")[0] for figure in compared.figures]
    assert shown == ["original", "demo", *available_peers(), "where the bits went"]
    presets = ["OFA", "context", "empty", "nonsense"]  # a single image has no other's caption
    assert [figure["data-label"] for figure in captions.figures] == ["original", *presets]
    for figure in compared.figures + captions.figures:
        assert all(low < high for low, high in pixels(figure).getextrema())
    assert len(json.dumps(notebook)) < 15_000_000


def test_its_page_opens_without_a_network(executed, tmp_path):
    nbformat.write(executed[0], tmp_path / "01_baseline.ipynb")
    seen = opens_without_a_network(export_html(tmp_path / "01_baseline.ipynb"))
    assert seen["figures"] == 5 and seen["compare"] == 2 and seen["formulas"] > 10
    assert seen["pictures"] >= len(["original", "demo", "JPEG", "WebP", "the map"]) + 6


def test_its_figures_need_no_network(executed):
    pages = outputs(executed[0], "text/html")
    assert any(len(page) > 1_000_000 and "plotly.js" in page for page in pages), (
        "plotly's script is in the notebook"
    )
    sources = {
        source for page in pages for source in re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\S+", page)
    }
    sources = {source for source in sources if 'src="data:' not in source}
    assert all("mathjax" in source for source in sources), (
        "MathJax sets formulas in titles, of which there are none"
    )


def test_its_summary_is_of_finite_numbers(executed):
    tables = [
        Cells(page).rows
        for page in outputs(executed[0], "text/html")
        if page.startswith(("<table", "<details"))
    ]
    beside_peers, after_training = [
        rows for rows in tables if {"codec", "images", "bpp", "psnr"} <= set(rows[0])
    ]
    codecs = [row[0] for row in beside_peers[1:] + after_training[1:]]
    assert codecs[:2] == ["demo", "JPEG"] and codecs[-2] == "demo" and codecs[-1] == "baseline"
    for row in beside_peers[1:] + after_training[1:]:
        cells = dict(zip(beside_peers[0], row))
        assert cells["images"] == "1" and cells["dataset"] == "kodak"
        numbers = {name: float(cells[name]) for name in ("bpp", "psnr", "ms_ssim")}
        assert all(map(math.isfinite, numbers.values())), cells
        assert numbers["bpp"] > 0 and numbers["psnr"] > 10 and 0 < numbers["ms_ssim"] <= 1
