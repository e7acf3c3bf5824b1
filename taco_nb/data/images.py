"""Images of every kind become the 8-bit RGB picture that is compressed, and that becomes a tensor and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image

from taco_nb.data.colour import to_srgb
from taco_nb.errors import DataError

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Each of EXIF's orientations is undone by one of these, as in Pillow's `exif_transpose`."""


def to_rgb(image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """Return the picture as a viewer shows it, so that every input is compressed and measured as the same kind of thing.

    `image` is a path, a Pillow image of any mode, a uint8 or uint16 array of shape (H, W), (H, W, 1), (H, W, 3) or
    (H, W, 4), or a float tensor of shape (3, H, W) or (1, 3, H, W) in [0, 1]. What comes back is a new 8-bit RGB image
    in sRGB, without metadata:

    - EXIF's orientation is applied; EXIF that is damaged is ignored.
    - Colours are converted to sRGB, if an ICC profile or PNG's gAMA and cHRM say that they are in another space (see
      `taco_nb.data.colour`). TACO's reference program ignores profiles, and so sees other colours in such files.
    - Transparency is composited over white. Of several frames the first is taken.
    - 16-bit values v (Pillow's modes I;16 and I) become round(v / 257), floats (mode F as well) round(255 v). Of a
      16-bit *colour* file Pillow itself reads the upper eight bits only.

    Raises `DataError`, with the file's name where there is one, if this is no image, is damaged or empty, has more
    pixels than Pillow's limit against decompression bombs, or has another shape, type or range than said here.
    """
    if isinstance(image, (str, os.PathLike)):
        with _reading(os.fspath(image)), Image.open(image) as opened:
            return _flatten(opened)
    if isinstance(image, Image.Image):
        with _reading(getattr(image, "filename", "") or f"The image (Pillow, mode {image.mode})"):
            return _flatten(image)
    if isinstance(image, np.ndarray):
        return _flatten(_from_array(image))
    if isinstance(image, torch.Tensor):
        if image.is_floating_point() and image.numel() and not (image.min() >= 0 and image.max() <= 1):
            raise DataError("The image tensor has NaN or values outside [0, 1]: divide by 255 or clamp it.")
        return to_image(image)
    kind = type(image).__name__
    raise DataError(f"{kind} is not an image: give a path, a Pillow image, an array or a tensor.")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an 8-bit RGB image as the model reads it: float32 of shape (3, H, W) in [0, 1]. `to_image` undoes it exactly.

    Raises `DataError` for any other mode; `to_rgb` turns every mode into RGB.
    """
    if image.mode != "RGB":
        raise DataError(f"The image has mode {image.mode}, not RGB: pass it through to_rgb first.")
    return pixels(image).float() / 255


def pixels(image: Image.Image) -> torch.Tensor:
    """Return an 8-bit RGB image as it is: uint8 of shape (3, H, W), a quarter of what `to_tensor` gives."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(x: torch.Tensor) -> Image.Image:
    """Return a reconstruction as the 8-bit RGB image that a user gets: clamped to [0, 1] and rounded to 255ths.

    `x` holds floats of shape (3, H, W) or (1, 3, H, W). Raises `DataError` for other shapes and types, no pixels, or NaN.
    """
    if not x.is_floating_point() or tuple(x.shape[:-2]) not in ((3,), (1, 3)) or x.numel() == 0:
        raise DataError(
            f"A {x.dtype} tensor of shape {tuple(x.shape)} is not an image: it must be floats of shape (3, H, W) or "
            "(1, 3, H, W) with at least one pixel."
        )
    if x.isnan().any():
        raise DataError("The image tensor holds NaN.")
    pixels = x.detach().reshape(x.shape[-3:]).float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def short_side(path: str | os.PathLike) -> int:
    """Return the pixels on an image file's shorter side, by its header alone. Raises `DataError` as `to_rgb` does."""
    with _reading(os.fspath(path)), Image.open(path) as opened:
        return min(opened.size)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"There is no image file {name}.") from error
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged files, SyntaxError included.
        raise DataError(f"{name} cannot be read as an image: {str(error).rstrip('.')}.") from error


def _flatten(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise DataError(f"it is {image.width}x{image.height} and has no pixels")
    image.load()  # now, since damage to the pixels must be an error, and damage to the EXIF after them must not
    image = _upright(image)
    alpha = None
    if image.mode[0] == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("its integers are not all in 0..65535")
        transparent = values == image.info.get("transparency", -1)
        opaque = Image.fromarray(np.where(transparent, np.uint8(255), _to_8_bits(values)))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise DataError("its floats are not all in [0, 1]")
        opaque = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        opaque = image.convert("RGBA").convert("L" if image.mode in ("L", "LA", "La") else "RGB")
    else:
        opaque = image
    rgb = to_srgb(opaque, image.info)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgb).convert("RGB")
    rgb.info.clear()  # Pillow writes a profile or EXIF found here into files, whose size we measure
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    """Return the image as EXIF's orientation says it is to be seen, or as it is where the EXIF cannot be read.

    Pillow's own `exif_transpose` also writes the EXIF anew, for which more of it must be sound than this one number.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # it reads EXIF as it reads damaged files
        return image
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def _from_array(array: np.ndarray) -> Image.Image:
    wide = array.dtype.type is np.uint16
    colours = array.shape[2] if array.ndim == 3 else 1
    if (
        array.ndim not in (2, 3)
        or colours not in (1, 3, 4)
        or array.size == 0
        or not (wide or array.dtype == np.uint8)
    ):
        raise DataError(
            f"A {array.dtype} array of shape {array.shape} is not an image: it must be uint8 or uint16 with at least "
            "one pixel, of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)."
        )
    array = _to_8_bits(array) if wide else array
    return Image.fromarray(array[..., 0] if array.ndim == 3 and colours == 1 else array)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    # 257 = 65535 / 255, and + 128 rounds to the nearest
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
