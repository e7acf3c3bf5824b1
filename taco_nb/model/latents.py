"""Between latents and two rANS streams, encoder and decoder must take the same steps.

    y, z -> quantize -> symbols and the numbers of their distributions -> rANS -> strings
    strings -> rANS, one half group of the walk at a time -> y_hat

`LatentCoder` says this once, for the network in floating point (`TACO`, CompressAI's convention, the reference's bytes)
and for its integer form (`IntegerModel`, the `.taco` file, the same on every machine).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taco_nb.errors import CheckpointError, DamagedFileError
from taco_nb.model import rans
from taco_nb.model.entropy import Step, Visit, squeeze, unsqueeze
from taco_nb.model.precision import full_float32


class Symbols(NamedTuple):
    """These are the integers of one image that are coded, and y_hat (1, M, h, w), which they decode to.

    y's and the numbers of their distributions, `indexes`, are one tensor for each step of the walk; all are int32, flat.
    """

    y: list[Tensor]
    indexes: list[Tensor]
    z: Tensor
    y_hat: Tensor


class Encoded(NamedTuple):
    """A coded image is two rANS streams, and y_hat (1, M, h, w), which they decode to."""

    y_string: bytes
    z_string: bytes
    y_hat: Tensor


class Tables(NamedTuple):
    """These are the distributions of y's symbols, by scale, and of z's, by channel."""

    y: rans.CodingTables
    z: rans.CodingTables


Network = Callable[[Tensor], Tensor]


class LatentCoder(ABC):
    """A coder of latents codes those of one image, given networks, medians and tables.

    Images are coded one by one even in a batch, since a decoder may get one file alone.
    """

    groups: Sequence[int]
    """So many channels of y are coded at a time; they add up to M."""
    h_s: Network
    """z_hat (B, N, h/4, w/4) -> hyper parameters (B, 2M, h, w)."""
    local_context: Sequence[Network]
    """A network for each group, as the three below. Group 0 has no channel context."""
    channel_context: Mapping[str, Network]
    entropy_parameters_anchor: Sequence[Network]
    entropy_parameters_nonanchor: Sequence[Network]
    largest_symbol = rans.LARGEST_SYMBOL
    """Symbols beyond this are not coded, and are a forgery where they are read."""

    @abstractmethod
    def medians(self) -> Tensor:
        """Return the numbers around which z is rounded, (1, N, 1, 1)."""

    @abstractmethod
    def scale_thresholds(self) -> Tensor:
        """Return the 63 scales that part the 64 distributions of y's symbols, ascending."""

    @abstractmethod
    def tables(self) -> Tables:
        """Return the coder's tables."""

    def walk(self, hyper: Tensor, visit: Visit) -> Tensor:
        """Visit the half groups of y in coding order, and return the y_hat (B, M, h, w) that the visits have made.

        `hyper` is h_s's output, (B, 2M, h, w). `visit(step, scales, means)` gets the Gaussian parameters of a half group,
        (B, c, h, w/2) each, and returns that half of y_hat: the context of everything that comes after it.
        """
        half_hyper = {anchor: squeeze(hyper, anchor) for anchor in (True, False)}
        y_hat: list[Tensor] = []
        first = 0
        for k, c in enumerate(self.groups):
            channels = slice(first, first + c)
            first += c
            # what the groups before say, at all positions at once
            context = [self.channel_context[str(k)](torch.cat(y_hat, 1))] if k else []
            known = {
                anchor: [*(squeeze(t, anchor) for t in context), half_hyper[anchor]]
                for anchor in (True, False)
            }

            parameters = self.entropy_parameters_anchor[k](torch.cat(known[True], 1))
            anchors = visit(Step(channels, True), *parameters.chunk(2, 1))

            local = self.local_context[k](anchors)
            parameters = self.entropy_parameters_nonanchor[k](torch.cat([local, *known[False]], 1))
            others = visit(Step(channels, False), *parameters.chunk(2, 1))

            y_hat.append(unsqueeze(anchors, others))
        return torch.cat(y_hat, 1)

    @torch.inference_mode()
    def quantize(self, y: Tensor, z: Tensor) -> Symbols:
        """Return what is coded of y (1, M, h, w) and z (1, N, h/4, w/4), both float32.

        Raises `CheckpointError` for values that are not finite or too large: the weights that made them are broken.
        """
        medians = self.medians()
        y, z = y.to(medians.device), z.to(medians.device)
        halves = {anchor: squeeze(y, anchor) for anchor in (True, False)}
        symbols: list[Tensor] = []
        indexes: list[Tensor] = []

        def visit(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            rounded = (halves[step.anchor][:, step.channels] - means).round()
            # by way of flat integers, as the decoder has them
            symbols.append(rounded.int().flatten())
            indexes.append(self.y_indexes(scales))
            return symbols[-1].reshape(means.shape) + means

        z_symbols = (z - medians).round().int().flatten()
        with full_float32(medians.device.type):
            y_hat = self.walk(self.h_s(z_symbols.reshape(z.shape) + medians), visit)
        if not all(torch.isfinite(values).all() for values in (y, z, y_hat)):
            raise CheckpointError("The encoder produced values that are not finite: the weights are broken.")
        if any(self._is_too_large(part) for part in (*symbols, z_symbols)):
            raise CheckpointError("The encoder produced latents too large to code: the weights are broken.")
        return Symbols(symbols, indexes, z_symbols, y_hat)

    @torch.inference_mode()
    def encode_latents(self, y: Tensor, z: Tensor) -> Encoded:
        """Code y (1, M, h, w) and z (1, N, h/4, w/4) of one image, float32. Raises what `quantize` raises."""
        tables = self.tables()
        symbols = self.quantize(y, z)
        y_string = rans.encode(torch.cat(symbols.y).cpu(), torch.cat(symbols.indexes).cpu(), tables.y)
        z_string = rans.encode(symbols.z.cpu(), self.z_indexes(len(symbols.z)), tables.z)
        return Encoded(y_string, z_string, symbols.y_hat)

    @torch.inference_mode()
    def decode_latents(self, y_string: bytes, z_string: bytes, shape: tuple[int, int]) -> Tensor:
        """Return y_hat (1, M, h, w); `shape` is that of z. Any bytes are safe to give.

        Raises `DamagedFileError` for streams that cannot be those of such an image.
        """
        tables, medians = self.tables(), self.medians()
        channels = medians.shape[1]
        if shape[0] * shape[1] * float(tables.z.least_bits.sum()) > 8 * len(z_string) + 64:
            raise DamagedFileError(
                f"{len(z_string)} bytes cannot hold the latents of so large an image: the header is forged."
            )
        z_indexes = self.z_indexes(channels * shape[0] * shape[1])
        z_symbols = self._read(rans.Decoder(z_string, tables.z, len(z_indexes)), z_indexes)
        # z has a position for every 4x4 of y's
        decoder = rans.Decoder(y_string, tables.y, 16 * shape[0] * shape[1] * sum(self.groups))

        def visit(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            symbols = self._read(decoder, self.y_indexes(scales).cpu())
            return symbols.to(means.device).reshape(means.shape) + means

        z_hat = z_symbols.to(medians.device).reshape(1, channels, *shape) + medians
        with full_float32(medians.device.type):
            y_hat = self.walk(self.h_s(z_hat), visit)
        if not torch.isfinite(y_hat).all():
            raise DamagedFileError("The latents decode to values that are not finite: damaged or forged.")
        return y_hat

    def _read(self, decoder: rans.Decoder, indexes: Tensor) -> Tensor:
        symbols = decoder.read(indexes)
        if self._is_too_large(symbols):
            raise DamagedFileError("The file holds latents that no encoder writes: it is damaged or forged.")
        return symbols

    def _is_too_large(self, symbols: Tensor) -> bool:
        # not by abs(), of which the least integer has none
        return bool((symbols > self.largest_symbol).any() or (symbols < -self.largest_symbol).any())

    def y_indexes(self, scales: Tensor) -> Tensor:
        """Return for each scale the number of the smallest in the table above it, int32 and flat.

        This is CompressAI's `build_indexes`, in one call.
        """
        return torch.bucketize(scales.contiguous(), self.scale_thresholds(), out_int32=True).flatten()

    def z_indexes(self, count: int) -> Tensor:
        """Return the distributions of z's `count` symbols, which are those of their channels."""
        channels = self.medians().shape[1]
        return torch.arange(channels, dtype=torch.int32).repeat_interleave(count // channels)
