"""Image and caption <-> bytes: the `.taco` file.

    offset  size  what
    0       4     magic, "TACO"
    4       1     version of this layout, 1
    5       4     fingerprint of the decoder's weights: the first bytes of a SHA-256
    9       2-8   width, then height, in pixels, each a LEB128 number
            1-4   length of z's string, a LEB128 number
            4     CRC-32 of width, height and y_hat
            ...   z's string, then y's string, rANS streams
            4     CRC-32 of everything before it

The last checksum tells a damaged file from a whole one before anything is decoded. The fingerprint tells wrong weights.
The checksum of y_hat, to the last bit of every float, tells whether this machine computed the very numbers that the
encoder's did, on which every learned entropy model depends. A decoded picture is therefore the right one, or there is
none. (The synthesis after it may round a pixel otherwise on another machine or with other threads, by 1/255 and rarely.)
22 or 23 bytes for a Kodak image.
"""

from __future__ import annotations

import hashlib
import os
import platform
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taco_nb import checkpoint
from taco_nb.data.images import to_image, to_rgb, to_tensor
from taco_nb.errors import DamagedFileError, DriftError, SettingError, WrongWeightsError
from taco_nb.model import TACO

if TYPE_CHECKING:
    from PIL import Image

    from taco_nb.model import Encoded
    from taco_nb.text import Conditioning, TextTower

MAGIC = b"TACO"
VERSION = 1
MULTIPLE = 64
"""Of which the network needs height and width to be multiples."""
MODES = ("exact", "fast")
MAX_PIXELS = 1 << 26
"""The largest image, in pixels once it is padded, that is encoded or that a header may announce (8192 x 8192)."""


class Header(NamedTuple):
    """What a `.taco` file says before its strings."""

    fingerprint: bytes
    width: int
    height: int
    latents_crc: int


