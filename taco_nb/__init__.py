"""A notebook companion to TACO, text-guided neural image compression (Lee et al., ICML 2024).

    codec = load("demo")
    data = codec.encode("barn.jpg", "a red barn")
    picture = codec.decode(data)

The names below are imported when they are first used, so that `import taco_nb` is quick.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "load": "codec",
    "Codec": "codec",
    "Experiment": "experiment",
    "baseline": "experiment",
    "fit": "training",
    "evaluate": "evaluation",
    "datasets": "data",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taco_nb' has no attribute {name!r}")
    return getattr(import_module(f"taco_nb.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
