"""``check_clip``: cut, clipped and long clips, and what the JSON says of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from bat.audio.decode import probe
from bat.audio.encode import encode
from bat.shard import clip_check
from bat.shard.clip_check import check_clip
from tests.shard.files import RATE, audio, noise


def file_of(wave: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format=kind)
    return out.getvalue()


def problems(data: bytes, **meta: object) -> list[tuple[str, str]]:
    return list(check_clip(data, meta, None).problems)


@pytest.mark.parametrize("codec", ["wav", "flac", "ogg", "opus"])
def test_check_clip__truncated_file_is_corrupt(codec: str) -> None:
    data = audio(1, seconds=2, rate=48_000, codec=codec)
    assert problems(data) == []
    [(kind, why)] = problems(data[:-500])
    assert kind == "corrupt"
    assert why.startswith("corrupt: damaged or truncated" if codec == "flac" else "truncated: ")


def test_check_clip__runs_of_three_at_full_scale_in_one_channel_are_clipped() -> None:
    wave = np.stack([noise(1), noise(2)], 1)
    wave[[20, 21, 40, 41, 60], 0] = 1.0  # runs of two and one do not count
    assert problems(file_of(wave, "WAV")) == []
    wave[100:108, 1] = [1, 1, -1, 1, 1, 1, 1, 1]
    why = "0.25 % of the samples in runs at full scale"
    assert problems(file_of(wave, "WAV")) == [("clipped", why)]


def test_check_clip__long_clips_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = noise(3, seconds=3.5)
    wave[:800], wave[-2000:] = 1.0, 1.0
    data = encode(wave, sample_rate=RATE, codec="flac")
    whole = check_clip(data, {"num_samples": len(wave)}, None)
    assert whole.problems == [("clipped", "5.00 % of the samples in runs at full scale")]
    assert whole.seconds == 3.5
    monkeypatch.setattr(clip_check, "PIECE_SECONDS", 1)
    assert check_clip(data, {"num_samples": len(wave)}, None) == whole


@pytest.mark.parametrize(("off", "kinds"), [(-1000, []), (-5000, ["label"]), (5000, ["corrupt"])])
def test_check_clip__length_of_an_mp3_has_slack(off: int, kinds: list[str]) -> None:
    data = file_of(noise(1, seconds=1), "MP3")
    found = problems(data, num_samples=probe(data).frames + off)
    assert [kind for kind, _ in found] == kinds


def test_check_clip__hash_is_of_the_samples_mixed_to_mono() -> None:
    mono = check_clip(audio(4), {}, None)
    both = check_clip(file_of(np.stack([noise(4), noise(4)], 1), "FLAC"), {}, None)
    mixed = check_clip(file_of(np.stack([noise(4), noise(5)], 1), "FLAC"), {}, None)
    assert both.audio_hash == mono.audio_hash != 0
    assert mono.seconds == 0.2
    assert mixed.audio_hash != mono.audio_hash


def test_check_clip__label_without_a_number_is_no_fault() -> None:
    assert check_clip(audio(1), {"label": ["x"]}, {"x": 3}).problems == []
