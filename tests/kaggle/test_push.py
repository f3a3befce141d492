"""Pushing a built kernel: its dataset, the wait for its end, and what it left."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kaggle_world import SLUG, World, environment

from melfold.errors import MelfoldError
from melfold.kaggle.built import Built
from melfold.kaggle.client import Kaggle
from melfold.kaggle.push import is_there, publish_dataset, push, wait_for_kernel
from tests.fake_kaggle import FakeKaggle, Fault

KERNEL = "melfold-infer-tiny"


@pytest.fixture
def fake(own: World, tmp_path: Path) -> Iterator[FakeKaggle]:
    """Kernels end by hand."""
    with (
        FakeKaggle(tmp_path / "kaggle", data=own.data, run_kernels=False) as server,
        environment(server.env(tmp_path / "user") | {"MELFOLD_PACE": "0.01"}),
    ):
        yield server


def pushed(own: World) -> Built:
    built = own.build()
    assert push(Kaggle(SLUG), built, unrehearsed=True) == 1
    return built


def test_a_dataset_with_a_file_of_another_size_is_uploaded_again(own: World, fake: FakeKaggle, tmp_path: Path) -> None:
    built, broken = own.build(), tmp_path / "broken"
    shutil.copytree(built.dataset, broken)
    path = next(broken.glob("*fold0.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    dataset = built.facts["dataset"]
    Kaggle(SLUG).publish_dataset(broken)
    publish_dataset(Kaggle(SLUG), built.dataset, dataset)
    publish_dataset(Kaggle(SLUG), built.dataset, dataset)
    assert [version.notes for version in fake.datasets[dataset.split("/")[1]]] == ["Initial release", "complete"]


def test_an_upload_is_continued_and_its_progress_told(own: World, fake: FakeKaggle) -> None:
    built, told = own.build(), []
    fake.faults.append(Fault("CreateDataset", "403"))
    with pytest.raises(MelfoldError, match="no access"):
        publish_dataset(Kaggle(SLUG), built.dataset, built.facts["dataset"])
    uploads = sum(call.rpc == "StartBlobUpload" for call in fake.calls)
    publish_dataset(
        Kaggle(SLUG), built.dataset, built.facts["dataset"], lambda done, total, text: told.append((done, total, text))
    )
    assert sum(call.rpc == "StartBlobUpload" for call in fake.calls) == uploads, "no file is uploaded twice"
    assert len(fake.datasets) == 1
    assert not (built.folder / "uploads").exists()
    assert told == [] or told[-1][:2] == (100, 100)


@pytest.mark.parametrize("status", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_kernel_that_failed_can_be_pushed_again(status: str, own: World, fake: FakeKaggle) -> None:
    built = pushed(own)
    fake.finish_kernel(KERNEL, status=status, failure="out of memory")
    with pytest.raises(MelfoldError, match=f"ended with {status}: out of memory"):
        wait_for_kernel(Kaggle(SLUG), built)
    assert built.pushed is None
    assert push(Kaggle(SLUG), built, unrehearsed=True) == 2


def test_the_output_of_another_build_is_refused(own: World, fake: FakeKaggle) -> None:
    built = pushed(own)
    fake.finish_kernel(KERNEL, {"melfold.json": json.dumps({"build_id": "0" * 64, "files": {}}).encode()})
    with pytest.raises(MelfoldError, match="belongs to another build: 000000000000"):
        wait_for_kernel(Kaggle(SLUG), built)
    assert built.pushed is None


@pytest.mark.parametrize("arrives", [True, False])
def test_the_output_is_compared_with_the_kernels_record(arrives: bool, own: World, fake: FakeKaggle) -> None:
    built, files = pushed(own), {f"more/{i}.txt": f"{i}".encode() for i in range(520 if arrives else 1)}
    sums = {name: hashlib.sha256(content if arrives else b"other").hexdigest() for name, content in files.items()}
    record = json.dumps({"build_id": built.facts["build_id"], "files": sums}).encode()
    fake.finish_kernel(KERNEL, files | {"melfold.json": record})
    if arrives:
        fake.faults.append(Fault("GET", "500_before"))
        output = wait_for_kernel(Kaggle(SLUG), built)
        assert {path.name for path in (output / "more").iterdir()} == {f"{i}.txt" for i in range(520)}
    else:
        with pytest.raises(
            MelfoldError, match=r"the output of kernel tester/melfold-infer-tiny is damaged: more/0\.txt, after 3"
        ):
            wait_for_kernel(Kaggle(SLUG), built)


def test_a_push_without_an_answer_is_found_at_kaggle(own: World, fake: FakeKaggle) -> None:
    """So that a training session, hours of a GPU, is not started twice."""
    built, client = own.build(), Kaggle(SLUG)
    assert not is_there(client, built)
    fake.faults.append(Fault("SaveKernel", "drop_after"))
    with pytest.raises(MelfoldError):
        push(client, built, unrehearsed=True)
    assert (built.pushed, built.asked) == (None, True)
    assert is_there(client, built)
    record = json.dumps({"build_id": built.facts["build_id"], "files": {}}).encode()
    fake.finish_kernel(KERNEL, {"melfold.json": record})
    assert (wait_for_kernel(client, built) / "melfold.json").read_bytes() == record
    assert len(fake.kernels[KERNEL]) == 1
