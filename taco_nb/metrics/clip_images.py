"""Pictures in CLIP's joint space: what CMMD and the CLIP score have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


@torch.inference_mode()
def embed_images(clip: nn.Module, pictures: Tensor) -> Tensor:
    """Unit vectors (B, d), float32, of uint8 pictures (B,3,S,S) that have the size of `clip`, an open_clip model.

    CLIP's own mean and standard deviation are taken out first. On CUDA the network runs in float16, as OpenAI's does:
    what that rounds off is noise of about 1e-3 in each vector, far below what one coded picture moves it.
    """
    with torch.autocast(pictures.device.type, torch.float16, enabled=pictures.is_cuda):
        embedding = clip.encode_image(standardized(pictures.float() / 255))
    return normalize(embedding.float(), dim=-1)


def standardized(x: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [0,1] less the mean of those that OpenAI trained CLIP on, over their standard deviation."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = (x.new_tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (x - mean) / std


def image_side(clip: nn.Module) -> int:
    """The side of the square pictures that an open_clip model sees, in pixels."""
    size = clip.visual.image_size
    return size if isinstance(size, int) else size[0]
