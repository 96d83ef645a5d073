"""What `segment` is given: paths, URIs, bytes, Pillow images and arrays become uint8 RGB arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from ovss_ray.errors import ImageError, SettingError

if TYPE_CHECKING:
    from ovss_ray.images.stores import StorageOptions

Image = NDArray[np.uint8]
OneImage = Image | PillowImage.Image | str | os.PathLike[str] | bytes | IO[bytes]

TAKEN = "give paths, URIs, bytes of image files, Pillow images or uint8 arrays [H, W, 3]"


def as_list(images: object) -> tuple[bool, list[Any]]:
    """Whether it is a single image, and the images as a list; raises `SettingError` for what is neither."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | PillowImage.Image):
        return True, [images]
    if hasattr(images, "read"):  # a file, which is iterable as well: over its lines
        return True, [images]
    if isinstance(images, np.ndarray):
        return images.ndim != 4, [images] if images.ndim != 4 else [*images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping) and not _is_array(images):
        return False, [*images]
    return True, [images]


def read_images(images: Sequence[Any], storage_options: StorageOptions | None) -> list[Image]:
    """Each as uint8 [H, W, 3].

    Raises:
        ImageError: a file cannot be read or decoded.
        SettingError: there is none, or something that is no image.
    """
    if not images:
        raise SettingError(f"segment() needs at least one image; {TAKEN}")
    return [_read(image, f"image {index}", storage_options) for index, image in enumerate(images)]


def _read(image: Any, name: str, storage_options: StorageOptions | None) -> Image:
    from ovss_ray.images.decoding import decode_image, upright_rgb  # the rules of a run, which only this door needs

    if isinstance(image, PillowImage.Image):
        return upright_rgb(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _named(name, lambda: decode_image(bytes(image)))
    if hasattr(image, "read"):
        return _read_open_file(image, name)
    if isinstance(image, str | os.PathLike):
        return _read_file(os.fspath(image), name, storage_options)
    check_array(image, name)
    return cast("Image", image)


def check_array(image: object, name: str) -> None:
    """Raise `SettingError` with what to give instead, unless it is a uint8 array [H, W, 3] with pixels."""
    if not isinstance(image, np.ndarray):
        raise SettingError(f"{name} is {_described(image)}; {_advice(image)}")
    problem = _array_problem(image)
    if problem is not None:
        raise SettingError(f"{name} is {_described(image)}; {problem}")


def _read_file(place: Any, name: str, storage_options: StorageOptions | None) -> Image:
    from ovss_ray.images.decoding import decode_image
    from ovss_ray.images.fetching import Fetcher
    from ovss_ray.images.stores import is_local, local_path

    if not isinstance(place, str):
        place = os.fsdecode(place)
    if not place:
        raise SettingError(f"{name} is an empty path; {TAKEN}")
    uri = local_path(place) if is_local(place) else place
    if is_local(place) and os.path.isdir(uri):  # noqa: PTH112 (a path may have characters that pathlib folds)
        raise SettingError(
            f"{name} is a folder, {place}; give the paths of its images, or label all of them by `ovss-ray label`"
        )
    return _named(place, lambda: decode_image(Fetcher(storage_options).fetch(uri)))


def _read_open_file(file: Any, name: str) -> Image:
    from ovss_ray.images.decoding import decode_image

    data = file.read()
    if not isinstance(data, bytes):
        raise SettingError(f"{name} is a file that is open as text; open it as bytes: open(path, 'rb')")
    return _named(name, lambda: decode_image(data))


def _named(name: str, read: Any) -> Image:
    try:
        return cast("Image", read())
    except ImageError as error:
        raise ImageError(error.status, f"{name}: {error.reason}") from error


def _array_problem(image: NDArray[Any]) -> str | None:
    """What to give instead of an array that cannot be taken; None for one that can."""
    hints = [hint for hint in (_shape_hint(image.shape), _value_hint(image)) if hint is not None]
    if not hints:
        return None if image.size else "it has no pixels"
    return "; ".join(["give uint8 RGB [H, W, 3], 0..255", *(hint for hint in hints if hint)])


def _shape_hint(shape: tuple[int, ...]) -> str | None:
    """None for the right shape; empty where there is nothing to say."""
    if len(shape) == 2:
        return "of a grey image `np.stack([grey] * 3, axis=2)`"
    if len(shape) != 3:
        return ""
    if shape[2] == 3:
        return None
    if shape[2] == 1:
        return "of a grey image `np.repeat(image, 3, axis=2)`"
    if shape[2] == 4:
        return "without an alpha channel: `image[..., :3]`, or a Pillow image, which is laid over white"
    return "of channels that come first `np.moveaxis(image, 0, 2)`" if shape[0] in (1, 3, 4) else ""


def _value_hint(image: NDArray[Any]) -> str | None:
    if image.dtype == np.uint8:
        return None
    if image.size == 0 or not np.issubdtype(image.dtype, np.number) or np.iscomplexobj(image):
        return ""
    if np.issubdtype(image.dtype, np.floating):
        values = image[np.isfinite(image)]
        if values.size and values.min() >= 0 and values.max() <= 1:
            return "of values from 0 to 1 `np.round(255 * image).astype(np.uint8)`"
    else:
        values = image
    return f"its values go from {values.min():.4g} to {values.max():.4g}" if values.size else "it has no finite value"


def _described(image: Any) -> str:
    kind = type(image).__name__
    article = "an" if kind[0].lower() in "aeio" else "a"
    if image is None:
        return "None"
    if _is_array(image):
        shape = "x".join(str(side) for side in tuple(image.shape))
        what = "array" if isinstance(image, np.ndarray) else kind
        article = "an" if what[0].lower() in "aeio" else "a"
        return f"{article} {what} of {str(image.dtype).removeprefix('torch.')}, shape ({shape})"
    return f"{article} {kind}"


def _advice(image: Any) -> str:
    if _is_array(image) and type(image).__module__.startswith("torch"):
        byte = ".byte()" if image.dtype.is_floating_point else ""
        scaled = "(255 * image).round()" if byte else "image"
        turned = ".permute(1, 2, 0)" if image.ndim == 3 and image.shape[0] == 3 != image.shape[2] else ""
        return f"give a NumPy array, uint8 RGB [H, W, 3], 0..255: `{scaled}{byte}{turned}.cpu().numpy()`"
    return TAKEN


def _is_array(image: Any) -> bool:
    return hasattr(image, "shape") and hasattr(image, "dtype")
