"""Every setting of a recipe, with its limits and default; and the fingerprints that name what was made with them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from melfold.files import digest
from melfold.train_config import NOT_TRAINING, Fraction, Frozen, Phase, Rate, TrainConfig

CACHE_VERSION = 2
"""Part of every cache fingerprint: raise it when `data/logmel.py` computes other numbers from the same configuration."""


class LogMelConfig(Frozen):
    """The front-end, in librosa's names. Hz, samples, dB."""

    sr: Annotated[int, Field(gt=0)] = 44_100
    """Sampling rate in Hz; audio of another rate is resampled."""
    n_fft: Annotated[int, Field(gt=1)] = 2048
    """Length of the FFT window, in samples."""
    hop_length: Annotated[int, Field(gt=0)] = 441
    """Samples between two frames."""
    n_mels: Annotated[int, Field(gt=0)] = 128
    """Number of mel bands."""
    fmin: Annotated[float, Field(ge=0)] = 20.0
    """Lowest frequency, in Hz."""
    fmax: Annotated[float, Field(gt=0)] = 22_050.0
    """Highest frequency, in Hz; at most half of `sr`."""
    window: str = "hann"
    """Window function, by its name in SciPy."""
    norm: Literal["slaney"] | None = "slaney"
    """Scaling of the mel bands; `none` leaves them unscaled."""
    htk: bool = False
    """Use the HTK mel scale instead of Slaney's."""
    top_db: Annotated[float, Field(gt=0)] | None = 80.0
    """Values further below a clip's peak than this many dB are raised to that limit; `none` sets no limit."""

    @field_validator("norm", "top_db", mode="before")
    @classmethod
    def _none_in_words(cls, value: Any) -> Any:
        return None if value == "none" else value  # TOML has no null

    @model_validator(mode="after")
    def _check(self) -> LogMelConfig:
        if not self.fmin < self.fmax <= self.sr / 2:
            raise ValueError(f"needs fmin < fmax <= sr / 2, found fmin={self.fmin} fmax={self.fmax} sr={self.sr}")
        return self

    def fingerprint(self) -> str:
        """16 hex digits that change with any field here or with `CACHE_VERSION`: the name of a cache folder."""
        return digest({"version": CACHE_VERSION, **self.model_dump()})[:16]


class Correction(Frozen):
    """Other labels for a curated clip."""

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    """The labels to train on."""
    why: str = ""
    """The reason."""
    track: Literal["scratch", "open"] = "scratch"
    """Of the run that suggested it; `scratch` if a person did."""


class DataConfig(Frozen):
    """Which clips take part, and with which labels."""

    exclude: dict[str, str] = {}
    """Clips left out of training and scoring: fname -> reason."""
    corrections: dict[str, Correction] = {}
    """Labels to train on instead of the table's: fname -> labels and reason, or the path of a `corrections.csv` (fname, labels,
    why, track), whose rows become part of the recipe. Scores still use the table's own labels."""


class NoisyConfig(Frozen):
    """How noisy clips are learned from, in the phases that draw them (`train.clips`)."""

    own_norm: bool = True
    """Normalise noisy clips with their own mean and standard deviation: they were recorded differently."""
    own_head: bool = True
    """Give noisy clips an output layer of their own, which is dropped after training."""
    bootstrap: Rate = 0.0
    """Share of the model's own prediction in the target of a noisy clip (soft bootstrapping)."""
    teachers: tuple[str, ...] = ()
    """Runs, one or several, whose models of the same fold together choose noisy clips and give soft targets."""
    top: Annotated[int, Field(ge=0)] = 5000
    """With teachers: keep at most this many noisy clips, those whose labels they agree with most; 0 keeps all."""
    per_label: Annotated[int, Field(ge=0)] = 100
    """With teachers: keep at most this many noisy clips of any label; 0 is no limit. With 50, `top` could not be reached."""
    pseudo: Fraction = 0.5
    """With teachers: share of their probabilities in the target of a noisy clip."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """With teachers: their probabilities are raised to this power before they become targets; more than 1 sharpens them."""
    missing: Rate = 0.0
    """With teachers: of the curated clips without a label, this share, those where they find it most probable, is taken to lack
    it by mistake, and gets their probability as its target."""

    @field_validator("teachers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class FoldsConfig(Frozen):
    """The fold table."""

    n_folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the fold table; another seed is another table."""
    groups: str = "auto"
    """Which clips must share a fold: `auto` (the competition's table of groups in folds/, else clips with identical audio),
    `identical`, `none`, or the path of a table (fname, group). Each has a fold table with its own name."""


