"""What a training tells: its log file, its progress, and the alarm when a number is no longer finite."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from melfold.compute import Progress
from melfold.errors import MelfoldError
from melfold.files import write_text
from melfold.learn.batches import Batch
from melfold.learn.fold_data import FoldData
from melfold.learn.phases import epochs_at, phase_at
from melfold.learn.state import TrainState

LOG_STEPS = 20
"""Steps between looks at the loss: on a GPU each look waits for all the work before it."""


class TrainLog:
    """Watches one fold's training.

    Args:
        path: `log.jsonl`, one row every `LOG_STEPS` steps.
        title: names the fold in messages.
        folds_left: how many more folds follow on this device, for the time left.
    """

    def __init__(self, path: Path, state: TrainState, data: FoldData, progress: Progress, title: str, folds_left: int) -> None:
        self.path, self.state, self.data, self.progress = path, state, data, progress
        self.title, self.folds_left = title, folds_left
        self.lwlrap: float | None = None
        self._pending: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []
        self._first_step, self._started = state.step, time.monotonic()
        self._seconds_before = state.seconds
        # Rows that a killed process wrote after its last checkpoint will be written again.
        write_text(path, "".join(json.dumps(row) + "\n" for row in state.rows))

    def add(self, batch: Batch, loss: torch.Tensor, norm: torch.Tensor, *, look: bool = False) -> bool:
        """Take note of a step. Every `LOG_STEPS` steps, at the end, on a CPU and if asked to `look`, read the losses since the
        last look, check them, and tell them; else this does not wait for the device.

        Returns:
            Whether all losses so far are checked.

        Raises:
            MelfoldError: a loss or gradient that is not finite; the batch's clips are named.
        """
        state = self.state
        self._pending.append((batch, loss.detach(), norm))
        due = state.step % LOG_STEPS == 0 or state.step == self.data.steps
        if not (due or look or state.device.torch.type == "cpu"):
            return False
        losses = torch.stack([loss for _, loss, _ in self._pending]).float().cpu().numpy()
        norms = torch.stack([norm for _, _, norm in self._pending]).float().cpu().numpy()
        self._check_finite("loss", losses)
        if not state.scaler.is_enabled():  # with fp16, the scaler skips such a step
            self._check_finite("gradient", norms)
        state.seconds = self._seconds_before + time.monotonic() - self._started
        if due:
            self.write(loss=float(losses[-1]), grad_norm=float(norms[-1]), lr=state.lr)
        self._pending = []
        self.progress(state.step, self.data.steps, f"{self.title}: {self._rate(float(losses[-1]))}")
        return True

    def _rate(self, loss: float) -> str:
        config, done = self.state.config, self.state.step - self._first_step
        seconds_per_step = (time.monotonic() - self._started) / max(1, done)
        phases = self.data.phases
        number = phase_at(phases, self.state.step - 1)
        text = f"phase {number}, {number + 1} of {len(phases)}, " if len(phases) > 1 else ""
        text += f"loss {loss:.4f}, {config.batch_size / seconds_per_step:.0f} crops/s"
        if self.lwlrap is not None:
            text += f", lwlrap {self.lwlrap:.5f}"
        if self.folds_left:
            left = self.data.steps - self.state.step + self.folds_left * self.data.steps
            text += f", {duration(left * seconds_per_step)} for all folds"
        return text

    def _check_finite(self, what: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            first = int(np.argmin(np.isfinite(values)))
            names = " ".join(self.data.train.fnames[row] for row in self._pending[first][0].rows)
            problem = f"the {what} is not finite at step {self.state.step - len(values) + first}"
            fix = "Lower train.lr, or look at these clips with `melfold show`"
            raise MelfoldError(problem, f"{values[first]} in the batch of {names}", fix)

    def write(self, **values: float) -> None:
        """Append a row to the log; values that are not finite become null."""
        phases, step = self.data.phases, self.state.step
        row = {"step": step, "phase": phase_at(phases, step - 1), "epoch": round(epochs_at(phases, step), 3)}
        row |= {"seconds": round(self.state.seconds, 1), **values}
        self.state.rows.append({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()})
        with self.path.open("a") as file:
            file.write(json.dumps(self.state.rows[-1]) + "\n")


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
