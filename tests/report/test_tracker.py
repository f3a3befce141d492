"""Mirroring a run's logs to trackers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from melfold.errors import MelfoldError
from melfold.learn import tracker
from melfold.learn.tracker import Mirror, Send, tracked


def append(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.closed: list[str] = []

    def open(self, fold: str) -> tuple[Send, object]:
        return lambda step, values: self.rows.append((fold, step, values)), lambda: self.closed.append(fold)


def test_each_row_of_each_fold_is_sent_once(tmp_path: Path) -> None:
    kept = Kept()
    mirror = Mirror(tmp_path, kept.open)
    mirror.send_new()
    append(tmp_path / "fold0" / "log.jsonl", {"step": 20, "loss": 0.5}, {"step": 40, "loss": None, "lr": 0.1})
    append(tmp_path / "fold1" / "log.jsonl", {"step": 20, "loss": 0.6})
    mirror.send_new()
    # A training that was killed is continued from its checkpoint: its log is cut back and grows again.
    (tmp_path / "fold0" / "log.jsonl").write_text(json.dumps({"step": 20, "loss": 0.5}) + '\n{"step": 4')
    mirror.send_new()
    (tmp_path / "fold0" / "log.jsonl").write_text("")
    append(tmp_path / "fold0" / "log.jsonl", {"step": 20, "loss": 0.5}, {"step": 40, "lr": 0.1}, {"step": 40, "lwlrap": 0.7})
    mirror.send_new()
    assert kept.rows == [
        ("fold0", 20, {"loss": 0.5}),
        ("fold0", 40, {"lr": 0.1}),
        ("fold1", 20, {"loss": 0.6}),
        ("fold0", 40, {"lwlrap": 0.7}),
    ]


def test_a_tracker_that_fails_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(fold: str) -> tuple[Send, object]:
        raise ConnectionError("no answer")

    monkeypatch.setattr(tracker, "_opener", lambda *_: broken)
    with tracked("wandb", tmp_path):
        append(tmp_path / "fold0" / "log.jsonl", {"step": 20, "loss": 0.5})
    assert "the tracker failed and gets no more: ConnectionError: no answer" in caplog.text


def test_an_unknown_or_missing_tracker_is_reported_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(MelfoldError, match="unknown tracker: 'mlflow'. Use trackio, wandb, tensorboard"),
        tracked("mlflow", tmp_path),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MelfoldError, match=r"wandb is not installed. pip install 'melfold\[wandb\]'"), tracked("wandb", tmp_path):
        pass
    with tracked("", tmp_path):
        pass


def test_curves_are_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs melfold[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracked("tensorboard", tmp_path, {"seed": 0}):
        append(tmp_path / "fold0" / "log.jsonl", *({"step": s, "loss": 1 / s} for s in (20, 40)))
        time.sleep(0.1)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "fold0"))
    events.Reload()
    assert [(event.step, pytest.approx(1 / event.step)) for event in events.Scalars("loss")] == [(20, 0.05), (40, 0.025)]
