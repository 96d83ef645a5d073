"""What is kept of an evaluation, against sums over dense matrices."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import DamagedRunError, OvssError
from ovss_ray.evaluation.boundary import boundary_counts
from ovss_ray.evaluation.confusion import ConfusionMatrix, confusion_counts
from ovss_ray.evaluation.table import ProblemImage, ScoredImage, decode_table, encode_table, gather
from ovss_ray.labels import load_schema
from tests.evaluation.tiny_runs import disturb, draw_labels

CLASSES = 6


@dataclasses.dataclass(frozen=True)
class Dense:
    """Images with their dense counts."""

    rows: list[ScoredImage]
    confusion: dict[int, np.ndarray]
    boundary: dict[int, np.ndarray]


@pytest.fixture
def dense(rng: np.random.Generator) -> Dense:
    rows, confusion, boundary = [], {}, {}
    for image_id in range(12):
        name = f"n{image_id}"
        if image_id % 5 == 3:
            rows.append(ScoredImage(image_id, f"{name}.jpg", name, "no_labels", "corrupt"))
            continue
        truth = draw_labels(rng, CLASSES)
        predicted = disturb(truth, rng, CLASSES)
        counts = confusion_counts(predicted, truth, CLASSES)
        outlines = boundary_counts(predicted, truth, CLASSES)
        cells = [(t, p, counts[t, p]) for t in range(CLASSES) for p in range(CLASSES + 1) if counts[t, p]]
        lines = [(c, *outlines[c]) for c in range(CLASSES) if outlines[c].any()]
        rows.append(ScoredImage(image_id, f"{name}.jpg", name, cells=np.array(cells), boundary=np.array(lines)))
        confusion[image_id], boundary[image_id] = counts, outlines
    return Dense(rows, confusion, boundary)


def tables(rows: list[ScoredImage], size: int = 5) -> list[tuple[int, pa.Table]]:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [(shard, decode_table(encode_table(part, {}), "t")) for shard, part in enumerate(parts)]


def test_a_file_has_the_columns_of_its_contract_and_says_what_it_is(dense: Dense) -> None:
    data = encode_table(dense.rows, {"shard_id": "7"})
    table = decode_table(data, "t.parquet")
    assert table.schema.equals(load_schema("evaluation"))
    assert table.schema.metadata[b"ovss_ray:shard_id"] == b"7"
    assert [field.name for field in dataclasses.fields(ScoredImage)] == table.column_names
    assert [field.name for field in dataclasses.fields(ProblemImage)] == table.column_names[:5]
    for row, stored in zip(dense.rows, table.to_pylist(), strict=True):
        assert stored["uri"] == row.uri
        if row.cells is None:
            assert stored["cells"] is stored["boundary"] is None
            assert stored["detail"] == "corrupt"
        else:
            assert [list(cell.values()) for cell in stored["cells"]] == row.cells.tolist()
            assert [list(line.values()) for line in stored["boundary"]] == row.boundary.tolist()


def test_a_damaged_or_foreign_file_is_refused(dense: Dense) -> None:
    data = encode_table(dense.rows, {})
    with pytest.raises(DamagedRunError, match="RUN/evaluation/x is damaged .*; remove it and evaluate again"):
        decode_table(data[:-20], "RUN/evaluation/x")
    flipped = bytearray(data)
    flipped[len(data) // 6] ^= 0xFF
    with pytest.raises(DamagedRunError, match="x is damaged"):
        decode_table(bytes(flipped), "x")
    other = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(OvssError, match="x is not written by ovss-ray, where an evaluation table is expected"):
        decode_table(other.getvalue(), "x")


def test_tables_add_up_to_the_sums_over_all_images(dense: Dense) -> None:
    scores = gather(tables(dense.rows), CLASSES)
    ids = sorted(dense.confusion)
    assert scores.image_ids.tolist() == ids
    assert scores.names == tuple(f"n{image_id}" for image_id in ids)
    assert scores.uris == tuple(f"n{image_id}.jpg" for image_id in ids)
    np.testing.assert_array_equal(scores.confusion().counts, sum(dense.confusion.values()))
    np.testing.assert_array_equal(scores.boundary(), sum(dense.boundary.values()))
    counts = scores.counts()
    for row, image_id in enumerate(ids):
        cells = dense.confusion[image_id]
        np.testing.assert_array_equal(counts.hits.toarray()[row], np.diagonal(cells))
        np.testing.assert_array_equal(counts.predicted.toarray()[row], cells[:, :CLASSES].sum(axis=0))
        np.testing.assert_array_equal(counts.true.toarray()[row], cells.sum(axis=1))


def test_rows_that_do_not_count_are_left_out(dense: Dense) -> None:
    scores = gather(tables(dense.rows), CLASSES, {0: {1, 3}, 2: {11}})
    left = [image_id for image_id in sorted(dense.confusion) if image_id not in (1, 11)]
    assert scores.image_ids.tolist() == left
    np.testing.assert_array_equal(scores.confusion().counts, sum(dense.confusion[image_id] for image_id in left))
    (problem,) = scores.problems()
    assert (problem.status, problem.images, problem.examples[0].image_id) == ("no_labels", 1, 8)


def test_the_first_image_of_a_name_counts_and_others_are_told(dense: Dense) -> None:
    twin = dataclasses.replace(dense.rows[2], image_id=90, uri="other/n2.jpg")
    scores = gather(tables([*dense.rows, twin]), CLASSES)
    assert scores.image_ids.tolist() == sorted(dense.confusion)
    np.testing.assert_array_equal(scores.confusion().counts, sum(dense.confusion.values()))
    repeated = scores.problems()[-1]
    assert (repeated.status, repeated.images) == ("repeated_name", 1)
    assert repeated.examples == (ProblemImage(90, "other/n2.jpg", "n2", "repeated_name", None),)


def test_outlines_are_unknown_unless_all_tables_have_them(dense: Dense) -> None:
    without = [dataclasses.replace(row, boundary=None) for row in dense.rows]
    assert gather(tables(without), CLASSES).boundary() is None
    assert (
        gather(tables([*dense.rows, dataclasses.replace(without[0], name="x", image_id=99)]), CLASSES).boundary()
        is None
    )


def test_worst_and_best_images_of_a_class_are_those_by_its_own_matrix(dense: Dense) -> None:
    scores = gather(tables(dense.rows), CLASSES)
    for class_id in range(CLASSES):
        iou = {
            image_id: value
            for image_id, counts in dense.confusion.items()
            if not np.isnan(value := ConfusionMatrix(CLASSES, counts=counts).class_iou[class_id])
        }
        assert len(iou) > 3
        # Of equal ones the image comes first where more pixels are true or labelled as the class.
        covered = {
            i: (c[class_id].sum() + c[:, class_id].sum() - c[class_id, class_id]) for i, c in dense.confusion.items()
        }
        assert scores.worst(class_id, 3) == tuple(sorted(iou, key=lambda i: (iou[i], -covered[i], i))[:3])
        assert scores.best(class_id, 100) == tuple(sorted(iou, key=lambda i: (-iou[i], -covered[i], i)))


def test_no_image_at_all_is_no_accident() -> None:
    scores = gather([], 3)
    assert (len(scores.image_ids), scores.problems(), scores.best(0, 5)) == (0, (), ())
    assert scores.confusion().counts.sum() == 0


def test_problems_are_counted_by_reason_with_the_first_of_each() -> None:
    rows = [
        ScoredImage(i, f"{i}.jpg", str(i), "size_mismatch" if i % 2 else "not_in_split", f"why {i}") for i in range(9)
    ]
    problems = gather(tables(rows), 2).problems()
    assert [(problem.status, problem.images) for problem in problems] == [("not_in_split", 5), ("size_mismatch", 4)]
    assert [example.image_id for example in problems[1].examples] == [1, 3, 5]
    assert problems[1].examples[0].detail == "why 1"
