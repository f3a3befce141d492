"""Probabilities as the whole kit passes them: a float32 table, index `fname`, one column a label.

Out-of-fold and test predictions, ensembles and the submission are all this one thing, always aligned by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd

from melfold.errors import MelfoldError
from melfold.files import atomic_path

Probs: TypeAlias = pd.DataFrame


def make_probs(values: np.ndarray, fnames: Sequence[str], labels: Sequence[str]) -> Probs:
    """Name the rows and columns of a `(clips, labels)` array.

    Raises:
        MelfoldError: a shape that does not fit, a repeated clip, or values outside 0..1.
    """
    if values.shape != (len(fnames), len(labels)):
        found = f"{values.shape} for {len(fnames)} clips and {len(labels)} labels"
        raise MelfoldError("probabilities do not fit their names", found)
    probs = pd.DataFrame(values.astype(np.float32), index=pd.Index(fnames, name="fname"), columns=list(labels))
    check_probs(probs, "probabilities")
    return probs


def check_probs(probs: Probs, source: str) -> None:
    """Refuse repeated clips or labels, and values that are not finite numbers within 0..1."""
    for axis, index in (("clips", probs.index), ("labels", probs.columns)):
        if index.has_duplicates:
            raise MelfoldError(f"{source}: repeated {axis}", ", ".join(index[index.duplicated()].unique()[:5]))
    values = probs.to_numpy()
    bad = ~((values >= 0) & (values <= 1)).all(axis=1)
    if bad.any():
        found = f"{bad.sum()} clips, first {probs.index[bad.argmax()]}"
        raise MelfoldError(f"{source}: values outside 0..1 or not finite", found)


def read_probs(path: Path) -> Probs:
    """Read what `write_probs` wrote (or any table with `fname` first).

    Raises:
        MelfoldError: a missing or unreadable file, cells that are no numbers, or values `check_probs` refuses.
    """
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, encoding="utf-8-sig").loc[0]
        if header.duplicated().any():  # pandas would rename the second to `label.1`
            raise MelfoldError(f"{path}: repeated labels", ", ".join(header[header.duplicated()].unique()[:5]))
        names = {"index_col": "fname", "dtype": {"fname": str}, "keep_default_na": False}  # a clip or label may be called NA
        table = pd.read_csv(path, float_precision="round_trip", encoding="utf-8-sig", **names)
        probs = table.astype(np.float32)
    except FileNotFoundError:
        raise MelfoldError("no such predictions", str(path)) from None
    except (ValueError, pd.errors.ParserError) as error:
        raise MelfoldError(f"{path} is no table of probabilities", str(error).splitlines()[0]) from None
    check_probs(probs, str(path))
    return probs


def write_probs(path: Path, probs: Probs) -> None:
    """Write 9 significant digits, which give every float32 back exactly."""
    with atomic_path(path) as temporary:
        probs.to_csv(temporary, index_label="fname", float_format="%.9g", lineterminator="\n")


def align(probs: Probs, fnames: pd.Index | Sequence[str], labels: Sequence[str], source: str) -> Probs:
    """Rows and columns of `probs` in the asked order.

    Raises:
        MelfoldError: a clip or a label that is not there.
    """
    for axis, wanted, present in (("clips", fnames, probs.index), ("labels", labels, probs.columns)):
        missing = pd.Index(wanted).difference(present)
        if len(missing):
            raise MelfoldError(f"{source}: {len(missing)} {axis} missing", ", ".join(missing[:5]))
    return probs.loc[list(fnames), list(labels)]


MEANS = ("arithmetic", "geometric", "logit", "rank")


def mean_probs(tables: Sequence[Probs], kind: str, weights: Sequence[float] | None = None) -> Probs:
    """The mean of several predictions for the same clips and labels.

    Args:
        tables: at least one; rows and columns are aligned by name to the first.
        kind: `arithmetic`; `geometric` (the mean of logarithms, not renormalised: labels are independent); `logit` (the mean of
            logits); `rank` (the mean of each label's rank within its clip, which is all that lwlrap sees, scaled to 0..1).
        weights: one a table, not negative; equal where not given.

    Raises:
        MelfoldError: tables that differ in their clips or labels, an unknown kind, or weights that do not fit.
    """
    first = tables[0]
    for table in tables[1:]:
        if len(table) != len(first) or len(table.columns) != len(first.columns):
            raise MelfoldError("predictions of different clips cannot be averaged", f"{table.shape} and {first.shape}")
    values = np.stack([align(t, first.index, first.columns, "predictions").to_numpy(np.float64) for t in tables])
    mean = np.tensordot(check_weights(weights, len(tables)), to_mean(values, kind), 1)
    if kind == "geometric":
        mean = np.exp(mean)
    elif kind == "logit":
        mean = 1 / (1 + np.exp(-mean))
    return make_probs(mean, list(first.index), list(first.columns))


def check_weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """Weights of a mean, scaled to a sum of 1.

    Raises:
        MelfoldError: another number of them, a negative or no finite one, or nothing but zeros.
    """
    given = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (count,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        found = ",".join(f"{w:g}" for w in given)
        raise MelfoldError("weights do not fit", f"{found} for {count}", "Give one a run, none negative, not all 0")
    return given / given.sum()


def to_mean(values: np.ndarray, kind: str) -> np.ndarray:
    """What a mean of a kind is linear in: probabilities, their logarithms, their logits, or ranks."""
    # A float32 probability may be 0 or 1; its neighbour stands in, as one model's zero must not veto the others.
    tiny, almost = np.finfo(np.float32).tiny, float(np.nextafter(np.float32(1), np.float32(0)))
    if kind == "arithmetic":
        return values
    if kind == "geometric":
        return np.log(np.maximum(values, tiny))
    if kind == "logit":
        inner = np.clip(values, tiny, almost)
        return np.log(inner) - np.log1p(-inner)
    if kind == "rank":
        # Ties share the mean of their ranks.
        return np.stack([pd.DataFrame(table).rank(axis=1).to_numpy() / (values.shape[-1] + 1) for table in values])
    raise MelfoldError("unknown mean", kind, f"Use {', '.join(MEANS)}")


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """In float64 and without overflow; a float32 one would saturate into ties."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)
