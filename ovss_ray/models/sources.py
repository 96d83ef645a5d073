"""Where a CLIP model comes from: parsing what the user wrote and finding the weight file behind it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
from open_clip import pretrained as open_clip_weights

from ovss_ray.errors import WeightsError, nearest
from ovss_ray.models.hub import NotHereError, hub_file
from ovss_ray.models.tower import DenseTower, TowerShape
from ovss_ray.models.vision import VisionTower

DEFAULT_CLIP = "ViT-B-16-quickgelu/openai"
DEMO_ARCHITECTURE = "ovss-demo"
QUICK_GELU_SUFFIX = "-quickgelu"

WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What open_clip's weights are called in a repository of the Hugging Face Hub, the safe format first."""

_FRIENDLY = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14-336": "ViT-L-14-336",
    "ViT-L/14@336px": "ViT-L-14-336",
}
DEMO_FOLDER = Path(str(resources.files("ovss_ray"))) / "demo" / "clip"
_DEMO_WEIGHTS = DEMO_FOLDER / f"{DEMO_ARCHITECTURE}.safetensors"


@dataclass(frozen=True)
class ClipSource:
    """An architecture and exactly one of: a pretrained tag of open_clip, a weight file, a seed for random weights."""

    architecture: str
    tag: str | None = None
    path: Path | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The normalised spelling."""
        if self.path == _DEMO_WEIGHTS:
            return "demo"
        if self.path is not None:
            return f"{self.architecture}//{self.path}"
        if self.seed is not None:
            return f"{self.architecture}/random:{self.seed}"
        return f"{self.architecture}/{self.tag}"


@dataclass(frozen=True)
class WeightsInfo:
    """What identifies a model in a run's fingerprint.

    digest: SHA-256 of the weight file, or "random:<seed>". path: the file, None for random weights.
    """

    clip: str
    architecture: str
    path: str | None
    digest: str


def parse_clip(clip: str, tower: type[DenseTower] = VisionTower) -> ClipSource:
    """Understands "architecture/tag", "architecture//path", "architecture/random[:seed]", "demo" and "ViT-B/16".

    Args:
        clip: what the user wrote.
        tower: the kind of vision tower that is needed.

    Raises:
        WeightsError: the architecture, tag or file does not exist, and names the nearest one; or the architecture has
            another vision tower.
    """
    if clip == "demo":
        register_demo()
        tower.refuse_others(architecture_config(DEMO_ARCHITECTURE), clip)
        return ClipSource(DEMO_ARCHITECTURE, path=_demo_weights())
    if clip in _FRIENDLY:
        clip = f"{_FRIENDLY[clip]}{QUICK_GELU_SUFFIX}/openai"
    for friendly, plain in _FRIENDLY.items():
        if clip.startswith(f"{friendly}/"):
            clip = plain + clip[len(friendly) :]
    if clip.startswith(DEMO_ARCHITECTURE):
        register_demo()
    architecture, slash, rest = clip.partition("/")
    _check_architecture(architecture, clip)
    tower.refuse_others(architecture_config(architecture), architecture)
    if rest.startswith("/"):
        return ClipSource(architecture, path=_find_file(rest[1:], architecture))
    if not slash or not rest:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise WeightsError(
            f"'{clip}' names no weights; write '{architecture}/tag' (known tags: {known}) "
            f"or '{architecture}//path/to/weights'"
        )
    if rest == "random" or rest.startswith("random:"):
        seed = rest.partition(":")[2] or "0"
        if not seed.isdigit():
            raise WeightsError(f"'{clip}': the seed of random weights must be a whole number")
        return ClipSource(architecture, seed=int(seed))
    _check_tag(architecture, rest)
    return ClipSource(architecture, tag=rest)


def resolve_weights(clip: str, tower: type[DenseTower] = VisionTower) -> WeightsInfo:
    """Finds the weight file (downloading it where a tag is not in the cache) and its SHA-256.

    Raises:
        WeightsError: there is no such model, file or download, or the model has not the kind of tower that is needed.
    """
    source = parse_clip(clip, tower)
    path = weight_file(source)
    if path is None:
        return WeightsInfo(source.name, source.architecture, None, f"random:{source.seed}")
    return WeightsInfo(source.name, source.architecture, str(path), file_digest(path))


def weight_file(source: ClipSource) -> Path | None:
    """The local weight file of a source, None for random weights; raises `WeightsError` if it cannot be had."""
    if source.tag is None:
        return source.path
    config = tag_config(source.architecture, source.tag)
    try:
        if config.get("hf_hub"):
            return hub_file(*_place_on_hub(str(config["hf_hub"])))
        return Path(open_clip_weights.download_pretrained(config))
    except NotHereError as error:
        reason, url = str(error), error.url
    except Exception as error:  # network and file errors of any library underneath
        reason, url = (str(error).splitlines() or [type(error).__name__])[0], str(config.get("url", ""))
    name = url.rsplit("/", 1)[-1]
    raise WeightsError(
        f"the weights {source.name} are not on this machine and cannot be downloaded: {reason}; get {url} where there "
        f"is a network, put it where every worker can read it, and give --clip {source.architecture}//path/to/{name}"
    )


def _place_on_hub(place: str) -> tuple[str, tuple[str, ...]]:
    """Repository and file names of "organisation/name/" or "organisation/name/file", the safe format first."""
    repository, _, name = place.rpartition("/")
    if not name:
        return repository, WEIGHT_NAMES
    stem, dot, extension = name.rpartition(".")
    return repository, (f"{stem}.safetensors", name) if dot and extension in ("bin", "pth") else (name,)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, computed once per process and version of the file.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        state = path.stat()
        return _digest(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise WeightsError(f"the weight file {path} cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=32)
def _digest(path: Path, size: int, modified_ns: int) -> str:  # noqa: ARG001 - they are the cache key
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def tag_config(architecture: str, tag: str) -> dict[str, Any]:
    """What open_clip knows about a pretrained tag (files, activation, pixel statistics); empty for an unknown one."""
    return dict(open_clip_weights.get_pretrained_cfg(architecture, tag) or {})


def tag_has_quick_gelu(architecture: str, tag: str) -> bool:
    """Whether the weights of a tag were trained with QuickGELU; OpenAI's all were."""
    return bool(tag_config(architecture, tag).get("quick_gelu", False)) or tag.lower() == "openai"


