"""The tagger: its layers for layer decay, the backbones it takes, and weights from files."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2

from melfold.config import ModelConfig
from melfold.errors import MelfoldError
from melfold.learn.model import Tagger, build_model, load_weights, save_weights

N_MELS, FRAMES, LABELS = 64, 64, 5
REAL = Path(__file__).parents[3] / "shared" / "data" / "weights" / "tf_efficientnet_lite0.safetensors"


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


@pytest.mark.parametrize(
    ("name", "first"),
    [("convnext_atto", "stem."), ("tf_efficientnet_lite0", "conv_stem."), ("resnet10t", "conv1."), ("test_convnext", "stem.")],
)
def test_layer_decay_slows_early_layers(name: str, first: str) -> None:
    model = build(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {key: scale[id(p)] for key, p in model.named_parameters()}
    assert scales["head.weight"] == scales["head.bias"] == 1.0
    stem = {s for key, s in scales.items() if key.startswith(f"backbone.{first}")}
    assert stem == {min(scales.values())}
    assert len(set(scales.values())) > 3
    assert max(s for key, s in scales.items() if key.startswith("backbone.")) <= 1.0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_vit", "test_mambaout"])
def test_a_backbone_without_a_feature_map_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(MelfoldError, match=f"{name} (refuses|gives no feature map)") as caught:
        build(name)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)


def test_the_width_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def lying(*args: object, **kwargs: object) -> torch.nn.Module:
        backbone = make(*args, **kwargs)
        backbone.num_features += 1
        return backbone

    monkeypatch.setattr(timm, "create_model", lying)
    model = build("mobilenetv4_conv_small")
    assert model.head.in_features == model.backbone.num_features - 1
    assert model(log_mels()).shape == (2, LABELS)


@pytest.mark.parametrize("pool", ["mean", "mean_max"])
@pytest.mark.parametrize("head", ["linear", "norm_linear"])
def test_pooling_is_over_frequency_then_time(pool: str, head: str) -> None:
    model = build(pool=pool, head=head).eval()
    model.mean.fill_(-40)
    model.std.fill_(20)
    with torch.inference_mode():
        features = model.backbone.forward_features((log_mels() + 40) / 20).mean(dim=2)
        pooled = features.mean(dim=2) + (features.amax(dim=2) if pool == "mean_max" else 0)
        expected = model.head(torch.nn.functional.layer_norm(pooled, pooled.shape[1:]) if head == "norm_linear" else pooled)
        torch.testing.assert_close(model(log_mels()), expected, atol=1e-4, rtol=1e-4)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(MelfoldError, match="unknown model: resnet1"):
        build("resnet1")


def test_refused_arguments_say_why() -> None:
    with pytest.raises(MelfoldError, match="timm refuses test_convnext: .*no_such_argument"):
        build(kwargs={"no_such_argument": 1})


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


def test_a_frozen_backbone_stays_as_it_is() -> None:
    model = build("test_resnet", frozen=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("backbone.")}
    model(log_mels()).sum().backward()
    assert {k for k, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert any("running_mean" in k for k in before)


def test_statistics_travel_with_the_weights(tmp_path: Path) -> None:
    model = build("test_resnet").eval()
    model.mean.fill_(-33)
    model.std.fill_(11)
    save_weights(tmp_path / "w.safetensors", model)
    other = build("test_resnet").eval()
    load_weights(tmp_path / "w.safetensors", other)
    assert (float(other.mean), float(other.std)) == (-33, 11)
    with torch.inference_mode():
        assert torch.equal(other(log_mels()), model(log_mels()))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", build("test_resnet"))
    with pytest.raises(MelfoldError, match="does not fit its recipe"):
        load_weights(tmp_path / "w.safetensors", build("test_convnext"))


def test_the_hub_is_asked_only_for_hub_weights(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert build("test_resnet.r160_in1k", weights="none").head.in_features == 96
    hub = ModelConfig(name="test_resnet.r160_in1k", weights="hub")
    assert build_model(hub, LABELS, N_MELS, FRAMES, initial=False).head.in_features == 96
