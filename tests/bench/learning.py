"""Training and prediction, against the same model without a loop of ours around it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from melfold import stages
from melfold.config import AugmentConfig, Recipe
from melfold.data.clips import ClipStore
from melfold.learn.augment import apply_augment, draw_augment
from melfold.learn.batches import Batch, draw_start, read_ahead, train_batches, window_batches
from melfold.learn.devices import Device, pick_device
from melfold.learn.model import Tagger, build_model
from melfold.learn.phases import Phase
from melfold.learn.predict import predict_logits
from melfold.learn.runs import FULL
from melfold.learn.start import start_run
from melfold.learn.train import train_fold
from melfold.recipes import load_recipe
from tests.bench.harness import Result, Turns, ratio_result, seconds_of, take_turns
from tests.bench.workspace import Workspace


def feed(work: Workspace) -> list[Result]:
    """Crops a second of 256 x 128, read, made float32 and augmented as a fold of `scratch` sees them, on two cores.

    Against FAT2019's habit: all log-mels in memory, and two `DataLoader` workers that augment clip by clip with the same
    methods in NumPy. What is not measured is a GPU: there our augmentation runs on it, and the processor has only to read.
    """
    length, batch, steps = 256, 64, work.pick(60, 3)
    recipe = load_recipe("scratch", [f"train.batch_size={batch}", "train.pad=wrap"])
    config, front = recipe.augment, recipe.logmel
    fnames = list(work.competition.curated.index)
    store = ClipStore(work.cache, fnames, front.n_mels, front.top_db)
    device = pick_device("cpu")
    silence = torch.tensor(-50.0)
    targets = np.eye(80, dtype=np.float32)[np.arange(len(fnames)) % 80]

    def batches() -> Iterator[Batch]:
        phase = Phase(recipe.train, 0, steps, np.arange(len(fnames)))
        return train_batches(store, [phase], length=length, seeds=(0, 0))

    def ours() -> None:
        for step, read in enumerate(read_ahead(batches(), device)):
            draw = draw_augment(config, batch, front.n_mels, length, np.random.default_rng([0, step]))
            apply_augment(draw, device.log_mels(read.log_mels), device.tensor(targets[read.rows]), silence, device)

    def reading() -> None:
        for read in read_ahead(batches(), device):
            device.log_mels(read.log_mels)

    clips = [np.load(work.cache / f"{fname[:-4]}.npy").astype(np.float32) for fname in fnames]
    peer = InMemory(clips, targets, length, batch * steps, config)
    loader = DataLoader(peer, batch_size=batch, num_workers=2, persistent_workers=True)

    def theirs() -> None:
        for _ in loader:
            pass

    turns = take_turns(ours, theirs, work.pick(5, 1))
    read_rate = batch * steps / statistics.median(seconds_of(reading) for _ in range(work.pick(5, 1)))
    rate, _ = turns.rates(batch * steps)
    notes = {"spread": turns.spread, "without_augmentation": round(read_rate), "threads": torch.get_num_threads()}
    return [
        Result("feed", "goal", rate, None, "crops/s", rate, "crops/s", 2000, 4000, notes=notes),
        ratio_result("feed", "in memory, augmented clip by clip", turns, batch * steps, "crops/s", bound=0.6, aim=1),
    ]


class InMemory(Dataset):
    """FAT2019's habit: log-mels `(frames, n_mels)` in memory; crops, SpecAugment and mixup for each clip, in NumPy."""

    def __init__(self, clips: list[np.ndarray], targets: np.ndarray, length: int, size: int, config: AugmentConfig) -> None:
        self.clips, self.targets, self.length, self.size, self.config = clips, targets, length, size, config

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(number)
        row = number % len(self.clips)
        crop, target = self._crop(row, rng), self.targets[row]
        if rng.random() < self.config.mixup_prob:
            other = int(rng.integers(len(self.clips)))
            louder = self._crop(other, rng) + np.float32(rng.uniform(-self.config.mixup_gain_db, self.config.mixup_gain_db))
            crop = 10 * np.log10(10 ** (crop / 10) + 10 ** (louder / 10))
            target = np.maximum(target, self.targets[other])
        masks = ((self.config.time_masks, self.config.time_mask_width), (self.config.freq_masks, self.config.freq_mask_width))
        for axis, (count, width) in enumerate(masks):
            for _ in range(count):
                size = int(rng.integers(0, int(width * crop.shape[axis]) + 1))
                begin = int(rng.integers(0, crop.shape[axis] - size + 1))
                crop[(slice(None),) * axis + (slice(begin, begin + size),)] = -50
        return np.ascontiguousarray(crop.T[None]), target

    def _crop(self, row: int, rng: np.random.Generator) -> np.ndarray:
        clip = self.clips[row]
        start = draw_start(len(clip), self.length, "wrap", rng)
        return np.take(clip, np.arange(start, start + self.length), axis=0, mode="wrap")


