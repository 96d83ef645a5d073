"""Label-map codecs: round trips, what other tools read, and damaged bytes."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ovss_ray.errors import OvssError, SettingError
from ovss_ray.labels import (
    CODECS,
    decode_confidence_map,
    decode_label_map,
    encode_confidence_map,
    encode_label_map,
)

DTYPES = (np.uint8, np.uint16)
LABEL_MAPS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))
)


@pytest.mark.parametrize("codec", CODECS)
@given(labels=LABEL_MAPS)
def test_a_label_map_comes_back_as_it_was(codec: str, labels: npt.NDArray[np.uint8]) -> None:
    decoded = decode_label_map(encode_label_map(labels, codec), *labels.shape, labels.dtype)
    assert decoded.dtype == labels.dtype
    np.testing.assert_array_equal(decoded, labels)


@given(labels=LABEL_MAPS)
def test_pillow_sees_one_grey_channel_with_the_class_ids(labels: npt.NDArray[np.uint8]) -> None:
    image = Image.open(io.BytesIO(encode_label_map(labels)))
    assert image.getbands() == ("L",) if labels.dtype == np.uint8 else image.mode in ("I;16", "I")
    np.testing.assert_array_equal(np.asarray(image), labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_png_that_another_tool_wrote_is_read(dtype: npt.DTypeLike, rng: np.random.Generator) -> None:
    labels = rng.integers(0, np.iinfo(dtype).max, (37, 53)).astype(dtype)
    written = io.BytesIO()
    Image.fromarray(labels).save(written, "png")
    np.testing.assert_array_equal(decode_label_map(written.getvalue(), 37, 53, dtype), labels)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_encoded_by_value(codec: str, dtype: npt.DTypeLike) -> None:
    labels = np.arange(600, dtype=dtype).reshape(20, 30)
    expected = encode_label_map(np.ascontiguousarray(labels[::2, ::-3]), codec)
    assert encode_label_map(labels[::2, ::-3], codec) == expected


@pytest.mark.parametrize("codec", CODECS)
def test_a_decoded_map_can_be_written_to(codec: str) -> None:
    decoded = decode_label_map(encode_label_map(np.zeros((2, 3), np.uint8), codec), 2, 3, np.uint8)
    decoded[0, 0] = 7
    assert decoded[0, 0] == 7


def test_a_map_beyond_pillows_pixel_limit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    labels = np.ones((50, 50), np.uint8)
    np.testing.assert_array_equal(decode_label_map(encode_label_map(labels), 50, 50, np.uint8), labels)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((0, 4), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), np.float32),
        np.zeros((2, 2), ">u2"),
    ],
)
def test_only_label_maps_are_encoded(wrong: npt.NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        encode_label_map(wrong)  # type: ignore[arg-type]


def test_an_unknown_codec_is_named_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match="'webp' is not one of png, zstd"):
        encode_label_map(np.zeros((2, 2), np.uint8), "webp")


@given(data=st.data())
def test_a_flipped_byte_of_a_png_never_changes_a_pixel_unnoticed(data: st.DataObject) -> None:
    labels = np.add.outer(np.arange(19), np.arange(23)).astype(np.uint8) // 5
    encoded = bytearray(encode_label_map(labels))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_label_map(bytes(encoded), 19, 23, np.uint8)
    except OvssError:
        return
    assert position >= len(encoded) - 12, "only the end marker holds no pixels and no header"
    np.testing.assert_array_equal(decoded, labels)


@pytest.mark.parametrize(("codec", "end_marker"), [("png", 12), ("zstd", 0)])
@given(data=st.data())
def test_a_truncated_map_is_noticed(codec: str, end_marker: int, data: st.DataObject) -> None:
    encoded = encode_label_map(np.add.outer(np.arange(19), np.arange(23)).astype(np.uint8), codec)
    length = data.draw(st.integers(0, len(encoded) - 1 - end_marker))
    with pytest.raises(OvssError):
        decode_label_map(encoded[:length], 19, 23, np.uint8)


@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_give_a_clear_error(data: bytes) -> None:
    for magic in (b"", b"\x89PNG\r\n\x1a\n", b"\x28\xb5\x2f\xfd"):
        with pytest.raises(OvssError, match="label map"):
            decode_label_map(magic + data, 4, 4, np.uint8)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("height", "width", "dtype"), [(5, 5, "uint8"), (4, 4, "uint8"), (4, 5, "uint16")])
def test_a_map_of_another_size_is_refused(codec: str, height: int, width: int, dtype: str) -> None:
    encoded = encode_label_map(np.ones((4, 5), np.uint8), codec)
    with pytest.raises(OvssError, match=f"{height} x {width} {dtype}"):
        decode_label_map(encoded, height, width, dtype)


PROBABILITIES = st.sampled_from((np.float16, np.float32, np.float64)).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(0, 1, width=np.dtype(dtype).itemsize * 8),  # type: ignore[arg-type]
    )
)


@pytest.mark.parametrize("codec", CODECS)
@given(confidence=PROBABILITIES)
def test_a_confidence_map_comes_back_as_rounded_255ths(codec: str, confidence: npt.NDArray[np.float32]) -> None:
    data = encode_confidence_map(confidence, codec)
    decoded = decode_confidence_map(data, *confidence.shape)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded - 255 * confidence.astype(np.float64)).max() <= 0.5 + 1e-4
    if codec == "png":
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), decoded)  # as any tool reads it


def test_what_is_no_probability_is_stored_as_the_nearest_one() -> None:
    strange = np.array([[np.nan, -1, 2, np.inf, -np.inf, 1.0000001]], np.float32)
    for codec in CODECS:
        decoded = decode_confidence_map(encode_confidence_map(strange, codec), 1, 6)
        assert decoded.tolist() == [[0, 0, 255, 255, 0, 255]]


@pytest.mark.parametrize("wrong", [np.zeros((0, 4), np.float32), np.zeros(5, np.float32), np.zeros((2, 2), np.uint8)])
def test_only_maps_of_floats_are_confidence_maps(wrong: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match=r"non-empty \[H, W\] array of floats"):
        encode_confidence_map(wrong)


def test_a_damaged_confidence_map_is_called_so() -> None:
    data = encode_confidence_map(np.full((4, 5), 0.5, np.float32))
    for damaged, size in ((data[:30], (4, 5)), (b"what", (4, 5)), (data, (5, 4))):
        with pytest.raises(OvssError, match="a confidence map"):
            decode_confidence_map(damaged, *size)
