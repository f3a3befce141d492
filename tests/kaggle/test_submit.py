"""Submit once, whatever goes wrong: the cases one by one. Faults and kills by seeded schedules are in test_schedules.py."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kaggle_world import DEMO, OLD_CLIENT, SLUG, World, command, environment, melfold
from typer.testing import CliRunner

from melfold.cli.main import app
from melfold.errors import MelfoldError
from melfold.files import read_json
from melfold.kaggle.build import Target, build_copy, build_infer
from melfold.kaggle.built import Kernel
from melfold.kaggle.client import Kaggle
from melfold.kaggle.command import KaggleError
from melfold.kaggle.courier import prepare
from melfold.kaggle.ledger import SPENT, Ledger, Row
from melfold.kaggle.reconcile import sync, wait_for_score
from melfold.kaggle.submit import check_file_form, competition_for, submit
from tests.fake_kaggle import FakeKaggle, Fault

QUICK = {"MELFOLD_PACE": "0.004", "MELFOLD_KAGGLE_TIMEOUT": "3"}
CREATED = ("CreateSubmission", "CreateCodeSubmission")


@pytest.fixture
def fake(own: World, tmp_path: Path) -> Iterator[FakeKaggle]:
    """A local Kaggle that this process's environment points to, with a competition for the demo's data."""
    with (
        FakeKaggle(tmp_path / "kaggle", competition=DEMO, data=own.data, truth=own.truth, run_kernels=False) as server,
        environment(server.env(tmp_path / "user") | QUICK),
    ):
        yield server


@pytest.fixture
def client(fake: FakeKaggle) -> Kaggle:
    return Kaggle(DEMO)


def created(fake: FakeKaggle) -> int:
    return sum(call.rpc in CREATED for call in fake.calls)


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def by_hand(client: Kaggle, own: World, message: str) -> None:
    """A submission that no ledger knows."""
    prepare(own.home.root / "record.json", {})
    client.submit_file(own.home.submissions / "tiny" / "submission.csv", message, own.home.root / "record.json")


def test_a_submission_is_scored_and_recorded_with_its_provenance(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    row = wait_for_score(client, own.home, submit(client, own.home, "tiny"))
    (theirs,) = fake.submissions
    assert f"melfold:{row.tag}" in theirs.description
    assert read_json(own.home.submissions / "tiny" / "manifest.json")["files"]["submission.csv"][:16] in theirs.description
    assert (row.status, row.ref, row.account, row.competition) == ("complete", str(theirs.ref), "tester", DEMO)
    assert float(row.public_score) == float(theirs.public_score)
    assert float(row.private_score) == float(theirs.private_score)
    assert (row.runs, row.track) == ("tiny", "scratch")
    assert 0 < float(row.oof_lwlrap) < 1
    assert all((row.time, row.weights, row.recipes, row.folds))
    assert not list(own.home.submissions.glob(".call-*")), "nothing is left to settle"


def test_what_kaggle_has_is_submitted_again_only_on_request(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    first = submit(client, own.home, "tiny")
    assert submit(client, own.home, "tiny").tag == first.tag
    assert len(fake.submissions) == 1
    again = submit(client, own.home, "tiny", again=True)
    assert again.tag != first.tag
    assert len(fake.submissions) == 2


@pytest.mark.parametrize("typed", ["tiny/", "./tiny", "../submissions/tiny", "submissions/tiny"])
def test_a_submission_has_one_name(typed: str, fake: FakeKaggle, client: Kaggle, own: World) -> None:
    with pytest.raises(MelfoldError, match="named without its folder.*Use tiny"):
        submit(client, own.home, typed)
    assert fake.calls == []


def test_a_lost_ledger_is_no_reason_to_submit_again(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    first = submit(client, own.home, "tiny")
    Ledger.of(own.home).path.unlink()
    row = submit(client, own.home, "tiny")
    assert (row.tag, row.ref, row.oof_lwlrap, row.account) == (first.tag, first.ref, first.oof_lwlrap, "tester")
    assert Ledger.of(own.home).rows() == [row]
    assert len(fake.submissions) == 1


@pytest.mark.parametrize("kind", ["delay", "409_after"])
def test_a_lost_ledger_is_no_reason_either_while_kaggle_does_not_list_it(
    kind: str, fake: FakeKaggle, client: Kaggle, own: World
) -> None:
    fake.list_late = 99
    fake.faults.append(Fault("CreateSubmission", kind, seconds=0))
    with contextlib.suppress(KaggleError):
        submit(client, own.home, "tiny")
    Ledger.of(own.home).path.unlink()
    fake.submissions[0].hidden = 1 if kind == "delay" else 0
    row = submit(client, own.home, "tiny")
    assert (row.status in SPENT, row.ref, len(fake.submissions)) == (True, "1", 1)


@pytest.mark.parametrize(("mark", "same"), [("", True), ("sha256:0123456789abcdef ", False)])
def test_a_message_without_a_hash_is_known_by_its_id(mark: str, same: bool, fake: FakeKaggle, client: Kaggle, own: World) -> None:
    by_hand(client, own, f"tiny oof=0.50000 {mark}melfold:0123456789ab")
    assert (submit(client, own.home, "tiny").tag == "0123456789ab") is same
    assert len(fake.submissions) == (1 if same else 2)


def test_scores_stay_empty_until_there_are_any(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.score_delay = 60
    row = submit(client, own.home, "tiny")
    assert (row.status, row.public_score, row.private_score) == ("submitted", "", "")
    with pytest.raises(MelfoldError, match="no score yet"):
        wait_for_score(client, own.home, row, minutes=0)
    assert Ledger.of(own.home).rows() == [row]


def test_kaggles_own_words_about_what_it_could_not_score(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.score_delay = 60
    row = submit(client, own.home, "tiny")
    fake.submissions[0].status, fake.submissions[0].error = "ERROR", "Submission must have\n3361 rows"
    words = "" if OLD_CLIENT else "Submission must have 3361 rows"
    with pytest.raises(MelfoldError, match=f"could not score tiny: submission 1{': ' if words else ''}{words}"):
        wait_for_score(client, own.home, row)
    (row,) = Ledger.of(own.home).rows()
    assert (row.status, row.note) == ("error", words)
    for wait in ([], ["--wait"]):
        again = melfold("submit", "tiny", *wait, "--competition", DEMO, env=fake.env(own.home.root) | QUICK, home=own.home)
        assert (again.returncode, "could not score" in again.stderr) == (2, True)
    assert len(fake.submissions) == 1


def test_no_submissions_left_is_reported_before_one_is_tried(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.daily_limit = 0
    with pytest.raises(MelfoldError, match="no submissions left today"):
        submit(client, own.home, "tiny")
    assert not any(call.rpc == "StartSubmissionUpload" for call in fake.calls)
    assert Ledger.of(own.home).rows() == []


def test_a_kernel_is_submitted_only_when_its_version_is_complete(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    output = (own.home.submissions / "tiny" / "submission.csv").read_bytes()
    form = Kernel("tester/some-kernel", fake.add_kernel("some-kernel", {"submission.csv": output}))
    fake.finish_kernel("some-kernel", status="RUNNING")
    with pytest.raises(MelfoldError, match="is not complete"):
        submit(client, own.home, "tiny", kernel=form)
    fake.finish_kernel("some-kernel")
    if not OLD_CLIENT:
        fake.add_kernel("some-kernel", {})
        fake.finish_kernel("some-kernel", status="RUNNING")  # a later version is of no interest
    row = submit(client, own.home, "tiny", kernel=form)
    assert (row.kernel, row.version, row.account) == ("tester/some-kernel", "1", "tester")
    assert fake.submissions[0].kernel == "tester/some-kernel/1"


def test_of_two_pushed_kernels_the_later_one_is_submitted(fake: FakeKaggle, own: World) -> None:
    target = Target("tester", DEMO, gpu=False)
    output = (own.home.submissions / "tiny" / "submission.csv").read_bytes()
    for built in (build_infer(own.home, "tiny", target), build_copy(own.home, "tiny", target)):
        version = fake.add_kernel(built.facts["kernel"].split("/")[1], {"submission.csv": output})
        built.push_stamp.commit(built.inputs, kernel=built.facts["kernel"], version=version)
    done = CliRunner().invoke(app, ["submit", "tiny", "--kernel", "--competition", DEMO, "--home", str(own.home.root)])
    assert done.exit_code == 0, done.stderr
    assert "two kernels were pushed; this is the later one: tester/melfold-copy-csv-tiny" in done.stderr
    assert fake.submissions[0].kernel == "tester/melfold-copy-csv-tiny/1"


def test_a_kernels_submission_is_not_repeated_after_a_time_out(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    output = (own.home.submissions / "tiny" / "submission.csv").read_bytes()
    form = Kernel("tester/some-kernel", fake.add_kernel("some-kernel", {"submission.csv": output}))
    fake.faults.append(Fault("CreateCodeSubmission", "hang_after"))
    assert submit(client, own.home, "tiny", kernel=form).ref == "1"
    assert created(fake) == 1


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_refusal_is_recorded_and_may_be_tried_again(flat: bool, fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.flat_errors = flat
    fake.faults.append(Fault("CreateSubmission", "error_body"))
    with pytest.raises(KaggleError, match="refused: 400 Something went wrong"):
        submit(client, own.home, "tiny")
    (row,) = Ledger.of(own.home).rows()
    assert row.status == "refused"
    assert "400 Something went wrong" in row.note
    assert submit(client, own.home, "tiny").status in SPENT
    assert len(fake.submissions) == 1


@pytest.mark.parametrize("kind", ["500_after", "drop_after", "hang_after", "cut", "408_after", "409_after", "429_after"])
def test_a_lost_answer_is_settled_by_looking_the_tag_up(kind: str, fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.list_late = 2  # one look is not enough
    fake.faults.append(Fault("CreateSubmission", kind, seconds=4 if kind.startswith("hang") else None))
    row = submit(client, own.home, "tiny")
    assert row.status in SPENT
    assert row.ref == str(fake.submissions[0].ref)
    assert row.note == ""
    assert len(fake.submissions) == 1


def test_a_refusal_that_took_effect_is_found_by_the_next_try(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.list_late = 99
    fake.faults.append(Fault("CreateSubmission", "409_after"))
    with pytest.raises(KaggleError):
        submit(client, own.home, "tiny")
    fake.submissions[0].hidden = 0
    row = submit(client, own.home, "tiny")
    assert (row.status in SPENT, row.note, len(fake.submissions)) == (True, "", 1)


@pytest.mark.parametrize(
    ("rpc", "kind"),
    [
        ("StartSubmissionUpload", "500_before"),
        ("StartSubmissionUpload", "500_after"),
        ("StartSubmissionUpload", "drop_before"),
        ("PUT", "refuse_upload"),
    ],
)
def test_what_fails_before_the_submission_itself_leaves_no_doubt(
    rpc: str, kind: str, fake: FakeKaggle, client: Kaggle, own: World
) -> None:
    fake.faults.append(Fault(rpc, kind))
    with pytest.raises(KaggleError):
        submit(client, own.home, "tiny")
    (row,) = Ledger.of(own.home).rows()
    assert (row.status, row.note[:9]) == ("refused", "not sent:")
    assert submit(client, own.home, "tiny").status in SPENT
    assert len(fake.submissions) == 1


def test_what_cannot_be_found_is_unknown_and_not_repeated(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "drop_before"))
    for _ in range(2):
        with pytest.raises(MelfoldError, match=r"unknown.*--again"):
            submit(client, own.home, "tiny")
    assert [row.status for row in Ledger.of(own.home).rows()] == ["unknown"]
    (line,) = sync(client, own.home)
    assert "still unknown" in line
    Ledger.of(own.home).path.unlink()
    with pytest.raises(MelfoldError, match=r"unknown.*--again"):  # the doubt outlives the ledger
        submit(client, own.home, "tiny")
    assert fake.submissions == []
    assert submit(client, own.home, "tiny", again=True).status in SPENT
    assert [row.status for row in Ledger.of(own.home).rows()] == ["unknown", "complete"]
    assert submit(client, own.home, "tiny").status == "complete", "the one that is there answers for the one in doubt"
    assert len(fake.submissions) == 1


def test_a_late_arrival_is_found_by_sync(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "late", seconds=15))
    with pytest.raises(MelfoldError, match="unknown"):
        submit(client, own.home, "tiny")
    wait_for(lambda: fake.submissions)
    assert "unknown -> " in sync(client, own.home)[0]
    (row,) = Ledger.of(own.home).rows()
    assert (row.ref, row.note) == (str(fake.submissions[0].ref), "")


def killed(fake: FakeKaggle, own: World, rpc: str) -> None:
    """Kill melfold when Kaggle has received a call."""
    args = command("submit", "tiny", "--competition", DEMO, home=own.home)
    process = subprocess.Popen(args, env=fake.env(own.home.root) | QUICK, stdout=-3, stderr=-3)
    wait_for(lambda: any(call.rpc == rpc for call in fake.calls))
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_call_outlives_melfold_and_is_waited_for(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.faults.append(Fault("StartSubmissionUpload", "delay", seconds=6))  # longer than all looks
    killed(fake, own, "StartSubmissionUpload")
    assert [row.status for row in Ledger.of(own.home).rows()] == ["pending"]
    row = submit(client, own.home, "tiny")
    assert row.status in SPENT
    assert (len(fake.submissions), created(fake)) == (1, 1)


def test_a_call_that_failed_after_melfold_was_killed_is_known_not_to_be_sent(
    fake: FakeKaggle, client: Kaggle, own: World
) -> None:
    fake.faults.append(Fault("StartSubmissionUpload", "hang", seconds=2))
    killed(fake, own, "StartSubmissionUpload")
    assert submit(client, own.home, "tiny").status in SPENT
    assert [row.status for row in Ledger.of(own.home).rows()] == ["refused", "complete"]
    assert len(fake.submissions) == 1


def test_two_at_a_time_submit_once(fake: FakeKaggle, own: World) -> None:
    args = command("submit", "tiny", "--competition", DEMO, home=own.home)
    both = [subprocess.Popen(args, env=fake.env(own.home.root) | QUICK, stdout=-3, stderr=-3) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (created(fake), len(Ledger.of(own.home).rows())) == (1, 1)


def test_sync_looks_at_scored_rows_again(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    fake.late = True
    row = wait_for_score(client, own.home, submit(client, own.home, "tiny"))
    assert (row.public_score, row.public) == ("0.00000", None)
    assert sync(client, own.home) == []
    fake.submissions[0].private_score = "0.12345"
    (line,) = sync(client, own.home)
    assert line.endswith("complete -> complete Private 0.12345")
    assert [r.private for r in Ledger.of(own.home).rows()] == [0.12345]


def test_sync_leaves_other_competitions_alone_and_names_what_the_ledger_lacks(
    fake: FakeKaggle, client: Kaggle, own: World
) -> None:
    by_hand(client, own, "by hand")
    elsewhere = Row(*["x"] * 9, "", status="unknown", competition="another")
    Ledger.of(own.home).add(elsewhere)
    (line,) = sync(client, own.home)
    assert line.startswith("not in the ledger: ")
    assert "by hand" in line
    assert Ledger.of(own.home).rows() == [elsewhere]


def test_a_submission_goes_to_the_competition_of_its_data(fake: FakeKaggle, own: World) -> None:
    with pytest.raises(MelfoldError, match="is for another competition: demo, not freesound"):
        submit(Kaggle(SLUG), own.home, "tiny")
    unasked = melfold("submit", "tiny", env=fake.env(own.home.root), home=own.home)
    assert (unasked.returncode, "Name it: --competition" in unasked.stderr) == (2, True)
    assert fake.calls == []
    real = {"id": "a", "competition": "fat2019"}
    assert competition_for(real, None) == competition_for(real, SLUG) == SLUG
    with pytest.raises(MelfoldError, match="is for another competition"):
        competition_for(real, "titanic")


def test_a_competition_that_takes_no_files_is_told_before_anything_is_spent() -> None:
    with pytest.raises(MelfoldError, match=r"takes no files.*nothing was submitted.*ship tiny --copy"):
        check_file_form("tiny", SLUG)
    check_file_form("tiny", DEMO)


def test_a_file_that_was_changed_is_not_submitted(fake: FakeKaggle, client: Kaggle, own: World) -> None:
    path = own.home.submissions / "tiny" / "submission.csv"
    path.write_text(path.read_text().replace("0.", "0.1", 1))
    with pytest.raises(MelfoldError, match="was changed after it was written"):
        submit(client, own.home, "tiny")
    assert fake.calls == []


def test_the_recorded_recipe_rebuilds_the_same_file(own: World) -> None:
    from melfold.combine.submission import build_submission
    from melfold.files import sha256_file
    from melfold.learn.predictions import open_prediction

    folder = own.home.submissions / "tiny"
    manifest = read_json(folder / "manifest.json")
    (folder / "submission.csv").unlink()
    runs = [open_prediction(own.home, run["name"]) for run in manifest["runs"]]
    rebuilt = build_submission(own.home, runs, own.competition, id="tiny", mean=manifest["mean"])
    assert sha256_file(rebuilt) == manifest["files"]["submission.csv"]
