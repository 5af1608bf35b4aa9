"""Decides where frozen features are stored between steps: in memory, on disk, or not at all.

``features.cache=auto`` decides by size, measured on a real clip (all blocks of 10 s at the width of
Base: 9.4 MB in bfloat16), counting only what the probes need. Memory is used if the features fit
``features.memory_gb``. On a CPU, where the encoder is the expensive part, the disk is used if they
fit ``features.disk_gb``; a GPU computes the features of a batch faster than a disk reads them.
Clips that differ from epoch to epoch (``data.roll``, ``pad_offset=random``, ``data.noise``) are
never stored.

The batches are the same wherever they are (``features.py``).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bat import __version__
from bat.config.probing import FeatureStore
from bat.data.bad_clips import BadClips, merged_states
from bat.data.stream import clip_samples
from bat.errors import UserError
from bat.eval import feature_disk as disk
from bat.eval.encoding import CLIP_AXIS, clips_first, counted, device_of
from bat.eval.features import FeatureBank, FeatureStream, Source
from bat.types import WaveBatch

log = logging.getLogger("bat")

Where = Literal["memory", "disk", "off"]


class Opened(NamedTuple):
    source: Source
    cache: Where
    why: str
    """Reason, as a phrase for the log and the results."""
    gb: float
    """Size of the features of all clips, labels included."""


def open_features(
    stream: FeatureStream,
    ids: np.ndarray,
    *,
    batch: int,
    store: FeatureStore,
    digest: str,
    progress: bool,
) -> Opened:
    """Returns the features that ``stream`` computes of the clips ``ids``, stored as ``store`` says.

    ``digest`` is that of the encoder's weights and keywords (``loading.weights_digest``). The
    stream's ``bad_clips`` receive the unreadable clips, also those recorded in a cache of an
    earlier run. Long clips are read from their start, from which frame labels are counted.

    Raises ``UserError`` if a requested cache is above its budget or impossible, the disk is full,
    no clip is readable or too many are not, or features are not finite.
    """
    moving = "data.roll=true" if stream.roll else ""
    moving = moving or ("pad_offset=random" if stream.random_offset else "")
    if moving and stream.targets_of is not None:
        raise UserError(f"{moving} moves the clips against their labels in time: omit it, or say "
                        "level=clip")  # fmt: skip
    moving = moving or (f"data.noise={stream.noise:g}" if stream.noise else "")
    device, bad_clips = device_of(stream.backbone), stream.bad_clips
    facts = _facts(stream, ids, digest=digest, device=device)
    folder = disk.folder_for(Path(store.folder), facts)
    on_gpu = device.type == "cuda"
    if not moving and (store.cache == "disk" or (store.cache == "auto" and not on_gpu)):
        found = disk.read(folder)
        if found is not None:
            return _from_disk(found, stream, ids, f"found in {folder}")

    each = measured(stream, ids, batch=batch if on_gpu else 1)
    need = each * len(ids)
    free = _free(Path(store.folder))
    where, why = storage_for(
        store, clips=len(ids), each=each, moving=moving, on_gpu=on_gpu, free=free
    )
    if where == "off":
        return Opened(stream, where, why, need / 1e9)
    if where == "memory":
        room = on_gpu and torch.cuda.mem_get_info(device)[0] >= 2 * need
        memory = FeatureBank.extract(
            stream,
            ids,
            batch=batch,
            device=device if room else "cpu",
            progress=progress,
            index=stream.index,
        )
        return Opened(memory, where, why, need / 1e9)
    with disk.alone(folder):
        found = disk.read(folder)  # may exist meanwhile
        if found is None:
            disk.sweep(folder.parent)
            bad = BadClips(max_bad=bad_clips.max_bad, file=bad_clips.file)
            waves = counted(stream.loader(ids, batch=batch), bad, clips=len(ids), progress=progress)
            disk.write(folder, stream.encoded(waves), bad=bad)
            size = sum(file.stat().st_size for file in folder.parent.glob("*/*.bin"))
            log.info("all features in %s: %.1f GB", folder.parent, size / 1e9)
            found = disk.read(folder)
    if found is None:
        raise UserError(
            f"{folder} does not give back what was written there: point features.folder to "
            "another disk, or say features.cache=off"
        )
    return _from_disk(found, stream, ids, why)


def storage_for(
    store: FeatureStore, *, clips: int, each: int, moving: str, on_gpu: bool, free: int
) -> tuple[Where, str]:
    """Returns where features of ``each`` bytes per clip are stored, and why.

    ``moving``: the setting by which clips differ from epoch to epoch; ``free``: bytes free in the
    folder. Raises ``UserError`` if what ``store`` asks for is impossible.
    """
    gb = clips * each / 1e9
    size = f"the features of {clips} clips need {gb:.3g} GB ({each / 1e6:.3g} MB a clip)"
    asked = f"features.cache={store.cache}"
    if moving and store.cache in ("memory", "disk"):
        raise UserError(f"{asked} with {moving}: the clips differ each time, so nothing can be "
                        "kept; omit one of them")  # fmt: skip
    if moving:
        return "off", f"{moving}: the clips differ each time"
    if store.cache == "off":
        return "off", asked
    much = f"{size}, more than features.memory_gb={store.memory_gb:g}"
    if store.cache != "disk" and gb <= store.memory_gb:
        return "memory", f"{gb:.3g} GB fit features.memory_gb={store.memory_gb:g}"
    if store.cache == "memory":
        raise UserError(f"{asked}: {much}. Raise features.memory_gb where the machine has so much, "
                        "or say features.cache=auto")  # fmt: skip
    if store.cache == "auto" and on_gpu:
        return "off", (
            f"{much}, and a GPU makes them faster than a disk gives them: raise features.memory_gb "
            "to keep them"
        )
    wrong = ""
    if gb > store.disk_gb:
        wrong = f"more than features.disk_gb={store.disk_gb:g}"
    elif clips * each > free:
        wrong = f"and only {free / 1e9:.3g} GB are free in features.folder={store.folder}"
    if wrong and store.cache == "disk":
        raise UserError(f"{asked}: {size}, {wrong}. Raise features.disk_gb, make room, or point "
                        "features.folder to another disk")  # fmt: skip
    if wrong:
        return "off", f"{much}, {wrong}"
    return "disk", asked if store.cache == "disk" else much


def measured(stream: FeatureStream, ids: np.ndarray, *, batch: int) -> int:
    """Returns the bytes of features and labels of one clip, the first readable one of ``ids``.

    ``batch``: clips encoded for the measurement (a compiled encoder needs the shape of the run).
    """
    for features, targets, found in stream.encoded(stream.loader(ids, batch=batch, workers=0)):
        total = sum(t.nbytes for t in (*clips_first(features).values(), targets))
        return total // len(found.keys)
    raise UserError(f"none of the {len(ids)} clips can be read: check them (bat-shard verify)")


def _facts(
    stream: FeatureStream, ids: np.ndarray, *, digest: str, device: torch.device
) -> dict[str, Any]:
    """Returns everything the features depend on, except rounding differences between machines."""
    backbone, kind = stream.backbone, type(stream.backbone)
    front = getattr(backbone, "frontend", None)
    return {
        "bat": __version__,
        "encoder": f"{kind.__module__}.{kind.__qualname__}",
        "weights": digest,
        "front end": type(front).__name__,
        "padded": str(getattr(front, "pad", None)),
        "data": stream.index.hash,
        "clips": hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest(),
        "frames": stream.frames,
        "clip_seconds": stream.clip_seconds,
        "min_seconds": stream.min_seconds,
        "max_seconds": stream.max_seconds,
        "crop": "start",  # of long clips; differs from older caches, which cropped the middle
        "type": str(stream.autocast or torch.float32),
        "needs": list(stream.needs),
        "device": device.type,
    }


def _from_disk(found: disk.Stored, stream: FeatureStream, ids: np.ndarray, why: str) -> Opened:
    """Returns the mapped features with the current labels of the index."""
    index, clips = stream.index, np.asarray(ids)[found.places]
    keys = [index.key(i) for i in clips]
    targets: Tensor = torch.from_numpy(np.stack([index.targets(i) for i in clips]))
    tensors = {name: found.tensors.get(name) for name in CLIP_AXIS}
    patches = found.tensors["patches"]  # (n, L', T, F, D)
    own = stream.backbone.time_patches(found.lengths) if stream.frames is None else None  # (n,)
    if stream.targets_of is not None:
        samples = clip_samples(stream.clip_seconds, stream.backbone.sample_rate)
        waves = torch.zeros(1, 1).expand(len(keys), samples)  # the waves are not used
        places = torch.from_numpy(found.places)
        batch = WaveBatch(waves, found.lengths, targets, keys, places, skipped=[])
        targets = stream.targets_of(batch, patches.shape[2])
        if own is not None and targets.ndim == 3:
            steps = torch.arange(patches.shape[2])
            targets = targets.masked_fill((steps >= own[:, None])[..., None], torch.nan)
    bank = FeatureBank(
        **tensors,  # type: ignore[arg-type]
        valid=own,
        targets=targets,
        ids=clips,
        keys=keys,
        skipped=found.bad_clips["keys"],
        index=index,
        order=stream.order,
    )
    stream.bad_clips.load_state_dict(
        merged_states([stream.bad_clips.state_dict(), found.bad_clips])
    )
    stream.bad_clips.check(final=True)
    size = sum(t.nbytes for t in (*tensors.values(), targets) if t is not None)
    return Opened(bank, "disk", why, size / 1e9)


def _free(folder: Path) -> int:
    """Returns the bytes free on the disk of ``folder``, which need not exist."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
