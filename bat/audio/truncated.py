"""Tells whether the end of an audio file is missing, from what its container states.

libsndfile reads a file whose end is missing (a download that broke off, a full disk) short and
without an error. WAV, AIFF, AU, RF64 and W64 state the bytes of their audio, which libsndfile
compares with the file in its log; an Ogg (Vorbis, Opus) must end with a whole page. Nothing is
known of a FLAC or an MP3: ``bat.audio.decode`` notices it when the end is read, and what is before
it can be used. A program that writes to a pipe states a length of 2 GiB or more, or none: such
files are whole.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import soundfile

from bat.audio.part import FilePart

STREAMED_BYTES = 0x7FFF0000
"""A length from which it is that of a stream: sox writes 0x7ffff000, ffmpeg 0xffffffff."""
SLACK_BYTES = 128  # some programs count a header to the audio
STATED = re.compile(r"^ *(?:data|SSND|Data Size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
STATED_RF64 = re.compile(r"count (\d+) does not match value from 'ds64' chunk of (\d+)")
PAGE_BYTES = 27 + 255 + 255 * 255  # the largest page of an Ogg (RFC 3533)


def missing_end(file: soundfile.SoundFile, data: bytes | Path | FilePart) -> str:
    """Returns why the open ``file`` of ``data`` is truncated; empty if nothing shows it."""
    if file.format == "OGG":
        return _ogg(data)
    if file.format in ("FLAC", "MP3"):
        return ""
    log = file.extra_info
    for stated, there in ((int(a), int(b)) for a, b in STATED.findall(log)):
        if there + SLACK_BYTES < stated < STREAMED_BYTES:
            return f"its header states {stated} bytes of audio, the file holds {there}"
    if found := STATED_RF64.search(log):
        there, stated = (int(n) for n in found.groups())
        if there < stated:
            return f"its header states {stated} samples, the file holds {there}"
    return ""


def _ogg(data: bytes | Path | FilePart) -> str:
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - PAGE_BYTES))
        end = file.read()
    last = end.rfind(b"OggS")
    if last < 0:
        return ""
    body = last + 27 + (end[last + 26] if last + 27 <= len(end) else len(end))
    if body + sum(end[last + 27 : body]) <= len(end):
        return ""
    return "its last page is cut"
