"""`to_rgb` takes what users have and refuses what is no picture; tensors and 8-bit images are the same thing."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

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


def exif_block() -> bytes:
    """EXIF of a few hundred bytes as a camera writes it: texts, numbers, a folder within; the picture is upright."""
    exif = Image.Exif()
    tags = {
        0x0112: 1,
        0x010F: "a maker",
        0x0110: "a model",
        0x011A: 72.0,
        0x0132: "2024:01:01 10:00:00",
        0x8298: "me",
    }
    for tag, value in tags.items():
        exif[tag] = value
    exif.get_ifd(0x8769).update(
        {0x829A: 1 / 250, 0x9003: "2024:01:01 10:00:00", 0xA002: 40, 0x927C: b"note" * 20}
    )
    return exif.tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_damaged_exif_does_not_refuse_a_sound_picture(name, tmp_path):
    """Whatever is wrong with it: a hundred blocks of EXIF, each with a few bytes changed, or cut, or replaced by junk."""
    chance, image, whole = random.Random(0), Image.fromarray(noise(40, 24, 3)), exif_block()
    image.save(tmp_path / name)
    expected = to_rgb(tmp_path / name)
    for attempt in range(100):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 12)):
            damaged[chance.randrange(6, len(damaged))] = chance.randrange(256)
        if attempt % 4 == 0:
            del damaged[chance.randrange(6, len(damaged)) :]
        if attempt % 10 == 0:
            damaged[6:] = chance.randbytes(50)
        image.save(tmp_path / name, exif=bytes(damaged))
        read = to_rgb(tmp_path / name)
        # A change may have made another, valid orientation.
        assert any(read == expected.transpose(way) for way in Image.Transpose) or read == expected, (
            attempt,
            bytes(damaged),
        )


def test_the_raw_profiles_of_imagemagick_may_be_damaged_too(tmp_path):
    """PNGs of some programs hold EXIF as text; with a thumbnail's header in front of it, no reader finds its start."""
    image, about = Image.fromarray(noise(4, 6, 3)), PngImagePlugin.PngInfo()
    about.add_text("Raw profile type exif", "\nexif\n      12\n0008000201120003deadbeef\n")
    image.save(tmp_path / "x.png", pnginfo=about)
    with Image.open(tmp_path / "x.png") as opened, pytest.raises(SyntaxError):
        opened.getexif()
    assert to_rgb(tmp_path / "x.png") == image


def test_exif_that_is_partly_damaged_still_tells_which_side_is_up(tmp_path):
    image, exif = Image.fromarray(noise(4, 6, 3)), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    # The maker's name is said to be a number that EXIF has no type for.
    block = exif.tobytes().replace(struct.pack(">HH", 0x010F, 2), struct.pack(">HH", 0x010F, 99))
    block = block.replace(struct.pack("<HH", 0x010F, 2), struct.pack("<HH", 0x010F, 99))
    assert block != exif.tobytes()
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=block)
    assert to_rgb(tmp_path / "x.png") == image


# --- Colour -----------------------------------------------------------------------------------------------------------

P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
ADOBE = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)


def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


def matrix(chromaticities: tuple[float, ...]) -> np.ndarray:
    """From linear RGB with these primaries to XYZ: textbook (Lindbloom, RGB working space matrices)."""
    white, *primaries = (xyz(*pair) for pair in zip(chromaticities[::2], chromaticities[1::2]))
    columns = np.array(primaries).T
    return columns * (np.linalg.inv(columns) @ white)


