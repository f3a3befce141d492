"""The adapter, with the real CLI against the local Kaggle: each surprise of the CLI that melfold may meet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kaggle_world import SLUG, World, environment, restamp

from melfold.errors import MelfoldError
from melfold.kaggle import pack
from melfold.kaggle.built import Built
from melfold.kaggle.client import Kaggle, KaggleError, redact
from melfold.kaggle.push import push, wait_for_kernel
from tests.fake_kaggle import FakeKaggle, Fault

SECRET = "c0ffee5ecret0c0ffee5ecret0c0ffee"


@pytest.fixture
def fake(kaggle_world: World, tmp_path: Path) -> Iterator[FakeKaggle]:
    """A local Kaggle that this process's environment points to."""
    with FakeKaggle(tmp_path / "kaggle", data=kaggle_world.data, truth=kaggle_world.truth, run_kernels=False) as server:
        with environment(server.env(tmp_path / "user") | {"MELFOLD_PACE": "0.01", "MELFOLD_KAGGLE_TIMEOUT": "20"}):
            yield server
        assert server.connects == []


@pytest.fixture
def built(own: World) -> Built:
    """A kernel that counts as rehearsed."""
    made = own.build()
    made.rehearsal_stamp.commit(made.inputs, passed=True)
    return made


def count(fake: FakeKaggle, rpc: str) -> int:
    return sum(call.rpc == rpc for call in fake.calls)


def test_no_submissions_is_an_empty_list_not_an_error(fake: FakeKaggle) -> None:
    assert Kaggle().submissions() == []


def test_submissions_are_read_past_what_is_printed_before_them(fake: FakeKaggle, own: World, tmp_path: Path) -> None:
    (tmp_path / "user" / "kaggle.json").write_text(json.dumps({"username": "tester", "key": SECRET}))
    (tmp_path / "user" / "kaggle.json").chmod(0o644)  # makes the CLI warn on stdout
    Kaggle().submit_file(own.home.submissions / "tiny" / "submission.csv", "one, with a comma melfold:abc")
    (found,) = Kaggle().submissions()
    assert found.description == "one, with a comma melfold:abc"
    assert found.status == "COMPLETE"
    assert 0 < found.public_score <= 1
    assert Kaggle().find("melfold:abc") == found
    assert Kaggle().find("melfold:abd") is None


def test_a_list_that_cannot_be_read_is_an_error(fake: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kaggle, "_run", lambda *_, **__: "something else\n")
    with pytest.raises(KaggleError, match="cannot be read: something else"):
        Kaggle().submissions()


def test_the_limit_counts_down_to_none(fake: FakeKaggle, own: World) -> None:
    fake.daily_limit = 1
    assert Kaggle().remaining() == 1
    Kaggle().submit_file(own.home.submissions / "tiny" / "submission.csv", "one")
    assert Kaggle().remaining() == 0


def test_a_refused_upload_is_a_refusal_though_the_cli_exits_with_0(fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("PUT", "refuse_upload"))
    with pytest.raises(KaggleError, match="upload was refused") as caught:
        Kaggle().submit_file(own.home.submissions / "tiny" / "submission.csv", "one")
    assert caught.value.outcome == "refused"
    assert fake.submissions == []


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("error_body", "refused"),
        ("429", "refused"),
        ("500_before", "doubtful"),
        ("500_after", "doubtful"),
        ("drop_after", "doubtful"),
    ],
)
def test_a_submission_is_never_repeated_by_the_adapter(kind: str, outcome: str, fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", kind))
    with pytest.raises(KaggleError) as caught:
        Kaggle().submit_file(own.home.submissions / "tiny" / "submission.csv", "one")
    assert caught.value.outcome == outcome
    assert len(caught.value.lines) == 1
    assert count(fake, "CreateSubmission") == 1


def test_a_call_that_hangs_is_ended_and_its_result_is_in_doubt(fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "hang_after"))
    with pytest.raises(KaggleError, match="no answer") as caught:
        Kaggle(timeout=0.6).submit_file(own.home.submissions / "tiny" / "submission.csv", "one")
    assert caught.value.outcome == "doubtful"


@pytest.mark.parametrize("kind", ["429", "500_before", "drop_before"])
def test_what_changes_nothing_is_tried_again(kind: str, fake: FakeKaggle) -> None:
    fake.faults.append(Fault("ListSubmissions", kind, times=2))
    assert Kaggle().submissions() == []
    assert count(fake, "ListSubmissions") == 3


def test_repeated_calls_end(fake: FakeKaggle) -> None:
    fake.faults.append(Fault("ListSubmissions", "500_before", times=99))
    with pytest.raises(KaggleError, match="500 Server Error"):
        Kaggle().submissions()
    assert count(fake, "ListSubmissions") == 4


@pytest.mark.parametrize("case", ["none", "bad key", "rules"])
def test_no_access_says_where_credentials_go_and_that_rules_must_be_accepted(case: str, fake: FakeKaggle, tmp_path: Path) -> None:
    changes = {"KAGGLE_KEY": "bad"} if case == "bad key" else {}
    fake.rules_accepted = case != "rules"
    env = fake.env(tmp_path / "user") | changes
    if case == "none":
        for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
            env.pop(name)
    with environment(env), pytest.raises(KaggleError) as caught:
        Kaggle().download(tmp_path / "parts")
    (line,) = caught.value.lines
    assert "kaggle.json" in line
    assert "rules" in line


