"""Other codecs to stand beside: JPEG, WebP, AVIF and, where Pillow has it, JPEG XL, as real files."""

from __future__ import annotations

import io
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from taco_nb.errors import DataError, SettingError
from taco_nb.metrics.rate import bpp


@dataclass(frozen=True)
class _Encoder:
    pillow_format: str
    qualities: range
    options: dict[str, Any]


_ENCODERS = {
    # libjpeg-turbo, with Huffman tables fitted to the picture
    "JPEG": _Encoder("JPEG", range(1, 101), {"subsampling": "4:2:0", "optimize": True}),
    # libwebp's most thorough search; its lossy mode knows 4:2:0 only
    "WebP": _Encoder("WEBP", range(0, 101), {"method": 6}),
    # libavif's default speed: on Kodak 0.2 s a picture, where speed 4 takes 0.8 s and gains 0.25 dB at the same rate.
    # One tile, as tiling by the number of cores would give other bytes on other machines.
    "AVIF": _Encoder("AVIF", range(0, 101), {"speed": 6, "subsampling": "4:2:0", "autotiling": False}),
    # libjxl's default effort; its quality 100 is a lossless mode, which is no peer
    "JPEG XL": _Encoder("JXL", range(0, 100), {"effort": 7}),
}


@dataclass(frozen=True)
class PeerResult:
    """A picture as another codec keeps it: the file's bytes and what they decode to.

    `quality` is the codec's own setting; `above_target` is true where `match_bpp` found no file small enough.
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
    """Those of "JPEG", "WebP", "AVIF" and "JPEG XL" that this machine's Pillow, with its loaded plugins, can encode."""
    Image.init()
    return [name for name, encoder in _ENCODERS.items() if encoder.pillow_format in Image.SAVE]


def encode_peer(image: Image.Image, peer: str, quality: int) -> PeerResult:
    """Encode an RGB picture with a peer at one quality, and decode the file's bytes back.

    Settings: JPEG 4:2:0 with optimised Huffman tables, WebP method 6, AVIF 4:2:0 at speed 6, JPEG XL at effort 7.
    Quality runs from 0 (JPEG: 1) to 100 (JPEG XL: 99). Profiles, EXIF and comments of `image` are not written, so the
    rate is that of the pixels. Raises `SettingError` for a peer that is unknown or not in this Pillow, or a quality out
    of range, and `DataError` for a picture that is not RGB or larger than the format allows.
    """
    return _decoded(image, peer, quality, _encoded(image, peer, quality))


def match_bpp(image: Image.Image, peer: str, target_bytes: int) -> PeerResult:
    """The best file of a peer that costs no more than `target_bytes`, for a comparison at matched rate.

    Bisects over quality, of which a file's size is a nearly monotone function. The result fits, and the next quality
    up does not (or is out of range). If even the lowest quality is too large, that file is returned with `above_target`
    set. Raises `SettingError` unless `target_bytes` is positive, and what `encode_peer` raises.
    """
    if target_bytes <= 0:
        raise SettingError(f"A file cannot be matched to {target_bytes} bytes; the target must be positive.")
    low, high = _encoder(peer).qualities[0], _encoder(peer).qualities[-1] + 1
    data = _encoded(image, peer, low)
    if len(data) > target_bytes:
        return _decoded(image, peer, low, data, above_target=True)
    while high - low > 1:
        middle = (low + high) // 2
        attempt = _encoded(image, peer, middle)
        if len(attempt) <= target_bytes:
            low, data = middle, attempt
        else:
            high = middle
    return _decoded(image, peer, low, data)


def peer_curve(image: Image.Image, peer: str, qualities: Iterable[int]) -> list[PeerResult]:
    """A peer's rate-distortion curve on one picture: a result per quality, in the order given (see `encode_peer`)."""
    return [encode_peer(image, peer, quality) for quality in qualities]


def _encoder(peer: str) -> _Encoder:
    if peer not in (available := available_peers()):
        reason = "is not in this machine's Pillow" if peer in _ENCODERS else "is not known"
        raise SettingError(f"The peer {peer!r} {reason}; choose from {available}.")
    return _ENCODERS[peer]


def _encoded(image: Image.Image, peer: str, quality: int) -> bytes:
    encoder = _encoder(peer)
    try:
        quality = operator.index(quality)
    except TypeError:
        raise SettingError(f"The quality of {peer} is a whole number, not {quality!r}.") from None
    if quality not in encoder.qualities:
        first, last = encoder.qualities[0], encoder.qualities[-1]
        raise SettingError(f"The quality of {peer} runs from {first} to {last}; {quality} is out of range.")
    if image.mode != "RGB":
        raise DataError(
            f'A picture of mode {image.mode!r} was given to {peer}; convert it first: image.convert("RGB").'
        )
    pixels = image.copy()
    pixels.info = {}
    file = io.BytesIO()
    try:
        pixels.save(file, encoder.pillow_format, quality=quality, **encoder.options)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{peer} cannot hold a picture of {image.width}x{image.height} pixels: {error}."
        ) from error
    return file.getvalue()


def _decoded(
    image: Image.Image, peer: str, quality: int, data: bytes, above_target: bool = False
) -> PeerResult:
    decoded = Image.open(io.BytesIO(data), formats=[_ENCODERS[peer].pillow_format]).convert("RGB")
    return PeerResult(peer, int(quality), data, decoded, above_target)
