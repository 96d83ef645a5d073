"""Vocabularies: every source, every refusal, the shipped lists, and the canonical text."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.errors import SettingError
from ovss_ray.vocabulary import Vocabulary, load_vocabulary, shipped_vocabularies, template_sets, voc_color

EXPECTED_CLASSES = {
    "ade20k": 150,
    "ade847": 847,
    "cityscapes": 19,
    "coco_object": 81,
    "coco_stuff": 171,
    "context459": 459,
    "context59": 59,
    "context60": 60,
    "voc20": 20,
    "voc21": 21,
}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_the_shipped_vocabularies_have_the_classes_of_their_benchmarks() -> None:
    assert {name: load_vocabulary(name).num_classes for name in shipped_vocabularies()} == EXPECTED_CLASSES


def test_voc21_is_queried_by_scene_words_and_falls_back_to_background() -> None:
    voc21 = load_vocabulary("voc21")
    assert voc21.background == 0
    assert len(voc21.classes[0].queries) == 26
    assert voc21.classes[4].queries == ("ship",)  # the name "boat" is not a query
    assert voc21.classes[15].color == (192, 128, 128)
    assert len(voc21.templates) == 80
    assert (voc21.ignore_index, voc21.label_dtype) == (255, "uint8")


def test_a_variant_replaces_synonyms_of_the_classes_it_lists() -> None:
    by_name = load_vocabulary("voc21:clearclip")
    assert by_name == load_vocabulary("voc21", variant="clearclip")
    assert by_name.name == "voc21:clearclip"
    assert by_name.classes[0].queries == ("background",)
    assert by_name.classes[4] == load_vocabulary("voc21").classes[4]


def test_queries_are_flat_and_know_their_class() -> None:
    vocabulary = load_vocabulary({"sky": ["cloud", "blue sky"], "cat": []})
    assert vocabulary.names == ("sky", "cat")
    assert vocabulary.queries == ("sky", "cloud", "blue sky", "cat")
    assert vocabulary.query_class == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("cat,dog,grass", ("cat", "dog", "grass")),
        (" cat ,  traffic   light ", ("cat", "traffic light")),
        ("cat,", ("cat",)),
        ("grass", ("grass",)),
        ("cat\ndog: puppy\n", ("cat", "dog")),
        (["cat", "dog"], ("cat", "dog")),
        (("cat",), ("cat",)),
    ],
)
def test_short_sources(source: str | list[str], names: tuple[str, ...]) -> None:
    assert load_vocabulary(source).names == names


def test_a_text_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "city.txt",
        "# things\n\ncar: automobile, van\ntree, palm  # green\n  road  \nperson: person, people\n",
    )
    vocabulary = load_vocabulary(path)
    assert vocabulary.name == "city"
    assert {item.name: item.queries for item in vocabulary.classes} == {
        "car": ("car", "automobile", "van"),
        "tree": ("tree", "palm"),
        "road": ("road",),
        "person": ("person", "people"),
    }
    assert load_vocabulary(str(path)) == vocabulary
    assert load_vocabulary(path.as_uri()) == vocabulary


def test_a_text_file_saved_by_a_windows_editor(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfcat\r\nd\xc3\xb6ner\r\n")
    assert load_vocabulary(path).names == ("cat", "döner")


@pytest.mark.parametrize(
    ("text", "names", "queries"),
    [
        ("- cat\n- no\n- 7\n", ("cat", "no", "7"), ("cat", "no", "7")),
        ("cat: [kitten]\ndog:\nowl: wren\n", ("cat", "dog", "owl"), ("cat", "kitten", "dog", "owl", "wren")),
        ("- cat: kitten\n- dog: [puppy]\n- owl\n", ("cat", "dog", "owl"), ("cat", "kitten", "dog", "puppy", "owl")),
        ("classes: [cat, dog]\nbackground: dog\ntemplates: single\n", ("cat", "dog"), ("cat", "dog")),
        ("classes:\n- cat: kitten\n- dog\n", ("cat", "dog"), ("cat", "kitten", "dog")),
        ("classes:\n- {name: boat, synonyms: [ship]}\n- {name: cat}\n", ("boat", "cat"), ("ship", "cat")),
    ],
)
def test_yaml_files(tmp_path: Path, text: str, names: tuple[str, ...], queries: tuple[str, ...]) -> None:
    vocabulary = load_vocabulary(write(tmp_path, "mine.yaml", text))
    assert vocabulary.names == names
    assert vocabulary.queries == queries


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"name": "cat", "synonyms": ["kitten"]}\n\n{"name": "dog"}\n'),
        ("a.ndjson", '"cat: kitten"\r\n"dog"\r\n'),
        ("a.jsonl", '{"name": "cat", "synonyms": ["kitten"], "note": "a\u2028b\x85c"}\n"dog"\n'),
        ("a.csv", "sep=;\r\nname;synonyms\r\ncat;kitten\r\ndog;\r\n"),
        ("a.csv", "sep=,\nname,synonyms\ncat,kitten\ndog,\n"),
    ],
)
def test_files_that_other_programs_export(tmp_path: Path, name: str, text: str) -> None:
    vocabulary = load_vocabulary(write(tmp_path, name, text))
    assert [(item.name, item.queries) for item in vocabulary.classes] == [("cat", ("cat", "kitten")), ("dog", ("dog",))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "0: cat, kitten\n1: dog\n2: owl\n"),
        ("a.txt", "2: owl\n0: cat; kitten\n1, dog\n"),
        ("a.json", '{"0": "cat, kitten", "2": "owl", "1": "dog"}'),
        ("a.json", '{"classes": {"0": ["cat", "kitten"], "1": "dog", "2": "owl"}}'),
        ("a.yaml", "0: cat; kitten\n2: owl\n1: dog\n"),
        ("a.yaml", "- 1: dog\n- 0: [cat, kitten]\n- 2: owl\n"),
        ("a.yaml", "classes:\n- '2: owl'\n- 0: [cat, kitten]\n- 1: dog\n"),
    ],
)
def test_where_all_keys_are_ids_the_names_stand_behind_them(tmp_path: Path, name: str, text: str) -> None:
    vocabulary = load_vocabulary(write(tmp_path, name, text))
    assert [(item.name, item.queries) for item in vocabulary.classes] == [
        ("cat", ("cat", "kitten")),
        ("dog", ("dog",)),
        ("owl", ("owl",)),
    ]


def test_keys_sorted_as_strings_are_ids_all_the_same() -> None:
    names = [f"class {index}" for index in range(12)]
    assert load_vocabulary({str(index): names[index] for index in sorted(range(12), key=str)}).names == tuple(names)
    assert load_vocabulary(dict(enumerate(names)), background=11).background == 11


def test_classes_may_be_called_by_numbers() -> None:
    assert load_vocabulary([{"name": "0", "synonyms": "zero"}]).queries == ("0", "zero")
    assert load_vocabulary([{"name": "7", "synonyms": "seven"}, "3: three"]).names == ("7", "3")
    assert load_vocabulary({"2": None, "7": []}).names == load_vocabulary("2,7").names == ("2", "7")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.txt",
            "2: cat\n3: dog\n",
            "line 1: the id of 'cat' is 2, but ids run from 0 to 1 where there are 2 of them",
        ),
        ("a.yaml", "1: cat\n2: dog\n", "line 2: the id of 'dog' is 2, but ids run from 0 to 1"),
        ("a.yaml", "0: cat\n1:\n", "line 2: the id 1 has no name; write '1: name'"),
        ("a.txt", "0: cat\n0: dog\n", "line 2: the id 0 is given twice; remove one"),
    ],
)
def test_other_ids_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SettingError, match="^[^\n]*$") as caught:
        load_vocabulary(write(tmp_path, name, text))
    assert message in str(caught.value)


def test_a_comment_may_follow_a_tab_a_separator_or_a_quotation(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "cat\t# one\ndog: puppy,# two\nC#: 'a # b' # three\n\t# four\n")
    assert [item.queries for item in load_vocabulary(path).classes] == [("cat",), ("dog", "puppy"), ("C#", "a # b")]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("class,class_name\n0,cat\n1,dog\n", ("cat", "dog")),
        ("label,class\n7,cat\n8,dog\n", ("cat", "dog")),
        ("class,name,label\nx,cat,u\ny,dog,v\n", ("cat", "dog")),
        ("label\n2\nB2\n", ("2", "B2")),
    ],
)
def test_the_column_of_names_is_not_that_of_numbers(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    assert load_vocabulary(write(tmp_path, "a.csv", text)).names == names


def test_a_table_with_numbers_for_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"a\.csv: the column 'label' holds numbers only; put the names"):
        load_vocabulary(write(tmp_path, "a.csv", "label,category\n0,cat\n1,dog\n"))


@pytest.mark.parametrize("text", ["x" * 300, "cat: " + "; ".join(f"kitten{index}" for index in range(60))])
def test_a_long_text_is_no_path(text: str) -> None:
    if text.startswith("cat"):
        assert len(load_vocabulary(text).queries) == 61
    else:
        with pytest.raises(SettingError, match="has 300 characters; 200 is the limit"):
            load_vocabulary(text)


def test_a_yaml_file_can_carry_its_own_rules(tmp_path: Path) -> None:
    text = "name: farm\nclasses: [cow, grass]\nbackground: grass\ntemplates: ['a {}.', '{} outside']\n"
    vocabulary = load_vocabulary(write(tmp_path, "v.yaml", text))
    assert (vocabulary.name, vocabulary.background) == ("farm", 1)
    assert vocabulary.templates == ("a {}.", "{} outside")
    overridden = load_vocabulary(write(tmp_path, "v.yaml", text), templates="single", background="cow")
    assert (overridden.templates, overridden.background) == (("a photo of a {}.",), 0)


def test_a_copy_of_a_shipped_file_reads_the_same(tmp_path: Path) -> None:
    import ovss_ray.vocabularies

    text = (Path(ovss_ray.vocabularies.__file__).parent / "cityscapes.yaml").read_text("utf-8")
    assert load_vocabulary(write(tmp_path, "copy.yaml", text)) == load_vocabulary("cityscapes")
    assert load_vocabulary(write(tmp_path, "c.yml", text), variant="corrclip") != load_vocabulary("cityscapes")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "cat\n\ncat\n", "a.txt, line 3: the class 'cat' is given twice (also line 1); remove one"),
        ("a.txt", "cat\nCat\n", "line 2: the class 'Cat' is given twice"),
        ("a.txt", "cat: pet\ndog: pet\n", "line 2: 'pet' is a query of both 'cat' (also line 1) and 'dog'"),
        ("a.txt", "cat: pet, Pet\n", "line 1: the class 'cat' repeats a query"),
        ("a.txt", ": pet\n", "line 1: the class name is empty"),
        ("a.txt", "# nothing\n", "a.txt names no class"),
        ("a.txt", "bus, coach: van\n", "not both"),
        ("a.txt", "x" * 201, "has 201 characters; 200 is the limit"),
        ("a.yaml", "- cat\n- dog\n- cat\n", "a.yaml, line 3: the class 'cat' is given twice (also line 1)"),
        ("a.yaml", "cat: [a]\ncat: [b]\n", "line 2, column 1: 'cat' is given twice"),
        ("a.yaml", "- cat\n- ''\n", "line 2: the class name is empty"),
        ("a.yaml", "classes: [cat\n", "cannot be read as YAML"),
        ("a.yaml", "just text", "must be a list of names or a mapping"),
        ("a.yaml", "", "must be a list of names or a mapping"),
        ("a.yaml", "classes: [a, b]\nbackgruond: a\n", "unknown field 'backgruond'; did you mean 'background'?"),
        ("a.yaml", "classes:\n- {name: a, synonym: [b]}\n", "unknown field 'synonym'; did you mean 'synonyms'?"),
        ("a.yaml", "classes:\n- {id: 1, name: a}\n", "ids run 0, 1, 2, ... in order; it must be 0"),
        ("a.yaml", "classes:\n- {name: a, color: [1, 2, 256]}\n", "line 2: the color must be three numbers"),
        ("a.yaml", "classes: [a]\nbackground: b\n", "the background 'b' is neither a class of"),
        ("a.yaml", "classes: [a]\nbackground: 3\n", "nor an id from 0 to 0"),
        ("a.yaml", "nc: 2\nnames: [cat, dog]\n", "a.yaml, line 2: 'names' would be a class; if classes stand under it"),
        ("a.json", '{"categories": [{"id": 1, "name": "cat"}]}', "'categories' would be a class; if classes stand"),
        ("a.json", '[{"class": "cat"}]', "a.json, class 1: there is no 'name' among its fields (class)"),
        ("a.jsonl", '"cat"\n["dog"\n', "a.jsonl, line 2 cannot be read as JSON"),
        ("a.yaml", "cat: {a: b}\n", "the synonyms must be a list of strings, not"),
        ("a.yaml", "classes: [a]\ntemplates: [x]\n", "the template 'x' must hold '{}' exactly once"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(SettingError) as caught:
        load_vocabulary(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("voc2l", "there is no vocabulary 'voc2l'; did you mean 'voc21'?"),
        ("cityscape", "did you mean 'cityscapes'?"),
        ("voc12:sclip", "did you mean 'voc21'?"),
        ("voc21:clearclipp", "no variant 'clearclipp', only sclip, "),
        ("cat,,dog", "class 2: the class name is empty"),
        ("cat,dog,cat", "class 3: the class 'cat' is given twice (also class 1)"),
        ("   ", "the vocabulary is empty"),
        ([], "names no class"),
        ({}, "names no class"),
        ([3], "3 is not a name"),
        ({"classes": "cat"}, "must be a list of names or a mapping"),
        ("s3x://bucket/a.txt", "cannot be read"),
        ({"cat", "dog"}, "the vocabulary is a set; give text, a path, a list or a mapping"),
        (None, "the vocabulary is a NoneType"),
    ],
)
def test_bad_sources_are_refused(source: object, message: str) -> None:
    with pytest.raises(SettingError, match="^[^\n]*$") as caught:
        load_vocabulary(source)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "classes.txt", "cat")
    with pytest.raises(SettingError, match=r"classe\.txt does not exist; did you mean 'classes\.txt'\?"):
        load_vocabulary(tmp_path / "classe.txt")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match="not UTF-8"):
        load_vocabulary(tmp_path / "a.txt")


def test_variants_belong_to_files_that_have_them(tmp_path: Path) -> None:
    for source in ("cat,dog", ["cat"], write(tmp_path, "a.txt", "cat"), write(tmp_path, "a.yaml", "- cat")):
        with pytest.raises(SettingError, match="variant"):
            load_vocabulary(source, variant="sclip")


def test_vocabularies_come_from_object_storage(s3: str) -> None:
    import fsspec

    with fsspec.open(f"{s3}/v.txt", "w") as stream:
        stream.write("cat\ndog\n")
    assert load_vocabulary(f"{s3}/v.txt").names == ("cat", "dog")


@pytest.mark.parametrize(("background", "expected"), [(None, None), ("dog", 1), (1, 1), ("1", 1), (0, 0)])
def test_the_background_is_a_name_or_an_id(background: str | int | None, expected: int | None) -> None:
    assert load_vocabulary("cat,dog", background=background).background == expected


def test_the_background_can_be_changed_on_a_loaded_vocabulary() -> None:
    loaded = load_vocabulary("cat,dog")
    assert load_vocabulary(loaded) == loaded
    changed = load_vocabulary(loaded, background="dog", templates=["{}"])
    assert (changed.background, changed.templates) == (1, ("{}",))


@pytest.mark.parametrize("background", ["bird", 2, "-1", True, "²"])
def test_a_background_that_does_not_exist(background: str | int) -> None:
    with pytest.raises(SettingError, match="is neither a class of"):
        load_vocabulary("cat,dog", background=background)


def test_template_sets() -> None:
    sizes = {name: len(load_vocabulary("cat,", templates=name).templates) for name in template_sets()}
    assert sizes["imagenet_80"] == 80
    assert sizes["maskclip_85"] == 85
    assert sizes["single"] == sizes["identity"] == 1


def test_own_templates(tmp_path: Path) -> None:
    text = write(tmp_path, "t.txt", "# mine\na {}.\n\n{} there\n")
    listed = write(tmp_path, "t.yaml", "templates: ['a {}.', '{} there']")
    assert load_vocabulary("cat,", templates=text).templates == ("a {}.", "{} there")
    assert load_vocabulary("cat,", templates=str(listed)).templates == ("a {}.", "{} there")
    assert load_vocabulary("cat,", templates="an {}").templates == ("an {}",)
    assert load_vocabulary("cat,", templates='["a {}.", "{} there"]').templates == ("a {}.", "{} there")


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("imagenet_8", "there is no template set 'imagenet_8'"),
        ([], "there is no template"),
        (["a photo"], "must hold '{}' exactly once"),
        ("missing.txt", "does not exist"),
    ],
)
def test_bad_templates(templates: str | list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_vocabulary("cat,", templates=templates)
    assert message in str(caught.value)


def test_many_classes_use_two_bytes() -> None:
    assert (load_vocabulary([f"c{i}" for i in range(255)]).label_dtype) == "uint8"
    large = load_vocabulary([f"c{i}" for i in range(256)])
    assert (large.label_dtype, large.ignore_index) == ("uint16", 65535)
    with pytest.raises(SettingError, match="65535 is the limit"):
        load_vocabulary([f"c{i}" for i in range(65536)])


def test_colours_are_those_of_voc_and_the_background_is_black() -> None:
    vocabulary = load_vocabulary("cat,other,dog", background="other")
    assert [item.color for item in vocabulary.classes] == [(128, 0, 0), (0, 0, 0), (0, 128, 0)]
    assert [voc_color(item.id) for item in load_vocabulary("voc21").classes] == [
        item.color for item in load_vocabulary("voc21").classes
    ]


names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(lambda s: s.strip())


@given(st.lists(names, min_size=1, max_size=6, unique_by=lambda s: " ".join(s.split()).casefold()), st.data())
def test_the_canonical_text_gives_the_vocabulary_back(listed: list[str], data: st.DataObject) -> None:
    background = data.draw(st.none() | st.integers(0, len(listed) - 1))
    vocabulary = load_vocabulary({name: [] for name in listed}, background=background, templates="single")
    text = vocabulary.to_json()
    assert Vocabulary.from_json(text) == vocabulary
    assert Vocabulary.from_json(text).to_json() == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def test_a_text_that_is_no_vocabulary() -> None:
    for text in ("", "{}", '{"classes": [{}]}', "[1]"):
        with pytest.raises(SettingError, match="cannot be read"):
            Vocabulary.from_json(text)


def test_vocabularies_cross_processes() -> None:
    vocabulary = load_vocabulary("voc21")
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    assert type(vocabulary.names[0]) is str


def test_loading_a_vocabulary_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, ovss_ray; from ovss_ray import load_vocabulary; import ovss_ray.segmenters;"
        "load_vocabulary('voc21'); ovss_ray.method_names();"
        "assert not {'torch', 'ray', 'open_clip'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
