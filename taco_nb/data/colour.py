"""Pictures are converted to sRGB on reading, by what their file says about its colours, as a viewer does.

The same red is (234, 51, 35) in sRGB and (218, 65, 48) in Display P3. A program that ignores the difference compresses
another picture than the one that people see, 35 dB away from it. So images are converted on reading, as browsers do:

    an ICC profile      by Little CMS, with the intent that the profile names
    PNG's gAMA, cHRM    by the formulas of the PNG specification, unless the file says it is sRGB, or has a profile

What is sRGB under whatever name stays as it is, to the last bit. A profile that is damaged, or made for another kind of
pixels, is ignored. An image that says nothing is taken for sRGB.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SRGB_GAMMA = 1 / 2.2
SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""x and y of white (D65), red, green and blue, in the order of PNG's cHRM chunk."""
D65 = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
ALIKE = 2
"""Levels, of 255, that a profile may move any colour by and still be called sRGB: many cameras' are, with other roundings."""


def to_srgb(image: Image.Image, info: dict[str, Any]) -> Image.Image:
    """Return an opaque 8-bit image of any mode as RGB, converted to sRGB where `info` gives it another colour space.

    `info` is Pillow's dictionary of what else the file holds: "icc_profile", "srgb", "gamma", "chromaticity".
    """
    if profile := info.get("icc_profile"):
        convert = _by_profile(profile, {"CMYK": "CMYK", "L": "L", "1": "L"}.get(image.mode, "RGB"))
    elif "srgb" in info:
        convert = None
    else:
        convert = _by_formula(info.get("gamma"), info.get("chromaticity"))
    return convert(image) if convert else image.convert("RGB")


@lru_cache(maxsize=16)  # the pictures of a data set share the profiles of a few cameras
def _by_profile(profile: bytes, pixels: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return a function from images with this ICC profile to sRGB; None where there is nothing to convert.

    `pixels` is what the images hold, "RGB", "L" or "CMYK". A profile for RGB may also describe grey images.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if mode != pixels and (mode, pixels) != ("RGB", "L"):
            return None
        intent = ImageCms.getDefaultIntent(source)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        return None

    def convert(image: Image.Image) -> Image.Image:
        return ImageCms.applyTransform(image.convert(mode), transform)

    return convert if mode == "CMYK" or _moves_colours(convert, mode) else None


def _by_formula(
    gamma: float | None, chromaticities: tuple[float, ...] | None
) -> Callable[[Image.Image], Image.Image] | None:
    """Return a function from images with this gAMA and cHRM to sRGB; None where there is nothing to convert.

    gAMA is the exponent from light to numbers. Within 5 % of 1/2.2 it means sRGB, by the convention of libpng.
    """
    if gamma is not None and (not 0 < gamma < 10 or abs(gamma / SRGB_GAMMA - 1) < 0.05):
        gamma = None
    try:
        to_xyz = _to_xyz(chromaticities or SRGB_CHROMATICITIES)
        to_linear_srgb = np.linalg.inv(_to_xyz(SRGB_CHROMATICITIES)) @ to_xyz
    except (np.linalg.LinAlgError, ZeroDivisionError, ValueError):
        to_linear_srgb = np.eye(3)

    def convert(image: Image.Image) -> Image.Image:
        levels = np.arange(256) / 255
        light = levels ** (1 / gamma) if gamma else _srgb_to_light(levels)
        linear = light[np.asarray(image.convert("RGB"))] @ to_linear_srgb.T
        return Image.fromarray(np.rint(_light_to_srgb(linear.clip(0, 1)) * 255).astype(np.uint8))

    return convert if (gamma or chromaticities) and _moves_colours(convert, "RGB") else None


def _moves_colours(convert: Callable[[Image.Image], Image.Image], mode: str) -> bool:
    """Tell whether a conversion changes any colour by more than rounding would.

    It is tried on 17 levels each of red, green and blue.
    """
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
    before = Image.fromarray(cube).convert(mode)
    moved = np.asarray(convert(before)).astype(int) - np.asarray(before.convert("RGB"))
    return bool(np.abs(moved).max() > ALIKE)


def _to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    """Return the matrix from linear RGB with these primaries to XYZ under D65 (SMPTE RP 177).

    The columns are the primaries' XYZ, scaled such that (1, 1, 1) is white. Another white than D65 is adapted to it in
    the Bradford space of cone responses, as ICC profiles are.
    """
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(*[iter(chromaticities)] * 2))
    columns = np.stack(primaries, 1)
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D65) / (BRADFORD @ white)) @ BRADFORD
    return adapt @ columns @ np.diag(np.linalg.solve(columns, white))


def _srgb_to_light(v: np.ndarray) -> np.ndarray:
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1


def _light_to_srgb(v: np.ndarray) -> np.ndarray:
    return np.where(v <= 0.0031308, v * 12.92, 1.055 * v ** (1 / 2.4) - 0.055)
