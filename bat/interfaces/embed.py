"""Embeds audio with a frozen encoder: ``bat-embed`` and ``bat.embed``.

Clip level, one vector a window: the class token (``pool="cls"``), the mean of its patches
(``mean``), or the 3 K features that the linear layer of a CGP head reads (``cgp``). Frame level, a
vector for each time patch: the mean over frequency. ``layer``: the ``last`` block, block ``N`` from
1, ``all`` blocks, or ``gate``, the blocks mixed as a head's gate weights them, each normalised:

    sum_l alpha_l z_l / ||z_l||

A clip is encoded at its own length: what it becomes does not depend on the others of its batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import bat
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.encoding import device_of, encode, evaluating
from bat.eval.loading import weights_digest
from bat.eval.waveforms import waveforms
from bat.interfaces.models import device_named, find_heads, load_model, trained_window
from bat.interfaces.parts import Job, Output, run
from bat.interfaces.recordings import (
    WindowReader,
    Windows,
    batches_of,
    list_recordings,
    stack,
)
from bat.interfaces.tables import writer_for
from bat.logs import is_main
from bat.probes.base import Probe, mean_patch
from bat.probes.cgp import CGP
from bat.probes.mixing import mix_normalised
from bat.types import Features, Needs, WaveBatch
from bat.weights import WEIGHTS

Level = Literal["clip", "frame"]
Floats = NDArray[np.float32]
WHOLE = "whole"


class Embedder:
    """Computes the embeddings of the clips of a batch.

    Attributes: ``size``, numbers of one embedding; ``pool``, settled.
    """

    def __init__(
        self,
        backbone: Encoder,
        *,
        level: str = "clip",
        layer: str | int = "last",
        pool: str | None = None,
        head: Probe | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Raises ``UserError`` for settings that do not fit each other or the encoder."""
        self.backbone, self.level, self.head, self.autocast = backbone, level, head, autocast
        self.pool = pool or ("cls" if backbone.has_cls and level == "clip" else "mean")
        layer = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
        if self.pool == "cgp" and layer == "last":
            layer = "gate"  # its head reads all blocks
        self.layer: str | int = layer
        if problems := list(self._problems()):
            raise UserError("; ".join(problems))
        patches = "none" if self.pool == "cls" else "last" if layer == "last" else "all"
        self.needs = Needs(patches)
        blocks = backbone.depth if layer == "all" else 1
        self.size = blocks * backbone.width
        if self.pool == "cgp":
            assert isinstance(head, CGP)
            self.size = 3 * len(head.prototypes)

    def _problems(self) -> Iterable[str]:
        depth, layer = self.backbone.depth, self.layer
        if self.level not in ("clip", "frame"):
            yield f"level={self.level}: clip or frame"
        if self.pool not in ("cls", "mean", "cgp"):
            yield f"pool={self.pool}: cls, mean or cgp"
        if isinstance(layer, int):
            if not 1 <= layer <= depth:
                yield f"layer={layer}: this encoder has blocks 1 to {depth}"
        elif layer not in ("last", "all", "gate"):
            yield f"layer={layer}: last, all, gate or a block from 1 to {depth}"
        if self.pool == "cls" and self.level == "frame":
            yield "pool=cls with level=frame: the class token is of a whole clip; omit pool"
        elif self.pool == "cls" and not self.backbone.has_cls:
            yield f"pool=cls: {type(self.backbone).__name__} has no class token; say pool=mean"
        if self.pool == "cgp" and layer != "gate":
            yield f"pool=cgp with layer={layer}: a CGP head mixes all blocks; omit layer"
        if self.pool == "cgp" and not isinstance(self.head, CGP):
            yield "pool=cgp needs the head of a CGP probe: head=RUN/heads/ENCODER/cgp-FOLD-SEED"
        elif self.pool == "cgp" and self.head is not None and self.head.level != self.level:
            yield f"pool=cgp with level={self.level}: this head is of level {self.head.level}"
        if layer == "gate" and self.pool != "cgp" and self._gate() is None:
            has = "has no gate" if self.head is not None else "is missing"
            yield f"layer=gate needs a head that weights the blocks (cgp, lcgp): head={has}"
        if self.head is not None and layer != "gate":
            yield f"a head is given, and layer={layer} does not use it: say layer=gate"

    def _gate(self) -> Tensor | None:
        return None if self.head is None else self.head.layer_gate()

    @torch.no_grad()
    def __call__(self, batch: WaveBatch) -> list[Floats]:
        """Returns (1, D) of each clip, at frame level (T_i, D); (.., L, D) for all blocks."""
        features = encode(
            self.backbone, batch, frames=None, autocast=self.autocast, needs=self.needs
        )
        rows = self.rows(features).float().cpu().numpy()
        if self.level == "clip":
            return [rows[i : i + 1].copy() for i in range(len(rows))]
        B, T = rows.shape[:2]
        own = [T] * B if features.valid is None else features.valid.tolist()
        return [row[:t].copy() for row, t in zip(rows, own, strict=True)]

    def rows(self, features: Features) -> Tensor:
        """Maps features to (B, ...), at frame level (B, T, ...)."""
        if self.pool == "cgp":
            assert isinstance(self.head, CGP)
            pooled = self.head.pooled(features)
            T = features.patches.shape[2]
            return pooled if self.level == "clip" else pooled.unflatten(0, (-1, T))
        tokens = features.cls if self.pool == "cls" else features.patches
        assert tokens is not None
        gate = self._gate() if self.layer == "gate" else None
        if gate is not None:
            tokens = mix_normalised(tokens, gate)[None]
        elif isinstance(self.layer, int):
            tokens = tokens[self.layer - 1 : self.layer]
        elif self.layer == "last":
            tokens = tokens[-1:]
        if self.level == "frame":
            rows = tokens.mean(3, dtype=torch.float32)  # (l, B, T, D)
        else:
            rows = tokens if self.pool == "cls" else mean_patch(tokens, features)  # (l, B, D)
        return rows.movedim(0, -2) if self.layer == "all" else rows[0]


