"""HEIC and AVIF, as phones and the web write them; HEIC needs an extra."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features

from ovss_ray.errors import ImageError
from ovss_ray.images import decode_image, list_images
from ovss_ray.images.decoding import read_header

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
KINDS = ["HEIC", pytest.param("AVIF", marks=needs_avif)]


@pytest.fixture
def picture() -> Image.Image:
    """Four quarters of different colours, 96 wide and 64 high."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:] = (255, 0, 0), (0, 255, 0)
    pixels[32:, :48], pixels[32:, 48:] = (0, 0, 255), (250, 250, 250)
    return Image.fromarray(pixels)


def encode(kind: str, image: Image.Image, *others: Image.Image, exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    if kind == "AVIF":
        options = {} if exif is None else {"exif": exif}
        image.save(buffer, "AVIF", quality=95, speed=10, save_all=bool(others), append_images=others, **options)
        return buffer.getvalue()
    container = pillow_heif.from_pillow(image)
    for other in others:
        container.add_from_pillow(other)
    container.save(buffer, quality=95, exif=None if exif is None else exif.tobytes())
    return buffer.getvalue()


def close(data: bytes, expected: np.ndarray) -> None:
    decoded = decode_image(data)
    assert decoded.shape == expected.shape
    assert decoded.flags.c_contiguous
    assert np.abs(decoded.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_comes_out(kind: str, picture: Image.Image) -> None:
    data = encode(kind, picture)
    close(data, np.asarray(picture))
    header = read_header(data)
    assert (header.kind, header.width, header.height) == (kind, 96, 64)


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    3: lambda a: a[::-1, ::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", TURNED)
def test_it_is_turned_once(kind: str, orientation: int, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    close(encode(kind, picture, exif=exif), TURNED[orientation](np.asarray(picture)))


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_is_laid_over_white(kind: str, picture: Image.Image) -> None:
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat([[0, 255]], [48, 48], axis=1).repeat(64, axis=0).astype(np.uint8)))
    expected = np.asarray(picture).copy()
    expected[:, :48] = 255
    close(encode(kind, clear), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_of_several_pictures_counts(kind: str, picture: Image.Image) -> None:
    close(encode(kind, picture, picture.transpose(Image.Transpose.ROTATE_180)), np.asarray(picture))


def test_ten_bits_become_eight(picture: Image.Image) -> None:
    deep = np.asarray(picture).astype(np.uint16) * 257
    buffer = io.BytesIO()
    pillow_heif.encode("RGB;16", picture.size, deep.tobytes(), buffer, quality=95)
    close(buffer.getvalue(), np.asarray(picture))


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_judged_by_the_header_and_damage_is_told(kind: str, picture: Image.Image) -> None:
    data = encode(kind, picture)
    with pytest.raises(ImageError, match="96 x 64 pixels, over the limit of 6143") as caught:
        decode_image(data, max_pixels=6143)
    assert caught.value.status == "too_large"
    for cut in (20, len(data) // 2, len(data) - 5):
        with pytest.raises(ImageError) as caught:
            decode_image(data[:cut])
        assert caught.value.status in ("corrupt", "unsupported")
        assert kind in caught.value.reason


def test_without_the_extra_a_heic_names_it(picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(encode("HEIC", picture))
    code = f"""
import sys
sys.modules["pillow_heif"] = None  # as if it were not installed
from pathlib import Path
from ovss_ray.images import decode_image
try:
    decode_image(Path({str(tmp_path / "a.heic")!r}).read_bytes())
except Exception as error:
    print(error.status, error.reason)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "unsupported HEIC; to read it, pip install 'ovss-ray[heif]' on every node\n"


def test_folders_are_searched_for_them(tmp_path: Path) -> None:
    names = ["a.heic", "b.HEIF", "c.avif", "d.jfif", "e.jpe", "f.hif", "g.mov"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [Path(ref.uri).name for ref in list_images(str(tmp_path))] == names[:-1]
