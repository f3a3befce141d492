"""Built kernels: what is in them, and what passes a rehearsal."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from kaggle_world import CPU as COMPUTE
from kaggle_world import SETS, SLUG, World, bundle_of, lay_out, record, restamp, rewrite
from slugify import slugify

from melfold import stages
from melfold.artefacts import Artefact
from melfold.combine.check import check_submission
from melfold.combine.oof import prior_of
from melfold.combine.submission import build_submission
from melfold.errors import MelfoldError
from melfold.files import digest, sha256_file
from melfold.kaggle import pack, sandbox
from melfold.kaggle.build import Target, build_infer
from melfold.kaggle.built import Built, slug_of, title_for
from melfold.kaggle.client import Kaggle
from melfold.kaggle.judge import judge_infer
from melfold.kaggle.push import check_output, push
from melfold.kaggle.rehearsal import rehearse
from melfold.kernels.boot import Session
from melfold.kernels.infer import infer
from melfold.learn.predict import predict_logits
from melfold.learn.predictions import open_prediction
from melfold.learn.runs import open_run
from melfold.probs import read_probs
from melfold.recipes import load_recipe

ON_KAGGLE = {"joblib", "librosa", "numpy", "pandas", "pydantic", "safetensors", "scipy", "sklearn", "soundfile", "soxr"}
ON_KAGGLE |= {"huggingface_hub", "timm", "torch", "tqdm"}  # timm needs huggingface_hub, which needs tqdm
"""The libraries that the package imports and Kaggle's image has."""

CPU = Target("tester", SLUG, gpu=False)

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


@pytest.mark.parametrize(("one", "other"), [("a" * 80, "a" * 81), ("x_1", "x-1"), ("X", "x"), ("x.1", "x_1")])
def test_two_names_do_not_share_a_slug(one: str, other: str) -> None:
    assert title_for("infer", one) != title_for("infer", other)
    assert title_for("train", one, 2) != title_for("train", other, 2)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".."])
def test_names_with_parts_of_a_path_are_refused(name: str, own: World) -> None:
    with pytest.raises(MelfoldError, match="not a Kaggle user name"):
        Target(name, SLUG)
    with pytest.raises(MelfoldError, match="not a kernel"):
        own.build(source=f"{name}/x/y")


def test_the_pack_imports_only_what_kaggles_image_has() -> None:
    archive = zipfile.ZipFile(BytesIO(pack.pack_source("infer")))
    sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    sources |= {"kernels/kernel": pack.read_source("kernel.py")}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources}
    imported: dict[str, set[str]] = {}
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for found in names:
                top = found.split(".")[0]
                if top == "melfold":
                    assert found in modules, f"{name} imports {found}, which is not packed"
                elif top not in sys.stdlib_module_names:
                    imported.setdefault(top, set()).add(name)
    never_called = {
        "iterstrat": {"melfold/data/folds.py"},  # a kernel makes no folds: the table is part of its script
        "distributed": {"melfold/compute.py"},  # only for --engine dask
    }
    assert {k: v for k, v in imported.items() if k not in ON_KAGGLE} == never_called
    assert not any(name.startswith(("melfold/kaggle/", "melfold/report/", "melfold/cli")) for name in sources)


@pytest.mark.parametrize("kind", ["infer", "train", "copy_csv"])
def test_a_kernels_folder_is_one_that_kaggle_knows(kind: str) -> None:
    metadata = json.loads(pack.read_source(f"{kind}/kernel-metadata.json"))
    assert metadata["id"].split("/")[1] == slugify(metadata["title"]) == slugify(f"melfold {kind}")
    assert pack.read_source(metadata["code_file"])
    assert (metadata["enable_internet"], metadata["is_private"]) == (False, True)


def test_a_build_is_private_offline_small_and_repeatable(own: World) -> None:
    built = own.build()
    first = built.inputs
    metadata = json.loads((built.kernel / "kernel-metadata.json").read_text())
    assert metadata["id"] == "tester/melfold-infer-tiny"
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
    assert built.facts["limit_seconds"] == 240 * 60
    shutil.rmtree(built.folder)
    assert own.build().inputs == first


def test_the_script_is_the_file_in_the_repository_and_one_line(own: World) -> None:
    script = (own.build().kernel / "kernel.py").read_text()
    source = pack.read_source("kernel.py")
    assert script.startswith(source)
    (line,) = script.removeprefix(source).strip().splitlines()
    assert line.startswith('if __name__ == "__main__": run(bundle=')


