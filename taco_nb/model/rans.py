"""Symbols <-> bytes through CompressAI's rANS coder, made safe to run on a stranger's bytes.

CompressAI's decoder trusts its stream: it reads on past the end of a short one. `decode` therefore hands it the stream
followed by zeros, as many as the decoder could possibly read, and stops when it has read more than was there.
"""

from __future__ import annotations

import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

from taco_nb.errors import DamagedFileError

CHUNK = 1 << 16  # symbols decoded between two checks
# A symbol takes at most 16 bits from the stream. An escape takes more: a run of full nibbles that says how many nibbles
# follow. Beyond the end the run stops within the 16 nibbles of the decoder's state, and says at most 15 each.
_BYTES_PER_SYMBOL = 2
_BYTES_PER_ESCAPE = 128
_BITS_PER_ESCAPE = 8  # the least an escape can take: its length and one nibble


class CodingTables:
    """The cumulative distributions of an entropy model as CompressAI's coder wants them, each row without its padding.

    Raises `ValueError` if the entropy model has no tables yet.
    """

    def __init__(self, model: EntropyModel):
        if model.quantized_cdf.numel() == 0:
            raise ValueError("The entropy model has no tables: call update() first.")
        self.lengths = model.cdf_length.tolist()
        self.offsets = model.offset.tolist()
        self.cdfs = [row[:length] for row, length in zip(model.quantized_cdf.tolist(), self.lengths)]
        most_likely = torch.tensor([max(b - a for a, b in zip(row, row[1:])) for row in self.cdfs])
        self.least_bits = 16 - most_likely.double().log2()  # that a symbol can take, per distribution
        self._first = model.offset.cpu()
        self._escape = (model.offset + model.cdf_length - 2).cpu()

    def escapes(self, symbols: Tensor, indexes: Tensor) -> int:
        """How many of the int32 `symbols` lie outside their table, and so were written in the long form."""
        return int(((symbols < self._first[indexes]) | (symbols >= self._escape[indexes])).sum())


def encode(symbols: Tensor, indexes: Tensor, tables: CodingTables) -> bytes:
    """One rANS stream for 1-d int32 `symbols`, the i-th under the distribution numbered `indexes[i]`."""
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols.tolist(), indexes.tolist(), tables.cdfs, tables.lengths, tables.offsets)
    return encoder.flush()


class Decoder:
    """Reads a stream of at most `total` symbols back, in the order in which `encode` was given them.

    Raises `DamagedFileError` when the stream ends before its symbols do. Any bytes are safe to give.
    """

    def __init__(self, stream: bytes, tables: CodingTables, total: int):
        self._tables = tables
        self._escapes_left = 8 * len(stream) // _BITS_PER_ESCAPE
        reach = _BYTES_PER_SYMBOL * total + _BYTES_PER_ESCAPE * (len(stream) + min(CHUNK, total)) + 64
        # the last run of full nibbles may start inside the stream, and announce 15 times its own length
        self._decoder = RansDecoder()
        self._decoder.set_stream(stream + bytes(reach + 16 * len(stream)))

    def read(self, indexes: Tensor) -> Tensor:
        """The next `len(indexes)` symbols, int32, one for each of the 1-d `indexes`."""
        tables, parts = self._tables, []
        for part in indexes.split(CHUNK):
            values = self._decoder.decode_stream(part.tolist(), tables.cdfs, tables.lengths, tables.offsets)
            symbols = torch.tensor(values, dtype=torch.int32)
            self._escapes_left -= tables.escapes(symbols, part)
            if self._escapes_left < 0:
                raise DamagedFileError("The compressed latents end before all symbols are read: damaged or forged.")
            parts.append(symbols)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
