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
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class LogMelConfig(_Frozen):
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


class Correction(_Frozen):
    """Other labels for a curated clip."""

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    """The labels to train on."""
    why: str = ""
    """The reason."""


class DataConfig(_Frozen):
    """Which clips take part, and with which labels."""

    exclude: dict[str, str] = {}
    """Clips left out of training and scoring: fname -> reason."""
    corrections: dict[str, Correction] = {}
    """Labels to train on instead of the table's: fname -> labels and reason, or the path of a `corrections.csv` (fname, labels,
    why), whose rows become part of the recipe. Scores still use the table's own labels."""


class NoisyConfig(_Frozen):
    """Training on the noisy set as well."""

    use: bool = False
    """Train on the noisy clips too."""
    curated_times: Annotated[int, Field(ge=0)] = 5
    """How many times as often a curated clip is drawn as a noisy one; 0 uses curated clips in the last epochs only."""
    curated_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs on curated clips only, after `train.epochs` on both."""
    own_norm: bool = True
    """Normalise noisy clips with their own mean and standard deviation: they were recorded differently."""
    own_head: bool = True
    """Give noisy clips an output layer of their own, which is dropped after training."""
    bootstrap: Rate = 0.0
    """Share of the model's own prediction in the target of a noisy clip (soft bootstrapping)."""
    teacher: str = ""
    """A run whose model of the same fold selects noisy clips and gives pseudo labels."""
    top: Annotated[int, Field(ge=0)] = 5000
    """With a teacher: keep this many clips, those whose labels it agrees with most; 0 keeps all."""
    per_label: Annotated[int, Field(ge=0)] = 50
    """With a teacher: keep at most this many clips of any label; 0 is no limit."""
    pseudo: Fraction = 0.0
    """With a teacher: share of its probabilities in the target of a noisy clip."""

    @model_validator(mode="after")
    def _check(self) -> NoisyConfig:
        if self.use and not self.curated_times and not self.curated_epochs:
            raise ValueError("curated_times = 0 needs curated_epochs: without them no curated clip is used in training")
        if self.teacher and not self.use:
            raise ValueError("a teacher needs use = true")
        if self.pseudo and not self.teacher:
            raise ValueError("pseudo needs a teacher")
        return self


class FoldsConfig(_Frozen):
    """The fold table."""

    n_folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the fold table; another seed is another table."""
    groups: str = "auto"
    """Which clips must share a fold: `auto` (the competition's table of groups in folds/, else clips with identical audio),
    `identical`, `none`, or the path of a table (fname, group). Each has a fold table with its own name."""


class ModelConfig(_Frozen):
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


class TrainConfig(_Frozen):
    """Optimisation. An epoch is one pass over the training clips."""

    epochs: Annotated[float, Field(gt=0)] = 30
    """Length of training. With noisy clips, an epoch draws every curated clip `noisy.curated_times` times."""
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
    loss: Literal["bce", "focal", "asl", "lsep", "lsep_bce"] = "bce"
    """Loss function."""
    loss_kwargs: dict[str, float] = {}
    """Arguments of the loss, such as `{gamma = 1}` for focal."""
    optimizer: str = "adamw"
    """Any optimizer of timm, by its name."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate, reached after the warm-up."""
    lr_min: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; biases and norms have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each group of layers nearer to the input learns at this fraction of the next one's rate; 1 is the same rate for all."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs in which the learning rate rises from near 0."""
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
    """Compile the model with torch.compile: a minute or more at the start of each fold, faster steps on recent GPUs, other last
    digits. Needs a C++ compiler. Prediction is not compiled."""
    validate_every: Annotated[float, Field(ge=0)] = 5.0
    """Epochs between scores of the held-out fold in the log; 0 scores only at the end. Changes no weight."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 3.0
    """Minutes between checkpoints. Changes no weight."""


NOT_TRAINING = ("validate_every", "checkpoint_minutes")
"""Settings of `train` that change no weight."""


class AugmentConfig(_Frozen):
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
    off_epochs: Annotated[float, Field(ge=0)] = 0.0
    """No augmentation in this many last epochs."""


class PredictConfig(_Frozen):
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


class Recipe(_Frozen):
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
        """`scratch`: the competition's data alone, as its rules ask. `open`: weights from elsewhere.

        The run that this recipe starts from, and its teacher, may open it still: see `RunInfo.track`.
        """
        return "scratch" if self.model.weights == "none" or self.model.first_run else "open"

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
