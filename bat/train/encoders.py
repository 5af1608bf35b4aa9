"""The encoder a probe or a fine-tuning starts from, and the data its run was made with.

``checkpoint=`` names a run, an export or a weight file, or the control that is easily forgotten:
``random``, the same architecture untrained. ``random:RUN`` takes its shape from a run or export,
``random:S`` from a model fragment; ``random`` alone is ``random:tiny``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import bat
from bat.backbones.base import Backbone, load_backbone
from bat.checkpoint import resolve
from bat.config.compose import from_yaml
from bat.config.locate import find_fragment, known_fragments
from bat.config.schema import Hardware, Pretrain, Supervised
from bat.config.sections import Data, Model
from bat.shapes import Grid, UserError
from bat.tasks.base import Task
from bat.train.trainer import derive_seed

RANDOM = "random"


def checkpoint_name(config: Supervised) -> str:
    """A short name for run folders: ``pretrain-esc10``, ``random-pretrain-esc10``, ``random-S``."""
    name = _given(config)
    prefix, _, rest = name.partition(":") if name.startswith(f"{RANDOM}:") else ("", "", name)
    path = Path(rest)
    while path.stem in ("export", "checkpoints", "model", "last") and path.parent.name:
        path = path.parent
    stem = path.stem if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors") else path.name
    return f"{prefix}-{stem}" if prefix else stem


def load_for(config: Supervised, task: Task) -> tuple[Backbone, int]:
    """The encoder that ``config.checkpoint`` names, in eval mode, and the frames of a clip.

    Raises ``UserError``: nothing given, nothing there, or frames that are not whole patches.
    """
    name = _given(config)
    frames = config.frames or task.frames
    if name == RANDOM or name.startswith(f"{RANDOM}:"):
        shape = name.partition(":")[2] or "tiny"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, RANDOM))
            backbone = _untrained(shape, config, frames)
    else:
        backbone = bat.load_encoder(name, weights=config.weights, heads=config.heads)
    if frames % backbone.patch:
        raise UserError(
            f"frames={frames} is not a multiple of the encoder's patch {backbone.patch}"
        )
    if config.pad != "checkpoint":
        backbone.frontend.pad = config.pad  # type: ignore[assignment]
    return backbone.eval(), frames


def data_of_run(config: Supervised) -> tuple[Data, str]:
    """``config.data``; where it names no data, the root or shards of the checkpoint's own run.

    And a line to print where the run's were taken, else nothing.
    """
    data = config.data
    file = _run_config(_given(config))
    if data.root or data.shards or file is None:
        return data, ""
    run = from_yaml(Pretrain, file)
    sources = [(run.task, run.data.root, run.data.shards)]
    if run.online.root or run.online.shards:
        sources.insert(0, (run.online.task or run.task, run.online.root, run.online.shards))
    for task, root, shards in sources:
        if task == config.task and (root or shards):
            return replace(data, root=root, shards=shards), f"data {root or shards}, as {file} says"
    return data, ""


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
    return torch.bfloat16 if hardware.precision == "bf16-mixed" else None


def compile_blocks(backbone: Backbone) -> None:
    """``torch.compile`` every block of the encoder; names stay as they are."""
    for module in backbone.modules():
        if type(module).__name__ == "Block":
            module.compile()


def _given(config: Supervised) -> str:
    if not config.checkpoint:
        raise UserError(
            "no checkpoint given: say checkpoint=RUN (a run, an export or a weight file), or "
            "checkpoint=random for the untrained control"
        )
    return config.checkpoint


def _run_config(name: str) -> Path | None:
    """``config.yaml`` of the run that a checkpoint lies in."""
    path = Path(name.removeprefix(f"{RANDOM}:")).expanduser()
    for folder in (path, *list(path.parents)[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None


def _untrained(shape: str, config: Supervised, frames: int) -> Backbone:
    """A fresh encoder of the shape of a run, an export, a file or a model fragment."""
    if shape not in known_fragments("model"):
        if not Path(shape).expanduser().exists():
            known = ", ".join(known_fragments("model"))
            raise UserError(
                f"checkpoint={RANDOM}:{shape}: neither a run nor a model fragment ({known})"
            )
        trained = bat.load_encoder(resolve(shape), weights="student", heads=config.heads)
        keywords = trained.config()
        return type(trained)(**{**keywords, "grid": Grid(*keywords["grid"])})
    model = _model(find_fragment(f"model/{shape}"))
    return load_backbone(model.backbone)(
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
