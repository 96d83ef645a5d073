"""Which image of a shard kills its worker: what each death tells, and what to try next. Pure, as the scheduler is.

A death of the worker that held the shard is followed by a careful attempt, in which the worker announces each
micro-batch before it touches it. A death then names a micro-batch; its images are tried one by one, so the next death
names an image. That image is tried once more, so that a worker killed by chance is not held against it. So an image is
found by its fourth death, whatever the size of shard and micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ovss_ray.run.events import CrashedImage, ShardTask, WorkerDied

MAX_CRASHED_PER_SHARD = 32

Status = Literal["crashed", "timeout", "out_of_memory"]


@dataclass
class ShardCase:
    """What is known about a shard that was part of a failure.

    Attributes:
        attempts: how often it was given out.
        failures: failures since the last one that told something new.
        careful: the next attempt names what it touches.
        alone: while it is given out, its worker gets nothing else, so that its failures are its own.
        starved: a worker that held it was killed for want of memory, so that it is given to one node only.
    """

    shard: int
    attempts: int = 0
    failures: int = 0
    careful: bool = False
    alone: bool = False
    starved: bool = False
    crashed: dict[int, CrashedImage] = field(default_factory=dict)
    _suspects: tuple[int, ...] = ()
    _confirm: int | None = None

    def task(self) -> ShardTask:
        """The next attempt."""
        self.attempts += 1
        return ShardTask(
            self.shard,
            self.attempts,
            crashed=tuple(self.crashed.values()),
            careful=self.careful,
            suspects=self._suspects,
            confirm=self._confirm,
        )

    def was_beside(self, *, memory: bool = False) -> None:
        """Its worker died while another shard was on the device, or beside others; it may still be the cause."""
        self.alone = self.careful = True
        self.starved = self.starved or memory

    def failed(self) -> None:
        """Its worker lives and reported an error."""
        self.alone = True
        self.failures += 1

    def died(self, event: WorkerDied) -> CrashedImage | None:
        """Its worker died; returns the image that is now known to be the cause, if there is one."""
        self.alone = self.careful = True
        self.starved = self.starved or event.memory
        if not event.group:
            self.failures += 1
        elif event.group == (self._confirm,):
            return self._found(event)
        else:
            within = bool(self._suspects) and set(event.group) <= set(self._suspects)
            if self._confirm is not None or (self._suspects and not within):
                self.failures += 1  # those that seemed to be the cause are not
            self._suspects = self._suspects if within and len(event.group) == 1 else event.group
            self._confirm = event.group[0] if len(event.group) == 1 else None
        return None

    def acquit(self) -> None:
        """Its failures were the fault of a device."""
        self.failures = 0
        self._suspects, self._confirm = (), None

    @property
    def hopeless(self) -> bool:
        """Whether so many of its images were found to crash that they are not the cause."""
        return len(self.crashed) > MAX_CRASHED_PER_SHARD

    def _found(self, event: WorkerDied) -> CrashedImage:
        image_id = event.group[0]
        status: Status = "timeout" if event.hung else "out_of_memory" if event.memory else "crashed"
        found = CrashedImage(self.shard, image_id, status, event.reason)
        self.crashed[image_id] = found
        self._suspects = tuple(suspect for suspect in self._suspects if suspect != image_id)
        self._confirm = None
        self.failures = 0
        return found


def groups_of(task: ShardTask, image_ids: Iterable[int], size: int) -> list[tuple[int, ...]]:
    """In which groups a careful worker goes through the images of a shard; images known to crash are left out.

    Args:
        image_ids: all images of the shard.
        size: of a group in which nothing is suspected.
    """
    crashed = {image.image_id for image in task.crashed}
    suspects = [image_id for image_id in task.suspects if image_id not in crashed]
    others = [image_id for image_id in image_ids if image_id not in crashed and image_id not in set(suspects)]
    rest = [tuple(others[start : start + size]) for start in range(0, len(others), size)]
    suspects.sort(key=lambda image_id: image_id != task.confirm)
    return [*((suspect,) for suspect in suspects), *rest]