class ModelConfig(Frozen):
    """A timm backbone and its head."""

    name: str = "convnext_tiny"
    """Any timm model that gives a feature map or a grid of tokens."""
    weights: str = "none"
    """Initial weights: `none`, `hub` (timm's), `hf:OWNER/REPO[/FILE]`, `file:PATH` (safetensors, or a .pth of tensors), or
    `run:NAME`: each fold starts from that run's weights of the same fold."""
    axes: Literal["auto", "mel_time", "time_mel"] = "auto"
    """Which axis of the weights' kernels comes first; `auto`: time in files with a `bn0`, such as AudioSet's, else mel."""
    normalise: Literal["scalar", "band", "checkpoint"] = "scalar"
    """Input normalisation: by one mean and deviation of the training clips, by one per mel band, or by the weights' `bn0`."""
    pad_frames: Annotated[int, Field(ge=0)] = 0
    """Zeros at each end of the time axis, after normalisation: the padding of the weights' own stem."""
    drop_rate: Rate = 0.0
    """Dropout before the output layer."""
    drop_path_rate: Rate = 0.0
    """Stochastic depth: how often a residual block is skipped in training."""
    pool: Literal["mean_max", "mean"] = "mean_max"
    """Pooling over time, after the mean over frequency."""
    head: Literal["linear", "norm_linear"] = "linear"
    """Output layer; `norm_linear` puts a layer norm first: the backbone's own final one if it has one, as ConvNeXt does."""
    frozen: bool = False
    """Train the head only."""
    licence: str = ""
    """Licence of a weights file, where timm does not know it."""
    seen: tuple[str, ...] = ()
    """Data sets that the weights were trained on, where the kit does not know them."""
    kwargs: dict[str, Any] = {}
    """Passed to timm's `create_model`; the text `none` means None."""

    @field_validator("weights")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"none|hub|file:.+|hf:\w[\w.-]*(/\w[\w.-]*)+|run:[\w.-]+", value):
            raise ValueError(f"needs none, hub, hf:OWNER/REPO[/FILE], file:PATH or run:NAME, found {value!r}")
        return value

    @property
    def first_run(self) -> str:
        """The name of the run whose weights the folds start from; empty if they start from none."""
        return self.weights.removeprefix("run:") if self.weights.startswith("run:") else ""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.normalise == "checkpoint" and self.weights in ("none", "hub"):
            raise ValueError(f'normalise = "checkpoint" needs a weights file with a bn0, found weights = {self.weights!r}')
        return self


