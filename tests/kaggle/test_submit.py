"""Submit once, whatever goes wrong: faults and kills by seeded schedules, and the cases one by one."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kaggle_world import World, command, environment, melfold

from melfold.errors import MelfoldError
from melfold.kaggle.client import Kaggle, KaggleError
from melfold.kaggle.ledger import SPENT, Ledger
from melfold.kaggle.submit import Kernel, submit, sync, wait_for_score
from tests.fake_kaggle import FakeKaggle, Fault

QUICK = {"MELFOLD_PACE": "0.004", "MELFOLD_KAGGLE_TIMEOUT": "3"}


@pytest.fixture
def fake(own: World, tmp_path: Path) -> Iterator[FakeKaggle]:
    """A local Kaggle that this process's environment points to."""
    with (
        FakeKaggle(tmp_path / "kaggle", data=own.data, truth=own.truth, run_kernels=False) as server,
        environment(server.env(tmp_path / "user") | QUICK),
    ):
        yield server


def test_a_submission_is_scored_and_recorded_with_its_provenance(fake: FakeKaggle, own: World) -> None:
    row = wait_for_score(Kaggle(), own.home, submit(Kaggle(), own.home, "tiny").tag)
    (theirs,) = fake.submissions
    assert f"melfold:{row.tag}" in theirs.description
    assert (row.status, row.ref) == ("complete", str(theirs.ref))
    assert float(row.public_score) == float(theirs.public_score)
    assert float(row.private_score) == float(theirs.private_score)
    assert (row.runs, row.track) == ("tiny", "scratch")
    assert 0 < float(row.oof_lwlrap) < 1
    assert all((row.time, row.weights, row.recipes, row.folds))


def test_what_kaggle_has_is_submitted_again_only_on_request(fake: FakeKaggle, own: World) -> None:
    first = submit(Kaggle(), own.home, "tiny")
    assert submit(Kaggle(), own.home, "tiny").tag == first.tag
    assert len(fake.submissions) == 1
    again = submit(Kaggle(), own.home, "tiny", again=True)
    assert again.tag != first.tag
    assert len(fake.submissions) == 2


def test_scores_stay_empty_until_there_are_any(fake: FakeKaggle, own: World) -> None:
    fake.score_delay = 60
    row = submit(Kaggle(), own.home, "tiny")
    assert (row.status, row.public_score, row.private_score) == ("submitted", "", "")
    with pytest.raises(MelfoldError, match="no score yet"):
        wait_for_score(Kaggle(), own.home, row.tag, minutes=0)
    assert Ledger.of(own.home).rows() == [row]


def test_no_submissions_left_is_reported_before_one_is_tried(fake: FakeKaggle, own: World) -> None:
    fake.daily_limit = 0
    with pytest.raises(MelfoldError, match="no submissions left today"):
        submit(Kaggle(), own.home, "tiny")
    assert not any(call.rpc == "StartSubmissionUpload" for call in fake.calls)
    assert Ledger.of(own.home).rows() == []


def test_a_kernel_is_submitted_only_when_it_is_complete(fake: FakeKaggle, own: World) -> None:
    from melfold.kaggle.push import push

    version = push(Kaggle(), own.build(), unrehearsed=True)
    form = Kernel("tester/melfold-infer-tiny", version)
    with pytest.raises(MelfoldError, match="is not complete"):
        submit(Kaggle(), own.home, "tiny", kernel=form)
    output = (own.home.submissions / "tiny" / "submission.csv").read_bytes()
    fake.finish_kernel("melfold-infer-tiny", outputs={"submission.csv": output})
    row = submit(Kaggle(), own.home, "tiny", kernel=form)
    assert (row.kernel, row.version) == ("tester/melfold-infer-tiny", "1")
    assert fake.submissions[0].kernel


def test_a_refusal_is_recorded_and_may_be_tried_again(fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "error_body"))
    with pytest.raises(KaggleError, match="400 Client Error"):
        submit(Kaggle(), own.home, "tiny")
    (row,) = Ledger.of(own.home).rows()
    assert row.status == "refused"
    assert "400 Client Error" in row.note
    assert submit(Kaggle(), own.home, "tiny").status in SPENT
    assert len(fake.submissions) == 1


@pytest.mark.parametrize("kind", ["500_after", "drop_after", "hang_after", "cut"])
def test_a_lost_answer_is_settled_by_looking_the_tag_up(kind: str, fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", kind, seconds=4 if kind.startswith("hang") else None))
    row = submit(Kaggle(), own.home, "tiny")
    assert row.status in SPENT
    assert row.ref == str(fake.submissions[0].ref)
    assert len(fake.submissions) == 1


def test_what_cannot_be_found_is_unknown_and_not_repeated(fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "drop_before"))
    for _ in range(2):
        with pytest.raises(MelfoldError, match=r"unknown.*--again"):
            submit(Kaggle(), own.home, "tiny")
    assert [row.status for row in Ledger.of(own.home).rows()] == ["unknown"]
    assert fake.submissions == []
    assert submit(Kaggle(), own.home, "tiny", again=True).status in SPENT
    assert [row.status for row in Ledger.of(own.home).rows()] == ["unknown", "complete"]
    assert submit(Kaggle(), own.home, "tiny").status == "complete", "the one that is there answers for the one in doubt"
    assert len(fake.submissions) == 1


