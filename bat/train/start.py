"""Starts a pre-training from existing weights: ``init=CHECKPOINT``.

The student's encoder takes the file's weights, strictly. The objective's teacher, if it has one,
takes the file's teacher, or is a copy of the student where the file has none. All else (decoder,
optimiser, schedule, order of the clips) is as in a run from scratch; a resumed run does not read
the file again.

The encoder must be the one that the settings describe; otherwise an error names the settings that
fit. Only the grid may differ, as it has no trained weights: the position code is recomputed for the
grid of the run.
"""

from __future__ import annotations

import logging
from typing import Any

import bat
from bat import registry
from bat.config.schema import Pretrain
from bat.config.sections import Model
from bat.encoders.base import Encoder
from bat.encoders.strict import load_strictly
from bat.errors import UserError
from bat.eval.loading import registered_name, weights_digest
from bat.objectives.base import Objective
from bat.weights import read_all, resolve

log = logging.getLogger("bat")

SHAPE = (
    *("width", "depth", "heads", "patch", "mlp_ratio", "gate", "norm_order", "pos_layout"),
    *("pre_norm", "layer_scale"),
)
"""Keywords of an encoder that decide what its weights mean."""


def start_from(config: Pretrain, objective: Objective) -> dict[str, Any]:
    """Loads ``config.init`` into the encoders of ``objective`` and returns facts for the records.

    Raises:
        UserError: it is missing, unreadable or another encoder than the settings describe.
    """
    assert config.init is not None
    encoders = objective.encoders()
    has_teacher = "teacher" in encoders and _holds_teacher(config.init)
    facts: dict[str, Any] = {"checkpoint": config.init}
    for who, encoder in encoders.items():
        loaded = _load(config, "teacher" if who == "teacher" and has_teacher else "student")
        if who == "student":
            facts["weights"] = weights_digest(loaded)[:16]
            facts |= _notes(loaded, encoder)
        _fill(encoder, loaded, config)
    if "teacher" in encoders:
        facts["teacher"] = "of the file" if has_teacher else "a copy of the student"
    said = [f"the teacher is {facts['teacher']}"] if "teacher" in facts else []
    if "position_code" in facts:
        said.append(f"position code recomputed: {facts['position_code']}")
    log.info("  encoder starts from %s%s", config.init, "".join(f"; {part}" for part in said))
    if "frontend" in facts:
        log.warning(
            "  %s was trained on another input than this run's: %s", config.init, facts["frontend"]
        )
    return facts


def _load(config: Pretrain, weights: str) -> Encoder:
    assert config.init is not None
    try:
        return bat.load_encoder(config.init, weights=weights)
    except UserError as error:
        if "heads=" not in str(error):
            raise
        # the file does not state its heads, and they do not follow from its width
        return bat.load_encoder(config.init, weights=weights, heads=config.model.heads)


def _holds_teacher(init: str) -> bool:
    """Returns True if the file has the weights of a teacher, in any of the known layouts."""
    held: dict[Any, Any] = read_all(resolve(registry.split_checkpoint(init)[1]))
    parts = [held, *(part for part in held.values() if isinstance(part, dict))]
    names = [str(name) for part in parts for name in part]
    return any(n == "ema_encoder" or n.endswith("_ema") or "teacher.encoder." in n for n in names)


def _fill(encoder: Encoder, loaded: Encoder, config: Pretrain) -> None:
    """Loads the weights of ``loaded`` into ``encoder``, or raises an error with what would fit."""
    related = issubclass(type(loaded), type(encoder)) or issubclass(type(encoder), type(loaded))
    if not related:
        raise UserError(
            f"init={config.init} holds encoder '{registered_name(loaded)}', this run trains "
            f"'{config.model.backbone}': say model.backbone={registered_name(loaded)}, if its "
            "weights can be masked, or give another file"
        )
    theirs, ours = loaded.config(), encoder.config()
    wrong = [n for n in SHAPE if n in theirs and n in ours and theirs[n] != ours[n]]
    if fixed := [n for n in wrong if n not in Model.__dataclass_fields__]:
        listed = ", ".join(f"{n}={theirs[n]} (here {ours[n]})" for n in fixed)
        raise UserError(f"init={config.init} holds an encoder that this run cannot train: {listed}")
    if wrong:
        raise UserError(
            f"init={config.init} holds another encoder than the settings describe; those that fit: "
            + " ".join(f"model.{n}={_word(theirs[n])}" for n in wrong)
        )
    state = loaded.state_dict()
    if "pos_embed" in state and theirs.get("grid") != ours.get("grid"):
        state["pos_embed"] = encoder.state_dict()["pos_embed"]
    load_strictly(encoder, state, f"init={config.init}")


def _notes(loaded: Encoder, encoder: Encoder) -> dict[str, str]:
    """Returns differences that are accepted: the grid, and the front end's settings."""
    found: dict[str, str] = {}
    theirs, ours = loaded.config(), encoder.config()
    if theirs.get("grid") != ours.get("grid"):
        (old_t, old_f), (new_t, new_f) = theirs["grid"], ours["grid"]
        found["position_code"] = (
            f"{old_t} x {old_f} patches (time x frequency) in the file, {new_t} x {new_f} here"
        )
    names = ("kind", "sample_rate", "n_fft", "hop_length", "n_mels", "statistics")
    fronts = (getattr(loaded, "frontend", None), getattr(encoder, "frontend", None))
    kinds = [type(front).__name__ for front in fronts]
    changes = [] if kinds[0] == kinds[1] else [f"front end {kinds[0]} in the file, {kinds[1]} here"]
    for name in names:
        was, now = (getattr(front, name, None) for front in fronts)
        if None not in (was, now) and was != now:
            changes.append(f"frontend.{name}={was} in the file, {now} here")
    if changes:
        found["frontend"] = "; ".join(changes)
    return found


def _word(value: Any) -> str:
    """Formats a setting as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
