"""The one error a user sees."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable


class MelfoldError(Exception):
    """Something the user can fix, told in one line: what is wrong (without a full stop), what was found, how to fix it."""

    def __init__(self, what: str, found: str = "", fix: str = "") -> None:
        super().__init__(what, found, fix)
        line = f"{what}: {found}" if found else what
        self.lines: tuple[str, ...] = (f"{line.rstrip('.')}. {fix}" if fix else line,)

    @classmethod
    def many(cls, errors: Iterable[MelfoldError]) -> MelfoldError:
        """One error that lists the lines of several."""
        lines = tuple(line for error in errors for line in error.lines)
        merged = cls(lines[0])
        merged.lines = lines
        return merged

    def __str__(self) -> str:
        return "\n".join(self.lines)


def system_error(error: OSError) -> str:
    """What the system refused, and for which file, in one line."""
    name = re.sub(r"/\.([^/]+)\.\d+\.tmp$", r"/\1", str(error.filename or ""))  # what it would have been named
    where = f": {name}" if name else ""
    full = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{error.strerror or error}{where}" + (". Free some space, or use another folder" if full else "")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut to what fits in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