def test_the_same_inputs_are_not_built_again_and_other_inputs_need_another_rehearsal(own: World) -> None:
    built = own.build()
    built.rehearsal_stamp.commit(built.inputs, passed=True)
    (built.folder / "output").mkdir()
    assert own.build().passed
    assert (built.folder / "output").exists()
    assert not own.build(minutes=30).passed
    built.rehearsal_stamp.commit({"build": "0" * 64}, passed=True)
    with pytest.raises(MelfoldError, match="not rehearsed since it was built: build: "):
        push(Kaggle(SLUG), built)


def test_what_was_built_by_another_version_is_built_again(own: World) -> None:
    built = own.build()
    (built.folder / "build.json").write_text(json.dumps({"kind": "infer"}))
    with pytest.raises(MelfoldError, match="not written by this version of melfold"):
        rehearse(built, own.competition, own.home)
    assert own.build().facts["kind"] == "infer"


@pytest.mark.parametrize("change", ["script", "weights", "another file", "a file less"])
def test_a_kernel_that_was_changed_after_the_build_is_refused(change: str, own: World) -> None:
    built = own.build()
    path = next(built.dataset.glob("*fold0.safetensors"))
    if change == "script":
        with (built.kernel / "kernel.py").open("a") as file:
            file.write("\n")
    elif change == "another file":
        (built.dataset / "more.txt").write_text("")
    else:
        content = path.read_bytes()
        path.unlink()  # it is a hard link to the run's file
        if change == "weights":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for refuse in (lambda: rehearse(built, own.competition, own.home), lambda: push(Kaggle(SLUG), built, unrehearsed=True)):
        with pytest.raises(MelfoldError, match=r"is missing|was changed after it was written") as caught:
            refuse()
        assert len(caught.value.lines) == 1
    own.build().verify()


def test_a_script_too_large_for_kaggle_is_refused(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "MAX_BYTES", 10_000)
    with pytest.raises(MelfoldError, match="too large for Kaggle"):
        own.build()
    assert not (own.home.root / "build" / "kernels" / "melfold-infer-tiny").exists()


def edit_stamp(path: Path, **changes: object) -> None:
    """Change what a stamp says, as if it had been written so."""
    content = Artefact(path).read() | changes
    path.write_text(json.dumps(content | {"digest": digest(content)}))


@pytest.mark.parametrize("change", ["result", "weights"])
def test_a_run_that_has_changed_is_not_built(change: str, own: World) -> None:
    fold = open_run(own.home, "tiny").fold(0)
    path = fold.result if change == "result" else fold.weights
    content = path.read_bytes()
    path.unlink()  # it is a hard link to the shared world's file
    if change == "result":
        path.write_bytes(content)
        edit_stamp(path, files={"weights.safetensors": "0" * 64})
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(MelfoldError, match="has changed since" if change == "result" else "changed after it was written"):
        own.build()


def run_here(built: Built, world: World, root: Path) -> tuple[Path, list[str], str]:
    """An inference kernel in this process. Returns: its working folder, its failures, how close it is to the file of home."""
    working = lay_out(built, world, root)
    infer(Session(bundle_of(built), root, time.monotonic()))
    return working, *judge_infer(working, built.facts, world.competition, world.home)[:2]


