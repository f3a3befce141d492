"""Weights of other people's files: copies, prefixes, axes, and norms in front of and behind the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from melfold.config import ModelConfig
from melfold.errors import MelfoldError
from melfold.learn.model import Tagger, build_model

N_MELS, FRAMES = 64, 96
State = dict[str, torch.Tensor]


def drawn_state(name: str, seed: int = 0, **kwargs: object) -> State:
    """timm's keys, every tensor drawn anew, so that no key can pass for another."""
    generator = torch.Generator().manual_seed(seed)
    state = timm.create_model(name, **kwargs).state_dict()
    return {
        k: 0.3 * torch.randn(v.shape, generator=generator) if v.is_floating_point() and v.ndim else v for k, v in state.items()
    }


def build(name: str, file: Path, **fields: object) -> Tagger:
    return build_model(ModelConfig(name=name, weights=f"file:{file}", **fields), 5, N_MELS, FRAMES).eval()


def holds(model: Tagger, state: State) -> bool:
    own = model.backbone.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own)


@pytest.mark.parametrize("prefix", ["model_ema.", "state_dict_ema.", "ema."])
def test_in_safetensors_too_the_averaged_copy_is_taken(prefix: str, tmp_path: Path) -> None:
    last, averaged = drawn_state("test_resnet", 1, in_chans=1), drawn_state("test_resnet", 2, in_chans=1)
    both = {f"model.{key}": value for key, value in last.items()} | {f"{prefix}{key}": v for key, v in averaged.items()}
    save_file(both, file := tmp_path / "w.safetensors")
    assert holds(build("test_resnet", file), averaged)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.model.", "_orig_mod.module."])
def test_prefixes_that_all_names_share_are_taken_off(prefix: str, tmp_path: Path) -> None:
    state = drawn_state("test_resnet", in_chans=1)
    save_file({f"{prefix}{key}": value for key, value in state.items()}, file := tmp_path / "w.safetensors")
    assert holds(build("test_resnet", file), state)


def test_wrappers_within_wrappers_are_taken_off(tmp_path: Path) -> None:
    state = drawn_state("test_resnet", in_chans=1)
    torch.save({"epoch": 3, "state_dict": {"model": {f"module.{k}": v for k, v in state.items()}}}, file := tmp_path / "w.pth")
    assert holds(build("test_resnet", file), state)


def test_a_stem_for_one_channel_is_loaded_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(drawn_state("test_convnext", in_chans=1), file := tmp_path / "w.safetensors")
    build("test_convnext", file)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_kernels_that_saw_time_first_are_transposed(tmp_path: Path) -> None:
    state = drawn_state("test_convnext", in_chans=1)
    save_file(state, file := tmp_path / "w.safetensors")
    x = torch.randn(2, 1, N_MELS, FRAMES, generator=torch.Generator().manual_seed(0))
    as_they_are, turned = build("test_convnext", file), build("test_convnext", file, axes="time_mel")
    with torch.inference_mode():
        theirs = as_they_are.backbone.forward_features(x.transpose(2, 3)).transpose(2, 3)
        torch.testing.assert_close(turned.backbone.forward_features(x), theirs, atol=1e-5, rtol=1e-4)


