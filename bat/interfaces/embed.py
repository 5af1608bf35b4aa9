"""Embeds audio with a frozen encoder: ``bat-embed`` and ``bat.embed``.

Clip level, one vector a window: the class token (``pool="cls"``), the mean of its patches
(``mean``), or the 3 K features that the linear layer of a CGP head reads (``cgp``). Frame level, a
vector for each time patch: the mean over frequency. ``layer``: the ``last`` block, block ``N`` from
1, ``all`` blocks, or ``gate``, the blocks mixed as a head's gate weights them, each normalised:

    sum_l alpha_l z_l / ||z_l||

A clip is encoded at its own length: what it becomes does not depend on the others of its batch.
"""

from __future__ import annotations

import functools
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
from bat.interfaces.models import device_named, find_heads, load_model, trained_window
from bat.interfaces.parts import run
from bat.interfaces.recordings import WHOLE, compute_clips, window_seconds
from bat.interfaces.tables import check_format, write_table
from bat.probes.base import Probe, mean_patch
from bat.probes.cgp import CGP
from bat.probes.mixing import mix_normalised
from bat.types import Features, Needs, WaveBatch
from bat.weights import WEIGHTS

Level = Literal["clip", "frame"]
Floats = NDArray[np.float32]


class Embedder:
    """Computes the embeddings of the clips of a batch.

    Attributes: ``width``, numbers of one embedding; ``pool``, settled.
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
        self.width = blocks * backbone.width
        if self.pool == "cgp":
            assert isinstance(head, CGP)
            self.width = 3 * len(head.prototypes)

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

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Encoder,
        *,
        weights: str = "student",
        head: str | Path | None = None,
        device: str = "auto",
        bf16: bool = False,
        **how: Any,
    ) -> Embedder:
        """Loads encoder and head onto the device; ``how``: ``level``, ``layer``, ``pool``."""
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
        made = cls(backbone.to(where).eval(), head=probe, autocast=autocast, **how)
        made.settings["head"] = digest
        return made

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """See ``bat.interfaces.parts.Compute``."""
        return {
            **{"command": "embed", "encoder": weights_digest(self.backbone), "head": ""},
            **{"level": self.level, "layer": str(self.layer), "pool": self.pool},
            **{"bf16": self.autocast is not None},
        }

    def window(self, value: float | str | None) -> float | None:
        """Returns the seconds of a window; None as ``value``: the longest clip that the encoder
        takes at once."""
        return window_seconds(value, trained_window(self.backbone))

    def size(self, seconds: float) -> float:
        """Returns the bytes of the embeddings of a window."""
        T = seconds / self.backbone.hop_seconds if self.level == "frame" else 1
        return 4.0 * self.width * T


def embed_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | Path | Encoder,
    level: str = "clip",
    layer: str | int = "last",
    pool: str | None = None,
    head: str | Path | None = None,
    weights: str = "student",
    device: str = "auto",
    bf16: bool = False,
    **reading: Any,
) -> None:
    """Embeds the audio at ``paths`` into ``out``; continues what was interrupted (docs/embed.md).

    Args:
        out: ``.parquet``, ``.npz``, ``.csv``, or a folder of ``.npy`` (see ``tables``); here, or a
            URL that fsspec can write.
        checkpoint, level, layer, pool, head, weights, device: see ``embed``.
        reading: see ``run``.

    Raises:
        UserError: whatever is wrong with these; nothing readable; ``out`` is of another command.
    """
    how: dict[str, Any] = {
        "level": level,
        "layer": layer,
        "pool": pool,
        "head": head,
        "weights": weights,
    }
    check_format(out)

    def load() -> Embedder:
        made = Embedder.load(checkpoint, device=device, bf16=bf16, **how)
        made.settings["format"] = Path(out).suffix or "folder"
        return made

    run(paths, out, load, write_table, **reading)


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
    how: dict[str, Any] = {
        "level": level,
        "layer": layer,
        "pool": pool,
        "head": head,
        "weights": weights,
    }
    reading: dict[str, Any] = {"sample_rate": sample_rate, "window": window, "hop": hop}
    with evaluating(checkpoint) if isinstance(checkpoint, Encoder) else nullcontext():
        embedder = Embedder.load(checkpoint, device=device, **how)
        windows, found = compute_clips(embedder, clips, batch=batch, **reading)
    bounds = itertools.pairwise(windows.first.tolist())
    each = [np.concatenate([found[row] for row in range(a, b)]) for a, b in bounds]
    return np.concatenate(each) if level == "clip" and window == WHOLE else each
