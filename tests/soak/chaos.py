"""Kills and damaged files, many times: `python -m tests.soak.chaos --seed 0 --kills 200 --damages 100`.

A kill (SIGKILL at a file operation, or after a random time) must lose nothing: the same command, given again, ends with the bytes
of a run that was never disturbed. A damaged file must be made again or reported in one line with exit code 2: never a traceback,
never another number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.data.demo import write_demo

SETS = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.epochs=0.3",
    "train.crop_seconds=0.64",
    "train.checkpoint_minutes=0",
    "folds.n_folds=2",
)
SAME = ("cache/*/*/*.npy", "folds/*", "runs/road/fold?/weights.safetensors", "runs/road/**/*.csv", "submissions/road/*")
"""What must be the same to the byte."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. `events`: file operations in the home."""

    code: int
    output: str
    events: int


class Trials:
    """A download, and a home in which every stage was done without a disturbance."""

    def __init__(self, root: Path) -> None:
        self.root, self.data, self.home = root, write_demo(root / "demo"), root / "home"
        sets = [word for item in SETS for word in ("--set", item)]
        common = [str(self.data), "--recipe", "demo", *sets]
        self.stages: dict[str, list[str]] = {
            "cache": ["cache", *common, "--jobs", "1"],
            "train": ["train", *common, "--run", "road", "--device", "cpu", "--jobs", "1"],
            "predict": ["predict", "road"],
            "oof": ["oof", "road", "--json"],
            "submission": ["submission", "build", "road"],
            "run": ["run", *common, "--run", "road", "--device", "cpu", "--jobs", "1"],
        }
        self.before: dict[str, Path] = {"run": root / "before cache"}
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.home.mkdir()
        for name, words in self.stages.items():
            self.before.setdefault(name, root / f"before {name}")
            if name != "run":
                shutil.copytree(self.home, self.before[name])
            began, home = time.monotonic(), self.copy_of(self.before[name])
            ended = self.command(words, home)
            assert ended.code == 0, ended.output
            self.events[name], self.seconds[name] = ended.events, time.monotonic() - began
            if name != "run":
                shutil.rmtree(self.home)
                home.rename(self.home)
            if name == "oof":
                self.scores = ended.output
        self.wanted = self.content(self.home)
        assert self.content(home) == self.wanted, "an undisturbed run is not repeatable"
        self._add_to_ledger()
        self.killed = self._killed_in_training()

    def _add_to_ledger(self) -> None:
        from melfold.files import Home
        from melfold.kaggle.ledger import Ledger, Row

        for tag in ("a", "b"):
            Ledger.of(Home(self.home)).add(Row(tag, "other", "", "", "x", "", "", "", "scratch", "0.5", status="refused"))

    def _killed_in_training(self) -> Path:
        """A home with a journal and a checkpoint: a cache killed halfway, and a training killed halfway."""
        home = self.copy_of(self.before["predict"])
        shutil.rmtree(home / "runs")
        self.command(self.stages["train"], home, at_event=self.events["train"] // 2)
        cache = next(home.glob("cache/*/*/manifest.csv")).parent
        for path in sorted(cache.glob("*.npy"))[:40]:
            path.unlink()
        self.command(self.stages["cache"], home, at_event=60)
        return home

    def copy_of(self, home: Path) -> Path:
        """A copy that may be disturbed."""
        place = Path(tempfile.mkdtemp(dir=self.root)) / "home"
        shutil.copytree(home, place)
        return place

    def content(self, home: Path) -> dict[str, bytes]:
        """The files that must be the same."""
        paths = {path for pattern in SAME for path in home.glob(pattern) if path.is_file()}
        return {str(path.relative_to(home)): path.read_bytes() for path in paths if path.name != "log.jsonl"}

    def command(self, words: Sequence[str], home: Path, *, at_event: int = 0, after: float = 0.0) -> Ended:
        """Run `melfold WORDS` in a child process; kill it at a file operation, or after some seconds."""
        out, count = home.with_name("output.txt"), home.with_name("events.txt")
        pid = os.fork()
        if pid == 0:
            _child([*words, "--home", str(home)], home, out, count, at_event)
        timer = threading.Timer(after, os.kill, (pid, signal.SIGKILL)) if after else None
        if timer:
            timer.start()
        _, status = os.waitpid(pid, 0)
        if timer:
            timer.cancel()
        events = int(count.read_text()) if count.exists() else 0
        return Ended(os.waitstatus_to_exitcode(status), out.read_text(errors="replace"), events)


def _child(words: list[str], home: Path, out: Path, count: Path, at_event: int) -> None:
    """Never returns."""
    number, inside = 0, str(home)

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal number
        writes = event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and re.search("[wax+]", str(args[1] or "")))
        if writes and str(args[0]).startswith(inside):
            number += 1
            if number == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for own in (1, 2):
            os.dup2(file, own)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.addaudithook(watch)
        os.chdir(home.parent)  # outside the repository, whose commit is part of a manifest
        sys.argv = ["melfold", *words]
        from melfold.__main__ import main

        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        count.write_text(str(number))
        os._exit(code)


