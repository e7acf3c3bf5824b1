"""What the test files share: the data beside the repository, and a codec so small that it runs by the thousand."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import nbformat
import pytest

TESTS = Path(__file__).resolve().parent
FRESH = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
"""Its processes are forks of one that has imported what takes seconds to import, and has never computed anything."""
if os.name == "posix":
    FRESH.set_forkserver_preload(["taco_nb.evaluation.run", "taco_nb.training.loop"])
PLAIN = {"text_encoder": "untrained-64", "k_P": 0.0, "k_J": 0.0}
"""Settings of an experiment without a CLIP: random text, and a loss of rate and squared error alone."""
TINY = {"N": 8, "M": 16, "groups": (4, 12), "text_dim": 16, "heads": 2, "context_widths": (8, 8)}


SLOWEST = (
    "test_browser", "test_ablation", "test_notebooks", "test_report", "test_training", "test_training_processes",
    "test_training_stops", "test_demo", "test_timing", "test_processes",
)  # fmt: skip
"""The files that run notebooks or train begin first, so that no worker is left alone with them in the end."""


def pytest_xdist_auto_num_workers() -> int:
    """Return three workers for two cores: many tests wait for processes that they have started."""
    from taco_nb.processes import cpu_count

    return max(1, cpu_count() * 3 // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; `make test` gives a worker one file after the other, in this order."""
    rank = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOWEST)))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what importing has made.

    These are a million objects, half a second for each full collection, and every training run ends with one.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or native libraries report at the end what they take for a leak


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `../shared`; without it the test is skipped."""
    path = TESTS.parents[1] / "shared"
    if not path.is_dir():
        pytest.skip("../shared is not on this machine")
    return path


def with_answers(name: str, folder: Path) -> Path:
    """Write a copy of a notebook into `folder`, with the code of its folded answers as cells at its end; return its path."""
    notebook = nbformat.read(TESTS.parent / "notebooks" / f"{name}.ipynb", 4)
    folded = "".join(cell.source.partition("<summary>Answers")[2] for cell in notebook.cells)
    answers = re.findall(r"^```python\n(.*?)^```$", folded, re.DOTALL | re.MULTILINE)
    assert answers, f"{name} has no answers that run"
    notebook.cells += [nbformat.v4.new_code_cell(code, id=f"answer-{i}") for i, code in enumerate(answers)]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def command(*words: object) -> int:
    """Run `taco-nb` with these words in this process, and return its exit status."""
    from taco_nb.tools.cli import main

    try:
        main([str(word) for word in words], prog_name="taco-nb")
    except SystemExit as end:
        return end.code or 0
    return 0


@contextmanager
def precision_put_back() -> Iterator[None]:
    """Put every setting of float32's precision back, since setting one of PyTorch's names for it sets some of the others."""
    import torch

    backends = torch.backends
    owners = [
        backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul,
        backends.mkldnn, backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul,
    ]  # fmt: skip
    start = [owner.fp32_precision for owner in owners]
    try:
        yield
    finally:
        backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for owner, value in zip(owners, start):
            owner.fp32_precision = value


def environment_of(**variables: str) -> dict[str, str]:
    """This process's environment with the package and the tests on the path, and with these variables."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))} | variables


def run_python(program: str, *arguments: object, env: dict[str, str] | None = None, cwd: Path = TESTS.parent):
    """Run a program in a process of its own, which must end well. Return it, with what it printed."""
    words = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(
        words, env=env or environment_of(), cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def make_net(seed: int = 0, **sizes):
    """A tiny TACO with random weights, its latents spread over many values and its encoder listening to the caption."""
    import torch

    from taco_nb.model import TACO, ModelConfig

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = TACO(ModelConfig(**TINY | sizes))
        net.g_a.analysis_transform[16].weight *= 10
        net.h_a.reduction[4].weight *= 20
        for network in (*net.entropy_parameters_anchor, *net.entropy_parameters_nonanchor):
            scales, means = network.fusion[4].bias.chunk(2)
            scales.uniform_(0.2, 8)
            means.uniform_(-2, 2)
        for layer in (8, 15):
            net.g_a.analysis_transform[layer].gamma.normal_()
    return net.eval()


def make_codec(seed: int = 0, **sizes):
    """A codec around `make_net`, reading captions through an untrained tower."""
    from taco_nb import Codec

    return Codec(make_net(seed, **sizes), "untrained-16", 8, name=f"tiny {seed}")


def make_lpips(seed: int = 0):
    """LPIPS over an AlexNet of random weights: no number of it means anything."""
    import warnings

    import lpips
    import torch

    from taco_nb.metrics.perception import Lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return Lpips(model=lpips.LPIPS(pnet_rand=True, verbose=False, eval_mode=False))


def make_inception(features: int = 6):
    """In the place of Inception: one layer of random weights."""
    import torch
    from torch import nn
    from torchvision.transforms import ConvertImageDtype

    from taco_nb.metrics.fid import Inception

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, features, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Inception(nn.Sequential(ConvertImageDtype(torch.float), *layers))


def save_inception(path: Path) -> Path:
    """A file like that of torch-fidelity, for the whole network, its values random."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path="none"
        )
    state = {
        key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def make_clip(image_size: int = 32):
    """A small CLIP of random weights."""
    import open_clip
    import torch

    sizes = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": image_size, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.CLIP(**sizes, quick_gelu=True).eval()


def make_networks() -> dict:
    """All that metrics look through, with random weights: how they are used can be tested, what they say means nothing."""
    import open_clip

    from taco_nb.metrics.joint_space import ClipScore, CmmdEmbedding

    return {
        "lpips": make_lpips(),
        "fid": make_inception(),
        "cmmd": CmmdEmbedding(make_clip(40)),
        "clip_score": ClipScore(make_clip(), open_clip.SimpleTokenizer()),
    }


@pytest.fixture(scope="session")
def tiny_codec():
    """A codec with random weights that no test may change."""
    return make_codec()


@pytest.fixture
def apart(tmp_path) -> Callable[..., None]:
    """`apart(function, *args)` calls a test module's function in a process of its own, with 1 GiB of memory to spare.

    A crash or hang of the entropy coder, or its hunger for memory, so fails a test and not the whole run.
    """

    def call(function: Callable, *args: object) -> None:
        process = fresh_process(function, *args, output=tmp_path / "said", memory=1 << 30)
        process.join()
        said = (tmp_path / "said").read_text()
        assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}:\n{said[-4000:]}"

    return call


def fresh_process(
    function: Callable, *args: object, output: Path, memory: int | None = None, **environment: str
) -> BaseProcess:
    """Start `function(*args)` in a process of its own, which may run on with as many threads as this one.

    A new interpreter would import PyTorch and what is built on it for seven seconds. What the process says on stdout and
    stderr goes to the file `output`. It heads a group of processes, as one does that a shell starts.
    """
    import torch

    how = (str(output), torch.get_num_threads(), memory, environment)
    process = FRESH.Process(target=_in_fresh_process, args=(how, function, args))
    process.start()
    return process


def _in_fresh_process(how: tuple, function: Callable, args: tuple) -> None:
    import torch

    output, threads, memory, environment = how
    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.setpgid(0, 0)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    if memory is not None:
        limit_memory(memory)
    function(*args)


def limit_memory(spare: int) -> None:
    """Let this process map at most `spare` bytes more than it has now, where the system can."""
    if sys.platform == "linux":
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + spare, mapped + spare))
