"""What the server does wrong on demand."""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = "delay hang hang_after drop_before drop_after late cut refuse_upload reply_error error_body"


@dataclass
class Fault:
    """What the server does wrong, the next `times` times that `rpc` is called, after `after` calls that go well.

    Kinds: `delay` (`seconds`, then as usual); `hang` (no reply until `seconds` pass or the server stops, nothing done);
    `hang_after` (done, then no reply); `drop_before`, `drop_after` (connection closed, before or after it is done); `late`
    (connection closed at once, done after `seconds`); `cut` (half of the reply); a status as `500_before` (or `429`, `403`;
    nothing done) or `500_after` (done all the same); `error_body` (400, nothing done); `refuse_upload` (403 to the PUT);
    `reply_error` (200 with `error` set, nothing done).

    Args:
        rpc: its name, `PUT`, `GET` or `*`.
        seconds: for `delay` and `late` (1 if not given) and `hang*` (for ever); for `429` the `Retry-After`.
        message: of an error.
    """

    rpc: str
    kind: str
    after: int = 0
    times: int = 1
    seconds: float | None = None
    message: str = "Something went wrong"

    def __post_init__(self) -> None:
        if self.kind not in KINDS.split() and not re.fullmatch(r"[45]\d\d(_before|_after)?", self.kind):
            raise ValueError(f"unknown fault {self.kind!r}: {KINDS}, or 429, 500_before, 500_after and the like")
