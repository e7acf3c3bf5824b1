"""FID: how far the features of decoded pictures, as a cloud, lie from those of the originals (Heusel et al., NIPS 2017).

Both clouds are taken for Gaussians, with means mu and covariances S, whose Fréchet distance is

    |mu - mu_hat|^2 + tr(S + S_hat - 2 (S S_hat)^(1/2))

The features are the 2048 numbers before the last layer of the Inception network of 2015 with TensorFlow's weights, as
torch-fidelity carries it: 8-bit pictures, resized to 299 x 299 by TensorFlow 1's bilinear rule, without antialiasing.
Published FIDs are computed so; torchmetrics' own default antialiases, which is another number. The distance is
torchmetrics', its sums in float64.

Of fewer pictures than features a covariance is not of full rank, and FID comes out too high: figures are comparable only at
equal numbers of pictures. Sets of few large images are measured on `patches`, which are more; HiFiC found even the 192 of
Kodak too few to report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from taco_nb.errors import CheckpointError, SettingError

PROTOCOL = (
    "Frechet distance of torch-fidelity's Inception features (2048), 8-bit pictures, TensorFlow 1's bilinear resize to "
    "299 x 299, distance by torchmetrics in float64"
)
CHUNK = 64  # pictures that go through the network together
ROWS = 2048  # of features that are added to the sums together, or a few more


class Inception:
    """The network, frozen: 8-bit pictures in, features out.

    `source` is the file of weights that torch-fidelity publishes, or a module to use in the network's place, which takes
    uint8 batches (B,3,H,W) and gives (B, d) or a tuple that holds it. Raises `CheckpointError` for a damaged file.
    """

    def __init__(self, source: Path | nn.Module, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        model = source if isinstance(source, nn.Module) else _load(source)
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, d), float32 on the CPU, of uint8 pictures (B,3,H,W) of one size. Raises `SettingError` for others."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise SettingError(f"FID takes uint8 (B,3,H,W), not {pictures.dtype} {tuple(pictures.shape)}.")
        features = [self.model(chunk.to(self.device)) for chunk in pictures.split(CHUNK)]
        return torch.cat([(f[0] if isinstance(f, tuple) else f).float().cpu() for f in features])


def frechet_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The distance above, of features (n, d) of originals and of decoded pictures that come in parts of any length.

    0 for identical clouds; the order and the cut into parts do not matter. NaN where there are fewer than two pictures.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for x, x_hat in _gathered(pairs):
        # Of several processes one alone may compute it; torchmetrics would wait for the others to join in.
        metric = metric or FrechetInceptionDistance(feature=_Given(x.shape[1]), sync_on_compute=False)
        metric.update(x.double(), real=True)
        metric.update(x_hat.double(), real=False)
    if metric is None or min(metric.real_features_num_samples, metric.fake_features_num_samples) < 2:
        return math.nan
    return metric.compute().item()


def _gathered(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in larger parts: each costs an update of two matrices of 2048 x 2048."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        waiting.append(pair)
        if sum(len(x) for x, _ in waiting) >= ROWS:
            yield tuple(map(torch.cat, zip(*waiting)))
            waiting.clear()
    if waiting:
        yield tuple(map(torch.cat, zip(*waiting)))


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are computed, and kept, already."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _load(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except Exception as error:  # torch and pickle each have errors of their own for a bad file
        raise CheckpointError(
            f"{path} is not the Inception network of torch-fidelity, or is damaged: {error}"
        ) from error
