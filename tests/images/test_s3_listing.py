"""Listing a bucket with many requests at once: the same keys in the same order as page by page, few more requests."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from fsspec.asyn import get_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.images import list_images, open_store, s3_listing
from ovss_ray.images.s3_listing import walk_s3


class Bucket:
    """ListObjectsV2 as AWS documents it, for listings too many for a server, and as other stores answer it.

    AWS shows no common prefix that is not behind StartAfter; "lenient" stores do if something in it is; stores that
    "ignore" StartAfter begin at the prefix.
    """

    def __init__(self, keys: list[str], page: int, manner: str = "strict") -> None:
        self.loop = get_loop()
        self.requests: Counter[str] = Counter()
        self._keys = sorted(keys)
        self._page = page
        self._manner = manner

    async def _call_s3(
        self,
        _method: str,
        *,
        Prefix: str,
        StartAfter: str = "",
        Delimiter: str = "",
        ContinuationToken: str = "",
        **_bucket: str,
    ) -> dict[str, Any]:
        self.requests["folders" if Delimiter else "keys"] += 1
        entries: dict[str, bool] = {}
        for key in self._keys:
            if key.startswith(Prefix) and (key > StartAfter or self._manner == "ignoring"):
                head, slash, _ = key[len(Prefix) :].partition("/")
                is_folder = bool(Delimiter and slash)
                name = Prefix + head + slash if is_folder else key
                if not (is_folder and self._manner == "strict" and name <= StartAfter):
                    entries[name] = is_folder
        names = [name for name in entries if name > ContinuationToken]
        shown = names[: self._page]
        return {
            "Contents": [{"Key": name, "Size": len(name), "ETag": f'"{name}"'} for name in shown if not entries[name]],
            "CommonPrefixes": [{"Prefix": name} for name in shown if entries[name]],
            "IsTruncated": len(names) > len(shown),
            "NextContinuationToken": shown[-1] if shown else "",
        }


MANNERS = st.sampled_from(["strict", "lenient", "ignoring"])


def listed(keys: list[str], page: int, prefix: str = "", manner: str = "strict") -> tuple[list[str], Counter[str]]:
    bucket = Bucket(keys, page, manner)
    return [file.relative for file in walk_s3(bucket, "b", "", prefix)], bucket.requests  # type: ignore[arg-type]


names = st.text("ab-./~\U0010ffff", min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(st.sets(names, max_size=80), st.integers(1, 7), st.sampled_from(["", "a", "a/", "b-"]), MANNERS)
def test_any_keys_come_once_and_sorted(keys: set[str], page: int, prefix: str, manner: str) -> None:
    expected = sorted(key for key in keys if key.startswith(prefix) and not key.endswith("/"))
    assert listed(list(keys), page, prefix, manner)[0] == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 10), MANNERS)
def test_trees_of_folders_come_once_and_sorted(seed: int, page: int, manner: str) -> None:
    choice = random.Random(seed)
    keys = set()
    for _ in range(choice.randint(0, 600)):
        depth = choice.choice([0, 1, 1, 2, 3])
        folders = [choice.choice("abcdefgh") * choice.randint(1, 2) for _ in range(depth)]
        keys.add("/".join([*folders, f"{choice.randint(0, 500):03}.jpg"]))
    assert listed(list(keys), page, "", manner)[0] == sorted(keys)


def pages(keys: list[str], page: int) -> int:
    return -(-len(keys) // page)


def test_a_short_listing_costs_its_pages_and_nothing_more() -> None:
    keys = [f"{folder:03}/{name}.jpg" for folder in range(35) for name in range(10)]
    assert listed(keys, 100)[1] == {"keys": pages(keys, 100)}


def test_large_folders_are_listed_side_by_side() -> None:
    keys = [f"data/{folder:02}/{name:04}.jpg" for folder in range(20) for name in range(1000)]
    found, requests = listed(keys, 100)
    assert found == keys
    assert requests.total() < pages(keys, 100) * 1.3


def test_small_folders_are_listed_together() -> None:
    keys = [f"{folder:04}/{name}.jpg" for folder in range(1000) for name in range(10)]
    found, requests = listed(keys, 100)
    assert found == keys
    assert requests["keys"] < pages(keys, 100) * 1.4
    assert requests["folders"] <= 1000 // 100 + 1


@pytest.mark.parametrize("folder_size", [1, 3, 5000])
def test_what_splitting_cannot_speed_up_costs_its_pages_and_nothing_more(folder_size: int) -> None:
    keys = [f"{number // folder_size:04}/{number:05}.jpg" for number in range(5000)]
    found, requests = listed(keys, 100, keys[0][:5] if folder_size == 5000 else "")
    assert found == keys
    assert requests == {"keys": pages(keys, 100)}


def test_folders_behind_many_files_are_found() -> None:
    keys = sorted(
        [f"{name:05}.jpg" for name in range(1000)]
        + [f"x{folder}/{name:03}" for folder in range(9) for name in range(200)]
    )
    found, requests = listed(keys, 100)
    assert found == keys
    assert 1 <= requests["folders"] <= 3


def test_what_waits_for_its_turn_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_listing, "_PAGES_AHEAD", 10)
    bucket = Bucket([f"{folder:02}/{name:04}.jpg" for folder in range(50) for name in range(500)], 100)
    listing = s3_listing._Listing(bucket, "b", "")  # type: ignore[arg-type]
    held = [listing._held for _ in listing.pages()]
    assert len(held) >= 250
    assert max(held) <= 10 + s3_listing._REQUESTS


def test_directory_buckets_are_listed_page_by_page() -> None:
    keys = [f"{folder}/{name:02}.jpg" for folder in range(10) for name in range(50)]
    bucket = Bucket(keys, 10)
    assert [file.relative for file in walk_s3(bucket, "b--usw2-az1--x-s3", "", "")] == keys  # type: ignore[arg-type]
    assert bucket.requests == {"keys": 50}


def test_a_real_server_gives_the_same_listing(s3: str) -> None:
    fs, root = open_store(s3)
    tree = [f"data/{folder}/{name}.jpg" for folder in ("a", "a b", "ä", "x=1/é", "a+") for name in range(40)]
    tree += [f"data/{name}.jpg" for name in range(30)] + ["data.jpg", "other/1.jpg"]
    fs.pipe({f"{root}/{name}": b"1" for name in tree})
    options = {"s3": {"s3_additional_kwargs": {"MaxKeys": 7}}}
    serial = fs.call_s3("list_objects_v2", Bucket=root, Prefix="data/")["Contents"]
    found = list(list_images(f"{s3}/data", storage_options=options))
    assert [ref.uri for ref in found] == [f"{s3}/{item['Key']}" for item in serial]
    assert {(ref.size_bytes, ref.etag) for ref in found} == {(1, serial[0]["ETag"].strip('"'))}
    assert len(found) == 230
