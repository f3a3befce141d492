"""The state of a training: model, optimiser, scaler and average; one object that saves and loads."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.utils import ModelEmaV3

from melfold.artefacts import differences, listed
from melfold.errors import MelfoldError
from melfold.files import write_bytes
from melfold.learn.devices import Device
from melfold.learn.losses import loss_named
from melfold.learn.model import Tagger
from melfold.train_config import TrainConfig

_HASH_BYTES = 32


class TrainState:
    """Everything that changes while a fold is trained. It starts with the loss and the highest learning rate of `config`."""

    def __init__(self, model: Tagger, config: TrainConfig, device: Device) -> None:
        self.model, self.config, self.device = model.to(device.torch).train(), config, device
        self.forward = torch.compile(self.model) if config.compile else self.model
        """What a training step calls: `(log_mels, noisy or None) -> logits`, as `Tagger`."""
        self.loss_of = loss_named(config.loss, config.loss_kwargs)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        try:
            # One kernel for all parameters. On the CPU the usual form stays, with the rounding it always had.
            fused = device.torch.type == "cuda" and _has_fused(config.optimizer)
            self.optimizer = create_optimizer_v2(
                model,
                opt=config.optimizer,
                lr=config.lr,
                weight_decay=config.weight_decay,
                layer_decay=config.layer_decay if config.layer_decay < 1 else None,
                **({"fused": True} if fused else {}),
            )
        except (TypeError, ValueError) as error:
            raise MelfoldError(f"timm refuses optimizer {config.optimizer}", str(error), "Check train.optimizer") from error
        self.scaler = device.scaler()
        self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.averaged: Tagger = self.ema.module if self.ema else self.model
        """The model that is scored and kept."""
        self._parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        self._parts |= {"ema": self.ema.module} if self.ema else {}
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict[str, Any]] = []
        """The rows of the log."""

    @property
    def lr(self) -> float:
        """The learning rate of the last layer."""
        return self.optimizer.param_groups[-1]["lr"]

    def set_phase(self, config: TrainConfig, lr: float) -> None:
        """Take the loss of a phase, and this learning rate: of the last layer, where earlier ones have smaller rates."""
        self.loss_of = loss_named(config.loss, config.loss_kwargs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)

    def update(self) -> torch.Tensor:
        """One step down the gradient. Returns: its norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step=self.step)
        self.step += 1
        return norm

    def save(self, path: Path, made_from: Mapping[str, str]) -> None:
        """Write a checkpoint, with a hash of its content in front of it."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"made_from": dict(made_from), "step": self.step, "seconds": self.seconds, "rows": json.dumps(self.rows)}
        content = io.BytesIO()
        torch.save(state, content)
        payload = content.getvalue()
        write_bytes(path, hashlib.sha256(payload).digest() + payload)

    def load(self, path: Path, made_from: Mapping[str, str]) -> None:
        """Read a checkpoint. Raises: MelfoldError: it is damaged, or was saved with other data, folds, settings or precision."""
        content = path.read_bytes()
        payload = content[_HASH_BYTES:]
        if hashlib.sha256(payload).digest() != content[:_HASH_BYTES]:
            raise MelfoldError("damaged checkpoint", str(path), "Delete it to train this fold again from the start")
        # To the CPU first: loaded straight to a GPU, the optimiser's step counters would stay there and cost a wait each.
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if changes := differences(state["made_from"], made_from):
            fix = "Undo the change, or delete it to train this fold again from the start"
            raise MelfoldError(f"{path} was saved under different conditions", listed(changes), fix)
        # Fused or not is this device's own choice; where PyTorch keeps the step counters depends on it.
        for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved.update({key: own[key] for key in ("fused", "foreach") if key in own})
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], json.loads(state["rows"])


def _has_fused(optimizer: str) -> bool:
    try:
        return "fused" in inspect.signature(get_optimizer_class(optimizer, bind_defaults=False)).parameters
    except ValueError:  # unknown: creating it says so
        return False
