"""Decoding: exact pixels for every mode and format."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from image_files import FORMATS, encoded, png, tiff
from PIL import Image

from ovss_ray.errors import ImageError
from ovss_ray.images import DECODING_VERSION, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

SHARED = Path(__file__).parents[3] / "shared" / "data"


def same(data: bytes, expected: np.ndarray) -> None:
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, expected)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


@pytest.fixture
def rgb(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)


# Eight bits a channel.


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_colour(kind: str, options: dict[str, Any], rgb: np.ndarray) -> None:
    same(encoded(Image.fromarray(rgb), kind, **options), rgb)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_lossless_grey(kind: str, rgb: np.ndarray) -> None:
    same(encoded(Image.fromarray(rgb[..., 0]), kind), grey(rgb[..., 0]))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_stay_close(kind: str) -> None:
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([x * 4, y * 5, 255 - x * 2 - y * 2], axis=-1).astype(np.uint8)
    decoded = decode_image(encoded(Image.fromarray(smooth), kind, quality=95))
    assert np.abs(decoded.astype(int) - smooth).mean() < 3
    decoded = decode_image(encoded(Image.fromarray(smooth[..., 1]), kind, quality=95))
    assert np.abs(decoded.astype(int) - grey(smooth[..., 1])).mean() < 3
    if kind == "JPEG":
        progressive = encoded(Image.fromarray(smooth), kind, quality=95, progressive=True)
        np.testing.assert_array_equal(
            decode_image(progressive), decode_image(encoded(Image.fromarray(smooth), kind, quality=95))
        )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_one_bit_is_black_and_white(kind: str, rgb: np.ndarray) -> None:
    bits = rgb[..., 0] > 127
    same(encoded(Image.fromarray(bits), kind), grey(bits.astype(np.uint8) * 255))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_below_eight_bits_spans_the_whole_range(bits: int, rng: np.random.Generator) -> None:
    top = (1 << bits) - 1
    values = rng.integers(0, top + 1, (5, 9))
    same(png(values, bits, 0), grey((values * 255 // top).astype(np.uint8)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_become_their_colours(bits: int, rng: np.random.Generator) -> None:
    palette = rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8)
    indices = rng.integers(0, 1 << bits, (5, 9))
    same(png(indices, bits, 3, (b"PLTE", palette.tobytes())), palette[indices])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_palettes_in_other_formats(kind: str, rng: np.random.Generator) -> None:
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(indices).convert("L")
    image.putpalette(palette.tobytes())
    same(encoded(image, kind), palette[indices])


# Alpha, laid over white.


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Integer rounding of colour * alpha + white * (1 - alpha)."""
    part = alpha.astype(int)[..., None]
    return ((colour.astype(int) * part + 255 * (255 - part)) * 2 + 255) // 510


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_laid_over_white(kind: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    rgba = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    expected = over_white(rgba[..., :3], rgba[..., 3])
    assert (expected[0] == 255).all()
    assert (expected[1] == rgba[1, :, :3]).all()
    same(encoded(Image.fromarray(rgba), kind, **options), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha(kind: str, rng: np.random.Generator) -> None:
    pair = rng.integers(0, 256, (8, 8, 2), dtype=np.uint8)
    same(encoded(Image.fromarray(pair, "LA"), kind), over_white(grey(pair[..., 0]), pair[..., 1]))


def test_transparent_palette_entries(rng: np.random.Generator) -> None:
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, 16, dtype=np.uint8)
    indices = rng.integers(0, 16, (5, 9))
    same(
        png(indices, 4, 3, (b"PLTE", palette.tobytes()), (b"tRNS", alpha.tobytes())),
        over_white(palette[indices], alpha[indices]),
    )


def test_a_transparent_gif_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    same(encoded(image, "GIF", transparency=0), np.array([[[255, 255, 255], [40, 50, 60]]]))


def test_colour_keys(rng: np.random.Generator) -> None:
    rgb = rng.integers(0, 2, (6, 6, 3)) * 200
    expected = np.where((rgb == [200, 0, 200]).all(-1, keepdims=True), 255, rgb)
    same(png(rgb, 8, 2, (b"tRNS", struct.pack(">3H", 200, 0, 200))), expected)
    values = rng.integers(0, 3, (6, 6)) * 100
    same(png(values, 8, 0, (b"tRNS", struct.pack(">H", 100))), grey(np.where(values == 100, 255, values)))


# More than eight bits a channel: a fixed rule, so that equal values stay equal across images.


@pytest.fixture
def deep(rng: np.random.Generator) -> np.ndarray:
    values = rng.integers(0, 65536, (6, 8, 4), dtype=np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    return values


def test_sixteen_bit_grey_keeps_the_upper_byte(deep: np.ndarray) -> None:
    values = deep[..., 0]
    upper = grey(values >> 8)
    same(png(values, 16, 0), upper)
    same(tiff(values, "<"), upper)
    same(tiff(values, ">"), upper)
    same(tiff(values, "<", photometric=0), 255 - upper)


def test_a_dark_sixteen_bit_image_is_not_stretched() -> None:
    values = np.full((4, 4), 300, np.uint16)
    values[0, 0] = 600
    same(png(values, 16, 0), grey(values >> 8))


def test_sixteen_bit_colour_keeps_the_upper_byte(deep: np.ndarray) -> None:
    colour = deep[..., :3]
    same(png(colour, 16, 2), colour >> 8)
    same(tiff(colour, "<", photometric=2), colour >> 8)
    same(tiff(colour, ">", photometric=2), colour >> 8)


def test_sixteen_bit_alpha(deep: np.ndarray) -> None:
    eight = (deep >> 8).astype(np.uint8)
    same(png(deep, 16, 6), over_white(eight[..., :3], eight[..., 3]))
    same(png(deep[..., 2:], 16, 4), over_white(grey(eight[..., 2]), eight[..., 3]))


def test_the_colour_key_of_a_sixteen_bit_image_is_ignored(deep: np.ndarray) -> None:
    key = (b"tRNS", struct.pack(">3H", *deep[3, 3, :3].tolist()))
    same(png(deep[..., :3], 16, 2, key), deep[..., :3] >> 8)


def test_twelve_bit_grey_keeps_its_own_upper_bits(deep: np.ndarray) -> None:
    values = deep[..., 0] >> 4
    same(tiff(values, bits=12), grey(values >> 4))


@pytest.mark.parametrize("order", ["<", ">"])
def test_wide_integers_are_clipped_to_sixteen_bits(order: str) -> None:
    values = np.array([[-5, 0, 255, 256, 32768, 65535, 65536, 2**31 - 1]])
    same(tiff(values.astype(np.int32), order, sample_format=2), grey(np.array([[0, 0, 0, 1, 128, 255, 255, 255]])))
    signed = np.array([[-32768, -1, 0, 256, 32767]], np.int16)
    same(tiff(signed, order, sample_format=2), grey(np.array([[0, 0, 0, 1, 127]])))


@pytest.mark.parametrize("order", ["<", ">"])
def test_floats_span_zero_to_one(order: str) -> None:
    values = np.array([[-1.0, 0.0, 0.5, 1.0, 7.0, np.nan, np.inf, -np.inf, 100 / 255]], np.float32)
    expected = grey(np.array([[0, 0, 128, 255, 255, 0, 255, 0, 100]]))
    same(tiff(values, order, sample_format=3), expected)
    same(tiff(values, order, sample_format=3, photometric=0), 255 - expected)


# TIFFs that Pillow alone turns into garbage without a word.


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_sixteen_bits(order: str, deflate: bool, deep: np.ndarray) -> None:
    colour = deep[..., :3]
    same(tiff(colour, order, photometric=2, planar=True, deflate=deflate), colour >> 8)
    cmyk = decode_image(tiff(deep, order, photometric=5, planar=True))
    assert np.abs(cmyk - from_cmyk((deep >> 8).astype(np.uint8))).max() <= 1


@pytest.mark.parametrize("photometric", [0, 1, 2])
def test_planes_with_their_bits_in_reverse_order(photometric: int, rgb: np.ndarray) -> None:
    values = rgb if photometric == 2 else rgb[..., 0]
    expected = rgb if photometric == 2 else grey(255 - values if photometric == 0 else values)
    same(tiff(values, photometric=photometric, planar=True, reverse_bits=True), expected)
    same(tiff(values, photometric=photometric, planar=True), expected)


def test_compressed_samples_in_big_endian_order(rng: np.random.Generator) -> None:
    floats = rng.random((6, 8)).astype(np.float32)
    same(tiff(floats, ">", sample_format=3, deflate=True), grey(np.rint(floats * 255)))
    wide = rng.integers(-70_000, 70_000, (6, 8)).astype(np.int32)
    same(tiff(wide, ">", sample_format=2, deflate=True), grey(np.clip(wide, 0, 65535) >> 8))
    signed = rng.integers(-32768, 32768, (6, 8)).astype(np.int16)
    same(tiff(signed, ">", sample_format=2, deflate=True), grey(np.clip(signed, 0, 65535) >> 8))


def test_layouts_that_nothing_here_reads_are_refused(rng: np.random.Generator) -> None:
    signed = rng.integers(-128, 128, (6, 8)).astype(np.int8)
    pairs = rng.integers(0, 256, (6, 8, 2), dtype=np.uint8)
    for data, reason in (
        (tiff(signed, sample_format=2), "signed samples of 8 bits"),
        (with_alpha_tag(tiff(pairs, planar=True, deflate=True)), "LA with a plane per channel"),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            decode_image(data)
        assert caught.value.status == "unsupported"


def with_alpha_tag(data: bytes) -> bytes:
    """A little-endian TIFF whose fill order (1) gives its place to "the extra sample is alpha"."""
    return data.replace(struct.pack("<HHIHH", 266, 3, 1, 1, 0), struct.pack("<HHIHH", 338, 3, 1, 2, 0))


# Large images are converted in strips.


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "I;16"])
def test_strips_fit_together(mode: str, orientation: int, rng: np.random.Generator) -> None:
    values = rng.integers(0, 256, (1300, 1700), dtype=np.uint8)
    stored = Image.fromarray(values)
    expected = grey(values)
    if mode == "I;16":
        stored = Image.fromarray(values.astype(np.uint16) << 8)
    elif mode == "LA":
        alpha = np.roll(values, 5)
        stored.putalpha(Image.fromarray(alpha))
        expected = over_white(expected, alpha)
    elif mode == "P":
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        stored.putpalette(palette.tobytes())
        expected = palette[values]
    else:
        stored = Image.fromarray(expected)
    exif = Image.Exif()
    exif[274] = orientation
    upright = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 5: lambda a: a.transpose(1, 0, 2)}.get(
        orientation, lambda a: np.rot90(a, -1 if orientation == 6 else 1)
    )
    same(encoded(stored, "PNG", exif=exif, compress_level=1), upright(expected))


