"""Writing shards: files of any folder become WebDataset tars with a manifest (FIELD section 1).

``shard-%05d.tar`` holds ``KEY.ext`` + ``KEY.json`` (``id, label, label_id, sample_rate,
num_samples, start_seconds`` and, where there are such, ``mid, fold, split``), beside it its index
(``table.py``). ``manifest.json`` is written last: where it lies, the set is complete. Each clip is
decoded once before it goes in, so a shard holds only what can be read; the rest is listed in the
manifest with its reason. The same files and options give the same bytes: rows in their order, one
time stamp, no user.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from bat.audio.decode import DecodeError, decode, encode, probe
from bat.data.manifest import Manifest, ShardInfo, source_hash
from bat.data.table import MAX_AUDIO_BYTES, scan
from bat.data.tar import BLOCK, escape_key
from bat.shapes import UserError
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, Row, Task, no_decoder

Codec = Literal["keep", "flac", "wav", "ogg"]
MARKER = ".bat-shard-in-progress"


def prepare(row: Row, *, codec: Codec, sample_rate: int | None) -> tuple[str, bytes, int, int]:
    """Suffix, bytes, frames and sample rate of ``row`` as it is to lie in a shard.

    Bytes are kept as they are where codec, rate and (unless ``codec="keep"``) one channel agree;
    otherwise the clip is mixed to mono and encoded (``keep`` at another rate: as FLAC).

    Raises:
        DecodeError, OSError: the clip is unreadable.
    """
    if row.path.stat().st_size > MAX_AUDIO_BYTES:
        raise DecodeError("long", f"the file is larger than {MAX_AUDIO_BYTES} bytes")
    data = row.path.read_bytes()
    info = probe(data)
    wave = decode(data, sample_rate=sample_rate or info.sample_rate, expected_frames=info.frames)
    same_rate = sample_rate in (None, info.sample_rate)
    if same_rate and (codec == "keep" or (codec == info.codec and info.channels == 1)):
        suffix = info.codec if info.codec in AUDIO_SUFFIXES else row.path.suffix[1:].lower()
        return suffix, data, info.frames, info.sample_rate
    target: Literal["flac", "wav", "ogg"] = "flac" if codec == "keep" else codec
    data = encode(wave, sample_rate=sample_rate or info.sample_rate, codec=target)
    info = probe(data)
    return target, data, info.frames, info.sample_rate


class _Shard:
    """One tar being written under a temporary name, hashed on its way."""

    def __init__(self, out: Path, number: int) -> None:
        import webdataset

        self.path = out / f"shard-{number:05d}.tar"
        self.temp = out / f".{self.path.name}.tmp"
        self.file: BinaryIO = self.temp.open("wb")
        self.sha256 = hashlib.sha256()
        self.clips = self.bytes = self.planned = 0
        self.tar = webdataset.TarWriter(
            self, encoder=False, compress=False, mtime=0, user="bat", group="bat", mode=0o644
        )

    def write(self, data: bytes) -> int:  # the tar's file object: this is how it is hashed
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def add(self, key: str, suffix: str, data: bytes, meta: bytes, size: int) -> None:
        self.tar.write({"__key__": key, suffix: data, "json": meta})
        self.clips += 1
        self.planned += size  # ``bytes`` lags behind: tarfile buffers

    def finish(self) -> ShardInfo:
        """Close, index, and give the tar its name."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        table = scan(self.temp, self.sha256.hexdigest())
        assert len(table.clips) == self.clips, "the scanner disagrees with the writer"
        os.replace(self.temp, self.path)
        table.save(self.path.with_suffix(".idx.npz"))
        return ShardInfo(self.path.name, self.clips, self.bytes, self.sha256.hexdigest())


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold ``out`` for writing: one process at a time, and never over somebody's own shards."""
    theirs = [*out.glob("*.tar"), *out.glob("manifest.json")]
    if theirs and not (out / MARKER).exists() and Manifest.load(out) is None:
        raise UserError(f"{out} holds shards that bat-shard did not write: give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        marker = (out / MARKER).open("a")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    with marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        try:
            yield
        except (UserError, OSError) as error:
            _sweep(out)
            (out / MARKER).unlink(missing_ok=True)
            if not any(out.iterdir()):
                out.rmdir()
            if isinstance(error, OSError):
                raise UserError(f"{out} cannot be written: {error.strerror}") from error
            raise
        (out / MARKER).unlink(missing_ok=True)


def _sweep(out: Path) -> None:
    """Remove what an interrupted run left."""
    if (out / "manifest.json").exists():
        return
    for pattern in ("shard-*.tar", "shard-*.idx.npz", ".shard-*.tmp"):
        for path in out.glob(pattern):
            path.unlink()


def write_shards(
    rows: Sequence[Row],
    out: Path,
    *,
    codec: Codec = "keep",
    sample_rate: int | None = None,
    shard_bytes: int = 1_000_000_000,
    vocabulary: Sequence[str] | None = None,
    progress: bool = False,
) -> Manifest:
    """Write ``rows`` to ``out`` as shards of at most ``shard_bytes`` (one clip at least).

    Args:
        codec: ``keep`` the files as they are, or re-encode (16-bit for FLAC and WAV).
        sample_rate: Hz of the stored clips; None: as they are.
        vocabulary: class names in the order of their ids; None: the labels met, sorted.

    Returns:
        The manifest; that of ``out`` itself where the very same set is already complete.

    Raises:
        UserError: nothing readable, a label outside the vocabulary, ``out`` in use otherwise.
    """
    if codec not in get_args(Codec):
        raise UserError(f"codec {codec!r}: one of {', '.join(get_args(Codec))}")
    if shard_bytes < 1 or (sample_rate is not None and sample_rate < 1):
        raise UserError(f"shard_bytes={shard_bytes} and sample_rate={sample_rate} must be positive")
    if not rows:
        raise UserError("there are no clips to write")
    met = sorted({label for row in rows for label in row.labels})
    names = {name: i for i, name in enumerate(met if vocabulary is None else vocabulary)}
    for label in met:
        if label not in names:
            raise UserError(f"label {label!r} is not among the {len(names)} classes given")
    source = source_hash(
        rows, codec=codec, sample_rate=sample_rate, shard_bytes=shard_bytes, vocabulary=list(names)
    )
    done = Manifest.load(out)
    if done is not None and done.source == source:
        return done
    with _claimed(out):
        done = Manifest.load(out)  # another process may have finished it meanwhile
        if done is not None and done.source == source:
            return done
        if done is not None:
            raise UserError(
                f"{out} already holds a complete set of {done.clips} clips from other files or "
                f"options: give another folder, or remove it"
            )
        _sweep(out)
        manifest = _write(rows, out, codec, sample_rate, shard_bytes, names, source, progress)
        manifest.save(out)
    return manifest


def _write(
    rows: Sequence[Row],
    out: Path,
    codec: Codec,
    sample_rate: int | None,
    shard_bytes: int,
    names: dict[str, int],
    source: str,
    progress: bool,
) -> Manifest:
    os.environ["WDS_SECURE"] = "1"  # before the import: no pipe: URLs, no pickle decoders
    import webdataset  # noqa: F401  # seconds: not once the progress bar runs
    from tqdm import tqdm

    shards: list[ShardInfo] = []
    left_out: list[dict[str, str]] = []
    keys: set[str] = set()
    shard: _Shard | None = None
    seconds = 0.0
    for row in tqdm(rows, unit="clip", disable=not progress):
        try:
            suffix, data, frames, rate = prepare(row, codec=codec, sample_rate=sample_rate)
        except (DecodeError, OSError) as error:
            kind = error.kind if isinstance(error, DecodeError) else "unreadable"
            why = error.strerror if isinstance(error, OSError) else error
            suffix = row.path.suffix[1:].lower()
            foreign = kind == "corrupt" and suffix in UNDECODED_SUFFIXES
            reason = no_decoder(suffix) if foreign else f"{kind}: {why}"
            left_out.append({"key": row.key, "file": row.path.name, "reason": reason})
            continue
        key = escape_key(row.key)
        if key in keys:
            key = escape_key(f"{row.key}#{len(keys)}")
        keys.add(key)
        meta = json.dumps(_meta(row, names, frames, rate), ensure_ascii=False).encode()
        size = sum(-(-len(part) // BLOCK) * BLOCK + BLOCK for part in (data, meta))
        if shard is not None and shard.planned + size > shard_bytes:
            shards.append(shard.finish())
            shard = None
        if shard is None:
            shard = _Shard(out, len(shards))
        shard.add(key, suffix, data, meta, size)
        seconds += frames / rate
    if shard is None:
        raise UserError(
            f"none of the {len(rows)} clips can be read (the first: {left_out[0]['file']}, "
            f"{left_out[0]['reason']})"
        )
    shards.append(shard.finish())
    total = sum(s.bytes for s in shards)
    clips = sum(s.clips for s in shards)
    return Manifest(shards, clips, round(seconds, 3), total, list(names), left_out, source)


def _meta(row: Row, names: dict[str, int], frames: int, rate: int) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": row.key,
        "label": list(row.labels),
        "label_id": [names[label] for label in row.labels],
        "sample_rate": rate,
        "num_samples": frames,
        "start_seconds": row.start_seconds,
    }
    optional = {"mid": list(row.mids) or None, "fold": row.fold, "split": row.split}
    return meta | {k: v for k, v in optional.items() if v is not None}


def ensure_shards(
    task: Task,
    root: str | Path,
    cache: str | Path,
    *,
    codec: Codec = "keep",
    sample_rate: int | None = None,
    shard_bytes: int = 1_000_000_000,
    progress: bool = False,
) -> Path:
    """The folder of shards of ``root`` in ``cache``, written unless it is there already.

    The folder's name is ``TASK-HASH`` with a hash over files, sizes, labels and options, so a
    changed data set gets a new one. Several processes may ask at once: one writes, others wait.

    Raises:
        UserError: as ``Task.read`` and ``write_shards``.
    """
    rows, vocabulary = task.read(root)
    source = source_hash(
        rows, codec=codec, sample_rate=sample_rate, shard_bytes=shard_bytes, vocabulary=vocabulary
    )
    out = Path(cache) / f"{task.name}-{source[:12]}"
    write_shards(
        rows,
        out,
        codec=codec,
        sample_rate=sample_rate,
        shard_bytes=shard_bytes,
        vocabulary=vocabulary,
        progress=progress,
    )
    return out
