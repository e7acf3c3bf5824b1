"""ELIC's entropy model has uneven channel groups, and a checkerboard in each (He et al., CVPR 2022, Sections 3.2 and 3.3).

    anchors (A) are coded first, given the hyper latents and the groups before;      . A . A
    then the others (.), given also a 5x5 look at the anchors around them.           A . A .
                                                                                     . A . A
                                                                                     A . A .

The order of coding is written down once, in `LatentCoder.walk`; the forward pass, compression and decompression differ only
in what they do at each of its steps, and the floating-point networks and their integer form only in the networks they bring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models.utils import conv
from torch import Tensor, nn

from taco_nb.model.layers import relu_stack

_ENDS = torch.tensor([0.11, 256.0], dtype=torch.float32).log()
SCALE_TABLE = torch.linspace(*_ENDS, 64, dtype=torch.float32).exp().tolist()
"""The standard deviations of y's 64 Gaussians, from 0.11 to 256 in equal ratios, as CompressAI has them."""


def squeeze(x: Tensor, anchor: bool) -> Tensor:
    """Return the anchors, or the others, of (B, C, H, W) side by side: (B, C, H, W/2), H and W even, channels last."""
    B, C, H, W = x.shape
    cells = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C)
    first = 1 if anchor else 0  # the column of a cell of 2x2 that the even row contributes
    halves = cells[:, :, 0, :, first], cells[:, :, 1, :, 1 - first]
    return torch.stack(halves, dim=2).reshape(B, H, W // 2, C).permute(0, 3, 1, 2)


def unsqueeze(anchors: Tensor, others: Tensor) -> Tensor:
    """Undo `squeeze`: put two halves (B, C, H, W/2) back on their checkerboard (B, C, H, W), channels last."""
    B, C, H, W = anchors.shape
    a, o = (t.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W, C) for t in (anchors, others))
    # even rows begin with one of the others, odd rows with an anchor
    even = torch.stack((o[:, :, 0], a[:, :, 0]), dim=3)
    odd = torch.stack((a[:, :, 1], o[:, :, 1]), dim=3)
    return torch.stack((even, odd), dim=2).reshape(B, H, 2 * W, C).permute(0, 3, 1, 2)


class LocalContext(nn.Conv2d):
    """Look at the squeezed anchors (B, c, h, w/2) from the other positions, by 5x5: -> (B, 2c, h, w/2)."""

    def __init__(self, c: int):
        super().__init__(c, 2 * c, 5, padding=2)

    def forward(self, anchors: Tensor) -> Tensor:
        return look_at_anchors(anchors, self.weight, self.bias)