class AugmentConfig(Frozen):
    """Per-batch augmentation, on the device. Probabilities and fractions of an axis."""

    mixup_prob: Fraction = 0.0
    """Share of clips that are mixed with another one."""
    mixup: Literal["db", "power"] = "power"
    """`db` mixes values and labels with one weight; `power` adds the powers of the two sounds and takes the labels of both."""
    mixup_alpha: Annotated[float, Field(gt=0)] = 0.4
    """`db`: parameter of the Beta distribution of the weights."""
    mixup_gain_db: Annotated[float, Field(ge=0)] = 6.0
    """`power`: the second sound is made louder or softer by up to this many dB."""
    freq_masks: Annotated[int, Field(ge=0)] = 0
    """Number of frequency masks (SpecAugment)."""
    freq_mask_width: Fraction = 0.15
    """Largest width of a frequency mask, as a fraction of the bands."""
    time_masks: Annotated[int, Field(ge=0)] = 0
    """Number of time masks (SpecAugment)."""
    time_mask_width: Fraction = 0.2
    """Largest width of a time mask, as a fraction of the crop."""
    gain_db: Annotated[float, Field(ge=0)] = 0.0
    """Whole crops are made louder or softer by up to this many dB."""
    concat_prob: Fraction = 0.0
    """Share of crops that fade over into the end of another one; the result has the labels of both."""
    resize_prob: Fraction = 0.0
    """Share of crops of which a random part is stretched to full size."""
    resize_scale: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Smallest part to be stretched, as a fraction of either axis."""


class PredictConfig(Frozen):
    """Evaluation windows and test-time augmentation: every length with every padding at every shift."""

    window_seconds: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Lengths of the windows, one or several; the crop's length where empty."""
    pads: tuple[Literal["wrap", "floor"], ...] = ()
    """How short clips are padded, one or several; as in training where empty."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Part of a window that the next one covers too."""
    shift_seconds: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    """Each value moves all windows by so many seconds (later where positive); the views are averaged."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Windows in a batch."""
    fold_mean: Literal["arithmetic", "geometric", "logit", "rank"] = "geometric"
    """How the test probabilities of the folds are averaged."""

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


class Recipe(Frozen):
    """All that decides a run. Saved with the run; prediction reads it from there."""

    name: str
    """The recipe's name; changes nothing."""
    about: str = ""
    """One sentence on the recipe; changes nothing."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all random numbers of training."""
    logmel: LogMelConfig = LogMelConfig()
    data: DataConfig = DataConfig()
    folds: FoldsConfig = FoldsConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    phases: tuple[Phase, ...] = ()
    """Stretches of training, one after the other. Each is a table of what it changes in `train`: any of `epochs clips
    curated_times lr lr_min warmup_epochs loss loss_kwargs augment`. Without phases, training is one stretch, as `train` says."""
    augment: AugmentConfig = AugmentConfig()
    noisy: NoisyConfig = NoisyConfig()
    predict: PredictConfig = PredictConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.noisy.teachers and not self.uses_noisy and not self.noisy.missing:
            raise ValueError('noisy.teachers need a phase that draws noisy clips (train.clips = "both"), or noisy.missing')
        if self.noisy.own_head and all(phase.clips == "noisy" for phase in self.schedule):
            raise ValueError("no phase draws curated clips, so their output layer learns nothing: set noisy.own_head = false")
        return self

    def frames(self, seconds: float) -> int:
        """The number of frames nearest to a time, at least one."""
        return max(1, round(seconds * self.logmel.sr / self.logmel.hop_length))

    @property
    def crop_frames(self) -> int:
        return self.frames(self.train.crop_seconds)

    @property
    def schedule(self) -> tuple[TrainConfig, ...]:
        """The settings of each stretch of training in turn."""
        return tuple(phase.of(self.train) for phase in self.phases) or (self.train,)

    @property
    def uses_noisy(self) -> bool:
        """Whether any stretch of training draws noisy clips."""
        return any(phase.clips != "curated" for phase in self.schedule)

    @property
    def views(self) -> tuple[View, ...]:
        """The looks whose logits are averaged, the cheapest set that says something first."""
        config = self.predict
        lengths = config.window_seconds or (self.train.crop_seconds,)
        shifts = [round(s * self.logmel.sr / self.logmel.hop_length) for s in config.shift_seconds]
        pads = config.pads or (self.train.pad,)
        return tuple(View(self.frames(n), s, p) for s, n, p in itertools.product(shifts, lengths, pads))

    @property
    def track(self) -> Literal["scratch", "open"]:
        """`scratch`: the competition's data alone, as its rules ask. `open`: weights from elsewhere, also through corrections.

        The run that this recipe starts from, and its teachers, may open it still: see `RunInfo.track`.
        """
        own = self.model.weights == "none" or self.model.first_run
        return "scratch" if own and all(c.track == "scratch" for c in self.data.corrections.values()) else "open"

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
