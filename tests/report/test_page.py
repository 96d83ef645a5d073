"""The HTML page: self-contained, escaped, complete."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ovss_ray.report.page import (
    Bar,
    Figures,
    Gallery,
    Legend,
    Picture,
    Section,
    Swatch,
    Table,
    Text,
    data_uri,
    paint_labels,
    render_page,
)

VOID = {"meta", "img", "br", "link", "input"}


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects images, links and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, size=(6, 9, 3), dtype=np.uint8)


def test_page_is_one_well_formed_file_that_loads_nothing(picture: np.ndarray) -> None:
    blocks = (
        Figures((("0.71", "mIoU"),)),
        Text("First.\n\nSecond."),
        Table(("class", "IoU"), ((Swatch("star", (255, 0, 0)), Bar(0.25)), ("none", Bar(float("nan"))))),
        Legend((Swatch("snow", (1, 2, 3)),)),
        Gallery(("scene", "labels"), ((Picture(picture, "a scene", note="00000"), Picture(picture, "its labels")),)),
    )
    page = render_page("A title", "A lead.", [Section("Everything", blocks)], footer="The end.")
    outline = Outline(page)
    text = " ".join(outline.text)
    for wanted in (
        "A title",
        "A lead.",
        "Everything",
        "0.71",
        "mIoU",
        "star",
        "25.0",
        "none",
        "snow",
        "00000",
        "The end.",
    ):
        assert wanted in text
    assert outline.tags.count("p") == 3
    assert len(outline.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert "http" not in page
    assert "url(" not in page
    assert not {"script", "link", "iframe"} & set(outline.tags)


def test_text_is_escaped() -> None:
    nasty = "<script>alert('x')</script> & \"quotes\""
    picture = Picture(np.zeros((1, 1, 3), np.uint8), nasty, note=nasty)
    blocks = [Text(nasty), Table((nasty,), ((nasty,),)), Legend((Swatch(nasty, (0, 0, 0)),)), picture]
    outline = Outline(render_page(nasty, nasty, blocks, footer=nasty))
    assert "script" not in outline.tags
    assert " ".join(outline.text).count(nasty) == 9


def test_pictures_survive_embedding(picture: np.ndarray) -> None:
    data = base64.b64decode(data_uri(picture).removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), picture)


def test_bars_stay_inside_their_cell() -> None:
    assert "width:100.0%" in Bar(1.7).html()
    assert "width:0.0%" in Bar(-0.2).html()


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        Table(("a", "b"), (("x",),))


def test_labels_are_painted_class_by_class(rng: np.random.Generator) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    labels = rng.integers(0, 3, size=(4, 5)).astype(np.uint8)
    labels[0, 0] = 255
    painted = paint_labels(labels, colors, unlabelled=(9, 9, 9))
    for (row, column), label in np.ndenumerate(labels):
        assert tuple(painted[row, column]) == ((9, 9, 9) if label == 255 else colors[label])
