"""Bring the ledger and Kaggle's list together: calls without a known result, submissions made elsewhere, scores."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from melfold.combine.rebuild import label_of
from melfold.errors import MelfoldError
from melfold.files import Home, digest, locked, read_json
from melfold.kaggle.client import Kaggle, Submission, looks
from melfold.kaggle.command import KaggleError, Said, failure, status_of
from melfold.kaggle.courier import read_record
from melfold.kaggle.ledger import SPENT, Ledger, Row

log = logging.getLogger(__name__)

LOOKS = (0, 5, 20, 60)  # seconds before each look for a tag after a doubtful call: Kaggle may list a submission late


def alone(home: Home) -> AbstractContextManager[IO[str]]:
    """Only one process at a time submits from a home, or brings its ledger up to date."""
    told = f"waiting for another melfold that submits from {home.submissions}"
    return locked(home.submissions / ".submit.lock", lambda: log.warning(told))


def find_row(client: Kaggle, home: Home, manifest: dict[str, Any], *, again: bool = False) -> Row | None:
    """The row of a submission that Kaggle has, even if the ledger did not know it; None if it can be submitted. Call it `alone`.

    Args:
        again: earlier calls are looked up too, but stop nothing.

    Raises:
        MelfoldError: one whose outcome is unknown.
    """
    ledger, id = Ledger.of(home), manifest["id"]
    _restore(home)
    listed = client.submissions()
    rows = [_review(client, home, row, listed) for row in ledger.rows() if row.id == id and row.competition == client.competition]
    if again:
        return None
    for row in reversed(rows):
        if row.status in SPENT:
            log.info("%s is at Kaggle already: %s, %s", id, row.ref or row.tag, row.status)
            return row
    if adopted := _adopt(client, home, manifest, listed):
        return adopted
    for row in rows:
        if row.status == "unknown":
            raise unknown_outcome(row)
    return None


def file_mark(manifest: dict[str, Any]) -> str:
    """What a message to Kaggle says of the file: the same file has the same mark in every clone."""
    return f"sha256:{manifest['files']['submission.csv'][:16]}"


def record_of(home: Home, tag: str) -> Path:
    """Where a call to Kaggle leaves its result, also if melfold is killed meanwhile."""
    return home.submissions / f".call-{tag}.json"


def _restore(home: Home) -> None:
    """Give each call that was not settled its row again, if the ledger has lost it."""
    ledger = Ledger.of(home)
    known = {row.tag for row in ledger.rows()}
    for record in sorted(home.submissions.glob(".call-*.json")):
        row = Row(**read_json(record)["about"])
        if row.tag not in known:
            ledger.add(row)


def _review(client: Kaggle, home: Home, row: Row, listed: Sequence[Submission]) -> Row:
    """A row with what Kaggle's list says; one whose call has left no result is looked for several times."""
    if found := _tagged(listed, row.tag):
        return _settle(client, home, row, found)
    if row.status == "pending":
        return conclude(client, home, row, read_record(record_of(home, row.tag)))
    if row.status == "unknown" and (found := _look(client, row.tag)):
        return _settle(client, home, row, found)
    return row


def conclude(client: Kaggle, home: Home, row: Row, said: Said) -> Row:
    """Record how a call ended. Kaggle's list decides; where it has nothing, the reply does.

    The call's own record stays until Kaggle lists the submission, since it may do so late, and the ledger may be lost by then.
    """
    ledger = Ledger.of(home)
    if said.code == 0 and re.search("success", said.text, re.I):
        ref = str((said.reply or {}).get("ref") or "")
        if found := _look(client, row.tag, LOOKS[:1] if ref else LOOKS):
            return _settle(client, home, row, found)
        note = "" if ref else "Kaggle accepted it, but does not list it"
        return ledger.update(row.tag, status="submitted" if ref else "unknown", ref=ref, note=note)
    reason = failure("kaggle competitions submit", said, client.timeout).lines[0]
    if not said.may_have("Create(Code)?Submission"):
        record_of(home, row.tag).unlink(missing_ok=True)
        return ledger.update(row.tag, status="refused", note=f"not sent: {reason}")
    log.warning("%s; looking for the submission", reason)
    if found := _look(client, row.tag):
        return _settle(client, home, row, found)
    status = "refused" if 400 <= status_of(said) < 500 else "unknown"
    return ledger.update(row.tag, status=status, note=reason)


def _settle(client: Kaggle, home: Home, row: Row, found: Submission) -> Row:
    """Record what Kaggle says about a submission, and nothing that was written before it was known."""
    said = {
        "ref": found.ref,
        "status": {"COMPLETE": "complete", "ERROR": "error"}.get(found.status, "submitted"),
        "public_score": "" if found.public_score is None else f"{found.public_score:.5f}",
        "private_score": "" if found.private_score is None else f"{found.private_score:.5f}",
    }
    if not said.items() <= vars(row).items():
        row = Ledger.of(home).update(row.tag, **said, note=client.why_failed(found.ref) if found.status == "ERROR" else "")
    record_of(home, row.tag).unlink(missing_ok=True)
    return row


