"""Any timm backbone gives a feature map `(clips, channels, mels, time)`, or is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2

from melfold.compute import Compute
from melfold.config import LogMelConfig, ModelConfig, PredictConfig, Recipe, TrainConfig
from melfold.data.cache import build_cache
from melfold.data.clips import ClipStore
from melfold.data.competition import load_competition
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.batches import train_batches
from melfold.learn.devices import pick_device
from melfold.learn.losses import loss_named
from melfold.learn.model import Tagger, build_model, load_model, try_model
from melfold.learn.phases import Phase
from melfold.learn.predict import predict_probs
from melfold.learn.state import TrainState
from melfold.learn.weights import save_weights

N_MELS, FRAMES = 64, 100
SWIN = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16}
FAMILIES = [
    ("test_vit", {}, "tokens", (4, 8)),
    ("swin_tiny_patch4_window7_224", SWIN, "NHWC", (8, 16)),
    ("test_mambaout", {}, "NHWC", (2, 4)),
    ("test_convnext", {}, "NCHW", (2, 3)),
]


def build(name: str, **fields: object) -> Tagger:
    return build_model(ModelConfig(name=name, **fields), 3, N_MELS, FRAMES).eval()


@pytest.mark.parametrize(("name", "kwargs", "kind", "grid"), FAMILIES)
def test_maps_have_mels_then_time(name: str, kwargs: dict[str, object], kind: str, grid: tuple[int, int]) -> None:
    model = build(name, kwargs=kwargs)
    assert model.layout.kind == kind
    with torch.inference_mode():
        features = model.features(torch.zeros(2, 1, N_MELS, FRAMES))
    assert features.shape == (2, model.layout.channels, *grid)
    assert model.head.in_features == model.layout.channels


@pytest.mark.parametrize(("name", "kwargs", "kind", "grid"), FAMILIES[:3])
def test_a_change_late_in_time_changes_the_maps_late_in_time(
    name: str, kwargs: dict[str, object], kind: str, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = build(name, kwargs=kwargs)
    x = torch.randn(1, 1, N_MELS, 96, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, :, :, 84:] += 5
    with torch.inference_mode():
        difference = (model.features(changed) - model.features(x)).abs().sum(dim=(0, 1, 2))
    assert int(difference.argmax()) >= 84 * len(difference) // 96


@pytest.mark.parametrize(("name", "kwargs", "kind", "grid"), FAMILIES)
def test_windows_of_other_lengths_are_taken(name: str, kwargs: dict[str, object], kind: str, grid: tuple[int, int]) -> None:
    model = build(name, kwargs=kwargs)
    with torch.inference_mode():
        for frames in (61, 150):
            assert model(torch.zeros(1, 1, N_MELS, frames)).shape == (1, 3)


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_layer_decay_and_undecayed_parameters_reach_a_transformer(name: str) -> None:
    model = build(name, kwargs=SWIN if "swin" in name else {})
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scale = {key: groups[id(p)]["lr_scale"] for key, p in model.named_parameters()}
    assert scale["head.weight"] == 1
    assert scale["backbone.patch_embed.proj.weight"] == min(scale.values()) < 0.5
    apart = "backbone.pos_embed" if name == "test_vit" else "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    decay = {key: groups[id(p)]["weight_decay"] for key, p in model.named_parameters()}
    assert decay[apart] == 0
    assert decay["head.weight"] == 0.05


def test_the_final_norm_of_a_vit_with_mean_pooling_is_its_own() -> None:
    model = build("test_vit", head="norm_linear", kwargs={"global_pool": "avg"})
    assert model.backbone_norm
    assert isinstance(model.norm, torch.nn.Identity)
    assert isinstance(build("test_vit", head="norm_linear").norm, torch.nn.LayerNorm), "its norm comes before pooling"


def test_the_norm_of_a_hidden_layer_is_not_taken_for_the_final_one() -> None:
    model = build("inception_next_atto", head="norm_linear")
    assert not model.backbone_norm
    with torch.inference_mode():
        assert model(torch.zeros(2, 1, N_MELS, FRAMES)).shape == (2, 3)


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "nest_tiny", "hf_hub:gaunernst/vit_base_patch16_1024_128.audiomae_as2m"])
def test_a_backbone_that_cannot_give_a_map_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(MelfoldError, match="refuses|gives no feature map|takes names that timm knows") as caught:
        build(name)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)


def test_a_view_that_a_backbone_of_one_size_cannot_take_is_refused_before_training() -> None:
    recipe = Recipe(
        name="fixed",
        logmel=LogMelConfig(sr=16_000, n_fft=512, hop_length=160, n_mels=64, fmax=8_000),
        model=ModelConfig(name="test_vit_relpos"),
        train=TrainConfig(crop_seconds=1),
        predict=PredictConfig(window_seconds=(1, 2)),
    )
    with pytest.raises(MelfoldError, match="test_vit_relpos refuses an input of 1 x 64 x 200"):
        try_model(recipe, 3)
    try_model(recipe.model_copy(update={"predict": PredictConfig()}), 3)


@pytest.mark.parametrize(("name", "kwargs", "kind", "grid"), FAMILIES[:3])
def test_it_trains_an_epoch_and_predicts(
    name: str, kwargs: dict[str, object], kind: str, grid: tuple[int, int], tiny_download: object, tmp_path: Path
) -> None:
    recipe = Recipe(
        name="tiny",
        logmel=LogMelConfig(sr=16_000, n_fft=512, hop_length=160, n_mels=64, fmax=8_000),
        model=ModelConfig(name=name, kwargs=kwargs, head="norm_linear"),
        train=TrainConfig(epochs=1, batch_size=2, crop_seconds=0.5, layer_decay=0.8, ema_decay=0),
        predict=PredictConfig(window_seconds=0.8),  # the weights are those of the crop's length
    )
    competition = load_competition(tiny_download())
    folder = build_cache(competition, recipe.logmel, Home(tmp_path), splits=["curated"], compute=Compute(jobs=1))
    store = ClipStore(folder, list(competition.curated.index), 64, recipe.logmel.top_db)
    device, labels = pick_device("cpu", "off"), list(competition.labels)
    torch.manual_seed(0)
    model = build_model(recipe.model, len(labels), 64, recipe.crop_frames)
    state = TrainState(model, recipe.train, device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    targets, loss_of = competition.targets().to_numpy(), loss_named("bce", {})
    phase = Phase(recipe.train, 0, 4, torch.arange(8).numpy())
    for batch in train_batches(store, [phase], length=recipe.crop_frames, seeds=[0, 0]):
        loss = loss_of(model(device.log_mels(batch.log_mels)), device.tensor(targets[batch.rows]))
        state.scaler.scale(loss).backward()
        assert torch.isfinite(state.update())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"head.weight", "head.bias"} < moved
    assert any(key.startswith("backbone.") for key in moved)
    save_weights(tmp_path / "w.safetensors", model.kept())
    again = load_model(recipe, len(labels), tmp_path / "w.safetensors", device)
    probs = predict_probs(again, store, labels, recipe, device)
    assert probs.shape == (8, len(labels))
    assert probs.equals(predict_probs(model, store, labels, recipe, device))
