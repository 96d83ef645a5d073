"""Train the tiny CLIP that the package ships, from pictures and captions alone.

    python -m ovss_ray.demo.training --minutes 30 --output build/demo-clip

Synthetic scenes are cut into crops, and each crop comes with a set of captions: one that names everything visible, and
one for every single thing. The loss on the CLS token is CLIP's, with several positives: a caption counts as right for
every crop of the batch whose caption set says the same. Label maps are never looked at; they only serve to score
held-out scenes.

Large CLIPs learn useful patches and distinct words from that loss alone, given hundreds of millions of pictures. To get
there in a few thousand steps, two terms are added that use the same pictures and captions. Among the captions, two
wordings of a thing come together and different things part: else the six shapes stay one point of the text space, and
nothing makes the picture tower tell them apart. And every patch, read as MaskCLIP reads it (official and reduced in
turn), must fit one of the things that its picture's captions name, while every thing named must be found in some
patches.

A second command may go on from the weights of a first, with `--start-from`; the record then holds both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ovss_ray.demo.captions import Thing, describe
from ovss_ray.demo.crops import CLOSE_UP, NATIVE, Crop, batches, draw_pool
from ovss_ray.demo.scenes import CLASSES
from ovss_ray.demo.scoring import TEST_SEEDS, VALIDATION_SEEDS, score_clip
from ovss_ray.demo.towers import encode_captions, encode_pictures
from ovss_ray.models.sources import DEMO_ARCHITECTURE, register_demo
from ovss_ray.vocabulary import load_vocabulary

log = logging.getLogger(__name__)

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True)
class TrainingSettings:
    """What the training depends on; stored in training.json."""

    minutes: float | None = 30.0
    steps: int | None = None
    batch_size: int = 128
    scenes: int = 8_000
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    close_ups: float = 0.7
    dense_weight: float = 2.0
    least_share: float = 0.15
    text_weight: float = 1.0
    seed: int = 0
    threads: int = 2
    score_every: int = 200


@dataclass(frozen=True)
class Captions:
    """One caption per crop of a batch.

    Attributes:
        tokens: [B, N].
        positives: bool [B crops, B captions], which captions are right for which crops.
        names: the thing that each caption names; empty where captions name several.
    """

    tokens: torch.Tensor
    positives: torch.Tensor
    names: tuple[str, ...] = ()


class CaptionWriter:
    """Writes captions and tells which of them say the same."""

    def __init__(self, templates: Sequence[str], tokenizer: Any, rng: np.random.Generator) -> None:
        self._templates = templates
        self._tokenizer = tokenizer
        self._rng = rng
        self._known: dict[str, torch.Tensor] = {}

    def everything(self, crops: Sequence[Crop]) -> Captions:
        """Captions that name all that is visible: right for every crop that shows the same things."""
        meanings = [frozenset(thing.name for thing in crop.things) for crop in crops]
        positives = [[own == other for other in meanings] for own in meanings]
        return Captions(self._tokens([describe(crop.things, self._rng) for crop in crops]), torch.tensor(positives))

    def single(self, crops: Sequence[Crop]) -> Captions:
        """Captions that name one thing: right for every crop that shows such a thing."""
        chosen = [self._choose(crop.things) for crop in crops]
        owned = [{thing.name for thing in crop.things} for crop in crops]
        positives = [[thing.name in names for thing in chosen] for names in owned]
        names = tuple(thing.name for thing in chosen)
        return Captions(self._tokens([self._name(thing) for thing in chosen]), torch.tensor(positives), names)

    def _choose(self, things: Sequence[Thing]) -> Thing:
        """Mostly a shape: grounds are learnt long before shapes are."""
        shapes = [thing for thing in things if not thing.is_ground]
        candidates = shapes if shapes and self._rng.random() < 0.7 else things
        return candidates[int(self._rng.integers(len(candidates)))]

    def _name(self, thing: Thing) -> str:
        if self._rng.random() < 0.25:
            return describe([thing], self._rng, adjectives=0.5)
        return self._templates[int(self._rng.integers(len(self._templates)))].format(thing.name)

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        for caption in captions:
            if caption not in self._known:
                self._known[caption] = self._tokenizer([caption])[0]
        return torch.stack([self._known[caption] for caption in captions])


def contrastive_loss(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss with several positives, each of which competes with the negatives only.

    With one positive per row and column this is exactly CLIP's cross entropy.

    Args:
        logits: scaled similarities [B crops, B captions].
        positives: bool [B, B], at least one in every row and column.
    """
    crops, captions = (_one_sided_loss(logits, positives, dim) for dim in (1, 0))
    return (crops + captions) / 2


