"""CompressAI's rANS coder turns symbols into bytes and back; here it is made safe to run on a stranger's bytes.

CompressAI's decoder trusts its stream: it reads on past the end of a short one. `Decoder` therefore hands it the stream
followed by zeros, as many as it could possibly read, and stops when it has read more than was there.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

from taco_nb.errors import CheckpointError, DamagedFileError

CHUNK = 1 << 15
"""Symbols decoded between two checks."""
LARGEST_SYMBOL = 1 << 26
"""From 2^27 on CompressAI's encoder never returns."""
# A symbol takes at most 16 bits from the stream. An escape takes more: a run of full nibbles that says how many nibbles
# follow. Beyond the end the run stops within 9 nibbles, when the zeros reach the low end of the decoder's state, and
# says at most 15 each.
_BYTES_PER_SYMBOL = 2
_BYTES_PER_ESCAPE = 72


class CodingTables:
    """These are cumulative distributions as CompressAI's coder wants them: rows of integers that rise from 0 to 2^16.

    A row's last symbol is the escape, for values outside; its first stands for the value `offsets[row]`. Raises
    `CheckpointError` for rows that are not such distributions, or not `count` of them: the coder would crash on them.
    """

    def __init__(self, cdfs: Sequence[Sequence[int]], offsets: Sequence[int], count: int):
        self.cdfs, self.offsets = [list(row) for row in cdfs], list(offsets)
        self.lengths = [len(row) for row in self.cdfs]
        frequencies = [[b - a for a, b in zip(row, row[1:])] for row in self.cdfs]
        whole = len(self.offsets) == len(self.cdfs) == count and all(
            len(row) > 2 and row[0] == 0 and row[-1] == 1 << 16 and min(counts) > 0
            for row, counts in zip(self.cdfs, frequencies)
        )
        if not whole:
            raise CheckpointError("The coder's tables in these weights are damaged; update() makes new ones.")
        # that a symbol can take, per distribution
        self.least_bits = 16 - torch.tensor([max(counts) for counts in frequencies]).double().log2()
        # an escape takes its own symbol, the last one, and a nibble, less what rounding in the coder may save
        self.least_escape_bits = 19.9 - math.log2(max(counts[-1] for counts in frequencies))
        self._first = np.array(self.offsets, np.int32)
        self._inside = np.array(self.lengths, np.uint32) - 2  # symbols but the escape

    @classmethod
    def of_model(cls, model: EntropyModel, count: int) -> CodingTables:
        """Take the tables of one of CompressAI's entropy models, whose rows are padded to one length."""
        lengths, rows = model.cdf_length.tolist(), model.quantized_cdf.tolist()
        rows = [row[: max(length, 0)] for row, length in zip(rows, lengths) if length <= len(row)]
        return cls(rows, model.offset.tolist(), count)

    def escapes(self, symbols: Tensor, indexes: Tensor) -> int:
        """Return how many of the int32 `symbols` lie outside their table, and so were written in the long form."""
        rows = indexes.numpy()
        # as unsigned numbers, those before the first symbol lie far beyond the last
        places = (symbols.numpy() - self._first.take(rows)).view(np.uint32)
        return int(np.count_nonzero(places >= self._inside.take(rows)))

    def up_to(self, indexes: Tensor) -> tuple[list[list[int]], list[int], list[int]]:
        """Return the rows, lengths and offsets that `indexes` can ask for.

        CompressAI copies every row it is given at every call; the rows of the widest Gaussians, which are seldom used,
        hold most of the numbers.
        """
        count = int(indexes.max()) + 1 if len(indexes) else 0
        return self.cdfs[:count], self.lengths[:count], self.offsets[:count]


def encode(symbols: Tensor, indexes: Tensor, tables: CodingTables) -> bytes:
    """Return one rANS stream for 1-d int32 `symbols`, two at least, the i-th under the distribution `indexes[i]`.

    Raises `CheckpointError` for symbols beyond `LARGEST_SYMBOL`, which only broken weights make.
    """
    if symbols.min() < -LARGEST_SYMBOL or symbols.max() > LARGEST_SYMBOL:
        raise CheckpointError("The encoder produced latents too large to be coded: the weights are broken.")
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols.tolist(), indexes.tolist(), *tables.up_to(indexes))
    return encoder.flush()


class Decoder:
    """Read a stream of at most `total` symbols back, in the order in which `encode` was given them.

    Raises `DamagedFileError` when the stream ends before its symbols do. Any bytes are safe to give.
    """

    def __init__(self, stream: bytes, tables: CodingTables, total: int):
        # the coder's state; from a smaller one the decoder would take four bytes for every symbol
        if len(stream) < 8 or not 1 << 31 <= int.from_bytes(stream[:8], "little") < 1 << 63:
            raise DamagedFileError("The latents do not begin as the coder's streams do: damaged or forged.")
        self._tables = tables
        self._escapes_left = int(8 * len(stream) / tables.least_escape_bits)
        reach = _BYTES_PER_SYMBOL * total + _BYTES_PER_ESCAPE * min(self._escapes_left + CHUNK, total) + 64
        # the last run of full nibbles may start inside the stream, and announce 15 times its own length
        self._decoder = RansDecoder()
        self._decoder.set_stream(stream.ljust(17 * len(stream) + reach, b"\0"))

    def read(self, indexes: Tensor) -> Tensor:
        """Return the next `len(indexes)` symbols, int32, one for each of the 1-d `indexes`."""
        parts = []
        for part in indexes.split(CHUNK):
            values = self._decoder.decode_stream(part.tolist(), *self._tables.up_to(part))
            # a third of the time of torch.tensor(values)
            symbols = torch.from_numpy(np.asarray(array("i", values)))
            # each escape takes bits of the stream, so only so many can have been in it
            self._escapes_left -= self._tables.escapes(symbols, part)
            if self._escapes_left < 0:
                raise DamagedFileError("The latents end before all symbols are read: damaged or forged.")
            parts.append(symbols)
        return torch.cat(parts)
