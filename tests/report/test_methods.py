"""The page of methods is what the cards, the recorded scores and the measured costs say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from ovss_ray.demo.scene_scores import score_method
from ovss_ray.demo.scoring import TEST_SEEDS
from ovss_ray.evaluation.scene_scores import read_record, recorded_scores
from ovss_ray.models.sources import resolve_weights
from ovss_ray.report.methods import methods_json, methods_page
from ovss_ray.segmenters import get_method, method_names

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "benchmarks" / "methods.json"


def test_the_page_is_in_step() -> None:
    command = [sys.executable, "-m", "ovss_ray.report.methods", str(COSTS)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert made == page, "make it anew: python -m ovss_ray.report.methods benchmarks/methods.json > docs/methods.md"
    for name in method_names():
        card = get_method(name).card
        assert card.idea in page
        assert all(f" {value:.1f} " in page for value in card.published.values())


def test_every_method_has_been_scored_and_its_cost_measured() -> None:
    assert set(recorded_scores()) == set(method_names())
    assert set(json.loads(COSTS.read_text())["methods"]) == set(method_names())
    record = read_record()
    assert record["weights"] == resolve_weights("demo").digest
    assert record["test_seeds"] == [TEST_SEEDS.start, TEST_SEEDS.stop - 1]


@pytest.mark.parametrize("method", ["clipbase", "naclip"])
def test_recorded_scores_can_be_had_again(method: str) -> None:
    recorded, again = recorded_scores()[method], score_method(method, TEST_SEEDS)
    assert recorded.windows == pytest.approx(again.windows, abs=0.003)
    assert recorded.whole == pytest.approx(again.whole, abs=0.003)


def test_methods_segment_the_scenes_far_better_than_chance() -> None:
    """Twelve classes: the most frequent one alone has an mIoU of about 0.02."""
    for method, score in recorded_scores().items():
        best = max((value for value in asdict(score).values() if value is not None), default=None)
        assert best is None or best > 0.15, method


def test_costs_and_scores_are_in_the_json_and_missing_ones_show_as_a_dash() -> None:
    everything = methods_json()
    assert everything["maskclip"]["scene_miou"] == asdict(recorded_scores()["maskclip"])
    costs = {"clip": "X", "machine": "Y", "threads": 1, "size": [10, 20], "methods": {}}
    assert "| `maskclip` | windows | 72.1 | - | - | - | - |" in methods_page(costs)
