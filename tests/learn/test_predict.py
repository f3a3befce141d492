"""The one prediction: windows over the whole clip, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from learn_world import World

from melfold.data.clips import window_starts
from melfold.learn.model import Tagger, build_model
from melfold.learn.predict import predict_logits, predict_probs, sigmoid


@pytest.fixture(scope="module")
def tagger(world: World) -> Tagger:
    torch.manual_seed(0)
    recipe = world.recipe()
    model = build_model(recipe.model, len(world.competition.labels), recipe.logmel.n_mels, recipe.views[0].length)
    model.normalise.set(-40, 20)
    torch.nn.init.normal_(model.head.weight)  # timm's small initial head would make any two windows look alike
    return model


def probs_of(world: World, tagger: Tagger, fnames: list[str], *sets: str):
    return predict_probs(tagger, world.store(fnames), world.competition.labels, world.recipe(*sets), world.device)


def by_hand(world: World, tagger: Tagger, fname: str, shift: int, overlap: float = 0.5) -> np.ndarray:
    """The mean logits of a clip's windows, one at a time."""
    recipe, store = world.recipe(), world.store([fname])
    logits = []
    for start in window_starts(int(store.frames[0]), recipe.views[0].length, overlap, shift, recipe.train.pad):
        out = np.empty((recipe.views[0].length, store.n_mels), np.float16)
        store.read(0, start, out, recipe.train.pad)
        with torch.inference_mode():
            logits.append(tagger.eval()(torch.from_numpy(out).float().T[None, None])[0].double().numpy())
    return np.mean(logits, axis=0)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_the_batch_size_does_not_matter(world: World, tagger: Tagger, batch_size: int) -> None:
    fnames = list(world.competition.test.index[:20])
    usual = probs_of(world, tagger, fnames)
    np.testing.assert_allclose(probs_of(world, tagger, fnames, f"predict.batch_size={batch_size}"), usual, atol=1e-5, rtol=0)
    assert usual.std(axis=0).min() > 1e-4


def test_the_order_of_clips_does_not_matter(world: World, tagger: Tagger) -> None:
    fnames = list(world.competition.test.index[:20])
    usual, backwards = probs_of(world, tagger, fnames), probs_of(world, tagger, fnames[::-1])
    assert list(backwards.index) == fnames[::-1]
    np.testing.assert_allclose(backwards.loc[fnames], usual, atol=1e-5, rtol=0)


def test_a_long_clip_is_the_mean_of_windows_that_cover_it(world: World, tagger: Tagger) -> None:
    store = world.store(list(world.competition.test.index))
    length = world.recipe().views[0].length
    row = int(store.frames.argmax())
    frames = int(store.frames[row])
    starts = window_starts(frames, length, 0.5, 0, "wrap")
    assert len(starts) > 2
    assert set().union(*(range(s, s + length) for s in starts)) == set(range(frames))
    logits = predict_logits(tagger, world.store([store.fnames[row]]), world.recipe(), world.device, world.recipe().views[0])
    np.testing.assert_allclose(logits[0], by_hand(world, tagger, store.fnames[row], 0), atol=1e-4)


def test_shifts_are_averaged_as_logits(world: World, tagger: Tagger) -> None:
    fname = world.competition.test.index[0]
    probs = probs_of(world, tagger, [fname], "predict.shift_seconds=[0.0, 0.2]")
    shift = world.recipe().frames(0.2)
    logits = np.mean([by_hand(world, tagger, fname, 0), by_hand(world, tagger, fname, shift)], axis=0)
    np.testing.assert_allclose(probs.to_numpy()[0], scipy.special.expit(logits), atol=1e-5)
    assert not np.allclose(probs, probs_of(world, tagger, [fname]), atol=1e-5)


def test_the_model_is_left_in_its_mode(world: World, tagger: Tagger) -> None:
    for mode in (True, False):
        tagger.train(mode)
        probs_of(world, tagger, [world.competition.test.index[0]])
        assert tagger.training is mode


def test_the_sigmoid_keeps_order_without_overflow() -> None:
    logits = np.array([-800, -700, -40, -20, -1, 0, 1, 20, 30, 36])
    with np.errstate(over="raise", invalid="raise"):
        probs = sigmoid(logits)
    np.testing.assert_allclose(probs, scipy.special.expit(logits), rtol=1e-12, atol=0)
    assert (np.diff(probs[1:]) > 0).all()
    assert sigmoid(np.array([-30.0, -31.0])).astype(np.float32)[0] > sigmoid(np.array([-30.0, -31.0])).astype(np.float32)[1]
