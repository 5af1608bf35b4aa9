"""Saves and loads trained heads: ``model.safetensors`` and ``config.json``.

Loading is strict: missing and unexpected weights are both errors, as for encoders. ``config.json``
says how the probe is built, for which encoder and labels, and its results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from bat.encoders.base import Encoder
from bat.encoders.strict import Range, check_settings, load_strictly
from bat.errors import UserError
from bat.eval.loading import weights_digest
from bat.io import replace_durably, write_json
from bat.probes.base import Probe, build_probe, known_probes
from bat.weights import CONFIG, WEIGHTS, check_numbers, read_json, read_tensors

FORMAT, VERSION = "bat-head", 1
SHAPE: dict[str, Range] = {
    "classes": (int, 1, 1 << 17),
    "width": (int, 1, 16_384),
    "depth": (int, 1, 512),
    "has_cls": bool,
    "level": ("clip", "frame"),
}
"""Arguments of every probe, with the allowed types and values."""
SETTINGS: dict[str, Range] = {
    **SHAPE,
    **dict.fromkeys(("prototypes", "per_class", "hidden"), (int, 1, 1 << 18)),
    **dict.fromkeys(("attention_heads", "pool_queries", "queries"), (int, 1, 1 << 12)),
    **dict.fromkeys(("lasso", "orthogonality"), (float, 0, 1e9)),
    "dropout": (float, 0, 0.999),
    "norm": bool,
}
OR_NULL = {"per_class", "hidden", "attention_heads"}


def save_head(
    folder: Path, probe: Probe, *, name: str, head: dict[str, Any], meta: dict[str, Any]
) -> Path:
    """Writes probe ``name``, built with the ``head`` settings, to ``folder``; returns that."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in probe.state_dict().items()}
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    replace_durably(temporary, folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "probe": name,
        "settings": {**{k: getattr(probe, k) for k in SHAPE}, **head},
        **meta,
    }
    write_json(folder / CONFIG, config)
    return folder


def load_head(
    folder: str | Path, *, trust: bool = False, encoder: Encoder | None = None
) -> tuple[Probe, dict[str, Any]]:
    """Loads the probe in ``folder``, in eval mode, and its ``config.json``.

    ``encoder``: the frozen encoder the probe was trained on; needed by ``vqt``, which is built from
    it. ``trust``: import a probe from outside ``bat.probes`` if the file names one: this runs code
    of the file's choosing. Raises ``UserError`` for a missing, foreign or damaged file, a probe
    from outside without ``trust``, weights that do not fit, and an encoder other than that one.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise UserError(f"{folder} is not a head of this bat (format {config.get('format')!r})")
    name, settings = config.get("probe"), config.get("settings")
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise UserError(f"{folder / CONFIG} does not say its probe and settings: it is damaged")
    if not trust and name not in known_probes():
        raise UserError(
            f"{folder / CONFIG} names probe {name!r}, which is not one of bat's own "
            f"({', '.join(known_probes())}): load_head(folder, trust=True) imports and runs it"
        )
    trained_on = config.get("encoder") or {}
    digest = trained_on.get("digest") if isinstance(trained_on, dict) else None
    if encoder is not None and digest is not None and digest != weights_digest(encoder):
        raise UserError(
            f"{folder} was trained on another encoder ({trained_on.get('checkpoint')}) than the "
            "one given: load that one"
        )
    given = {k: v for k, v in settings.items() if k in SETTINGS}
    given = {k: v for k, v in given.items() if v is not None or k not in OR_NULL}
    check_settings(str(folder / CONFIG), given, SETTINGS)
    try:
        probe = build_probe(name, **settings, encoder=encoder)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / CONFIG}: no {name} can be built from it: {error}") from error
    state = read_tensors(folder / WEIGHTS)
    check_numbers(state, str(folder / WEIGHTS))
    load_strictly(probe, state, str(folder / WEIGHTS))
    return probe.eval(), config
