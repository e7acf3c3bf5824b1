"""CMMD: the distance of decoded pictures from originals in CLIP's space (Jayasumana et al., CVPR 2024, arXiv:2401.09603).

The maximum mean discrepancy of two sets of unit vectors, squared, under the Gaussian kernel
k(a, b) = exp(-|a - b|^2 / (2 sigma^2)) with sigma 10, times 1000:

    1000 * (mean k(x, x') + mean k(x_hat, x_hat') - 2 mean k(x, x_hat))

the means over all pairs, a vector with itself included: the biased estimator of least variance (Gretton et al., JMLR 2012,
eq. 5), as the official program (google-research/cmmd) has it. No Gaussian is assumed, and a few thousand pictures do.
The bias of a set of n pictures falls as 1/n, so small sets compare only among equals.

The vectors are CLIP ViT-L/14@336's of 8-bit pictures, cut to their central square and resized to 336 with the antialiased
bicubic filter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, resize

from taco_nb.metrics.clip_images import embed_images, image_side

CLIP = "ViT-L-14-336-quickgelu/openai"
PROTOCOL = (
    "1000 x squared MMD, biased estimator, Gaussian kernel of sigma 10, unit embeddings by CLIP ViT-L/14@336 of 8-bit "
    "pictures, central square, bicubic to 336"
)
SIGMA, SCALE = 10.0, 1000.0
BLOCK = 2048  # vectors whose kernel with as many others is in memory at once


class CmmdEmbedding:
    """CLIP's image half, frozen, with the official program's preparation of the picture. `clip` is an open_clip model."""

    def __init__(self, clip: nn.Module, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.model = clip.to(self.device).eval().requires_grad_(False)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Unit vectors (B, d), float32 on the CPU, of uint8 pictures (B,3,H,W) of one size."""
        side, pictures = image_side(self.model), pictures.to(self.device)
        short = min(pictures.shape[-2:])
        top, left = ((length - short) // 2 for length in pictures.shape[-2:])
        square = pictures[..., top : top + short, left : left + short]
        return embed_images(
            self.model, resize(square, [side, side], InterpolationMode.BICUBIC, antialias=True)
        ).cpu()


@torch.inference_mode()
def cmmd(x: Tensor, x_hat: Tensor, device: str | torch.device = "cpu") -> float:
    """The figure above for embeddings (n, d) and (m, d); 0 for identical sets, whatever their order. NaN for none.

    Computed on `device` in float64, since the three means agree in their first four digits, and in blocks: 30,504
    pictures would have a kernel matrix of 7 GB.
    """
    pairs = ((x, x), (x_hat, x_hat), (x, x_hat))
    within_x, within_x_hat, across = (_mean_kernel(a, b, torch.device(device)) for a, b in pairs)
    return SCALE * (within_x + within_x_hat - 2 * across)


def _mean_kernel(x: Tensor, y: Tensor, device: torch.device) -> float:
    from tqdm.auto import tqdm

    total = torch.zeros((), dtype=torch.float64, device=device)
    for a in tqdm(x.split(BLOCK), "CMMD", leave=False, delay=2):
        a = a.to(device).double()
        for b in y.split(BLOCK):
            b = b.to(device).double()
            squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
            total += torch.exp(-squares / (2 * SIGMA**2)).sum()
    return total.item() / (len(x) * len(y)) if len(x) and len(y) else float("nan")