class Codec:
    """A trained network, the text tower its encoder reads captions through, and the file format around both.

    The text settings are an `Experiment`'s, `keywords` the JSON of the run's fitted `KeywordWeights`. The tower is loaded
    when a caption is first encoded, since a decoder never needs it. `about` is what is known of the weights, for labels
    beside results. Keywords that a language model chose are read from the data folder `data_dir`.

    `mode="fast"` computes g_a and g_s in bfloat16 where the device is quicker at it (`has_fast_bfloat16`), else as "exact"
    does. All that a decoder repeats stays in float32, so the files of either mode decode in either; pictures and sizes
    differ by rounding. "exact" is the default because measured figures are to be the weights' own, not the machine's.
    """

    def __init__(
        self,
        net: TACO,
        text_encoder: str = "ViT-B-32-quickgelu/openai",
        text_tokens: int = 38,
        *,
        text_length: str = "truncate",
        text_pooling: str = "none",
        keywords: str | None = None,
        mode: str = "exact",
        name: str = "",
        about: dict[str, Any] | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        if mode not in MODES:
            raise SettingError(f"mode is one of {MODES}, not {mode!r}.")
        self.mode = mode
        self.net = net.eval().to(memory_format=torch.channels_last)
        self.text_encoder, self.text_tokens = text_encoder, text_tokens
        self.text_length, self.text_pooling, self.keywords = text_length, text_pooling, keywords
        self.name, self.about, self.data_dir = name, about or {}, data_dir

    @property
    def device(self) -> torch.device:
        return self.net.medians().device

    @cached_property
    def tower(self) -> TextTower:
        """The frozen text tower. Raises `MissingWeightsError` where its weights are not to be had."""
        from taco_nb.text import text_tower

        tower = text_tower(self.text_encoder, length=self.text_tokens, device=str(self.device))
        if tower.dim != self.net.config.text_dim:
            raise SettingError(
                f"{self.text_encoder} gives {tower.dim} numbers per token, but these weights want "
                f"{self.net.config.text_dim}."
            )
        return tower

    @cached_property
    def conditioning(self) -> Conditioning:
        """From captions to what the encoder's adapter reads. Raises `MissingWeightsError` as `tower` does."""
        from taco_nb.text import Conditioning, KeywordWeights
        from taco_nb.text.chat_keywords import chat_keywords

        keywords = None
        if self.keywords is not None:
            keywords = KeywordWeights.from_json(self.keywords, [chat_keywords(self.data_dir)])
        return Conditioning(self.tower, self.text_length, self.text_pooling, keywords)

    @cached_property
    def fingerprint(self) -> bytes:
        """Four bytes that name the weights a decoder uses; the encoder's may differ without harm."""
        digest = hashlib.sha256()
        for key, value in sorted(self.net.state_dict().items()):
            if not key.startswith(("g_a.", "h_a.")) and value.is_floating_point():
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()[:4]

    def encode(self, image: Any, caption: str) -> bytes:
        """The bytes of a `.taco` file.

        `image`: a path, a PIL image, a uint8 or uint16 array, or a float tensor in [0, 1], as `taco_nb.data.to_rgb`
        takes them; any size from 1x1 to `MAX_PIXELS`. Transparency is laid over white, EXIF rotation applied. Raises
        `DataError` for an image that cannot be read, `SettingError` for one too large or a caption that is not text,
        `CheckpointError` where the weights make no finite numbers of it.
        """
        return self.encode_batch([image], [caption])[0]

    def encode_batch(self, images: Sequence[Any], captions: Sequence[str]) -> list[bytes]:
        """A `.taco` file of each image under its caption, as `encode` takes them; the images are all of one size.

        The transforms run on the batch, the entropy coder on each image by itself, since its decoder may get that file
        alone. The latents, and so the files, may differ from those of `encode` by the rounding of a larger batch.
        Raises what `encode` raises, and `SettingError` for images of different sizes or another number of captions.
        """
        for caption in captions:
            if not isinstance(caption, str):
                raise SettingError(
                    f"A caption is text, but this one is {caption!r}. An image without one takes ''."
                )
        pictures = [to_rgb(image) for image in images]
        if len(pictures) != len(captions):
            raise SettingError(
                f"Every image has one caption, but these are {len(pictures)} and {len(captions)}."
            )
        size = _common_size("images", [picture.size for picture in pictures])
        if not _fits(*size):
            raise SettingError(
                f"{size[0]}x{size[1]}, padded to multiples of {MULTIPLE}, is more than the {MAX_PIXELS} "
                "pixels a file may have. Scale the image down or cut it into parts."
            )
        x = pad(torch.stack([to_tensor(picture) for picture in pictures]).to(self.device))
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):  # the caller's, if any
            text = self.conditioning(captions)
            with self.transform_precision():
                y = self.net.g_a(x.contiguous(memory_format=torch.channels_last), *text).float()
        return [self._file(size, self.net.encode_latents(latents)) for latents in y.split(1)]

    def transform_precision(self) -> torch.autocast:
        """Around g_a and g_s, which a decoder need not repeat."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.mode == "fast" and has_fast_bfloat16(kind))

    def _file(self, size: tuple[int, int], coded: Encoded) -> bytes:
        size = _leb128(size[0]) + _leb128(size[1])
        head = MAGIC + bytes([VERSION]) + self.fingerprint + size + _leb128(len(coded.z_string))
        body = head + _latents_crc(size, coded.y_hat).to_bytes(4, "little") + coded.z_string + coded.y_string
        return body + zlib.crc32(body).to_bytes(4, "little")

    def decode(self, data: bytes | str | os.PathLike) -> Image.Image:
        """The picture in a `.taco` file, given its bytes or its path; no caption needed.

        Raises `DamagedFileError`, `WrongWeightsError` or `DriftError` (all `BitstreamError`), and nothing else for any
        bytes whatever: there is no wrong picture.
        """
        return to_image(self.decode_tensor(data))

    def decode_tensor(self, data: bytes | str | os.PathLike) -> Tensor:
        """As `decode`, but x_hat itself: float32 (3, height, width), neither clamped nor rounded."""
        return self.decode_batch([data])[0]

    @torch.inference_mode()
    def decode_batch(self, files: Sequence[bytes | str | os.PathLike]) -> list[Tensor]:
        """As `decode_tensor` for several files of pictures of one size, whose synthesis runs as one batch.

        Raises what `decode` raises, and `SettingError` for pictures of different sizes.
        """
        parts = [read_header(data) for data in files]
        width, height = _common_size("files", [(header.width, header.height) for header, _, _ in parts])
        y_hat = torch.cat([self._latents(*part) for part in parts])
        with self.transform_precision():
            x_hat = self.net.g_s(y_hat.contiguous(memory_format=torch.channels_last)).float()
        if not torch.isfinite(x_hat).all():
            raise DamagedFileError("The latents decode to a picture of values that are not finite: forged.")
        return [picture.contiguous() for picture in x_hat[:, :, :height, :width]]

    def _latents(self, header: Header, z_string: bytes, y_string: bytes) -> Tensor:
        """y_hat (1, M, h, w), the very numbers that the encoder had."""
        if header.fingerprint != self.fingerprint:
            raise WrongWeightsError(
                f"This file was written with the weights {header.fingerprint.hex()}, but this codec"
                f"{f' ({self.name})' if self.name else ''} has {self.fingerprint.hex()}. Load the codec that wrote it."
            )
        shape = (-(-header.height // MULTIPLE), -(-header.width // MULTIPLE))
        drift = DriftError(
            "The file is whole and the weights are right, but the decoded latents are not those that were encoded. This "
            "machine's arithmetic differs from the encoder's (another kind of processor, device or PyTorch), or "
            "the file was forged. Decode it where it was encoded."
        )
        try:
            y_hat = self.net.decode_latents(y_string, z_string, shape)
        except DamagedFileError as error:
            raise drift from error
        if _latents_crc(_leb128(header.width) + _leb128(header.height), y_hat) != header.latents_crc:
            raise drift
        return y_hat


def read_header(data: bytes | str | os.PathLike) -> tuple[Header, bytes, bytes]:
    """Header, z's string and y's string of a `.taco` file. Raises `DamagedFileError` for anything that is not one."""
    if isinstance(data, (str, os.PathLike)):
        try:
            with open(data, "rb") as file:
                data = file.read()
        except OSError as error:
            raise DamagedFileError(f"{data} cannot be read: {error.strerror}.") from None
    if not data.startswith(MAGIC):
        raise DamagedFileError("This is not a .taco file, or its first bytes are damaged.")
    if len(data) < 20 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise DamagedFileError(
            f"These {len(data)} bytes were truncated or altered: the checksum at their end is wrong."
        )
    if data[4] != VERSION:
        raise DamagedFileError(
            f"This file has version {data[4]} of the format; this program reads version {VERSION}."
        )
    try:
        width, at = _read_leb128(data, 9)
        height, at = _read_leb128(data, at)
        z_length, at = _read_leb128(data, at)
    except IndexError:
        raise DamagedFileError("The header is cut short: damaged or forged.") from None
    if not width or not height or not _fits(width, height):
        raise DamagedFileError(
            f"The header announces {width}x{height} pixels; 1 to {MAX_PIXELS} are possible."
        )
    strings = data[at + 4 : -4]
    if at + 8 > len(data) or z_length > len(strings):
        raise DamagedFileError("The header announces more bytes than there are: damaged or forged.")
    header = Header(data[5:9], width, height, int.from_bytes(data[at : at + 4], "little"))
    return header, strings[:z_length], strings[z_length:]


def pad(x: Tensor) -> Tensor:
    """Zeros to the right and below, up to the next multiples of 64, as the reference pads: (..., H, W)."""
    return F.pad(x, (0, -x.shape[-1] % MULTIPLE, 0, -x.shape[-2] % MULTIPLE))


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is quicker than float32 there: on a processor without instructions for it, it is six times slower."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # there oneDNN says yes wherever it can emulate it, from AVX-512 on; a processor with AMX has AVX512_BF16 as well
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def load(
    source: str | os.PathLike = "demo",
    *,
    mode: str = "exact",
    device: str = "cpu",
    data_dir: str | os.PathLike | None = None,
    text_encoder: str | None = None,
) -> Codec:
    """A codec ready to use, from a bundled codec's name, a run's folder, or a checkpoint file, the authors' included.

    `mode` is "exact", float32 throughout, or "fast", as `Codec` explains. `text_encoder` replaces the text tower that the
    weights name; the authors' name none and read CLIP ViT-B/32. Raises `CheckpointError` for weights that are missing,
    damaged or not TACO's.
    """
    net, about = checkpoint.load_net(checkpoint.find(source, data_dir))
    experiment = about.get("experiment", {})
    named = ("text_length", "text_pooling")
    return Codec(
        net.to(device),
        text_encoder or experiment.get("text_encoder", "ViT-B-32-quickgelu/openai"),
        experiment.get("text_tokens", 38),
        **{name: experiment[name] for name in named if name in experiment},
        keywords=about.get("keywords"),
        mode=mode,
        name=about.get("name", Path(source).name),
        about={key: value for key, value in about.items() if key != "keywords"},
        data_dir=data_dir,
    )


def _fits(width: int, height: int) -> bool:
    """Whether an image is small enough for a file; padding counts, since a line of one pixel is padded to 64."""
    return -(-width // MULTIPLE) * -(-height // MULTIPLE) * MULTIPLE**2 <= MAX_PIXELS


def _common_size(what: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    if len(set(sizes)) != 1:
        found = ", ".join(f"{width}x{height}" for width, height in dict.fromkeys(sizes)) or "none at all"
        raise SettingError(f"The {what} of a batch show pictures of one size, but these are {found}.")
    return sizes[0]


def _latents_crc(size: bytes, y_hat: Tensor) -> int:
    """CRC-32 of an image's size, and of y_hat (1, M, h, w) in that order as little-endian float32."""
    return zlib.crc32(np.ascontiguousarray(y_hat.cpu().numpy(), "<f4"), zlib.crc32(size))


def _leb128(number: int) -> bytes:
    """Seven bits to a byte, the lowest first, the top bit set on all but the last."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _read_leb128(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, of at most four bytes, and where the next one starts. Raises `IndexError` past the end."""
    number = 0
    for shift in range(0, 28, 7):
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise IndexError
