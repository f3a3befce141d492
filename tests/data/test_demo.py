"""The synthetic competition: the same bytes for the same seed, however often its writing was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from melfold.data import demo
from melfold.errors import MelfoldError
from melfold.files import sha256_file


def hashes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_file(path) for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of a demo that nothing stopped."""
    return hashes(demo.write_demo(tmp_path_factory.mktemp("demo") / "whole"))


@pytest.mark.parametrize("after", [0, 1, 200])
def test_stopped_at_any_clip_it_is_written_again_to_the_same_bytes(
    after: int, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = demo._write_wav, [after]

    def stopped(path: Path, samples: np.ndarray) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_wav", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.write_demo(tmp_path / "stopped")
    assert hashes(demo.write_demo(tmp_path / "stopped")) == whole


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(MelfoldError, match=r"the folder for the demo holds something else: .*\. Choose another --home"):
        demo.write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
