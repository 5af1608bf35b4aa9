"""LogMel: against the golden vectors, against torchaudio, and what a batch must not change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from bat.audio.filters import htk_bank
from bat.audio.frontend import LogMel
from bat.errors import UserError

TOLERANCE = 1e-4  # the golden vectors' own advice for values in [0, 1]
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def by_torchaudio(wave: Tensor, frames: int) -> Tensor:
    """One clip, the obvious way: (S,) -> (frames, 128)."""
    mel = torchaudio.transforms.MelSpectrogram(
        16000, 1024, hop_length=160, n_mels=128, power=2.0, norm=None, mel_scale="htk"
    )(wave)
    db = torchaudio.transforms.AmplitudeToDB("power", top_db=80)(mel[None, None])[0, 0]
    unit = (db - db.min()) / (db.max() - db.min() + 1e-8)  # (128, T)
    return torch.nn.functional.pad(unit.T, (0, 0, 0, frames - unit.shape[1]))


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "frontend.npz", allow_pickle=False) as file:
        return dict(file)


CASES = [
    "ssl_10.23s_T1024",
    "ssl_10.5s_T1024",
    "ssl_10s_T1024",
    "ssl_1s_T1024",
    "ssl_click_1s_T112",
    "ssl_noise_1s_T112",
    "ssl_quiet_noise_1s_T112",
    "ssl_silence_1s_T112",
    "sup_1.5s_T112",
    "sup_1s_T112",
    "sup_32k_5s_T512",
    "sup_5s_T512",
    "sup_audioset_10s_padded_T1024",
]


def test_golden_cases_are_all_listed(arrays: dict[str, np.ndarray]) -> None:
    assert sorted(json.loads(str(arrays["meta_json"]))["cases"]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_golden(arrays: dict[str, np.ndarray], case: str) -> None:
    meta = json.loads(str(arrays["meta_json"]))["cases"][case]
    wave = torch.from_numpy(arrays[meta["wave"]][meta["start"] : meta["stop"]])[None]
    wide = {"sample_rate": 32000, "n_fft": 2048, "hop_length": 320} if "32k" in case else {}
    pad = "waveform" if "zero_pad_to" in meta else "spectrogram"
    front_end = LogMel(**wide, pad=pad, crop="spectrogram")  # type: ignore[arg-type]
    out = front_end(wave, meta["shape"][0])
    assert out.shape == (1, 1, *meta["shape"])
    np.testing.assert_allclose(out[0, 0].numpy(), arrays[f"out_{case}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "clip_seconds"),
    [("sup_1s_T112", 1.0), ("sup_32k_5s_T512", 5.0), ("sup_5s_T512", 5.0),
     ("sup_audioset_10s_padded_T1024", 10.23)],
)  # fmt: skip
def test_golden_padded_to_the_tasks_clip(
    arrays: dict[str, np.ndarray], case: str, clip_seconds: float
) -> None:
    """The reference's supervised tasks."""
    meta = json.loads(str(arrays["meta_json"]))["cases"][case]
    wave = torch.from_numpy(arrays[meta["wave"]][meta["start"] : meta["stop"]])[None]
    wide = {"sample_rate": 32000, "n_fft": 2048, "hop_length": 320} if "32k" in case else {}
    front_end = LogMel(**wide, pad="clip", clip_seconds=clip_seconds)  # type: ignore[arg-type]
    out = front_end(wave, meta["shape"][0])[0, 0].numpy()
    np.testing.assert_allclose(out, arrays[f"out_{case}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("samples", [500, 9000, 16000])
def test_padded_to_the_clip_equals_torchaudio_on_zeros_to_there(samples: int) -> None:
    """All of the clip is signal; the frames after it are zero."""
    wave = noise(samples)
    wanted = by_torchaudio(F.pad(wave, (0, 16000 - samples)), 112)
    batch = torch.stack([F.pad(wave, (0, 16000 - samples), value=torch.nan), noise(16000, seed=1)])
    front_end = LogMel(pad="clip", clip_seconds=1.0)
    out = front_end(batch, 112, torch.tensor([samples, 16000]))[0, 0]
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(front_end(wave[None], 112)[0, 0], wanted, rtol=0, atol=2e-5)
    assert not out[101:].any()
    for pad, differs in (("spectrogram", samples < 16000), ("waveform", samples == 16000)):
        other = LogMel(pad=pad)(wave[None], 112)[0, 0]  # type: ignore[arg-type]
        assert ((other - wanted).abs().max() > 0.1) == differs


def test_a_clip_of_one_frame_more_is_cut_before_anything_is_computed() -> None:
    """120 s are 12,001 frames where a task has 12,000; here 1 s and 100."""
    wave = noise(16000)
    wave[-1] = 10.0  # would set the range
    out = LogMel(pad="clip", clip_seconds=1.0)(wave[None], 100)[0, 0]
    torch.testing.assert_close(out, by_torchaudio(wave[:15999], 100), rtol=0, atol=2e-5)


def test_golden_batch_is_per_clip(arrays: dict[str, np.ndarray]) -> None:
    out = LogMel()(torch.from_numpy(arrays["batch4_in"]), 112)
    np.testing.assert_allclose(out[:, 0].numpy(), arrays["batch4_out"], rtol=0, atol=TOLERANCE)


def test_golden_padded_batch_mended_and_as_the_paper(arrays: dict[str, np.ndarray]) -> None:
    waves, alone = torch.from_numpy(arrays["padbatch_in"]), arrays["padbatch_short_alone_out"]
    mended = LogMel()(waves, 112, torch.tensor([16000, 9600]))[:, 0].numpy()
    np.testing.assert_allclose(mended[1], alone, rtol=0, atol=TOLERANCE)
    papers = LogMel()(waves, 112)[:, 0].numpy()
    np.testing.assert_allclose(papers, arrays["padbatch_out"], rtol=0, atol=TOLERANCE)
    assert np.abs(papers[1] - alone)[:61].max() > 0.03


def test_golden_tables(arrays: dict[str, np.ndarray]) -> None:
    for name, rate, n_fft in (("16k_1024", 16000, 1024), ("32k_2048", 32000, 2048)):
        bank = htk_bank(sample_rate=rate, n_fft=n_fft, n_mels=128, device=CPU)
        np.testing.assert_allclose(bank, arrays[f"mel_filterbank_{name}"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(LogMel().window, arrays["stft_window_1024"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), [(16000, 1024, 128), (44100, 400, 40)])
def test_bank_equals_torchaudio(rate: int, n_fft: int, n_mels: int) -> None:
    bank = htk_bank(sample_rate=rate, n_fft=n_fft, n_mels=n_mels, device=CPU)
    other = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, rate / 2, n_mels, rate)
    torch.testing.assert_close(bank, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [8000, 16000, 16159, 17919])
def test_equals_torchaudio(samples: int) -> None:
    wave = noise(samples)
    torch.testing.assert_close(
        LogMel()(wave[None], 112)[0, 0], by_torchaudio(wave, 112), rtol=0, atol=2e-5
    )


def test_float32_is_near_float64() -> None:
    wave = noise(2, 16000)
    exact = LogMel().double()(wave.double(), 112)
    assert exact.dtype == torch.float64
    assert (LogMel()(wave, 112) - exact).abs().max() < 1e-5


def test_padded_rows_are_what_they_are_alone() -> None:
    lengths = [16000, 1, 2, 100, 511, 512, 513, 4000, 15999]
    batch = torch.full((len(lengths), 16000), torch.nan)  # padding must not even be looked at
    for row, length in enumerate(lengths):
        batch[row, :length] = noise(length, seed=row)
    front_end = LogMel()
    out = front_end(batch, 112, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = front_end(batch[row : row + 1, :length], 112)
        torch.testing.assert_close(out[row], alone[0], rtol=0, atol=1e-6)
        valid = 1 + length // 160
        assert front_end.valid_frames(torch.tensor(length)) == valid
        assert out[row, 0, :valid].max() == pytest.approx(1.0, abs=1e-6)
        assert not out[row, 0, valid:].any()


@pytest.mark.parametrize("samples", [1, 2, 3, 160, 500, 512, 513, 900])
def test_tiny_clips_are_reflected_as_numpy_does(samples: int) -> None:
    wave = noise(samples).double()
    padded = np.pad(wave.numpy(), 512, mode="reflect" if samples > 1 else "edge")
    front_end = LogMel().double()
    reflected = front_end._reflect(wave[None], torch.tensor([samples]))
    np.testing.assert_array_equal(reflected[0].numpy(), padded)
    windows = np.stack([padded[t * 160 : t * 160 + 1024] for t in range(1 + samples // 160)])
    power = np.abs(np.fft.rfft(windows * front_end.window.numpy())) ** 2
    db = 10 * np.log10(np.maximum(power @ front_end.filters.numpy(), 1e-10))
    db = np.maximum(db, db.max() - 80)
    unit = (db - db.min()) / (db.max() - db.min() + 1e-8)
    out = front_end(wave[None], 16)[0, 0].numpy()
    np.testing.assert_allclose(out[: len(unit)], unit, rtol=0, atol=1e-9)
    assert not out[len(unit) :].any()


def test_long_clips_are_cropped_before_anything_else() -> None:
    wave = noise(1, 20000)
    wave[:, 18000:] *= 100.0  # a burst in the part that is dropped
    front_end = LogMel()
    assert front_end.max_samples(112) == 17919
    cropped = front_end(wave, 112)
    torch.testing.assert_close(cropped, front_end(wave[:, :17919], 112), rtol=0, atol=0)
    assert cropped.max() == pytest.approx(1.0, abs=1e-6)
    papers = LogMel(crop="spectrogram")(wave, 112)
    assert papers.shape == cropped.shape
    assert papers[..., :100, :].max() < 0.8
    mixed = front_end(wave.expand(2, -1), 112, torch.tensor([20000, 9000]))
    torch.testing.assert_close(mixed[:1], cropped, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1:], front_end(wave[:, :9000], 112), rtol=0, atol=1e-6)


def test_waveform_padding_does_not_depend_on_the_batch() -> None:
    wave = noise(1, 9000)
    front_end = LogMel(pad="waveform")
    alone = front_end(wave, 112)  # zeros up to 111 * 160 samples count as signal
    by_hand = LogMel()(torch.nn.functional.pad(wave, (0, 17760 - 9000)), 112)
    torch.testing.assert_close(alone, by_hand, rtol=0, atol=0)
    batch = torch.cat([torch.nn.functional.pad(wave, (0, 3000)), noise(1, 12000, seed=1)])
    batch[0, 9000:] = torch.nan
    both = front_end(batch, 112, torch.tensor([9000, 12000]))
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-6)


def test_silence_and_empty_rows_are_zero() -> None:
    out = LogMel()(torch.zeros(2, 4000), 32, torch.tensor([4000, 0]))
    assert not out.any()


def test_gain_does_not_matter() -> None:
    wave = noise(1, 8000)
    torch.testing.assert_close(LogMel()(wave * 0.25, 64), LogMel()(wave, 64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_under_autocast_and_from_half(dtype: torch.dtype) -> None:
    wave = noise(2, 8000).to(dtype)
    plain = LogMel()(wave.float(), 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = LogMel()(wave, 64)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, plain, rtol=0, atol=0)


def test_tables_survive_casting_and_the_meta_device() -> None:
    wave, plain = noise(1, 8000), LogMel()
    assert not plain.state_dict()
    wanted = plain(wave, 64)
    torch.testing.assert_close(LogMel().bfloat16()(wave, 64), wanted, rtol=0, atol=0)
    torch.testing.assert_close(LogMel().half().float()(wave, 64), wanted, rtol=0, atol=0)
    with torch.device("meta"):
        empty = LogMel()
    assert empty.window.is_meta
    torch.testing.assert_close(empty.to_empty(device="cpu")(wave, 64), wanted, rtol=0, atol=0)


def test_gradient_is_the_difference_quotient() -> None:
    front_end = LogMel(n_fft=64, hop_length=16, n_mels=8).double()
    wave = noise(2, 100).double().requires_grad_()
    lengths = torch.tensor([100, 40])
    assert torch.autograd.gradcheck(lambda w: front_end(w, 8, lengths), (wave,), atol=1e-5)
    front_end(wave, 8, lengths).square().sum().backward()
    assert wave.grad is not None
    assert wave.grad[0].abs().min() > 0
    assert wave.grad[1, :40].abs().min() > 0
    assert not wave.grad[1, 40:].any()


def test_gradient_is_finite_for_silence_and_a_click() -> None:
    wave = torch.zeros(2, 4000)
    wave[1, 2000] = 1.0
    wave.requires_grad_()
    LogMel()(wave, 32).sum().backward()
    assert wave.grad is not None
    assert torch.isfinite(wave.grad).all()


@pytest.mark.parametrize("pad", ["spectrogram", "waveform", "clip"])
@pytest.mark.parametrize("crop", ["spectrogram", "waveform"])
def test_compiled_whole_equals_eager(pad: str, crop: str) -> None:
    torch._dynamo.reset()
    seconds = 0.25 if pad == "clip" else None
    front_end = LogMel(pad=pad, crop=crop, clip_seconds=seconds)  # type: ignore[arg-type]
    compiled = torch.compile(front_end, backend="eager", fullgraph=True)
    wave, lengths = noise(2, 6000), torch.tensor([6000, 2000])
    for frames in (32, 48):
        torch.testing.assert_close(
            compiled(wave, frames, lengths), front_end(wave, frames, lengths), rtol=0, atol=0
        )
        torch.testing.assert_close(compiled(wave, frames), front_end(wave, frames), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wave", "frames", "lengths", "message"),
    [
        (torch.zeros(16000), 112, None, r"shape \(16000,\): give \(clips, samples\)"),
        (torch.zeros(2, 0), 112, None, "give"),
        (torch.zeros(2, 100, dtype=torch.int16), 112, None, "int16: give floating point"),
        (torch.zeros(2, 100), 0, None, "frames=0"),
        (torch.zeros(2, 100), 112, torch.tensor([100]), r"lengths of shape \(1,\) for 2 clips"),
    ],
)
def test_bad_input(wave: Tensor, frames: int, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogMel()(wave, frames, lengths)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad": "zeros"}, "pad='zeros': one of spectrogram, waveform, clip"),
        ({"pad": "clip"}, "pad='clip' with clip_seconds=None"),
        ({"clip_seconds": 1.0}, "pad='spectrogram' with clip_seconds=1"),
        ({"pad": "clip", "clip_seconds": -1.0}, "clip_seconds=-1"),
        ({"pad": "clip", "clip_seconds": float("nan")}, "clip_seconds=nan"),
        ({"crop": "no"}, "crop='no'"),
        ({"n_fft": 1023}, "n_fft=1023: an even number"),
        ({"n_mels": 0}, "n_mels=0"),
        ({"hop_length": 0}, "hop_length=0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogMel(**settings)
