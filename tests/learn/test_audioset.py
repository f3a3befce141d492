"""AudioSet's ConvNeXt: held against the authors' own network where its material is, and against a small twin anywhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import timm
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from melfold.config import ModelConfig
from melfold.data.arrays import make_clip, npy_path
from melfold.data.logmel import log_mel_of
from melfold.learn.model import Tagger, build_model
from melfold.learn.provenance import freesound_warning, licence_of, seen_data
from melfold.recipes import load_recipe

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "audioset_convnext" / "golden.npz"))


@pytest.fixture(scope="module")
def tagger(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    """The recipe's model with the synthetic checkpoint."""
    made = runpy.run_path(str(shared / "audioset_convnext" / "synthetic_checkpoint.py"))["state"]()
    file = tmp_path_factory.mktemp("audioset") / "model.safetensors"
    save_arrays(made, file)
    recipe = load_recipe("audioset", [f"model.weights=file:{file}"])
    return build_model(recipe.model, 80, recipe.logmel.n_mels, recipe.crop_frames).eval()


def batch(log_mel: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(log_mel).float().T[None, None]


def test_it_gives_what_the_authors_network_gives(tagger: Tagger, golden: dict[str, np.ndarray]) -> None:
    with torch.inference_mode():
        normalised = tagger.normalise(batch(golden["log_mel"]))[0, 0].T
        features = tagger.features(batch(golden["log_mel"]))
        pooled = tagger.pool(features)
        embedding = tagger.embed(pooled)
    np.testing.assert_allclose(normalised, golden["normalised"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features[0].transpose(1, 2), golden["features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(pooled[0], golden["pooled"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(embedding[0], golden["embedding"], rtol=0, atol=1e-4)


def test_from_the_waveform_through_the_cache_it_is_close(tagger: Tagger, golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    front = load_recipe("audioset").logmel
    soundfile.write(tmp_path / "clip.wav", golden["waveform"], front.sr, subtype="FLOAT")
    make_clip(tmp_path, "clip.wav", tmp_path / "clip.wav", log_mel_of(front))
    cached = np.load(npy_path(tmp_path, "clip.wav"))
    assert cached.dtype == np.float16
    np.testing.assert_allclose(cached[2:-2], golden["log_mel"][2:-2], rtol=0, atol=0.03)  # the ends are padded differently
    with torch.inference_mode():
        found = tagger.embed(tagger.pool(tagger.features(batch(cached))))[0].numpy()
    assert np.linalg.norm(found - golden["embedding"]) < 1e-2 * np.linalg.norm(golden["embedding"])
    assert np.abs(found - golden["embedding"]).max() < 1e-2 * np.abs(golden["embedding"]).max()


N_MELS, SMALL = 32, {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def twin_file(path: Path) -> tuple[State, State]:
    """A tiny ConvNeXt as the authors' file has it, and the same under timm's keys (time x mel still)."""
    draw = torch.Generator().manual_seed(3)
    state = timm.create_model("convnext_tiny", in_chans=1, num_classes=0, **SMALL).state_dict()
    state = {k: (v.ndim == 1 and k.endswith("weight")) + 0.3 * torch.randn(v.shape, generator=draw) for k, v in state.items()}
    theirs = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key.replace("head.norm.", "norm."))
        key = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"stages\.(\d)\.blocks\.", r"stages.\1.", key)
        theirs[key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")] = value
    theirs |= {
        "spectrogram_extractor.stft.conv_real.weight": torch.zeros(9, 1, 16),
        "logmel_extractor.melW": torch.zeros(9, N_MELS),
        "bn0.weight": torch.linspace(0.5, 1.5, N_MELS),
        "bn0.bias": torch.linspace(-1, 1, N_MELS),
        "bn0.running_mean": torch.linspace(-60, -20, N_MELS),
        "bn0.running_var": torch.linspace(100, 400, N_MELS),
        "bn0.num_batches_tracked": torch.tensor(9),
        "head_audioset.weight": torch.zeros(527, 32),
        "head_audioset.bias": torch.zeros(527),
    }
    save_file(theirs, path)
    return theirs, state


def twin_embedding(theirs: State, state: State, log_mels: torch.Tensor) -> torch.Tensor:
    """What such a network computes, time first, with a stem that pads 4 frames. Args: log_mels: `(clips, frames, n_mels)`."""
    norm = nn.BatchNorm2d(N_MELS).eval()
    norm.load_state_dict({k.removeprefix("bn0."): v for k, v in theirs.items() if k.startswith("bn0.")})
    x = norm(log_mels[:, None].transpose(1, 3)).transpose(1, 3)
    network = timm.create_model("convnext_tiny", in_chans=1, num_classes=0, **SMALL).eval()
    network.load_state_dict(state)
    network.stem[0].padding = (4, 0)
    x = network.forward_features(x).mean(dim=3)
    x = x.amax(dim=2) + x.mean(dim=2)
    return functional.layer_norm(x, (32,), theirs["norm.weight"], theirs["norm.bias"], 1e-6)


@pytest.mark.parametrize("frames", [100, 101, 130])
def test_a_small_twin_under_the_authors_names_gives_the_same(frames: int, tmp_path: Path) -> None:
    theirs, state = twin_file(file := tmp_path / "twin.safetensors")
    config = load_recipe("audioset").model.model_copy(update={"weights": f"file:{file}", "kwargs": SMALL})
    model = build_model(config, 5, N_MELS, frames).eval()
    log_mels = -80 * torch.rand(2, frames, N_MELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model.embed(model.pool(model.features(log_mels.transpose(1, 2)[:, None])))
        torch.testing.assert_close(found, twin_embedding(theirs, state, log_mels), atol=1e-4, rtol=1e-4)


def test_the_recipe_says_where_its_weights_come_from() -> None:
    recipe = load_recipe("audioset")
    assert (recipe.track, licence_of(recipe), seen_data(recipe), freesound_warning(recipe)) == ("open", "mit", ("AudioSet",), "")
    assert recipe.logmel.top_db is None
    assert recipe.crop_frames == 1000


def test_open_is_another_name_of_imagenet() -> None:
    recipe, alias = load_recipe("imagenet"), load_recipe("open")
    assert recipe.fingerprint() == alias.fingerprint()
    assert recipe.predict == alias.predict
    assert seen_data(recipe) == ("ImageNet-1k", "ImageNet-21k")
    assert licence_of(recipe) == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "weights", "seen", "warns"),
    [
        ("convnext_tiny", "none", (), False),
        ("vit_base_patch16_224", "hf:gaunernst/vit_base_patch16_1024_128.audiomae_as2m_ft_as20k", ("AudioSet",), False),
        ("convnext_tiny.fb_in1k", "file:w.safetensors", ("ImageNet-1k",), False),
        ("convnext_tiny", "file:w.safetensors", ("unknown",), True),
        ("convnext_tiny", "hf:someone/tagger.fsd50k", ("FSD50K",), True),
        ("tf_efficientnet_b0.ns_jft_in1k", "hub", ("ImageNet-1k", "JFT"), False),
        ("vit_small_patch14_dinov2.lvd142m", "hub", ("LVD-142M",), False),
    ],
)
def test_what_weights_have_seen_is_named(name: str, weights: str, seen: tuple[str, ...], warns: bool) -> None:
    recipe = load_recipe("scratch")
    recipe = recipe.model_copy(update={"model": ModelConfig(name=name, weights=weights)})
    assert seen_data(recipe) == seen
    assert bool(freesound_warning(recipe)) == warns
    named = recipe.model_copy(update={"model": ModelConfig(name=name, weights=weights, seen=("WavCaps",))})
    assert seen_data(named) == (() if weights == "none" else ("WavCaps",))
    assert bool(freesound_warning(named)) == (weights != "none")


def test_nothing_is_cut_off_below_the_peak_without_top_db() -> None:
    front = load_recipe("audioset").logmel
    waveform = np.zeros(32_000, np.float32)
    waveform[:1600] = np.sin(np.arange(1600) / 3)
    log_mel = log_mel_of(front)(waveform)
    assert log_mel.min() == pytest.approx(-100)
    assert log_mel.max() - log_mel.min() > 100
    assert log_mel_of(front.model_copy(update={"top_db": 80.0}))(waveform).min() == pytest.approx(log_mel.max() - 80)
