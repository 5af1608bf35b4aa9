"""The encoder a probe or a fine-tuning starts from, and the data its run was made with.

``checkpoint=`` names a run, an export or a weight file, or the control that is easily forgotten:
``random``, the same architecture untrained. ``random:RUN`` takes its shape from a run or export,
``random:S`` from a model fragment; ``random`` alone is ``random:tiny``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

import bat
from bat import registry
from bat.audio.frontend import KaldiFbank
from bat.config.compose import from_yaml
from bat.config.locate import find_fragment, known_fragments
from bat.config.schema import Finetune, Hardware, Pretrain, Probe, Supervised
from bat.config.sections import Data, Model
from bat.data.stream import clip_samples
from bat.encoders.base import Encoder, SpectrogramEncoder, find_encoder, make_frontend
from bat.errors import UserError
from bat.eval.encoder_list import RANDOM, check_there, given, path_of, several
from bat.redact import HIDDEN
from bat.seeding import derive_seed
from bat.tasks.base import Task
from bat.types import Grid
from bat.weights import is_export, resolve

OWN = "own"
"""The task of ``data.csv``."""
PATCH = 16
"""Side of a patch of the encoders in the model fragments, in frames."""
STATISTICS_OF = {"esc10": "esc50", "esc50": "esc50"}
"""Task -> data set whose statistics suit it (``bat.audio.frontend``); others: AudioSet's."""


def check_weights(config: Supervised) -> None:
    """Raise ``UserError`` for a checkpoint of ``config`` that is not there or holds no weights."""
    check_there(config)
    for name in several(config) if isinstance(config, Probe) else [given(config)]:
        path = Path(path_of(name)).expanduser()
        if path.exists():
            resolve(path)


def load_for(config: Supervised, task: Task) -> tuple[Encoder, int | None]:
    """The encoder that ``config.checkpoint`` names, in eval mode, and the frames of a clip; None
    where neither ``config`` nor ``task`` has a number: each clip is encoded at its own length.

    Raises ``UserError``: nothing given, nothing there, settings that its front end does not have.
    """
    check_there(config)
    name = given(config)
    frames = config.frames or task.frames
    if name == RANDOM or name.startswith(f"{RANDOM}:"):
        shape = name.partition(":")[2] or "tiny"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, RANDOM))
            backbone = _untrained(shape, config, frames or _usual_frames(config.data))
    else:
        backbone = bat.load_encoder(name, weights=config.weights, heads=config.heads)
    backbone = _with_frontend(backbone, config, task)
    if not isinstance(backbone, SpectrogramEncoder):
        frames = config.frames  # those of a task are of spectrograms
    front = getattr(backbone, "frontend", None)
    if config.pad_offset == "random" and getattr(front, "pad", "spectrogram") == "spectrogram":
        raise UserError(
            "pad_offset=random with clips padded in the spectrogram: say pad=clip or pad=waveform"
        )
    return backbone.eval(), frames


def _with_frontend(backbone: Encoder, config: Supervised, task: Task) -> Encoder:
    """The encoder with ``pad`` and ``statistics`` as ``config`` says; with ``pad=clip``, to
    ``data.clip_seconds``.

    It is built again where they differ, so that its exports say what it was used with.
    """
    if not isinstance(backbone, SpectrogramEncoder):
        if config.pad != "checkpoint" or config.statistics is not None:
            raise UserError(
                f"pad={config.pad}, statistics={config.statistics}: the front end of "
                f"{type(backbone).__name__} is fixed; leave both out"
            )
        return backbone
    front: Any = backbone.frontend
    changes = dict[str, Any]()
    pad = front.pad if config.pad == "checkpoint" else config.pad
    seconds = config.data.clip_seconds if pad == "clip" else None
    samples = 0 if seconds is None else clip_samples(seconds, backbone.sample_rate)
    if (pad, samples) != (front.pad, getattr(front, "clip_samples", 0)):
        changes |= {"pad": pad, "clip_seconds": seconds}
    if isinstance(front, KaldiFbank):
        # the field's files and folders do not say what they were trained or tuned with
        own = is_export(resolve(path_of(given(config))))
        usual = front.statistics if own else STATISTICS_OF.get(task.name, "audioset")
        if (config.statistics or usual) != front.statistics:
            changes["statistics"] = config.statistics or usual
    elif config.statistics is not None:
        raise UserError(
            f"statistics={config.statistics}: this encoder's front end "
            f"({type(front).__name__}) uses none; leave statistics away"
        )
    if not changes:
        return backbone
    keywords = backbone.config()
    if "frontend" not in keywords:
        raise UserError(f"the front end of {type(backbone).__name__} is fixed: pad=checkpoint")
    keywords["frontend"] = {**(keywords["frontend"] or {}), **changes}
    return backbone.from_weights(backbone.state_dict(), config=keywords, heads=None)


