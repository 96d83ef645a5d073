"""Data sets as their archives lay them out, with tiny label files in the real formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
from PIL import Image

Labels = npt.NDArray[Any]


def save_indexed(path: Path, labels: Labels) -> None:
    """A PNG with a palette of other colours than the indices, as VOC has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8), "L").convert("L")
    indexed = Image.frombytes("P", image.size, image.tobytes())
    indexed.putpalette([(37 * value + 11 * channel) % 256 for value in range(256) for channel in range(3)])
    indexed.save(path)


def save_grey(path: Path, labels: Labels) -> None:
    """A single-channel PNG or TIFF of 8 or 16 bits, as the array has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def save_rgb(path: Path, pixels: Labels) -> None:
    save_grey(path, pixels.astype(np.uint8))


def save_mat(path: Path, labels: Labels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"LabelMap": labels.astype(np.uint16)}, do_compression=True)


def save_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def object_class_image(classes: Labels, rng: np.random.Generator) -> Labels:
    """The colours of a `_seg.png` of ADE20K: red and green tell the class, the rest of red and blue are others'."""
    red = classes // 256 * 10 + rng.integers(0, 10, classes.shape)
    blue = rng.integers(0, 256, classes.shape)
    return np.stack([red, classes % 256, blue], axis=-1).astype(np.uint8)


def run_lengths(mask: Labels) -> list[int]:
    """Uncompressed run lengths of a mask, column by column, pixel by pixel."""
    runs, current = [0], False
    for column in mask.T:
        for pixel in column:
            if bool(pixel) != current:
                runs.append(0)
                current = bool(pixel)
            runs[-1] += 1
    return runs


def compressed(runs: list[int]) -> str:
    """COCO's text of run lengths, digit by digit."""
    text = ""
    for index, run in enumerate(runs):
        number = run - runs[index - 2] if index > 2 else run
        while True:
            digit, number = number & 31, number >> 5
            done = number == (-1 if digit & 16 else 0)
            text += chr(48 + (digit if done else digit | 32))
            if done:
                break
    return text


def save_merged(path: Path, images: Mapping[str, tuple[tuple[int, int], list[tuple[int, Labels]]]]) -> None:
    """`trainval_merged.json`: image id -> size and painted masks; every second mask is compressed."""
    listed, masks = [], []
    for number, (name, ((height, width), painted)) in enumerate(images.items()):
        image_id = int(name.replace("_", ""))
        listed.append(
            {"image_id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width, "phase": "val"}
        )
        for category, mask in painted:
            runs = run_lengths(mask)
            counts: Any = compressed(runs) if (len(masks) + number) % 2 else runs
            segmentation = {"size": list(mask.shape), "counts": counts}
            masks.append(
                {"id": len(masks), "image_id": image_id, "category_id": category, "segmentation": segmentation}
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": listed, "annos_segmentation": masks, "categories": []}))
