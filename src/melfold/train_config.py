"""The settings of a recipe's training: what is the same from start to end, and what each phase may change."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """A section of a recipe: it never changes, and knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Schedule(Frozen):
    """What a phase of training may change."""

    epochs: Annotated[float, Field(gt=0)] = 30
    """Length of training; an epoch is one pass over what is drawn from."""
    clips: Literal["curated", "noisy", "both"] = "curated"
    """Which clips are drawn."""
    curated_times: Annotated[int, Field(ge=1)] = 5
    """With `clips = "both"`: how many times an epoch draws a curated clip; a noisy one is drawn once."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate, reached after the warm-up."""
    lr_min: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the start of the warm-up and at the end of the cosine schedule."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs in which the learning rate rises."""
    loss: Literal["bce", "focal", "asl", "lsep", "lsep_bce"] = "bce"
    """Loss function."""
    loss_kwargs: dict[str, float] = {}
    """Arguments of the loss, such as `{gamma = 1}` for focal."""
    augment: bool = True
    """Augment the crops as `augment` says; `false` trains on the clips as they are."""


class TrainConfig(Schedule):
    """Optimisation."""

    batch_size: Annotated[int, Field(gt=0)] = 64
    """Crops in a batch."""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """The batch is computed in parts of so many clips, whose gradients are added up: the same training in less memory; 0 is the
    whole batch at once. The sums differ in their last digits, BatchNorm takes its statistics from each part, and dropout draws
    for each part."""
    crop_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Length of a training crop."""
    pad: Literal["wrap", "floor"] = "wrap"
    """A clip shorter than the crop is repeated (`wrap`), or placed at random in silence (`floor`)."""
    optimizer: str = "adamw"
    """Any optimizer of timm, by its name."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; biases and norms have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each group of layers nearer to the input learns at this fraction of the next one's rate; 1 is the same rate for all."""
    clip_grad: Annotated[float, Field(ge=0)] = 5.0
    """Largest gradient norm; 0 is no limit."""
    ema_decay: Rate = 0.999
    """Decay of the moving average of the weights, which is the model that predicts; 0 turns it off."""
    amp: Literal["auto", "off"] = "auto"
    """Mixed precision: bf16 or fp16 where the device has it, or off."""
    benchmark: bool = True
    """On a GPU, try cuDNN's algorithms and take the fastest. Which one wins may change from run to run, and with it the last
    digits of the weights; `false` repeats a training to the byte. Prediction never does this."""
    compile: bool = False
    """Compile the model with torch.compile: a minute or more at the start of each fold (105 s on a CPU), faster steps
    on recent GPUs, other last digits and draws of dropout. Needs a C++ compiler. Prediction is not compiled."""
    validate_every: Annotated[float, Field(ge=0)] = 5.0
    """Epochs of a phase between scores of the held-out fold in the log; 0 scores only at the end. Changes no weight."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 3.0
    """Minutes between checkpoints. Changes no weight."""


NOT_TRAINING = ("validate_every", "checkpoint_minutes")
"""Settings of `train` that change no weight."""


class Phase(Schedule):
    """A stretch of training. Keys that are not given are as in `train`; only those given are saved."""

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}

    def of(self, train: TrainConfig) -> TrainConfig:
        """The settings of `train` with this phase's changes."""
        return train.model_copy(update={key: getattr(self, key) for key in self.model_fields_set})