def kill(trials: Trials, rng: random.Random) -> tuple[str, str]:
    """One to three kills of a command; then it, and all that is left, must end as if nothing had happened."""
    name = rng.choice(list(trials.stages))
    home, moments = trials.copy_of(trials.before[name]), []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.6:
            moment: dict[str, Any] = {"at_event": rng.randint(1, max(1, trials.events[name]))}
        else:
            moment = {"after": rng.uniform(0.01, trials.seconds[name])}
        moments.append(f"{name} {moment}")
        ended = trials.command(trials.stages[name], home, **moment)
        if ended.code not in (0, -signal.SIGKILL):
            return name, f"{moments}: exit code {ended.code}: {ended.output[-600:]}"
    for words in (trials.stages[name], trials.stages["run"]):
        ended = trials.command(words, home)
        if ended.code:
            return name, f"{moments}: the repeat ended with {ended.code}: {ended.output[-600:]}"
    problem = ""
    if (found := trials.content(home)) != trials.wanted:
        odd = [key for key in found.keys() | trials.wanted.keys() if found.get(key) != trials.wanted.get(key)]
        problem = f"{moments}: other bytes: {sorted(odd)[:4]}"
    shutil.rmtree(home.parent)
    return name, problem


def _edit_number(content: bytes) -> bytes:
    """Another digit in the middle: what a careless edit leaves."""
    at = [i for i, c in enumerate(content) if 48 <= c < 57]
    i = at[len(at) // 2] if at else 0
    return content[:i] + bytes([content[i] + 1]) + content[i + 1 :] if at else content + b"1"


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "a flipped bit": lambda c, rng: _flip(c, rng),
    "cut": lambda c, rng: c[: rng.randrange(len(c))],
    "empty": lambda c, rng: b"",
    "zeros": lambda c, rng: bytes(len(c)),
    "not UTF-8": lambda c, rng: c[: len(c) // 2] + b"\xff\xfe" + c[len(c) // 2 :],
    "a digit": lambda c, rng: _edit_number(c),
    "last line twice": lambda c, rng: c + (c.splitlines(keepends=True) or [b"x"])[-1],
    "another JSON": lambda c, rng: b'{"made_from": {}, "files": {}}',
    "a list": lambda c, rng: b"[1, 2]",
    "gone": lambda c, rng: None,
}


def _flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\x01"
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def kind_of(path: Path, home: Path) -> str:
    """Files of one kind: their path without names and numbers."""
    parts = path.relative_to(home).parts
    place = f"{parts[0]}/fold" if re.fullmatch(r"fold\d", path.parent.name) else parts[0]
    return f"{place}/*{path.suffix}" if parts[0] in ("folds",) or path.suffix == ".npy" else f"{place}/{path.name}"


def damage(trials: Trials, rng: random.Random, number: int) -> tuple[str, str]:
    """One damaged file; then every command must heal it or report it, and no number may be another."""
    home = trials.copy_of(rng.choice([trials.home, trials.killed]))
    kinds: dict[str, list[Path]] = {}
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            kinds.setdefault(kind_of(path, home), []).append(path)
    kind = sorted(kinds)[number % len(kinds)]
    path, how = rng.choice(kinds[kind]), rng.choice(list(DAMAGES))
    before = path.read_bytes()
    after = DAMAGES[how](before, rng)
    path.unlink()
    if after is not None:
        path.write_bytes(after)
    what = f"{kind}, {how}"
    if kind.startswith("cache/") and (home / "runs" / "road" / "fold0").exists() and home.parent.exists():
        shutil.rmtree(home / "runs" / "road" / "fold0")  # so that the log-mels are read
    for name in ("oof", "predict", "submission", "run", "oof"):
        ended = trials.command(trials.stages[name], home)
        lines = [line for line in ended.output.splitlines() if line.startswith("melfold: ")]
        if "Traceback" in ended.output or ended.code not in (0, 2) or (ended.code == 2 and not lines):
            return kind, f"{what}: {name} ended with {ended.code}: {ended.output[-900:]}"
        if name == "oof" and ended.code == 0 and '"missing": []' in ended.output and _json(ended.output) != _json(trials.scores):
            return kind, f"{what}: another score: {ended.output[-300:]}"
        if name == "run" and ended.code == 0:
            key = "submissions/road/submission.csv"
            if (home / key).read_bytes() != trials.wanted[key]:
                return kind, f"{what}: another submission"
    ended = trials.command(["ledger", "show"], home)
    if "Traceback" in ended.output or ended.code not in (0, 2):
        return kind, f"{what}: ledger show ended with {ended.code}: {ended.output[-600:]}"
    shutil.rmtree(home.parent)
    return kind, ""


def _json(output: str) -> object:
    return json.loads(output[output.index("{") :])


def main() -> int:
    """Run the trials. Returns: how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=100)
    args = parser.parse_args()
    import librosa  # noqa: F401  (imported once here, so that no child takes seconds for it)
    import timm  # noqa: F401

    import melfold.cli.main
    import melfold.learn.launch
    import melfold.stages  # noqa: F401

    failed = 0
    with tempfile.TemporaryDirectory(prefix="melfold-chaos-") as folder:
        began = time.monotonic()
        trials = Trials(Path(folder))
        print(f"prepared in {time.monotonic() - began:.0f} s; file operations: {trials.events}", flush=True)
        for title, count, trial in (
            ("kill", args.kills, lambda rng, number: kill(trials, rng)),
            ("damage", args.damages, lambda rng, number: damage(trials, rng, number)),
        ):
            kinds: Counter[str] = Counter()
            for number in range(count):
                kind, problem = trial(random.Random(f"{args.seed} {title} {number}"), number)
                kinds[kind] += 1
                if problem:
                    failed += 1
                    print(f"FAILED {title} {number}: {problem}", flush=True)
            print(f"{title}: {count} trials, {dict(kinds)}; {time.monotonic() - began:.0f} s", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