def test_a_late_arrival_is_found_by_sync(fake: FakeKaggle, own: World) -> None:
    fake.faults.append(Fault("CreateSubmission", "late", seconds=15))
    with pytest.raises(MelfoldError, match="unknown"):
        submit(Kaggle(), own.home, "tiny")
    while not fake.submissions:
        time.sleep(0.1)
    assert "unknown -> " in sync(Kaggle(), own.home)[0]
    (row,) = Ledger.of(own.home).rows()
    assert row.ref == str(fake.submissions[0].ref)


def test_sync_names_what_the_ledger_lacks(fake: FakeKaggle, own: World) -> None:
    Kaggle().submit_file(own.home.submissions / "tiny" / "submission.csv", "by hand")
    (line,) = sync(Kaggle(), own.home)
    assert line.startswith("not in the ledger: ")
    assert "by hand" in line


def test_a_file_that_was_changed_is_not_submitted(fake: FakeKaggle, own: World) -> None:
    path = own.home.submissions / "tiny" / "submission.csv"
    path.write_text(path.read_text().replace("0.", "0.1", 1))
    with pytest.raises(MelfoldError, match="was changed after it was written"):
        submit(Kaggle(), own.home, "tiny")
    assert fake.calls == []


def test_the_recorded_recipe_rebuilds_the_same_file(own: World) -> None:
    from melfold.combine.submission import build_submission
    from melfold.files import read_json, sha256_file
    from melfold.learn.predictions import open_prediction

    folder = own.home.submissions / "tiny"
    manifest = read_json(folder / "manifest.json")
    (folder / "submission.csv").unlink()
    runs = [open_prediction(own.home, run["name"]) for run in manifest["runs"]]
    rebuilt = build_submission(own.home, runs, own.competition, id="tiny", mean=manifest["mean"])
    assert sha256_file(rebuilt) == manifest["files"]["submission.csv"]


# Schedules


def run_schedule(seed: int, world: World, root: Path) -> None:
    """Faults and kills around `submit`, drawn from a seed; then what must hold, whatever happened."""
    rng = random.Random(seed)
    own = world.copy(root / "own")
    kinds = [
        "delay",
        "hang",
        "hang_after",
        "drop_before",
        "drop_after",
        "late",
        "cut",
        "error_body",
        "429",
        "500_before",
        "500_after",
    ]
    rpcs = ["CreateSubmission"] * 5 + ["StartSubmissionUpload", "PUT", "ListSubmissions", "GetSubmissionLimits"]
    told = []
    with FakeKaggle(root / "kaggle", data=own.data, truth=own.truth, run_kernels=False) as fake:
        env = fake.env(root / "user") | QUICK
        for _ in range(rng.choice([1, 1, 2, 3])):
            rpc = rng.choice(rpcs)
            kind = "refuse_upload" if rpc == "PUT" and rng.random() < 0.5 else rng.choice(kinds)
            seconds = {"delay": 0.5, "late": rng.uniform(0.2, 3)}.get(kind, 5.0 if kind.startswith("hang") else None)
            fake.faults.append(Fault(rpc, kind, after=rng.choice([0, 0, 1]), times=rng.choice([1, 1, 2]), seconds=seconds))
            told.append((rpc, kind))
        for _ in range(3):
            patience = rng.uniform(0.3, 3.5) if rng.random() < 0.6 else 60
            process = subprocess.Popen(command("submit", "tiny", home=own.home), env=env, stdout=-3, stderr=-3, cwd=root)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                told.append(("kill", round(patience, 2)))
                process.kill()
                process.wait()
        time.sleep(0.5)
        fake.faults.clear()
        done = melfold("ledger", "sync", env=env, home=own.home)
        assert done.returncode == 0, (told, done.stderr)
        rows = Ledger.of(own.home).rows()
        story = (seed, told, rows, [(s.ref, s.description) for s in fake.submissions])
        assert len(fake.submissions) <= 1, story
        for theirs in fake.submissions:
            (row,) = [row for row in rows if f"melfold:{row.tag}" in theirs.description]
            assert row.status in (*SPENT, "unknown"), story
            assert row.status == "unknown" or row.ref == str(theirs.ref), story
        for row in rows:
            at_kaggle = any(f"melfold:{row.tag}" in theirs.description for theirs in fake.submissions)
            assert at_kaggle or row.status in ("refused", "unknown"), story


def run_schedules(seeds: range, world: World, root: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run_schedule, seed, world, root / str(seed)) for seed in seeds]:
            done.result()


def test_twenty_schedules_of_faults_and_kills(kaggle_world: World, tmp_path: Path) -> None:
    run_schedules(range(20), kaggle_world, tmp_path)


@pytest.mark.soak
def test_two_hundred_schedules_of_faults_and_kills(kaggle_world: World, tmp_path: Path) -> None:
    run_schedules(range(1000, 1200), kaggle_world, tmp_path)
