"""Numbers as colours: dark where little is, bright where much is."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

COLD, HOT = (
    np.array((20, 24, 60)),
    np.array((255, 214, 90)),
)  # apart in lightness too, for eyes that see no hue


def heat(field: Tensor) -> Image.Image:
    """A field (h, w) in [0, 1] as a picture of w x h pixels."""
    return Image.fromarray((COLD + field.numpy()[..., None] * (HOT - COLD)).round().astype(np.uint8))
