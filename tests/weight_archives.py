"""TorchScript archives: CLIP's tensors as OpenAI published them, and one that does something when it is opened."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


class Archive(nn.Module):
    """A module with a CLIP's tensors under their names, to be scripted as OpenAI did."""

    def __init__(self, model: nn.Module, openai: bool) -> None:
        super().__init__()
        self.visual, self.transformer = _bare(model.visual), _bare(model.transformer)
        self.token_embedding, self.ln_final = _bare(model.token_embedding), _bare(model.ln_final)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, nn.Parameter(getattr(model, name).detach().clone()))
        numbers = (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408))
        for name, value in numbers if openai else ():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale


def _bare(module: nn.Module) -> nn.Module:
    """The same tensors in plain containers, which TorchScript takes without compiling anything."""
    out = nn.Module()
    for name, child in module.named_children():
        out.add_module(name, _bare(child))
    for name, parameter in module.named_parameters(recurse=False):
        out.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    return out


def save_archive(path: Path, model: nn.Module, *, openai: bool = True) -> Path:
    """The weights of a model as TorchScript; with the numbers that OpenAI's archives carry beside them, or without."""
    torch.jit.save(torch.jit.trace(Archive(model, openai), torch.ones(1)), path)
    return path


class _Tampered(nn.Module):
    """Creates a file, named by the bytes of its state, as soon as it is loaded."""

    def __init__(self, victim: str) -> None:
        super().__init__()
        self.victim = victim
        self.weights = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return (self.victim, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):  # type: ignore[no-untyped-def]
        self.victim = state[0]
        self.training = state[1]
        self.weights = torch.from_file(self.victim, True, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weights[:1]


def save_tampered(path: Path, victim: Path) -> Path:
    """A TorchScript file that creates `victim` when it is opened."""
    torch.jit.save(torch.jit.script(_Tampered(str(victim))), str(path))
    return path
