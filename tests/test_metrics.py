"""Metrics against independent computations, published curves, and properties that any right implementation has."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_python
from PIL import Image
from scipy.integrate import quad
from scipy.interpolate import CubicHermiteSpline

from taco_nb.data import CaptionedFolder
from taco_nb.errors import MissingWeightsError, SettingError
from taco_nb.evaluation import evaluate_peers, means
from taco_nb.metrics.distortion import PSNR_LIMIT, distortion, ms_ssim, psnr
from taco_nb.metrics.perception import Lpips
from taco_nb.metrics.rate import BD_POINTS, bd_quality, bd_rate, bpp, few_points, rate_at
from taco_nb.pretrained import ALEXNET

CODECS = json.loads(
    (Path(__file__).resolve().parents[1] / "data/reference/kodak_published_rd.json").read_text(
        encoding="utf-8"
    )
)["codecs"]
METHODS = ["pchip", "cubic"]


def curve(name: str) -> tuple[list[float], list[float]]:
    return CODECS[name]["bpp"], CODECS[name]["psnr"]


# ---------------------------------------------------------------- rate


def monotone_cubic(x, y):
    """Fritsch and Butland's monotone piecewise cubic, its slopes written out from the definition."""
    h, d = np.diff(x), np.diff(y) / np.diff(x)

    def end(h0, h1, d0, d1):
        slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
        if slope * d0 <= 0:
            return 0.0
        return 3 * d0 if d0 * d1 <= 0 and abs(slope) > 3 * abs(d0) else slope

    slopes = [end(h[0], h[1], d[0], d[1])]
    for k in range(1, len(d)):
        w0, w1 = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
        slopes.append(0.0 if d[k - 1] * d[k] <= 0 else (w0 + w1) / (w0 / d[k - 1] + w1 / d[k]))
    slopes.append(end(h[-1], h[-2], d[-1], d[-2]))
    return CubicHermiteSpline(x, y, slopes)


def least_squares_cubic(x, y):
    centre = np.mean(x)
    coefficients, *_ = np.linalg.lstsq(np.vander(np.asarray(x) - centre, 4), np.asarray(y), rcond=None)
    return lambda at: np.polyval(coefficients, at - centre)


def mean_gap(anchor, other, method):
    """The Bjøntegaard integral by adaptive quadrature of the difference of two curves, each (x, y) by ascending x."""
    draw = {"pchip": monotone_cubic, "cubic": least_squares_cubic}[method]
    f, g = draw(*anchor), draw(*other)
    low, high = max(anchor[0][0], other[0][0]), min(anchor[0][-1], other[0][-1])
    knots = [x for x in (*anchor[0], *other[0]) if low < x < high]
    return quad(lambda x: g(x) - f(x), low, high, points=knots, limit=500)[0] / (high - low)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anchor", ["VTM", "JPEG", "BPG 4:4:4", "WebP", "AV1", "cheng2020-attn (CompressAI)"])
def test_bd_agrees_with_quadrature(anchor, method):
    (rate, quality), (elic_rate, elic_quality) = curve(anchor), curve("ELIC (paper)")
    logs, elic_logs = np.log(rate), np.log(elic_rate)
    expected = 100 * math.expm1(mean_gap((quality, logs), (elic_quality, elic_logs), method))
    assert bd_rate(rate, quality, elic_rate, elic_quality, method) == pytest.approx(expected, rel=1e-6)
    expected = mean_gap((logs, quality), (elic_logs, elic_quality), method)
    assert bd_quality(rate, quality, elic_rate, elic_quality, method) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anchor", ["VTM", "JPEG", "AV1"])
def test_bd_agrees_with_the_bjontegaard_package(anchor, method):
    import bjontegaard

    curves, options = (
        (*curve(anchor), *curve("ELIC (paper)")),
        {"require_matching_points": False, "min_overlap": 0},
    )
    assert bd_rate(*curves, method) == pytest.approx(
        bjontegaard.bd_rate(*curves, method, **options), rel=1e-6
    )
    assert bd_quality(*curves, method) == pytest.approx(
        bjontegaard.bd_psnr(*curves, method, **options), rel=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "anchor, low, high",
    [("VTM", -8, -5), ("BPG 4:4:4", -30, -20), ("JPEG", -70, -63), ("mbt2018-mean (paper)", -30, -15)],
)
def test_elic_saves_what_its_paper_says(anchor, low, high, method):
    assert low < bd_rate(*curve(anchor), *curve("ELIC (paper)"), method) < high
    assert bd_quality(*curve(anchor), *curve("ELIC (paper)"), method) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CODECS)
