"""What a pre-training step costs: docs/method.md 3's hand count, and PyTorch's counter.

A block costs ``2 (5 + 2 r) D^2`` FLOP a token (r the MLP's ratio; 26 D^2 at r = 4) and ``4 n D``
for attention over n tokens; training is three forwards, the teacher one. The counter runs the model
on fake tensors, forward and backward, attention as matrix products (no kernel hides its count); it
sees what the hand count leaves out: patch embedding, output projection. Neither sees norms,
softmax, the front end or the optimiser.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bat.config.schema import Pretrain
from bat.objectives.masked_latent import DECODERS
from bat.train import cost
from bat.train.cost import clip_flop
from benchmarks.plain_model import plain_model

TERA = 1e12


def peak_flops() -> float | None:
    """Peak of this machine's GPU, dense bfloat16 FLOP/s; None where it is unknown."""
    return peak_of(torch.cuda.get_device_name() if torch.cuda.is_available() else "")


def peak_of(name: str) -> float | None:
    """Returns the peak FLOP/s of the device that CUDA calls ``name``, if it is known."""
    device = cost.device_called(name)
    return device and TERA * device.tflops


def tokens_of(config: Pretrain) -> tuple[int, int]:
    """Patches of a clip, and those that a masked view keeps."""
    front, patch = config.frontend, config.model.patch
    patches = (front.frames // patch) * (front.n_mels // patch)
    return patches, int(patches * (1 - config.objective.mask.ratio))


def hand_tflop(config: Pretrain) -> float:
    """TFLOP of one clip's training step by hand; transformer decoders only."""
    model, objective = config.model, config.objective
    patches, kept = tokens_of(config)
    decoder_ratio = float(DECODERS[objective.decoder]["mlp_ratio"])

    def blocks(tokens: int, depth: int, width: int, ratio: float) -> float:
        linears = 2 * (4 + model.gate + 2 * ratio) * width**2
        return tokens * depth * (linears + 4 * tokens * width)

    encoder = (model.depth, model.width, model.mlp_ratio)
    decoder = (objective.decoder_depth, objective.width_in(model.width), decoder_ratio)
    student = blocks(kept + 1, *encoder) + blocks(patches, *decoder)
    return (3 * objective.mask.views * student + blocks(patches + 1, *encoder)) / TERA


def counted_tflop(config: Pretrain, way: str) -> float:
    """TFLOP of one clip's training step by PyTorch's counter; ``way`` is ``ours`` or ``plain``."""
    assert way in ("ours", "plain"), way
    config = copy.deepcopy(config)
    config.model.attention = "eager"
    sections = (config.model, config.frontend, config.objective)
    if (way, repr(sections)) not in _COUNTED:
        _COUNTED[way, repr(sections)] = _count(config, way)
    return _COUNTED[way, repr(sections)]


_COUNTED: dict[tuple[str, str], float] = {}


def _count(config: Pretrain, way: str) -> float:
    if way == "ours":
        return clip_flop(config) / TERA
    with torch.device("meta"):
        model = nn.ModuleList(plain_model(config))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        with FlopCounterMode(display=False) as counter:
            rows, (patches, kept) = config.objective.mask.views, tokens_of(config)
            spectrogram = torch.empty(1, 1, config.frontend.frames, config.frontend.n_mels)
            keep_ids = torch.empty(rows, kept, dtype=torch.int64)
            student, teacher = model
            with torch.no_grad():
                teacher(spectrogram)
            repeated = spectrogram.repeat_interleave(rows, dim=0)
            restore_ids = torch.empty(rows, patches, dtype=torch.int64)
            cls, predictions = student(repeated, keep_ids, restore_ids)
            (cls.sum() + predictions.sum()).backward()
    return counter.get_total_flops() / TERA
