"""A timm backbone that gives a feature map, and a pooling head for log-mels."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional

from melfold.config import ModelConfig, Recipe
from melfold.errors import MelfoldError, first_line
from melfold.learn.normalise import Normalisation
from melfold.learn.weights import load_backbone


class Tagger(nn.Module):
    """Log-mels `(clips, 1, n_mels, frames)` in dB -> logits `(clips, labels)`.

    The mean over frequency, then the sum of maximum and mean over time, as in PANNs (Kong et al., 2020).
    """

    def __init__(self, config: ModelConfig, n_labels: int, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalisation()
        self.backbone = backbone
        # ConvNeXt's final norm comes after pooling, is part of its pretrained weights, and is used if the recipe wants a norm.
        self.backbone_norm = config.head == "norm_linear" and isinstance(_head_norm(backbone), nn.LayerNorm)
        self.norm = nn.LayerNorm(width) if config.head == "norm_linear" and not self.backbone_norm else nn.Identity()
        self.drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(width, n_labels)
        self.noisy_head: nn.Linear | None = None
        if config.frozen:
            self.backbone.requires_grad_(False)

    def add_noisy_head(self) -> None:
        """Add a last layer for the noisy clips' labels, which is thrown away after training."""
        self.noisy_head = nn.Linear(self.head.in_features, self.head.out_features)

    def forward(self, log_mels: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """Args: noisy: bool `(clips,)`, in training: these clips take their own statistics and head, if the model has them."""
        x = self.normalise(log_mels, noisy).contiguous(memory_format=torch.channels_last)
        x = self.backbone.forward_features(x).mean(dim=2)
        x = x.amax(dim=2) + x.mean(dim=2) if self.config.pool == "mean_max" else x.mean(dim=2)
        if self.backbone_norm:
            norm = _head_norm(self.backbone)
            x = functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = self.drop(self.norm(x))
        logits = self.head(x)
        if noisy is None or self.noisy_head is None:
            return logits
        return torch.where(noisy[:, None], self.noisy_head(x), logits)

    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors that prediction needs."""
        return {name: value for name, value in self.state_dict().items() if "noisy_" not in name}

    def train(self, mode: bool = True) -> Tagger:
        super().train(mode)
        if self.config.frozen:
            self.backbone.eval()  # running statistics of a frozen backbone stay as they were
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layers under this wrapper's names: without it timm's layer decay would do nothing."""

        def inside(pattern: str) -> str:
            return r"backbone\.(?:" + re.sub(r"(?<!\[)\^", "", pattern) + ")"

        return {
            group: [(inside(p), value) for p, value in spec] if isinstance(spec, (list, tuple)) else inside(spec)
            for group, spec in self.backbone.group_matcher(coarse=coarse).items()
            if spec is not None
        }


def _head_norm(backbone: nn.Module) -> Any:
    return getattr(getattr(backbone, "head", None), "norm", None)


def build_model(config: ModelConfig, n_labels: int, n_mels: int, frames: int, *, initial: bool = True) -> Tagger:
    """Make a model.

    Args:
        n_mels, frames: the input's size, tried out once.
        initial: start from the recipe's weights; without, from random ones that are to be replaced. Then neither the
            network nor a file is needed.

    Raises:
        MelfoldError: an unknown model, one without a feature map, arguments it refuses, or weights that do not fit.
    """
    if hasattr(timm.models, "set_pretrained_download_progress"):
        timm.models.set_pretrained_download_progress(False)
    name, known = config.name.split(".")[0], timm.list_models()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3))
        raise MelfoldError("unknown model", config.name, f"Did you mean {near}?" if near else "timm.list_models() lists them")
    # TOML has no null: "none" stands for it.
    kwargs = {"in_chans": 1, "num_classes": 0} | {k: None if v == "none" else v for k, v in config.kwargs.items()}
    if config.drop_path_rate:
        kwargs["drop_path_rate"] = config.drop_path_rate
    try:
        backbone = timm.create_model(config.name, pretrained=initial and config.weights == "hub", **kwargs)
    except OSError as error:
        raise MelfoldError(
            f"cannot download the weights of {config.name}",
            first_line(error),
            "Get them on a machine with a network and use --set model.weights=file:PATH",
        ) from error
    except Exception as error:  # timm's models refuse arguments in many ways, assertions among them
        raise MelfoldError(f"timm refuses {config.name}", first_line(error), "Check model.name and model.kwargs") from error
    if initial and config.weights.startswith("file:"):
        load_backbone(backbone, Path(config.weights.removeprefix("file:")).expanduser(), config.name)
    width = feature_width(backbone, config.name, n_mels, frames)
    return Tagger(config, n_labels, backbone, width).to(memory_format=torch.channels_last)


def feature_width(backbone: nn.Module, name: str, n_mels: int, frames: int) -> int:
    """Channels of the feature map, found by trying: some models emit another width than they declare."""
    was_training = backbone.training
    try:
        with torch.inference_mode():
            features = backbone.eval().forward_features(torch.zeros(1, 1, n_mels, frames))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise MelfoldError(
            f"{name} refuses an input of 1 x {n_mels} x {frames}",
            first_line(error),
            "Use a convolutional model, one input channel and crops that are not too short",
        ) from error
    finally:
        backbone.train(was_training)
    channels_first = getattr(backbone, "output_fmt", "NCHW") == "NCHW"
    if features.ndim != 4 or not channels_first or features.shape[2] > n_mels or features.shape[3] > frames:
        raise MelfoldError(
            f"{name} gives no feature map",
            f"an output of shape {tuple(features.shape)}",
            "Use a model that gives (batch, channels, height, width), such as convnext_tiny",
        )
    return features.shape[1]


def try_model(recipe: Recipe, n_labels: int) -> None:
    """Make a recipe's model once, and try the length of each of its views.

    Raises:
        MelfoldError: as `build_model`.
    """
    model = build_model(recipe.model, n_labels, recipe.logmel.n_mels, recipe.crop_frames)
    for length in {view.length for view in recipe.views} - {recipe.crop_frames}:
        feature_width(model.backbone, recipe.model.name, recipe.logmel.n_mels, length)