def has_quick_gelu(architecture: str) -> bool:
    """Whether an architecture is built with QuickGELU."""
    return bool(architecture_config(architecture).get("quick_gelu", False))


def architecture_config(architecture: str) -> dict[str, Any]:
    """The model configuration of a known architecture."""
    return dict(open_clip.get_model_config(architecture))


def tower_shape(architecture: str, tower: type[DenseTower] = VisionTower) -> TowerShape:
    """What settings follow of the vision tower of an architecture that `parse_clip` took, without building it."""
    return tower.shape_of(architecture_config(architecture))


def register_demo() -> None:
    """Makes the package's own architecture known to open_clip; doing so twice changes nothing."""
    if DEMO_ARCHITECTURE not in open_clip.list_models():
        open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_ARCHITECTURE}.json")


def sibling(architecture: str) -> str:
    """The same architecture with the other activation."""
    if architecture.endswith(QUICK_GELU_SUFFIX):
        return architecture.removesuffix(QUICK_GELU_SUFFIX)
    return architecture + QUICK_GELU_SUFFIX


def wrong_activation(architecture: str, weights: str, quick: bool) -> WeightsError:
    """The error for weights trained with the other activation; `quick`: they were trained with QuickGELU."""
    trained, built = ("QuickGELU", "plain GELU") if quick else ("plain GELU", "QuickGELU")
    other = sibling(architecture)
    known = other in open_clip.list_models()
    fix = f"use the architecture '{other}'" if known else "use an architecture that has the same activation"
    return WeightsError(f"the weights {weights} were trained with {trained}, but {architecture} has {built}; {fix}")


def _check_architecture(architecture: str, clip: str) -> None:
    known = open_clip.list_models()
    if architecture in known:
        return
    if any(clip == friendly.partition("/")[0] for friendly in _FRIENDLY) or architecture in ("ViT-B", "ViT-L"):
        raise WeightsError(f"there is no CLIP model '{clip}'{nearest(clip, _FRIENDLY)}")
    hint = nearest(architecture, known)
    if clip == architecture:  # one word: it may stand for a model
        hint = nearest(clip, [*known, *_FRIENDLY, "demo"]) or "; `ovss-ray methods METHOD` names models that fit"
    raise WeightsError(f"open_clip has no architecture '{architecture}'{hint}")


def _check_tag(architecture: str, tag: str) -> None:
    if tag_config(architecture, tag):
        trained = tag_has_quick_gelu(architecture, tag)
        if trained != has_quick_gelu(architecture) and sibling(architecture) in open_clip.list_models():
            # open_clip only warns here; the model would run and be quietly worse.
            raise wrong_activation(architecture, f"'{tag}'", quick=trained)
        return
    if tag_config(sibling(architecture), tag):
        raise wrong_activation(architecture, f"'{tag}'", quick=not has_quick_gelu(architecture))
    known = open_clip.list_pretrained_tags_by_model(architecture)
    raise WeightsError(f"{architecture} has no weights '{tag}', only {', '.join(known) or 'none'}{nearest(tag, known)}")


def _find_file(text: str, architecture: str) -> Path:
    path = Path(text).expanduser()
    try:
        if not path.exists() and not path.is_absolute() and Path(f"/{text}").exists():
            path = Path(f"/{text}")  # "architecture//absolute/path" reads naturally, too
        if path.is_file():
            return path.resolve()
        if path.is_dir():
            return _file_of_folder(path, architecture).resolve()
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise WeightsError(f"{architecture}: the weight file {path} cannot be read: {error.strerror}") from None
    raise WeightsError(f"{architecture}: the weight file {path} does not exist{nearest(path.name, siblings)}")


def _file_of_folder(folder: Path, architecture: str) -> Path:
    """The weight file of a copy of a hub's repository, or of its folder in the hub's cache."""
    for place in (folder, *sorted(folder.glob("snapshots/*"))):
        for name in WEIGHT_NAMES:
            if (place / name).is_file():
                return place / name
    files = sorted(item.name for item in folder.iterdir() if item.is_file())
    there = f"; it has {', '.join(files[:5])}" if files else ""
    raise WeightsError(
        f"{architecture}: {folder} is a folder without {' or '.join(WEIGHT_NAMES)}; name the weight file itself{there}"
    )


def _demo_weights() -> Path:
    if not _DEMO_WEIGHTS.is_file():
        raise WeightsError(
            f"the demo weights {_DEMO_WEIGHTS} are missing; run `python -m ovss_ray.demo.training` to make them"
        )
    return _DEMO_WEIGHTS