def _tagged(listed: Sequence[Submission], tag: str) -> Submission | None:
    return next((s for s in listed if f"melfold:{tag}" in s.description), None)


def _look(client: Kaggle, tag: str, pauses: Sequence[float] = LOOKS) -> Submission | None:
    for pause in pauses:
        client.wait(pause)
        try:
            if found := _tagged(client.submissions(), tag):
                return found
        except KaggleError as error:
            log.warning("%s", error)
    return None


def _adopt(client: Kaggle, home: Home, manifest: dict[str, Any], listed: Sequence[Submission]) -> Row | None:
    """A row for the same submission, made from another clone or before the ledger was lost.

    It is known by its file, or by the id in an old message.
    """
    known = {row.tag for row in Ledger.of(home).rows()}
    for theirs in listed:
        text = theirs.description
        tag = re.search(r"melfold:(\w+)", text)
        same = file_mark(manifest) in text or ("sha256:" not in text and text.startswith(f"{manifest['id']} oof="))
        if not tag or tag[1] in known or not same:
            continue
        log.warning("%s is at Kaggle already, from another ledger: %s", manifest["id"], theirs.ref)
        time = f"{theirs.date[:19].replace(' ', 'T')}Z"
        account = {"account": client.username(), "competition": client.competition}
        row = Row(tag=tag[1], id=manifest["id"], time=time, commit="", **account, **provenance_of(manifest))
        Ledger.of(home).add(row)
        return _settle(client, home, row, theirs)
    return None


def unknown_outcome(row: Row) -> MelfoldError:
    """The error for a submission of which Kaggle may or may not know."""
    return MelfoldError(
        f"whether Kaggle took submission {row.id} is unknown",
        f"{row.note}; its message ends in melfold:{row.tag}",
        "Look at your submissions on kaggle.com; `melfold ledger sync` looks again; --again submits it once more",
    )


def wait_for_score(client: Kaggle, home: Home, row: Row, *, minutes: float = 240) -> Row:
    """Wait until Kaggle has scored a submission, or cannot.

    Raises:
        MelfoldError: Kaggle could not score it, with its words; or no score in time.
    """
    if row.status == "submitted":
        for _ in looks(client, minutes=minutes):
            found = _tagged(client.submissions(), row.tag)
            if found and found.status != "PENDING":
                break
            log.info("waiting for the score of %s", row.id)
        if found:
            row = _settle(client, home, row, found)
    if row.status == "error":
        reason = f"submission {row.ref}" + (f": {row.note}" if row.note else "")
        raise MelfoldError(f"Kaggle could not score {row.id}", reason, "" if row.note else "Its page on kaggle.com says why")
    if row.status == "submitted":
        raise MelfoldError("no score yet", f"after {minutes:.0f} minutes", "`melfold ledger sync` looks again")
    return row


def sync(client: Kaggle, home: Home) -> list[str]:
    """Bring the ledger up to date with Kaggle, for one competition. Scores may change, so scored rows are looked at too.

    Returns: what changed, what is still unknown, and what Kaggle has that the ledger lacks, a line each.
    """
    ledger, lines = Ledger.of(home), []
    with alone(home):
        _restore(home)
        listed = client.submissions()
        rows = ledger.rows()
        for row in rows:
            if row.competition != client.competition:
                continue
            after = _review(client, home, row, listed)
            if after != row:
                halves = {"Public": after.public, "Private": after.private}
                scores = ", ".join(f"{half} {score:.5f}" for half, score in halves.items() if score is not None)
                lines.append(f"{row.id} ({row.tag}): {row.status} -> {after.status} {scores}".rstrip())
            elif row.status == "unknown":
                lines.append(f"{row.id} ({row.tag}): still unknown, Kaggle does not list it: {row.note}")
        foreign = [s for s in listed if not any(f"melfold:{row.tag}" in s.description for row in rows)]
        lines += [f"not in the ledger: {s.ref} {s.date} {s.description!r} {s.public_score}" for s in foreign]
    return lines


def provenance_of(manifest: dict[str, Any]) -> dict[str, str]:
    """The columns of a ledger's row that say what a submission was made from."""
    runs = manifest["runs"]
    oof = manifest["oof_lwlrap"]
    return {
        "runs": "+".join(map(label_of, runs)),
        "weights": digest([run["weights_sha256"] for run in runs])[:16],
        "recipes": digest([run["recipe"] for run in runs])[:16],
        "folds": "+".join(sorted({run["folds_sha256"][:16] for run in runs})),
        "track": manifest["track"],
        "oof_lwlrap": "" if oof is None else f"{oof:.6f}",
    }
