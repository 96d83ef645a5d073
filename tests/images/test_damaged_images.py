"""What is no image, too large an image, or a damaged one: always an ImageError with a status and a reason."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import FORMATS, encoded, png, tiff
from PIL import Image

from ovss_ray.errors import ImageError
from ovss_ray.images import decode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def test_an_empty_file() -> None:
    with pytest.raises(ImageError, match=r"empty file \(0 bytes\)") as caught:
        decode_image(b"")
    assert caught.value.status == "corrupt"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"\n <!-- proxy --> <HTML>", "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML document.*server answered"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "SVG"),
        (b"<?XML version='1.0'?>\n<!-- a --><!-- > --> <!DOCTYPE svg PUBLIC 'x' [<!ENTITY a 'b'>]><svg/>", "SVG"),
        (b"<!---->" * 100 + b"<body>", "HTML page"),
        (b"<!---->" * 100 + b"x", "text file"),  # which a regular expression would ponder until the sun is out
        (b"<!-- " * 100 + b"<html>", "text file"),
        (b'{"error": "expired"}', "JSON document"),
        ("just some näive text".encode(), "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "text file"),
        (b"8BPS\0\1" + bytes(20), "PSD"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "EPS"),
        (b"\xc5\xd0\xd3\xc6" + bytes(30), "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41", "MP4 video"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"PK\x03\x04" + bytes(30), "ZIP"),
        (b"\0\0\1\0\1\0" + bytes(30), "ICO"),
        (b"P6\n1 1\n255\n\1\2\3", "PNM"),
        (b"\x9c\x01\x88\xfe\x00\x03", "not an image, nor any other kind"),
        (b"BMW is a maker of cars", "text file"),
    ],
)
def test_other_kinds_of_files_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data)
    assert caught.value.status == "unsupported"


def test_a_file_of_zeros_is_damaged() -> None:
    with pytest.raises(ImageError, match="zeros") as caught:
        decode_image(bytes(5000))
    assert caught.value.status == "corrupt"


def claims(kind: str, width: int, height: int) -> bytes:
    """A small file whose header claims another size."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG"])
def test_bombs_are_refused_by_their_header(kind: str) -> None:
    with pytest.raises(ImageError, match="60000 x 50000 pixels, over the limit of 100000000") as caught:
        decode_image(claims(kind, 60000, 50000))
    assert caught.value.status == "too_large"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_pixel_limit_is_ours_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (30, 20)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow itself refuses twice that
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match="30 x 20 pixels, over the limit of 599") as caught:
        decode_image(data, max_pixels=599)
    assert caught.value.status == "too_large"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_limit_of_the_process_stays_as_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (30, 20)), kind)
    decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError), Image.open(io.BytesIO(data)) as image:
        image.load()


# Damage.


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(np.zeros((4, 4), np.uint8), photometric=3), r"its tag 320 \(ColorMap\) is missing"),
        (tiff(np.zeros((4, 4), np.uint8), without=(256,)), "Missing dimensions"),
        (tiff(np.zeros((4, 4), np.uint8), deflate=True).replace(b"x\x9c", b"zz"), "compressed data cannot be decoded"),
        (tiff(np.zeros((4, 4), np.uint8))[:9], "Missing dimensions"),
        (encoded(Image.new("L", (4, 4)), "GIF")[:12], "no more images in GIF file"),
        (encoded(Image.new("L", (4, 4)), "GIF")[:9], "ends too early"),
    ],
)
def test_damage_is_told_in_words(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data)
    assert caught.value.status == "corrupt"


def samples() -> dict[str, bytes]:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(pixels)
    found = {kind: encoded(image, kind) for kind in FORMATS}
    found["JPEG with EXIF"] = encoded(image, "JPEG", exif=exif)
    found["progressive JPEG"] = encoded(image, "JPEG", progressive=True)
    found["CMYK JPEG"] = encoded(image.convert("CMYK"), "JPEG")
    found["LZW TIFF"] = encoded(image, "TIFF", compression="tiff_lzw", exif=exif)
    found["JPEG TIFF"] = encoded(image, "TIFF", compression="jpeg")
    found["palette PNG"] = encoded(image.quantize(16), "PNG", transparency=3)
    found["deep PNG"] = png(pixels[..., 0].astype(np.uint16) << 8, 16, 0)
    found["animated GIF"] = encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    found["animated WebP"] = encoded(image, "WEBP", save_all=True, append_images=[image.rotate(90)])
    return found


SAMPLES = samples()


def outcome(data: bytes) -> np.ndarray | ImageError:
    try:
        return decode_image(data, max_pixels=300_000)
    except ImageError as error:
        return error


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_file_cut_anywhere_is_an_error_or_whole(kind: str) -> None:
    data = SAMPLES[kind]
    whole = decode_image(data)
    cuts = np.unique(np.linspace(1, len(data) - 1, 150).astype(int))
    failed = 0
    for cut in cuts.tolist():
        result = outcome(data[:cut])
        if isinstance(result, ImageError):
            assert result.status in ("corrupt", "unsupported")
            failed += 1
        else:
            np.testing.assert_array_equal(result, whole)
    assert failed > len(cuts) / 3  # animated files are whole as soon as their first frame is


def test_a_photograph_cut_in_the_middle_is_corrupt() -> None:
    for kind in FORMATS:
        with pytest.raises(ImageError) as caught:
            decode_image(SAMPLES[kind][: len(SAMPLES[kind]) // 2])
        assert caught.value.status == "corrupt"


def only_image_errors(data: bytes) -> None:
    result = outcome(data)
    if isinstance(result, ImageError):
        assert result.status in ("corrupt", "unsupported", "too_large")
        assert len(re.findall(r"[A-Za-z]{2,}", result.reason)) > 2, result.reason  # words, not the number of a tag
    else:
        assert result.dtype == np.uint8
        assert result.ndim == 3
        assert result.shape[2] == 3


EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(min_size=1, max_size=6)), min_size=1, max_size=6
)


@pytest.mark.parametrize("kind", SAMPLES)
@settings(max_examples=100, deadline=None)
@given(edits=EDITS, head=st.booleans())
def test_damaged_files_end_as_image_errors(kind: str, edits: list[tuple[int, int, bytes]], head: bool) -> None:
    data = bytearray(SAMPLES[kind])
    for place, edit, replacement in edits:
        position = place % min(len(data) or 1, 200 if head else 1 << 16)  # headers matter most
        if edit == 0:
            data[position : position + len(replacement)] = replacement
        elif edit == 1:
            data[position:position] = replacement
        elif edit == 2:
            del data[position : position + len(replacement)]
        else:
            data[position % (len(data) or 1) :] = b"" if place % 5 == 0 else data[position:]
    only_image_errors(bytes(data))


SIGNATURES = [
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\x20\0\0\0WEBPVP8 ",
    b"II*\0\x08\0\0\0",
    b"MM\0*",
    b"BM",
    b"",
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
def test_random_bytes_end_as_image_errors(signature: bytes, data: bytes) -> None:
    only_image_errors(signature + data)


def test_threads_decode_alike() -> None:
    alone = [decode_image(data) for data in SAMPLES.values()]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for together, expected in zip(pool.map(decode_image, SAMPLES.values()), alone, strict=True):
                np.testing.assert_array_equal(together, expected)
