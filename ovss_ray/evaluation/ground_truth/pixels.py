"""The values in annotation files: PNG, TIFF and MATLAB files as arrays of integers, never as colours by accident."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
from PIL import ImageFile, PngImagePlugin, TiffImagePlugin

from ovss_ray.evaluation.ground_truth.errors import ColourAnnotationError, DamagedAnnotationError
from ovss_ray.evaluation.ground_truth.ids import Values

MAX_PIXELS = 100_000_000
"""Larger label maps are refused by their header, before memory is taken for them."""

_PNG, _TIFF = (b"\x89PNG\r\n\x1a\n",), (b"II*\0", b"MM\0*")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_ASK_FOR_A_MAP = (
    "it is a colour image, and a label map has one number per pixel; say which colour is which class in an id map "
    "('128,64,128: road')"
)

Decoder = Callable[[bytes, str], Values]


def read_indices(data: bytes, where: str) -> Values:
    """The numbers in a single-channel PNG or TIFF.

    A palette is not applied: its indices are the numbers. Grey of 1, 2 and 4 bits is taken as stored, not stretched.

    Args:
        data: the whole file.
        where: its place, for messages.

    Returns:
        [H, W] uint8 or uint16.

    Raises:
        ColourAnnotationError: a colour image.
        DamagedAnnotationError: any other file, damage, or more than `MAX_PIXELS`.
    """
    return _decoded(data, where, _indices)


def read_colours(data: bytes, where: str) -> Values:
    """The colours of an RGB PNG or TIFF as [H, W] numbers, red * 65536 + green * 256 + blue.

    Palettes are applied. Arguments and errors as for `read_indices`; `ColourAnnotationError` if the image is grey.
    """
    rgb = _decoded(data, where, _rgb).astype(np.uint32)
    colours: Values = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    return colours


def read_mat(data: bytes, where: str) -> Values:
    """The variable `LabelMap` of a MATLAB file (version 5 or 7): [H, W] uint16; errors as for `read_indices`."""
    try:
        shapes = {name: shape for name, shape, _ in scipy.io.whosmat(io.BytesIO(data))}
        if "LabelMap" not in shapes:
            raise DamagedAnnotationError(f"{where} has no variable LabelMap, only {', '.join(shapes) or 'none'}")
        if len(shapes["LabelMap"]) != 2:
            raise DamagedAnnotationError(f"{where}: LabelMap has the shape {shapes['LabelMap']}, not height x width")
        height, width = shapes["LabelMap"]
        _check_size(height, width, where)
        values = scipy.io.loadmat(io.BytesIO(data), variable_names=["LabelMap"])["LabelMap"]
    except DamagedAnnotationError:
        raise
    except NotImplementedError as error:
        raise DamagedAnnotationError(f"{where} is a MATLAB file of version 7.3; save it with -v7") from error
    except Exception as error:  # damaged bytes raise anything in the reader
        raise _damaged(where, "MATLAB file", error) from error
    whole = np.asarray(values)
    if whole.dtype.kind not in "uif" or whole.size == 0 or not _fits(whole):
        raise DamagedAnnotationError(f"{where}: LabelMap holds other values than whole numbers from 0 to 65535")
    return whole.astype(np.uint16)


def show_colour(colour: int) -> str:
    """A number of `read_colours` as "red,green,blue"."""
    return f"{colour >> 16},{colour >> 8 & 255},{colour & 255}"


def _fits(values: npt.NDArray[Any]) -> bool:
    return bool((values >= 0).all() and (values <= 65535).all() and (values == np.floor(values)).all())


def _decoded(data: bytes, where: str, convert: Callable[[ImageFile.ImageFile, str], npt.NDArray[Any]]) -> Values:
    # The plugins themselves: Image.open tries all that there are, and its guard against huge images is a global.
    plugin: type[ImageFile.ImageFile]
    if data.startswith(_PNG):
        kind, plugin = "PNG", PngImagePlugin.PngImageFile
    elif data.startswith(_TIFF):
        kind, plugin = "TIFF", TiffImagePlugin.TiffImageFile
    else:
        raise DamagedAnnotationError(
            f"{where} is neither PNG nor TIFF: it begins with {data[:8].hex(' ') or 'nothing'}"
        )
    try:
        if kind == "PNG":
            plugin(io.BytesIO(data)).verify()  # the checksums, which loading does not look at
        with plugin(io.BytesIO(data)) as image:
            _check_size(image.height, image.width, where)
            return convert(image, where)
    except DamagedAnnotationError:
        raise
    except Exception as error:  # hostile bytes raise anything in Pillow
        raise _damaged(where, kind, error) from error


def _indices(image: ImageFile.ImageFile, where: str) -> Values:
    if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        raise ColourAnnotationError(f"{where} cannot be read as a label map: {_ASK_FOR_A_MAP}")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise DamagedAnnotationError(
            f"{where} is an image of mode {image.mode}, not one number of 8 or 16 bits per pixel"
        )
    depth = _stored_bits(image, where)
    values = np.array(image)
    if image.mode == "L" and depth in (2, 4):
        values //= 255 // (2**depth - 1)  # Pillow stretches them to 0..255
    if image.mode == "I" and not _fits(values):
        raise DamagedAnnotationError(f"{where} holds values outside 0..65535")
    return values.astype(np.uint8 if image.mode in ("1", "L", "P") else np.uint16, copy=False)


def _stored_bits(image: ImageFile.ImageFile, where: str) -> int:
    """Bits of a grey value as the file has it."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
        if bits not in ((8,), (16,)) or image.tag_v2.get(_PHOTOMETRIC) == 0:
            raise DamagedAnnotationError(
                f"{where} is a TIFF of {bits[0]} bits, or one where 0 is white; save it as PNG"
            )
        return int(bits[0])
    raw_mode = str(image.tile[0][3])  # "L;4": grey of 4 bits
    return int(raw_mode.partition(";")[2]) if raw_mode in ("L;2", "L;4") else 8


def _rgb(image: ImageFile.ImageFile, where: str) -> npt.NDArray[np.uint8]:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ColourAnnotationError(
            f"{where} has no colours (mode {image.mode}), and the id map is one of colours; map its numbers instead"
        )
    if any(";16" in str(tile[3]) for tile in image.tile):
        raise DamagedAnnotationError(f"{where} has 16 bits per colour; save it with 8")
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise DamagedAnnotationError(f"{where} is partly transparent; save it without an alpha channel")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(height: int, width: int, where: str) -> None:
    if height * width > MAX_PIXELS:
        raise DamagedAnnotationError(f"{where} has {width} x {height} pixels, over the limit of {MAX_PIXELS}")


def _damaged(where: str, kind: str, error: Exception) -> DamagedAnnotationError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DamagedAnnotationError(f"{where} is a damaged {kind}: {reason}; get the file again")
