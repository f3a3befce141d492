"""Any timm backbone as one that gives a feature map `(clips, channels, mels, time)`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import timm
import torch
from torch import nn
from torch.nn import functional

from melfold.config import ModelConfig
from melfold.errors import MelfoldError, first_line

SIZE_STEP = 32
"""The input of a backbone with a fixed input size is padded to a multiple of this: patches of 16, windows of a 32nd."""


Kind: TypeAlias = Literal["NCHW", "NHWC", "tokens"]


@dataclass(frozen=True)
class Layout:
    """What a backbone gives, and how its input is padded.

    Args:
        kind: `NCHW` or `NHWC` maps, or `tokens` with a grid (ViT), which timm itself can turn into maps.
        channels: of the feature map; some models give another width than they declare.
        step: mels and frames are padded with zeros at the end to a multiple of this.
    """

    kind: Kind
    channels: int = 0
    step: int = 1


def feature_map(backbone: nn.Module, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Normalised log-mels `(clips, 1, n_mels, frames)` -> `(clips, channels, mels, time)`."""
    if layout.step > 1:
        x = functional.pad(x, (0, -x.shape[3] % layout.step, 0, -x.shape[2] % layout.step))
    if layout.kind == "tokens":
        return backbone.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]
    features = backbone.forward_features(x)
    return features.permute(0, 3, 1, 2) if layout.kind == "NHWC" else features


def find_layout(backbone: nn.Module, name: str, n_mels: int, frames: int) -> Layout:
    """How to get a feature map from a backbone, found by trying it once.

    Raises:
        MelfoldError: a backbone that refuses this input, or that gives no feature map.
    """
    step = SIZE_STEP if _has_fixed_size(name) else 1
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            x = torch.zeros(1, 1, n_mels, frames)
            features = feature_map(backbone, x, Layout("NCHW", step=step))
            shape = tuple(features.shape)
            kind: Kind = getattr(backbone, "output_fmt", "NCHW") if len(shape) == 4 else "tokens"
            if kind != "tokens" or hasattr(backbone, "forward_intermediates"):
                features = feature_map(backbone, x, Layout(kind, step=step))
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        fix = "Use another model, other crops, or give its input size in model.kwargs"
        raise MelfoldError(f"{name} refuses an input of 1 x {n_mels} x {frames}", first_line(error), fix) from error
    finally:
        backbone.train(was_training)
    whole = (-(-n_mels // step) * step, -(-frames // step) * step)
    if features.ndim != 4 or features.shape[2] > whole[0] or features.shape[3] > whole[1]:
        fix = "Use a model with maps or with a grid of tokens, such as convnext_tiny or vit_small_patch16_224"
        raise MelfoldError(f"{name} gives no feature map", f"an output of shape {shape}", fix)
    return Layout(kind, features.shape[1], step)


def final_norm(backbone: nn.Module, channels: int) -> nn.LayerNorm | None:
    """A backbone's own norm behind its pooling, part of its weights, which `forward_features` leaves out.

    Args:
        channels: of the feature map: the norm of a hidden layer behind it has another width.
    """
    for norm in (getattr(getattr(backbone, "head", None), "norm", None), getattr(backbone, "fc_norm", None)):
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (channels,):
            return norm
    return None


def make_backbone(config: ModelConfig, n_mels: int, frames: int) -> nn.Module:
    """A backbone with random weights, one input channel and no classifier.

    Args:
        n_mels, frames: the input's size, told to models that must know it (ViT, Swin).

    Raises:
        MelfoldError: an unknown model, or arguments it refuses.
    """
    name, known = config.name.split(".")[0], timm.list_models()
    if ":" in name or "/" in name:
        fix = "Use timm's name of the architecture, and model.weights=hf:OWNER/REPO"
        raise MelfoldError("model.name takes names that timm knows", config.name, fix)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3))
        raise MelfoldError("unknown model", config.name, f"Did you mean {near}?" if near else "timm.list_models() lists them")
    # TOML has no null: "none" stands for it.
    kwargs = {"in_chans": 1, "num_classes": 0} | {k: None if v == "none" else v for k, v in config.kwargs.items()}
    if config.drop_path_rate:
        kwargs["drop_path_rate"] = config.drop_path_rate
    for size in _size_arguments(config.name, n_mels, frames):
        try:
            return timm.create_model(config.name, **size | kwargs)
        except Exception as error:  # timm's models refuse arguments in many ways, assertions among them
            if isinstance(error, TypeError) and any(f"'{key}'" in str(error) for key in size):
                continue  # this family takes its size in another way
            raise MelfoldError(f"timm refuses {config.name}", first_line(error), "Check model.name and model.kwargs") from error
    raise AssertionError("the last arguments are none")


def _has_fixed_size(name: str) -> bool:
    known = timm.get_pretrained_cfg(name)
    return bool(known and known.fixed_input_size)


def _size_arguments(name: str, n_mels: int, frames: int) -> Iterator[dict[str, Any]]:
    """Ways to tell a model its input's size, and that it may be given others: families differ in what they take."""
    if _has_fixed_size(name):
        size = {"img_size": (-(-n_mels // SIZE_STEP) * SIZE_STEP, -(-frames // SIZE_STEP) * SIZE_STEP)}
        yield size | {"dynamic_img_size": True, "dynamic_img_pad": True}
        yield size | {"dynamic_img_size": True}
        yield size | {"strict_img_size": False}
        yield size
    yield {}
