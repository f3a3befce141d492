"""Reading waveforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from melfold.data.audio import read_waveform
from melfold.errors import MelfoldError
from tests.conftest import write_wav


def test_reading_resamples_and_mixes_down_and_says_so(tmp_path: Path) -> None:
    t = np.arange(48_000) / 48_000
    tone = 0.5 * np.sin(2 * np.pi * 1000 * t)
    stereo, flags = read_waveform(write_wav(tmp_path / "a.wav", np.stack([tone, np.zeros_like(tone)], 1), 48_000), 16_000)
    assert flags == ["downmixed", "resampled"]
    assert (stereo.dtype, stereo.shape) == (np.float32, (16_000,))
    expected = 0.25 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(stereo[200:-200], expected[200:-200], atol=2e-3)
    mono, flags = read_waveform(write_wav(tmp_path / "b.wav", tone, 48_000), 48_000)
    assert flags == []
    np.testing.assert_allclose(mono, tone, atol=2**-15)


def test_a_clip_without_a_sample_after_resampling_is_refused(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.array([0.5]), 44_100)
    with pytest.raises(MelfoldError, match=r"unreadable audio: a\.wav \(no samples left at 8000 Hz\)"):
        read_waveform(path, 8_000)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "x.wav"), (b"RIFF1234WAVEjunk", "x.wav"), ("empty", "no samples"), ("nan", "samples that are not finite")],
)
def test_audio_that_cannot_be_read_is_refused_and_never_becomes_silence(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "x.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, np.array([0.1, np.nan] if content == "nan" else []), 16_000, subtype="FLOAT")
    with pytest.raises(MelfoldError, match=f"unreadable audio: .*{said}"):
        read_waveform(path, 16_000)


def test_samples_far_beyond_full_scale_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.array([0.1, 1e30]), 16_000, subtype="FLOAT")
    with pytest.raises(MelfoldError, match=r"unreadable audio: x\.wav \(samples of 1e\+30\)"):
        read_waveform(tmp_path / "x.wav", 16_000)
    soundfile.write(tmp_path / "y.wav", np.array([0.1, -(2.0**31)]), 16_000, subtype="FLOAT")
    assert read_waveform(tmp_path / "y.wav", 16_000)[0].min() == -(2.0**31), "integers as floats"


@pytest.mark.parametrize("suffix", [".ogg", ".flac"])
def test_compressed_audio_that_was_cut_short_is_never_a_short_clip(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 40_000), 16_000)
    whole = path.read_bytes()
    assert len(read_waveform(path, 16_000)[0]) == 40_000
    between_pages = whole.rfind(b"OggS") if suffix == ".ogg" else len(whole) // 2
    for length in (*(int(share * len(whole)) for share in (0.3, 0.6, 0.9, 0.999)), between_pages):
        path.write_bytes(whole[:length])
        with pytest.raises(MelfoldError, match="unreadable audio"):
            read_waveform(path, 16_000)
