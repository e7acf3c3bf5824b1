"""Other codecs are measured here by real files: JPEG, WebP, AVIF and, where Pillow has it, JPEG XL.

`encode_peer`, `match_bpp` and `peer_curve` take one picture, `evaluate_peers` and `evaluate_matched` whole data sets.
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image, features
from tqdm.auto import tqdm

from taco_nb.data import CaptionedImages, Sample
from taco_nb.data.images import to_tensor
from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation.measure import size_columns
from taco_nb.evaluation.records import as_json, as_table
from taco_nb.evaluation.run import check_sets
from taco_nb.files import atomic_write
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.networks import find_networks
from taco_nb.metrics.rate import bpp
from taco_nb.processes import alone_in
from taco_nb.provenance import code_digest

QUALITIES = (5, 10, 20, 35, 50, 65, 80, 90)
"""Points on the other codecs' own scales, for their rate-distortion curves."""


class _PeerFormat(NamedTuple):
    """A format of Pillow's, with the range of its qualities and the options that it is written with."""

    pillow_format: str
    qualities: range
    options: dict[str, Any]


_FORMATS = {
    # libjpeg-turbo, with Huffman tables fitted to the picture
    "JPEG": _PeerFormat("JPEG", range(1, 101), {"subsampling": "4:2:0", "optimize": True}),
    # libwebp's most thorough search; its lossy mode knows 4:2:0 only
    "WebP": _PeerFormat("WEBP", range(0, 101), {"method": 6}),
    # libavif's default speed: on Kodak 0.2 s a picture, where speed 4 takes 0.8 s and gains 0.25 dB at the same rate.
    # One tile, as tiling by the number of cores would give other bytes on other machines.
    "AVIF": _PeerFormat("AVIF", range(0, 101), {"speed": 6, "subsampling": "4:2:0", "autotiling": False}),
    # libjxl's default effort; its quality 100 is a lossless mode, which is no peer
    "JPEG XL": _PeerFormat("JXL", range(0, 100), {"effort": 7}),
}


@dataclass(frozen=True)
class PeerResult:
    """A picture as another codec keeps it: the file's bytes and what they decode to.

    `quality` is on the codec's own scale; `above_target` is true where `match_bpp` found no file small enough.
    """

    format: str
    quality: int
    data: bytes
    image: Image.Image
    above_target: bool = False

    @property
    def bpp(self) -> float:
        """Bits per pixel of the whole file, headers included."""
        return bpp(len(self.data), *self.image.size)


def available_peers() -> list[str]:
    """Return those of "JPEG", "WebP", "AVIF" and "JPEG XL" that this machine's Pillow can encode, plugins included."""
    Image.init()
    return [name for name, peer in _FORMATS.items() if peer.pillow_format in Image.SAVE]


def encode_peer(image: Image.Image, peer: str, quality: int) -> PeerResult:
    """Encode an RGB picture with a peer at one quality, and decode the file's bytes back.

    Settings: JPEG 4:2:0 with optimised Huffman tables, WebP method 6, AVIF 4:2:0 at speed 6, JPEG XL at effort 7.
    Quality runs from 0 (JPEG: 1) to 100 (JPEG XL: 99). Profiles, EXIF and comments of `image` are not written, so the
    rate is that of the pixels. Raises `SettingError` for a peer that is unknown or not in this Pillow, or a quality out
    of range, and `DataError` for a picture that is not RGB or larger than the format allows.
    """
    return _decoded(peer, quality, _encoded(image, peer, quality))


def match_bpp(image: Image.Image, peer: str, target_bytes: int) -> PeerResult:
    """Return a peer's best file of no more than `target_bytes`, for a comparison at matched rate.

    The search bisects over quality, with which a file's size nearly always rises. The result fits, and the next quality
    up does not (or is out of range). If even the lowest quality is too large, that file is returned with `above_target`
    set. Raises `SettingError` unless `target_bytes` is positive, and what `encode_peer` raises.
    """
    if target_bytes <= 0:
        raise SettingError(f"A file cannot be matched to {target_bytes} bytes; the target must be positive.")
    low, high = _format_of(peer).qualities[0], _format_of(peer).qualities[-1] + 1
    data = _encoded(image, peer, low)
    if len(data) > target_bytes:
        return _decoded(peer, low, data, above_target=True)
    while high - low > 1:
        middle = (low + high) // 2
        attempt = _encoded(image, peer, middle)
        if len(attempt) <= target_bytes:
            low, data = middle, attempt
        else:
            high = middle
    return _decoded(peer, low, data)


def peer_curve(image: Image.Image, peer: str, qualities: Iterable[int]) -> list[PeerResult]:
    """Return a peer's rate-distortion curve on one picture: a result per quality, in the order given."""
    return [encode_peer(image, peer, quality) for quality in qualities]


def _format_of(peer: str) -> _PeerFormat:
    if peer not in (available := available_peers()):
        reason = "is not in this machine's Pillow" if peer in _FORMATS else "is not known"
        raise SettingError(f"The peer {peer!r} {reason}; choose from {available}.")
    return _FORMATS[peer]


