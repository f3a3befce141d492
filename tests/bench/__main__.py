"""Run all benchmarks, or those that are named."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tests.bench
from melfold.learn.provenance import current_commit, versions
from tests.bench.harness import RESULTS, Result, show
from tests.bench.workspace import Workspace

BENCHMARKS = {
    "cache_bound": "caching.cache_bound",
    "cache_one": "caching.cache_one",
    "cache_two": "caching.cache_two",
    "cache_workers": "caching.cache_workers",
    "cache_fat2019": "caching.cache_fat2019",
    "hour": "memory.hour",
    "png": "caching.png",
    "crops": "caching.crops",
    "recache": "caching.recache",
    "memory": "memory.memory",
    "growth": "memory.growth",
    "lwlrap": "scoring.score",
    "tables": "scoring.tables",
    "feed": "learning.feed",
    "predict": "learning.predict",
    "train": "learning.train",
    "forecast": "planning.forecast",
    "recipes": "planning.recipes",
}
"""Name -> where it is."""


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


def processor() -> str:
    """The processor's model."""
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def result_path() -> Path:
    """This machine's own file."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", f"{processor()} {os.cpu_count()} cores".lower()) + ".json")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What a file of results holds, or nothing where there is none."""
    return json.loads(path.read_text())["results"] if path.exists() else []


def write_out(path: Path, results: list[Result]) -> None:
    """Write the results and what they were measured on as JSON; those of benchmarks that were not run again stay."""
    machine = {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version(), **versions()}
    new = {(r.name, r.against): asdict(r) | {"commit": current_commit()} for r in results}
    old = {(row["name"], row["against"]): row for row in read_rows(path)}
    rows = [new.get(key, old.get(key)) for key in [*old, *(key for key in new if key not in old)]]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": rows}, indent=2) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.bench", description=tests.bench.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do the benchmarks run at all?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="another file than this machine's in tests/bench/results")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    results = run(args.names or list(BENCHMARKS), quick=args.quick)
    out = args.out or result_path()
    before = {(row["name"], row["against"]): row["value"] for row in read_rows(out)}
    show(results, {} if args.quick else before, quick=args.quick)
    if args.out or not args.quick:
        write_out(out, results)
    return 0 if args.quick or all(r.ok for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
