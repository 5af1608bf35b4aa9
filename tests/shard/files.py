"""Audio files and tars for the tests of shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bat.audio.encode import encode
from bat.tasks.base import Row

RATE = 16_000
WAV = encode(np.sin(np.arange(800) * 0.1), sample_rate=RATE, codec="wav")


def noise(seed: int, seconds: float = 0.2, *, level: float = 0.3, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-level, level, round(seconds * rate))


def audio(seed: int, *, codec: str = "wav", rate: int = RATE, **how: float) -> bytes:
    return encode(noise(seed, rate=rate, **how), sample_rate=rate, codec=codec)  # type: ignore[arg-type]


def recording(path: Path, wave: np.ndarray, rate: int = RATE, **more: Any) -> Row:
    """Writes ``wave`` (S,) or (S, channels) as a file of the codec of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(wave, sample_rate=rate, codec=path.suffix[1:]))  # type: ignore[arg-type]
    return Row(path, path.stem, **{"labels": ("x",), **more})


def tar_bytes(members: Mapping[str, Any], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Returns a tar of ``{name: bytes, an object to be written as JSON, or a TarInfo}``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, Any], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, format))
    return path


def confit(key: str, labels: dict[str, int]) -> dict[str, Any]:
    """Returns a clip with ``{name: number}`` as AudioSet's shards of ConFit have it."""
    said = {"id": key, "label": [*labels], "label_id": [*labels.values()]}
    return {f"{key}.wav": WAV, f"{key}.json": said}


def lay(root: Path, files: Mapping[str, str]) -> Path:
    """Writes ``{name: text}`` below ``root`` and returns it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def clips(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Returns ``{key: (audio, JSON)}`` in order, read as any tar."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        for name, data in read_tar(path).items():
            key, _, suffix = name.rpartition(".")
            found.setdefault(key, {})["json" if suffix == "json" else "audio"] = data
    return {key: (parts["audio"], json.loads(parts["json"])) for key, parts in found.items()}


def contents(folder: Path) -> dict[str, str]:
    """Returns names and hashes of the files; of a table all but the time of its tar."""

    def told(path: Path) -> bytes:
        if path.suffix != ".npz":
            return path.read_bytes()
        with np.load(path) as file:
            head = json.loads(file["head"].tobytes())
            assert head.pop("mtime_ns") > 0
            arrays = [file[name].tobytes() for name in ("clips", "labels", "keys")]
        return b"\0".join([json.dumps(head).encode(), *arrays])

    return {p.name: hashlib.sha256(told(p)).hexdigest() for p in folder.iterdir()}
