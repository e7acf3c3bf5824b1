"""A codec turns an image and a caption into a `.taco` file, which decodes to the same latents on every machine.

    offset  size  what
    0       4     magic, "TACO"
    4       1     version of this layout, 2
    5       4     fingerprint of the decoder's weights: the first bytes of a SHA-256
    9       2-8   width, then height, in pixels, each a LEB128 number
            1-4   length of z's string, a LEB128 number
            4     CRC-32 of width, height and y_hat
            ...   z's string, then y's string, rANS streams
            4     CRC-32 of everything before it

All that a decoder must repeat is computed on integers, as `taco_nb.model.integer` explains, so that neither the processor
nor the GPU, the number of threads or the version of PyTorch matters. The last checksum tells a damaged file from a whole
one before anything is decoded. The fingerprint, over those integers and the weights of g_s, tells wrong weights. The
checksum of y_hat tells a forged file. A decoded picture is therefore the right one, or there is none. (The synthesis after
it is in floating point and may round a pixel otherwise on another machine, by 1/255 and rarely.) 22 or 23 bytes for a
Kodak image.

Version 1 ran the entropy networks in floating point and decoded only where it had been encoded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taco_nb import checkpoint
from taco_nb.data.images import to_image, to_rgb, to_tensor
from taco_nb.errors import DamagedFileError, SettingError, WrongWeightsError
from taco_nb.experiment import Experiment
from taco_nb.model import TACO
from taco_nb.model.integer import MEAN_BITS, IntegerModel
from taco_nb.model.precision import full_float32

if TYPE_CHECKING:
    from PIL import Image

    from taco_nb.model import Encoded
    from taco_nb.text import Conditioning, TextTower

MAGIC = b"TACO"
VERSION = 2
READERS = {1: "taco-nb 0.1.0"}
"""Which release reads files of other versions."""
MULTIPLE = 64
"""The network needs heights and widths that are multiples of this."""
MODES = ("exact", "fast")
MAX_PIXELS = 1 << 26
"""The largest image, in pixels once it is padded, that is encoded or that a header may announce (8192 x 8192)."""


class Header(NamedTuple):
    """These are the fields of a `.taco` file that come before its strings."""

    fingerprint: bytes
    width: int
    height: int
    latents_crc: int


class Codec:
    """A codec is a trained network, the text tower its encoder reads captions through, and the file format around both.

    The text settings are an `Experiment`'s, `keywords` the JSON of the run's fitted `KeywordWeights`. The tower is loaded
    when a caption is first encoded, since a decoder never needs it. `about` is what is known of the weights, for labels
    beside results. Keywords that a language model chose are read from the data folder `data_dir`.

    `mode="fast"` computes g_a and g_s in bfloat16 where the device is quicker at it (`has_fast_bfloat16`), else as "exact"
    does: in float32 throughout, whatever the program around it has allowed. All that a decoder repeats is in integers, so
    the files of either mode decode in either; pictures and sizes differ by rounding. "exact" is the default because
    measured figures are to be the weights' own, not the machine's.

    A codec follows its network: after `load_state_dict` or a step of training it writes files of the new weights, under
    their fingerprint. `net` may be compiled (`torch.compile`), and is converted to float32.
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
        self.net = net.eval().float().to(memory_format=torch.channels_last)
        self.text_encoder, self.text_tokens = text_encoder, text_tokens
        self.text_length, self.text_pooling, self.keywords = text_length, text_pooling, keywords
        self.name, self.about, self.data_dir = name, about or {}, data_dir
        self._fingerprinted: tuple[IntegerModel, bytes] | None = None

    @property
    def device(self) -> torch.device:
        return self.net.medians().device

    @cached_property
    def tower(self) -> TextTower:
        """Return the frozen text tower. Raises `MissingWeightsError` where its weights are not to be had."""
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
        """Return what turns captions into the encoder's tokens. Raises `MissingWeightsError` as `tower` does."""
        from taco_nb.text import Conditioning, KeywordWeights
        from taco_nb.text.chat_keywords import chat_keywords

        keywords = None
        if self.keywords is not None:
            keywords = KeywordWeights.from_json(self.keywords, [chat_keywords(self.data_dir)])
        return Conditioning(self.tower, self.text_length, self.text_pooling, keywords)

    @property
    def fingerprint(self) -> bytes:
        """Return four bytes that name the weights of the decoder as they are. The encoder's may differ without harm."""
        return self._integers()[1]

    def _integers(self) -> tuple[IntegerModel, bytes]:
        """Return the integer form of the network as it is now, and the fingerprint."""
        self.net.check_float32()
        model = self.net.integer_model()
        if self._fingerprinted is None or self._fingerprinted[0] is not model:
            digest = hashlib.sha256(model.digest())
            for name, weight in self.net.decoder_weights().items():
                if name.startswith("g_s."):
                    values = weight.detach().cpu().contiguous().numpy().astype("<f4")
                    digest.update(name.encode() + values.tobytes())
            self._fingerprinted = model, digest.digest()[:4]
        return self._fingerprinted

    def encode(self, image: Any, caption: str) -> bytes:
        """Return the bytes of a `.taco` file.

        `image`: a path, a PIL image, a uint8 or uint16 array, or a float tensor in [0, 1], as `taco_nb.data.to_rgb`
        takes them; any size from 1x1 to `MAX_PIXELS`. Transparency is laid over white, EXIF rotation applied. Raises
        `DataError` for an image that cannot be read, `SettingError` for one too large or a caption that is not text,
        `CheckpointError` where the weights make no finite numbers of it.
        """
        return self.encode_batch([image], [caption])[0]

    def encode_batch(self, images: Sequence[Any], captions: Sequence[str]) -> list[bytes]:
        """Return a `.taco` file of each image under its caption, as `encode` takes them; the images are all of one size.

        The transforms run on the batch, the entropy coder on each image by itself, since its decoder may get that file
        alone. The latents, and so the files, may differ from those of `encode` by the rounding of a larger batch.
        Raises what `encode` raises, and `SettingError` for images of different sizes or another number of captions.
        """
        for caption in captions:
            if not isinstance(caption, str):
                raise SettingError(f"A caption is text, not {caption!r}. An image without one takes ''.")
        pictures = [to_rgb(image) for image in images]
        if len(pictures) != len(captions):
            counts = f"{len(pictures)} and {len(captions)}"
            raise SettingError(f"Every image has one caption, but there are {counts}.")
        size = _common_size("images", [picture.size for picture in pictures])
        if not _fits(*size):
            raise SettingError(
                f"{size[0]}x{size[1]}, padded to multiples of {MULTIPLE}, is more than the {MAX_PIXELS} "
                "pixels a file may have. Scale the image down or cut it into parts."
            )
        model, fingerprint = self._integers()
        x = pad(torch.stack([to_tensor(picture).float() for picture in pictures]).to(self.device))
        with torch.inference_mode(), full_float32(self.device.type):
            text, mask = self.conditioning(captions)
            with self.transform_precision():
                y = self.net.g_a(x.contiguous(memory_format=torch.channels_last), text.float(), mask).float()
            coded = [model.encode_latents(latents, self.net.h_a(latents)) for latents in y.split(1)]
        return [self._file(fingerprint, size, image) for image in coded]

    def transform_precision(self) -> AbstractContextManager:
        """Return the precision in which g_a and g_s run, which a decoder need not repeat to the last bit."""
        kind = self.device.type
        if self.mode == "fast" and has_fast_bfloat16(kind):
            return torch.autocast(kind, torch.bfloat16)
        return full_float32(kind)

    def _file(self, fingerprint: bytes, size: tuple[int, int], coded: Encoded) -> bytes:
        size = _leb128(size[0]) + _leb128(size[1])
        head = MAGIC + bytes([VERSION]) + fingerprint + size + _leb128(len(coded.z_string))
        body = head + _latents_crc(size, coded.y_hat).to_bytes(4, "little") + coded.z_string + coded.y_string
        return body + zlib.crc32(body).to_bytes(4, "little")

    def decode(self, data: bytes | str | os.PathLike) -> Image.Image:
        """Return the picture in a `.taco` file, given its bytes or its path; no caption is needed.

        Raises `DamagedFileError` or `WrongWeightsError` (both `BitstreamError`), and nothing else for any bytes whatever:
        there is no wrong picture.
        """
        return to_image(self.decode_tensor(data))

    def decode_tensor(self, data: bytes | str | os.PathLike) -> Tensor:
        """Decode as `decode` does, but return x_hat itself: float32 (3, height, width), neither clamped nor rounded."""
        return self.decode_batch([data])[0]

    @torch.inference_mode()
    def decode_batch(self, files: Sequence[bytes | str | os.PathLike]) -> list[Tensor]:
        """Decode several files of pictures of one size as `decode_tensor` does; their synthesis runs as one batch.

        Raises what `decode` raises, and `SettingError` for pictures of different sizes.
        """
        parts = [read_header(data) for data in files]
        width, height = _common_size("files", [(header.width, header.height) for header, _, _ in parts])
        y_hat = torch.cat([self._latents(*part) for part in parts]).to(self.device)
        with self.transform_precision():
            x_hat = self.net.g_s(y_hat.contiguous(memory_format=torch.channels_last)).float()
        if not torch.isfinite(x_hat).all():
            raise DamagedFileError("The latents decode to a picture of values that are not finite: forged.")
        return [picture.contiguous() for picture in x_hat[:, :, :height, :width]]

    def decode_latents(self, data: bytes | str | os.PathLike) -> Tensor:
        """Return the latents y_hat (1, M, h, w) in a file, float32: what is the same on every machine.

        Raises what `decode` raises.
        """
        return self._latents(*read_header(data)).contiguous()

    def _latents(self, header: Header, z_string: bytes, y_string: bytes) -> Tensor:
        model, fingerprint = self._integers()
        if header.fingerprint != fingerprint:
            raise WrongWeightsError(
                f"This file was written with the weights {header.fingerprint.hex()}, but this codec"
                f"{f' ({self.name})' if self.name else ''} has {fingerprint.hex()}. Load the codec that wrote it."
            )
        shape = (-(-header.height // MULTIPLE), -(-header.width // MULTIPLE))
        y_hat = model.decode_latents(y_string, z_string, shape)
        if _latents_crc(_leb128(header.width) + _leb128(header.height), y_hat) != header.latents_crc:
            raise DamagedFileError(
                "The decoded latents are not those that the file says it holds: the file was forged, or damaged and given "
                "new checksums."
            )
        return y_hat


def read_header(data: bytes | str | os.PathLike) -> tuple[Header, bytes, bytes]:
    """Return header, z's string and y's string of a `.taco` file.

    Raises `DamagedFileError` for anything that is not one, or is one of another version.
    """
    if isinstance(data, (str, os.PathLike)):
        try:
            with open(data, "rb") as file:
                data = file.read()
        except OSError as error:
            raise DamagedFileError(f"{data} cannot be read: {error.strerror}.") from None
    if not data.startswith(MAGIC):
        raise DamagedFileError("This is not a .taco file, or its first bytes are damaged.")
    if len(data) < 20 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise DamagedFileError(f"These {len(data)} bytes were truncated or altered: their checksum is wrong.")
    if data[4] != VERSION:
        reader = READERS.get(data[4], "a newer taco-nb, perhaps")
        raise DamagedFileError(
            f"This file has version {data[4]} of the format, which {reader} reads; this program reads version {VERSION}."
        )
    try:
        width, at = _read_leb128(data, 9)
        height, at = _read_leb128(data, at)
        z_length, at = _read_leb128(data, at)
    except IndexError:
        raise DamagedFileError("The header is cut short: damaged or forged.") from None
    if not width or not height or not _fits(width, height):
        raise DamagedFileError(f"The header announces {width}x{height} pixels, not 1 to {MAX_PIXELS}.")
    strings = data[at + 4 : -4]
    if at + 8 > len(data) or z_length > len(strings):
        raise DamagedFileError("The header announces more bytes than there are: damaged or forged.")
    header = Header(data[5:9], width, height, int.from_bytes(data[at : at + 4], "little"))
    return header, strings[:z_length], strings[z_length:]


def pad(x: Tensor) -> Tensor:
    """Pad (..., H, W) with zeros to the right and below, up to the next multiples of 64, as the reference does."""
    return F.pad(x, (0, -x.shape[-1] % MULTIPLE, 0, -x.shape[-2] % MULTIPLE))


def has_fast_bfloat16(device_type: str) -> bool:
    """Tell whether bfloat16 is quicker than float32 there.

    On a processor without instructions for it, it is six times slower.
    """
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
    """Return a codec ready to use, from a bundled codec's name, a run's folder, or a checkpoint, the authors' included.

    `mode` is "exact", float32 throughout, or "fast", as `Codec` explains. `text_encoder` replaces the text tower that the
    weights name; the authors' name none and read CLIP ViT-B/32. Raises `CheckpointError` for weights that are missing,
    damaged or not TACO's.
    """
    net, about = checkpoint.load_net(checkpoint.find(source, data_dir))
    experiment = checkpoint.trained_as(about) or Experiment()
    return Codec(
        net.to(device),
        text_encoder or experiment.text_encoder,
        experiment.text_tokens,
        **experiment.text_settings,
        keywords=about.get("keywords"),
        mode=mode,
        name=about.get("name", Path(source).name),
        about={key: value for key, value in about.items() if key != "keywords"},
        data_dir=data_dir,
    )


def _fits(width: int, height: int) -> bool:
    """Tell whether an image is small enough for a file; padding counts, since a line of one pixel is padded to 64."""
    return -(-width // MULTIPLE) * -(-height // MULTIPLE) * MULTIPLE**2 <= MAX_PIXELS


def _common_size(what: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    if len(set(sizes)) != 1:
        found = ", ".join(f"{width}x{height}" for width, height in dict.fromkeys(sizes)) or "none at all"
        raise SettingError(f"The {what} of a batch show pictures of one size, but these are {found}.")
    return sizes[0]


def _latents_crc(size: bytes, y_hat: Tensor) -> int:
    """Return the CRC-32 of an image's size, and of y_hat (1, M, h, w) in that order as little-endian integers."""
    integers = (y_hat * 2**MEAN_BITS).int().cpu().contiguous().numpy()
    return zlib.crc32(integers.astype("<i4").tobytes(), zlib.crc32(size))


def _leb128(number: int) -> bytes:
    """Write a number with seven bits to a byte, the lowest first, the top bit set on all but the last."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _read_leb128(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, of at most four bytes, and where the next one starts.

    Raises `IndexError` past the end of the data and for longer numbers.
    """
    number = 0
    for shift in range(0, 28, 7):
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise IndexError
