"""Loads the encoder that a probe run or a fine-tuning starts from, and finds the data of its run.

``checkpoint=`` names a run, an export or a weight file, or the random-init baseline: ``random``,
the same architecture untrained. ``random:RUN`` takes its shape from a run or export, ``random:S``
from a model fragment; ``random`` alone is ``random:tiny``.
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
from bat.audio.frontend import KaldiFbank, LogMel
from bat.config.compose import from_yaml
from bat.config.locate import find_fragment, known_fragments
from bat.config.schema import Finetune, Hardware, Pretrain, Probe, Supervised
from bat.config.sections import Data, Model
from bat.data.stream import clip_samples
from bat.encoders.base import Encoder, SpectrogramEncoder, find_encoder
from bat.encoders.strict import make_frontend
from bat.errors import UserError
from bat.eval.encoder_list import RANDOM, check_there, given, path_of, several
from bat.redact import HIDDEN
from bat.seeding import derive_seed
from bat.tasks.base import Task
from bat.types import Grid
from bat.weights import is_export, resolve

CSV = "csv"
"""Task name of ``data.csv``."""
PATCH = 16
"""Side of a patch of the encoders in the model fragments, in frames."""


def check_weights(config: Supervised) -> None:
    """Raise ``UserError`` if a checkpoint of ``config`` is missing or holds no weights."""
    check_there(config)
    for name in several(config) if isinstance(config, Probe) else [given(config)]:
        path = Path(path_of(name)).expanduser()
        own = registry.split_checkpoint(name.removeprefix(f"{RANDOM}:"))[0]
        if path.exists() and not registry.takes_hub_names(own):
            resolve(path)


def load_for(config: Supervised, task: Task) -> tuple[Encoder, int | None]:
    """Loads the encoder that ``config.checkpoint`` names, in eval mode.

    Returns it with the frames of a clip, None if neither ``config`` nor ``task`` sets a number:
    each clip is then encoded at its own length. Raises ``UserError`` if no checkpoint is given, it
    does not exist, or settings are given that its front end does not have.
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
        backbone = bat.load_encoder(
            name,
            weights=config.weights,
            heads=config.heads,
            trust_remote_code=config.trust_remote_code,
        )
    backbone = _with_frontend(_with_class_token(backbone, config), config, task)
    if not isinstance(backbone, SpectrogramEncoder):
        frames = config.frames  # the frames of a task are those of spectrograms
    front = getattr(backbone, "frontend", None)
    if config.pad_offset == "random" and getattr(front, "pad", "spectrogram") == "spectrogram":
        raise UserError(
            "pad_offset=random with clips padded in the spectrogram: say pad=clip or pad=waveform"
        )
    return backbone.eval(), frames


def _with_class_token(backbone: Encoder, config: Supervised) -> Encoder:
    """Returns the encoder with its keyword ``cls`` as ``config`` says, built again if it differs;
    the papers' protocol has ``mean``."""
    keywords = backbone.config()
    if "cls" not in keywords:
        if config.cls is not None:
            raise UserError(
                f"cls={config.cls}: {type(backbone).__name__} offers no choice of its class token; "
                "omit cls"
            )
        return backbone
    papers = isinstance(config, Probe) and config.protocol.name == "bat" and not config.head.cls
    wanted = config.cls or ("mean" if papers else keywords["cls"])
    if wanted == keywords["cls"]:
        return backbone
    keywords["cls"] = wanted
    return backbone.from_weights(backbone.state_dict(), config=keywords, heads=None)


def _with_frontend(backbone: Encoder, config: Supervised, task: Task) -> Encoder:
    """Returns the encoder with the sample rate, window, hop, ``pad`` and ``statistics`` that
    ``config`` asks of its front end; ``pad=clip`` pads to ``data.clip_seconds``.

    It is built again if they differ, so that its exports record what it was used with.
    """
    fixed = (
        f"pad={config.pad}, statistics={config.statistics}: the front end of "
        f"{type(backbone).__name__} is fixed; omit both"
    )
    changes = _rate_changes(backbone, config)
    if not isinstance(backbone, SpectrogramEncoder):
        if config.pad != "checkpoint" or config.statistics is not None:
            raise UserError(fixed)
        return backbone
    front: Any = backbone.frontend
    rate = changes.get("sample_rate", backbone.sample_rate)
    pad = front.pad if config.pad == "checkpoint" else config.pad
    seconds = config.data.clip_seconds if pad == "clip" else None
    samples = 0 if seconds is None else clip_samples(seconds, rate)
    if (pad, samples) != (front.pad, getattr(front, "clip_samples", 0)):
        changes |= {"pad": pad, "clip_seconds": seconds}
    if isinstance(front, KaldiFbank):
        # checkpoint formats of other projects do not record what they were trained or tuned with
        path = Path(path_of(given(config))).expanduser()  # none of random:eat
        exported = path.exists() and is_export(resolve(path))
        recorded = exported or front.statistics != "audioset"
        usual = front.statistics if recorded else task.statistics
        if (config.statistics or usual) != front.statistics:
            changes["statistics"] = config.statistics or usual
    elif config.statistics is not None:
        raise UserError(
            f"statistics={config.statistics}: this encoder's front end ({type(front).__name__}) "
            "uses none; omit statistics"
        )
    if not changes:
        return backbone
    keywords = backbone.config()
    if "frontend" not in keywords:
        raise UserError(fixed)
    keywords["frontend"] = {**(keywords["frontend"] or {}), **changes}
    return backbone.from_weights(backbone.state_dict(), config=keywords, heads=None)


