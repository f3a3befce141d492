"""The one error a user sees."""

from __future__ import annotations

import pickle

import pytest

from melfold.errors import MelfoldError


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (("no cache", "/x", "Run it"), "no cache: /x. Run it"),
        (("no cache", "/x"), "no cache: /x"),
        (("no cache", "", "Run it"), "no cache. Run it"),
        (("no cache",), "no cache"),
    ],
)
def test_an_error_is_one_line_of_what_found_and_fix(parts: tuple[str, ...], line: str) -> None:
    assert str(MelfoldError(*parts)) == line


def test_a_merged_error_lists_every_line_also_of_merged_ones() -> None:
    inner = MelfoldError.many([MelfoldError("a", "1"), MelfoldError("b", "2", "Fix it")])
    outer = MelfoldError.many([inner, MelfoldError("c")])
    assert outer.lines == ("a: 1", "b: 2. Fix it", "c")
    assert str(outer).splitlines() == list(outer.lines)


def test_errors_come_back_whole_from_a_worker_process() -> None:
    merged = MelfoldError.many([MelfoldError("a", "1"), MelfoldError("b", "2", "Fix it")])
    for error in (merged, MelfoldError("what", "found", "Fix")):
        back = pickle.loads(pickle.dumps(error))
        assert isinstance(back, MelfoldError)
        assert back.lines == error.lines