def test_bd_properties(name, method):
    rate, quality = (np.array(values) for values in curve(name))
    assert bd_rate(rate, quality, rate, quality, method) == pytest.approx(0, abs=1e-9)
    assert bd_rate(rate, quality, rate / 2, quality, method) == pytest.approx(-50)
    assert bd_quality(rate, quality, rate, quality + 1.5, method) == pytest.approx(1.5)
    shuffled = np.random.default_rng(1).permutation(len(rate))
    vtm = curve("VTM")
    assert bd_rate(*vtm, rate[shuffled], quality[shuffled], method) == bd_rate(*vtm, rate, quality, method)
    there, back = bd_rate(*vtm, rate, quality, method), bd_rate(rate, quality, *vtm, method)
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)
    assert bd_quality(*vtm, rate, quality, method) == pytest.approx(
        -bd_quality(rate, quality, *vtm, method), abs=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_bd_rate_takes_a_distance_for_quality(method):
    rate, lpips = np.array([0.1, 0.2, 0.4, 0.8]), np.array([0.3, 0.2, 0.12, 0.05])
    assert bd_rate(rate, lpips, rate * 0.8, lpips, method) == pytest.approx(-20)


def test_two_points_are_joined_by_a_line():
    assert bd_rate([1, 10], [30, 40], [0.5, 20], [30, 40]) == pytest.approx(0, abs=1e-9)
    assert bd_quality([1, 100], [30, 40], [1, 100], [30, 42]) == pytest.approx(1)


GOOD = ([0.1, 0.2, 0.4, 0.8], [28.0, 30.0, 32.0, 34.0])


@pytest.mark.parametrize(
    "rate, quality, method, message",
    [
        ([0.1], [28], "pchip", "1 points.*at least 2"),
        ([0.1, 0.2, 0.3], [28, 30, 31], "cubic", "3 points.*at least 4"),
        ([0.1, 0.2], [28, 30, 31], "pchip", "one quality for each rate"),
        ([0.0, 0.2], [28, 30], "pchip", "rates above 0"),
        ([-0.1, 0.2], [28, 30], "pchip", "rates above 0"),
        ([0.1, math.inf], [28, 30], "pchip", "finite"),
        ([0.1, 0.2], [28, math.nan], "pchip", "finite"),
        ([0.1, 0.1], [28, 30], "pchip", "same rate"),
        (*GOOD, "akima", "no method 'akima'"),
    ],
)
def test_bd_refuses_bad_curves(rate, quality, method, message):
    for measure in (bd_rate, bd_quality):
        with pytest.raises(SettingError, match=message):
            measure(rate, quality, *GOOD, method=method)
        with pytest.raises(SettingError, match=message):
            measure(*GOOD, rate, quality, method=method)


def test_bd_refuses_disjoint_curves_and_names_both_ranges():
    rate, quality = GOOD
    with pytest.raises(
        SettingError, match="quality: .* runs from 28 to 34, the compared one.s from 50 to 56"
    ):
        bd_rate(*GOOD, rate, [q + 22 for q in quality])
    with pytest.raises(SettingError, match="rate: .* runs from 0.1 to 0.8, the compared one's from 10 to 80"):
        bd_quality(*GOOD, [100 * r for r in rate], quality)


def test_a_dip_matters_to_bd_rate_only():
    dip = ([0.1, 0.2, 0.4, 0.8], [28.0, 31.0, 30.5, 34.0])
    with pytest.raises(SettingError, match="compared curve turns or stands still after rate 0.2"):
        bd_rate(*GOOD, *dip)
    with pytest.raises(SettingError, match="anchor curve turns or stands still after rate 0.1"):
        bd_rate([0.1, 0.2, 0.4], [30, 30, 31], *GOOD)
    assert math.isfinite(bd_quality(*GOOD, *dip))


def test_bd_rate_refuses_two_measures():
    with pytest.raises(SettingError, match="same measure"):
        bd_rate(*GOOD, GOOD[0], GOOD[1][::-1])


def test_few_points_are_counted_on_the_shorter_curve():
    assert few_points(9, 3) == few_points(3) == "only 3 points" and few_points(1, 9) == "only 1 point"
    assert few_points(BD_POINTS) == few_points(9, BD_POINTS) == ""


def test_bpp():
    assert bpp(768 * 512 // 8, 768, 512) == 1.0
    assert bpp(0, 1, 1) == 0
    for bad in [(-1, 8, 8), (10, 0, 8), (10, 8, -8)]:
        with pytest.raises(SettingError, match="bytes"):
            bpp(*bad)


def test_a_rate_is_read_off_at_a_quality():
    rates, decibels = curve("JPEG")
    for rate, quality in zip(rates, decibels):
        assert rate_at(rates[::-1], decibels[::-1], quality) == pytest.approx(rate)
    between = rate_at(rates, decibels, (decibels[3] + decibels[4]) / 2)
    assert rates[3] < between < rates[4]
    # where two curves differ by a factor everywhere, so do the rates that are read off
    assert rate_at([2 * rate for rate in rates], decibels, 30.0) == pytest.approx(
        2 * rate_at(rates, decibels, 30.0)
    )
    assert rate_at(rates, [-quality for quality in decibels], -30.0) == pytest.approx(
        rate_at(rates, decibels, 30.0)
    )


@pytest.mark.parametrize("wanted", [10.0, 60.0, math.nan])
def test_a_quality_beyond_the_curve_has_no_rate(wanted):
    with pytest.raises(SettingError, match="is not on it"):
        rate_at(*curve("JPEG"), wanted)


# ---------------------------------------------------------------- distortion


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture (3,H,W) whose values are whole 255ths."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(height // 8, 2), max(width // 8, 2), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    return (smooth * 255).round() / 255


def noisy(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


def test_psnr_by_hand():
    x = torch.full((3, 20, 30), 0.25)
    assert psnr(x, x + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(x, x) == math.inf
    y = noisy(x, 0.05)
    mse = np.mean((x.double().numpy() - y.double().numpy()) ** 2)
    assert psnr(x, y) == pytest.approx(10 * math.log10(1 / mse), abs=1e-4)


def test_a_batch_gives_the_mean_over_its_pictures():
    x = torch.stack([picture(180, 200, seed) for seed in range(2)])
    x_hat = torch.stack([noisy(x[0], 0.02), noisy(x[1], 0.2)])
    for measure in (psnr, ms_ssim):
        assert measure(x, x_hat) == pytest.approx(
            (measure(x[0], x_hat[0]) + measure(x[1], x_hat[1])) / 2, abs=1e-4
        )


@pytest.mark.parametrize("measure", [psnr, ms_ssim])
def test_more_noise_is_worse(measure):
    x = picture(176, 192)
    values = [measure(x, noisy(x, sigma)) for sigma in (0.01, 0.05, 0.2)]
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("protocol, limit", [("8bit", PSNR_LIMIT), ("taco", math.inf)])
def test_identical_pictures(protocol, limit):
    x = picture(176, 192)
    assert distortion(x, x.clone(), protocol) == {"psnr": limit, "ms_ssim": pytest.approx(1)}


def test_the_limit_of_psnr_holds_for_each_picture_of_a_batch():
    x = picture(64, 64)
    one_level = x.clone()
    one_level[0, 0, 0] += 1 / 255 if one_level[0, 0, 0] < 0.5 else -1 / 255
    assert psnr(x, one_level) > PSNR_LIMIT == distortion(x, one_level)["psnr"]
    coarse = (x + 0.1).clamp(0, 1)
    both = torch.stack([x, coarse])
    expected = (PSNR_LIMIT + distortion(x, coarse)["psnr"]) / 2
    assert distortion(torch.stack([x, x]), both)["psnr"] == pytest.approx(expected)


def test_a_flat_picture_leaves_means_and_curves_finite(tmp_path):
    """JPEG and others reproduce a white page exactly."""
    Image.new("RGB", (200, 200), "white").save(tmp_path / "white.png")
    Image.effect_noise((200, 200), 40).convert("RGB").save(tmp_path / "noise.png")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"white.png": "paper", "noise.png": "noise"}))
    rows = evaluate_peers([CaptionedFolder(tmp_path, captions)], [20, 80])
    assert (rows.loc[rows["name"].str.startswith("white"), "psnr"] == PSNR_LIMIT).any()
    assert np.isfinite(means(rows)["psnr"]).all()


def test_8bit_measures_what_a_viewer_gets():
    x = picture(176, 192)
    x_hat = noisy(x, 0.3)  # far beyond [0,1] in places
    shown = torch.from_numpy(np.clip(np.rint(x_hat.numpy() * 255), 0, 255).astype(np.uint8)).float() / 255
    measured = distortion(x, x_hat, "8bit")
    assert measured == distortion(x, x_hat)
    assert measured == {"psnr": pytest.approx(psnr(x, shown)), "ms_ssim": pytest.approx(ms_ssim(x, shown))}
    assert distortion(x, x + 0.4 / 255)["psnr"] == PSNR_LIMIT  # an error that rounding removes


def test_taco_measures_the_floats():
    x = picture(176, 192)
    x_hat = noisy(x, 0.3)
    measured = distortion(x, x_hat, "taco")
    assert measured["psnr"] == pytest.approx(-10 * math.log10(((x - x_hat) ** 2).mean().item()), abs=1e-5)
    assert (
        measured["psnr"] < distortion(x, x_hat, "8bit")["psnr"] - 0.1
    )  # what overshoots costs here, and only here
    assert measured["ms_ssim"] == ms_ssim(x, x_hat)


@pytest.mark.parametrize("height, width", [(1, 1), (160, 400), (400, 160)])
def test_too_small_for_five_scales(height, width):
    x = picture(height, width)
    x_hat = noisy(x, 0.05)
    assert math.isnan(ms_ssim(x, x_hat)) and math.isnan(distortion(x, x_hat)["ms_ssim"])
    assert math.isfinite(distortion(x, x_hat)["psnr"])
    taco = distortion(x, x_hat, "taco")
    assert 0 <= taco["ms_ssim"] < 1
    assert taco["psnr"] == psnr(x, x_hat)  # only MS-SSIM sees the enlarged picture


def test_taco_enlarges_the_short_side_to_256():
    from torchvision.transforms import Resize

    x = picture(100, 150)
    x_hat = noisy(x, 0.05)
    large, large_hat = Resize(256)(x), Resize(256)(x_hat)
    assert large.shape == (3, 256, 384)
    assert distortion(x, x_hat, "taco")["ms_ssim"] == pytest.approx(ms_ssim(large, large_hat))


def test_161_pixels_are_enough():
    x = picture(161, 161)
    assert 0 < ms_ssim(x, noisy(x, 0.05)) < 1


@pytest.mark.parametrize(
    "x, x_hat",
    [
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)),
        (torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)),
        (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)),
        (torch.zeros(8, 8), torch.zeros(8, 8)),
        (torch.zeros(3, 0, 8), torch.zeros(3, 0, 8)),
    ],
)
@pytest.mark.parametrize("measure", [psnr, ms_ssim, distortion])
def test_shapes_must_match(measure, x, x_hat):
    with pytest.raises(SettingError, match="one shape"):
        measure(x, x_hat)


