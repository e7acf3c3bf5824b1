"""This module takes images through the codec and back, as real files, and measures everything about each of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taco_nb.codec import Codec
from taco_nb.data import Sample
from taco_nb.data.images import to_tensor
from taco_nb.evaluation.records import file_of
from taco_nb.files import atomic_write
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.fid import patches
from taco_nb.metrics.perception import MIN_SIDE, MINI_MIN_SIDE, Lpips, MiniDistance
from taco_nb.metrics.rate import bpp
from taco_nb.model.precision import full_float32

CAPTIONS = {
    "first": "the first of each image's captions",
    "last": "the last of each image's captions, which TACO's released script reports",
    "best": "of each image's captions the one with the lowest lpips_01, as TACO's paper chose among the five of MS-COCO",
}


class Coded(NamedTuple):
    """An image's file under one caption, what it decodes to, and how many seconds both took."""

    caption: str
    data: bytes
    x_hat: Tensor
    encode_s: float
    decode_s: float


def measure(
    codec: Codec,
    samples: Sequence[Sample],
    folder: Path,
    networks: Mapping[str, Any],
    caption: str = "first",
    patch_size: int | None = None,
    read: Sequence[str] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a row of figures for each of some images of one size, and features, from which a data set's figures come.

    The images' `.taco` files are written to `folder`. `networks` has what metrics look through, by metric; without one,
    its columns or features are absent. A row has the columns that `taco_nb.evaluate` documents, but for those of the whole
    set. Features: "fid.x" and "fid.x_hat", of the pictures themselves where `patch_size` is None, else of their patches;
    "cmmd.x" and "cmmd.x_hat", "mini_mmd.x" and "mini_mmd.x_hat".

    With `read`, a caption per image, the encoder reads those. The scores of picture against caption keep the caption that
    is chosen from the image's own.
    """
    lpips = networks.get("lpips")
    x = torch.stack([to_tensor(sample.image) for sample in samples]).to(codec.device)
    if read is None:
        chosen = _choose(codec, samples, x, folder, caption, lpips)
        own = [coded.caption for coded in chosen]
    else:
        chosen = _code(codec, samples, read, folder)
        own = [_plain(sample, caption) for sample in samples]
    x_hat = torch.stack([coded.x_hat for coded in chosen])
    # Metrics that are fed 8-bit pictures see what a user gets.
    pictures, decoded = (values.clamp(0, 1).mul(255).round().byte() for values in (x, x_hat))
    with _repeatable_float32(codec.device.type):
        figures = [
            distortion(*pair) | {f"{key}_taco": value for key, value in distortion(*pair, "taco").items()}
            for pair in zip(x, x_hat)
        ]
        seen_by: dict[str, Sequence[float]] = {}
        if lpips:
            seen_by["lpips"] = _distances(lpips, x, decoded.float() / 255, MIN_SIDE, convention="pm1")
            seen_by["lpips_01"] = _distances(lpips, x, x_hat, MIN_SIDE)
        if mini := networks.get("mini_distance"):
            seen_by["mini_distance"] = _distances(mini, x, decoded.float() / 255, MINI_MIN_SIDE)
        for name in ("clip_score", "mini_score"):
            if name in networks:
                seen_by[name] = networks[name](decoded, own)
        features = {}
        for name, seen in (("x", pictures), ("x_hat", decoded)):
            if "fid" in networks:
                cut = seen if patch_size is None else torch.cat([patches(one, patch_size) for one in seen])
                features[f"fid.{name}"] = networks["fid"](cut)
            for metric in ("cmmd", "mini_mmd"):
                if metric in networks:
                    features[f"{metric}.{name}"] = networks[metric](seen)
    rows = []
    for i, (sample, coded) in enumerate(zip(samples, chosen)):
        row = {**size_columns(sample, len(coded.data)), "caption": coded.caption, **figures[i]}
        row |= {name: values[i] for name, values in seen_by.items()}
        rows.append(row | {"encode_s": coded.encode_s, "decode_s": coded.decode_s})
    return rows, features


def size_columns(sample: Sample, size: int) -> dict[str, Any]:
    """Return the columns that follow from an image's file of `size` bytes."""
    width, height = sample.image.size
    columns = {"name": sample.name, "width": width, "height": height, "bytes": size}
    return columns | {"bpp": bpp(size, width, height)}


def _choose(
    codec: Codec, samples: Sequence[Sample], x: Tensor, folder: Path, caption: str, lpips: Lpips | None
) -> list[Coded]:
    """Return each image under the caption that the rule chooses, its file in `folder`."""
    if caption != "best":
        return _code(codec, samples, [_plain(sample, caption) for sample in samples], folder)
    best: list[Coded] = []
    lowest = [math.inf] * len(samples)
    for turn in range(max(len(sample.captions) for sample in samples)):
        # an image with fewer captions than others goes through again under its last, which changes nothing
        coded = _code(codec, samples, [sample.captions[: turn + 1][-1] for sample in samples], folder)
        with _repeatable_float32(codec.device.type):
            distances = _distances(lpips, x, torch.stack([one.x_hat for one in coded]), MIN_SIDE)
        best = best or coded
        for i, distance in enumerate(distances):
            if distance < lowest[i]:
                best[i], lowest[i] = coded[i], distance
    for sample, one in zip(samples, best):  # the last caption's files are there, whichever was the best
        _write_file(folder, sample, one.data)
    return best


def _plain(sample: Sample, caption: str) -> str:
    """Return the caption of an image that the rule "first" or "last" chooses."""
    return sample.captions[0 if caption == "first" else -1]


def _code(codec: Codec, samples: Sequence[Sample], captions: Sequence[str], folder: Path) -> list[Coded]:
    """Encode images to files and decode these; the seconds of each image are an equal share of its batch's."""
    clock = time.perf_counter()
    files = codec.encode_batch([sample.image for sample in samples], captions)
    encode_s = (time.perf_counter() - clock) / len(samples)
    paths = [_write_file(folder, sample, data) for sample, data in zip(samples, files)]
    clock = time.perf_counter()
    x_hat = codec.decode_batch(paths)
    if x_hat[0].is_cuda:
        torch.cuda.synchronize(x_hat[0].device)
    decode_s = (time.perf_counter() - clock) / len(samples)
    return [Coded(caption, data, x, encode_s, decode_s) for caption, data, x in zip(captions, files, x_hat)]


def _write_file(folder: Path, sample: Sample, data: bytes) -> Path:
    path = file_of(folder, sample.name, ".taco")
    with atomic_write(path, durable=False) as file:
        file.write(data)
    return path


def _distances(
    network: Lpips | MiniDistance, x: Tensor, x_hat: Tensor, min_side: int, **how: str
) -> list[float]:
    """Return a perceptual distance per picture; NaN for pictures that are too small for its network."""
    if min(x.shape[-2:]) < min_side:
        return [math.nan] * len(x)
    with torch.no_grad():
        return network.distance(x_hat.to(network.device), x.to(network.device), **how).tolist()


@contextmanager
def _repeatable_float32(device_type: str) -> Iterator[None]:
    """Measure in full float32, whatever the program around has allowed, by the same algorithms of cuDNN each time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with full_float32(device_type):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
