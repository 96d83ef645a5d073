"""A real segmenter that meets with accidents, for runs in which processes really die.

Pictures of one plain colour are what it cannot bear; `draw_fault` makes them. Everything else goes through CLIPBase.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PillowImage

from ovss_ray.images import plugins
from ovss_ray.segmenters import Segmentation, TextEmbeddings
from ovss_ray.segmenters.base import Image
from ovss_ray.segmenters.clipbase import CLIPBase
from ovss_ray.segmenters.dense import DenseSettings
from ovss_ray.vocabulary import Vocabulary

METHOD = "tests.run.faulty:Faulty"

FAULTS = {
    "segfault": (250, 0, 10),
    "kill": (250, 0, 20),
    "exit": (250, 0, 30),
    "hang": (250, 0, 40),
    "slow-once": (250, 0, 50),
    "too-large": (250, 0, 60),
    "device-lost": (250, 0, 70),
    "grow": (250, 0, 80),
}
DEADLY_WIDTH = 77  # of a BMP file, which then ends the process that decodes it


def draw_fault(path: Path, fault: str, size: tuple[int, int] = (64, 64)) -> Path:
    """Write a picture of one colour that brings the fault about (or a BMP, for "decode")."""
    if fault == "decode":
        path = path.with_suffix(".bmp")
        PillowImage.new("RGB", (DEADLY_WIDTH, 40), (9, 9, 9)).save(path)
    else:
        path = path.with_suffix(".png")
        PillowImage.new("RGB", size, FAULTS[fault]).save(path)
    return path


def make_noise() -> None:
    """Write to standard error in every way that libraries do."""
    os.write(2, b"native code\x1b[1m says\n")
    subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('a child process says')"], check=True)
    os.write(2, b"\n\n")
    sys.stderr.write("Python says\n")
    sys.stderr.flush()
    os.write(2, b"downloading 0 %\rdownloading 50 %\rdownloading 100 %\n")
    warnings.warn("careless", stacklevel=1)


def grow(most: int = 12 * 2**30) -> None:
    """Take more and more memory, until somebody ends this process or there is too much of it."""
    taken = []
    while len(taken) < most // 2**26:
        taken.append(np.ones(2**23))  # 64 MiB
        time.sleep(0.02)
    raise RuntimeError("nobody minds")


class _DeadlyBmp(plugins.PLUGINS["BMP"]):  # type: ignore[misc,name-defined]
    def load(self) -> Any:
        if self.size[0] == DEADLY_WIDTH:
            ctypes.string_at(0)
        return super().load()


plugins.PLUGINS["BMP"] = _DeadlyBmp


class Faulty(CLIPBase):
    """CLIPBase with accidents."""

    name = "faulty"

    class Settings(DenseSettings):
        """What goes wrong.

        Attributes:
            cgroup: folder of a control group that a process joins before it takes memory.
            journal: file that gets a line per image that goes through the network: process, images before it.
            kill_rate: probability that a micro-batch kills the process.
            fits: images that fit into memory together; a too-large picture never does, but in little memory.
            broken_gpu: index of a GPU on which nothing works; the others go on when three workers have failed on it.
            seconds: time that each image takes.
        """

        SPEED_ONLY: ClassVar[frozenset[str]] = DenseSettings.SPEED_ONLY | {
            *("cgroup", "journal", "kill_rate", "fits", "seconds")
        }

        cgroup: str | None = None
        journal: str | None = None
        kill_rate: float = 0.0
        fits: int = 1000
        broken_gpu: str | None = None
        seconds: float = 0.0

    settings: Settings

    def encode_vocabulary(self, vocabulary: Vocabulary) -> TextEmbeddings:
        if "NOISE" in os.environ:
            make_noise()
        return super().encode_vocabulary(vocabulary)

    def segment_batch(self, images: Sequence[Image], text: TextEmbeddings, *, low_memory: bool) -> list[Segmentation]:
        """Segment, unless there is an accident."""
        faults = {name for image in images for name, color in FAULTS.items() if (image == np.uint8(color)).all()}
        self._break_down(faults)
        if random.random() < self.settings.kill_rate:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(images) > self.settings.fits or ("too-large" in faults and not low_memory):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        time.sleep(self.settings.seconds * len(images))
        found = super().segment_batch(images, text, low_memory=low_memory)
        self._note(f"{os.getpid()} {len(images)}")
        return found

    def _break_down(self, faults: set[str]) -> None:
        on_broken_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") == self.settings.broken_gpu
        if on_broken_gpu:
            self._note("broken")
        elif self.settings.broken_gpu and str(os.getpid()) in self._journal():  # not in the warm-up
            deadline = time.monotonic() + 120
            while self._journal().count("broken") < 3 and time.monotonic() < deadline:
                time.sleep(0.1)
        if "device-lost" in faults or on_broken_gpu:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "segfault" in faults:
            ctypes.string_at(0)
        if "kill" in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if "exit" in faults:
            os._exit(1)
        if "hang" in faults:
            self._note("hang")
            time.sleep(10_000)
        if "grow" in faults:
            if self.settings.cgroup:
                Path(self.settings.cgroup, "cgroup.procs").write_text(str(os.getpid()))
            grow()
        if "slow-once" in faults and self._is_first():
            time.sleep(10_000)

    def _is_first(self) -> bool:
        assert self.settings.journal is not None
        try:
            Path(f"{self.settings.journal}.slow").open("x").close()
        except FileExistsError:
            return False
        self._note(f"slow {os.getpid()}")
        return True

    def _journal(self) -> list[str]:
        """The words of the journal."""
        path = Path(self.settings.journal or "")
        return path.read_text().split() if path.is_file() else []

    def _note(self, line: str) -> None:
        if self.settings.journal is not None:
            with open(self.settings.journal, "a") as file:
                file.write(f"{line}\n")