def placement_loss(logits: torch.Tensor, named: torch.Tensor, least_share: float) -> torch.Tensor:
    """Every place shows a thing that is named, and every thing that is named is shown in some places.

    Args:
        logits: scaled similarities [B, N, K] of N places with K things.
        named: bool [B, K], the things that a picture's captions name; at least one per picture.
        least_share: share of the places that a thing is expected to take at least, 0..1.
    """
    fit = logits.softmax(dim=-1)
    fitting = (fit * named[:, None]).sum(dim=-1)
    count = max(1, int(least_share * logits.shape[1]))
    found = fit.topk(count, dim=1).values.mean(dim=1)
    missing = -(found.clamp_min(1e-6).log() * named).sum(dim=-1) / named.sum(dim=-1)
    return (-fitting.clamp_min(1e-6).log().mean(dim=-1) + missing).mean()


def _one_sided_loss(logits: torch.Tensor, positives: torch.Tensor, dim: int) -> torch.Tensor:
    negatives = torch.logsumexp(logits.masked_fill(positives, -1e4), dim=dim, keepdim=True)
    surprise = F.softplus(negatives - logits) * positives
    return (surprise.sum(dim) / positives.sum(dim)).mean()


def pixels_of(crops: Sequence[Crop]) -> torch.Tensor:
    """Normalised pixels [B, 3, S, S]."""
    images = torch.from_numpy(np.stack([crop.image for crop in crops]))
    return (images.permute(0, 3, 1, 2).float() / 255.0 - MEAN) / STD


def create_model() -> Any:
    """The demo architecture with fresh weights."""
    register_demo()
    return open_clip.create_model(DEMO_ARCHITECTURE)


