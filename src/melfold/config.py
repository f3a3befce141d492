"""Everything that decides a run: frozen configurations, recipes, and the fingerprints that name their results."""

from __future__ import annotations

import copy
import csv
import difflib
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from melfold.errors import MelfoldError
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
    top_db: Annotated[float, Field(gt=0)] = 80.0

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
    """`none`, `hub` (timm downloads them) or `file:PATH` (safetensors, or a .pth of plain tensors)."""
    drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    pool: Literal["mean_max", "mean"] = "mean_max"
    """Over time, after the mean over frequency."""
    head: Literal["linear", "norm_linear"] = "linear"
    frozen: bool = False
    """Train the head only."""
    licence: str = ""
    """Of a weights file, where timm does not know it."""
    kwargs: dict[str, Any] = {}
    """Passed to timm's `create_model`; the text `none` stands for None."""

    @field_validator("weights")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("none", "hub") and not (value.startswith("file:") and len(value) > len("file:")):
            raise ValueError(f"needs none, hub or file:PATH, found {value!r}")
        return value


class TrainConfig(_Frozen):
    """The optimisation. Seconds, epochs of the training clips."""

    epochs: Annotated[float, Field(gt=0)] = 30
    batch_size: Annotated[int, Field(gt=0)] = 64
    crop_seconds: Annotated[float, Field(gt=0)] = 5.0
    pad: Literal["wrap", "floor"] = "wrap"
    """A clip shorter than the crop is repeated, or set in silence at a random place."""
    loss: Literal["bce", "focal", "asl", "lsep", "lsep_bce"] = "bce"
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

    def fingerprint(self) -> str:
        """12 hex digits of all that decides the run's results; the recipe's name and `about` do not."""
        return digest(self.model_dump(mode="json", exclude={"name", "about"}))[:12]


