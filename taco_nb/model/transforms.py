"""ELIC's g_a, with TACO's text adapter inside, and g_s are built here; the index of a layer is its key in a state dict."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from compressai.layers import AttentionBlock
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

from taco_nb.model.adapter import Extractor, Injector, make_attentions
from taco_nb.model.config import ModelConfig
from taco_nb.model.layers import ResidualBottleneck

STRIP = {"cpu": 26 << 20, "cuda": 1 << 30}
"""Bytes of the widest tensor inside a strip. From 32 MiB on, Linux's malloc asks the system for every tensor anew, and its
zeroing of fresh pages takes as long as the arithmetic."""


def in_strips(
    layers: nn.Module, x: Tensor, *, halo: int, widest: float, down: int = 1, up: int = 1
) -> Tensor:
    """Apply the layers to x (B, C, H, W) in parts, so that memory does not grow with B or H.

    The parts are as many whole images as may be, else strips of the rows of one image. The result is that of the whole:
    strips overlap by the `halo` rows of x on either side that their outputs depend on, and are four times as high at
    least. `up / down` is the height of the output over that of x; `widest`, in channels at the size of x, is the largest
    tensor between the layers. In training, and where x is small, there is one part.
    """
    kept = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    images, height, strip = x.shape[0], x.shape[2], STRIP.get(x.device.type, 1 << 30)
    image = max(1, height * x.shape[3] * widest * kept.itemsize)  # in bytes, of the widest tensor
    together = max(1, int(strip / image))  # images in a part
    # rows of x in a strip, of which `down` make one row of the output
    rows = max(4 * halo, math.ceil(height / math.ceil(image / strip) / down) * down)
    if torch.is_grad_enabled() or (together >= images and rows >= height):
        return layers(x)
    out = None
    for first, top in product(range(0, images, together), range(0, height, rows)):
        these, above, bottom = slice(first, first + together), min(halo, top), min(top + rows, height)
        # rows that only the halo has made are cut off again, above here and below in the last line
        part = layers(x[these, :, top - above : bottom + halo])[:, :, above * up // down :]
        if out is None:
            shape = (images, part.shape[1], height * up // down, part.shape[3])
            out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        out[these, :, top * up // down : bottom * up // down] = part[:, :, : (bottom - top) * up // down]
    return out


class AnalysisTransform(nn.Module):
    """g_a turns an image (B, 3, H, W) in [0, 1] and text (B, T, text_dim) into y (B, M, H/16, W/16).

    The text enters at H/4 (layer 8), is refreshed from the image at H/8 (14), and enters again there (15). mask (B, T)
    bool, True at the tokens to attend to, hides padding both times.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        N, M, text_dim = config.N, config.M, config.text_dim
        over_text, over_image, over_text_again = make_attentions(config)
        # never called as a whole, since three of these layers take the text too
        self.analysis_transform = nn.Sequential(
            conv(3, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            conv(N, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            Injector(N, text_dim, over_text),
            AttentionBlock(N),
            conv(N, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            Extractor(N, text_dim, over_image),
            Injector(N, text_dim, over_text_again),
            conv(N, M),
            AttentionBlock(M),
        )

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        layers = self.analysis_transform
        N = layers[0].out_channels
        x = in_strips(layers[:5], x, halo=12, down=4, widest=N / 4)
        x = in_strips(layers[5:8], x, halo=3, widest=N)
        x = layers[8](x, text, mask)
        x = in_strips(layers[9:11], x, halo=6, down=2, widest=N)
        x = in_strips(layers[11:14], x, halo=3, widest=N)
        x = layers[15](x, layers[14](x, text), mask)
        return layers[16:](x)


class ToPixels(nn.ConvTranspose2d):
    """The last layer of g_s, (B, N, H, W) -> (B, 3, 2H, 2W), is the others' transposed convolution, computed otherwise.

    Each position yields the 2x2 pixels that lie there, as twelve channels of a 3x3 convolution (sub-pixel convolution, Shi
    et al., CVPR 2016). For three output channels that takes less than half of a transposed convolution's time.
    """

    def __init__(self, N: int):
        super().__init__(N, 3, 5, 2, padding=2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # the taps of pixel (a, b) of four: N, 3, row, a, column, b
        taps = F.pad(self.weight, (0, 1, 0, 1)).unflatten(3, (3, 2)).unflatten(2, (3, 2))
        kernel = taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
        return F.pixel_shuffle(F.conv2d(x, kernel, self.bias.repeat_interleave(4), padding=1), 2)


class SynthesisTransform(nn.Module):
    """g_s turns y_hat (B, M, H/16, W/16) into x_hat (B, 3, H, W), unclamped; it has no text input at all."""

    def __init__(self, N: int, M: int):
        super().__init__()
        self.synthesis_transform = nn.Sequential(
            AttentionBlock(M),
            deconv(M, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            deconv(N, N),
            AttentionBlock(N),
            *(ResidualBottleneck(N) for _ in range(3)),
            deconv(N, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            ToPixels(N),
        )

    def forward(self, y_hat: Tensor) -> Tensor:
        layers = self.synthesis_transform
        N = layers[1].out_channels
        x = in_strips(layers[6:10], layers[:6](y_hat), halo=6, widest=N)
        return in_strips(layers[10:], x, halo=3, up=4, widest=4 * N)
