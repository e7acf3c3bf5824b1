"""CLIP score: how well a picture goes with its caption (Hessel et al., EMNLP 2021), without a reference.

100 * max(cos, 0), cos between CLIP ViT-B/32's embeddings of the picture and of the caption. Hessel et al. scale by 2.5
instead of 100, and begin each caption with "A photo depicts"; captions here are taken as they are. Captions of more than
77 tokens are cut there. The picture is prepared as CLIP's own: short side to 224, bicubic and antialiased, central square.

TACO is trained against this very network (the term J of its loss), so a score of its pictures may be flattered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from taco_nb.metrics.clip_images import embed_images, image_side

CLIP = "ViT-B-32-quickgelu/openai"
PROTOCOL = (
    "100 * max(cosine, 0) of CLIP ViT-B/32's embeddings of the decoded 8-bit picture and of the caption that it was "
    "coded with, no prompt before it"
)


class ClipScore:
    """Both halves of CLIP, frozen. `clip` is an open_clip model, `tokenizer` its own: captions -> ids (B, 77)."""

    def __init__(
        self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor], device: str | torch.device = "cpu"
    ):
        self.device = torch.device(device)
        self.model, self.tokenizer = clip.to(self.device).eval().requires_grad_(False), tokenizer

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> list[float]:
        """A score from 0 to 100 for each of the uint8 pictures (B,3,H,W) and its caption."""
        side = image_side(self.model)
        pictures = resize(pictures.to(self.device), [side], InterpolationMode.BICUBIC, antialias=True)
        images = embed_images(self.model, center_crop(pictures, side))
        texts = normalize(
            self.model.encode_text(self.tokenizer(list(captions)).to(self.device)).float(), dim=-1
        )
        return (100 * (images * texts).sum(dim=-1).clamp(min=0)).tolist()