def test_bytes_and_unknown_protocols_are_refused():
    x = picture(8, 8)
    with pytest.raises(SettingError, match="divide by 255"):
        psnr((x * 255).to(torch.uint8), x)
    with pytest.raises(SettingError, match='protocol \'16bit\'.*"8bit" or "taco"'):
        distortion(x, x, "16bit")


# ---------------------------------------------------------------- perception


@pytest.fixture(scope="module")
def network():
    """LPIPS with the library's calibration over a backbone of fixed random weights."""
    import lpips

    with torch.random.fork_rng(devices=[]), pytest.warns(UserWarning):
        torch.manual_seed(0)
        return lpips.LPIPS(pnet_rand=True, verbose=False, eval_mode=False)


def test_lpips_keeps_two_conventions_apart(network):
    x, x_hat = picture(64, 80), noisy(picture(64, 80), 0.1)
    measured = Lpips(model=network)(x, x_hat)
    assert measured.keys() == {"lpips", "lpips_01"}
    with torch.no_grad():
        assert measured["lpips"] == pytest.approx(network(2 * x[None] - 1, 2 * x_hat[None] - 1).item())
        assert measured["lpips_01"] == pytest.approx(network(x[None], x_hat[None]).item())
    assert measured["lpips"] != pytest.approx(measured["lpips_01"], rel=0.01)


