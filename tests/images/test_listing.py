"""Listing images: folders, patterns, lists and single files, on disks, in buckets and on the web."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.errors import InputError, SettingError
from ovss_ray.images import ImageRef, list_images, open_store, walking
from ovss_ray.images.globs import GlobPattern

TREE = (
    "a.jpg",
    "b.PNG",
    "notes.txt.bak",
    "a/2.jpeg",
    "a/10.webp",
    "a/deep/er/x.tif",
    "c/.hidden.jpg",
    ".cache/thumb.jpg",
    "2024-01/p.jpg",
    "2024-02/sub/q.jpg",
    "2023-12/o.jpg",
    "a.b/z.gif",
)


def plant(root: Path, names: tuple[str, ...] = TREE) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def plant_bucket(bucket: str, names: tuple[str, ...] = TREE, data: bytes = b"x") -> str:
    fs, root = open_store(bucket)
    fs.pipe({f"{root}/{name}": data for name in names})
    return bucket


def relative(refs: Iterator[ImageRef], root: Path | str) -> list[str]:
    return [ref.uri.removeprefix(f"{root}/") for ref in refs]


IMAGES = [
    "2023-12/o.jpg",
    "2024-01/p.jpg",
    "2024-02/sub/q.jpg",
    "a.b/z.gif",
    "a.jpg",
    "a/10.webp",
    "a/2.jpeg",
    "a/deep/er/x.tif",
    "b.PNG",
]


def test_a_folder_is_listed_in_the_order_of_object_keys(tmp_path: Path) -> None:
    assert relative(list_images(plant(tmp_path)), tmp_path) == IMAGES


def test_a_bucket_lists_the_same_images_in_the_same_order(s3: str) -> None:
    assert relative(list_images(plant_bucket(s3)), s3) == IMAGES


def test_a_folder_in_a_bucket_is_not_taken_for_its_namesakes(s3: str) -> None:
    plant_bucket(s3)
    assert relative(list_images(f"{s3}/a"), s3) == ["a/10.webp", "a/2.jpeg", "a/deep/er/x.tif"]
    assert relative(list_images(f"{s3}/a/"), s3) == ["a/10.webp", "a/2.jpeg", "a/deep/er/x.tif"]


def test_a_bucket_gives_sizes_and_etags(s3: str) -> None:
    plant_bucket(s3, ("k/a.jpg",), b"12345")
    (listed,) = list_images(f"{s3}/k")
    (single,) = list_images(f"{s3}/k/a.jpg")
    md5_of_the_content = "827ccb0eea8a706c4c34a16891f84e7b"
    assert listed == single == ImageRef(f"{s3}/k/a.jpg", 5, md5_of_the_content)


def test_folder_markers_are_skipped_and_empty_images_kept(s3: str) -> None:
    fs, root = open_store(s3)
    fs.call_s3("put_object", Bucket=root, Key="photos/", Body=b"")
    fs.call_s3("put_object", Bucket=root, Key="photos/odd.jpg/", Body=b"")
    fs.call_s3("put_object", Bucket=root, Key="photos/empty.jpg", Body=b"")
    assert [(ref.uri, ref.size_bytes) for ref in list_images(f"{s3}/photos")] == [(f"{s3}/photos/empty.jpg", 0)]


def test_keys_with_odd_characters_survive(s3: str) -> None:
    names = ("a b.jpg", "a+b.jpg", "a%20b.jpg", "ä#?.jpg", "x=1/é.jpg")
    plant_bucket(s3, names)
    assert sorted(relative(list_images(s3), s3)) == sorted(names)


def test_a_bucket_is_listed_across_pages(s3: str) -> None:
    names = [f"{number:02}.jpg" for number in range(23)]
    plant_bucket(s3, tuple(names))
    for page in (1, 5, 23):
        options = {"s3": {"s3_additional_kwargs": {"MaxKeys": page}}}
        assert relative(list_images(s3, storage_options=options), s3) == names


PATTERNS = {
    "*.jpg": ["a.jpg"],
    "**/*.jpg": ["2023-12/o.jpg", "2024-01/p.jpg", "2024-02/sub/q.jpg", "a.jpg"],
    "2024-*/**.jpg": ["2024-01/p.jpg", "2024-02/sub/q.jpg"],
    "2024-*/*.jpg": ["2024-01/p.jpg"],
    "a/?.jpeg": ["a/2.jpeg"],
    "202[34]-[!0]*/*": ["2023-12/o.jpg"],
    "a/**/*.{tif,webp}": ["a/10.webp", "a/deep/er/x.tif"],
    "{a,a.b}/*": ["a.b/z.gif", "a/10.webp", "a/2.jpeg"],
    "{a/deep,a.b}/**": ["a.b/z.gif", "a/deep/er/x.tif"],
    ".cache/*.jpg": [".cache/thumb.jpg"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_choose_local_files(pattern: str, tmp_path: Path) -> None:
    assert relative(list_images(f"{plant(tmp_path)}/{pattern}"), tmp_path) == PATTERNS[pattern]


def test_patterns_choose_keys(s3: str) -> None:
    plant_bucket(s3)
    assert {pattern: relative(list_images(f"{s3}/{pattern}"), s3) for pattern in PATTERNS} == PATTERNS


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "b.c", "*", "?", "**", "a*", "[ab]"]), min_size=1, max_size=4), st.data())
def test_pruned_folders_never_hold_a_match(parts: list[str], data: st.DataObject) -> None:
    pattern = GlobPattern("root/" + "/".join(parts) + "*")
    names = data.draw(st.lists(st.sampled_from(["a", "b", "b.c", "ab"]), min_size=1, max_size=5))
    whole = "/".join(["root", *names]).removeprefix(pattern.base).lstrip("/")
    if pattern.matches(whole):
        folders = whole.split("/")[:-1]
        assert all(pattern.may_contain("/".join(folders[: depth + 1])) for depth in range(len(folders)))


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    plant(tmp_path, ("photo[1].jpg", "photo1.jpg"))
    assert relative(list_images(tmp_path / "photo[1].jpg"), tmp_path) == ["photo[1].jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    plant(tmp_path / "data", ("x/a.jpg", "y/b.jpg"))
    (tmp_path / "data/x/loop").symlink_to(tmp_path / "data")
    (tmp_path / "other").mkdir()
    plant(tmp_path / "other", ("c.jpg",))
    (tmp_path / "data/linked").symlink_to(tmp_path / "other")
    (tmp_path / "data/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "data/pipe.jpg")
    found = relative(list_images(tmp_path / "data"), tmp_path / "data")
    assert found == ["gone.jpg", "linked/c.jpg", "x/a.jpg", "y/b.jpg"]


def test_an_enormous_folder_comes_in_sorted_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"{number}.jpg" for number in range(50))
    plant(tmp_path, names)
    monkeypatch.setattr(walking, "SORTED_NAMES", 8)
    found = relative(list_images(tmp_path), tmp_path)
    assert sorted(found) == sorted(names)
    assert all(found[start : start + 8] == sorted(found[start : start + 8]) for start in range(0, 50, 8))


def test_only_the_extensions_asked_for_are_images(tmp_path: Path) -> None:
    plant(tmp_path)
    assert relative(list_images(tmp_path, extensions=["png", ".GIF"]), tmp_path) == ["a.b/z.gif", "b.PNG"]


def test_paths_are_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, ("sub/a.jpg",))
    monkeypatch.chdir(tmp_path / "sub")
    for source in (".", "a.jpg", "../sub", "*.jpg", f"file://{tmp_path}/sub"):
        assert [ref.uri for ref in list_images(source)] == [str(tmp_path / "sub/a.jpg")]


# Limit and sample.


def test_limit_takes_the_first(tmp_path: Path) -> None:
    assert relative(list_images(plant(tmp_path), limit=2), tmp_path) == IMAGES[:2]


def test_a_sample_is_stable_nested_and_independent_of_order(tmp_path: Path) -> None:
    names = [f"/data/{number}.jpg" for number in range(4000)]
    forward, backward = tmp_path / "f.txt", tmp_path / "b.txt"
    forward.write_text("\n".join(names))
    backward.write_text("\n".join(reversed(names)))
    tenth = {ref.uri for ref in list_images(forward, sample=0.1)}
    assert {ref.uri for ref in list_images(backward, sample=0.1)} == tenth
    assert tenth < {ref.uri for ref in list_images(forward, sample=0.3)}
    assert 320 < len(tenth) < 480  # four standard deviations around 400
    assert len(list(list_images(forward, sample=1.0))) == 4000
    assert [ref.uri for ref in list_images(forward, sample=0.1, limit=3)] == [n for n in names if n in tenth][:3]


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"sample": 0.0}, {"sample": 1.5}, {"sample": -1.0}])
def test_impossible_limits_are_refused(arguments: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=next(iter(arguments))):
        list_images(plant(tmp_path), **arguments)  # type: ignore[arg-type]


# What is said when there is nothing to list.


def test_a_misspelt_folder_suggests_the_right_one(tmp_path: Path) -> None:
    plant(tmp_path, ("photos/2024/a.jpg",))
    with pytest.raises(InputError, match=rf"no {tmp_path}/fotos/2024 \(did you mean {tmp_path}/photos\?\)"):
        list_images(tmp_path / "fotos/2024")


def test_a_misspelt_folder_in_a_bucket_suggests_the_right_one(s3: str) -> None:
    plant_bucket(s3, ("data/photos/a.jpg", "data/masks/a.png"))
    with pytest.raises(InputError, match=rf"no file is there \(did you mean {s3}/data/photos\?\)"):
        list_images(f"{s3}/data/fotos")


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    plant(tmp_path, ("a.npy", "b.npy", "c.psd", "README"))
    with pytest.raises(InputError, match=r"4 other files were seen \(2 \.npy, 1 .*\).*bmp, gif, heic, .*jpeg"):
        list_images(tmp_path)


def test_empty_places_say_so(tmp_path: Path, s3: str) -> None:
    with pytest.raises(InputError, match=r"no image found in .*: no file is there"):
        list_images(tmp_path)
    with pytest.raises(InputError, match=r"no image found in .*nothing/here: no file is there"):
        list_images(f"{s3}/nothing/here")
    plant_bucket(s3)
    with pytest.raises(InputError, match=r"a/x\.jpg does not exist"):
        list_images(f"{s3}/a/x.jpg")
    with pytest.raises(InputError, match=r"l\.csv does not exist"):
        list_images(f"{s3}/l.csv")


def test_an_empty_sample_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 9 images"):
        list_images(plant(tmp_path), sample=1e-12)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    plant(tmp_path, ("model.safetensors",))
    with pytest.raises(InputError, match=r"neither a folder, nor a tar, nor a list .* nor an image"):
        list_images(tmp_path / "model.safetensors")


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_named() -> None:
    with pytest.raises(InputError, match="the bucket no-such-bucket-here does not exist"):
        list_images("s3://no-such-bucket-here/photos")


ONE_TRY = {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 2}}


def test_an_endpoint_that_does_not_answer_is_named(s3: str) -> None:
    with pytest.raises(InputError, match=r"cannot be reached.*endpoint.*127\.0\.0\.1:9"):
        list_images(f"{s3}/photos", storage_options={"s3": {"endpoint_url": "http://127.0.0.1:9", **ONE_TRY}})


def test_missing_credentials_are_explained(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(InputError, match=r"no credentials for s3://.*AWS_PROFILE.*anon"):
        list_images(f"{s3}/photos", storage_options={"s3": ONE_TRY})


def test_what_is_left_out_is_said_by_extension_though_there_are_images(
    tmp_path: Path, s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, ("x.MOV", "y.mov", "z.psd", "README"))
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for name in ("1.jpg", "1.json", "2.cr2"):
            tar.addfile(tarfile.TarInfo(name))
    list(list_images(tmp_path))
    (said,) = (message for message in caplog.messages if "left out" in message)
    assert "left out 6 files (2 .mov, 1 " in said
    assert all(f"1 {kind}" in said for kind in (".psd", ".json", ".cr2", "without extension"))
    assert "--extensions" in said

    caplog.clear()
    plant_bucket(s3)
    store, path = open_store(s3)
    store.pipe_file(f"{path}/a/film.mkv", b"x")
    list(list_images(f"{s3}/a"))
    assert any("1 .mkv" in message for message in caplog.messages)


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(list_images(plant(tmp_path, ("a.jpg", "b/c.PNG", ".hidden"))))
    assert not caplog.messages
