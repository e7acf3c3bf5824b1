"""FID says how far the features of decoded pictures, as a cloud, lie from the originals' (Heusel et al., NIPS 2017).

Both clouds are taken for Gaussians, with means mu and covariances S, whose Fréchet distance is

    |mu - mu_hat|^2 + tr(S + S_hat - 2 (S S_hat)^(1/2))

The features are the 2048 numbers before the last layer of the Inception network of 2015 with TensorFlow's weights, as
torch-fidelity carries it: of 8-bit pictures, resized to 299 x 299 by TensorFlow 1's bilinear rule, without antialiasing.
Published FIDs are computed so; torchmetrics antialiases by default, which gives another number. The distance is
torchmetrics', with its sums in float64.

With fewer pictures than features a covariance does not have full rank, and FID comes out too high. So figures compare only
at equal numbers of pictures. Sets of few large images are measured on `patches`, of which there are more; HiFiC found even
the 192 of Kodak too few to report.
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
PATCH_SIZE = 256
CHUNK = 64  # pictures that go through the network together
ROWS = 2048  # at least so many features are added to the sums together


class Inception:
    """The frozen Inception network turns 8-bit pictures into features.

    `source` is the file of weights that torch-fidelity publishes, or a module to use in the network's place, which takes
    uint8 batches (B,3,H,W) and gives (B, d) or a tuple that holds it. Raises `CheckpointError` for a damaged file.
    """

    def __init__(self, source: Path | nn.Module, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        model = source if isinstance(source, nn.Module) else _load_inception(source)
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return features (B, d), float32 on the CPU, of uint8 pictures (B,3,H,W) of one size.

        Raises `SettingError` for other tensors.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise SettingError(f"FID takes uint8 (B,3,H,W), not {pictures.dtype} {tuple(pictures.shape)}.")
        features = [self.model(chunk.to(self.device)) for chunk in pictures.split(CHUNK)]
        return torch.cat([(f[0] if isinstance(f, tuple) else f).float().cpu() for f in features])


def frechet_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the distance above, of the features (n, d) of originals and of decoded pictures, in parts of any length.

    It is 0 for identical clouds; the order and the cut into parts do not matter. NaN for fewer than two pictures.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for x, x_hat in _larger_parts(pairs):
        # One of several processes may compute it alone; torchmetrics would wait for the others to join in.
        metric = metric or FrechetInceptionDistance(feature=_GivenFeatures(x.shape[1]), sync_on_compute=False)
        metric.update(x.double(), real=True)
        metric.update(x_hat.double(), real=False)
    if metric is None or min(metric.real_features_num_samples, metric.fake_features_num_samples) < 2:
        return math.nan
    return metric.compute().item()


def _larger_parts(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Join parts into larger ones, since each costs an update of two matrices of 2048 x 2048."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        waiting.append(pair)
        if sum(len(x) for x, _ in waiting) >= ROWS:
            yield tuple(map(torch.cat, zip(*waiting)))
            waiting.clear()
    if waiting:
        yield tuple(map(torch.cat, zip(*waiting)))


class _GivenFeatures(nn.Module):
    """This stands where torchmetrics expects a network, since the features are computed, and kept, already."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _load_inception(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    except Exception as error:  # torch and pickle each have errors of their own for a bad file
        message = f"{path} is not the Inception network of torch-fidelity, or is damaged: {error}"
        raise CheckpointError(message) from error


def patches(x: Tensor, size: int = PATCH_SIZE) -> Tensor:
    """Cut a picture (3,H,W) into squares (n,3,size,size), as HiFiC does (Mentzer et al., NeurIPS 2020, A.7).

    The first floor(H/size) * floor(W/size) do not overlap and start in the upper left corner. With that corner moved by
    half a patch down and to the right, there are (floor(H/size) - 1) * (floor(W/size) - 1) more:

        +----+----+----+
        |    |    |    |      a picture of 3 x 2 patches has
        |  +----+----+ |      6 of the first grid
        +--| -+-|  +-|-+      and 2 of the second
        |  +----+----+ |
        |    |    |    |
        +----+----+----+

    What is left over on the right and below is in none. A picture smaller than a patch has none: n is 0.
    Raises `SettingError` unless `size` is even and at least 2.
    """
    check_patch_size(size)
    rows, columns = x.shape[-2] // size, x.shape[-1] // size
    shifted = x[:, size // 2 :, size // 2 :]
    return torch.cat([_grid(x, rows, columns, size), _grid(shifted, rows - 1, columns - 1, size)])


def check_patch_size(size: int) -> None:
    """Raise `SettingError` unless `size` is an even number of at least 2, which can be halved."""
    if type(size) is not int or size < 2 or size % 2:
        raise SettingError(f"The side of FID's patches must be an even number of pixels, but it is {size!r}.")


def _grid(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    if rows < 1 or columns < 1:
        return x.new_empty(0, len(x), size, size)
    cut = x[:, : rows * size, : columns * size].reshape(len(x), rows, size, columns, size)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, len(x), size, size)
