"""The demo: draw scenes, label them, score the labels, show everything on one page; needs no download."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ovss_ray.demo.scenes import CLASSES, write_scenes
from ovss_ray.errors import SettingError
from ovss_ray.evaluation.confusion import ConfusionMatrix
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.report.page import (
    Bar,
    Figures,
    Gallery,
    Legend,
    Picture,
    Section,
    Swatch,
    Table,
    paint_labels,
    render_page,
)
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ovss_ray.run.progress import Reporter

SHOWN_SCENES = 12
_RECORD = "scenes.json"
_COLORS = {
    "circle": (228, 61, 64),
    "square": (246, 148, 30),
    "triangle": (255, 215, 0),
    "star": (138, 43, 226),
    "cross": (255, 105, 180),
    "heart": (40, 40, 48),
    "grass": (84, 158, 57),
    "water": (31, 119, 180),
    "sand": (222, 203, 150),
    "brick": (160, 72, 52),
    "wood": (120, 84, 60),
    "snow": (214, 232, 244),
}


@dataclass(frozen=True)
class Tour:
    """What the demo produced.

    Attributes:
        images: folder of the scenes.
        run: run directory of the labelling job.
        page: the HTML page.
        miou: mean intersection over union, 0..1, over the classes of `CLASSES`.
        class_iou: intersection over union per class, 0..1; NaN where a class occurs nowhere.
        pixel_accuracy: share of pixels labelled right, 0..1.
    """

    images: Path
    run: Path
    page: Path
    miou: float
    class_iou: dict[str, float]
    pixel_accuracy: float


@dataclass(frozen=True)
class _LabelledScene:
    """One scene as it comes out of the run."""

    name: str
    image: npt.NDArray[np.uint8]
    prediction: npt.NDArray[Any]
    truth: npt.NDArray[np.uint8]

    @property
    def accuracy(self) -> float:
        return float((self.prediction == self.truth).mean())


def take_tour(
    folder: str | Path, *, scenes: int = 48, seed: int = 0, engine: str = "ray", reporter: Reporter | None = None
) -> Tour:
    """Draw scenes into a folder, label them with the shipped model, score the labels and write a page.

    Doing it again in the same folder continues where it was stopped.

    Args:
        folder: where scenes, run and page go; created if missing.
        scenes: how many scenes.
        seed: seed of the first; the others count up.
        engine: "ray" or "local".
        reporter: shows the progress of the labelling; silent by default.

    Raises:
        SettingError: the folder holds a demo with other scenes.
        OvssError: labelling failed.
    """
    from ovss_ray.run.driver import run_job

    folder = Path(folder)
    _draw(folder, scenes, seed)
    images, run, page = folder / "images", folder / "run", folder / "index.html"
    spec = JobSpec.build(
        {"input": str(images), "run": str(run), "classes": _classes(), "method": "maskclip", "clip": "demo",
         "engine": engine},
        source="demo",
    )  # fmt: skip
    run_job(spec, reporter=reporter)
    with open_run(run) as labelled:
        matrix, shown = _score(labelled, folder)
        page.write_text(_page(labelled, matrix, shown), encoding="utf-8")
    return Tour(
        images=images,
        run=run,
        page=page,
        miou=matrix.miou,
        class_iou=dict(zip(CLASSES, matrix.class_iou.tolist(), strict=True)),
        pixel_accuracy=matrix.pixel_accuracy,
    )


def _classes() -> dict[str, Any]:
    entries = [{"id": index, "name": name, "color": list(_COLORS[name])} for index, name in enumerate(CLASSES)]
    return {"name": "demo", "classes": entries}


def _draw(folder: Path, scenes: int, seed: int) -> None:
    wanted = {"scenes": scenes, "seed": seed}
    record = folder / _RECORD
    if record.exists():
        present = json.loads(record.read_text())
        if present != wanted:
            raise SettingError(
                f"{folder} holds a demo of {present['scenes']} scenes with seed {present['seed']}; "
                "ask for the same, give another folder, or remove it"
            )
        return
    try:
        write_scenes(folder, scenes, seed)
    except ValueError as error:
        raise SettingError(f"seed = {seed}: {error}") from None
    record.write_text(json.dumps(wanted) + "\n")


def _score(run: Run, folder: Path) -> tuple[ConfusionMatrix, list[_LabelledScene]]:
    matrix = ConfusionMatrix(len(CLASSES), run.vocabulary.ignore_index)
    shown: list[_LabelledScene] = []
    table = run.images(["image_id", "uri"])
    for image_id, uri in zip(table["image_id"].to_pylist(), table["uri"].to_pylist(), strict=True):
        name = Path(uri).stem
        prediction = run.label_map(image_id)
        truth = np.asarray(Image.open(folder / "labels" / f"{name}.png"))
        matrix.update(prediction, truth)
        if len(shown) < SHOWN_SCENES:
            with Image.open(folder / "images" / f"{name}.jpg") as picture:
                shown.append(_LabelledScene(name, np.asarray(picture), prediction, truth))
    return matrix, shown


def _page(run: Run, matrix: ConfusionMatrix, shown: list[_LabelledScene]) -> str:
    swatches = {entry.name: Swatch(entry.name, entry.color) for entry in run.vocabulary.classes}
    share = matrix.counts.sum(axis=1) / matrix.counts.sum()
    rows = tuple(
        (swatches[name], Bar(float(iou)), f"{100 * part:.1f} %")
        for name, iou, part in zip(CLASSES, matrix.class_iou, share, strict=True)
    )
    figures = (
        (f"{100 * matrix.miou:.1f} %", f"mIoU over {len(CLASSES)} classes"),
        (f"{100 * matrix.pixel_accuracy:.1f} %", "of all pixels right"),
        (str(run.num_images), "scenes labelled"),
    )
    pictures = tuple(_pictures(scene, run.vocabulary) for scene in shown)
    gallery = Gallery(("scene", "labels", "ground truth"), pictures)
    return render_page(
        "Pixels labelled by name",
        "A tiny CLIP that learnt from pictures and captions alone labels every pixel of scenes that it has never "
        "seen. The classes were given as words; no label map was used in training.",
        [
            Figures(figures),
            Section("Scenes", (Legend(tuple(swatches.values())), gallery)),
            Section("Intersection over union", (Table(("class", "IoU in percent", "share of pixels"), rows),)),
        ],
        footer=f"ovss-ray {run.job['method']} on CLIP {run.job['clip']}; run {run.fingerprint[:12]}.",
    )


def _pictures(scene: _LabelledScene, vocabulary: Vocabulary) -> tuple[Picture, Picture, Picture]:
    colors = [entry.color for entry in vocabulary.classes]
    return (
        Picture(scene.image, f"scene {scene.name}", note=scene.name),
        Picture(
            paint_labels(scene.prediction, colors),
            f"labels of scene {scene.name}",
            note=f"{100 * scene.accuracy:.0f} % right",
        ),
        Picture(paint_labels(scene.truth, colors), f"ground truth of scene {scene.name}"),
    )
