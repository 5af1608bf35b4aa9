"""bat: pre-train, probe and fine-tune audio encoders.

Importing this package does not import torch; loading the first encoder does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from bat.encoders.base import Encoder

__version__ = "0.1.0"
__all__ = ["__version__", "embed", "load_encoder", "predict"]


def load_encoder(
    path: str | Path,
    *,
    weights: str = "student",
    heads: int | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Loads an encoder of bat or another project strictly, in eval mode on the CPU.

    ``path``: a run, export or hub folder, or a weight file (the paper's, EAT's, SSLAM's, BEATs');
    ``ENCODER:PATH`` chooses the encoder: a file of ``bat/encoders``, ``hf`` for a folder or hub
    name of transformers, or ``package.module.Class`` from outside bat, which is imported.
    ``weights``: ``student`` or ``teacher`` (EMA), if a file holds both. ``heads``: attention heads,
    for a file that does not state them; default width / 64. ``trust_remote_code``: run the code
    that a folder of transformers brings.
    Raises ``bat.errors.UserError`` (a ValueError) naming every missing, unexpected or
    non-numeric weight, and settings out of range.

    >>> encoder = bat.load_encoder("runs/pretrain-toy")     # doctest: +SKIP
    >>> features = encoder(waveform)                        # (B, S) -> Features
    >>> features = encoder(waveform, lengths)               # (B,) samples: each as it is alone
    """
    from bat import weights as files

    encoder = files.load_encoder(
        str(path), weights=weights, heads=heads, trust_remote_code=trust_remote_code
    ).eval()
    numbers = {n: t for n, t in encoder.state_dict().items() if t.is_floating_point()}
    files.check_numbers(numbers, str(path))
    return encoder


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
    window: float | str | None = "whole",
    hop: float | None = None,
    batch: int = 32,
    device: str = "auto",
) -> Any:
    """Embeds clips with a frozen encoder; ``bat-embed`` does so for many files (docs/embed.md).

    Args:
        clips: a path or several (files, folders, CSVs, shards), or waveforms: (S,), (B, S), or
            several (S,), floats in [-1, 1]. Clips longer than the encoder takes are chunked by it.
        checkpoint: an encoder, or what ``load_encoder`` takes.
        sample_rate: of waveforms, Hz; None: the encoder's.
        level: ``clip``, or ``frame``: a vector each ``encoder.hop_seconds``.
        layer: ``last``, ``all``, a block from 1 on, or ``gate``: mixed as ``head`` weights them.
        pool: ``cls``, ``mean`` or ``cgp`` (what ``head``, a CGP, reads); None: ``cls`` if any.
        head: a head's folder in a run of bat-probe.
        window, hop: seconds; ``whole``: clips are not cut; None: the longest that fits at once.

    Returns:
        (n, D) float32, or (n, L, D) for all blocks; a list of (rows, ...) a clip at frame level or
        with windows.

    Raises:
        UserError: unreadable or unsuitable clips, settings that do not fit.
    """
    from bat.interfaces.embed import embed as run

    given = {"level": level, "layer": layer, "pool": pool, "head": head, "weights": weights}
    reading = {"sample_rate": sample_rate, "window": window, "hop": hop}
    return run(clips, checkpoint, batch=batch, device=device, **given, **reading)  # type: ignore[arg-type]


def predict(
    clips: Any,
    checkpoint: str | Path,
    *,
    sample_rate: int | None = None,
    average: bool = False,
    encoder: str | None = None,
    answer: str | None = None,
    top: int | None = None,
    threshold: float | None = None,
    median: int | None = None,
    window: float | str | None = None,
    hop: float | None = None,
    average_windows: bool = False,
    batch: int = 32,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Predicts with a head of bat-probe or bat-finetune, as ``bat-predict`` (docs/embed.md).

    Args:
        clips, sample_rate: as for ``embed``.
        checkpoint: a head's folder, a fold, or a run with one head. average: the mean of folds.
        encoder: where a probe's encoder lies, if it was moved.
        answer: ``scores``, ``events`` or ``text``; None: as the head was trained.
        top: the best labels only. threshold, median: of events; None: the task's.
        window, hop: seconds; None: the clips of the head's run; ``whole``: clips are not cut.
        average_windows: one answer a clip, its mean scores.

    Returns:
        A dict for each window, or each event: ``clip`` (its number), ``start``, ``end`` (seconds)
        and ``scores`` (label to score, best first) or ``text``; or ``onset``, ``offset``,
        ``label``, ``score``.

    Raises:
        UserError: unreadable or unsuitable clips, several heads, settings that do not fit.
    """
    from bat.interfaces.predict import predict as run

    how = {"average": average, "encoder": encoder, "answer": answer, "top": top}
    events = {"threshold": threshold, "median": median, "average_windows": average_windows}
    reading = {"sample_rate": sample_rate, "window": window, "hop": hop}
    return run(clips, checkpoint, batch=batch, device=device, **how, **events, **reading)  # type: ignore[arg-type]
