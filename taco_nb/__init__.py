"""A notebook companion to TACO, text-guided neural image compression (Lee et al., ICML 2024).

    codec = load("demo")
    data = codec.encode("barn.jpg", "a red barn")
    picture = codec.decode(data)

The names below are imported when they are first used, so that `import taco_nb` is quick.
"""

from taco_nb.lazy import lazy_names

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
__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
