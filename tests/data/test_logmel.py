"""Log-mels against librosa, on sounds that are hard for a fast transform."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest

from melfold.config import LogMelConfig
from melfold.data.audio import read_waveform
from melfold.data.logmel import LogMel, log_mel_of

FRONT_ENDS = {
    "1st": LogMelConfig(n_fft=2560, hop_length=690),
    "post-deadline": LogMelConfig(n_fft=1764, hop_length=882, fmin=50, fmax=16_000),
    "audioset": LogMelConfig(sr=32_000, n_fft=1024, hop_length=320, n_mels=224, fmin=50, fmax=14_000),
    "with gaps": LogMelConfig(sr=16_000, n_fft=256, hop_length=1000, n_mels=16, fmax=8_000),
    "odd sizes": LogMelConfig(
        sr=16_000, n_fft=401, hop_length=161, n_mels=33, fmin=0, fmax=7_000, window="hamming", htk=True, norm=None
    ),
}


def tones_and_silence(sr: int) -> np.ndarray:
    t = np.arange(2 * sr) / sr
    tones = np.sin(2 * np.pi * 440 * t) + 0.5 * np.sin(2 * np.pi * 5000 * t)
    return np.where((t > 0.5) & (t < 1.5), 0.3 * tones, 0)


def clicks(sr: int) -> np.ndarray:
    wave = np.zeros(sr)
    wave[[0, 777, sr // 2, sr - 1]] = 1, -1, 1e-3, 1
    return wave


def noise(sr: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, sr + 13)


def quiet_noise(sr: int) -> np.ndarray:
    return 1e-4 * noise(sr)


def full_scale_square(sr: int) -> np.ndarray:
    return np.sign(np.sin(2 * np.pi * 100.5 * np.arange(sr) / sr))


def short(sr: int) -> np.ndarray:
    return noise(sr)[:200]


def one_sample(sr: int) -> np.ndarray:
    return np.array([0.5])


def silence(sr: int) -> np.ndarray:
    return np.zeros(sr // 3)


Signal = Callable[[int], np.ndarray]
SIGNALS: tuple[Signal, ...] = (tones_and_silence, clicks, noise, quiet_noise, full_scale_square, short, one_sample, silence)


def oracle(waveform: np.ndarray, config: LogMelConfig) -> np.ndarray:
    """librosa's own log-mel, `(frames, n_mels)`; its FFT is in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a clip shorter than n_fft; bands narrower than a bin
        mel = librosa.feature.melspectrogram(y=waveform, **config.model_dump(exclude={"top_db"}))
        return librosa.power_to_db(mel, ref=1.0, top_db=config.top_db).T


def ours(waveform: np.ndarray, config: LogMelConfig) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogMel(config)(waveform)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("front_end", list(FRONT_ENDS))
def test_equals_librosa_within_a_thousandth_of_a_db(front_end: str, signal: Signal) -> None:
    config = FRONT_ENDS[front_end]
    waveform = signal(config.sr).astype(np.float32)
    found, expected = ours(waveform, config), oracle(waveform, config)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("front_end", list(FRONT_ENDS))
def test_as_stored_no_value_is_more_than_a_float16_step_or_a_thousandth_of_a_db_from_librosas(
    front_end: str, signal: Signal
) -> None:
    config = FRONT_ENDS[front_end]
    waveform = signal(config.sr).astype(np.float32)
    found, expected = ours(waveform, config).astype(np.float16), oracle(waveform, config).astype(np.float16)
    step = np.spacing(np.maximum(np.abs(found), np.abs(expected))).astype(np.float32)
    assert (np.abs(found.astype(np.float32) - expected.astype(np.float32)) <= np.maximum(step, 1e-3)).all()


def pure_tones(sr: int, count: int) -> list[np.ndarray]:
    """Tones of many pitches and strengths: between their partials there is only the rounding of the FFT."""
    rng, t = np.random.default_rng(0), np.arange(sr) / sr
    return [(rng.uniform(0.05, 1) * np.sin(2 * np.pi * rng.uniform(50, sr / 2) * t)).astype(np.float32) for _ in range(count)]


def test_pure_tones_equal_librosas_within_a_thousandth_of_a_db() -> None:
    config = LogMelConfig()
    assert max(np.abs(ours(tone, config) - oracle(tone, config)).max() for tone in pure_tones(config.sr, 40)) <= 1e-3


@pytest.mark.parametrize("config", [LogMelConfig(), *FRONT_ENDS.values()], ids=["default", *FRONT_ENDS])
def test_pure_tones_as_stored_are_within_a_float16_step_of_librosas(config: LogMelConfig) -> None:
    for tone in pure_tones(config.sr, 8):
        found, expected = ours(tone, config).astype(np.float16), oracle(tone, config).astype(np.float16)
        step = np.spacing(np.maximum(np.abs(found), np.abs(expected))).astype(np.float32)
        assert (np.abs(found.astype(np.float32) - expected.astype(np.float32)) <= np.maximum(step, 1e-3)).all()


@pytest.mark.parametrize("front_end", list(FRONT_ENDS)[:3])
def test_equals_librosa_on_real_recordings(front_end: str, esc10: Path) -> None:
    config = FRONT_ENDS[front_end]
    for path in sorted((esc10 / "train_curated").iterdir())[::40]:
        waveform, _ = read_waveform(path, config.sr)
        np.testing.assert_allclose(ours(waveform, config), oracle(waveform, config), rtol=0, atol=1e-3, err_msg=path.name)


def test_no_value_is_further_below_the_peak_than_top_db() -> None:
    config = LogMelConfig(top_db=30)
    values = LogMel(config)(tones_and_silence(config.sr).astype(np.float32))
    assert values.min() == values.max() - np.float32(30)


@pytest.mark.parametrize("config", FRONT_ENDS.values(), ids=FRONT_ENDS)
@pytest.mark.parametrize("sizes", [[7], [100, 5, 9_000, 1, 20_000], [3_000] * 9], ids=str)
def test_blocks_of_any_size_give_the_log_mel_of_the_whole(config: LogMelConfig, sizes: list[int]) -> None:
    whole = noise(config.sr)[: sum(sizes)].astype(np.float32)
    log_mel = LogMel(config)
    parts = list(log_mel.stream(iter(np.split(whole, np.cumsum(sizes)[:-1]))))
    limited = np.concatenate(parts)
    # A matrix product's last bit may depend on its number of rows.
    np.testing.assert_allclose(np.maximum(limited, limited.max() - np.float32(config.top_db)), log_mel(whole), rtol=0, atol=1e-5)


def test_a_transform_is_made_once_per_configuration() -> None:
    assert log_mel_of(LogMelConfig()) is log_mel_of(LogMelConfig())
    assert log_mel_of(LogMelConfig()) is not log_mel_of(LogMelConfig(n_mels=64))
