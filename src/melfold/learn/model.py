"""A timm backbone that gives a feature map, and a pooling head for log-mels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from melfold.config import ModelConfig
from melfold.errors import MelfoldError
from melfold.files import atomic_path


class Tagger(nn.Module):
    """Log-mels `(clips, 1, n_mels, frames)` in dB -> logits `(clips, labels)`.

    The mean over frequency, then the sum of maximum and mean over time, as PANNs do (Kong et al., 2020).
    """

    def __init__(self, config: ModelConfig, n_labels: int, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.norm = nn.LayerNorm(width) if config.head == "norm_linear" else nn.Identity()
        self.drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(width, n_labels)
        # Statistics of the training clips, dB: they travel with the weights.
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        if config.frozen:
            self.backbone.requires_grad_(False)

    def add_noisy(self, *, own_head: bool, mean: float, std: float) -> None:
        """Make what only training on the noisy set needs: its statistics in dB and, if asked for, a head for its labels."""
        self.register_buffer("noisy_mean", torch.tensor(mean))
        self.register_buffer("noisy_std", torch.tensor(std))
        self.noisy_head = nn.Linear(self.head.in_features, self.head.out_features) if own_head else None

    def forward(self, log_mels: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """Args: noisy: bool `(clips,)`, in training with `add_noisy`: these clips take its statistics and head."""
        mean, std = self.mean, self.std
        if noisy is not None:
            mean, std = (
                torch.where(noisy, theirs, own).view(-1, 1, 1, 1)
                for theirs, own in ((self.noisy_mean, mean), (self.noisy_std, std))
            )
        x = ((log_mels - mean) / std).contiguous(memory_format=torch.channels_last)
        x = self.backbone.forward_features(x).mean(dim=2)
        x = x.amax(dim=2) + x.mean(dim=2) if self.config.pool == "mean_max" else x.mean(dim=2)
        x = self.drop(self.norm(x))
        logits = self.head(x)
        if noisy is None or self.noisy_head is None:
            return logits
        return torch.where(noisy[:, None], self.noisy_head(x), logits)

    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors that prediction needs."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("noisy_")}

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


def build_model(config: ModelConfig, n_labels: int, n_mels: int, frames: int, *, initial: bool = True) -> Tagger:
    """Make a model.

    Args:
        n_mels, frames: the input's size, tried out once.
        initial: start from the recipe's weights; without, from random ones that are to be replaced. Then neither the
            network nor a file is needed.

    Raises:
        MelfoldError: an unknown model, one without a feature map, arguments it refuses, or weights that do not fit.
    """
    timm.models.set_pretrained_download_progress(False) if hasattr(timm.models, "set_pretrained_download_progress") else None
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
            _first_line(error),
            "Get them on a machine with a network and use --set model.weights=file:PATH",
        ) from error
    except Exception as error:  # timm's models refuse arguments in many ways, assertions among them
        raise MelfoldError(f"timm refuses {config.name}", _first_line(error), "Mend model.name or model.kwargs") from error
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
            _first_line(error),
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


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read weights from safetensors, or from a .pth of plain tensors; nothing is ever unpickled.

    Raises:
        MelfoldError: a file that is missing, broken, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MelfoldError("no such weights file", str(path), "Mend model.weights=file:PATH") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise MelfoldError("broken weights file", f"{path} ({_first_line(error)})", "Download it again") from None
    except Exception as error:  # pickle.UnpicklingError and what torch wraps around it
        raise MelfoldError(
            "a weights file must hold tensors only", f"{path} ({_first_line(error)})", "Save it as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise MelfoldError("a weights file must hold named tensors", str(path), "Save it as safetensors")
    return dict(state)


def load_backbone(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a file under timm's key names; a stem for three channels is adapted to one by timm.

    Raises:
        MelfoldError: naming the keys and shapes that differ.
    """
    state = read_state(path)
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    state = {k: v for k, v in state.items() if not any(k.startswith(f"{h}.") for h in heads)}
    own = backbone.state_dict()
    check_fit(own, state, f"{path.name} does not fit {name}", adapted_stem=True)
    timm.models.load_pretrained(
        backbone, {**backbone.pretrained_cfg, "state_dict": state, "source": ""}, num_classes=0, in_chans=1, strict=False
    )


def check_fit(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], what: str, *, adapted_stem: bool = False
) -> None:
    """Refuse a state whose keys or shapes differ from a model's own.

    Args:
        adapted_stem: let a convolution take 3 input channels where the model has 1.
    """

    def fits(a: torch.Tensor, b: torch.Tensor) -> bool:
        if a.shape == b.shape:
            return True
        return adapted_stem and a.ndim == 4 and (a.shape[1], b.shape[1]) == (1, 3) and a[:, 0].shape == b[:, 0].shape

    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own if k in state and not fits(own[k], state[k])]
    if missing or extra or shapes:
        parts = [
            f"{len(items)} {kind} ({', '.join(items[:3])}{', …' if len(items) > 3 else ''})"
            for kind, items in (("keys missing", missing), ("unknown keys", extra), ("shapes differ", shapes))
            if items
        ]
        raise MelfoldError(what, "; ".join(parts), "Name the model these weights belong to in model.name")


def save_weights(path: Path, model: Tagger) -> None:
    """Write the tensors that prediction needs as safetensors, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.kept().items()}, temporary)


def load_weights(path: Path, model: Tagger) -> None:
    """Put a fold's weights, statistics included, into a model.

    Raises:
        MelfoldError: a missing or broken file, or one that does not fit.
    """
    try:
        state = read_state(path)
    except MelfoldError as error:
        raise MelfoldError(error.lines[0].split(". ")[0], "", f"Delete {path.parent} and train that fold again") from None
    check_fit(model.state_dict(), state, f"{path} does not fit its recipe")
    model.load_state_dict(state)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
