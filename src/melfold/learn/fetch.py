"""Weights from the Hugging Face hub: downloaded once, checked, and kept in the home folder with their licence."""

from __future__ import annotations

import difflib
import io
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from melfold.artefacts import Artefact
from melfold.compute import Progress, silent
from melfold.config import ModelConfig, Recipe
from melfold.errors import MelfoldError, first_line
from melfold.files import Home, locked, sha256_file
from melfold.recipes import load_recipe, parse_recipe, recipe_names

ANSWER_SECONDS = 4.0
"""The hub must answer the first question within this time; its own client would ask again for almost a minute."""

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """A file in a model repository of the hub. `licence`: what timm says, if it knows the file."""

    repo: str
    file: str = "model.safetensors"
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}"

    def path(self, home: Home) -> Path:
        """Where a home keeps its copy."""
        return weights_folder(home) / self.repo.replace("/", "--") / self.file


@dataclass(frozen=True)
class Fetched:
    """A file that was downloaded into the home. `licence`: as the hub or timm names it, or `unknown`."""

    path: Path
    source: str
    sha256: str
    licence: str


def weights_folder(home: Home) -> Path:
    """Where a home keeps downloaded weights."""
    return home.root / "weights"


def hub_file(config: ModelConfig) -> HubFile | None:
    """The hub's file that a model starts from; None if its weights do not come from the hub.

    Raises:
        MelfoldError: timm knows no weights on the hub for this name.
    """
    if config.weights.startswith("hf:"):
        owner, repo, *file = config.weights.removeprefix("hf:").split("/", 2)
        return HubFile(f"{owner}/{repo}", *file)
    if config.weights != "hub":
        return None
    import timm

    known = timm.get_pretrained_cfg(config.name)
    if not known or not known.hf_hub_id:
        found = f"{config.name}{f' (only {known.url})' if known and known.url else ''}"
        raise MelfoldError("timm knows no weights on the hub for this model", found, "Use model.weights=file:PATH, or none")
    return HubFile(known.hf_hub_id, known.hf_hub_filename or HubFile.file, known.license or "")


def recipe_named(name: str) -> Recipe:
    """What `melfold weights fetch NAME` means: a recipe, `hf:OWNER/REPO[/FILE]`, or a model's name in timm.

    Raises:
        MelfoldError: a name that is none of these.
    """
    if name in recipe_names() or name.endswith(".toml"):
        return load_recipe(name)
    if name.startswith("hf:"):
        return parse_recipe({"name": name, "model": {"weights": name}}, f"weights {name}")
    import timm

    known = timm.list_pretrained()
    if name not in known and name not in timm.list_models():
        near = ", ".join(difflib.get_close_matches(name, known, 3))
        fix = "Use a recipe, hf:OWNER/REPO[/FILE], or a model's name in timm"
        raise MelfoldError("no weights of this name", name, f"Did you mean {near}?" if near else fix)
    return parse_recipe({"name": name, "model": {"name": name, "weights": "hub"}}, f"weights {name}")


def local_copy(file: HubFile, home: Home) -> Path | None:
    """The file in the home, or else in the hub's own cache on this machine; None if it is in neither."""
    path = file.path(home)
    if Artefact.of(path).exists:
        return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(file.repo, file.file)
    return Path(cached) if isinstance(cached, str) else None


def first_weights(config: ModelConfig, home: Home) -> Path | None:
    """The file that a model starts from, downloaded now if it has to be; None for random weights, and for another run's.

    Raises:
        MelfoldError: no such file, or a hub that does not answer.
    """
    if config.weights.startswith("file:"):
        path = Path(config.weights.removeprefix("file:")).expanduser()
        if not path.is_file():
            raise MelfoldError("no such weights file", str(path), "Check model.weights=file:PATH")
        return path
    file = hub_file(config)
    return (local_copy(file, home) or fetch(file, home).path) if file else None


def first_weights_sha256(config: ModelConfig, home: Home) -> str:
    """The hash of the file that a model starts from; empty for random weights. Raises: MelfoldError: as `first_weights`."""
    path = first_weights(config, home)
    return sha256_file(path) if path else ""


def fetch(file: HubFile, home: Home, progress: Progress = silent) -> Fetched:
    """Download a file into the home, unless it is there and undamaged.

    Raises:
        MelfoldError: no such file, a hub that does not answer, or a download that was damaged on its way.
    """
    path = file.path(home)
    stamp = Artefact.of(path)
    with locked(weights_folder(home) / ".lock"):
        if not stamp.is_fresh({"source": str(file)}):
            stamp.remove()
            revision, sha256 = _look_up(file)
            _download(file, path, revision, sha256, progress)
            stamp.commit({"source": str(file)}, revision=revision, licence=file.licence or _licence(file.repo))
    content = stamp.read()
    return Fetched(path, str(file), content["files"][path.name], content["licence"])


def share_weights(home: Home, other: Home) -> None:
    """Let another home, such as a dry run's, use the downloaded weights of this one."""
    weights_folder(home).mkdir(parents=True, exist_ok=True)
    other.root.mkdir(parents=True, exist_ok=True)
    if not weights_folder(other).exists():
        weights_folder(other).symlink_to(weights_folder(home).resolve())


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _look_up(file: HubFile) -> tuple[str, str]:
    """The file's revision on the hub, and its SHA-256 where the hub tells it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    url = hf_hub_url(file.repo, file.file, endpoint=_endpoint())
    try:
        found = _in_time(lambda: get_hf_file_metadata(url, timeout=ANSWER_SECONDS))
    except (EntryNotFoundError, RepositoryNotFoundError):
        fix = "Check the name; another file of a repository is hf:OWNER/REPO/FILE"
        raise MelfoldError("the hub has no such file", str(file), fix) from None
    except Exception as error:  # the client's libraries raise errors of many kinds
        fix = f"With a network: melfold weights fetch hf:{file}; then copy the weights folder of the home, or use file:PATH"
        raise MelfoldError(f"cannot get {file} from the hub", first_line(error), fix) from None
    etag = found.etag or ""
    return found.commit_hash or "", etag if len(etag) == 64 else ""


def _in_time(ask: Callable[[], T]) -> T:
    """The answer of a question, which may hang in more ways than its own timeout covers (names, proxies)."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    wait([answer], ANSWER_SECONDS)
    if not answer.done():
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
    return answer.result()


def _download(file: HubFile, path: Path, revision: str, sha256: str, progress: Progress) -> None:
    from huggingface_hub import hf_hub_download

    partial = path.with_name(f".{path.name}.partial")
    try:
        bar = _bar(progress, f"downloading {file.repo} (MB)")
        options = {"revision": revision or None, "local_dir": partial, "endpoint": _endpoint(), "tqdm_class": bar}
        got = hf_hub_download(file.repo, file.file, **options)
        if sha256 and sha256_file(Path(got)) != sha256:
            raise MelfoldError("the download was damaged on its way", str(file), "Try again")
        os.replace(got, path)
    except MelfoldError:
        raise
    except Exception as error:
        raise MelfoldError(f"cannot download {file}", first_line(error), "Try again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bar(progress: Progress, text: str) -> type:
    """What the hub's client draws on, as a `Progress`."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            progress(-(-int(self.n) // 10**6), -(-int(self.total or self.n) // 10**6), text)
            return shown

    return Bar


def _licence(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        tags = _in_time(lambda: HfApi(endpoint=_endpoint()).model_info(repo, timeout=ANSWER_SECONDS)).tags or []
    except Exception:  # a licence that cannot be asked for is unknown
        tags = []
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "unknown")
