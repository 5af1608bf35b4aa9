"""The plain pre-training step: an honest rendition of how the paper's implementation organises it.

torchaudio's mel spectrogram computed twice a step (for the teacher, then for the student, whose is
repeated V times), masks by a loop over rows on the CPU with ``multinomial`` and ``.item()``, copied
to the device; the model of ``plain_model.py``; targets repeated V times, loss over all patches
times a mask; ``.item()`` on the losses; AdamW as PyTorch constructs it by default; EMA parameter by
parameter. ``compiled`` is ``torch.compile(mode="default")`` on student and teacher.

It computes what ``Pretraining`` with ``MaskedLatent`` computes (a test holds it to that).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from bat.config.schema import Pretrain
from bat.objectives.masked_latent import MaskedLatent
from bat.types import Grid, Views, WaveBatch
from benchmarks.plain_model import plain_model


class PlainFrontEnd(nn.Module):
    """Mel, decibels floored 80 dB below the clip's maximum, min-max, zero frames to the end."""

    def __init__(self, *, sample_rate: int, n_fft: int, hop_length: int, n_mels: int) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=sample_rate,
            n_fft=n_fft,
            win_length=n_fft,
            hop_length=hop_length,
            f_min=0.0,
            f_max=sample_rate / 2,
            n_mels=n_mels,
            power=2.0,
        )
        self.decibels = torchaudio.transforms.AmplitudeToDB(stype="power", top_db=80.0)

    @torch.no_grad()
    def forward(self, waves: Tensor, frames: int) -> Tensor:
        """(B, S) -> (B, 1, frames, mels) float32."""
        with torch.autocast(waves.device.type, enabled=False):
            x = self.decibels(self.mel(waves.float()).unsqueeze(1))  # (B, 1, mels, T)
            low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
            x = ((x - low) / (high - low + 1e-8)).transpose(2, 3)
            return F.pad(x, (0, 0, 0, frames - x.shape[2]))


def plain_masks(
    rows: int, grid: Grid, *, keep_ratio: float, block: int = 5, adjust: float = 0.07
) -> Tensor:
    """Inverse block masks (rows, N) on the CPU, 1.0 where removed, from the global generator.

    Squares are set by index lists for all rows; the number kept is then adjusted row by row.
    """
    N = grid.tokens
    keep = int(N * keep_ratio)
    count = int(N * (keep_ratio + adjust) / block**2)
    kept = torch.zeros(rows, grid.time, grid.freq)
    kept.view(rows, N).scatter_(1, torch.randint(0, N, (rows, count)), 1)
    row, time, freq = kept.nonzero(as_tuple=True)
    back = block // 2
    for i in range(-back, block - back):
        for j in range(-back, block - back):
            t = (time + i).clamp(0, grid.time - 1)
            f = (freq + j).clamp(0, grid.freq - 1)
            kept[row, t, f] = 1
    kept = kept.view(rows, N)
    for r in range(rows):
        n = int(kept[r].sum().item())
        if n > keep:
            drop = torch.multinomial(kept[r], n - keep, replacement=False)
            kept[r, drop] = 0
        elif n < keep:
            add = torch.multinomial(1 - kept[r], keep - n, replacement=False)
            kept[r, add] = 1
    return 1 - kept


def plain_ids(mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Kept ids (rows, n) ascending and, of every patch, its place behind them (rows, N)."""
    shuffled = torch.argsort(mask, dim=1, stable=True)
    return shuffled[:, :keep], torch.argsort(shuffled, dim=1)


def plain_weights_of(objective: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A copy of the weights of a ``MaskedLatent``, as ``PlainStep`` takes them."""
    assert isinstance(objective, MaskedLatent), "the plain step is the paper's objective"
    parts = {"student": objective.student, "teacher": objective.teacher.encoder}
    return {
        who: {name: t.detach().to("cpu", copy=True) for name, t in part.state_dict().items()}
        for who, part in parts.items()
    }


def plain_masks_of(objective: nn.Module, batch: WaveBatch) -> Tensor:
    """The masks that a ``MaskedLatent`` draws for a batch, (B V, N), 1.0 where removed."""
    assert isinstance(objective, MaskedLatent), "the plain step is the paper's objective"
    return objective.draw_views(batch.positions).mask.float()


class PlainStep:
    """The whole step over waveforms that lie on ``device``.

    ``student`` and ``teacher`` are state dicts of ``Pretraining``'s student and teacher encoder.
    """

    def __init__(
        self,
        config: Pretrain,
        *,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        device: torch.device,
        compiled: bool,
    ) -> None:
        front, model, optim = config.frontend, config.model, config.optim
        assert front.kind == "bat", "the plain step has BAT's front end only"
        assert optim.decay == "all", "the plain step decays everything, as the paper does"
        self.config, self.device = config, device
        self.grid = Grid(front.frames // model.patch, front.n_mels // model.patch)
        self.mask = config.objective.mask
        self.keep = int(self.grid.tokens * (1 - self.mask.ratio))
        self.autocast = config.hardware.precision == "bf16-mixed"
        self.frontend = PlainFrontEnd(
            sample_rate=front.sample_rate,
            n_fft=front.n_fft,
            hop_length=front.hop_length,
            n_mels=front.n_mels,
        ).to(device)
        self.student, self.teacher = plain_model(config)
        self.student.load_state_dict(student)
        self.teacher.encoder.load_state_dict(teacher)
        self.student.to(device)
        self.teacher.to(device)
        if compiled:
            self.student.compile(mode="default")
            self.teacher.compile(mode="default")
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )

    def masks(self, rows: int) -> Tensor:
        """(rows, N) on the device, 1.0 where removed."""
        mask = self.mask
        drawn = plain_masks(
            rows, self.grid, keep_ratio=1 - mask.ratio, block=mask.block, adjust=mask.adjust
        )
        return drawn.to(self.device)

    def losses(self, waves: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S) and masks (B V, N) -> total, local and global loss."""
        views, frames = self.mask.views, self.config.frontend.frames
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                targets = self.teacher(self.frontend(waves, frames))  # (B, N, D)
                targets = targets.repeat_interleave(views, dim=0)  # (B V, N, D)
            spectrogram = self.frontend(waves, frames).repeat_interleave(views, dim=0)
            keep_ids, restore_ids = plain_ids(mask, self.keep)
            cls, predictions = self.student(spectrogram, keep_ids, restore_ids)
        error = ((predictions.float() - targets) ** 2).mean(-1)  # (B V, N)
        local = (error * mask).sum() / mask.sum()
        global_ = ((cls.float() - targets.mean(1)) ** 2).mean()
        return local + global_, local, global_

    def __call__(
        self, waves: Tensor, *, decay: float | None = None, views: Views | None = None
    ) -> dict[str, float]:
        """One step; ``views`` given: with these masks. ``decay`` None: the schedule's first. The
        losses as numbers."""
        rows = waves.shape[0] * self.mask.views
        mask = self.masks(rows) if views is None else views.mask.float()
        loss, local, global_ = self.losses(waves, mask)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_teacher(self.config.objective.ema.start if decay is None else decay)
        return {"loss": loss.item(), "local": local.item(), "global": global_.item()}

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """EMA parameter by parameter, then buffer by buffer."""
        ours, theirs = self.student.encoder, self.teacher.encoder
        for slow, fast in zip(theirs.parameters(), ours.parameters(), strict=True):
            slow.mul_(decay).add_(fast, alpha=1 - decay)
        for slow, fast in zip(theirs.buffers(), ours.buffers(), strict=True):
            slow.mul_(decay).add_(fast, alpha=1 - decay)
