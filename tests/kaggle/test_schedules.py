"""Schedules of faults and kills, drawn from seeds: whatever happens, a submission is made once, and the ledger knows it."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kaggle_world import DEMO, World

from melfold.kaggle.build import Target, build_copy
from melfold.kaggle.built import Built
from melfold.kaggle.ledger import SPENT, Ledger
from tests.fake_kaggle import FakeKaggle, Fault
from tests.quick_start import QuickStart

QUICK = {"MELFOLD_PACE": "0.004", "MELFOLD_KAGGLE_TIMEOUT": "3"}
FORMS = ("file", "kernel", "copy")
KINDS = ["delay", "hang", "hang_after", "drop_before", "drop_after", "late", "cut", "error_body"]
KINDS += ["408_after", "409_after", "429", "500_before", "500_after"]
BEFORE = ["ListSubmissions", "GetSubmissionLimits"]
UPLOAD, CREATE = ["StartSubmissionUpload", "PUT"], {"file": "CreateSubmission"}


@pytest.fixture(scope="session")
def kernels(kaggle_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The two kernels of the world's submission, built once."""
    copy = kaggle_world.copy(tmp_path_factory.mktemp("kernels") / "home")
    target = Target("tester", DEMO, gpu=False)
    return {"kernel": copy.build(), "copy": build_copy(copy.home, "tiny", target)}


def push_without_kaggle(built: Built, own: World, fake: FakeKaggle) -> None:
    """As if a kernel had been pushed and had run: that is not what is tried here."""
    output = (own.home.submissions / "tiny" / "submission.csv").read_bytes()
    version = fake.add_kernel(built.facts["kernel"].split("/")[1], {"submission.csv": output})
    built.push_stamp.commit(built.inputs, kernel=built.facts["kernel"], version=version)


def draw_faults(rng: random.Random, form: str) -> list[Fault]:
    create = CREATE.get(form, "CreateCodeSubmission")
    rpcs = [create] * 5 + BEFORE + (UPLOAD if form == "file" else ["GetKernelSessionStatus"])
    faults = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        rpc = rng.choice(rpcs)
        kind = "refuse_upload" if rpc == "PUT" and rng.random() < 0.5 else rng.choice(KINDS)
        seconds = {"delay": 0.5, "late": rng.uniform(0.2, 2)}.get(kind, 4.5 if kind.startswith("hang") else None)
        faults.append(Fault(rpc, kind, after=rng.choice([0, 0, 1]), times=rng.choice([1, 1, 2]), seconds=seconds))
    return faults


def run_schedule(seed: int, world: World, kernels: dict[str, Built], melfold: str, root: Path) -> None:
    """Faults and kills around `submit`, and sometimes a lost ledger; then what must hold."""
    rng = random.Random(seed)
    form, forgetful = FORMS[seed % 3], rng.random() < 0.5
    own = world.copy(root / "own")
    with FakeKaggle(root / "kaggle", competition=DEMO, data=own.data, truth=own.truth, run_kernels=False) as fake:
        env = fake.env(root / "user") | QUICK
        if form != "file":
            folder = own.home.root / "build" / "kernels" / kernels[form].folder.name
            folder.parent.mkdir(parents=True)
            subprocess.run(["cp", "-r", kernels[form].folder, folder], check=True)
            push_without_kaggle(Built(folder), own, fake)
        fake.flat_errors, fake.list_late = rng.random() < 0.5, rng.choice([0, 0, 1, 2])
        fake.faults = draw_faults(rng, form)
        told: list[Any] = [seed, form, [(f.rpc, f.kind, f.after, f.times) for f in fake.faults]]
        to = ["--competition", DEMO, "--home", str(own.home.root)]
        args = [melfold, "submit", "tiny", *to, *([] if form == "file" else ["--kernel"])]
        for _ in range(rng.choice([2, 3])):
            patience = rng.uniform(0.3, 6) if rng.random() < 0.6 else 60
            process = subprocess.Popen(args, env=env, stdout=-3, stderr=-3, cwd=root)
            try:
                told.append(process.wait(patience))
            except subprocess.TimeoutExpired:
                told.append(("kill", round(patience, 2)))
                process.kill()
                process.wait()
            if forgetful and rng.random() < 0.5:
                told.append("the ledger is lost")
                Ledger.of(own.home).path.unlink(missing_ok=True)
        fake.faults, fake.list_late = [], 0
        # This one waits for a call that outlived its melfold.
        done = subprocess.run(args, env=env, capture_output=True, text=True, cwd=root)
        told.append((done.returncode, done.stderr))
        if any(kind == "late" for _, kind, *_ in told[2]):
            time.sleep(2)
        synced = subprocess.run([melfold, "ledger", "sync", *to], env=env, capture_output=True, text=True, cwd=root)
        assert synced.returncode == 0, (told, synced.stderr)
        check(own, fake, told)


def check(own: World, fake: FakeKaggle, told: list[Any]) -> None:
    """Never a second submission, never a lost one, never a doubt about a call that was not made, never a lie."""
    rows = Ledger.of(own.home).rows()
    story = (told, rows, [(s.ref, s.description) for s in fake.submissions])
    asked = [call.request.get("submissionDescription", "") for call in fake.calls if call.rpc.startswith("Create")]
    assert len(fake.submissions) <= 1, story
    for theirs in fake.submissions:
        (row,) = [row for row in rows if f"melfold:{row.tag}" in theirs.description]
        assert row.status in SPENT, story
        assert row.ref == str(theirs.ref), story
    for row in rows:
        at_kaggle = any(f"melfold:{row.tag}" in theirs.description for theirs in fake.submissions)
        assert at_kaggle or row.status in ("refused", "unknown"), story
        assert row.status != "unknown" or any(f"melfold:{row.tag}" in text for text in asked), story
    assert fake.submissions or any(row.status == "unknown" for row in rows), story


@pytest.fixture
def run_schedules(kaggle_world: World, kernels: dict[str, Built], quick: QuickStart, tmp_path: Path) -> Callable[[range], None]:
    def run(seeds: range) -> None:
        with ThreadPoolExecutor(8) as pool:  # they wait more than they work
            told = (kaggle_world, kernels, quick.program("melfold"))
            for done in [pool.submit(run_schedule, seed, *told, tmp_path / str(seed)) for seed in seeds]:
                done.result()

    return run


def test_eight_schedules_of_faults_and_kills(run_schedules: Callable[[range], None]) -> None:
    run_schedules(range(8))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_three_hundred_schedules_of_faults_and_kills(part: int, run_schedules: Callable[[range], None]) -> None:
    run_schedules(range(1000 + 30 * part, 1030 + 30 * part))
