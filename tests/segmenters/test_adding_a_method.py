"""The example of docs/adding_a_method.md runs, and is the method that it claims to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovss_ray.segmenters import DenseSegmenter, load_segmenter
from tests.reference import explicit_last_block, self_weights

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"


def example(clip: torch.nn.Module) -> DenseSegmenter:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "ovss_ray.segmenters.sclip"}
    exec(compile(code, str(PAGE), "exec"), names)
    method: type[DenseSegmenter] = names["SCLIP"]
    return method.load(clip=clip, device="cpu", dtype="float32")


@torch.inference_mode()
def test_the_example_is_correlative_self_attention(tiny_clip: torch.nn.Module) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = explicit_last_block(
        tiny_clip, pixels, lambda q, k: self_weights(q) + self_weights(k), residual=True, mlp=True
    )
    torch.testing.assert_close(example(tiny_clip).patch_embeddings(pixels), expected, atol=1e-4, rtol=1e-3)


def test_the_example_labels_as_the_method_of_the_package_does(tiny_clip: torch.nn.Module, images) -> None:
    shipped = load_segmenter("sclip", clip=tiny_clip, device="cpu", dtype="float32")
    results = example(tiny_clip).segment(images[:3], "cat,dog,grass")
    for result, expected in zip(results, shipped.segment(images[:3], "cat,dog,grass"), strict=True):
        assert np.array_equal(result.labels, expected.labels)
        assert np.array_equal(result.confidence, expected.confidence)


def test_the_page_names_what_there_is(tiny_clip: torch.nn.Module) -> None:
    page = PAGE.read_text("utf-8")
    segmenter = example(tiny_clip)
    for attribute in re.findall(r"`tower\.(\w+)", page):
        assert hasattr(segmenter.tower, attribute), attribute
    for setting in ("resize", "interpolation", "crop", "logit_scale", "pad"):
        assert f"`{setting}" in page
        assert setting in type(segmenter.settings).model_fields
    root = PAGE.parents[1]
    for file in re.findall(r"`(\w+\.py)`", page):
        assert (root / "ovss_ray" / "segmenters" / file).exists(), file
    for path in re.findall(r"`((?:ovss_ray|tests)/[\w/.]+)`", page):
        assert (root / path).exists(), path
