"""CLIP score and CMMD are both measured in CLIP's joint space, where pictures and captions are unit vectors.

**CLIP score** says how well a picture goes with its caption, without a reference (Hessel et al., EMNLP 2021):
100 * max(cos, 0) of CLIP ViT-B/32's embeddings of both. Hessel et al. scale by 2.5 instead of 100, and begin each caption
with "A photo depicts"; captions here are taken as they are, and cut at 77 tokens. TACO is trained against this very network
(the term J of its loss), so the score may flatter its pictures.

**CMMD** is the distance of decoded pictures from originals (Jayasumana et al., CVPR 2024, arXiv:2401.09603): the maximum
mean discrepancy of two sets of unit vectors, squared, times 1000,

    1000 * (mean k(x, x') + mean k(x_hat, x_hat') - 2 mean k(x, x_hat))

under the Gaussian kernel k(a, b) = exp(-|a - b|^2 / (2 sigma^2)) with sigma 10. The means are over all pairs, a vector with
itself included: the biased estimator of least variance (Gretton et al., JMLR 2012, eq. 5), as in the official program
(google-research/cmmd). Unlike FID it takes nothing for Gaussian, and a few thousand pictures are enough. Its bias falls as
1/n for n pictures, so figures of small sets compare only with those of sets of the same size. The vectors are CLIP
ViT-L/14@336's.

**mini_score and mini_mmd** are the same two quantities in the space of the bundled CLIP, `mini/flickr8k`. They need no
download, and have names of their own because their values compare with no published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

CLIP_SCORE_PROTOCOL = (
    "100 * max(cosine, 0) of CLIP ViT-B/32's embeddings of the decoded 8-bit picture and of the caption that it was "
    "coded with, no prompt before it"
)
CMMD_PROTOCOL = (
    "1000 x squared MMD, biased estimator, Gaussian kernel of sigma 10, unit embeddings by CLIP ViT-L/14@336 of 8-bit "
    "pictures, central square, bicubic to 336"
)
MINI_SCORE_PROTOCOL = (
    "100 * max(cosine, 0) of mini/flickr8k's embeddings of the decoded 8-bit picture and of the caption that it was coded "
    "with; no CLIP score, and comparable with none"
)
MINI_MMD_PROTOCOL = (
    "1000 x squared MMD, biased estimator, Gaussian kernel of sigma 10, unit embeddings by mini/flickr8k of 8-bit pictures, "
    "central square, bicubic to 224; no CMMD, and comparable with none"
)
SIGMA, SCALE = 10.0, 1000.0
BLOCK = 2048  # vectors whose kernel with as many others is in memory at once


class ClipScore:
    """Both halves of a frozen CLIP score pictures against their captions.

    `clip` is an open_clip model, `tokenizer` its own: captions -> ids (B, 77).
    """

    def __init__(
        self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor], device: str | torch.device = "cpu"
    ):
        self.device = torch.device(device)
        self.model, self.tokenizer = clip.to(self.device).eval().requires_grad_(False), tokenizer

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> list[float]:
        """Return a score from 0 to 100 for each of the uint8 pictures (B,3,H,W) and its caption.

        Pictures are prepared as CLIP's own were: short side to 224, bicubic and antialiased, then the central square.
        """
        side = _image_side(self.model)
        pictures = resize(pictures.to(self.device), [side], InterpolationMode.BICUBIC, antialias=True)
        images = _embed_images(self.model, center_crop(pictures, side))
        ids = self.tokenizer(list(captions)).to(self.device)
        texts = normalize(self.model.encode_text(ids).float(), dim=-1)
        return (100 * (images * texts).sum(dim=-1).clamp(min=0)).tolist()


class CmmdEmbedding:
    """The image half of a frozen CLIP embeds pictures as CMMD's official program does. `clip` is an open_clip model."""

    def __init__(self, clip: nn.Module, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.model = clip.to(self.device).eval().requires_grad_(False)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return unit vectors (B, d), float32 on the CPU, of uint8 pictures (B,3,H,W) of one size.

        Unlike CLIP's own preparation, the central square is cut first and then resized, bicubic and antialiased.
        """
        side, short = _image_side(self.model), min(pictures.shape[-2:])
        top, left = ((length - short) // 2 for length in pictures.shape[-2:])
        square = pictures[..., top : top + short, left : left + short].to(self.device)
        small = resize(square, [side, side], InterpolationMode.BICUBIC, antialias=True)
        return _embed_images(self.model, small).cpu()


@torch.inference_mode()
def cmmd(x: Tensor, x_hat: Tensor, device: str | torch.device = "cpu") -> float:
    """Return CMMD for embeddings (n, d) and (m, d); 0 for identical sets, whatever their order. NaN for empty ones.

    It is computed on `device` in float64, since the three means agree in their first four digits, and in blocks: 30,504
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


@torch.inference_mode()
def _embed_images(clip: nn.Module, pictures: Tensor) -> Tensor:
    """Return unit vectors (B, d), float32, of uint8 pictures (B,3,S,S) that have the size of `clip`.

    On CUDA the network runs in float16, as OpenAI's does. That rounds off about 1e-3 of each vector, far less than coding
    a picture changes in it.
    """
    with torch.autocast(pictures.device.type, torch.float16, enabled=pictures.is_cuda):
        embedding = clip.encode_image(standardized(pictures.float() / 255))
    return normalize(embedding.float(), dim=-1)


def standardized(x: Tensor) -> Tensor:
    """Return pictures (B,3,H,W) in [0,1] less the mean of OpenAI's training pictures, over their standard deviation."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    # A GPU fills in numbers by itself, while a tensor of them would be copied there, and waited for.
    mean, std = (
        torch.stack([x.new_full((1, 1), value) for value in values])
        for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    return (x - mean) / std


def _image_side(clip: nn.Module) -> int:
    """Return the side of the square pictures that an open_clip model sees, in pixels."""
    size = clip.visual.image_size
    return size if isinstance(size, int) else size[0]
