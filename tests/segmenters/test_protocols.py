"""Protocols are the published ones, and each is a valid job for its method."""

from __future__ import annotations

import dataclasses

import pytest

from ovss_ray.errors import SettingError
from ovss_ray.models.sources import tower_shape
from ovss_ray.segmenters import DenseSettings, get_method, load_protocol, load_segmenter, method_names, protocol_names
from ovss_ray.vocabulary import load_vocabulary

# Short side / crop / stride; logit scale; threshold (and area threshold), as the papers' configuration files have them.
PUBLISHED = {
    "sclip": {
        "voc21": "336/224/112; 65; .1 +.1",
        "context60": "336/224/112; 50; .1",
        "coco_object": "336/224/112; 50; .1",
        "voc20": "336/224/112; 40",
        "cityscapes": "560/224/112; 40",
        "context59": "336/224/112; 40",
        "ade20k": "336/224/112; 40",
        "coco_stuff": "448/224/112; 40",
    },
    "naclip": {
        "voc21": "336/0/112; 40; .1",
        "context60": "336/224/112; 40; .1",
        "coco_object": "336/224/112; 40; .1",
        "voc20": "336/0/112; 40",
        "cityscapes": "560/224/112; 40",
        "context59": "336/224/112; 40",
        "ade20k": "336/224/112; 40",
        "coco_stuff": "336/224/112; 40",
    },
    "clearclip": {
        "voc21": "448/448/224; 50; .5",
        "context60": "448/448/224; 50; .15",
        "coco_object": "448/448/224; 50; .4",
        "voc20": "448/448/224; 50",
        "cityscapes": "448/224/224; 50",
        "context59": "448/448/224; 50",
        "ade20k": "448/448/224; 50",
        "coco_stuff": "448/448/224; 50",
    },
    "sc_clip": {
        "voc21": "336/224/112; 50; .15 +.1",
        "context60": "336/224/112; 40; .15",
        "coco_object": "336/224/112; 55; .35",
        "voc20": "336/224/112; 40",
        "cityscapes": "560/224/112; 40",
        "context59": "336/224/112; 40",
        "ade20k": "336/224/112; 40",
        "coco_stuff": "336/224/112; 40",
    },
    "itaclip": {
        "voc21": "336/224/28; 60; .1 +.1",
        "context60": "336/224/28; 55; .1",
        "coco_object": "336/224/28; 50; .1",
        "cityscapes": "560/224/28; 40",
        "coco_stuff": "448/224/28; 40",
    },
    "clip_surgery": {
        "cityscapes": "560/224/112; 40",
        "context59": "336/224/112; 40",
        "coco_stuff": "448/224/112; 40",
    },
    "gem": {"context59": "448/0/112; 100", "ade20k": "448/0/112; 100"},
}
PUBLISHED |= {"clipbase": PUBLISHED["sclip"], "maskclip": PUBLISHED["sclip"], "resclip": PUBLISHED["naclip"]}


@pytest.mark.parametrize("name", protocol_names())
def test_a_protocol_is_a_valid_job_for_its_method(name: str) -> None:
    protocol = load_protocol(name)
    assert name == protocol.name
    assert protocol.name.startswith(f"{protocol.method}/{protocol.benchmark}")
    assert protocol.method in method_names()
    assert protocol.source
    vocabulary = load_vocabulary(protocol.classes, templates=protocol.templates)
    assert vocabulary.name.partition(":")[0] == protocol.benchmark
    settings = get_method(protocol.method).parse_settings(protocol.settings)
    settings = settings.resolve(tower_shape("ViT-B-16-quickgelu"))
    settings.check_vocabulary(vocabulary)
    kept = settings.model_dump(mode="json")
    assert {key: kept[key] for key in protocol.settings} == protocol.settings
    if kept.get("prob_thd") or kept.get("area_thd"):
        assert vocabulary.background == 0, "a threshold needs a class that pixels fall to"


@pytest.mark.parametrize("method", PUBLISHED)
def test_windows_and_thresholds_are_the_published_ones(method: str) -> None:
    own = {name: load_protocol(name) for name in protocol_names() if name.partition("/")[0] == method}
    plain = {protocol.benchmark: protocol for name, protocol in own.items() if ":" not in name}
    written = {benchmark: _written(method, protocol.settings) for benchmark, protocol in plain.items()}
    assert written == PUBLISHED[method]