def test_secrets_do_not_get_out(fake: FakeKaggle, own: World, built: Built, tmp_path: Path) -> None:
    (tmp_path / "user" / "kaggle.json").write_text(json.dumps({"username": "tester", "key": SECRET[::-1]}))
    with environment(fake.env(tmp_path / "user") | {"KAGGLE_KEY": SECRET, "MELFOLD_PACE": "0"}):
        assert redact(f"key={SECRET} other={SECRET[::-1]}") == "key=*** other=***"
        push(Kaggle(), built)
    texts = [p.read_bytes() for p in own.home.root.rglob("*") if p.is_file()]
    assert texts
    assert not [text for text in texts if SECRET.encode() in text or SECRET[::-1].encode() in text]


def test_a_kernel_push_that_kaggle_refuses_is_an_error_though_the_cli_exits_with_0(fake: FakeKaggle, built: Built) -> None:
    fake.faults.append(Fault("SaveKernel", "reply_error"))
    with pytest.raises(KaggleError, match="Kernel push error"):
        push(Kaggle(), built)
    assert built.pushed is None


def test_a_hidden_reason_is_hinted_at(fake: FakeKaggle, built: Built) -> None:
    fake.faults.append(Fault("SaveKernel", "error_body"))
    with pytest.raises(KaggleError, match="over 1 MB"):
        push(Kaggle(), built)


def test_a_push_without_one_of_its_sources_is_an_error(fake: FakeKaggle, built: Built) -> None:
    path = built.kernel / "kernel-metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"competition_sources": ["some-other-competition"]}))
    restamp(built)
    with pytest.raises(KaggleError, match="without its competition sources"):
        push(Kaggle(), built, unrehearsed=True)
    assert built.pushed is None


def test_the_pushed_kernel_is_private_and_offline_and_limited(fake: FakeKaggle, built: Built) -> None:
    assert push(Kaggle(), built) == 1
    (request,) = [call.request for call in fake.calls if call.rpc == "SaveKernel"]
    assert request.get("enableInternet", False) is False
    assert request["isPrivate"] is True
    assert request["sessionTimeoutSeconds"] == 240 * 60
    assert request["competitionDataSources"] == [SLUG]
    assert list(fake.kernels) == [built.facts["kernel"].split("/")[1]] or list(fake.kernels) == [built.facts["kernel"]]


def test_a_complete_dataset_is_not_uploaded_again(fake: FakeKaggle, built: Built) -> None:
    push(Kaggle(), built)
    uploads = count(fake, "PUT")
    assert push(Kaggle(), built) == 2
    assert count(fake, "PUT") == uploads


def test_an_incomplete_dataset_is_uploaded_again(fake: FakeKaggle, built: Built) -> None:
    fake.faults.append(Fault("PUT", "refuse_upload"))
    push(Kaggle(), built)
    (versions,) = fake.datasets.values()
    wanted = {p.name for p in built.dataset.iterdir()} - {"dataset-metadata.json"}
    assert {p.name for p in versions[-1].folder.iterdir()} == wanted
    assert len(versions) == 2


def test_a_dataset_error_is_an_error_though_the_cli_exits_with_0(fake: FakeKaggle, built: Built) -> None:
    fake.faults.append(Fault("CreateDataset", "reply_error", times=9))
    with pytest.raises(KaggleError, match="Dataset creation error"):
        push(Kaggle(), built)
    assert count(fake, "SaveKernel") == 0


def test_a_kernel_waits_for_a_dataset_that_is_still_processed(fake: FakeKaggle, built: Built) -> None:
    fake.dataset_delay = 1.5
    push(Kaggle(pace=0.1), built)
    (save,) = [call for call in fake.calls if call.rpc == "SaveKernel"]
    (create,) = [call for call in fake.calls if call.rpc == "CreateDataset"]
    assert save.time - create.time > 1.5


def test_a_failed_kernel_is_reported_with_kaggles_message(fake: FakeKaggle, built: Built) -> None:
    push(Kaggle(), built)
    finish(fake, status="ERROR", failure="Your notebook ran out of memory", log="allocating\n")
    with pytest.raises(MelfoldError, match=r"ended with ERROR: Your notebook ran out of memory"):
        wait_for_kernel(Kaggle(), built)


def test_the_output_of_another_build_is_not_taken_for_ones_own(fake: FakeKaggle, built: Built) -> None:
    push(Kaggle(), built)
    finish(fake, outputs={"submission.csv": b"fname\n", "melfold.json": json.dumps({"build_id": "f" * 64}).encode()})
    with pytest.raises(MelfoldError, match="belongs to another build"):
        wait_for_kernel(Kaggle(), built)


def test_waiting_needs_a_push_of_this_very_build(fake: FakeKaggle, built: Built) -> None:
    with pytest.raises(MelfoldError, match="not pushed since it was built"):
        wait_for_kernel(Kaggle(), built)


def test_a_name_that_the_cli_knows(fake: FakeKaggle) -> None:
    assert Kaggle().username() == "tester"


def test_without_a_clone_there_are_no_kernels(own: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pack, "_PACKAGE", tmp_path / "a" / "b" / "melfold")
    with pytest.raises(MelfoldError, match="kernels' sources are missing"):
        own.build()


def finish(fake: FakeKaggle, **how: object) -> None:
    (slug,) = fake.kernels
    fake.finish_kernel(slug, **how)  # type: ignore[arg-type]
