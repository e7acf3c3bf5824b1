"""Published numbers beside measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taco_nb.evaluation import means

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {"lpips": "lpips_01"}  # the report's LPIPS follows TACO's [0, 1] convention
DATASETS = {"MS-COCO": "coco", "CLIC": "clic", "Kodak": "kodak"}


def validation(results: pd.DataFrame, report: dict[str, Any]) -> pd.DataFrame:
    """The figures that the report states for the baseline, each beside the mean of `results` where it was measured.

    Columns: dataset, metric, published, measured, difference (measured less published), images. A figure whose data set
    or metric is not in `results` has no measurement.
    """
    import pandas as pd

    measured = means(results).set_index("dataset")
    rows = []
    for name, figures in report["baseline"].items():
        dataset = DATASETS[name]
        for metric, value in figures.items():
            column = COLUMNS.get(metric, metric)
            found = dataset in measured.index and column in measured
            here = float(measured.loc[dataset, column]) if found else float("nan")
            images = int(measured.loc[dataset, "images"]) if found else 0
            rows.append((name, metric, value, here, here - value, images))
    return pd.DataFrame(rows, columns=["dataset", "metric", "published", "measured", "difference", "images"])