class Trainer:
    """One training; `run` returns the number of steps taken."""

    def __init__(self, settings: TrainingSettings, crops: Sequence[Crop], output: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.output = output
        self.rng = np.random.default_rng(settings.seed)
        self.model = create_model()
        self.tokenizer = open_clip.get_tokenizer(DEMO_ARCHITECTURE)
        self.writer = CaptionWriter(list(load_vocabulary(list(CLASSES)).templates), self.tokenizer, self.rng)
        self.crops = crops
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))

    def run(self) -> int:
        start = time.monotonic()
        step, losses = 0, []
        streams = {
            size: batches([c for c in self.crops if len(c.image) == size], self.settings.batch_size, self.rng)
            for size in (CLOSE_UP, NATIVE)
        }
        for step in itertools.count(1):
            elapsed = (time.monotonic() - start) / 60
            progress = self._progress(step, elapsed)
            batch = next(streams[CLOSE_UP if progress < self.settings.close_ups else NATIVE])
            losses.append(self._step(batch, step, progress))
            if step % 50 == 0:
                log.info(
                    "step %d  %.1f min  loss %.3f  scale %.1f",
                    step,
                    elapsed,
                    np.mean(losses[-50:]),
                    self.model.logit_scale.exp().item(),
                )
            if step % self.settings.score_every == 0:
                save(self.model, self.output)
                scores = score_clip(self.model, VALIDATION_SEEDS)
                log.info("step %d  validation mIoU %s", step, {name: round(s.miou, 3) for name, s in scores.items()})
            if progress >= 1.0:
                break
        save(self.model, self.output)
        return step

    def _progress(self, step: int, minutes: float) -> float:
        parts = [0.0]
        if self.settings.steps is not None:
            parts.append(step / self.settings.steps)
        if self.settings.minutes is not None:
            parts.append(minutes / self.settings.minutes)
        return min(1.0, max(parts))

    def _step(self, batch: list[Crop], step: int, progress: float) -> float:
        rate = self.settings.learning_rate * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / self.settings.warmup_steps)
        self.model.train()
        pixels = pixels_of(batch)
        spare = (NATIVE - pixels.shape[-1]) // self.model.visual.patch_size[0]
        top, left = self.rng.integers(0, spare + 1, size=2)
        with torch.autocast("cpu", torch.bfloat16):
            whole, patches = encode_pictures(self.model, pixels, int(top), int(left), reduced=step % 2 == 0)
        loss = self._loss(batch, whole, patches)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, math.log(50.0))
        return float(loss.detach())

    def _loss(self, batch: list[Crop], whole: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        written = [self.writer.everything(batch), self.writer.single(batch), self.writer.single(batch)]
        texts = encode_captions(self.model, torch.cat([captions.tokens for captions in written]))
        scale = self.model.logit_scale.exp()
        loss = torch.zeros(())
        for text, captions in zip(torch.split(texts, len(batch)), written, strict=True):
            loss = loss + contrastive_loss(scale * whole @ text.T, captions.positives)
        singles, names = texts[len(batch) :], [name for captions in written for name in captions.names]
        synonyms = torch.tensor([[one == other for other in names] for one in names])
        loss = loss + self.settings.text_weight * contrastive_loss(scale * singles @ singles.T, synonyms)
        kinds = sorted(set(names))
        words = F.normalize(torch.stack([singles[[name == kind for name in names]].mean(0) for kind in kinds]), dim=-1)
        shown = [{thing.name for thing in crop.things} for crop in batch]
        named = torch.tensor([[kind in things for kind in kinds] for things in shown])
        usable = named.any(dim=1)
        fit = placement_loss(scale * patches[usable] @ words.T, named[usable], self.settings.least_share)
        return loss + self.settings.dense_weight * fit


def save(model: torch.nn.Module, output: Path) -> Path:
    """Write the weights as float16 safetensors, in one piece or not at all."""
    path = output / f"{DEMO_ARCHITECTURE}.safetensors"
    partial = path.with_suffix(".partial")
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, partial)
    partial.replace(path)
    return path


def describe_machine() -> str:
    """The processor in neutral words."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores, {models[0] if models else platform.machine()}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="folder of an earlier training to go on from")
    for name, value in vars(TrainingSettings()).items():
        kind = float if name == "minutes" else int if name == "steps" else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    options = vars(parser.parse_args(arguments))
    output, earlier = options.pop("output"), options.pop("start_from")
    settings = TrainingSettings(**options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(settings.threads)
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    crops = draw_pool(settings.scenes, settings.seed, os.cpu_count() or 1)
    log.info("%d crops drawn in %.0f s", len(crops), time.monotonic() - start)
    trainer = Trainer(settings, crops, output)
    if earlier is not None:
        trainer.model.load_state_dict(load_file(earlier / f"{DEMO_ARCHITECTURE}.safetensors"))
    steps = trainer.run()
    weights = output / f"{DEMO_ARCHITECTURE}.safetensors"
    command = "python -m ovss_ray.demo.training " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    record = {
        "command": command,
        "settings": asdict(settings),
        "steps": steps,
        "pictures_seen": steps * settings.batch_size,
        "seconds": round(time.monotonic() - start),
        "machine": describe_machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")},
        "test_seeds": [TEST_SEEDS.start, TEST_SEEDS.stop - 1],
        "scores": {name: asdict(score) for name, score in score_clip(weights, TEST_SEEDS).items()},
    }
    if earlier is not None:
        record["started_from"] = json.loads((earlier / "training.json").read_text())
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    log.info("wrote %s", output / "training.json")


if __name__ == "__main__":
    main()
