"""Ground truth of one's own: any folder of label images with a list of classes."""

from __future__ import annotations

import os
import re

from ovss_ray.errors import InputError, SettingError
from ovss_ray.evaluation.ground_truth.errors import AnnotationError, ColourAnnotationError
from ovss_ray.evaluation.ground_truth.id_maps import IdMap, IdMapSource, load_id_map
from ovss_ray.evaluation.ground_truth.ids import IdTable
from ovss_ray.evaluation.ground_truth.pixels import read_colours, read_indices, show_colour
from ovss_ray.evaluation.ground_truth.place import AnnotationFiles, DataRoot
from ovss_ray.evaluation.ground_truth.truth import GroundTruth, MappedTruth
from ovss_ray.images.stores import StorageOptions
from ovss_ray.vocabulary import Source, Vocabulary, load_vocabulary

_ENDINGS = (".png", ".tif", ".tiff")


def open_folder_truth(
    folder: str | os.PathLike[str],
    classes: Source,
    *,
    id_map: IdMapSource | None = None,
    ignore_index: int | None = None,
    label_suffix: str = "",
    image_suffix: str = "",
    storage_options: StorageOptions | None = None,
) -> GroundTruth:
    """Open a folder of label images: PNG (grey or indexed, 8 or 16 bits) or TIFF, in folders as deep as they like.

    An image of a run belongs to the label image with the same path below `folder`, endings aside: the longest end of
    its address that is one counts, so that `s3://photos/seq1/0001.jpg` finds `seq1/0001.png`, else `0001.png`.

    Args:
        folder: local, or of an object store.
        classes: see `load_vocabulary`.
        id_map: what the values in the files mean, see `load_id_map`; None: they are the ids of the classes. An id map
            of colours is for RGB images.
        ignore_index: the value in the files of pixels that do not count; None: 255, or 65535 with more than 255
            classes, unless the id map gives it a meaning.
        label_suffix: what the names of label images have behind that of the image, such as "_L"; others are left out.
        image_suffix: the same for images, such as "_leftImg8bit".
        storage_options: see `open_store`.

    Raises:
        InputError: there is no such folder, or no label image in it.
        SettingError: the classes or the id map cannot be used, or the files are colour images without a map of colours.
    """
    vocabulary = load_vocabulary(classes)
    meaning = None if id_map is None else load_id_map(id_map, vocabulary)
    of_colours = meaning is not None and meaning.of_colours
    root = DataRoot.of(os.fspath(folder), storage_options)
    files = _label_files(root, label_suffix)
    truth = MappedTruth(
        name=re.sub(r"[^\w.-]", "_", root.uri.rpartition("/")[2]) or "ground_truth",
        vocabulary=vocabulary,
        root=root.uri,
        expected_images=None,
        source=AnnotationFiles(root, files, read_colours if of_colours else read_indices),
        table=IdTable(_ids(vocabulary, meaning, ignore_index), vocabulary.label_dtype),
        image_suffix=image_suffix,
        show=show_colour if of_colours else str,
    )
    _refuse_other_kind(truth)
    return truth


def _label_files(root: DataRoot, suffix: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in root.paths("", deep=True):
        stem, dot, ending = path.rpartition(".")
        hidden = any(part.startswith(".") for part in path.split("/"))
        if hidden or f"{dot}{ending}".lower() not in _ENDINGS or not stem.endswith(suffix):
            continue
        name = stem.removesuffix(suffix)
        if name in files:
            raise InputError(f"{root.uri} has two label images of {name}: {files[name]} and {path}; remove one")
        files[name] = path
    if not files:
        wanted = ", ".join(f"*{suffix}{ending}" for ending in _ENDINGS)
        raise InputError(f"no label image in {root.uri}: looked for {wanted}; there is {root.shown_entries()}")
    return files


def _ids(vocabulary: Vocabulary, meaning: IdMap | None, ignore_index: int | None) -> dict[int, int]:
    ids = {value: value for value in range(vocabulary.num_classes)} if meaning is None else dict(meaning.ids)
    if meaning is not None and meaning.of_colours:
        if ignore_index is not None:
            raise SettingError(
                "ignore_index is a number, and the id map is one of colours; write 'r,g,b: ignore' in it"
            )
        return ids
    if ignore_index is None:
        return {vocabulary.ignore_index: vocabulary.ignore_index} | ids
    class_id = ids.get(ignore_index, vocabulary.ignore_index)
    if class_id != vocabulary.ignore_index:
        raise SettingError(
            f"the value {ignore_index} cannot be ignored, because it is that of the class "
            f"'{vocabulary.names[class_id]}'; leave the class out, or give an id map"
        )
    return ids | {ignore_index: vocabulary.ignore_index}


def _refuse_other_kind(truth: GroundTruth) -> None:
    """One look at the first file: colour images are a mistake of the command, not of a file."""
    try:
        truth.read(truth.names()[0])
    except ColourAnnotationError as error:
        raise SettingError(str(error)) from error
    except AnnotationError:
        return  # of this image only, and said where it is scored
