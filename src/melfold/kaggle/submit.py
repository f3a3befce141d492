"""Submit once: a tag in every message, a ledger row before every call, and no second call while the first is in doubt."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.combine.submission import open_submission
from melfold.errors import MelfoldError
from melfold.files import Home, digest, locked
from melfold.kaggle.client import Kaggle, KaggleError, Submission, wait_until
from melfold.kaggle.ledger import SPENT, Ledger, Row, now
from melfold.learn.provenance import current_commit

log = logging.getLogger(__name__)

LOOKS = (0, 5, 20, 60)
"""Seconds before each look for a tag after a doubtful call: Kaggle may list a submission late."""


@dataclass(frozen=True)
class Kernel:
    """A pushed kernel version whose output is to be submitted."""

    slug: str
    version: int


def submit(client: Kaggle, home: Home, id: str, *, kernel: Kernel | None = None, again: bool = False) -> Row:
    """Submit `submissions/<id>/submission.csv`, or the output of a kernel version that gave it, once.

    An earlier call with an unknown result is looked up first. A submission that Kaggle has is not made again.

    Args:
        kernel: the code form; without, the file form.
        again: submit even if Kaggle has, or may have, this one.

    Returns:
        The ledger's row.

    Raises:
        MelfoldError: no such submission, one whose outcome is unknown, no submissions left today, a kernel version that is
            not complete, or a refusal.
    """
    ledger = Ledger.of(home)
    manifest = open_submission(home, id)

    def busy() -> None:
        log.warning("waiting for another melfold that submits from %s", home.submissions)

    with locked(home.submissions / ".submit.lock", busy):
        rows = [
            settle(client, ledger, row.tag, row.note or "left pending") if row.status in ("pending", "unknown") else row
            for row in ledger.of_id(id)
        ]
        if not again:
            for row in reversed(rows):
                if row.status in SPENT:
                    log.info("%s is at Kaggle already: %s, %s", id, row.ref or row.tag, row.status)
                    return row
            for row in rows:
                if row.status == "unknown":
                    raise _unknown(row)
        if client.remaining() < 1:
            raise MelfoldError("no submissions left today", client.competition, "The count restarts at 00:00 UTC")
        if kernel:
            status, message = client.kernel_status(kernel.slug)
            if status != "COMPLETE":
                raise MelfoldError(f"kernel {kernel.slug} is not complete", f"{status} {message}".strip(), "Wait for it")
        row = Row(
            tag=secrets.token_hex(6),
            id=id,
            time=now(),
            commit=current_commit(exclude="submissions"),
            kernel=kernel.slug if kernel else "",
            version=str(kernel.version) if kernel else "",
            **_provenance(manifest),
        )
        ledger.add(row)
        return _call(client, ledger, row, home.submissions / id / "submission.csv", kernel)


def _call(client: Kaggle, ledger: Ledger, row: Row, path: Path, kernel: Kernel | None) -> Row:
    message = f"{row.id} oof={float(row.oof_lwlrap or 'nan'):.4f} melfold:{row.tag}"
    try:
        if kernel:
            client.submit_kernel(kernel.slug, kernel.version, "submission.csv", message)
        else:
            client.submit_file(path, message)
    except KaggleError as error:
        if error.outcome == "refused" and not _look(client, row.tag, (0,)):
            ledger.update(row.tag, status="refused", note=error.lines[0])
            raise
        log.warning("%s; looking for the submission", error)
        row = settle(client, ledger, row.tag, error.lines[0])
    else:
        row = settle(client, ledger, row.tag, "Kaggle accepted it, but does not list it")
    if row.status == "unknown":
        raise _unknown(row)
    return row


def settle(client: Kaggle, ledger: Ledger, tag: str, why: str) -> Row:
    """Look a tag up several times, and record what was found, or `unknown` with a reason."""
    found = _look(client, tag, LOOKS)
    return ledger.settle(tag, found) if found else ledger.update(tag, status="unknown", note=why)


def _look(client: Kaggle, tag: str, pauses: tuple[float, ...]) -> Submission | None:
    for pause in pauses:
        client.wait(pause)
        try:
            if found := client.find(tag):
                return found
        except KaggleError as error:
            log.warning("%s", error)
    return None


def _unknown(row: Row) -> MelfoldError:
    return MelfoldError(
        f"whether Kaggle took submission {row.id} is unknown",
        f"{row.note}; its message ends in melfold:{row.tag}",
        "Look at your submissions on kaggle.com; `melfold ledger sync` looks again; --again submits it once more",
    )


def wait_for_score(client: Kaggle, home: Home, tag: str, *, minutes: float = 240) -> Row:
    """Wait until Kaggle has scored a submission, or cannot.

    Raises:
        MelfoldError: Kaggle's error, or no score in time.
    """
    ledger = Ledger.of(home)
    seen: list[Submission] = []

    def look() -> bool:
        if found := client.find(tag):
            seen.append(found)
            return found.status != "PENDING"
        return False

    def tell() -> None:
        log.info("waiting for the score of %s", tag)

    done = wait_until(client, look, minutes=minutes, tell=tell)
    if seen:
        row = ledger.settle(tag, seen[-1])
        if row.status == "error":
            raise MelfoldError(f"Kaggle could not score {row.id}", f"submission {row.ref}", "Its page on kaggle.com says why")
        if done:
            return row
    raise MelfoldError("no score yet", f"after {minutes:.0f} minutes", "`melfold ledger sync` looks again")


def sync(client: Kaggle, home: Home) -> list[str]:
    """Bring the ledger up to date with Kaggle. Returns: what changed, and what Kaggle has that the ledger lacks, a line each."""
    ledger = Ledger.of(home)
    lines = []
    with locked(home.submissions / ".submit.lock"):
        listed = client.submissions()
        rows = ledger.rows()
        for row in rows:
            found = next((s for s in listed if f"melfold:{row.tag}" in s.description), None)
            if found and row.status != "complete":
                after = ledger.settle(row.tag, found)
                if after != row:
                    lines.append(f"{row.id} ({row.tag}): {row.status} -> {after.status} {after.public_score}".rstrip())
            elif not found and row.status == "pending":
                ledger.update(row.tag, status="unknown", note="left pending, and not at Kaggle")
                lines.append(f"{row.id} ({row.tag}): pending -> unknown")
        known = {row.tag for row in rows}
        foreign = [s for s in listed if not any(f"melfold:{tag}" in s.description for tag in known)]
        lines += [f"not in the ledger: {s.ref} {s.date} {s.description!r} {s.public_score}" for s in foreign]
    return lines


def _provenance(manifest: dict[str, Any]) -> dict[str, str]:
    runs = manifest["runs"]
    oof = manifest["oof_lwlrap"]
    return {
        "runs": "+".join(run["name"] for run in runs),
        "weights": digest([run["weights_sha256"] for run in runs])[:16],
        "recipes": digest([run["recipe"] for run in runs])[:16],
        "folds": "+".join(sorted({run["folds_sha256"][:16] for run in runs})),
        "track": manifest["track"],
        "oof_lwlrap": "" if oof is None else f"{oof:.6f}",
    }
