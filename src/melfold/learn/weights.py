"""The one door for weights: what a model starts from, and what a trained fold keeps.

Files are read as tensors only; nothing is ever unpickled. timm knows the key names of the original authors (Facebook's ConvNeXt,
among others), and its own code renames them and adapts the stem; what is left is checked here, key by key.
`create_model(pretrained=True)` would not do that: without a classifier it loads with `strict=False`, and a file that lacks half
of the keys passes in silence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from melfold.config import ModelConfig
from melfold.errors import MelfoldError, first_line
from melfold.files import write_bytes
from melfold.learn.backbones import final_norm

State = Mapping[str, torch.Tensor]

AVERAGED = ("state_dict_ema", "model_ema", "ema_model", "ema")
"""Where training scripts put averaged copies of the weights, which are better than the last ones."""

WRAPPERS = ("state_dict", "model", "module", "_orig_mod", "backbone", "net")
"""What training scripts wrap around weights, as a key of a dictionary or as a prefix of every name."""

PANNS_PARTS = ("spectrogram_extractor.", "logmel_extractor.", "bn0.", "head_audioset.")
"""In files of PANNs' kind: a fixed front-end, the norm of its bands, and the classifier of AudioSet."""

BATCH_NORM_EPS = 1e-5

RENAME_FIX = "Name the model these weights belong to in model.name"


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read named tensors from safetensors, or from a `.pth` that holds tensors and plain values only.

    Of several copies the averaged one (EMA) is taken; wrappers and prefixes are taken off.

    Raises:
        MelfoldError: a file that is missing, broken, or holds something else.
    """
    if not path.is_file():
        raise MelfoldError("no such weights file", str(path), "Check model.weights=file:PATH")
    try:
        if path.suffix == ".safetensors":
            return unwrap(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in a training script's checkpoint
            state = unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise MelfoldError("broken weights file", f"{path} ({first_line(error)})", "Download it again") from None
    except Exception as error:  # pickle.UnpicklingError and what torch wraps around it
        found = f"{path} ({first_line(error)})"
        raise MelfoldError("a weights file must hold tensors only", found, "Save it as safetensors") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise MelfoldError("a weights file must hold named tensors", str(path), "Save it as safetensors")
    return dict(state)


def unwrap(content: Any) -> Any:
    """Take off what training scripts wrap around weights: dictionaries, prefixes that all names share, averaged copies first."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in (*AVERAGED, *WRAPPERS) if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return content
    for prefix in (f"{name}." for name in AVERAGED):
        if own := {key.removeprefix(prefix): value for key, value in content.items() if str(key).startswith(prefix)}:
            content = own
    prefixes = [f"{name}." for name in WRAPPERS]
    while content and (prefix := next((p for p in prefixes if all(str(key).startswith(p) for key in content)), "")):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def load_backbone(backbone: nn.Module, path: Path, config: ModelConfig, n_mels: int) -> dict[str, torch.Tensor] | None:
    """Load a backbone's weights from a file.

    A stem for three channels is adapted to one by timm. Where the file's kernels are time x mel, they are transposed.

    Args:
        n_mels: of the log-mels that the model will see.

    Returns:
        The state of a `Normalisation`, from the file's `bn0`, if the recipe asks for it.

    Raises:
        MelfoldError: naming the keys and shapes that do not fit.
    """
    state = read_state(path)
    what = f"{path.name} does not fit {config.name}"
    input_norm = _input_norm(state, what, n_mels) if config.normalise == "checkpoint" else None
    time_first = config.axes == "time_mel" or (config.axes == "auto" and "bn0.running_mean" in state)
    state = {key: value for key, value in state.items() if not key.startswith(PANNS_PARTS)}
    positions = _time_first_positions(backbone, state, what, n_mels) if time_first else {}
    state = _renamed(backbone, {key: value for key, value in state.items() if key not in positions}, what) | positions
    if time_first:
        state = {key: value.transpose(2, 3).contiguous() if value.ndim == 4 else value for key, value in state.items()}
    known = backbone.pretrained_cfg
    classifier = known.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    own = backbone.state_dict()
    if not known.get("num_classes"):  # such files (self-supervised ones) have no classifier, and some have no norm before it
        norm = final_norm(backbone, backbone.num_features)
        fresh = [name for name, module in backbone.named_modules() if module is norm]
        state = {key: value for key, value in own.items() if key.rpartition(".")[0] in fresh} | state
    check_fit(own, state, what, adapted_stem=True)
    stem = state.get(f"{known.get('first_conv')}.weight") if isinstance(known.get("first_conv"), str) else None
    fits = stem is not None and stem.shape == own[f"{known['first_conv']}.weight"].shape
    size = (1, *known["input_size"][1:]) if fits else known["input_size"]
    loaded = {**known, "state_dict": state, "source": "", "input_size": size}
    try:
        timm.models.load_pretrained(backbone, loaded, num_classes=0, in_chans=1, strict=False)
    except (RuntimeError, ValueError) as error:
        raise MelfoldError(what, first_line(error), RENAME_FIX) from error
    return input_norm


