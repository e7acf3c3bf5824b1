"""PSNR and MS-SSIM compare pixels: of the 8-bit picture that a user gets, or of the decoder's floats as TACO published."""

from __future__ import annotations

import math

import pytorch_msssim
from torch import Tensor
from torchvision.transforms.functional import resize

from taco_nb.errors import SettingError

PSNR_LIMIT = 60.0
"""The highest PSNR of an 8-bit picture, in dB. libvmaf has the same limit (6 dB per bit, plus 12).

Equal pictures have no finite PSNR, and a blank page, which JPEG reproduces exactly, would make the mean over a whole data
set infinite. At 60 dB one value in fifteen is wrong by a single level of 255: nobody sees what lies beyond.
"""
MS_SSIM_MIN_SIDE = 161  # halved four times, it still holds one of MS-SSIM's 11-pixel windows


def psnr(x: Tensor, x_hat: Tensor, limit: float = math.inf) -> float:
    """Return the peak signal-to-noise ratio in dB for a peak of 1; identical pictures have the value of `limit`.

    `x` and `x_hat` are float tensors (3,H,W) or (B,3,H,W). The PSNR of a batch is the mean over its pictures, of each of
    which no more than `limit` counts. Raises `SettingError` if the tensors do not have the same such shape.
    """
    x, x_hat = _float_batches(x, x_hat)
    decibels = -10 * (x - x_hat).square().mean(dim=(1, 2, 3)).log10()
    return decibels.clamp(max=limit).mean().item()


def ms_ssim(x: Tensor, x_hat: Tensor) -> float:
    """Return the multi-scale structural similarity (Wang, Simoncelli and Bovik, Asilomar 2003) of values in [0,1].

    It is at most 1. Takes the tensors that `psnr` takes. A picture with a side under 161 pixels gives NaN: at the coarsest
    of the five scales the 11-pixel window would no longer fit, and fewer scales would be another measure under the same
    name. Raises `SettingError` if the tensors do not have the same shape.
    """
    x, x_hat = _float_batches(x, x_hat)
    if min(x.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return math.nan
    return pytorch_msssim.ms_ssim(x, x_hat, data_range=1.0).item()


def distortion(x: Tensor, x_hat: Tensor, protocol: str = "8bit") -> dict[str, float]:
    """Return `{"psnr": dB, "ms_ssim": …}` of the decoder's output `x_hat`, not yet clamped, against `x` in [0,1].

    - `"8bit"`: `x_hat` is first clamped to [0,1] and rounded to whole 255ths, so the figures are those of the picture
      that a user gets. PSNR is at most `PSNR_LIMIT`, which is also the value of identical pictures. MS-SSIM is NaN for
      pictures too small for it (see `ms_ssim`); means then count fewer pictures, and must say how many.
    - `"taco"`: as the authors' evaluation script (effl-lab/TACO): floats, neither clamped nor rounded, and PSNR without a
      limit. For MS-SSIM, a picture too small for it is enlarged to a short side of 256.

    Shapes are those of `psnr`. Raises `SettingError` for unequal shapes or an unknown protocol.
    """
    if protocol == "8bit":
        x_hat = (x_hat.clamp(0, 1) * 255).round() / 255
        return {"psnr": psnr(x, x_hat, PSNR_LIMIT), "ms_ssim": ms_ssim(x, x_hat)}
    if protocol == "taco":
        decibels = psnr(x, x_hat)
        if min(x.shape[-2:]) < MS_SSIM_MIN_SIDE:
            x, x_hat = (resize(picture, [256]) for picture in (x, x_hat))
        return {"psnr": decibels, "ms_ssim": ms_ssim(x, x_hat)}
    raise SettingError(f'There is no protocol {protocol!r} for distortion; choose "8bit" or "taco".')


def _float_batches(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float32 (B,3,H,W), since half precision is too coarse to measure with."""
    if x.shape != x_hat.shape or x.ndim not in (3, 4) or x.shape[-3] != 3 or 0 in x.shape:
        raise SettingError(
            "Two pictures of one shape, (3,H,W) or (B,3,H,W), are needed to measure distortion, "
            f"not {tuple(x.shape)} and {tuple(x_hat.shape)}."
        )
    if not (x.is_floating_point() and x_hat.is_floating_point()):
        kinds = f"{x.dtype} and {x_hat.dtype}"
        raise SettingError(f"Distortion takes floats in [0,1], not {kinds}; divide by 255.")
    return tuple(picture.float().reshape(-1, *picture.shape[-3:]) for picture in (x, x_hat))
