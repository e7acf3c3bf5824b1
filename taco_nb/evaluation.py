"""Real files, measured: a row per image, and where every number came from."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from taco_nb.codec import Codec
from taco_nb.data import CaptionedImages, Sample
from taco_nb.data.images import to_image, to_tensor
from taco_nb.errors import SettingError
from taco_nb.files import atomic_write
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.perception import Lpips
from taco_nb.metrics.rate import bpp
from taco_nb.peers import PeerResult, available_peers, match_bpp, peer_curve
from taco_nb.pretrained import ALEXNET
from taco_nb.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd

QUALITIES = (5, 10, 20, 35, 50, 65, 80, 90)
"""Of the other codecs' own scales, for their rate-distortion curves."""


def evaluate(
    codec: Codec,
    sets: Sequence[CaptionedImages],
    out_dir: str | os.PathLike | None = None,
    *,
    lpips: Lpips | None = None,
) -> pd.DataFrame:
    """Encode every image with its first caption to a `.taco` file, decode the file, and measure both: a row per image.

    Columns: codec, dataset, name, caption, width, height, bytes (the file's size), bpp, psnr and ms_ssim of the 8-bit
    picture, psnr_taco and ms_ssim_taco by the reference's protocol, lpips (of the 8-bit picture, in [-1, 1] as the library
    wants) and lpips_01 (of the floats, in [0, 1], as TACO published) where LPIPS's weights are on the machine, encode_s and
    decode_s (seconds, wall clock, without the loading of tower and tables).

    With `out_dir`, `files/<dataset>/<name>.taco`, `evaluation.csv` and `evaluation.json` (means, experiment, versions,
    commit, hardware, checksums of the data) are kept there. Raises `DataError` for an image that cannot be read,
    `SettingError` if `sets` is no list of data sets with names of their own.
    """
    import pandas as pd

    lpips = lpips or find_lpips()
    started = time.time()
    codec.decode(codec.encode(Image.new("RGB", (64, 64)), ""))  # what is loaded once is no part of the first row's time
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch if out_dir is None else out_dir) / "files"
        rows = [
            {"codec": codec.name, "dataset": dataset.name, **_measure(codec, sample, files / dataset.name, lpips)}
            for dataset, sample in _samples(sets, f"evaluating {codec.name}")
        ]
    results = pd.DataFrame(rows)
    if out_dir is not None:
        about = {
            "codec": codec.name,
            "fingerprint": codec.fingerprint.hex(),
            "weights": codec.about,
            "text_encoder": codec.text_encoder,
            "data": {dataset.name: {"images": len(dataset), "sha256": dataset.checksum()} for dataset in sets},
            "means": json.loads(means(results).to_json(orient="records", double_precision=15)),  # null for NaN
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 1),
            **provenance(),
        }
        with atomic_write(Path(out_dir) / "evaluation.csv", "w") as file:
            results.to_csv(file, index=False)
        with atomic_write(Path(out_dir) / "evaluation.json", "w") as file:
            json.dump(about, file, indent=1)
    return results