# Other colour spaces.


def from_cmyk(cmyk: np.ndarray) -> np.ndarray:
    colour, black = cmyk[..., :3].astype(int), cmyk[..., 3:].astype(int)
    return np.rint((255 - colour) * (255 - black) / 255)


def test_cmyk_tiff(rng: np.random.Generator) -> None:
    cmyk = rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    decoded = decode_image(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"))
    assert np.abs(decoded - from_cmyk(cmyk)).max() <= 1


def test_inverted_cmyk_of_adobe_jpeg() -> None:
    cmyk = np.empty((16, 16, 4), np.uint8)
    cmyk[:] = (200, 30, 90, 40)
    data = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(decode_image(data) - from_cmyk(cmyk)).max() <= 2


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 cannot read the YCbCr TIFF it writes")
def test_ycbcr_tiff_by_the_jpeg_formula(rng: np.random.Generator) -> None:
    ycc = rng.integers(60, 200, (9, 9, 3), dtype=np.uint8)
    y, cb, cr = (ycc[..., channel].astype(float) for channel in range(3))
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    expected = np.clip(np.stack([red, green, blue], -1), 0, 255)
    decoded = decode_image(encoded(Image.fromarray(ycc, "YCbCr"), "TIFF"))
    assert np.abs(decoded - expected).max() <= 1.5


def test_lab_tiff_has_its_neutral_axis_grey() -> None:
    lab = np.zeros((1, 3, 3), np.uint8)
    lab[0, :, 0] = (0, 128, 255)
    decoded = decode_image(encoded(Image.fromarray(lab, "LAB"), "TIFF")).astype(int)
    assert np.ptp(decoded, axis=-1).max() <= 2
    assert decoded[0, 0].max() <= 1
    assert abs(decoded[0, 1, 0] - 119) <= 3  # L* = 50 is sRGB 119
    assert decoded[0, 2].min() >= 254


# Orientation, frames, sizes.

STORED_FOR: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED_FOR)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_the_exif_orientation_is_applied(kind: str, options: dict[str, Any], orientation: int, rgb: np.ndarray) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED_FOR[orientation](rgb))
    same(encoded(Image.fromarray(stored), kind, exif=exif, **options), rgb)


