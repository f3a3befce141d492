"""The script of a kernel: `kernels/kernel.py`, the package and what to do, in one file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError
from melfold.files import digest

MAX_BYTES = 1_000_000  # Kaggle refuses a larger script, without naming the reason

LEFT_OUT = {
    *("__main__.py", "cli", "stages.py", "dry_run.py", "kaggle", "report"),
    *("data/demo.py", "learn/tracker.py", "combine/relabel.py", "kernels/copy_csv.py"),
}
"""Files and folders of the package that no kernel needs, but for the one that copies."""

COPY_NEEDS = {"__init__.py", "errors.py", "files.py", *(f"kernels/{name}.py" for name in ("__init__", "boot", "copy_csv"))}
"""All that the kernel that copies needs."""

_PACKAGE = Path(str(resources.files("melfold")))


def make_script(kind: str, bundle: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Append to `kernel.py` the line that starts it. Returns: the script, and the hashes of what it was made from.

    Args:
        kind: `infer`, `train` or `copy_csv`: a module of `melfold.kernels`.
        bundle: what the kernel is to do, JSON-able. `kind` and `build_id`, the digest of these hashes, are added to it.

    Raises:
        MelfoldError: a script that would be too large, or melfold without its repository.
    """
    code, pack, bundle = read_source("kernel.py"), pack_source(kind), bundle | {"kind": kind}
    made_from = {"kernel.py": digest(code), "package": hashlib.sha256(pack).hexdigest(), "bundle": digest(bundle)}
    arguments = json.dumps(bundle | {"build_id": digest(made_from)}), base64.b85encode(pack).decode()
    text = '{}\n\nif __name__ == "__main__": run(bundle={!r}, pack={!r})\n'.format(code, *arguments)
    if (size := len(text.encode())) >= MAX_BYTES:
        raise MelfoldError("the kernel's script is too large for Kaggle", f"{size:,} bytes, the limit is {MAX_BYTES:,}")
    return text, made_from


def read_source(name: str) -> str:
    """The text of a file in `kernels/`.

    Raises:
        MelfoldError: no such file, since melfold does not run from a clone.
    """
    path = _PACKAGE.parents[1] / "kernels" / name
    if not path.exists():
        raise MelfoldError("the kernels' sources are missing", str(path), "Run melfold from a clone of its repository")
    return path.read_text()


def pack_source(kind: str) -> bytes:
    """What a kind of kernel needs of the package, as a zip: the same source gives the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pack:
        for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.toml")]):
            inner = path.relative_to(_PACKAGE)
            names = {inner.as_posix(), inner.parts[0]}
            if names & COPY_NEEDS if kind == "copy_csv" else not names & LEFT_OUT:
                pack.writestr(zipfile.ZipInfo(f"melfold/{inner.as_posix()}"), path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    return out.getvalue()
