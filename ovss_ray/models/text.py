"""The text tower of CLIP: query strings to unit vectors, in float32 and never truncated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovss_ray.errors import SettingError, WeightsError
from ovss_ray.models.quiet import silenced
from ovss_ray.models.sources import DEMO_ARCHITECTURE, register_demo
from ovss_ray.vocabulary import Vocabulary

_TEXTS_PER_PASS = 256
_QUERIES_PER_CHUNK = 512


class TextTower:
    """A frozen CLIP text tower with its tokenizer.

    Args:
        model: an open_clip model; its text side must be float32 for exact results.
        tokenizer: what `open_clip.get_tokenizer` gives for the architecture.
        name: the model's name, for messages.

    Attributes:
        texts_encoded: how many texts went through it so far; other threads read it to show progress.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._name = name
        self.texts_encoded = 0

    @property
    def logit_scale(self) -> float:
        """The factor on cosines that the model was trained with; 100 for OpenAI's."""
        return float(self._model.logit_scale.detach().exp())

    def check_lengths(self, vocabulary: Vocabulary) -> None:
        """As `check_query_lengths`, for this tower's own tokenizer."""
        _check_lengths(vocabulary, self._tokenizer, self._name)

    def encode(self, queries: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit embeddings [Q, E] float32: per query the mean over templates of unit embeddings, normalised again."""
        chunks = [queries[start : start + _QUERIES_PER_CHUNK] for start in range(0, len(queries), _QUERIES_PER_CHUNK)]
        means = []
        for chunk in chunks:
            texts = [template.replace("{}", query) for query in chunk for template in templates]
            means.append(self._encode_texts(texts).view(len(chunk), len(templates), -1).mean(1))
        return F.normalize(torch.cat(means), dim=-1)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(texts))
        device = next(self._model.parameters()).device
        lengths = tokens.argmax(1) + 1  # the end-of-text token has the largest id
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.split(_TEXTS_PER_PASS):
            batch = tokens[rows].to(device)
            parts.append(F.normalize(self._forward(batch, int(lengths[rows].max())).float(), dim=-1))
            self.texts_encoded += len(rows)
        return torch.cat(parts)[order.argsort()]

    def _forward(self, tokens: Tensor, length: int) -> Tensor:
        model = self._model
        causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None
        if not causal or model.text_pool_type != "argmax":
            encoded: Tensor = model.encode_text(tokens)
            return encoded
        # The tower is causal and reads the end-of-text token, so nothing behind the longest text can matter.
        tokens = tokens[:, :length]
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        projection = model.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection
        pooled: Tensor = x
        return pooled


def check_query_lengths(vocabulary: Vocabulary, architecture: str) -> None:
    """Refuses queries that are longer than the text tower reads, in any template. Needs no weights.

    Raises:
        SettingError: names the query, its class and the template; CLIP would silently cut the text off.
    """
    _check_lengths(vocabulary, tokenizer_of(architecture), architecture)


def _check_lengths(vocabulary: Vocabulary, tokenizer: Any, name: str) -> None:
    limit = int(tokenizer.context_length)
    for item in vocabulary.classes:
        for query in item.queries:
            for template in vocabulary.templates:
                text = template.replace("{}", query)
                count = _count_tokens(tokenizer, text, limit)
                if count > limit:
                    raise SettingError(
                        f"the query '{query}' of class '{item.name}' in the template '{template}' has {count} tokens, "
                        f"and {name} reads {limit}; shorten it"
                    )


@cache
def tokenizer_of(architecture: str) -> Any:
    """The tokenizer that open_clip prescribes for an architecture.

    Raises:
        WeightsError: it is one of another library that is not installed, or cannot be downloaded.
    """
    if architecture == DEMO_ARCHITECTURE:
        register_demo()
    try:
        with silenced():
            return open_clip.get_tokenizer(architecture)
    except ImportError as error:
        raise WeightsError(f"{architecture} needs a package that is not installed: {error}") from None
    except OSError as error:  # the transformers library looks for its files on the hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"the tokenizer of {architecture} is not on this machine and cannot be downloaded: {reason}; bring it into "
            "the hub's cache (HF_HOME) where there is a network"
        ) from None


@cache
def simple_tokenizer(context_length: int) -> Any:
    """CLIP's own tokenizer, for a model that comes without a name."""
    return open_clip.SimpleTokenizer(context_length=context_length)


def _count_tokens(tokenizer: Any, text: str, limit: int) -> int:
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        if text.isascii() and "&" not in text and len(text) + 2 <= limit:
            return len(text) + 2  # a token is at least one byte, so this bounds the count from above
        return len(tokenizer.encode(text)) + 2
    wrapped = getattr(tokenizer, "tokenizer", None)
    return len(wrapped(text)["input_ids"]) if callable(wrapped) else 0
