"""Submission by copy in a Kaggle kernel: unpack melfold, then call `melfold.kernels.copy_csv`.

`melfold ship ID --copy` appends one line to this file, which calls `run`.
"""

import base64
import io
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

STARTED = time.monotonic()


def run(bundle: str, pack: str) -> None:
    """Unpack the package (a zip in base85) and start it. The bundle, in JSON, says what to do."""
    root = Path(os.environ.get("MELFOLD_KERNEL_ROOT", "/"))  # a rehearsal has its own
    settings = json.loads(bundle)
    source = root / "tmp" / f"melfold-{settings['build_id'][:12]}"
    if not source.exists():
        unpacked = source.with_name(f"{source.name}.{os.getpid()}")
        zipfile.ZipFile(io.BytesIO(base64.b85decode(pack))).extractall(unpacked)
        try:
            unpacked.rename(source)
        except OSError:  # another process of this kernel was faster
            shutil.rmtree(unpacked)
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("NUMBA_CACHE_DIR", str(root / "tmp" / "numba"))

    from melfold.kernels import copy_csv

    assert Path(copy_csv.__file__).is_relative_to(source), f"another melfold was imported: {copy_csv.__file__}"
    copy_csv.main(settings, root, STARTED)
