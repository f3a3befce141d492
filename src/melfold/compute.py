"""Where work runs: devices, worker processes, a cluster; and progress."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text) during work; the library draws nothing itself."""

ENGINES = ("joblib", "dask")
WAIT_SECONDS = 60


Tell = Callable[[int], None]
"""Called with how much was done since the call before."""


def silent(*told: object) -> None:
    """A `Progress` or a `Tell` that says nothing."""


def adding(progress: Progress, total: int, text: str) -> Tell:
    """A `Tell` that adds up what it is told and passes the sum to `progress`."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, text)

    return tell


@dataclass(frozen=True)
class Compute:
    """Where work runs. Made by the command line; devices are looked up where the work is done, not before.

    Args:
        devices: `auto`, `cpu`, `cuda` or `cuda:N`. Several train one fold each at the same time. On a cluster, the first one is
            the device of every worker.
        jobs: worker processes for log-mels; -1 is one per core.
        engine: `joblib` (this machine) or `dask` (the workers of `scheduler`).
        scheduler: address of the Dask scheduler.
        progress: called during the work.
    """

    devices: tuple[str, ...] = ("auto",)
    jobs: int = -1
    engine: str = "joblib"
    scheduler: str = ""
    progress: Progress = silent

    @contextmanager
    def connected(self, home: Path) -> Iterator[None]:
        """Run joblib's jobs on the cluster within this context; without a cluster, change nothing.

        Args:
            home: the home folder, which every worker must see under the same path.

        Raises:
            MelfoldError: an unknown engine, no Dask here, no scheduler at the address, workers without the folder or with other
                versions, or a job that killed one worker after another.
        """
        if self.engine not in ENGINES:
            raise MelfoldError("unknown engine", repr(self.engine), f"Use --engine {' or '.join(ENGINES)}")
        if (self.engine == "dask") != bool(self.scheduler):
            found = f"engine {self.engine}, scheduler {self.scheduler!r}"
            raise MelfoldError("--engine dask and --scheduler ADDRESS go together", found, "Give both or neither")
        if self.engine == "joblib":
            yield
            return
        try:
            from distributed import Client, KilledWorker
        except ImportError:
            raise MelfoldError("Dask is not installed", "", "pip install 'melfold[dask]'") from None
        from joblib import parallel_config

        try:
            client = Client(self.scheduler, timeout=WAIT_SECONDS / 4, set_as_default=False)
        except (OSError, ValueError) as error:
            raise MelfoldError("no Dask scheduler answers", f"{self.scheduler} ({error})", "Check --scheduler") from None
        with client:
            _check_workers(client, home)
            try:
                with parallel_config("dask", client=client):
                    yield
            except KilledWorker as error:
                fix = "Give the workers more memory; see their logs"
                raise MelfoldError("a job killed one worker after another", str(error), fix) from None


def _check_workers(client: Any, home: Path) -> None:
    try:
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
    except TimeoutError:
        raise MelfoldError("the Dask scheduler has no workers", f"after {WAIT_SECONDS} s", "Start `dask worker`") from None
    home.mkdir(parents=True, exist_ok=True)
    here = _about(str(home))
    for worker, there in client.run(_about, str(home), on_error="return").items():
        if isinstance(there, BaseException):
            raise MelfoldError(f"worker {worker} cannot import melfold", str(there), "Install the same version there")
        for key, value in there.items():
            if value != here[key]:
                raise MelfoldError(f"worker {worker} differs", f"{key}: {value}, here {here[key]}", "Make them the same")
    log.info("dask: %d workers", len(client.ncores()))


def _about(home: str) -> dict[str, str]:
    """What must be the same on every machine."""
    about = {name: importlib.metadata.version(name) for name in ("melfold", "torch", "timm", "numpy", "joblib")}
    return about | {f"home {home}": "present" if Path(home).is_dir() else "absent"}


def remote() -> bool:
    """Whether jobs currently go to the workers of a cluster."""
    from joblib.parallel import get_active_backend

    return type(get_active_backend()[0]).__name__ == "DaskDistributedBackend"


def end_with_parent() -> None:
    """Make this process end when its parent does: it gets SIGTERM, so that training saves its state first."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()
