"""Integers are convolved exactly: in float32, or in bytes where the processor multiplies these faster.

`taco_nb.model.integer` says which integers a layer computes; this module computes them, in whichever way is quicker on the
machine at hand. Every way gives the same integers, so that the machine's own choice is safe.

**In float32.** The sums keep below 2^24, chunk by chunk, so that an ordinary convolution has them exactly.

**In bytes.** Processors with VNNI (Intel since 2019, AMD since 2022) or AMX multiply bytes four times as fast as float32
and add them up in 32-bit integers, which never overflow here. An input of up to 14 bits is cut in two,

    a = 256 * high + low,    0 <= low < 256,

and a weight beyond a byte likewise, w = 128 * high + low; the convolutions of the parts are added. Few weights of a large
network need two bytes, and those few lie in some input channels, in some output channels and near the kernel's middle, so
that a small convolution adds what the high bytes contribute.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 1 << 24
"""Up to here float32 holds every integer."""


def power(exponents: Tensor) -> Tensor:
    """Return 2 to each exponent, float64, exactly. (torch.ldexp goes by way of pow, which may round.)"""
    return torch.from_numpy(np.ldexp(1.0, exponents.clamp(-1000, 1000).numpy()))


class FloatKernel:
    """Convolve one image's integers in float32: x (1, in, h, w) -> clamp(floor((w * x + bias) / 2^shift)).

    `weight` is (out, in, kh, kw), `bias` and `shift` (out); every range of input channels in `cuts` keeps `LIMIT`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, shift: Tensor, ends: tuple[int, int], cuts: Sequence[slice],
        stride: tuple[int, int], padding: int, device: torch.device,
    ):  # fmt: skip
        self.ends, self.stride, self.padding = ends, stride, padding
        # in units of 2^shift, float32 has these to the last bit
        unit = power(-shift)
        weight, self.bias = weight * unit.float().view(-1, 1, 1, 1), (bias * unit).float().to(device)
        last = torch.channels_last
        self.parts = [(cut, weight[:, cut].contiguous(memory_format=last).to(device)) for cut in cuts]

    def __call__(self, x: Tensor) -> Tensor:
        convolve = conv2d_by_matmul if x.is_cuda else F.conv2d
        (cut, weight), *others = self.parts
        total = convolve(x[:, cut], weight, self.bias, self.stride, self.padding)
        total = total.double() if others else total  # which has room for the sum of the chunks
        for cut, weight in others:
            total += convolve(x[:, cut], weight, None, self.stride, self.padding)
        return total.floor_().clamp_(*self.ends).float()


def conv2d_by_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int] = (1, 1), padding: int = 0
) -> Tensor:
    """Convolve one image as a matrix product: all patches that the kernel meets, side by side.

    A GPU computes so, since cuDNN may take Winograd's or a Fourier transform, which are not exact. On a CPU, oneDNN's and
    PyTorch's own convolutions only ever multiply and add for a single image.
    """
    out, _, *kernel = weight.shape
    h, w = ((n + 2 * padding - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride))
    patches = F.unfold(x, kernel, padding=padding, stride=stride)[0]
    y = (weight.flatten(1) @ patches).view(1, out, h, w)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


