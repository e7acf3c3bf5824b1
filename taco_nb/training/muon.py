"""The optimizer Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), for all kernels of one shape at once.

PyTorch's Muon takes matrices only, and timm's works in bfloat16, one kernel after the other. For small networks, on
processors that have no bfloat16, that took three times as long as the rest of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's polynomial: in five iterations it brings any singular value between 0.003 and 1 near enough to 1."""
BETAS = (0.9, 0.95)
"""Adam's, for the weights that Muon does not move."""
LEAST = 4
"""A kernel with fewer rows or columns is no matrix worth the name, and is moved by Adam."""


class Muon(torch.optim.Optimizer):
    """Moves each kernel by the orthogonal matrix nearest to its gradient's running mean, and all other weights by Adam.

    A kernel is flattened to a matrix with a row per channel. Steps have the root mean square of Adam's (Liu et al. 2025,
    arXiv:2502.16982), so a learning rate that suits Adam suits both. `others` go to Adam whatever their shape.
    """

    def __init__(self, weights: Iterable[Tensor], others: Iterable[Tensor], lr: float):
        weights = list(weights)
        matrices = [w for w in weights if w.ndim > 1 and min(len(w), w[0].numel()) >= LEAST]
        taken = set(map(id, matrices))
        rest = [w for w in weights if id(w) not in taken]
        groups = [{"params": matrices, "matrices": True}, {"params": [*rest, *others], "matrices": False}]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (self._step_matrices if group["matrices"] else self._step_others)(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple, list[Tensor]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                shapes[len(weight), weight[0].numel()].append(weight)
        for (rows, columns), weights in shapes.items():
            for weight in weights:
                self.state[weight].setdefault("mean", torch.zeros_like(weight))
            gradients = [weight.grad for weight in weights]
            means = [self.state[weight]["mean"] for weight in weights]
            torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, means, MOMENTUM)  # Nesterov's momentum
            moves = orthogonalized(torch.stack([step.reshape(rows, columns) for step in ahead]))
            scale = 0.2 * max(rows, columns) ** 0.5
            moves = [move.reshape(weight.shape) for move, weight in zip(moves, weights)]
            torch._foreach_add_(weights, moves, alpha=-group["lr"] * scale)

    def _step_others(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] |= {"step": torch.zeros(()), "first": torch.zeros_like(weight)}
                self.state[weight]["second"] = torch.zeros_like(weight)
        states = [self.state[weight] for weight in weights]
        first, second, steps = ([state[name] for state in states] for name in ("first", "second", "step"))
        adam(
            weights, [weight.grad for weight in weights], first, second, [], steps, foreach=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=group["lr"], weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip


def orthogonalized(stack: Tensor) -> Tensor:
    """Return nearly the orthogonal matrix nearest to each of n matrices (n, rows, columns), by Newton-Schulz iterations.

    Singular values become about 1, in float32 on a CPU and in bfloat16 on a GPU, where that is many times faster.
    """
    x = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if stack.shape[1] > stack.shape[2] else x).to(stack.dtype)
