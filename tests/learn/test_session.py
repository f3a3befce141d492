"""Folds in processes of their own, as many at a time as there are devices, within a time limit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from learn_world import World
from melfold.learn.session import train_session

from melfold import pipeline
from melfold.errors import MelfoldError
from melfold.files import sha256_file
from melfold.learn.devices import shared_threads
from melfold.learn.train import train_fold

TINY = ("model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}", "train.epochs=1", "train.amp=off")


def test_two_devices_train_two_folds_to_the_bytes_of_one_after_the_other(world: World, tmp_path: Path) -> None:
    cache = pipeline.cache(world.competition, world.home, world.recipe(), jobs=1)
    together, alone = world.start(tmp_path / "a", *TINY), world.start(tmp_path / "b", *TINY)
    assert train_session(together, ["0", "1"], cache, ["cpu", "cpu"], amp="off") == ["0", "1"]
    for fold in ("0", "1"):
        train_fold(alone, fold, cache, world.device)
        assert sha256_file(together.fold(fold).weights) == sha256_file(alone.fold(fold).weights)
    begun = [(together.fold(fold).path / ".lock").stat().st_mtime for fold in ("0", "1")]
    ended = [together.fold(fold).result.stat().st_mtime for fold in ("0", "1")]
    assert max(begun) < min(ended), "both at a time"
    assert train_session(together, ["0", "1"], cache, ["cpu"]) == ["0", "1"], "what is done is left"


def test_processes_on_the_cpu_share_its_threads_and_gpus_leave_them_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert shared_threads(["cpu", "cpu"]) == {"OMP_NUM_THREADS": "2"}
        assert shared_threads(["cpu"] * 8) == {"OMP_NUM_THREADS": "1"}
        assert shared_threads(["cpu"]) == shared_threads(["cuda:0", "cuda:1"]) == {}
    finally:
        torch.set_num_threads(before)


def test_a_fold_that_fails_is_named_and_the_others_end(world: World, tmp_path: Path) -> None:
    cache = pipeline.cache(world.competition, world.home, world.recipe(), jobs=1)
    run = world.start(tmp_path, *TINY)
    run.fold(0).path.mkdir()
    run.fold(0).checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(MelfoldError, match=r"folds failed: 0 \(exit code 2\)"):
        train_session(run, ["0", "1"], cache, ["cpu"], amp="off")
    assert run.done_folds() == ["1"]


def test_no_time_is_no_fold(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, *TINY)
    begun = time.monotonic()
    assert train_session(run, ["0", "1"], tmp_path, ["cpu"], seconds=-1) == []
    assert time.monotonic() - begun < 5
    assert not run.fold(0).path.exists()