def test_lpips_is_zero_symmetric_and_grows(network):
    lpips, x = Lpips(model=network), picture(64, 80)
    assert lpips(x, x.clone()) == {"lpips": 0, "lpips_01": 0}
    near, far = noisy(x, 0.02), noisy(x, 0.2)
    assert lpips(x, near) == pytest.approx(lpips(near, x))
    assert all(0 < lpips(x, near)[key] < lpips(x, far)[key] for key in ("lpips", "lpips_01"))


def test_lpips_gradient_reaches_x_hat_only(network):
    lpips = Lpips(model=network)
    x = torch.stack([picture(64, 64, seed) for seed in range(3)])
    x_hat = noisy(x, 0.1).requires_grad_()
    distance = lpips.distance(x_hat, x)
    assert distance.shape == (3,)
    alone = [lpips(*pair)["lpips_01"] for pair in zip(x, x_hat)]
    assert distance.tolist() == pytest.approx(alone, rel=1e-4)
    distance.mean().backward()
    assert x_hat.grad.abs().sum() > 0 and x.grad is None
    assert not lpips.model.training
    assert all(not weight.requires_grad and weight.grad is None for weight in lpips.model.parameters())


def test_lpips_of_tiny_pictures_is_nan(network):
    lpips, x = Lpips(model=network), picture(30, 200)
    assert all(math.isnan(value) for value in lpips(x, x).values())
    assert lpips(picture(31, 31), picture(31, 31)) == {"lpips": 0, "lpips_01": 0}
    with pytest.raises(SettingError, match="at least 31"):
        lpips.distance(x[None], x[None])


