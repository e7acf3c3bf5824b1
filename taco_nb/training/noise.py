"""The uniform noise that stands for rounding in training, drawn for every image by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from taco_nb.model import TACO


@contextmanager
def image_noise(net: TACO, seeds: Sequence[int]) -> Iterator[None]:
    """Within the block, `net` in training mode draws the noise of image i of its batch from `seeds[i]` alone.

    CompressAI draws it for a batch as a whole, so that what an image gets would depend on those beside it, and the result
    of a step on how its batch is divided among processes. Only noise is replaced: rounding stays CompressAI's.
    """
    device = net.medians().device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def uniform(shape: Sequence[int], dim: int) -> Tensor:
        """Noise in [-1/2, 1/2): of one shape for each image, stacked along `dim`."""
        return torch.stack([torch.rand(shape, generator=g, device=device) for g in generators], dim) - 0.5

    def quantize_y(y: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
        return (
            y + uniform(y.shape[1:], 0)
            if mode == "noise"
            else type(gaussian).quantize(gaussian, y, mode, means)
        )

    def quantize_z(z: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
        if mode != "noise":
            return type(bottleneck).quantize(bottleneck, z, mode, means)
        channels, _, values = z.shape  # the bottleneck flattens a batch to (channels, 1, images * positions)
        return z + uniform((channels, values // len(generators)), 1).reshape(z.shape)

    gaussian, bottleneck = net.gaussian_conditional, net.entropy_bottleneck
    gaussian.quantize, bottleneck.quantize = quantize_y, quantize_z
    try:
        yield
    finally:
        del gaussian.quantize, bottleneck.quantize
