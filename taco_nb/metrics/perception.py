"""Two distances say how far apart pictures look: LPIPS, as its library and as TACO feed it, and one without a download.

Both compare the features that a network trained on other tasks has at several depths. LPIPS weighs them by what people
said of pairs of pictures; `MiniDistance` weighs them all alike, so its values compare with each other and with nothing
else. It is not LPIPS and is never called so.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from taco_nb.errors import SettingError
from taco_nb.metrics.joint_space import standardized
from taco_nb.pretrained import ALEXNET

PROTOCOL = (
    "LPIPS 0.1, AlexNet; lpips: of the 8-bit picture, shown to the network in [-1, 1] as the library wants; lpips_01: of "
    "the decoder's floats, shown in [0, 1] as TACO published"
)
MINI_PROTOCOL = (
    "of the 8-bit picture: squared distance of unit features at the four depths of mini/flickr8k's image half, mean over "
    "positions, sum over depths"
)
MINI_MIN_SIDE = 32  # one position of its deepest features
MIN_SIDE = 31  # below this AlexNet's second pooling has nothing left to pool


class Lpips:
    """LPIPS is the distance of two pictures' features in a frozen AlexNet (Zhang et al., CVPR 2018).

    The library expects pixels in [-1,1]. TACO's training and evaluation hand it pixels in [0,1] as they are, so the
    values that the paper and the report print are another, smaller quantity. Both are kept, under different names:
    `lpips` follows the library (`convention="pm1"`), `lpips_01` follows TACO (`convention="01"`).

    `model` is an `lpips.LPIPS` to use in place of the pretrained one. Without it the backbone is torchvision's; raises
    `MissingWeightsError`, with the command that fetches it, if it is not on this machine.
    """

    name = "lpips"

    def __init__(self, device: str | torch.device = "cpu", model: nn.Module | None = None):
        self.device = torch.device(device)
        self.model = (_pretrained_lpips() if model is None else model).to(self.device)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor, x_hat: Tensor) -> dict[str, float]:
        """Return `{"lpips": …, "lpips_01": …}` of two float pictures (3,H,W) in [0,1]; 0 is identical, higher is farther.

        Both are NaN for a picture with a side under 31 pixels, of which AlexNet's poolings leave nothing.
        Raises `SettingError` for other or unequal shapes.
        """
        if x.ndim != 3:
            raise SettingError(f"LPIPS takes one picture (3,H,W), not {tuple(x.shape)}: see `distance`.")
        x, x_hat = x[None].to(self.device), x_hat[None].to(self.device)
        if x.shape == x_hat.shape and min(x.shape[-2:]) < MIN_SIDE:
            return {"lpips": math.nan, "lpips_01": math.nan}
        return {
            "lpips": self.distance(x_hat, x, convention="pm1").item(),
            "lpips_01": self.distance(x_hat, x, convention="01").item(),
        }

    def distance(self, x_hat: Tensor, x: Tensor, convention: str = "01") -> Tensor:
        """Return LPIPS per picture, (B,), of float batches (B,3,H,W) in [0,1]. It is differentiable, to be a loss.

        `convention` is "01" (TACO's, the default, as its loss uses it) or "pm1" (the library's); see the class. Both
        tensors are on `self.device`. Raises `SettingError` for another convention, unequal shapes, or sides under 31.
        """
        if convention not in ("01", "pm1"):
            raise SettingError(f'There is no LPIPS convention {convention!r}; choose "01" or "pm1".')
        if x.shape != x_hat.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < MIN_SIDE:
            raise SettingError(
                f"LPIPS needs two batches of one shape (B,3,H,W) with sides of at least {MIN_SIDE} pixels, "
                f"not {tuple(x.shape)} and {tuple(x_hat.shape)}."
            )
        # `normalize` is the library's word for moving [0,1] to the [-1,1] that it wants.
        return self.model(x_hat, x, normalize=convention == "pm1").flatten()


class MiniDistance:
    """This is the distance of two pictures' features in the image half of the bundled CLIP, frozen.

    At each of its four depths (1/4 to 1/32 of the side) features are scaled to unit length at every position, as LPIPS
    does. Their squared differences are summed over channels, averaged over positions, and summed over depths, all with
    weights of one: 0 is identical, 8 is the most.

    `clip` is an open_clip model whose image half is one of timm's networks of convolutions.
    """

    name = "mini_distance"

    def __init__(self, clip: nn.Module, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.model = clip.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor, x_hat: Tensor) -> dict[str, float]:
        """Return `{"mini_distance": …}` of two float pictures (3,H,W) in [0,1]; NaN if a side is under 32 pixels."""
        small = min(x.shape[-2:]) < MINI_MIN_SIDE and x.shape == x_hat.shape
        pair = (x_hat[None].to(self.device), x[None].to(self.device))
        return {self.name: math.nan if small else self.distance(*pair).item()}

    def distance(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return the distance per picture, (B,), of float batches (B,3,H,W) in [0,1]. It is differentiable, to be a loss.

        Raises `SettingError` for unequal shapes or sides under 32 pixels.
        """
        if x.shape != x_hat.shape or x.ndim != 4 or min(x.shape[-2:]) < MINI_MIN_SIDE:
            raise SettingError(
                f"The distance needs two batches of one shape (B,3,H,W) with sides of at least {MINI_MIN_SIDE} pixels, not "
                f"{tuple(x.shape)} and {tuple(x_hat.shape)}."
            )
        features = self.model.visual.trunk.forward_intermediates
        # without the first depth, the stem
        depths = (features(standardized(y), intermediates_only=True)[1:] for y in (x_hat, x))
        return sum(
            (normalize(a.float(), dim=1) - normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
            for a, b in zip(*depths)
        )


def _pretrained_lpips() -> nn.Module:
    """Return the calibrated `lpips.LPIPS(net="alex")`, whose backbone torchvision finds in torch's cache."""
    import lpips

    ALEXNET.require()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips 0.1.4 calls torchvision by arguments that are deprecated
        return lpips.LPIPS(net="alex", verbose=False)