def _renamed(backbone: nn.Module, state: State, what: str) -> dict[str, torch.Tensor]:
    """A state under timm's names, by the model family's own filter."""
    rename = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if not rename:
        return dict(state)
    try:
        return dict(rename(dict(state), backbone))
    except Exception as error:  # timm's filters assume a file of their family
        found = f"unknown key {error.args[0]}" if isinstance(error, KeyError) else first_line(error)
        raise MelfoldError(what, found, RENAME_FIX) from error


def _input_norm(state: State, what: str, n_mels: int) -> dict[str, torch.Tensor]:
    """A file's `bn0`, the batch norm over mel bands in front of its network, as the state of a `Normalisation`."""
    names = {"mean": "bn0.running_mean", "std": "bn0.running_var", "weight": "bn0.weight", "bias": "bn0.bias"}
    if missing := [key for key in names.values() if key not in state]:
        fix = 'Use model.normalise = "scalar" or "band"'
        raise MelfoldError("these weights hold no input normalisation", f"no {', '.join(missing)}", fix)
    found = {key: state[name].float() for key, name in names.items()}
    if any(value.shape != (n_mels,) for value in found.values()):
        shape = tuple(found["mean"].shape)
        raise MelfoldError(what, f"its bn0 has the shape {shape}, the recipe {n_mels} mel bands", "Check logmel.n_mels")
    found["std"] = (found["std"] + BATCH_NORM_EPS).sqrt()
    return found


def _time_first_positions(backbone: nn.Module, state: State, what: str, n_mels: int) -> dict[str, torch.Tensor]:
    """The position embedding of a ViT whose tokens run over mels first and time last, for one with mels as rows."""
    if odd := [key for key in state if "relative_position" in key or "rel_pos" in key]:
        raise MelfoldError(what, f"{odd[0]} cannot be transposed", "Use a model without relative positions")
    if "pos_embed" not in state or not hasattr(backbone, "patch_embed"):
        return {}
    embed, prefix = state["pos_embed"], getattr(backbone, "num_prefix_tokens", 0)
    mels = n_mels // backbone.patch_embed.patch_size[0]
    frames, rest = divmod(embed.shape[1] - prefix, max(1, mels))
    if not mels or rest or not frames:
        found = f"{embed.shape[1] - prefix} positions for {mels} rows of {n_mels} mel bands"
        raise MelfoldError(what, found, "Check logmel.n_mels and model.axes")
    grid = embed[:, prefix:].reshape(1, frames, mels, -1).transpose(1, 2).reshape(1, mels * frames, -1)
    embed = torch.cat([embed[:, :prefix], grid], dim=1)
    size = list(backbone.patch_embed.grid_size)
    return {"pos_embed": timm.layers.resample_abs_pos_embed(embed, size, [mels, frames], num_prefix_tokens=prefix)}


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

    found = {
        "keys missing": [key for key in own if key not in state],
        "unknown keys": [key for key in state if key not in own],
        "shapes differ": [
            f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and not fits(value, state[key])
        ],
    }
    parts = [
        f"{len(items)} {kind} ({', '.join(items[:3])}{', …' if len(items) > 3 else ''})" for kind, items in found.items() if items
    ]
    if parts:
        raise MelfoldError(what, "; ".join(parts), RENAME_FIX)


def save_weights(path: Path, state: State) -> None:
    """Write tensors as safetensors, whole or not at all."""
    write_bytes(path, save({key: value.detach().cpu().contiguous() for key, value in state.items()}))


def load_weights(path: Path, model: nn.Module, recipe: str = "its") -> None:
    """Put a fold's weights, normalisation included, into a model.

    Args:
        recipe: whose recipe the model is of, for the message.

    Raises:
        MelfoldError: a missing or broken file, or one that does not fit.
    """
    try:
        state = read_state(path)
    except MelfoldError as error:
        raise MelfoldError(error.lines[0].split(". ")[0], "", f"Delete {path.parent} and train that fold again") from None
    check_fit(model.state_dict(), state, f"{path} does not fit {recipe} recipe")
    model.load_state_dict(state)
