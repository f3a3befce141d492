"""The adapter, with the real CLI against the local Kaggle: each surprise of the CLI that melfold may meet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kaggle_world import OLD_CLIENT, SLUG, World, environment, restamp

from melfold.errors import MelfoldError
from melfold.kaggle import pack
from melfold.kaggle.built import Built
from melfold.kaggle.client import Kaggle
from melfold.kaggle.command import KaggleError, Said, failure, read, redact, status_of
from melfold.kaggle.courier import prepare, read_record
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


def send(own: World, message: str, timeout: float = 20) -> Said:
    """Submit the file of `tiny`."""
    record = own.home.root / "record.json"
    prepare(record, {})
    return Kaggle(timeout=timeout).submit_file(own.home.submissions / "tiny" / "submission.csv", message, record)


def count(fake: FakeKaggle, rpc: str) -> int:
    return sum(call.rpc == rpc for call in fake.calls)


def test_no_submissions_is_an_empty_list_not_an_error(fake: FakeKaggle) -> None:
    assert Kaggle().submissions() == []


def test_submissions_are_read_past_what_is_printed_before_them(fake: FakeKaggle, own: World, tmp_path: Path) -> None:
    (tmp_path / "user" / "kaggle.json").write_text(json.dumps({"username": "tester", "key": SECRET}))
    (tmp_path / "user" / "kaggle.json").chmod(0o644)  # makes the CLI warn on stdout
    send(own, "one, with a comma melfold:abc")
    (found,) = Kaggle().submissions()
    assert found.description == "one, with a comma melfold:abc"
    assert found.status == "COMPLETE"
    assert 0 < found.public_score <= 1


def test_a_list_that_cannot_be_read_is_an_error(fake: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kaggle, "_ask", lambda *_, **__: "something else\n")
    with pytest.raises(KaggleError, match="cannot be read: something else"):
        Kaggle().submissions()


def test_the_limit_counts_down_to_none(fake: FakeKaggle, own: World) -> None:
    fake.daily_limit = 1
    assert Kaggle().remaining() == 1
    send(own, "one")
    assert Kaggle().remaining() == 0


def test_a_command_that_hides_what_it_does_may_not_submit(
    fake: FakeKaggle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    silent.write_text(f'#!/bin/sh\nunset VERBOSE\nexec {os.environ["MELFOLD_KAGGLE"]} "$@"\n')
    silent.chmod(0o755)
    monkeypatch.setenv("MELFOLD_KAGGLE", str(silent))
    with pytest.raises(KaggleError, match="shows no trace"):
        Kaggle().remaining()


@pytest.mark.parametrize(("rpc", "kind"), [("PUT", "refuse_upload"), ("StartSubmissionUpload", "drop_before")])
def test_a_call_tells_that_it_did_not_come_as_far_as_submitting(rpc: str, kind: str, fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault(rpc, kind))
    said = send(own, "one")
    assert not said.may_have("CreateSubmission")
    assert said.may_have("StartSubmissionUpload")
    assert fake.submissions == []


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("kind", "status", "outcome"),
    [
        ("error_body", 400, "refused"),
        ("429", 429, "refused"),
        ("500_before", 500, "doubtful"),
        ("500_after", 500, "doubtful"),
        ("drop_after", 0, "doubtful"),
    ],
)
def test_a_submission_is_never_repeated_by_the_adapter(
    kind: str, status: int, outcome: str, flat: bool, fake: FakeKaggle, own: World
) -> None:
    fake.flat_errors = flat
    fake.faults.append(Fault("CreateSubmission", kind))
    said = send(own, "one")
    assert said.may_have("CreateSubmission")
    assert (status_of(said), said.message) == (status, "Something went wrong" if status else "")
    error = failure("submit", said)
    assert error.outcome == outcome
    assert len(error.lines) == 1
    assert count(fake, "CreateSubmission") == 1


def test_a_call_that_hangs_is_ended_and_its_result_is_in_doubt(fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "hang_after"))
    said = send(own, "one", timeout=1.5)
    assert said.code is None
    assert said.may_have("CreateSubmission")
    assert failure("submit", said, 7.5).outcome == "doubtful"
    assert "no answer" in str(failure("submit", said, 7.5))


def test_what_a_lost_call_left_behind(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert read_record(record).may_have("CreateSubmission"), "a record that is not here may be elsewhere"
    prepare(record, {})
    assert not read_record(record).may_have("CreateSubmission")
    record.write_text('{"state": "started"}')
    assert read_record(record).may_have("CreateSubmission"), "its courier was killed"


TRACEBACK = "Traceback (most recent call last):\n  File x\nConnectionError: gone\n"


@pytest.mark.parametrize(
    ("text", "status", "outcome", "reason"),
    [
        ("400 Client Error: Bad Request for url: http://x\n", 400, "refused", "400 Client Error: Bad Request"),
        (TRACEBACK, 0, "doubtful", "ConnectionError: gone"),
        ("Dataset not found\n", 0, "doubtful", "Dataset not found"),
        ("Not there\n\nThe resource was not found. Check the spelling.\nMore\n", 404, "refused", "Not there"),
        ("Oh\n\nThis is a problem on Kaggle's side, not with your command.\n", 0, "doubtful", "Oh"),
    ],
)
def test_an_output_without_a_trace_is_read_as_far_as_it_goes(text: str, status: int, outcome: str, reason: str) -> None:
    said = read(text, 1, trace=False)
    assert said.may_have("anything")
    error = failure("kaggle x", said)
    assert (status_of(said), error.outcome) == (status, outcome)
    assert reason in str(error)


@pytest.mark.parametrize("kind", ["429", "500_before", "drop_before"])
def test_what_changes_nothing_is_tried_again(kind: str, fake: FakeKaggle) -> None:
    fake.faults.append(Fault("ListSubmissions", kind, times=2))
    assert Kaggle().submissions() == []
    assert count(fake, "ListSubmissions") == 3


def test_repeated_calls_end(fake: FakeKaggle) -> None:
    fake.faults.append(Fault("ListSubmissions", "500_before", times=99))
    with pytest.raises(KaggleError, match="500 Something went wrong"):
        Kaggle().submissions()
    assert count(fake, "ListSubmissions") == 4


NO_ACCESS = {
    "none": "no Kaggle credentials",
    "bad key": "does not accept these credentials",
    "bad token": "does not accept these credentials",
    "rules": "no access",
}


@pytest.mark.parametrize("case", NO_ACCESS)
def test_no_access_says_how_to_log_in_and_that_rules_must_be_accepted(case: str, fake: FakeKaggle, tmp_path: Path) -> None:
    fake.rules_accepted = case != "rules"
    env = fake.env(tmp_path / "user", token="bad" if case == "bad token" else "")
    env |= {"KAGGLE_API_TOKEN": "bad-bad"} if case == "bad token" else {"KAGGLE_KEY": "bad-bad"} if case == "bad key" else {}
    if case == "none":
        for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
            env.pop(name)
    with environment(env), pytest.raises(KaggleError) as caught:
        Kaggle().download(tmp_path / "parts")
    (line,) = caught.value.lines
    assert NO_ACCESS[case] in line
    assert "kaggle.json" in line
    assert "rules" in line
    assert "token" in line.lower()


def test_an_access_token_is_enough(fake: FakeKaggle, own: World, tmp_path: Path) -> None:
    with environment(fake.env(tmp_path / "user", token=SECRET) | {"MELFOLD_PACE": "0"}):
        assert Kaggle().username() == "tester"
        assert SECRET not in send(own, "one").text
        assert [s.description for s in Kaggle().submissions()] == ["one"]
    assert SECRET not in (own.home.root / "record.json").read_text()


@pytest.mark.parametrize(("code", "flat"), [(403, False), (404, False), (403, True), (404, True)])
def test_a_dataset_that_is_not_there_is_none_in_every_form_of_error(code: int, flat: bool, fake: FakeKaggle) -> None:
    fake.missing_code, fake.flat_errors = code, flat
    assert Kaggle().dataset_status("tester/nothing") is None


def test_the_gpu_hours_that_are_left(fake: FakeKaggle) -> None:
    fake.gpu_hours = 12.5
    assert Kaggle().gpu_hours() == 12.5
    fake.faults.append(Fault("GetAcceleratorQuotaStatistics", "500_before"))
    assert Kaggle().gpu_hours() is None


@pytest.mark.skipif(OLD_CLIENT, reason="kaggle 2.2.4 asks for the latest version, whatever it is told")
def test_a_version_of_a_kernel_is_asked_for_by_its_number(fake: FakeKaggle, tmp_path: Path) -> None:
    fake.add_kernel("some-kernel", {"made.txt": b"one"})
    fake.add_kernel("some-kernel", {"made.txt": b"two"})
    fake.finish_kernel("some-kernel", status="RUNNING")
    assert Kaggle().kernel_status("tester/some-kernel", 1) == ("COMPLETE", "")
    assert Kaggle().kernel_status("tester/some-kernel", 2)[0] == "RUNNING"
    Kaggle().kernel_output("tester/some-kernel", 1, tmp_path / "out")
    assert (tmp_path / "out" / "made.txt").read_text() == "one"


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


def test_kaggles_own_words_and_where_they_say_little_a_hint(fake: FakeKaggle, built: Built) -> None:
    fake.faults.append(Fault("SaveKernel", "error_body"))
    with pytest.raises(KaggleError, match="400 Something went wrong.*over 1 MB"):
        push(Kaggle(), built)
    quota = "Maximum weekly GPU quota of 30.00 hours was reached."
    for kind in ("error_body", "reply_error"):
        fake.faults.append(Fault("SaveKernel", kind, message=quota))
        with pytest.raises(KaggleError, match="weekly GPU quota") as caught:
            push(Kaggle(), built)
        assert "1 MB" not in str(caught.value)


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


@pytest.mark.parametrize("lost", ["before the dataset is made", "without a word, as kaggle 2.2.4 does"])
def test_an_upload_that_loses_a_file_is_repeated(lost: str, fake: FakeKaggle, built: Built) -> None:
    before = lost.startswith("before")
    if before:
        fake.faults.append(Fault("PUT", "refuse_upload"))
    push(Kaggle(), built)
    (versions,) = fake.datasets.values()
    if not before:
        next(versions[0].folder.iterdir()).unlink()
        push(Kaggle(), built)
    wanted = {p.name for p in built.dataset.iterdir()} - {"dataset-metadata.json"}
    assert {p.name for p in versions[-1].folder.iterdir()} == wanted
    assert len(versions) == (1 if before and not OLD_CLIENT else 2), "2.2.4 publishes what is left"


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
    said = r"version 1 ended with ERROR: Your notebook ran out of memory; its log ends: allocating"
    with pytest.raises(MelfoldError, match=said):
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
