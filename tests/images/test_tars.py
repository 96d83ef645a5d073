"""Images in tars: every format that people pack, on disks, in buckets and on the web, whole and damaged."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ovss_ray.errors import ImageError, InputError, SettingError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store
from ovss_ray.images.globs import GlobPattern, expand_braces
from ovss_ray.images.parallel import flat_map_ordered
from tests.images.conftest import RangeServer, fetch

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: str = "pax") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[format]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, size: int = 700, start: int = 0) -> list[tuple[str, bytes]]:
    """WebDataset samples: an image, its caption and its JSON."""
    rng = np.random.default_rng(start)
    members = []
    for number in range(start, start + count):
        members.append((f"{number:06}.jpg", rng.bytes(size + number)))
        members.append((f"{number:06}.json", json.dumps({"caption": f"no. {number}", "id": number}).encode()))
        members.append((f"{number:06}.txt", f"no. {number}".encode()))
    return members


def contents(tar: Path) -> dict[str, bytes]:
    """What tarfile itself reads: name and bytes of every image."""
    with tarfile.open(tar) as file:
        images = [info for info in file if info.isreg() and info.name.endswith((".jpg", ".png"))]
        return {info.name: file.extractfile(info).read() for info in images}  # type: ignore[union-attr]


def fetched(refs: Iterable[ImageRef]) -> list[bytes]:
    fetcher = Fetcher(attempts=1)
    return [fetch(fetcher, ref) for ref in refs]


def names(refs: Iterable[ImageRef]) -> list[str]:
    return [ref.uri.removeprefix("tar://").partition("::")[0] for ref in refs]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_each_image_whole(format: str, tmp_path: Path) -> None:
    folder = "a-folder-with-a-long-name/" * (3 if format == "ustar" else 12)
    odd = [(f"{folder}x.jpg", b"long"), ("empty.jpg", b""), ("ä b#?.jpg", b"odd"), ("./dot.png", b"dot")]
    tar = write_tar(tmp_path / "a.tar", [*samples(30), *odd, *samples(3, start=100)], format)
    refs = list(list_images(tar))
    assert names(refs) == list(contents(tar))
    assert fetched(refs) == list(contents(tar).values())
    modified = f"{tar.stat().st_mtime_ns // 10**9}.{tar.stat().st_mtime_ns % 10**9:09d}"
    mark = f"size={tar.stat().st_size};modified={modified}"
    assert refs[0] == ImageRef(f"tar://000000.jpg::{tar}", 700, mark, 512, header_bytes=512)


def test_the_address_is_one_that_fsspec_opens(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a/b.jpg", b"content")])
    (ref,) = list_images(tar)
    with fsspec.open(ref.uri) as file:
        assert file.read() == b"content"


def test_only_regular_files_are_images_and_lost_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "real.jpg"
            file.addfile(info)
        for name in ("real.jpg", "._real.jpg", ".cache/x.jpg", "d/notes.npy"):
            info = tarfile.TarInfo(name)
            info.size = 4
            file.addfile(info, io.BytesIO(b"real"))
    with caplog.at_level(logging.WARNING):
        assert names(list_images(tar)) == ["real.jpg"]
    assert "2 images are links or sparse files" in caplog.text


def test_sparse_files_of_gnu_tar_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar program here")
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    (tmp_path / "whole.jpg").write_bytes(b"whole")
    for format in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={format}", "-cf", "a.tar", "holes.jpg", "whole.jpg"]
        if subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode:
            pytest.skip("this tar program packs no sparse files")
        with caplog.at_level(logging.WARNING):
            refs = list(list_images(tmp_path / "a.tar"))
        with tarfile.open(tmp_path / "a.tar") as tar:
            if tar.getmember("holes.jpg").sparse is None:
                pytest.skip("this file system knows no holes")
        assert (names(refs), fetched(refs)) == (["whole.jpg"], [b"whole"])
        assert "1 images are links or sparse files" in caplog.text


# How much is read.


def test_planning_reads_headers_and_not_images(range_server: RangeServer) -> None:
    size = 1 << 20
    tar = write_tar(range_server.folder / "a.tar", ((f"{number}.jpg", bytes(size)) for number in range(12)))
    refs = list(list_images(f"{range_server.uri}/a.tar"))
    assert names(refs) == list(contents(tar))
    assert range_server.requests <= 12 + 4
    assert range_server.sent_bytes < tar.stat().st_size / 10


def test_small_members_share_requests(range_server: RangeServer) -> None:
    write_tar(range_server.folder / "a.tar", samples(400, 300))
    assert sum(1 for _ in list_images(f"{range_server.uri}/a.tar")) == 400
    assert range_server.requests <= (range_server.folder / "a.tar").stat().st_size // (1 << 16) + 4


def test_an_image_is_one_request_of_its_own_bytes(range_server: RangeServer) -> None:
    tar = write_tar(range_server.folder / "a.tar", samples(20, 5000))
    refs = list(list_images(f"{range_server.uri}/a.tar"))
    assert {ref.etag for ref in refs} == {hashlib.md5(tar.read_bytes()).hexdigest()}
    range_server.requests = range_server.sent_bytes = 0
    assert fetched(refs) == list(contents(tar).values())
    assert range_server.requests == 20
    assert range_server.sent_bytes == sum(map(len, contents(tar).values())) + 20 * 512


def test_a_server_without_byte_ranges_is_explained(range_server: RangeServer) -> None:
    write_tar(range_server.folder / "a.tar", [("a.jpg", bytes(1 << 18)), ("b.jpg", b"b")])
    refs = list(list_images(f"{range_server.uri}/a.tar"))
    range_server.ranges = False
    with pytest.raises(InputError, match=r"a\.tar knows no byte ranges.*download"):
        list(list_images(f"{range_server.uri}/a.tar"))
    with pytest.raises(ImageError, match="ignores byte ranges"):
        fetched(refs)


# Several tars.


def test_a_folder_of_tars_and_images_keeps_its_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", samples(3))
    write_tar(tmp_path / "d/e.tar", samples(300, start=3))
    for name in ("a.jpg", "c.jpg", "d/f.jpg", "notes.md"):
        (tmp_path / name).write_bytes(b"own")
    expected = ["a.jpg", *(f"{number:06}.jpg" for number in range(3)), "c.jpg"]
    expected += [*(f"{number:06}.jpg" for number in range(3, 303)), "d/f.jpg"]
    refs = list(list_images(tmp_path))
    assert [name.removeprefix(f"{tmp_path}/") for name in names(refs)] == expected
    assert names(list_images(tmp_path / "*.tar")) == expected[1:4]


def test_tars_in_a_bucket_are_named_by_a_range(s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    expected = []
    for number in range(12):
        tar = write_tar(tmp_path / f"train-{number:03}.tar", samples(5, start=5 * number), list(FORMATS)[number % 3])
        fs.put_file(str(tar), f"{root}/wds/{tar.name}")
        expected += list(contents(tar).values())
    for source in ("wds/train-{000..011}.tar", "wds", "wds/*.tar", "wds/train-{000..011}*"):
        refs = list(list_images(f"{s3}/{source}"))
        assert fetched(refs) == expected
        assert {ref.etag is None for ref in refs} == {False}
    assert [ref.uri.rpartition("/")[2] for ref in list_images(f"{s3}/wds/train-{{011..000..11}}.tar")] == [
        *["train-011.tar"] * 5,
        *["train-000.tar"] * 5,
    ]
    with pytest.raises(InputError, match=r"train-012\.tar does not exist"):
        list(list_images(f"{s3}/wds/train-{{010..012}}.tar"))


def test_a_range_on_disk_and_on_the_web(range_server: RangeServer) -> None:
    tars = [write_tar(range_server.folder / f"{number}.tar", samples(2, start=number)) for number in range(8, 11)]
    expected = [data for tar in tars for data in contents(tar).values()]
    assert fetched(list_images(range_server.folder / "{8..10}.tar")) == expected
    assert fetched(list_images(f"{range_server.uri}/{{8..10}}.tar")) == expected
    assert [ref.uri for ref in list_images("/photos/{01..02}.jpg")] == ["/photos/01.jpg", "/photos/02.jpg"]


def test_a_few_images_do_not_open_all_tars(range_server: RangeServer) -> None:
    for number in range(60):
        write_tar(range_server.folder / f"{number:02}.tar", samples(3, start=number))
    assert len(list(list_images(f"{range_server.uri}/{{00..59}}.tar", limit=4))) == 4
    assert range_server.requests < 60


@pytest.mark.parametrize(
    "pattern", ["x{0..3}.tar", "{08..11}-{a,b}", "{8..11}", "{10..7}", "{000..9..4}/{1..2}", "a{1..1}", "{a,b{1..2"]
)
def test_ranges_mean_what_they_mean_to_a_shell(pattern: str) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    words = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout.split()
    assert list(expand_braces(pattern)) == words


def test_ranges_go_with_wildcards(tmp_path: Path) -> None:
    for number in range(7, 13):
        write_tar(tmp_path / f"part-{number:02}/a.tar", samples(1, start=number))
    assert names(list_images(tmp_path / "part-{08..11}/*.tar")) == [f"{number:06}.jpg" for number in range(8, 12)]
    with pytest.raises(SettingError, match=r"range \{0\.\.99999\} is too long"):
        GlobPattern("a/{0..99999}/*.tar")


# Damage.


def test_a_tar_that_is_cut_off_is_named_after_what_is_readable(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(10))
    whole = tar.read_bytes()
    with tarfile.open(tar) as file:
        last = file.getmembers()[-3]  # the last image
    for end in (last.offset_data + 1, last.offset_data + last.size - 1, last.offset + 100):
        tar.write_bytes(whole[:end])
        refs = list_images(tar)
        assert [next(refs).size_bytes for _ in range(9)] == list(range(700, 709))
        with pytest.raises(InputError, match=rf"{tar} is (cut off|damaged).*again"):
            next(refs)


def test_a_missing_end_is_forgiven(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"a" * 600), ("b.jpg", b"b" * 700)])
    whole = tar.read_bytes()
    content_end = 512 + 1024 + 512 + 700
    for end in (content_end, content_end + 100, content_end + 324, content_end + 324 + 512, content_end + 324 + 700):
        tar.write_bytes(whole[:end])
        assert fetched(list_images(tar)) == [b"a" * 600, b"b" * 700]


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"a" * 600), ("b.jpg", b"b" * 700), ("c.jpg", b"c")])
    data = bytearray(tar.read_bytes())
    data[1536 + 20] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(InputError, match=rf"{tar} is damaged: no header at byte 1536"):
        list(list_images(tar))


def test_tars_joined_end_to_end_are_read_to_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = [write_tar(tmp_path / f"{number}.part", samples(4, start=number * 4)) for number in range(3)]
    joined = tmp_path / "a.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    expected = [data for part in parts for data in contents(part).values()]
    assert fetched(list_images(joined)) == expected
    joined.write_bytes(joined.read_bytes() + b"signature of the packer" * 40)
    with caplog.at_level(logging.WARNING):
        assert fetched(list_images(joined)) == expected
    assert "is no tar and is ignored" in caplog.text


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.tar", lambda _: b"", r"a\.tar is empty"),
        ("a.tar", lambda _: b"<html>not found</html>" * 100, r"a\.tar is not a tar"),
        ("a.tar", lambda data: data[:100], r"a\.tar is not a tar"),
        ("a.tar", lambda _: bytes(10240), r"no image found in .*a\.tar"),
        ("a.tar", lambda data: b"\x1f\x8b" + data, r"a\.tar is a compressed tar.*decompress it"),
        ("a.tar.gz", lambda data: data, r"a\.tar\.gz is a compressed tar.*decompress it"),
        ("a.tgz", lambda data: data, r"a\.tgz is a compressed tar"),
        ("a::b.tar", lambda data: data, r"has '::' in its name.*rename it"),
    ],
)
def test_what_is_no_readable_tar_is_explained(
    name: str, make: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / name, samples(3))
    tar.write_bytes(make(tar.read_bytes()))
    with pytest.raises(InputError, match=message):
        list_images(tar)


def test_a_compressed_tar_in_a_folder_is_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "backup.tar.gz", samples(1))
    (tmp_path / "a.jpg").write_bytes(b"a")
    with caplog.at_level(logging.WARNING):
        assert [ref.uri for ref in list_images(tmp_path)] == [str(tmp_path / "a.jpg")]
    assert "backup.tar.gz is left out" in caplog.text
    with pytest.raises(InputError, match="compressed tar"):
        list(list_images(tmp_path / "*.gz"))


def test_a_tar_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.npy", b"1"), ("b.npy", b"2"), ("LICENSE", b"3")])
    with pytest.raises(InputError, match=r"no image found in .*3 other files were seen \(2 \.npy, 1 without"):
        list_images(tmp_path / "a.tar")


def test_the_limit_of_bytes_is_that_of_the_image_and_not_of_the_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("small.jpg", bytes(100)), ("large.jpg", bytes(5000))])
    small, large = list_images(tar)
    fetcher = Fetcher(max_bytes=1000)
    assert fetcher.fetch(small.uri, small.size_bytes, small.offset) == bytes(100)
    with pytest.raises(ImageError, match="over the limit"):
        fetcher.fetch(large.uri, large.size_bytes, large.offset)


# What lies beside the images.


def test_fields_of_samples_are_kept(tmp_path: Path) -> None:
    members = [*samples(3), ("000007.cls", b"4"), ("000007.seg.png", b"png"), ("000007.jpg", b"jpg")]
    tar = write_tar(tmp_path / "a.tar", members)
    refs = list(list_images(tar, keep_columns=["caption", "id", "txt", "cls"]))
    assert [json.loads(ref.extra or "") for ref in refs] == [
        *({"caption": f"no. {number}", "id": number, "txt": f"no. {number}", "cls": None} for number in range(3)),
        *[{"caption": None, "id": None, "txt": None, "cls": "4"}] * 2,
    ]
    assert fetched(refs) == list(contents(tar).values())
    write_tar(tmp_path / "b.tar", [("README.md", b"no images")])
    assert len(list(list_images(tmp_path / "{a,b}.tar", keep_columns=["caption"]))) == 5
    with pytest.raises(InputError, match=r"a\.tar has no column 'captoin' to keep; did you mean 'caption'"):
        list(list_images(tar, keep_columns=["captoin"]))


def test_a_sample_with_broken_json_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"1"), ("1.json", b"{")])
    assert len(list(list_images(tar))) == 1
    with pytest.raises(InputError, match=r"1\.json in .*a\.tar cannot be read"):
        list(list_images(tar, keep_columns=["caption"]))


# The order of what is read side by side.


def test_results_of_many_files_come_in_the_order_of_one_loop() -> None:
    def squares(number: int) -> Iterable[tuple[int, int]]:
        return ((number, step) for step in range(number * 37 % 600))

    expected = [pair for number in range(50) for pair in squares(number)]
    for held in (1, 300, 100_000):
        assert list(flat_map_ordered(squares, range(50), threads=7, held=held)) == expected


def test_a_failure_comes_in_its_place() -> None:
    def until_five(number: int) -> Iterable[int]:
        yield from range(300)
        if number == 5:
            raise ValueError("file 5")
        yield number

    results = flat_map_ordered(until_five, range(50), threads=4)
    assert sum(1 for _ in (next(results) for _ in range(5 * 301 + 300))) == 1805
    with pytest.raises(ValueError, match="file 5"):
        next(results)


def test_a_half_read_listing_does_not_hold_up_the_end_of_a_program(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"{name}.jpg", b"") for name in range(600)])
    program = f"""
from ovss_ray.images import parallel
from ovss_ray.images.containers import Container, ContainerReader, OtherFiles
from ovss_ray.images.references import Wanted
reader = ContainerReader(Wanted(frozenset(["jpg"])), None, OtherFiles())
tars = [Container(f"{tmp_path}/{{number}}.tar") for number in range(3)]
kept = parallel.flat_map_ordered(reader.images, tars, held=300)
print(next(kept).offset)
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "512\n"
