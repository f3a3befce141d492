"""The tagger: its layers for layer decay, the backbones it takes, and what it does with log-mels."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from melfold.config import ModelConfig
from melfold.errors import MelfoldError
from melfold.learn.model import Tagger, build_model

N_MELS, FRAMES, LABELS = 64, 64, 5


def build(name: str = "test_convnext", **fields: object) -> Tagger:
    return build_model(ModelConfig(name=name, **fields), LABELS, N_MELS, FRAMES)


def log_mels(clips: int = 2) -> torch.Tensor:
    return -80 * torch.rand(clips, 1, N_MELS, FRAMES, generator=torch.Generator().manual_seed(0))


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
    model.normalise.set(-40, 20)
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


def test_a_frozen_backbone_stays_as_it_is() -> None:
    model = build("test_resnet", frozen=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("backbone.")}
    model(log_mels()).sum().backward()
    assert {k for k, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert any("running_mean" in k for k in before)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_noisy_head_is_for_noisy_clips_and_is_not_kept(frozen: bool) -> None:
    model = build(frozen=frozen).eval()
    curated = model(log_mels(3))
    model.add_noisy_head()
    noisy = torch.tensor([False, True, False])
    with torch.inference_mode():
        logits = model(log_mels(3), noisy)
        torch.testing.assert_close(logits[[0, 2]], curated[[0, 2]])
        assert not torch.allclose(logits[1], curated[1])
        torch.testing.assert_close(model(log_mels(3)), curated)
    assert model.kept().keys() == build().state_dict().keys()


def test_noisy_clips_are_seen_through_their_own_statistics() -> None:
    model = build().eval()
    model.normalise.set(-40, 20)
    model.normalise.set_noisy(-60, 5)
    with torch.inference_mode():
        both = model(log_mels(2), torch.tensor([False, True]))
        curated = model(log_mels(2))
        model.normalise.set(-60, 5)
        as_noisy = model(log_mels(2))
    torch.testing.assert_close(both[0], curated[0])
    torch.testing.assert_close(both[1], as_noisy[1])
    assert not torch.allclose(both[1], curated[1])
    assert not [name for name in model.kept() if "noisy" in name]


def test_the_norm_behind_a_convnext_is_its_own_and_is_trained_and_kept() -> None:
    model = build(head="norm_linear").train()
    assert not [name for name, _ in model.named_parameters() if name.startswith("norm.")], "no second norm"
    norm = {"backbone.head.norm.weight", "backbone.head.norm.bias"}
    assert norm < model.kept().keys()
    model(log_mels()).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert norm <= trained
    with torch.inference_mode():
        before = model.eval()(log_mels())
        model.backbone.head.norm.weight.mul_(2)
        assert not torch.allclose(model(log_mels()), before)


def test_other_backbones_and_a_linear_head_use_no_norm_of_the_backbone() -> None:
    assert {n for n, _ in build("test_resnet", head="norm_linear").named_parameters() if n.startswith("norm.")} == {
        "norm.weight",
        "norm.bias",
    }
    model = build(head="linear").train()
    model(log_mels()).sum().backward()
    assert model.backbone.head.norm.weight.grad is None


def test_the_curated_head_is_the_one_that_is_kept() -> None:
    model = build()
    model.add_noisy_head()
    assert not torch.equal(model.noisy_head.weight, model.head.weight)
    assert torch.equal(model.kept()["head.weight"], model.head.weight)


@pytest.mark.parametrize("setting", ["drop_rate", "drop_path_rate"])
def test_dropout_and_stochastic_depth_act_in_training_only(setting: str) -> None:
    model, plain = build(**{setting: 0.9}), build()
    with torch.inference_mode():
        assert not torch.equal(model.train()(log_mels()), model(log_mels()))
        assert torch.equal(model.eval()(log_mels()), model(log_mels()))
        assert torch.equal(plain.train()(log_mels()), plain(log_mels())), "without either, training repeats itself"
