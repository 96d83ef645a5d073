"""Class lists as people have them: CSV, TSV and JSON files, quotation marks, one rule for synonyms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ovss_ray.errors import SettingError
from ovss_ray.vocabularies.notation import class_text
from ovss_ray.vocabulary import describe_vocabulary, load_vocabulary

QUERIES = ("cat", "kitten", "tabby", "dog")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.csv", 'id,name,synonyms\n0,cat,"kitten, tabby"\n1,dog,\n'),
        ("v.csv", "\ufeffname;synonyms;note\ncat;kitten|tabby;x\ndog;;y\n"),
        ("v.csv", '"Class","Synonyms"\n"cat","kitten;tabby"\n\n"dog",""\n'),
        ("v.tsv", "name\tsynonyms\ncat\tkitten; tabby\ndog\n"),
        ("v.json", '["cat: kitten, tabby", "dog"]'),
        ("v.json", '{"cat": ["kitten", "tabby"], "dog": null}'),
        ("v.json", '{"cat": "kitten, tabby", "dog": ""}'),
        ("v.json", '[{"id": 0, "name": "cat", "synonyms": "kitten|tabby", "supercategory": "x"}, {"name": "dog"}]'),
        ("v.json", '{"classes": {"cat": ["kitten", "tabby"], "dog": []}}'),
        ("v.yaml", "- {name: cat, synonyms: [kitten, tabby]}\n- {name: dog}\n"),
        ("v.yaml", "- 'cat: kitten; tabby'\n- dog\n"),
        ("v.yaml", "cat: kitten | tabby\ndog:\n"),
        ("v.txt", "cat: kitten, tabby\ndog\n"),
        ("v.txt", "cat, kitten; tabby\n'dog'  # good\n"),
    ],
)
def test_every_form_of_file_gives_the_same_classes(tmp_path: Path, name: str, text: str) -> None:
    vocabulary = load_vocabulary(write(tmp_path, name, text))
    assert vocabulary.names == ("cat", "dog")
    assert vocabulary.queries == QUERIES


@pytest.mark.parametrize(
    "source",
    [
        "cat: kitten; tabby, dog",
        "cat:kitten|tabby,dog",
        "cat: kitten, tabby\ndog",
        '["cat: kitten, tabby", "dog"]',
        '{"cat": ["kitten", "tabby"], "dog": []}',
        ["cat: kitten, tabby", "dog"],
        {"cat": "kitten, tabby", "dog": None},
    ],
)
def test_the_command_line_and_python_follow_the_same_rule(source: Any) -> None:
    assert load_vocabulary(source).queries == QUERIES


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('"hot dog, plain",dog', ("hot dog, plain", "dog")),
        ("'hot dog, plain', dog", ("hot dog, plain", "dog")),
        ('"ratio 4:3",16:9', ("ratio 4:3", "16")),
        ("24\" monitor,potter's wheel", ('24" monitor', "potter's wheel")),
        ('"the ""big"" one",x', ('the "big" one', "x")),
        ('"voc21",', ("voc21",)),
        (["hot dog, plain", '"a: b"'], ("hot dog, plain", "a: b")),
        ({"a: b, c": []}, ("a: b, c",)),
        ("[red],[/b]", ("[red]", "[/b]")),
        ('"hot dog, plain"\n"a #1: b": "x, y"; z  # comment', ("hot dog, plain", "a #1: b")),
    ],
)
def test_quotation_marks_take_a_name_as_it_is(source: Any, names: tuple[str, ...]) -> None:
    assert load_vocabulary(source).names == names


def test_a_cell_of_a_table_is_a_name_whatever_is_in_it(tmp_path: Path) -> None:
    table = write(
        tmp_path, "v.csv", 'name,synonyms,color\n"hot dog, plain",,#ff8000\nratio 4:3,"""a, b"";c","0, 0, 255"\n'
    )
    vocabulary = load_vocabulary(table)
    assert vocabulary.queries == ("hot dog, plain", "ratio 4:3", "a, b", "c")
    assert [item.color for item in vocabulary.classes] == [(255, 128, 0), (0, 0, 255)]


