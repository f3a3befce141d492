"""Where independent jobs run: on this machine, or on the workers of a Dask scheduler that share the home folder."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from melfold.errors import MelfoldError

log = logging.getLogger(__name__)

ENGINES = ("joblib", "dask")
WAIT_SECONDS = 60

T = TypeVar("T")


@contextmanager
def engine(name: str, scheduler: str, folder: Path) -> Iterator[None]:
    """Let joblib's jobs, and those of `spread`, run on a Dask cluster within this context; `joblib` leaves all as it is.

    Args:
        name: `joblib` or `dask`.
        scheduler: the Dask scheduler's address.
        folder: the home, which every worker must see under the same path.

    Raises:
        MelfoldError: an unknown engine, no Dask here, nobody at the address, workers that lack the folder or have other
            versions, or a job that brought down worker after worker.
    """
    if name not in ENGINES:
        raise MelfoldError("unknown engine", repr(name), f"Use --engine {' or '.join(ENGINES)}")
    if (name == "dask") != bool(scheduler):
        raise MelfoldError("--engine dask and --scheduler ADDRESS go together", f"engine {name}, scheduler {scheduler!r}")
    if name == "joblib":
        yield
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise MelfoldError("Dask is not installed", "", "pip install 'melfold[dask]'") from None
    from joblib import parallel_config

    try:
        client = Client(scheduler, timeout=WAIT_SECONDS / 4, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MelfoldError("no Dask scheduler answers", f"{scheduler} ({error})", "Mend --scheduler") from None
    with client:
        _check_workers(client, folder)
        try:
            with parallel_config("dask", client=client):
                yield
        except KilledWorker as error:
            raise MelfoldError(
                "a job brought down one worker after another", str(error), "Give the workers more memory; look at their logs"
            ) from None


def _check_workers(client: Any, folder: Path) -> None:
    try:
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
    except TimeoutError:
        raise MelfoldError("the Dask scheduler has no workers", f"after {WAIT_SECONDS} s", "Start `dask worker`") from None
    folder.mkdir(parents=True, exist_ok=True)
    here = _about(str(folder))
    for worker, there in client.run(_about, str(folder), on_error="return").items():
        if isinstance(there, BaseException):
            raise MelfoldError(f"worker {worker} cannot import melfold", str(there), "Install it there, the same version")
        for key, value in there.items():
            if value != here[key]:
                raise MelfoldError(f"worker {worker} differs", f"{key}: {value}, here {here[key]}", "Make it the same")
    log.info("dask: %d workers", len(client.ncores()))


def _about(folder: str) -> dict[str, str]:
    """What must be the same everywhere."""
    about = {name: importlib.metadata.version(name) for name in ("melfold", "torch", "timm", "numpy", "joblib")}
    return about | {f"home {folder}": "present" if Path(folder).is_dir() else "absent"}


def remote() -> bool:
    """Whether jobs go to other machines at present."""
    from joblib.parallel import get_active_backend

    return type(get_active_backend()[0]).__name__ == "DaskDistributedBackend"


def spread(function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """A function's results for some tuples of arguments, in any order: on the workers, or one after the other here.

    A job whose worker is lost is begun again on another one, so it must go on from what it left behind. Arguments must be small:
    they go through the scheduler.
    """
    if not remote():
        for arguments in jobs:
            yield function(*arguments)
        return
    from joblib import Parallel, delayed

    yield from Parallel(return_as="generator_unordered", batch_size=1)(delayed(function)(*arguments) for arguments in jobs)
