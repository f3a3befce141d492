"""The one error a user sees."""

from __future__ import annotations

from collections.abc import Iterable


class MelfoldError(Exception):
    """Something the user can fix, told in one line: what is wrong, what was found, how to fix it.

    Args:
        what: what is wrong, without a final full stop.
        found: what was found instead.
        fix: how to fix it.
    """

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

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle through their arguments; `lines` of a merged error would be lost on the way back from a worker.
        return _rebuild, (self.lines,)


def _rebuild(lines: tuple[str, ...]) -> MelfoldError:
    error = MelfoldError(lines[0])
    error.lines = lines
    return error


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut to what fits in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
