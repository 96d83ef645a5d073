"""The published numbers hold together, and the cards of the methods say the same."""

from __future__ import annotations

import math

import pytest

from ovss_ray.evaluation.published import PublishedScore, backbone_of, published_for, published_methods
from ovss_ray.segmenters import get_method, method_names
from ovss_ray.vocabulary import shipped_vocabularies

MIXED_COLUMNS = {"voc", "context"}
OTHERS = {"coco_stuff10k"}


def test_every_number_is_a_percentage_of_a_known_benchmark_with_a_source() -> None:
    known = set(shipped_vocabularies()) | MIXED_COLUMNS | OTHERS
    scores = published_for()
    assert len(scores) > 500
    for score in scores:
        assert 0 < score.miou < 100
        assert math.isclose(score.miou, round(score.miou, 2))
        assert score.benchmark in known, score
        assert score.method
        assert score.source


def test_no_number_is_printed_twice() -> None:
    scores = published_for()
    assert len(set(scores)) == len(scores)


def test_every_name_of_a_method_is_printed_somewhere_and_belongs_to_one_method() -> None:
    printed = {score.method for score in published_for()}
    names = [name for names in published_methods().values() for name in names]
    assert set(names) <= printed
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", [name for name in method_names() if get_method(name).card.published])
def test_cards_say_what_the_table_says_that_they_name(method: str) -> None:
    card = get_method(method).card
    assert card.published_model == "OpenAI CLIP ViT-B/16"
    assert card.published_source.endswith("the survey of training-free methods, table 1")
    rows = [
        score
        for score in published_for(method=method, backbone="CLIP ViT-B/16")
        if score.source.startswith("A Survey on Training-free") and score.source.endswith("table 1")
    ]
    assert dict(card.published) == {score.benchmark: score.miou for score in rows}
    assert len(rows) == len(card.published)
    for score in rows:
        origin = score.quoted_from.partition(" (")[0]
        assert card.published_source.startswith(origin or "the paper")


def test_methods_without_published_numbers_have_no_card_numbers_either() -> None:
    without = {name for name in method_names() if not published_for(method=name)}
    assert without == {name for name in method_names() if not get_method(name).card.published}


def test_a_method_is_found_under_all_its_names_and_narrowed_down() -> None:
    def found(**wanted: str) -> list[tuple[str, str, float]]:
        return [(score.label, score.backbone, score.miou) for score in published_for(**wanted)]

    assert found(method="naclip", benchmark="voc21") == [
        ("NACLIP", "CLIP ViT-B/16", 58.9),
        ("NACLIP + PAMR", "CLIP ViT-L/14", 57.9),
        ("NACLIP, PAMR, 10 steps, dilations 8 and 16", "CLIP ViT-B/16", 64.07),
    ]
    assert found(method="naclip", benchmark="voc21", backbone="CLIP ViT-L/14") == [
        ("NACLIP + PAMR", "CLIP ViT-L/14", 57.9)
    ]
    assert found(method="NACLIP + PAMR", benchmark="context59") == [("NACLIP + PAMR", "CLIP ViT-L/14", 36.4)]
    assert found(method="convclip") == found(benchmark="my folder") == []


def test_remarks_say_what_qualifies_a_number() -> None:
    (tagclip,) = published_for(method="tagclip", benchmark="coco_stuff")
    assert tagclip.remarks == "quoted from the ITACLIP paper (reproduction)"
    (sed,) = published_for(method="SED (reproduction)", benchmark="ade847")
    assert (sed.miou, sed.remarks) == (11.0, "trained on COCO-Stuff with label maps")
    notes = [score.note for score in published_for(method="reco", benchmark="context59") if score.note]
    assert notes == [
        "the survey's table 1 has 19.9 under Context-60 and 22.3 under Context-59; "
        "where the survey has another number, trust the survey"
    ]
    plain = PublishedScore("A", "B", "voc21", 1.0, "a paper")
    assert (plain.label, plain.remarks) == ("A", "")


@pytest.mark.parametrize(
    ("clip", "backbone"),
    [
        ("ViT-B-16/openai", "CLIP ViT-B/16"),
        ("ViT-B-16-quickgelu/openai", "CLIP ViT-B/16"),
        ("ViT-L-14-336-quickgelu/openai", "CLIP ViT-L/14"),
        ("ViT-B-16-quickgelu/metaclip_fullcc", "MetaCLIP ViT-B/16"),
        ("ViT-H-14/laion2b_s32b_b79k", "CLIP ViT-H/14"),
        ("ViT-B-16/laion2b_s34b_b88k", None),
        ("ViT-B-16//weights.pt", None),
        ("RN50/openai", None),
        ("demo", None),
    ],
)
def test_backbones_have_the_names_of_the_tables(clip: str, backbone: str | None) -> None:
    assert backbone_of(clip) == backbone
    assert backbone is None or published_for(backbone=backbone)
