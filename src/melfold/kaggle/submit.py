"""Submit once: a tag in every message, a ledger row before every call, and no second call while the first is in doubt."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from melfold.combine.submission import open_submission
from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import Home
from melfold.kaggle.built import Kernel
from melfold.kaggle.client import Kaggle
from melfold.kaggle.command import failure
from melfold.kaggle.courier import prepare
from melfold.kaggle.ledger import Ledger, Row
from melfold.kaggle.reconcile import alone, conclude, file_mark, find_row, provenance_of, record_of, unknown_outcome
from melfold.learn.provenance import current_commit

log = logging.getLogger(__name__)


def competition_for(manifest: dict[str, Any], asked: str | None) -> str:
    """The slug of the competition that a submission is for: that of its data, or the one that is asked for.

    Raises:
        MelfoldError: they differ, or neither is known.
    """
    own, name = facts_of(manifest["competition"]).slug, manifest["competition"]
    if own and asked in (None, own):
        return own
    if own or facts_of(asked or "").name:
        fix = "Leave out --competition" if own else "Name the competition that has this data"
        raise MelfoldError(f"submission {manifest['id']} is for another competition", f"{own or name}, not {asked}", fix)
    if not asked:
        raise MelfoldError(f"no Kaggle competition is known for submission {manifest['id']}", name, "Name it: --competition SLUG")
    return asked


def check_file_form(id: str, competition: str) -> None:
    """Raise a `MelfoldError` if a competition takes no files."""
    if facts_of(competition).code_only:
        fix = f"Run `melfold ship {id}`, or `melfold ship {id} --copy` to submit this very file by a small kernel"
        raise MelfoldError(f"{competition} takes no files, only kernels", "nothing was submitted", fix)


def submit(client: Kaggle, home: Home, id: str, *, kernel: Kernel | None = None, again: bool = False) -> Row:
    """Submit `submissions/<id>/submission.csv`, or the output of a kernel version that gave it, once.

    An earlier call with an unknown result is looked up first. A submission that Kaggle has is not made again, even if the ledger
    does not know it.

    Args:
        kernel: the code form; without, the file form.
        again: submit even if Kaggle has, or may have, this one.

    Raises:
        MelfoldError: no such submission, one for another competition, one whose outcome is unknown, no submissions left today,
            a kernel version that is not complete, or a refusal.
    """
    ledger, manifest = Ledger.of(home), open_submission(home, id)
    competition_for(manifest, client.competition)
    if not kernel:
        check_file_form(id, client.competition)
    with alone(home) as lock:
        os.set_inheritable(lock.fileno(), True)  # a call that outlives this process keeps the lock
        if row := find_row(client, home, manifest, again=again):
            return row
        left = client.remaining()
        if left < 1:
            raise MelfoldError("no submissions left today", client.competition, "The count restarts at 00:00 UTC")
        log.info("%d submissions are left today, this one included", left)
        if kernel:
            status, message = client.kernel_status(kernel.slug, kernel.version)
            if status != "COMPLETE":
                what = f"kernel {kernel.slug} version {kernel.version} is not complete"
                fix = "Wait for it; kaggle 2.2.4 sees only the latest version, 2.2.5 this one"
                raise MelfoldError(what, f"{status} {message}".strip(), fix)
        row = Row(
            tag=secrets.token_hex(6),
            id=id,
            time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=current_commit(exclude="submissions"),
            kernel=kernel.slug if kernel else "",
            version=str(kernel.version) if kernel else "",
            account=kernel.slug.split("/")[0] if kernel else client.username(),
            competition=client.competition,
            **provenance_of(manifest),
        )
        prepare(record_of(home, row.tag), asdict(row))
        ledger.add(row)
        return _send(client, home, row, manifest, kernel)


def _send(client: Kaggle, home: Home, row: Row, manifest: dict[str, Any], kernel: Kernel | None) -> Row:
    message = f"{row.id} oof={row.oof or float('nan'):.5f} {file_mark(manifest)} melfold:{row.tag}"
    record = record_of(home, row.tag)
    if kernel:
        said = client.submit_kernel(kernel.slug, kernel.version, message, record)
    else:
        said = client.submit_file(home.submissions / row.id / "submission.csv", message, record)
    row = conclude(client, home, row, said)
    if row.status == "unknown":
        raise unknown_outcome(row)
    if row.status == "refused":
        raise failure("kaggle competitions submit", said, client.timeout)
    return row
