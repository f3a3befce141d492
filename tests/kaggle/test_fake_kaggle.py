"""The stand-in for Kaggle, driven by the real command."""

from __future__ import annotations

import csv
import http.client
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import LABELS, Maker
from tests.fake_kaggle import FakeKaggle, Fault

SLUG = "freesound-audio-tagging-2019"
Result = subprocess.CompletedProcess


@pytest.fixture
def download(tiny_download: Maker) -> Path:
    return tiny_download("download", seconds=4, sr=44_100, curated=5, noisy=0)


@pytest.fixture
def server(tmp_path: Path, download: Path) -> Iterator[FakeKaggle]:
    with FakeKaggle(tmp_path / "server", data=download, truth=download / "test_post_competition.csv") as fake:
        yield fake


@pytest.fixture
def submission(tmp_path: Path, download: Path) -> Path:
    """A perfect one."""
    path = tmp_path / "submission.csv"
    with (download / "test_post_competition.csv").open() as truth, path.open("w", newline="") as file:
        rows = [[r["fname"], *[int(label in r["labels"].split(",")) for label in LABELS]] for r in csv.DictReader(truth)]
        csv.writer(file).writerows([["fname", *LABELS], *rows])
    return path


def call(server: FakeKaggle, *args: object, timeout: float = 60, **variables: str) -> Result[str]:
    command = [str(Path(sys.executable).with_name("kaggle")), "-W", *map(str, args)]
    env = server.env(server.root / "home") | variables
    return subprocess.run(command, env=env, cwd=server.root, capture_output=True, text=True, timeout=timeout)


def submit(server: FakeKaggle, path: Path, message: str, **options: float) -> Result[str]:
    return call(server, "competitions", "submit", SLUG, "-f", path, "-m", message, "-q", **options)


