"""Grad-CAM of the last block against autograd through open_clip's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from ovss_ray.models.clip import load_clip
from ovss_ray.models.tail import VisionTail
from tests import tiny_models


def reference(model, entering: torch.Tensor, text: torch.Tensor, classes: int, scale: float) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Hooks on the first LayerNorm of the last block, one backward pass per class."""
    visual = copy.deepcopy(model).visual
    block = visual.transformer.resblocks[-1]
    seen: list[torch.Tensor] = []
    block.ln_1.register_forward_hook(lambda *call: seen.append(call[2].retain_grad() or call[2]))
    maps = []
    for index in range(classes):
        out = visual.ln_post(block(entering[None].clone().requires_grad_()))
        pooled = sum(out[0, t] for t in range(1, out.shape[1])) / (out.shape[1] - 1) @ visual.proj
        logits = torch.stack([scale * F.cosine_similarity(pooled, row, dim=0) for row in text])
        (logits[index].exp() / logits.exp().sum()).backward()
        z, gradient = seen[-1][0, 1:], seen[-1].grad[0, 1:]
        weight = gradient.mean(0)
        maps.append(torch.stack([(row * weight).sum().clamp(min=0) for row in z]))
    return torch.stack(maps).detach()


@pytest.fixture(scope="module")
def entering() -> torch.Tensor:
    return torch.randn(20, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(2)), dim=-1)


@pytest.mark.parametrize("seed", [0, 1])
def test_grad_cam_is_what_autograd_says(seed: int, entering, text) -> None:
    model = tiny_models.build(seed)
    tail = VisionTail(load_clip(model, torch.device("cpu"), torch.float32).vision)
    expected = reference(model, entering, text, 3, 20.0)
    got = tail.grad_cam(entering, text, 3, 20.0)
    assert got.shape == (3, 19)
    assert (expected > 0).any(1).all()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=float(1e-4 * other.max()))


def test_maps_keep_their_digits_where_a_class_is_certain(entering, text) -> None:
    """Autograd in single precision has none left: a probability of 1 has no gradient."""
    model = tiny_models.build()
    tail = VisionTail(load_clip(model, torch.device("cpu"), torch.float32).vision)
    exact = reference(copy.deepcopy(model).double(), entering.double(), text[:2].double(), 2, 60.0).float()
    assert (exact.amax(1) > 0).all()
    for one, other in zip(tail.grad_cam(entering, text[:2], 2, 60.0), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=float(1e-3 * other.max()))


def test_no_gradient_reaches_the_model_and_any_mode_will_do(entering, text) -> None:
    model = tiny_models.build()
    tail = VisionTail(load_clip(model, torch.device("cpu"), torch.float32).vision)
    expected = tail.grad_cam(entering, text, 2, 20.0)
    with torch.inference_mode():
        inside = tail.grad_cam(entering * 1, text * 1, 2, 20.0)
    with torch.no_grad():
        without = tail.grad_cam(entering, text, 2, 20.0)
    assert torch.equal(inside, expected)
    assert torch.equal(without, expected)
    assert not expected.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_in_low_precision_gives_gradients_in_float32(dtype: torch.dtype, entering, text) -> None:
    model = tiny_models.build()
    exact = VisionTail(load_clip(model, torch.device("cpu"), torch.float32).vision)
    low = VisionTail(load_clip(model, torch.device("cpu"), dtype).vision)
    a, b = exact.grad_cam(entering, text, 5, 20.0), low.grad_cam(entering.to(dtype), text, 5, 20.0)
    assert b.dtype == torch.float32
    for one, other in zip(a, b, strict=True):
        assert F.cosine_similarity(one, other, dim=0) > 0.99
