"""A timm backbone that gives a feature map, and a pooling head for log-mels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from melfold.config import ModelConfig, Recipe
from melfold.files import Home
from melfold.learn.backbones import Layout, feature_map, final_norm, find_layout, make_backbone
from melfold.learn.devices import Device
from melfold.learn.fetch import first_weights
from melfold.learn.normalise import Normalisation
from melfold.learn.weights import load_backbone, load_weights


class Tagger(nn.Module):
    """Log-mels `(clips, 1, n_mels, frames)` in dB -> logits `(clips, labels)`.

    The mean over frequency, then the sum of maximum and mean over time, as in PANNs (Kong et al., 2020).
    """

    def __init__(self, config: ModelConfig, n_labels: int, n_mels: int, backbone: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        per_band = config.normalise != "scalar"
        self.normalise = Normalisation(n_mels if per_band else 0, affine=config.normalise == "checkpoint")
        self.backbone = backbone
        # A final norm behind the pooling is part of the pretrained weights, and is used if the recipe wants a norm.
        self.backbone_norm = config.head == "norm_linear" and final_norm(backbone, layout.channels) is not None
        fresh = config.head == "norm_linear" and not self.backbone_norm
        self.norm = nn.LayerNorm(layout.channels) if fresh else nn.Identity()
        self.drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(layout.channels, n_labels)
        self.noisy_head: nn.Linear | None = None
        if config.frozen:
            self.backbone.requires_grad_(False)

    def add_noisy_head(self) -> None:
        """Add a last layer for the noisy clips' labels, which is thrown away after training."""
        self.noisy_head = nn.Linear(self.head.in_features, self.head.out_features)

    def features(self, log_mels: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """The backbone's feature map `(clips, channels, mels, time)`."""
        x = self.normalise(log_mels, noisy)
        if self.config.pad_frames:
            x = functional.pad(x, (self.config.pad_frames, self.config.pad_frames))
        return feature_map(self.backbone, x.contiguous(memory_format=torch.channels_last), self.layout)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """A feature map -> `(clips, channels)`."""
        x = features.mean(dim=2)
        return x.amax(dim=2) + x.mean(dim=2) if self.config.pool == "mean_max" else x.mean(dim=2)

    def embed(self, pooled: torch.Tensor) -> torch.Tensor:
        """`(clips, channels)`: after the norm, before the head."""
        norm = final_norm(self.backbone, self.layout.channels) if self.backbone_norm else None
        if norm is not None:
            pooled = functional.layer_norm(pooled, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return self.norm(pooled)

    def forward(self, log_mels: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """Args: noisy: bool `(clips,)`, in training: these clips take their own statistics and head, if the model has them."""
        x = self.drop(self.embed(self.pool(self.features(log_mels, noisy))))
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

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that its authors did not decay, such as position embeddings."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}


def build_model(
    config: ModelConfig, n_labels: int, n_mels: int, frames: int, *, initial: bool = True, home: Home | None = None
) -> Tagger:
    """Make a model.

    Args:
        n_mels, frames: the input's size, tried out once.
        initial: start from the recipe's weights; without, from random ones that are to be replaced. Then neither the
            network nor a file is needed.
        home: where downloaded weights are kept (default: as `Home.find`).

    Raises:
        MelfoldError: an unknown model, one without a feature map, arguments it refuses, or weights that do not fit.
    """
    path = first_weights(config, home or Home.find()) if initial else None
    backbone = make_backbone(config, n_mels, frames + 2 * config.pad_frames)
    input_norm = load_backbone(backbone, path, config, n_mels) if path else None
    layout = find_layout(backbone, config.name, n_mels, frames + 2 * config.pad_frames)
    model = Tagger(config, n_labels, n_mels, backbone, layout)
    if input_norm:
        model.normalise.load_state_dict(input_norm)
    return model.to(memory_format=torch.channels_last)


def load_model(recipe: Recipe, n_labels: int, path: Path, device: Device) -> Tagger:
    """A trained model, ready to predict: no hub, no initial weights file.

    Raises:
        MelfoldError: weights that are damaged or do not fit.
    """
    model = build_model(recipe.model, n_labels, recipe.logmel.n_mels, recipe.crop_frames, initial=False)
    load_weights(path, model)
    return model.to(device.torch).eval()


def try_model(recipe: Recipe, n_labels: int, home: Home | None = None) -> None:
    """Make a recipe's model once, and try the length of each of its views. Raises: MelfoldError: as `build_model`."""
    config, n_mels = recipe.model, recipe.logmel.n_mels
    model = build_model(config, n_labels, n_mels, recipe.crop_frames, home=home)
    for length in {view.length for view in recipe.views} - {recipe.crop_frames}:
        find_layout(model.backbone, config.name, n_mels, length + 2 * config.pad_frames)
