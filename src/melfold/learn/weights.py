"""The one door for weights: what a model starts from, and what a trained fold keeps.

Files are read as tensors only; nothing is ever unpickled. timm knows the key names of the original authors (Facebook's ConvNeXt,
among others), wrappers such as `model` and `state_dict`, averaged copies (EMA) and the `module.` prefix: its own code reads and
renames, and what is left is checked here, key by key. `create_model(pretrained=True)` would not do that: without a classifier it
loads with `strict=False`, and a file that lacks half of the keys passes in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from melfold.errors import MelfoldError, first_line
from melfold.files import atomic_path

State = Mapping[str, torch.Tensor]


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read named tensors from safetensors, or from a `.pth` that holds tensors and plain values only.

    Raises:
        MelfoldError: a file that is missing, broken, or holds something else.
    """
    if not path.is_file():
        raise MelfoldError("no such weights file", str(path), "Check model.weights=file:PATH")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise MelfoldError("broken weights file", f"{path} ({first_line(error)})", "Download it again") from None
    except Exception as error:  # pickle.UnpicklingError and what torch wraps around it
        raise MelfoldError(
            "a weights file must hold tensors only", f"{path} ({first_line(error)})", "Save it as safetensors"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise MelfoldError("a weights file must hold named tensors", str(path), "Save it as safetensors")
    return dict(state)


def load_backbone(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a backbone's weights from a file; a stem for three channels is adapted to one by timm.

    Raises:
        MelfoldError: naming the keys and shapes that do not fit.
    """
    state = read_state(path)
    what = f"{path.name} does not fit {name}"
    rename = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if rename:
        try:
            state = rename(state, backbone)
        except Exception as error:  # timm's filters assume a file of their family
            raise MelfoldError(what, first_line(error), "Name the model these weights belong to in model.name") from error
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    state = {key: value for key, value in state.items() if not any(key.startswith(f"{head}.") for head in heads)}
    check_fit(backbone.state_dict(), state, what, adapted_stem=True)
    config = {**backbone.pretrained_cfg, "state_dict": state, "source": ""}
    try:
        timm.models.load_pretrained(backbone, config, num_classes=0, in_chans=1, strict=False)
    except (RuntimeError, ValueError) as error:
        raise MelfoldError(what, first_line(error), "Name the model these weights belong to in model.name") from error


def check_fit(own: State, state: State, what: str, *, adapted_stem: bool = False) -> None:
    """Refuse a state whose keys or shapes differ from a model's own.

    Args:
        adapted_stem: accept a convolution with 3 input channels where the model has 1.

    Raises:
        MelfoldError: naming missing, unknown and misshapen keys.
    """

    def fits(a: torch.Tensor, b: torch.Tensor) -> bool:
        if a.shape == b.shape:
            return True
        return adapted_stem and a.ndim == b.ndim == 4 and (a.shape[1], b.shape[1]) == (1, 3) and a[:, 0].shape == b[:, 0].shape

    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and not fits(own[key], state[key])
    ]
    if missing or extra or shapes:
        parts = [
            f"{len(items)} {kind} ({', '.join(items[:3])}{', …' if len(items) > 3 else ''})"
            for kind, items in (("keys missing", missing), ("unknown keys", extra), ("shapes differ", shapes))
            if items
        ]
        raise MelfoldError(what, "; ".join(parts), "Name the model these weights belong to in model.name")


def save_weights(path: Path, state: State) -> None:
    """Write tensors as safetensors, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a fold's weights, normalisation included, into a model.

    Raises:
        MelfoldError: a missing or broken file, or one that does not fit.
    """
    try:
        state = read_state(path)
    except MelfoldError as error:
        raise MelfoldError(error.lines[0].split(". ")[0], "", f"Delete {path.parent} and train that fold again") from None
    check_fit(model.state_dict(), state, f"{path} does not fit its recipe")
    model.load_state_dict(state)
