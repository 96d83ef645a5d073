"""Names that are not text, or lead nowhere: each is an image of its own that says what is wrong, or is read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.errors import ImageError, InputError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store
from ovss_ray.images.addresses import local_path, storable
from ovss_ray.images.members import split_member, tar_uri

LATIN = b"caf\xe9 100%.jpg"
ESCAPED = "caf%E9%20100%25.jpg"


def path_of(folder: Path, name: bytes) -> str:
    return os.fsdecode(os.fsencode(folder) + b"/" + name)


def write(folder: Path, name: bytes, data: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, name)
    with open(path, "wb") as file:
        file.write(data)
    return path


def fetched(refs: list[ImageRef]) -> list[bytes]:
    fetcher = Fetcher(attempts=1)
    return [fetcher.fetch(ref.uri, ref.size_bytes, ref.offset) for ref in refs]


# -- the rule --------------------------------------------------------------------------------------------------------

FILE_NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: not {0, 47} & set(name) and name not in (b".", b"..")
)


@given(FILE_NAMES)
def test_any_file_name_can_be_had_back_from_its_address(name: bytes) -> None:
    path = path_of(Path("/photos"), name)
    uri = storable(path)
    uri.encode()
    assert os.fsencode(local_path(uri)) == b"/photos/" + name
    try:
        assert uri == "/photos/" + name.decode()
    except UnicodeDecodeError:
        assert uri.startswith("file:///photos/")
        assert uri.isascii()


@given(FILE_NAMES, FILE_NAMES)
def test_any_member_of_any_tar_can_be_had_back_from_its_address(name: bytes, file: bytes) -> None:
    member = name.decode("utf-8", "surrogateescape")
    tar = path_of(Path("/photos"), file.replace(b"::", b"--"))
    uri = storable(tar_uri(member, tar))
    uri.encode()
    found = split_member(uri)
    assert found is not None
    assert (found.name, local_path(found.file)) == (member, tar)


@pytest.mark.parametrize(
    "uri", ["/a b/%41.jpg", "/a\nb.jpg", "s3://b/ä%20?#.jpg", "tar://a%41.jpg::/b.tar", "", "/ä/☃.jpg"]
)
def test_names_that_are_text_stay_as_they_are(uri: str) -> None:
    assert storable(uri) == uri


# -- where they are met ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "/*.jpg", "/**/*.jpg"])
def test_a_file_whose_name_is_not_utf8_is_an_image_like_others(pattern: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name, data in ((LATIN, b"latin"), ("ä.jpg".encode(), b"text"), (b"new\nline.jpg", b"two lines")):
        write(folder, name, data)
    refs = list(list_images(f"{folder}{pattern}"))
    uris = {f"file://{folder}/{ESCAPED}": b"latin", f"{folder}/ä.jpg": b"text", f"{folder}/new\nline.jpg": b"two lines"}
    assert dict(zip((ref.uri for ref in refs), fetched(refs), strict=True)) == uris
    assert [ref.uri for ref in list_images(f"{folder}{pattern}", sample=0.999999)] == [ref.uri for ref in refs]


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = path_of(tmp_path, b"\xff\xfe")
    os.mkdir(folder)  # noqa: PTH102
    write(Path(folder), b"a.jpg", b"a")
    for source in (folder, tmp_path, storable(folder), path_of(tmp_path, b"\xff\xfe/a.jpg")):
        (ref,) = list_images(source)
        assert (ref.uri, fetched([ref])) == (f"file://{tmp_path}/%FF%FE/a.jpg", [b"a"])


@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.tsv", "l.jsonl", "l.parquet"])
def test_lists_name_such_files_by_their_bytes_or_by_their_address(name: str, tmp_path: Path) -> None:
    write(tmp_path, LATIN, b"latin")
    write(tmp_path, b"good.jpg", b"good")
    address = f"file://{tmp_path}/{ESCAPED}"
    source = tmp_path / name
    if name == "l.parquet":
        texts = pa.array([LATIN, b"good.jpg", address.encode()], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"url": texts}), source)
    else:
        rows = [LATIN, b"good.jpg", address.encode()]
        if name == "l.jsonl":
            rows = [b'{"url": "' + row + b'"}' for row in rows]
        elif name != "l.txt":
            rows = [b"url", *rows]
        source.write_bytes(b"\n".join(rows))
    refs = list(list_images(source))
    assert [ref.uri for ref in refs] == [address, f"{tmp_path}/good.jpg", address]
    assert fetched(refs) == [b"latin", b"good", b"latin"]


def test_addresses_on_the_web_and_in_buckets_keep_their_bytes_too(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"https://host/caf\xe9?q=1\ns3://bucket/caf\xe9.jpg\n")
    (tmp_path / "l.jsonl").write_text('{"url": "s3://bucket/half \\ud83d.jpg"}\n')
    found = [ref.uri for name in ("l.txt", "l.jsonl") for ref in list_images(tmp_path / name)]
    assert found == ["https://host/caf%E9?q=1", "s3://bucket/caf%E9.jpg", "s3://bucket/half %ED%A0%BD.jpg"]


def test_kept_columns_that_are_not_utf8_lose_only_those_bytes(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"url,caption\na.jpg,caf\xe9\n")
    (ref,) = list_images(tmp_path / "l.csv", keep_columns=["caption"])
    assert json.loads(ref.extra or "") == {"caption": "caf?"}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_tars(kind: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [os.fsdecode(LATIN), "ä.jpg", "new\nline.jpg", "100%.jpg", "../up.jpg", "/top.jpg", "._a.jpg", ".b/c.jpg"]
    tar_path = path_of(tmp_path, b"\xe9.tar")
    with tarfile.open(tar_path, "w", format=kind, encoding="utf-8", errors="surrogateescape") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    refs = list(list_images(tmp_path))
    tar_uri = f"file://{tmp_path}/%E9.tar"
    assert [ref.uri for ref in refs] == [
        f"tar+escaped://{ESCAPED}::{tar_uri}",
        *(f"tar://{name}::{tar_uri}" for name in ("ä.jpg", "new\nline.jpg", "100%.jpg", "/top.jpg")),
    ]
    assert fetched(refs) == [b"abc"] * 5
    assert "3 members of tars are left out" in caplog.text


def test_names_that_lead_nowhere_are_images_that_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write(folder, b"good.jpg", b"good")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "a.jpg").symlink_to("b.jpg")
    (folder / "b.jpg").symlink_to("a.jpg")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    (folder / "long.jpg").symlink_to("x" * 255 + "/" + "y" * 255)
    (folder / "in.jpg").symlink_to("good.jpg/below")
    (folder / "self").symlink_to(".")
    waits: list[float] = []
    fetcher = Fetcher(attempts=5, sleep=waits.append)
    reasons = {}
    for ref in list_images(folder):
        try:
            assert fetcher.fetch(ref.uri) == b"good"
        except ImageError as error:
            reasons[Path(ref.uri).name] = (error.status, error.reason)
    looped = ("not_found", "Too many levels of symbolic links")
    assert reasons == {
        **dict.fromkeys(("a.jpg", "b.jpg", "loop.jpg"), looped),
        "gone.jpg": ("not_found", "No such file or directory"),
        "in.jpg": ("not_found", "Not a directory"),
        "long.jpg": ("not_found", "No such file or directory"),
    }
    assert waits == []


def test_a_name_in_a_list_that_is_too_long_is_an_image_that_says_so(tmp_path: Path) -> None:
    write(tmp_path, b"good.jpg", b"good")
    (tmp_path / "l.txt").write_text("good.jpg\n" + "x" * 300 + ".jpg\n")
    good, long = list_images(tmp_path / "l.txt")
    assert fetched([good]) == [b"good"]
    with pytest.raises(ImageError, match="File name too long") as caught:
        Fetcher().fetch(long.uri)
    assert caught.value.status == "not_found"


NOBODY = """
import json, os, sys
from ovss_ray.errors import ImageError, InputError
from ovss_ray.images import Fetcher, list_images
if os.geteuid() == 0:
    os.setuid(65534)