def registered_name(backbone: Encoder) -> str:
    """The name that ``find_encoder`` finds the class of ``backbone`` by."""
    cls = type(backbone)
    folder, _, name = cls.__module__.rpartition(".")
    return name if folder == "bat.encoders" else f"{cls.__module__}.{cls.__qualname__}"


def weights_digest(backbone: Encoder) -> str:
    """SHA-256 over the encoder's keywords, and the names and bytes of its weights."""
    digest = hashlib.sha256(json.dumps(backbone.config(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_of_run(config: Supervised) -> tuple[Data, str]:
    """``config.data``; where it names no data, the root, CSV or shards of the checkpoint's own run.

    And a line to print where the run's were taken, else nothing. A ``config.yaml`` that is none of
    ours is passed over.
    """
    data = config.data
    if data.root or data.shards or data.csv:
        return data, ""
    for file in _config_files(given(config)):
        for task, root, csv, shards in _sources(file):
            if task == config.task and any(HIDDEN in s for s in (root or csv or "", *shards)):
                raise UserError(
                    f"the data of {file} was given with credentials, or what looks like some, "
                    "which are not written down: say data.shards= or data.root= again"
                )
            if task == config.task and (root or csv or shards):
                note = f"data {root or csv or ', '.join(shards)}, as {file} says"
                return replace(data, root=root, csv=csv, shards=shards), note
    return data, ""


def _sources(file: Path) -> list[tuple[str, str | None, str | None, list[str]]]:
    """Task, root, CSV and shards of the data that the run with this configuration used."""
    for schema in (Pretrain, Finetune, Probe):
        try:
            run: Any = from_yaml(schema, file)
        except (ValueError, OmegaConfBaseException):
            continue
        task = OWN if run.data.csv else run.task
        found = [(task, run.data.root, run.data.csv, run.data.shards)]
        if isinstance(run, Pretrain) and (run.online.root or run.online.shards):
            other = (run.online.task or run.task, run.online.root, None, run.online.shards)
            found.insert(0, other)
        return found
    return []


def device_for(hardware: Hardware) -> torch.device:
    """The one device of a plain loop; ``UserError`` where it is not there."""
    wanted = hardware.accelerator
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"hardware.accelerator={wanted}: no GPU here; try hardware=cpu")
    if wanted not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"hardware.accelerator={wanted}: auto, cpu or gpu")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def autocast_for(hardware: Hardware) -> torch.dtype | None:
    """Autocast's type, None for float32."""
    assert hardware.precision != "auto", "settled by with_precision, before a run begins"
    return torch.bfloat16 if hardware.precision == "bf16-mixed" else None


def _config_files(name: str) -> Iterator[Path]:
    """``config.yaml`` of the folders that a checkpoint lies in (RUN/fold-1/export/FILE)."""
    path = Path(path_of(name)).expanduser()
    if path.exists():
        for folder in (path, *list(path.parents)[:3]):
            if (folder / "config.yaml").is_file():
                yield folder / "config.yaml"


def _usual_frames(data: Data) -> int:
    """Frames of ``data.clip_seconds`` by the usual front end, rounded up to whole patches."""
    front = make_frontend()
    samples = clip_samples(data.clip_seconds, front.sample_rate)  # type: ignore[arg-type]
    return int(-(-front.valid_frames(samples) // PATCH) * PATCH)  # type: ignore[operator]


def _untrained(shape: str, config: Supervised, frames: int) -> Encoder:
    """A fresh encoder of the shape of a run, an export, a file or a model fragment."""
    if shape not in known_fragments("model"):
        if shape in registry.known("encoders") or registry.DOTTED.fullmatch(shape):
            return find_encoder(shape)()
        trained = bat.load_encoder(shape, weights="student", heads=config.heads)
        keywords = trained.config()
        grid = {"grid": Grid(*keywords["grid"])} if "grid" in keywords else {}
        return type(trained)(**{**keywords, **grid})
    model = _model(find_fragment(f"model/{shape}"))
    return find_encoder(model.backbone)(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        grid=Grid(frames // model.patch, 128 // model.patch),
        patch=model.patch,
        mlp_ratio=model.mlp_ratio,
        gate=model.gate,
        norm_order=model.norm_order,
        pos_layout=model.pos_layout,
    )


def _model(fragment: Path) -> Model:
    """The ``model`` section that a fragment makes of the defaults."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(Pretrain), OmegaConf.load(fragment))
    model: Model = OmegaConf.to_object(merged).model  # type: ignore[union-attr]
    return model
