"""Built kernels: what is in them, and what a rehearsal lets pass."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from kaggle_world import SETS, SLUG, World, record, rewrite
from slugify import slugify

from melfold import pipeline
from melfold.combine.submission import build_submission
from melfold.errors import MelfoldError
from melfold.files import sha256_file
from melfold.kaggle import kernels, sandbox
from melfold.kaggle.client import Kaggle
from melfold.kaggle.kernels import Built, build_infer, build_train, fetch_run, pack_source, push, slug_of, title_for
from melfold.kaggle.rehearsal import rehearse
from melfold.learn.devices import pick_device
from melfold.learn.runs import open_run
from melfold.recipes import load_recipe

ON_KAGGLE = {"joblib", "librosa", "numpy", "pandas", "pydantic", "safetensors", "scipy", "sklearn", "soundfile", "soxr"}
ON_KAGGLE |= {"timm", "torch"}
"""Of what the package imports, the distributions that Kaggle's image has."""

ISOLATIONS = [
    pytest.param("namespaces", marks=pytest.mark.skipif(not sandbox.available(), reason="no user namespaces here")),
    "prefix",
]


@pytest.mark.parametrize(
    "name", ["open", "A+B", "my_run.v2", "x", "a" * 80, "Ümlaut 1", "open-3f2a1b+scratch-9c8d7e+more-aaaaaa-bbbbbbb"]
)
def test_a_kernels_slug_is_the_one_its_title_gives(name: str) -> None:
    title = title_for("infer", name)
    assert 5 <= len(title) <= 50
    assert slug_of(title) == slugify(title)


def test_long_names_do_not_share_a_slug() -> None:
    assert title_for("infer", "a" * 80) != title_for("infer", "a" * 81)


def test_the_pack_imports_only_what_kaggles_image_has() -> None:
    pack = zipfile.ZipFile(BytesIO(pack_source()))
    sources = {name: pack.read(name).decode() for name in pack.namelist() if name.endswith(".py")}
    sources |= {f"kernels/{kind}": kernels._main_source(kind) for kind in ("infer", "train")}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources}
    asked: dict[str, set[str]] = {"": set()}
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for found in names:
                top = found.split(".")[0]
                if top == "melfold":
                    assert found in modules, f"{name} imports {found}, which is not packed"
                elif top not in sys.stdlib_module_names:
                    asked.setdefault(top, set()).add(name)
    lazily = {
        "iterstrat": {"melfold/data/folds.py"},  # folds are never made in a kernel: the table travels with it
        "distributed": {"melfold/compute.py"},  # asked for by --engine dask alone
    }
    assert {k: v for k, v in asked.items() if k and k not in ON_KAGGLE} == lazily


def test_a_build_is_private_offline_small_and_repeatable(own: World) -> None:
    built = own.build()
    first = built.sha256
    metadata = json.loads((built.kernel / "kernel-metadata.json").read_text())
    assert metadata["enable_internet"] is False
    assert metadata["is_private"] is True
    assert metadata["competition_sources"] == [SLUG]
    assert (built.kernel / "kernel.py").stat().st_size < 1_000_000
    dataset = json.loads((built.dataset / "dataset-metadata.json").read_text())
    assert metadata["dataset_sources"] == [dataset["id"]]
    assert 6 <= len(dataset["title"]) <= 50
    assert len(dataset["licenses"]) == 1
    assert slugify(dataset["title"]) == dataset["id"].split("/")[1]
    manifest = json.loads((built.dataset / "manifest.json").read_text())
    assert manifest["files"] == {p.name: sha256_file(p) for p in built.dataset.glob("*.safetensors")}
    assert all(p.is_file() for p in built.dataset.iterdir()), "the CLI leaves folders out"
    assert own.build().sha256 == first
    assert built.facts["limit_seconds"] == 240 * 60


