"""How candidates are written, named, drawn and told apart."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml

from ovss_ray.choose.candidates import Candidate, SettledCandidate, draw_candidates, parse_candidates, setting_text
from ovss_ray.errors import SettingError
from ovss_ray.segmenters import get_method, method_names


def test_methods_and_settings_are_read() -> None:
    found = parse_candidates(
        ["sclip, naclip:sigma=3:crop=0", "maskclip:variant=reduced,itaclip:views=[original, blur]"]
    )
    assert found == [
        Candidate("sclip", {}),
        Candidate("naclip", {"sigma": 3, "crop": 0}),
        Candidate("maskclip", {"variant": "reduced"}),
        Candidate("itaclip", {"views": ["original", "blur"]}),
    ]


def test_a_method_of_ones_own_has_a_colon() -> None:
    assert parse_candidates(["my.module:Mine:sigma=3,my.module:Mine"]) == [
        Candidate("my.module:Mine", {"sigma": 3}),
        Candidate("my.module:Mine", {}),
    ]


@pytest.mark.parametrize("text", ["", " , ", "sigma=3", ":sigma=3"])
def test_what_names_no_method_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="--methods"):
        parse_candidates([text])


@pytest.mark.parametrize("value", [3, 0.25, None, True, "reduced", "yes", "3", ["a", "b"], {"cat": "a, b"}])
def test_a_name_reads_back_and_so_does_a_setting(value: Any) -> None:
    candidate = Candidate("naclip", {"sigma": value})
    assert parse_candidates([candidate.name]) == [candidate]
    assert yaml.safe_load(shlex.split(shlex.quote(setting_text(value)))[0]) == value


GRIDS = {"naclip": {"sigma": (1.0, 2.0, 3.0), "crop": (None, 0)}, "sclip": {"crop": (None, 0)}, "odd": {}}


def test_drawn_candidates_come_from_the_grids_and_keep_what_was_written() -> None:
    bases = [Candidate("naclip", {"sigma": 9.0}), Candidate("sclip", {}), Candidate("odd", {})]
    drawn = draw_candidates(bases, GRIDS, 4, seed=1)
    assert len(drawn) == len({candidate.name for candidate in drawn}) == 4
    for candidate in drawn:
        assert candidate.settings["crop"] in (None, 0)
        assert candidate.settings.get("sigma", 9.0) == 9.0
    assert {candidate.method for candidate in drawn} == {"naclip", "sclip"}


def test_more_draws_begin_with_the_same() -> None:
    bases = [Candidate("naclip", {})]
    assert draw_candidates(bases, GRIDS, 5, seed=7)[:2] == draw_candidates(bases, GRIDS, 2, seed=7)
    assert {one.name for one in draw_candidates(bases, GRIDS, 99, seed=0)} == {
        f"naclip:sigma={sigma}:crop={crop}" for sigma in ("1.0", "2.0", "3.0") for crop in ("null", "0")
    }


def test_nothing_to_search_is_said() -> None:
    with pytest.raises(SettingError, match="odd declare no settings to search"):
        draw_candidates([Candidate("odd", {})], GRIDS, 3, seed=0)


@pytest.mark.parametrize("method", method_names())
def test_every_declared_value_is_valid(method: str) -> None:
    """One at a time; `get_method` knows nothing of models."""
    cls = get_method(method)
    for name, values in cls.Settings.SEARCH.items():
        assert len(set(values)) == len(values) > 1
        for value in values:
            assert getattr(cls.parse_settings({name: value}), name) == value


def test_keys_tell_labels_apart_and_nothing_else() -> None:
    one = SettledCandidate.of(Candidate("sclip", {}), {"a": 1}, {"a": 1})
    assert one.key == SettledCandidate.of(Candidate("sclip", {"b": 2}), {"a": 1, "b": 2}, {"a": 1}).key
    assert one.key != SettledCandidate.of(Candidate("naclip", {}), {"a": 1}, {"a": 1}).key
    assert one.key != SettledCandidate.of(Candidate("sclip", {}), {"a": 2}, {"a": 2}).key
    assert SettledCandidate.of(Candidate("my.module:Mine", {}), {}, {}).key.startswith("my_module_Mine-")
