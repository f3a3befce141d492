"""Phases: what each draws from, how long it is, its learning rate, and that the training loop keeps to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from learn_world import World

from melfold.config import TrainConfig
from melfold.learn import train
from melfold.learn.batches import Batch
from melfold.learn.phases import Phase, epochs_at, phase_at, phases_of
from melfold.learn.runs import FoldFolder, Run
from melfold.learn.state import TrainState
from melfold.recipes import load_recipe

SETS = ("train.batch_size=10", "phases.0={clips = 'both', curated_times = 3, epochs = 2}", "phases.1.clips=noisy")
SETS += ("phases.2={epochs = 0.5, lr = 0.25, lr_min = 0.0625, warmup_epochs = 0.1}", "train.validate_every=0.75")


def test_an_epoch_is_a_pass_over_what_its_phase_draws_from() -> None:
    phases = phases_of(load_recipe("base", [*SETS, "train.epochs=1"]), 100, 40)
    assert Counter(phases[0].rows.tolist()) == dict.fromkeys(range(100), 3) | dict.fromkeys(range(100, 140), 1)
    assert sorted(phases[1].rows) == list(range(100, 140))
    assert sorted(phases[2].rows) == list(range(100))
    assert [(p.begin, p.until) for p in phases] == [(0, 68), (68, 72), (72, 77)]
    assert [phase_at(phases, step) for step in (0, 67, 68, 71, 72, 76, 77)] == [0, 0, 1, 1, 2, 2, 2]
    assert [epochs_at(phases, step) for step in (34, 68, 70, 77)] == [1, 2, 2.5, 3.5]


def test_the_held_out_fold_is_scored_by_the_epochs_of_each_phase() -> None:
    phases = phases_of(load_recipe("base", [*SETS, "train.epochs=1"]), 100, 40)
    assert [list(phase.looks()) for phase in phases] == [[26, 52], [71], []]
    assert not list(phases_of(load_recipe("base", ["train.validate_every=0"]), 100, 0)[0].looks())


def test_each_phase_warms_up_and_falls_along_half_a_cosine_of_its_own() -> None:
    config = TrainConfig(lr=1.0, lr_min=0.25, warmup_epochs=0.25, batch_size=1)
    phase = Phase(config, 10, 30, np.arange(20))
    rates = [phase.learning_rate(step) for step in range(10, 30)]
    assert phase.warmup == 5
    np.testing.assert_allclose(rates[:6], [0.25, 0.4, 0.55, 0.7, 0.85, 1.0])
    falling = np.arange(15) / 15
    np.testing.assert_allclose(rates[5:], 0.25 + 0.75 * (1 + np.cos(np.pi * falling)) / 2)
    short = Phase(config, 0, 2, np.arange(20))
    assert [short.learning_rate(step) for step in range(2)] == [0.25, 1.0], "a short phase ends its warm-up in time"


Spy = Callable[[Run], list[tuple[float, bool, object, int]]]


@pytest.fixture
def steps_of(world: World, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Trains fold 0 of a run. Returns: of each step the learning rate, whether the loss ranks, the generator's state or None,
    and torch's seed."""
    step, seen = train.train_step, []

    def spy(state: TrainState, batch: Batch, targets: np.ndarray, recipe: object, rng: np.random.Generator | None) -> object:
        drawn = rng and str(rng.bit_generator.state)
        logits, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
        ranks = torch.allclose(state.loss_of(logits, target), state.loss_of(logits + 5, target))
        seen.append((state.lr, ranks, drawn, torch.initial_seed()))
        return step(state, batch, targets, recipe, rng)

    def go(run: Run) -> list[tuple[float, bool, object, int]]:
        train.train_fold(run, 0, world.cache, world.device)
        return seen

    monkeypatch.setattr(train, "train_step", spy)
    return go


PHASES = ("phases.0={epochs = 0.6}", "phases.1={epochs = 0.4, lr = 0.25, warmup_epochs = 0, loss = 'lsep', augment = false}")


def test_each_phase_trains_with_its_own_rate_loss_and_augmentation(world: World, tmp_path: Path, steps_of: Spy) -> None:
    run = world.start(tmp_path, *PHASES, "train.lr_min=0.125", "train.lr=0.5")
    seen = steps_of(run)
    rates, ranks, drawn, seeds = zip(*seen, strict=True)
    assert rates[:3] == (0.125, 0.3125, 0.5)
    assert rates[4] == 0.25
    assert len(seen) == 7
    assert ranks == (False,) * 4 + (True,) * 3
    assert [state is None for state in drawn] == [False] * 4 + [True] * 3
    assert len(set(drawn[:4])) == 4, "each step draws another augmentation"
    assert len(set(seeds)) == 7, "and another dropout"
    rows = [json.loads(line) for line in run.fold(0).log.read_text().splitlines()]
    assert [(row["step"], row["phase"], row["epoch"]) for row in rows] == [(7, 1, 1.077)] * 2


def test_a_stop_in_any_phase_changes_no_byte(world: World, tmp_path: Path) -> None:
    def contents(folder: FoldFolder) -> list[bytes]:
        return [(folder.path / name).read_bytes() for name in ("weights.safetensors", "oof.csv")]

    told: list[str] = []
    whole = train.train_fold(
        world.start(tmp_path / "a", *PHASES), 0, world.cache, world.device, progress=lambda *args: told.append(args[2])
    )
    assert [text.split(": ")[1].split(", loss")[0] for text in told] == ["phase 0, 1 of 2"] * 4 + ["phase 1, 2 of 2"] * 3
    run = world.start(tmp_path / "b", *PHASES, "train.checkpoint_minutes=0")
    for step in (2, 4, 5, 6):

        def stop(done: int, total: int, text: str, step: int = step) -> None:
            if done == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train.train_fold(run, 0, world.cache, world.device, progress=stop)
    assert contents(train.train_fold(run, 0, world.cache, world.device)) == contents(whole)
