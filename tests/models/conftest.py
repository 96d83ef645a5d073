"""Tiny architectures for tests of loading."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_models


@pytest.fixture(scope="session")
def tiny_architectures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Names of two architectures known to open_clip: with plain GELU, with QuickGELU."""
    return tiny_models.register(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are tiny: more threads only wait for each other."""
    torch.set_num_threads(1)
