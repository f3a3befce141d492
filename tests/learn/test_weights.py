"""Weights come in through one door: timm's keys and others', wrappers, misfits; and what a fold keeps."""

from __future__ import annotations

import pickle
import re
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from melfold.config import ModelConfig
from melfold.errors import MelfoldError
from melfold.learn.model import Tagger, build_model
from melfold.learn.weights import load_weights, save_weights

N_MELS, FRAMES, LABELS = 64, 64, 5
REAL = Path(__file__).parents[3] / "shared" / "data" / "weights" / "tf_efficientnet_lite0.safetensors"
State = dict[str, torch.Tensor]


def build(name: str = "test_convnext", **fields: object) -> Tagger:
    return build_model(ModelConfig(name=name, **fields), LABELS, N_MELS, FRAMES)


def log_mels(clips: int = 2) -> torch.Tensor:
    return -80 * torch.rand(clips, 1, N_MELS, FRAMES, generator=torch.Generator().manual_seed(0))


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet"])
def test_a_file_of_timms_own_keys_loads_as_timm_loads_it(name: str, suffix: str, tmp_path: Path, no_network: None) -> None:
    file = tmp_path / f"weights{suffix}"
    state = timm.create_model(name).state_dict()
    assert any(v.ndim == 4 and v.shape[1] == 3 for v in state.values())
    if suffix == ".pth":
        torch.save({"state_dict": state}, file)
    else:
        save_file(state, file)
    overlay = {"file": str(file), "num_classes": 1000}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=0)
    assert_same_state(build(name, weights=f"file:{file}").backbone, theirs)


@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL}")
def test_real_pretrained_weights_load(no_network: None) -> None:
    overlay = {"file": str(REAL)}
    name = "tf_efficientnet_lite0"
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=0)
    ours = build(name, weights=f"file:{REAL}").backbone
    assert_same_state(ours, theirs)
    with torch.inference_mode():
        x = log_mels() / 20
        torch.testing.assert_close(ours.eval().forward_features(x), theirs.eval().forward_features(x), atol=1e-3, rtol=1e-3)


def test_a_misfit_names_keys_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    state = timm.create_model("test_convnext").state_dict()
    state["head.norm.extra"] = torch.zeros(1)
    del state["stem.0.bias"]
    state["stem.1.weight"] = torch.zeros(7)
    save_file(state, file)
    with pytest.raises(MelfoldError) as caught:
        build(weights=f"file:{file}")
    for part in ("weights.safetensors does not fit test_convnext", "stem.0.bias", "head.norm.extra", "stem.1.weight (7,) for"):
        assert part in str(caught.value)
    assert len(caught.value.lines) == 1


class _Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_weights_file_is_never_unpickled(plain_pickle: bool, tmp_path: Path) -> None:
    file, touched = tmp_path / "weights.pth", tmp_path / "touched"
    if plain_pickle:
        file.write_bytes(pickle.dumps({"stem.0.bias": _Evil(touched)}))
    else:
        torch.save({"stem.0.bias": _Evil(touched)}, file)
    with pytest.raises(MelfoldError, match="weights"):
        build(weights=f"file:{file}")
    assert not touched.exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_broken_or_missing_weights_file_is_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    with pytest.raises(MelfoldError, match="no such weights file"):
        build(weights=f"file:{file}")
    file.write_bytes(content)
    with pytest.raises(MelfoldError, match=f"weights{suffix}"):
        build(weights=f"file:{file}")


def drawn_state(name: str, seed: int = 0, **kwargs: object) -> State:
    """timm's keys, every tensor drawn anew, so that no key can pass for another."""
    generator = torch.Generator().manual_seed(seed)
    state = timm.create_model(name, **kwargs).state_dict()
    return {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for k, v in state.items()}


