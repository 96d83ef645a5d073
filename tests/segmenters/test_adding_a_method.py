"""The example of docs/adding_a_method.md runs, and is the method that it claims to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ovss_ray.segmenters import DenseSegmenter
from tests.reference import entering_last_block

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"


def example() -> type[DenseSegmenter]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "ovss_ray.segmenters.sclip"}
    exec(compile(code, str(PAGE), "exec"), names)
    method: type[DenseSegmenter] = names["SCLIP"]
    return method


@torch.inference_mode()
def test_the_example_is_correlative_self_attention(tiny_clip: torch.nn.Module) -> None:
    segmenter = example().load(clip=tiny_clip, device="cpu", dtype="float32")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    visual: Any = tiny_clip.visual
    x = entering_last_block(tiny_clip, pixels)
    block = visual.transformer.resblocks[-1]
    projected = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    q, k, v = projected.view(2, 65, 3, 3, 16).permute(2, 0, 3, 1, 4)
    weights = (q @ q.mT / 4).softmax(-1) + (k @ k.mT / 4).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 3, 65), 2.0))
    x = x + block.attn.out_proj((weights @ v).transpose(1, 2).reshape(2, 65, 48))
    x = x + block.mlp(block.ln_2(x))
    expected = (visual.ln_post(x) @ visual.proj)[:, 1:].view(2, 8, 8, 24)
    torch.testing.assert_close(segmenter.patch_embeddings(pixels), expected, atol=1e-4, rtol=1e-3)


def test_the_example_segments(tiny_clip: torch.nn.Module, vocabulary, images) -> None:
    segmenter = example().load(clip=tiny_clip, device="cpu", dtype="float32")
    (result,) = segmenter.segment(images[:1], segmenter.encode_vocabulary(vocabulary))
    assert result.labels.shape == (64, 64)
