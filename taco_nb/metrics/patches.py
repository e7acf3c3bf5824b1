"""Patches: how a few large pictures become enough small ones for FID."""

from __future__ import annotations

import torch
from torch import Tensor

from taco_nb.errors import SettingError

PATCH_SIZE = 256


def patches(x: Tensor, size: int = PATCH_SIZE) -> Tensor:
    """A picture (3,H,W) cut into squares (n,3,size,size), as HiFiC cut them (Mentzer et al., NeurIPS 2020, A.7).

    floor(H/size) * floor(W/size) that do not overlap, from the upper left corner on; then, with that corner moved by half
    a patch down and to the right, (floor(H/size) - 1) * (floor(W/size) - 1) more:

        +----+----+----+
        |    |    |    |      a picture of 3 x 2 patches has
        |  +----+----+ |      6 of the first grid
        +--| -+-|  +-|-+      and 2 of the second
        |  +----+----+ |
        |    |    |    |
        +----+----+----+

    What is left over on the right and below belongs to none. A picture smaller than a patch has none: n is 0.
    Raises `SettingError` unless `size` is even and at least 2.
    """
    check_patch_size(size)
    rows, columns = x.shape[-2] // size, x.shape[-1] // size
    shifted = x[:, size // 2 :, size // 2 :]
    return torch.cat([_grid(x, rows, columns, size), _grid(shifted, rows - 1, columns - 1, size)])


def check_patch_size(size: int) -> None:
    """Raise `SettingError` unless `size` is a whole even number of at least 2, which has a half."""
    if type(size) is not int or size < 2 or size % 2:
        raise SettingError(f"The patches of FID have a side of an even number of pixels, but it is {size!r}.")


def _grid(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    if rows < 1 or columns < 1:
        return x.new_empty(0, len(x), size, size)
    cut = x[:, : rows * size, : columns * size].reshape(len(x), rows, size, columns, size)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, len(x), size, size)
