"""The only reader and writer of weights: strict, versioned, never an unrestricted pickle.

Pickles are read by ``bat.restricted``, within bounds; nothing in them runs.

An export is a folder with ``config.json`` (what the encoder is, how it was trained) and
``model.safetensors`` holding ``student.encoder.*`` and ``teacher.encoder.*``: the names of the
paper's released weight file. Read besides it (SPEC section 7): the paper's training file
(``encoder`` / ``decoder`` / ``ema_encoder``), its ``student.encoder.*`` file with or without a
``state_dict`` around it, a bare encoder, EAT / SSLAM files, and our own training checkpoints.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bat import restricted
from bat.shapes import UserError

FORMAT, VERSION = "bat-export", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Which = Literal["student", "teacher"]

_PICKLES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass
class EncoderFile:
    """What a file says of an encoder, before a model is built."""

    path: Path
    backbone: str
    """``bat`` or ``eat`` or the name in an export's config."""
    config: dict[str, Any] | None
    """Keywords of the backbone; None where the file does not say."""
    state: dict[str, Tensor]
    meta: dict[str, Any]
    """Of an export: the rest of ``config.json``."""


def resolve(path: str | Path) -> Path:
    """A run folder, an export folder or a file -> the export folder or file that holds weights.

    Of a fine-tuning it is the export of its only fold.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist: give a run, an export or a weight file")
    if path.is_file():
        return path
    for folder in (path, path / "export"):
        if (folder / WEIGHTS).is_file():
            return folder
    tuned = sorted(file.parent for file in path.glob(f"fold-*/export/{WEIGHTS}"))
    if len(tuned) == 1:
        return tuned[0]
    if tuned:
        raise UserError(
            f"{path} is a fine-tuning with an encoder for each held-out fold: name one of "
            f"{', '.join(map(str, tuned))}"
        )
    hint = ""
    if (path / "config.yaml").is_file():
        hint = ": the run has not finished (its export is written at the end)"
    raise UserError(f"{path} holds no {WEIGHTS}, nor does its export/ folder{hint}")


def read_encoder(path: str | Path, weights: Which = "student") -> EncoderFile:
    """Read one encoder. ``weights`` picks student or teacher where a file holds both.

    Raises ``UserError`` for what is missing, unreadable, or not a known format.
    """
    if weights not in ("student", "teacher"):
        raise UserError(f"weights='{weights}': student or teacher")
    path = resolve(path)
    if path.is_dir():
        return _read_folder(path, weights)
    held = read_tensors(path)
    if isinstance(held.get("model"), dict) and any(
        str(k).startswith("modality_encoders.") for k in held["model"]
    ):
        _only_student(path, weights)
        return EncoderFile(path, "eat", None, _tensors(held["model"], path), {})
    if isinstance(held.get("encoder"), dict) and "ema_encoder" in held:
        state = held["encoder" if weights == "student" else "ema_encoder"]
        return EncoderFile(path, "bat", None, _tensors(state, path), _training_meta(held))
    flat = held.get("state_dict", held)
    if not isinstance(flat, dict):
        raise UserError(f"{path}: its 'state_dict' is not a mapping of names to tensors")
    return EncoderFile(path, "bat", None, _pick(_tensors(flat, path), path, weights), {})


def read_tensors(path: Path) -> dict[str, Any]:
    """The mapping in a ``.safetensors`` or PyTorch file, tensors on the CPU, nothing executed."""
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in _PICKLES:
        known = " ".join((".safetensors", *_PICKLES))
        raise UserError(f"{path}: unknown kind of weight file; known: {known}")
    try:
        held = restricted.read(path)
    except (restricted.Refused, OSError) as error:
        raise UserError(
            f"{path} cannot be read without running code from it, or is damaged: {error}"
        ) from error
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__}, not a mapping of weights")
    return held


def export(
    folder: Path,
    *,
    backbone: str,
    encoder: dict[str, Any],
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    meta: dict[str, Any],
) -> Path:
    """Write an export folder, each file atomically, the weights first. Returns ``folder``.

    ``encoder``: keywords of the backbone (JSON). ``meta``: what else to say (training, labels).
    """
    tensors = {
        f"{who}.encoder.{name}": tensor.detach().cpu().contiguous()
        for who, state in (("student", student), ("teacher", teacher))
        for name, tensor in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        replace_durably(temporary, folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {folder / WEIGHTS}: {error}. Checkpoints are untouched; make room, "
            "then run the same command again"
        ) from error
    config = {"format": FORMAT, "version": VERSION, "backbone": backbone, "encoder": encoder}
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps({**config, **meta}, indent=2) + "\n", encoding="utf-8")
    replace_durably(temporary, folder / CONFIG)
    return folder


def replace_durably(temporary: Path, target: Path) -> None:
    """Flush ``temporary`` to disk, then rename it over ``target`` (same folder): all or nothing,
    after a power cut too."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:  # a file system without: the file itself is whole in any case
        pass
    finally:
        os.close(folder)


def _read_folder(folder: Path, weights: Which) -> EncoderFile:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} is missing or not JSON: {error}") from error
    state = read_tensors(folder / WEIGHTS)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is not a JSON object")
    if config.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG}: format is {config.get('format')!r}, not '{FORMAT}'")
    if config.get("version") != VERSION:
        raise UserError(
            f"{folder} is export version {config.get('version')}; this bat reads {VERSION}"
        )
    if not isinstance(config.get("backbone"), str) or not isinstance(config.get("encoder"), dict):
        raise UserError(f"{folder / CONFIG} does not say its backbone and encoder")
    return EncoderFile(
        folder,
        config["backbone"],
        config["encoder"],
        _pick(_tensors(state, folder), folder, weights),
        {k: v for k, v in config.items() if k not in ("backbone", "encoder")},
    )


def _pick(state: dict[str, Tensor], path: Path, weights: Which) -> dict[str, Tensor]:
    """The asked encoder of a flat mapping, its prefix removed."""
    if "cls_token" in state:
        _only_student(path, weights)
        return state
    prefixes = [f"{weights}.encoder.", f"objective.{weights}.encoder."]
    for prefix in prefixes:
        found = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        if found:
            return found
    names = ", ".join(list(state)[:6]) or "nothing"
    raise UserError(f"{path} holds no {weights} encoder ({prefixes[0]}*). It holds {names}, ...")


def _only_student(path: Path, weights: Which) -> None:
    if weights == "teacher":
        raise UserError(f"{path} holds one encoder, no teacher: say weights=student")


def _tensors(mapping: Any, path: Path) -> dict[str, Tensor]:
    bad = [str(k) for k, v in mapping.items() if not isinstance(v, Tensor)]
    if bad:
        raise UserError(f"{path}: these entries are not tensors: {', '.join(bad[:10])}")
    return {str(k): v for k, v in mapping.items()}


def _training_meta(held: dict[str, Any]) -> dict[str, Any]:
    steps = held.get("optimized_steps")
    return {"steps": steps} if isinstance(steps, int) else {}
