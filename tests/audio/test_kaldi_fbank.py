"""KaldiFbank: against the golden vectors and torchaudio's Kaldi, clip by clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from bat.audio.filters import kaldi_bank
from bat.audio.frontend import STATISTICS, KaldiFbank
from bat.errors import UserError

TOLERANCE = 1e-3  # the golden vectors' own advice
KINDS = [("eat", "EAT"), ("beats", "BEATs")]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def raw(front_end: KaldiFbank, out: Tensor) -> Tensor:
    return out * 2 * front_end.std + front_end.mean


def by_torchaudio(wave: Tensor, kind: str, rate: int = 16000) -> Tensor:
    """One clip (S,) -> (T, 128), before standardisation."""
    wave = wave - wave.mean() if kind == "eat" else wave * 2**15
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


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_golden_audioset(arrays: dict[str, np.ndarray], kind: str, name: str) -> None:
    wave = torch.from_numpy(arrays["wave_16k_10s"])[None]
    out = KaldiFbank(kind=kind, pad="waveform")(wave, 1024)  # type: ignore[arg-type]
    np.testing.assert_allclose(out[0, 0], arrays[f"audioset_{name}"], rtol=0, atol=TOLERANCE)
    assert not out[0, 0, 1021:].any()


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_golden_speechcommands(arrays: dict[str, np.ndarray], kind: str, name: str) -> None:
    wave = torch.from_numpy(arrays["wave_16k_10s"])[None, :16000]
    front_end = KaldiFbank(kind=kind, statistics="speechcommands")  # type: ignore[arg-type]
    out = front_end(wave, 112)[0, 0]
    wanted = arrays[f"speechcommands_1s_{name}"]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE)
    unscaled = arrays[f"raw_fbank_1s_{name}"]
    np.testing.assert_allclose(raw(front_end, out)[:98], unscaled, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize(
    ("case", "samples", "seconds", "statistics"),
    [("audioset", 160000, 10.23, "audioset"), ("speechcommands_1s", 16000, 1.0, "speechcommands")],
)
def test_golden_padded_to_the_tasks_clip(
    arrays: dict[str, np.ndarray],
    kind: str,
    name: str,
    case: str,
    samples: int,
    seconds: float,
    statistics: str,
) -> None:
    wave = torch.from_numpy(arrays["wave_16k_10s"])[None, :samples]
    front_end = KaldiFbank(kind=kind, statistics=statistics, pad="clip", clip_seconds=seconds)  # type: ignore[arg-type]
    wanted = arrays[f"{case}_{name}"]
    out = front_end(wave, len(wanted))[0, 0]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["eat", "beats"])
def test_padded_to_the_clip_the_mean_is_that_of_the_unpadded(kind: str) -> None:
    wave = 0.3 + noise(9000)
    padded = torch.nn.functional.pad(wave - wave.mean() if kind == "eat" else wave, (0, 7000))
    wanted = torchaudio.compliance.kaldi.fbank(
        padded[None] * (1 if kind == "eat" else 2**15),
        htk_compat=kind == "eat",
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning" if kind == "eat" else "povey",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    front_end = KaldiFbank(kind=kind, pad="clip", clip_seconds=1.0)  # type: ignore[arg-type]
    batch = torch.stack([torch.nn.functional.pad(wave, (0, 7000), value=torch.nan), noise(16000)])
    for out in (front_end(wave[None], 112), front_end(batch, 112, torch.tensor([9000, 16000]))):
        own = raw(front_end, out[0, 0])[:98]
        torch.testing.assert_close(own, wanted, rtol=0, atol=2e-4)
        assert not out[0, 0, 98:].any()


def test_golden_esc50(arrays: dict[str, np.ndarray]) -> None:
    wave = torch.from_numpy(arrays["wave_16k_10s"])[None, :80000]
    out = KaldiFbank(statistics="esc50")(wave, 512)[0, 0]
    wanted = arrays["esc50_5s_EAT_first_and_last_frames"]
    np.testing.assert_allclose(torch.cat([out[:8], out[-24:]]), wanted, rtol=0, atol=TOLERANCE)


def test_golden_tables(arrays: dict[str, np.ndarray]) -> None:
    eat, beats = KaldiFbank(kind="eat"), KaldiFbank(kind="beats")
    np.testing.assert_allclose(eat.filters.T[:, :256], arrays["kaldi_mel_banks"], atol=2e-5)
    assert not eat.filters[256].any()
    np.testing.assert_allclose(eat.window, arrays["window_hanning_400"], atol=1e-6)
    np.testing.assert_allclose(beats.window, arrays["window_povey_400"], atol=1e-6)


def test_golden_statistics(arrays: dict[str, np.ndarray]) -> None:
    names = {
        "AudioSet": "audioset",
        "BirdSet": "hsn",
        "DCASE": "dcase16",
        "ESC50": "esc50",
        "LibriSpeech": "librispeech",
        "SpeechCommands": "speechcommands",
    }
    stats = json.loads(str(arrays["meta_json"]))["stats"]
    for kind, name in KINDS:
        for theirs, ours in names.items():
            wanted = (stats[name][theirs]["mu"], stats[name][theirs]["std"])
            assert STATISTICS[kind][ours] == wanted
        assert len(STATISTICS[kind]) == len(names)


def test_bank_equals_torchaudio() -> None:
    other, _ = torchaudio.compliance.kaldi.get_mel_banks(
        80, 1024, 32000.0, 20.0, 0.0, 100.0, -500.0, 1.0
    )
    bank = kaldi_bank(sample_rate=32000, n_fft=1024, n_mels=80, device=torch.device("cpu"))
    torch.testing.assert_close(bank[:512].T, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["eat", "beats"])
@pytest.mark.parametrize(
    ("samples", "rate"), [(400, 16000), (559, 16000), (9000, 16000), (9000, 32000)]
)
def test_equals_torchaudio(kind: str, samples: int, rate: int) -> None:
    wave = noise(samples) if rate == 16000 else noise(samples).mul(2)
    front_end = KaldiFbank(kind=kind, sample_rate=rate)  # type: ignore[arg-type]
    wanted = by_torchaudio(wave, kind, rate)
    out = front_end(wave[None], 64)[0, 0]
    assert front_end.valid_frames(torch.tensor(samples)) == len(wanted)
    torch.testing.assert_close(raw(front_end, out)[: len(wanted)], wanted, rtol=0, atol=2e-4)
    assert not out[len(wanted) :].any()


@pytest.mark.parametrize("kind", ["eat", "beats"])
@pytest.mark.parametrize("pad", ["spectrogram", "waveform", "clip"])
def test_padded_rows_are_what_they_are_alone(kind: str, pad: str) -> None:
    seconds = 0.4 if pad == "clip" else None
    front_end = KaldiFbank(kind=kind, pad=pad, clip_seconds=seconds)  # type: ignore[arg-type]
    lengths = [9000, 1, 399, 400, 401, 5000]
    batch = torch.full((len(lengths), 9000), torch.nan)
    for row, length in enumerate(lengths):
        batch[row, :length] = 0.3 + noise(length, seed=row)  # an offset: the mean matters
    out = front_end(batch, 64, torch.tensor(lengths))
    assert torch.isfinite(out).all()
    for row, length in enumerate(lengths):
        alone = front_end(batch[row : row + 1, :length], 64)
        torch.testing.assert_close(out[row], alone[0], rtol=0, atol=1e-4)
        if pad == "spectrogram":
            assert not out[row, 0, front_end.valid_frames(torch.tensor(length)) :].any()


def test_shorter_than_a_window_is_one_frame() -> None:
    front_end = KaldiFbank(kind="beats")
    wave = noise(1, 100)
    whole = torch.nn.functional.pad(wave, (0, 300))
    torch.testing.assert_close(front_end(wave, 4), front_end(whole, 4), rtol=0, atol=0)
    assert front_end.valid_frames(torch.tensor([1, 399, 400, 559, 560])).tolist() == [1, 1, 1, 1, 2]


def test_long_clips_are_cropped_first() -> None:
    wave = noise(1, 9000)
    wave[:, 6000:] += 1.0  # moves the mean of the whole, not of what is kept
    front_end = KaldiFbank()
    assert front_end.max_samples(32) == 400 + 32 * 160 - 1
    cropped = front_end(wave, 32)
    torch.testing.assert_close(cropped, front_end(wave[:, :5519], 32), rtol=0, atol=0)
    papers = KaldiFbank(crop="spectrogram")
    wanted = by_torchaudio(wave[0], "eat")[:32]
    torch.testing.assert_close(raw(papers, papers(wave, 32)[0, 0]), wanted, rtol=0, atol=2e-4)


def test_silence_is_the_floor() -> None:
    front_end = KaldiFbank()
    out = front_end(torch.zeros(1, 4000), 32)[0, 0]
    assert raw(front_end, out)[:23] == pytest.approx(np.log(2.0**-23), abs=1e-5)
    assert not out[23:].any()


def test_float32_under_autocast_and_after_casting() -> None:
    wave, front_end = noise(2, 4000), KaldiFbank()
    wanted = front_end(wave, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(front_end(wave, 32), wanted, rtol=0, atol=0)
    torch.testing.assert_close(KaldiFbank().bfloat16()(wave, 32), wanted, rtol=0, atol=0)
    assert not front_end.state_dict()


def test_gradient_is_the_difference_quotient() -> None:
    front_end = KaldiFbank(sample_rate=4000, n_mels=8).double()  # windows of 100
    wave = noise(2, 260).double().requires_grad_()
    lengths = torch.tensor([260, 150])
    assert torch.autograd.gradcheck(lambda w: front_end(w, 6, lengths), (wave,), atol=1e-5)


def test_compiled_whole_equals_eager() -> None:
    torch._dynamo.reset()
    wave, lengths = noise(2, 6000), torch.tensor([6000, 200])
    for kind, pad in (("eat", "spectrogram"), ("beats", "waveform")):
        front_end = KaldiFbank(kind=kind, pad=pad)  # type: ignore[arg-type]
        compiled = torch.compile(front_end, backend="eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(wave, 32, lengths), front_end(wave, 32, lengths), rtol=0, atol=0
        )


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UserError, match=r"statistics='esc': .* audioset, speechcommands, esc50"):
        KaldiFbank(statistics="esc")
    with pytest.raises(UserError, match="kind='ast': one of eat, beats"):
        KaldiFbank(kind="ast")  # type: ignore[arg-type]