def test_a_source_too_large_for_kaggle_is_refused(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_BYTES", 10_000)
    with pytest.raises(MelfoldError, match="too large for Kaggle"):
        own.build()
    assert not (own.home.root / "build" / "kernels" / "melfold-infer-tiny").exists()


def test_a_run_that_has_changed_is_not_built(own: World) -> None:
    result = open_run(own.home, "tiny").fold(0).result
    facts = json.loads(result.read_text()) | {"weights_sha256": "0" * 64}
    result.unlink()
    result.write_text(json.dumps(facts))
    with pytest.raises(MelfoldError, match="has changed since"):
        own.build()


def test_a_weighted_ensemble_of_front_ends_and_views_gives_the_bytes_of_home(own: World) -> None:
    other = load_recipe("demo", [*SETS, "seed=1", "logmel.n_mels=40", 'predict.pads=["wrap", "floor"]', "train.loss=lsep"])
    device = pick_device("cpu", "off")
    runs = [open_run(own.home, "tiny"), pipeline.run_all(own.data, own.home, other, "other", device, jobs=1)[0]]
    build_submission(own.home, runs, own.competition, id="pair", mean="logit", weights=[3, 1])
    built = build_infer(own.home, "pair", "tester", SLUG, gpu=False)
    report = rehearse(built, own.competition, own.home)
    assert (report.failures, report.equality) == ([], "the same bytes as at home")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_rehearsal_gives_the_bytes_of_home(isolation: str, own: World, tmp_path: Path) -> None:
    built = own.build()
    report = rehearse(built, own.competition, own.home, isolation=isolation, keep=tmp_path / "kept")
    assert report.failures == []
    assert report.equality == "the same bytes as at home"
    assert report.isolation == isolation
    assert set(report.predicted_seconds) == {"1120", "3361"}
    assert report.peak_mib > 50
    passes = record(tmp_path / "kept")["passes"]
    assert [(p["fold"], p["view"]) for p in passes] == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]
    assert (built.noted("rehearsal.json") or {})["blessed"]
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"submission.csv", "melfold.json", "log.txt"}
    assert own.build().noted("rehearsal.json"), "the same build again keeps its blessing"
    with (built.kernel / "kernel.py").open("a") as file:
        file.write("\n")
    with pytest.raises(MelfoldError, match="not rehearsed since it was built"):
        push(Kaggle(SLUG), built)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 2)\nexcept OSError:\n    pass\n", "network"),
        (
            "import urllib.request\ntry:\n    urllib.request.urlopen('http://nowhere.invalid')\nexcept Exception:\n    pass\n",
            "network",
        ),
        (
            "import os\nfrom pathlib import Path\nroot = Path(os.environ['MELFOLD_KERNEL_ROOT'])\n"
            "try:\n    next(root.glob('kaggle/input/*/*/test')).joinpath('x.wav').write_bytes(b'')\nexcept OSError:\n    pass\n",
            "writes to its inputs",
        ),
        ("raise SystemExit('out of memory')", "exit code 1: out of memory"),
        ("print('nothing')", "submission.csv"),
    ],
)
def test_a_kernel_that_misbehaves_fails_with_the_reason(code: str, why: str, isolation: str, own: World) -> None:
    built = own.build()
    rewrite(built, code)
    report = rehearse(built, own.competition, own.home, isolation=isolation)
    assert not report.blessed
    assert why in report.failures[0]
    with pytest.raises(MelfoldError, match="not rehearsed"):
        push(Kaggle(SLUG), built)


@pytest.mark.skipif(not sandbox.available(), reason="no user namespaces here")
def test_a_reach_for_the_network_past_python_is_seen_too(own: World) -> None:
    built = own.build()
    code = "import subprocess\nsubprocess.run(['bash', '-c', 'echo x > /dev/udp/192.0.2.1/53'], stderr=subprocess.DEVNULL)\n"
    rewrite(built, code)
    report = rehearse(built, own.competition, own.home, isolation="namespaces")
    assert "network" in report.failures[0]


def test_a_kernel_over_its_limit_is_stopped(own: World) -> None:
    built = own.build()
    rewrite(built, "import time\ntime.sleep(600)\n")
    facts = built.facts | {"budget_minutes": {"cpu": -0.3}}
    (built.folder / "build.json").write_text(json.dumps(facts))
    report = rehearse(built, own.competition, own.home)
    assert "overruns its limit" in report.failures[0]
    assert report.seconds < 60


def test_with_a_budget_far_too_small_the_file_is_whole_and_in_time(own: World, tmp_path: Path) -> None:
    built = own.build(budget={"cpu": 0.01, "gpu": 0.01})
    report = rehearse(built, own.competition, own.home, keep=tmp_path / "kept")
    assert "overruns its budget" in report.failures[0]
    kernels.check_output(tmp_path / "kept", own.competition)
    assert record(tmp_path / "kept")["seconds"] < 30


def test_a_budget_for_half_gives_first_passes_before_shifts(own: World, tmp_path: Path) -> None:
    """The kernel's own clock is what it goes by: after the first pass it is told that the time is almost up."""
    built = own.build()
    script = (built.kernel / "kernel.py").read_text()
    rewrite(built, script.replace("        write()\n        writing", "        write()\n        budget = 0.0\n        writing"))
    rehearse(built, own.competition, own.home, keep=tmp_path / "kept")
    done = [(p["fold"], p["done"]) for p in record(tmp_path / "kept")["passes"]]
    assert done == [("0", True), ("1", False), ("0", False), ("1", False)]
    kernels.check_output(tmp_path / "kept", own.competition)


