"""A choice: candidates, a sample, the classes of its images, rewards, a ranking; what is finished is kept.

What is wrong with the question is found here, without torch; `comparing.py` does the work.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovss_ray.choose.candidates import SettledCandidate, parse_candidates
from ovss_ray.choose.image_classes import read_image_classes
from ovss_ray.choose.places import open_place
from ovss_ray.choose.reward import FEWEST_CLASSES
from ovss_ray.errors import RunMismatchError, SettingError
from ovss_ray.labels.layout import RUN_FILE
from ovss_ray.naming import setting_name
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import RunInterrupted
from ovss_ray.run.own_folders import own_folder
from ovss_ray.run.preflight import check_images, check_words, check_writable
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ovss_ray.choose.ranking import Ranking

CLASS_THRESHOLD = 0.05
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """What is asked beside the job itself.

    Attributes:
        methods: candidates as `parse_candidates` reads them.
        sample: images to compare them on.
        search: candidates that a random search adds.
        seed: of the search.
        judge: the CLIP that judges; None for that of the segmenters.
        image_classes: file with the classes of images; None asks the judge.
        class_threshold: probability from which a class counts as present where the judge is asked, 0..1.
    """

    methods: Sequence[str]
    sample: int = 200
    search: int = 0
    seed: int = 0
    judge: str | None = None
    image_classes: str | None = None
    class_threshold: float = CLASS_THRESHOLD


@dataclass(frozen=True)
class Choice:
    """What a choice came to.

    Attributes:
        spec: the job as it was given; its run, method and settings mean nothing.
        clip: the CLIP of the segmenters, by its full name.
        judge: the CLIP that judged, likewise.
        image_classes: the file with the classes of images; None if the judge found them.
        candidates: by key.
        ranking: of their keys.
        taken_over: candidates whose rewards were there already.
    """

    spec: JobSpec
    clip: str
    judge: str
    image_classes: str | None
    candidates: Mapping[str, SettledCandidate]
    ranking: Ranking
    taken_over: int

    @property
    def best(self) -> SettledCandidate:
        return self.candidates[self.ranking.standings[0].key]


def choose(spec: JobSpec, question: Question, *, out: str | None = None, watch: Watch = lambda *_: None) -> Choice:
    """Rank methods and settings on unlabelled images by the reward of PnP-OVSS; see `reward`.

    Args:
        spec: where the images are, the classes, the segmenters' CLIP, engine and device; its run, method and settings
            are not used.
        question: what to compare, and on what.
        out: folder where everything is kept as it comes, so that the same call continues; None keeps nothing.
        watch: told how many candidates are done, of how many.

    Raises:
        SettingError: a method, setting, class or number that cannot be used; fewer than two classes.
        WeightsError: a model cannot be loaded.
        InputError: no image, none that can be read, or none with two classes.
        RunMismatchError: `out` belongs to another choice.
        RunFailedError: a device or a Ray task failed; what is finished is kept.
        RunInterrupted: Ctrl-C.
    """
    check_question(spec, question, out=out)
    try:
        from ovss_ray.choose.comparing import compare

        with ExitStack() as stack:
            place = stack.enter_context(open_place(spec))
            kept = out or str(stack.enter_context(own_folder()))
            return compare(spec, question, kept, place, watch)
    except KeyboardInterrupt:
        raise RunInterrupted(signal.SIGINT, "finished candidates are kept" if out else "nothing is kept") from None


def check_question(spec: JobSpec, question: Question, *, out: str | None = None) -> Vocabulary:
    """Find in a second what is wrong with a question, before weights are looked for; see `choose`.

    Returns:
        The classes.
    """
    _check(question)
    for candidate in parse_candidates(question.methods):
        vocabulary = check_words(spec.model_copy(update={"method": candidate.method}))
    foreground = vocabulary.num_classes - (vocabulary.background is not None)
    if foreground < FEWEST_CLASSES:
        raise SettingError(
            f"--classes names {foreground} beside the background, and the reward compares classes with each other; "
            "name at least two"
        )
    if question.image_classes is not None:
        read_image_classes(question.image_classes, vocabulary, spec.storage_options)
    if out is not None:
        check_writable(out)
        if RunDirectory(out, spec.storage_options).exists(RUN_FILE):
            raise RunMismatchError(f"{out} is the directory of a run; give another --out")
    check_images(spec)
    return vocabulary


def _check(question: Question) -> None:
    for name, number, lowest in (("sample", question.sample, 1), ("search", question.search, 0)):
        if number < lowest:
            raise SettingError(f"{setting_name(name)} is {number}; give a number of at least {lowest}")
    if not 0 < question.class_threshold <= 1:
        raise SettingError(
            f"{setting_name('class_threshold')} is {question.class_threshold:g}; give a probability above 0, at most 1"
        )
