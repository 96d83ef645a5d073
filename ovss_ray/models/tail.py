"""The last block and the head of a vision transformer, for methods that look at gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovss_ray.models.vision import VisionTower


class VisionTail:
    """A frozen float32 copy of what follows on the tokens that enter the last block.

    It is a copy so that no gradient can reach the model, and float32 because small gradients vanish in half precision.
    """

    def __init__(self, tower: VisionTower) -> None:
        block, ln_post, projection = tower.last_parts()
        self._block: Any
        with torch.inference_mode(False):
            self._block = copy.deepcopy(block).float().requires_grad_(False)
            self._ln_post = copy.deepcopy(ln_post).float().requires_grad_(False)
            self._projection = projection.detach().clone().float()

    def grad_cam(self, tokens: Tensor, text: Tensor, classes: int, logit_scale: float) -> Tensor:
        """Grad-CAM of CLIP-ES (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023, section 3.2).

        The image is read off the mean of its patches, its classes compete with all rows of `text`, and a class's map is
        made of the channels of the last block's first LayerNorm, weighted by the mean over patches of the gradient of
        its probability.

        Args:
            tokens: [N, D] that enter the last block; token 0 is the class token.
            text: [K, E], unit rows; at least two.
            classes: a map is made for each of the first so many rows.
            logit_scale: factor on the cosines before the softmax.

        Returns:
            [classes, N - 1] float32, not negative.
        """
        with torch.inference_mode(False), torch.enable_grad():
            entering = tokens.detach().clone().float()[None]
            normed = self._block.ln_1(entering).requires_grad_()
            pooled = self._ln_post(self._after(entering, normed))[:, 1:].mean(1) @ self._projection
            cosines = F.normalize(pooled, dim=-1) @ text.detach().clone().float().T
            logits = logit_scale * cosines[0]
            maps = []
            for row in range(classes):
                # The gradient of P is P (1 - P) times that of its log odds, which keeps its digits where P is near 1.
                odds = logits[row] - torch.cat([logits[:row], logits[row + 1 :]]).logsumexp(0)
                (gradient,) = torch.autograd.grad(odds, normed, retain_graph=True)
                gradient = gradient * (odds.sigmoid() * (-odds).sigmoid()).detach()
                maps.append(normed.detach()[0, 1:] @ gradient[0, 1:].mean(0))
        return torch.stack(maps).relu_()

    def _after(self, entering: Tensor, normed: Tensor) -> Tensor:
        """The last block from its first LayerNorm on."""
        block = self._block
        attended, _ = block.attn(normed, normed, normed, need_weights=False)
        tokens = entering + block.ls_1(attended)
        after: Tensor = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return after