class ByteKernel:
    """Compute the same convolution in bytes, on a processor. `fits` tells whether it can be, for inputs of so many `bits`.

    `signed` says whether inputs may be negative. In what follows "low" and "high" are the parts of an input.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, shift: Tensor, ends: tuple[int, int], stride: tuple[int, int],
        padding: int, bits: int, signed: bool,
    ):  # fmt: skip
        self.ends = ends
        self.zero = 1 << (bits - 8) if signed else 0  # what stands for a high part of nothing
        small, self.large = _in_bytes(weight, padding)
        small = small.to(torch.int8)
        # the sums of low parts are rounded down to 2^unit, beside which those of high parts are integers
        unit = shift.clamp(max=8)
        self.rest = None  # ...and then to 2^shift
        if (shift > unit).any():
            self.rest = power(unit - shift).float().view(1, -1, 1, 1)
        scale = power(-unit).float()
        self.low = [_ByteConvolution(small, scale, (bias * power(-unit)).float(), stride, padding, 0)]
        self.high = [_ByteConvolution(small, 256 * scale, None, stride, padding, self.zero)]
        if self.large is not None:
            more, inner = 128 * scale[self.large.rows], padding - self.large.margin
            self.low.append(_ByteConvolution(self.large.weight, more, None, stride, inner, 0))
            self.high.append(_ByteConvolution(self.large.weight, 256 * more, None, stride, inner, self.zero))

    @staticmethod
    def fits(weight: Tensor, bias: Tensor, shift: Tensor, padding: int, bits: int) -> bool:
        """Tell whether float32 holds the sums of the parts, and so few weights need two bytes that it is worth it."""
        if not 8 < bits < 15 or weight.abs().max() >= 1 << 13:
            return False
        small, large = _in_bytes(weight, padding)
        size = small.abs().sum((1, 2, 3), dtype=torch.float64)
        if large is not None:
            if 2 * large.weight.numel() > weight.numel():
                return False
            size[large.rows] += 128 * large.weight.abs().sum((1, 2, 3), dtype=torch.float64)
        low = 256 * size + bias.abs()
        total = (low + size * (1 << bits)) * power(-shift.clamp(max=8))
        return bool((low <= LIMIT).all() and (total <= LIMIT).all())

    def __call__(self, x: Tensor) -> Tensor:
        integers = x.to(torch.int16)
        total = self._sum(self.low, integers.to(torch.uint8)).floor_()  # modulo 256
        total += self._sum(self.high, ((integers >> 8) + self.zero).to(torch.uint8))
        if self.rest is not None:
            total.mul_(self.rest).floor_()
        return total.clamp_(*self.ends)

    def _sum(self, convolutions: list[_ByteConvolution], x: Tensor) -> Tensor:
        total = convolutions[0](x)
        if self.large is not None:
            more = convolutions[1](x.index_select(1, self.large.columns))
            total.permute(0, 2, 3, 1).index_add_(3, self.large.rows, more.permute(0, 2, 3, 1))
        return total


class _LargeWeights(NamedTuple):
    """These are the high bytes of weights: `weight` (rows, columns, kh, kw) for the output and input channels that have any.

    The kernel has lost `margin` taps on each side, where all are 0.
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor
    margin: int


def _in_bytes(weight: Tensor, padding: int) -> tuple[Tensor, _LargeWeights | None]:
    """Return the low bytes of weights, float32 (out, in, kh, kw), and the high ones if there are any but 0."""
    large = torch.where(weight.abs() > 127, (weight / 128).round(), 0)
    if not large.any():
        return weight, None
    small, used = weight - 128 * large, large != 0
    rows, columns = (used.any(3).any(2).any(1 - dim).nonzero().flatten() for dim in (0, 1))
    large, margin = large[rows][:, columns], 0
    # only padding makes up for taps that are left out
    while margin < padding and not (large[:, :, [0, -1]].any() or large[:, :, :, [0, -1]].any()):
        large, margin = large[:, :, 1:-1, 1:-1], margin + 1
    return small, _LargeWeights(large.contiguous(), rows, columns, margin)


class _ByteConvolution:
    """Convolve bytes; return the sums times `scale` plus `bias`, in float32. In x the byte `zero` stands for 0."""

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: int, zero: int
    ):  # fmt: skip
        self.weight, self.scale, self.bias, self.zero = weight.to(torch.int8), scale, bias, zero
        self.geometry = (list(stride), [padding, padding], [1, 1], 1)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._packed: dict[torch.Size, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        # The operators behind PyTorch's own quantised networks. oneDNN orders weights by the image's size; those in the order
        # of another size it would reorder at every call, which takes longer than the convolution.
        packed = self._packed.get(x.shape)
        if packed is None:
            packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.scale, 1.0, self.zero, *self.geometry, list(x.shape)
            )
            last = list(self._packed.items())[-1:]  # pictures often lie and stand in turn
            self._packed = dict([*last, (x.shape, packed)])
        return torch.ops.onednn.qconv2d_pointwise(
            x, 1.0, self.zero, packed, self.scale, self.zeros, self.bias, *self.geometry, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what oneDNN has packed, which can neither be copied nor pickled."""
        return self.__dict__ | {"_packed": {}}


@lru_cache(maxsize=1)
def bytes_are_exact() -> bool:
    """Try whether this processor and this PyTorch convolve bytes exactly, and hence quickly.

    Without VNNI, x86 processors add pairs of products in 16 bits, which the largest bytes overflow. Other processors are
    not tried, since there it need not be quicker.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        for channels, k, zero in ((64, 3, 0), (33, 5, 0), (256, 1, 16)):
            w = torch.randint(0, 2, (40, channels, k, k), generator=generator) * 254.0 - 127
            x = torch.randint(0, 3, (1, channels, 9, 12), generator=generator)
            w[::2], x[:, :, 4] = 127.0, 255  # one row of positions, so that float32 holds the sums
            x = x.to(torch.uint8).contiguous(memory_format=torch.channels_last)
            ours = _ByteConvolution(w, torch.ones(40), None, (1, 1), k // 2, zero)(x)
            if not torch.equal(ours.double(), F.conv2d(x.double() - zero, w.double(), padding=k // 2)):
                return False
    except (AttributeError, RuntimeError, TypeError):  # another PyTorch, another operator
        return False
    return True
