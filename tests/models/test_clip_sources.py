"""What a CLIP model may be called, and what happens when it is called wrongly."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ovss_ray.errors import WeightsError
from ovss_ray.models.sources import parse_clip, resolve_weights


@pytest.mark.parametrize(
    ("clip", "name"),
    [
        ("ViT-B-16-quickgelu/openai", "ViT-B-16-quickgelu/openai"),
        ("ViT-B/16", "ViT-B-16-quickgelu/openai"),
        ("ViT-B/32", "ViT-B-32-quickgelu/openai"),
        ("ViT-L/14", "ViT-L-14-quickgelu/openai"),
        ("ViT-L/14-336", "ViT-L-14-336-quickgelu/openai"),
        ("ViT-B/16/laion2b_s34b_b88k", "ViT-B-16/laion2b_s34b_b88k"),
        ("ViT-B-16/random", "ViT-B-16/random:0"),
        ("ViT-B-16/random:7", "ViT-B-16/random:7"),
        ("ovss-demo/random", "ovss-demo/random:0"),
        ("ViT-B-32-quickgelu/metaclip-fullcc", "ViT-B-32-quickgelu/metaclip-fullcc"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "roberta-ViT-B-32/laion2b_s12b_b32k"),
    ],
)
def test_names_of_models(clip: str, name: str) -> None:
    assert parse_clip(clip).name == name
    assert parse_clip(name).name == name


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("ViT-B-16/openai", "were trained with QuickGELU, but ViT-B-16 has plain GELU"),
        ("ViT-B-16/openai", "use the architecture 'ViT-B-16-quickgelu'"),
        ("ViT-L-14-336/openai", "use the architecture 'ViT-L-14-336-quickgelu'"),
        ("ViT-B-16-quickgelu/laion2b_s34b_b88k", "trained with plain GELU, but ViT-B-16-quickgelu has QuickGELU"),
        ("ViT-B-16-quickgelu/opanai", "has no weights 'opanai', only "),
        ("ViT-B-16-quickgelu/opanai", "did you mean 'openai'?"),
        ("ViT-B-61/openai", "no architecture 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        ("ViT-B/15", "no CLIP model 'ViT-B/15'; did you mean 'ViT-B/16'?"),
        ("ViT-B-16", "'ViT-B-16' names no weights; write 'ViT-B-16/tag' (known tags: openai, "),
        ("ViT-B-16/", "names no weights"),
        ("ViT-B-16/random:x", "the seed of random weights must be a whole number"),
        ("", "no architecture ''"),
        ("RN50-quickgelu/openai", "RN50-quickgelu cannot be used: its vision tower is a ResNet"),
        ("ViT-B-16-SigLIP/webli", "its vision tower is the timm model vit_base_patch16_siglip_224"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "its vision tower pools by attention"),
        ("ViT-L-14-CLIPA/datacomp1b", "does not read the image off a class token; dense methods need a CLIP vision"),
    ],
)
def test_wrong_names_are_refused_with_the_right_one(clip: str, message: str) -> None:
    with pytest.raises(WeightsError, match="^[^\n]*$") as caught:
        parse_clip(clip)
    assert message in str(caught.value)


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"anything")
    for spelling in (f"ViT-B-16//{path}", f"ViT-B-16/{path}"):
        info = resolve_weights(spelling)
        assert info.digest == hashlib.sha256(b"anything").hexdigest()
        assert (info.architecture, info.path) == ("ViT-B-16", str(path.resolve()))
    path.write_bytes(b"something else")
    assert resolve_weights(f"ViT-B-16//{path}").digest == hashlib.sha256(b"something else").hexdigest()


def test_random_weights_are_identified_by_their_seed() -> None:
    info = resolve_weights("ViT-B-16/random:3")
    assert (info.digest, info.path) == ("random:3", None)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "clip_b16.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"clip_b61\.pt does not exist; did you mean 'clip_b16\.pt'\?"):
        resolve_weights(f"ViT-B-16//{tmp_path}/clip_b61.pt")