def test_a_weighted_ensemble_of_front_ends_and_views_gives_the_bytes_of_home(own: World, tmp_path: Path) -> None:
    other = load_recipe("demo", [*SETS, "seed=1", "logmel.n_mels=40", 'predict.pads=["wrap", "floor"]', "train.loss=lsep"])
    other_run, _, _ = stages.run(own.data, own.home, other, "other", COMPUTE)
    runs = [open_prediction(own.home, "tiny"), other_run]
    build_submission(own.home, runs, own.competition, id="pair", mean="logit", weights=[3, 1])
    _, failures, equality = run_here(build_infer(own.home, "pair", CPU), own, tmp_path)
    assert (failures, equality) == ([], "the same bytes as at home")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_rehearsal_gives_the_bytes_of_home(isolation: str, own: World, tmp_path: Path) -> None:
    gpu = isolation == "prefix"
    built = own.build(gpu=gpu)
    report = rehearse(built, own.competition, own.home, isolation=isolation, keep=tmp_path / "kept")
    assert report.failures == []
    assert report.equality == "the same bytes as at home"
    assert report.isolation == isolation
    assert set(report.predicted_seconds) == {"1120", "3361"}
    assert report.peak_mib > 50
    kept = record(tmp_path / "kept")
    passes = kept["passes"]
    assert [(p["fold"], p["view"]) for p in passes] == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]
    assert built.passed
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"submission.csv", "melfold.json", "log.txt"}
    assert own.build(gpu=gpu).passed, "the same build still counts as rehearsed"
    if not torch.cuda.is_available():
        assert kept["budget_s"] == pytest.approx(0.93 * 240 * 60), "a GPU kernel may take its time in a rehearsal without one"
        assert ("nothing is known" in report.note) == ("NO GPU: this kernel asked for one" in report.log) == gpu


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
    assert not report.passed
    assert why in report.failures[0]
    with pytest.raises(MelfoldError, match=f"did not pass its rehearsal: .*{why}"):
        push(Kaggle(SLUG), built)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_kernel_can_neither_write_outside_its_folders_nor_read_the_environment_of_others(
    isolation: str, own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_KEY", "a-secret-key")
    outside = [Path(f"/var/tmp/melfold-test-{os.getpid()}"), own.home.root / "written", own.home.root / "linked"]
    code = f"""
import os, pathlib
for path in {list(map(str, outside[:2]))!r}:
    try: pathlib.Path(path).write_text('x')
    except OSError: pass
try: os.symlink('/tmp', {str(outside[2])!r})
except OSError: pass
seen = []
for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
    try: seen.append(path.read_bytes())
    except OSError: pass
pathlib.Path('submission.csv').write_text(str(any(b'a-secret-key' in text for text in seen)))
"""
    built = own.build()
    rewrite(built, code)
    report = rehearse(built, own.competition, own.home, isolation=isolation, keep=tmp_path / "kept")
    assert [path for path in outside if path.exists()] == []
    assert (tmp_path / "kept" / "submission.csv").read_text() == "False"
    if isolation == "prefix":
        assert "it writes outside its folders" in report.failures[0]


@pytest.mark.skipif(not sandbox.available(), reason="no user namespaces here")
def test_use_of_the_network_outside_python_is_seen_too(own: World) -> None:
    built = own.build()
    code = "import subprocess\nsubprocess.run(['bash', '-c', 'echo x > /dev/udp/192.0.2.1/53'], stderr=subprocess.DEVNULL)\n"
    rewrite(built, code)
    report = rehearse(built, own.competition, own.home, isolation="namespaces")
    assert "network" in report.failures[0]


def test_a_kernel_over_its_limit_is_stopped(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    built, wait = own.build(), sandbox.wait
    rewrite(built, "import time\ntime.sleep(600)\n")
    edit_stamp(built.folder / "build.json", budget_minutes=0)
    monkeypatch.setattr(sandbox, "wait", lambda process, limit: wait(process, limit - 19))  # of the 20 s that a start may take
    report = rehearse(built, own.competition, own.home)
    assert "exceeds its time limit" in report.failures[0]
    assert report.seconds < 60


def test_with_a_budget_far_too_small_the_file_is_complete_and_in_time(own: World, tmp_path: Path) -> None:
    built = own.build(minutes=0.01)
    edit_stamp(built.folder / "build.json", budget_minutes=2)  # Python's start takes longer
    report = rehearse(built, own.competition, own.home, keep=tmp_path / "kept")
    assert "exceeds its budget" in report.failures[0]
    check_submission(tmp_path / "kept" / "submission.csv", own.competition)
    with pytest.raises(MelfoldError, match="predicted nothing: its submission holds the prior alone: 0 of 0"):
        check_output(tmp_path / "kept", own.competition)
    kept = record(tmp_path / "kept")
    assert kept["seconds"] - kept["setup_s"] < 20, "Python's start is not counted"


def test_when_time_is_up_after_the_first_pass_the_others_are_left_out(own: World, tmp_path: Path) -> None:
    built = own.build()
    working = lay_out(built, own, tmp_path)

    def clock() -> float:
        done = (working / "melfold.json").exists() and any(p["done"] for p in record(working)["passes"])
        return time.monotonic() + 1e6 * done

    infer(Session(bundle_of(built), tmp_path, time.monotonic(), clock))
    done = [(p["fold"], p["done"]) for p in record(working)["passes"]]
    assert done == [("0", True), ("1", False), ("0", False), ("1", False)]
    check_output(working, own.competition)


def test_when_time_is_up_during_the_log_mels_the_other_clips_keep_the_prior(
    own: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = own.build()
    working = lay_out(built, own, tmp_path)
    budget = 0.93 * 240 * 60

    def clock() -> float:
        """Half of the budget is gone after the first 16 clips."""
        return time.monotonic() + 0.5 * budget * (len(list(tmp_path.glob("tmp/melfold/cache/*/*/*.npy"))) >= 16)

    infer(Session(bundle_of(built), tmp_path, time.monotonic(), clock))
    kept, probs = record(working), read_probs(working / "submission.csv")
    assert (kept["late"], sum(p["done"] for p in kept["passes"])) == (60 - 16, 4)
    assert "NO TIME for more log-mels: 44 clips keep the prior" in capsys.readouterr().out
    assert len(probs.drop_duplicates()) == 16 + 1
    with pytest.raises(MelfoldError, match="no time for all log-mels: 44 of 60 clips keep the prior"):
        check_output(working, own.competition)


@pytest.mark.parametrize("first", [False, True])
def test_a_pass_that_fails_is_left_out_unless_all_fail(
    first: bool, own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = own.build()
    working = lay_out(built, own, tmp_path)
    predict = predict_logits

    def fail(*args: object) -> object:
        if first or any(p["done"] for p in record(working)["passes"]):
            raise RuntimeError("CUDA out of memory")
        return predict(*args)

    monkeypatch.setattr("melfold.learn.predict.predict_logits", fail)
    session = Session(bundle_of(built), tmp_path, time.monotonic())
    if first:
        with pytest.raises(RuntimeError):
            infer(session)
    else:
        infer(session)
        check_output(working, own.competition)
        assert "the kernel did 1 of 4 passes" in caplog.text
    kept = record(working)
    assert [p["done"] for p in kept["passes"]] == [not first, False, False, False]
    assert kept["passes"][1]["error"] == "RuntimeError: CUDA out of memory"
    failures, _, _ = judge_infer(working, built.facts, own.competition, own.home)
    assert failures[0].startswith(f"tiny fold {0 if first else 1}, view 0 fails: RuntimeError: CUDA out of memory")


def test_a_competition_with_other_labels_is_refused(own: World, tmp_path: Path) -> None:
    built = own.build()
    lay_out(built, own, tmp_path)
    sample = next(tmp_path.glob("kaggle/input/competitions/*/sample_submission.csv"))
    header, *rows = sample.read_text().splitlines()
    fname, first, second, *others = header.split(",")
    sample.unlink()
    sample.write_text("\n".join([",".join([fname, second, first, *others]), *rows]) + "\n")
    with pytest.raises(MelfoldError, match="the mounted competition has other labels"):
        infer(Session(bundle_of(built), tmp_path, time.monotonic()))


@pytest.mark.parametrize(("gpu", "seconds", "fits"), [(False, 60, True), (False, 600, False), (True, 600, True)])
def test_what_cannot_predict_the_real_number_of_clips_on_a_cpu_fails(
    gpu: bool, seconds: float, fits: bool, own: World, tmp_path: Path
) -> None:
    """60 clips in 600 s are 3,361 in more than nine hours."""
    shutil.copy(own.home.submissions / "tiny" / "submission.csv", tmp_path)
    done = {"run": "tiny", "fold": "0", "view": 0, "done": True, "seconds": seconds}
    facts = {"clips": 60, "late": 0, "passes": [done], "cache_s": 0, "cache_start_s": 0, "setup_s": 1, "audio_s": 60 * 11}
    (tmp_path / "melfold.json").write_text(json.dumps(facts | {"budget_s": 13_392, "device": "cpu"}))
    built = {"kind": "infer", "id": "tiny", "gpu": gpu, "competition_slug": SLUG}
    failures, _, predicted = judge_infer(tmp_path, built, own.competition, own.home)
    assert predicted["3361"] == pytest.approx(seconds / 60 * 3361, rel=0.01)
    assert [failure[:31] for failure in failures] == ([] if fits else ["it would exceed its budget: 336"])


def test_a_test_clip_that_cannot_be_read_keeps_the_prior(own: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "broken"
    shutil.copytree(own.data, data)
    first, second, *_ = own.competition.test.index
    (data / "test" / first).write_bytes(b"no audio")
    working, failures, _ = run_here(own.build(), replace(own, data=data), tmp_path)
    assert "differ" in failures[0]
    probs = read_probs(working / "submission.csv")
    prior = prior_of(open_prediction(own.home, "tiny"))
    assert (probs.loc[first] == prior[probs.columns]).all()
    assert not (probs.loc[second] == prior[probs.columns]).all()
    assert f"TEST CLIP {first} cannot be read" in capsys.readouterr().out


def test_weights_may_come_from_a_training_kernels_output(own: World, tmp_path: Path) -> None:
    """Its output is not here: the rehearsal takes those of the run itself."""
    built = own.build(source="tester/melfold-train-far-s1")
    assert not built.dataset.exists()
    metadata = json.loads((built.kernel / "kernel-metadata.json").read_text())
    assert (metadata["dataset_sources"], metadata["kernel_sources"]) == ([], ["tester/melfold-train-far-s1"])
    _, failures, equality = run_here(built, own, tmp_path)
    assert (failures, equality) == ([], "the same bytes as at home")


def test_weights_that_are_damaged_on_the_way_are_refused(own: World, tmp_path: Path) -> None:
    built = own.build()
    path = next(built.dataset.glob("*fold0.safetensors"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    restamp(built)
    with pytest.raises(MelfoldError, match="missing or damaged"):
        run_here(built, own, tmp_path)


def test_no_such_submission(own: World) -> None:
    with pytest.raises(MelfoldError, match="no such submission: nosuch"):
        build_infer(own.home, "nosuch", CPU)
