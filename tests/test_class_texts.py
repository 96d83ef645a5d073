"""One text for each class, from a mapping or a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ovss_ray.errors import SettingError
from ovss_ray.vocabularies.texts import load_class_texts


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".json", ".JSON"])
def test_a_file_holds_a_text_for_each_class(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"texts{ending}"
    yaml = "cat: >\n  a small\n  animal\nno: 1\n"
    path.write_text(json.dumps({"cat": "a small\n\tanimal", "no": "1"}, indent="\t") if "j" in ending.lower() else yaml)
    for source in (path, str(path), path.as_uri()):
        texts = load_class_texts(source)
        assert texts == {"cat": "a small animal", "no": "1"}
        assert all(type(part) is str for item in texts.items() for part in item)


def test_a_mapping_is_taken_as_it_is() -> None:
    assert load_class_texts({"cat": " a  kitten "}) == {"cat": "a kitten"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- cat\n- dog\n", "must hold 'class name: text' lines"),
        ("", "must hold 'class name: text' lines"),
        ("cat: [a, b]\n", "the text of 'cat' must be a string; put it in quotation marks"),
        ("cat: ' '\n", "the text of 'cat' is empty; write one or remove the line"),
        ("cat: a\ncat: b\n", "line 2, column 1: 'cat' is given twice"),
        ("cat: 'a\n", "cannot be read as YAML"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.yaml"
    path.write_text(content)
    with pytest.raises(SettingError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        load_class_texts(path)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "texts.json"
    broken.write_text("{")
    for source, message in [
        (tmp_path / "text.yaml", "file of class texts .* does not exist"),
        (broken, "texts.json cannot be read as JSON"),
        ("texts.txt", "'texts.txt' is not the name of a .yaml or .json file"),
        (["cat"], "not a list"),
        ({"cat": 1}, "the texts: the text of 'cat' must be a string"),
    ]:
        with pytest.raises(SettingError, match=message):
            load_class_texts(source)  # type: ignore[arg-type]
