"""ELIC (He et al., CVPR 2022, arXiv:2203.10886) is built of these bricks, which have the reference's parameter names.

CompressAI's `conv`, `deconv` and `AttentionBlock` (Cheng et al., CVPR 2020, arXiv:2001.01568) are used as they are. The first
two divide and multiply height and width by their stride exactly. Unless told otherwise, it is 2 and kernels are 5x5.
"""

from collections import OrderedDict

from compressai.models.utils import conv
from torch import Tensor, nn


class ResidualBottleneck(nn.Module):
    """ELIC's residual block is x + branch(x), (B, N, H, W) -> (B, N, H, W) (ELIC, Fig. 2).

    The branch narrows to half the channels for its 3x3 convolution, which costs a quarter there.
    """

    def __init__(self, N: int):
        super().__init__()
        self.branch = nn.Sequential(
            conv(N, N // 2, 1, 1), relu(), conv(N // 2, N // 2, 3, 1), relu(), conv(N // 2, N, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).add_(x)


def relu() -> nn.ReLU:
    """Return a ReLU that works in place.

    A fresh tensor of a large image costs more time than the operation itself, since its pages come from the system.
    """
    return nn.ReLU(inplace=True)


def relu_stack(name: str, *layers: nn.Module) -> nn.Sequential:
    """Return the layers in order with a ReLU between each two; layer i has the key "{name}.{2i}" in a state dict."""
    stack: list[nn.Module] = []
    for layer in layers:
        stack += [layer, relu()]
    return nn.Sequential(OrderedDict({name: nn.Sequential(*stack[:-1])}))