def recipe_names() -> list[str]:
    """The recipes that come with the kit."""
    return sorted(p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml"))


def load_recipe(name: str, sets: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe.

    Args:
        name: a shipped recipe's name, or the path of a `.toml` file.
        sets: changes as `section.key=value`; the value is TOML, or else a plain string.

    Raises:
        MelfoldError: an unknown recipe or key (the nearest is named), or a value that does not fit.
    """
    values = {key: value for key, (value, _) in explain_recipe(name).items()}
    sets = list(sets)
    for item in sets:
        key, value = _parse_set(item)
        values[key] = value
    nested: dict[str, Any] = {"name": Path(name).stem}
    for key, value in values.items():
        _put(nested, _path(key), value)
    data = nested.get("data")
    if isinstance(data, dict) and isinstance(data.get("corrections"), str):
        data["corrections"] = read_corrections(Path(data["corrections"]))
    return parse_recipe(nested, f"recipe {name}" + (f" with --set {' '.join(sets)}" if sets else ""))


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A `Recipe` from nested values, with one line for each thing that does not fit."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise MelfoldError.many(_explain(e, source) for e in error.errors()) from None


def read_corrections(path: Path) -> dict[str, dict[str, Any]]:
    """fname -> labels and why, of a `corrections.csv`.

    Raises:
        MelfoldError: a missing file, other columns, a clip that stands twice or one without labels.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames != ["fname", "labels", "why"]:
                found = ",".join(reader.fieldnames or ["an empty file"])
                raise MelfoldError(f"{path} is no table of corrections", found, "Its columns are fname,labels,why")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MelfoldError("cannot read data.corrections", f"{path} ({error})", "Mend the path, or the file") from None
    corrections: dict[str, dict[str, Any]] = {}
    for row in rows:
        fname = row["fname"]
        if None in row or fname in corrections or not row["labels"]:
            why = "more cells than columns" if None in row else "stands twice" if fname in corrections else "no labels"
            raise MelfoldError(f"{path}: {why}", fname, "Put several labels in quotes; to leave a clip out use data.exclude")
        corrections[fname] = {"labels": row["labels"].split(","), "why": row["why"] or ""}
    return corrections


def explain_recipe(name: str, _above: tuple[str, ...] = ()) -> dict[str, tuple[Any, str]]:
    """`section.key` -> (value, reason) for all that a recipe and its bases set, the nearest file winning."""
    if name in _above:
        raise MelfoldError("a recipe is its own base", " -> ".join((*_above, name)), "Mend `base` in one of them")
    text = _recipe_text(name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MelfoldError(f"recipe {name} is not TOML", str(error), "Mend that line") from None
    base = content.pop("base", None)
    result = explain_recipe(base, (*_above, name)) if base else {}
    reasons = _reasons(text)
    for key, value in content.items():
        if isinstance(value, dict):
            for field, inner in value.items():
                result[f"{key}.{field}"] = (inner, reasons.get(f"{key}.{field}", ""))
        else:
            result[key] = (value, reasons.get(key, ""))
    return result


def recipe_differences(a: Recipe, b: Recipe) -> list[str]:
    """`section.key: old -> new` for each value in which two recipes differ, names and remarks aside."""
    left, right = (r.model_dump(mode="json", exclude={"name", "about"}) for r in (a, b))
    lines = []
    for section, value in left.items():
        pairs = [(section, value, right[section])]
        if isinstance(value, dict):
            pairs = [(f"{section}.{k}", value[k], right[section][k]) for k in value]
        lines += [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]
    return lines


def _shipped() -> Any:
    return resources.files("melfold") / "recipes"


def _recipe_text(name: str) -> str:
    if name.endswith(".toml"):
        try:
            return Path(name).read_text()
        except OSError as error:
            raise MelfoldError("cannot read a recipe", f"{name} ({error.strerror})", "Give the path of a .toml file") from None
    if name not in recipe_names():
        raise MelfoldError("unknown recipe", f"{name!r}{_nearest(name, recipe_names())}", f"Known: {', '.join(recipe_names())}")
    return (_shipped() / f"{name}.toml").read_text()


def _reasons(text: str) -> dict[str, str]:
    """`section.key` -> the comment that ends its line."""
    reasons, section = {}, ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped.split("#")[0].strip().strip("[]") + "."
            continue
        for at in (i for i, c in enumerate(stripped) if c == "#"):
            try:
                parsed = tomllib.loads(stripped[:at])
            except tomllib.TOMLDecodeError:
                continue  # this # stands inside a string
            reasons |= {section + key: stripped[at + 1 :].strip() for key in parsed}
            break
    return reasons


def _parse_set(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise MelfoldError("--set needs section.key=value", repr(item), "For example --set train.epochs=10")
    try:
        return key.strip(), tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def _path(key: str) -> list[str]:
    """`section.key`, and all of the rest as one name: `data.exclude.0a1b2c3d.wav` has a dot of its own, maybe in quotes."""
    return [part.strip("'\"") for part in key.split(".", 2)]


def _put(nested: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = nested.setdefault(part, {})
        if not isinstance(inner, dict):
            raise MelfoldError("unknown key", ".".join(path) + _nearest(".".join(path), _known_keys()))
        nested = inner
    nested[path[-1]] = copy.deepcopy(value)


def _explain(error: Any, source: str) -> MelfoldError:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return MelfoldError(
            f"{source}: unknown key", f"{where}{_nearest(where, _known_keys())}", "See `melfold recipe show NAME`"
        )
    found = f", found {error['input']!r}" if "found" not in error["msg"] and not isinstance(error["input"], dict) else ""
    return MelfoldError(f"{source}: {where}", error["msg"].removeprefix("Value error, ") + found)


def _known_keys() -> list[str]:
    keys = []
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in inner.model_fields]
        else:
            keys.append(name)
    return keys


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = [key for key in known if key.startswith(word)] or difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f" (nearest: {close[0]})" if close else ""