def _rate_changes(backbone: Encoder, config: Supervised) -> dict[str, Any]:
    """Returns the rate, window and hop of ``config`` that the front end does not have.

    A Kaldi one follows the sample rate. Raises ``UserError`` where they cannot be changed.
    """
    front = getattr(backbone, "frontend", None)
    asked = {name: getattr(config, name) for name in ("sample_rate", "n_fft", "hop_length")}
    if isinstance(front, KaldiFbank):
        rate = asked["sample_rate"] or front.sample_rate
        if asked["hop_length"] not in (None, rate // 100):
            raise UserError(
                f"hop_length={config.hop_length}: a Kaldi front end has frames every 10 ms, "
                f"{rate // 100} samples at {rate} Hz; omit hop_length"
            )
        asked = {"sample_rate": rate}
    now: dict[str, Any] = {"sample_rate": backbone.sample_rate}
    now |= {name: getattr(front, name, None) for name in ("n_fft", "hop_length")}
    changes = {n: value for n, value in asked.items() if value not in (None, now[n])}
    if changes and not isinstance(front, (LogMel, KaldiFbank)):
        said = " ".join(f"{n}={value}" for n, value in changes.items())
        raise UserError(
            f"{said}: the front end of {type(backbone).__name__} is fixed at "
            f"{backbone.sample_rate} Hz; say {' '.join(f'{n}=null' for n in changes)}"
        )
    return changes


def registered_name(backbone: Encoder) -> str:
    """Returns the name under which ``find_encoder`` finds the class of ``backbone``."""
    cls = type(backbone)
    folder, _, name = cls.__module__.rpartition(".")
    return name if folder == "bat.encoders" else f"{cls.__module__}.{cls.__qualname__}"


def weights_digest(backbone: Encoder) -> str:
    """Returns the SHA-256 over the encoder's keywords and the names and bytes of its weights."""
    digest = hashlib.sha256(json.dumps(backbone.config(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_of_run(config: Supervised) -> tuple[Data, str]:
    """Returns ``config.data``, filled in with the data of a checkpoint's run if it names none.

    These are root, CSV or shards of the first checkpoint whose run has some. The second value is a
    line to print if they were taken from the run, else empty. A ``config.yaml`` of another program
    is ignored.
    """
    data = config.data
    if data.root or data.shards or data.csv:
        return data, ""
    for file in (file for name in several(config) for file in _config_files(name)):
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
    """Reads task, root, CSV and shards of the data from the configuration file of a run."""
    for schema in (Pretrain, Finetune, Probe):
        try:
            run: Any = from_yaml(schema, file)
        except (ValueError, OmegaConfBaseException):
            continue
        task = CSV if run.data.csv else run.task
        found = [(task, run.data.root, run.data.csv, run.data.shards)]
        online = run.online if isinstance(run, Pretrain) else None
        if online and (online.root or online.shards or online.csv):
            task = CSV if online.csv else online.task or run.task
            other = (task, online.root, online.csv, online.shards)
            found.insert(0, other)
        return found
    return []


def device_for(hardware: Hardware) -> torch.device:
    """Returns the one device of a plain loop; raises ``UserError`` if it is not available."""
    wanted = hardware.accelerator
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"hardware.accelerator={wanted}: no GPU here; try hardware=cpu")
    if wanted not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"hardware.accelerator={wanted}: auto, cpu or gpu")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def autocast_for(hardware: Hardware) -> torch.dtype | None:
    """Returns autocast's type, None for float32."""
    assert hardware.precision != "auto", "settled by with_precision, before a run begins"
    return torch.bfloat16 if hardware.precision == "bf16-mixed" else None


def _config_files(name: str) -> Iterator[Path]:
    """Yields ``config.yaml`` of the folders that contain a checkpoint (RUN/fold-1/export/FILE)."""
    path = Path(path_of(name)).expanduser()
    if path.exists():
        for folder in (path, *list(path.parents)[:3]):
            if (folder / "config.yaml").is_file():
                yield folder / "config.yaml"


def _usual_frames(data: Data) -> int:
    """Returns the frames of ``data.clip_seconds`` by the usual front end, in whole patches."""
    front = make_frontend()
    samples = clip_samples(data.clip_seconds, front.sample_rate)  # type: ignore[arg-type]
    return int(-(-front.valid_frames(samples) // PATCH) * PATCH)  # type: ignore[operator]


def _untrained(shape: str, config: Supervised, frames: int) -> Encoder:
    """Builds an untrained encoder of the shape of a run, an export, a file or a model fragment."""
    if shape not in known_fragments("model"):
        if shape in registry.known("encoders") or registry.DOTTED.fullmatch(shape):
            return find_encoder(shape)()
        trained = bat.load_encoder(
            shape,
            weights="student",
            heads=config.heads,
            trust_remote_code=config.trust_remote_code,
        )
        keywords = trained.config()
        if "grid" in keywords:
            keywords["grid"] = Grid(*keywords["grid"])
        return type(trained)(**keywords)
    model = _model(find_fragment(f"model/{shape}"))
    names = ("width", "depth", "heads", "patch", "mlp_ratio", "gate", "norm_order", "pos_layout")
    keywords = {name: getattr(model, name) for name in names}
    grid = Grid(frames // model.patch, 128 // model.patch)
    return find_encoder(model.backbone)(grid=grid, **keywords)


def _model(fragment: Path) -> Model:
    """Returns the ``model`` section of the defaults, overridden by a fragment."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(Pretrain), OmegaConf.load(fragment))
    model: Model = OmegaConf.to_object(merged).model  # type: ignore[union-attr]
    return model
