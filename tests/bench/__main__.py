"""Run all benchmarks, or those that are named."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import tests.bench
from melfold.learn.runs import current_commit, versions
from tests.bench.harness import Result, show
from tests.bench.workspace import Workspace

BENCHMARKS = {
    "cache_one": "caching.cache_one",
    "cache_two": "caching.cache_two",
    "png": "caching.png",
    "crops": "caching.crops",
    "recache": "caching.recache",
    "memory": "memory.memory",
    "lwlrap": "scoring.score",
    "predict": "learning.predict",
    "train": "learning.train",
}
"""Name -> where it is. Those without torch come first: its threads stay out of their process."""


def run(names: list[str], *, quick: bool) -> list[Result]:
    """Run benchmarks one after another in a temporary folder."""
    results = []
    with tempfile.TemporaryDirectory(prefix="melfold-bench-") as folder:
        work = Workspace(Path(folder), quick=quick)
        for name in names:
            module, function = BENCHMARKS[name].split(".")
            begin = time.monotonic()
            found = getattr(importlib.import_module(f"tests.bench.{module}"), function)(work)
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            results += found
    return results


def write_out(path: Path, results: list[Result], *, quick: bool) -> None:
    """Write the results and what they were measured on as JSON."""
    machine = {"cores": os.cpu_count(), "processor": platform.processor(), "python": platform.python_version(), **versions()}
    rows = [asdict(r) | {"ok": r.ok} for r in results]
    path.write_text(
        json.dumps({"commit": current_commit(), "quick": quick, "machine": machine, "results": rows}, indent=2) + "\n"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.bench", description=tests.bench.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do the benchmarks run at all?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    results = run(args.names or list(BENCHMARKS), quick=args.quick)
    show(results, quick=args.quick)
    if args.out:
        write_out(args.out, results, quick=args.quick)
    return 0 if args.quick or all(r.ok for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
