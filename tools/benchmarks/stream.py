"""The stream on one core: the decoders' own limit, ours from shards on disk, the plain way.

*limit*: a bare loop over the same encoded bytes in memory: soundfile reads (a crop: seeks and
reads), channels are mixed, soxr resamples, and nothing else. *ours*: ``AudioData`` over shards on
disk: order, index, read, decode, crop, roll, batch. *plain*, the paper's way: a map-style Dataset
over separate files in the order of a sampler, ``librosa.load`` of the whole file, crop, roll, a
collate that pads to the longest. One process pinned to one core with one thread; *worker* is ours
in a loader process on that core, received by the trainer's process on another (where there is one);
*worker_mb* is what that process holds for itself alone afterwards.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch.utils.data import DataLoader, Dataset

from bat.audio.decode import encode
from bat.data.index import open_index
from bat.data.module import AudioData
from bat.shard.write import write_shards
from bat.tasks.base import Row
from benchmarks.timing import attempted, medians

ABOUT = "ms a clip on one core; of_limit = limit / ours, ratio = plain / ours; an H100 eats 150/s"
SAMPLE_RATE = 16_000
CLIPS_PER_SECOND = 150
"""Of one H100 in pre-training (issue's figure, not measured here)."""
CASES = {  # name: codec, sample rate, channels, seconds of a crop (None: whole clips)
    "flac 16k mono, whole 10 s": ("flac", 16_000, 1, None),
    "flac 16k mono, 2-s crops": ("flac", 16_000, 1, 2.0),
    "ogg 44.1k stereo, whole 10 s": ("ogg", 44_100, 2, None),
    "ogg 44.1k stereo, 2-s crops": ("ogg", 44_100, 2, 2.0),
}
CLIP_SECONDS = 10.0


def coloured_noise(rng: np.random.Generator, samples: int, channels: int) -> np.ndarray:
    """Noise of a 1/f spectrum that swells and fades, channels alike in part: (S, channels)."""
    spectrum = np.fft.rfft(rng.standard_normal((samples, channels)), axis=0)
    spectrum /= np.maximum(np.arange(len(spectrum)), 1)[:, None] ** 0.5
    wave = np.fft.irfft(spectrum, samples, axis=0)
    if channels > 1:
        wave += wave[:, ::-1]
    wave *= 0.6 + 0.4 * np.sin(np.linspace(0, 9, samples))[:, None]
    return wave / np.abs(wave).max() * 0.7


def make_clips(folder: Path, *, codec: str, rate: int, channels: int, count: int) -> list[Path]:
    """``count`` files of ``CLIP_SECONDS``."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        wave = coloured_noise(rng, round(CLIP_SECONDS * rate), channels)
        path = folder / f"{i:04d}.{codec}"
        path.write_bytes(encode(wave.squeeze(), sample_rate=rate, codec=codec))
        paths.append(path)
    return paths


def make_shards(paths: list[Path], out: Path) -> Path:
    """The same bytes in shards."""
    write_shards([Row(path, path.stem, ()) for path in paths], out)
    return out


class Files(Dataset):
    """The plain way: one file an item, decoded whole by librosa."""

    def __init__(self, paths: list[Path], seconds: float | None) -> None:
        self.paths, self.seconds = paths, seconds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        import librosa

        wave, _ = librosa.load(self.paths[i], sr=SAMPLE_RATE, mono=True)
        if self.seconds is not None:
            wanted = round(self.seconds * SAMPLE_RATE)
            start = int(torch.randint(0, len(wave) - wanted + 1, ()))
            wave = wave[start : start + wanted]
        roll = int(torch.randint(0, len(wave), ()))
        return torch.roll(torch.from_numpy(wave), roll)


def padded(waves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, longest) and lengths."""
    lengths = torch.tensor([len(wave) for wave in waves])
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths


def limit_loop(encoded: list[bytes], seconds: float | None) -> Callable[[], None]:
    """soundfile and soxr over bytes in memory."""
    rng = np.random.default_rng(1)

    def loop() -> None:
        for data in encoded:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                frames, rate = file.frames, file.samplerate
                if seconds is not None:
                    wanted = math.ceil(seconds * rate)
                    file.seek(int(rng.integers(0, frames - wanted + 1)))
                    frames = wanted
                wave = file.read(frames, dtype="float32", always_2d=True)
                channels = file.channels
            mono = wave[:, 0] if channels == 1 else (wave[:, 0] + wave[:, 1]) * np.float32(0.5)
            if rate != SAMPLE_RATE:
                soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")

    return loop


def ours_loader(shards: Path, seconds: float | None, *, batch: int, batches: int, workers: int):
    """Our loader and the number of its clips."""
    data = AudioData(
        index=open_index(shards),
        batch=batch,
        batches=batches,
        sample_rate=SAMPLE_RATE,
        clip_seconds=seconds or CLIP_SECONDS,
        roll=True,
        workers=workers,
    )
    return data.train_dataloader()


def plain_loader(paths: list[Path], seconds: float | None, *, batch: int) -> DataLoader:
    return DataLoader(Files(paths, seconds), batch_size=batch, shuffle=True, collate_fn=padded)


def drain(loader: DataLoader) -> None:
    for _ in loader:
        pass


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This process and its later children on one core, one thread."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def high_water_mb() -> float:
    """Most memory this process ever had resident (``ru_maxrss`` would count its parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _peak(way: str, source: Any, seconds: float | None, batch: int, batches: int, out: Any) -> None:
    """Child process: what a pass adds to the peak of resident memory, MB."""
    torch.set_num_threads(1)
    if way == "ours":
        loader = ours_loader(source, seconds, batch=batch, batches=batches, workers=0)
    else:
        import librosa

        librosa.resample(np.zeros(100, np.float32), orig_sr=2, target_sr=1)  # its lazy imports
        loader = plain_loader(source, seconds, batch=batch)
    before = high_water_mb()
    drain(loader)
    drain(loader)
    out.put(high_water_mb() - before)


def peak_mb(way: str, source: Any, seconds: float | None, *, batch: int, batches: int) -> float:
    context = get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_peak, args=(way, source, seconds, batch, batches, out))
    child.start()
    peak = float(out.get(timeout=600))
    child.join()
    return peak


def case(
    name: str, folder: Path, *, clips: int, batch: int, repeats: int, quick: bool
) -> dict[str, Any]:
    codec, rate, channels, seconds = CASES[name]
    paths = make_clips(folder, codec=codec, rate=rate, channels=channels, count=clips)
    shards = make_shards(paths, folder / "shards")
    encoded = [path.read_bytes() for path in paths]
    batches = clips // batch
    core = min(os.sched_getaffinity(0))
    with pinned(core):
        ours = ours_loader(shards, seconds, batch=batch, batches=batches, workers=0)
        plain = plain_loader(paths, seconds, batch=batch)
        taken = medians(
            {
                "limit": limit_loop(encoded, seconds),
                "ours": lambda: drain(ours),
                "plain": lambda: drain(plain),
            },
            repeats=repeats,
            title=name,
        )
    ms = {way: 1e3 * t / clips for way, t in taken.items()}
    sizes = {"batch": batch, "batches": batches}
    row = {
        "case": name,
        "limit_ms": ms["limit"],
        "ours_ms": ms["ours"],
        "plain_ms": ms["plain"],
        "of_limit": ms["limit"] / ms["ours"],
        "ratio": ms["plain"] / ms["ours"],
        "cores_for_150": CLIPS_PER_SECOND * ms["ours"] / 1e3,
        "ours_peak_mb": None if quick else peak_mb("ours", shards, seconds, **sizes),
        "plain_peak_mb": None if quick else peak_mb("plain", paths, seconds, **sizes),
    }
    if not quick:
        row |= worker(shards, seconds, repeats=repeats, **sizes)
    return row


def worker(
    shards: Path, seconds: float | None, *, batch: int, batches: int, repeats: int
) -> dict[str, float | None]:
    """ms a clip with one loader process on one core, this process on another; and its own memory.

    Nothing on a machine with one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return {"worker_ms": None, "worker_mb": None}
    with pinned(cores[0]):
        loader = ours_loader(shards, seconds, batch=batch, batches=batches, workers=1)
        iterator = iter(loader)  # its process is persistent, and pinned as this one is
    with pinned(cores[1]):
        taken = medians({"worker": lambda: drain(loader)}, repeats=repeats, title="worker")
    pid = iterator._workers[0].pid
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    private = sum(int(x.split()[1]) for x in lines if x.startswith("Private_")) / 1024
    return {"worker_ms": 1e3 * taken["worker"] / (batch * batches), "worker_mb": private}


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    clips, batch = (8, 4) if quick else (192, 24)

    def measure(name: str) -> Iterator[dict[str, Any]]:
        sizes = {"clips": clips, "batch": batch, "repeats": repeats, "quick": quick}
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory(prefix="bat-bench-") as folder,
        ):
            warnings.simplefilter("ignore")
            row = case(name, Path(folder), **sizes)
        yield row

    for name in CASES:
        yield from attempted(name, lambda name=name: measure(name))
