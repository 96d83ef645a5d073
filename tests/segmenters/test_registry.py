"""Finding methods by name, without importing what is not used."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

import ovss_ray
from ovss_ray.errors import SettingError
from ovss_ray.segmenters import METHODS, Segmenter, get_method, load_segmenter, method_names


def test_methods_are_the_files_of_the_package() -> None:
    assert set(method_names()) >= {"clipbase", "maskclip"}
    assert method_names() == METHODS
    assert all(issubclass(get_method(name), Segmenter) for name in METHODS)


def test_a_misspelt_method_suggests_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"no method 'maskclp', only .*; did you mean 'maskclip'\?"):
        load_segmenter("maskclp")


def test_a_method_of_ones_own_is_named_by_module_and_class() -> None:
    own = get_method("ovss_ray.segmenters.clipbase:CLIPBase")
    assert own is get_method("clipbase")
    for name, said in [
        ("no_such_package.methods:Mine", "No module named 'no_such_package'; install the module wherever workers run"),
        ("ovss_ray.segmenters.clipbase:Mine", "the module ovss_ray.segmenters.clipbase has no Mine"),
        ("pathlib:Path", "is not a Segmenter; see docs/adding_a_method.md"),
    ]:
        with pytest.raises(SettingError, match=re.escape(said)):
            get_method(name)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"views": "blur"}, "views = 'blur': should be a list"),
        ({"views": []}, "views = []: should have at least 1 item"),
        (
            {"views": ["blurr"]},
            "views = 'blurr': should be 'original', 'grayscale', 'blur', 'vertical_flip' or 'horizontal_flip'",
        ),
        ({"closing": "maybe"}, "closing = 'maybe': should be a valid boolean"),
        ({"pad": "x"}, "pad = 'x': should be a valid integer, or should be 'patch'"),
    ],
)
def test_a_wrong_setting_is_explained_in_the_words_of_settings(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as error:
        get_method("itaclip").parse_settings(setting)
    assert str(error.value) == f"settings of itaclip: {said}"


def test_listing_methods_is_free() -> None:
    code = (
        "import sys; from ovss_ray.segmenters import method_names; assert 'maskclip' in method_names();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_exist() -> None:
    assert len(ovss_ray.__all__) <= 15
    for name in ("load_segmenter", "Segmenter", "Segmentation", "Vocabulary", "load_vocabulary", "method_names"):
        assert getattr(ovss_ray, name) is not None
    assert set(ovss_ray.__all__) == set(dir(ovss_ray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ovss_ray.nothing
