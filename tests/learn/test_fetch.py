"""Weights from the hub: fetched once, checked, kept; and what happens without a network."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from hub_standin import REVISION, Hub, serve
from safetensors.torch import save
from typer.testing import CliRunner

from melfold.cli.main import app
from melfold.config import ModelConfig
from melfold.errors import MelfoldError
from melfold.files import Home, read_json, sha256_file
from melfold.learn.fetch import HubFile, fetch, first_weights, first_weights_sha256, hub_file, recipe_named, share_weights
from melfold.learn.model import build_model
from melfold.learn.provenance import licence_of

NAME = "test_convnext.r160_in1k"
REPO = "timm/test_convnext.r160_in1k"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.files[f"{REPO}/model.safetensors"] = save(timm.create_model("test_convnext").state_dict())
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_the_hubs_weights_of_a_timm_name_are_downloaded_once(hub: Hub, home: Home) -> None:
    config = ModelConfig(name=NAME, weights="hub")
    file = hub_file(config)
    assert file == HubFile(REPO, "model.safetensors", "apache-2.0")
    seen: list[tuple[int, int]] = []
    fetched = fetch(file, home, lambda done, total, text: seen.append((done, total)))
    assert fetched.path.read_bytes() == hub.files[f"{REPO}/model.safetensors"]
    assert fetched.path == home.root / "weights" / "timm--test_convnext.r160_in1k" / "model.safetensors"
    assert fetched.licence == "apache-2.0"
    assert seen
    assert seen[-1][0] == seen[-1][1]
    assert read_json(fetched.path.with_suffix(".json"))["revision"] == REVISION
    asked = len(hub.asked)
    assert fetch(file, home) == fetched
    assert first_weights(config, home) == fetched.path
    assert first_weights_sha256(config, home) == fetched.sha256
    assert len(hub.asked) == asked, "a second time nothing is asked"


def test_a_model_starts_from_them_as_timm_would_load_them(hub: Hub, home: Home) -> None:
    state = timm.create_model("test_convnext").state_dict()
    hub.files[f"{REPO}/model.safetensors"] = save(state)
    torch.manual_seed(0)
    ours = build_model(ModelConfig(name=NAME, weights="hub"), 5, 64, 64, home=home).backbone.state_dict()
    theirs = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": state, "num_classes": 1000}, in_chans=1, num_classes=0
    ).state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


def test_a_repository_is_named_with_or_without_its_file(hub: Hub, home: Home) -> None:
    content = hub.files[f"{REPO}/model.safetensors"]
    hub.files |= {"someone/audio-tagger/model.safetensors": content, "someone/audio-tagger/sub/other.safetensors": content}
    hub.licences["someone/audio-tagger"] = "mit"
    for weights, file in (("hf:someone/audio-tagger", "model"), ("hf:someone/audio-tagger/sub/other.safetensors", "sub/other")):
        config = ModelConfig(name="test_convnext", weights=weights)
        assert first_weights(config, home) == home.root / "weights/someone--audio-tagger" / f"{file}.safetensors"
        assert fetch(hub_file(config), home).licence == "mit"
        recipe = recipe_named(weights)
        assert (licence_of(recipe, home), licence_of(recipe)) == ("mit", "unknown")
        assert build_model(config, 5, 64, 64, home=home).head.out_features == 5


def test_an_unknown_licence_is_said_to_be_unknown(hub: Hub, home: Home) -> None:
    hub.files["someone/secret/model.safetensors"] = b"x"
    assert fetch(HubFile("someone/secret"), home).licence == "unknown"


def test_a_file_or_repository_that_is_not_there_is_named(hub: Hub, home: Home) -> None:
    for file in (HubFile(REPO, "missing.safetensors"), HubFile("nobody/nothing")):
        with pytest.raises(MelfoldError, match=f"the hub has no such file: {file}") as caught:
            fetch(file, home)
        assert len(caught.value.lines) == 1
    assert not list((home.root / "weights").rglob("*.safetensors"))


def test_a_damaged_download_is_not_kept(hub: Hub, home: Home) -> None:
    hub.damaged = True
    with pytest.raises(MelfoldError, match="damaged on its way"):
        fetch(HubFile(REPO), home)
    assert not [p for p in (home.root / "weights").rglob("*") if p.is_file() and p.name != ".lock"]
    hub.damaged = False
    assert fetch(HubFile(REPO), home).path.is_file()


def test_a_copy_that_was_changed_is_downloaded_again(hub: Hub, home: Home) -> None:
    path = fetch(HubFile(REPO), home).path
    path.write_bytes(b"something else")
    assert fetch(HubFile(REPO), home).path.read_bytes() == hub.files[f"{REPO}/model.safetensors"]


@pytest.mark.parametrize("network", ["absent", "silent"])
def test_without_a_network_it_fails_at_once_and_names_the_command(
    network: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if network == "silent":
            silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(MelfoldError, match=f"melfold weights fetch hf:{REPO}/model.safetensors") as caught:
            build_model(ModelConfig(name=NAME, weights="hub"), 5, 64, 64, home=home)
    assert time.monotonic() - began < 5
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)


def test_fetched_weights_need_no_network(hub: Hub, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(HubFile(REPO), home)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert build_model(ModelConfig(name=NAME, weights="hub"), 5, 64, 64, home=home).head.out_features == 5


def test_a_model_that_timm_has_no_hub_weights_for_is_refused() -> None:
    with pytest.raises(MelfoldError, match="timm knows no weights on the hub for this model: gcvit_tiny"):
        hub_file(ModelConfig(name="gcvit_tiny.in1k", weights="hub"))


def test_what_can_be_fetched_is_a_recipe_a_repository_or_a_timm_name() -> None:
    assert hub_file(recipe_named("audioset").model) == HubFile("topel/ConvNeXt-Tiny-AT")
    assert hub_file(recipe_named("hf:a/b/c/d.pth").model) == HubFile("a/b", "c/d.pth")
    assert hub_file(recipe_named(NAME).model).repo == REPO
    assert hub_file(recipe_named("scratch").model) is None
    with pytest.raises(MelfoldError, match="no weights of this name: convnext_tinny. Did you mean"):
        recipe_named("convnext_tinny")
    with pytest.raises(MelfoldError, match="needs none, hub, hf:OWNER/REPO"):
        recipe_named("hf:../x")


def test_another_home_can_use_the_same_weights(hub: Hub, home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "build" / "dry-run")
    share_weights(home, other)
    path = fetch(HubFile(REPO), home).path
    found = first_weights(ModelConfig(name=NAME, weights="hub"), other)
    assert found is not None
    assert found.samefile(path)


def test_the_command_says_what_was_fetched(hub: Hub, home: Home) -> None:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["weights", "fetch", *words, "--home", str(home.root)])

    found = run(NAME)
    path = HubFile(REPO).path(home)
    assert (found.exit_code, found.stdout.split()[0]) == (0, str(path))
    assert f"licence apache-2.0, trained on ImageNet-1k, sha256 {sha256_file(path)}" in found.stdout
    asked = len(hub.asked)
    again = json.loads(run(NAME, "--json").stdout)
    assert again["sha256"] == sha256_file(path)
    assert (again["path"], again["seen"]) == (str(path), ["ImageNet-1k"])
    assert len(hub.asked) == asked
    hub.files["someone/tagger.fsd50k/model.safetensors"] = b"x"
    assert "may have seen clips of this competition: data sets FSD50K" in run("hf:someone/tagger.fsd50k").stderr
    refused = run("scratch")
    assert refused.exit_code == 2
    assert "recipe scratch needs no download: model.weights = none" in refused.stderr
