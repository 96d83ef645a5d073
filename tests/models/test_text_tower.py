"""Encoding queries against open_clip's own text path, and refusing what would be cut off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from ovss_ray.errors import SettingError
from ovss_ray.models.text import TextTower, check_query_lengths
from ovss_ray.vocabulary import load_vocabulary
from tests import tiny_models

EMBEDDINGS = Path(__file__).parents[2] / "../shared/data/clip_text_embeddings"
QUERIES = ("cat", "a very long name of a thing that is hard to describe!", "dog, puppy", "traffic light", "!")
TEMPLATES = ("a photo of a {}.", "{}", "art of the {}.")


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return tiny_models.build()


@torch.inference_mode()
def test_queries_are_encoded_as_the_papers_do(model: open_clip.CLIP) -> None:
    tokenizer = open_clip.SimpleTokenizer()
    got = TextTower(model, tokenizer, "tiny").encode(QUERIES, TEMPLATES)
    for row, query in enumerate(QUERIES):
        texts = tokenizer([template.format(query) for template in TEMPLATES])
        each = model.encode_text(texts, normalize=True)
        torch.testing.assert_close(got[row], F.normalize(each.mean(0), dim=-1), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_query_does_not_depend_on_its_neighbours(model: open_clip.CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    import ovss_ray.models.text as module

    tower = TextTower(model, open_clip.SimpleTokenizer(), "tiny")
    whole = tower.encode(QUERIES, TEMPLATES)
    monkeypatch.setattr(module, "_TEXTS_PER_PASS", 4)
    monkeypatch.setattr(module, "_QUERIES_PER_CHUNK", 2)
    torch.testing.assert_close(tower.encode(QUERIES, TEMPLATES), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(tower.encode(QUERIES[2:3], TEMPLATES), whole[2:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("words", [5, 74, 75, 76, 90])
def test_a_query_is_refused_exactly_when_the_tokenizer_would_cut_it(words: int) -> None:
    vocabulary = load_vocabulary([{"name": "short", "synonyms": [" ".join(["x"] * words)]}], templates=["{}"])
    if len(open_clip.get_tokenizer("ViT-B-16").encode(vocabulary.queries[-1])) + 2 <= 77:
        check_query_lengths(vocabulary, "ViT-B-16")
        return
    message = r"of class 'short' in the template '\{\}' has \d+ tokens, and ViT-B-16 reads 77"
    with pytest.raises(SettingError, match=message):
        check_query_lengths(vocabulary, "ViT-B-16")


def test_the_template_counts_too() -> None:
    query = " ".join(["owl"] * 30)
    check_query_lengths(load_vocabulary([query], templates=["{}"]), "ovss-demo")
    with pytest.raises(SettingError, match="has 36 tokens, and ovss-demo reads 32; shorten it"):
        check_query_lengths(load_vocabulary([query], templates=["a photo of a {}"]), "ovss-demo")


@pytest.mark.parametrize("name", ["voc21", "ade847", "context459", "coco_object"])
def test_the_shipped_vocabularies_fit(name: str) -> None:
    check_query_lengths(load_vocabulary(name), "ViT-B-16")


@pytest.mark.skipif(not EMBEDDINGS.is_dir(), reason="the published embeddings are not here")
def test_published_embeddings_are_unit_rows_of_the_names_in_order() -> None:
    rows = np.load(EMBEDDINGS / "vitb16_voc20_single.npy").astype(np.float32)
    labels = json.loads((EMBEDDINGS / "labels.json").read_text())
    assert rows.shape == (20, 512)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=2e-3)
    assert any(len(value) == 20 for value in labels.values())
