"""What the test files share: the data beside the repository, and a codec so small that it runs by the thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TINY = {"N": 8, "M": 16, "groups": (4, 12), "text_dim": 16, "heads": 2, "context_widths": (8, 8)}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `../shared`; without it the test is skipped."""
    path = TESTS.parents[1] / "shared"
    if not path.is_dir():
        pytest.skip("../shared is not on this machine")
    return path


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


@pytest.fixture(scope="session")
def tiny_codec():
    """A codec with random weights that no test may change."""
    return make_codec()


@pytest.fixture(scope="session")
def apart() -> Callable[..., None]:
    """`apart(function, *args)` calls a test module's function in a process of its own, with 1 GiB of memory to spare.

    A crash or hang of the entropy coder, or its hunger for memory, so fails a test and not the whole run.
    """

    def call(function: Callable, *args: object, timeout: float = 120) -> None:
        module, name = function.__module__, function.__name__
        code = f"import conftest, {module}; conftest.limit_memory(1 << 30); {module}.{name}(*{args!r})"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}"

    return call


def limit_memory(spare: int) -> None:
    """Let this process map at most `spare` bytes more than it has now, where the system can."""
    if sys.platform == "linux":
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + spare, mapped + spare))
