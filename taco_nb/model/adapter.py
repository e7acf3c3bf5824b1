"""The caption reaches the encoder through TACO's text adapter (Lee et al., ICML 2024, arXiv:2403.02944, Section 3.1).

Following ViT-Adapter (Chen et al., ICLR 2023), an `Injector` lets image positions look at the text, and an `Extractor`
lets the text look at the image. Both live in g_a only: the decoder never needs the caption.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taco_nb.model.attention import CrossAttention, Grid, LengthProjection, LinformerAttention
from taco_nb.model.config import ModelConfig


def make_attentions(config: ModelConfig) -> tuple[CrossAttention, CrossAttention, CrossAttention]:
    """Return the adapter's three attentions in the order they run: over the text, over the image, over the new text."""
    text, image = (1, config.text_tokens), (config.image_grid, config.image_grid)
    if config.attention == "softmax":
        return tuple(CrossAttention(dim, config.heads) for dim in (config.N, config.text_dim, config.N))

    shared: dict[Grid, LengthProjection] = {}

    def linformer(dim: int, grid: Grid) -> LinformerAttention:
        project = LengthProjection(config.linformer_k, grid)
        if config.linformer_sharing == "layerwise":
            project = shared.setdefault(grid, project)
        other = LengthProjection(config.linformer_k, grid) if config.linformer_sharing == "none" else project
        return LinformerAttention(dim, config.heads, project, other)

    return linformer(config.N, text), linformer(config.text_dim, image), linformer(config.N, text)


def to_tokens(x: Tensor) -> Tensor:
    """Return an image (B, C, H, W) as a sequence (B, H*W, C); free of copies for a channels_last image."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class Injector(nn.Module):
    """Image positions attend to the text: q + gamma * attention(q, text), with q the *normalised* image.

    x (B, N, H, W) and text (B, T, text_dim) -> (B, N, H, W). mask (B, T) bool, True at the tokens to attend to, hides
    padding. `gamma` starts at zero, so a new Injector is the layer norm of its image, not the identity.
    """

    def __init__(self, N: int, text_dim: int, attention: CrossAttention):
        super().__init__()
        self.text_feature_dim_proj = nn.Linear(text_dim, N)
        nn.init.kaiming_normal_(self.text_feature_dim_proj.weight)
        self.image_norm = nn.LayerNorm(N)
        self.text_norm = nn.LayerNorm(N)
        self.cross_attn = attention
        self.gamma = nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        queries, keys_values = self.sequences(x, text)
        out = queries + self.gamma * self.cross_attn(queries, keys_values, (1, text.shape[1]), mask)
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def sequences(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention sees: image queries (B, H*W, N) and text keys (B, T, N)."""
        return self.image_norm(to_tokens(x)), self.text_norm(self.text_feature_dim_proj(text))


class Extractor(nn.Module):
    """The text attends to the image: q + attention(q, image), with q the normalised text.

    x (B, N, H, W) and text (B, T, text_dim) -> new text (B, T, text_dim), read by the next Injector. Its keys are image
    positions, so it needs no mask: padding in, padding out, each token by itself.
    """

    def __init__(self, N: int, text_dim: int, attention: CrossAttention):
        super().__init__()
        self.image_feature_dim_proj = nn.Linear(N, text_dim)
        nn.init.kaiming_normal_(self.image_feature_dim_proj.weight)
        self.image_norm = nn.LayerNorm(text_dim)
        self.text_norm = nn.LayerNorm(text_dim)
        self.cross_attn = attention

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        queries, keys_values = self.sequences(x, text)
        return queries + self.cross_attn(queries, keys_values, tuple(x.shape[2:]))

    def sequences(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention sees: text queries (B, T, text_dim) and image keys (B, H*W, text_dim)."""
        return self.text_norm(text), self.image_norm(self.image_feature_dim_proj(to_tokens(x)))