def _loaded(
    checkpoint: str | Path | Encoder,
    *,
    weights: str,
    head: str | Path | None,
    device: str,
    bf16: bool,
    **how: Any,
) -> tuple[Embedder, str]:
    """Returns the embedder on its device, and the SHA-256 of the head's weights (empty: none)."""
    where = device_named(device)
    digest, probe = "", None
    if head is not None:
        if isinstance(checkpoint, Encoder):
            raise UserError("head= with an encoder object: name its checkpoint")
        (folder,) = find_heads(head)
        model = load_model(folder, encoder=str(checkpoint))
        own = (model.meta.get("encoder") or {}).get("weights", "student")
        if weights == "teacher" != own:
            raise UserError(f"weights=teacher: {folder} was trained on the {own}; omit weights")
        backbone, probe = model.backbone, model.head.to(where)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    elif isinstance(checkpoint, Encoder):
        backbone = checkpoint
        where = device_of(backbone) if device == "auto" else where
    else:
        backbone = bat.load_encoder(checkpoint, weights=weights)
    autocast = torch.bfloat16 if bf16 else None
    return Embedder(backbone.to(where).eval(), head=probe, autocast=autocast, **how), digest


def _window(value: float | str | None, backbone: Encoder) -> float | None:
    """Returns the seconds of a window, None for whole recordings."""
    if value == WHOLE:
        return None
    try:
        return trained_window(backbone) if value is None else float(value)
    except ValueError:
        raise UserError(f"window={value}: seconds, or {WHOLE}") from None


