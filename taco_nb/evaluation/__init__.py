"""Evaluation: `evaluate` measures a codec on data sets, by real files; on the command line, `taco-nb evaluate`.

    run.py       evaluate: what is measured, by which processes, and what is said of it
    measure.py   some images through the codec and back, and their figures
    records.py   what is kept on disk, and how tables are written, read and averaged
    protocol.py  labels, commands that repeat an evaluation, and why figures may not be judged
    peers.py     JPEG, WebP, AVIF

The names below are imported when they are first used, so that the command line answers before PyTorch loads.
"""

from taco_nb.lazy import lazy_names

_HOMES = {
    "QUALITIES": "peers",
    "evaluate": "run",
    "evaluate_matched": "peers",
    "evaluate_peers": "peers",
    "means": "records",
    "read_evaluation": "records",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