def _written(method: str, values: dict) -> str:
    settings = get_method(method).parse_settings(values).resolve(tower_shape("ViT-B-16-quickgelu"))
    assert isinstance(settings, DenseSettings)
    text = f"{settings.short_side}/{settings.crop}/{settings.stride}; {settings.logit_scale:g}"
    text += f"; {settings.prob_thd:g}".replace("0.", ".") if settings.prob_thd else ""
    return text + (f" +{settings.area_thd:g}".replace("0.", ".") if settings.area_thd else "")


def test_the_published_numbers_of_a_method_have_their_protocols() -> None:
    numbers = {f"{method}/{benchmark}" for method in method_names() for benchmark in get_method(method).card.published}
    without = numbers - set(protocol_names())
    assert without == {"gem/voc21"}  # its background threshold was not published


def test_vocabularies_and_templates_are_those_of_the_authors() -> None:
    assert load_protocol("clearclip/voc21").classes == "voc21:clearclip"
    assert load_protocol("sclip/voc21").classes == "voc21"
    assert load_protocol("itaclip/coco_stuff").classes == "coco_stuff:itaclip"
    assert len(load_vocabulary("voc21", templates=load_protocol("clip_surgery/context59").templates).templates) == 85
    assert load_vocabulary("voc21", templates=load_protocol("gem/ade20k").templates).templates == ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("benchmark", "renamed"),
    [
        ("voc21", {}),
        (
            "coco_object",
            {
                "motorcycle": "motorbike",
                "airplane": "aeroplane",
                "couch": "sofa",
                "potted plant": "pottedplant",
                "dining table": "diningtable",
                "tv": "tvmonitor",
            },
        ),
        ("coco_stuff", {"potted plant": "pottedplant", "dining table": "diningtable"}),
    ],
)
def test_tagclip_reads_one_name_a_class(benchmark: str, renamed: dict[str, str]) -> None:
    vocabulary = load_vocabulary(load_protocol(f"tagclip/{benchmark}").classes)
    assert {item.name: item.queries for item in vocabulary.classes} == {
        name: (renamed.get(name, name),) for name in vocabulary.names
    }


def test_settings_of_single_methods() -> None:
    resclip = load_protocol("resclip/coco_object").settings
    names = ("temp_thd", "tau_r", "l_r", "tau_s", "l_s", "sigma")
    assert [resclip[name] for name in names] == [0.11, 2.0, 0.4, 1.8, 0.7, 5]
    itaclip = load_protocol("itaclip/context60").settings
    assert (itaclip["alpha"], itaclip["img_eng"]) == (0.15, 0.75)
    assert load_protocol("tagclip/coco_stuff").settings == {"variant": "stuff"}
    gem = load_protocol("gem/context59").settings
    assert (gem["resize"], gem["interpolation"]) == ("square", "bicubic")


def test_a_variant_differs_in_what_its_name_says() -> None:
    plain, refined = load_protocol("naclip/voc21"), load_protocol("naclip/voc21:pamr")
    assert refined.settings == {**plain.settings, "pamr": 10, "pamr_dilations": [8, 16]}
    assert dataclasses.replace(refined, name=plain.name, settings=plain.settings, source=plain.source) == plain


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sclip/voc12", "sclip has voc21, context60, .*; did you mean 'voc21'"),
        ("sklip/voc21", "write method/benchmark with one of .*; did you mean 'sclip'"),
        ("voc21", "there is no protocol 'voc21'; write method/benchmark"),
        ("naclip/voc21:pam", "did you mean 'voc21:pamr'"),
    ],
)
def test_an_unknown_protocol_gets_one_sentence(name: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        load_protocol(name)


def test_what_a_caller_does_to_the_settings_stays_with_the_caller() -> None:
    load_protocol("naclip/voc21:pamr").settings["pamr_dilations"].append(99)
    assert load_protocol("naclip/voc21:pamr").settings["pamr_dilations"] == [8, 16]


def test_a_segmenter_takes_the_settings_of_a_protocol(tiny_clip) -> None:
    segmenter = load_segmenter("sclip", clip=tiny_clip, **load_protocol("sclip/voc21").settings)
    assert isinstance(segmenter.settings, DenseSettings)
    assert (segmenter.settings.logit_scale, segmenter.settings.area_thd) == (65, 0.1)
