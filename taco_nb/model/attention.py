"""Multi-head cross-attention (Vaswani et al. 2017, arXiv:1706.03762), the operation that the ablations exchange."""

import torch.nn.functional as F
from torch import Tensor, empty, nn


class CrossAttention(nn.Module):
    """Softmax attention from one sequence to another, under `nn.MultiheadAttention`'s names and initialised like it.

    queries (B, n, dim) and keys_values (B, m, dim) -> (B, n, dim). Every key is attended to: TACO masks no padding.
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

    def forward(self, queries: Tensor, keys_values: Tensor) -> Tensor:
        dim = self.out_proj.in_features
        q = F.linear(queries, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        kv = F.linear(keys_values, self.in_proj_weight[dim:], self.in_proj_bias[dim:])
        q, k, v = (self._split_heads(t) for t in (q, *kv.chunk(2, dim=-1)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, keys_values: Tensor) -> Tensor:
        """The attention matrix itself, (B, heads, n, m), rows summing to one: what the notebooks draw."""
        dim = self.out_proj.in_features
        q = self._split_heads(F.linear(queries, self.in_proj_weight[:dim], self.in_proj_bias[:dim]))
        k = self._split_heads(
            F.linear(keys_values, self.in_proj_weight[dim : 2 * dim], self.in_proj_bias[dim : 2 * dim])
        )
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)

    def _split_heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
