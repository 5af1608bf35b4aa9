"""KaldiFbank against golden vectors and torchaudio's Kaldi."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from bat.audio.frontend import STATISTICS, KaldiFbank, kaldi_bank

TOLERANCE = 1e-3  # the golden vectors' own advice
NAMES = {"eat": "EAT", "beats": "BEATs"}
every_kind = pytest.mark.parametrize("kind", NAMES)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.1


def raw(front_end: KaldiFbank, out: Tensor) -> Tensor:
    return out * 2 * front_end.std + front_end.mean


def by_torchaudio(wave: Tensor, kind: str, *, rate: int = 16000, samples: int = 0) -> Tensor:
    """One clip (S,), zeros up to ``samples`` after its mean is removed: (T, 128), unscaled."""
    wave = wave - wave.mean() if kind == "eat" else wave * 2**15
    wave = torch.nn.functional.pad(wave, (0, max(0, samples - len(wave))))
    return torchaudio.compliance.kaldi.fbank(
        wave[None],
        htk_compat=kind == "eat",
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning" if kind == "eat" else "povey",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "legacy_frontend.npz", allow_pickle=False) as file:
        return dict(file)


@every_kind
@pytest.mark.parametrize(
    ("case", "samples", "statistics", "settings"),
    [
        ("audioset", 160000, "audioset", {"pad": "waveform"}),
        ("audioset", 160000, "audioset", {"pad": "clip", "clip_seconds": 10.23}),
        ("speechcommands_1s", 16000, "speechcommands", {}),
        ("speechcommands_1s", 16000, "speechcommands", {"pad": "clip", "clip_seconds": 1.0}),
    ],
)
def test_kaldi_fbank__golden(
    arrays: dict[str, np.ndarray],
    kind: str,
    case: str,
    samples: int,
    statistics: str,
    settings: dict,
) -> None:
    wave = torch.from_numpy(arrays["wave_16k_10s"])[None, :samples]
    front_end = KaldiFbank(kind=kind, statistics=statistics, **settings)  # type: ignore[arg-type]
    wanted = arrays[f"{case}_{NAMES[kind]}"]
    out = front_end(wave, len(wanted))[0, 0]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE)
    if case == "speechcommands_1s":
        unscaled = arrays[f"raw_fbank_1s_{NAMES[kind]}"]
        np.testing.assert_allclose(raw(front_end, out)[:98], unscaled, rtol=1e-4, atol=TOLERANCE)


def test_kaldi_fbank__golden_esc50_tables_and_statistics(arrays: dict[str, np.ndarray]) -> None:
    wave = torch.from_numpy(arrays["wave_16k_10s"])[None, :80000]
    out = KaldiFbank(statistics="esc50")(wave, 512)[0, 0]
    wanted = arrays["esc50_5s_EAT_first_and_last_frames"]
    np.testing.assert_allclose(torch.cat([out[:8], out[-24:]]), wanted, rtol=0, atol=TOLERANCE)
    eat, beats = KaldiFbank(kind="eat"), KaldiFbank(kind="beats")
    np.testing.assert_allclose(eat.filters.T[:, :256], arrays["kaldi_mel_banks"], atol=2e-5)
    assert not eat.filters[256].any()
    np.testing.assert_allclose(eat.window, arrays["window_hanning_400"], atol=1e-6)
    np.testing.assert_allclose(beats.window, arrays["window_povey_400"], atol=1e-6)
    data_sets = {
        "AudioSet": "audioset",
        "BirdSet": "hsn",
        "DCASE": "dcase16",
        "ESC50": "esc50",
        "LibriSpeech": "librispeech",
        "SpeechCommands": "speechcommands",
    }
    stats = json.loads(str(arrays["meta_json"]))["stats"]
    for kind, name in NAMES.items():
        theirs = {ours: stats[name][them] for them, ours in data_sets.items()}
        assert (
            STATISTICS[kind].items() >= {k: (v["mu"], v["std"]) for k, v in theirs.items()}.items()
        )


def test_kaldi_bank__equals_torchaudio() -> None:
    other, _ = torchaudio.compliance.kaldi.get_mel_banks(
        80, 1024, 32000.0, 20.0, 0.0, 100.0, -500.0, 1.0
    )
    bank = kaldi_bank(32000, 1024, 80, torch.device("cpu"))
    assert bank[:512].T.equal(other)


@every_kind
@pytest.mark.parametrize(
    ("samples", "rate"), [(400, 16000), (559, 16000), (9000, 16000), (9000, 32000)]
)
def test_kaldi_fbank__equals_torchaudio(kind: str, samples: int, rate: int) -> None:
    wave = 0.3 + noise(samples) * (rate / 16000)
    front_end = KaldiFbank(kind=kind, sample_rate=rate)  # type: ignore[arg-type]
    wanted = by_torchaudio(wave, kind, rate=rate)
    out = front_end(wave[None], 64)[0, 0]
    assert front_end.valid_frames(samples) == len(wanted)
    torch.testing.assert_close(raw(front_end, out)[: len(wanted)], wanted, rtol=0, atol=3e-4)
    assert not out[len(wanted) :].any()
    if rate == 16000:  # the mean is that of the unpadded clip
        padded = KaldiFbank(kind=kind, pad="clip", clip_seconds=0.6)  # type: ignore[arg-type]
        out = padded(wave[None], 64)[0, 0]
        wanted = by_torchaudio(wave, kind, samples=9600)
        torch.testing.assert_close(raw(padded, out)[:58], wanted, rtol=0, atol=3e-4)
        assert not out[58:].any()


@pytest.mark.parametrize("statistics", ["audioset-eat", "esc50-eat", "speechcommands-ast"])
def test_kaldi_fbank__zero_frames_before_standardising(statistics: str) -> None:
    wave = noise(9000)
    front_end = KaldiFbank(statistics=statistics, pad="fbank")
    fbank = torch.nn.functional.pad(by_torchaudio(wave, "eat"), (0, 0, 0, 10))  # (64, 128)
    mean, std = STATISTICS["eat"][statistics]
    out = front_end(wave[None], 64)[0, 0]
    torch.testing.assert_close(out, (fbank - mean) / (2 * std), rtol=0, atol=1e-4)
    assert out[-1, 0] == pytest.approx(-mean / (2 * std))


def test_kaldi_fbank__clips_shorter_than_a_window_are_one_frame() -> None:
    front_end = KaldiFbank(kind="beats")
    wave = noise(1, 100)
    whole = torch.nn.functional.pad(wave, (0, 300))
    torch.testing.assert_close(front_end(wave, 4), front_end(whole, 4), rtol=0, atol=0)
    assert front_end.valid_frames(torch.tensor([1, 399, 400, 559, 560])).tolist() == [1, 1, 1, 1, 2]


def test_kaldi_fbank__long_clips_are_cropped_first() -> None:
    wave = noise(1, 9000)
    wave[:, 6000:] += 1.0  # moves the mean of the whole, not of what is kept
    front_end = KaldiFbank()
    assert front_end.max_samples(32) == 400 + 32 * 160 - 1
    torch.testing.assert_close(front_end(wave, 32), front_end(wave[:, :5519], 32), rtol=0, atol=0)
    papers = KaldiFbank(crop="spectrogram")
    wanted = by_torchaudio(wave[0], "eat")[:32]
    torch.testing.assert_close(raw(papers, papers(wave, 32)[0, 0]), wanted, rtol=0, atol=2e-4)


def test_kaldi_fbank__silence_is_the_floor() -> None:
    front_end = KaldiFbank()
    out = front_end(torch.zeros(1, 4000), 32)[0, 0]
    assert raw(front_end, out)[:23] == pytest.approx(np.log(2.0**-23), abs=1e-5)
    assert not out[23:].any()