def test_a_vit_that_saw_time_first_keeps_its_positions(tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit2", in_chans=1, num_classes=0, img_size=(FRAMES, N_MELS), reg_tokens=0).eval()
    theirs.load_state_dict(drawn_state("test_vit2", in_chans=1, num_classes=0, img_size=(FRAMES, N_MELS), reg_tokens=0))
    save_file(theirs.state_dict(), file := tmp_path / "w.safetensors")
    ours = build("test_vit2", file, axes="time_mel", kwargs={"reg_tokens": 0})
    x = torch.randn(2, 1, N_MELS, FRAMES, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.forward_intermediates(x.transpose(2, 3), indices=1, norm=True, intermediates_only=True)[-1]
        torch.testing.assert_close(ours.features(x), expected.transpose(2, 3), atol=1e-5, rtol=1e-4)


def test_positions_that_do_not_make_a_grid_are_refused(tmp_path: Path) -> None:
    state = drawn_state("test_vit", in_chans=1, num_classes=0)
    state["pos_embed"] = state["pos_embed"][:, :12]
    save_file(state, file := tmp_path / "w.safetensors")
    with pytest.raises(MelfoldError, match="11 positions for 4 rows of 64 mel bands"):
        build("test_vit", file, axes="time_mel")


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_weights_of_square_images_fit_log_mels(name: str, tmp_path: Path) -> None:
    small = {} if name == "test_vit" else {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16}
    save_file(timm.create_model(name, **small).state_dict(), file := tmp_path / "w.safetensors")
    model = build(name, file, kwargs=small)
    with torch.inference_mode():
        assert model(torch.randn(2, 1, N_MELS, FRAMES)).shape == (2, 5)


def with_bands(state: State, n_mels: int = N_MELS) -> State:
    draw = torch.Generator().manual_seed(5)
    return state | {
        "bn0.weight": 1 + 0.1 * torch.randn(n_mels, generator=draw),
        "bn0.bias": 0.1 * torch.randn(n_mels, generator=draw),
        "bn0.running_mean": -35 + 8 * torch.randn(n_mels, generator=draw),
        "bn0.running_var": 250 + 40 * torch.rand(n_mels, generator=draw),
        "bn0.num_batches_tracked": torch.tensor(7),
    }


def test_a_norm_of_the_bands_is_only_used_if_asked_for(tmp_path: Path) -> None:
    save_file(with_bands(drawn_state("test_convnext", in_chans=1)), file := tmp_path / "w.safetensors")
    assert build("test_convnext", file).normalise.mean.shape == ()
    bands = build("test_convnext", file, normalise="band").normalise
    assert (bands.mean.shape, float(bands.mean.abs().max())) == ((N_MELS,), 0)
    norm = build("test_convnext", file, normalise="checkpoint").normalise
    x = -80 * torch.rand(2, 1, N_MELS, 7)
    theirs = torch.nn.BatchNorm1d(N_MELS).eval()
    theirs.load_state_dict({k.removeprefix("bn0."): v for k, v in with_bands({}).items()})
    torch.testing.assert_close(norm(x)[:, 0], theirs(x[:, 0]))


def test_a_norm_of_the_bands_that_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    plain = drawn_state("test_convnext", in_chans=1)
    save_file(plain, file := tmp_path / "w.safetensors")
    with pytest.raises(MelfoldError, match="these weights hold no input normalisation: no bn0.running_mean"):
        build("test_convnext", file, normalise="checkpoint")
    save_file(with_bands(plain, 224), file)
    with pytest.raises(MelfoldError, match=r"its bn0 has the shape \(224,\), the recipe 64 mel bands"):
        build("test_convnext", file, normalise="checkpoint")


def test_self_supervised_files_may_lack_the_final_norm_but_others_may_not(tmp_path: Path) -> None:
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    state = drawn_state("convnextv2_atto", in_chans=1, num_classes=0, **kwargs)
    cut = {k: v for k, v in state.items() if not k.startswith("head.norm.")}
    save_file(cut, file := tmp_path / "w.safetensors")
    model = build("convnextv2_atto.fcmae", file, kwargs=kwargs, head="norm_linear")
    assert holds(model, cut | {"head.norm.weight": torch.ones(8), "head.norm.bias": torch.zeros(8)})
    with pytest.raises(MelfoldError, match=r"2 keys missing \(head.norm.weight, head.norm.bias\)"):
        build("convnextv2_atto.fcmae_ft_in1k", file, kwargs=kwargs)


@pytest.mark.parametrize("weights", ["hub:x", "hf:", "hf:a", "hf:a/../b", "hf:a/b/.hidden", "file:", "run"])
def test_other_words_for_weights_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="needs none, hub, hf:OWNER/REPO"):
        ModelConfig(weights=weights)


def test_a_norm_from_the_weights_needs_weights() -> None:
    for weights in ("none", "hub"):
        with pytest.raises(ValueError, match="needs a weights file with a bn0"):
            ModelConfig(weights=weights, normalise="checkpoint")