def test_a_test_clip_that_cannot_be_read_keeps_the_prior(own: World, tmp_path: Path) -> None:
    from melfold.combine.ensemble import prior_of
    from melfold.data.competition import load_competition
    from melfold.probs import read_probs

    data = tmp_path / "broken"
    shutil.copytree(own.data, data)
    first, second, *_ = own.competition.test.index
    (data / "test" / first).write_bytes(b"no audio")
    built = own.build()
    report = rehearse(built, load_competition(data), own.home, keep=tmp_path / "kept")
    assert "differ" in report.failures[0]
    probs = read_probs(tmp_path / "kept" / "submission.csv")
    prior = prior_of(open_run(own.home, "tiny"))
    assert (probs.loc[first] == prior[probs.columns]).all()
    assert not (probs.loc[second] == prior[probs.columns]).all()
    assert f"TEST CLIP {first} cannot be read" in (tmp_path / "kept" / "log.txt").read_text()


def test_weights_may_come_from_a_training_kernels_output(own: World) -> None:
    output = own.home.root / "build/kernels/melfold-train-far-s1/output/runs"
    shutil.copytree(open_run(own.home, "tiny").folder, output / "tiny")
    built = own.build(source="tester/melfold-train-far-s1")
    assert not built.dataset.exists()
    metadata = json.loads((built.kernel / "kernel-metadata.json").read_text())
    assert (metadata["dataset_sources"], metadata["kernel_sources"]) == ([], ["tester/melfold-train-far-s1"])
    report = rehearse(built, own.competition, own.home)
    assert report.failures == [], report.log
    assert report.equality == "the same bytes as at home"


def test_damaged_weights_are_refused(own: World) -> None:
    built = own.build()
    path = next(built.dataset.glob("*fold0.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    report = rehearse(built, own.competition, own.home)
    assert "missing or damaged" in report.failures[0]


def build_training(world: World, *sets: str, session: int = 1, folds: list[int | str]) -> Built:
    recipe = load_recipe("demo", [*SETS, *sets])
    table, _ = pipeline.folds(world.competition, world.home, recipe)
    return build_train(
        world.home, recipe, "far", table, world.competition, "tester", SLUG, folds=folds, session=session, minutes=60, gpu=False
    )


def test_a_training_kernel_brings_its_run_home(own: World) -> None:
    built = build_training(own, "seed=3", folds=[0, 1])
    report = rehearse(built, own.competition, own.home, minutes=10, keep=built.folder / "output")
    assert report.failures == [], report.log
    assert set(record(built.folder / "output")["folds"].values()) == {"done"}
    assert "OOF lwlrap" in report.log
    fetch_run(built, built.folder / "output", own.home)
    assert open_run(own.home, "far").done_folds() == ["0", "1"]


@pytest.mark.soak
def test_training_stops_in_time_and_goes_on_in_a_second_session(own: World) -> None:
    """The first session gets more time until it has trained at all; the second must go on from where that one stopped."""
    steps = []
    for session in (1, 2):
        built = build_training(own, "train.epochs=5000", session=session, folds=[0])
        for minutes in (0.3, 0.6, 1.2, 2.4):
            report = rehearse(built, own.competition, own.home, minutes=minutes, keep=built.folder / "output")
            if "nothing was trained" not in "".join(report.failures):
                break
        assert report.failures == [], report.log
        assert record(built.folder / "output")["folds"] == {"0": "saved, to be gone on with"}, report.log
        state = torch.load(built.folder / "output/runs/far/fold0/checkpoint.pt", weights_only=True)
        steps.append(state["step"])
    assert f"going on at step {steps[0]} of" in report.log
    assert 0 < steps[0] < steps[1]


def test_a_training_kernel_needs_its_weights_as_a_file(own: World) -> None:
    recipe = load_recipe("demo", [*SETS, "model.weights=hub"])
    table, _ = pipeline.folds(own.competition, own.home, recipe)
    with pytest.raises(MelfoldError, match="no network to download weights"):
        build_train(own.home, recipe, "hub", table, own.competition, "tester", SLUG, folds=[0])


def test_no_such_submission(own: World) -> None:
    with pytest.raises(MelfoldError, match="no such submission: nosuch"):
        build_infer(own.home, "nosuch", "tester", SLUG)
