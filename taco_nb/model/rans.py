"""Symbols <-> bytes through CompressAI's rANS coder, made safe to run on a stranger's bytes.

CompressAI's decoder trusts its stream: it reads on past the end of a short one. `Decoder` therefore hands it the stream
followed by zeros, as many as it could possibly read, and stops when it has read more than was there.
"""

from __future__ import annotations

import math
from array import array

import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

from taco_nb.errors import CheckpointError, DamagedFileError

CHUNK = 1 << 16  # symbols decoded between two checks
LARGEST_SYMBOL = 1 << 26  # from 2^27 on CompressAI's encoder never returns
# A symbol takes at most 16 bits from the stream. An escape takes more: a run of full nibbles that says how many nibbles
# follow. Beyond the end the run stops within 9 nibbles, when the zeros reach the low end of the decoder's state, and
# says at most 15 each.
_BYTES_PER_SYMBOL = 2
_BYTES_PER_ESCAPE = 72


class CodingTables:
    """The `count` cumulative distributions of an entropy model as CompressAI's coder wants them, rows without padding.

    Raises `CheckpointError` for tables that are not such distributions, on which the coder would crash.
    """

    def __init__(self, model: EntropyModel, count: int):
        self.lengths = model.cdf_length.tolist()
        self.offsets = model.offset.tolist()
        self.cdfs = [row[:length] for row, length in zip(model.quantized_cdf.tolist(), self.lengths)]
        frequencies = [[b - a for a, b in zip(row, row[1:])] for row in self.cdfs]
        whole = len(self.offsets) == len(self.cdfs) == count and all(
            len(row) == length > 2 and row[0] == 0 and row[-1] == 1 << 16 and min(counts) > 0
            for length, row, counts in zip(self.lengths, self.cdfs, frequencies)
        )
        if not whole:
            raise CheckpointError(
                "The entropy coder's tables in these weights are damaged; update() makes them anew."
            )
        # that a symbol can take, per distribution
        self.least_bits = 16 - torch.tensor([max(counts) for counts in frequencies]).double().log2()
        # an escape takes its own symbol, the last one, and a nibble, less what rounding in the coder may save
        self.least_escape_bits = 19.9 - math.log2(max(counts[-1] for counts in frequencies))
        self._first = model.offset.cpu()
        self._escape = (model.offset + model.cdf_length - 2).cpu()

    def escapes(self, symbols: Tensor, indexes: Tensor) -> int:
        """How many of the int32 `symbols` lie outside their table, and so were written in the long form."""
        return int(((symbols < self._first[indexes]) | (symbols >= self._escape[indexes])).sum())


def encode(symbols: Tensor, indexes: Tensor, tables: CodingTables) -> bytes:
    """One rANS stream for 1-d int32 `symbols`, two at least, the i-th under the distribution numbered `indexes[i]`.

    Raises `CheckpointError` for symbols beyond `LARGEST_SYMBOL`, which only broken weights make.
    """
    if symbols.min() < -LARGEST_SYMBOL or symbols.max() > LARGEST_SYMBOL:
        raise CheckpointError("The encoder produced latents too large to be coded: the weights are broken.")
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(
        symbols.tolist(), indexes.tolist(), tables.cdfs, tables.lengths, tables.offsets
    )
    return encoder.flush()


class Decoder:
    """Reads a stream of at most `total` symbols back, in the order in which `encode` was given them.

    Raises `DamagedFileError` when the stream ends before its symbols do. Any bytes are safe to give.
    """

    def __init__(self, stream: bytes, tables: CodingTables, total: int):
        # the coder's state; from a smaller one the decoder would take four bytes for every symbol
        if len(stream) < 8 or not 1 << 31 <= int.from_bytes(stream[:8], "little") < 1 << 63:
            raise DamagedFileError(
                "The compressed latents do not begin as the coder's streams do: damaged or forged."
            )
        self._tables = tables
        self._escapes_left = int(8 * len(stream) / tables.least_escape_bits)
        reach = _BYTES_PER_SYMBOL * total + _BYTES_PER_ESCAPE * min(self._escapes_left + CHUNK, total) + 64
        # the last run of full nibbles may start inside the stream, and announce 15 times its own length
        self._decoder = RansDecoder()
        self._decoder.set_stream(stream.ljust(17 * len(stream) + reach, b"\0"))

    def read(self, indexes: Tensor) -> Tensor:
        """The next `len(indexes)` symbols, int32, one for each of the 1-d `indexes`."""
        tables, parts = self._tables, []
        for part in indexes.split(CHUNK):
            values = self._decoder.decode_stream(part.tolist(), tables.cdfs, tables.lengths, tables.offsets)
            symbols = torch.frombuffer(
                array("i", values), dtype=torch.int32
            )  # a third of torch.tensor(values)'s time
            self._escapes_left -= tables.escapes(symbols, part)
            if self._escapes_left < 0:
                raise DamagedFileError(
                    "The compressed latents end before all symbols are read: damaged or forged."
                )
            parts.append(symbols)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
