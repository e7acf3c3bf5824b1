"""`to_rgb` takes what users have and refuses what is no picture; tensors and 8-bit images are the same thing."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taco_nb.data.images import short_side, to_image, to_rgb, to_tensor
from taco_nb.errors import DataError


def noise(height: int, width: int, *channels: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (height, width, *channels), dtype, endpoint=True
    )


def same(image: Image.Image, pixels: np.ndarray) -> bool:
    return image.mode == "RGB" and np.array_equal(
        np.asarray(image), np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    )


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return colour * weight + 255 * (1 - weight)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (16, 16), (33, 20)])
def test_tensor_round_trip_is_exact(height, width):
    image = Image.fromarray(noise(height, width, 3))
    x = to_tensor(image)
    assert x.shape == (3, height, width) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert to_image(x) == image == to_image(x[None]) == to_rgb(x) == to_rgb(x[None])


def test_every_8_bit_level_survives():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert same(to_image(to_tensor(to_rgb(ramp))), ramp[..., None])


def test_tensor_has_the_channels_of_the_image():
    red = to_tensor(Image.new("RGB", (2, 1), (255, 51, 0)))
    assert torch.equal(red[:, 0, 0], torch.tensor([1.0, 0.2, 0.0]))


def test_to_image_clamps_and_rounds_and_detaches():
    x = torch.tensor(
        [-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0], dtype=torch.float64, requires_grad=True
    )
    assert np.asarray(to_image(x.expand(3, 1, 6)))[0, :, 1].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_float_type(dtype):
    assert (
        np.asarray(to_rgb(torch.full((3, 2, 2), 0.5, dtype=dtype))).tolist()
        == np.full((2, 2, 3), 128).tolist()
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_look_as_pillow_shows_them(mode):
    image = Image.fromarray(noise(6, 7, 3)).convert(mode)
    assert to_rgb(image) == image.convert("RGB")


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_transparency_is_composited_over_white(mode):
    image = Image.fromarray(noise(6, 7, 3)).convert("L" if mode == "LA" else "RGB").convert(mode)
    alpha = noise(6, 7)
    image.putalpha(Image.fromarray(alpha))
    colour = np.asarray(image.convert("RGBA"))[..., :3]
    assert np.abs(np.asarray(to_rgb(image)) - over_white(colour, alpha)).max() <= 1


def test_transparency_of_palettes_and_of_a_single_colour(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0, 255]))
    Image.fromarray(np.array([[[10, 20, 30], [1, 2, 3], [200, 100, 50]]], np.uint8)).save(
        tmp_path / "colour.png", transparency=(1, 2, 3)
    )
    for name in ("palette.png", "colour.png"):
        assert np.asarray(to_rgb(tmp_path / name)).tolist() == [
            [[10, 20, 30], [255, 255, 255], [200, 100, 50]]
        ]
    Image.fromarray(np.array([[1000, 65535]], np.uint16)).save(tmp_path / "grey16.png", transparency=1000)
    assert np.asarray(to_rgb(tmp_path / "grey16.png")).tolist() == [[[255] * 3, [255] * 3]]


def test_arrays_of_every_shape():
    grey, colour, alpha = noise(5, 6), noise(5, 6, 3), noise(5, 6)
    assert same(to_rgb(grey), grey[..., None]) and same(to_rgb(grey[..., None]), grey[..., None])
    assert same(to_rgb(colour), colour) and same(to_rgb(colour[::-1, ::2]), colour[::-1, ::2])
    composited = to_rgb(np.dstack([colour, alpha]))
    assert np.abs(np.asarray(composited) - over_white(colour, alpha)).max() <= 1


@pytest.mark.parametrize("suffix", [(), (1,), (3,)])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_arrays_are_rounded(suffix, dtype):
    values = noise(9, 9, *suffix, dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    assert same(to_rgb(values.astype(dtype)), expected if expected.ndim == 3 else expected[..., None])


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_16_bit_modes_are_rounded(mode, tmp_path):
    values = noise(9, 9, dtype=np.uint16)
    image = Image.fromarray(values.astype(np.int32)).convert(mode)
    expected = np.rint(values / 257).astype(np.uint8)[..., None]
    assert same(to_rgb(image), expected)
    image.save(tmp_path / "x.tif")
    assert same(to_rgb(tmp_path / "x.tif"), expected)


def test_float_mode():
    levels = np.linspace(0, 1, 256, dtype=np.float32)[None]
    assert same(to_rgb(Image.fromarray(levels)), np.arange(256)[None, :, None])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, tmp_path):
    upright = Image.fromarray(noise(4, 6, 3))
    undo = {  # what a camera stored, so that a viewer which obeys the tag shows the upright picture
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    once = to_rgb(tmp_path / "x.png")
    assert once == upright == to_rgb(once) == to_rgb(Image.open(tmp_path / "x.png"))


def test_metadata_does_not_travel_on(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a long description " * 100
    image = Image.fromarray(noise(8, 8, 3))
    image.save(tmp_path / "x.png", exif=exif, icc_profile=b"not a profile" * 100)
    clean, again = io.BytesIO(), io.BytesIO()
    image.save(clean, "PNG")
    to_rgb(tmp_path / "x.png").save(again, "PNG")
    assert clean.getvalue() == again.getvalue()


def test_the_users_image_is_left_as_it_was():
    image = Image.fromarray(noise(8, 8, 4))
    image.info["note"] = "mine"
    before = image.copy()
    to_rgb(image).putpixel((0, 0), (0, 0, 0))
    assert image == before and image.info == {"note": "mine"}
    plain = Image.fromarray(noise(8, 8, 3))
    result = to_rgb(plain)
    result.putpixel((0, 0), (1, 2, 3))
    assert plain == Image.fromarray(noise(8, 8, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of some damage before it refuses
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.tif", "x.ppm"])
def test_a_truncated_file_is_the_same_picture_or_an_error_that_names_it(name, tmp_path):
    whole, cut = tmp_path / name, tmp_path / f"cut_{name}"
    Image.fromarray(noise(20, 30, 3)).save(whole)
    expected, data, refused = to_rgb(whole), whole.read_bytes(), 0
    for end in np.linspace(0, len(data) - 1, 60, dtype=int):
        cut.write_bytes(data[:end])
        try:
            assert to_rgb(cut) == expected
        except DataError as error:
            assert str(cut) in str(error)
            refused += 1
    assert refused > 40


def bomb(path: Path) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    return path


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="3600000000 pixels"):
        to_rgb(bomb(tmp_path / "bomb.png"))
    for name in ("text.png", "empty.png", "bomb.png", "absent.png", "."):
        for read in (to_rgb, short_side):
            with pytest.raises(DataError) as raised:
                read(str(tmp_path / name))
            assert str(tmp_path / name) in str(raised.value)


def test_a_lazily_opened_image_is_named_too(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as image, pytest.raises(DataError, match="cut.png"):
        to_rgb(image)


@pytest.mark.parametrize(
    "image, complaint",
    [
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\(1, 8, 8, 3\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), "at least one pixel"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((8, 8), bool), "bool"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\)"),
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\)"),
        (torch.zeros(3, 3, 8, 8), r"\(3, 3, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(()), r"\(\)"),
        (torch.zeros(3, 0, 8), "at least one pixel"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((3, 8, 8), 1.01), "outside"),
        (torch.full((3, 8, 8), -0.01), "outside"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (torch.tensor([0.5, float("nan")]).expand(3, 8, 2), "NaN"),
        (torch.full((3, 8, 8), float("inf")), "outside"),
        (Image.new("RGB", (0, 8)), "no pixels"),
        (Image.fromarray(np.full((2, 2), 1.5, np.float32)), r"floats are not all in \[0, 1\]"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), r"floats are not all in \[0, 1\]"),
        (Image.fromarray(np.full((2, 2), -1, np.int32)), "0..65535"),
        (Image.fromarray(np.full((2, 2), 65536, np.int32)), "0..65535"),
        (b"bytes", "bytes is not an image"),
        (None, "NoneType is not an image"),
    ],
)
def test_what_is_no_image_is_refused(image, complaint):
    with pytest.raises(DataError, match=complaint):
        to_rgb(image)


def test_to_image_refuses_nan_and_to_tensor_other_modes():
    with pytest.raises(DataError, match="NaN"):
        to_image(torch.full((3, 2, 2), float("nan")))
    with pytest.raises(DataError, match="mode L"):
        to_tensor(Image.new("L", (2, 2)))


def test_short_side_is_that_of_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert short_side(tmp_path / "x.jpg") == min(to_rgb(tmp_path / "x.jpg").size) == 20
