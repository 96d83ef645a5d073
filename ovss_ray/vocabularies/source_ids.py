"""What the shipped vocabularies say about the files of their data sets."""

from __future__ import annotations

from functools import cache
from importlib import resources

from ovss_ray.vocabularies.entries import parse_yaml


@cache
def load_source_ids(name: str) -> dict[int, int]:
    """Value in the files as they are downloaded -> class id, of a shipped vocabulary; see its `source_id_kind`.

    Classes without a value of their own, such as the background of COCO-Object, are left out.
    """
    text = (resources.files("ovss_ray.vocabularies") / f"{name}.yaml").read_text("utf-8")
    classes = parse_yaml(text, name)["classes"]
    return {int(item["source_id"]): int(item["id"]) for item in classes if item["source_id"] != "null"}
