"""MTEB: an AbsEncoder that embeds audio, and its ModelMeta.

A batch is a list of ``{"array", "sampling_rate"}``. Clips are resampled to the encoder's rate and
grouped by length; each gets the embedding that it has alone: the last block's class token, or the
mean of the patches (``bat.interfaces.suites``). The similarity is the cosine.

Guide: docs/evaluation_suites.md. The package is imported when an encoder is loaded, not to write
the file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.interfaces import suites

MODULE = '''\
"""MTEB model of an encoder of bat; bat and mteb must be installed (docs/evaluation_suites.md)."""

from bat.interfaces import mteb

CHECKPOINT = {checkpoint!r}
NAME = {name!r}


def model_meta():
    return mteb.model_meta(CHECKPOINT, NAME)


def load_model(device=None):
    return mteb.load_model(CHECKPOINT, NAME, device=device)
'''


class Embedder:
    """``encode`` of an MTEB model; ``load_model`` combines it with ``mteb``'s ``AbsEncoder``."""

    def __init__(self, encoder: Encoder) -> None:
        self.model = encoder

    @torch.no_grad()
    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        """Embeds a loader of batches with ``audio`` -> (N, D) float32, in their order.

        MTEB's other keywords (task, split, prompt) have no effect. Raises ``UserError`` for a batch
        without audio and for clips as ``suites.check_clips``, counted from 0 over all batches.
        """
        rows: list[np.ndarray] = []
        for batch in inputs:
            if "audio" not in batch:
                raise UserError(f"a batch holds {', '.join(batch)}: this model embeds audio alone")
            clips = self._clips(batch["audio"], len(rows))
            rows += [one.clip.float().cpu().numpy() for one in suites.embed(self.model, clips)]
        return np.stack(rows) if rows else np.zeros((0, self.model.width), np.float32)

    def _clips(self, items: Any, before: int) -> list[torch.Tensor]:
        """Returns a batch's clips at the encoder's rate; ``before``: clips of earlier batches."""
        clips = suites.check_clips([np.asarray(item["array"]) for item in items], first=before)
        rates = [int(item["sampling_rate"]) for item in items]
        target = self.model.sample_rate
        return [suites.resample(c, rate, target) for c, rate in zip(clips, rates, strict=True)]


def load_model(checkpoint: str, name: str | None = None, *, device: str | None = None) -> Any:
    """Returns an ``mteb.models.abs_encoder.AbsEncoder`` of ``checkpoint`` with its ``ModelMeta``.

    ``name``: the model's, without organization; default: made of path and weights. ``device``:
    default the GPU if there is one. Raises ``UserError`` if mteb is not installed.
    """
    _need_mteb()
    from mteb.models.abs_encoder import AbsEncoder  # type: ignore[import-not-found]

    encoder, found = suites.load_named(checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = type("BatEncoder", (Embedder, AbsEncoder), {})
    model = kind(encoder.to(device))
    model.mteb_model_meta = _meta(encoder, checkpoint, name or found)
    return model


def model_meta(checkpoint: str, name: str | None = None) -> Any:
    """Returns the ``mteb.ModelMeta`` of ``checkpoint``; its loader is ``load_model``. Licence,
    dates and training data are left open: fill them in with ``model_copy(update=...)``."""
    _need_mteb()
    encoder, found = suites.load_named(checkpoint)
    return _meta(encoder, checkpoint, name or found)


def _meta(encoder: Encoder, checkpoint: str, name: str) -> Any:
    from mteb.models import ModelMeta  # type: ignore[import-not-found]

    def loader(model_name: str, revision: str | None = None, **options: Any) -> Any:
        return load_model(checkpoint, name, device=options.get("device"))

    size = sum(p.numel() for p in encoder.parameters())
    unknown = ("release_date", "license", "open_weights", "public_training_code")
    return ModelMeta(
        loader=loader,
        name=f"bat/{name}",
        revision=name.rpartition("_")[2],
        languages=None,
        n_parameters=size,
        n_embedding_parameters=0,
        memory_usage_mb=sum(p.numel() * p.element_size() for p in encoder.parameters()) / 2**20,
        max_tokens=None,
        embed_dim=encoder.width,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=False,
        training_datasets=None,
        modalities=["audio"],
        **dict.fromkeys(unknown),
    )


def _need_mteb() -> None:
    if importlib.util.find_spec("mteb") is None:
        raise UserError("mteb is not installed: pip install 'mteb[audio]'")


def write(checkpoint: str, out: Path) -> None:
    """Writes ``NAME.py`` with ``load_model`` and ``model_meta`` to the folder ``out``."""
    _, name = suites.load_named(checkpoint)
    source = suites.source_of(checkpoint)
    suites.write(out / f"{name}.py", MODULE.format(checkpoint=source, name=name))


EXPORT = write
