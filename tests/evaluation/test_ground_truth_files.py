"""Reading annotation files: values as stored, and every damage noticed."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_files import Labels, compressed, run_lengths
from PIL import Image

from ovss_ray.evaluation.ground_truth.errors import ColourAnnotationError, DamagedAnnotationError, UnknownIdsError
from ovss_ray.evaluation.ground_truth.ids import IdTable
from ovss_ray.evaluation.ground_truth.pixels import read_colours, read_indices, read_mat, show_colour
from ovss_ray.evaluation.ground_truth.rle import decode_mask
from ovss_ray.evaluation.ground_truth.shrinking import nearest, shrunk_size

GREY, INDEXED = 0, 3


def png(values: Labels, bits: int, colour_type: int) -> bytes:
    """A PNG written by hand, of any depth."""
    planes = values[:, :, None] >> np.arange(bits)[::-1] & 1
    packed = np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour_type, 0, 0, 0)
    palette = bytes((number * 91 + 7) % 256 for number in range(3 * min(2**bits, 256)))
    parts = [
        (b"IHDR", header),
        *([(b"PLTE", palette)] if colour_type == INDEXED else []),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mat(**variables: Any) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("bits", "colour_type"),
    [(1, GREY), (2, GREY), (4, GREY), (8, GREY), (16, GREY), (1, INDEXED), (2, INDEXED), (4, INDEXED), (8, INDEXED)],
)
def test_the_values_of_a_png_are_those_stored_whatever_its_depth(bits: int, colour_type: int) -> None:
    values = np.arange(min(2**bits, 600)).repeat(3)[: 3 * 2**bits].reshape(3, -1)
    read = read_indices(png(values, bits, colour_type), "a.png")
    assert read.dtype == (np.uint16 if bits == 16 else np.uint8)
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_the_values_of_a_tiff(dtype: type, compression: str | None, rng: np.random.Generator) -> None:
    values = rng.integers(0, np.iinfo(dtype).max + 1, (7, 9)).astype(dtype)
    read = read_indices(saved(Image.fromarray(values), "TIFF", compression=compression), "a.tif")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_no_labels(mode: str) -> None:
    with pytest.raises(ColourAnnotationError, match=r"a\.png cannot be read as a label map: it is a colour image"):
        read_indices(saved(Image.new(mode, (2, 2))), "a.png")


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_labels_with_transparency_are_refused(mode: str) -> None:
    with pytest.raises(DamagedAnnotationError, match="mode LA"):
        read_indices(saved(Image.new(mode, (2, 2)).convert("LA")), "a.png")


def test_tiffs_that_pillow_would_change_are_refused() -> None:
    with pytest.raises(DamagedAnnotationError, match="1 bits, or one where 0 is white"):
        read_indices(saved(Image.new("1", (8, 2)), "TIFF"), "a.tif")
    with pytest.raises(DamagedAnnotationError, match="where 0 is white"):
        read_indices(saved(Image.new("L", (8, 2)), "TIFF", tiffinfo={262: 0}), "a.tif")
    with pytest.raises(DamagedAnnotationError, match="mode F"):
        read_indices(saved(Image.new("F", (8, 2)), "TIFF"), "a.tif")


def test_other_files_are_refused() -> None:
    for data in (b"", b"GIF89a", saved(Image.new("L", (2, 2)), "JPEG")):
        with pytest.raises(DamagedAnnotationError, match=r"a\.png is neither PNG nor TIFF: it begins with "):
            read_indices(data, "a.png")


@pytest.mark.parametrize("read", [read_indices, read_colours])
@given(data=st.data())
def test_a_png_with_any_byte_changed_or_cut_off_is_noticed_or_reads_the_same(
    read: Callable[[bytes, str], Labels], data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    shape = (9, 11) if read is read_indices else (9, 11, 3)
    whole = saved(Image.fromarray(rng.integers(0, 20, shape).astype(np.uint8)))
    expected = read(whole, "a.png")
    place = data.draw(st.integers(8, len(whole) - 1))
    flipped = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
        with contextlib.suppress(DamagedAnnotationError):
            np.testing.assert_array_equal(read(damaged, "a.png"), expected)  # a byte of the end mark


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = png(np.zeros((1, 8), np.uint8), 8, GREY)
    header = bomb[:16] + struct.pack(">II", 60000, 60000) + bomb[24:29]
    huge = header + struct.pack(">I", zlib.crc32(header[12:29])) + bomb[33:]
    with pytest.raises(DamagedAnnotationError, match="60000 x 60000 pixels, over the limit"):
        read_indices(huge, "a.png")


def test_colours_as_numbers(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    expected = [[int(r) * 65536 + int(g) * 256 + int(b) for r, g, b in row] for row in pixels]
    assert read_colours(saved(Image.fromarray(pixels)), "a.png").tolist() == expected
    assert show_colour(expected[0][0]) == ",".join(map(str, pixels[0, 0]))
    opaque = Image.fromarray(pixels).convert("RGBA")
    assert read_colours(saved(opaque), "a.png").tolist() == expected
    opaque.putalpha(254)
    with pytest.raises(DamagedAnnotationError, match="partly transparent"):
        read_colours(saved(opaque), "a.png")
    with pytest.raises(ColourAnnotationError, match=r"has no colours \(mode L\)"):
        read_colours(saved(Image.new("L", (2, 2))), "a.png")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8, np.float64])  # MATLAB saves numbers as doubles by default
def test_matlab_files(dtype: type, rng: np.random.Generator) -> None:
    values = rng.integers(0, 200, (4, 6))
    read = read_mat(mat(LabelMap=values.astype(dtype), other="text"), "a.mat")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mat(Labels=np.zeros((2, 2))), "has no variable LabelMap, only Labels"),
        (mat(LabelMap=np.zeros((2, 2, 3))), "not height x width"),
        (mat(LabelMap=np.full((2, 2), 0.5)), "other values than whole numbers"),
        (mat(LabelMap=np.full((2, 2), -1)), "other values than whole numbers"),
        (mat(LabelMap=np.full((2, 2), 65536)), "other values than whole numbers"),
        (mat(LabelMap=np.full((2, 2), np.nan)), "other values than whole numbers"),
        (mat(LabelMap="road"), "LabelMap"),
        (mat(LabelMap=np.zeros((50, 50)))[:-99], "damaged MATLAB file"),
        (b"", "damaged MATLAB file"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400), "version 7.3|damaged"),
    ],
)
def test_matlab_files_that_cannot_be_read(data: bytes, message: str) -> None:
    with pytest.raises(DamagedAnnotationError, match=message):
        read_mat(data, "a.mat")


@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_masks_are_those_that_loops_encoded(mask: Labels) -> None:
    runs = run_lengths(mask)
    for counts in (runs, compressed(runs)):
        np.testing.assert_array_equal(decode_mask({"size": list(mask.shape), "counts": counts}, "m"), mask)


def test_a_mask_as_pycocotools_wrote_it() -> None:
    expected = np.zeros((50, 40), bool)
    expected[3:30, 5:37] = True
    expected[10:12, 6:9] = False
    counts = r"m7k0g0\O[O;e0E[O;e0E[O;e09" + "0" * 54 + "c4"
    np.testing.assert_array_equal(decode_mask({"size": [50, 40], "counts": counts}, "m"), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [2, 2], "counts": [1, 2]}, "do not add up to 2 x 2"),
        ({"size": [2, 2], "counts": [5, -1]}, "do not add up"),
        ({"size": [2, 2], "counts": "04P"}, "no run-length encoded mask"),
        ({"size": [2, 2], "counts": "\u1234"}, "no run-length encoded mask"),
        ({"size": [2, 2], "counts": "o" * 10_000}, "no run-length encoded mask"),
        ({"size": [2, 2]}, "no run-length encoded mask"),
        ({"size": [2], "counts": [4]}, "no run-length encoded mask"),
        ([[0, 0, 1, 1]], "no run-length encoded mask"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "no size of a mask"),
        ({"size": [-2, -2], "counts": [4]}, "no size of a mask"),
    ],
)
def test_damaged_masks_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(DamagedAnnotationError, match=message):
        decode_mask(segmentation, "m")


def test_unknown_values_are_counted_and_long_lists_cut() -> None:
    table = IdTable({0: 0}, "uint8")
    with pytest.raises(UnknownIdsError, match=r"1 \(1 pixels\), .*8 \(1 pixels\) and 11 more") as caught:
        table.apply(np.arange(20).reshape(4, 5), "a.png")
    assert caught.value.values == tuple(range(1, 20))


@given(
    values=hnp.arrays(np.uint32, (3, 4), elements=st.sampled_from([0, 7, 65535, 65536, 1 << 23, (1 << 24) - 1])),
    otherwise=st.sampled_from([None, 4]),
)
def test_tables_of_numbers_of_any_size(values: Labels, otherwise: int | None) -> None:
    ids = {0: 3, 65535: 1, 65536: 2, (1 << 24) - 1: 255}
    table = IdTable(ids, "uint8", otherwise)
    if otherwise is None and any(int(value) not in ids for value in values.flat):
        with pytest.raises(UnknownIdsError):
            table.apply(values, "a.png")
    else:
        expected = [[ids.get(int(value), otherwise) for value in row] for row in values]
        assert table.apply(values, "a.png").tolist() == expected


def test_shrinking_rounds_as_opencv_does() -> None:
    # What cv2.resize(..., interpolation=cv2.INTER_NEAREST) gives, OpenCV 4.11 and 5.0; exact arithmetic: 0, 93, 186.
    assert nearest(np.arange(279)[None], 1, 3).tolist() == [[0, 92, 185]]
    assert nearest(np.arange(1152)[:, None], 51, 1)[[17, 34], 0].tolist() == [383, 767]
    assert shrunk_size(683, 1024, 512) == (512, 768)
    assert shrunk_size(1536, 2048, 512) == (512, 683)
    assert shrunk_size(2048, 1536, 512) == (683, 512)
    assert shrunk_size(512, 4000, 512) == (512, 4000)