@pytest.mark.parametrize("names", [["hot dog, plain", "dog"], ['a "b" c', "d: e;f|g"], ["#1", "it's"]])
def test_names_are_written_as_they_are_read(names: list[str]) -> None:
    assert load_vocabulary(class_text(names) + ",").names == tuple(names)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.csv", "cat,dog\nowl,bird\n", "v.csv must begin with a line of headings, with a column 'name'"),
        ("v.csv", "", "must begin with a line of headings"),
        ("v.csv", "name\ncat\ncat\n", "v.csv, line 3: the class 'cat' is given twice"),
        ("v.csv", "name\ncat,kitten\n", "v.csv, line 2: there are 2 cells under 1 headings"),
        ("v.csv", 'name\n"cat\n', "v.csv, line 2: unexpected end of data"),
        ("v.csv", "id,name\n1,cat\n2,dog\n", "line 2: the id is 1, but ids run 0, 1, 2, ... in order; it must be 0"),
        ("v.csv", "name,color\ncat,red\n", "line 2: the color must be three numbers"),
        ("v.csv", "name,synonym\ncat,kitten\n", "line 1: there is a column 'synonym'; did you mean 'synonyms'?"),
        ("v.json", '["cat"', "v.json cannot be read as JSON"),
        ("v.json", '{"cat": [], "cat": []}', "'cat' is given twice; remove one"),
        ("v.json", "7", "the classes must be a list of names or a mapping"),
        ("v.json", '[{"name": "cat", "synonym": "a"}]', "unknown field 'synonym'; did you mean 'synonyms'?"),
        ("v.txt", "%PDF-1.4\n", "v.txt is not text but of another kind (PDF)"),
        ("v.txt", "<!doctype html>\n", "v.txt is not text but of another kind (HTML page)"),
        ("v.txt", "cat\0dog", "v.txt is not text, it holds zero bytes"),
        ("v.csv", "PAR1\n", "(Parquet)"),
        ("v.txt", '"cat\n', "line 1: the quotation mark in '\"cat' is not closed"),
        (
            "v.txt",
            '["cat", "dog"]',
            "v.txt holds JSON and would be read as one class a line; let its name end in .json",
        ),
        ("v.txt", "- cat\n- dog\n", "holds YAML"),
        ("v.txt", "id,name\n0,cat\n", "holds a table with headings"),
    ],
)
def test_what_is_no_vocabulary_is_refused_in_one_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SettingError, match="^[^\n]*$") as caught:
        load_vocabulary(str(write(tmp_path, name, text)))
    assert message in str(caught.value)


def test_an_image_a_folder_and_a_missing_file_are_no_vocabularies(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    with pytest.raises(SettingError, match=r"photo\.png is not text but of another kind \(PNG\)"):
        load_vocabulary(str(tmp_path / "photo.png"))
    with pytest.raises(SettingError, match="is a folder; give a file"):
        load_vocabulary(str(tmp_path))
    with pytest.raises(SettingError, match=r"there is no vocabulary file classes\.lst"):
        load_vocabulary("classes.lst")


def test_a_vocabulary_is_described_in_one_line() -> None:
    described = describe_vocabulary(load_vocabulary('cat: kitten,"hot dog, plain",grass', background="grass"))
    assert described == (
        '3 classes (custom): cat, "hot dog, plain", grass; 1 with other queries (cat: cat, kitten); background grass; '
        "80 templates"
    )
    many = describe_vocabulary(load_vocabulary("ade847", templates="single"))
    assert many.startswith("847 classes (ade847): ")
    assert ", ..., " in many
    assert many.endswith("no background; 1 template")
    assert len(many) < 300


def test_yaml_and_json_of_one_content_are_one_vocabulary(tmp_path: Path) -> None:
    content = {"name": "farm", "classes": ["cow", "grass"], "background": "grass", "templates": ["a {}."]}
    from_yaml = load_vocabulary(write(tmp_path, "a.yaml", yaml.safe_dump(content)))
    assert load_vocabulary(write(tmp_path, "b.json", json.dumps(content))) == from_yaml
