"""The loss of TACO (Lee et al., ICML 2024, Section 3.2), each term by its name.

loss = lmbda * 255^2 * MSE + bpp + k_P * perceptual distance (TACO: LPIPS) + k_J * J
J    = symmetric cross-entropy between the batch's captions and reconstructions, in CLIP's joint space
       + 40 * |embeddings of x_hat - embeddings of x|, one Frobenius norm over the whole batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taco_nb.errors import SettingError
from taco_nb.metrics.joint_space import standardized
from taco_nb.metrics.perception import Lpips, MiniDistance
from taco_nb.text.clip import to_device
from taco_nb.text.tokens import caption_ids

LOGIT_SCALE = math.exp(2.6592)  # at which CLIP's training starts, and where TACO leaves it
IMAGE_WEIGHT = 40.0
CLIP_SIDE = 224


class TacoLoss:
    """This is the weighted sum above. `perceptual` and `joint` may be None where their weights k_P and k_J are zero.

    `perceptual.distance(x_hat, x) -> (B,)` is fed tensors in [0, 1], x_hat unclamped, as the reference feeds LPIPS; the
    term is called `perceptual.name`. Raises `SettingError` for a positive weight without its term.
    """

    def __init__(
        self,
        lmbda: float,
        k_P: float = 0.0,
        k_J: float = 0.0,
        perceptual: Lpips | MiniDistance | None = None,
        joint: JointLoss | None = None,
    ):
        if (k_P and perceptual is None) or (k_J and joint is None):
            raise SettingError(
                f"k_P={k_P} needs a perceptual distance and k_J={k_J} needs CLIP, but one of them was not given."
            )
        self.perceptual, self.joint = perceptual if k_P else None, joint if k_J else None
        self.weights = {"bpp": 1.0, "mse": lmbda * 255**2}
        if self.perceptual:
            self.weights[self.perceptual.name] = k_P
        if self.joint:
            self.weights["joint"] = k_J
        self.names = ["loss", *self.weights]

    def __call__(self, out: dict[str, Any], x: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the terms and their sum for a network's output `out`: {"loss", "bpp", "mse", ...}."""
        terms = self.means(out, x)
        if self.joint:
            terms["joint"] = self.joint(out["x_hat"], x, captions)
        return {"loss": self.total(terms), **terms}

    def means(self, out: dict[str, Any], x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Return the terms that are means over images: those of a batch follow from those of its parts.

        `weight` (B, 1, H, W) says how much the squared error of each pixel counts, where pixels are not all alike.
        """
        mse = F.mse_loss(out["x_hat"], x) if weight is None else (weight * (out["x_hat"] - x) ** 2).mean()
        terms = {"bpp": bits_per_pixel(out), "mse": mse}
        if self.perceptual:
            terms[self.perceptual.name] = self.perceptual.distance(out["x_hat"], x).float().mean()
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms that are there."""
        return sum(self.weights[name] * term for name, term in terms.items())


def bits_per_pixel(out: dict[str, Any]) -> Tensor:
    """Return the entropy of all latents in bits, divided by the number of pixels."""
    B, _, H, W = out["x_hat"].shape
    return sum(-likelihoods.log2().sum() for likelihoods in out["likelihoods"].values()) / (B * H * W)


class JointLoss:
    """This is TACO's J, on an open_clip model, which is frozen in place, and its tokenizer.

    It pulls the reconstructions to their captions, and to their originals, in CLIP's space of unit vectors. Raises
    `SettingError` unless the model takes pictures of 224x224.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor]):
        if clip.visual.image_size not in (CLIP_SIDE, (CLIP_SIDE, CLIP_SIDE)):
            raise SettingError(
                f"J shows CLIP pictures of {CLIP_SIDE}x{CLIP_SIDE}, but this CLIP takes {clip.visual.image_size}. Choose "
                "another text_encoder, such as 'ViT-B-32-quickgelu/openai', or k_J=0."
            )
        self.clip = clip.eval().requires_grad_(False)
        self.visual = self.clip.visual
        self.tokenizer = tokenizer

    def __call__(self, x_hat: Tensor, x: Tensor, captions: Sequence[str]) -> Tensor:
        """Return J of a batch (B, 3, H, W) with B captions: a scalar, differentiable in x_hat only."""
        with torch.no_grad():
            original = self.embed(x)
        return self.of_embeddings(self.embed(x_hat), original, self.embed_text(captions))

    @staticmethod
    def of_embeddings(image: Tensor, original: Tensor, text: Tensor) -> Tensor:
        """Return J from the unit vectors (B, d) of reconstructions, originals and captions of a whole batch."""
        logits = LOGIT_SCALE * text @ image.T
        partner = torch.arange(len(image), device=image.device)
        agreement = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2
        return agreement + IMAGE_WEIGHT * torch.linalg.matrix_norm(image - original)

    def embed(self, x: Tensor) -> Tensor:
        """Return unit vectors (B, d) for images (B, 3, H, W)."""
        return F.normalize(self.visual(clip_input(x)).float(), dim=-1)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str], hidden: Tensor | None = None) -> Tensor:
        """Return unit vectors (B, d) for captions.

        `hidden` are the states (B, T, width) that this CLIP's own text tower has already given for them. If it has cut
        none of them, each caption's vector follows from the state of its last token, and the tower need not run again.
        """
        ids = self.tokenizer(list(captions))
        projection = getattr(self.clip, "text_projection", None)
        longest = min(max(len(caption_ids(caption)) for caption in captions) + 2, ids.shape[1])
        if hidden is not None and isinstance(projection, Tensor) and longest <= hidden.shape[1]:
            ends = to_device(ids.argmax(-1), hidden.device)  # the end of a text has the largest id
            text = hidden[torch.arange(len(ends), device=ends.device), ends] @ projection
        else:
            text = self.clip.encode_text(to_device(ids, self.clip.logit_scale.device))
        return F.normalize(text.float(), dim=-1)


def clip_input(x: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] as CLIP sees them: short side 224, centre crop, CLIP's mean and deviation."""
    size = [CLIP_SIDE * side // min(x.shape[2:]) for side in x.shape[2:]]
    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((side - CLIP_SIDE) / 2) for side in size)
    return standardized(x[:, :, top : top + CLIP_SIDE, left : left + CLIP_SIDE])