def look_at_anchors(anchors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve the squeezed anchors (B, c, h, w/2) with a 5x5 kernel (2c, c, 5, 5), seen from the other positions.

    The result, (B, 2c, h, w/2), is what a convolution of the whole board with its other positions zero gives there, for
    a quarter of the arithmetic: of the kernel's 25 taps 12 meet anchors, in rows of three and of two.
    """
    rows = zip(rows_around(anchors), anchor_kernels(weight))
    return interleave_rows(*(F.conv2d(x, kernel, bias, stride=(2, 1)) for x, kernel in rows))


def anchor_kernels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernels (2c, c, 5, 3) with which the even and the odd rows look at the squeezed anchors.

    Anchors of neighbouring rows are half a position apart: where a row of the kernel has two taps, they lie left or right
    of the position.
    """
    kernels = []
    for odd in (0, 1):
        kernel = weight.new_zeros(*weight.shape[:3], 3)
        # rows of the kernel at an even distance have two taps on anchors, the others three
        kernel[:, :, 0::2, odd : odd + 2] = weight[:, :, 0::2, 1::2]
        kernel[:, :, 1::2] = weight[:, :, 1::2, 0::2]
        kernels.append(kernel)
    return kernels[0], kernels[1]


def rows_around(anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the padded anchors that the even rows look at, and those of the odd rows, for a stride of two rows."""
    padded = F.pad(anchors, (1, 1, 2, 2))
    return padded[:, :, :-1], padded[:, :, 1:]


def interleave_rows(even: Tensor, odd: Tensor) -> Tensor:
    """Put even and odd rows, (B, C, h/2, w) each, back in order: (B, C, h, w)."""
    rows = [t.permute(0, 2, 3, 1) for t in (even, odd)]
    return torch.stack(rows, dim=2).flatten(1, 2).permute(0, 3, 1, 2)


def channel_context(before: int, c: int, widths: tuple[int, int]) -> nn.Module:
    """Return what the groups already coded, (B, `before`, h, w), say of the next: (B, 2c, h, w)."""
    a, b = widths
    # "fushion" is how the reference's state dicts spell it
    return relu_stack("fushion", conv(before, a, 5, 1), conv(a, b, 5, 1), conv(b, 2 * c, 5, 1))


def entropy_parameters(known: int, c: int) -> nn.Module:
    """Return the network from what is known of a half group, (B, `known`, h, w/2), to scales and means (B, 2c, h, w/2)."""
    out = 2 * c
    a, b = out * 5 // 3, out * 4 // 3
    return relu_stack("fusion", conv(known, a, 1, 1), conv(a, b, 1, 1), conv(b, out, 1, 1))


@dataclass(frozen=True)
class Step:
    """Each of the ten steps of the walk is half of the channels `channels` of y."""

    channels: slice
    anchor: bool


Visit = Callable[[Step, Tensor, Tensor], Tensor]
"""A visit does what a step asks for, given its scales and means; see `LatentCoder.walk`."""


class SpaceChannelModel(nn.Module):
    """This is the probability model of y and z; `groups` are the channel counts of y's groups, summing to M.

    `context_widths` are the two inner widths of the channel context networks (224 and 128 in the reference).
    """

    def __init__(self, N: int, M: int, groups: tuple[int, ...], context_widths: tuple[int, int]):
        super().__init__()
        self.groups = groups
        self.local_context = nn.ModuleList([LocalContext(c) for c in groups])
        self.channel_context = nn.ModuleDict(
            {str(k): channel_context(sum(groups[:k]), c, context_widths) for k, c in enumerate(groups) if k}
        )
        # the hyper parameters, and from the second group on what the channel context says
        known = [(2 * M + (2 * c if k else 0), c) for k, c in enumerate(groups)]
        anchors = [entropy_parameters(n, c) for n, c in known]
        others = [entropy_parameters(n + 2 * c, c) for n, c in known]  # which have the local context as well
        self.entropy_parameters_anchor = nn.ModuleList(anchors)
        self.entropy_parameters_nonanchor = nn.ModuleList(others)
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(SCALE_TABLE)

    def likelihoods_of_z(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the likelihoods of z (B, N, h, w), rounded, or under noise in training, as CompressAI's bottleneck does.

        `noise` (B, N, h, w) is to be used in place of new noise. CompressAI's own `forward` keeps the order of the axes in a
        tensor, and a GPU's would have to be waited for thirteen times to read it.
        """
        model = self.entropy_bottleneck
        B, N, h, w = z.shape
        values = z if noise is None else z + noise
        values = values.transpose(0, 1).reshape(N, 1, -1)
        if noise is None:
            values = model.quantize(values, "noise" if self.training else "dequantize", model._get_medians())
        likelihoods = model.likelihood_lower_bound(model._likelihood(values)[0])
        return likelihoods.reshape(N, B, h, w).transpose(0, 1).contiguous()

    def likelihoods_of_y(
        self, y: Tensor, scales: Tensor, means: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Return the likelihoods of a half group of y under its Gaussians, all (B, c, h, w/2); `noise` is as for z."""
        if noise is None:
            return self.gaussian_conditional(y, scales, means)[1]
        model = self.gaussian_conditional
        return model.likelihood_lower_bound(model._likelihood(y + noise, scales, means))

    def medians(self) -> Tensor:
        """Return the numbers around which z is rounded, (1, N, 1, 1)."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
