"""`evaluate:` of a job file: the ground truth that a run is scored against once it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ovss_ray.errors import SettingError, explain_invalid
from ovss_ray.images.splits import DEFAULT_SPLIT, BenchmarkSplit


class EvaluateSpec(BaseModel):
    """What `ovss-ray evaluate` is told by its flags of the same names: a benchmark, or a folder of label images.

    Construct it with `EvaluateSpec.build`, which turns every invalid value into one `SettingError` sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    benchmark: str | None = Field(default=None, description="voc21, cityscapes, ...")
    root: str | None = Field(default=None, min_length=1, description="Folder or bucket of the benchmark's data set.")
    split: str = Field(default=DEFAULT_SPLIT, description="Split of the benchmark.")

    ground_truth: str | None = Field(default=None, min_length=1, description="Folder or bucket of label images.")
    classes: str | list[str] | dict[str, Any] | None = Field(
        default=None, description="Classes of these label images; by default those of the job."
    )
    id_map: str | dict[str | int, str | int] | None = Field(
        default=None, description="What the values of the label images mean: a file, or the mapping itself."
    )
    ignore_index: int | None = Field(default=None, ge=0, description="Value of pixels that do not count.")
    label_suffix: str = Field(default="", description="What label images have behind the name of their image.")
    image_suffix: str = Field(default="", description="What images have behind the name of their label image.")

    boundary: bool = Field(default=True, description="Boundary IoU too.")
    seen: str | list[str] | None = Field(default=None, description="Classes that count as seen, for hIoU.")
    json_file: str | None = Field(default=None, alias="json", description="Where everything is written as JSON.")
    page: str | None = Field(default=None, description="Where a page (HTML) is written.")

    @model_validator(mode="after")
    def _names_one_ground_truth(self) -> EvaluateSpec:
        if (self.benchmark is None) == (self.ground_truth is None):
            raise ValueError("name the ground truth: either benchmark and root, or ground_truth")
        if (self.benchmark is None) != (self.root is None):
            raise ValueError("benchmark and root belong together: the name, and where its data set lies")
        own = ("classes", "id_map", "ignore_index", "label_suffix", "image_suffix")
        foreign = own if self.benchmark is not None else ("split",)
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {'' if self.benchmark is None else 'not '}for a benchmark; leave it out")
        return self

    @property
    def images(self) -> BenchmarkSplit | None:
        """The images of the benchmark; None for label images of one's own."""
        if self.benchmark is None or self.root is None:
            return None
        return BenchmarkSplit(self.benchmark, self.split, self.root)

    @classmethod
    def build(cls, values: Any) -> EvaluateSpec:
        """Validate what stands below `evaluate:`.

        Raises:
            SettingError: one sentence with the field, its value and what is allowed.
        """
        if not isinstance(values, Mapping):
            raise SettingError("evaluate must hold 'field: value' lines, such as benchmark and root")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            fields = [field.alias or name for name, field in cls.model_fields.items()]
            raise explain_invalid(error, source="evaluate", fields=fields) from None
