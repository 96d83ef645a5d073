"""Label maps as pictures: what is shown where, at any size and with any names."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFont

from ovss_ray.labels import fonts
from ovss_ray.labels.fonts import Writer, printable
from ovss_ray.labels.pictures import draw_labels
from ovss_ray.vocabulary import Vocabulary, VocabularyClass, voc_color

WHITE = (255, 255, 255)


def vocabulary(names: list[str]) -> Vocabulary:
    """Names that no vocabulary file would get through, too."""
    classes = tuple(VocabularyClass(index, name, (name,), voc_color(index + 1)) for index, name in enumerate(names))
    return Vocabulary("test", classes, ("{}",), None)


def halves(height: int, width: int) -> npt.NDArray[np.uint8]:
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    return labels


def legend_box(sheet: Image.Image, picture: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of all that is drawn outside the picture."""
    pixels = np.asarray(sheet).copy()
    pixels[: picture[1], : picture[0]] = 255
    rows, columns = np.nonzero((pixels != 255).any(2))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 2), (40, 60), (255, 10), (420, 640), (1, 900), (3000, 100), (100, 3000), (2500, 2600)]
)
def test_the_legend_stands_clear_of_the_picture_and_within_the_sheet(size: tuple[int, int]) -> None:
    labels = halves(*size)
    sheet = draw_labels(labels, vocabulary(["cat", "a class with a long name, far too long for any legend there is"]))
    factor = max(1, 256 // max(size)) if max(size) < 256 else (4 if min(size) == 1 else 1)
    width, height = factor * size[1], factor * size[0]
    shown = np.asarray(sheet)[:height, :width]
    expected = np.array([(128, 0, 0), (0, 128, 0)], np.uint8)[np.kron(labels, np.ones((factor, factor), np.uint8))]
    np.testing.assert_array_equal(shown, expected)
    left, top, right, bottom = legend_box(sheet, (width, height))
    assert left >= width or top >= height
    assert right < sheet.width - 1
    assert bottom < sheet.height - 1
    assert bottom - top >= 9  # letters that can be read


def test_letters_grow_with_the_picture() -> None:
    def height_of_letters(side: int) -> int:
        sheet = draw_labels(np.zeros((side, side), np.uint8), vocabulary(["dog"]))
        _, top, _, bottom = legend_box(sheet, (side, side))
        return bottom - top

    small, medium, large = (height_of_letters(side) for side in (300, 1200, 4800))
    assert medium >= 2 * small
    assert large >= 3.5 * medium


def test_the_photo_is_seen_through_the_colours_and_alone_where_there_is_no_label(rng: np.random.Generator) -> None:
    labels = halves(300, 400)
    labels[:100] = 255
    photo = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    sheet = draw_labels(labels, vocabulary(["cat", "dog"]), photo)
    shown = np.asarray(sheet)[:300, :400].astype(float)
    np.testing.assert_array_equal(shown[:100], photo[:100])
    expected = 0.55 * np.array([128, 0, 0]) + 0.45 * photo[100:, :200]
    assert np.abs(shown[100:, :200] - expected).max() <= 0.501
    alone = draw_labels(labels, vocabulary(["cat", "dog"]), photo, legend=False)
    np.testing.assert_array_equal(np.asarray(alone), shown)


def test_without_legend_the_picture_has_the_size_of_the_labels() -> None:
    assert draw_labels(halves(3, 5), vocabulary(["cat", "dog"]), legend=False).size == (5, 3)


def test_large_pictures_can_be_reduced() -> None:
    labels = halves(1000, 2000)
    picture = draw_labels(labels, vocabulary(["cat", "dog"]), np.full((1000, 2000, 3), 10, np.uint8), legend=False)
    small = draw_labels(
        labels, vocabulary(["cat", "dog"]), np.full((1000, 2000, 3), 10, np.uint8), legend=False, max_side=100
    )
    assert small.size == (100, 50)
    assert small.getpixel((10, 10)) == picture.getpixel((10, 10))
    assert small.getpixel((90, 10)) == picture.getpixel((1900, 10))
    with pytest.raises(ValueError, match="max_side is 0"):
        draw_labels(labels, vocabulary(["cat", "dog"]), max_side=0)


def test_of_very_many_classes_the_largest_are_listed_in_columns() -> None:
    labels = np.kron(np.arange(225).reshape(15, 15), np.ones((20, 20))).astype(np.uint8)
    labels[:] = np.where(labels < 200, labels, 0)
    sheet = draw_labels(labels, vocabulary([f"class {number}" for number in range(200)]))
    assert max(sheet.size) < 2500
    _, _, right, bottom = legend_box(sheet, (300, 300))
    assert right < sheet.width - 1
    assert bottom < sheet.height - 1


STRANGE = [
    "猫と犬", "🐱👩‍👩‍👧", "кошка", "قطة", "a\nb\tc", "\u202eright to left", "\x1b[31mred", "a\u0301", "\U000f0000",
    "[bold]", "x" * 5000, "\ud800", "",
]  # fmt: skip


def test_any_name_is_drawn() -> None:
    labels = np.repeat(np.arange(len(STRANGE), dtype=np.uint8), 40)[None].repeat(100, 0)
    sheet = draw_labels(labels, vocabulary(STRANGE))
    assert max(sheet.size) < 1500


def test_names_are_one_line_without_control_characters() -> None:
    assert [printable(name) for name in STRANGE[4:7]] == ["a b c", "right to left", "[31mred"]
    assert printable("👩‍👩‍👧️") == "👩👩👧"


def test_long_names_are_cut_to_fit() -> None:
    writer = Writer(20)
    cut = writer.cut("traffic light of the old town", 120)
    assert cut.startswith("traffic")
    assert cut.endswith("…")
    assert writer.width(cut) <= 120 < writer.width(cut[:-1] + "ght…")
    assert writer.cut("cat", 120) == "cat"


def test_a_character_that_the_own_font_lacks_is_taken_from_another() -> None:
    """The own font has no snowman."""
    own = ImageFont.load_default(24)
    assert fonts._has(own, "a")
    assert not fonts._has(own, "\u2603")
    try:
        machine = ImageFont.truetype("DejaVuSans.ttf", 24)
    except OSError:
        pytest.skip("this machine has no DejaVu, whose snowman is drawn")
    fonts._font_for.cache_clear()
    assert fonts._font_for(24, "\u2603").getname() == machine.getname()
    assert fonts._font_for(24, "a").getname() == own.getname()


def test_a_machine_without_fonts_draws_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_CANDIDATES", ("no-such-font.ttf",))
    fonts._font_for.cache_clear()
    sheet = draw_labels(halves(300, 300), vocabulary(["猫と犬", "🐱"]))
    assert legend_box(sheet, (300, 300))
    fonts._font_for.cache_clear()


def test_a_large_picture_needs_no_float_copy_of_it() -> None:
    labels = halves(2000, 3000)
    photo = np.zeros((2000, 3000, 3), np.uint8)
    tracemalloc.start()
    draw_labels(labels, vocabulary(["cat", "dog"]), photo)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * photo.nbytes + (60 << 20)


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the image has shape \(40, 61, 3\), the label map is 40 x 60"):
        draw_labels(halves(40, 60), vocabulary(["cat", "dog"]), np.zeros((40, 61, 3), np.uint8))