def wait_for(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def listed(server: FakeKaggle, *more: str) -> list[dict[str, str]]:
    """The submissions as the command tells them, once all are scored."""
    wait_for(lambda: all(s.status != "PENDING" for s in server.submissions))
    return list(csv.DictReader(call(server, "competitions", "submissions", SLUG, "--csv", *more).stdout.splitlines()))


def write_dataset(folder: Path, slug: str = "my-weights") -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "deep.txt").write_text("deep")
    (folder / "fold0.bin").write_bytes(b"w" * 1000)
    (folder / "empty.txt").touch()
    metadata = {"id": f"tester/{slug}", "title": slug, "licenses": [{"name": "CC0-1.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata))
    return folder


def write_kernel(folder: Path, source: str, **metadata: object) -> Path:
    folder.mkdir(exist_ok=True)
    own = {"id": "tester/my-kernel", "title": "My kernel", "code_file": "script.py", "language": "python"}
    own |= {"kernel_type": "script", "is_private": True, "enable_internet": False}
    (folder / "kernel-metadata.json").write_text(json.dumps(own | metadata))
    (folder / "script.py").write_text(source)
    return folder


def test_a_file_is_submitted_scored_and_listed(server: FakeKaggle, submission: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.csv"
    short.write_text("".join(submission.read_text().splitlines(keepends=True)[:-1]))
    assert call(server, "competitions", "submissions", SLUG, "--csv").stdout == "No submissions found\n"
    done = submit(server, submission, "tag one, with a comma")
    assert (done.returncode, done.stdout) == (0, "Submission ref: 1\nSuccessfully submitted to Freesound Audio Tagging 2019")
    submit(server, short, "tag two")
    two, one = listed(server)
    assert list(one) == ["ref", "fileName", "date", "description", "status", "publicScore", "privateScore"]
    assert one["description"] == "tag one, with a comma"
    assert (one["status"], one["publicScore"], one["privateScore"]) == ("SubmissionStatus.COMPLETE", "1.00000", "1.00000")
    assert (two["status"], two["publicScore"]) == ("SubmissionStatus.ERROR", "")
    assert "rows" in server.submissions[1].error
    assert [row["ref"] for row in listed(server, "--page-size", "1", "--page-token", "1")] == ["1"]
    limits = json.loads(call(server, "competitions", "submission-limits", SLUG, "--json").stdout)
    assert limits == {"numToday": 2, "numTotal": 2, "numAllowedNow": 3}
    server.daily_limit = 2
    assert submit(server, submission, "tag three").returncode == 1
    assert len(server.submissions) == 2


def test_a_half_that_is_not_covered_has_no_score(tmp_path: Path, submission: Path) -> None:
    truth = tmp_path / "public.csv"
    lines = (tmp_path / "download" / "test_post_competition.csv").read_text().splitlines()
    truth.write_text("\n".join([lines[0], *[line for line in lines if "Public" in line]]))
    with FakeKaggle(tmp_path / "server", truth=truth) as server:
        submit(server, submission, "half")
        assert [(r["publicScore"], r["privateScore"]) for r in listed(server)] == [("1.00000", "")]


@pytest.mark.parametrize(
    ("rpc", "kind", "code", "taken", "said"),
    [
        ("CreateSubmission", "error_body", 1, 0, "400 Client Error"),
        ("CreateSubmission", "500_after", 1, 1, "500 Server Error"),
        ("CreateSubmission", "drop_after", 1, 1, "RemoteDisconnected"),
        ("PUT", "refuse_upload", 1, 0, "Could not submit to competition"),
    ],
)
def test_faults_of_a_submission(
    server: FakeKaggle, submission: Path, rpc: str, kind: str, code: int, taken: int, said: str
) -> None:
    server.faults.append(Fault(rpc, kind))
    done = submit(server, submission, "tag")
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert len(server.submissions) == taken


def test_a_hang_holds_the_command_and_a_late_submission_comes(server: FakeKaggle, submission: Path) -> None:
    server.faults += [Fault("CreateSubmission", "hang"), Fault("CreateSubmission", "late", after=1, seconds=0.3)]
    with pytest.raises(subprocess.TimeoutExpired):
        submit(server, submission, "held", timeout=2)
    assert submit(server, submission, "late").returncode == 1
    wait_for(lambda: [s.description for s in server.submissions] == ["late"])


def test_the_wrong_key_and_the_wrong_user(server: FakeKaggle, submission: Path) -> None:
    wrong = call(server, "competitions", "submissions", SLUG, KAGGLE_KEY="bad")
    assert (wrong.returncode, wrong.stdout[:23]) == (1, "Authentication required")
    other = call(server, "competitions", "submissions", SLUG, KAGGLE_USERNAME="other")
    assert (other.returncode, other.stderr[:16]) == (1, "403 Client Error")
    server.rules_accepted = False
    assert "403 Client Error" in submit(server, submission, "x").stderr
    assert "tester" in call(server, "config", "view").stdout


def test_the_data_is_listed_downloaded_and_resumed(server: FakeKaggle, download: Path, tmp_path: Path) -> None:
    files = call(server, "competitions", "files", SLUG, "--csv", "--page-size", 200).stdout
    assert "train_curated/c0000.wav" in files
    assert "test_post_competition" not in files
    server.faults.append(Fault("GET", "cut"))
    done = call(server, "competitions", "download", SLUG, "-p", tmp_path / "got")
    assert done.returncode == 0
    assert "Resuming from 1048576 bytes" in done.stdout
    assert [c.request["range"] for c in server.calls if c.rpc == "GET"] == [None, "bytes=1048576-"]
    with zipfile.ZipFile(tmp_path / "got" / f"{SLUG}.zip") as archive:
        assert archive.testzip() is None
        assert archive.read("train_curated.csv") == (download / "train_curated.csv").read_bytes()
    one = call(server, "competitions", "download", SLUG, "-f", "test/t0000.wav", "-p", tmp_path / "got", "-q")
    assert one.returncode == 0
    assert (tmp_path / "got" / "test" / "t0000.wav").read_bytes() == (download / "test" / "t0000.wav").read_bytes()


def test_datasets_are_made_and_versioned(server: FakeKaggle, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "dataset")
    assert call(server, "datasets", "status", "tester/my-weights").returncode == 1
    done = call(server, "datasets", "create", "-p", folder, "-q")
    assert done.stdout.startswith("Your private Dataset is being created.")
    assert call(server, "datasets", "status", "tester/my-weights").stdout == "ready"
    server.dataset_delay = 600
    done = call(server, "datasets", "version", "-p", folder, "-m", "two", "-q", "--dir-mode", "zip")
    assert done.stdout.startswith("Dataset version is being created.")
    status = call(server, "datasets", "status", "tester/my-weights", "--format", "json").stdout
    assert json.loads(status) == {"status": "blobs_received", "current_version_number": 1}
    early = call(server, "datasets", "version", "-p", folder, "-m", "three", "-q")
    assert (early.returncode, early.stderr[:16]) == (1, "403 Client Error")
    files = call(server, "datasets", "files", "tester/my-weights", "--csv").stdout.splitlines()
    assert [line.split(",")[:2] for line in files[1:]] == [["empty.txt", "0"], ["fold0.bin", "1000"], ["sub/deep.txt", "4"]]
    assert [(v.number, v.notes) for v in server.datasets["my-weights"]] == [(1, "Initial release"), (2, "two")]


def test_a_dataset_is_not_made_without_one_of_its_files(server: FakeKaggle, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "dataset")
    server.faults += [Fault("PUT", "refuse_upload"), Fault("CreateDataset", "drop_after")]
    refused = call(server, "datasets", "create", "-p", folder, "-q")
    assert (refused.returncode, "Upload unsuccessful" in refused.stderr, server.datasets) == (1, True, {})
    done = call(server, "datasets", "create", "-p", folder, "-q")
    assert done.stdout.startswith("Dataset creation error: The requested title")  # the client asked twice
    assert list(server.datasets) == ["my-weights"]


RECORD = """
import os, shutil, socket
from pathlib import Path
root = Path(os.environ["MELFOLD_KERNEL_ROOT"])
inputs = [p for p in sorted((root / "kaggle/input").rglob("*")) if p.is_file()]
for path in inputs:
    print(path.relative_to(root), oct(path.stat().st_mode & 0o222))
print(sorted(name for name in os.environ if name.startswith("KAGGLE") or name.lower().endswith("_proxy")))
try:
    socket.create_connection(("127.0.0.1", PORT), timeout=2).close()
    print("connected")
except OSError:
    print("no network")
Path("submission.csv").write_bytes(Path(SUBMISSION).read_bytes())
assert Path.cwd() == root / "kaggle/working" and os.environ["TMPDIR"] == str(root / "tmp")
"""


def test_a_kernel_runs_on_what_is_mounted_and_is_submitted(server: FakeKaggle, submission: Path, tmp_path: Path) -> None:
    call(server, "datasets", "create", "-p", write_dataset(tmp_path / "dataset"), "-q")
    source = RECORD.replace("PORT", str(server.port)).replace("SUBMISSION", repr(str(submission)))
    sources = {"dataset_sources": ["tester/my-weights", "tester/no-such"], "competition_sources": [SLUG]}
    folder = write_kernel(tmp_path / "kernel", source, **sources)
    done = call(server, "kernels", "push", "-p", folder, "-t", 60)
    assert done.returncode == 0
    refused, pushed = done.stdout.splitlines()
    assert refused.endswith("valid dataset sources and could not be added to the kernel: ['tester/no-such']")
    assert pushed.startswith("Kernel version 1 successfully pushed.")
    session = server.kernels["my-kernel"][0]
    wait_for(lambda: session.done)
    assert session.status == "COMPLETE", session.text
    mounted = session.text.splitlines()
    assert f"kaggle/input/competitions/{SLUG}/sample_submission.csv 0o0" in mounted
    assert "kaggle/input/datasets/tester/my-weights/fold0.bin 0o0" in mounted
    assert mounted[-2:] == ["[]", "no network" if server._can_unshare else "connected"]
    assert call(server, "kernels", "status", "tester/my-kernel").stdout.endswith('"KernelWorkerStatus.COMPLETE"\n')
    call(server, "kernels", "output", "tester/my-kernel", "-p", tmp_path / "out", "-q")
    assert (tmp_path / "out" / "submission.csv").read_bytes() == submission.read_bytes()
    log = json.loads((tmp_path / "out" / "my-kernel.log").read_text())
    assert "".join(entry["data"] for entry in log) == session.text
    code = ["competitions", "submit", SLUG, "-k", "tester/my-kernel", "-v", 1, "-m", "from code", "-f"]
    assert "400 Client Error" in call(server, *code, "other.csv").stderr
    assert call(server, *code, "submission.csv").returncode == 0
    assert [row["publicScore"] for row in listed(server)] == ["1.00000"]


def test_a_kernel_fails_stops_in_time_and_feeds_the_next(server: FakeKaggle, tmp_path: Path) -> None:
    server.layout = "flat"
    folder = write_kernel(tmp_path / "kernel", "open('made.txt', 'w').write('by one')")
    call(server, "kernels", "push", "-p", folder)
    wait_for(lambda: server.kernels["my-kernel"][0].status == "COMPLETE")
    look = "print([p for p in __import__('os').listdir('../input/my-kernel')], flush=True); __import__('time').sleep(60)"
    write_kernel(folder, look, title="My second", kernel_sources=["tester/my-kernel"])  # its title decides its name
    assert "does not resolve" in call(server, "kernels", "push", "-p", folder, "-t", 1).stdout
    session = server.kernels["my-second"][0]
    wait_for(lambda: session.done)
    assert session.text == "['made.txt']\n"
    said = call(server, "kernels", "status", "tester/my-second").stdout.splitlines()
    assert said[0].endswith('"KernelWorkerStatus.ERROR"')
    assert said[1].startswith('Failure message: "Your notebook was stopped')
    early = ["competitions", "submit", SLUG, "-f", "made.txt", "-k", "tester/my-second", "-v", 1, "-m", "x", "-q"]
    assert call(server, *early).returncode == 1
    write_kernel(folder, "#" * 1_000_000)
    assert "400 Client Error" in call(server, "kernels", "push", "-p", folder).stderr
    server.faults.append(Fault("SaveKernel", "reply_error"))
    error = call(server, "kernels", "push", "-p", folder)
    assert (error.returncode, error.stdout) == (0, "Kernel push error: Something went wrong\n")


def test_nothing_leaves_the_machine_and_stopping_lets_go(tmp_path: Path) -> None:
    with FakeKaggle(tmp_path, run_kernels=False) as server:
        tunnel = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        tunnel.request("CONNECT", "example.com:443")
        assert tunnel.getresponse().status == 403
        tunnel.close()
        assert server.connects == ["example.com:443"]
        server.faults.append(Fault("*", "hang"))
        held = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        held.request("POST", "/api/v1/x/ListSubmissions", body="{}")
        wait_for(lambda: server.calls)
    held.close()
    with pytest.raises(ValueError, match="unknown fault"):
        Fault("PUT", "sulk")


def test_it_serves_a_command(repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fake_kaggle", "--root", str(tmp_path), "--"]
    inner = "import os; print(os.environ['KAGGLE_API_ENVIRONMENT'], 'NO_PROXY' in os.environ); raise SystemExit(3)"
    done = subprocess.run([*command, sys.executable, "-c", inner], cwd=repo, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "LOCALHOST False\n")
    assert "LOCAL stand-in" in done.stderr
    assert "127.0.0.1" not in done.stderr
