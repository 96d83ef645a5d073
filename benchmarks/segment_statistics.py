"""Time per label map: class statistics against SciPy's labelling class by class, and the label-map codecs.

    OMP_NUM_THREADS=1 python benchmarks/segment_statistics.py

Compare the columns of one run with each other, not runs with each other. Needs SciPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ovss_ray.labels import CODECS, decode_label_map, encode_label_map, segment_statistics

LabelMap = npt.NDArray[np.uint8]


def draw_map(rng: np.random.Generator, height: int, width: int, noise_px: float) -> LabelMap:
    """Voronoi cells with borders warped by smooth noise (as segmenters draw them) and by `noise_px` per pixel."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for axis in (y, x):
        axis += ndimage.gaussian_filter(rng.normal(size=(height, width)), 12) * 200
        axis += rng.normal(size=(height, width)) * noise_px
    best = np.full((height, width), np.inf, np.float32)
    labels = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(5, 31))):
        distance = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2
        closer = distance < best
        best[closer] = distance[closer]
        labels[closer] = rng.integers(0, 150)
    return labels


def label_with_scipy(labels: LabelMap) -> list[int]:
    """The components alone, the way that is usual: one labelling per class."""
    return [ndimage.label(labels == class_id, np.ones((3, 3)))[1] for class_id in np.unique(labels)]


def best_ms(work: Callable[[], object], repeats: int = 7) -> float:
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return min(durations) * 1e3


def measure(name: str, maps: list[LabelMap]) -> str:
    """One line of the table; the time of a map is the best of several, the line shows the median over maps."""
    rows = []
    for labels in maps:
        confidence = np.random.default_rng(0).random(labels.shape, np.float32)
        row = [
            best_ms(lambda m=labels, c=confidence: segment_statistics(m, c, c, 255)),
            best_ms(lambda m=labels: label_with_scipy(m)),
        ]
        for codec in CODECS:
            data = encode_label_map(labels, codec)
            row += [
                len(data) / 1e3,
                best_ms(lambda m=labels, codec=codec: encode_label_map(m, codec)),
                best_ms(lambda m=labels, data=data: decode_label_map(data, *m.shape, m.dtype)),
            ]
        rows.append(row)
    statistics, scipy, *codecs = np.median(rows, axis=0)
    cells = [f"{statistics:6.2f}", f"{scipy:7.1f}", f"{scipy / statistics:5.1f}x", *(f"{cell:7.2f}" for cell in codecs)]
    return f"{name:20}" + " ".join(cells)


def main() -> None:
    rng = np.random.default_rng(0)
    board = (np.indices((512, 512)).sum(0) % 2).astype(np.uint8)
    cases = {
        "512x512 smooth": [draw_map(rng, 512, 512, 0.0) for _ in range(6)],
        "512x512 noisy": [draw_map(rng, 512, 512, 1.5) for _ in range(6)],
        "1024x2048 smooth": [draw_map(rng, 1024, 2048, 0.0) for _ in range(2)],
        "512x512 checkerboard": [board],
    }
    codecs = " ".join(f"{codec + ' kB':>7} {'enc ms':>7} {'dec ms':>7}" for codec in CODECS)
    print(f"{'label map':20}{'ms':>6} {'scipy':>7} {'ratio':>6} {codecs}")
    for name, maps in cases.items():
        print(measure(name, maps))


if __name__ == "__main__":
    main()
