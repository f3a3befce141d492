"""Every setting of a recipe, with its limits and default; and the fingerprints that name what was made with them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from melfold.files import digest

CACHE_VERSION = 2
"""Part of every cache fingerprint: raise it when `data/logmel.py` computes other numbers from the same configuration."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LogMelConfig(_Frozen):
    """The front-end, in librosa's names. Hz, samples, dB."""

    sr: Annotated[int, Field(gt=0)] = 44_100
    n_fft: Annotated[int, Field(gt=1)] = 2048
    hop_length: Annotated[int, Field(gt=0)] = 441
    n_mels: Annotated[int, Field(gt=0)] = 128
    fmin: Annotated[float, Field(ge=0)] = 20.0
    fmax: Annotated[float, Field(gt=0)] = 22_050.0
    window: str = "hann"
    norm: Literal["slaney"] | None = "slaney"
    htk: bool = False
    top_db: Annotated[float, Field(gt=0)] | None = 80.0
    """How far below its peak a clip's floor is; `none` in TOML: no floor but the smallest power, -100 dB."""

    @field_validator("top_db", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _check(self) -> LogMelConfig:
        if not self.fmin < self.fmax <= self.sr / 2:
            raise ValueError(f"needs fmin < fmax <= sr / 2, found fmin={self.fmin} fmax={self.fmax} sr={self.sr}")
        return self

    def fingerprint(self) -> str:
        """16 hex digits that change with any field here or with `CACHE_VERSION`: the name of a cache folder."""
        return digest({"version": CACHE_VERSION, **self.model_dump()})[:16]


class Correction(_Frozen):
    """Other labels for a curated clip."""

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    why: str = ""


class DataConfig(_Frozen):
    """Which clips take part, and what they are taken for."""

    exclude: dict[str, str] = {}
    """fname -> why it is left out of training and scoring."""
    corrections: dict[str, Correction] = {}
    """fname -> labels to learn from in place of the table's; scores are still taken against the table. In a recipe: the path
    of a `corrections.csv` (fname, labels, why), whose rows become part of the recipe."""


class NoisyConfig(_Frozen):
    """Learning from the noisy set as well."""

    use: bool = False
    curated_times: Annotated[int, Field(ge=0)] = 5
    """A curated clip is drawn this many times as often as a noisy one; 0 leaves them to the last epochs."""
    curated_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of curated clips alone, after `train.epochs` of both."""
    own_norm: bool = True
    """Noisy clips are normalised with their own mean and standard deviation: they were recorded otherwise."""
    own_head: bool = True
    """A second linear layer learns the noisy labels; it is thrown away afterwards."""
    bootstrap: Rate = 0.0
    """The share of the model's own prediction in a noisy target (soft bootstrapping)."""
    teacher: str = ""
    """A run whose model of the same fold judges the noisy clips."""
    top: Annotated[int, Field(ge=0)] = 5000
    """With a teacher: how many clips it agrees with most are kept; 0 keeps all."""
    per_label: Annotated[int, Field(ge=0)] = 50
    """With a teacher: at most so many clips of any label; 0 is no limit."""
    pseudo: Fraction = 0.0
    """With a teacher: the share of its probabilities in a noisy target."""

    @model_validator(mode="after")
    def _check(self) -> NoisyConfig:
        if self.use and not self.curated_times and not self.curated_epochs:
            raise ValueError("curated_times = 0 needs curated_epochs: else no curated clip is learnt from")
        if self.teacher and not self.use:
            raise ValueError("a teacher needs use = true")
        if self.pseudo and not self.teacher:
            raise ValueError("pseudo needs a teacher")
        return self


class FoldsConfig(_Frozen):
    """The fold table."""

    n_folds: Annotated[int, Field(ge=2)] = 5
    seed: Annotated[int, Field(ge=0)] = 42
    group_identical: bool = False
    """Keep clips with identical audio in one fold, in a table of another name."""


class ModelConfig(_Frozen):
    """A timm backbone and its head."""

    name: str = "convnext_tiny"
    weights: str = "none"
    """`none`, `hub` (those timm names), `hf:OWNER/REPO[/FILE]` or `file:PATH` (safetensors, or a .pth of plain tensors)."""
    axes: Literal["auto", "mel_time", "time_mel"] = "auto"
    """Which axis of the weights' kernels comes first; `auto`: time in files of PANNs' kind (with a `bn0`), else mel."""
    normalise: Literal["scalar", "band", "checkpoint"] = "scalar"
    """By the training clips' mean and standard deviation, one for all bands or one per band; or by the weights' `bn0`."""
    pad_frames: Annotated[int, Field(ge=0)] = 0
    """Zeros at each end of the time axis, after normalisation: the padding of the weights' own stem."""
    drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    pool: Literal["mean_max", "mean"] = "mean_max"
    """Over time, after the mean over frequency."""
    head: Literal["linear", "norm_linear"] = "linear"
    """`norm_linear`: a layer norm first; the backbone's own final one if it has one behind its pooling, as ConvNeXt does."""
    frozen: bool = False
    """Train the head only."""
    licence: str = ""
    """Of a weights file, where timm does not know it."""
    seen: tuple[str, ...] = ()
    """The data sets that the weights were trained on, where the kit does not know them."""
    kwargs: dict[str, Any] = {}
    """Passed to timm's `create_model`; the text `none` stands for None."""

    @field_validator("weights")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"none|hub|file:.+|hf:\w[\w.-]*(/\w[\w.-]*)+", value):
            raise ValueError(f"needs none, hub, hf:OWNER/REPO[/FILE] or file:PATH, found {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.normalise == "checkpoint" and self.weights in ("none", "hub"):
            raise ValueError(f'normalise = "checkpoint" needs a weights file with a bn0, found weights = {self.weights!r}')
        return self


class TrainConfig(_Frozen):
    """The optimisation. Seconds, epochs of the training clips."""

    epochs: Annotated[float, Field(gt=0)] = 30
    batch_size: Annotated[int, Field(gt=0)] = 64
    crop_seconds: Annotated[float, Field(gt=0)] = 5.0
    pad: Literal["wrap", "floor"] = "wrap"
    """A clip shorter than the crop is repeated, or set in silence at a random place."""
    loss: Literal["bce", "focal", "asl", "lsep", "lsep_bce"] = "bce"
    loss_kwargs: dict[str, float] = {}
    """Arguments of the loss, such as `{gamma = 1}` for focal."""
    optimizer: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    lr_min: Annotated[float, Field(ge=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    clip_grad: Annotated[float, Field(ge=0)] = 5.0
    """Largest gradient norm; 0 is no limit."""
    ema_decay: Rate = 0.999
    """0 turns the moving average off."""
    amp: Literal["auto", "off"] = "auto"
    validate_every: Annotated[float, Field(ge=0)] = 5.0
    """Epochs between looks at the held-out fold, for the eye only; 0 is the end alone."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 3.0


NOT_TRAINING = ("validate_every", "checkpoint_minutes")
"""Settings of `train` that change no weight."""


class AugmentConfig(_Frozen):
    """Per-batch augmentation, on the device. Probabilities and fractions of an axis."""

    mixup_prob: Fraction = 0.0
    mixup: Literal["db", "power"] = "power"
    """`db` mixes values and labels by one weight; `power` adds the two sounds' powers and ORs the labels."""
    mixup_alpha: Annotated[float, Field(gt=0)] = 0.4
    """The Beta distribution of `db` weights."""
    mixup_gain_db: Annotated[float, Field(ge=0)] = 6.0
    """`power`: the second sound is made louder or softer by up to this."""
    freq_masks: Annotated[int, Field(ge=0)] = 0
    freq_mask_width: Fraction = 0.15
    time_masks: Annotated[int, Field(ge=0)] = 0
    time_mask_width: Fraction = 0.2
    gain_db: Annotated[float, Field(ge=0)] = 0.0
    """Whole crops are made louder or softer by up to this."""
    concat_prob: Fraction = 0.0
    """The clip's begin passes into another clip's end, labels ORed."""
    resize_prob: Fraction = 0.0
    resize_scale: Annotated[float, Field(gt=0, le=1)] = 0.7
    """A window of at least this share of either axis is stretched to the whole."""
    off_epochs: Annotated[float, Field(ge=0)] = 0.0
    """No augmentation in the last epochs."""


class PredictConfig(_Frozen):
    """Evaluation windows and test-time augmentation: every length with every padding at every shift."""

    window_seconds: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """The crop's length where not set."""
    pads: tuple[Literal["wrap", "floor"], ...] = ()
    """As in training where not set."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    shift_seconds: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    """Each shifts the grid of windows, to later where it is positive."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    fold_mean: Literal["arithmetic", "geometric", "logit", "rank"] = "geometric"

    @field_validator("window_seconds", "pads", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float, str)) else value


@dataclass(frozen=True)
class View:
    """One look at a clip: windows of `length` frames, their grid moved by `shift` frames, short clips padded."""

    length: int
    shift: int
    pad: Literal["wrap", "floor"]


class Recipe(_Frozen):
    """All that decides a run. Saved with the run; prediction reads it from there."""

    name: str
    about: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    logmel: LogMelConfig = LogMelConfig()
    data: DataConfig = DataConfig()
    folds: FoldsConfig = FoldsConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    noisy: NoisyConfig = NoisyConfig()
    predict: PredictConfig = PredictConfig()

    def frames(self, seconds: float) -> int:
        """The number of frames nearest to a time, at least one."""
        return max(1, round(seconds * self.logmel.sr / self.logmel.hop_length))

    @property
    def crop_frames(self) -> int:
        return self.frames(self.train.crop_seconds)

    @property
    def views(self) -> tuple[View, ...]:
        """The looks whose logits are averaged, the cheapest set that says something first."""
        config = self.predict
        lengths = config.window_seconds or (self.train.crop_seconds,)
        shifts = [round(s * self.logmel.sr / self.logmel.hop_length) for s in config.shift_seconds]
        pads = config.pads or (self.train.pad,)
        return tuple(View(self.frames(n), s, p) for s, n, p in itertools.product(shifts, lengths, pads))

    @property
    def window_frames(self) -> int:
        """Of the first view."""
        return self.views[0].length

    @property
    def track(self) -> Literal["scratch", "open"]:
        """`scratch`: the competition's data alone, as its rules ask. `open`: weights from elsewhere."""
        return "scratch" if self.model.weights == "none" else "open"

    def training(self) -> dict[str, Any]:
        """The settings that decide a run's weights: two recipes with the same ones give the same run.

        Settings of prediction, of logging and of checkpoints do not, nor do names and remarks.
        """
        values = self.model_dump(mode="json", exclude={"name": True, "about": True, "predict": True, "train": set(NOT_TRAINING)})
        values["data"] = {
            "exclude": sorted(self.data.exclude),
            "corrections": {fname: list(own.labels) for fname, own in sorted(self.data.corrections.items())},
        }
        return values

    def fingerprint(self) -> str:
        """12 hex digits of `training()`."""
        return digest(self.training())[:12]