def _encoded(image: Image.Image, peer: str, quality: int) -> bytes:
    encoder = _format_of(peer)
    try:
        quality = operator.index(quality)
    except TypeError:
        raise SettingError(f"The quality of {peer} is a whole number, not {quality!r}.") from None
    if quality not in encoder.qualities:
        first, last = encoder.qualities[0], encoder.qualities[-1]
        raise SettingError(f"The quality of {peer} runs from {first} to {last}; {quality} is out of range.")
    if image.mode != "RGB":
        said = f"A picture of mode {image.mode!r} was given to {peer}"
        raise DataError(f'{said}; convert it first: image.convert("RGB").')
    pixels = image.copy()
    pixels.info = {}  # profiles, EXIF and comments, which the file would hold too
    file = io.BytesIO()
    try:
        pixels.save(file, encoder.pillow_format, quality=quality, **encoder.options)
    except (OSError, ValueError, RuntimeError) as error:
        size = f"{image.width}x{image.height}"
        raise DataError(f"{peer} cannot hold a picture of {size} pixels: {error}.") from error
    return file.getvalue()


def _decoded(peer: str, quality: int, data: bytes, above_target: bool = False) -> PeerResult:
    decoded = Image.open(io.BytesIO(data), formats=[_FORMATS[peer].pillow_format]).convert("RGB")
    return PeerResult(peer, int(quality), data, decoded, above_target)


# Whole data sets ------------------------------------------------------------------------------------------------------


def evaluate_peers(
    sets: Sequence[CaptionedImages],
    qualities: Iterable[int] = QUALITIES,
    peers: Sequence[str] | None = None,
    folder: str | os.PathLike | None = None,
) -> pd.DataFrame:
    """Return the rate-distortion curves of other codecs: a row per image, peer and quality.

    Columns are `evaluate`'s, as far as they apply, and quality. `peers` defaults to all that this machine's Pillow has.
    With `folder`, the rows of each data set are kept there, and returned without encoding the next time that the same
    images, peers and qualities are asked for.
    """
    check_sets(sets)
    peers, qualities = available_peers() if peers is None else peers, list(qualities)
    if folder is None:
        return as_table(_curve_rows(sets, peers, qualities))
    rows = []
    with alone_in(Path(folder), "encoding with other codecs", wait=True):
        for dataset in sets:
            path = Path(folder, f"{dataset.name}-{_curve_key(dataset, peers, qualities)}.json")
            if not path.is_file():
                with atomic_write(path, "w") as file:
                    file.write(as_json(_curve_rows([dataset], peers, qualities)))
            rows += json.loads(path.read_text(encoding="utf-8"))
    return as_table(rows)


def _curve_rows(
    sets: Sequence[CaptionedImages], peers: Sequence[str], qualities: Sequence[int]
) -> list[dict[str, Any]]:
    rows = [
        {**_peer_row(dataset, sample, result), "quality": result.quality}
        for dataset, sample in _samples(sets, "encoding with other codecs")
        for peer in peers
        for result in peer_curve(sample.image, peer, qualities)
    ]
    return json.loads(as_json(rows))


def _curve_key(dataset: CaptionedImages, peers: Sequence[str], qualities: Sequence[int]) -> str:
    """Return a short digest of all that a data set's curves depend on."""
    libraries = [features.version(name) for name in ("pil", "jpg", "libjpeg_turbo", "webp", "avif")]
    formats = [[peer, _format_of(peer).pillow_format, _format_of(peer).options] for peer in peers]
    code = code_digest("metrics/distortion.py", "evaluation/peers.py", "data/images.py")
    known = [dataset.checksum(), dataset.crop, formats, list(map(int, qualities)), libraries, code]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def evaluate_matched(results: pd.DataFrame, sets: Sequence[CaptionedImages]) -> pd.DataFrame:
    """Return the other codecs at no more bytes than `results` (from `evaluate`) spent on the same image.

    There is a row per image and peer, with PSNR, MS-SSIM and `mini_distance`. Where even a peer's smallest file is larger,
    that file is measured, and `above_target` is true in its row. Raises `SettingError` unless `results` holds each image of
    `sets` exactly once.
    """
    check_sets(sets)
    budget = results.set_index(["dataset", "name"])["bytes"]
    if not budget.index.is_unique:
        raise SettingError("These results have more than one row per image: give those of a single codec.")
    network = find_networks()[0].get("mini_distance")
    mini = network and network.load("cpu")
    rows = []
    for dataset, sample in _samples(sets, "matching other codecs"):
        if (dataset.name, sample.name) not in budget.index:
            raise SettingError(
                f"{sample.name} of {dataset.name} is not in these results: evaluate the same data sets."
            )
        for peer in available_peers():
            result = match_bpp(sample.image, peer, int(budget[dataset.name, sample.name]))
            choice = {"chosen_quality": result.quality, "above_target": result.above_target}
            seen = mini(to_tensor(sample.image), to_tensor(result.image)) if mini else {}
            rows.append({**_peer_row(dataset, sample, result), **seen, **choice})
    return as_table(json.loads(as_json(rows)))


def _samples(sets: Sequence[CaptionedImages], what: str) -> Iterator[tuple[CaptionedImages, Sample]]:
    """Yield one image at a time, under a progress bar."""
    with tqdm(total=sum(map(len, sets)), desc=what, unit="image") as bar:
        for dataset in sets:
            for i in range(len(dataset)):
                yield dataset, dataset[i]
                bar.update()


def _peer_row(dataset: CaptionedImages, sample: Sample, result: PeerResult) -> dict[str, Any]:
    return {
        "codec": result.format,
        "dataset": dataset.name,
        **size_columns(sample, len(result.data)),
        **distortion(to_tensor(sample.image), to_tensor(result.image)),
    }