def test_lpips_refuses_bad_arguments(network):
    lpips, x = Lpips(model=network), picture(64, 64)
    with pytest.raises(SettingError, match="one shape"):
        lpips(x, picture(64, 65))
    with pytest.raises(SettingError, match="distance"):
        lpips(x[None], x[None])
    with pytest.raises(SettingError, match='"01" or "pm1"'):
        lpips.distance(x[None], x[None], convention="255")


def test_missing_backbone_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    """In a process of its own, whose only way out is a port where nobody listens."""
    dead = "http://127.0.0.1:9"
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"TORCH_HOME": str(tmp_path), "https_proxy": dead, "http_proxy": dead}
    program = """
from taco_nb.errors import MissingWeightsError
from taco_nb.metrics.perception import Lpips
try:
    Lpips()
except MissingWeightsError as error:
    print("REFUSED", error)
"""
    done = run_python(program, env=environment)
    message = done.stdout.split("REFUSED ")[1]
    file = str(tmp_path / "hub" / "checkpoints" / ALEXNET.file.name)
    for part in (file, "244,408,911 bytes", "run: taco-nb fetch alexnet"):
        assert part in message
    assert "Setting up" not in done.stdout and "deprecated" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_backbone_in_the_cache_is_loaded_without_a_word(tmp_path, monkeypatch, capfd, recwarn):
    """Random weights in the published file's layout and size, which torchvision takes for the real ones."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / ALEXNET.file.name
    file.parent.mkdir(parents=True)
    weights = torchvision.models.alexnet().state_dict()
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    os.truncate(file, ALEXNET.size)
    lpips = Lpips()
    file.unlink()
    assert torch.equal(lpips.model.net.slice5[0].bias, weights["features.10.bias"])
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_half_a_backbone_is_named_and_stays_until_a_whole_one_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    half = tmp_path / "hub" / "checkpoints" / ALEXNET.file.name
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x" * 1000)
    with pytest.raises(
        MissingWeightsError,
        match="244,408,911.*has 1,000 bytes and cannot be whole.*run: taco-nb fetch alexnet",
    ):
        Lpips()
    assert half.read_bytes() == b"x" * 1000