def facebook_keys(state: State) -> State:
    """A ConvNeXt's weights under the names, and with the shapes, of its authors' own release."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if "pwconv" in key and value.ndim == 4:
            value = value[:, :, 0, 0]
        renamed[key] = value.contiguous()
    return renamed


def timms_own(state: State, name: str) -> torch.nn.Module:
    """The backbone as timm makes it of a state with its own keys."""
    overlay = {"state_dict": dict(state), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=0)


@pytest.mark.parametrize("name", ["test_convnext", "convnext_atto"])
@pytest.mark.parametrize("wrapper", ["model", "safetensors"])
def test_facebooks_names_of_a_convnext_load_as_timms(name: str, wrapper: str, tmp_path: Path, no_network: None) -> None:
    state = drawn_state(name)
    theirs = facebook_keys(state)
    assert {
        "downsample_layers.0.0.weight",
        "stages.0.0.dwconv.weight",
        "stages.0.0.pwconv1.weight",
        "norm.weight",
    } < theirs.keys()
    if wrapper == "model":
        torch.save({"model": theirs}, file := tmp_path / "convnext_22k.pth")
    else:
        save_file(theirs, file := tmp_path / "convnext_22k.safetensors")
    assert_same_state(build(name, weights=f"file:{file}").backbone, timms_own(state, name))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes_are_taken_off(wrapper: str, prefix: str, tmp_path: Path, no_network: None) -> None:
    state = drawn_state("test_resnet")
    prefixed = {f"{prefix}{key}": value for key, value in state.items()}
    torch.save({wrapper: prefixed, "epoch": 3, "arch": "test_resnet"}, file := tmp_path / "checkpoint.pth")
    assert_same_state(build("test_resnet", weights=f"file:{file}").backbone, timms_own(state, "test_resnet"))


def test_the_averaged_copy_is_taken_where_there_is_one(tmp_path: Path, no_network: None) -> None:
    last, averaged = drawn_state("test_resnet", 1), drawn_state("test_resnet", 2)
    torch.save({"state_dict": last, "state_dict_ema": averaged}, file := tmp_path / "checkpoint.pth")
    assert_same_state(build("test_resnet", weights=f"file:{file}").backbone, timms_own(averaged, "test_resnet"))


def test_a_prefix_in_safetensors_is_taken_off_too(tmp_path: Path, no_network: None) -> None:
    state = drawn_state("test_resnet")
    save_file({f"module.{key}": value for key, value in state.items()}, file := tmp_path / "w.safetensors")
    assert_same_state(build("test_resnet", weights=f"file:{file}").backbone, timms_own(state, "test_resnet"))


@pytest.mark.parametrize("keys", ["timm", "facebook"])
def test_a_plain_convnext_does_not_fit_an_overlapping_stem(keys: str, tmp_path: Path) -> None:
    state = drawn_state("test_convnext")
    save_file(state if keys == "timm" else facebook_keys(state), file := tmp_path / "plain.safetensors")
    with pytest.raises(MelfoldError, match="plain.safetensors does not fit test_convnext: .*stem") as caught:
        build(weights=f"file:{file}", kwargs={"stem_type": "overlap_tiered"})
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)


def test_facebooks_names_for_another_family_are_one_line(tmp_path: Path) -> None:
    save_file(facebook_keys(drawn_state("test_convnext")), file := tmp_path / "w.safetensors")
    for name in ("test_resnet", "convnext_atto", "test_efficientnet"):
        with pytest.raises(MelfoldError, match=f"w.safetensors does not fit {name}: ") as caught:
            build(name, weights=f"file:{file}")
        assert len(caught.value.lines) == 1


def test_the_pretrained_norm_behind_a_convnext_is_used(tmp_path: Path, no_network: None) -> None:
    state = drawn_state("test_convnext")
    save_file(facebook_keys(state), file := tmp_path / "w.safetensors")
    model = build(weights=f"file:{file}", head="norm_linear").eval()
    with torch.inference_mode():
        features = model.backbone.forward_features(model.normalise(log_mels())).mean(dim=2)
        pooled = features.mean(dim=2) + features.amax(dim=2)
        weight, bias = state["head.norm.weight"], state["head.norm.bias"]
        normed = torch.nn.functional.layer_norm(pooled, pooled.shape[1:], weight, bias, 1e-6)
        torch.testing.assert_close(model(log_mels()), model.head(normed), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.kept()["backbone.head.norm.weight"], weight)


@pytest.mark.parametrize("values", [{"a": torch.zeros(1), "b": 3}, [torch.zeros(1)], {"state_dict": {"a": "text"}}])
def test_a_file_of_something_else_than_named_tensors_is_refused(values: object, tmp_path: Path) -> None:
    torch.save(values, file := tmp_path / "w.pth")
    with pytest.raises(MelfoldError, match="a weights file must hold .*Save it as safetensors") as caught:
        build(weights=f"file:{file}")
    assert len(caught.value.lines) == 1


def test_statistics_travel_with_the_weights(tmp_path: Path) -> None:
    model = build("test_resnet").eval()
    model.normalise.set(-33, 11)
    save_weights(tmp_path / "w.safetensors", model.kept())
    other = build("test_resnet").eval()
    load_weights(tmp_path / "w.safetensors", other)
    assert (float(other.normalise.mean), float(other.normalise.std)) == (-33, 11)
    with torch.inference_mode():
        assert torch.equal(other(log_mels()), model(log_mels()))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", build("test_resnet").kept())
    with pytest.raises(MelfoldError, match="does not fit its recipe"):
        load_weights(tmp_path / "w.safetensors", build("test_convnext"))


def test_the_hub_is_asked_only_for_hub_weights(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert build("test_resnet.r160_in1k", weights="none").head.in_features == 96
    hub = ModelConfig(name="test_resnet.r160_in1k", weights="hub")
    assert build_model(hub, LABELS, N_MELS, FRAMES, initial=False).head.in_features == 96