@pytest.mark.parametrize("orientation", STORED_FOR)
def test_the_exif_orientation_of_a_jpeg(orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = (255, 0, 0)
    upright[:16, 32:] = (0, 255, 0)
    upright[16:, :16] = (0, 0, 255)
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED_FOR[orientation](upright))
    decoded = decode_image(encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=95))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 8


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_a_senseless_orientation_is_ignored(value: int, rgb: np.ndarray) -> None:
    exif = Image.Exif()
    exif[274] = value
    same(encoded(Image.fromarray(rgb), "PNG", exif=exif), rgb)


def test_damaged_exif_does_not_cost_the_image(rgb: np.ndarray) -> None:
    whole = encoded(Image.fromarray(rgb), "JPEG")
    broken = encoded(Image.fromarray(rgb), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    np.testing.assert_array_equal(decode_image(broken), decode_image(whole))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (6, 5), (255, 0, 0)), Image.new("RGB", (6, 5), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    same(data, np.broadcast_to(np.uint8([255, 0, 0]), (5, 6, 3)))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("kind", FORMATS)
def test_degenerate_sizes(kind: str, size: tuple[int, int]) -> None:
    decoded = decode_image(encoded(Image.new("RGB", size, (0, 0, 255)), kind))
    assert decoded.shape == (size[1], size[0], 3)
    assert np.abs(decoded.astype(int) - [0, 0, 255]).max() <= 2


# Real photographs.


@pytest.mark.skipif(not SHARED.is_dir(), reason="the photographs are not here")
def test_photographs_decode_as_pillow_alone_decodes_them() -> None:
    photographs = [
        path
        for folder in (
            "camvid/val",
            "voc/images",
            "coco_panoptic_samples/input_images",
            "clip_golden",
            "ade20k_samples",
        )
        for path in sorted((SHARED / folder).rglob("*"))[:12]
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    assert len(photographs) > 20
    for path in photographs:
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        same(path.read_bytes(), expected)


def test_the_version_is_a_number_for_the_fingerprint() -> None:
    assert isinstance(DECODING_VERSION, int)
