"""Peers as real files: what is measured is what Pillow decodes again, at the size that was asked for."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation.peers import available_peers, encode_peer, match_bpp, peer_curve

KODAK = Path(__file__).resolve().parents[2] / "shared" / "kodak"
PEERS = available_peers()


def photograph(width: int = 160, height: int = 96) -> Image.Image:
    """Smooth shapes with edges and a little grain, as no coder finds trivial."""
    y, x = np.mgrid[:height, :width] / 32
    disc = np.where((x - 2) ** 2 + (y - 1.5) ** 2 < 1, 1, -0.5)
    waves = np.stack([np.sin(x + y), np.cos(2 * x) * np.sin(y), disc], axis=-1)
    grain = np.random.default_rng(0).normal(0, 0.05, waves.shape)
    return Image.fromarray(np.uint8(np.clip(127 + 100 * (waves + grain), 0, 255)))


def psnr(a: Image.Image, b: Image.Image) -> float:
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


def test_the_three_usual_peers_are_here():
    assert PEERS[:3] == ["JPEG", "WebP", "AVIF"]


@pytest.mark.parametrize("peer", PEERS)
def test_a_result_is_a_real_file(peer):
    image = photograph()
    result = encode_peer(image, peer, 60)
    assert (result.format, result.quality, result.above_target) == (peer, 60, False)
    reopened = Image.open(io.BytesIO(result.data))
    assert np.array_equal(reopened.convert("RGB"), result.image)
    assert result.image.mode == "RGB" and result.image.size == image.size
    assert result.bpp == 8 * len(result.data) / (160 * 96)
    assert psnr(image, result.image) > 25
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.quality = 3


@pytest.mark.parametrize("peer", PEERS)
def test_rate_and_quality_rise_along_the_curve(peer):
    image = photograph()
    curve = peer_curve(image, peer, np.array([5, 30, 60, 90]))
    assert [result.quality for result in curve] == [5, 30, 60, 90]
    assert np.all(np.diff([result.bpp for result in curve]) > 0)
    assert np.all(np.diff([psnr(image, result.image) for result in curve]) > 0)


def test_jpeg_is_420():
    from PIL import JpegImagePlugin

    assert (
        JpegImagePlugin.get_sampling(Image.open(io.BytesIO(encode_peer(photograph(), "JPEG", 90).data))) == 2
    )


@pytest.mark.parametrize("peer", PEERS)
def test_metadata_costs_nothing_and_the_original_keeps_it(peer):
    bare, labelled = photograph(), photograph()
    exif = Image.Exif()
    exif[0x010E] = "a red barn" * 50
    labelled.info = {
        "icc_profile": b"p" * 3000,
        "comment": b"c" * 3000,
        "exif": exif.tobytes(),
        "xmp": b"x" * 3000,
    }
    assert encode_peer(labelled, peer, 50).data == encode_peer(bare, peer, 50).data
    assert len(labelled.info["icc_profile"]) == 3000


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("peer", PEERS)
def test_match_is_the_largest_file_that_fits(peer, share):
    image = photograph()
    sizes = [len(encode_peer(image, peer, quality).data) for quality in (1, 95)]
    target = round(sizes[0] + share * (sizes[1] - sizes[0]))
    result = match_bpp(image, peer, target)
    assert len(result.data) <= target and not result.above_target
    assert result.data == encode_peer(image, peer, result.quality).data
    assert len(encode_peer(image, peer, result.quality + 1).data) > target


@pytest.mark.parametrize("peer", PEERS)
def test_a_file_of_just_the_target_fits(peer):
    image = photograph()
    target = len(encode_peer(image, peer, 50).data)
    assert len(match_bpp(image, peer, target).data) == target


@pytest.mark.parametrize("peer", PEERS)
def test_match_at_both_ends(peer):
    image = photograph(64, 64)
    smallest = match_bpp(image, peer, 1)
    assert smallest.above_target and smallest.quality == (1 if peer == "JPEG" else 0)
    exact = match_bpp(image, peer, len(smallest.data))
    assert not exact.above_target and len(exact.data) <= len(smallest.data)
    best = match_bpp(image, peer, 10**9)
    assert not best.above_target and best.quality == (99 if peer == "JPEG XL" else 100)


@pytest.mark.parametrize("peer", PEERS)
def test_a_single_pixel(peer):
    assert encode_peer(Image.new("RGB", (1, 1), "red"), peer, 50).image.size == (1, 1)


@pytest.mark.parametrize(
    "peer, quality, message",
    [
        ("GIF", 50, r"'GIF' is not known; choose from \['JPEG'"),
        ("jpeg", 50, "'jpeg' is not known"),
        ("JPEG", 0, "from 1 to 100; 0 is out of range"),
        ("AVIF", 101, "from 0 to 100; 101 is out of range"),
        ("WebP", 50.5, "whole number, not 50.5"),
        ("WebP", "50", "whole number, not '50'"),
    ],
)
def test_bad_settings(peer, quality, message):
    with pytest.raises(SettingError, match=message):
        encode_peer(photograph(), peer, quality)


@pytest.mark.skipif("JPEG XL" in PEERS, reason="this Pillow has JPEG XL")
def test_an_absent_peer_is_told_from_an_unknown_one():
    with pytest.raises(SettingError, match="'JPEG XL' is not in this machine's Pillow"):
        match_bpp(photograph(), "JPEG XL", 1000)


@pytest.mark.parametrize("target", [0, -5])
def test_bad_target(target):
    with pytest.raises(SettingError, match="positive"):
        match_bpp(photograph(), "JPEG", target)


def test_bad_pictures():
    with pytest.raises(DataError, match=r"mode 'RGBA'.*convert\(\"RGB\"\)"):
        encode_peer(Image.new("RGBA", (8, 8)), "WebP", 50)
    with pytest.raises(DataError, match="WebP cannot hold a picture of 20000x1 pixels"):
        encode_peer(Image.new("RGB", (20000, 1)), "WebP", 50)
    with pytest.raises(DataError, match="JPEG cannot hold a picture of 0x0 pixels"):
        encode_peer(Image.new("RGB", (0, 0)), "JPEG", 50)


@pytest.mark.skipif(not KODAK.is_dir(), reason="the Kodak images are not in ../shared/kodak")
def test_newer_codecs_win_on_a_photograph():
    image = Image.open(KODAK / "kodim23.png").convert("RGB")
    target = image.width * image.height * 3 // 80  # 0.3 bpp
    matched = {peer: match_bpp(image, peer, target) for peer in ("JPEG", "WebP", "AVIF")}
    assert all(0.25 < result.bpp <= 0.3 for result in matched.values())
    quality = {peer: psnr(image, result.image) for peer, result in matched.items()}
    assert quality["JPEG"] + 1 < quality["WebP"] < quality["AVIF"]