def train(work: Workspace) -> list[Result]:
    """Steps a second of `train_fold`, between its steps those of a bare step with the same model on one random batch.

    The bare step is forward, BCE, backward, clipping, AdamW and EMA under the same autocast; the loop adds reading,
    augmentation, the schedule and looks at the loss. `train_fold` tells its progress after each step (on a GPU after
    each twenty); there the bare side has its turn. Building, the first steps and saving are not timed.
    """
    device = pick_device()
    steps = work.pick(28, 5) if device.torch.type == "cpu" else work.pick(400, 60)
    recipe = _train_recipe(work, steps)
    table, _ = stages.folds(work.competition, work.home, recipe)
    run = start_run(work.home, "bench", recipe, work.competition, table)
    watch = _Watch(_BareStep(recipe, len(work.competition.labels), device), skip=work.pick(3, 1))
    train_fold(run, FULL, work.cache, device, progress=watch)
    clips = recipe.train.batch_size
    return [
        ratio_result(
            "train",
            "bare step",
            watch.turns,
            clips,
            "clips/s",
            bound=0.95,
            aim=0.95,
            model=recipe.model.name,
            device=str(device.torch),
            amp=str(device.amp),
            threads=torch.get_num_threads(),
            step_ms=[round(1000 * statistics.median(side)) for side in (watch.turns.ours, watch.turns.theirs)],
            pairs=len(watch.turns.ours),
        )
    ]


def _train_recipe(work: Workspace, steps: int) -> Recipe:
    batch = work.pick(16, 4)
    return load_recipe(
        "scratch",
        [
            f"model.name={'convnext_atto' if work.quick else 'convnext_tiny'}",
            "model.kwargs={}",
            f"train.epochs={steps * batch / len(work.competition.curated)}",
            f"train.batch_size={batch}",
            f"train.crop_seconds={0.64 if work.quick else 2.56}",
            "train.ema_decay=0.999",
            "train.warmup_epochs=0",
            "train.validate_every=0",
            "train.checkpoint_minutes=1000",
            "augment.mixup_prob=0.5",
            "train.clips=curated",
            "phases=[]",
        ],
    )


class _BareStep:
    """A training step and nothing else."""

    def __init__(self, recipe: Recipe, n_labels: int, device: Device) -> None:
        config, n_mels = recipe.train, recipe.logmel.n_mels
        self.device, self.clip = device, config.clip_grad
        self.model = build_model(recipe.model, n_labels, n_mels, recipe.crop_frames).to(device.torch).train()
        fused = {"fused": True} if device.torch.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **fused)
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
        self.log_mels = torch.randn(config.batch_size, 1, n_mels, recipe.crop_frames, device=device.torch)
        self.targets = (torch.rand(config.batch_size, n_labels, device=device.torch) < 0.1).float()
        self.scaler = device.scaler()
        self.done = 0

    def __call__(self) -> None:
        with self.device.autocast():
            logits = self.model(self.log_mels)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model, step=self.done)
        self.done += 1


class _Watch:
    """A `Progress` that times the loop between its calls, and as many bare steps within each call."""

    def __init__(self, bare: _BareStep, skip: int) -> None:
        self.bare, self.skip = bare, skip
        self.turns = Turns([], [])
        self._calls = self._done = 0
        self._mark = 0.0

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.perf_counter()
        steps = done - self._done
        begin = time.perf_counter()
        for _ in range(steps):
            self.bare()
        self._wait()
        if self._calls >= self.skip:
            self.turns.ours.append((now - self._mark) / steps)
            self.turns.theirs.append((time.perf_counter() - begin) / steps)
        self._calls += 1
        self._done = done
        self._mark = time.perf_counter()

    def _wait(self) -> None:
        if self.bare.device.torch.type == "cuda":
            torch.cuda.synchronize(self.bare.device.torch)


def predict(work: Workspace) -> list[Result]:
    """Windows a second of `predict_logits`, from cache to mean logits, against bare forwards over batches of equal sizes."""
    device = pick_device()
    sizes = {"convnext_atto": work.pick(54, 4), "convnext_tiny": work.pick(32, 2)}
    return [_predict(work, name, clips, device) for name, clips in sizes.items() if not work.quick or name == "convnext_atto"]


def _predict(work: Workspace, name: str, clips: int, device: Device) -> Result:
    recipe = load_recipe("scratch", [f"model.name={name}", "model.kwargs={}", "train.crop_seconds=2.56", "predict.batch_size=32"])
    front, frames = recipe.logmel, recipe.views[0].length
    store = ClipStore(work.cache, list(work.competition.curated.index)[:clips], front.n_mels, front.top_db)
    model = build_model(recipe.model, len(work.competition.labels), front.n_mels, frames).to(device.torch).eval()
    batches = window_batches(store, recipe.views[0], overlap=recipe.predict.overlap, batch_size=recipe.predict.batch_size)
    sizes = [len(batch.rows) for batch in batches]
    log_mels = torch.randn(max(sizes), 1, front.n_mels, frames, device=device.torch)
    turns = take_turns(
        lambda: predict_logits(model, store, recipe, device, recipe.views[0]),
        lambda: _forwards(model, log_mels, sizes),
        work.pick(5 if name == "convnext_atto" else 3, 1),
    )
    return ratio_result(
        f"predict {name}",
        "bare forward",
        turns,
        sum(sizes),
        "windows/s",
        bound=0.9,
        aim=0.9,
        batches=len(sizes),
        windows=sum(sizes),
    )


def _forwards(model: Tagger, log_mels: torch.Tensor, sizes: list[int]) -> list[np.ndarray]:
    with torch.inference_mode():
        return [model(log_mels[:size]).cpu().numpy() for size in sizes]