def embed_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | Path | Encoder,
    weights: str = "student",
    level: str = "clip",
    layer: str | int = "last",
    pool: str | None = None,
    head: str | Path | None = None,
    window: float | str | None = None,
    hop: float | None = None,
    batch: int = 32,
    workers: int = 0,
    device: str = "auto",
    bf16: bool = False,
    progress: bool = False,
    stop_after: int | None = None,
) -> None:
    """Embeds the audio at ``paths`` into ``out``; continues what was interrupted (docs/embed.md).

    Args:
        paths: files, folders, CSVs, shards; see ``list_recordings``.
        out: ``.parquet``, ``.npz``, ``.csv``, or a folder of ``.npy``; see ``tables``.
        checkpoint: as ``bat.load_encoder``. weights: ``student`` or ``teacher``.
        level, layer, pool: see above. head: of a probe run, for ``gate`` and ``cgp``.
        window: seconds; ``whole``; None: the longest clip that the encoder takes at once.
        hop: seconds from one window to the next; None: ``window``.
        stop_after: return after this many parts (tests).

    Raises:
        UserError: whatever is wrong with these; nothing readable; ``out`` is of another command.
    """
    out = Path(out)
    if batch < 1 or workers < 0:
        raise UserError(f"batch={batch}, workers={workers}: at least 1, and 0")
    output = Output(out)
    writer_for(out, hop_seconds=None)
    with output.checked():
        how = {"level": level, "layer": layer, "pool": pool}
        embedder, digest = _loaded(
            checkpoint, weights=weights, head=head, device=device, bf16=bf16, **how
        )
        backbone = embedder.backbone
        show = progress and is_main()
        recordings = list_recordings(paths, cache=output.headers, progress=show)
        windows = Windows(
            recordings.seconds,
            window=_window(window, backbone),
            hop=hop,
            rest=backbone.hop_seconds,
        )
        hop_seconds = backbone.hop_seconds if level == "frame" else None
        longest = windows.window or float(recordings.seconds.max(initial=1.0))
        job = Job(
            recordings,
            windows,
            sample_rate=backbone.sample_rate,
            compute=embedder,
            settings={
                "command": "embed",
                "encoder": weights_digest(backbone),
                "head": digest,
                "level": level,
                "layer": str(embedder.layer),
                "pool": embedder.pool,
                "window": windows.window,
                "hop": windows.hop,
                "bf16": bf16,
                "format": out.suffix or "folder",
            },
            batch=batch,
            window_bytes=4.0 * embedder.size * (longest / hop_seconds if hop_seconds else 1),
            workers=workers,
            progress=show,
        )
        run(job, out, writer_for(out, hop_seconds=hop_seconds), stop_after=stop_after)


def embed(
    clips: Any,
    checkpoint: str | Path | Encoder,
    *,
    sample_rate: int | None = None,
    level: str = "clip",
    layer: str | int = "last",
    pool: str | None = None,
    head: str | Path | None = None,
    weights: str = "student",
    window: float | str | None = WHOLE,
    hop: float | None = None,
    batch: int = 32,
    device: str = "auto",
) -> Floats | list[Floats]:
    """Embeds clips with a frozen encoder; ``bat-embed`` does so for many files (docs/embed.md).

    ``encoder.embed(clips, ...)`` is the same for an encoder that is loaded.

    Args:
        clips: a path or several (files, folders, CSVs, shards), or waveforms, NumPy or torch,
            floats in [-1, 1]: one (S,), a batch (B, S), or several (S,) of any lengths. What is
            longer than the encoder takes is chunked by it.
        checkpoint: an encoder, or what ``bat.load_encoder`` takes.
        sample_rate: of waveforms, Hz; they are resampled. Not needed for files.
        level: ``clip``, or ``frame``: a vector each ``encoder.hop_seconds``.
        layer: ``last``, ``all``, a block from 1 on, or ``gate``: mixed as ``head`` weights them.
        pool: ``cls``, ``mean`` or ``cgp`` (what ``head``, a CGP, reads); None: ``cls`` if any.
        head: a head's folder in a run of bat-probe.
        weights: ``student`` or ``teacher``, if the checkpoint holds both.
        window, hop: seconds; ``whole``: clips are not cut; None: the longest that fits at once.
        batch: clips at once; those of similar length are batched, which changes no result.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; an encoder stays where it is with ``auto``.

    Returns:
        (n, D) float32, or (n, L, D) for all blocks; a list of (rows, ...) a clip at frame level or
        with windows.

    Raises:
        UserError: clips that are unreadable, not finite, not mono, or of unknown rate (all of them
            are named); settings that do not fit.
    """
    how = {"level": level, "layer": layer, "pool": pool}
    with evaluating(checkpoint) if isinstance(checkpoint, Encoder) else nullcontext():
        embedder, _ = _loaded(
            checkpoint, weights=weights, head=head, device=device, bf16=False, **how
        )
        backbone = embedder.backbone
        reader = clip_reader(
            clips,
            sample_rate=sample_rate,
            to_rate=backbone.sample_rate,
            window=_window(window, backbone),
            hop=hop,
            rest=backbone.hop_seconds,
        )
        found: list[Any] = [None] * len(reader.windows)
        for part in read_batches(reader, batch):
            for row, values in zip(part.positions.tolist(), embedder(part), strict=True):
                found[row] = values
    first = reader.windows.first.tolist()
    each = [np.concatenate(found[a:b]) for a, b in itertools.pairwise(first)]
    return np.concatenate(each) if level == "clip" and reader.windows.window is None else each


