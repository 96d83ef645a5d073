"""Which class of a run is which class of a ground truth: by name, whatever their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.errors import SettingError, nearest
from ovss_ray.labels.codecs import LabelMap
from ovss_ray.vocabulary import Vocabulary

_LISTED = 8


@dataclass(frozen=True, eq=False)
class ClassMatch:
    """How the labels of a run become class ids of a ground truth.

    Attributes:
        lookup: [256 or 65536] label -> class id 0..C-1; C for unlabelled pixels and classes the ground truth lacks.
        foreign: classes of the run that the ground truth lacks.
        absent: classes of the ground truth that the run never had.
    """

    lookup: npt.NDArray[np.int32]
    foreign: tuple[str, ...]
    absent: tuple[str, ...]

    def apply(self, labels: LabelMap) -> npt.NDArray[np.int32]:
        """[H, W] class ids of the ground truth; C where there is none."""
        return self.lookup[labels]

    def warnings(self) -> Iterator[str]:
        """What the differences mean for the scores, a sentence each."""
        if self.foreign:
            yield (
                f"the ground truth lacks {_listed(self.foreign)} of the run: pixels with these labels count as "
                "without a prediction"
            )
        if self.absent:
            yield f"the run never had {_listed(self.absent)} of the ground truth: their IoU is 0 where they are true"


def match_classes(run: Vocabulary, truth: Vocabulary) -> ClassMatch:
    """Match classes by their names; upper and lower case, blanks, hyphens and underscores make no difference.

    Some published lists have a name twice: then the first belongs to the first, the second to the second.

    Raises:
        SettingError: no class has the same name.
    """
    ids = {key: class_id for class_id, key in enumerate(_keys(truth.names))}
    lookup = np.full(np.iinfo(run.label_dtype).max + 1, truth.num_classes, np.int32)
    foreign = []
    for label, (name, key) in enumerate(zip(run.names, _keys(run.names), strict=True)):
        if key in ids:
            lookup[label] = ids.pop(key)
        else:
            foreign.append(name)
    if len(foreign) == run.num_classes:
        raise SettingError(
            f"the run has no class of the ground truth {truth.name}: it was labelled with {_listed(run.names)}, the "
            f"ground truth has {_listed(truth.names)}; evaluate against a ground truth with the same class names"
        )
    absent = tuple(truth.names[class_id] for class_id in sorted(ids.values()))
    return ClassMatch(lookup, tuple(foreign), absent)


def class_ids(names: Sequence[str], truth: Vocabulary, what: str) -> tuple[int, ...]:
    """The ids of named classes, ascending.

    Args:
        names: compared as in `match_classes`.
        truth: the classes.
        what: the setting that names them, for the message.

    Raises:
        SettingError: a name is no class.
    """
    known = [_normalised(name) for name in truth.names]
    found: set[int] = set()
    for name in names:
        same = [class_id for class_id, other in enumerate(known) if other == _normalised(name)]
        if not same:
            hint = nearest(name, truth.names) or f"; its classes are {_listed(truth.names)}"
            raise SettingError(f"{what}: {truth.name} has no class {name!r}{hint}")
        found.update(same)
    return tuple(sorted(found))


def mixed_up(counts: npt.NDArray[np.integer[Any]], names: Sequence[str]) -> str | None:
    """What speaks for values of the label images that mean other classes than the list says; None: nothing.

    A class that is mostly labelled as another one is common. That this other one is mostly labelled as a third, and
    that this happens twice or more, is what a list in another order or a shift by one looks like.

    Args:
        counts: [C, C + 1], pixels of true class and predicted class, as in `ConfusionMatrix`.
        names: of the C classes.
    """
    most = counts.argmax(axis=1)
    over_half = 2 * counts.max(axis=1) > counts.sum(axis=1)
    lost = over_half & (most != np.arange(len(names))) & (most < len(names))
    links = {names[one]: names[int(most[one])] for one in np.flatnonzero(lost).tolist() if lost[most[one]]}
    if len(set(links.values())) < 2:
        return None
    pairs = _listed([f"{true} as {label}" for true, label in links.items()])
    return (
        f"classes are mostly labelled as others ({pairs}): do the values of the label images mean what the list says?"
    )


def _keys(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each name with how often it came before."""
    before: Counter[str] = Counter()
    for name in map(_normalised, names):
        yield name, before[name]
        before[name] += 1


def _normalised(name: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", name).casefold().split())


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(str, names[:_LISTED])) + more
