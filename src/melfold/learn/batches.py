"""Batches of training crops and of evaluation windows, read ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from melfold.config import View
from melfold.data.clips import ClipStore, Pad, window_starts
from melfold.learn.devices import Device
from melfold.learn.phases import Phase


@dataclass(frozen=True)
class Batch:
    """`log_mels`: float16 dB `(clips, frames, n_mels)`. `rows`: which clip of the store each one is. `noisy`: bool `(clips,)`."""

    log_mels: np.ndarray | torch.Tensor
    """A tensor in pinned memory, if it comes from `read_ahead`."""
    rows: np.ndarray
    noisy: np.ndarray


def draw_start(frames: int, length: int, pad: Pad, rng: np.random.Generator) -> int:
    """Where a training crop begins: anywhere within a longer clip, or so that a shorter one lies anywhere in the crop."""
    if frames >= length:
        return int(rng.integers(0, frames - length + 1))
    return int(rng.integers(0, frames)) if pad == "wrap" else int(rng.integers(frames - length, 1))


def train_batches(
    store: ClipStore,
    phases: Sequence[Phase],
    *,
    length: int,
    seeds: Sequence[int],
    first_step: int = 0,
    first_noisy: int | None = None,
) -> Iterator[Batch]:
    """Random crops, for the steps from `first_step` to the end of the last phase.

    In each phase clips come in an endless row of shuffled passes over its rows, cut into equal batches, and each step draws
    from a generator of its own: the batch of a step does not depend on where reading started, so that a resumed run sees what it
    would have seen.

    Args:
        first_noisy: the row of the first noisy clip; None if there is none.
    """
    first_noisy = len(store.fnames) if first_noisy is None else first_noisy
    for number, phase in enumerate(phases):
        n, batch_size, pad = len(phase.rows), phase.config.batch_size, phase.config.pad
        orders: dict[int, np.ndarray] = {}
        for step in range(max(first_step, phase.begin), phase.until):
            positions = (step - phase.begin) * batch_size + np.arange(batch_size)
            passes = positions // n
            for p in np.unique(passes):
                if p not in orders:
                    orders[p] = np.random.default_rng([*seeds, 10 * number, int(p)]).permutation(n)
            rows = phase.rows[[orders[p][i] for p, i in zip(passes, positions % n, strict=True)]]
            orders = {p: order for p, order in orders.items() if p >= passes[-1]}
            rng = np.random.default_rng([*seeds, 1, step])
            log_mels = np.empty((batch_size, length, store.n_mels), np.float16)
            for out, row in zip(log_mels, rows, strict=True):
                store.read(row, draw_start(int(store.frames[row]), length, pad, rng), out, pad)
            yield Batch(log_mels, rows, rows >= first_noisy)


def window_batches(store: ClipStore, view: View, *, overlap: float, batch_size: int) -> Iterator[Batch]:
    """Evaluation windows of all clips in order; every batch but the last is full, whatever the clips' lengths."""
    windows = [
        (row, start)
        for row, frames in enumerate(store.frames)
        for start in window_starts(int(frames), view.length, overlap, view.shift, view.pad)
    ]
    for begin in range(0, len(windows), batch_size):
        part = windows[begin : begin + batch_size]
        log_mels = np.empty((len(part), view.length, store.n_mels), np.float16)
        for out, (row, start) in zip(log_mels, part, strict=True):
            store.read(row, start, out, view.pad)
        yield Batch(log_mels, np.array([row for row, _ in part]), np.zeros(len(part), bool))


def read_ahead(batches: Iterable[Batch], device: Device) -> Iterator[Batch]:
    """Batches read in a background thread, in memory from which the device can copy them while it computes."""
    return prefetch(replace(batch, log_mels=device.pinned(batch.log_mels)) for batch in batches)


T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 3) -> Iterator[T]:
    """Iterate in a background thread, up to `depth` items ahead; its errors are raised here.

    One thread is enough: a crop is one read of some tens of microseconds, against milliseconds of a training step.
    """
    source, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        ahead = deque(pool.submit(next, source, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