def evaluate_peers(
    sets: Sequence[CaptionedImages],
    qualities: Iterable[int] = QUALITIES,
    peers: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The rate-distortion curves of JPEG, WebP, AVIF (and JPEG XL where Pillow has it): a row per image and quality.

    Columns as `evaluate`'s, as far as they apply, and quality. `peers` defaults to all that this machine's Pillow has.
    """
    import pandas as pd

    qualities = list(qualities)
    rows = [
        {**_peer_row(dataset, sample, result), "quality": result.quality}
        for dataset, sample in _samples(sets, "encoding with other codecs")
        for peer in (available_peers() if peers is None else peers)
        for result in peer_curve(sample.image, peer, qualities)
    ]
    return pd.DataFrame(rows)


def evaluate_matched(results: pd.DataFrame, sets: Sequence[CaptionedImages]) -> pd.DataFrame:
    """The other codecs at no more bytes than `results` (from `evaluate`) spent on the same image: a row per both.

    Where even a peer's smallest file is larger, that file is measured, and `above_target` is true in its row. Raises
    `SettingError` unless `results` holds each image of `sets` exactly once.
    """
    import pandas as pd

    budget = results.set_index(["dataset", "name"])["bytes"]
    if not budget.index.is_unique:
        raise SettingError("These results have more than one row per image: give those of a single codec.")
    rows = []
    for dataset, sample in _samples(sets, "matching other codecs"):
        if (dataset.name, sample.name) not in budget.index:
            raise SettingError(f"{sample.name} of {dataset.name} is not in these results: evaluate the same data sets.")
        for peer in available_peers():
            result = match_bpp(sample.image, peer, int(budget[dataset.name, sample.name]))
            choice = {"chosen_quality": result.quality, "above_target": result.above_target}
            rows.append({**_peer_row(dataset, sample, result), **choice})
    return pd.DataFrame(rows)


def means(results: pd.DataFrame) -> pd.DataFrame:
    """The mean of every measured column over the images of each data set, per codec (and quality, for peers)."""
    results = results.reset_index(drop=True)  # frames put together keep their row numbers, which would be ambiguous
    keys = [key for key in ("codec", "dataset", "quality") if key in results]
    numbers = results.drop(columns=[*keys, "width", "height"]).select_dtypes("number")
    table = results[keys].join(numbers).groupby(keys, sort=False, dropna=False).mean()
    return table.assign(images=results.groupby(keys, sort=False, dropna=False).size()).reset_index()


@cache
def find_lpips() -> Lpips | None:
    """LPIPS where its weights are on the machine; else None, after one line that says what to do, once.

    An evaluation downloads nothing: it may run where there is no network, and 244 MB are nobody's to spend unasked.
    """
    if ALEXNET.path is None:
        print(f"Without LPIPS: {ALEXNET.missing}")
        return None
    return Lpips()


def _samples(sets: Sequence[CaptionedImages], what: str) -> Iterator[tuple[CaptionedImages, Sample]]:
    """One image in memory at a time, under a progress bar."""
    from tqdm.auto import tqdm

    if isinstance(sets, CaptionedImages) or not sets:
        raise SettingError("The data sets are a list with at least one in it, as taco_nb.datasets gives them.")
    if len({dataset.name for dataset in sets}) < len(sets):
        raise SettingError(f"Two data sets have the same name, of {[dataset.name for dataset in sets]}: rename one.")
    with tqdm(total=sum(map(len, sets)), desc=what, unit="image") as bar:
        for dataset in sets:
            for i in range(len(dataset)):
                yield dataset, dataset[i]
                bar.update()


def _measure(codec: Codec, sample: Sample, folder: Path, lpips: Lpips | None) -> dict[str, Any]:
    path = folder / f"{sample.name}.taco"
    caption = sample.captions[0]

    clock = time.perf_counter()
    data = codec.encode(sample.image, caption)
    encode_s = time.perf_counter() - clock
    with atomic_write(path) as file:
        file.write(data)

    clock = time.perf_counter()
    x_hat = codec.decode_tensor(path).cpu()
    decode_s = time.perf_counter() - clock

    x, picture = to_tensor(sample.image), to_tensor(to_image(x_hat))
    taco = {f"{key}_taco": value for key, value in distortion(x, x_hat, "taco").items()}
    perceived = {"lpips": lpips(x, picture)["lpips"], "lpips_01": lpips(x, x_hat)["lpips_01"]} if lpips else {}
    return {
        **_rate(sample, path.stat().st_size),
        "caption": caption,
        **distortion(x, x_hat),
        **taco,
        **perceived,
        "encode_s": encode_s,
        "decode_s": decode_s,
    }


def _peer_row(dataset: CaptionedImages, sample: Sample, result: PeerResult) -> dict[str, Any]:
    return {
        "codec": result.format,
        "dataset": dataset.name,
        **_rate(sample, len(result.data)),
        **distortion(to_tensor(sample.image), to_tensor(result.image)),
    }


def _rate(sample: Sample, size: int) -> dict[str, Any]:
    width, height = sample.image.size
    return {"name": sample.name, "width": width, "height": height, "bytes": size, "bpp": bpp(size, width, height)}
