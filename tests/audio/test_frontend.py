"""Front ends: what holds for all of them, and LogMel against golden vectors and torchaudio."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from bat.audio.frontend import DbMel, FrontEnd, KaldiFbank, LnMel, LogMel, mel_bank
from bat.errors import UserError

TOLERANCE = 1e-4  # the golden vectors' own advice for values in [0, 1]
KINDS: dict[str, Callable[..., FrontEnd]] = {
    "bat": LogMel,
    "eat": functools.partial(KaldiFbank, kind="eat"),
    "beats": functools.partial(KaldiFbank, kind="beats"),
    "m2d": functools.partial(
        LnMel, mean=-7.1, std=4.2, n_fft=400, n_mels=80, f_min=50.0, slaney=True
    ),
    "dasheng": functools.partial(DbMel, n_fft=512, n_mels=64),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@every_kind
@pytest.mark.parametrize("pad", ["spectrogram", "waveform", "clip", "fbank"])
def test_front_end__padded_rows_are_what_they_are_alone(kind: str, pad: str) -> None:
    if pad == "fbank" and kind not in ("eat", "beats"):
        with pytest.raises(UserError, match="pad='fbank'"):
            KINDS[kind](pad=pad)
        return
    front_end = KINDS[kind](pad=pad, clip_seconds=0.4 if pad == "clip" else None)
    lengths = [9000, 1, 2, 100, 399, 400, 401, 512, 513, 5000, 8999]
    batch = torch.full((len(lengths), 9000), torch.nan)  # padding must not even be looked at
    for row, length in enumerate(lengths):
        batch[row, :length] = 0.3 + noise(length, seed=row)  # an offset: the mean matters
    out = front_end(batch, 64, torch.tensor(lengths))
    assert torch.isfinite(out).all()
    for row, length in enumerate(lengths):
        alone = front_end(batch[row : row + 1, :length], 64)
        torch.testing.assert_close(out[row], alone[0], rtol=0, atol=1e-4)
        if pad in ("spectrogram", "fbank"):
            valid = front_end.valid_frames(length)
            assert front_end.valid_frames(torch.tensor(length)) == valid
            assert (out[row, 0, valid:] == front_end.fill).all()


@every_kind
def test_front_end__float32_under_autocast_and_after_casting(kind: str) -> None:
    wave, front_end = noise(2, 4000).bfloat16(), KINDS[kind]()
    assert not front_end.state_dict()
    wanted = front_end(wave.float(), 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = front_end(wave, 32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    torch.testing.assert_close(KINDS[kind]().half().float()(wave, 32), wanted, rtol=0, atol=0)
    with torch.device("meta"):
        empty = KINDS[kind]()
    assert empty.window.is_meta
    torch.testing.assert_close(empty.to_empty(device="cpu")(wave, 32), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "front_end",
    [LogMel(n_fft=32, hop_length=16, n_mels=4), KaldiFbank(sample_rate=1600, n_mels=4)],
    ids=["bat", "eat"],
)
def test_front_end__gradient_is_the_difference_quotient(front_end: FrontEnd) -> None:
    front_end = front_end.double()
    wave, lengths = noise(2, 80).double().requires_grad_(), torch.tensor([80, 50])
    assert torch.autograd.gradcheck(
        lambda w: front_end(w, 6, lengths), (wave,), atol=1e-5, fast_mode=True
    )
    front_end(wave, 6, lengths).square().sum().backward()
    assert wave.grad is not None
    assert wave.grad[1, :40].abs().min() > 0
    assert not wave.grad[1, 50:].any()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bat", {"pad": "waveform", "crop": "spectrogram"}),
        ("bat", {"pad": "clip", "clip_seconds": 0.25}),
        ("beats", {"pad": "waveform"}),
    ],
)
def test_front_end__compiled_whole_equals_eager(kind: str, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    front_end = KINDS[kind](**settings)
    compiled = torch.compile(front_end, backend="eager", fullgraph=True)
    wave, lengths = noise(2, 6000), torch.tensor([6000, 2000])
    for given in (lengths, None):
        expected = front_end(wave, 32, given)
        torch.testing.assert_close(compiled(wave, 32, given), expected, rtol=0, atol=0)


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
def test_front_end__bad_input(
    wave: Tensor, frames: int, lengths: Tensor | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LogMel()(wave, frames, lengths)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bat", {"pad": "zeros"}, "pad='zeros': one of spectrogram, waveform, clip"),
        ("bat", {"pad": "clip"}, "pad='clip' with clip_seconds=None"),
        ("bat", {"clip_seconds": 1.0}, "pad='spectrogram' with clip_seconds=1"),
        ("bat", {"pad": "clip", "clip_seconds": float("nan")}, "clip_seconds=nan"),
        ("bat", {"crop": "no"}, "crop='no'"),
        ("bat", {"n_fft": 1023}, "n_fft=1023: an even number"),
        ("bat", {"n_mels": 0}, "n_mels=0"),
        ("eat", {"statistics": "esc"}, "statistics='esc': .* audioset, speechcommands, esc50"),
        ("eat", {"kind": "ast"}, "kind='ast': one of eat, beats"),
    ],
)
def test_front_end__bad_settings(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KINDS[kind](**settings)


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "frontend.npz", allow_pickle=False) as file:
        return dict(file)


CASES = {  # seconds that the reference's supervised tasks pad the clip to
    "ssl_10.23s_T1024": None,
    "ssl_10.5s_T1024": None,
    "ssl_10s_T1024": None,
    "ssl_1s_T1024": None,
    "ssl_click_1s_T112": None,
    "ssl_noise_1s_T112": None,
    "ssl_quiet_noise_1s_T112": None,
    "ssl_silence_1s_T112": None,
    "sup_1.5s_T112": None,
    "sup_1s_T112": 1.0,
    "sup_32k_5s_T512": 5.0,
    "sup_5s_T512": 5.0,
    "sup_audioset_10s_padded_T1024": 10.23,
}


@pytest.mark.parametrize("case", CASES)
def test_log_mel__golden(arrays: dict[str, np.ndarray], case: str) -> None:
    cases = json.loads(str(arrays["meta_json"]))["cases"]
    assert sorted(cases) == list(CASES)
    meta, clip_seconds = cases[case], CASES[case]
    wave = torch.from_numpy(arrays[meta["wave"]][meta["start"] : meta["stop"]])[None]
    wide = {"sample_rate": 32000, "n_fft": 2048, "hop_length": 320} if "32k" in case else {}
    pad = "waveform" if "zero_pad_to" in meta else "spectrogram"
    front_ends = [LogMel(**wide, pad=pad, crop="spectrogram")]  # type: ignore[arg-type]
    if clip_seconds is not None:
        front_ends.append(LogMel(**wide, pad="clip", clip_seconds=clip_seconds))  # type: ignore[arg-type]
    for front_end in front_ends:
        out = front_end(wave, meta["shape"][0])
        assert out.shape == (1, 1, *meta["shape"])
        np.testing.assert_allclose(out[0, 0].numpy(), arrays[f"out_{case}"], rtol=0, atol=TOLERANCE)


def test_log_mel__golden_batches_and_tables(arrays: dict[str, np.ndarray]) -> None:
    out = LogMel()(torch.from_numpy(arrays["batch4_in"]), 112)
    np.testing.assert_allclose(out[:, 0].numpy(), arrays["batch4_out"], rtol=0, atol=TOLERANCE)
    waves, alone = torch.from_numpy(arrays["padbatch_in"]), arrays["padbatch_short_alone_out"]
    repaired = LogMel()(waves, 112, torch.tensor([16000, 9600]))[:, 0].numpy()
    np.testing.assert_allclose(repaired[1], alone, rtol=0, atol=TOLERANCE)
    papers = LogMel()(waves, 112)[:, 0].numpy()
    np.testing.assert_allclose(papers, arrays["padbatch_out"], rtol=0, atol=TOLERANCE)
    assert np.abs(papers[1] - alone)[:61].max() > 0.03
    for name, rate, n_fft in (("16k_1024", 16000, 1024), ("32k_2048", 32000, 2048)):
        bank = mel_bank(rate, n_fft, 128)
        np.testing.assert_allclose(bank, arrays[f"mel_filterbank_{name}"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(LogMel().window, arrays["stft_window_1024"], rtol=0, atol=1e-7)


def by_torchaudio(wave: Tensor, frames: int) -> Tensor:
    """One clip, the obvious way: (S,) -> (frames, 128)."""
    mel = torchaudio.transforms.MelSpectrogram(
        16000, 1024, hop_length=160, n_mels=128, power=2.0, norm=None, mel_scale="htk"
    )(wave)
    db = torchaudio.transforms.AmplitudeToDB("power", top_db=80)(mel[None, None])[0, 0]
    unit = (db - db.min()) / (db.max() - db.min() + 1e-8)  # (128, T)
    return F.pad(unit.T, (0, 0, 0, frames - unit.shape[1]))


@pytest.mark.parametrize("samples", [8000, 16000, 16159, 17919])
def test_log_mel__equals_torchaudio(samples: int) -> None:
    wave = noise(samples)
    out = LogMel()(wave[None], 112)[0, 0]
    torch.testing.assert_close(out, by_torchaudio(wave, 112), rtol=0, atol=2e-5)
    exact = LogMel().double()(wave[None].double(), 112)[0, 0]
    assert exact.dtype == torch.float64
    assert (out - exact).abs().max() < 1e-5


def test_db_mel__equals_torchaudio_and_has_the_clips_own_floor() -> None:
    """A loud clip, whose floor shows, and a quiet one, which a floor of the batch would reach."""
    wave = 10 * noise(8000)
    wave[4000:] = 0
    waves = torch.stack([wave, 1e-4 * wave])
    mel = torchaudio.transforms.MelSpectrogram(16000, 512, hop_length=160, n_mels=64)(waves)
    to_db = torchaudio.transforms.AmplitudeToDB("power", top_db=120)
    out = KINDS["dasheng"]()(waves, 51)
    for row in (0, 1):
        wanted = to_db(mel[row : row + 1])[0].T
        torch.testing.assert_close(out[row, 0], wanted, rtol=0, atol=1e-3)
    assert (out[0].max() - out[0].min()).item() == pytest.approx(120, abs=1e-3)
    assert (to_db(mel)[1].T - out[1, 0]).abs().max() > 1


@pytest.mark.parametrize("samples", [500, 9000, 16000])
def test_log_mel__padding_up_to_the_clip_counts_as_signal(samples: int) -> None:
    wave = noise(samples)
    wanted = by_torchaudio(F.pad(wave, (0, 16000 - samples)), 112)
    out = LogMel(pad="clip", clip_seconds=1.0)(wave[None], 112)[0, 0]
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-5)
    assert not out[101:].any()
    for pad, differs in (("spectrogram", samples < 16000), ("waveform", samples == 16000)):
        other = LogMel(pad=pad)(wave[None], 112)[0, 0]  # type: ignore[arg-type]
        assert ((other - wanted).abs().max() > 0.1) == differs


@pytest.mark.parametrize("samples", [1, 2, 3, 160, 500, 512, 513, 900])
def test_log_mel__tiny_clips_are_reflected_as_numpy_does(samples: int) -> None:
    wave = noise(samples).double()
    padded = np.pad(wave.numpy(), 512, mode="reflect" if samples > 1 else "edge")
    front_end = LogMel().double()
    windows = np.stack([padded[t * 160 : t * 160 + 1024] for t in range(1 + samples // 160)])
    power = np.abs(np.fft.rfft(windows * front_end.window.numpy())) ** 2
    db = 10 * np.log10(np.maximum(power @ front_end.filters.numpy(), 1e-10))
    db = np.maximum(db, db.max() - 80)
    unit = (db - db.min()) / (db.max() - db.min() + 1e-8)
    out = front_end(wave[None], 16)[0, 0].numpy()
    np.testing.assert_allclose(out[: len(unit)], unit, rtol=0, atol=1e-9)
    assert not out[len(unit) :].any()


def test_log_mel__long_clips_are_cropped_before_anything_else() -> None:
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
    # pad="clip": 1 s has one frame more than 100
    clip = LogMel(pad="clip", clip_seconds=1.0)(wave[:, 4000:], 100)[0, 0]
    torch.testing.assert_close(clip, by_torchaudio(wave[0, 4000:19999], 100), rtol=0, atol=2e-5)


def test_log_mel__silence_is_zero_and_has_finite_gradients() -> None:
    wave = torch.zeros(3, 4000)
    wave[2, 2000] = 1.0
    wave.requires_grad_()
    out = LogMel()(wave, 32, torch.tensor([4000, 0, 4000]))
    assert not out[:2].any()
    out.sum().backward()
    assert wave.grad is not None
    assert torch.isfinite(wave.grad).all()
