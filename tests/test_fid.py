"""FID: torchmetrics' distance of torch-fidelity's features, on the patches of HiFiC, against independent computations."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import make_inception, save_inception

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.metrics.fid import CHUNK, Inception, frechet_distance, patches


def cloud(count: int, seed: int, features: int = 7) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(features, features))
    return torch.from_numpy(generator.normal(0.1 * seed, 1 + 0.2 * seed, (count, features)) @ mixing).float()


def pictures(count: int, side: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


# --- The distance -----------------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_the_formula():
    x, x_hat = cloud(60, 1), cloud(50, 2)
    mean, mean_hat = x.double().numpy().mean(0), x_hat.double().numpy().mean(0)
    S, S_hat = (np.cov(values.double().numpy(), rowvar=False) for values in (x, x_hat))
    expected = ((mean - mean_hat) ** 2).sum() + np.trace(S + S_hat - 2 * scipy.linalg.sqrtm(S @ S_hat).real)
    assert expected > 1
    assert frechet_distance([(x, x_hat)]) == pytest.approx(expected, rel=1e-9)


def test_with_one_feature_it_is_the_distance_of_means_and_deviations():
    x, x_hat = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[10.0], [14.0], [18.0]])
    assert frechet_distance([(x, x_hat)]) == pytest.approx((14 - 2) ** 2 + (4 - 2) ** 2)


@pytest.mark.parametrize("count", [40, 5], ids=["many", "fewer than features"])
def test_it_is_0_for_the_same_pictures_and_does_not_depend_on_order_or_parts(count):
    x, x_hat, mixed = cloud(count, 1), cloud(count, 2), torch.randperm(count)
    assert frechet_distance([(x, x[mixed])]) == pytest.approx(0, abs=1e-5)
    whole = frechet_distance([(x, x_hat)])
    assert frechet_distance(zip(x.split(3), x_hat[mixed].split(3))) == pytest.approx(whole, rel=1e-6)


def test_large_means_cost_no_digits():
    """Sums of squares in float32 would lose a spread of 1 around 10,000."""
    x, x_hat = cloud(200, 1), cloud(200, 2)
    assert frechet_distance([(x + 1e4, x_hat + 1e4)]) == pytest.approx(
        frechet_distance([(x, x_hat)]), rel=1e-2
    )


def test_fewer_than_two_pictures_have_no_fid():
    assert math.isnan(frechet_distance([]))
    assert math.isnan(frechet_distance([(cloud(1, 1), cloud(1, 2))]))
    assert math.isfinite(frechet_distance([(cloud(1, 1), cloud(1, 2))] * 2))


# --- The features -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def test_features_and_distance_are_those_of_torchmetrics_without_its_antialiasing(weights):
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, x_hat = pictures(4, 80, 0), pictures(4, 80, 1) // 2
    reference = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), antialias=False)
    network = Inception(weights)
    features = network(x)
    assert features.shape == (4, 2048) and features.dtype == torch.float32 and features.std() > 0
    assert torch.allclose(features, reference.inception(x), rtol=1e-5, atol=1e-6)
    reference.update(x, real=True)
    reference.update(x_hat, real=False)
    assert frechet_distance([(features, network(x_hat))]) == pytest.approx(
        reference.compute().item(), rel=1e-4
    )


def test_a_file_of_something_else_is_an_error(tmp_path):
    for content in (b"nothing", b""):
        (tmp_path / "inception.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"inception\.pth is not the Inception network"):
            Inception(tmp_path / "inception.pth")


def test_many_pictures_go_through_in_chunks():
    network, x = make_inception(), pictures(2 * CHUNK + 1, 16, 0)
    assert torch.allclose(network(x), torch.cat([network(one[None]) for one in x]), atol=1e-6)
    assert not any(weight.requires_grad for weight in network.model.parameters())


@pytest.mark.parametrize(
    "bad", [torch.rand(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 1, 8, 8).byte()]
)
def test_only_8_bit_batches_are_taken(bad):
    with pytest.raises(SettingError, match="uint8"):
        make_inception()(bad)


# --- Patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width", [(512, 768), (768, 512), (300, 1000), (255, 900), (256, 256), (640, 640)]
)
def test_patches_are_counted_as_in_the_paper(height, width):
    rows, columns = height // 256, width // 256
    expected = rows * columns + max(rows - 1, 0) * max(columns - 1, 0)
    assert patches(torch.zeros(3, height, width)).shape == (expected, 3, 256, 256)


def test_kodak_has_the_192_patches_of_the_paper():
    assert 24 * len(patches(torch.zeros(3, 512, 768))) == 192


def test_patches_lie_where_they_should():
    size, x = 4, torch.arange(3 * 9 * 14).reshape(3, 9, 14)
    expected = [x[:, r : r + size, c : c + size] for r in (0, 4) for c in (0, 4, 8)]
    expected += [x[:, 2:6, c : c + size] for c in (2, 6)]
    assert torch.equal(patches(x, size), torch.stack(expected))


@pytest.mark.parametrize("size", [0, 7, -2, 4.0, True, None])
def test_the_size_of_a_patch_must_be_even(size):
    with pytest.raises(SettingError, match="even number"):
        patches(torch.zeros(3, 16, 16), size)
