"""Training curves while it runs, in the trackers that people already use: trackio, wandb, TensorBoard.

The tracker reads the folds' log files while they grow. So training does not know of it and is not slowed by it, and folds in
other processes, or on other machines that share the home folder, are followed in the same way.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError
from melfold.files import read_json_lines

log = logging.getLogger(__name__)

TRACKERS = ("trackio", "wandb", "tensorboard")

POLL_SECONDS = 2.0

Send = Callable[[int, dict[str, float]], None]
"""Takes a step and its named numbers."""

Opened = tuple[Send, Callable[[], None]]
"""How to send, and how to close."""


@contextmanager
def tracked(kind: str, folder: Path, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Mirror the logs of a run's folds to a tracker within this context, each fold under a name of its own.

    A tracker that fails later is reported once, and training continues without it.

    Args:
        kind: one of `TRACKERS`; empty for none.
        folder: of the run; it need not exist yet. TensorBoard's files go to its `tensorboard` folder.
        settings: shown beside the curves.

    Raises:
        MelfoldError: an unknown tracker, or one that is not installed.
    """
    if not kind:
        yield
        return
    mirror = Mirror(folder, _opener(kind, folder, dict(settings or {})))
    stop = threading.Event()
    thread = threading.Thread(target=mirror.follow, args=(stop,), daemon=True, name="tracker")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Mirror:
    """Sends each row of each fold's log once."""

    def __init__(self, folder: Path, opener: Callable[[str], Opened]) -> None:
        self.folder, self._opener = folder, opener
        self._opened: dict[str, Opened] = {}
        self._sent: set[tuple[str, int, tuple[str, ...]]] = set()

    def follow(self, stop: threading.Event) -> None:
        """Send what is new until told to stop, then the rest, and close."""
        try:
            while not stop.wait(POLL_SECONDS):
                self.send_new()
            self.send_new()
            for _, close in self._opened.values():
                close()
        except Exception as error:
            log.warning("the tracker failed and gets no more: %s: %s", type(error).__name__, error)

    def send_new(self) -> None:
        """Send the rows that were not sent yet. A log that was cut back to a checkpoint repeats some: they are left out."""
        for path in sorted(self.folder.glob("*/log.jsonl")):
            fold = path.parent.name
            for row in read_json_lines(path):
                step, values = row.pop("step"), {key: value for key, value in row.items() if value is not None}
                if (key := (fold, step, tuple(values))) not in self._sent:
                    if fold not in self._opened:
                        self._opened[fold] = self._opener(fold)
                    self._opened[fold][0](step, values)
                    self._sent.add(key)


def _opener(kind: str, folder: Path, settings: dict[str, Any]) -> Callable[[str], Opened]:
    """What opens the tracker for a fold. The library is imported here, so that a missing one is told before training."""
    if kind not in TRACKERS:
        raise MelfoldError("unknown tracker", repr(kind), f"Use {', '.join(TRACKERS)}")
    try:
        return _tensorboard(folder, settings) if kind == "tensorboard" else _logged(kind, folder, settings)
    except ImportError:
        raise MelfoldError(f"{kind} is not installed", "", f"pip install 'melfold[{kind}]'") from None


def _tensorboard(folder: Path, settings: dict[str, Any]) -> Callable[[str], Opened]:
    from torch.utils.tensorboard import SummaryWriter

    def opener(fold: str) -> Opened:
        writer = SummaryWriter(str(folder / "tensorboard" / fold))
        writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```")

        def send(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return send, writer.close

    return opener


def _logged(kind: str, folder: Path, settings: dict[str, Any]) -> Callable[[str], Opened]:
    library = importlib.import_module(kind)  # trackio has the functions of wandb
    more = {"reinit": "create_new"} if kind == "wandb" else {}

    def opener(fold: str) -> Opened:
        run = library.init(project="melfold", group=folder.name, name=f"{folder.name}-{fold}", config=settings, **more)
        return lambda step, values: run.log(values, step=step), run.finish

    return opener