def in_srgb(pixels: np.ndarray, chromaticities: tuple[float, ...], gamma: float) -> np.ndarray:
    """What numbers of another space with the same white, D65, are in sRGB, as the standard says it."""
    light = (pixels / 255) ** gamma @ (np.linalg.inv(matrix(SRGB)) @ matrix(chromaticities)).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def profile(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The least that an ICC profile of version 2.1 must hold: a header, a table of tags, and their data."""
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    connection = b"Lab " if b"A2B0" in tags else b"XYZ "
    size = at + len(data)
    header = (
        struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", kind, connection)
        + bytes(12)
        + b"acsp"
    )
    header = header.ljust(68, b"\0") + struct.pack(
        ">3i", 63190, 65536, 54061
    )  # D50, which all profiles connect through
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def numbers(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(chromaticities: tuple[float, ...], gamma: float) -> bytes:
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    scale = (bradford @ d50) / (bradford @ xyz(*chromaticities[:2]))
    columns = (np.linalg.inv(bradford) @ np.diag(scale) @ bradford @ matrix(chromaticities)).T
    tags = {f"{name}XYZ".encode(): numbers(*column) for name, column in zip("rgb", columns)}
    return profile(
        b"RGB ", tags | {f"{name}TRC".encode(): curve(gamma) for name in "rgb"} | {b"wtpt": numbers(*d50)}
    )


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(gamma), b"wtpt": numbers(0.9642, 1, 0.8249)})


def cmyk_profile() -> bytes:
    """Black ink alone counts: lightness falls in proportion to it. No such press exists, so nobody confuses it."""
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    table += bytes(range(256)) * 4 + bytes([255, 128, 128, 0, 128, 128]) * 8 + bytes(range(256)) * 3
    return profile(b"CMYK", {b"A2B0": table, b"wtpt": numbers(0.9642, 1, 0.8249)})


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif", "x.avif", "pillow"])
@pytest.mark.parametrize("chromaticities, gamma", [(P3, 2.2), (ADOBE, 563 / 256), (SRGB, 1.8)])
def test_an_embedded_profile_is_converted_to_srgb(name, chromaticities, gamma, tmp_path):
    pixels, embedded = noise(40, 50, 3), rgb_profile(chromaticities, gamma)
    image = Image.fromarray(pixels)
    if name == "pillow":
        image.info["icc_profile"] = embedded
    else:
        lossless = {"lossless": True} if name == "x.webp" else {"quality": 100, "subsampling": "4:4:4"}
        image.save(tmp_path / name, icc_profile=embedded, **lossless if name != "x.png" else {})
        image = tmp_path / name
        if name == "x.avif":  # nearly lossless: what it holds is what Pillow reads
            with Image.open(image) as opened:
                pixels = np.asarray(opened.convert("RGB"))
    read = to_rgb(image)
    assert np.abs(np.asarray(read) - in_srgb(pixels, chromaticities, gamma)).max() < 2
    assert not read.info and np.abs(np.asarray(read).astype(int) - pixels).max() > 15


def test_a_photograph_in_display_p3_is_read_as_a_viewer_shows_it(shared):
    with Image.open(shared / "cases" / "display_p3.png") as image:
        pixels = np.asarray(image)
        srgb = ImageCms.createProfile("sRGB")
        shown = np.asarray(ImageCms.profileToProfile(image, io.BytesIO(image.info["icc_profile"]), srgb))
    assert np.array_equal(np.asarray(to_rgb(shared / "cases" / "display_p3.png")), shown)
    assert 10 * np.log10(255**2 / np.mean((shown.astype(float) - pixels) ** 2)) < 36


@pytest.mark.parametrize(
    "embedded", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"not a profile" * 100]
)
def test_srgb_and_damaged_profiles_change_nothing(embedded, tmp_path):
    for size in ((40, 50, 3), (40, 50)):
        Image.fromarray(noise(*size)).save(tmp_path / "x.png", icc_profile=embedded)
        assert same(to_rgb(tmp_path / "x.png"), noise(*size).reshape(40, 50, -1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16"])
def test_profiles_of_grey_and_indexed_pictures(mode, tmp_path):
    """A grey picture may have a profile for grey, or one for RGB; a palette's colours are those of the profile."""
    grey = mode != "P"
    image = Image.fromarray(noise(20, 20) if grey else noise(20, 20, 3))
    image = Image.fromarray(noise(20, 20).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    plain = np.asarray((image if mode != "I;16" else Image.fromarray(noise(20, 20))).convert("RGB"))
    expected = in_srgb(plain, SRGB, 1.5)
    for embedded in [rgb_profile(SRGB, 1.5)] + grey * [grey_profile(1.5)]:
        image.save(tmp_path / "x.png", icc_profile=embedded)
        assert np.abs(np.asarray(to_rgb(tmp_path / "x.png")) - expected).max() < 2


def test_transparency_is_composited_after_the_colours_are_converted():
    image = Image.fromarray(noise(9, 9, 4))
    image.info["icc_profile"] = rgb_profile(P3, 2.2)
    colour, alpha = np.asarray(image)[..., :3], np.asarray(image)[..., 3]
    assert np.abs(np.asarray(to_rgb(image)) - over_white(in_srgb(colour, P3, 2.2), alpha)).max() < 3


def test_a_profile_for_print_is_converted_and_one_that_does_not_fit_is_ignored():
    printed, colour = Image.fromarray(noise(8, 8, 3)).convert("CMYK"), Image.fromarray(noise(8, 8, 3))
    for image, embedded in (
        (printed, rgb_profile(P3, 2.2)),
        (colour, grey_profile(1.0)),
        (colour, cmyk_profile()),
    ):
        image.info["icc_profile"] = embedded
        assert same(to_rgb(image), np.asarray(image.convert("RGB")))
    inks = np.array([[[90, 0, 200, 0], [0, 70, 9, 128], [255, 255, 9, 255]]], np.uint8)
    printed = Image.fromarray(inks, "CMYK")
    printed.info["icc_profile"] = cmyk_profile()
    lightnesses = np.asarray(to_rgb(printed)).astype(int)
    assert np.abs(lightnesses - np.array([255, 118, 0])[None, :, None]).max() <= 3  # L* of 100, 50 and 0


def png(path: Path, pixels: np.ndarray, **chunks: bytes) -> Path:
    about = PngImagePlugin.PngInfo()
    for name, data in chunks.items():
        about.add(name.encode(), data)
    Image.fromarray(pixels).save(path, pnginfo=about)
    return path


def hundred_thousandths(*values: float) -> bytes:
    return struct.pack(f">{len(values)}I", *(round(value * 1e5) for value in values))


@pytest.mark.parametrize(
    "chromaticities, gamma", [(P3, 2.2), (P3, 1.8), (SRGB, 1.0), (None, 1.8), (ADOBE, None)]
)
def test_pngs_gamma_and_primaries_are_converted_to_srgb(chromaticities, gamma, tmp_path):
    pixels = noise(40, 50, 3)
    chunks = {"gAMA": hundred_thousandths(1 / gamma)} if gamma else {}
    chunks |= {"cHRM": hundred_thousandths(*chromaticities)} if chromaticities else {}
    read = np.asarray(to_rgb(png(tmp_path / "x.png", pixels, **chunks)))
    if gamma not in (None, 2.2):  # 1/2.2 and no gamma at all are sRGB's own curve
        assert np.abs(read - in_srgb(pixels, chromaticities or SRGB, gamma)).max() < 2
    else:
        light = np.where(pixels <= 10, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
        assert np.abs(read - in_srgb(light * 255, chromaticities, 1)).max() < 2
    assert np.abs(read.astype(int) - pixels).max() > 15


def test_another_white_stays_white_and_agrees_with_the_profile_that_says_the_same(tmp_path):
    d50 = (0.3457, 0.3585, *P3[2:])
    pixels = np.concatenate([noise(20, 20, 3), np.full((1, 20, 3), 255, np.uint8)])
    read = np.asarray(
        to_rgb(png(tmp_path / "x.png", pixels, gAMA=hundred_thousandths(1), cHRM=hundred_thousandths(*d50)))
    )
    image = Image.fromarray(pixels)
    image.info["icc_profile"] = rgb_profile(d50, 1)
    assert np.abs(read.astype(int) - np.asarray(to_rgb(image))).max() < 3 and read[-1].min() == 255


@pytest.mark.parametrize(
    "chunks",
    [
        {"gAMA": hundred_thousandths(0.45455)},
        {"gAMA": hundred_thousandths(0.45455), "cHRM": hundred_thousandths(*SRGB)},
        {"sRGB": b"\0", "gAMA": hundred_thousandths(1.0), "cHRM": hundred_thousandths(*P3)},
        {"gAMA": bytes(4)},
        {"gAMA": b"\xff" * 4},
        {"cHRM": bytes(32)},
        {"cHRM": hundred_thousandths(*[0.3] * 8)},
    ],
)
def test_what_is_srgb_by_its_chunks_or_makes_no_sense_changes_nothing(chunks, tmp_path):
    assert same(to_rgb(png(tmp_path / "x.png", noise(8, 8, 3), **chunks)), noise(8, 8, 3))


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
