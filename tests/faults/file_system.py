"""A file system that fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

from fsspec.asyn import AsyncFileSystem
from fsspec.registry import _registry

from tests.faults.plan import Plan


@dataclass(frozen=True)
class FileFault:
    """What goes wrong with a call of a file system; made by the functions and constants below."""

    error: Callable[[], Exception] | None = None
    afterwards: bool = False
    stall: bool = False


def fails(error: type[Exception], *arguments: object, afterwards: bool = False) -> FileFault:
    """Raise an exception: before anything is done, or `afterwards`, when it has been done."""
    return FileFault(lambda: error(*arguments), afterwards)


HANGS = FileFault(stall=True)
IGNORES_CONDITION = FileFault()  # mode="create" overwrites


class FaultyFileSystem(AsyncFileSystem):
    """A folder behind the interface of an object store; use `faulty_file_system`.

    Methods in its plan: cat_file, pipe_file, info, ls, rm_file, open; paths: "bucket/key".
    """

    protocol = ("gs", "gcs")
    cachable = False
    plan: Plan[FileFault]
    folder: Path

    def __init__(self, **_: object) -> None:
        super().__init__()

    async def _spoilt(self, method: str, path: str, action: Callable[[FileFault], Any]) -> Any:
        fault = self.plan.pick(method, path) or FileFault()
        if fault.stall:
            await asyncio.sleep(300)
        if fault.error is not None and not fault.afterwards:
            raise fault.error()
        result = action(fault)
        if fault.error is not None:
            raise fault.error()
        return result

    def _place(self, path: str) -> Path:
        return self.folder / self._strip_protocol(path).strip("/")

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        return await self._spoilt("cat_file", path, lambda _: self._place(path).read_bytes()[start:end])

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        def write(fault: FileFault) -> None:
            place = self._place(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{uuid.uuid4().hex}"
            temporary.write_bytes(value)
            try:
                if mode == "create" and fault is not IGNORES_CONDITION:
                    os.link(temporary, place)
                else:
                    temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)

        await self._spoilt("pipe_file", path, write)

    async def _rm_file(self, path: str, **_: object) -> None:
        await self._spoilt("rm_file", path, lambda _: self._place(path).unlink())

    async def _info(self, path: str, **_: object) -> dict[str, Any]:
        return await self._spoilt("info", path, lambda _: self._describe(self._place(path)))

    async def _ls(self, path: str, detail: bool = True, **_: object) -> list[Any]:
        def look(_: FileFault) -> list[Any]:
            found = [self._describe(place) for place in sorted(self._place(path).iterdir())]
            return found if detail else [entry["name"] for entry in found]

        return await self._spoilt("ls", path, look)

    def _open(self, path: str, mode: str = "rb", **_: object) -> Any:
        fault = self.plan.pick("open", path)
        if fault is not None and fault.error is not None:
            raise fault.error()
        return open(self._place(path), mode)

    def _describe(self, place: Path) -> dict[str, Any]:
        return {
            "name": str(place.relative_to(self.folder)),
            "size": place.stat().st_size,
            "type": "directory" if place.is_dir() else "file",
        }

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self._place(path).stat().st_mtime, timezone.utc)


@contextlib.contextmanager
def faulty_file_system(folder: Path) -> Iterator[Plan[FileFault]]:
    """Let gs:// addresses of this process mean files below a folder, which fail by the plan that this gives."""
    plan: Plan[FileFault] = Plan()
    kind = type("FaultyFileSystem", (FaultyFileSystem,), {"plan": plan, "folder": folder})
    with mock.patch.dict(_registry, dict.fromkeys(FaultyFileSystem.protocol, kind)):
        yield plan
