"""Training: the loss, the towers as they are run in training, and a real, short training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from ovss_ray.demo import training
from ovss_ray.demo.crops import CLOSE_UP, NATIVE, Crop, batches, draw_crops
from ovss_ray.demo.scenes import CLASSES
from ovss_ray.demo.towers import encode_captions, encode_pictures
from ovss_ray.demo.training import (
    CaptionWriter,
    Trainer,
    TrainingSettings,
    contrastive_loss,
    create_model,
    placement_loss,
)
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.dense import DenseSegmenter
from ovss_ray.vocabulary import load_vocabulary


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return create_model().eval()


@pytest.fixture(scope="module")
def crops() -> list[Crop]:
    return [crop for seed in range(12) for crop in draw_crops(seed)]


def test_loss_with_one_positive_each_is_clips(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(5, 5)))
    target = torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert contrastive_loss(logits, torch.eye(5, dtype=torch.bool)).item() == pytest.approx(expected.item())


def test_positives_compete_with_negatives_only(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(4, 4))
    positives = np.eye(4, dtype=bool)
    positives[0, 2] = positives[2, 0] = True

    def one_side(scores: np.ndarray, right: np.ndarray) -> float:
        losses = []
        for row, good in zip(scores, right, strict=True):
            negatives = sum(math.exp(s) for s, g in zip(row, good, strict=True) if not g)
            each = [-math.log(math.exp(s) / (math.exp(s) + negatives)) for s, g in zip(row, good, strict=True) if g]
            losses.append(sum(each) / len(each))
        return sum(losses) / len(losses)

    expected = (one_side(logits, positives) + one_side(logits.T, positives.T)) / 2
    assert contrastive_loss(torch.from_numpy(logits), torch.from_numpy(positives)).item() == pytest.approx(expected)


def test_placement_loss_is_its_definition(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(2, 10, 3))
    named = np.array([[True, False, True], [False, True, False]])
    expected = []
    for picture, names in zip(logits, named, strict=True):
        fit = np.exp(picture) / np.exp(picture).sum(axis=1, keepdims=True)
        fitting = -np.mean([math.log(row[names].sum()) for row in fit])
        found = [np.mean(sorted(fit[:, thing])[-3:]) for thing in np.flatnonzero(names)]
        expected.append(fitting - np.mean(np.log(found)))
    loss = placement_loss(torch.from_numpy(logits), torch.from_numpy(named), least_share=0.3)
    assert loss.item() == pytest.approx(np.mean(expected))


def test_placement_loss_prefers_the_right_places() -> None:
    named = torch.tensor([[True, True, False]])
    right = torch.tensor([[[9.0, 0, 0]] * 5 + [[0, 9.0, 0]] * 5])
    absent = torch.tensor([[[9.0, 0, 0]] * 5 + [[0, 0, 9.0]] * 5])
    missing = torch.tensor([[[9.0, 0, 0]] * 10])
    losses = [placement_loss(logits, named, least_share=0.3).item() for logits in (right, absent, missing)]
    assert losses[0] < 0.01
    assert min(losses[1:]) > 1


@torch.no_grad()
def test_native_pictures_are_encoded_as_open_clip_and_maskclip_do(model: Any) -> None:
    pixels = torch.randn(2, 3, NATIVE, NATIVE)
    whole, patches = encode_pictures(model, pixels, 0, 0)
    torch.testing.assert_close(whole, model.encode_image(pixels, normalize=True), atol=1e-5, rtol=0)
    maskclip = load_segmenter("maskclip", clip=model, device="cpu", dtype="float32")
    assert isinstance(maskclip, DenseSegmenter)
    expected = F.normalize(maskclip.patch_embeddings(pixels), dim=-1).flatten(1, 2)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)
    reduced = load_segmenter("maskclip", clip=model, device="cpu", dtype="float32", variant="reduced")
    assert isinstance(reduced, DenseSegmenter)
    _, patches = encode_pictures(model, pixels, 0, 0, reduced=True)
    expected = F.normalize(reduced.patch_embeddings(pixels), dim=-1).flatten(1, 2)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_close_ups_take_their_place_in_the_grid(model: Any) -> None:
    pixels = torch.randn(1, 3, CLOSE_UP, CLOSE_UP)
    corner, middle = (encode_pictures(model, pixels, at, at)[0] for at in (0, 2))
    assert (corner - middle).abs().max() > 1e-4


@torch.no_grad()
def test_captions_are_encoded_as_open_clip_does(model: Any) -> None:
    tokens = open_clip.get_tokenizer("ovss-demo")(["a star", "a photo of a large red circle on snow and sand"])
    assert tokens.shape[1] == model.context_length == 32
    expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encode_captions(model, tokens), expected, atol=1e-5, rtol=0)


def test_captions_count_as_right_where_they_are(crops: list[Crop], rng: np.random.Generator) -> None:
    tokenizer = open_clip.get_tokenizer("ovss-demo")
    writer = CaptionWriter(["{}"], tokenizer, rng)
    names = [{thing.name for thing in crop.things} for crop in crops]
    assert writer.everything(crops).positives.tolist() == [[own == other for other in names] for own in names]
    single = writer.single(crops)
    captions = [tokenizer.decode(row[1 : int(row.argmax())].tolist()).split() for row in single.tokens]
    for row, own in zip(single.positives.tolist(), names, strict=True):
        for right, caption in zip(row, captions, strict=True):
            assert right == any(name in caption for name in own), caption
    assert single.positives.diagonal().all()
    named = [next(name for name in CLASSES if name in caption) for caption in captions]
    assert single.names == tuple(named)


def test_crops_are_what_the_trainer_expects(crops: list[Crop]) -> None:
    assert {crop.image.shape for crop in crops} == {(CLOSE_UP, CLOSE_UP, 3), (NATIVE, NATIVE, 3)}
    assert all(crop.things for crop in crops)
    assert {thing.name for crop in crops for thing in crop.things} == set(CLASSES)


def test_batches_show_every_crop_once_a_round(crops: list[Crop], rng: np.random.Generator) -> None:
    native = [crop for crop in crops if len(crop.image) == NATIVE]
    stream = batches(native, 3, rng)
    shown = [crop for _ in range(len(native) // 3) for crop in next(stream)]
    # Mirroring keeps the sum of a picture.
    assert len({int(crop.image.sum()) for crop in shown}) == len(shown)
    assert {int(crop.image.sum()) for crop in shown} <= {int(crop.image.sum()) for crop in native}


def test_a_short_training_lowers_its_loss(crops: list[Crop], tmp_path: Path) -> None:
    trainer = Trainer(TrainingSettings(warmup_steps=2), crops, tmp_path)
    batch = [crop for crop in crops if len(crop.image) == CLOSE_UP][:24]
    losses = [trainer._step(batch, step, progress=0.0) for step in range(1, 16)]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_the_command_writes_weights_and_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TEST_SEEDS", range(2000, 2001))
    arguments = ["--output", str(tmp_path), "--steps", "2", "--scenes", "16", "--batch-size", "8"]
    training.main(arguments)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 2
    assert record["settings"]["seed"] == 0
    assert record["command"].startswith("python -m ovss_ray.demo.training --output")
    assert set(record["scores"]) == {"maskclip_official", "maskclip_reduced", "clipbase"}
    further = tmp_path / "further"
    training.main([*arguments[:1], str(further), "--start-from", str(tmp_path), *arguments[2:]])
    assert json.loads((further / "training.json").read_text())["started_from"] == record
    model = open_clip.create_model("ovss-demo", pretrained=str(tmp_path / "ovss-demo.safetensors"))
    assert model.visual.grid_size == (12, 12)
    assert (tmp_path / "ovss-demo.safetensors").stat().st_size <= 8_000_000


def test_templates_fit_into_the_context() -> None:
    tokenizer = open_clip.get_tokenizer("ovss-demo")
    prompts = [template.format("triangle") for template in load_vocabulary(["triangle"]).templates]
    assert (tokenizer(prompts)[:, -1] == 0).all()
