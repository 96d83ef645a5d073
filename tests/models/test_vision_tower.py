"""The pieces of the vision tower against open_clip's own forward pass and explicit formulas."""

from __future__ import annotations

import pytest
import torch

from ovss_ray.models.vision import TowerShape, VisionTower
from ovss_ray.ops.attention import attend, merge_heads
from tests import tiny_models


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return tiny_models.build(ls_init_value=0.7)


@pytest.fixture
def tower(model) -> VisionTower:  # type: ignore[no-untyped-def]
    return VisionTower(model.visual, "tiny")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _no_gradients():  # type: ignore[no-untyped-def]
    with torch.inference_mode():
        yield


def test_sizes(tower: VisionTower) -> None:
    assert (tower.patch_size, tower.image_size, tower.native_grid, tower.depth) == (8, 64, (8, 8), 4)
    assert (tower.heads, tower.width, tower.embed_dim) == (3, 48, 24)
    assert tower.grid_of(70, 39) == (8, 4)


def test_a_full_pass_is_encode_image(model, tower: VisionTower, pixels: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    tokens = tower.head(tower.trunk(pixels, "dino_offset", until=tower.depth).tokens)
    torch.testing.assert_close(tokens[:, 0], model.encode_image(pixels), atol=1e-5, rtol=1e-4)


def test_the_block_in_pieces_is_the_block(tower: VisionTower, pixels: torch.Tensor) -> None:
    x = tower.trunk(pixels, "bicubic", until=2).tokens
    q, k, v = tower.qkv(x, 2)
    torch.testing.assert_close(
        tower.readout(x, 2, attend(q, k, v), residual=True, mlp=True), tower.block(x, 2), atol=1e-5, rtol=1e-4
    )


def test_queries_keys_and_values_are_projections_of_the_normed_tokens(model, tower: VisionTower) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    block = model.visual.transformer.resblocks[1]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed * block.ln_1.weight + block.ln_1.bias
    torch.testing.assert_close(tower.normed(x, 1), normed, atol=1e-5, rtol=1e-4)
    for part, got, again in zip(range(3), tower.qkv(x, 1), tower.project_qkv(tower.normed(x, 1), 1), strict=True):
        assert got.shape == (2, 3, 7, 16)
        assert torch.equal(got, again)
        rows = slice(part * 48, (part + 1) * 48)
        expected = normed @ block.attn.in_proj_weight[rows].T + block.attn.in_proj_bias[rows]
        for head in range(3):
            torch.testing.assert_close(got[:, head], expected[:, :, 16 * head : 16 * head + 16], atol=1e-4, rtol=1e-3)


def test_blocks_count_from_either_end(tower: VisionTower, pixels: torch.Tensor) -> None:
    x = tower.embed(pixels, "bicubic")
    assert torch.equal(tower.normed(x, -1), tower.normed(x, 3))
    assert torch.equal(tower.trunk(pixels, "bicubic").tokens, tower.trunk(pixels, "bicubic", until=3).tokens)
    assert torch.equal(tower.trunk(pixels, "bicubic", until=0).tokens, x)


@pytest.mark.parametrize(
    ("depth", "published", "expected"),
    [
        (12, (6, 7, 9), (6, 7, 9)),
        (12, (9, 6, 6), (6, 9)),
        (24, (6, 7, 9), (6, 7, 9)),
        (6, (0, 11), (0, 5)),
        (6, (5, 6, 7, 8), (2, 3, 4)),
        (4, (6, 7, 9), (2,)),
        (4, range(12), (0, 1, 2, 3)),
        (2, (3, 10), (0, 1)),
        (1, (3, 10), (0,)),
        (4, (), ()),
    ],
)
def test_published_blocks_are_scaled_for_shallower_towers(depth: int, published, expected) -> None:  # type: ignore[no-untyped-def]
    assert TowerShape(64, 8, depth).blocks_like(published) == expected


def test_published_blocks_of_other_depths() -> None:
    assert TowerShape(64, 8, 12).blocks_like((0, 8, 23), depth=24) == (0, 4, 11)
    assert TowerShape(64, 8, 24).blocks_like((0, 8, 23), depth=24) == (0, 8, 23)


def test_the_flags_of_the_readout(model, tower: VisionTower, pixels: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    x = tower.trunk(pixels, "bicubic").tokens
    _, _, v = tower.qkv(x, -1)
    block = model.visual.transformer.resblocks[-1]
    bare = block.ls_1(block.attn.out_proj(merge_heads(v)))
    torch.testing.assert_close(tower.readout(x, -1, v, residual=False, mlp=False), bare)
    torch.testing.assert_close(tower.readout(x, -1, v, residual=True, mlp=False), x + bare)
    with_mlp = bare + block.ls_2(block.mlp(block.ln_2(bare)))
    torch.testing.assert_close(tower.readout(x, -1, v, residual=False, mlp=True), with_mlp)


def test_recording_changes_nothing_and_keeps_what_was_asked(tower: VisionTower, pixels: torch.Tensor) -> None:
    plain = tower.trunk(pixels, "dino_offset")
    recorded = tower.trunk(pixels, "dino_offset", hidden=(0, 2), queries_keys=(1, 2))
    torch.testing.assert_close(recorded.tokens, plain.tokens, atol=1e-5, rtol=1e-4)
    assert set(recorded.hidden) == {0, 2}
    assert set(recorded.queries_keys) == {1, 2}
    torch.testing.assert_close(recorded.hidden[2], recorded.tokens)
    q, k, _ = tower.qkv(recorded.hidden[0], 1)
    assert torch.equal(recorded.queries_keys[1][0], q)
    assert torch.equal(recorded.queries_keys[1][1], k)
    assert plain.hidden == {}


def test_any_grid_works_and_the_remainder_is_dropped(tower: VisionTower, pixels: torch.Tensor) -> None:
    wide = torch.cat([pixels, pixels], dim=3)[:, :, :47]
    trunk = tower.trunk(wide, "dino_offset")
    assert trunk.grid == (5, 16)
    assert tower.patch_map(tower.head(trunk.tokens), trunk.grid).shape == (3, 5, 16, 24)
    torch.testing.assert_close(tower.trunk(wide[:, :, :40], "dino_offset").tokens, trunk.tokens)


def test_patches_are_row_major(tower: VisionTower) -> None:
    tokens = torch.arange(1 + 6.0).view(1, 7, 1)
    assert tower.patch_map(tokens, (2, 3))[0, :, :, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_positions_are_resampled_from_the_native_table_every_time(model, pixels: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    stored = model.visual.positional_embedding.clone()
    fresh = VisionTower(model.visual, "a").embed(pixels[:, :, :32, :48], "bilinear")
    used = VisionTower(model.visual, "b")
    for height in (16, 64, 128):
        used.embed(torch.zeros(1, 3, height, 24), "bilinear")
    assert torch.equal(used.embed(pixels[:, :, :32, :48], "bilinear"), fresh)
    assert torch.equal(model.visual.positional_embedding, stored)


def test_pieces_can_be_used_with_gradients_too(tower: VisionTower, pixels: torch.Tensor) -> None:
    tower.embed(pixels[:, :, :40], "bicubic")  # the positions are now cached
    with torch.inference_mode(False), torch.enable_grad():
        leaf = pixels.clone().requires_grad_()
        tower.head(tower.trunk(leaf[:, :, :40], "bicubic").tokens).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0
