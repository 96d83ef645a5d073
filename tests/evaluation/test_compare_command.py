"""`ovss-ray evaluate --compare --page` as a user gives it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from ovss_ray.demo.scenes import CLASSES
from ovss_ray.evaluation.compare import compare_evaluations
from tests.processes import ovss_ray
from tests.scored_demo import ScoredDemo


def evaluate(demo: ScoredDemo, *flags: str) -> subprocess.CompletedProcess[str]:
    truth = ["--ground-truth", str(demo.labels), "--classes", ",".join(CLASSES)]
    return ovss_ray("evaluate", str(demo.folder / "maskclip"), "--engine", "local", *truth, *flags)


def test_runs_are_set_side_by_side_on_the_terminal_in_json_and_on_the_page(
    scored_demo: ScoredDemo, tmp_path: Path
) -> None:
    others = [str(scored_demo.folder / run) for run in ("clipbase", "coarser")]
    page, record = tmp_path / "page.html", tmp_path / "scores.json"
    flags = ["--compare", others[0], "--compare", others[1], "--page", str(page), "--json", str(record)]
    done = evaluate(scored_demo, *flags)
    assert done.returncode == 0, done.stderr
    expected = compare_evaluations(list(scored_demo.evaluations.values()))
    for difference in expected.differences:
        first, second = expected.runs[difference.first].label, expected.runs[difference.second].label
        verdict = "clear" if difference.is_clear else "not clear: other images could turn it around"
        (line,) = [line for line in done.stdout.splitlines() if f"from {first} to {second} " in line]
        assert line.startswith(f"{100 * difference.miou:+.2f} ")
        assert line.endswith(f", {verdict}")
    found = json.loads(record.read_text())
    assert found["comparison"] == json.loads(json.dumps(expected.record()))
    assert found["published"] == []
    assert "Runs side by side" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_and_a_run_given_twice_are_told(scored_demo: ScoredDemo, tmp_path: Path) -> None:
    done = evaluate(scored_demo, "--page", str(tmp_path / "nowhere" / "page.html"))
    assert done.returncode == 3
    assert "page.html cannot be written: No such file or directory; name another file for --page" in done.stderr
    twice = evaluate(scored_demo, "--compare", str(scored_demo.folder / "maskclip"))
    assert twice.returncode == 2
    assert "is given twice" in twice.stderr