class ArrayReader:
    """Windows of waveforms in memory, as ``WindowReader`` gives those of recordings."""

    def __init__(self, waves: Sequence[Floats], windows: Windows, *, sample_rate: int) -> None:
        self.waves, self.windows, self.sample_rate = waves, windows, sample_rate

    def __getitems__(self, rows: list[int]) -> WaveBatch:
        numbers = np.array(rows, np.int64)
        of = self.windows.recording(numbers).tolist()
        start, end = (
            (t * self.sample_rate).round().astype(int) for t in self.windows.times(numbers)
        )
        waves = [self.waves[i][a:b] for i, a, b in zip(of, start, end, strict=True)]
        return stack(waves, [f"array {i}" for i in of], rows, [])


def clip_reader(
    clips: Any,
    *,
    sample_rate: int | None,
    to_rate: int,
    window: float | None,
    hop: float | None,
    rest: float,
) -> ArrayReader | WindowReader:
    """Returns a reader of paths or arrays, for ``bat.embed`` and ``bat.predict``.

    ``clips``: a path or several, or waveforms (``bat.eval.waveforms``).
    """
    how: dict[str, Any] = {"window": window, "hop": hop, "rest": rest}
    given = [clips] if isinstance(clips, (str, Path)) else clips
    numbers = isinstance(given, np.ndarray) and given.dtype.kind not in "OU"
    if not (numbers or isinstance(given, Tensor)):
        given = list(given)
    if isinstance(given, list) and given and all(isinstance(c, (str, Path)) for c in given):
        recordings = list_recordings(given, repeats=True)
        if recordings.left_out:
            raise UserError(
                "; ".join(f"{bad.name}: {bad.reason}" for bad in recordings.left_out[:10])
            )
        return WindowReader(recordings, Windows(recordings.seconds, **how), sample_rate=to_rate)
    waves = waveforms(given, sample_rate=sample_rate, to_rate=to_rate)
    seconds = np.array([len(wave) for wave in waves]) / to_rate
    return ArrayReader(waves, Windows(seconds, **how), sample_rate=to_rate)


def read_batches(reader: ArrayReader | WindowReader, batch: int) -> Iterable[WaveBatch]:
    """Yields all windows, those of similar length together; ``UserError`` if one is unreadable."""
    start, end = reader.windows.times(np.arange(len(reader.windows)))
    for rows in batches_of(end - start, batch):
        made = reader.__getitems__(rows)
        if made.skipped:
            (i,) = reader.windows.recording(np.array([made.skipped[0].position])).tolist()
            assert isinstance(reader, WindowReader)
            raise UserError(f"{reader.recordings.name(i)}: {made.skipped[0].why}")
        yield made
