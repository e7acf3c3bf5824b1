"""Learned codecs fail to decode on other machines. Here is why, and how this one does not.

**The problem.** The coder gives every latent a probability that two ends must know alike: sender and receiver each run
the same networks, on what has been coded so far, and get a mean and a scale. A sum of floating-point numbers depends on
the order in which it is taken, and that order on the processor, the number of threads, the library, the GPU. So means and
scales differ in their last bits, one of a million scales falls on the other side of a table's step, the receiver reads
one symbol by the wrong table, and everything after it is noise. The authors' TACO, ELIC and CompressAI's models all have
this fault (CompressAI issues 235, 279 and 309), and most give a wrong picture without a word.

**The trick.** Sums of *integers* do not depend on their order, as long as none overflows. A float32 holds every integer
up to 2^24 exactly. So let weights and inputs of a convolution be integers w and a, few enough bits each that

    sum over the kernel of |w| * max |a|  +  |bias|   <=   2^24

for every output channel: then each product, each partial sum and the result are integers that float32 holds, in any order
of summation, with fused multiply-add or without, and an ordinary fast convolution computes them exactly. (The bound is
that of accumulator-aware quantisation, A2Q, Colbert et al., arXiv:2308.13504. After a ReLU no input is negative; then it
suffices that positive and negative weights keep it each by themselves.) Where a layer has so many inputs that its weights
would get too few bits, its input channels are cut into chunks: each chunk keeps the bound, and their exact results are
added in float64, which holds integers up to 2^53.

**A layer.** Every channel lies on a *grid*: an integer a stands for the number a / 2^p. A layer has an exponent p for each
input channel, q for each output channel's sum and r for each output channel's result:

    w = round(weight * 2^(q - p))      s = sum of w * a + round(bias * 2^q)      result = clamp(floor(s / 2^(q - r) + 1/2))

All of it is exact: powers of two change only a float's exponent, and the sums keep the bound. ReLU is in the clamp, whose
other end keeps the next layer's bound, whatever a forged file makes the networks read. `taco_nb.model.kernels` computes
the sums in float32 so, or in bytes where the processor is quicker at these: the integers are the same.

**Where the grids come from.** The ranges of the networks' values must be known. Measured in floating point on pictures
they would depend on the machine that measures. Instead the codec *draws a picture's latents from its own probability
model*, with pseudo-random bits that are the same everywhere: symbols of z from their tables, then, walking through y,
symbols of y from the tables that the networks choose. Each layer is set up on integers that the layers before made
exactly, so that the grids are a function of the weights alone: two machines with one checkpoint agree, the authors' own
included, without a sidecar file. Real pictures reach up to three times as far as such latents, hence `_MARGIN`. Our own
checkpoints keep the derived grids all the same (`IntegerModel.state`), so that a later change of this procedure deprives
no file of its decoder.

The coder's tables and the steps between scales come from erfc and exp, which no two libraries round alike. They are
computed in float64 and rounded to integers, and kept with the weights too.

Only what a decoder must repeat is computed so: h_s, the contexts and the entropy parameters. g_a and h_a run at the
encoder alone, and g_s, which makes the picture of y_hat, may round a pixel otherwise elsewhere, by 1/255 and rarely.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from compressai._CXX import pmf_to_quantized_cdf
from torch import Tensor, nn

from taco_nb.errors import CheckpointError
from taco_nb.model import rans
from taco_nb.model.entropy import SCALE_TABLE, Step, anchor_kernels, interleave_rows, rows_around
from taco_nb.model.kernels import LIMIT, ByteKernel, FloatKernel, bytes_are_exact, power
from taco_nb.model.latents import LatentCoder, Tables
from taco_nb.model.precision import full_float32

if TYPE_CHECKING:
    from taco_nb.model.taco import TACO

BITS, LATENT_BITS = 11, 12
"""Magnitudes of what layers pass on stay below 2^11, of y and its context's inputs up to 2^12."""
MEAN_BITS, SCALE_BITS = 10, 11
"""Binary places of y's means and scales: steps that are small beside the narrowest Gaussian, of 0.11."""
_LARGEST_PARAMETER = 1 << 22
"""Means and scales are clamped to this many of their steps."""
_MARGIN = 3
"""How much larger than in the drawn latents a channel's values may become before they are clamped."""
_QUIETEST = 8
"""A channel that was quiet in the drawn latents still gets this part of the loudest channel's range."""
_KERNEL_RMS = 64
"""The size, in grid steps, of a typical weight, below which a layer is cut into more chunks..."""
_LEAST_CHANNELS = 4
"""...of this many channels at least..."""
_LARGE, _FEW_CHUNKS = 1 << 22, 3
"""...but into this few at most where the networks together have so many weights that chunks would cost time."""
_CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_ANY_CHUNKS = _CHUNKS[-1]
_DRAWN = (6, 6)
"""Height and width of the z that is drawn to find ranges: that of a picture of 384x384 pixels."""
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, zlib.error)
"""What reading a damaged state can raise."""
_LARGEST_STATE = 1 << 26
"""Bytes that the state of a forged file may unpack to."""


