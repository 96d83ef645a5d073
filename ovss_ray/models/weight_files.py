"""Opening weight files without running anything that is in them."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from ovss_ray.errors import WeightsError
from ovss_ray.models.sources import file_digest, tag_config

_ARCHIVE_EXTRAS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's TorchScript archives carry among the weights."""

_STATE_KEYS = ("state_dict", "model")
"""Where training checkpoints keep the weights, beside optimizers and the like."""

_LFS_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
_FOREIGN = {
    b"\x89HDF\r\n": "an HDF5 file (of TensorFlow)",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
}
_SAFE_FORMATS = "take a .safetensors file, or a state dict saved by torch.save"


def read_state(path: Path, *, trusted: bool = False) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a weight file, and whether it is one of OpenAI's TorchScript archives.

    Nothing in the file is run: tensors come from safetensors, or from a pickle of nothing but tensors and plain values.
    TorchScript runs code of the file while it is opened, so it is read only if the file is one of OpenAI's, told by its
    SHA-256, or trusted. What a file is, its content says, not its name. Tensors stay on the disk until they are used,
    where the format allows.

    Args:
        path: a file that exists.
        trusted: whether the user vouches for the file, so that TorchScript may run.

    Raises:
        WeightsError: the file cannot be read, is no weight file, or would run code.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
        kind = _kind_of(path, head, size)
        if kind == "torchscript":
            return _read_torchscript(path, trusted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "safetensors":
                from safetensors.torch import load_file

                return load_file(str(path)), False
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise WeightsError(
            f"the weight file {path} holds more than tensors{what} and is not opened for safety: it could run code; "
            "where you trust it, save its state dict alone, as .safetensors"
        ) from None
    except Exception as error:  # each format raises its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"the weight file {path} cannot be read ({reason}); download or copy it again") from None
    return _named_tensors(content, path), False


def _kind_of(path: Path, head: bytes, size: int) -> str:
    """ "safetensors", "zip", "torchscript" or "pickle"; raises `WeightsError` for anything else, saying what it is."""
    if not size:
        raise WeightsError(f"the weight file {path} is empty; download or copy it again")
    if head.startswith(_LFS_POINTER):
        raise WeightsError(
            f"the weight file {path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or "
            "download the file itself"
        )
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[8:9] == b"{" and _check_safetensors(path, int.from_bytes(head[:8], "little"), size):
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    raise WeightsError(f"the weight file {path} is {_describe(head)}")


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        raise WeightsError(f"the weight file {path} is cut off or damaged; download or copy it again") from None
    names = [f"/{member.filename}" for member in members]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "torchscript"
    if names and all(name.endswith(".npy") for name in names):
        raise WeightsError(f"the weight file {path} is a NumPy archive (.npz); {_SAFE_FORMATS}")
    # torch.save compresses nothing: a small file must not become a large one in memory.
    if not any(name.endswith("/data.pkl") for name in names) or any(member.compress_type for member in members):
        raise WeightsError(f"the weight file {path} is a zip archive without weights; {_SAFE_FORMATS}")
    return "zip"


def _check_safetensors(path: Path, header_size: int, size: int) -> bool:
    """Whether this is a safetensors file; raises `WeightsError` if the end of it is missing."""
    if header_size > _LARGEST_HEADER:
        return False
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(header_size)
    needed = 8 + header_size
    if len(text) == header_size:
        try:
            entries = json.loads(text)
            needed += max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"),
                          default=0)  # fmt: skip
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return True  # the library says what is wrong with it
    if needed > size:
        raise WeightsError(
            f"the weight file {path} is cut off: it has {size:,} of {needed:,} bytes; download or copy it again"
        )
    return True


def _describe(head: bytes) -> str:
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return "a web page, not weights: a download gave an error page; download it again"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            return what if "unpack" in what else f"{what}; {_SAFE_FORMATS}"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return f"in no format of weights that is read here; {_SAFE_FORMATS}"
    shown = " ".join(text.split())[:60]
    return f"a text that begins with {shown!r}, not weights; download it again"


def _read_torchscript(path: Path, trusted: bool) -> tuple[dict[str, Tensor], bool]:
    if not trusted and file_digest(path) not in openai_digests():
        raise WeightsError(
            f"the weight file {path} is a TorchScript archive, which runs code of its own when it is opened, and none "
            "of those that OpenAI published; save its state dict as .safetensors where you trust it, or vouch for it "
            "with --trust-weights (in Python trust_weights=True)"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript goes out of use
        state = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    tensors = {key: value for key, value in state.items() if key not in _ARCHIVE_EXTRAS}
    return tensors, "input_resolution" in state


@cache
def openai_digests() -> frozenset[str]:
    """SHA-256 of the TorchScript archives that OpenAI published, as open_clip's table has them in their addresses."""
    urls = (str(tag_config(model, tag).get("url", "")) for model, tag in open_clip.list_pretrained())
    parts = (url.split("/")[-2] for url in urls if "openaipublic" in url)
    return frozenset(part for part in parts if re.fullmatch("[0-9a-f]{64}", part))


def _named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights of what `torch.load` gave: a state dict, or a training checkpoint that holds one."""
    state: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    for key in _STATE_KEYS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"the weight file {path} holds no named tensors; {_SAFE_FORMATS}")
    return tensors
