"""A stand-in for Kaggle: a real server on loopback that the unmodified `kaggle` command talks to.

    with FakeKaggle(tmp_path, data=download, truth=truth) as kaggle:
        subprocess.run(["kaggle", "-W", "competitions", "submissions", kaggle.competition], env=kaggle.env(tmp_path / "home"))

It keeps uploads, datasets, kernels and submissions in memory (their bytes below `root`), really runs kernels, really scores
submissions, and misbehaves on demand (`Fault`). Its shapes come from the client's own types; beyond them it is a guess at Kaggle.

From a shell: `python -m tests.fake_kaggle --root DIR --data DATA --truth FILE -- COMMAND ...`

    wire            requests, replies, refusals, pages, and helpers on files
    faults          what goes wrong on demand
    state           what the server knows; bytes on their way up and down
    competitions    the download, submissions, scores, the leaderboard
    datasets        datasets and their versions
    kernels         kernels: pushed, mounted, run for real
    web             HTTP, and the faults around each request
    server          `FakeKaggle`, all of it together
"""

from tests.fake_kaggle.faults import Fault
from tests.fake_kaggle.server import FakeKaggle

__all__ = ["FakeKaggle", "Fault"]