# One layer -----------------------------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """This is a kind of convolution of one image, on any device, with weights (out, in, kh, kw)."""

    kind: str
    """"plain" (padded to keep the size), "transposed" (multiplies the size by `stride`), or "anchors" (`look_at_anchors`)."""
    stride: int = 1

    def plain(self, weight: Tensor) -> list[Tensor]:
        """Return the kernels of ordinary convolutions, which together compute this one: see `inputs` and `arranged`.

        A transposed convolution becomes one with stride^2 outputs for each channel, the pixels that lie at a position
        (sub-pixel convolution, Shi et al., CVPR 2016).
        """
        if self.kind == "anchors":
            return list(anchor_kernels(weight))
        if self.kind == "plain":
            return [weight]
        k, s = weight.shape[2], self.stride
        reach = k // 2 // s + (k // 2 % s > 0)  # positions on either side that a kernel meets
        # output s * i + a takes tap t from input i + d - reach
        taps = [(a, d, a + k // 2 - s * (d - reach)) for a in range(s) for d in range(2 * reach + 1)]
        taps = [(a, d, t) for a, d, t in taps if 0 <= t < k]
        kernel = weight.new_zeros(weight.shape[0], s, s, weight.shape[1], 2 * reach + 1, 2 * reach + 1)
        for a, d, t in taps:
            for b, e, u in taps:
                kernel[:, a, b, :, d, e] = weight[:, :, t, u]
        return [kernel.flatten(0, 2)]

    def inputs(self, x: Tensor) -> list[Tensor]:
        """Return the input of each of the kernels."""
        return list(rows_around(x)) if self.kind == "anchors" else [x]

    def arranged(self, outputs: list[Tensor]) -> Tensor:
        """Return the result of this convolution, given the kernels' results."""
        if self.kind == "anchors":
            return interleave_rows(*outputs)
        return F.pixel_shuffle(outputs[0], self.stride) if self.stride > 1 else outputs[0]

    def loads(self, weight: Tensor, signed: bool) -> Tensor:
        """Return how much each input channel can add to each sum, per unit of input: (out, in, cases).

        A sum has a case for each sign of a weight, unless inputs are `signed`, and for each position modulo the stride of
        a transposed convolution, which meets only some taps.
        """
        signs = [weight.abs()] if signed else [weight.clamp(min=0), (-weight).clamp(min=0)]
        phases = [slice(first, None, self.stride) for first in range(self.stride)]
        # of integers, in float64, hence exact
        sums = [w[:, :, a, b].sum((2, 3), dtype=torch.float64) for w in signs for a in phases for b in phases]
        return torch.stack(sums, dim=2)


class Kernel(NamedTuple):
    """These are the weights of one convolution, on the CPU: weight (out, in, kh, kw) in float32, bias (out) in float64."""

    convolution: Convolution
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layer: nn.Module, kind: str = "plain") -> Kernel:
        """Return the weights of one of the network's layers."""
        weight, bias = layer.weight.detach().cpu().float(), layer.bias.detach().cpu().double()
        if isinstance(layer, nn.ConvTranspose2d):
            return cls(Convolution("transposed", layer.stride[0]), weight.transpose(0, 1), bias)
        if kind == "anchors":  # the 13 taps that meet no anchor count for nothing
            weight = weight.clone()
            weight[:, :, 0::2, 0::2] = 0
            weight[:, :, 1::2, 1::2] = 0
        return cls(Convolution(kind), weight, bias)


class ExactLayer:
    """This is a convolution on integers, its requantisation and its clamp: (1, in, h, w) -> (1, out, h', w').

    p, q and r are the exponents of the module's docstring; `signed` says whether inputs may be negative, `relu` whether
    outputs may not. Raises `CheckpointError` where the bound is not kept, which only a forged file's exponents do.
    """

    def __init__(
        self, kernel: Kernel, p: Tensor, q: Tensor, r: Tensor, chunks: int, *, bits: int, signed: bool, relu: bool,
        largest: int = (1 << BITS) - 1,
    ):  # fmt: skip
        # finer weights than 12 bits below the output's step change nothing; coarser than it, there is no half to add
        q = torch.minimum(q, r + 12)
        r = torch.minimum(r, q - 1)
        self.convolution, self.q, self.r, self.chunks = kernel.convolution, q, r, chunks
        self.bits, self.signed = bits, signed
        self.low, self.high = 0 if relu else -largest, largest
        weight = (kernel.weight * _scales(q, 0) * _scales(-p, 1)).round()
        bias = (kernel.bias * power(q)).round()
        half = power(q - r - 1)
        worst = _worst(self.convolution.loads(weight, signed), chunks, bits)
        if not (worst + bias.abs() + half <= LIMIT).all():
            raise CheckpointError("The integer form of these weights is damaged: its sums can leave float32.")
        # of 14 and 24 bits at most, since inputs have ten at least
        self.weight, self.bias = weight.to(torch.int16), bias.int()
        self._kernels: list[FloatKernel | ByteKernel] = []
        self._device: torch.device | None = None  # that the kernels are laid out for

    def __call__(self, x: Tensor) -> Tensor:
        if x.device != self._device:
            self._kernels, self._device = self._prepared(x.device), x.device
        x = x.contiguous(memory_format=torch.channels_last)
        inputs = self.convolution.inputs(x)
        return self.convolution.arranged([kernel(part) for kernel, part in zip(self._kernels, inputs)])

    def _prepared(self, device: torch.device) -> list[FloatKernel | ByteKernel]:
        """Lay the integers out as this device convolves them."""
        shift, ends = self.q - self.r, (self.low, self.high)
        bias = self.bias.double() + power(shift - 1)  # with a half, so that floor rounds
        at_anchors = self.convolution.kind == "anchors"  # whose rows are padded already, and taken in turn
        quick = device.type == "cpu" and torch.backends.mkldnn.enabled and bytes_are_exact()
        kernels = []
        for weight in self.convolution.plain(self.weight.float()):
            stride, padding = ((2, 1), 0) if at_anchors else ((1, 1), weight.shape[2] // 2)
            # a transposed convolution has several outputs for each channel
            common = (weight, *(v.repeat_interleave(len(weight) // len(v)) for v in (bias, shift)))
            if quick and ByteKernel.fits(*common, padding, self.bits):
                kernels.append(ByteKernel(*common, ends, stride, padding, self.bits, self.signed))
            else:
                cuts = _cuts(weight.shape[1], self.chunks)
                kernels.append(FloatKernel(*common, ends, cuts, stride, padding, device))
        return kernels


def _cuts(channels: int, chunks: int) -> list[slice]:
    """Return `chunks` ranges of nearly equal length that cover the channels."""
    ends = [i * channels // chunks for i in range(chunks + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def _worst(loads: Tensor, chunks: int, bits: int) -> Tensor:
    """Return the largest magnitude that a sum over the inputs of any chunk can reach, for each output channel."""
    sums = [loads[:, channels].sum(1).amax(1) for channels in _cuts(loads.shape[1], chunks)]
    return torch.stack(sums).amax(0) * (1 << bits)


def _scales(exponents: Tensor, dim: int) -> Tensor:
    """Return powers of two by which a float32 kernel (out, in, kh, kw) is multiplied along a dimension, exactly."""
    return power(exponents).float().view([-1 if i == dim else 1 for i in range(4)])


def _exponent(values: Tensor) -> Tensor:
    """Return for each value the least e with value < 2^e, as its float64 has it in its bits."""
    return torch.frexp(values.double()).exponent.long()


# Choosing the exponents ----------------------------------------------------------------------------------------------


def grid_for(largest: Tensor, bits: int = BITS) -> Tensor:
    """Return exponents p at which values of these magnitudes, by channel, stay below 2^bits."""
    largest = torch.maximum(largest, largest.max() / _QUIETEST)
    return (bits - _exponent(largest)).clamp(-60, 20)


def sums_for(
    kernel: Kernel, p: Tensor, bits: int, signed: bool, most: int = _ANY_CHUNKS
) -> tuple[Tensor, int]:
    """Return the exponents q of a layer's sums, as large as the bound allows, and the number of its chunks.

    There are `most` chunks at most, and as few as leave half of the output channels weights of `_KERNEL_RMS` grid steps,
    in the root of their mean square. All sums here are of integers below 2^53, exact in float64, so that every machine
    decides alike.
    """
    scaled = kernel.weight * _scales(-p, 1)
    # the exponents at which the largest weight of a channel has 18 bits; a channel of zeros has none
    places = (18 - _exponent(scaled.abs().amax((1, 2, 3)))).clamp(max=60)
    fine = (scaled * _scales(places, 0)).round()
    loads = kernel.convolution.loads(fine, signed)
    bias = (kernel.bias.abs() * power(places)).ceil()
    # in parts, since float64 takes room
    squares = torch.cat([part.double().square().mean((1, 2, 3)) for part in fine.split(16)])
    inputs, taps = loads.shape[1], kernel.weight[0, 0].numel()
    most = max(1, min(most, inputs // _LEAST_CHANNELS))
    found = None
    for chunks in _CHUNKS:
        if chunks > most and found:
            break
        # rounding a weight adds half a step at most; 2^12 is more than the half of an output's step
        rounding = math.ceil(inputs / chunks) * taps * 2 ** (bits - 1) + 2**12
        if rounding >= LIMIT / 2 and chunks < inputs:
            continue
        worst = _worst(loads, chunks, bits) + bias
        q = places + _exponent((LIMIT - rounding) / worst.clamp(min=1)) - 1
        found = q, chunks
        if (squares * power(2 * (q - places))).sort().values[len(q) // 2] >= _KERNEL_RMS**2:
            break
    if found is None:
        raise CheckpointError("These networks have kernels too large for exact sums.")
    q, chunks = found
    # weights that all round one way can use up what was set aside for rounding: then one bit less
    loads = kernel.convolution.loads((scaled * _scales(q, 0)).round(), signed)
    full = _worst(loads, chunks, bits) + (kernel.bias * power(q)).abs() + 2**12 > LIMIT
    return q - full.long(), chunks


# Networks ------------------------------------------------------------------------------------------------------------


class ExactNetwork:
    """One of the networks that a decoder repeats: convolutions on integers, with ReLUs between them.

    Its input is either a tensor of real numbers, which it puts on a grid itself, or the outputs of other networks side by
    side, the `sources`, whose grids it knows. Its output is integers on the grid `grid`; with `places`, the binary places
    that its output channels are to have, it is the real numbers that they stand for. `largest` are the magnitudes of a
    real input, by channel, where they are known beforehand.

    Exponents come from a saved `state`, or else are derived at the first call, from the ranges of what is put in.
    """

    def __init__(
        self, stack: nn.Module, sources: Sequence[ExactNetwork] = (), places: Tensor | None = None,
        largest: Tensor | None = None, kind: str = "plain",
    ):  # fmt: skip
        # in floating point, until the layers are there
        self.convolutions = [layer for layer in stack if hasattr(layer, "weight")]
        self.sources, self.places, self.kind = sources, places, kind
        self.layers: list[ExactLayer] = []
        self.most_chunks = _ANY_CHUNKS
        self.input_bits = BITS if sources or largest is not None else LATENT_BITS
        self.input: Tensor | None = None  # the grid of a real input
        if largest is not None:
            self._put_input_on(grid_for(largest))

    @property
    def grid(self) -> Tensor:
        return self.layers[-1].r

    def __call__(self, x: Tensor) -> Tensor:
        if not self.sources:
            if self.input is None:
                self._put_input_on(grid_for(_MARGIN * x.abs().amax((0, 2, 3)), LATENT_BITS))
            # one exact product, an addition and a floor round to an integer, the same anywhere
            x = (x * self._scale).add_(0.5).floor_().clamp_(-(1 << self.input_bits), 1 << self.input_bits)
        if self.convolutions:
            x = self._build(x)
        else:
            for layer in self.layers:
                x = layer(x)
        return x if self.places is None else x * self._step

    def _put_input_on(self, grid: Tensor) -> None:
        self.input, self._scale = grid, _by_channel(power(grid))

    def _build(self, x: Tensor | None, kept: Sequence | None = None) -> Tensor | None:
        """Make the layers of the exponents `kept`, or else choose these by what each layer makes of the integers x.

        Returns what the last layer makes of x.
        """
        p = torch.cat([source.grid for source in self.sources]) if self.sources else self.input
        for i, convolution in enumerate(self.convolutions):
            last, bits = i == len(self.convolutions) - 1, self.input_bits if i == 0 else BITS
            kernel = Kernel.of(convolution, self.kind)  # one at a time, since float64 takes room
            layer_of = partial(ExactLayer, kernel, p, bits=bits, signed=i == 0, relu=not last)
            if kept is not None:
                q, r = (torch.tensor(exponents, dtype=torch.long) for exponents in kept[i][:2])
                chunks = kept[i][2]
            else:
                q, chunks = sums_for(kernel, p, bits, i == 0, self.most_chunks)
                r = self.places if last else None
                if r is None:
                    # the layer with a grid as fine as its sums' shows what they are
                    fine = layer_of(q, q - 1, chunks, largest=1 << 40)
                    r = grid_for(_MARGIN * fine(x).abs().amax((0, 2, 3)).double() / power(fine.r))
            largest = _LARGEST_PARAMETER if last and self.places is not None else (1 << BITS) - 1
            self.layers.append(layer_of(q, r, chunks, largest=largest))
            p = self.layers[-1].r
            x = x if x is None else self.layers[-1](x)
        self.convolutions, self._step = [], _by_channel(power(-p))
        return x

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the exponents that `state` returned. Its sources are restored before."""
        if not self.sources:
            self._put_input_on(torch.tensor(state["input"], dtype=torch.long))
        if len(state["layers"]) != len(self.convolutions):
            raise ValueError("another number of layers")
        self._build(None, state["layers"])

    def state(self) -> dict[str, Any]:
        """Return all exponents, as JSON holds them."""
        layers = [[layer.q.tolist(), layer.r.tolist(), layer.chunks] for layer in self.layers]
        return {"input": None if self.input is None else self.input.tolist(), "layers": layers}

    def to(self, device: torch.device) -> None:
        """Move what is not moved with the first call: the steps of real inputs and outputs."""
        self._step = self._step.to(device)
        if not self.sources:
            self._scale = self._scale.to(device)


def _by_channel(values: Tensor) -> Tensor:
    return values.float().view(1, -1, 1, 1)


# Tables --------------------------------------------------------------------------------------------------------------


def scale_steps() -> list[float]:
    """Return the scales of y's distributions, computed in float64."""
    first, last = math.log(0.11), math.log(256.0)
    return [math.exp(first + (last - first) * i / 63) for i in range(64)]


@lru_cache(maxsize=1)
def gaussian_pmfs() -> list[list[float]]:
    """Return the probabilities of y's symbols for every scale, and last that of all symbols beyond, in float64."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    rows = []
    for scale in scale_steps():
        reach = math.ceil(scale * 6.109410204869)  # beyond lies 1e-9
        half = [below((0.5 - k) / scale) - below((-0.5 - k) / scale) for k in range(reach + 1)]
        rows.append([*reversed(half[1:]), *half, 2 * below((-0.5 - reach) / scale)])
    return rows


_KEPT = ("medians", "thresholds", "y", "y_offsets", "z", "z_offsets")


def _tables_for(net: TACO) -> dict[str, list]:
    """Return the integers that are saved beside the networks' exponents; of tables, their symbols' frequencies."""
    y = [pmf_to_quantized_cdf(row, 16) for row in gaussian_pmfs()]
    # from the bottleneck's weights in float64, whatever tables it holds
    bottleneck = deepcopy(net.entropy_bottleneck).cpu().double()
    bottleneck.update(force=True)
    z = [row[:n] for row, n in zip(bottleneck.quantized_cdf.tolist(), bottleneck.cdf_length.tolist())]
    return {
        "medians": (net.medians().flatten().double() * 2**MEAN_BITS).round().long().tolist(),
        "thresholds": [round(scale * 2**SCALE_BITS) for scale in scale_steps()[:-1]],
        "y": [np.diff(row).tolist() for row in y],
        "y_offsets": [1 - len(row) // 2 for row in gaussian_pmfs()],
        "z": [np.diff(row).tolist() for row in z],
        "z_offsets": bottleneck.offset.tolist(),
    }


# The model -----------------------------------------------------------------------------------------------------------


class IntegerModel(LatentCoder):
    """This is all that a decoder of `net`'s latents repeats, on integers. It does not follow later changes of the weights.

    Exponents and tables come from `state`, as `IntegerModel.state` returned them, or else are derived from the weights, the
    same on every machine. Raises `CheckpointError` for a state that is not these weights'.
    """

    largest_symbol = 1 << 13
    """With it, and means below 2^12 of 10 binary places, float32 holds y_hat exactly."""

    def __init__(self, net: TACO, state: bytes | None = None):
        self.groups = net.groups
        try:
            kept = None if state is None else _unpacked(state)
            self._set_up_tables(net.config.N, _tables_for(net) if kept is None else kept)
            self._set_up_networks(net)
            if kept is None:
                self._derive()
            else:
                for name, network in self._networks():
                    network.restore(kept["networks"][name])
        except CheckpointError:
            raise
        except _DAMAGE as error:
            raise CheckpointError(f"The integer form of these weights is damaged: {error!r}.") from None
        # other devices than these have no float64, or unknown convolutions
        device = net.medians().device
        device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        for _, network in self._networks():
            network.to(device)
        self._medians, self._thresholds = self._medians.to(device), self._thresholds.to(device)

    def _set_up_tables(self, N: int, kept: Mapping[str, list]) -> None:
        """Take the integers that `_tables_for` returns."""
        self._kept = {name: kept[name] for name in _KEPT}
        y, z = ([np.cumsum([0, *row]).tolist() for row in kept[name]] for name in ("y", "z"))
        self._tables = Tables(
            rans.CodingTables(y, kept["y_offsets"], len(SCALE_TABLE)),
            rans.CodingTables(z, kept["z_offsets"], N),
        )
        self._medians = _by_channel(torch.tensor(kept["medians"])) / 2**MEAN_BITS
        self._thresholds = torch.tensor(kept["thresholds"]).float() / 2**SCALE_BITS
        if self._medians.shape[1] != N or len(self._thresholds) != len(SCALE_TABLE) - 1:
            raise ValueError("medians or thresholds of another model")

    def _set_up_networks(self, net: TACO) -> None:
        first = torch.tensor(self._tables.z.offsets)
        last = first + torch.tensor(self._tables.z.lengths) - 3
        z_range = torch.maximum(first.abs(), last.abs()).double() + self._medians.flatten().abs()
        self.h_s = ExactNetwork(net.h_s.increase, largest=z_range)
        self.local_context = [ExactNetwork([layer], kind="anchors") for layer in net.local_context]
        self.channel_context = {k: ExactNetwork(part.fushion) for k, part in net.channel_context.items()}
        self.entropy_parameters_anchor, self.entropy_parameters_nonanchor = [], []
        for k, c in enumerate(self.groups):
            anchors, others = (
                net.entropy_parameters_anchor[k].fusion,
                net.entropy_parameters_nonanchor[k].fusion,
            )
            known = [*([self.channel_context[str(k)]] if k else []), self.h_s]
            places = torch.tensor([SCALE_BITS] * c + [MEAN_BITS] * c)
            self.entropy_parameters_anchor.append(ExactNetwork(anchors, known, places))
            known = [self.local_context[k], *known]
            self.entropy_parameters_nonanchor.append(ExactNetwork(others, known, places))

        networks = [network for _, network in self._networks()]
        layers = [layer for network in networks for layer in network.convolutions]
        if sum(weight.numel() for layer in layers for weight in layer.parameters()) > _LARGE:
            for network in networks:
                network.most_chunks = _FEW_CHUNKS

    def _networks(self) -> Iterator[tuple[str, ExactNetwork]]:
        """Yield every network under a name, sources first."""
        yield "h_s", self.h_s
        yield from ((f"channel_context.{k}", network) for k, network in self.channel_context.items())
        for part in ("local_context", "entropy_parameters_anchor", "entropy_parameters_nonanchor"):
            yield from ((f"{part}.{k}", network) for k, network in enumerate(getattr(self, part)))

    @torch.inference_mode()
    def _derive(self) -> None:
        """Draw latents from the model itself, and so lead every network through its first call."""
        calls = count(1)
        z_indexes = self.z_indexes(self._medians.shape[1] * _DRAWN[0] * _DRAWN[1])
        z = _draw(self._tables.z, z_indexes, next(calls)).view(1, -1, *_DRAWN)

        def visit(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            return _draw(self._tables.y, self.y_indexes(scales), next(calls)).view(means.shape) + means

        with full_float32("cpu"):
            self.walk(self.h_s(z + self._medians), visit)

    def medians(self) -> Tensor:
        return self._medians

    def scale_thresholds(self) -> Tensor:
        return self._thresholds

    def tables(self) -> Tables:
        return self._tables

    def state(self) -> bytes:
        """Return exponents and tables, all of them integers, as a few tens of kilobytes to keep with the weights."""
        return zlib.compress(self._written(), 9)

    def _written(self) -> bytes:
        """Return exponents and tables as JSON."""
        networks = {name: network.state() for name, network in self._networks()}
        return json.dumps({"networks": networks, **self._kept}, separators=(",", ":")).encode()

    def digest(self) -> bytes:
        """Return a SHA-256 of every integer that decoding the latents depends on."""
        digest = hashlib.sha256(self._written())
        for name, network in self._networks():
            digest.update(name.encode())
            for layer in network.layers:
                weight, bias = layer.weight.numpy(), layer.bias.numpy()
                digest.update(weight.astype("<i2").tobytes() + bias.astype("<i4").tobytes())
        return digest.digest()


def _unpacked(state: bytes) -> dict[str, Any]:
    unpack = zlib.decompressobj()
    text = unpack.decompress(state, _LARGEST_STATE)
    if not unpack.eof:
        raise ValueError("it is cut short, or too large")
    return json.loads(text)


def _draw(tables: rans.CodingTables, indexes: Tensor, call: int) -> Tensor:
    """Draw a symbol from each of these distributions, float32; escapes become the largest symbol in the table.

    The random numbers, of 16 bits, are SHAKE-256 of the number of this call: the same everywhere, and they will stay so.
    """
    data = hashlib.shake_256(b"taco_nb %d" % call).digest(2 * len(indexes))
    numbers, rows = np.frombuffer(data, "<u2").astype(np.int64), indexes.cpu().numpy()
    symbols = np.empty(len(rows), np.float32)
    for row in np.unique(rows):
        these = rows == row
        found = np.searchsorted(tables.cdfs[row], numbers[these], side="right") - 1
        symbols[these] = np.minimum(found, tables.lengths[row] - 3) + tables.offsets[row]
    return torch.from_numpy(symbols)
