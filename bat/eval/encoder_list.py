"""Lists the encoders of a probe run with their names and their fine-tuning results.

torch is needed only when an encoder is loaded.

``checkpoint=A,B,random``: ``random`` beside others is the same architecture untrained, one
random-init baseline for each architecture among them. Names are those of ``checkpoint_name``,
numbered if two are equal.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bat
from bat import registry
from bat.config.locate import known_fragments
from bat.config.schema import Probe, Supervised
from bat.errors import UserError
from bat.io import missing

RANDOM = "random"
"""Checkpoint name of the random-init baseline; ``random:RUN`` or ``random:S``: its architecture."""


def encoders_of(config: Probe) -> dict[str, str]:
    """Returns ``{name: checkpoint}`` in the order given.

    Raises ``UserError`` if there is none, one is empty, or one is named twice.
    """
    names = several(config)
    trained = [c for c in names if c != RANDOM and not c.startswith(f"{RANDOM}:")]
    checkpoints: list[str] = []
    for checkpoint in names:
        if checkpoint == RANDOM and trained:
            checkpoints += [f"{RANDOM}:{source}" for source in _architectures(config, trained)]
        else:
            checkpoints.append(checkpoint)
    found: dict[str, str] = {}
    for checkpoint in dict.fromkeys(checkpoints):
        stem = checkpoint_name(replace(config, checkpoint=checkpoint))
        name, number = stem, 2
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found[name] = checkpoint
    return found


def given(config: Supervised) -> str:
    """Returns the checkpoint as the user wrote it; raises ``UserError`` if there is none."""
    if not (config.checkpoint or "").strip():
        raise UserError(
            "no checkpoint given: say checkpoint=RUN (a run, an export or a weight file), or "
            "checkpoint=random for the untrained baseline; several with commas"
        )
    return str(config.checkpoint)


def path_of(checkpoint: str) -> str:
    """Returns the path in ``random:ENCODER:PATH``; without one, the text in its place."""
    return registry.split_checkpoint(checkpoint.removeprefix(f"{RANDOM}:"))[1]


def checkpoint_name(config: Supervised) -> str:
    """Returns a name for folders: ``pretrain-esc10``, ``random-pretrain-esc10``, ``random-S``."""
    name = given(config)
    prefix = RANDOM if name.startswith(f"{RANDOM}:") else ""
    rest = path_of(name)
    if prefix and registry.DOTTED.fullmatch(rest) and not Path(rest).exists():
        return f"{prefix}-{rest.rpartition('.')[2]}"
    path = Path(rest).expanduser().resolve() if Path(rest).name in ("", "..") else Path(rest)
    while path.stem in ("export", "checkpoints", "model", "last") and path.parent.name:
        path = path.parent
    stem = path.stem if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors") else path.name
    return f"{prefix}-{stem}" if prefix else stem


def check_there(config: Supervised) -> None:
    """Raise ``UserError`` for a checkpoint of ``config`` that does not exist."""
    for name in several(config) if isinstance(config, Probe) else [given(config)]:
        shape = path_of(name)
        own = registry.split_checkpoint(name.removeprefix(f"{RANDOM}:"))[0]
        if name == RANDOM or Path(shape).expanduser().exists() or registry.takes_hub_names(own):
            continue
        if not name.startswith(f"{RANDOM}:"):
            raise UserError(
                f"checkpoint {missing(shape)}: give a run (bat runs lists them), an export or a "
                "weight file"
            )
        fragments, encoders = known_fragments("model"), registry.known("encoders")
        if shape not in (*fragments, *encoders) and not registry.DOTTED.fullmatch(shape):
            raise UserError(
                f"checkpoint={name}: neither a run, a model fragment ({', '.join(fragments)}) nor "
                f"an encoder ({', '.join(encoders)} or a dotted package.module.Class)"
            )


def several(config: Supervised) -> list[str]:
    """Returns the checkpoints as the user wrote them."""
    text = given(config).strip()
    parts = [text] if Path(text).expanduser().exists() else [p.strip() for p in text.split(",")]
    if not all(parts):
        raise UserError(f"checkpoint={text} has an empty name between its commas")
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise UserError(f"checkpoint={text} names {twice[0]} twice")
    return parts


def _architectures(config: Probe, checkpoints: list[str]) -> list[str]:
    """Returns one of ``checkpoints`` for each architecture among them."""
    found: dict[str, str] = {}
    for checkpoint in checkpoints:
        encoder = bat.load_encoder(
            checkpoint,
            weights=config.weights,
            heads=config.heads,
            trust_remote_code=config.trust_remote_code,
        )
        shape = json.dumps({**encoder.config(), "drop_path": 0}, sort_keys=True, default=str)
        found.setdefault(f"{type(encoder).__name__} {shape}", checkpoint)
    return list(found.values())


def finetuned_of(
    config: Probe, names: list[str], *, task: str, metric: str, data: str
) -> dict[str, float]:
    """Returns the fine-tuning result (a fraction) of the encoders listed in ``config.finetuned``.

    ``data``: hash of the index of the probe run. Raises ``UserError`` for more entries than
    checkpoints, a number that is no percentage, and a folder that is no finished fine-tuning of
    this task on these data.
    """
    checkpoints = several(config)
    entries = [part.strip() for entry in config.finetuned for part in entry.split(",")]
    if len(entries) > len(checkpoints):
        raise UserError(
            f"finetuned={','.join(entries)} has {len(entries)} entries for {len(checkpoints)} "
            "checkpoint(s): give one each, in order, or none"
        )
    by_checkpoint = dict(zip(checkpoints, entries, strict=False))
    found = {}
    for name, checkpoint in zip(names, encoders_of(config).values(), strict=True):
        entry = by_checkpoint.get(checkpoint, "none")
        if entry != "none":
            found[name] = _finetuned(entry, task=task, metric=metric, data=data)
    return found


def _finetuned(entry: str, *, task: str, metric: str, data: str) -> float:
    """Returns the result that ``entry`` gives: a number in percent, or a run of bat-finetune."""
    try:
        percent = float(entry)
    except ValueError:
        return _of_run(Path(entry).expanduser(), task=task, metric=metric, data=data)
    if not 0 <= percent <= 100:
        raise UserError(f"finetuned={entry} is no percentage (0 to 100)")
    return percent / 100


def _of_run(folder: Path, *, task: str, metric: str, data: str) -> float:
    file = folder / "summary.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        (entry,) = run["results"].values()
        value, run_task = float(entry["mean"][metric]), run["task"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"finetuned={folder}: no finished run of bat-finetune with its {metric} there "
            f"({file}: {error}); give such a run, a number in percent, or none"
        ) from error
    if run_task != task:
        raise UserError(f"finetuned={folder} is of task '{run_task}', this probe run of '{task}'")
    if run.get("data", data) != data:
        raise UserError(
            f"finetuned={folder} was evaluated on other clips, labels or folds than this run: "
            "give a run on the same data, or its number in percent if you know that they agree"
        )
    return value
