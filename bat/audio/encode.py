"""Encodes float samples to the bytes of an audio file, reproducibly.

libsndfile (soundfile) writes all four codecs. It stamps OGG pages with a random serial number, so
``encode`` replaces it and corrects the pages' checksums (RFC 3533): equal waves give equal bytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal

import numpy as np
import soundfile

from bat.errors import UserError

OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)
WRITE_FRAMES = 2**15  # one large write overflows libvorbis' stack (libsndfile 1.2.2)
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def encode(
    wave: np.ndarray, *, sample_rate: int, codec: Literal["flac", "wav", "ogg", "opus"]
) -> bytes:
    """Encodes a wave as a file; the same wave gives the same bytes.

    ``flac`` and ``wav`` hold 16-bit PCM, clipped to [-1, 1): a wave on the grid k / 32768 is
    restored bit for bit. ``ogg`` is Vorbis, ``opus`` is Opus in OGG, each at libsndfile's default
    quality.

    Args:
        wave: (S,) or (S, channels) float, nominally in [-1, 1]; S >= 1.
        sample_rate: Hz; Opus supports 8000, 12000, 16000, 24000 and 48000.

    Raises:
        UserError: another shape, an empty or non-finite wave, an unknown codec, a rate that Opus
            lacks, more channels than the codec has.
    """
    wave = np.asarray(wave)
    if wave.ndim not in (1, 2) or not wave.size or not np.isfinite(wave).all():
        raise UserError(
            f"encode takes a finite wave (S,) or (S, channels) with S >= 1, not shape {wave.shape}"
        )
    if codec not in ("flac", "wav", "ogg", "opus"):
        raise UserError(f"unknown codec {codec!r}: one of flac, wav, ogg, opus")
    if codec == "opus" and sample_rate not in OPUS_RATES_HZ:
        rates = ", ".join(map(str, OPUS_RATES_HZ))
        raise UserError(f"Opus has no {sample_rate} Hz: resample to one of {rates}")
    channels = wave.shape[1] if wave.ndim == 2 else 1
    out = io.BytesIO()
    try:
        if codec in ("flac", "wav"):
            pcm: np.ndarray = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
            soundfile.write(out, pcm, sample_rate, format=codec.upper(), subtype="PCM_16")
            return out.getvalue()
        subtype = "VORBIS" if codec == "ogg" else "OPUS"
        with soundfile.SoundFile(out, "w", sample_rate, channels, subtype, format="OGG") as file:
            for start in range(0, len(wave), WRITE_FRAMES):
                file.write(wave[start : start + WRITE_FRAMES].astype(np.float32))
    except soundfile.SoundFileError as error:
        raise UserError(
            f"{codec} cannot hold {channels} channels at {sample_rate} Hz ({error}): mix to mono, "
            f"resample, or take another codec"
        ) from error
    return stamp_ogg(out.getvalue(), serial=0)


def stamp_ogg(data: bytes, serial: int) -> bytes:
    """Returns the same OGG stream with ``serial`` in every page header and corrected checksums."""
    out, at = bytearray(data), 0
    while at < len(out):
        assert out[at : at + 4] == b"OggS"
        lacing = out[at + 26]
        end = at + 27 + lacing + sum(out[at + 27 : at + 27 + lacing])
        out[at + 14 : at + 18] = struct.pack("<I", serial)
        out[at + 22 : at + 26] = bytes(4)
        out[at + 22 : at + 26] = struct.pack("<I", _ogg_crc(out[at:end]))
        at = end
    return bytes(out)


def _ogg_crc(page: bytes | bytearray) -> int:
    """Computes the CRC-32 of RFC 3533: zlib's polynomial, most significant bit first, not
    inverted."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
