"""The work of a choice: every candidate settled, a sample drawn, its images segmented and judged, a ranking made."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence

from ovss_ray.choose.assessing import Assessment, SampledImage, assess, find_classes
from ovss_ray.choose.candidates import Candidate, SettledCandidate, draw_candidates, parse_candidates
from ovss_ray.choose.choose import Choice, Question, Watch
from ovss_ray.choose.image_classes import ImageClasses, read_image_classes
from ovss_ray.choose.loading import Setting
from ovss_ray.choose.places import Place
from ovss_ray.choose.ranking import Ranking, rank
from ovss_ray.choose.records import ChoiceFolder
from ovss_ray.choose.reward import FEWEST_CLASSES
from ovss_ray.errors import InputError, RunFailedError
from ovss_ray.estimate.sampling import survey
from ovss_ray.models.clip import check_weights
from ovss_ray.models.sources import resolve_weights
from ovss_ray.models.text import check_query_lengths
from ovss_ray.run.job import ResolvedSpec, images_of, resolve, with_dtype
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.segmenters.registry import get_method
from ovss_ray.spec import JobSpec
from ovss_ray.version import __version__

log = logging.getLogger(__name__)

_IMAGES_PER_BLOCK = 16  # of tars and Parquet files, where images that are far apart cost more


def compare(asked: JobSpec, question: Question, kept: str, place: Place, watch: Watch) -> Choice:
    """Answer a question that was checked; see `choose`.

    Args:
        kept: folder for what is finished.
        place: where the work is done.
    """
    folder = ChoiceFolder(kept, asked.storage_options)
    resolved, candidates = _settle(asked.model_copy(update={"device": place.device}), question)
    spec, vocabulary = resolved.spec, resolved.vocabulary
    judge = resolve_weights(question.judge or spec.clip)
    if question.judge is not None:
        check_weights(judge.clip, trust_weights=spec.trust_weights)
    check_query_lengths(vocabulary, judge.architecture)
    known = None
    if question.image_classes is not None:
        known = read_image_classes(question.image_classes, vocabulary, spec.storage_options)
    setting = Setting(spec, vocabulary, judge.clip, place.threads)
    folder.claim(_identity(resolved, question, known, judge.digest))
    sample = folder.read_sample()
    if sample is None:
        rows = _draw_sample(spec, question.sample, known)
        sample = folder.write_sample(_with_classes(rows, setting, question, known, place))
    _refuse_silent(sample, question)
    done = {key: found for key, one in candidates.items() if (found := folder.read_assessment(one)) is not None}
    taken_over = len(done)
    missing = {one.candidate.name: one for key, one in candidates.items() if key not in done}
    watch(len(done), len(candidates))
    tasks = {name: (setting, one, sample) for name, one in missing.items()}
    for name, assessment in place.calls(assess, tasks):
        folder.write_assessment(missing[name], assessment)
        done[missing[name].key] = assessment
        watch(len(done), len(candidates))
    folder.sweep()
    ranking = rank(sample, {key: done[key] for key in candidates})
    _refuse_hopeless(ranking, done)
    return Choice(asked, spec.clip, judge.clip, question.image_classes, candidates, ranking, taken_over)


def _settle(spec: JobSpec, question: Question) -> tuple[ResolvedSpec, dict[str, SettledCandidate]]:
    """The job that is common to all candidates, but for method and settings; and every candidate once, checked."""
    written = parse_candidates(question.methods)
    grids = {one.method: get_method(one.method).Settings.SEARCH for one in written}
    drawn = draw_candidates(written, grids, question.search, question.seed) if question.search else []
    settled: dict[str, SettledCandidate] = {}
    resolved: ResolvedSpec | None = None
    for candidate in [*written, *map(_without_defaults, drawn)]:
        update = {"method": candidate.method, "settings": dict(candidate.settings)}
        resolved = with_dtype(resolve(spec.model_copy(update=update)), spec.device)
        found = SettledCandidate.of(candidate, resolved.spec.settings, resolved.label_settings)
        settled.setdefault(found.key, found)
    assert resolved is not None
    for warning in resolved.warnings:
        log.warning("%s", warning)
    return resolved, settled


def _without_defaults(candidate: Candidate) -> Candidate:
    fields = get_method(candidate.method).Settings.model_fields
    changed = {
        name: value
        for name, value in candidate.settings.items()
        if name not in fields or value != fields[name].get_default(call_default_factory=True)
    }
    return Candidate(candidate.method, changed)


def _draw_sample(spec: JobSpec, wanted: int, known: ImageClasses | None) -> list[ManifestRow]:
    listing = images_of(spec)
    first = next(listing)
    refs = itertools.chain([first], listing)
    if known is not None:
        refs = (ref for ref in refs if known.name_of(ref.uri) is not None)  # type: ignore[assignment]
    found = survey(refs, wanted=wanted, block=1 if first.offset is None else _IMAGES_PER_BLOCK).sample
    if known is not None and not found:
        raise InputError(
            f"{known.source} names no image of {spec.input}: it has for example '{next(iter(known.classes))}', and the "
            f"input {first.uri}"
        )
    if known is not None:
        known.check_unambiguous(ref.uri for ref in found)
    return [ManifestRow(number, ref.uri, ref.size_bytes, ref.offset) for number, ref in enumerate(found)]


def _with_classes(
    rows: Sequence[ManifestRow], setting: Setting, question: Question, known: ImageClasses | None, place: Place
) -> list[SampledImage]:
    if known is not None:
        names = [known.name_of(row.uri) or "" for row in rows]
        return [SampledImage(row, known.classes[name]) for row, name in zip(rows, names, strict=True)]
    ((_, found),) = place.calls(find_classes, {"finding classes": (setting, rows, question.class_threshold)})
    return found


def _identity(
    resolved: ResolvedSpec, question: Question, known: ImageClasses | None, judge_digest: str
) -> dict[str, object]:
    """What rewards depend on beside the candidate."""
    spec = resolved.spec
    how = {"threshold": question.class_threshold} if known is None else {"file": known.digest}
    return {
        "input": spec.input,
        "extensions": spec.extensions,
        "uri_column": spec.uri_column,
        "image_column": spec.image_column,
        **spec.limits._asdict(),
        "sample": question.sample,
        "classes": json.loads(resolved.vocabulary.to_json()),
        "image_classes": how,
        "clip": spec.clip,
        "weights": resolved.weights_digest,
        "judge": judge_digest,
        "dtype": spec.dtype,
        "package_version": __version__,
    }


def _refuse_silent(sample: Sequence[SampledImage], question: Question) -> None:
    """Refuses a sample that says nothing, before the work is done."""
    errors = [image.error for image in sample if image.error is not None]
    if len(errors) == len(sample):
        raise InputError(
            f"none of the {len(sample):,} images of the sample could be read ({errors[0]}); check the input, and the "
            "permission to read it"
        )
    if any(len(image.classes) >= FEWEST_CLASSES for image in sample):
        return
    hint = (
        f"lower --class-threshold (it is {question.class_threshold:g}), or give --image-classes"
        if question.image_classes is None
        else "take a sample of images with more"
    )
    raise InputError(
        f"none of the {len(sample):,} images of the sample has two classes or more, and the reward says nothing about "
        f"others; {hint}"
    )


def _refuse_hopeless(ranking: Ranking, done: Mapping[str, Assessment]) -> None:
    if not ranking.images:
        reason = next(iter(ranking.unread.values()), "")
        raise InputError(f"no image with two classes could be read with every candidate ({reason}); check the input")
    failures = [verdict.error for found in done.values() for verdict in found.verdicts if verdict.status == "ok"]
    if not failures:
        reasons = [verdict.error for found in done.values() for verdict in found.verdicts if verdict.error]
        raise RunFailedError(f"no candidate could segment any image ({reasons[0]}); look at the methods and settings")
