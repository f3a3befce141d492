"""Datasets and their versions."""

from __future__ import annotations

import gzip
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fake_kaggle.state import Blob, State
from tests.fake_kaggle.wire import SITE, Refused, Request, file_entry, page, tree_files


@dataclass
class DatasetVersion:
    """One snapshot of a dataset, `ready` some time after it was made."""

    number: int
    notes: str
    folder: Path
    ready_at: float

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self.ready_at


class Datasets(State):
    """The calls about datasets."""

    def _versions(self, request: Request) -> list[DatasetVersion]:
        versions = self.datasets.get(request.get("datasetSlug", ""))
        if versions is None or request.get("ownerSlug") != self.owner:
            raise Refused(self.missing_code, "Permission 'datasets.get' was denied")
        return versions

    def _CreateDataset(self, request: Request) -> Request:
        if request.get("ownerSlug") != self.owner:
            raise Refused(403, "Permission 'datasets.create' was denied")
        if request["slug"] in self.datasets:
            return {"status": "error", "error": f'The requested title "{request["title"]}" is already in use by a dataset.'}
        return self._add_version(request["slug"], request, "Initial release")

    def _CreateDatasetVersion(self, request: Request) -> Request:
        if not self._versions(request)[-1].ready:
            raise Refused(403, "The previous version is still being processed")
        return self._add_version(request["datasetSlug"], request["body"], request["body"].get("versionNotes", ""))

    def _add_version(self, slug: str, request: Request, notes: str) -> Request:
        blobs = [self.uploaded(file.get("token", "")) for file in request.get("files", [])]
        if not blobs:
            return {"status": "error", "error": "A dataset needs at least one file"}
        number = len(self.datasets.get(slug, [])) + 1
        folder = self.store / "datasets" / slug / str(number)
        for blob in blobs:
            unpack(blob, folder)
        version = DatasetVersion(number, notes, folder, time.monotonic() + self.dataset_delay)
        self.datasets.setdefault(slug, []).append(version)
        return {"status": "ok", "ref": f"/{self.owner}/{slug}", "url": f"{SITE}/datasets/{self.owner}/{slug}"}

    def _GetDatasetStatus(self, request: Request) -> Request:
        return {"status": "READY" if self._versions(request)[-1].ready else "BLOBS_RECEIVED"}

    def _GetDataset(self, request: Request) -> Request:
        number = max((version.number for version in self._versions(request) if version.ready), default=None)
        return {"ref": f"{self.owner}/{request['datasetSlug']}", "ownerRef": self.owner, "currentVersionNumber": number}

    def _ListDatasetFiles(self, request: Request) -> Request:
        versions = self._versions(request)
        wanted = request.get("datasetVersionNumber") or len(versions)
        if not 0 < wanted <= len(versions):
            raise Refused(404, "Version not found")
        files = tree_files(versions[wanted - 1].folder)
        return page("datasetFiles", [file_entry(name, path) for name, path in files.items()], request)


def unpack(blob: Blob, folder: Path) -> None:
    """Keep one uploaded file as Kaggle does: an archive becomes a folder, a gzip file what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, dot, kind = blob.name.rpartition(".")
    if dot and kind in ("zip", "tar"):
        shutil.unpack_archive(blob.path, folder / stem, kind)
    elif dot and kind == "gz":
        with gzip.open(blob.path) as packed, (folder / stem).open("wb") as file:
            shutil.copyfileobj(packed, file)
    else:
        shutil.copyfile(blob.path, folder / blob.name)
