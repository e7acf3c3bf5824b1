"""ELIC's four transforms, g_a with TACO's text adapter inside; the index of a layer is its key in a state dict."""

from compressai.layers import AttentionBlock
from torch import Tensor, nn

from taco_nb.model.adapter import Extractor, Injector, attentions
from taco_nb.model.config import ModelConfig
from taco_nb.model.layers import ResidualBottleneck, conv, deconv, relu_stack


class AnalysisTransform(nn.Module):
    """g_a: image (B, 3, H, W) in [0, 1] and text (B, T, text_dim) -> y (B, M, H/16, W/16).

    The text enters at H/4 (layer 8), is refreshed from the image at H/8 (14), and enters again there (15). mask (B, T)
    bool, True at the tokens to attend to, hides padding both times.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        N, M, text_dim = config.N, config.M, config.text_dim
        over_text, over_image, over_text_again = attentions(config)
        self.analysis_transform = nn.ModuleList(
            [
                conv(3, N),
                *(ResidualBottleneck(N) for _ in range(3)),
                conv(N, N),
                *(ResidualBottleneck(N) for _ in range(3)),
                Injector(N, text_dim, over_text),
                AttentionBlock(N),
                conv(N, N),
                *(ResidualBottleneck(N) for _ in range(3)),
                Extractor(N, text_dim, over_image),
                Injector(N, text_dim, over_text_again),
                conv(N, M),
                AttentionBlock(M),
            ]
        )

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.analysis_transform:
            if isinstance(layer, Injector):
                x = layer(x, text, mask)
            elif isinstance(layer, Extractor):
                text = layer(x, text)
            else:
                x = layer(x)
        return x


class SynthesisTransform(nn.Module):
    """g_s: y_hat (B, M, H/16, W/16) -> x_hat (B, 3, H, W), unclamped; it has no text input at all."""

    def __init__(self, N: int, M: int):
        super().__init__()
        self.synthesis_transform = nn.Sequential(
            AttentionBlock(M),
            deconv(M, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            deconv(N, N),
            AttentionBlock(N),
            *(ResidualBottleneck(N) for _ in range(3)),
            deconv(N, N),
            *(ResidualBottleneck(N) for _ in range(3)),
            deconv(N, 3),
        )

    def forward(self, y_hat: Tensor) -> Tensor:
        return self.synthesis_transform(y_hat)


class HyperAnalysis(nn.Module):
    """h_a: y (B, M, h, w) -> z (B, N, h/4, w/4)."""

    def __init__(self, N: int, M: int):
        super().__init__()
        self.reduction = relu_stack(conv(M, N, 3, 1), conv(N, N), conv(N, N))

    def forward(self, y: Tensor) -> Tensor:
        return self.reduction(y)


class HyperSynthesis(nn.Module):
    """h_s: z_hat (B, N, h/4, w/4) -> hyper parameters (B, 2M, h, w)."""

    def __init__(self, N: int, M: int):
        super().__init__()
        self.increase = relu_stack(deconv(N, M), deconv(M, 3 * M // 2), deconv(3 * M // 2, 2 * M, 3, 1))

    def forward(self, z_hat: Tensor) -> Tensor:
        return self.increase(z_hat)
