"""One ONNX file, front end included: waveform to embedding, frames and a head's scores.

Inputs of ``model.onnx``: ``waveform`` (B, S) float32 in [-1, 1] at ``sample_rate``, padded on the
right; ``lengths`` (B,) int64, samples of each row. B and S are free. Outputs:

    embedding       (B, D)     class token after the last block
    mean_embedding  (B, D)     mean of its patch tokens
    frames          (B, T, D)  their mean over frequency, one vector every ``hop_seconds``
    frame_mask      (B, T)     True for a clip's own frames; later ones are zero
    scores          (B, C)     after fine-tuning: softmax for one label a clip, sigmoid for several;
                               (B, T, C) of a head at frame level

Each row is what the clip alone gives: here keys are masked, where ``bat.load_encoder``'s encoders
run clips of one length together. Clips longer than the position table are cut into chunks in the
graph, so there is no maximum length. A fine-tuned model that was trained on a fixed number of
spectrogram frames gets that number: shorter clips are padded, longer ones are cut.

The metadata of the file (``metadata_props``) says ``sample_rate``, ``hop_seconds``, ``width``,
``clip_frames`` (the fixed number, if any), ``labels`` (JSON) and ``target``.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat import __version__
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.interfaces import require
from bat.interfaces.trained import Trained, read_trained
from bat.nn.block import Block
from bat.probes.base import mean_patch
from bat.types import Features

FILE = "model.onnx"
HEADS = ("linear", "lcgp", "mlp", "h2t", "mhca", "ep", "simpool", "abmilp")
"""Heads without operators of our own, which ONNX does not have."""
TOLERANCE = 1e-4
"""Largest difference from torch, relative to the largest value, that an export may have."""


class Graph(nn.Module):
    """Computes the outputs of the file from (B, S) waveforms and (B,) lengths."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        assert isinstance(trained.encoder, BAT)
        self.encoder, self.head = trained.encoder, trained.head
        self.target, self.frames = trained.target, trained.frames

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        spectrogram, own = self.inputs(waveform, lengths)
        features = self.features(spectrogram, own)
        assert features.cls is not None
        last, inside = features.patches[-1], features.inside()
        assert inside is not None
        frames = last.mean(2)  # (B, T, D)
        found = (features.cls[-1], mean_patch(last, features), frames, inside)
        if self.head is None:
            return found
        logits = self.head(features)
        if self.target in ("class", "tokens"):
            return (*found, logits.softmax(-1))
        return (*found, logits.sigmoid())

    def inputs(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns spectrograms (B, 1, frames, mels) and each row's own time patches (B,)."""
        encoder, S = self.encoder, waveform.shape[1]
        front, patch = encoder.frontend, encoder.patch
        lengths = lengths.clamp(1, S)
        if self.frames is None:
            frames = patch * encoder.time_patches(S)
            own = encoder.time_patches(lengths)
        else:
            frames = self.frames
            own = torch.full_like(lengths, frames // patch)
        # a length that follows from ``frames`` alone: the front end then decides nothing by S
        most = front.max_samples(frames)  # type: ignore[operator]
        x = F.pad(waveform, (0, most - S))  # cuts if negative
        return front(x, frames, lengths, row_frames=patch * own), own

    def features(self, spectrogram: Tensor, own: Tensor) -> Features:
        """Computes ``Encoder.features`` of rows of ``own`` (B,) time patches, all rows at once."""
        encoder = self.encoder
        patch, time, freq = encoder.patch, encoder.grid.time, encoder.grid.freq
        B, _, frames, mels = spectrogram.shape
        T = frames // patch
        t = torch.sym_min(T, time)
        P = (T + t - 1) // t  # chunks of t time patches
        x = F.pad(spectrogram, (0, 0, 0, (P * t - T) * patch))
        tokens = encoder.enter(encoder.embed_patches(x.reshape(B * P, 1, t * patch, mels)))
        inside = torch.arange(P * t, device=x.device) < own[:, None]  # (B, P t)
        keys = inside.reshape(B * P, t, 1).expand(-1, -1, freq).flatten(1)
        keys = F.pad(keys, (1, 0), value=True)[:, None, None]  # (B P, 1, 1, 1 + t F)
        used = torch.arange(P, device=x.device) < ((own + time - 1) // time)[:, None]
        used = used.to(tokens.dtype).unsqueeze(-1)  # (B, P, 1)
        classes, patches = [], []
        for block in encoder.blocks:
            assert isinstance(block, Block)
            tokens = masked_block(block, tokens, keys)
            cls = tokens[:, 0].reshape(B, P, -1)
            classes.append((cls * used).sum(1) / used.sum(1))
            grid = tokens[:, 1:].reshape(B, P * t, freq, -1)
            patches.append(grid.masked_fill(~inside[..., None, None], 0.0)[:, :T])
        return Features(torch.stack(patches), torch.stack(classes), valid=own)


def masked_block(block: Block, x: Tensor, keys: Tensor) -> Tensor:
    """Computes a block of (B, n, D) tokens that attend to the tokens in ``keys`` only,
    (B, 1, 1, n) bool."""
    attn, post = block.attn, block.norm_order == "post"
    projected = attn.project(x if post else block.norm1(x))
    q, k, v, *gate = projected.split(x.shape[-1], dim=-1)
    q, k, v = (z.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for z in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
    for opened in gate:
        out = out * torch.sigmoid(opened)
    x = x + block.ls1(attn.proj(out))
    if post:
        x = block.norm1(x)
        return block.norm2(x + block.ls2(block.mlp(x)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def write(checkpoint: str, out: Path) -> None:
    """Writes ``out/model.onnx`` and compares it with torch.

    Raises ``UserError`` for a missing package, an encoder or head that has no such file, and a file
    whose outputs are not torch's.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    trained = read_trained(checkpoint)
    encoder = trained.encoder
    if type(encoder) not in (BAT, EAT):
        raise UserError(
            f"{checkpoint} holds encoder '{trained.name}': onnx is written of bat and eat; "
            "torch.onnx.export the encoder yourself, or take a format that keeps Python"
        )
    if trained.head is not None and trained.head_name not in HEADS:
        raise UserError(
            f"{checkpoint} has a head '{trained.head_name}': onnx is written with "
            f"{', '.join(HEADS)}; export the encoder alone: {trained.folder}/model.safetensors"
        )
    assert isinstance(encoder, BAT)
    graph = Graph(trained).eval()
    names = ["embedding", "mean_embedding", "frames", "frame_mask"]
    names += [] if trained.head is None else ["scores"]
    seconds = 1.5 * encoder.grid.time * encoder.hop_seconds  # two chunks
    example = _example(2, int(seconds * encoder.sample_rate))
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of packages that are not needed
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                example,
                dynamo=True,
                dynamic_shapes={"waveform": {0: "batch", 1: "samples"}, "lengths": {0: "batch"}},
                input_names=["waveform", "lengths"],
                output_names=names,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    program.model.metadata_props.update(
        {
            "sample_rate": str(encoder.sample_rate),
            "hop_seconds": str(encoder.hop_seconds),
            "width": str(encoder.width),
            "clip_frames": "" if trained.frames is None else str(trained.frames),
            "labels": json.dumps(trained.labels),
            "target": trained.target,
            "producer": f"bat {__version__}",
        }
    )
    program.save(str(out / FILE))
    _compare(graph, out / FILE)


def _example(clips: int, samples: int) -> tuple[Tensor, Tensor]:
    """Returns noise (clips, samples) and lengths from a third of it to all."""
    waveform = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))
    return waveform, torch.linspace(samples // 3, samples, clips).long()


def _compare(graph: Graph, file: Path) -> None:
    """Raises ``UserError`` if the file's outputs are not those of ``graph``, for clips shorter and
    longer than one chunk."""
    import onnxruntime

    encoder = graph.encoder
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    chunk = int(encoder.grid.time * encoder.hop_seconds * encoder.sample_rate)
    for clips, samples in ((1, chunk // 3), (3, chunk + chunk // 4)):
        given = _example(clips, samples)
        with torch.no_grad():
            wanted = graph(*given)
        feed = dict(zip(("waveform", "lengths"), (x.numpy() for x in given), strict=True))
        for name, want, got in zip(
            (output.name for output in session.get_outputs()),
            wanted,
            map(torch.from_numpy, session.run(None, feed)),
            strict=True,
        ):
            want, got = want.float(), got.float()
            bound = TOLERANCE * float(want.abs().max().clamp(min=1))
            close = want.shape == got.shape and bool((want - got).abs().max() <= bound)
            if not close:
                raise UserError(
                    f"{name} of {clips} clip(s) of {samples} samples by onnxruntime is not "
                    f"torch's: this torch ({torch.__version__}) translates the encoder wrongly; "
                    "use another"
                )


EXPORT = write
