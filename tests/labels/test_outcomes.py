"""What became of the images, counted from footers and rows, against SQL over all rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovss_ray.errors import DamagedRunError, ImageError
from ovss_ray.labels import encode_shard, failed_row, outcomes, summarise
from ovss_ray.labels.outcomes import FailureReason
from ovss_ray.labels.reading import open_run
from ovss_ray.labels.reasons import OTHER_REASONS

FATES = (None, None, ("corrupt", "it ends too early"), ("not_found", "there is no such file"), ("corrupt", "no JPEG"))


def write_shard(run: Path, shard: int, fates: list[tuple[str, str] | None]) -> None:
    rows = []
    for position, fate in enumerate(fates):
        image_id, uri = shard * 8 + position, f"{(shard * 37 + position * 11) % 100:02d}.jpg"
        pixels = np.ones((3, 4), np.uint8)
        if fate is None:
            confidence = np.ones((3, 4), np.float32)
            rows.append(summarise(image_id, uri, pixels, confidence, confidence, ignore_index=255))
        else:
            rows.append(failed_row(image_id, uri, ImageError(*fate)))
    statuses = Counter(row.status for row in rows)
    (run / f"shards/{shard:08d}.parquet").write_bytes(encode_shard(rows, {"statuses": json.dumps(statuses)}))


@pytest.fixture
def run(tmp_path: Path, write: Callable[..., Any], rng: np.random.Generator) -> Path:
    """40 images in 5 shards, the last of which has labels for all."""
    place = tmp_path / "run"
    write(str(place), images=40, done=())
    for shard in range(5):
        write_shard(place, shard, [FATES[choice] if shard < 4 else None for choice in rng.integers(0, 5, 8)])
    return place


def test_outcomes_are_those_of_sql_over_all_rows(run: Path) -> None:
    with open_run(run) as opened:
        found = opened.outcomes()
        counted = opened.sql("SELECT status, count(*) FROM images GROUP BY status").fetchall()
        reasons = opened.sql(
            "SELECT status, error, count(*) AS images, min(uri) FROM images WHERE status != 'ok' "
            "GROUP BY status, error ORDER BY images DESC, status, error"
        ).fetchall()
    assert found.statuses == dict(counted)
    assert next(iter(found.statuses)) == "ok"
    assert found.failures == [FailureReason(*row, error=row[1]) for row in reasons]
    assert len(found.failures) == 3


def test_no_row_is_read_where_the_footer_says_that_all_have_labels(run: Path) -> None:
    with open_run(run) as opened:
        before = opened.outcomes()
        whole, all_labelled = run / "shards/00000000.parquet", run / "shards/00000004.parquet"
        for shard in (all_labelled, whole):
            content = bytearray(shard.read_bytes())
            content[4:400] = bytes(396)
            shard.write_bytes(bytes(content))
            if shard == all_labelled:
                assert opened.outcomes() == before
        with pytest.raises(DamagedRunError, match=r"00000000.parquet is damaged .*; remove it and continue the run"):
            opened.outcomes()


def test_reasons_that_differ_in_numbers_and_names_only_are_one_kind_with_an_example(run: Path) -> None:
    for shard in range(5):
        numbers = range(shard * 8, shard * 8 + 8)
        write_shard(run, shard, [("corrupt", f"/data/{number}.jpg broken at byte {number}") for number in numbers])
    with open_run(run) as opened:
        (found,) = opened.outcomes().failures
        ((error,),) = opened.sql("SELECT error FROM images ORDER BY uri LIMIT 1").fetchall()
    assert (found.kind, found.images, found.example) == ("<path> broken at byte N", 40, "00.jpg")
    assert found.error == error


def test_kinds_without_end_are_put_together(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "KINDS_KEPT", 8)
    for shard in range(5):
        words = [chr(97 + shard) + chr(97 + position) for position in range(8)]
        write_shard(run, shard, [("corrupt", f"broken at {word}") for word in words])
    with open_run(run) as opened:
        found = opened.outcomes()
    assert (found.failures[0].kind, found.failures[0].images) == (OTHER_REASONS, 32)
    assert sum(failure.images for failure in found.failures) == found.statuses["corrupt"] == 40
    assert len(found.failures) == 9