"""


def _as_nobody(script: str, *arguments: object) -> str:
    """Run Python as a user without rights, which whoever is no administrator is already."""
    command = [sys.executable, "-c", NOBODY + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def open_to_all(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o755)
    return tmp_path


SHOW = """
rows = []
for ref in list_images(sys.argv[1]):
    try:
        rows.append([ref.uri, "ok", Fetcher().fetch(ref.uri).decode()])
    except ImageError as error:
        rows.append([ref.uri, error.status, error.reason])
print(json.dumps(rows))
"""


def test_a_folder_without_permission_is_one_row_that_says_so(open_to_all: Path) -> None:
    folder = open_to_all / "photos"
    write(folder, b"good.jpg", b"good")
    write(folder / "locked", b"a.jpg", b"a")
    (folder / "through.jpg").symlink_to("locked/a.jpg")
    write(folder, b"own.jpg", b"own")
    (folder / "own.jpg").chmod(0)
    (folder / "locked").chmod(0)
    try:
        rows = json.loads(_as_nobody(SHOW, folder))
    finally:
        (folder / "locked").chmod(0o755)
    denied = ["forbidden", "Permission denied"]
    assert rows == [
        [f"{folder}/good.jpg", "ok", "good"],
        [f"{folder}/locked/", *denied],
        [f"{folder}/own.jpg", *denied],
        [f"{folder}/through.jpg", *denied],
    ]


def test_a_root_without_permission_is_an_error(open_to_all: Path) -> None:
    folder = open_to_all / "photos"
    write(folder, b"good.jpg", b"good")
    folder.chmod(0o111)
    said = _as_nobody("try: list_images(sys.argv[1])\nexcept InputError as error: print(error)", folder)
    assert said.startswith(f"no permission to read {folder}")


def test_what_vanishes_while_a_folder_is_listed_is_an_image_that_says_so(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg", "b/3.jpg", "c/4.jpg"):
        write((tmp_path / name).parent, os.fsencode(Path(name).name), b"x")
    found = list_images(tmp_path)
    uris = [next(found).uri]
    (tmp_path / "b" / "2.jpg").unlink()
    (tmp_path / "b" / "3.jpg").unlink()
    (tmp_path / "b").rmdir()
    refs = list(found)
    assert [*uris, *(ref.uri for ref in refs)] == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/", f"{tmp_path}/c/4.jpg"]
    with pytest.raises(ImageError, match="No such file") as caught:
        Fetcher().fetch(refs[0].uri)
    assert caught.value.status == "not_found"


# -- keys of buckets -------------------------------------------------------------------------------------------------

KEYS = [
    "a b.jpg",
    "a+b.jpg",
    "100%.jpg",
    "%41.jpg",
    "q?x=1.jpg",
    "hash#1.jpg",
    "two//slashes.jpg",
    "tab\t.jpg",
    "\N{SNOWMAN}\N{SMILING FACE WITH OPEN MOUTH}.jpg",
    unicodedata.normalize("NFD", "käse.jpg"),
    unicodedata.normalize("NFC", "käse.jpg"),
    "[ab]*{c,d}.jpg",
    "a&b<c>\"'.jpg",
    "colon::twice.jpg",
    "s3:/x.jpg",
    " lead.jpg",
    "back\\slash.jpg",
]


def test_keys_with_any_character_are_listed_and_read(s3: str) -> None:
    fs, root = open_store(s3)
    for key in KEYS:
        fs.call_s3("put_object", Bucket=root, Key=f"in/{key}", Body=key.encode())
    fs.call_s3("put_object", Bucket=root, Key="in/folder.jpg/", Body=b"")
    refs = {ref.uri: ref for ref in list_images(f"{s3}/in")}
    assert sorted(refs) == sorted(f"{s3}/in/{key}" for key in KEYS)
    for key in KEYS:
        assert fetched([refs[f"{s3}/in/{key}"]]) == [key.encode()]


def test_keys_in_a_list(s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    keys = [key for key in KEYS if key == key.strip()]
    for key in keys:
        fs.call_s3("put_object", Bucket=root, Key=key, Body=key.encode())
    pq.write_table(pa.table({"url": [f"{s3}/{key}" for key in keys]}), tmp_path / "l.parquet")
    assert fetched(list(list_images(tmp_path / "l.parquet"))) == [key.encode() for key in keys]


def test_a_list_in_two_bytes_a_character_is_explained(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le"):
        (tmp_path / "l.txt").write_bytes("a.jpg\nb.jpg\n".encode(encoding))
        with pytest.raises(InputError, match="not UTF-8 text; save the list as UTF-8"):
            list_images(tmp_path / "l.txt")
