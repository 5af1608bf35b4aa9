"""Axis letters and the data types shared by all packages.

Letters in the shape comments of this package:

====  =====================================  ====  ==============================
B     clips                                  L     blocks of an encoder
S     samples of a waveform                  V     masked views of a clip
T     time patches (frames where stated)     K     prototypes
F     frequency patches (mels likewise)      C     classes
N     tokens, ``N = T * F``                  H     attention heads
D     width
====  =====================================  ====  ==============================

Tokens are **time-major**: token ``i`` sits at time ``i // F`` and frequency ``i % F``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The patch grid of a spectrogram: ``time`` by ``freq`` patches, time-major tokens."""

    time: int
    freq: int

    @property
    def tokens(self) -> int:
        return self.time * self.freq


@dataclass(frozen=True)
class Clip:
    """One clip as stored in a shard, still encoded."""

    key: str
    """Sample key, unique in its data set."""
    data: bytes
    """The audio file, in ``codec``."""
    codec: str
    """File suffix without the dot: ``flac``, ``ogg``, ``wav``, ``mp3``, ..."""
    labels: tuple[int, ...] = ()
    """Indices into the data set's label vocabulary."""
    shard: str = ""
    """Name of the shard it lies in."""


class Skipped(NamedTuple):
    """A clip that could not be used, and its place."""

    key: str
    shard: str
    """Name of the shard it lies in."""
    kind: str
    """Reason in one word, for counting: ``corrupt``, ``truncated``, ``nan``, ``unreadable``, ..."""
    why: str
    position: int
    """Position in the stream."""


@dataclass
class WaveBatch:
    """A batch as it leaves the loader; all later processing is on the device."""

    waves: Tensor
    """(B, S) float32 in [-1, 1] at the front end's rate, zero-padded on the right."""
    lengths: Tensor
    """(B,) int64: valid samples of each row, ``1 <= lengths <= S``."""
    targets: Tensor
    """(B, C) float32 in [0, 1]: multi-hot labels (one-hot where a task has one label)."""
    keys: list[str]
    """(B) sample keys."""
    positions: Tensor
    """(B,) int64: global position of each sample in the stream (evaluation: its row)."""
    skipped: list[Skipped]
    """Unreadable clips; in training they are replaced by other clips of this batch."""

    def to(self, device: object, non_blocking: bool = False) -> WaveBatch:
        """Returns the same batch with its tensors on ``device``."""
        self.waves = self.waves.to(device, non_blocking=non_blocking)  # type: ignore[call-overload]
        self.lengths = self.lengths.to(device, non_blocking=non_blocking)  # type: ignore[call-overload]
        self.targets = self.targets.to(device, non_blocking=non_blocking)  # type: ignore[call-overload]
        return self

    def first(self, count: int) -> WaveBatch:
        """Returns a batch of the first clips only; does not change this one."""
        return WaveBatch(
            self.waves[:count],
            self.lengths[:count],
            self.targets[:count],
            self.keys[:count],
            self.positions[:count],
            [],
        )

    def pin_memory(self) -> WaveBatch:
        self.waves = self.waves.pin_memory()
        self.lengths = self.lengths.pin_memory()
        self.targets = self.targets.pin_memory()
        return self


class Views(NamedTuple):
    """Masks for ``rows = B * V`` views, clip-major (all views of clip 0, then clip 1, ...)."""

    keep_ids: Tensor
    """(rows, n) int64, ascending: the visible tokens."""
    mask: Tensor
    """(rows, N) bool: True where the token is removed."""
    chosen: Tensor | None = None
    """(rows, m) int64, ascending: the removed tokens that are predicted; None: all."""

    @property
    def predict_ids(self) -> Tensor:
        """(rows, m) int64, ascending: the removed tokens that a decoder predicts."""
        return self.masked_ids if self.chosen is None else self.chosen

    @property
    def masked_ids(self) -> Tensor:
        """(rows, N - n) int64, ascending: the removed tokens. No host synchronisation."""
        import torch  # not at the top: config and cli import this file

        n, removed = self.keep_ids.shape[1], self.mask.shape[1] - self.keep_ids.shape[1]
        # consecutive removed tokens differ by one, plus one for each kept token
        # between them; the i-th kept token has keep_ids[i] - i removed ones before it
        before = self.keep_ids - torch.arange(n, device=self.keep_ids.device)  # (rows, n)
        steps = before.new_ones(len(before), removed + 1)  # the last: kept tokens after all of them
        steps.scatter_add_(1, before, before.new_ones(1).expand_as(before))
        return steps.cumsum(1)[:, :-1] - 1


class Features(NamedTuple):
    """Features of a frozen encoder for all probes: the tokens of all blocks."""

    patches: Tensor
    """(L, B, T, F, D) patch tokens after each block. If only some are needed, the last ones:
    (1, B, T, F, D) or (0, B, T, F, D), see ``Needs``."""
    cls: Tensor | None
    """(L, B, D) class tokens after each block; None for an encoder without one."""
    entry: Tensor | None = None
    """(B, T, F, D) patch tokens as they enter the first block; None unless asked for."""
    pieces: Tensor | None = None
    """(L, B, P, D) class tokens of the P chunks of a long clip, if ``entry`` was requested
    and P > 1; their mean is ``cls``. For clips with fewer chunks than the longest of the batch, the
    last ones are zero."""
    valid: Tensor | None = None
    """(B,) int64, valid time patches of each clip in a batch of several lengths; later tokens are
    zero padding, to be excluded from means, extremes and attention. None: all T are valid."""

    def __repr__(self) -> str:
        """Returns the shapes, not the numbers."""
        axes = ("L, B, T, F, D", "L, B, D", "B, T, F, D", "L, B, P, D", "B")
        found = zip(self._fields, axes, self, strict=True)
        said = [f"{name} ({of}) = {tuple(t.shape)}" for name, of, t in found if t is not None]
        return f"Features({', '.join(said)}, {self.patches.dtype}, {self.patches.device})"

    def inside(self) -> Tensor | None:
        """(B, T) bool, True for valid time patches; None: all."""
        if self.valid is None:
            return None
        steps = self.valid.new_ones(self.patches.shape[2]).cumsum(0)  # 1 .. T
        return steps <= self.valid[:, None]

    def clip(self, row: int) -> Features:
        """Returns one clip of the batch without its padding: B = 1, ``valid`` None."""
        T = self.patches.shape[2] if self.valid is None else int(self.valid[row])
        return Features(
            self.patches[:, row : row + 1, :T],
            None if self.cls is None else self.cls[:, row : row + 1],
        )


class Needs(NamedTuple):
    """Features that a reader needs, so that only these are stored. Class tokens always are."""

    patches: str = "all"
    """``all`` blocks' patch tokens, the ``last`` block's, or ``none``."""
    entry: bool = False
    """Also the tokens that enter the first block."""

    def __or__(self, other: Needs) -> Needs:
        """Returns the needs that satisfy both."""
        order = ("none", "last", "all")
        most = max(self.patches, other.patches, key=order.index)
        return Needs(most, self.entry or other.entry)

    def blocks(self, depth: int) -> int:
        """Returns the number of last blocks whose patch tokens are kept."""
        return {"none": 0, "last": 1, "all": depth}[self.patches]
