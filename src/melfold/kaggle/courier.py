"""A call of the kaggle command that outlives melfold: whoever stops melfold, the call ends, and a record says how.

melfold starts it as `python -m melfold.kaggle.courier RECORD SECONDS ARGUMENT...`. A lock that melfold holds through an
inheritable file stays held until the courier has ended.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from melfold.files import read_json, write_json
from melfold.kaggle.command import Said, call, executable


def prepare(record: Path, about: dict[str, Any]) -> None:
    """Write a record before its call is announced anywhere else, so that a call without a record is one from elsewhere."""
    executable()  # says so now if it is missing
    write_json(record, {"about": about, "state": "prepared"})


def send(args: Sequence[str], timeout: float, record: Path) -> Said:
    """Run the kaggle command in a courier. Returns: what it left behind, which is in `record` too."""
    command = [sys.executable, "-m", "melfold.kaggle.courier", str(record), str(timeout), *args]
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen(command, **silent, start_new_session=True, close_fds=False).wait()
    return read_record(record)


def read_record(record: Path) -> Said:
    """What a courier left behind, once it has ended. If it was killed, or is from elsewhere, nothing is known."""
    content = read_json(record) if record.exists() else {"state": "lost"}
    if content["state"] == "ended":
        return Said(**content["said"])
    if content["state"] == "prepared":
        return Said(1, "melfold was stopped before the call", asked=[])
    return Said(None, "the call was killed")


def main(path: str, seconds: str, *args: str) -> None:
    """Make the call and record it."""
    record = Path(path)
    content = read_json(record)
    write_json(record, content | {"state": "started"})  # on the disk before anything is sent
    write_json(record, content | {"state": "ended", "said": asdict(call(args, float(seconds)))})


if __name__ == "__main__":
    main(*sys.argv[1:])
