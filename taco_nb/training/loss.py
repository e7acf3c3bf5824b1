"""The loss of TACO (Lee et al., ICML 2024, Section 3.2), each term by its name.

loss = lmbda * 255^2 * MSE + bpp + k_P * LPIPS + k_J * J
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

LOGIT_SCALE = math.exp(2.6592)  # at which CLIP's training starts, and where TACO leaves it
IMAGE_WEIGHT = 40.0
CLIP_SIDE = 224


class TacoLoss:
    """The weighted sum above. `lpips` and `joint` may be None where their weights k_P and k_J are zero.

    `lpips(x_hat, x) -> (B,)` is fed [0, 1] tensors, unclamped, as the reference does. Raises `SettingError` for a
    positive weight without its term.
    """

    def __init__(
        self,
        lmbda: float,
        k_P: float = 0.0,
        k_J: float = 0.0,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        joint: JointLoss | None = None,
    ):
        if (k_P and lpips is None) or (k_J and joint is None):
            raise SettingError(
                f"k_P={k_P} needs LPIPS and k_J={k_J} needs CLIP, but one of them was not given."
            )
        self.lmbda, self.k_P, self.k_J = lmbda, k_P, k_J
        self.lpips, self.joint = lpips, joint

    @property
    def names(self) -> list[str]:
        """The names of the terms, their sum first."""
        return ["loss", "bpp", "mse", *["lpips"] * bool(self.k_P), *["joint"] * bool(self.k_J)]

    def __call__(self, out: dict[str, Any], x: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """The terms and their sum for a network's output `out`: {"loss", "bpp", "mse"[, "lpips"][, "joint"]}."""
        terms = self.means(out, x)
        if self.k_J:
            terms["joint"] = self.joint(out["x_hat"], x, captions)
        return {"loss": self.total(terms), **terms}

    def means(self, out: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        """The terms that are means over images, so that those of a batch follow from those of its parts."""
        terms = {"bpp": bits_per_pixel(out), "mse": F.mse_loss(out["x_hat"], x)}
        return terms | ({"lpips": self.lpips(out["x_hat"], x).float().mean()} if self.k_P else {})

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms that are there."""
        weights = {"bpp": 1.0, "mse": self.lmbda * 255**2, "lpips": self.k_P, "joint": self.k_J}
        return sum(weights[name] * term for name, term in terms.items())


def bits_per_pixel(out: dict[str, Any]) -> Tensor:
    """The entropy of all latents in bits, over the number of pixels."""
    B, _, H, W = out["x_hat"].shape
    return sum(-likelihoods.log2().sum() for likelihoods in out["likelihoods"].values()) / (B * H * W)


class JointLoss:
    """TACO's J, on a frozen open_clip model and its tokenizer.

    The reconstructions are pulled to their captions, and to their originals, in CLIP's space of unit vectors. The model
    is frozen in place. Raises `SettingError` unless it takes pictures of 224x224.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor]):
        if clip.visual.image_size not in (CLIP_SIDE, (CLIP_SIDE, CLIP_SIDE)):
            raise SettingError(
                f"J shows CLIP pictures of {CLIP_SIDE}x{CLIP_SIDE}, but this CLIP takes {clip.visual.image_size}. Choose "
                "another text_encoder, such as 'ViT-B-32-quickgelu/openai', or k_J=0."
            )
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    def __call__(self, x_hat: Tensor, x: Tensor, captions: Sequence[str]) -> Tensor:
        """J of a batch (B, 3, H, W), B captions: a scalar, differentiable in x_hat only."""
        with torch.no_grad():
            original = self.embed(x)
        return self.of_embeddings(self.embed(x_hat), original, self.embed_text(captions))

    @staticmethod
    def of_embeddings(image: Tensor, original: Tensor, text: Tensor) -> Tensor:
        """J from the unit vectors (B, d) of reconstructions, originals and captions, those of a whole batch."""
        logits = LOGIT_SCALE * text @ image.T
        partner = torch.arange(len(image), device=image.device)
        agreement = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2
        return agreement + IMAGE_WEIGHT * torch.linalg.matrix_norm(image - original)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) as unit vectors (B, d)."""
        return F.normalize(self.clip.encode_image(clip_input(x)).float(), dim=-1)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str], hidden: Tensor | None = None) -> Tensor:
        """Captions as unit vectors (B, d).

        `hidden` are the states (B, T, width) that this CLIP's own text tower has already given for them. Where it has cut
        none of them, each caption's vector follows from the state of its last token, and the tower is not run again.
        """
        ids = self.tokenizer(list(captions))
        ends = ids.argmax(-1)  # the end of a text has the largest id
        projection = getattr(self.clip, "text_projection", None)
        if hidden is not None and isinstance(projection, Tensor) and ends.max() < hidden.shape[1]:
            ends = ends.to(hidden.device)
            text = hidden[torch.arange(len(ends), device=ends.device), ends] @ projection
        else:
            text = self.clip.encode_text(ids.to(self.clip.logit_scale.device))
        return F.normalize(text.float(), dim=-1)


def clip_input(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as CLIP sees them: short side 224, centre crop, CLIP's mean and deviation."""
    size = [CLIP_SIDE * side // min(x.shape[2:]) for side in x.shape[2:]]
    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((side - CLIP_SIDE) / 2) for side in size)
    return standardized(x[:, :, top : top + CLIP_SIDE, left : left + CLIP_SIDE])
