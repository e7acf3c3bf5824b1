"""The convolutional bricks of ELIC (He et al., CVPR 2022, arXiv:2203.10886), with the reference's parameter names.

CompressAI's `AttentionBlock` (Cheng et al., CVPR 2020, arXiv:2001.01568) is used as it is.
"""

from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel_size: int = 5, stride: int = 2) -> nn.Conv2d:
    """Return a convolution that divides height and width by `stride` exactly."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)


def deconv(in_channels: int, out_channels: int, kernel_size: int = 5, stride: int = 2) -> nn.ConvTranspose2d:
    """Return a transposed convolution that multiplies height and width by `stride` exactly."""
    return nn.ConvTranspose2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, output_padding=stride - 1
    )


class ResidualBottleneck(nn.Module):
    """ELIC's residual block: x + branch(x), (B, N, H, W) -> (B, N, H, W) (ELIC, Fig. 2).

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


def relu_stack(*layers: nn.Module) -> nn.Sequential:
    """Return the layers in order with a ReLU between each two, so that layer i has the key 2i in a state dict."""
    stack: list[nn.Module] = []
    for layer in layers:
        stack += [layer, relu()]
    return nn.Sequential(*stack[:-1])
