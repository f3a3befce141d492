"""From a shell: `python -m tests.fake_kaggle --root DIR --data DATA --truth FILE -- COMMAND ...`"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fake_kaggle.server import FakeKaggle


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a command, or whoever comes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    command = argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.fake_kaggle", usage="%(prog)s --root DIR [options] [-- COMMAND ...]")
    parser.add_argument("--root", type=Path, required=True, help="a folder for everything it keeps")
    parser.add_argument("--data", type=Path, help="the competition's download")
    parser.add_argument("--truth", type=Path, help="fname,labels,usage: what submissions are scored against")
    parser.add_argument("--competition", default="freesound-audio-tagging-2019")
    parser.add_argument("--layout", choices=("nested", "flat"), default="nested", help="how kernels find their inputs")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(argv[:cut])
    names = ("competition", "data", "truth", "port")
    with FakeKaggle(options.root, **{name: getattr(options, name) for name in names}) as fake:
        fake.layout = options.layout
        home = fake.root / "home"
        env = fake.env(home)
        print("This is a LOCAL stand-in for Kaggle: nothing leaves this machine, no real submission is made.", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            if command:
                return subprocess.run(command, env=env).returncode
            print("unset NO_PROXY no_proxy ALL_PROXY all_proxy")
            for name, value in fake.settings(home).items():
                print(f"export {name}={shlex.quote(value)}", flush=True)
            while True:
                time.sleep(3600)
    return 130


if __name__ == "__main__":
    sys.exit(main())
