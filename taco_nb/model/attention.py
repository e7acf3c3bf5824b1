"""The ablations exchange multi-head cross-attention: here are softmax attention and Linformer's linear form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn

Grid = tuple[int, int]
"""Height and width of the positions that keys and values come from; of T tokens, (1, T)."""


class CrossAttention(nn.Module):
    """This is softmax attention (Vaswani et al. 2017, arXiv:1706.03762), under `nn.MultiheadAttention`'s names.

    queries (B, n, dim) and keys_values (B, m, dim) -> (B, n, dim). mask (B, m) bool is True where a key may be attended
    to, at least once per row; without one every key is, padding included, as in TACO. `grid` says how the m positions
    lie, which matters to `LinformerAttention` alone.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, keys_values: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        attended = self._attend(*self._project(queries, keys_values), grid, mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, keys_values: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Return the attention matrix itself, (B, heads, n, m), rows summing to one: what the notebooks draw."""
        q, k, _ = self._project(queries, keys_values)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return (scores if mask is None else scores.masked_fill(~_over_heads(mask), float("-inf"))).softmax(-1)

    def _project(self, queries: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of every head, (B, heads, n or m, dim / heads)."""
        dim = self.out_proj.in_features
        q = F.linear(queries, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        kv = F.linear(keys_values, self.in_proj_weight[dim:], self.in_proj_bias[dim:])
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=-1)))
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_over_heads(mask))


class LengthProjection(nn.Module):
    """This is Linformer's E or F for any length: k learned maps over the positions of the grid that was trained on.

    `forward(grid)` gives them on another grid, (k, positions): interpolated, and rescaled so that each map keeps its
    sum. A constant sequence is therefore projected to the same k values at every size.
    """

    def __init__(self, k: int, grid: Grid):
        super().__init__()
        self.weight = nn.Parameter(empty(k, *grid))
        # which keeps the variance of independent positions
        nn.init.normal_(self.weight, std=(grid[0] * grid[1]) ** -0.5)

    def forward(self, grid: Grid) -> Tensor:
        trained = self.weight.flatten(1)
        if grid == tuple(self.weight.shape[1:]):
            return trained
        resized = F.interpolate(self.weight[None], grid, mode="bilinear", antialias=True, align_corners=False)
        resized = resized[0].flatten(1) * (trained.shape[1] / (grid[0] * grid[1]))
        # interpolation at the border does not keep sums exactly; what is missing is spread evenly
        return resized + (trained.sum(1, keepdim=True) - resized.sum(1, keepdim=True)) / resized.shape[1]


class LinformerAttention(CrossAttention):
    """Attention takes linear time (Wang et al. 2020, arXiv:2006.04768) if m keys and values are projected to k first.

    The cost of n queries falls from n * m to n * k + m * k. `project_v` may be the same module as `project_k`.
    """

    def __init__(self, dim: int, heads: int, project_k: LengthProjection, project_v: LengthProjection):
        super().__init__(dim, heads)
        self.project_k, self.project_v = project_k, project_v

    def weights(self, queries: Tensor, keys_values: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Return what each of the m values contributes to each query, (B, heads, n, m): softmax over k, times F.

        It is the counterpart of a softmax attention's matrix, of rank k at most; its rows need not sum to one or be positive.
        """
        q, k, _ = self._project(queries, keys_values)
        short = _maps(self.project_k, grid, mask) @ k
        over_k = (q @ short.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return over_k @ _maps(self.project_v, grid, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        k, v = _maps(self.project_k, grid, mask) @ k, _maps(self.project_v, grid, mask) @ v
        return F.scaled_dot_product_attention(q, k, v)


def _over_heads(mask: Tensor | None) -> Tensor | None:
    """Return a mask of keys (B, m), shaped to hold for every head and query of an attention matrix (B, heads, n, m)."""
    return mask if mask is None else mask[:, None, None, :]


def _maps(projection: LengthProjection, grid: Grid, mask: Tensor | None) -> Tensor:
    """Return the projection's k maps over a grid, (k, m); under a mask over each row's own tokens alone, (B, 1, k, m).

    A mask hides padding at the end of tokens, so a row of fewer is projected as if it stood alone.
    """
    if mask is None:
        return projection(grid)
    lengths = mask.sum(1).tolist()
    return torch.stack([F.pad(projection((1, n)), (0, mask.shape[1] - n)) for n in lengths])[:, None]
