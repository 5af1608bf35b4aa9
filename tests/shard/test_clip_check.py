"""One clip under the magnifying glass: cut, clipped, long, and what its JSON says of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from bat.audio.decode import encode
from bat.shard import clip_check
from bat.shard.clip_check import _in_runs, check_clip, label_faults, missing_end

RATE = 16_000


def noise(seed: int, seconds: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * RATE))


def test_a_cut_clip_without_num_samples_is_corrupt_too() -> None:
    for codec in ("wav", "ogg", "opus"):
        data = encode(noise(1, seconds=2), sample_rate=48_000, codec=codec)  # type: ignore[arg-type]
        assert missing_end(data) is None
        assert check_clip(data, {}, None).problems == []
        for lost in (1, 500, len(data) // 2):
            assert "cut short" in str(missing_end(data[:-lost])), (codec, lost)
        if codec != "wav":
            page = data.rfind(b"OggS")
            assert "cut short" in str(missing_end(data[:page])), "cut between two pages"
        [(kind, why)] = check_clip(data[:-500], {}, None).problems
        assert (kind, why[:6]) == ("corrupt", "short:"), codec
    streamed = bytearray(encode(noise(0), sample_rate=RATE, codec="wav"))
    streamed[4:8] = b"\xff" * 4
    assert missing_end(bytes(streamed)) is None


def test_clipped_in_one_channel_only() -> None:
    quiet, loud = noise(1), noise(2)
    loud[100:108] = [1, 1, -1, 1, 1, 1, 1, 1]  # one run of eight at full scale: 0.25 %
    out = io.BytesIO()
    soundfile.write(out, np.stack([quiet, loud], 1), RATE, format="WAV", subtype="PCM_16")
    [(kind, why)] = check_clip(out.getvalue(), {}, None).problems
    assert (kind, why) == ("clipped", "0.25 % of the samples in runs at full scale")


def test_runs_of_three_count_and_shorter_ones_do_not() -> None:
    hot = np.zeros((20, 2), bool)
    hot[[0, 1, 5, 6, 7, 17, 18, 19], 0] = True
    hot[[3, 5, 7, 9, 10], 1] = True
    assert _in_runs(hot).tolist() == [6, 0]
    assert _in_runs(hot[:2]).tolist() == [0, 0]


def test_label_faults_without_a_vocabulary_or_numbers() -> None:
    assert label_faults({"label": ["x"]}, (("x", -1),), None) == []
    assert label_faults({"label": ["x"]}, (("x", -1),), {"x": 3}) == []


def test_long_clips_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = noise(3, seconds=3.5)
    wave[:800], wave[-2000:] = 1.0, 1.0
    flac = encode(wave, sample_rate=RATE, codec="flac")
    whole = check_clip(flac, {"num_samples": len(wave)}, None)
    asked = []
    real = clip_check.decode_channels
    monkeypatch.setattr(
        clip_check,
        "decode_channels",
        lambda d, **k: (asked.append(k["start_seconds"]), real(d, **k))[1],
    )
    monkeypatch.setattr(clip_check, "PIECE_SECONDS", 1)
    pieces = check_clip(flac, {"num_samples": len(wave)}, None)
    assert asked == [0, 1, 2, 3]
    assert pieces == whole
    assert whole.problems == [("clipped", "5.00 % of the samples in runs at full scale")]
    assert whole.seconds == 3.5


def test_mp3_lengths_have_slack() -> None:
    out = io.BytesIO()
    soundfile.write(out, noise(1, seconds=1), RATE, format="MP3")
    frames = clip_check.probe(out.getvalue()).frames
    for off, kinds in ((-1000, []), (-5000, ["label"]), (5000, ["corrupt"])):
        found = check_clip(out.getvalue(), {"num_samples": frames + off}, None).problems
        assert [kind for kind, _ in found] == kinds, off


def test_the_same_sound_in_mono_and_in_both_channels() -> None:
    wave = noise(4)
    out = io.BytesIO()
    soundfile.write(out, np.stack([wave, wave], 1), RATE, format="FLAC", subtype="PCM_16")
    mono = check_clip(encode(wave, sample_rate=RATE, codec="wav"), {}, None)
    assert check_clip(out.getvalue(), {}, None).audio_hash == mono.audio_hash != 0
    assert mono.seconds == 0.2
    mixed = io.BytesIO()
    soundfile.write(mixed, np.stack([wave, noise(5)], 1), RATE, format="FLAC", subtype="PCM_16")
    assert check_clip(mixed.getvalue(), {}, None).audio_hash != mono.audio_hash


def test_a_length_in_the_json_overrules_the_container() -> None:
    data = bytearray(encode(noise(0), sample_rate=RATE, codec="wav"))
    data[4:8] = (1_000_000).to_bytes(4, "little")
    assert check_clip(bytes(data), {"num_samples": 3200}, None).problems == []
    assert [kind for kind, _ in check_clip(bytes(data), {}, None).problems] == ["corrupt"]
