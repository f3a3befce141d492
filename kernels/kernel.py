"""A melfold kernel: put the package on the path, then call the module of `melfold.kernels` that the bundle names.

`melfold kernel build` appends one line to this file, which calls `run`.
"""

import base64
import importlib
import json
import os
import sys
import time
from pathlib import Path

STARTED = time.monotonic()


def run(bundle: str, pack: str) -> None:
    """Start the package (a zip in base85). The bundle, in JSON, says what to do."""
    settings, root = json.loads(bundle), Path(os.environ.get("MELFOLD_KERNEL_ROOT", "/"))  # a rehearsal has its own
    package = root / "tmp" / f"melfold-{settings['build_id'][:12]}.zip"
    temporary = package.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(base64.b85decode(pack))
    temporary.replace(package)
    sys.path.insert(0, str(package))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("NUMBA_CACHE_DIR", str(root / "tmp" / "numba"))
    importlib.import_module(f"melfold.kernels.{settings['kind']}").main(settings, root, STARTED)
